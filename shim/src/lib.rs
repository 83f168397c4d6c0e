//! Bulkhead's host side: one shim process per pod, which owns the pod's QEMU microVM and everything around it.
//!
//! Modules in reading order; what may use what is in ARCHITECTURE.md.

pub mod annotations;
pub mod bootstrap;
pub mod config;
pub mod device;
pub mod error;
pub mod events;
pub mod host;
pub mod log;
pub mod metrics;
pub mod namespace;
pub mod network;
pub mod paths;
pub mod process;
pub mod qemu;
pub mod seccomp;
pub mod sizing;
pub mod storage;
pub mod store;
pub mod tail;
pub mod timeouts;
pub mod vm;

pub mod sys;
