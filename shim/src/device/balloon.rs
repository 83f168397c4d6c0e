//! Balloon: reports the guest's free pages, which the host then takes back (virtio 1.3 §5.5, free page reporting).
//!
//! Never inflated. Given at start only.

use serde::{Deserialize, Serialize};

use crate::device::DeviceId;
use crate::device::slots::Address;
use crate::qemu::args::Args;

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// Name of the device.
    pub id: DeviceId,
}

impl Balloon {
    /// Adds the device to the command line.
    pub fn args(&self, address: Address, args: &mut Args) {
        let device = address.device("virtio-balloon").with("id", &self.id).with("free-page-reporting", "on");
        args.option("-device", device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_pages_are_reported() {
        let mut args = Args::default();
        Balloon { id: DeviceId::new("balloon").expect("legal") }.args(Address::Pci(7), &mut args);
        assert_eq!(args.lines(), "-device virtio-balloon-pci,bus=pcie.0,addr=0x7,id=balloon,free-page-reporting=on\n");
    }
}
