//! What is decided about a child before it starts.

use std::ffi::{CString, OsString};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::process::Resource;
use rustix::thread::CapabilitySet;

use crate::seccomp::Filter;

/// Whom a child runs as.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Real, effective, saved and filesystem user.
    pub uid: u32,
    /// Real, effective, saved and filesystem group.
    pub gid: u32,
    /// Supplementary groups; the shim's own never pass on.
    pub groups: Vec<u32>,
    /// All that the child, and whatever it executes, can ever have. Empty for most.
    pub capabilities: CapabilitySet,
    /// Its capabilities stay in effect when it acts as another user; needs `CAP_SETPCAP` among them.
    pub keep_for_others: bool,
}

impl Credentials {
    /// A user without capabilities and supplementary groups.
    pub fn unprivileged(uid: u32, gid: u32) -> Self {
        Self { uid, gid, groups: Vec::new(), capabilities: CapabilitySet::empty(), keep_for_others: false }
    }
}

/// Which namespaces a child does not share with the shim's host thread.
#[derive(Debug, Clone, Default)]
pub struct Namespaces {
    /// An empty network namespace, with a loopback that is down.
    pub net: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
    /// A mount namespace that receives the host thread's mounts and unmounts and gives none.
    pub mount: bool,
}

/// A device node of a child's private `/dev`.
#[derive(Debug, Clone)]
pub struct DeviceNode {
    pub(super) path: CString,
    pub(super) device: u64,
}

impl DeviceNode {
    /// The same node as the host's at `path`, which must lie directly in `/dev`.
    pub fn like(path: &Path) -> anyhow::Result<Self> {
        let metadata = std::fs::metadata(path).with_context(|| format!("device {}", path.display()))?;
        anyhow::ensure!(path.parent() == Some(Path::new("/dev")), "device {} is not directly in /dev", path.display());
        Ok(Self { path: CString::new(path.as_os_str().as_bytes())?, device: metadata.rdev() })
    }
}

/// Everything about a child that is decided before it starts.
#[derive(Debug)]
pub struct ChildConfig {
    /// What the child is to us, for messages: `QEMU`, `virtiofsd`.
    pub role: &'static str,
    /// Absolute path.
    pub program: PathBuf,
    /// Without the program's name.
    pub args: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory; `None` is the shim's.
    pub cwd: Option<PathBuf>,
    /// User, group, capabilities.
    pub credentials: Credentials,
    /// Namespaces of its own.
    pub namespaces: Namespaces,
    /// `Some` replaces `/dev` by one that has `null`, `urandom` and these, all owned by the child's user; needs
    /// [`Namespaces::mount`].
    pub devices: Option<Vec<DeviceNode>>,
    /// Open files and the numbers that the child knows them by. Nothing else of the shim's is open in the child.
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// `cgroup.procs` files, open for writing, that the child enters before it executes the program.
    pub cgroup: Vec<OwnedFd>,
    /// Soft and hard limits. No core is ever dumped: it would hold the guest's memory.
    pub rlimits: Vec<(Resource, u64)>,
    /// For programs that do not bring a filter of their own.
    pub seccomp: Option<Filter>,
    /// `None` leaves what the shim has. A refusal is logged, not an error: some machines forbid every change.
    pub oom_score_adj: Option<i32>,
}

impl ChildConfig {
    /// `program` with nothing but `credentials`.
    pub fn new(role: &'static str, program: impl Into<PathBuf>, credentials: Credentials) -> Self {
        Self {
            role,
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            credentials,
            namespaces: Namespaces::default(),
            devices: None,
            fds: Vec::new(),
            cgroup: Vec::new(),
            rlimits: Vec::new(),
            seccomp: None,
            oom_score_adj: None,
        }
    }
}
