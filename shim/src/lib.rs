//! Bulkhead's host side: one shim process per pod, which owns the pod's QEMU microVM and everything around it.
//!
//! Modules in reading order; what may use what is in ARCHITECTURE.md.

pub mod error;
pub mod host;
pub mod timeouts;

pub mod sys;
