//! Nodes of disks in a container (the pod's raw block volumes), and the rules by which it may use them.
//!
//! Below /dev libcontainer makes them, like those of the spec. It takes no other paths, and in a user namespace nobody may make
//! nodes: there the container gets a bind of one that the agent makes in the guest's own /dev, since /run takes no devices. So
//! its owner is the same outside of the namespace, as with runc, which binds the host's.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_proto::agent as api;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use rustix::fs::{CWD, FileType, Mode, OFlags, major, makedev, minor, mknodat};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::device;
use crate::error::{During, Error, Result};
use crate::spec::Spec;

/// Where the agent makes nodes, a directory for each container that needs one.
const OWN: &str = "/dev/bulkhead";
/// How long the kernel may take to let go of a disk that nobody uses any more, and how often that is looked at.
const LET_GO: Duration = Duration::from_secs(2);
const TRY: Duration = Duration::from_millis(10);
/// What the kernel takes for a path, with the byte that ends it.
const PATH_AT_MOST: usize = 4096;

/// A disk as a device of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    path: PathBuf,
    access: String,
    file_mode: u32,
    uid: u32,
    gid: u32,
    major: u32,
    minor: u32,
    /// The guest's own node of the disk.
    disk: PathBuf,
}

impl Node {
    /// The guest's own node of the disk.
    pub fn disk(&self) -> &Path {
        &self.disk
    }
}

/// Brings what was written to a disk to the host, after the container that wrote it has ended.
///
/// A file system that the container had mounted from the disk is unmounted by the kernel in its own time, which is over when
/// the disk can be had exclusively: no event tells. Or another container has it mounted, and goes on.
pub async fn flush(disk: &Path) {
    let begun = Instant::now();
    let flushed = loop {
        let (disk, exclusively) = (disk.to_owned(), begun.elapsed() < LET_GO);
        match tokio::task::spawn_blocking(move || flush_now(&disk, exclusively)).await {
            Ok(Err(Errno::BUSY)) if exclusively => tokio::time::sleep(TRY).await,
            flushed => break flushed.during(|| "flush").and_then(|flushed| flushed.during(|| "flush")),
        }
    };
    if let Err(error) = flushed {
        tracing::warn!(disk = %disk.display(), %error, "what a container wrote to a disk may be lost");
    }
}

fn flush_now(disk: &Path, exclusively: bool) -> Result<(), Errno> {
    let mut flags = OFlags::RDONLY | OFlags::CLOEXEC;
    flags.set(OFlags::EXCL, exclusively);
    rustix::fs::fsync(rustix::fs::open(disk, flags, Mode::empty())?)
}

/// A node that the agent makes, for a container to have a bind of.
#[derive(Debug, PartialEq, Eq)]
pub struct Own<'a> {
    path: PathBuf,
    node: &'a Node,
}

/// Waits until the disks of a container are there.
pub async fn find(devices: Vec<api::BlockDevice>) -> Result<Vec<Node>> {
    let mut nodes = Vec::with_capacity(devices.len());
    for api::BlockDevice { serial, path, access, file_mode, uid, gid } in devices {
        let path = container_path(&path)?;
        if !access.chars().all(|letter| "rwm".contains(letter)) {
            return Err(Error::invalid(format!("access {access:?} to device {path:?} is not of the letters rwm")));
        }
        let disk = device::wait_for(&serial).await?;
        let number = fs::metadata(&disk).during(|| format!("look at {}", disk.display()))?.rdev();
        nodes.push(Node { path, access, file_mode, uid, gid, major: major(number), minor: minor(number), disk });
    }
    Ok(nodes)
}

/// Checks the path of a node: absolute, and as plain below the root as it looks.
fn container_path(path: &str) -> Result<PathBuf> {
    let given = Path::new(path);
    let plain = given.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let fits = path.len() < PATH_AT_MOST && !path.contains('\0');
    if given.is_absolute() && given.file_name().is_some() && plain && fits {
        return Ok(given.components().collect());
    }
    Err(Error::invalid(format!("device path {path:?} is not an absolute path without \"..\"")))
}

/// Gives `nodes` to the container of `spec`; what is returned has to be made before it is created.
pub fn enter<'a>(nodes: &'a [Node], spec: &mut Spec, container_id: &str, user_namespace: bool) -> Vec<Own<'a>> {
    let mut own = Vec::new();
    for node in nodes {
        let Node { path, file_mode, uid, gid, major, minor, .. } = node;
        // In a volume below /dev others may have links, which libcontainer would follow.
        let in_dev = match spec.mount_of(path) {
            None => path.starts_with("/dev"),
            Some((below, _)) => path.strip_prefix("/dev").is_ok_and(|name| name == below),
        };
        if in_dev && !user_namespace {
            let device = json!({
                "path": path, "type": "b", "major": major, "minor": minor, "fileMode": file_mode, "uid": uid, "gid": gid,
            });
            push(&mut spec.config["linux"]["devices"], device);
        } else {
            let source = directory(container_id).join(own.len().to_string());
            let bind = json!({ "destination": path, "type": "bind", "source": source, "options": ["bind"] });
            push(&mut spec.config["mounts"], bind);
            own.push(Own { path: source, node });
        }
        if !node.access.is_empty() {
            spec.resources.devices_mut().get_or_insert_default().push(rule(node));
        }
    }
    own
}

fn push(list: &mut Value, item: Value) {
    match list {
        Value::Array(items) => items.push(item),
        absent => *absent = json!([item]),
    }
}

fn rule(node: &Node) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true);
    rule.set_typ(Some(LinuxDeviceType::B));
    rule.set_major(Some(node.major.into()));
    rule.set_minor(Some(node.minor.into()));
    rule.set_access(Some(node.access.clone()));
    rule
}

/// Where a container's own nodes are.
pub fn directory(container_id: &str) -> PathBuf {
    Path::new(OWN).join(container_id)
}

/// Makes nodes; they go with [`directory`].
pub fn make(own: &[Own<'_>]) -> Result<()> {
    for Own { path, node } in own {
        let what = || format!("make {} for device {}", path.display(), node.path.display());
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).during(what)?;
        }
        let number = makedev(node.major, node.minor);
        mknodat(CWD, path, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number).during(what)?;
        chown(path, Some(node.uid), Some(node.gid)).during(what)?;
        fs::set_permissions(path, Permissions::from_mode(node.file_mode & 0o7777)).during(what)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{self, Guest};

    fn node(path: &str, access: &str) -> Node {
        let (file_mode, uid, gid) = (0o660, 0, 6);
        let disk = "/dev/sdb".into();
        Node { path: path.into(), access: access.into(), file_mode, uid, gid, major: 8, minor: 16, disk }
    }

    fn spec() -> Spec {
        let json = json!({
            "ociVersion": "1.1.0",
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "linux": {
                "devices": [{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }],
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            },
        });
        let guest = Guest {
            container_id: "c1",
            rootfs: Path::new("/r"),
            pid_namespace: None,
            namespaces: None,
            terminal: false,
        };
        spec::rewrite(json.to_string().as_bytes(), &guest).expect("rewrite")
    }

    #[test]
    fn a_disk_below_dev_is_a_device_of_the_spec_and_allowed_what_was_asked_for() {
        let mut spec = spec();
        let nodes = [node("/dev/data", "r"), node("/dev/shut", "")];
        assert!(enter(&nodes, &mut spec, "c1", false).is_empty());
        let devices = spec.config["linux"]["devices"].as_array().expect("array");
        assert_eq!(devices.len(), 3);
        assert_eq!(
            devices[1],
            json!({ "path": "/dev/data", "type": "b", "major": 8, "minor": 16, "fileMode": 0o660, "uid": 0, "gid": 6 })
        );
        assert!(spec.config.get("mounts").is_none());
        assert_eq!(
            serde_json::to_value(spec.resources.devices()).expect("json"),
            json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 8, "minor": 16, "access": "r" },
            ])
        );
    }

    #[test]
    fn elsewhere_and_in_a_user_namespace_a_disk_is_a_bind_of_a_node_of_the_agents() {
        let nodes = [node("/dev/data", "rwm"), node("/data/disk", "rwm")];
        let paths = |own: Vec<Own<'_>>| own.into_iter().map(|own| own.path).collect::<Vec<_>>();
        let mut apart = spec();
        assert_eq!(paths(enter(&nodes, &mut apart, "c1", false)), [Path::new("/dev/bulkhead/c1/0")]);
        assert_eq!(
            apart.config["mounts"],
            json!([{
                "destination": "/data/disk", "type": "bind", "source": "/dev/bulkhead/c1/0", "options": ["bind"],
            }])
        );
        let mut mapped = spec();
        let made = paths(enter(&nodes, &mut mapped, "c1", true));
        assert_eq!(made, [Path::new("/dev/bulkhead/c1/0"), Path::new("/dev/bulkhead/c1/1")]);
        assert_eq!(mapped.config["linux"]["devices"].as_array().map(Vec::len), Some(1));
        assert_eq!(mapped.resources.devices().as_ref().map(Vec::len), Some(3));
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        for (path, plain) in [("/dev/data", "/dev/data"), ("//dev/./data/", "/dev/data"), ("/data", "/data")] {
            assert_eq!(container_path(path).expect(path), Path::new(plain));
        }
        for path in ["", "/", "dev/data", "/dev/../data", "/dev/a\0b"] {
            let error = container_path(path).expect_err(path);
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{path:?}");
        }
    }
}
