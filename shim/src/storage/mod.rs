//! How a container's files get from the host to the guest: its rootfs, its volumes, and the share that carries them.
//!
//! [`plan`] and [`volume::plan_volumes`] decide without looking at anything but their arguments; [`rootfs`], [`disk`],
//! [`bind`], [`block_volume`] and [`share`] act. No path of the host leaves this module towards the guest: what is shared is
//! named by container and number, a disk by its serial.

pub mod bind;
pub mod block_volume;
pub mod common;
pub mod container;
pub mod disk;
pub mod empty_dir;
pub mod etc;
pub mod layers;
pub mod memory;
pub mod plan;
pub mod rootfs;
pub mod share;
mod spec_mount;
pub mod volume;
