//! End-to-end tests of Bulkhead: real containerds, real QEMU, and runc beside it as the measure.
//!
//! A test binary under `tests/` is a list of [`row::Row`]s. [`suite`] runs each of them against every pair of containerd
//! version and runtime that the suite names, in a private containerd ([`containerd`]) that has its own directories, bridge
//! and images ([`image`]), and compares what is there before and after each row ([`leaks`]). A row drives pods through
//! `crictl` ([`pod`], [`container`]) or `ctr` ([`ctr`]), as a person would.
//!
//! Nothing here knows how the shim works inside, except [`faults`], which has to find its processes to kill them.

pub mod cgroup;
pub mod cluster;
pub mod command;
pub mod config;
pub mod conformance;
pub mod container;
pub mod containerd;
pub mod cri;
pub mod critest;
pub mod ctr;
pub mod faults;
pub mod figure;
pub mod floor;
pub mod ginkgo;
pub mod grpc;
pub mod image;
pub mod leaks;
pub mod loop_device;
pub mod mounts;
pub mod nerdctl;
pub mod network;
pub mod overhead;
pub mod pod;
pub mod process;
pub mod row;
pub mod suite;
pub mod task;
pub mod terminal;
pub mod tools;
pub mod trend;
pub mod usage;
