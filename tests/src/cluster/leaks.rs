//! What is on a node that belongs to no pod of the cluster any more, and on the machine when the node is gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::process::Process;

/// Everything of pods that the apiserver does not know (any more): processes, mounts, links, cgroups and directories.
///
/// A pod in the middle of its start or its end shows up here too: to be asked until the list is empty.
pub fn of_lost_pods(cluster: &Cluster) -> Result<Vec<String>> {
    let pods = Pods::of(cluster)?;
    let mut left = Vec::new();
    left.extend(processes(cluster, &pods)?);
    left.extend(named_by_uid(cluster, &pods)?);
    left.extend(named_by_sandbox(cluster, &pods)?);
    left.extend(links(cluster, &pods)?);
    Ok(left)
}

/// The pods that the apiserver knows, and their sandboxes, as containerd knows them.
struct Pods {
    uids: BTreeSet<String>,
    sandboxes: BTreeSet<String>,
}

impl Pods {
    fn of(cluster: &Cluster) -> Result<Self> {
        let text = cluster.kubectl(&["get", "pods", "-A", "-o", "json"]).success()?.stdout;
        let list: Value = serde_json::from_slice(&text).context("parse the list of pods")?;
        let items = list["items"].as_array().context("no list of pods")?;
        // The directories and cgroups of a static pod have the name that the kubelet gives to its manifest.
        let mirrored =
            |pod: &Value| pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].as_str().map(str::to_owned);
        let uids = items.iter().filter_map(|pod| mirrored(pod).or(Some(pod["metadata"]["uid"].as_str()?.to_owned())));
        let uids: BTreeSet<String> = uids.collect();
        let text = cluster.crictl(&["pods", "-o", "json"]).success()?.stdout;
        let list: Value = serde_json::from_slice(&text).context("parse the list of sandboxes")?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let of_ours =
            items.iter().filter(|item| item["metadata"]["uid"].as_str().is_some_and(|uid| uids.contains(uid)));
        let sandboxes = of_ours.filter_map(|item| item["id"].as_str()).map(str::to_owned).collect();
        Ok(Self { uids, sandboxes })
    }

    fn has_sandbox_in(&self, text: &str) -> bool {
        self.sandboxes.iter().any(|id| text.contains(id.as_str()))
    }

    /// Whether `text` names a pod's uid, also in the form that cgroups of systemd have.
    fn has_uid_in(&self, text: &str) -> bool {
        self.uids.iter().any(|uid| text.contains(uid.as_str()) || text.contains(&uid.replace('-', "_")))
    }
}

/// Shims of lost sandboxes, and helpers of virtual machines that have no shim.
fn processes(cluster: &Cluster, pods: &Pods) -> Result<Vec<String>> {
    let inside = cluster.processes()?;
    let is_shim = |process: &Process| process.name.starts_with("containerd-shim");
    let shims: BTreeSet<i32> = inside.iter().filter(|process| is_shim(process)).map(|process| process.pid).collect();
    let helper =
        |process: &Process| ["qemu-system-x86", "virtiofsd", "bulkhead-vsock"].contains(&process.name.as_str());
    let parent_of = |pid: i32| inside.iter().find(|process| process.pid == pid).map_or(0, |process| process.parent);
    let lost = inside.iter().filter(|process| {
        let orphan = helper(process)
            && !shims.contains(&process.parent)
            // virtiofsd serves from a child of its own.
            && !shims.contains(&parent_of(process.parent));
        process.state != 'Z' && (orphan || (is_shim(process) && !pods.has_sandbox_in(&process.command)))
    });
    Ok(lost.map(|process| format!("process {} ({}) {}", process.pid, process.name, process.command)).collect())
}

/// Directories of pods, mounts in them, and their cgroups.
fn named_by_uid(cluster: &Cluster, pods: &Pods) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let directory = cluster.layout.root.join("kubelet/pods");
    let names = entries(&directory).into_iter().filter(|name| !pods.has_uid_in(name));
    left.extend(names.map(|name| format!("directory {}", directory.join(name).display())));
    let table = cluster.mount_table()?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let lost = points.filter(|point| Path::new(point).starts_with(&directory) && !pods.has_uid_in(point));
    left.extend(lost.map(|point| format!("mount {point}")));
    let groups = cluster.cgroups()?.list().into_iter().filter(|group| {
        // `.../kubepods[/besteffort]/pod<uid>`; what is below goes with it.
        group.rsplit('/').next().is_some_and(|name| name.starts_with("pod")) && !pods.has_uid_in(group)
    });
    left.extend(groups.map(|group| format!("cgroup {group}")));
    Ok(left)
}

/// Run state of lost sandboxes: that of Bulkhead's, and network namespaces that are more than there are sandboxes.
fn named_by_sandbox(cluster: &Cluster, pods: &Pods) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let listed = cluster.inside(&["ls", "-1", &cluster.layout.bulkhead_state.display().to_string()]).output()?;
    // Before the first pod of its kind there is no such directory.
    let names = if listed.code == 0 { listed.text() } else { String::new() };
    // Each name begins with the sandbox's id.
    let of_pods = |name: &&str| name.len() >= 64 && !pods.has_sandbox_in(name);
    left.extend(names.lines().filter(of_pods).map(|name| format!("run state of sandbox {name}")));
    let spaces = cluster.mount_table()?;
    let spaces: BTreeSet<_> =
        spaces.lines().filter_map(|line| line.split(' ').nth(4)).filter(|point| point.contains("/netns/")).collect();
    if spaces.len() > pods.sandboxes.len() {
        left.push(format!("{} network namespaces for {} sandboxes", spaces.len(), pods.sandboxes.len()));
    }
    Ok(left)
}

/// Ports of the pods' bridge that are more than there are sandboxes, and leases of addresses.
fn links(cluster: &Cluster, pods: &Pods) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let count = pods.sandboxes.len();
    let listed = cluster.inside(&["ls", "-1", "/sys/class/net/cni0/brif"]).output()?;
    let ports = if listed.code == 0 { listed.text().lines().count() } else { 0 };
    if ports > count {
        left.push(format!("{ports} ports of the pods' bridge for {count} sandboxes"));
    }
    let leases = entries(&cluster.layout.root.join("cni/leases/pods"));
    let leases = leases.iter().filter(|name| !name.starts_with("last_reserved_ip") && *name != "lock").count();
    // One of each family.
    if leases > 2 * count {
        left.push(format!("{leases} leases of addresses for {count} sandboxes"));
    }
    Ok(left)
}

fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
