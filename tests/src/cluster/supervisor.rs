//! PID 1 of a node: makes its namespaces look like a machine, then runs the daemons and starts again those that end.
//!
//! To kill it is to cut the node's power: the kernel ends every process of the PID namespace, and with the last of them go
//! the mounts, the links and `/run`.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::wait::{WaitStatus, waitpid};

use crate::cluster::NODE;
use crate::cluster::daemons::Daemon;
use crate::cluster::layout::Layout;
use crate::command::{pause, wait_for};

/// File with the list of daemons, in the cluster's directory.
pub const DAEMONS: &str = "daemons.json";

/// Between the end of a daemon and its next start, as systemd's `RestartSec` would have it.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// The machine gives the node its link at once.
const LINK_DEADLINE: Duration = Duration::from_secs(30);

/// Files of the machine that a node has of its own: where they are, and the directory of the cluster that is put there.
const OWN_DIRECTORIES: [(&str, &str); 2] = [("/var/log", "log"), ("/var/lib/cni", "cni/state")];

/// Runs the node of the cluster in `root`; for the first process of fresh mount, PID, network, UTS and IPC namespaces.
/// Returns only if the node cannot be set up.
pub fn run(root: &Path) -> Result<std::convert::Infallible> {
    ensure!(std::process::id() == 1, "this is to be the first process of a PID namespace; use `cluster up`");
    let layout = Layout::new(root);
    let path = root.join(DAEMONS);
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let daemons: Vec<Daemon> = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
    set_up_mounts(&layout)?;
    nix::unistd::sethostname(NODE).context("set the host name")?;
    wait_for("the node's link", LINK_DEADLINE, || {
        let state = fs::read_to_string("/sys/class/net/eth0/operstate").context("read the link's state")?;
        ensure!(state.trim() == "up", "the link is {}", state.trim());
        Ok(())
    })?;
    set_up_network()?;
    supervise(&layout, &daemons)
}

/// The directories that have to exist on the machine to be mounted over.
pub fn mount_points() -> impl Iterator<Item = &'static Path> {
    OWN_DIRECTORIES.iter().map(|(point, _)| Path::new(*point))
}

fn set_up_mounts(layout: &Layout) -> Result<()> {
    // Only the first mount of each cgroup hierarchy counts for runc and cAdvisor, so they move and are not bound.
    let cgroups = Path::new("/sys/fs/cgroup");
    let aside = layout.root.join("cgroups-aside");
    fs::create_dir_all(&aside).with_context(|| format!("make {}", aside.display()))?;
    let of_kind = |source: &str, target: &Path, kind: &str, data: Option<&str>| {
        mount(Some(source), target, Some(kind), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, data)
            .with_context(|| format!("mount {kind} at {}", target.display()))
    };
    let move_mount = |from: &Path, to: &Path| {
        mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("move {} to {}", from.display(), to.display()))
    };
    move_mount(cgroups, &aside)?;
    umount2("/sys", MntFlags::MNT_DETACH).context("unmount /sys")?;
    of_kind("sysfs", Path::new("/sys"), "sysfs", None)?;
    move_mount(&aside, cgroups)?;
    of_kind("proc", Path::new("/proc"), "proc", None)?;
    of_kind("tmpfs", Path::new("/run"), "tmpfs", Some("mode=755"))?;
    // The kubelet's cAdvisor asks here for what it knows of pods, their network's figures among it.
    fs::create_dir("/run/containerd").context("make /run/containerd")?;
    symlink(&layout.socket, "/run/containerd/containerd.sock").context("link containerd's socket")?;
    for (point, directory) in OWN_DIRECTORIES {
        let own = layout.root.join(directory);
        mount(Some(&own), point, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("bind {} to {point}", own.display()))?;
    }
    // The kubelet wants mounts of the node to reach those pods that ask for them.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)
        .context("share the node's mounts")
}

fn set_up_network() -> Result<()> {
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        // Else Services do not work between pods of one bridge.
        ("net/bridge/bridge-nf-call-iptables", "1"),
        ("net/bridge/bridge-nf-call-ip6tables", "1"),
    ] {
        let path = Path::new("/proc/sys").join(key);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
    }
    Ok(())
}

/// Runs the daemons for ever, and takes in the children of whoever ends before them.
fn supervise(layout: &Layout, daemons: &[Daemon]) -> Result<std::convert::Infallible> {
    let mut running: Vec<(&Daemon, i32, Instant)> = Vec::new();
    for daemon in daemons {
        running.push((daemon, start(layout, daemon)?, Instant::now()));
    }
    loop {
        let ended = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), ExitStatus::from_raw(code << 8)),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), ExitStatus::from_raw(signal as i32)),
            Ok(_) | Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error).context("wait for the node's processes"),
        };
        let Some(slot) = running.iter_mut().find(|(_, pid, _)| *pid == ended.0) else { continue };
        println!("{} ended after {:?}: {}", slot.0.name, slot.2.elapsed(), ended.1);
        pause(RESTART_DELAY);
        *slot = (slot.0, start(layout, slot.0)?, Instant::now());
    }
}

fn start(layout: &Layout, daemon: &Daemon) -> Result<i32> {
    let path: PathBuf = layout.log(&daemon.name);
    let open = || fs::OpenOptions::new().create(true).append(true).open(&path);
    let child = Command::new(&daemon.program)
        .args(&daemon.args)
        .envs(daemon.environment.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::null())
        .stdout(open().with_context(|| format!("open {}", path.display()))?)
        .stderr(open()?)
        .spawn()
        .with_context(|| format!("start {}", daemon.program.display()))?;
    println!("{} started as {}", daemon.name, child.id());
    Ok(child.id().cast_signed())
}
