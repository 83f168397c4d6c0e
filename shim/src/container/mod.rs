//! Containers and their processes as containerd sees them: ids, states, stdio, and what the guest is told of them.
//!
//! Everything here belongs to the one driver task of the sandbox (`sandbox::driver`); nothing here talks to QEMU.

mod device;
pub mod id;
pub mod limits;
pub mod pid;
pub mod process;
pub mod spec;
pub mod stdio;

pub use id::{ContainerId, ExecId, ProcessId};
