//! Volumes of the pod that are the guest's own: a tmpfs each, made for the first container that has it. They end with the
//! machine, as the host's volume does with the pod.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bulkhead_proto::agent::MemoryVolume;
use nix::mount::MsFlags;
use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fstat, mkdirat, openat2};
use rustix::io::Errno;

use crate::container::check_id;
use crate::error::{During, Error, Result};
use crate::{mount, spec};

/// Directory of their mount points.
const VOLUMES: &str = "/run/bulkhead/volumes";
/// Permissions of a directory with its sticky bit, and with set-ID bits as well.
const PERMISSIONS: u32 = 0o1777;
const ALL_BITS: u32 = 0o7777;

/// The volumes that there are.
#[derive(Debug, Default)]
pub struct MemoryVolumes {
    made: Mutex<HashSet<String>>,
}

impl MemoryVolumes {
    /// Makes a volume unless the pod has one of that name.
    pub fn make(&self, volume: &MemoryVolume) -> Result<()> {
        check_id(&volume.name)?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.contains(&volume.name) {
            return Ok(());
        }
        let target = Path::new(VOLUMES).join(&volume.name);
        fs::create_dir_all(&target).during(|| format!("create {}", target.display()))?;
        mount::attach(Path::new("tmpfs"), &target, "tmpfs", MsFlags::empty(), &options(volume))?;
        made.insert(volume.name.clone());
        Ok(())
    }
}

fn options(volume: &MemoryVolume) -> String {
    let MemoryVolume { size_bytes, inodes, mode, uid, gid, .. } = volume;
    format!("size={size_bytes},nr_inodes={inodes},mode={:o},uid={uid},gid={gid}", mode & ALL_BITS)
}

/// Opens `path`, the name of a volume with a path in it, as a place to be bound from.
///
/// Directories that are missing are made like those that kubelet makes for a `subPath`: with the permissions of the volume.
/// Links are followed, and none leads out of the volume.
pub fn open(path: &str) -> Result<OwnedFd> {
    let path = spec::share_path(path)?;
    let (volume, below) = path.split_once('/').unwrap_or((path, ""));
    check_id(volume)?;
    let missing = |error| Error::invalid(format!("volume {volume:?} of the pod: {error}"));
    let root = mount::open_directory(&Path::new(VOLUMES).join(volume)).map_err(missing)?;
    if below.is_empty() {
        return Ok(root);
    }
    open_below(&root, Path::new(below))
        .map_err(|error| Error::invalid(format!("{below:?} in volume {volume:?}: {error}")))
}

fn open_below(root: &OwnedFd, below: &Path) -> Result<OwnedFd, Errno> {
    let open = |path: &Path, flags| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    };
    match open(below, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        opened => return opened,
    }
    let like = fstat(root)?;
    let mut walked = std::path::PathBuf::new();
    let mut directory = root.try_clone().map_err(|_| Errno::MFILE)?;
    for name in below {
        walked.push(name);
        if let Err(Errno::NOENT) = open(&walked, OFlags::PATH) {
            make_like(&directory, name, &like)?;
        }
        directory = open(&walked, OFlags::PATH | OFlags::DIRECTORY)?;
    }
    Ok(directory)
}

/// Makes a directory with the permissions and the owner of `like`; a group that the directory above hands down stays.
fn make_like(directory: &OwnedFd, name: &OsStr, like: &rustix::fs::Stat) -> Result<(), Errno> {
    match mkdirat(directory, name, Mode::RWXU) {
        Ok(()) => {}
        // A container was faster, and the directory is its.
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let inherited = fstat(&made)?;
    fchown(&made, Some(Uid::from_raw(like.st_uid)), None::<Gid>)?;
    let handed_down = Mode::SGID.bits() & inherited.st_mode;
    if handed_down == 0 {
        fchown(&made, None::<Uid>, Some(Gid::from_raw(like.st_gid)))?;
    }
    fchmod(&made, Mode::from_bits_retain((like.st_mode & PERMISSIONS) | handed_down))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn volume() -> (tempfile::TempDir, OwnedFd) {
        let base = tempfile::tempdir().expect("tempdir");
        let root = base.path().join("volume");
        fs::create_dir(&root).expect("mkdir");
        fs::set_permissions(&root, fs::Permissions::from_mode(0o3770)).expect("chmod");
        let opened = mount::open_directory(&root).expect("opens");
        (base, opened)
    }

    #[test]
    fn a_tmpfs_is_as_large_and_owned_as_asked_for() {
        let volume = MemoryVolume { name: "v".into(), size_bytes: 4096, inodes: 0, mode: 0o42_777, uid: 0, gid: 2345 };
        assert_eq!(options(&volume), "size=4096,nr_inodes=0,mode=2777,uid=0,gid=2345");
    }

    #[test]
    fn missing_directories_are_made_like_the_volume() {
        let (base, root) = volume();
        open_below(&root, Path::new("a/b")).expect("opens");
        for made in ["volume/a", "volume/a/b"] {
            let made = base.path().join(made).metadata().expect("is there");
            assert_eq!(made.mode() & ALL_BITS, 0o3770);
        }
        open_below(&root, Path::new("a/b")).expect("opens what is there");
    }

    #[test]
    fn a_file_is_opened_as_it_is() {
        let (base, root) = volume();
        fs::write(base.path().join("volume/file"), "x").expect("writes");
        let opened = open_below(&root, Path::new("file")).expect("opens");
        assert_eq!(fstat(&opened).expect("stat").st_size, 1);
        assert_eq!(open_below(&root, Path::new("file/x")).expect_err("is refused"), Errno::NOTDIR);
    }

    #[test]
    fn links_lead_nowhere_else() {
        let (base, root) = volume();
        fs::create_dir(base.path().join("outside")).expect("mkdir");
        symlink("../outside", base.path().join("volume/up")).expect("symlink");
        symlink("/etc", base.path().join("volume/away")).expect("symlink");
        symlink("inside", base.path().join("volume/link")).expect("symlink");
        for path in ["up", "away", "up/x", "away/x"] {
            assert_eq!(open_below(&root, Path::new(path)).expect_err(path), Errno::XDEV, "{path}");
        }
        fs::create_dir(base.path().join("volume/inside")).expect("mkdir");
        open_below(&root, Path::new("link/deep")).expect("opens");
        assert!(base.path().join("volume/inside/deep").is_dir());
        assert!(!base.path().join("outside/x").exists());
    }
}
