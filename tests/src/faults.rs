//! Finding a pod's processes, to look at them or to kill them.
//!
//! A shim is found by the pod's id in its command line, everything else by descent from that shim: never by name alone,
//! since other pods and other people's QEMUs run on the same machine.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::command::wait_for;
use crate::containerd::Node;
use crate::process::Process;

/// One kind of process of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The shim that serves the pod.
    Shim,
    /// The virtual machine.
    Qemu,
    /// The file server; the process that serves, where it has a parent of its own.
    Virtiofsd,
    /// The vsock helper, where the kernel has no vhost-vsock.
    VsockHelper,
}

impl Part {
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Shim => "containerd-shim",
            Self::Qemu => "qemu-system-x86",
            Self::Virtiofsd => "virtiofsd",
            // The kernel cuts names at 15 bytes.
            Self::VsockHelper => "bulkhead-vsock",
        }
    }
}

/// Finds the processes of one kind that belong to the sandbox `id`; the one that does the work comes last.
pub fn find_all(node: &Node, id: &str, part: Part) -> Result<Vec<Process>> {
    let shims: Vec<_> = Process::all()?
        .into_iter()
        .filter(|process| {
            process.command.contains("containerd-shim")
                && process.command.contains(id)
                && process.state != 'Z'
                && Some(process.parent) != node.daemon_pid()
        })
        .collect();
    if part == Part::Shim {
        return Ok(shims);
    }
    let mut found = Vec::new();
    for shim in shims {
        let children = Process::descendants(shim.pid)?.into_iter();
        found.extend(children.filter(|process| process.name == part.program() && process.state != 'Z'));
    }
    Ok(found)
}

/// Finds the one process that does the work of `part` for the sandbox `id`.
pub fn find(node: &Node, id: &str, part: Part) -> Result<Process> {
    find_all(node, id, part)?.pop().with_context(|| format!("sandbox {id} has no {}", part.program()))
}

/// Kills that process as a crash would and waits until it is gone.
pub fn kill(node: &Node, id: &str, part: Part) -> Result<()> {
    let process = find(node, id, part)?;
    process.signal(Signal::SIGKILL)?;
    wait_for(&format!("{} to be gone", process.name), Duration::from_secs(10), || {
        ensure!(!Process::lives(process.pid), "it lives");
        Ok(())
    })
}
