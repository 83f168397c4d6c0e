//! A shared directory (virtio 1.3 §5.11), served by a virtiofsd that the shim runs. Given at start only.

use serde::{Deserialize, Serialize};

use crate::device::DeviceId;
use crate::device::file::{FileRole, FileTable};
use crate::device::slots::Address;
use crate::qemu::args::{Args, Properties};

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fs {
    /// Name of the device.
    pub id: DeviceId,
    /// What the guest mounts; at most 36 bytes.
    pub tag: String,
}

impl Fs {
    /// Adds the device to the command line.
    pub fn args(&self, address: Address, args: &mut Args, files: &mut FileTable) {
        let socket = format!("{}-socket", self.id);
        let number = files.number(FileRole::VhostUser(self.id.clone()));
        args.option("-chardev", Properties::of("socket").with("id", &socket).with("fd", number));
        let device = address.device("vhost-user-fs").with("id", &self.id).with("chardev", socket);
        args.option("-device", device.with("tag", &self.tag).with("queue-size", 1024));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_comes_by_number() {
        let (mut args, mut files) = (Args::default(), FileTable::default());
        let id = DeviceId::new("share").expect("legal");
        Fs { id, tag: "share".into() }.args(Address::Mmio(1), &mut args, &mut files);
        assert_eq!(
            args.lines(),
            "-chardev socket,id=share-socket,fd=10\n\
             -device vhost-user-fs-device,bus=virtio-mmio-bus.1,id=share,chardev=share-socket,tag=share,queue-size=1024\n"
        );
    }
}
