//! What dies is noticed, told, and cleaned up.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{pause, wait_for};
use bulkhead_tests::container::{ContainerSpec, text_of};
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::process::Process;
use bulkhead_tests::row::{ALL, BULKHEAD, Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use nix::sys::signal::Signal;
use serde_json::json;

const ROWS: &[Row] = &[
    Row::alone(
        "when QEMU is killed, containers exit with 137 and the pod is not ready within two seconds",
        qemu_killed,
    )
    .only(BULKHEAD),
    Row::alone("when QEMU is killed, a running exec ends with an error", qemu_killed_under_exec).only(BULKHEAD),
    Row::alone("when the shim is killed, nothing of the pod is left after its removal", shim_killed).only(BULKHEAD),
    Row::alone("when virtiofsd is killed, it is told and nothing is left", virtiofsd_killed).only(BULKHEAD),
    Row::alone("when the vsock helper is killed, it is told and nothing is left", vsock_helper_killed).only(BULKHEAD),
    Row::alone("when containerd is killed, pods run on and their logs and execs work afterwards", containerd_killed),
    Row::alone("a container that ends while containerd is down keeps its exit", exit_while_down),
    Row::alone("a pod can be removed after containerd was killed", removed_after_restart),
    Row::alone("a guest that hangs is noticed and told", guest_hangs).only(BULKHEAD),
    Row::alone("a guest that panics is noticed and told with its console", guest_panics).only(BULKHEAD),
    Row::alone("QEMU killed while a pod is stopped does not hold up the stop", qemu_killed_during_stop).only(BULKHEAD),
    Row::alone(
        "containerd killed while pods start leaves nothing after they are removed",
        containerd_killed_during_start,
    )
    .only(BULKHEAD)
    // 1.6 forgets a task that it was about to create, and now and then no call ever comes that would end its shim.
    .releases(&[Version::V2_4]),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], ALL, ROWS)
}

const SOON: Duration = Duration::from_secs(20);

/// Waits until CRI calls the pod not ready.
fn wait_not_ready(pod: &Pod, deadline: Duration) -> Result<()> {
    wait_for("the pod to be not ready", deadline, || {
        ensure!(!pod.is_ready()?, "it is ready");
        Ok(())
    })
}

/// Waits for a line of the node's log since `position` of which `tells` is true, and returns it.
fn wait_for_line(pod: &Pod, position: u64, tells: impl Fn(&str) -> bool) -> Result<String> {
    wait_for("the log to tell", SOON, || {
        let log = pod.node.log_since(position, 1000);
        let line = log.lines().find(|line| tells(line)).map(str::to_owned);
        line.with_context(|| format!("the log does not tell: {log}"))
    })
}

fn qemu_killed(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let (first, second) = (pod.run(ContainerSpec::idle())?, pod.run(ContainerSpec::idle())?);
    // To find it takes a while on a machine with many processes.
    let qemu = faults::find(&pod.node, &pod.id, Part::Qemu)?;
    let (position, killed) = (pod.node.log_position(), SystemTime::now());
    qemu.signal(Signal::SIGKILL)?;
    for container in [&first, &second] {
        let exit = container.wait(SOON)?;
        ensure!(exit.code == 137, "exit {exit:?}");
    }
    wait_not_ready(&pod, SOON)?;
    // How long it took until containerd was told is in the log: a question by crictl may take as long on a slow machine.
    for id in [&pod.id, &first.id, &second.id] {
        // A sandbox of the sandbox API has no process.
        let is_exit = |line: &str| {
            ["process exited", "sandbox ended"].iter().any(|what| line.contains(&format!("msg=\"{what}\"")))
        };
        let told = wait_for_line(&pod, position, |line| is_exit(line) && line.contains(&format!("={id} ")));
        let told = told.with_context(|| format!("the exit of {id}"))?;
        let took = seconds_of_day_in(&told)? - killed.duration_since(UNIX_EPOCH)?.as_secs_f64() % DAY_SECONDS;
        ensure!(took.rem_euclid(DAY_SECONDS) < 2.0, "it took {took} s until the exit of {id} was told");
    }
    let said = first.exec(&["true"])?.failure()?;
    ensure!(said.contains("running") || said.contains("not found") || said.contains("EXITED"), "exec said {said:?}");
    pod.remove_by_force()
}

const DAY_SECONDS: f64 = 86_400.0;

/// Seconds since midnight, UTC, of a line of the log (`time="2026-01-31T23:59:59.5Z"`).
fn seconds_of_day_in(line: &str) -> Result<f64> {
    let time = line.split_once('T').and_then(|(_, rest)| rest.split_once('Z')).map(|(time, _)| time);
    let parts: Option<Vec<f64>> = time.and_then(|time| time.split(':').map(|part| part.parse().ok()).collect());
    match parts.as_deref() {
        Some([hours, minutes, seconds]) => Ok(hours * 3600.0 + minutes * 60.0 + seconds),
        _ => anyhow::bail!("the line has no time: {line}"),
    }
}

fn qemu_killed_under_exec(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    let exec = container.exec_streamed_command(&["sh", "-c", "touch /tmp/runs; sleep 1000"], "");
    let running = exec.deadline(Duration::from_mins(1)).start()?;
    wait_for("the exec to run", SOON, || container.exec(&["test", "-e", "/tmp/runs"])?.success())?;
    faults::kill(&pod.node, &pod.id, Part::Qemu)?;
    let output = running.finish()?;
    ensure!(output.code != 0, "the exec succeeded: {}", output.describe());
    pod.remove_by_force()
}

fn shim_killed(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    faults::kill(&pod.node, &pod.id, Part::Shim)?;
    wait_not_ready(&pod, SOON)?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code != 0, "exit {exit:?}");
    pod.remove_by_force()
}

fn virtiofsd_killed(context: &Context) -> Result<()> {
    helper_killed(context, Part::Virtiofsd, "virtiofsd")
}

fn vsock_helper_killed(context: &Context) -> Result<()> {
    if Path::new("/dev/vhost-vsock").exists() {
        print!("(skipped: the kernel's vhost-vsock is used) ");
        return Ok(());
    }
    helper_killed(context, Part::VsockHelper, "bulkhead-vsock")
}

/// A pod without one of its helpers cannot go on: it must end by itself and say why.
fn helper_killed(context: &Context, part: Part, name: &str) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    let position = pod.node.log_position();
    faults::kill(&pod.node, &pod.id, part)?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 137, "exit {exit:?}");
    wait_not_ready(&pod, SOON)?;
    wait_for_line(&pod, position, |line| line.contains("level=error") && line.contains(name))?;
    pod.remove_by_force()
}

fn containerd_killed(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::script("n=0; while :; do echo tick $n; n=$((n+1)); sleep 0.2; done"))?;
    let pid = |part| faults::find(&pod.node, &pod.id, part).map(|process: Process| process.pid);
    let before = pid(Part::Shim)?;
    // What containerd has taken and not yet written is lost with it: it is killed right behind a line.
    let line = container.log_text("stdout")?.lines().count() + 3;
    container.wait_for_log(&format!("tick {line}"), SOON)?;
    pod.node.kill_daemon()?;
    pause(Duration::from_secs(1));
    pod.node.start_daemon()?;
    ensure!(pid(Part::Shim)? == before, "the shim is another one");
    ensure!(pod.is_ready()?, "the pod is not ready");
    ensure!(container.state()? == "CONTAINER_RUNNING", "the container does not run");
    ensure!(container.shell("echo well")? == "well");
    let output = container.exec_streamed(&["sh", "-c", "cat; exit 3"], "through")?.exited(3)?;
    ensure!(output.text() == "through");
    // containerd itself reads the log's stream; what matters is that it goes on and that numbers only rise.
    let log = container.log_text("stdout")?;
    let last: u32 = log.lines().last().and_then(|line| line.strip_prefix("tick ")?.parse().ok()).context("no tick")?;
    container.wait_for_log(&format!("tick {}", last + 10), SOON)?;
    let ticks: Vec<u32> =
        container.log_text("stdout")?.lines().filter_map(|line| line.strip_prefix("tick ")?.parse().ok()).collect();
    ensure!(ticks.is_sorted(), "the log is out of order: {ticks:?}");
    if context.runtime.is_bulkhead() {
        ensure!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "lines were lost: {ticks:?}");
    }
    container.stop(5)?;
    container.remove()?;
    // What a new container of the pod finds is still what the pod was made with.
    let (exit, log) = pod.run(ContainerSpec::script("hostname; cat /etc/hostname /etc/resolv.conf"))?.finish(SOON)?;
    let said = text_of(&log, "stdout");
    ensure!(exit.code == 0 && said.starts_with("compartment\ncompartment\n"), "{exit:?}, it found {said:?}");
    ensure!(said.contains("nameserver 10.0.0.10"), "it found {said:?}");
    pod.remove()
}

fn exit_while_down(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    // A second container keeps the pod's shim busy, as in any pod that matters.
    let other = pod.run(ContainerSpec::idle())?;
    let container = pod.run(ContainerSpec::script("sleep 3; exit 5"))?;
    pod.node.kill_daemon()?;
    pause(Duration::from_secs(4));
    pod.node.start_daemon()?;
    let exit = container.wait(SOON)?;
    // containerd replaces the code of a runc container whose shim lists no process any more by 255.
    ensure!(exit.code == 5 || context.runtime == Runtime::Runc && exit.code == 255, "exit {exit:?}");
    ensure!(other.state()? == "CONTAINER_RUNNING");
    pod.remove_by_force()
}

fn removed_after_restart(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    pod.run(ContainerSpec::idle())?;
    pod.node.kill_daemon()?;
    pod.node.start_daemon()?;
    pod.remove_by_force()
}

fn guest_hangs(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    let position = pod.node.log_position();
    // A stopped QEMU is what a guest that spins with interrupts off looks like from outside.
    faults::find(&pod.node, &pod.id, Part::Qemu)?.signal(Signal::SIGSTOP)?;
    let exit = container.wait(Duration::from_mins(1))?;
    ensure!(exit.code == 137, "exit {exit:?}");
    wait_not_ready(&pod, SOON)?;
    wait_for_line(&pod, position, |line| line.contains("level=error") && line.contains("no heartbeat"))?;
    pod.remove_by_force()
}

fn guest_panics(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new().set("/linux/security_context/privileged", true))?;
    let spec = ContainerSpec::idle().security("privileged", true).security("seccomp", json!({"profile_type": 1}));
    let container = pod.run(spec)?;
    let position = pod.node.log_position();
    // The exec ends with the guest, in whatever way.
    let script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger";
    container.exec_command(&["sh", "-c", script]).deadline(Duration::from_mins(1)).output()?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 137, "exit {exit:?}");
    wait_not_ready(&pod, SOON)?;
    wait_for_line(&pod, position, |line| line.contains("Kernel panic")).context("the console")?;
    pod.remove_by_force()
}

fn qemu_killed_during_stop(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let script = "trap 'echo asked' TERM; echo ready; while :; do sleep 1; done";
    let container = pod.run(ContainerSpec::script(script))?;
    container.wait_for_log("ready", SOON)?;
    let stopping = container.crictl(&["stop", "--timeout", "20", &container.id]).start()?;
    container.wait_for_log("asked", SOON)?;
    faults::kill(&pod.node, &pod.id, Part::Qemu)?;
    let took = stopping.finish()?.success()?.elapsed;
    ensure!(took < Duration::from_secs(10), "the stop took {took:?}");
    pod.remove_by_force()
}

fn containerd_killed_during_start(context: &Context) -> Result<()> {
    let node = &context.node;
    for delay in [50, 100, 200, 300, 450, 600, 1000] {
        let (outcome, killed) = std::thread::scope(|scope| {
            let starting =
                scope.spawn(|| context.try_start(PodSpec::new()).map(|(pod, _)| pod.map(|pod| pod.id.clone())));
            pause(Duration::from_millis(delay));
            let killed = node.kill_daemon().and_then(|()| node.start_daemon());
            (starting.join(), killed)
        });
        killed?;
        // The command may have failed, or not; all that counts is that nothing stays.
        drop(outcome);
    }
    let listed = node.crictl(&["pods", "-q", "--no-trunc"]).success()?.text();
    for id in listed.lines() {
        node.remember(bulkhead_tests::containerd::CRI_NAMESPACE, id);
        node.crictl(&["rmp", "-f", id]).success()?;
    }
    // And the node works as before.
    let pod = context.start(PodSpec::new())?;
    let (exit, log) = pod.run(ContainerSpec::script("echo well"))?.finish(SOON)?;
    ensure!(exit.code == 0 && text_of(&log, "stdout") == "well", "{exit:?} {log:?}");
    pod.remove()
}
