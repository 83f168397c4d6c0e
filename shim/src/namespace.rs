//! The pod's mount namespace on the host: where rootfs and volumes are mounted for the guest, and nowhere else.
//!
//! The host thread ([`crate::host`]) lives in it. Every mount of a pod is made here, so the host's own mount table never
//! shows one, and all of them end with the last process inside. Events travel one way only: what the host mounts and
//! unmounts arrives here (`/` is a slave), nothing of ours goes back.
//!
//! Binds cross from the host's namespace as detached trees: [`Tree::open`] clones the source in the host's namespace (any
//! thread but the host thread), [`Tree::attach`] puts the clone into place on the host thread. So a source means what it
//! means to containerd, whatever was mounted since the pod started.
//!
//! Every function but [`Tree::open`] acts on the calling thread's mount namespace and belongs on the host thread.
//! See `mount_namespaces(7)`, `open_tree(2)`, `mount_setattr(2)`.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use anyhow::Context;
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, FileType};
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::error::{Error, Kind, Result, WithKind};
use crate::mount_table::MountTable;
use crate::sys;

/// Rights that no mount of the share gives to the helper that serves it: virtiofsd opens no device and executes nothing.
/// What the guest may do with a file is the guest kernel's matter and not narrowed by this.
const NEVER: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// The tmpfs below which everything lies that the guest may see through virtiofs.
///
/// It is mounted twice: [`Self::exported`] is read-only, so that a guest can neither fill the host's memory nor plant a
/// symbolic link where the next mount goes; [`Self::staging`] is where mount points are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareRoot {
    root: PathBuf,
}

impl ShareRoot {
    /// The share at `root`, which [`prepare`] mounts.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory that virtiofsd serves; mounts on it are seen by virtiofsd's own namespace as well.
    pub fn exported(&self) -> PathBuf {
        self.root.join("export")
    }

    /// The same directory, writable.
    pub fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// Where layers of an overlay have names while it is mounted; nothing serves it.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Makes the mount point `relative`, a directory or an empty file, with the directories above it; returns its path in
    /// [`Self::exported`]. What exists already is kept.
    pub fn mount_point(&self, relative: &Path, is_dir: bool) -> Result<PathBuf> {
        let staged = self.staging().join(inside(relative)?);
        let what = || format!("make mount point {}", staged.display());
        let dir = if is_dir { Some(staged.as_path()) } else { staged.parent() };
        fs::create_dir_all(dir.unwrap_or(&staged)).or_kind(Kind::Internal, what())?;
        if !is_dir {
            fs::File::create(&staged).or_kind(Kind::Internal, what())?;
        }
        Ok(self.exported().join(relative))
    }

    /// Unmounts everything at and below `relative` and removes its mount points. Safe to call twice.
    ///
    /// Lazy: what the guest still holds goes away when the guest lets go of it. Every mount is tried; all errors are told.
    pub fn remove(&self, relative: &Path) -> Result<()> {
        let exported = self.exported().join(inside(relative)?);
        let mut failed = Vec::new();
        for mounted in mounts_below(&exported)? {
            if let Err(error) = unmount(&mounted) {
                failed.push(format!("{error}"));
            }
        }
        let staged = self.staging().join(relative);
        // Only mount points of ours lie here: empty files and directories. A directory that is still mounted refuses.
        if let Err(error) = remove_tree(&staged)
            && error.kind() != io::ErrorKind::NotFound
        {
            failed.push(format!("remove {}: {error}", staged.display()));
        }
        if failed.is_empty() { Ok(()) } else { Err(Error::internal(failed.join("; "))) }
    }
}

/// Makes the calling thread's mount namespace the pod's, with the share at `share_root` (see [`ShareRoot`]).
///
/// For [`crate::host::HostThread::start`].
pub fn prepare(share_root: PathBuf) -> impl FnOnce() -> anyhow::Result<()> + Send + 'static {
    move || {
        // CLONE_FS gives the thread a root and working directory of its own; unshare(2) demands it of a thread.
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).context("leave the host's mount namespace")?;
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", slave).context("cut mount propagation to the host")?;

        let share = ShareRoot::new(&share_root);
        let at = |step: &str| format!("share {}: {step}", share_root.display());
        fs::create_dir_all(&share_root).with_context(|| at("make the directory"))?;
        // A slave of a shared `/run` would still receive what the host mounts here; nobody does, and nothing goes back.
        rustix::mount::mount("tmpfs", &share_root, "tmpfs", NEVER, Some(c"mode=0700,size=16m,nr_inodes=64k"))
            .with_context(|| at("mount tmpfs"))?;
        rustix::mount::mount_change(&share_root, MountPropagationFlags::PRIVATE).with_context(|| at("make private"))?;
        fs::create_dir(share.staging()).with_context(|| at("make the staging directory"))?;
        fs::create_dir(share.exported()).with_context(|| at("make the exported directory"))?;
        // Directories that a container's users search must let them; the tmpfs root above lets only root through.
        for dir in [share.staging(), share.exported()] {
            fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .with_context(|| at("chmod"))?;
        }
        rustix::mount::mount_bind(share.staging(), share.exported()).with_context(|| at("bind"))?;
        let attributes = sys::MountAttributes { set: NEVER | MountFlags::RDONLY, propagation: None };
        sys::mount_setattr(CWD, &share.exported(), false, attributes)
            .with_context(|| at("make the export read-only"))?;
        // Shared, so that the copy in virtiofsd's namespace, a slave of this one, receives every later mount and unmount.
        rustix::mount::mount_change(share.exported(), MountPropagationFlags::SHARED).with_context(|| at("make shared"))
    }
}

/// Whether a mounted tree can be written through the share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// As its source can be.
    Writable,
    /// The topmost mount is read-only; mounts below it are as their sources are (`ro` of mount(8)).
    ReadOnly,
    /// No mount of the tree can be written (`rro` of the OCI runtime spec).
    ReadOnlyRecursive,
}

/// What a mounted tree hears of later mounts below its source on the host. The host never hears of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Nothing; and no unmount on the host has to wait for us.
    Private,
    /// Mounts and unmounts arrive (`HostToContainer` in Kubernetes).
    Slave,
}

/// Tells one source from another, whatever their paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    /// What its mount forbids.
    flags: u64,
}

/// A detached copy of a mounted tree, ready to be attached in the pod's namespace.
#[derive(Debug)]
pub struct Tree {
    fd: OwnedFd,
    file_type: FileType,
}

impl Tree {
    /// Clones the mount at `source` as the calling thread's namespace has it, with all mounts below it if `recursive`.
    ///
    /// Symbolic links are followed, as mount(2) and runc do. Errors say `stat <source>: ...`, with
    /// [`Kind::InvalidArgument`] when there is no such file. Not for the host thread.
    pub fn open(source: &Path, recursive: bool) -> Result<Self> {
        let stat = || format!("stat {}", source.display());
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        let fd = match rustix::mount::open_tree(CWD, source, flags) {
            Ok(fd) => fd,
            Err(errno @ (rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP)) => {
                return Err(Error::invalid(format!("{}: {}", stat(), told(errno))));
            }
            // The clone of a subtree that the kernel refuses (an unbindable mount) has no better name than this.
            Err(errno) => {
                return Err(Error::internal(format!("clone the mount of {}: {}", source.display(), told(errno))));
            }
        };
        let metadata = rustix::fs::fstat(&fd).or_kind(Kind::Internal, stat())?;
        Ok(Self { fd, file_type: FileType::from_raw_mode(metadata.st_mode) })
    }

    /// Whether the source is a directory; its mount point must be one then, and a file otherwise.
    pub fn is_dir(&self) -> bool {
        self.file_type == FileType::Directory
    }

    /// What the source is.
    pub fn file_type(&self) -> FileType {
        self.file_type
    }

    /// Which source it is.
    pub fn identity(&self) -> Result<Identity> {
        let (what, mounted) = (rustix::fs::fstat(&self.fd), rustix::fs::fstatvfs(&self.fd));
        let (what, mounted) = (what.or_kind(Kind::Internal, "stat")?, mounted.or_kind(Kind::Internal, "statvfs")?);
        Ok(Identity { device: what.st_dev, inode: what.st_ino, flags: mounted.f_flag.bits() })
    }

    /// Whether the source lies in procfs, sysfs or a cgroup hierarchy.
    pub fn is_kernel_file_system(&self) -> bool {
        // Values of linux/magic.h.
        const KERNEL: [i64; 4] =
            [libc::PROC_SUPER_MAGIC, libc::SYSFS_MAGIC, libc::CGROUP_SUPER_MAGIC, libc::CGROUP2_SUPER_MAGIC];
        rustix::fs::fstatfs(&self.fd).is_ok_and(|statfs| KERNEL.contains(&statfs.f_type))
    }

    /// Has the tree show and take owners through the maps of `user_namespace`; only its topmost mount unless `recursive`.
    ///
    /// Once for each mount. File systems that cannot do it are an error ([`Kind::InvalidArgument`]).
    pub fn map_ids(&self, user_namespace: &OwnedFd, recursive: bool) -> Result<()> {
        sys::map_mount_ids(&self.fd, recursive, user_namespace).map_err(|error| {
            let unfit = error.kind() == io::ErrorKind::InvalidInput;
            let kind = if unfit { Kind::InvalidArgument } else { Kind::Internal };
            let reason = if unfit { " (its file system takes no id-mapped mounts on this kernel)" } else { "" };
            Error::new(kind, format!("map the ids of a mount for its user namespace: {error}{reason}"))
        })
    }

    /// Mounts the tree at `target` in the calling thread's namespace.
    pub fn attach(self, target: &Path, access: Access, propagation: Propagation) -> Result<()> {
        let at = || format!("mount at {}", target.display());
        // Before the tree is attached: attached to a shared parent it becomes shared, with virtiofsd's copy as the only
        // peer. Were it still a peer of its source then, mounts below it would appear on the host.
        let propagation = match propagation {
            Propagation::Private => MountPropagationFlags::PRIVATE,
            Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
        };
        let mut set = NEVER;
        set.set(MountFlags::RDONLY, access == Access::ReadOnlyRecursive);
        let whole = sys::MountAttributes { set, propagation: Some(propagation) };
        sys::mount_setattr(&self.fd, Path::new(""), true, whole).or_kind(Kind::Internal, at())?;
        if access == Access::ReadOnly {
            let top = sys::MountAttributes { set: MountFlags::RDONLY, propagation: None };
            sys::mount_setattr(&self.fd, Path::new(""), false, top).or_kind(Kind::Internal, at())?;
        }
        rustix::mount::move_mount(&self.fd, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .or_kind(Kind::Internal, at())
    }
}

/// Mounts a new file system at `target`; `data` are the options that mount(2) leaves to the file system.
///
/// `directory` is where relative paths in `data` begin (long lists of lower directories must fit into one page).
pub fn mount(
    fstype: &str,
    source: &Path,
    target: &Path,
    flags: MountFlags,
    data: &str,
    directory: Option<&Path>,
) -> Result<()> {
    let at = || format!("mount {fstype} {} at {}", source.display(), target.display());
    let data = std::ffi::CString::new(data).or_kind(Kind::InvalidArgument, at())?;
    if let Some(directory) = directory {
        std::env::set_current_dir(directory).or_kind(Kind::Internal, format!("enter {}", directory.display()))?;
    }
    let mounted = rustix::mount::mount(source, target, fstype, flags | NEVER, Some(&*data));
    if directory.is_some() {
        // The thread's own working directory, not the process's (CLONE_FS); a busy one would hold a mount.
        std::env::set_current_dir("/").or_kind(Kind::Internal, "leave the directory of the layers")?;
    }
    mounted.or_kind(Kind::Internal, at())
}

/// Unmounts the topmost mount at `target` and everything below it, at once or as soon as its last user lets go.
/// Safe to call twice.
pub fn unmount(target: &Path) -> Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Not a mount point, or gone.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error).or_kind(Kind::Internal, format!("unmount {}", target.display())),
    }
}

/// Mount points at and below `path` in the calling thread's namespace, deepest and latest first.
fn mounts_below(path: &Path) -> Result<Vec<PathBuf>> {
    let table = MountTable::of_thread()?;
    let points = table.mounts().iter().map(|mount| mount.mount_point.clone());
    let mut found: Vec<PathBuf> = points.filter(|mounted| mounted.starts_with(path)).collect();
    found.reverse();
    // Only the topmost need a call of their own: MNT_DETACH takes the tree. Stacked mounts need one each.
    found.sort_by_key(|mounted| std::cmp::Reverse(mounted.components().count()));
    Ok(found)
}

/// Removes a tree of empty files and directories without following links and without descending into a mount.
fn remove_tree(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return fs::remove_file(path);
    }
    for entry in fs::read_dir(path)? {
        remove_tree(&entry?.path())?;
    }
    fs::remove_dir(path)
}

/// `relative`, if it stays below where it begins.
fn inside(relative: &Path) -> Result<&Path> {
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    if plain && relative.components().next().is_some() {
        Ok(relative)
    } else {
        Err(Error::internal(format!("\"{}\" is not a path below the share", relative.display())))
    }
}

/// The kernel's words for `errno`, in the lower case and without the number, as Go programs and so runc print them.
fn told(errno: rustix::io::Errno) -> String {
    let text = io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or(&text).to_owned();
    text.to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::host::HostThread;
    use crate::idmap::{IdMapping, IdMappings};
    use crate::storage::bind::{self, Bind, Ids};
    use crate::storage::{plan, rootfs};

    /// A pod's namespace and a directory of the host to take things from; `None`, with the reason printed, without root.
    fn pod() -> Option<(tempfile::TempDir, HostThread, ShareRoot)> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mounts need root");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("share");
        let host = HostThread::start(prepare(root.clone())).expect("the namespace is prepared");
        Some((dir, host, ShareRoot::new(root)))
    }

    fn volume(source: &Path, access: Access, propagation: Propagation) -> Bind {
        let destination = "/data".to_owned();
        let (source, recursive, ids) = (source.into(), true, None);
        Bind { index: 0, source, destination, recursive, access, propagation, ids }
    }

    async fn read(host: &HostThread, path: PathBuf) -> anyhow::Result<String> {
        host.run(move || Ok(fs::read_to_string(path)?)).await
    }

    #[tokio::test]
    async fn a_bound_directory_is_seen_in_the_pod_and_never_on_the_host() {
        let Some((dir, host, share)) = pod() else { return };
        let source = dir.path().join("source");
        fs::create_dir(&source).expect("mkdir");
        fs::write(source.join("file"), "content").expect("write");
        let volume = volume(&source, Access::Writable, Propagation::Private);
        bind::attach(&host, &share, "web", &[volume]).await.expect("attaches");
        let seen = share.exported().join("web/0/file");
        assert_eq!(read(&host, seen.clone()).await.expect("is there"), "content");
        assert!(!seen.exists(), "the host must not see the pod's mounts");
        rootfs::detach(&host, &share, "web").await.expect("detaches");
        rootfs::detach(&host, &share, "web").await.expect("detaches again");
        assert!(read(&host, seen).await.is_err());
        assert!(source.join("file").exists(), "detaching leaves the source alone");
    }

    #[tokio::test]
    async fn a_file_is_bound_alone_and_through_a_symbolic_link() {
        let Some((dir, host, share)) = pod() else { return };
        fs::write(dir.path().join("real"), "linked").expect("write");
        fs::write(dir.path().join("neighbour"), "secret").expect("write");
        symlink("real", dir.path().join("link")).expect("symlink");
        let volume = volume(&dir.path().join("link"), Access::Writable, Propagation::Private);
        bind::attach(&host, &share, "web", &[volume]).await.expect("attaches");
        assert_eq!(read(&host, share.exported().join("web/0")).await.expect("is there"), "linked");
        let listed = share.exported().join("web");
        let names = host.run(move || Ok(fs::read_dir(listed)?.count())).await.expect("lists");
        assert_eq!(names, 1, "a file must not bring its directory along");
    }

    #[tokio::test]
    async fn a_missing_source_is_refused_in_runc_s_words_and_leaves_nothing() {
        let Some((dir, host, share)) = pod() else { return };
        let missing = dir.path().join("missing");
        let volume = volume(&missing, Access::Writable, Propagation::Private);
        let error = bind::attach(&host, &share, "web", &[volume]).await.expect_err("is refused");
        let expected = format!(
            "error mounting {missing:?} to rootfs at \"/data\": stat {}: no such file or directory",
            missing.display()
        );
        assert_eq!(error.to_string(), expected);
        assert_eq!(error.kind(), Kind::InvalidArgument);
        let container = share.staging().join("web");
        assert!(host.run(move || Ok(fs::read_dir(container)?.count())).await.is_err());
    }

    #[tokio::test]
    async fn a_link_to_a_device_or_to_proc_is_refused() {
        let Some((dir, host, share)) = pod() else { return };
        for (name, target) in [("zero", "/dev/zero"), ("proc", "/proc/self")] {
            let link = dir.path().join(name);
            symlink(target, &link).expect("symlink");
            let volume = volume(&link, Access::Writable, Propagation::Private);
            let error = bind::attach(&host, &share, "web", &[volume]).await.expect_err("is refused");
            assert!(error.to_string().contains("not available in the guest"), "{error}");
        }
    }

    #[tokio::test]
    async fn read_only_holds_on_the_host_s_side_of_the_share() {
        let Some((dir, host, share)) = pod() else { return };
        for (access, writable) in
            [(Access::Writable, true), (Access::ReadOnly, false), (Access::ReadOnlyRecursive, false)]
        {
            let volume = volume(dir.path(), access, Propagation::Private);
            bind::attach(&host, &share, "web", &[volume]).await.expect("attaches");
            let file = share.exported().join("web/0/written");
            assert_eq!(host.run(move || Ok(fs::write(file, "x").is_ok())).await.expect("runs"), writable, "{access:?}");
            rootfs::detach(&host, &share, "web").await.expect("detaches");
        }
        let planted = share.exported().join("planted");
        assert!(!host.run(move || Ok(fs::write(planted, "x").is_ok())).await.expect("runs"), "the export is read-only");
    }

    #[tokio::test]
    async fn later_mounts_of_the_host_arrive_only_where_asked_for() {
        let Some((dir, host, share)) = pod() else { return };
        // A shared mount of its own: this machine's `/` need not be shared.
        let source = dir.path().join("source");
        fs::create_dir(&source).expect("mkdir");
        rustix::mount::mount("tmpfs", &source, "tmpfs", MountFlags::empty(), None).expect("mount");
        rustix::mount::mount_change(&source, MountPropagationFlags::SHARED).expect("share");
        fs::create_dir(source.join("later")).expect("mkdir");
        for (container, propagation) in [("private", Propagation::Private), ("slave", Propagation::Slave)] {
            let volume = volume(&source, Access::Writable, propagation);
            bind::attach(&host, &share, container, &[volume]).await.expect("attaches");
        }
        rustix::mount::mount("tmpfs", source.join("later"), "tmpfs", MountFlags::empty(), None).expect("mount");
        fs::write(source.join("later/file"), "x").expect("write");
        let in_slave = read(&host, share.exported().join("slave/0/later/file")).await;
        let in_private = read(&host, share.exported().join("private/0/later/file")).await;

        // And the other way: what the pod mounts below such a bind stays in the pod.
        let below = share.exported().join("slave/0/later");
        let mounted =
            host.run(move || Ok(mount("tmpfs", Path::new("pod"), &below, MountFlags::empty(), "", None)?)).await;
        let host_still_sees = fs::read_to_string(source.join("later/file"));
        let unmounted = rustix::mount::unmount(source.join("later"), UnmountFlags::DETACH)
            .and_then(|()| rustix::mount::unmount(&source, UnmountFlags::DETACH));
        unmounted.expect("unmount");
        mounted.expect("mounts in the pod");
        assert_eq!(in_slave.expect("arrives"), "x");
        assert!(in_private.is_err(), "a private bind hears nothing");
        assert_eq!(host_still_sees.expect("the host's mount is untouched"), "x");
    }

    #[tokio::test]
    async fn an_overlay_is_mounted_with_its_layers_relative_when_they_are_many() {
        let Some((dir, host, share)) = pod() else { return };
        let layers = dir.path().join("a-long-name-for-the-directory-of-all-the-layers-of-this-snapshotter");
        fs::create_dir(&layers).expect("mkdir");
        let count = 60;
        let lower: Vec<String> =
            (0..count).rev().map(|n| layers.join(format!("{n}/fs")).display().to_string()).collect();
        for (n, path) in lower.iter().enumerate() {
            fs::create_dir_all(path).expect("mkdir");
            fs::write(Path::new(path).join(format!("layer-{n}")), "x").expect("write");
        }
        let (upperdir, workdir) = (layers.join("up").display().to_string(), layers.join("work").display().to_string());
        fs::create_dir(&upperdir).expect("mkdir");
        fs::create_dir(&workdir).expect("mkdir");
        let options = vec![
            "index=off".to_owned(),
            format!("workdir={workdir}"),
            format!("upperdir={upperdir}"),
            format!("lowerdir={}", lower.join(":")),
        ];
        let mounts =
            [plan::Mount { fstype: "overlay".into(), source: "overlay".into(), target: String::new(), options }];
        let plan = plan::plan_rootfs(&mounts, None).expect("is planned");
        let guest = rootfs::attach(&host, &share, "web", &plan).await.expect("attaches");
        assert_eq!(guest[0].target, "/");
        let root = share.exported().join("web/rootfs");
        let seen = host.run(move || {
            fs::write(root.join("written"), "x")?;
            Ok((fs::read_dir(&root)?.count(), std::env::current_dir()?))
        });
        assert_eq!(seen.await.expect("reads"), (count + 1, PathBuf::from("/")));
        assert!(Path::new(&upperdir).join("written").exists());
        rootfs::detach(&host, &share, "web").await.expect("detaches");
    }

    #[tokio::test]
    async fn a_rootfs_whose_layers_are_missing_leaves_nothing() {
        let Some((_dir, host, share)) = pod() else { return };
        let options = vec!["lowerdir=/no/such/layer".to_owned()];
        let mounts =
            [plan::Mount { fstype: "overlay".into(), source: "overlay".into(), target: String::new(), options }];
        let plan = plan::plan_rootfs(&mounts, None).expect("is planned");
        let error = rootfs::attach(&host, &share, "web", &plan).await.expect_err("fails").to_string();
        assert!(error.contains("rootfs of container web"), "{error}");
        let left = share.staging().join("web/rootfs");
        assert!(!host.run(move || Ok(left.exists())).await.expect("runs"));
    }

    #[tokio::test]
    async fn an_id_mapped_volume_shows_and_takes_the_owners_of_its_namespace() {
        use std::os::unix::fs::{MetadataExt, chown};
        let Some((dir, host, share)) = pod() else { return };
        let source = dir.path().join("source");
        fs::create_dir(&source).expect("mkdir");
        fs::write(source.join("file"), "x").expect("write");
        let map = vec![IdMapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        let mappings = IdMappings { uids: map.clone(), gids: map };
        let mut volume = volume(&source, Access::Writable, Propagation::Private);
        volume.ids = Some(Ids { mappings, recursive: false });
        bind::attach(&host, &share, "web", std::slice::from_ref(&volume)).await.expect("attaches");
        let file = share.exported().join("web/0/file");
        let seen = host.run(move || {
            let seen = fs::metadata(&file)?.uid();
            chown(&file, Some(100_033), Some(100_000))?;
            Ok(seen)
        });
        assert_eq!(seen.await.expect("reads"), 100_000);
        assert_eq!(fs::metadata(source.join("file")).expect("is there").uid(), 33);

        volume.source = "/proc/self/attr".into();
        let error = bind::attach(&host, &share, "proc", &[volume]).await.expect_err("is refused");
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
    }

    #[test]
    fn paths_that_leave_the_share_are_refused() {
        for path in ["", ".", "..", "/etc", "a/../../b"] {
            assert!(inside(Path::new(path)).is_err(), "{path:?}");
        }
        assert!(inside(Path::new("web/0")).is_ok());
    }
}
