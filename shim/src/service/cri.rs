//! CRI's own messages as far as they reach a shim: the sandbox API hands over kubelet's `PodSandboxConfig` whole.
//!
//! Only the fields that concern a virtual machine are declared; decoding passes over the others. Pure.
//! <https://github.com/kubernetes/cri-api/blob/master/pkg/apis/runtime/v1/api.proto>

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use prost::Message;
use serde::Deserialize;

use crate::container::ContainerId;
use crate::container::spec::host_ipc_refused;
use crate::error::{Error, Kind, Result, WithKind};
use crate::idmap::{IdMapping, IdMappings};
use crate::network;
use crate::sandbox::spec::{PodResources, SHM_BYTES, SandboxSpec};
use crate::storage::etc::{Dns, Etc};

/// The type of a sandbox's options.
const POD_SANDBOX_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// `NamespaceMode`.
const MODE_POD: i32 = 0;
const MODE_NODE: i32 = 2;

/// Sysctls that containerd adds to the spec of a pause container, with their values: any user may listen on any port, and
/// ping. The second only where the pod has no user namespace.
const UNPRIVILEGED_PORTS: (&str, &str) = ("net.ipv4.ip_unprivileged_port_start", "0");
const UNPRIVILEGED_PING: (&str, &str) = ("net.ipv4.ping_group_range", "0 2147483647");

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(message, optional, tag = "4")]
    dns_config: Option<DnsConfig>,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct DnsConfig {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security_context: Option<SecurityContext>,
    #[prost(map = "string, string", tag = "3")]
    sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    resources: Option<LinuxContainerResources>,
}

#[derive(Clone, PartialEq, Message)]
struct SecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "3")]
    ipc: i32,
    #[prost(message, optional, tag = "5")]
    userns_options: Option<UserNamespace>,
}

#[derive(Clone, PartialEq, Message)]
struct UserNamespace {
    #[prost(int32, tag = "1")]
    mode: i32,
    #[prost(message, repeated, tag = "2")]
    uids: Vec<CriIdMapping>,
    #[prost(message, repeated, tag = "3")]
    gids: Vec<CriIdMapping>,
}

/// `IDMapping`.
#[derive(Clone, Copy, PartialEq, Message)]
struct CriIdMapping {
    #[prost(uint32, tag = "1")]
    host_id: u32,
    #[prost(uint32, tag = "2")]
    container_id: u32,
    #[prost(uint32, tag = "3")]
    length: u32,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainerResources {
    #[prost(int64, tag = "1")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    cpu_quota: i64,
    #[prost(int64, tag = "4")]
    memory_limit_in_bytes: i64,
}

/// What a sandbox is asked to be, from the options of a `CreateSandbox`; no options at all are an empty configuration.
///
/// `netns_path` is the request's, empty for `hostNetwork`; `host_name` is the node's, which a pod without a name gets, as
/// under runc.
pub fn sandbox_spec(
    id: &str,
    options: Option<(&str, &[u8])>,
    netns_path: &str,
    host_name: &str,
) -> Result<SandboxSpec> {
    let config = match options {
        None => PodSandboxConfig::default(),
        Some((type_url, value)) => {
            if type_url.rsplit('/').next() != Some(POD_SANDBOX_CONFIG) {
                return Err(Error::invalid(format!(
                    "options of sandbox {id} are a {type_url:?}, accepted is {POD_SANDBOX_CONFIG}"
                )));
            }
            PodSandboxConfig::decode(value)
                .or_kind(Kind::InvalidArgument, format!("options of sandbox {id} are no {POD_SANDBOX_CONFIG}"))?
        }
    };
    let linux = config.linux.unwrap_or_default();
    let namespaces = linux.security_context.unwrap_or_default().namespace_options.unwrap_or_default();
    let netns = netns(netns_path, namespaces.network)?;
    if namespaces.ipc == MODE_NODE {
        return Err(host_ipc_refused());
    }
    let hostname = if config.hostname.is_empty() { host_name.to_owned() } else { config.hostname };
    let dns = config.dns_config.map(|dns| Dns { servers: dns.servers, searches: dns.searches, options: dns.options });
    Ok(SandboxSpec {
        id: ContainerId(id.to_owned()),
        // What `start` was told counts.
        options: None,
        netns: Some(netns),
        hostname: hostname.clone(),
        sysctls: sysctls(linux.sysctls, namespaces.userns_options.as_ref()),
        user_namespace: namespaces.userns_options.as_ref().map_or(Ok(None), user_namespace)?,
        cgroups_path: cgroups_path(&linux.cgroup_parent, id),
        limits: linux.resources.map(PodResources::from).unwrap_or_default().limits(),
        annotations: config.annotations.into_iter().collect(),
        // Nothing says what the containers will have; see `sandbox::spec` for why it is not the sandbox's -998.
        oom_score_adj: Some(0),
        shm_bytes: SHM_BYTES,
        etc: Some(Etc { hostname, dns }),
        hooks: None,
    })
}

fn netns(path: &str, mode: i32) -> Result<PathBuf> {
    if path.is_empty() || mode == MODE_NODE {
        return Err(network::host_network_refused());
    }
    if !path.starts_with('/') {
        return Err(Error::invalid(format!("path {path:?} of the network namespace is not absolute")));
    }
    Ok(path.into())
}

/// The maps of a user namespace for the pod; None for the node's.
fn user_namespace(options: &UserNamespace) -> Result<Option<IdMappings>> {
    const FIELD: &str = "linux.security_context.namespace_options.userns_options";
    match options.mode {
        MODE_NODE => return Ok(None),
        MODE_POD => {}
        other => {
            return Err(Error::invalid(format!(
                "{FIELD}.mode is {other}, expected {MODE_POD} (POD) or {MODE_NODE} (NODE)"
            )));
        }
    }
    let ranges = |map: &[CriIdMapping]| {
        map.iter()
            .map(|&CriIdMapping { host_id, container_id, length }| IdMapping { container_id, host_id, size: length })
            .collect()
    };
    let mappings = IdMappings { uids: ranges(&options.uids), gids: ranges(&options.gids) };
    let (uids, gids) = (format!("{FIELD}.uids"), format!("{FIELD}.gids"));
    match mappings.checked(&uids, &gids)? {
        Some(mappings) => mappings.with_root(&uids, &gids).map(Some),
        None => Err(Error::invalid(format!("{FIELD}.mode is POD, and uids and gids are missing"))),
    }
}

fn sysctls(asked: HashMap<String, String>, user_namespace: Option<&UserNamespace>) -> BTreeMap<String, String> {
    let mut sysctls: BTreeMap<_, _> = asked.into_iter().collect();
    let mut default = |(name, value): (&str, &str)| {
        sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    };
    default(UNPRIVILEGED_PORTS);
    if user_namespace.is_none_or(|options| options.mode != MODE_POD) {
        default(UNPRIVILEGED_PING);
    }
    sysctls
}

/// The path that containerd gives a pause container below `parent`, in the form of the cgroup driver that made it.
fn cgroups_path(parent: &str, id: &str) -> String {
    let last = Path::new(parent).file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    match parent {
        "" => String::new(),
        _ if last.ends_with(".slice") => format!("{last}:cri-containerd:{id}"),
        _ => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

impl From<LinuxContainerResources> for PodResources {
    fn from(resources: LinuxContainerResources) -> Self {
        Self {
            cpu_quota: resources.cpu_quota,
            cpu_period: resources.cpu_period,
            memory_bytes: resources.memory_limit_in_bytes,
        }
    }
}

/// `UpdateSandbox` as it became a method in containerd's API 1.12, with the fields that concern us.
#[derive(Clone, PartialEq, Message)]
pub struct UpdateSandboxRequest {
    /// Id of the sandbox.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// The sandbox as containerd has it stored.
    #[prost(message, optional, tag = "4")]
    sandbox: Option<StoredSandbox>,
    /// Paths of what has changed in it; empty for everything.
    #[prost(string, repeated, tag = "5")]
    fields: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct StoredSandbox {
    #[prost(map = "string, message", tag = "7")]
    extensions: HashMap<String, Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// Extension under which containerd's CRI stores the resources that kubelet asked for last.
const UPDATED_RESOURCES: &str = "updated-resources";

/// Its value: Go's names, and CRI's below them. The overhead concerns the host alone.
#[derive(Deserialize)]
struct UpdatedResources {
    #[serde(rename = "Resources", default)]
    resources: Option<UpdatedLimits>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct UpdatedLimits {
    cpu_period: i64,
    cpu_quota: i64,
    memory_limit_in_bytes: i64,
}

impl UpdateSandboxRequest {
    /// Decodes the bytes of a request.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Self::decode(bytes).or_kind(Kind::InvalidArgument, "request is no UpdateSandboxRequest")
    }

    /// The new limits; None if something else has changed.
    pub fn resources(&self) -> Result<Option<PodResources>> {
        let concerns = |field: &String| field.split('.').next() == Some("extensions");
        if !self.fields.is_empty() && !self.fields.iter().any(concerns) {
            return Ok(None);
        }
        let extensions = self.sandbox.as_ref().map(|sandbox| &sandbox.extensions);
        let Some(any) = extensions.and_then(|extensions| extensions.get(UPDATED_RESOURCES)) else { return Ok(None) };
        let updated: UpdatedResources = serde_json::from_slice(&any.value)
            .or_kind(Kind::InvalidArgument, format!("extension {UPDATED_RESOURCES} of the sandbox is malformed"))?;
        Ok(updated.resources.map(|limits| PodResources {
            cpu_quota: limits.cpu_quota,
            cpu_period: limits.cpu_period,
            memory_bytes: limits.memory_limit_in_bytes,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sizing::Limits;

    const NETNS: &str = "/var/run/netns/cni-1";

    fn spec_of(config: &PodSandboxConfig) -> Result<SandboxSpec> {
        sandbox_spec("pod", Some((POD_SANDBOX_CONFIG, &config.encode_to_vec())), NETNS, "node")
    }

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_pods_configuration_becomes_what_a_pause_container_tells_otherwise() {
        let dns = DnsConfig { servers: vec!["10.0.0.10".into()], searches: vec![], options: vec!["ndots:5".into()] };
        let resources =
            LinuxContainerResources { cpu_period: 100_000, cpu_quota: 50_000, memory_limit_in_bytes: 1 << 28 };
        let config = PodSandboxConfig {
            hostname: "compartment".into(),
            dns_config: Some(dns),
            annotations: map(&[("bulkhead.io/vcpus", "2")]),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".into(),
                resources: Some(resources),
                ..LinuxPodSandboxConfig::default()
            }),
        };
        let spec = spec_of(&config).expect("reads");
        assert_eq!((&*spec.id.0, &*spec.hostname, &*spec.cgroups_path), ("pod", "compartment", "/kubepods/pod1/pod"));
        assert_eq!(spec.netns.as_deref(), Some(Path::new(NETNS)));
        assert_eq!(spec.limits, Limits { cpu_milli: Some(500), memory_bytes: Some(1 << 28) });
        assert_eq!(spec.annotations["bulkhead.io/vcpus"], "2");
        assert_eq!((spec.oom_score_adj, spec.shm_bytes), (Some(0), 64 << 20));
        let dns = Dns { servers: vec!["10.0.0.10".into()], searches: vec![], options: vec!["ndots:5".into()] };
        assert_eq!(spec.etc, Some(Etc { hostname: "compartment".into(), dns: Some(dns) }));
    }

    #[test]
    fn unknown_fields_are_passed_over() {
        #[derive(Clone, PartialEq, Message)]
        struct Later {
            #[prost(string, tag = "2")]
            hostname: String,
            #[prost(string, tag = "99")]
            colour: String,
        }
        let later = Later { hostname: "compartment".into(), colour: "teal".into() }.encode_to_vec();
        let spec = sandbox_spec("pod", Some((POD_SANDBOX_CONFIG, &later)), NETNS, "node").expect("reads");
        assert_eq!(spec.hostname, "compartment");
    }

    #[test]
    fn a_pod_without_a_name_is_called_as_the_node() {
        let spec = sandbox_spec("pod", None, NETNS, "node").expect("reads");
        assert_eq!((&*spec.hostname, spec.etc), ("node", Some(Etc { hostname: "node".into(), dns: None })));
        assert_eq!(spec.limits, Limits::default());
    }

    #[test]
    fn sysctls_have_containerds_defaults_unless_the_pod_has_its_own() {
        let with = |sysctls: &[(&str, &str)], mode: Option<i32>| {
            let ids = vec![CriIdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
            let userns_options = mode.map(|mode| UserNamespace { mode, uids: ids.clone(), gids: ids });
            let namespace_options = Some(NamespaceOption { network: MODE_POD, ipc: MODE_POD, userns_options });
            let linux = LinuxPodSandboxConfig {
                sysctls: map(sysctls),
                security_context: Some(SecurityContext { namespace_options }),
                ..LinuxPodSandboxConfig::default()
            };
            spec_of(&PodSandboxConfig { linux: Some(linux), ..PodSandboxConfig::default() }).expect("reads").sysctls
        };
        let defaults = [UNPRIVILEGED_PORTS, UNPRIVILEGED_PING];
        assert_eq!(with(&[], None), map(&defaults).into_iter().collect());
        assert_eq!(with(&[], Some(MODE_NODE)), map(&defaults).into_iter().collect());
        assert_eq!(with(&[], Some(MODE_POD)), map(&defaults[..1]).into_iter().collect());
        let own = [(UNPRIVILEGED_PORTS.0, "1024"), (UNPRIVILEGED_PING.0, "1 0"), ("net.ipv4.tcp_syncookies", "0")];
        assert_eq!(with(&own, None), map(&own).into_iter().collect());
    }

    #[test]
    fn a_user_namespace_is_the_pods_or_the_nodes_or_refused_by_its_field() {
        let range = |host_id, length| CriIdMapping { host_id, container_id: 0, length };
        let of = |mode, map: Vec<CriIdMapping>| user_namespace(&UserNamespace { mode, uids: map.clone(), gids: map });
        let pods = of(MODE_POD, vec![range(100_000, 65_536)]).expect("reads").expect("is there");
        assert_eq!(pods.to_string(), "users 0:100000:65536, groups 0:100000:65536");
        assert_eq!(of(MODE_NODE, vec![]).expect("reads"), None);
        for (error, said) in [
            (of(1, vec![]), "userns_options.mode is 1"),
            (of(MODE_POD, vec![]), "uids and gids are missing"),
            (of(MODE_POD, vec![range(100_000, 0)]), "userns_options.uids has a range of 0 ids"),
        ] {
            let error = error.expect_err("is refused");
            assert_eq!(error.kind(), Kind::InvalidArgument);
            assert!(error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn cgroups_follow_the_driver_of_the_parent() {
        assert_eq!(cgroups_path("", "pod"), "");
        assert_eq!(cgroups_path("/kubepods/pod1/", "pod"), "/kubepods/pod1/pod");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod1.slice", "pod"),
            "kubepods-pod1.slice:cri-containerd:pod"
        );
    }

    #[test]
    fn the_hosts_namespaces_are_refused_in_the_same_words_as_through_the_other_door() {
        let refused = network::host_network_refused().to_string();
        assert_eq!(sandbox_spec("pod", None, "", "node").expect_err("is refused").to_string(), refused);
        let with = |network, ipc| {
            let namespace_options = Some(NamespaceOption { network, ipc, userns_options: None });
            let security_context = Some(SecurityContext { namespace_options });
            let linux = Some(LinuxPodSandboxConfig { security_context, ..LinuxPodSandboxConfig::default() });
            spec_of(&PodSandboxConfig { linux, ..PodSandboxConfig::default() }).expect_err("is refused").to_string()
        };
        assert_eq!(with(MODE_NODE, MODE_POD), refused);
        assert_eq!(with(MODE_POD, MODE_NODE), host_ipc_refused().to_string());
        sandbox_spec("pod", None, "netns/x", "node").expect_err("is refused");
    }

    #[test]
    fn options_of_another_type_are_refused_by_name() {
        let said = sandbox_spec("pod", Some(("example.Config", b"")), NETNS, "node").expect_err("is refused");
        assert!(said.to_string().contains("\"example.Config\""), "{said}");
        let broken = sandbox_spec("pod", Some((POD_SANDBOX_CONFIG, b"\xff\xff")), NETNS, "node");
        assert_eq!(broken.expect_err("is refused").kind(), Kind::InvalidArgument);
        sandbox_spec("pod", Some(("type.googleapis.com/runtime.v1.PodSandboxConfig", b"")), NETNS, "node")
            .expect("reads");
    }

    fn update(fields: &[&str], extension: Option<(&str, &str)>) -> Result<Option<PodResources>> {
        let any = |json: &str| Any { type_url: "UpdatedResources".into(), value: json.as_bytes().to_vec() };
        let extensions = extension.iter().map(|(name, json)| ((*name).to_owned(), any(json))).collect();
        let request = UpdateSandboxRequest {
            sandbox_id: "pod".into(),
            sandbox: Some(StoredSandbox { extensions }),
            fields: fields.iter().map(|field| (*field).to_owned()).collect(),
        };
        UpdateSandboxRequest::parse(&request.encode_to_vec())?.resources()
    }

    #[test]
    fn new_limits_are_read_from_where_containerd_stores_them() {
        let json = r#"{"Overhead": {"memory_limit_in_bytes": 7}, "Resources": {"cpu_period": 100000, "cpu_quota": 50000,
            "memory_limit_in_bytes": 268435456, "unified": {"x": "y"}, "later": 1}}"#;
        let expected = PodResources { cpu_quota: 50_000, cpu_period: 100_000, memory_bytes: 1 << 28 };
        for fields in [&["extensions"][..], &[], &["labels", "extensions.updated-resources"], &["extensions", "colour"]]
        {
            assert_eq!(update(fields, Some((UPDATED_RESOURCES, json))).expect("reads"), Some(expected), "{fields:?}");
        }
    }

    #[test]
    fn an_update_of_something_else_changes_nothing() {
        let json = r#"{"Resources": {"cpu_quota": 1}}"#;
        assert_eq!(update(&["labels"], Some((UPDATED_RESOURCES, json))).expect("reads"), None);
        assert_eq!(update(&["extensions"], Some(("metadata", "not JSON"))).expect("reads"), None);
        assert_eq!(update(&["extensions"], None).expect("reads"), None);
        assert_eq!(update(&[], Some((UPDATED_RESOURCES, r#"{"Resources": null}"#))).expect("reads"), None);
        assert!(update(&[], Some((UPDATED_RESOURCES, "{"))).is_err());
    }
}
