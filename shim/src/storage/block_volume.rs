//! Raw block volumes: block devices of the host that a container has as devices (`volumeDevices` of a pod, `--device`).
//!
//! A spec names a device by its number, and by that the host's node of it is found. It becomes a disk of the VM, one for all
//! containers of the pod that may do the same with it: of two disks the guest would cache the same content twice, and a
//! container not see what another one writes. Pods and programs of the host may have the device too, see
//! [`DiskSource::SharedDevice`]. Gone with the last container that has it, or with the VM.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent;
use rustix::fs::{OFlags, ioctl_blkpbszget, ioctl_blksszget, makedev};
use tokio::sync::OnceCell;

use crate::device::block::{DiskSource, PluggedDisk};
use crate::error::{Error, Kind, Result, WithKind};
use crate::vm::disks::Disks;

/// Where the kernel lists block devices by number.
const BY_NUMBER: &str = "/sys/dev/block";

/// A block device that a spec gives to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockVolume {
    /// Path of its node in the container.
    pub path: String,
    /// Major number on the host.
    pub major: u32,
    /// Minor number on the host.
    pub minor: u32,
    /// Permission bits of the node.
    pub file_mode: u32,
    /// User that the node belongs to, by the host's ids.
    pub uid: u32,
    /// Group that the node belongs to, by the host's ids.
    pub gid: u32,
    /// What the container may do with it: letters of `rwm`. Without `w` the disk is read-only.
    pub access: String,
    /// The spec allows every device and may list all of the host's: what the host itself has at this path nobody asked for.
    pub among_all: bool,
}

impl BlockVolume {
    /// What the agent is told of it; `serial` is that of its disk.
    pub fn in_guest(self, serial: String) -> agent::BlockDevice {
        let Self { path, access, file_mode, uid, gid, .. } = self;
        agent::BlockDevice { serial, path, access, file_mode, uid, gid }
    }
}

impl fmt::Display for BlockVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {:?} (b {}:{})", self.path, self.major, self.minor)
    }
}

/// The device of the host that a volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// Its node, as the kernel names it.
    node: PathBuf,
    /// Where udev has another one.
    by_number: PathBuf,
    key: Key,
}

/// What makes two volumes one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// The device, as stat(2) numbers it.
    number: u64,
    read_only: bool,
}

/// Finds the devices of `volumes` on the host; those that nobody asked for are left out.
///
/// Fails for one that the host does not have, and says so by its path in the container.
pub async fn find(volumes: &[BlockVolume]) -> Result<Vec<(BlockVolume, HostDevice)>> {
    if volumes.is_empty() {
        return Ok(Vec::new());
    }
    let volumes = volumes.to_vec();
    let found = tokio::task::spawn_blocking(move || {
        let find_one = |volume: BlockVolume| -> Result<Option<(BlockVolume, HostDevice)>> {
            Ok(locate(Path::new(BY_NUMBER), &volume)?.map(|device| (volume, device)))
        };
        volumes.into_iter().filter_map(|volume| find_one(volume).transpose()).collect::<Result<Vec<_>>>()
    });
    found.await.map_err(|error| Error::internal(format!("look for block devices: {error}")))?
}

/// The device of `volume`, by `sysfs`; None if nobody asked for it.
fn locate(sysfs: &Path, volume: &BlockVolume) -> Result<Option<HostDevice>> {
    let number = makedev(volume.major, volume.minor);
    if volume.among_all && is_node(Path::new(&volume.path), number) {
        return Ok(None);
    }
    let numbers = format!("{}:{}", volume.major, volume.minor);
    let directory = sysfs.join(&numbers);
    let Ok(uevent) = fs::read_to_string(directory.join("uevent")) else {
        // One of all the host's may have gone since they were listed.
        return if volume.among_all {
            Ok(None)
        } else {
            Err(Error::invalid(format!("{volume}: the host has no such block device")))
        };
    };
    let by_number = Path::new("/dev/block").join(&numbers);
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let node = name.map_or_else(|| by_number.clone(), |name| Path::new("/dev").join(name));
    // Under runc a device that lets nobody write can be read whatever the spec allows; QEMU takes it for reading only.
    let protected = fs::read_to_string(directory.join("ro")).is_ok_and(|text| text.trim_end() == "1");
    let read_only = protected || !volume.access.contains('w');
    Ok(Some(HostDevice { node, by_number, key: Key { number, read_only } }))
}

fn is_node(path: &Path, number: u64) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_block_device() && found.rdev() == number)
}

/// The block volumes of one VM, each attached once for all that have it; clones are for the same VM.
#[derive(Debug, Clone, Default)]
pub struct BlockVolumes {
    disks: Arc<Mutex<HashMap<Key, Shared>>>,
}

/// A disk and how many containers have it, or are about to.
#[derive(Debug, Default)]
struct Shared {
    leases: usize,
    /// Filled by the first; the others wait for that.
    disk: Arc<OnceCell<Attached>>,
}

#[derive(Debug)]
struct Attached {
    disk: PluggedDisk,
    serial: String,
}

/// A container's part in a disk, until [`BlockVolumes::detach`].
#[derive(Debug)]
#[must_use = "the disk stays until the last lease of it is given back"]
pub struct Lease {
    key: Key,
}

impl BlockVolumes {
    /// Attaches `device` unless it is there already; returns the serial of its disk too. Not cancel safe: run it as a job.
    pub async fn attach(&self, disks: &Disks, device: &HostDevice) -> Result<(Lease, String)> {
        let (lease, disk) = self.take(device.key);
        match disk.get_or_try_init(|| plug(disks, device)).await.map(|attached| attached.serial.clone()) {
            Ok(serial) => Ok((lease, serial)),
            Err(error) => {
                // Another container may have had more luck with it, and let go of it first.
                if let Err(left) = self.detach(disks, lease).await {
                    tracing::warn!(error = %left, "a block volume that nobody has stays until the pod ends");
                }
                Err(error)
            }
        }
    }

    /// Gives `lease` back, and detaches the disk if it was the last. Not cancel safe: run it as a job.
    pub async fn detach(&self, disks: &Disks, lease: Lease) -> Result<()> {
        match self.give_back(lease) {
            Some(disk) => Ok(disks.unplug(&disk).await?),
            None => Ok(()),
        }
    }

    fn take(&self, key: Key) -> (Lease, Arc<OnceCell<Attached>>) {
        let mut disks = self.disks();
        let shared = disks.entry(key).or_default();
        shared.leases += 1;
        (Lease { key }, Arc::clone(&shared.disk))
    }

    /// Returns the disk if nobody has it any more: from now on who wants the device gets a new one.
    fn give_back(&self, lease: Lease) -> Option<PluggedDisk> {
        let mut disks = self.disks();
        let shared = disks.get_mut(&lease.key)?;
        shared.leases -= 1;
        if shared.leases > 0 {
            return None;
        }
        let last = disks.remove(&lease.key)?;
        last.disk.get().map(|attached| attached.disk.clone())
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<Key, Shared>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn plug(disks: &Disks, device: &HostDevice) -> Result<Attached> {
    let to_open = device.clone();
    let opened = tokio::task::spawn_blocking(move || open(&to_open)).await;
    let (source, file) = opened.map_err(|error| Error::internal(format!("open the device: {error}")))??;
    let disk = disks.name(source, device.key.read_only)?;
    let plugged = disks.plug(&disk, file).await?;
    Ok(Attached { disk: plugged, serial: disk.serial })
}

/// Opens the device by whichever node of it there is. The first one's error is the one that says more.
fn open(device: &HostDevice) -> Result<(DiskSource, OwnedFd)> {
    open_node(&device.node, device.key).or_else(|error| open_node(&device.by_number, device.key).map_err(|_| error))
}

fn open_node(node: &Path, key: Key) -> Result<(DiskSource, OwnedFd)> {
    let name = node.display();
    let mut options = File::options();
    // What else may have that name must not block.
    options.read(true).write(!key.read_only).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let file = options.open(node).or_kind(Kind::InvalidArgument, format!("open {name}"))?;
    let metadata = file.metadata().or_kind(Kind::Internal, format!("look at {name}"))?;
    if !metadata.file_type().is_block_device() || metadata.rdev() != key.number {
        return Err(Error::invalid(format!("{name} is not a node of the device")));
    }
    let size_of_blocks = || format!("ask {name} for the size of its blocks");
    let source = DiskSource::SharedDevice {
        logical_block: ioctl_blksszget(&file).or_kind(Kind::Internal, size_of_blocks())?,
        physical_block: ioctl_blkpbszget(&file).or_kind(Kind::Internal, size_of_blocks())?,
    };
    Ok((source, file.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceId;

    fn volume(path: &str, access: &str, among_all: bool) -> BlockVolume {
        BlockVolume {
            path: path.into(),
            major: 7,
            minor: 5,
            file_mode: 0o660,
            uid: 0,
            gid: 6,
            access: access.into(),
            among_all,
        }
    }

    /// A sysfs that has the device 7:5.
    fn sysfs(protected: &str) -> tempfile::TempDir {
        let sysfs = tempfile::tempdir().expect("makes a directory");
        let device = sysfs.path().join("7:5");
        fs::create_dir(&device).expect("makes a directory");
        fs::write(device.join("uevent"), "MAJOR=7\nMINOR=5\nDEVNAME=loop5\nDEVTYPE=disk\n").expect("writes");
        fs::write(device.join("ro"), protected).expect("writes");
        sysfs
    }

    #[test]
    fn a_device_is_found_by_its_number_and_read_only_unless_it_may_be_written() {
        for (access, protected, read_only) in
            [("rwm", "0\n", false), ("mrw", "0\n", false), ("r", "0\n", true), ("", "0\n", true), ("rwm", "1\n", true)]
        {
            let found = locate(sysfs(protected).path(), &volume("/dev/data", access, false)).expect("is fine");
            let key = Key { number: makedev(7, 5), read_only };
            let device = HostDevice { node: "/dev/loop5".into(), by_number: "/dev/block/7:5".into(), key };
            assert_eq!(found, Some(device), "{access:?}, {protected:?}");
        }
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_refused_unless_nobody_asked_for_it() {
        let empty = tempfile::tempdir().expect("makes a directory");
        let error = locate(empty.path(), &volume("/dev/data", "rwm", false)).expect_err("is refused");
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert_eq!(error.to_string(), "device \"/dev/data\" (b 7:5): the host has no such block device");
        assert_eq!(locate(empty.path(), &volume("/dev/data", "rwm", true)).expect("is fine"), None);
    }

    #[test]
    fn among_all_devices_one_that_is_elsewhere_on_the_host_was_asked_for() {
        // A character device is there, which is another one.
        let found = locate(sysfs("0\n").path(), &volume("/dev/null", "rwm", true)).expect("is fine");
        assert!(found.is_some());
    }

    #[test]
    fn what_is_not_the_device_is_refused_by_its_name() {
        let device = |node: &str| HostDevice {
            node: node.into(),
            by_number: "/no/such/fallback".into(),
            key: Key { number: makedev(7, 5), read_only: true },
        };
        for (node, said) in [("/dev/null", "/dev/null is not a node"), ("/no/such/device", "open /no/such/device: ")] {
            let error = open(&device(node)).expect_err("is refused");
            assert!(error.kind() == Kind::InvalidArgument && error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn a_disk_stays_until_the_last_that_has_it_lets_go() {
        let volumes = BlockVolumes::default();
        let writable = Key { number: makedev(7, 5), read_only: false };
        let plugged = PluggedDisk { id: DeviceId::new("disk-3").expect("legal"), lun: 4, fdset_id: 5 };
        let (first, disk) = volumes.take(writable);
        disk.set(Attached { disk: plugged.clone(), serial: "disk-3".into() }).expect("is empty");
        let (second, same) = volumes.take(writable);
        assert_eq!(same.get().map(|attached| attached.serial.as_str()), Some("disk-3"));
        let (reader, apart) = volumes.take(Key { read_only: true, ..writable });
        assert!(!apart.initialized(), "who may only read has a disk that cannot be written to");
        assert_eq!(volumes.give_back(first), None);
        assert_eq!(volumes.give_back(reader), None, "was never attached");
        assert_eq!(volumes.give_back(second), Some(plugged));
        let (_again, fresh) = volumes.take(writable);
        assert!(!fresh.initialized(), "a disk that is being detached is not given out again");
    }
}
