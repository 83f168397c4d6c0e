//! A live host pid for each container.
//!
//! The container's processes live in the guest and have no pid on the host. But containerd wants one, `/proc/<pid>/ns` of
//! it turns up in the specs of the pod's other containers, and `kubectl debug --target` names a container by nothing else.
//! So each container gets a thread that does nothing but wait: its tid is a pid that is the container's alone and is gone
//! when the container is. The thread waits in the pod's network namespace, where whoever looks for a container's addresses by
//! its pid finds them, as with runc: `nsenter --net`, and nerdctl. It leaves when the container's process ends, for a network
//! namespace lives as long as what is in it. Where there is none, it has an empty one of its own: `ctr run --cni` configures
//! whatever network the pid leads to, and that must never be the host's. A container that cannot have one is not made.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, JoinHandle};

use anyhow::Context;
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace to enter, none for a new one, and where to answer.
type Move = (Option<File>, SyncSender<io::Result<()>>);

/// The pid of one container, as long as this value lives.
#[derive(Debug)]
pub struct HostPid {
    tid: u32,
    in_pod: bool,
    /// Dropped to end the thread.
    moves: Option<Sender<Move>>,
    thread: Option<JoinHandle<()>>,
}

impl HostPid {
    /// Takes a pid.
    pub fn allocate() -> anyhow::Result<Self> {
        let (moves, wanted) = mpsc::channel();
        let (tell, told) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("container".into())
            // The smallest stack there is: the thread only waits.
            .stack_size(16 * 1024)
            .spawn(move || {
                if tell.send(nix::unistd::gettid().as_raw()).is_ok() {
                    wait(&wanted);
                }
            })
            .context("start a thread to hold a container's pid")?;
        let tid = told.recv().context("the thread that holds a container's pid ended")?;
        Ok(Self { tid: tid.unsigned_abs(), in_pod: false, moves: Some(moves), thread: Some(thread) })
    }

    /// Has `/proc/<pid>/ns/net` be the network namespace at `path`.
    ///
    /// An error leaves it as it was. Takes as long as `setns(2)`.
    pub fn enter_network(&mut self, path: &Path) -> anyhow::Result<()> {
        self.move_to(path)?;
        self.in_pod = true;
        Ok(())
    }

    /// Undoes [`enter_network`](Self::enter_network).
    pub fn leave_network(&mut self) {
        // Of the main thread, which never leaves it.
        if self.in_pod
            && let Err(error) = self.move_to(Path::new("/proc/self/ns/net"))
        {
            tracing::warn!(error = %format_args!("{error:#}"), "a pod's network namespace is kept by the pid of a container");
        }
        self.in_pod = false;
    }

    /// Has `/proc/<pid>/ns/net` be an empty network namespace that is the pid's alone, as long as the pid is there.
    ///
    /// An error leaves it as it was. Takes as long as `unshare(2)`.
    pub fn enter_empty_network(&mut self) -> anyhow::Result<()> {
        self.ask(None).context("make a network namespace")
    }

    fn move_to(&self, path: &Path) -> anyhow::Result<()> {
        let netns = File::open(path).with_context(|| format!("open {}", path.display()))?;
        self.ask(Some(netns)).with_context(|| format!("enter {}", path.display()))
    }

    fn ask(&self, netns: Option<File>) -> anyhow::Result<()> {
        let (answer, answered) = mpsc::sync_channel(1);
        let asked = self.moves.as_ref().is_some_and(|moves| moves.send((netns, answer)).is_ok());
        let entered = if asked { answered.recv().ok() } else { None };
        Ok(entered.context("the thread that holds a container's pid ended")??)
    }

    /// The pid.
    pub fn get(&self) -> u32 {
        self.tid
    }
}

impl Drop for HostPid {
    fn drop(&mut self) {
        self.moves.take();
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do, so this does not block; a panic in it has nobody to tell.
            drop(thread.join());
        }
    }
}

/// Until the sender is dropped.
fn wait(wanted: &Receiver<Move>) {
    for (netns, answer) in wanted {
        let moved = match netns {
            Some(netns) => setns(&netns, CloneFlags::CLONE_NEWNET),
            None => unshare(CloneFlags::CLONE_NEWNET),
        };
        // Who asked waits for the answer.
        drop(answer.send(moved.map_err(io::Error::from)));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::network::netns::NewNetns;

    #[tokio::test]
    async fn a_pid_leads_to_the_network_namespace_that_it_entered_until_it_leaves() {
        let netns = NewNetns::create().await.expect("makes a namespace");
        let inode = |path: &Path| std::fs::metadata(path).expect("is there").ino();
        let (wanted, own) = (inode(&netns.path()), inode(Path::new("/proc/self/ns/net")));
        let mut pid = HostPid::allocate().expect("allocates");
        let path = std::path::PathBuf::from(format!("/proc/{}/ns/net", pid.get()));
        assert_eq!(inode(&path), own);
        pid.enter_network(&netns.path()).expect("enters");
        assert_eq!(inode(&path), wanted);
        pid.enter_network(Path::new("/nonexistent")).expect_err("cannot be entered");
        assert_eq!(inode(&path), wanted);
        pid.leave_network();
        assert_eq!(inode(&path), own);
    }

    #[test]
    fn a_pid_without_a_network_of_the_pod_has_one_of_its_own() {
        let inode = |path: &str| std::fs::metadata(path).expect("is there").ino();
        let mut pid = HostPid::allocate().expect("allocates");
        pid.enter_empty_network().expect("makes one");
        let own = inode(&format!("/proc/{}/ns/net", pid.get()));
        assert_ne!(own, inode("/proc/self/ns/net"));
        pid.leave_network();
        assert_eq!(inode(&format!("/proc/{}/ns/net", pid.get())), own);
    }

    #[test]
    fn a_pid_is_alive_until_it_is_dropped() {
        let pid = HostPid::allocate().expect("allocates");
        let proc = format!("/proc/{}/ns", pid.get());
        assert!(std::path::Path::new(&proc).exists());
        let other = HostPid::allocate().expect("allocates");
        assert_ne!(pid.get(), other.get());
        drop(pid);
        // A thread can be joined a moment before the kernel takes it out of /proc.
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::path::Path::new(&proc).exists() {
            assert!(Instant::now() < deadline, "{proc} is still there");
            thread::yield_now();
        }
    }
}
