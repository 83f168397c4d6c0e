//! What the machine has is used without being told: hardware virtualisation, the kernel's vhost devices, its cgroups.
//!
//! Each row looks at the machine first and then expects the one or the other, so that it tests as much on a machine with
//! KVM (`make test-kvm` makes one) as on one without.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::pod::Pod;
use bulkhead_tests::process::Process;
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;

const ROWS: &[Row] = &[
    Row::in_pod("QEMU uses KVM where the CPU has virtualisation, and emulates elsewhere", accelerator),
    Row::in_pod("the kernel's vhost-vsock is used where there is one, and a helper elsewhere", vsock),
    Row::in_pod("the kernel's vhost-net is used where there is one", vhost_net),
    Row::in_pod("QEMU and its helpers are in the pod's cgroup, and the shim is not", cgroups),
];

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], &[Runtime::Bulkhead], ROWS)
}

fn qemu(pod: &Pod) -> Result<Process> {
    faults::find(&pod.node, &pod.id, Part::Qemu)
}

/// Paths behind the open files of a process.
fn open_files(process: &Process) -> Result<Vec<String>> {
    let directory = format!("/proc/{}/fd", process.pid);
    let entries = fs::read_dir(&directory).with_context(|| format!("list {directory}"))?.flatten();
    Ok(entries.filter_map(|entry| fs::read_link(entry.path()).ok()).map(|path| path.display().to_string()).collect())
}

fn accelerator(_: &Context, pod: &Pod) -> Result<()> {
    let flags = fs::read_to_string("/proc/cpuinfo")?;
    let virtualises = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let expected = if virtualises && Path::new("/dev/kvm").exists() { "-accel kvm" } else { "-accel tcg" };
    let qemu = qemu(pod)?;
    ensure!(qemu.command.contains(expected), "{expected} was expected, QEMU runs as {}", qemu.command);
    let has_kvm = open_files(&qemu)?.iter().any(|path| path == "/dev/kvm" || path.starts_with("anon_inode:kvm"));
    ensure!(has_kvm == expected.ends_with("kvm"), "{expected}, but QEMU has KVM open: {has_kvm}");
    Ok(())
}

fn vsock(_: &Context, pod: &Pod) -> Result<()> {
    let in_kernel = Path::new("/dev/vhost-vsock").exists();
    let files = open_files(&qemu(pod)?)?;
    ensure!(files.iter().any(|path| path == "/dev/vhost-vsock") == in_kernel, "QEMU has {files:?} open");
    let helpers = faults::find_all(&pod.node, &pod.id, Part::VsockHelper)?;
    ensure!(helpers.is_empty() == in_kernel, "helpers are {helpers:?}");
    Ok(())
}

fn vhost_net(_: &Context, pod: &Pod) -> Result<()> {
    let in_kernel = Path::new("/dev/vhost-net").exists();
    let files = open_files(&qemu(pod)?)?;
    ensure!(files.iter().any(|path| path == "/dev/vhost-net") == in_kernel, "QEMU has {files:?} open");
    Ok(())
}

fn cgroups(_: &Context, pod: &Pod) -> Result<()> {
    let pure_v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let parts = [Part::Qemu, Part::Virtiofsd, Part::VsockHelper];
    let processes: Vec<_> =
        parts.into_iter().map(|part| faults::find_all(&pod.node, &pod.id, part)).collect::<Result<Vec<_>>>()?.concat();
    ensure!(processes.len() >= 2, "the pod has only {processes:?}");
    let inside = |process: &Process| process.cgroups.iter().filter(|path| pod.node.cgroups.holds(path)).count();
    for process in processes {
        let count = inside(&process);
        let everywhere = count == process.cgroups.len();
        ensure!(count > 0 && (!pure_v2 || everywhere), "{} is in {:?}", process.name, process.cgroups);
        if pure_v2 {
            let leaf = process.cgroups.first().context("it is in one cgroup")?.trim_start_matches('/');
            for file in ["memory.current", "cpu.max", "pids.current", "io.stat"] {
                let path = Path::new("/sys/fs/cgroup").join(leaf).join(file);
                ensure!(path.exists(), "nobody handed a controller down: there is no {}", path.display());
            }
        }
    }
    let shim = faults::find(&pod.node, &pod.id, Part::Shim)?;
    ensure!(inside(&shim) == 0, "the shim is in {:?}", shim.cgroups);
    Ok(())
}
