//! Block devices by serial number: what the host plugged in under a name, found when the kernel has it.
//!
//! The serial is virtio-blk's `serial` attribute or the unit serial number page (VPD 0x80) of a SCSI disk.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{During, Error, Result};
use crate::sys;

/// How long a device may take to appear after the request that names it.
const APPEAR: Duration = Duration::from_secs(10);
/// Multicast group of the kernel's own uevents.
const KERNEL_EVENTS: u32 = 1;

/// Waits for the block device with `serial` and returns its node.
pub async fn wait_for(serial: &str) -> Result<PathBuf> {
    // Subscribed before the first look, so that a device cannot appear unseen between the two.
    let events = uevents()?;
    let search = async {
        loop {
            if let Some(node) = find(Path::new("/sys/block"), serial) {
                return Ok(node);
            }
            let mut ready = events.readable().await.during(|| "wait for device events")?;
            match rustix::net::recv(events.get_ref(), &mut [0; 4096], rustix::net::RecvFlags::empty()) {
                // A full socket means that events were lost: look again as well.
                Ok(_) | Err(rustix::io::Errno::NOBUFS) => {}
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(Error::internal(format!("receive device events: {error}"))),
            }
        }
    };
    tokio::time::timeout(APPEAR, search).await.map_err(|_| {
        Error::deadline(format!("no block device with serial {serial:?} appeared within {} s", APPEAR.as_secs()))
    })?
}

fn uevents() -> Result<AsyncFd<OwnedFd>> {
    let open = || -> io::Result<OwnedFd> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
        Ok(socket)
    };
    sys::watch(open().during(|| "listen for device events")?, Interest::READABLE).during(|| "listen for device events")
}

/// Looks through `/sys/block`; a device without a node in /dev yet does not count.
fn find(devices: &Path, serial: &str) -> Option<PathBuf> {
    fs::read_dir(devices).ok()?.flatten().find_map(|entry| {
        let directory = entry.path();
        let matches = fs::read_to_string(directory.join("serial")).is_ok_and(|text| text.trim_end() == serial)
            || fs::read(directory.join("device/vpd_pg80")).is_ok_and(|page| unit_serial(&page) == Some(serial));
        let node = Path::new("/dev").join(entry.file_name());
        (matches && node.exists()).then_some(node)
    })
}

/// The serial number in a VPD page 0x80: SPC-4, "Unit Serial Number VPD page".
fn unit_serial(page: &[u8]) -> Option<&str> {
    let length = usize::from(u16::from_be_bytes([*page.get(2)?, *page.get(3)?]));
    std::str::from_utf8(page.get(4..4 + length)?).ok().map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scsi_serial_is_read_from_its_page() {
        assert_eq!(unit_serial(b"\x00\x80\x00\x06rootfs"), Some("rootfs"));
        assert_eq!(unit_serial(b"\x00\x80\x00\x08  padded"), Some("padded"));
        assert_eq!(unit_serial(b"\x00\x80\x00\x09short"), None);
        assert_eq!(unit_serial(b""), None);
    }

    #[test]
    fn a_device_without_a_matching_serial_is_not_found() {
        let directory = tempfile::tempdir().expect("tempdir");
        fs::create_dir(directory.path().join("null")).expect("mkdir");
        fs::write(directory.path().join("null/serial"), "abc\n").expect("write");
        assert_eq!(find(directory.path(), "abc"), Some(PathBuf::from("/dev/null")));
        assert_eq!(find(directory.path(), "ab"), None);
    }
}
