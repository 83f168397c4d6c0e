//! The first process of the pod-wide PID namespace: reaps what containers leave, and keeps the namespace alive.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::{Line, isolate, wire};
use crate::sys::{self, Fork};

/// In a worker: makes the namespace and its first process, both in the user namespace of that file if there is one.
pub fn start(socket: &UnixStream, user_namespace: Option<&Path>) -> Result<(), String> {
    if let Some(path) = user_namespace {
        let file = File::open(path).map_err(|error| format!("open the pod's user namespace: {error}"))?;
        isolate::enter(&file)?;
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(|error| format!("make the pod's PID namespace: {error}"))?;
    match sys::fork_sibling().map_err(|error| format!("fork the holder of the pod's PID namespace: {error}"))? {
        Fork::Child => hold(),
        Fork::Parent(pid) => {
            wire::send_line(socket, &Line::Pid(pid), &[]).map_err(|error| error.to_string())?;
            wire::send_line(socket, &Line::Done, &[]).map_err(|error| error.to_string())
        }
    }
}

/// Waits for children until killed; SIGKILL from outside ends the namespace.
fn hold() -> ! {
    // A name for `ps` in the pod; nothing depends on it.
    let _ = nix::sys::prctl::set_name(c"pause");
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Blocked, so that a signal between two waits is not lost.
    let _ = children.thread_block();
    loop {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(nix::sys::wait::WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                _ => {}
            }
        }
        // Whatever ends the wait, children are looked for again.
        let _ = children.wait();
    }
}
