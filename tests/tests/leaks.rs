//! Nothing is left behind, and the check that says so would notice.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{Run, wait_for};
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::{ALL, BULKHEAD, Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;

const ROWS: &[Row] = &[
    Row::alone("the check notices a process, a mount, a link, a cgroup, a socket and a directory", check_notices)
        .only(&[Runtime::Runc]),
    Row::alone("a pod started and removed ten times leaves nothing", one_after_the_other),
    Row::alone("six pods started and removed at once leave nothing", at_once),
    Row::alone("a running pod has everything that the check looks for", check_sees_a_pod).only(BULKHEAD),
    Row::alone("the shim holds no more files and threads after fifty execs", shim_keeps_nothing).only(BULKHEAD),
    Row::alone("a pod stopped but not removed has nothing running", stopped_pod),
];

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], ALL, ROWS)
}

const SOON: Duration = Duration::from_secs(20);

fn check_notices(context: &Context) -> Result<()> {
    let node = &context.node;
    // The bridge comes with the first pod.
    let pod = context.start(PodSpec::new())?;
    let before = Snapshot::take(node)?;
    let root = &node.layout.root;
    let mount = context.scratch.join("mount");
    fs::create_dir(&mount)?;
    Run::new("/bin/mount").args(["-t", "tmpfs", "none"]).arg(&mount).success()?;
    let link = format!("{}x", node.name);
    Run::new("/sbin/ip")
        .args(["link", "add", &link, "type", "veth", "peer", "name", &format!("{}y", node.name)])
        .success()?;
    Run::new("/sbin/ip").args(["link", "set", &link, "master", &node.name]).success()?;
    let sleeping = Run::new("/bin/sh").args(["-c", "sleep 1000; :", &root.display().to_string()]).start()?;
    let socket = std::os::unix::net::UnixListener::bind(context.scratch.join("socket"))?;
    let directory = root.join("state/io.containerd.runtime.v2.task/k8s.io/left-over");
    fs::create_dir(&directory)?;
    node.cgroups.make("left-over")?;
    let noticed: Vec<_> = {
        let now = Snapshot::take(node)?;
        let known: Vec<_> = before.things().collect();
        now.things().filter(|thing| !known.contains(thing)).map(str::to_owned).collect()
    };
    // Everything is undone before anything is judged.
    node.cgroups.remove_if_empty("left-over");
    fs::remove_dir(&directory)?;
    drop((socket, sleeping));
    Run::new("/sbin/ip").args(["link", "del", &link]).success()?;
    Run::new("/bin/umount").arg(&mount).success()?;
    pod.remove()?;
    for kind in ["process", "mount", "link", "socket", "directory", "cgroup"] {
        ensure!(noticed.iter().any(|thing| thing.starts_with(kind)), "no {kind} was noticed, only {noticed:?}");
    }
    Ok(())
}

fn one_after_the_other(context: &Context) -> Result<()> {
    for _ in 0..10 {
        let pod = context.start(PodSpec::new())?;
        let (exit, _) = pod.run(ContainerSpec::new(&["true"]))?.finish(SOON)?;
        ensure!(exit.code == 0, "exit {exit:?}");
        pod.remove()?;
    }
    Ok(())
}

fn at_once(context: &Context) -> Result<()> {
    std::thread::scope(|scope| {
        let pods: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let pod = context.start(PodSpec::new())?;
                    let (exit, _) = pod.run(ContainerSpec::new(&["true"]))?.finish(Duration::from_mins(1))?;
                    ensure!(exit.code == 0, "exit {exit:?}");
                    pod.remove()
                })
            })
            .collect();
        for pod in pods {
            pod.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

fn check_sees_a_pod(context: &Context) -> Result<()> {
    let before = Snapshot::take(&context.node)?;
    let pod = context.start(PodSpec::new())?;
    let known: Vec<_> = before.things().collect();
    let now = Snapshot::take(&context.node)?;
    let new: Vec<_> = now.things().filter(|thing| !known.contains(thing)).collect();
    let expected =
        ["containerd-shim", "qemu-system", "virtiofsd", "link ", "cgroup ", "socket ", "directory ", "CNI record "];
    for part in expected {
        ensure!(new.iter().any(|thing| thing.contains(part)), "{part} is not among {new:#?}");
    }
    pod.remove()
}

/// Open files and threads of the pod's shim.
fn shim_size(pod: &Pod) -> Result<(usize, usize)> {
    let shim = faults::find(&pod.node, &pod.id, Part::Shim)?;
    let count = |what: &str| -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/{what}", shim.pid))
            .with_context(|| format!("list {what} of the shim"))?
            .count())
    };
    Ok((count("fd")?, count("task")?))
}

fn shim_keeps_nothing(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    for _ in 0..3 {
        container.exec(&["true"])?.success()?;
    }
    let before = shim_size(&pod)?;
    for _ in 0..50 {
        container.exec(&["true"])?.success()?;
    }
    // What the last one had is closed a moment after its end.
    wait_for("the shim to come to rest", SOON, || {
        let after = shim_size(&pod)?;
        ensure!(after.0 <= before.0 + 3, "open files went from {} to {}", before.0, after.0);
        ensure!(after.1 <= before.1 + 3, "threads went from {} to {}", before.1, after.1);
        Ok(())
    })?;
    container.remove_by_force()?;
    pod.remove()
}

fn stopped_pod(context: &Context) -> Result<()> {
    let before = Snapshot::take(&context.node)?;
    let pod = context.start(PodSpec::new())?;
    pod.run(ContainerSpec::idle())?;
    pod.stop()?;
    // The records and the cgroup stay until the pod is removed.
    let known: Vec<_> = before.things().collect();
    wait_for("the pod to come to rest", SOON, || {
        let now = Snapshot::take(&context.node)?;
        let kinds = ["process", "link", "socket", "loop"];
        let new = now.things().filter(|thing| !known.contains(thing));
        // Through the sandbox API the shim answers for the pod until it is removed.
        let answers = |thing: &&str| {
            context.runtime == Runtime::BulkheadSandbox
                && (thing.contains("(containerd-shim)") || thing.starts_with("socket /run/containerd/s/"))
        };
        let running = new.filter(|thing| kinds.iter().any(|kind| thing.starts_with(kind)));
        let running: Vec<_> = running.filter(|thing| !answers(thing)).collect();
        ensure!(running.is_empty(), "a stopped pod still has {running:?}");
        Ok(())
    })?;
    pod.remove()
}
