//! Bulkhead's host side: one shim process per pod, which owns the pod's QEMU microVM and everything around it.
//!
//! Modules in reading order; what may use what is in ARCHITECTURE.md.

pub mod bootstrap;
pub mod cli;
pub mod service;

pub mod sandbox;

pub mod container;

pub mod guest;
pub mod network;
pub mod storage;
pub mod vm;

pub mod device;
pub mod qemu;

pub mod cgroup;
pub mod namespace;
pub mod process;
pub mod seccomp;
pub mod store;
pub mod tail;

pub mod events;
pub mod metrics;
pub mod mount_table;

pub mod annotations;
pub mod config;
pub mod control;
pub mod error;
pub mod hooks;
pub mod host;
pub mod idmap;
pub mod log;
pub mod paths;
pub mod sizing;
pub mod stopwatch;
pub mod timeouts;

pub mod sys;

/// Name of the runtime, as containerd's configuration spells it.
pub const RUNTIME_NAME: &str = "io.containerd.bulkhead.v2";
