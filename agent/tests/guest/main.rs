//! The agent in a real guest: promises, each kept by containers in QEMU.
//!
//! Needs a guest (`BULKHEAD_TEST_ASSETS`) and helpers (`BULKHEAD_CACHE`), as `make test` sets them; skipped with a reason
//! without.

mod containers;
mod disks;
mod execs;
mod machine;
mod pods;
mod requests;
