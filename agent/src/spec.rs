//! The OCI spec of a container as libcontainer shall see it in this guest. Pure: no effects, no clock, no files.
//!
//! The JSON is edited in place rather than parsed and written again, so that fields this version does not know survive.
//! OCI runtime: <https://github.com/opencontainers/runtime-spec/blob/main/config.md>

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bulkhead_proto::{MEMORY_SCHEME, SHARE_SCHEME, SHM_SOURCE};
use oci_spec::runtime::{LinuxResources, LinuxSeccomp, LinuxSeccompAction, Process};
use serde_json::{Map, Value, json};

use crate::cgroup;
use crate::error::{Error, Result};

/// Where the pod's virtiofs share is mounted.
pub const SHARE: &str = "/run/bulkhead/share";
/// Where the pod-wide /dev/shm is mounted.
pub const SHM: &str = "/dev/shm";

/// What the agent decides about a container.
pub struct Guest<'a> {
    /// The container's id.
    pub container_id: &'a str,
    /// Guest path of its rootfs.
    pub rootfs: &'a Path,
    /// Guest path of the PID namespace to join; none for a new one.
    pub pid_namespace: Option<String>,
    /// Directory with the files `user`, `net`, `ipc` and `uts` of the pod's own namespaces; none if they are the guest's.
    pub namespaces: Option<&'a Path>,
    /// Whether stdio is a pty.
    pub terminal: bool,
}

/// A spec made fit for this guest.
#[derive(Debug)]
pub struct Spec {
    /// The whole, for libcontainer.
    pub config: Value,
    /// Its `process`.
    pub process: Process,
    /// Limits and device rules, which the agent applies itself.
    pub resources: LinuxResources,
    /// The filter; execs get it too.
    pub seccomp: Option<LinuxSeccomp>,
    /// Sysctls of namespaces that containers share with the pod, which the agent sets itself.
    pub sysctls: BTreeMap<String, String>,
    /// The container may write to its cgroup.
    pub cgroup_writable: bool,
    /// All mounts, in order.
    pub mounts: Vec<Mount>,
}

/// What the agent has to know of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Path in the container.
    pub destination: String,
    /// What it is bound from; none if it is no bind.
    pub source: Option<Source>,
    /// The container may not write to it.
    pub read_only: bool,
}

/// What a mount of a container is bound from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Path below the share, of what the host has mounted there.
    Share(String),
    /// Path below the share, in what the host has mounted there: containers may have links in it.
    InShare {
        /// The path.
        path: String,
        /// Where the agent has to bind it before.
        at: PathBuf,
    },
    /// A memory-backed volume of the pod's, or a part of it.
    Memory {
        /// The volume's name, and the path in it.
        path: String,
        /// Where the agent has to bind it before.
        at: PathBuf,
    },
    /// The pod-wide /dev/shm.
    Shm,
}

impl Source {
    /// Resolves the source of a container's bind, the `index`th of its mounts; `None` if it is none of these.
    fn parse(source: &str, guest: &Guest<'_>, index: usize) -> Result<Option<Self>> {
        if source == SHM_SOURCE {
            return Ok(Some(Self::Shm));
        }
        let at = || guest.rootfs.with_file_name("volumes").join(index.to_string());
        if let Some(path) = source.strip_prefix(SHARE_SCHEME) {
            let path = share_path(path)?.to_owned();
            // `<container or directory>/<number>` is a mount of the host's.
            let is_part = path.split('/').count() > 2;
            return Ok(Some(if is_part { Self::InShare { path, at: at() } } else { Self::Share(path) }));
        }
        let Some(path) = source.strip_prefix(MEMORY_SCHEME) else { return Ok(None) };
        share_path(path).map(|path| Some(Self::Memory { path: path.to_owned(), at: at() }))
    }

    /// Its guest path.
    fn guest_path(&self) -> String {
        match self {
            Self::Share(path) => format!("{SHARE}/{path}"),
            Self::InShare { at, .. } | Self::Memory { at, .. } => at.display().to_string(),
            Self::Shm => SHM.to_owned(),
        }
    }
}

impl Spec {
    /// The mount that `path` lies on, and what is below it. `None` is the rootfs.
    pub fn mount_of(&self, path: &Path) -> Option<(PathBuf, &Mount)> {
        let holds = |mount: &&Mount| mount.destination != "/" && path.starts_with(&mount.destination);
        let mount = self.mounts.iter().filter(holds).max_by_key(|mount| mount.destination.len())?;
        Some((path.strip_prefix(&mount.destination).ok()?.to_owned(), mount))
    }
}

/// Rewrites the request's spec.
pub fn rewrite(json: &[u8], guest: &Guest<'_>) -> Result<Spec> {
    let invalid = |error: serde_json::Error| Error::invalid(format!("OCI spec: {error}"));
    let mut config: Value = serde_json::from_slice(json).map_err(invalid)?;
    let root = config.as_object_mut().ok_or_else(|| Error::invalid("OCI spec is not a JSON object"))?;

    for key in ["hooks", "hostname", "domainname", "annotations"] {
        root.remove(key);
    }
    let readonly = root.get("root").and_then(|root| root.get("readonly")).and_then(Value::as_bool).unwrap_or(false);
    root.insert("root".to_owned(), json!({ "path": guest.rootfs, "readonly": readonly }));

    let process = root.get_mut("process").ok_or_else(|| Error::invalid("OCI spec has no process"))?;
    rewrite_process(process, guest.terminal)?;
    let parsed_process: Process = serde_json::from_value(process.clone()).map_err(invalid)?;

    let mut mounts = Vec::new();
    let cgroup_writable = has_writable_cgroup(root.get("mounts"));
    for mount in root.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten() {
        mounts.push(rewrite_mount(mount, guest, mounts.len())?);
    }

    let linux = root.entry("linux").or_insert_with(|| json!({}));
    let linux = linux.as_object_mut().ok_or_else(|| Error::invalid("linux of the OCI spec is not a JSON object"))?;
    for key in ["mountLabel", "intelRdt", "netDevices"] {
        linux.remove(key);
    }
    linux.insert("cgroupsPath".to_owned(), format!("{}/{}", cgroup::PARENT, guest.container_id).into());
    rewrite_namespaces(linux, guest)?;
    let resources = linux.remove("resources").unwrap_or_else(|| json!({}));
    let sysctls = linux.remove("sysctl").unwrap_or_else(|| json!({}));
    let seccomp = match linux.get("seccomp") {
        None | Some(Value::Null) => None,
        Some(filter) => Some(serde_json::from_value(filter.clone()).map_err(invalid)?),
    };
    check_seccomp(seccomp.as_ref())?;

    Ok(Spec {
        process: parsed_process,
        resources: serde_json::from_value(resources).map_err(invalid)?,
        seccomp,
        sysctls: serde_json::from_value(sysctls).map_err(invalid)?,
        cgroup_writable,
        mounts,
        config,
    })
}

/// Parses and adjusts the `process` of an exec.
pub fn exec_process(json: &[u8], terminal: bool) -> Result<Process> {
    let invalid = |error: serde_json::Error| Error::invalid(format!("OCI process: {error}"));
    let mut process = serde_json::from_slice(json).map_err(invalid)?;
    rewrite_process(&mut process, terminal)?;
    serde_json::from_value(process).map_err(invalid)
}

fn rewrite_process(process: &mut Value, terminal: bool) -> Result<()> {
    let process = process.as_object_mut().ok_or_else(|| Error::invalid("process is not a JSON object"))?;
    // Labels of the host's security modules mean nothing here.
    for key in ["apparmorProfile", "selinuxLabel", "consoleSize"] {
        process.remove(key);
    }
    // libcontainer takes `false` for "set, late": it would load the seccomp filter after the capabilities are gone.
    if process.get("noNewPrivileges") == Some(&Value::Bool(false)) {
        process.remove("noNewPrivileges");
    }
    // The agent's own -1000 must not be inherited.
    process.entry("oomScoreAdj").or_insert_with(|| json!(0));
    process.insert("terminal".to_owned(), terminal.into());
    let args = process.get("args").and_then(Value::as_array);
    if args.is_none_or(Vec::is_empty) {
        return Err(Error::invalid("process.args must not be empty"));
    }
    let cwd = process.get("cwd").and_then(Value::as_str).unwrap_or_default();
    if !cwd.starts_with('/') {
        return Err(Error::invalid(format!("Cwd must be an absolute path, process.cwd is {cwd:?}")));
    }
    Ok(())
}

fn has_writable_cgroup(mounts: Option<&Value>) -> bool {
    let mounts = mounts.and_then(Value::as_array).into_iter().flatten();
    let mut cgroups = mounts.filter(|mount| {
        mount.get("type").and_then(Value::as_str).is_some_and(|kind| matches!(kind, "cgroup" | "cgroup2"))
    });
    cgroups.any(|mount| {
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        // The last of the two counts, as in mount(8).
        !options
            .filter_map(Value::as_str)
            .fold(false, |read_only, option| (read_only || option == "ro") && option != "rw")
    })
}

/// Resolves the source of the `index`th mount.
fn rewrite_mount(mount: &mut Value, guest: &Guest<'_>, index: usize) -> Result<Mount> {
    let mount = mount.as_object_mut().ok_or_else(|| Error::invalid("a mount of the OCI spec is not a JSON object"))?;
    let destination = mount.get("destination").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !destination.starts_with('/') {
        return Err(Error::invalid(format!("mount destination {destination:?} is not an absolute path")));
    }
    let options = mount.get("options").and_then(Value::as_array);
    let bind = mount.get("type").and_then(Value::as_str) == Some("bind")
        || options.is_some_and(|options| options.iter().any(|option| option == "bind" || option == "rbind"));
    // The last of two contrary options counts, as in mount(8).
    let access = options.into_iter().flatten().rev().find(|option| *option == "ro" || *option == "rw");
    let read_only = access.is_some_and(|option| option == "ro");
    let source = mount.get("source").and_then(Value::as_str).unwrap_or_default().to_owned();
    let found = Source::parse(&source, guest, index)?;
    let resolved = match &found {
        Some(found) => found.guest_path(),
        None if bind => {
            return Err(Error::invalid(format!(
                "mount of {destination} binds {source:?}; a source is {SHARE_SCHEME}<path>, {MEMORY_SCHEME}<volume> or \
                 {SHM_SOURCE}"
            )));
        }
        // A file system without a source of its own; libcontainer insists on a word.
        None if source.is_empty() => mount.get("type").and_then(Value::as_str).unwrap_or("none").to_owned(),
        None => source,
    };
    mount.insert("source".to_owned(), resolved.into());
    Ok(Mount { destination, source: found, read_only })
}

/// Checks a path below the share, or one that begins with a volume: relative, without `.` or `..`.
pub fn share_path(path: &str) -> Result<&str> {
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if path.split('/').all(plain) {
        return Ok(path);
    }
    Err(Error::invalid(format!(
        "{path:?} is not a path below the share or in a volume: plain names joined by single slashes"
    )))
}

/// Containers share the pod's network, UTS and IPC namespaces: the guest's own, or those of the pod's user namespace.
fn rewrite_namespaces(linux: &mut Map<String, Value>, guest: &Guest<'_>) -> Result<()> {
    let given = linux.remove("namespaces").unwrap_or_else(|| json!([]));
    let given = given.as_array().ok_or_else(|| Error::invalid("linux.namespaces of the OCI spec is not an array"))?;
    let asked = |kind: &str| given.iter().any(|namespace| namespace.get("type").is_some_and(|typ| typ == kind));
    let mut namespaces = vec![
        match &guest.pid_namespace {
            Some(path) => json!({ "type": "pid", "path": path }),
            None => json!({ "type": "pid" }),
        },
        json!({ "type": "mount" }),
        json!({ "type": "cgroup" }),
    ];
    if asked("time") {
        namespaces.push(json!({ "type": "time" }));
    }
    match (guest.namespaces, asked("user")) {
        (None, false) => {}
        (Some(directory), true) => {
            for (kind, name) in [("user", "user"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
                namespaces.push(json!({ "type": kind, "path": directory.join(name) }));
            }
        }
        (None, true) => {
            return Err(Error::invalid("linux.namespaces asks for a user namespace, and the pod was made without one"));
        }
        (Some(_), false) => {
            return Err(Error::invalid("linux.namespaces asks for no user namespace, and the pod was made with one"));
        }
    }
    // The pod's user namespace has them already.
    linux.remove("uidMappings");
    linux.remove("gidMappings");
    linux.insert("namespaces".to_owned(), namespaces.into());
    Ok(())
}

fn check_seccomp(seccomp: Option<&LinuxSeccomp>) -> Result<()> {
    let notifies = |filter: &LinuxSeccomp| {
        filter.default_action() == LinuxSeccompAction::ScmpActNotify
            || filter.syscalls().iter().flatten().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify)
    };
    if seccomp.is_some_and(notifies) {
        return Err(Error::invalid(
            "seccomp action SCMP_ACT_NOTIFY needs a listener on the host, which a guest has not",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest<'static> {
        Guest { container_id: "c1", rootfs: Path::new("/r"), pid_namespace: None, namespaces: None, terminal: false }
    }

    fn spec(extra: &Value) -> Value {
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "noNewPrivileges": false,
                         "apparmorProfile": "cri-containerd.apparmor.d" },
            "root": { "path": "rootfs", "readonly": true },
            "hostname": "h", "hooks": { "prestart": [] },
            "linux": { "namespaces": [{ "type": "network", "path": "/n" }, { "type": "pid" }, { "type": "uts" }],
                       "resources": { "memory": { "limit": 1000 } }, "sysctl": { "net.ipv4.ip_forward": "1" } },
        });
        for (key, value) in extra.as_object().expect("object") {
            spec[key] = value.clone();
        }
        spec
    }

    fn rewritten(extra: &Value) -> Result<Spec> {
        rewrite(spec(extra).to_string().as_bytes(), &guest())
    }

    #[test]
    fn host_matters_are_taken_out_and_guest_matters_put_in() {
        let spec = rewritten(&json!({})).expect("rewrite");
        let config = &spec.config;
        for absent in ["hooks", "hostname"] {
            assert!(config.get(absent).is_none(), "{absent}");
        }
        for absent in ["noNewPrivileges", "apparmorProfile"] {
            assert!(config["process"].get(absent).is_none(), "{absent}");
        }
        assert_eq!(config["root"], json!({ "path": "/r", "readonly": true }));
        assert_eq!(config["process"]["oomScoreAdj"], 0);
        assert_eq!(config["linux"]["cgroupsPath"], "/bulkhead/c1");
        let kinds: Vec<_> =
            config["linux"]["namespaces"].as_array().expect("array").iter().map(|n| &n["type"]).collect();
        assert_eq!(kinds, ["pid", "mount", "cgroup"]);
        assert!(config["linux"].get("resources").is_none() && config["linux"].get("sysctl").is_none());
        assert_eq!(spec.resources.memory().and_then(|memory| memory.limit()), Some(1000));
        assert_eq!(spec.sysctls.get("net.ipv4.ip_forward").map(String::as_str), Some("1"));
    }

    #[test]
    fn a_container_joins_the_namespaces_of_its_pod_and_no_others() {
        let user = json!({ "linux": { "namespaces": [{ "type": "pid" }, { "type": "user" }],
            "uidMappings": [{ "containerID": 0, "hostID": 7, "size": 1 }] } });
        let with =
            |extra: &Value, namespaces| rewrite(spec(extra).to_string().as_bytes(), &Guest { namespaces, ..guest() });
        let joined = with(&user, Some(Path::new("/ns"))).expect("rewrite").config;
        let paths: Vec<_> =
            joined["linux"]["namespaces"].as_array().expect("array").iter().map(|n| &n["path"]).collect();
        let none = Value::Null;
        assert_eq!(
            paths,
            [&none, &none, &none, &json!("/ns/user"), &json!("/ns/net"), &json!("/ns/ipc"), &json!("/ns/uts")]
        );
        assert!(joined["linux"].get("uidMappings").is_none());
        for (spec, namespaces) in [(&user, None), (&json!({}), Some(Path::new("/ns")))] {
            let error = with(spec, namespaces).expect_err("is refused");
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
        }
    }

    #[test]
    fn a_cgroup_is_writable_unless_its_mount_is_not() {
        for (mounts, writable) in [
            (json!([]), false),
            (json!([{ "destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"] }]), false),
            (json!([{ "destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro", "rw"] }]), true),
            (json!([{ "destination": "/sys/fs/cgroup", "type": "cgroup2" }]), true),
        ] {
            let spec = rewritten(&json!({ "mounts": mounts })).expect("rewrite");
            assert_eq!(spec.cgroup_writable, writable, "{mounts}");
        }
    }

    #[test]
    fn sources_are_resolved() {
        let mounts = json!({ "mounts": [
            { "destination": "/data", "source": "share:c1/0", "options": ["rbind", "ro"] },
            { "destination": "/dev/shm", "source": "shm:", "options": ["rbind"] },
            { "destination": "/proc", "type": "proc" },
            { "destination": "/cache", "source": "memory:cache/sub", "options": ["rbind"] },
            { "destination": "/part", "source": "share:_0/0/sub", "options": ["rbind"] },
        ]});
        let spec = rewritten(&mounts).expect("rewrite");
        let sources: Vec<_> = spec.config["mounts"].as_array().expect("array").iter().map(|m| &m["source"]).collect();
        assert_eq!(sources, ["/run/bulkhead/share/c1/0", "/dev/shm", "proc", "/volumes/3", "/volumes/4"]);
        let found: Vec<_> = spec.mounts.into_iter().filter_map(|mount| mount.source).collect();
        let cache = Source::Memory { path: "cache/sub".into(), at: "/volumes/3".into() };
        let part = Source::InShare { path: "_0/0/sub".into(), at: "/volumes/4".into() };
        assert_eq!(found, [Source::Share("c1/0".into()), Source::Shm, cache, part]);
    }

    #[test]
    fn the_longest_mount_holds_a_path() {
        let mounts = json!({ "mounts": [
            { "destination": "/a", "type": "tmpfs" },
            { "destination": "/a/b", "source": "share:c1/0", "options": ["bind", "ro"] },
        ]});
        let spec = rewritten(&mounts).expect("rewrite");
        assert_eq!(spec.mount_of(Path::new("/a/b/c/d")), Some((PathBuf::from("c/d"), &spec.mounts[1])));
        assert_eq!(spec.mount_of(Path::new("/a/x")), Some((PathBuf::from("x"), &spec.mounts[0])));
        assert_eq!([spec.mounts[0].read_only, spec.mounts[1].read_only], [false, true]);
        assert_eq!(spec.mount_of(Path::new("/ab")), None);
    }

    #[test]
    fn sources_that_leave_their_place_are_refused() {
        for source in ["share:../x", "share:/etc", "share:a//b", "share:", "share:a/./b", "memory:v/../x", "/etc"] {
            let mounts = json!({ "mounts": [{ "destination": "/d", "source": source, "type": "bind" }] });
            let error = rewritten(&mounts).expect_err(source);
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{source}");
        }
    }

    #[test]
    fn a_process_without_program_or_with_a_relative_directory_is_refused() {
        for process in [json!({ "args": [], "cwd": "/" }), json!({ "args": ["a"], "cwd": "x" })] {
            assert!(exec_process(process.to_string().as_bytes(), false).is_err(), "{process}");
        }
    }

    #[test]
    fn a_filter_that_needs_a_listener_is_refused() {
        let linux = json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mount"], "action": "SCMP_ACT_NOTIFY" }] } } });
        assert!(rewritten(&linux).is_err());
    }
}
