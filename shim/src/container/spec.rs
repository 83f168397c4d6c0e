//! Translates an OCI runtime spec made for the host into one for the guest. Pure.
//!
//! The spec is edited as JSON, since a typed round trip would lose fields that the types do not know. What belongs to the
//! host's topology or policy is dropped, and each drop is returned for one log line; what names the host's namespaces is
//! replaced by what it means inside the pod's VM. Mounts are `storage::volume`'s.
//!
//! Spec: <https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md>

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::container::device;
use crate::error::{Error, Result};
use crate::idmap::IdMappings;
use crate::storage::block_volume::BlockVolume;

/// Annotation of CRI specs: `sandbox` or `container`.
const CONTAINER_TYPE: &[&str] = &["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

/// Annotation with Kubernetes' uid of the pod.
const POD_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// What a spec describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The pause container of a CRI pod: the pod's VM itself.
    Sandbox,
    /// A container of a CRI pod.
    PodContainer,
    /// A container without a pod, as `ctr` and nerdctl run: it has a VM of its own.
    Single,
}

/// The PID namespace that a container gets in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    Own,
    /// The pod-wide one: `pid: POD`, and also `hostPID`, since the pod is all of the host that its containers may see.
    Pod,
    /// That of the process with this host pid (`kubectl debug --target`).
    OfHostPid(u32),
}

/// A spec for the guest and what the shim must know of it.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestSpec {
    /// For the agent.
    pub spec: Value,
    /// Where its processes live.
    pub pid_namespace: PidNamespace,
    /// Block devices of the host that it gives to the container; they are no longer in `spec`.
    pub block_volumes: Vec<BlockVolume>,
    /// JSON paths of what was dropped.
    pub dropped: Vec<String>,
}

/// What the spec is for.
pub fn role(spec: &Value) -> Result<Role> {
    let annotations = annotations(spec);
    match CONTAINER_TYPE.iter().find_map(|key| annotations.get(*key)).map(String::as_str) {
        None => Ok(Role::Single),
        Some("sandbox") => Ok(Role::Sandbox),
        Some("container") => Ok(Role::PodContainer),
        Some(other) => Err(Error::invalid(format!(
            "container-type annotation is {other:?}, expected \"sandbox\" or \"container\""
        ))),
    }
}

/// The spec's annotations; what is not a string is passed over, as the spec allows only strings.
pub fn annotations(spec: &Value) -> BTreeMap<String, String> {
    let Some(map) = spec.get("annotations").and_then(Value::as_object) else { return BTreeMap::new() };
    map.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// Kubernetes' uid of the pod that the spec's container is of; None if nothing is said of one.
pub fn pod_uid(spec: &Value) -> Option<String> {
    annotations(spec).remove(POD_UID).filter(|uid| !uid.is_empty())
}

/// Fails for a pod in the host's IPC namespace, which a VM has no part in.
pub fn check_ipc_namespace(spec: &Value) -> Result<()> {
    if namespaces(spec).iter().any(|(kind, _)| kind == "ipc") {
        return Ok(());
    }
    Err(host_ipc_refused())
}

/// Error for a pod that asks for the host's IPC namespace.
pub fn host_ipc_refused() -> Error {
    Error::invalid(
        "the host's IPC namespace (hostIPC: true) is not available to a pod in a virtual machine: an IPC namespace of its \
         own is needed",
    )
}

/// The maps of the user namespace that the spec asks for; None for the guest's own.
///
/// A path that the spec gives to it is one of the host's, of a namespace with the same maps, and says nothing more.
pub fn user_namespace(spec: &Value) -> Result<Option<IdMappings>> {
    let mappings = spec.get("linux").map_or(Ok(None), |linux| IdMappings::of_oci(linux, "linux."))?;
    let asked = namespaces(spec).iter().any(|(kind, _)| kind == "user");
    match (asked, mappings) {
        (true, Some(mappings)) => mappings.with_root("linux.uidMappings", "linux.gidMappings").map(Some),
        (false, None) => Ok(None),
        (true, None) => Err(Error::invalid(
            "linux.uidMappings and linux.gidMappings are missing although linux.namespaces asks for a user namespace",
        )),
        (false, Some(_)) => Err(Error::invalid(
            "linux.uidMappings and linux.gidMappings are given although linux.namespaces asks for no user namespace",
        )),
    }
}

/// Fails for a container whose user namespace is not that of its pod, `pods`: all containers of a pod share one.
pub fn check_user_namespace(spec: &Value, pods: Option<&IdMappings>) -> Result<()> {
    let said = |mappings: Option<&IdMappings>| mappings.map_or_else(|| "none".to_owned(), ToString::to_string);
    match user_namespace(spec)? {
        own if own.as_ref() == pods => Ok(()),
        own => Err(Error::invalid(format!(
            "the user namespace by linux.namespaces and linux.uidMappings is {}, expected that of the pod, {}",
            said(own.as_ref()),
            said(pods)
        ))),
    }
}

/// The namespaced sysctls of the spec.
pub fn sysctls(spec: &Value) -> BTreeMap<String, String> {
    let Some(map) = spec.pointer("/linux/sysctl").and_then(Value::as_object) else { return BTreeMap::new() };
    map.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// A string at `pointer`, empty if there is none.
pub fn string(spec: &Value, pointer: &str) -> String {
    spec.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Translates `spec`. Its `mounts` must already be the guest's.
///
/// `sandbox_pid` is the host pid that containerd knows the sandbox by: a PID namespace of it means the pod-wide one.
pub fn translate(mut spec: Value, sandbox_pid: Option<u32>) -> Result<GuestSpec> {
    if spec.get("process").is_none_or(|process| !process.is_object()) {
        return Err(Error::invalid("spec has no process object"));
    }
    let pid_namespace = pid_namespace(&spec, sandbox_pid)?;
    let mut dropped = Vec::new();
    let root = spec.as_object_mut().ok_or_else(|| Error::invalid("spec is not a JSON object"))?;
    for key in ["hooks", "solaris", "windows", "vm", "zos"] {
        drop_key(root, "", key, &mut dropped);
    }
    // Annotations steer runtimes and tools of the host; nothing in the guest reads them.
    root.remove("annotations");
    root.remove("hostname");
    root.remove("domainname");
    if let Some(process) = root.get_mut("process").and_then(Value::as_object_mut) {
        guest_process(process, &mut dropped);
    }
    if let Some(rootfs) = root.get_mut("root").and_then(Value::as_object_mut) {
        rootfs.insert("path".into(), json!("rootfs"));
    }
    let linux = root.entry("linux").or_insert_with(|| json!({}));
    let linux = linux.as_object_mut().ok_or_else(|| Error::invalid("linux in the spec is not a JSON object"))?;
    let block_volumes = guest_linux(linux, &pid_namespace, &mut dropped)?;
    Ok(GuestSpec { spec, pid_namespace, block_volumes, dropped })
}

/// Translates the `process` object of an exec.
pub fn translate_process(mut process: Value) -> Result<Value> {
    let object = process.as_object_mut().ok_or_else(|| Error::invalid("exec spec is not a JSON object"))?;
    guest_process(object, &mut Vec::new());
    Ok(process)
}

/// Translates `linux.resources` for a container's cgroup in the guest; what was dropped is the second value.
pub fn translate_resources(mut resources: Value) -> Result<(Value, Vec<String>)> {
    let mut dropped = Vec::new();
    let object = resources.as_object_mut().ok_or_else(|| Error::invalid("resources are not a JSON object"))?;
    guest_resources(object, &mut dropped);
    Ok((resources, dropped))
}

fn guest_process(process: &mut Map<String, Value>, dropped: &mut Vec<String>) {
    // Labels name policies that are loaded on the host.
    for key in ["apparmorProfile", "selinuxLabel", "scheduler", "ioPriority", "execCPUAffinity"] {
        drop_key(process, "process.", key, dropped);
    }
}

fn guest_linux(
    linux: &mut Map<String, Value>,
    pid_namespace: &PidNamespace,
    dropped: &mut Vec<String>,
) -> Result<Vec<BlockVolume>> {
    for key in ["intelRdt", "mountLabel", "netDevices", "memoryPolicy", "personality", "timeOffsets"] {
        drop_key(linux, "linux.", key, dropped);
    }
    // The guest knows the maps of the pod's user namespace by the sandbox.
    linux.remove("uidMappings");
    linux.remove("gidMappings");
    let user = linux
        .get("namespaces")
        .and_then(Value::as_array)
        .is_some_and(|list| list.iter().any(|namespace| namespace.get("type").is_some_and(|kind| kind == "user")));
    // Before the rules that they are allowed by are dropped.
    let devices = device::take(linux)?;
    if devices.left_out {
        dropped.push("linux.devices".to_owned());
    }
    // Set once for the pod; network, UTS and IPC namespaces are the guest's own.
    linux.remove("sysctl");
    linux.remove("cgroupsPath");
    // Speaks of the host's mounts: those arrive through the share, whichever way the guest's own propagate.
    linux.remove("rootfsPropagation");
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
    if *pid_namespace == PidNamespace::Own {
        namespaces.push(json!({"type": "pid"}));
    }
    if user {
        namespaces.push(json!({"type": "user"}));
    }
    linux.insert("namespaces".into(), Value::Array(namespaces));
    if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) {
        guest_resources(resources, dropped);
    }
    Ok(devices.block_volumes)
}

/// Files of a cgroup that mean in the guest what they mean on the host, by which kubelet says how memory is protected,
/// throttled and killed for. What they hold is no promise, so none is too large for a VM: without a limit, kubelet takes
/// `memory.high` from the memory of the node.
const UNIFIED: &[&str] = &["memory.high", "memory.low", "memory.min", "memory.oom.group"];

fn guest_resources(resources: &mut Map<String, Value>, dropped: &mut Vec<String>) {
    let at = "linux.resources.";
    for key in ["hugepageLimits", "blockIO", "network", "rdma"] {
        drop_key(resources, at, key, dropped);
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        // Ids of the host's CPUs and memory nodes, and kinds of CPU time that the agent does not set.
        for key in ["cpus", "mems", "realtimeRuntime", "realtimePeriod", "burst"] {
            drop_key(cpu, "linux.resources.cpu.", key, dropped);
        }
    }
    if let Some(memory) = resources.get_mut("memory").and_then(Value::as_object_mut) {
        // The guest has no swap, so these would be refused or mean something else. Swap as large as memory is none.
        if memory.get("swap").is_some() && memory.get("swap") == memory.get("limit") {
            memory.remove("swap");
        }
        for key in ["swap", "swappiness", "kernel", "kernelTCP"] {
            drop_key(memory, "linux.resources.memory.", key, dropped);
        }
        memory.remove("useHierarchy");
    }
    if let Some(unified) = resources.get_mut("unified").and_then(Value::as_object_mut) {
        let foreign: Vec<_> = unified.keys().filter(|key| !UNIFIED.contains(&key.as_str())).cloned().collect();
        for key in foreign {
            unified.remove(&key);
            dropped.push(format!("linux.resources.unified.{key}"));
        }
        if unified.is_empty() {
            resources.remove("unified");
        }
    }
    // Other numbers are those of the host's devices; the agent's own default rules hold the standard ones, and it makes those
    // of disks.
    if let Some(devices) = resources.get_mut("devices").and_then(Value::as_array_mut) {
        devices
            .retain(|rule| (rule.get("major").is_none() && rule.get("minor").is_none()) || device::is_in_guest(rule));
    }
}

/// Removes `key`, and notes it unless it was empty.
fn drop_key(map: &mut Map<String, Value>, prefix: &str, key: &str, dropped: &mut Vec<String>) {
    let Some(value) = map.remove(key) else { return };
    let empty = match &value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    if !empty {
        dropped.push(format!("{prefix}{key}"));
    }
}

fn namespaces(spec: &Value) -> Vec<(String, Option<String>)> {
    let Some(list) = spec.pointer("/linux/namespaces").and_then(Value::as_array) else { return Vec::new() };
    list.iter()
        .filter_map(|entry| {
            let kind = entry.get("type")?.as_str()?.to_owned();
            let path = entry.get("path").and_then(Value::as_str).filter(|path| !path.is_empty());
            Some((kind, path.map(str::to_owned)))
        })
        .collect()
}

fn pid_namespace(spec: &Value, sandbox_pid: Option<u32>) -> Result<PidNamespace> {
    let Some((_, path)) = namespaces(spec).into_iter().find(|(kind, _)| kind == "pid") else {
        return Ok(PidNamespace::Pod);
    };
    let Some(path) = path else { return Ok(PidNamespace::Own) };
    let pid =
        path.strip_prefix("/proc/").and_then(|rest| rest.strip_suffix("/ns/pid")).and_then(|pid| pid.parse().ok());
    match pid {
        Some(pid) if Some(pid) == sandbox_pid => Ok(PidNamespace::Pod),
        Some(pid) => Ok(PidNamespace::OfHostPid(pid)),
        None => Err(Error::invalid(format!(
            "PID namespace {path:?} in linux.namespaces, expected /proc/<pid of a container of this pod>/ns/pid or none"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: Value) -> Value {
        json!({
            "ociVersion": "1.1.0",
            "process": {"args": ["sh"], "cwd": "/", "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": ""},
            "root": {"path": "/run/containerd/io.containerd.runtime.v2.task/k8s.io/a/rootfs", "readonly": true},
            "hostname": "web",
            "mounts": [],
            "annotations": {"io.kubernetes.cri.container-type": "container"},
            "hooks": {"prestart": [{"path": "/usr/bin/hook"}]},
            "linux": {
                "namespaces": namespaces,
                "cgroupsPath": "/kubepods/pod1/a",
                "rootfsPropagation": "rslave",
                "sysctl": {"net.ipv4.ip_forward": "1"},
                "intelRdt": {"closID": "x"},
                "resources": {
                    "cpu": {"shares": 512, "cpus": "0-3", "mems": ""},
                    "memory": {"limit": 1_048_576, "swap": 1_048_576},
                    "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                    "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "major": 1, "minor": 3, "access": "rwm"}],
                    "unified": {}
                },
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                "maskedPaths": ["/proc/kcore"]
            }
        })
    }

    #[test]
    fn host_topology_is_dropped_and_named_and_policy_of_the_guest_stays() {
        let guest = translate(spec(json!([{"type": "pid"}, {"type": "network", "path": "/var/run/netns/x"}])), None)
            .expect("translates");
        assert_eq!(guest.pid_namespace, PidNamespace::Own);
        assert_eq!(
            guest.spec["linux"],
            json!({
                "namespaces": [{"type": "mount"}, {"type": "cgroup"}, {"type": "pid"}],
                "resources": {
                    "cpu": {"shares": 512},
                    "memory": {"limit": 1_048_576},
                    "devices": [{"allow": false, "access": "rwm"}]
                },
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                "maskedPaths": ["/proc/kcore"]
            })
        );
        assert_eq!(guest.spec["process"], json!({"args": ["sh"], "cwd": "/"}));
        assert_eq!(guest.spec["root"], json!({"path": "rootfs", "readonly": true}));
        assert!(guest.spec.get("annotations").is_none() && guest.spec.get("hostname").is_none());
        assert_eq!(
            guest.dropped,
            [
                "hooks",
                "process.apparmorProfile",
                "linux.intelRdt",
                "linux.resources.hugepageLimits",
                "linux.resources.cpu.cpus"
            ]
        );
    }

    #[test]
    fn block_devices_and_their_rules_leave_the_spec_with_the_access_that_they_had() {
        let mut asked = spec(json!([{"type": "pid"}]));
        asked["linux"]["devices"] = json!([{"path": "/dev/data", "type": "b", "major": 7, "minor": 5}]);
        let rules = asked["linux"]["resources"]["devices"].as_array_mut().expect("is an array");
        rules.push(json!({"allow": true, "type": "b", "major": 7, "minor": 5, "access": "r"}));
        let guest = translate(asked, None).expect("translates");
        assert_eq!(guest.spec["linux"]["devices"], json!([]));
        assert_eq!(guest.spec["linux"]["resources"]["devices"], json!([{"allow": false, "access": "rwm"}]));
        let [volume] = &guest.block_volumes[..] else { panic!("{:?}", guest.block_volumes) };
        assert_eq!((volume.path.as_str(), volume.access.as_str()), ("/dev/data", "r"));
        assert!(!guest.dropped.contains(&"linux.devices".to_owned()));
    }

    #[test]
    fn resources_of_the_host_are_dropped_and_named_one_by_one() {
        let asked = json!({
            "cpu": {"quota": 50_000, "cpus": "0-3", "mems": "0", "burst": 1000},
            "memory": {"limit": 1_048_576, "swap": 2_097_152, "swappiness": 10, "useHierarchy": true},
            "pids": {"limit": 10},
            "blockIO": {"weight": 10},
            "unified": {
                "memory.high": "900000", "memory.oom.group": "1", "io.max": "8:0 rbps=1", "hugetlb.2MB.max": "0"
            }
        });
        let (resources, dropped) = translate_resources(asked).expect("translates");
        assert_eq!(
            resources,
            json!({
                "cpu": {"quota": 50_000},
                "memory": {"limit": 1_048_576},
                "pids": {"limit": 10},
                "unified": {"memory.high": "900000", "memory.oom.group": "1"}
            })
        );
        assert_eq!(
            dropped,
            [
                "linux.resources.blockIO",
                "linux.resources.cpu.cpus",
                "linux.resources.cpu.mems",
                "linux.resources.cpu.burst",
                "linux.resources.memory.swap",
                "linux.resources.memory.swappiness",
                "linux.resources.unified.hugetlb.2MB.max",
                "linux.resources.unified.io.max"
            ]
        );
        let (resources, dropped) = translate_resources(json!({"unified": {"io.max": "x"}})).expect("translates");
        assert_eq!((resources, dropped.len()), (json!({}), 1));
        translate_resources(json!("1Gi")).expect_err("is refused");
    }

    #[test]
    fn no_path_of_the_host_is_left() {
        let guest = translate(
            spec(json!([{"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "ipc", "path": "/proc/77/ns/ipc"}])),
            Some(77),
        )
        .expect("translates");
        let text = guest.spec.to_string();
        for host_path in ["/proc/77", "/run/containerd", "/kubepods", "/usr/bin/hook"] {
            assert!(!text.contains(host_path), "{host_path} in {text}");
        }
    }

    #[test]
    fn each_way_to_name_a_pid_namespace_has_its_meaning() {
        let of = |namespaces| pid_namespace(&spec(namespaces), Some(77));
        assert_eq!(of(json!([{"type": "pid"}])).expect("own"), PidNamespace::Own);
        assert_eq!(of(json!([])).expect("hostPID"), PidNamespace::Pod);
        assert_eq!(of(json!([{"type": "pid", "path": "/proc/77/ns/pid"}])).expect("pod"), PidNamespace::Pod);
        assert_eq!(
            of(json!([{"type": "pid", "path": "/proc/78/ns/pid"}])).expect("target"),
            PidNamespace::OfHostPid(78)
        );
        let error = of(json!([{"type": "pid", "path": "/etc/shadow"}])).expect_err("refused");
        assert!(error.to_string().contains("/etc/shadow"));
    }

    #[test]
    fn a_pod_in_the_hosts_ipc_namespace_is_refused_by_the_name_of_the_field() {
        let error = check_ipc_namespace(&spec(json!([{"type": "pid"}]))).expect_err("refused");
        assert_eq!(error.kind(), crate::error::Kind::InvalidArgument);
        assert!(error.to_string().contains("hostIPC"));
        assert!(check_ipc_namespace(&spec(json!([{"type": "ipc"}]))).is_ok());
    }

    fn in_user_namespace(namespaces: Value, host_id: u32) -> Value {
        let mut spec = spec(namespaces);
        for key in ["uidMappings", "gidMappings"] {
            spec["linux"][key] = json!([{"containerID": 0, "hostID": host_id, "size": 65_536}]);
        }
        spec
    }

    #[test]
    fn a_user_namespace_stays_and_loses_what_is_the_hosts() {
        let asked = in_user_namespace(json!([{"type": "pid"}, {"type": "user", "path": "/proc/77/ns/user"}]), 100_000);
        assert_eq!(user_namespace(&asked).expect("reads").expect("is there").uids[0].host_id, 100_000);
        let guest = translate(asked, Some(77)).expect("translates");
        let expected = json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "pid"}, {"type": "user"}]);
        assert_eq!(guest.spec["linux"]["namespaces"], expected);
        assert!(guest.spec["linux"].get("uidMappings").is_none());
        assert_eq!(user_namespace(&spec(json!([{"type": "pid"}]))).expect("reads"), None);
    }

    #[test]
    fn a_user_namespace_other_than_the_pods_is_refused_by_its_fields() {
        let user = json!([{"type": "user"}]);
        let pods = user_namespace(&in_user_namespace(user.clone(), 100_000)).expect("reads");
        check_user_namespace(&in_user_namespace(user.clone(), 100_000), pods.as_ref()).expect("is the same");
        check_user_namespace(&spec(json!([])), None).expect("there is none");
        let refused = |spec: &Value, pods: Option<&IdMappings>| {
            let error = check_user_namespace(spec, pods).expect_err("is refused");
            assert_eq!(error.kind(), crate::error::Kind::InvalidArgument);
            error.to_string()
        };
        assert_eq!(
            refused(&in_user_namespace(user.clone(), 200_000), pods.as_ref()),
            "the user namespace by linux.namespaces and linux.uidMappings is users 0:200000:65536, groups 0:200000:65536, \
             expected that of the pod, users 0:100000:65536, groups 0:100000:65536"
        );
        assert!(refused(&spec(json!([])), pods.as_ref()).contains("is none, expected that of the pod, users 0:100000"));
        assert!(refused(&spec(user), None).contains("linux.uidMappings and linux.gidMappings are missing"));
        assert!(refused(&in_user_namespace(json!([]), 1), None).contains("asks for no user namespace"));
    }

    #[test]
    fn the_role_comes_from_the_annotation_and_nothing_else() {
        assert_eq!(role(&spec(json!([]))).expect("known"), Role::PodContainer);
        assert_eq!(role(&json!({})).expect("known"), Role::Single);
        let error = role(&json!({"annotations": {"io.kubernetes.cri.container-type": "vm"}})).expect_err("refused");
        assert!(error.to_string().contains("\"vm\""));
    }
}
