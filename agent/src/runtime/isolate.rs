//! In a worker: makes the namespaces of a pod that has a user namespace, and files that keep them.
//!
//! The process that makes them cannot map its own ids, so there are two: the first maps and keeps, the second unshares and
//! ends when the first has what it wants.

use std::convert::Infallible;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::{Isolate, Line, wire};
use crate::sys::{self, Fork};

/// What the second process says after each of its steps.
const DONE: u8 = b'+';

/// The second of a user namespace's namespaces, by their names in `/proc/<pid>/ns`.
const OWNED: CloneFlags = CloneFlags::CLONE_NEWNET.union(CloneFlags::CLONE_NEWIPC).union(CloneFlags::CLONE_NEWUTS);

/// Makes the namespaces and tells the pid of a process that was in them.
pub fn start(socket: &UnixStream, request: &Isolate) -> Result<(), String> {
    let (mut ours, theirs) = UnixStream::pair().map_err(|error| format!("make a socket pair: {error}"))?;
    match sys::fork_sibling().map_err(|error| format!("fork: {error}"))? {
        Fork::Child => {
            drop(ours);
            let Err(text) = unshare_by_turns(theirs);
            drop(wire::send_line(socket, &Line::Failed(text), &[]));
            std::process::exit(1);
        }
        Fork::Parent(pid) => {
            drop(theirs);
            wire::send_line(socket, &Line::Pid(pid), &[]).map_err(|error| error.to_string())?;
            // An end without a word: it has told PID 1 itself why.
            let mut turn = |what: &str| ours.read_exact(&mut [0]).map_err(|_| format!("the pod's {what} was not made"));
            turn("user namespace")?;
            for (file, map) in [("uid_map", &request.uid_map), ("gid_map", &request.gid_map)] {
                fs::write(format!("/proc/{pid}/{file}"), map)
                    .map_err(|error| format!("write {file} {map:?} of the pod's user namespace: {error}"))?;
            }
            ours.write_all(&[DONE]).map_err(|error| format!("go on: {error}"))?;
            let mut turn =
                |what: &str| ours.read_exact(&mut [0]).map_err(|_| format!("the pod's {what} were not made"));
            turn("namespaces")?;
            for name in ["user", "net", "ipc", "uts"] {
                keep(pid, name, &request.directory.join(name))
                    .map_err(|error| format!("keep the pod's {name} namespace: {error}"))?;
            }
            wire::send_line(socket, &Line::Done, &[]).map_err(|error| error.to_string())
        }
    }
}

fn unshare_by_turns(mut parent: UnixStream) -> Result<Infallible, String> {
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|error| format!("make the pod's user namespace: {error}"))?;
    let gone = |error: std::io::Error| format!("hear from the worker: {error}");
    parent.write_all(&[DONE]).and_then(|()| parent.read_exact(&mut [0])).map_err(gone)?;
    unshare(OWNED).map_err(|error| format!("make the pod's network, IPC and UTS namespaces: {error}"))?;
    parent.write_all(&[DONE]).map_err(gone)?;
    // Until they have their files.
    drop(parent.read_exact(&mut [0]));
    std::process::exit(0)
}

/// Binds the namespace `name` of `pid` to the file `path`, which keeps it.
pub fn keep(pid: i32, name: &str, path: &Path) -> std::io::Result<()> {
    if !path.exists() {
        fs::File::create(path)?;
    }
    let source = format!("/proc/{pid}/ns/{name}");
    Ok(nix::mount::mount(Some(&*source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Enters the user namespace `file` and becomes its root, who may then join or make its other namespaces.
pub fn enter(file: &fs::File) -> Result<(), String> {
    setns(file, CloneFlags::CLONE_NEWUSER).map_err(|error| format!("join the pod's user namespace: {error}"))?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])
        .and_then(|()| setresgid(gid, gid, gid))
        .and_then(|()| setresuid(uid, uid, uid))
        .map_err(|error| format!("become root of the pod's user namespace: {error}"))
}
