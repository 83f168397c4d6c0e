//! The agent of a Bulkhead guest: PID 1, and all there is in the initramfs.
//!
//! ```text
//! init ──> server ──> pod ──> sandbox ──> network
//!                      ├────> forward ──> link ──> host
//!                      ├────> namespaces ──> idmap, runtime
//!                      └────> container ──> process ──> stdio ──> link ──> host
//!                                  ├──> mount, node ──> device
//!                                  ├──> cgroup ──> limits, filter
//!                                  └──> runtime (spawner, workers: libcontainer)
//! ```
//!
//! [`reaper`] owns every exit, [`events`] tells them in order. Nothing here polls or knows a path of the host.

pub mod cgroup;
pub mod clock;
pub mod container;
pub mod device;
pub mod error;
pub mod events;
pub mod filter;
pub mod forward;
pub mod idmap;
pub mod init;
pub mod limits;
pub mod link;
pub mod metrics;
pub mod mount;
pub mod namespaces;
pub mod network;
pub mod node;
pub mod oom;
pub mod passwd;
pub mod pod;
pub mod process;
pub mod reaper;
pub mod runtime;
pub mod sandbox;
pub mod server;
pub mod spec;
pub mod stdio;
pub mod sys;
pub mod volume;
