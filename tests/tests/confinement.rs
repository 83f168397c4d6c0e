//! What serves a pod on the host can do little there: no root, no capabilities, seccomp, namespaces of its own.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::process::{Process, namespace_of};
use bulkhead_tests::row::{BULKHEAD, Context, Row};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use serde_json::json;

const ROWS: &[Row] = &[
    Row::in_pod("QEMU has no root uid, no capabilities, no new privileges and a seccomp filter", qemu),
    Row::in_pod("the vsock helper has no root uid, no capabilities and a seccomp filter", vsock_helper),
    Row::in_pod("virtiofsd has its own mount and PID namespaces and a seccomp filter", virtiofsd),
    Row::in_pod("virtiofsd has only the capabilities that ARCHITECTURE.md names", virtiofsd_capabilities),
    Row::alone("two pods' QEMUs have different users", different_users),
    Row::in_pod("QEMU and its helpers are in the pod's cgroup, the shim is not", placement),
    Row::in_pod("the run state is for root alone", state_directory),
    Row::in_pod("a pod's mounts are not on the host", no_host_mounts),
    Row::in_pod("a guest that mounts the share itself cannot write to a read-only volume", share_is_read_only),
    Row::in_pod("a guest that mounts the share itself finds no path of the host in it", share_has_no_host_paths),
];

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], BULKHEAD, ROWS)
}

/// Status of every thread of `process`.
fn threads(process: &Process) -> Result<Vec<Process>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid)).context("list threads")?;
    let ids = tasks.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // A thread has its own status in /proc, though no entry in the listing.
    Ok(ids.filter_map(Process::read).collect())
}

fn check_powerless(process: &Process) -> Result<()> {
    let threads = threads(process)?;
    ensure!(!threads.is_empty(), "{} has no threads", process.name);
    for thread in threads {
        let who = format!("thread {} ({}) of {}", thread.pid, thread.name, process.name);
        for field in ["Uid", "Gid"] {
            let ids = thread.status_field(field)?;
            ensure!(ids.split_whitespace().all(|id| id != "0"), "{who} has {field} {ids}");
        }
        let groups = thread.status_field("Groups")?;
        ensure!(groups.split_whitespace().all(|id| id != "0"), "{who} has the groups {groups}");
        for field in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            let bits = thread.status_field(field)?;
            ensure!(bits.trim_matches('0').is_empty(), "{who} has {field} {bits}");
        }
        let filter = thread.status_field("Seccomp")?;
        ensure!(filter == "2", "{who} has Seccomp {filter}");
        let no_new = thread.status_field("NoNewPrivs")?;
        ensure!(no_new == "1", "{who} has NoNewPrivs {no_new}");
    }
    Ok(())
}

fn qemu(_: &Context, pod: &Pod) -> Result<()> {
    check_powerless(&faults::find(&pod.node, &pod.id, Part::Qemu)?)
}

fn vsock_helper(_: &Context, pod: &Pod) -> Result<()> {
    if Path::new("/dev/vhost-vsock").exists() {
        print!("(skipped: the kernel's vhost-vsock is used) ");
        return Ok(());
    }
    check_powerless(&faults::find(&pod.node, &pod.id, Part::VsockHelper)?)
}

fn virtiofsd(_: &Context, pod: &Pod) -> Result<()> {
    let process = faults::find(&pod.node, &pod.id, Part::Virtiofsd)?;
    for kind in ["mnt", "pid"] {
        let (its, ours) = (process.namespace(kind)?, namespace_of("self", kind)?);
        ensure!(its != ours, "virtiofsd is in the host's {kind} namespace");
    }
    for thread in threads(&process)? {
        let filter = thread.status_field("Seccomp")?;
        ensure!(filter == "2", "thread {} of virtiofsd has Seccomp {filter}", thread.name);
    }
    Ok(())
}

/// Names of capabilities, without `CAP_`, in the order of their numbers (capabilities(7)).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

fn virtiofsd_capabilities(_: &Context, pod: &Pod) -> Result<()> {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md");
    let document = fs::read_to_string(&document).with_context(|| format!("read {}", document.display()))?;
    // The process that serves and the one that waits for it.
    for process in faults::find_all(&pod.node, &pod.id, Part::Virtiofsd)? {
        for field in ["CapEff", "CapPrm"] {
            let bits = process.status_field(field)?;
            let bits = u64::from_str_radix(&bits, 16).with_context(|| format!("{field} {bits}"))?;
            for (number, name) in CAPABILITIES.iter().enumerate() {
                let named = document.contains(&format!("`CAP_{name}`"));
                ensure!(
                    bits & (1 << number) == 0 || named,
                    "{field} has CAP_{name}, which ARCHITECTURE.md does not name"
                );
            }
            ensure!(bits >> CAPABILITIES.len() == 0, "{field} is {bits:x}, more than this test knows");
        }
    }
    Ok(())
}

fn different_users(context: &Context) -> Result<()> {
    let (first, second) = (context.start(PodSpec::new())?, context.start(PodSpec::new())?);
    let user = |pod: &Pod| faults::find(&pod.node, &pod.id, Part::Qemu)?.status_field("Uid");
    let (one, other) = (user(&first)?, user(&second)?);
    ensure!(one != other, "both are {one}");
    first.remove()?;
    second.remove()
}

fn placement(_: &Context, pod: &Pod) -> Result<()> {
    let config: serde_json::Value = serde_json::from_slice(&fs::read(&pod.config_path)?)?;
    let parent = config["linux"]["cgroup_parent"].as_str().context("no cgroup parent")?;
    for part in [Part::Qemu, Part::Virtiofsd, Part::VsockHelper] {
        for process in faults::find_all(&pod.node, &pod.id, part)? {
            for path in controlled_groups(&process)? {
                ensure!(path.starts_with(parent), "{} is in {path}, outside {parent}", process.name);
            }
        }
    }
    for path in controlled_groups(&faults::find(&pod.node, &pod.id, Part::Shim)?)? {
        ensure!(!path.starts_with(parent), "the shim is in {path}");
    }
    Ok(())
}

/// The cgroups of a process in hierarchies that control something: those with controllers, or else that of version 2.
fn controlled_groups(process: &Process) -> Result<Vec<String>> {
    let path = format!("/proc/{}/cgroup", process.pid);
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let fields: Vec<Vec<&str>> = text.lines().map(|line| line.splitn(3, ':').collect()).collect();
    let of = |wanted: fn(&str) -> bool| -> Vec<String> {
        fields.iter().filter(|f| f.len() == 3 && wanted(f[1])).map(|f| f[2].to_owned()).collect()
    };
    let version_1 = of(|controllers| !controllers.is_empty() && !controllers.starts_with("name="));
    Ok(if version_1.is_empty() { of(str::is_empty) } else { version_1 })
}

fn state_directory(_: &Context, pod: &Pod) -> Result<()> {
    let mut found = 0;
    for entry in fs::read_dir(&pod.node.layout.bulkhead_state)?.flatten() {
        let mode = std::os::unix::fs::PermissionsExt::mode(&entry.metadata()?.permissions());
        ensure!(mode & 0o7777 == 0o700, "{} has mode {mode:o}", entry.path().display());
        found += 1;
    }
    ensure!(found > 0, "no run state at all");
    Ok(())
}

fn no_host_mounts(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle().mount(&context.scratch, "/data", false))?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let state = pod.node.layout.bulkhead_state.display().to_string();
    let shown: Vec<_> = table.lines().filter(|line| line.contains(&state)).collect();
    ensure!(shown.is_empty(), "the host's mount table has {shown:?}");
    container.remove_by_force()
}

/// A container that may mount what it likes inside the guest.
fn mighty(spec: ContainerSpec) -> ContainerSpec {
    spec.security("capabilities", json!({"add_capabilities": ["SYS_ADMIN"]}))
        .security("seccomp", json!({"profile_type": 1}))
}

fn share_is_read_only(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    fs::write(directory.join("precious-file"), "kept")?;
    let container = pod.run(mighty(ContainerSpec::idle()).mount(&directory, "/data", true))?;
    let script = "mkdir -p /mnt/s && mount -t virtiofs share /mnt/s && find /mnt/s -name precious-file";
    let found = container.shell(script)?;
    ensure!(found.contains("precious-file"), "the volume is not in the share: the test tests nothing");
    let script = "mount -o remount,rw /data 2>&1; echo lost > /data/precious-file; for f in $(find /mnt/s -name precious-file); \
                  do echo lost > $f; mount -o remount,rw $(dirname $f); echo lost > $f; rm -f $f; done; true";
    container.exec(&["sh", "-c", script])?;
    ensure!(
        fs::read_to_string(directory.join("precious-file"))? == "kept",
        "the guest changed a file it was given to read"
    );
    container.remove_by_force()
}

fn share_has_no_host_paths(context: &Context, pod: &Pod) -> Result<()> {
    let data = context.scratch.join("data");
    fs::create_dir(&data)?;
    fs::write(context.scratch.join("neighbour"), "not shared")?;
    fs::write(data.join("shown"), "shared")?;
    let container = pod.run(mighty(ContainerSpec::idle()).mount(&data.join("shown"), "/shown", false))?;
    let script = "mkdir -p /mnt/s && mount -t virtiofs share /mnt/s && cd /mnt/s && find . -maxdepth 4 | head -500; \
                  ls /mnt/s/../../.. > /dev/null; find . -name neighbour; cat /proc/mounts";
    let found = container.exec(&["sh", "-c", script])?;
    let host = context.node.layout.root.display().to_string();
    ensure!(!found.text().contains("neighbour"), "the file's neighbour is in the share: {}", found.text());
    ensure!(!found.text().contains(&host), "a path of the host is seen: {}", found.text());
    container.remove_by_force()
}
