//! A network interface (virtio 1.3 §5.1) on a tap of the shim's, with the data path in the kernel where vhost-net is there.
//!
//! The tap arrives open and configured. Given at start only.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::DeviceId;
use crate::device::file::{FileRole, FileTable};
use crate::device::slots::Address;
use crate::qemu::args::{Args, Properties};

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Name of the device.
    pub id: DeviceId,
    /// The guest's hardware address.
    pub mac: MacAddress,
    /// Whether `/dev/vhost-net` comes along with the tap.
    pub vhost: bool,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let octets = self.0.map(|octet| format!("{octet:02x}"));
        f.write_str(&octets.join(":"))
    }
}

impl Net {
    /// Adds the device to the command line.
    pub fn args(&self, address: Address, args: &mut Args, files: &mut FileTable) {
        let host = format!("{}-host", self.id);
        let tap = files.number(FileRole::Tap(self.id.clone()));
        let mut netdev = Properties::of("tap").with("id", &host).with("fd", tap);
        if self.vhost {
            let vhost = files.number(FileRole::VhostNet(self.id.clone()));
            netdev = netdev.with("vhost", "on").with("vhostfd", vhost);
        }
        args.option("-netdev", netdev);
        let mut device = address.device("virtio-net").with("id", &self.id).with("netdev", host).with("mac", self.mac);
        if matches!(address, Address::Pci(_)) {
            // No boot from the network, so no firmware of the card's, which need not be installed then.
            device = device.with("romfile", "");
        }
        args.option("-device", device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(address: Address, vhost: bool) -> String {
        let (mut args, mut files) = (Args::default(), FileTable::default());
        let id = DeviceId::new("net0").expect("legal");
        Net { id, mac: MacAddress([2, 0, 0, 0, 0, 0xab]), vhost }.args(address, &mut args, &mut files);
        args.lines()
    }

    #[test]
    fn the_tap_comes_by_number() {
        assert_eq!(
            render(Address::Mmio(0), false),
            "-netdev tap,id=net0-host,fd=10\n\
             -device virtio-net-device,bus=virtio-mmio-bus.0,id=net0,netdev=net0-host,mac=02:00:00:00:00:ab\n"
        );
    }

    #[test]
    fn vhost_net_comes_by_number_too() {
        assert_eq!(
            render(Address::Pci(2), true),
            "-netdev tap,id=net0-host,fd=10,vhost=on,vhostfd=11\n\
             -device virtio-net-pci,bus=pcie.0,addr=0x2,id=net0,netdev=net0-host,mac=02:00:00:00:00:ab,romfile=\n"
        );
    }
}
