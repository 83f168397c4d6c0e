//! Starts the processes of containers: the only user of libcontainer.
//!
//! libcontainer clones raw processes that allocate, which a parent with several threads must not do. So PID 1 keeps a
//! [`spawner`] at hand, this binary re-executed with one thread, which forks a worker for each request. Workers and what
//! they start are children of PID 1 (`CLONE_PARENT`), so that the [`crate::reaper`] sees every exit. Forking a warm process
//! instead of executing a cold one is what makes an exec cheap under emulation.
//!
//! [`create`] makes containers with libcontainer. [`exec`] joins them by itself: libcontainer's tenants come without the
//! container's seccomp filter.

pub mod create;
pub mod exec;
pub mod holder;
pub mod isolate;
pub mod lookup;
mod rlimit;
pub mod spawner;
mod wire;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxSeccomp, PosixRlimit, Process};
use serde::{Deserialize, Serialize};

/// Argument of the binary that makes it the spawner.
pub const SPAWNER_ARGUMENT: &str = "spawner";

/// What a worker is asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Create a container from the bundle at `bundle`; descriptors: stdin, stdout, stderr unless it has a terminal.
    Create {
        /// The container's id.
        id: String,
        /// Directory with `config.json`.
        bundle: PathBuf,
        /// Where libcontainer keeps its state.
        state: PathBuf,
        /// Stdio is a pty.
        terminal: bool,
        /// OCI `process.rlimits`.
        limits: Vec<PosixRlimit>,
    },
    /// Run a further process in a container; descriptors as above.
    Exec(Box<Exec>),
    /// Run the holder of the pod-wide PID namespace; no descriptors.
    Hold {
        /// File of the user namespace that owns it; none for the guest's.
        user_namespace: Option<PathBuf>,
    },
    /// Make the namespaces of a pod with a user namespace; no descriptors.
    Isolate(Isolate),
}

/// A user namespace to make, with a network, IPC and UTS namespace that it owns.
#[derive(Debug, Serialize, Deserialize)]
pub struct Isolate {
    /// Content of its `uid_map`.
    pub uid_map: String,
    /// Content of its `gid_map`.
    pub gid_map: String,
    /// Where the files `user`, `net`, `ipc` and `uts` are made that keep the namespaces.
    pub directory: PathBuf,
}

/// A process to run in a running container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    /// Guest pid of the container's init, whose namespaces are joined.
    pub init_pid: i32,
    /// The container's cgroup directory.
    pub cgroup: PathBuf,
    /// OCI `process`.
    pub process: Process,
    /// The container's filter.
    pub seccomp: Option<LinuxSeccomp>,
    /// Rows and columns of the pty.
    pub size: Option<(u16, u16)>,
}

/// A line of a worker's answer.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    /// The process exists.
    Pid(i32),
    /// The master of the process's pty came along.
    Terminal,
    /// Nothing more will be told although the socket stays open in the process.
    Done,
    /// It failed; in the words of runc where a user sees them.
    Failed(String),
    /// What libcontainer logged as an error on the way.
    Log(String),
}

/// A started process.
#[derive(Debug)]
pub struct Started {
    /// Its guest pid.
    pub pid: i32,
    /// Master of its pty.
    pub terminal: Option<OwnedFd>,
}
