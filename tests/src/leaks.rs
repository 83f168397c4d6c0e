//! What is on the machine because of a node, before and after a test.
//!
//! Only what can be traced to the node counts (by its directory, its cgroups, its bridge, or a hash of an id that ran on
//! it), so that several nodes and other work can share the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

use crate::command::{Run, pause};
use crate::containerd::{CRI_NAMESPACE, Node};
use crate::image::hex;
use crate::process::Process;

/// How long things may take to disappear after a test; containerd and shims finish some of it in the background.
const SETTLE: Duration = Duration::from_secs(10);

/// What is there: an identity that stays the same, and a line that names the thing to people.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    things: BTreeMap<String, String>,
}

impl Snapshot {
    /// Looks at the machine.
    pub fn take(node: &Node) -> Result<Self> {
        node.sweep_cgroups();
        let mut things = BTreeMap::new();
        for process in processes(node)? {
            // A program that has just been started still changes its name and its arguments.
            let name = format!("process {} ({}) {}", process.pid, process.name, process.command);
            things.insert(format!("process {}", process.pid), name);
        }
        let mut add = |kind: &str, names: BTreeSet<String>| {
            things.extend(names.into_iter().map(|name| (format!("{kind} {name}"), format!("{kind} {name}"))));
        };
        add("mount", mounts(&node.layout.root)?);
        add("link", node.network.links());
        add("CNI record", node.network.records());
        add("cgroup", node.cgroups.list());
        add("socket", sockets(node)?);
        add("directory", directories(node));
        add("loop device", loop_devices(&node.layout.root));
        Ok(Self { things })
    }

    /// Waits until nothing is there that was not there when this snapshot was taken; returns what stays.
    pub fn leaks(&self, node: &Node) -> Result<Vec<String>> {
        let end = Instant::now() + SETTLE;
        loop {
            let mut now = Self::take(node)?.things;
            now.retain(|identity, _| !self.things.contains_key(identity));
            let left: Vec<_> = now.into_values().collect();
            if left.is_empty() || Instant::now() >= end {
                return Ok(left);
            }
            pause(Duration::from_millis(100));
        }
    }

    /// Everything seen.
    pub fn things(&self) -> impl Iterator<Item = &str> {
        self.things.values().map(String::as_str)
    }

    /// How many things of each kind were seen, for instance `12 cgroups`.
    pub fn summary(&self) -> String {
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for thing in self.things() {
            *kinds.entry(thing.split(' ').next().unwrap_or_default()).or_default() += 1;
        }
        kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
    }
}

/// Processes of the node other than containerd itself and what this program runs at the moment.
fn processes(node: &Node) -> Result<Vec<Process>> {
    let all = Process::all()?;
    let root = node.layout.root.to_string_lossy().into_owned();
    let own = i32::try_from(std::process::id()).context("process id")?;
    let mut ours: BTreeSet<i32> = all
        .iter()
        .filter(|process| {
            process.command.contains(&root) || process.cgroups.iter().any(|path| node.cgroups.holds(path))
        })
        .map(|process| process.pid)
        .collect();
    // Children of ours are ours too, whatever they call themselves.
    loop {
        let more: Vec<_> =
            all.iter().filter(|p| ours.contains(&p.parent) && !ours.contains(&p.pid)).map(|p| p.pid).collect();
        if more.is_empty() {
            break;
        }
        ours.extend(more);
    }
    let daemon = node.daemon_pid();
    let keep = |process: &Process| {
        ours.contains(&process.pid)
            && process.state != 'Z'
            && process.pid != own
            && Some(process.pid) != daemon
            // What containerd runs in passing (`runc`, CNI plugins, `start` and `delete` of shims).
            && (daemon.is_none() || Some(process.parent) != daemon)
    };
    Ok(all.into_iter().filter(keep).collect())
}

fn mounts(root: &Path) -> Result<BTreeSet<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.filter(|point| Path::new(point).starts_with(root)).map(str::to_owned).collect())
}

/// Listening Unix sockets below the node's directory, and shim sockets of ids that ran here.
fn sockets(node: &Node) -> Result<BTreeSet<String>> {
    let root = node.layout.root.to_string_lossy().into_owned();
    let table = fs::read_to_string("/proc/net/unix").context("read /proc/net/unix")?;
    let mut found: BTreeSet<_> = table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
        .filter(|path| path.starts_with(&root) && !path.starts_with(&*node.layout.socket.to_string_lossy()))
        .map(str::to_owned)
        .collect();
    for id in node.remembered() {
        let name = format!("{}/{id}", node.layout.socket.display());
        let path = PathBuf::from("/run/containerd/s").join(hex(&Sha256::digest(name.as_bytes())));
        if path.exists() {
            found.insert(format!("{} (of {id})", path.display()));
        }
    }
    Ok(found)
}

/// Entries of the directories in which a sandbox or a container has something of its own. Snapshots are not among them:
/// containerd's garbage collector takes its time, and a root file system still in use shows as a mount.
fn directories(node: &Node) -> BTreeSet<String> {
    let root = &node.layout.root;
    let mut parents = vec![node.layout.bulkhead_state.clone()];
    for side in ["root", "state"] {
        for namespace in [CRI_NAMESPACE, &node.name] {
            parents.push(root.join(side).join("io.containerd.runtime.v2.task").join(namespace));
            parents.push(root.join(side).join("io.containerd.sandbox.controller.v1.shim").join(namespace));
        }
        for plugin in ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"] {
            parents.extend(["sandboxes", "containers"].map(|kind| root.join(side).join(plugin).join(kind)));
        }
    }
    parents.push(root.join("state/netns"));
    let mut found = BTreeSet::new();
    for parent in parents {
        let Ok(entries) = fs::read_dir(&parent) else { continue };
        found.extend(entries.flatten().map(|entry| entry.path().display().to_string()));
    }
    for id in node.remembered() {
        let path = Path::new("/run/containerd/runc").join(id);
        if path.exists() {
            found.insert(path.display().to_string());
        }
    }
    found
}

fn loop_devices(root: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return BTreeSet::new() };
    let backing = entries.flatten().filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    backing.map(|path| path.trim().to_owned()).filter(|path| Path::new(path).starts_with(root)).collect()
}

/// What is still there of a node whose containerd has ended, waiting a while for the last of it to go.
pub fn after_stop(node: &Node) -> Result<Vec<String>> {
    let end = Instant::now() + SETTLE;
    loop {
        let mut left: Vec<_> = Snapshot::take(node)?.things.into_values().collect();
        if node.network.exists() {
            left.push("the bridge".into());
        }
        if left.is_empty() || Instant::now() >= end {
            return Ok(left);
        }
        pause(Duration::from_millis(100));
    }
}

/// Removes by force whatever a failed test left, so that the machine stays usable.
pub fn clean_up(node: &Node) {
    // Every step may find nothing to do, or a thing that went by itself: errors tell nothing new here.
    for process in processes(node).unwrap_or_default() {
        let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
    }
    let mut points: Vec<_> = mounts(&node.layout.root).unwrap_or_default().into_iter().collect();
    points.reverse();
    for point in points {
        let _ = nix::mount::umount2(Path::new(&point), nix::mount::MntFlags::MNT_DETACH);
    }
    for link in node.network.links() {
        let _ = Run::new("/sbin/ip").args(["link", "del", &link]).output();
    }
    node.network.remove();
    pause(Duration::from_millis(100));
    node.cgroups.remove();
}
