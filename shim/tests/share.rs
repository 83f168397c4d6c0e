//! The pod's mounts as a real virtiofsd sees them: whatever comes and goes after it has made its own namespaces.
//!
//! Skipped with a printed reason without root or virtiofsd; `BULKHEAD_VIRTIOFSD` names another than the usual ones.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_shim::host::HostThread;
use bulkhead_shim::namespace::{self, Access, Propagation, ShareRoot};
use bulkhead_shim::storage::bind::{self, Bind};
use bulkhead_shim::storage::plan::{Mount, plan_rootfs};
use bulkhead_shim::storage::rootfs;
use tokio::sync::RwLock;

/// Written while a child is started, read while a file of an overlay is open: until it executes its program, the child has
/// a copy of every open file, and one of an overlay's would keep that overlay in use.
static STARTING: RwLock<()> = RwLock::const_new(());

/// A pod's mount namespace with a virtiofsd in it.
struct Bed {
    dir: tempfile::TempDir,
    host: HostThread,
    share: ShareRoot,
    outer: Child,
    inner_pid: i32,
}

impl Bed {
    async fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mounts need root");
            return None;
        }
        let Some(program) = virtiofsd() else {
            println!("skipped: no virtiofsd; BULKHEAD_VIRTIOFSD may name one");
            return None;
        };
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("share");
        let host = HostThread::start(namespace::prepare(root.clone())).expect("the namespace is prepared");
        let share = ShareRoot::new(root);
        let mut command = Command::new(program);
        command.arg("--shared-dir").arg(share.exported()).arg("--socket-path").arg(dir.path().join("socket"));
        command.args(["--sandbox=namespace", "--seccomp=kill", "--announce-submounts", "--inode-file-handles=never"]);
        command.stdin(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let starting = STARTING.write().await;
        let outer = host.run(move || Ok(command.spawn()?)).await.expect("virtiofsd starts");
        drop(starting);
        let inner_pid = settled(outer.id()).expect("virtiofsd makes its namespaces");
        Some(Self { dir, host, share, outer, inner_pid })
    }

    fn mount_count(&self) -> usize {
        fs::read_to_string(format!("/proc/{}/mountinfo", self.inner_pid)).expect("it lives").lines().count()
    }

    /// `path` below the share, as virtiofsd reaches it.
    fn inside(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.inner_pid.to_string()).join("root").join(path)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for pid in [self.inner_pid, self.outer.id().cast_signed()] {
            let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
            // The one may have taken the other with it.
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        self.outer.wait().expect("it ends");
    }
}

fn virtiofsd() -> Option<PathBuf> {
    let named = std::env::var_os("BULKHEAD_VIRTIOFSD").map(PathBuf::from);
    // Where `make setup` puts it.
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let built = cache.map(|cache| cache.join("bulkhead/tools/bin/virtiofsd"));
    let known = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"].map(PathBuf::from);
    named.into_iter().chain(built).chain(known).find(|path| path.exists())
}

/// The inner process of virtiofsd, once it lives in the share alone; `None` if that takes too long.
fn settled(outer_pid: u32) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        let children = fs::read_to_string(format!("/proc/{outer_pid}/task/{outer_pid}/children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            // One mount, its new root; the helper process that goes before it still has the host's.
            if mounts.lines().count() == 1 {
                return Some(pid);
            }
        }
        #[allow(clippy::disallowed_methods, reason = "a stranger's progress is seen in /proc only")]
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

#[tokio::test]
async fn a_container_restarted_a_hundred_times_leaves_no_mount_with_virtiofsd() {
    let Some(bed) = Bed::new().await else { return };
    let layers = bed.dir.path().join("layers");
    for name in ["lower", "upper", "work", "volume"] {
        fs::create_dir_all(layers.join(name)).expect("mkdir");
    }
    fs::write(layers.join("lower/file"), "of the image").expect("write");
    fs::write(layers.join("volume/file"), "of the volume").expect("write");
    let of = |name: &str| layers.join(name).display().to_string();
    // With the index on, overlayfs refuses an upper directory that another overlay still uses: so each round proves that
    // the one before is gone for good.
    let options = vec![
        "index=on".into(),
        format!("lowerdir={}", of("lower")),
        format!("upperdir={}", of("upper")),
        format!("workdir={}", of("work")),
    ];
    let mounts = [Mount { fstype: "overlay".into(), source: "overlay".into(), target: String::new(), options }];
    let plan = plan_rootfs(&mounts, None).expect("is planned");
    let volumes: Vec<Bind> = (0..3)
        .map(|index| Bind {
            index,
            source: layers.join(if index == 0 { "volume" } else { "volume/file" }),
            destination: "/data".into(),
            recursive: true,
            access: Access::ReadOnly,
            propagation: Propagation::Private,
            ids: None,
        })
        .collect();
    let before = bed.mount_count();
    for round in 0..100 {
        let round_s = |error| format!("round {round}: {error}");
        rootfs::attach(&bed.host, &bed.share, "web", &plan).await.map_err(round_s).expect("attaches");
        bind::attach(&bed.host, &bed.share, "web", &volumes).await.map_err(round_s).expect("attaches");
        let nobody_starts = STARTING.read().await;
        let seen = fs::read_to_string(bed.inside("web/rootfs/file")).expect("virtiofsd sees the rootfs");
        drop(nobody_starts);
        assert_eq!(seen, "of the image");
        for path in ["web/0/file", "web/1", "web/2"] {
            assert_eq!(fs::read_to_string(bed.inside(path)).expect(path), "of the volume");
        }
        assert!(fs::write(bed.inside("web/0/file"), "changed").is_err(), "read-only holds for virtiofsd too");
        assert_eq!(bed.mount_count(), before + 4);
        rootfs::detach(&bed.host, &bed.share, "web").await.map_err(round_s).expect("detaches");
        assert_eq!(bed.mount_count(), before, "round {round}");
        assert!(!bed.inside("web").exists());
    }
}

#[tokio::test]
async fn what_virtiofsd_holds_open_does_not_stop_the_removal() {
    let Some(bed) = Bed::new().await else { return };
    let source = bed.dir.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    rustix::mount::mount("tmpfs", &source, "tmpfs", rustix::mount::MountFlags::empty(), None).expect("mount");
    fs::write(source.join("file"), "x").expect("write");
    let volume = Bind {
        index: 0,
        source: source.clone(),
        destination: "/data".into(),
        recursive: true,
        access: Access::Writable,
        propagation: Propagation::Private,
        ids: None,
    };
    bind::attach(&bed.host, &bed.share, "web", &[volume]).await.expect("attaches");
    // As an inode that the guest has not forgotten is held.
    let held = fs::File::open(bed.inside("web/0/file")).expect("opens");
    rootfs::detach(&bed.host, &bed.share, "web").await.expect("detaches");
    // The host unmounts its volume without MNT_DETACH, as kubelet and containerd do.
    let unmounted = rustix::mount::unmount(&source, rustix::mount::UnmountFlags::empty());
    if unmounted.is_err() {
        rustix::mount::unmount(&source, rustix::mount::UnmountFlags::DETACH).expect("unmount");
    }
    unmounted.expect("the source is not busy");
    drop(held);
}

#[tokio::test]
async fn nothing_of_the_host_but_the_share_is_in_virtiofsd_s_namespace() {
    let Some(bed) = Bed::new().await else { return };
    let names: Vec<_> = fs::read_dir(bed.inside("")).expect("lists").collect();
    assert!(names.is_empty(), "the share is empty, and so is virtiofsd's world: {names:?}");
    let planted = fs::write(bed.inside("planted"), "x").expect_err("the root of the share is read-only");
    assert_eq!(planted.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}
