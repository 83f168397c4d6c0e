//! Volumes: the mounts of an OCI spec, each shared with the guest, kept as a mount of the guest's own, or refused.
//!
//! [`plan_volumes`] is pure; [`super::bind`] acts on it. What happens to a mount:
//!
//! | mount of the spec | in the guest |
//! |---|---|
//! | proc, sysfs, tmpfs, devpts, mqueue, cgroup and their like | the same: the guest's own |
//! | bind of the sandbox's shm directory, or of the host's `/dev/shm`, to `/dev/shm` | the pod-wide `/dev/shm` (`shm:`) |
//! | bind of a memory-backed `emptyDir` | a tmpfs of the guest (`memory:<volume>`); see [`super::memory`] |
//! | bind of any other file or directory | bound from the share (`share:<container>/<n>`, or, for what containers of a pod have in common, see [`super::common`]) |
//! | bind of a kernel file system of the host (`/proc`, `/sys`, `/sys/fs/cgroup`, `/dev`, ...) | a fresh one of that type, which shows the guest's kernel: the host's would describe the wrong machine |
//! | bind of anything below `/proc`, `/sys` or `/dev` | refused: there is nothing in the guest that could be meant |
//! | any other type | refused |
//!
//! Directories are shared as they are, so updates of `ConfigMap`s, Secrets and projected tokens arrive; a file is shared by
//! itself, never its directory. Id-mapped binds are mapped on the host ([`super::bind`]), by the kernel that has the file
//! system: the guest sees the owners as they are in the user namespace's parent, and makes that namespace with the same maps.
//! So what it writes has the owner on the host that it would have with runc, mapped or not.
//! See <https://github.com/opencontainers/runtime-spec/blob/main/config.md#mounts>.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bulkhead_proto::{SHARE_SCHEME, SHM_SOURCE};
use serde_json::{Map, Value, json};

use super::bind::{Bind, refusal, share_path};
use super::spec_mount::SpecMount;
use crate::error::{Error, Result};
use crate::idmap::IdMappings;
use crate::mount_table::MountTable;
use crate::namespace::{Access, Propagation};

/// Whose volumes are planned.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// The container; names its directory in the share.
    pub container_id: &'a str,
    /// The sandbox; tells its shm directory from a volume.
    pub sandbox_id: &'a str,
    /// Kubernetes' uid of the pod; None where nobody says. Tells its volumes from those of other pods.
    pub pod_uid: Option<&'a str>,
    /// Directory of the spec; relative sources begin here.
    pub bundle: &'a Path,
    /// The maps of its user namespace, which `idmap` without maps of its own means; None if it has none.
    pub user_namespace: Option<&'a IdMappings>,
}

/// What becomes of a spec's mounts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VolumePlan {
    /// The `mounts` of the guest's spec, in the order of the host's.
    pub guest_mounts: Vec<Value>,
    /// What [`super::bind::attach`] puts into the share.
    pub binds: Vec<Bind>,
    /// What was asked for and is left out; each a phrase for the log.
    pub notes: Vec<String>,
}

/// File systems without a host source that a guest mounts itself.
const GUEST_TYPES: [&str; 16] = [
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "proc",
    "ramfs",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// Where a host has its kernel file systems, and which type shows the same of the guest.
const KERNEL_SOURCES: [(&str, &str); 11] = [
    ("/dev", "devtmpfs"),
    ("/dev/hugepages", "hugetlbfs"),
    ("/dev/mqueue", "mqueue"),
    ("/dev/pts", "devpts"),
    ("/proc", "proc"),
    ("/sys", "sysfs"),
    ("/sys/fs/bpf", "bpf"),
    ("/sys/fs/cgroup", "cgroup"),
    ("/sys/kernel/debug", "debugfs"),
    ("/sys/kernel/security", "securityfs"),
    ("/sys/kernel/tracing", "tracefs"),
];

/// Decides what becomes of `mounts` in an OCI `spec`.
pub fn plan_volumes(spec: &Value, owner: Owner<'_>) -> Result<VolumePlan> {
    let mut plan = VolumePlan::default();
    let mounts = match spec.get("mounts") {
        None | Some(Value::Null) => return Ok(plan),
        Some(Value::Array(mounts)) => mounts,
        Some(_) => return Err(Error::invalid("spec: mounts is not a list")),
    };
    for (index, value) in mounts.iter().enumerate() {
        let mount = SpecMount::parse(value).map_err(|error| error.context(format!("spec: mounts[{index}]")))?;
        let guest_mount = plan_mount(&mount, owner, &mut plan)?;
        plan.guest_mounts.push(guest_mount);
    }
    Ok(plan)
}

fn plan_mount(mount: &SpecMount, owner: Owner<'_>, plan: &mut VolumePlan) -> Result<Value> {
    let destination = mount.destination.clone();
    if !mount.is_bind() {
        if !GUEST_TYPES.contains(&mount.fstype.as_str()) {
            return Err(Error::invalid(format!(
                "mount at {destination:?}: type {:?} is not supported; accepted are bind, {}",
                mount.fstype,
                GUEST_TYPES.join(", ")
            )));
        }
        if mount.mappings.is_some() || mount.has("idmap") || mount.has("ridmap") {
            return Err(Error::invalid(format!(
                "mount at {destination:?}: uidMappings of a {} are not supported; accepted are those of a bind",
                mount.fstype
            )));
        }
        // Such a source is a label. If it looks like a path of the host it stays on the host all the same.
        let source = if mount.source.contains('/') { mount.fstype.clone() } else { mount.source.clone() };
        return Ok(oci_mount(&destination, &mount.fstype, &source, &mount.options));
    }
    if mount.source.is_empty() {
        return Err(Error::invalid(format!("mount at {destination:?}: a bind needs a source")));
    }
    let source = lexical(&owner.bundle.join(&mount.source));
    if is_pod_shm(&source, &destination, owner.sandbox_id) {
        let mut options = vec!["rbind".to_owned()];
        options.extend(mount.guest_options());
        return Ok(oci_mount(&destination, "bind", SHM_SOURCE, &options));
    }
    if let Some((_, fstype)) = KERNEL_SOURCES.iter().find(|(path, _)| Path::new(path) == source) {
        plan.notes.push(format!("mount at {destination}: {} of the guest instead of the host's", source.display()));
        return Ok(oci_mount(&destination, fstype, fstype, &mount.guest_options()));
    }
    if ["/proc", "/sys", "/dev"].iter().any(|kernel| source.starts_with(kernel)) {
        return Err(refusal(&source, &destination));
    }
    if let Some(shared) = ["rshared", "shared"].into_iter().find(|option| mount.has(option)) {
        return Err(Error::invalid(format!(
            "mount at {destination:?}: propagation {shared} (Bidirectional) cannot be had, accepted are rprivate (None) and \
             rslave (HostToContainer): mounts made in a virtual machine do not reach the host"
        )));
    }
    let slave = ["slave", "rslave"].iter().any(|option| mount.has(option));
    let bind = Bind {
        index: plan.binds.len(),
        destination,
        recursive: mount.has("rbind") || mount.fstype == "rbind",
        access: mount.access(),
        propagation: if slave { Propagation::Slave } else { Propagation::Private },
        ids: mount.ids(owner.user_namespace)?,
        source,
    };
    // Recursive whatever the spec says: what lies below is the host's decision, made when the tree was cloned.
    let mut options = vec!["rbind".to_owned()];
    options.extend(mount.guest_options());
    let guest_mount = oci_mount(&bind.destination, "bind", &share_source(owner.container_id, bind.index), &options);
    plan.binds.push(bind);
    Ok(guest_mount)
}

impl VolumePlan {
    /// Takes a bind out, so that nothing is attached for it; its number stays its own.
    pub(super) fn take_bind(&mut self, index: usize) -> Option<Bind> {
        let at = self.binds.iter().position(|bind| bind.index == index)?;
        Some(self.binds.remove(at))
    }

    /// The guest's mount of the bind `index` of `container_id`.
    pub(super) fn guest_mount_of(&mut self, container_id: &str, index: usize) -> Option<&mut Map<String, Value>> {
        let shared = json!(share_source(container_id, index));
        let mount = self.guest_mounts.iter_mut().find(|mount| mount.get("source") == Some(&shared));
        mount.and_then(Value::as_object_mut)
    }
}

fn share_source(container_id: &str, index: usize) -> String {
    format!("{SHARE_SCHEME}{}", share_path(container_id, index))
}

fn oci_mount(destination: &str, fstype: &str, source: &str, options: &[String]) -> Value {
    let mut mount = Map::new();
    mount.insert("destination".into(), json!(destination));
    mount.insert("type".into(), json!(fstype));
    if !source.is_empty() {
        mount.insert("source".into(), json!(source));
    }
    if !options.is_empty() {
        mount.insert("options".into(), json!(options));
    }
    Value::Object(mount)
}

/// containerd and CRI-O keep a sandbox's shm in `.../<sandbox id>/.../shm`; a volume that a user mounts at `/dev/shm` lies
/// elsewhere and stays a volume.
fn is_pod_shm(source: &Path, destination: &str, sandbox_id: &str) -> bool {
    lexical(Path::new(destination)) == Path::new("/dev/shm")
        && (source == Path::new("/dev/shm")
            || (source.ends_with("shm") && source.iter().any(|part| part.to_str() == Some(sandbox_id))))
}

/// Removes `.` and `..` by the letters of the path alone.
fn lexical(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Leaves read-only binds with mounts below them to the share, which refuses writes to the topmost mount alone.
///
/// The guest's kernel meets the mounts below when somebody walks into them, and would give them the flags of what they lie
/// on: read-only, where `ro` of the OCI spec leaves them as they are.
pub async fn spare_mounts_below(container_id: &str, plan: &mut VolumePlan, table: &Arc<MountTable>) -> Result<()> {
    let topmost_only = |bind: &&Bind| bind.recursive && bind.access == Access::ReadOnly;
    let candidates: Vec<(usize, PathBuf)> =
        plan.binds.iter().filter(topmost_only).map(|bind| (bind.index, bind.source.clone())).collect();
    if candidates.is_empty() {
        return Ok(());
    }
    let table = Arc::clone(table);
    let spared = tokio::task::spawn_blocking(move || {
        let below = |(index, source): (usize, PathBuf)| table.has_mounts_below(&source).then_some(index);
        candidates.into_iter().filter_map(below).collect::<Vec<_>>()
    });
    for index in spared.await.map_err(|error| Error::internal(format!("look for mounts below volumes: {error}")))? {
        let mount = plan.guest_mount_of(container_id, index);
        if let Some(options) = mount.and_then(|mount| mount.get_mut("options")).and_then(Value::as_array_mut) {
            options.retain(|option| option != "ro");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SANDBOX: &str = "5f2d";

    fn owner(user_namespace: Option<&IdMappings>) -> Owner<'_> {
        let bundle = Path::new("/bundle");
        Owner { container_id: "web", sandbox_id: SANDBOX, pod_uid: None, bundle, user_namespace }
    }

    fn plan(mounts: &Value) -> Result<VolumePlan> {
        plan_volumes(&json!({ "mounts": mounts }), owner(None))
    }

    fn bind(source: &str, destination: &str, options: &[&str]) -> Value {
        json!({"destination": destination, "type": "bind", "source": source, "options": options})
    }

    #[test]
    fn the_mounts_of_a_cri_container_become_the_golden_file() {
        let spec: Value = serde_json::from_str(include_str!("testdata/cri-spec.json")).expect("is JSON");
        let plan = plan_volumes(&spec, owner(None)).expect("is planned");
        let binds: Vec<String> = plan
            .binds
            .iter()
            .map(|bind| {
                let how = if bind.recursive { "rbind" } else { "bind" };
                format!("{} {} {how} {:?} {:?}", bind.index, bind.source.display(), bind.access, bind.propagation)
            })
            .collect();
        let planned = json!({ "mounts": plan.guest_mounts, "binds": binds, "notes": plan.notes });
        let planned = serde_json::to_string_pretty(&planned).expect("is JSON") + "\n";
        assert_eq!(
            planned,
            include_str!("testdata/cri-volumes.json"),
            "the plan differs from testdata/cri-volumes.json"
        );
    }

    #[test]
    fn only_the_sandbox_s_own_shm_is_the_pod_s() {
        let shm = format!("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/{SANDBOX}/shm");
        let pod = plan(&json!([bind(&shm, "/dev/shm", &["rbind", "ro"])])).expect("is planned");
        assert_eq!(pod.guest_mounts[0]["source"], "shm:");
        assert_eq!(pod.guest_mounts[0]["options"], json!(["rbind", "ro"]));
        let own = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/shm";
        let volume = plan(&json!([bind(own, "/dev/shm", &["rbind"])])).expect("is planned");
        assert_eq!(volume.guest_mounts[0]["source"], "share:web/0");
        let elsewhere = plan(&json!([bind(&shm, "/shm", &["rbind"])])).expect("is planned");
        assert_eq!(elsewhere.guest_mounts[0]["source"], "share:web/0");
    }

    #[test]
    fn kernel_file_systems_are_the_guest_s_and_what_lies_in_them_is_refused() {
        let planned = plan(&json!([bind("/sys/fs/cgroup/", "/sys/fs/cgroup", &["rbind", "ro", "rslave"])]));
        let planned = planned.expect("is planned");
        assert_eq!(planned.guest_mounts[0]["type"], "cgroup");
        assert_eq!(planned.guest_mounts[0]["options"], json!(["ro"]));
        assert!(planned.binds.is_empty());
        for source in ["/dev/fuse", "/proc/1/root", "/sys/class/net", "/srv/../dev/kvm"] {
            let error = plan(&json!([bind(source, "/x", &["bind"])])).expect_err(source).to_string();
            assert!(error.contains("to \"/x\": devices and kernel files"), "{error}");
        }
    }

    #[test]
    fn the_last_access_option_wins_and_recursion_is_told_apart() {
        let access = |options: &[&str]| plan(&json!([bind("/a", "/x", options)])).expect("is planned").binds[0].access;
        assert_eq!(access(&["rbind"]), Access::Writable);
        assert_eq!(access(&["ro", "rw"]), Access::Writable);
        assert_eq!(access(&["rw", "ro"]), Access::ReadOnly);
        assert_eq!(access(&["rro"]), Access::ReadOnlyRecursive);
    }

    #[test]
    fn id_mappings_are_the_mounts_own_or_the_containers() {
        let map = json!([{"containerID": 0, "hostID": 65_536, "size": 65_536}]);
        let pods = IdMappings::of_mount_options(Some("0:100000:65536"), Some("0:100000:65536")).expect("reads");
        let ids = |mount: Value, user_namespace: Option<&IdMappings>| {
            let owner = Owner {
                container_id: "web",
                sandbox_id: SANDBOX,
                pod_uid: None,
                bundle: Path::new("/bundle"),
                user_namespace,
            };
            let planned = plan_volumes(&json!({ "mounts": [mount] }), owner)?;
            let text = planned.guest_mounts[0].to_string();
            assert!(!text.contains("idmap") && !text.contains("Mappings"), "{text}");
            let ids = planned.binds.into_iter().next().and_then(|bind| bind.ids);
            Ok::<_, Error>(ids.map(|ids| (ids.mappings.uids[0].host_id, ids.recursive)))
        };
        let own = json!({
            "destination": "/data", "type": "bind", "source": "/a", "options": ["rbind"],
            "uidMappings": map, "gidMappings": map,
        });
        assert_eq!(ids(own, pods.as_ref()).expect("is planned"), Some((65_536, false)));
        assert_eq!(
            ids(bind("/a", "/data", &["rbind", "ridmap"]), pods.as_ref()).expect("is planned"),
            Some((100_000, true))
        );
        assert_eq!(ids(bind("/a", "/data", &["rbind"]), pods.as_ref()).expect("is planned"), None);
        let error = ids(bind("/a", "/data", &["rbind", "idmap"]), None).expect_err("is refused").to_string();
        assert!(error.contains("option idmap needs uidMappings"), "{error}");
        let tmpfs = json!({"destination": "/t", "type": "tmpfs", "uidMappings": map, "gidMappings": map});
        let error = ids(tmpfs, None).expect_err("is refused").to_string();
        assert!(error.contains("uidMappings of a tmpfs are not supported"), "{error}");
        // The pod's own shared memory belongs to its root as it is.
        let shm = json!({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "uidMappings": map, "gidMappings": map});
        assert_eq!(ids(shm, None).expect("is planned"), None);
    }

    #[test]
    fn no_path_of_the_host_reaches_the_guest() {
        let mounts = json!([
            bind("/srv/secret", "/a", &["rbind"]),
            bind("relative", "/b", &["bind"]),
            {"destination": "/c", "type": "tmpfs", "source": "/srv/secret", "options": ["size=1m"]},
        ]);
        let planned = plan(&mounts).expect("is planned");
        let guest = Value::Array(planned.guest_mounts).to_string();
        assert!(!guest.contains("secret") && !guest.contains("bundle") && !guest.contains("relative"), "{guest}");
        assert_eq!(planned.binds[1].source, Path::new("/bundle/relative"));
    }

    #[test]
    fn broken_mounts_are_refused_by_name() {
        let refused = |mount: Value| plan(&json!([mount])).expect_err("is refused").to_string();
        assert!(refused(json!({"type": "tmpfs"})).contains("mounts[0]: destination"));
        assert!(refused(json!({"destination": "/a", "type": "nfs"})).contains("\"nfs\""));
        assert!(refused(json!({"destination": "/a", "type": "bind"})).contains("needs a source"));
        assert!(refused(json!({"destination": 3})).contains("destination is not a string"));
        assert!(refused(json!({"destination": "/a", "type": "tmpfs", "options": [1]})).contains("options"));
    }
}
