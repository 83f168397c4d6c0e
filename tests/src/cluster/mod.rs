//! A Kubernetes of one node on this machine: real daemons in namespaces of their own, runc and Bulkhead side by side.
//!
//! ```text
//! machine ── veth ──> node: PID 1 is the [`supervisor`]; etcd, apiserver, controllers, scheduler,
//!                     containerd, kubelet and kube-proxy are its children; pods hang on its bridge
//! ```
//!
//! Everything lies in one directory ([`layout`]), but for a cgroup in every hierarchy and the machine's end of the link,
//! both of which carry the cluster's name. The node's directory is on the disk of the machine; its `/run`, mounts, links and
//! processes are gone when its power is ([`Cluster::lose_power`]).

pub mod addons;
pub mod admission;
pub mod daemons;
pub mod images;
pub mod layout;
pub mod leaks;
pub mod network;
pub mod pki;
pub mod supervisor;
pub mod table;
pub mod user;

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::cgroup::Subtree;
use crate::command::{Run, wait_for};
use crate::config;
use crate::containerd::{self, CRI_NAMESPACE};
use crate::image::{self, Image, hex};
use crate::process::Process;
use crate::row::Runtime;
use crate::tools::{self, BulkheadTools, ContainerdTools, Version};
use layout::Layout;
use network::Link;

/// Name of the only node.
pub const NODE: &str = "node";

/// What the kubelet sets for the whole machine; put back when the cluster is down.
const MACHINE_SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// File in the cluster's directory that says what `down` has to undo.
const MARK: &str = "cluster.json";
/// From the start of the daemons to a ready node; two busy CPUs need a quarter of it.
const START_DEADLINE: Duration = Duration::from_mins(3);

/// What may differ between clusters.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The directory of everything; made by [`Cluster::up`].
    pub directory: PathBuf,
    /// The handler of pods that name no RuntimeClass. With Bulkhead those with limits are given its RuntimeClass.
    pub default_runtime: Runtime,
    /// Whether the node loses its power when the thread that started it ends.
    pub tied: bool,
}

impl Settings {
    /// A cluster that lasts, in the directory that `BULKHEAD_CLUSTER` names or the usual one.
    pub fn lasting() -> Self {
        let directory = std::env::var_os("BULKHEAD_CLUSTER").unwrap_or("/var/tmp/bulkhead-cluster".into());
        Self { directory: directory.into(), default_runtime: Runtime::Runc, tied: false }
    }

    /// A cluster of a test's own.
    pub fn temporary() -> Self {
        let directory = format!("/var/tmp/bulkhead-cluster-{}", std::process::id());
        Self { directory: directory.into(), default_runtime: Runtime::Runc, tied: true }
    }
}

/// What [`Cluster::down`] has to know, written before anything is done to the machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Mark {
    /// Name of the link and of the cgroups.
    name: String,
    link: Link,
    /// The machine's sysctls as they were.
    sysctls: BTreeMap<String, String>,
    /// Directories that were made for the node to mount over.
    mount_points: Vec<PathBuf>,
    /// PID 1 of the node and when it started, in clock ticks after boot. None: the node has no power.
    node: Option<(i32, u64)>,
}

/// A cluster that is there; it stays when this value is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// Where everything is.
    pub layout: Layout,
    mark: Mutex<Mark>,
    tied: bool,
}

impl Cluster {
    /// Starts a cluster and waits until its node is ready and its DNS answers. What was made on the way is removed if that
    /// fails, but for the logs, whose ends are in the error.
    pub fn up(settings: &Settings) -> Result<Self> {
        ensure!(
            !settings.directory.join(MARK).exists(),
            "{} has a cluster already: `make cluster-down` removes it",
            settings.directory.display()
        );
        let bulkhead = BulkheadTools::find()?;
        let name = format!("bhk{}", &hex(&Sha256::digest(settings.directory.as_os_str().as_encoded_bytes()))[..6]);
        let layout = Layout::new(&settings.directory);
        layout.make()?;
        fs::set_permissions(&layout.root, fs::Permissions::from_mode(0o755)).context("open the directory")?;
        let mut sysctls = BTreeMap::new();
        for key in MACHINE_SYSCTLS {
            let value = fs::read_to_string(Path::new("/proc/sys").join(key)).with_context(|| format!("read {key}"))?;
            sysctls.insert(key.to_owned(), value.trim().to_owned());
        }
        let mount_points = supervisor::mount_points().filter(|point| !point.exists()).map(Path::to_owned).collect();
        let mark = Mark { link: Link::choose(&name)?, name, sysctls, mount_points, node: None };
        let cluster = Self { layout, mark: Mutex::new(mark), tied: settings.tied };
        cluster.save_mark()?;
        let started = cluster.install(settings, &bulkhead).and_then(|()| cluster.start(settings.default_runtime));
        if let Err(error) = started {
            let logs: Vec<_> = ["node", "kube-apiserver", "containerd", "kubelet"]
                .iter()
                .map(|daemon| format!("the end of the log of {daemon}:\n{}", cluster.log(daemon, 12)))
                .collect();
            let error = error.context(logs.join("\n"));
            return match cluster.down() {
                Ok(()) => Err(error),
                Err(other) => Err(error.context(format!("and it could not be removed: {other:#}"))),
            };
        }
        Ok(cluster)
    }

    /// The cluster in `directory`.
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join(MARK);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("there is no cluster in {}: `make cluster-up` starts one", directory.display())
            }
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let mark: Mark = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        Ok(Self { layout: Layout::new(directory), mark: Mutex::new(mark), tied: false })
    }

    /// Writes what does not depend on a start: programs, keys, configurations.
    fn install(&self, settings: &Settings, bulkhead: &BulkheadTools) -> Result<()> {
        let mark = self.mark().clone();
        let bin = self.layout.root.join("bin");
        bulkhead.link_into(&bin)?;
        let ctr = ContainerdTools::find(Version::V2_4)?.directory.join("ctr");
        for (name, target) in [("kubectl", tools::kubernetes("kubectl")?), ("crictl", tools::crictl()?), ("ctr", ctr)] {
            symlink(&target, bin.join(name)).with_context(|| format!("link {}", target.display()))?;
        }
        let paths = containerd::Layout {
            root: self.layout.root.clone(),
            socket: self.layout.socket.clone(),
            bulkhead_state: self.layout.bulkhead_state.clone(),
        };
        fs::write(self.layout.root.join("bulkhead.toml"), config::Bulkhead::default().render(&paths))
            .context("write bulkhead.toml")?;
        let addresses = [
            "127.0.0.1".to_owned(),
            network::API_SERVICE.to_owned(),
            mark.link.node().to_string(),
            mark.link.node_v6(),
        ];
        pki::make(&self.layout, &addresses)?;
        network::configure(&self.layout.root.join("cni"))?;
        let daemons = daemons::all(&self.layout, settings, &mark.link, &format!("/{}", mark.name))?;
        let path = self.layout.root.join(supervisor::DAEMONS);
        fs::write(&path, serde_json::to_vec_pretty(&daemons)?).with_context(|| format!("write {}", path.display()))
    }

    /// The first start: also imports the images and installs what a cluster has besides its daemons.
    fn start(&self, default_runtime: Runtime) -> Result<()> {
        self.boot()?;
        wait_for("containerd to answer", START_DEADLINE, || {
            self.ctr(&["version"]).deadline(Duration::from_secs(5)).success()
        })?;
        self.import(&images::all()?)?;
        self.wait_until_ready()?;
        addons::install(self)?;
        if default_runtime == Runtime::Bulkhead {
            admission::install(self, default_runtime.handler())?;
        }
        user::wait_for("the cluster's DNS", START_DEADLINE, || {
            self.kubectl(&["-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=1s"]).success()
        })?;
        Ok(())
    }

    /// Starts the node's first process and connects it; the daemons are not waited for.
    fn boot(&self) -> Result<()> {
        // What the kernel has built in needs no module, and a kernel without either says so when it is used.
        Run::new("/sbin/modprobe").args(["--all", "--quiet", "overlay", "br_netfilter"]).output()?;
        self.cgroups()?.make("node")?;
        for point in supervisor::mount_points() {
            fs::create_dir_all(point).with_context(|| format!("make {}", point.display()))?;
        }
        let program = std::env::current_exe().context("find the running program")?;
        let log = fs::OpenOptions::new().create(true).append(true).open(self.layout.log("node"))?;
        let mut command = Command::new(if self.tied { "/usr/bin/setpriv" } else { "/usr/bin/env" });
        if self.tied {
            command.arg("--pdeathsig=KILL");
        }
        let mut unshare = command
            .args(["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--propagation=private", "--fork"])
            .arg("--kill-child=KILL")
            .arg(program)
            .arg(NODE_COMMAND)
            .arg(&self.layout.root)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the node")?;
        let parent = unshare.id().cast_signed();
        // Reaps it when the node ends while this program still runs.
        std::thread::spawn(move || unshare.wait());
        let node = wait_for("the node's first process", Duration::from_secs(10), || {
            // It has namespaces of its own once it runs our program.
            let children = Process::descendants(parent)?;
            let first = children.into_iter().find(|process| process.command.contains(NODE_COMMAND));
            first.with_context(|| format!("none; the log ends with {}", self.log("node", 5)))
        })?;
        let started = start_time(node.pid).context("the node ended at once")?;
        let link = {
            let mut mark = self.mark();
            mark.node = Some((node.pid, started));
            mark.link.clone()
        };
        self.save_mark()?;
        link.connect(node.pid)
    }

    /// Waits until the apiserver and the kubelet say that they are ready.
    fn wait_until_ready(&self) -> Result<()> {
        user::wait_for("the apiserver to be ready", START_DEADLINE, || {
            self.kubectl(&["get", "--raw", "/readyz"]).success()
        })?;
        user::wait_for("the node to be ready", START_DEADLINE, || {
            let text = self.kubectl(&["get", "node", NODE, "-o", "json"]).success()?.stdout;
            let node: Value = serde_json::from_slice(&text)?;
            ensure!(user::condition(&node, "Ready") == "True", "its conditions are {}", node["status"]["conditions"]);
            Ok(())
        })
    }

    /// Cuts the node's power: every process is killed at once, and with them go `/run`, the mounts and the links.
    pub fn lose_power(&self) -> Result<()> {
        let Some((pid, started)) = self.mark().node.take() else { return Ok(()) };
        if start_time(pid) == Some(started) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).context("kill the node")?;
        }
        // The kernel lets the first process go when all others of its namespace are gone.
        wait_for("the node's processes to be gone", Duration::from_secs(60), || {
            ensure!(start_time(pid) != Some(started), "process {pid} is there");
            Ok(())
        })?;
        self.save_mark()?;
        // Cgroups are no more than a running kernel's memory.
        let cgroups = self.cgroups()?;
        wait_for("the cgroups to be empty", Duration::from_secs(20), || {
            cgroups.remove();
            let left = cgroups.list();
            ensure!(left.is_empty(), "{left:?} are left");
            Ok(())
        })?;
        let name = self.mark().name.clone();
        // It goes with the namespace of its other end, which lasts while somebody from outside is in it (`nsenter`).
        Run::new("/sbin/ip").args(["link", "del", &name]).output()?;
        wait_for("the node's link to be gone", Duration::from_secs(20), || {
            ensure!(!Path::new("/sys/class/net").join(&name).exists(), "{name} is there");
            Ok(())
        })
    }

    /// Starts the node again after [`Self::lose_power`], and waits until it is ready.
    pub fn restore_power(&self) -> Result<()> {
        self.boot()?;
        // The apiserver tells the node's last state until the kubelet has told it another.
        let begin = Instant::now();
        self.wait_until_ready()?;
        user::wait_for("the kubelet to say that it is back", START_DEADLINE, || {
            let lease = self.kubectl(&["-n", "kube-node-lease", "get", "lease", NODE, "-o", "json"]).success()?.stdout;
            let lease: Value = serde_json::from_slice(&lease)?;
            let renewed = lease["spec"]["renewTime"].as_str().unwrap_or_default().to_owned();
            let age = age_of(&renewed)?;
            ensure!(age < begin.elapsed(), "its lease was renewed {age:?} ago");
            Ok(())
        })
    }

    /// Ends the cluster and removes everything of it; what stays is an error.
    pub fn down(&self) -> Result<()> {
        self.lose_power()?;
        let mark = self.mark().clone();
        for (key, value) in &mark.sysctls {
            fs::write(Path::new("/proc/sys").join(key), value).with_context(|| format!("put {key} back"))?;
        }
        // The mark goes last: a removal that failed can be tried again.
        for entry in fs::read_dir(&self.layout.root).context("list the cluster's directory")?.flatten() {
            if entry.file_name() == MARK {
                continue;
            }
            let path = entry.path();
            let removed = if entry.file_type()?.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.with_context(|| format!("remove {}", path.display()))?;
        }
        for point in &mark.mount_points {
            match fs::remove_dir(point) {
                // Somebody else has put something there meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {}
                removed => removed.with_context(|| format!("remove {}", point.display()))?,
            }
        }
        fs::remove_dir_all(&self.layout.root).with_context(|| format!("remove {}", self.layout.root.display()))
    }

    /// Whether the node has power.
    pub fn has_power(&self) -> bool {
        self.mark().node.is_some_and(|(pid, started)| start_time(pid) == Some(started))
    }

    /// `kubectl` as the cluster's administrator, on the machine.
    pub fn kubectl(&self, args: &[&str]) -> Run {
        let kubectl = self.layout.root.join("bin/kubectl");
        Run::new(kubectl)
            .args(args)
            .env("KUBECONFIG", &self.layout.kubeconfig)
            .env("KUBECTL_KUBERC", "false")
            // Else it keeps what it knows of the API in the home directory.
            .env("KUBECACHEDIR", self.layout.root.join("kubectl"))
    }

    /// A command in the node's namespaces.
    pub fn inside(&self, command: &[&str]) -> Run {
        let pid = self.mark().node.map_or(0, |(pid, _)| pid).to_string();
        Run::new("/usr/bin/nsenter")
            .args(["--target", &pid, "--mount", "--net", "--pid", "--uts", "--ipc", "--"])
            .args(command)
    }

    /// `crictl` on the node's containerd.
    pub fn crictl(&self, args: &[&str]) -> Run {
        let endpoint = format!("unix://{}", self.layout.socket.display());
        Run::new(self.layout.root.join("bin/crictl"))
            .args(["--timeout", "60s", "--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint])
            .args(args)
            .env("CRI_CONFIG_FILE", "/dev/null")
    }

    fn ctr(&self, args: &[&str]) -> Run {
        let socket = self.layout.socket.display().to_string();
        Run::new(self.layout.root.join("bin/ctr")).args(["--address", &socket, "--namespace", CRI_NAMESPACE]).args(args)
    }

    /// Imports images into the node's containerd.
    pub fn import(&self, images: &[Image]) -> Result<()> {
        let archive = self.layout.root.join("images.tar");
        image::write_archive(&archive, images)?;
        self.ctr(&["images", "import"]).arg(&archive).deadline(Duration::from_mins(10)).success()?;
        fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
        for image in images {
            wait_for("the CRI plugin to know the images", Duration::from_secs(20), || {
                self.crictl(&["inspecti", &image.name]).success()
            })?;
        }
        Ok(())
    }

    /// One of the node's daemons, as the machine sees it.
    pub fn daemon(&self, name: &str) -> Result<Process> {
        let (node, _) = self.mark().node.context("the node has no power")?;
        // The kernel cuts names at 15 bytes.
        let short = &name[..name.len().min(15)];
        let found = Process::all()?.into_iter().find(|process| process.parent == node && process.name == short);
        found.with_context(|| format!("{name} does not run"))
    }

    /// Every process of the node, as the machine sees it.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let (node, _) = self.mark().node.context("the node has no power")?;
        Process::descendants(node)
    }

    /// The node's mounts, in the form of `/proc/PID/mountinfo`.
    pub fn mount_table(&self) -> Result<String> {
        let (node, _) = self.mark().node.context("the node has no power")?;
        let path = format!("/proc/{node}/mountinfo");
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    }

    /// The cgroups that everything of the node's pods lies in.
    pub fn cgroups(&self) -> Result<Subtree> {
        Subtree::new(&self.mark().name)
    }

    /// The node's address on its link to the machine.
    pub fn node_address(&self) -> Ipv4Addr {
        self.mark().link.node()
    }

    /// The last `lines` lines of a daemon's log; empty if there is none.
    pub fn log(&self, daemon: &str, lines: usize) -> String {
        let text = fs::read(self.layout.log(daemon)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn mark(&self) -> MutexGuard<'_, Mark> {
        self.mark.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save_mark(&self) -> Result<()> {
        let path = self.layout.root.join(MARK);
        let text = serde_json::to_vec_pretty(&*self.mark())?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }
}

/// First argument of a program that is to be the first process of a node; the second is the cluster's directory.
pub const NODE_COMMAND: &str = "be-the-node";

/// To be called at the very beginning of the `main` of every program that starts clusters: a node is that same program.
pub fn be_the_node_if_asked() {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(command), Some(directory)) = (arguments.next(), arguments.next()) else { return };
    if command == NODE_COMMAND {
        let Err(error) = supervisor::run(Path::new(&directory));
        eprintln!("the node could not be set up: {error:#}");
        std::process::exit(1);
    }
}

/// When a process started, in clock ticks after boot; None: there is none, or only a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    (fields.next()? != "Z").then_some(())?;
    // Field 22 of proc_pid_stat(5), counted from 1; the state was the third.
    fields.nth(18)?.parse().ok()
}

/// How long ago a time of the API was, as `date` reckons it.
fn age_of(time: &str) -> Result<Duration> {
    let seconds = |args: &[&str]| -> Result<f64> {
        let text = Run::new("/bin/date").args(args).success()?.text();
        text.parse().with_context(|| format!("parse {text:?}"))
    };
    let age = seconds(&["+%s.%N"])? - seconds(&["--date", time, "+%s.%N"])?;
    Ok(Duration::from_secs_f64(age.max(0.0)))
}
