//! The daemons of a node, their command lines and their configuration.
//!
//! What is set here and why it has to be: no systemd, cgroups of either version, and a machine that may not let anybody
//! lower an oom_score_adj.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cluster::layout::Layout;
use crate::cluster::network::{DNS_SERVICE, Link, POD_RANGES, SERVICE_RANGES};
use crate::cluster::{NODE, Settings, pki};
use crate::image::PAUSE;
use crate::tools::{self, ContainerdTools, Version};

/// A program that runs as long as the node does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Daemon {
    /// Short name: that of its log.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// What is set in its environment.
    pub environment: Vec<(String, String)>,
}

/// All daemons of a node, after writing their configuration.
pub fn all(layout: &Layout, settings: &Settings, link: &Link, cgroup: &str) -> Result<Vec<Daemon>> {
    let write = |file: &str, content: &Value| -> Result<String> {
        let path = layout.root.join(file);
        fs::write(&path, serde_json::to_vec_pretty(content)?).with_context(|| format!("write {}", path.display()))?;
        Ok(path.display().to_string())
    };
    let address = link.node().to_string();
    let local = "https://127.0.0.1:6443";
    pki::kubeconfig(layout, "admin", &format!("https://{address}:6443"), &layout.kubeconfig)?;
    for component in ["kubelet", "controller-manager", "scheduler", "kube-proxy"] {
        pki::kubeconfig(layout, component, local, &layout.kubeconfig_of(component))?;
    }
    // CoreDNS answers for the cluster; for the rest of the world there is nobody to ask.
    fs::write(layout.root.join("resolv.conf"), format!("nameserver {DNS_SERVICE}\n")).context("write resolv.conf")?;
    let kubelet = write("kubelet.json", &kubelet(layout, cgroup))?;
    let proxy = write("kube-proxy.json", &proxy(layout))?;
    Ok(vec![
        plain("etcd", etcd(layout))?,
        plain("kube-apiserver", apiserver(layout, &address))?,
        plain("kube-controller-manager", controller_manager(layout))?,
        plain("kube-scheduler", scheduler(layout))?,
        containerd(layout, settings)?,
        plain(
            "kubelet",
            vec![
                format!("--config={kubelet}"),
                format!("--kubeconfig={}", layout.kubeconfig_of("kubelet").display()),
                format!("--root-dir={}", layout.root.join("kubelet").display()),
                format!("--hostname-override={NODE}"),
                format!("--node-ip={address},{}", link.node_v6()),
                // What an admin gives to nodes that have been prepared: the RuntimeClass asks for it.
                "--node-labels=bulkhead.io/ready=true".into(),
            ],
        )?,
        plain("kube-proxy", vec![format!("--config={proxy}")])?,
    ])
}

fn plain(name: &str, args: Vec<String>) -> Result<Daemon> {
    Ok(Daemon { name: name.into(), program: tools::kubernetes(name)?, args, environment: Vec::new() })
}

fn etcd(layout: &Layout) -> Vec<String> {
    vec![
        format!("--name={NODE}"),
        format!("--data-dir={}", layout.root.join("etcd").display()),
        "--listen-client-urls=http://127.0.0.1:2379".into(),
        "--advertise-client-urls=http://127.0.0.1:2379".into(),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        // A cluster to throw away: what a crash of the machine costs it does not matter.
        "--unsafe-no-fsync".into(),
    ]
}

fn apiserver(layout: &Layout, address: &str) -> Vec<String> {
    let pki = |file: &str| layout.pki(file).display().to_string();
    vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--advertise-address={address}"),
        "--secure-port=6443".into(),
        format!("--service-cluster-ip-range={}", SERVICE_RANGES.join(",")),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={}", pki("sa.pub")),
        format!("--service-account-signing-key-file={}", pki("sa.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        format!("--kubelet-client-certificate={}", pki("kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("kubelet-client.key")),
        // Nobody resolves the node's name.
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        "--requestheader-allowed-names=front-proxy-client".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        format!("--proxy-client-cert-file={}", pki("front-proxy.crt")),
        format!("--proxy-client-key-file={}", pki("front-proxy.key")),
    ]
}

fn controller_manager(layout: &Layout) -> Vec<String> {
    let pki = |file: &str| layout.pki(file).display().to_string();
    let mut args = with_kubeconfig(layout, "controller-manager");
    args.extend([
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--service-account-private-key-file={}", pki("sa.key")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        "--use-service-account-credentials=true".into(),
        // It makes this directory, by default under /usr.
        format!("--flex-volume-plugin-dir={}", layout.root.join("plugins").display()),
    ]);
    args
}

fn scheduler(layout: &Layout) -> Vec<String> {
    with_kubeconfig(layout, "scheduler")
}

fn with_kubeconfig(layout: &Layout, component: &str) -> Vec<String> {
    let file = layout.kubeconfig_of(component).display().to_string();
    vec![
        format!("--kubeconfig={file}"),
        format!("--authentication-kubeconfig={file}"),
        format!("--authorization-kubeconfig={file}"),
        "--bind-address=127.0.0.1".into(),
        // There is one of each.
        "--leader-elect=false".into(),
    ]
}

fn kubelet(layout: &Layout, cgroup: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": layout.pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": layout.pki("kubelet.crt"), "tlsPrivateKeyFile": layout.pki("kubelet.key"),
        "containerRuntimeEndpoint": format!("unix://{}", layout.socket.display()),
        "cgroupDriver": "cgroupfs", "cgroupRoot": cgroup,
        "failCgroupV1": false, "failSwapOn": false,
        // A machine need not let its root lower these or raise those.
        "oomScoreAdj": 0, "maxOpenFiles": 20000,
        "clusterDNS": [DNS_SERVICE], "clusterDomain": "cluster.local",
        "resolvConf": layout.root.join("resolv.conf"),
        "staticPodPath": layout.manifests, "fileCheckFrequency": "2s",
        "volumePluginDir": layout.root.join("plugins"),
        "syncFrequency": "10s", "nodeStatusUpdateFrequency": "4s", "volumeStatsAggPeriod": "10s",
        "evictionPressureTransitionPeriod": "10s",
        "evictionHard": {
            "memory.available": "50Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%",
        },
        // Images are imported, and could not be pulled again.
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
    })
}

fn proxy(layout: &Layout) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": layout.kubeconfig_of("kube-proxy")},
        "hostnameOverride": NODE, "mode": "iptables", "oomScoreAdj": 0, "clusterCIDR": POD_RANGES.join(","),
        // The limits belong to the machine and are read-only in a network namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

fn containerd(layout: &Layout, settings: &Settings) -> Result<Daemon> {
    let tools = ContainerdTools::find(Version::V2_4)?;
    let path = layout.root.join("containerd.toml");
    let text = containerd_configuration(layout, &tools::runc()?, settings.default_runtime.handler());
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    let inherited = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let search = format!("{}:{}:{inherited}", layout.root.join("bin").display(), tools.directory.display());
    Ok(Daemon {
        name: "containerd".into(),
        program: tools.directory.join("containerd"),
        args: vec![format!("--config={}", path.display())],
        environment: vec![
            ("PATH".into(), search),
            ("BULKHEAD_CONFIG".into(), layout.root.join("bulkhead.toml").display().to_string()),
        ],
    })
}

/// containerd's configuration: what an admin would write after README and the snippets of `runtimeclass/`, and the
/// directories of this node.
fn containerd_configuration(layout: &Layout, runc: &Path, default_runtime: &str) -> String {
    let runtime = "io.containerd.cri.v1.runtime";
    let handler = |name: &str, special: &str| {
        format!(
            "[plugins.\"{runtime}\".containerd.runtimes.{name}]\nruntime_type = \"io.containerd.bulkhead.v2\"\n\
             pod_annotations = [\"bulkhead.io/*\"]\ncontainer_annotations = [\"bulkhead.io/*\"]\n\
             privileged_without_host_devices = true\n{special}\n"
        )
    };
    format!(
        r#"version = 3
root = "{root}/containerd"
state = "/run/containerd"
temp = "{root}/containerd-temp"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.blockfile"]

[grpc]
address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{root}/opt"

[plugins."io.containerd.nri.v1.nri"]
disable = true

[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "127.0.0.1"
stream_server_port = "0"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"

[plugins."{runtime}"]
restrict_oom_score_adj = true

[plugins."{runtime}".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "{root}/cni/net.d"

[plugins."{runtime}".containerd]
default_runtime_name = "{default_runtime}"

[plugins."{runtime}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."{runtime}".containerd.runtimes.runc.options]
BinaryName = "{runc}"

{bulkhead}{sandbox}"#,
        root = layout.root.display(),
        socket = layout.socket.display(),
        runc = runc.display(),
        bulkhead = handler("bulkhead", ""),
        sandbox = handler("bulkhead-sandbox", "sandboxer = \"shim\"\ndisable_pause_image_pull = true\n"),
    )
}
