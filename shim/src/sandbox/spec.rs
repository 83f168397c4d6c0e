//! What a boot needs to know of a sandbox, whichever door it came in by. Pure.
//!
//! Through the first door, a task's Create, all of it is in an OCI spec: that of the pause container, or of a container
//! without a pod ([`SandboxSpec::of_task`]). Through the second, the sandbox API, it is in CRI's own message, which
//! `service::cri` translates; then nobody on the host makes the files of `/etc` that a pod has ([`Etc`]).

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::container::ContainerId;
use crate::container::spec::{self, Role};
use crate::error::{Kind, Result, WithKind};
use crate::hooks::Hooks;
use crate::idmap::IdMappings;
use crate::network;
use crate::sandbox::CreateTask;
use crate::sizing::Limits;
use crate::storage::etc::Etc;

/// Size of the pod's /dev/shm, as containerd makes it.
pub const SHM_BYTES: u64 = 64 << 20;

/// The version of the OCI spec whose words [`SandboxSpec::to_oci`] uses.
const OCI_VERSION: &str = "1.1.0";

/// A sandbox as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    /// Its id; for a container without a pod, the container's.
    pub id: ContainerId,
    /// The runtime options of the handler, where they come with the request: type URL and bytes of the `Any`.
    pub options: Option<(String, Vec<u8>)>,
    /// Path of the network namespace; None for no network.
    pub netns: Option<PathBuf>,
    /// Empty leaves the guest its default.
    pub hostname: String,
    /// Namespaced sysctls, by dotted name.
    pub sysctls: BTreeMap<String, String>,
    /// OCI `linux.cgroupsPath`: where the VM's processes go; empty for the default.
    pub cgroups_path: String,
    /// What the pod's containers may use together.
    pub limits: Limits,
    /// The pod's annotations, or the container's.
    pub annotations: BTreeMap<String, String>,
    /// For the VM's processes; None leaves them the shim's.
    pub oom_score_adj: Option<i32>,
    /// Size of the pod's /dev/shm.
    pub shm_bytes: u64,
    /// The maps of the pod's user namespace; None for none.
    pub user_namespace: Option<IdMappings>,
    /// The files that the shim makes for the pod's containers; None where containerd does.
    pub etc: Option<Etc>,
    /// What is run on the host at points of the life of a container without a pod; None for nothing.
    pub hooks: Option<Hooks>,
}

/// New limits of a running pod, in CRI's units: microseconds and bytes. Zero and less mean no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodResources {
    /// CPU time in a period.
    pub cpu_quota: i64,
    /// The period; zero for the kernel's.
    pub cpu_period: i64,
    /// Memory.
    pub memory_bytes: i64,
}

impl SandboxSpec {
    /// The sandbox that `task`, the first of its shim, describes; `role` is the spec's.
    ///
    /// Errors name the field or annotation that is wrong; `hostNetwork` is one of them.
    pub fn of_task(task: &CreateTask, role: Role) -> Result<Self> {
        let typed = serde_json::from_value(task.spec.clone()).or_kind(Kind::InvalidArgument, "read spec")?;
        spec::check_ipc_namespace(&task.spec)?;
        let hostname = spec::string(&task.spec, "/hostname");
        let netns = network::netns_of(&task.spec)?;
        if role == Role::Sandbox && netns.is_none() {
            return Err(network::late_network_refused());
        }
        Ok(Self {
            id: task.id.clone(),
            options: task.options.clone(),
            netns,
            // A container without a pod has its own host name by its spec.
            hostname: if hostname.is_empty() && role == Role::Single { task.id.0.clone() } else { hostname },
            sysctls: spec::sysctls(&task.spec),
            cgroups_path: spec::string(&task.spec, "/linux/cgroupsPath"),
            limits: Limits::from_spec(&typed)?,
            annotations: spec::annotations(&task.spec),
            oom_score_adj: oom_score_adj(&task.spec),
            shm_bytes: SHM_BYTES,
            user_namespace: spec::user_namespace(&task.spec)?,
            etc: None,
            hooks: match role {
                Role::Single => Hooks::of_spec(&task.spec, &task.id.0, &task.bundle)?,
                Role::Sandbox | Role::PodContainer => None,
            },
        })
    }

    /// The pod in the words of the OCI spec that a pause container would have, for those who inspect it: where its network
    /// namespace and its cgroup are found on the host, and what it was asked to be.
    pub fn to_oci(&self) -> Value {
        let network = self.netns.iter().map(|path| json!({"type": "network", "path": path}));
        json!({
            "ociVersion": OCI_VERSION,
            "hostname": self.hostname,
            "annotations": self.annotations,
            "linux": {
                "cgroupsPath": self.cgroups_path,
                "sysctl": self.sysctls,
                "namespaces": network.collect::<Vec<_>>(),
            }
        })
    }
}

impl PodResources {
    /// The same as limits of a VM.
    pub fn limits(self) -> Limits {
        Limits::new(self.cpu_quota, self.cpu_period, self.memory_bytes)
    }

    /// As OCI `linux.resources`, in which no limit is -1: what an earlier update has limited is free again.
    pub fn to_oci(self) -> Value {
        let or_none = |value: i64| if value > 0 { value } else { -1 };
        let mut cpu = json!({"quota": or_none(self.cpu_quota)});
        if self.cpu_period > 0 {
            cpu["period"] = json!(self.cpu_period);
        }
        json!({"cpu": cpu, "memory": {"limit": or_none(self.memory_bytes)}})
    }
}

/// The pod's processes are killed for want of memory as its containers would be; the sandbox's own value (-998) would make
/// the guest's memory the last that the host gets back.
fn oom_score_adj(spec: &Value) -> Option<i32> {
    let value = spec.pointer("/process/oomScoreAdj").and_then(Value::as_i64)?;
    i32::try_from(value.max(0)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::stdio::StdioPaths;

    fn task(spec: Value) -> CreateTask {
        CreateTask {
            id: ContainerId("web".into()),
            bundle: "/bundle".into(),
            rootfs: Vec::new(),
            stdio: StdioPaths::default(),
            spec,
            options: None,
        }
    }

    #[test]
    fn the_spec_of_a_pause_container_tells_everything() {
        let spec = json!({
            "ociVersion": "1.1.0",
            "hostname": "compartment",
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "oomScoreAdj": -998},
            "annotations": {
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-cpu-quota": "150000",
                "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "bulkhead.io/vcpus": "2"
            },
            "linux": {
                "cgroupsPath": "/kubepods/pod1/web",
                "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
                "namespaces": [{"type": "network", "path": "/var/run/netns/x"}, {"type": "ipc"}]
            }
        });
        let made = SandboxSpec::of_task(&task(spec), Role::Sandbox).expect("reads");
        assert_eq!((&*made.hostname, &*made.cgroups_path), ("compartment", "/kubepods/pod1/web"));
        assert_eq!(made.netns.as_deref(), Some(std::path::Path::new("/var/run/netns/x")));
        assert_eq!(made.limits, Limits { cpu_milli: Some(1500), memory_bytes: None });
        assert_eq!(made.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(made.annotations["bulkhead.io/vcpus"], "2");
        assert_eq!((made.oom_score_adj, made.etc), (Some(0), None));
    }

    #[test]
    fn a_container_without_a_pod_is_called_by_its_id() {
        let network = json!({"type": "network", "path": "/var/run/netns/x"});
        let spec = json!({"ociVersion": "1.1.0", "linux": {"namespaces": [network, {"type": "ipc"}]}});
        assert_eq!(SandboxSpec::of_task(&task(spec.clone()), Role::Single).expect("reads").hostname, "web");
        assert_eq!(SandboxSpec::of_task(&task(spec), Role::Sandbox).expect("reads").hostname, "");
    }

    #[test]
    fn a_pod_is_told_again_in_the_words_that_it_came_in() {
        let network = json!({"type": "network", "path": "/var/run/netns/x"});
        let told = json!({
            "ociVersion": "1.1.0",
            "hostname": "web",
            "annotations": {"a": "b"},
            "linux": {
                "cgroupsPath": "/kubepods/pod1/web",
                "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
                "namespaces": [network]
            }
        });
        let mut asked = told.clone();
        asked["linux"]["namespaces"] = json!([network, {"type": "ipc"}]);
        assert_eq!(SandboxSpec::of_task(&task(asked), Role::Sandbox).expect("reads").to_oci(), told);
    }

    #[test]
    fn a_pod_whose_network_comes_after_it_is_refused_and_a_lone_container_may_have_none() {
        let spec = json!({"ociVersion": "1.1.0", "linux": {"namespaces": [{"type": "ipc"}, {"type": "network"}]}});
        let said = SandboxSpec::of_task(&task(spec.clone()), Role::Sandbox).expect_err("is refused");
        assert_eq!(said.to_string(), network::late_network_refused().to_string());
        assert_eq!(SandboxSpec::of_task(&task(spec), Role::Single).expect("reads").netns, None);
    }

    #[test]
    fn a_pod_in_the_hosts_network_is_refused() {
        let said = SandboxSpec::of_task(
            &task(json!({"ociVersion": "1.1.0", "linux": {"namespaces": [{"type": "ipc"}]}})),
            Role::Sandbox,
        )
        .expect_err("is refused");
        assert_eq!(said.to_string(), network::host_network_refused().to_string());
    }

    #[test]
    fn no_limit_frees_what_was_limited() {
        let limited = PodResources { cpu_quota: 50_000, cpu_period: 100_000, memory_bytes: 1 << 20 };
        let expected = json!({"cpu": {"quota": 50_000, "period": 100_000}, "memory": {"limit": 1 << 20}});
        assert_eq!(limited.to_oci(), expected);
        assert_eq!(PodResources::default().to_oci(), json!({"cpu": {"quota": -1}, "memory": {"limit": -1}}));
        assert_eq!(PodResources::default().limits(), Limits::default());
    }
}
