//! Sockets between guest and host (virtio 1.3 §5.10): the kernel's vhost-vsock, or a process that serves vhost-user.
//!
//! The guest sees no difference. Given at start only.

use serde::{Deserialize, Serialize};

use crate::device::DeviceId;
use crate::device::file::{FileRole, FileTable};
use crate::device::slots::Address;
use crate::qemu::args::{Args, Properties};

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// Name of the device.
    pub id: DeviceId,
    /// Who serves it.
    pub backend: Backend,
}

/// Who serves the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// The kernel, through an open `/dev/vhost-vsock`.
    Vhost {
        /// The guest's address, unique on the host.
        guest_cid: u32,
    },
    /// A process at the other end of a socket, which also knows the address.
    VhostUser,
}

impl Vsock {
    /// Whether another process must see the guest's memory.
    pub fn needs_shared_memory(&self) -> bool {
        self.backend == Backend::VhostUser
    }

    /// Adds the device to the command line.
    pub fn args(&self, address: Address, args: &mut Args, files: &mut FileTable) {
        let device = match self.backend {
            Backend::Vhost { guest_cid } => {
                let number = files.number(FileRole::VhostVsock(self.id.clone()));
                address.device("vhost-vsock").with("id", &self.id).with("vhostfd", number).with("guest-cid", guest_cid)
            }
            Backend::VhostUser => {
                let socket = format!("{}-socket", self.id);
                let number = files.number(FileRole::VhostUser(self.id.clone()));
                args.option("-chardev", Properties::of("socket").with("id", &socket).with("fd", number));
                address.device("vhost-user-vsock").with("id", &self.id).with("chardev", socket)
            }
        };
        args.option("-device", device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(backend: Backend) -> String {
        let (mut args, mut files) = (Args::default(), FileTable::default());
        Vsock { id: DeviceId::new("vsock").expect("legal"), backend }.args(Address::Mmio(3), &mut args, &mut files);
        args.lines()
    }

    #[test]
    fn the_kernels_device_has_an_address() {
        assert_eq!(
            render(Backend::Vhost { guest_cid: 77 }),
            "-device vhost-vsock-device,bus=virtio-mmio-bus.3,id=vsock,vhostfd=10,guest-cid=77\n"
        );
    }

    #[test]
    fn a_process_serves_by_socket() {
        assert_eq!(
            render(Backend::VhostUser),
            "-chardev socket,id=vsock-socket,fd=10\n\
             -device vhost-user-vsock-device,bus=virtio-mmio-bus.3,id=vsock,chardev=vsock-socket\n"
        );
    }
}
