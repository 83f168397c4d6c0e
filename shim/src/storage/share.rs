//! The share: virtiofsd, which serves the pod's files to the guest. One per pod.
//!
//! It acts for the owners of files, so it keeps uid 0, and of root's capabilities those alone that the guest's root needs to
//! create, own and read files of any user. It confines itself in mount and PID namespaces of its own, with its own seccomp
//! filter; for that the *outer* process, which only waits, has `CAP_SYS_ADMIN` as well. The socket has no name that lasts:
//! it is bound, connected and unlinked here, and both ends are handed over as files.
//!
//! <https://gitlab.com/virtio-fs/virtiofsd>

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::process::{Pid, PidfdFlags, Resource, Signal};
use rustix::thread::CapabilitySet;
use tokio::time::timeout;

use crate::host::HostThread;
use crate::namespace::ShareRoot;
use crate::process::{Child, ChildConfig, Credentials};
use crate::timeouts;

/// Number that virtiofsd knows its listening socket by.
const LISTENER_FD: i32 = 3;

/// What virtiofsd keeps, and why; see ARCHITECTURE.md, "Confinement".
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Needed until it has made its namespaces, then dropped by itself.
const AT_START: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SETPCAP);

/// Everything about virtiofsd that is decided before it starts.
#[derive(Debug)]
pub struct ShareLaunch {
    /// The binary.
    pub program: PathBuf,
    /// What it serves.
    pub share: ShareRoot,
    /// A directory of ours, where the socket has a name for a moment.
    pub directory: PathBuf,
    /// `cgroup.procs` files that it enters.
    pub cgroup: Vec<OwnedFd>,
    /// None leaves what the shim has.
    pub oom_score_adj: Option<i32>,
    /// The pod has a user namespace. Then the root of its containers is not root to virtiofsd, which makes files as the user
    /// that asks for them, and would be refused where the guest's kernel has found the capability that allows it.
    pub user_namespace: bool,
}

/// A running virtiofsd.
#[derive(Debug)]
pub struct Share {
    child: Child,
    socket: Option<OwnedFd>,
}

impl Share {
    /// Starts virtiofsd. It need not have come up when this returns: QEMU waits for it, and its death is told by the child.
    pub async fn start(host: &HostThread, launch: ShareLaunch) -> anyhow::Result<Self> {
        let (listener, socket) = {
            let path = launch.directory.join("virtiofsd.sock");
            tokio::task::spawn_blocking(move || socket_pair(&path)).await.context("make virtiofsd's socket")??
        };
        let credentials = Credentials {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            capabilities: KEPT.union(AT_START),
            keep_for_others: launch.user_namespace,
        };
        let mut config = ChildConfig::new("virtiofsd", launch.program, credentials);
        config.args = [
            format!("--fd={LISTENER_FD}"),
            format!("--shared-dir={}", launch.share.exported().display()),
            "--sandbox=namespace".to_owned(),
            "--seccomp=kill".to_owned(),
            "--announce-submounts".to_owned(),
            // Handles would save open files, but take CAP_DAC_READ_SEARCH: with it, whoever breaks out of virtiofsd can open
            // any file of a shared file system by its number.
            "--inode-file-handles=never".to_owned(),
            // Names and attributes are trusted for a second; pages, by our guest kernel, while the file has not changed.
            "--cache=auto".to_owned(),
            "--xattr".to_owned(),
            // The limit is set below: raising it is not allowed everywhere, and virtiofsd would insist.
            "--rlimit-nofile=0".to_owned(),
            "--log-level=warn".to_owned(),
        ]
        .map(Into::into)
        .to_vec();
        config.fds = vec![(listener, LISTENER_FD)];
        config.cgroup = launch.cgroup;
        config.oom_score_adj = launch.oom_score_adj;
        if let Some(most) = rustix::process::getrlimit(Resource::Nofile).maximum {
            config.rlimits = vec![(Resource::Nofile, most)];
        }
        let child = Child::spawn(host, config).await?;
        Ok(Self { child, socket: Some(socket) })
    }

    /// The vhost-user connection for QEMU; None the second time.
    pub fn take_socket(&mut self) -> Option<OwnedFd> {
        self.socket.take()
    }

    /// The outer process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Ends virtiofsd, both its processes. Safe to call twice.
    pub async fn kill(&self) -> anyhow::Result<()> {
        // The inner process is the first of a PID namespace, on which the death signal that it asks for, SIGTERM, is lost.
        for pid in children_of(self.child.pid()) {
            if let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
                // It is a child of ours if its parent still is the one we asked about; a stranger is not touched.
                if children_of(self.child.pid()).contains(&pid) {
                    let _already_gone = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
                }
            }
        }
        // The outer process follows the inner one by itself; SIGKILL is for one that has no inner one yet.
        if timeout(timeouts::HELPER_EXIT, self.child.wait()).await.is_err() {
            tracing::debug!("virtiofsd did not follow its inner process");
        }
        self.child.kill().await
    }
}

/// A listening socket and a connection to it.
fn socket_pair(path: &Path) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let what = || format!("socket {} of virtiofsd", path.display());
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(what),
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(what)?;
    let connected = UnixStream::connect(path);
    fs::remove_file(path).with_context(what)?;
    Ok((listener.into(), connected.with_context(what)?.into()))
}

fn children_of(pid: i32) -> Vec<Pid> {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) else { return Vec::new() };
    text.split_whitespace().filter_map(|pid| pid.parse().ok().and_then(Pid::from_raw)).collect()
}
