//! The namespaces of a pod that has a user namespace: that one, and the network, IPC and UTS namespaces that it owns.
//!
//! Without a user namespace a pod's containers live in the guest's own. With one they could not: mounting sysfs and mqueue,
//! raw sockets and all else that takes a capability is decided by the user namespace that owns the namespace concerned. So
//! such a pod has its own, made once and kept by their files; the agent stays outside, and enters with a thread for what is
//! the pod's: devices, addresses, host name, sysctls, forwarded connections.
//!
//! Files, and not `/proc/<pid>/ns`, which a process of the user namespace may not open.
//! namespaces(7), user_namespaces(7)

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::thread::CapabilitiesSecureBits;

use crate::error::{During, Result};
use crate::idmap::{IdMap, Owner};
use crate::runtime::isolate::keep;
use crate::runtime::{Isolate, Request};

/// Where the files are.
const DIRECTORY: &str = "/run/bulkhead/namespaces";
/// The file of the pod-wide PID namespace, when there is one.
const PID: &str = "pid";

/// The pod's namespaces; see the module's documentation.
#[derive(Debug)]
pub struct Namespaces {
    /// Maps of the user namespace.
    pub ids: IdMap,
    net: File,
    ipc: File,
    uts: File,
}

impl Namespaces {
    /// What a worker must do to make those with the maps `ids`. Makes their directory.
    pub fn request(ids: &IdMap) -> Result<Request> {
        fs::create_dir_all(DIRECTORY).during(|| format!("create {DIRECTORY}"))?;
        Ok(Request::Isolate(Isolate { uid_map: ids.uid_map(), gid_map: ids.gid_map(), directory: DIRECTORY.into() }))
    }

    /// Those that a worker has made by [`Self::request`].
    pub fn open(ids: IdMap) -> Result<Self> {
        let directory = Path::new(DIRECTORY);
        let open = |name: &str| File::open(directory.join(name)).during(|| format!("open the pod's {name} namespace"));
        Ok(Self { ids, net: open("net")?, ipc: open("ipc")?, uts: open("uts")? })
    }

    /// Directory with a file for each namespace, named as in `/proc/<pid>/ns`.
    pub fn directory(&self) -> &'static Path {
        Path::new(DIRECTORY)
    }

    /// The file of the user namespace.
    pub fn user(&self) -> PathBuf {
        self.directory().join("user")
    }

    /// The network namespace.
    pub fn net(&self) -> BorrowedFd<'_> {
        self.net.as_fd()
    }

    /// Runs `work` inside, on a thread of its own. The user namespace is not entered: `work` keeps the agent's rights.
    pub async fn run<T: Send + 'static>(self: &Arc<Self>, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let namespaces = Arc::clone(self);
        let entered = move || -> Result<T> {
            for (file, kind, name) in [
                (&namespaces.net, CloneFlags::CLONE_NEWNET, "network"),
                (&namespaces.ipc, CloneFlags::CLONE_NEWIPC, "IPC"),
                (&namespaces.uts, CloneFlags::CLONE_NEWUTS, "UTS"),
            ] {
                setns(file, kind).during(|| format!("enter the pod's {name} namespace"))?;
            }
            Ok(work())
        };
        tokio::task::spawn_blocking(move || on_own_thread(entered)).await.during(|| "enter the pod's namespaces")?
    }

    /// Runs `work` like [`Self::run`], but as the user namespace's root: sysctls of the IPC namespace let nobody else write.
    pub async fn run_as_root<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let Owner { uid, gid } = self.ids.root();
        let (uid, gid) = (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(gid));
        self.run(move || {
            keep_capabilities()?;
            // Of this thread alone: the C library's functions would change the whole process.
            rustix::thread::set_thread_res_gid(rustix::process::Gid::ROOT, gid, rustix::process::Gid::ROOT)
                .and_then(|()| {
                    rustix::thread::set_thread_res_uid(rustix::process::Uid::ROOT, uid, rustix::process::Uid::ROOT)
                })
                .during(|| "become root of the pod's user namespace")?;
            work()
        })
        .await?
    }

    /// Runs `work` as the user namespace's root as far as files are concerned: what it makes belongs to the pod. Blocks.
    pub fn as_root<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let Owner { uid, gid } = self.ids.root();
        on_own_thread(move || {
            keep_capabilities()?;
            // Neither tells whether it worked; for a caller with all capabilities they do.
            setfsgid(Gid::from_raw(gid));
            setfsuid(Uid::from_raw(uid));
            Ok(work())
        })
    }

    /// Gives a file to the PID namespace of `pid`, the first process in it; returns its path.
    pub fn keep_pid(&self, pid: i32) -> Result<PathBuf> {
        let path = self.directory().join(PID);
        keep(pid, PID, &path).during(|| "keep the pod's PID namespace")?;
        Ok(path)
    }
}

/// Or a change of the calling thread's user would take the capabilities with which root gets everywhere.
fn keep_capabilities() -> Result<()> {
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP).during(|| "keep capabilities")
}

/// Runs `work` on a thread that ends with it, and what it changed of itself with it.
fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
