//! The configuration of a VM: plain data from which everything about its QEMU follows. Can be stored and read back.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::Machine;
use crate::device::Device;
use crate::vm::accel::Accel;

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Name that a person sees in the list of processes: the sandbox's id.
    pub name: String,
    /// Machine type, or `auto` for the smallest that the devices fit.
    pub machine: Machine,
    /// Accelerator.
    pub accel: Accel,
    /// Virtual CPUs, from 1.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Uncompressed `vmlinux` (PVH), or a bzImage.
    pub kernel: PathBuf,
    /// A cpio archive, compressed as the kernel can read it.
    pub initramfs: PathBuf,
    /// Kernel parameters beside those that machine and devices need.
    pub kernel_params: Vec<String>,
    /// Devices in the order of their slots.
    pub devices: Vec<Device>,
}
