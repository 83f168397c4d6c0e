//! Mounts in the guest outside of containers: the share, /dev/shm, and the rootfs a container is created from.
//!
//! A [`Stack`] remembers what it mounted and takes it down in reverse. What the containers' own mount namespaces hold is
//! libcontainer's.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::{GuestMount, guest_mount::Source};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2};

use crate::device;
use crate::error::{During, Error, Result};
use crate::spec::{self, SHARE, SHM};

/// Mounts that belong together.
#[derive(Debug, Default)]
pub struct Stack {
    targets: Vec<PathBuf>,
    /// Paths below the share that were entered.
    entered: Vec<(Arc<CommonMounts>, String)>,
}

impl Stack {
    /// Carries out `steps` in order. A target of `/` is `rootfs`, any other is a directory for a later overlay to name.
    pub async fn mount(&mut self, steps: Vec<GuestMount>, directory: &Path, rootfs: &Path) -> Result<()> {
        for step in steps {
            let target = if step.target == "/" {
                rootfs.to_owned()
            } else {
                directory.join(spec::share_path(step.target.trim_start_matches('/'))?)
            };
            let name = step.target.clone();
            let node = match &step.source {
                Some(Source::DeviceSerial(serial)) => Some(device::wait_for(serial).await?),
                _ => None,
            };
            let mounts = directory.to_owned();
            let mounted = target.clone();
            tokio::task::spawn_blocking(move || one(&step, node.as_deref(), &mounted, &mounts))
                .await
                .during(|| "mount")?
                .map_err(|error| error.during(format!("mount {name} of the rootfs")))?;
            self.targets.push(target);
        }
        Ok(())
    }

    /// Binds `source`, a file or directory, to `target`, which is made.
    pub fn bind(&mut self, source: &OwnedFd, target: &Path) -> Result<()> {
        let what = || format!("create {}", target.display());
        let kind = FileType::from_raw_mode(rustix::fs::fstat(source).during(what)?.st_mode);
        let parent = if kind == FileType::Directory { Some(target) } else { target.parent() };
        fs::create_dir_all(parent.unwrap_or(target)).during(what)?;
        if kind != FileType::Directory {
            fs::write(target, "").during(what)?;
        }
        let source = format!("/proc/self/fd/{}", source.as_raw_fd());
        bind(Path::new(&source), target, MsFlags::empty())?;
        self.targets.push(target.to_owned());
        Ok(())
    }

    /// Opens a path below the share, in what the host has mounted there for several containers.
    pub fn enter(&mut self, common: &Arc<CommonMounts>, path: &str) -> Result<OwnedFd> {
        let opened = common.enter(path)?;
        self.entered.push((Arc::clone(common), path.to_owned()));
        Ok(opened)
    }

    /// Unmounts everything; tries every mount, keeps what stays mounted for another try, and returns the first error. Blocks.
    pub fn unmount(&mut self) -> Result<()> {
        let (mut left, mut first) = (Vec::new(), Ok(()));
        while let Some(target) = self.targets.pop() {
            if let Err(error) = unmount(&target) {
                first = first.and(Err(error));
                left.push(target);
            }
        }
        left.reverse();
        self.targets = left;
        let left = self.entered.drain(..).map(|(common, path)| common.leave(&path));
        left.fold(first, Result::and)
    }
}

fn one(step: &GuestMount, node: Option<&Path>, target: &Path, directory: &Path) -> Result<()> {
    fs::create_dir_all(target).during(|| format!("create {}", target.display()))?;
    let (flags, data) = parse_options(&step.options);
    match &step.source {
        Some(Source::SharePath(path)) => bind(&shared(path)?, target, flags),
        Some(Source::PodShm(_)) => bind(Path::new(SHM), target, flags),
        Some(Source::DeviceSerial(_)) => {
            let node = node.ok_or_else(|| Error::internal("no device node"))?;
            attach(node, target, &step.fstype, flags, &data)
        }
        Some(Source::None(_)) | None if step.fstype == "overlay" => {
            let data = place_layers(&data, directory)?;
            for path in own_directories(&data) {
                fs::create_dir_all(path).during(|| format!("create {path}"))?;
            }
            attach(Path::new("overlay"), target, "overlay", flags, &data)
        }
        Some(Source::None(_)) | None => attach(Path::new(&step.fstype), target, &step.fstype, flags, &data),
    }
}

/// Mounts `fstype`.
pub fn attach(source: &Path, target: &Path, fstype: &str, flags: MsFlags, data: &str) -> Result<()> {
    mount(Some(source), target, Some(fstype), flags, Some(data))
        .during(|| format!("mount {fstype} on {} with options {data:?}", target.display()))
}

/// Binds `source`, a file or directory, to `target`; read-only and its like take a second step.
fn bind(source: &Path, target: &Path, flags: MsFlags) -> Result<()> {
    let recursive = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, recursive, None::<&str>)
        .during(|| format!("bind {} to {}", source.display(), target.display()))?;
    let restrictions = flags & (MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC);
    if restrictions.is_empty() {
        return Ok(());
    }
    let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | restrictions;
    mount(None::<&str>, target, None::<&str>, remount, None::<&str>).during(|| format!("restrict {}", target.display()))
}

/// Unmounts `target` if it is a mount point, lazily when it is still in use.
pub fn unmount(target: &Path) -> Result<()> {
    use nix::errno::Errno;
    match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(Errno::EBUSY) => umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .during(|| format!("unmount {}", target.display())),
        Err(error) => Err(Error::internal(format!("unmount {}: {error}", target.display()))),
    }
}

/// The guest path of `path` below the share, which must exist there and lead through no symbolic link.
pub fn shared(path: &str) -> Result<PathBuf> {
    open_shared(path).map(|_exists| Path::new(SHARE).join(path))
}

/// Opens `path` below the share as a place to be bound from; it must lead through no symbolic link.
///
/// What the host has mounted there is a file system that the kernel mounts when a path leads into it, anew in each mount
/// namespace. Those of containers are copies of this one: they all have it once this one has.
pub fn open_shared(path: &str) -> Result<OwnedFd> {
    let below = spec::share_path(path)?;
    let share =
        open_directory(Path::new(SHARE)).map_err(|error| Error::precondition(format!("open the share: {error}")))?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let open = |flags| openat2(&share, below, OFlags::PATH | OFlags::CLOEXEC | flags, Mode::empty(), resolve);
    // Only who asks for a directory enters it.
    let opened = match open(OFlags::DIRECTORY) {
        Err(rustix::io::Errno::NOTDIR) => open(OFlags::empty()),
        opened => opened,
    };
    opened.map_err(|error| Error::invalid(format!("{path} below the share: {error}")))
}

/// What the host has mounted in the share for several containers, by its path there, and how many binds of it there are.
///
/// The kernel mounts it in the guest when a path leads into it, and each time as another file system: containers have one in
/// common only if it stays from the first to the last of them.
#[derive(Debug, Default)]
pub struct CommonMounts {
    binds: Mutex<HashMap<String, usize>>,
}

impl CommonMounts {
    /// Opens `path` below the share as [`open_shared`] does, and keeps what it is in until [`Self::leave`].
    fn enter(&self, path: &str) -> Result<OwnedFd> {
        let mut binds = self.lock();
        // Entered first: nobody leaves what could not be.
        let opened = open_shared(path)?;
        *binds.entry(mount_in_share(path).to_owned()).or_default() += 1;
        Ok(opened)
    }

    /// Gives back what was entered by `path`. The last to do so unmounts it.
    fn leave(&self, path: &str) -> Result<()> {
        let (mut binds, mounted) = (self.lock(), mount_in_share(path));
        let Some(count) = binds.get_mut(mounted) else { return Ok(()) };
        *count -= 1;
        if *count > 0 {
            return Ok(());
        }
        binds.remove(mounted);
        unmount(&Path::new(SHARE).join(mounted))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.binds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part of a path below the share that is a mount of the host's: `<directory>/<number>`.
fn mount_in_share(path: &str) -> &str {
    path.match_indices('/').nth(1).map_or(path, |(end, _)| &path[..end])
}

/// Unmounts what the kernel has mounted by itself for the container `id` below the share. Blocks.
///
/// Whatever the host mounts there is announced as a file system of its own, and mounted when a path first leads into it. It
/// stays until the kernel looks the path up again and finds it gone, which nobody makes it do: each container would leave a
/// mount in the guest, and on the host its rootfs in use by virtiofsd, until the pod ends.
/// <https://docs.kernel.org/filesystems/virtiofs.html>, `announce_submounts` of virtiofsd.
pub fn leave_share(id: &str) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").during(|| "read the mount table")?;
    entered(&table, id).iter().map(|target| unmount(target)).fold(Ok(()), Result::and)
}

/// Mount points of a mount table right below a container's directory in the share, the latest first; what lies deeper goes
/// with them.
fn entered(table: &str, id: &str) -> Vec<PathBuf> {
    let directory = Path::new(SHARE).join(id);
    let points = table.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.parent() == Some(directory.as_path())).collect()
}

/// Makes `path` and its parents inside `root` with mode 0755, following links without ever leaving `root`.
pub fn make_directories(root: &Path, path: &Path) -> io::Result<()> {
    let mut directory = open_directory(root)?;
    let root = open_directory(root)?;
    let mut walked = PathBuf::from("/");
    for part in path.components() {
        let Component::Normal(name) = part else {
            if part == Component::ParentDir {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            }
            continue;
        };
        walked.push(name);
        match mkdirat(&directory, name, Mode::from(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST | rustix::io::Errno::ROFS) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        directory = openat2(&root, &walked, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)?;
    }
    Ok(())
}

/// Opens `path` inside `root` for reading, following links without ever leaving `root`.
pub fn read_inside(root: &Path, path: &Path) -> io::Result<Vec<u8>> {
    let root = open_directory(root)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(fs::File::from(file), 1 << 20), &mut bytes)?;
    Ok(bytes)
}

/// Opens a directory as a place, not to read it.
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Has the kernel forget the names below the share that nobody uses, so that the host can unmount what was deleted.
///
/// virtiofsd keeps a file open for each inode that the guest remembers; only FORGET releases it. A remount, even one that
/// changes nothing, drops what is cached of this file system and of no other; what containers that run have cached lies in
/// the file systems below it. Kernel: `reconfigure_super` in `fs/super.c`.
pub fn forget_share() -> Result<()> {
    mount(None::<&str>, Path::new(SHARE), None::<&str>, MsFlags::MS_REMOUNT, None::<&str>)
        .during(|| "have the kernel forget the share")
}

/// Lets every file system reach its disk, or the host. Blocks.
pub fn sync_all() {
    sync(Path::new(SHARE));
    nix::unistd::sync();
}

/// Flushes a mounted file system.
fn sync(path: &Path) {
    if let Ok(directory) = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        // What could not be written now is lost with the machine in any case.
        let _ = nix::unistd::syncfs(&directory);
    }
}

/// Splits options as mount(8) spells them into flags and what the file system itself reads.
pub fn parse_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (flag, set) = match option.as_str() {
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            // How mounts propagate is settled by the container's own mount namespace.
            "bind" | "rbind" | "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "defaults" => {
                continue;
            }
            other => {
                data.push(other);
                continue;
            }
        };
        flags.set(flag, set);
    }
    (flags, data.join(","))
}

/// Turns the layers of an overlay, named by the targets of earlier steps, into guest paths.
fn place_layers(data: &str, directory: &Path) -> Result<String> {
    let place = |path: &str| -> Result<String> {
        let below = spec::share_path(path.trim_start_matches('/'))?;
        Ok(directory.join(below).display().to_string())
    };
    let mut placed = Vec::new();
    for option in data.split(',').filter(|option| !option.is_empty()) {
        placed.push(match option.split_once('=') {
            Some(("lowerdir", layers)) => {
                let layers = layers.split(':').map(place).collect::<Result<Vec<_>>>()?;
                format!("lowerdir={}", layers.join(":"))
            }
            Some((key @ ("upperdir" | "workdir"), path)) => format!("{key}={}", place(path)?),
            _ => option.to_owned(),
        });
    }
    Ok(placed.join(","))
}

/// The directories of an overlay that may not exist yet on a fresh upper file system.
fn own_directories(data: &str) -> impl Iterator<Item = &str> {
    data.split(',').filter_map(|option| option.strip_prefix("upperdir=").or_else(|| option.strip_prefix("workdir=")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_into_flags_and_data() {
        let options = ["ro", "nosuid", "size=64m", "rslave", "mode=1777"].map(str::to_owned);
        assert_eq!(parse_options(&options), (MsFlags::MS_RDONLY | MsFlags::MS_NOSUID, "size=64m,mode=1777".to_owned()));
    }

    #[test]
    fn the_last_of_two_contrary_options_counts() {
        assert_eq!(parse_options(&["ro".to_owned(), "rw".to_owned()]).0, MsFlags::empty());
    }

    #[test]
    fn layers_are_placed_below_the_containers_directory() {
        let placed = place_layers("lowerdir=/l1:/l0,upperdir=/rw/up,workdir=/rw/work,xino=off", Path::new("/c"));
        let expected = "lowerdir=/c/l1:/c/l0,upperdir=/c/rw/up,workdir=/c/rw/work,xino=off";
        assert_eq!(placed.expect("placed"), expected);
        assert!(place_layers("lowerdir=/../x", Path::new("/c")).is_err());
    }

    #[test]
    fn the_mount_of_a_path_in_the_share_is_its_first_two_parts() {
        for path in ["_3/0", "_3/0/a", "_3/0/a/b"] {
            assert_eq!(mount_in_share(path), "_3/0");
        }
    }

    #[test]
    fn a_container_leaves_its_own_part_of_the_share() {
        let table = "20 1 0:2 / / rw - rootfs none rw\n21 20 0:30 / /run/bulkhead/share rw - virtiofs share rw\n\
             25 21 0:40 / /run/bulkhead/share/c1/rootfs rw - virtiofs share rw\n\
             26 25 0:41 / /run/bulkhead/share/c1/rootfs/a\\040b rw - virtiofs share rw\n\
             27 21 0:42 / /run/bulkhead/share/c1/0 rw - virtiofs share rw\n\
             28 21 0:43 / /run/bulkhead/share/c12/rootfs rw - virtiofs share rw\n\
             29 20 0:40 / /run/bulkhead/containers/c1/rootfs rw - virtiofs share rw\n";
        let expected = ["/run/bulkhead/share/c1/0", "/run/bulkhead/share/c1/rootfs"].map(PathBuf::from);
        assert_eq!(entered(table, "c1"), expected);
    }

    #[test]
    fn directories_are_made_inside_the_root_only() {
        let base = tempfile::tempdir().expect("tempdir");
        let root = base.path().join("root");
        fs::create_dir(&root).expect("mkdir");
        std::os::unix::fs::symlink("/outside", root.join("link")).expect("symlink");
        fs::create_dir(root.join("outside")).expect("mkdir");
        make_directories(&root, Path::new("/link/a/b")).expect("mkdirs");
        assert!(root.join("outside/a/b").is_dir());
        assert!(make_directories(&root, Path::new("/../x")).is_err());
        assert!(!base.path().join("x").exists());
    }

    #[test]
    fn files_are_read_inside_the_root_only() {
        let base = tempfile::tempdir().expect("tempdir");
        fs::create_dir(base.path().join("etc")).expect("mkdir");
        std::os::unix::fs::symlink("/etc/real", base.path().join("etc/passwd")).expect("symlink");
        fs::write(base.path().join("etc/real"), "inside").expect("write");
        assert_eq!(read_inside(base.path(), Path::new("/etc/passwd")).expect("read"), b"inside");
    }
}
