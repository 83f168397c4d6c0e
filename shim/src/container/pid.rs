//! A live host pid for each container.
//!
//! The container's processes live in the guest and have no pid on the host. But containerd wants one, `/proc/<pid>/ns` of
//! it turns up in the specs of the pod's other containers, and `kubectl debug --target` names a container by nothing else.
//! So each container gets a thread that does nothing but wait: its tid is a pid that is the container's alone and is gone
//! when the container is.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use anyhow::Context;

/// The pid of one container, as long as this value lives.
#[derive(Debug)]
pub struct HostPid {
    tid: u32,
    /// Dropped to end the thread.
    release: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl HostPid {
    /// Takes a pid.
    pub fn allocate() -> anyhow::Result<Self> {
        let (release, released) = mpsc::channel::<()>();
        let (tell, told) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("container".into())
            // The smallest stack there is: the thread only waits.
            .stack_size(16 * 1024)
            .spawn(move || {
                if tell.send(nix::unistd::gettid().as_raw()).is_ok() {
                    // Ends with an error when the sender is dropped, which is the signal.
                    let _ended = released.recv();
                }
            })
            .context("start a thread to hold a container's pid")?;
        let tid = told.recv().context("the thread that holds a container's pid ended")?;
        Ok(Self { tid: tid.unsigned_abs(), release: Some(release), thread: Some(thread) })
    }

    /// The pid.
    pub fn get(&self) -> u32 {
        self.tid
    }
}

impl Drop for HostPid {
    fn drop(&mut self) {
        self.release.take();
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do, so this does not block; a panic in it has nobody to tell.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_is_alive_until_it_is_dropped() {
        let pid = HostPid::allocate().expect("allocates");
        let proc = format!("/proc/{}/ns", pid.get());
        assert!(std::path::Path::new(&proc).exists());
        let other = HostPid::allocate().expect("allocates");
        assert_ne!(pid.get(), other.get());
        drop(pid);
        assert!(!std::path::Path::new(&proc).exists());
    }
}
