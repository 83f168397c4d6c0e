//! A rootfs on a block device or in an image file: attached to the guest as a disk, and mounted there.
//!
//! The host's kernel never reads that file system, which whoever wrote the image, and then the guest, made up; and reads and
//! writes need no file server. Gone with [`detach`], or with the VM.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use bulkhead_proto::agent::{GuestMount, guest_mount::Source};
use rustix::fs::OFlags;

use super::plan::Device;
use crate::device::block::{DiskSource, PluggedDisk};
use crate::error::{Error, Kind, Result, WithKind};
use crate::vm::disks::Disks;

/// File systems of the guest's kernel that live on one device.
const GUEST_TYPES: [&str; 3] = ["erofs", "ext4", "xfs"];

/// Whether the guest can mount what is on `device`; if not, the host has to.
pub fn fits(device: &Device) -> bool {
    GUEST_TYPES.contains(&device.fstype.as_str())
}

/// Attaches the disk and returns it with what the guest mounts; on an error nothing is left.
///
/// Not cancel safe: run it as a job.
pub async fn attach(disks: &Disks, container_id: &str, device: &Device) -> Result<(PluggedDisk, GuestMount)> {
    let attach = async {
        let (path, read_only) = (device.source.clone(), device.read_only);
        let opened = tokio::task::spawn_blocking(move || open(&path, read_only)).await;
        let (source, file) = opened.map_err(|error| Error::internal(format!("open the device: {error}")))??;
        let disk = disks.name(source, device.read_only)?;
        let plugged = disks.plug(&disk, file).await?;
        let mut options = device.options.clone();
        if device.read_only {
            options.push("ro".to_owned());
        }
        let mount = GuestMount {
            source: Some(Source::DeviceSerial(disk.serial)),
            target: "/".into(),
            fstype: device.fstype.clone(),
            options,
        };
        Ok((plugged, mount))
    };
    attach.await.map_err(|error: Error| error.context(format!("rootfs of container {container_id}")))
}

/// Detaches the disk, which the guest must have unmounted. Safe to repeat.
pub async fn detach(disks: &Disks, disk: &PluggedDisk) -> Result<()> {
    Ok(disks.unplug(disk).await?)
}

fn open(path: &str, read_only: bool) -> Result<(DiskSource, OwnedFd)> {
    let mut options = File::options();
    // A FIFO of that name must not block.
    options.read(true).write(!read_only).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let file = options.open(path).or_kind(Kind::InvalidArgument, format!("open {path}"))?;
    let kind = file.metadata().or_kind(Kind::Internal, format!("look at {path}"))?.file_type();
    let source = if kind.is_file() {
        DiskSource::File
    } else if kind.is_block_device() {
        DiskSource::HostDevice
    } else {
        return Err(Error::invalid(format!("{path} is neither a block device nor an image file")));
    };
    Ok((source, file.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_file_is_opened_and_anything_else_refused_by_name() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let image = dir.path().join("image");
        std::fs::write(&image, "").expect("writes");
        assert_eq!(open(image.to_str().expect("text"), false).expect("opens").0, DiskSource::File);
        for (path, said) in [("/dev/null", "neither a block device"), ("/no/such/device", "/no/such/device")] {
            let error = open(path, true).expect_err("is refused");
            assert!(error.kind() == Kind::InvalidArgument && error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn what_only_the_host_can_mount_is_left_to_it() {
        let on = |fstype: &str| Device {
            fstype: fstype.into(),
            source: "/dev/vdb".into(),
            options: Vec::new(),
            read_only: false,
        };
        assert!(["ext4", "xfs", "erofs"].iter().all(|fstype| fits(&on(fstype))));
        assert!(!["btrfs", "zfs"].iter().any(|fstype| fits(&on(fstype))));
    }
}
