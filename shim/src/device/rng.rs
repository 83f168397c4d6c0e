//! Entropy for the guest (virtio 1.3 §5.4), from the host kernel's generator. Given at start only.

use serde::{Deserialize, Serialize};

use crate::device::DeviceId;
use crate::device::slots::Address;
use crate::qemu::args::{Args, Properties};

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rng {
    /// Name of the device.
    pub id: DeviceId,
}

impl Rng {
    /// Adds the device to the command line.
    pub fn args(&self, address: Address, args: &mut Args) {
        let source = format!("{}-source", self.id);
        // The built-in source calls getrandom(2): no file, so nothing to open in QEMU's own /dev.
        args.option("-object", Properties::of("rng-builtin").with("id", &source));
        args.option("-device", address.device("virtio-rng").with("id", &self.id).with("rng", source));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_comes_before_the_device() {
        let mut args = Args::default();
        Rng { id: DeviceId::new("rng").expect("legal") }.args(Address::Mmio(2), &mut args);
        assert_eq!(
            args.lines(),
            "-object rng-builtin,id=rng-source\n-device virtio-rng-device,bus=virtio-mmio-bus.2,id=rng,rng=rng-source\n"
        );
    }
}
