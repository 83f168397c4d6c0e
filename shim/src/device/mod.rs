//! The devices of a VM, one file each: what it is, how it is given at QEMU's start (`args`), and, where it can be, how it comes
//! and goes at run time (`plug`, `unplug`).
//!
//! Every virtio device renders itself for either bus: virtio-mmio on `microvm`, PCI Express on `q35`. Plain, serialisable data:
//! a list of devices at stable addresses is what a snapshot or a migration target has to be given.
//!
//! Devices: <https://www.qemu.org/docs/master/system/device-emulation.html>; virtio 1.3 §4.1 (PCI), §4.2 (MMIO).

pub mod file;
pub mod slots;

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
pub mod memory;
pub mod net;
pub mod rng;
pub mod vsock;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::balloon::Balloon;
use crate::device::block::ScsiController;
use crate::device::file::FileTable;
use crate::device::fs::Fs;
use crate::device::net::Net;
use crate::device::rng::Rng;
use crate::device::slots::Address;
use crate::device::vsock::Vsock;
use crate::qemu::args::Args;

/// Name of a device, unique in its VM. QEMU's rule: a letter, then letters, digits, `-`, `.`, `_`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceId(String);

impl DeviceId {
    /// Checks `id` against QEMU's rule.
    pub fn new(id: impl Into<String>) -> Result<Self, InvalidDeviceId> {
        let id = id.into();
        let legal = |character: char| character.is_ascii_alphanumeric() || "-._".contains(character);
        if id.starts_with(|first: char| first.is_ascii_alphabetic()) && id.len() <= 127 && id.chars().all(legal) {
            Ok(Self(id))
        } else {
            Err(InvalidDeviceId(id))
        }
    }

    /// As QEMU is told.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for DeviceId {
    type Error = InvalidDeviceId;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        Self::new(id)
    }
}

impl From<DeviceId> for String {
    fn from(id: DeviceId) -> Self {
        id.0
    }
}

/// A string that cannot name a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("device id {0:?}: accepted is a letter, then at most 126 letters, digits, '-', '.', '_'")]
pub struct InvalidDeviceId(String);

/// A device on the virtio bus, which takes one slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// Network interface.
    Net(Net),
    /// Shared directory.
    Fs(Fs),
    /// Controller of the disks that come and go.
    Scsi(ScsiController),
    /// Sockets between guest and host.
    Vsock(Vsock),
    /// Entropy.
    Rng(Rng),
    /// Gives free memory back.
    Balloon(Balloon),
}

impl Device {
    /// The device's name.
    pub fn id(&self) -> &DeviceId {
        match self {
            Self::Net(device) => &device.id,
            Self::Fs(device) => &device.id,
            Self::Scsi(device) => &device.id,
            Self::Vsock(device) => &device.id,
            Self::Rng(device) => &device.id,
            Self::Balloon(device) => &device.id,
        }
    }

    /// Whether another process serves the device and must see the guest's memory.
    pub fn needs_shared_memory(&self) -> bool {
        match self {
            Self::Fs(_) => true,
            Self::Vsock(device) => device.needs_shared_memory(),
            Self::Net(_) | Self::Scsi(_) | Self::Rng(_) | Self::Balloon(_) => false,
        }
    }

    /// What the guest's kernel must be told for the device.
    pub fn kernel_params(&self) -> &'static [&'static str] {
        match self {
            Self::Scsi(_) => ScsiController::KERNEL_PARAMS,
            Self::Net(_) | Self::Fs(_) | Self::Vsock(_) | Self::Rng(_) | Self::Balloon(_) => &[],
        }
    }

    /// Adds the device at `address` to QEMU's command line.
    pub fn args(&self, address: Address, args: &mut Args, files: &mut FileTable) {
        match self {
            Self::Net(device) => device.args(address, args, files),
            Self::Fs(device) => device.args(address, args, files),
            Self::Scsi(device) => device.args(address, args),
            Self::Vsock(device) => device.args(address, args, files),
            Self::Rng(device) => device.args(address, args),
            Self::Balloon(device) => device.args(address, args),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_id_cannot_carry_an_option() {
        assert!(DeviceId::new("net-eth0.1_a").is_ok());
        for bad in ["", "0net", "net,mac=1", "net 0", "nét", &"x".repeat(128)] {
            assert!(DeviceId::new(bad).is_err(), "{bad:?}");
        }
        let read = serde_json::from_str::<DeviceId>("\"a,b\"");
        assert!(read.expect_err("is checked on reading too").to_string().contains("accepted is a letter"));
    }
}
