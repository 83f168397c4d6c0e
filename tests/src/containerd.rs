//! A private containerd: its directories, its configuration, its process.
//!
//! Everything of a node lies under one temporary directory, except what other programs put in fixed places: the bridge
//! network, the cgroups, and shim sockets in /run/containerd/s. All of those carry the node's name or a hash of it, and
//! [`crate::leaks`] looks for them there.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::cgroup::Subtree;
use crate::command::{Run, wait_for, wait_until};
use crate::config;
use crate::image::{self, Image};
use crate::network::Network;
use crate::tools::{self, BulkheadTools, ContainerdTools, Version};

/// containerd's namespace of everything that `ctr` makes.
pub const CRI_NAMESPACE: &str = "k8s.io";

/// Size of a container's root file system on the blockfile snapshotter.
const SCRATCH_BYTES: u64 = 32 << 20;

/// Paths of a node.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The directory of everything.
    pub root: PathBuf,
    /// containerd's socket.
    pub socket: PathBuf,
    /// Bulkhead's run state.
    pub bulkhead_state: PathBuf,
}

impl Layout {
    /// Path by which a program or guest file of Bulkhead is named on this node: a link under [`Self::root`], so that a
    /// process can be told by its command line.
    pub fn program(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }
}

/// A running containerd with its network and images.
#[derive(Debug)]
pub struct Node {
    /// Release line.
    pub version: Version,
    /// Where everything is.
    pub layout: Layout,
    /// The pods' network.
    pub network: Network,
    /// Where the pods' cgroups are.
    pub cgroups: Subtree,
    /// Short name, unique on the machine; also the namespace that `ctr` uses.
    pub name: String,
    tools: ContainerdTools,
    crictl: PathBuf,
    daemon: Mutex<Option<Child>>,
    counter: AtomicU32,
    /// `namespace/id` of everything that ever ran, for what is named by hashes of it.
    ids: Mutex<BTreeSet<String>>,
    /// Cgroups of pods that are gone: removed as soon as they are empty.
    released: Mutex<BTreeSet<String>>,
    // Removed last.
    _directory: TempDir,
}

impl Node {
    /// Starts a containerd of `version` and imports the images.
    ///
    /// `bulkhead` may be `None` for a node that only runs runc.
    pub fn start(version: Version, bulkhead: Option<&BulkheadTools>) -> Result<Self> {
        let tools = ContainerdTools::find(version)?;
        let crictl = tools::crictl()?;
        let runc = tools::runc()?;
        // Socket paths are limited to 107 bytes and hold a 64 digit id: the directory's name has to be short.
        let directory = tempfile::Builder::new().prefix("bh").rand_bytes(6).tempdir().context("make a directory")?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let root = directory.path().to_owned();
        let name: String = directory.path().file_name().context("a directory without name")?.to_string_lossy().into();
        let layout = Layout { socket: root.join("c.sock"), bulkhead_state: root.join("r"), root };
        for part in ["bin", "cni", "rows"] {
            let path = layout.root.join(part);
            fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        }
        if let Some(bulkhead) = bulkhead {
            bulkhead.link_into(&layout.root.join("bin"))?;
        }
        let network = Network::configure(&name, &layout.root.join("cni"))?;
        let cgroups = Subtree::new(&name)?;
        let scratch = layout.root.join(config::SCRATCH_FILE);
        fs::File::create(&scratch).and_then(|file| file.set_len(SCRATCH_BYTES)).context("make a scratch file")?;
        Run::new("/sbin/mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(&scratch).success()?;
        fs::write(layout.root.join("containerd.toml"), config::containerd(version, &layout, &runc))?;
        let node = Self {
            version,
            layout,
            network,
            cgroups,
            name,
            tools,
            crictl,
            daemon: Mutex::new(None),
            counter: AtomicU32::new(0),
            ids: Mutex::default(),
            released: Mutex::default(),
            _directory: directory,
        };
        node.configure_bulkhead("bulkhead.toml", &config::Bulkhead::default())?;
        node.configure_bulkhead("bad.toml", &config::Bulkhead::default())?;
        node.start_daemon()?;
        node.import_images()?;
        Ok(node)
    }

    /// Writes one of Bulkhead's configuration files; pods started from now on use it.
    pub fn configure_bulkhead(&self, file: &str, settings: &config::Bulkhead) -> Result<()> {
        let path = self.layout.root.join(file);
        fs::write(&path, settings.render(&self.layout)).with_context(|| format!("write {}", path.display()))
    }

    /// Starts the daemon and waits until it answers.
    pub fn start_daemon(&self) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let child = Command::new(self.tools.directory.join("containerd"))
            .arg("--config")
            .arg(self.layout.root.join("containerd.toml"))
            .env("PATH", self.search_path())
            .env("BULKHEAD_CONFIG", self.layout.root.join("bulkhead.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start containerd {}", self.version))?;
        *self.daemon() = Some(child);
        wait_for(&format!("containerd {} to answer", self.version), Duration::from_secs(30), || {
            self.crictl(&["version"]).deadline(Duration::from_secs(5)).success()
        })
        .map_err(|error| error.context(format!("containerd's log ends with\n{}", self.log_since(0, 20))))?;
        Ok(())
    }

    fn import_images(&self) -> Result<()> {
        self.import(&image::common()?, &[CRI_NAMESPACE, self.name.as_str()])
    }

    /// Imports images into namespaces of containerd, CRI's among them, and waits until CRI knows them.
    pub fn import(&self, images: &[Image], namespaces: &[&str]) -> Result<()> {
        let archive = self.layout.root.join("images.tar");
        image::write_archive(&archive, images)?;
        for namespace in namespaces {
            Run::new(self.tools.directory.join("ctr"))
                .arg("--address")
                .arg(&self.layout.socket)
                .args(["--namespace", namespace, "images", "import"])
                .arg(&archive)
                .success()?;
        }
        for image in images {
            wait_for("the CRI plugin to know the images", Duration::from_secs(10), || {
                self.crictl(&["inspecti", &image.name]).success()
            })?;
        }
        Ok(())
    }

    fn daemon(&self) -> MutexGuard<'_, Option<Child>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Process id of containerd, while it runs.
    pub fn daemon_pid(&self) -> Option<i32> {
        self.daemon().as_ref().map(|child| child.id().cast_signed())
    }

    /// Kills containerd as a crash would; shims and pods stay.
    pub fn kill_daemon(&self) -> Result<()> {
        self.stop_daemon(Signal::SIGKILL)
    }

    fn stop_daemon(&self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.daemon().take() else { return Ok(()) };
        kill(Pid::from_raw(child.id().cast_signed()), signal).context("signal containerd")?;
        if wait_until(&mut child, Instant::now() + Duration::from_secs(20))?.is_none() {
            child.kill().context("kill containerd")?;
            child.wait().context("wait for containerd")?;
            anyhow::bail!("containerd {} was still there 20 s after {signal}", self.version);
        }
        Ok(())
    }

    /// Ends containerd and removes the network and the cgroups.
    pub fn stop(&self) -> Result<()> {
        let stopped = self.stop_daemon(Signal::SIGTERM);
        self.network.remove();
        self.cgroups.remove();
        stopped
    }

    /// The directory of the `ctr`, `containerd` and runc shim of this release.
    pub fn tools(&self) -> &Path {
        &self.tools.directory
    }

    /// Path of `crictl`.
    pub fn crictl_path(&self) -> &Path {
        &self.crictl
    }

    /// What `crictl` needs to find this node.
    pub fn crictl_environment(&self) -> [(&'static str, String); 3] {
        let endpoint = format!("unix://{}", self.layout.socket.display());
        [
            ("CONTAINER_RUNTIME_ENDPOINT", endpoint.clone()),
            ("IMAGE_SERVICE_ENDPOINT", endpoint),
            ("CRI_CONFIG_FILE", "/dev/null".into()),
        ]
    }

    /// A `crictl` command on this node.
    pub fn crictl(&self, args: &[&str]) -> Run {
        let mut run = Run::new(&self.crictl).args(["--timeout", "180s"]).args(args);
        for (key, value) in self.crictl_environment() {
            run = run.env(key, value);
        }
        run
    }

    /// `PATH` of the daemon: the node's own programs first.
    fn search_path(&self) -> String {
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        format!("{}:{}:{path}", self.layout.root.join("bin").display(), self.tools.directory.display())
    }

    /// The node CLI, `bulkhead`, with the configuration of this node's pods.
    pub fn bulkhead(&self, args: &[&str]) -> Run {
        self.bulkhead_with("bulkhead.toml", args)
    }

    /// [`Self::bulkhead`] with another of the node's configuration files.
    pub fn bulkhead_with(&self, file: &str, args: &[&str]) -> Run {
        let config = self.layout.root.join(file);
        Run::new(self.layout.program("bulkhead")).arg("--config").arg(config).args(args).env("PATH", self.search_path())
    }

    /// A number that no other name on this node has.
    pub fn next_number(&self) -> u32 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    /// A directory for one row's files.
    pub fn scratch(&self) -> Result<PathBuf> {
        let path = self.layout.root.join(format!("rows/{}", self.next_number()));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// Notes an id, so that what is named after it can be looked for.
    pub fn remember(&self, namespace: &str, id: &str) {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("{namespace}/{id}"));
    }

    /// `namespace/id` of everything noted so far.
    pub fn remembered(&self) -> BTreeSet<String> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes the cgroup of a pod.
    pub fn make_pod_cgroup(&self, pod: &str) -> Result<String> {
        self.cgroups.make(pod)
    }

    /// Notes that a pod is gone: its cgroup is removed as soon as it is empty, at the latest by [`Self::sweep_cgroups`].
    pub fn forget_pod_cgroup(&self, pod: &str) {
        self.released.lock().unwrap_or_else(PoisonError::into_inner).insert(pod.to_owned());
        self.sweep_cgroups();
    }

    /// Removes the cgroups of pods that are gone, as far as they are empty by now.
    ///
    /// Of all of them every time, as the kubelet does: a pod that was removed while it still started makes its cgroup again,
    /// under any runtime.
    pub fn sweep_cgroups(&self) {
        for pod in self.released.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            self.cgroups.remove_if_empty(pod);
        }
    }

    /// Where containerd and the shims write their log.
    pub fn log_path(&self) -> PathBuf {
        self.layout.root.join("containerd.log")
    }

    /// Size of the log now, to be handed to [`Self::log_since`].
    pub fn log_position(&self) -> u64 {
        fs::metadata(self.log_path()).map_or(0, |metadata| metadata.len())
    }

    /// The last `lines` lines of what was logged after `position`.
    pub fn log_since(&self, position: u64, lines: usize) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = fs::File::open(self.log_path()) {
            // A log that cannot be read is an empty one: this only illustrates another failure.
            let _ = file.seek(SeekFrom::Start(position)).and_then(|_| file.read_to_end(&mut text));
        }
        let text = String::from_utf8_lossy(&text);
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Fails unless containerd still runs.
    pub fn check_daemon(&self) -> Result<()> {
        if let Some(child) = self.daemon().as_mut() {
            let status = child.try_wait().context("look after containerd")?;
            ensure!(status.is_none(), "containerd {} ended: {status:?}", self.version);
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A suite stops its nodes and reports; this is for those that failed on the way.
        let _ = self.stop();
    }
}
