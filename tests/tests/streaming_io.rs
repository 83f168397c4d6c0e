//! What is special about containerd's streaming IO: streams that break, come late, or are closed early. All that a
//! program's input and output is about otherwise is in `streams`, which runs with it too.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{pause, wait_for};
use bulkhead_tests::container::{ContainerSpec, text_of};
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::tools::Version;

const ROWS: &[Row] = &[
    Row::in_pod("streams lead to the shim, and are all closed when their container is gone", streams_of_shim),
    Row::in_pod("a container that is started long after its creation has its streams", late_start),
    Row::in_pod("a container that is removed without a start leaves no stream", never_started),
    Row::in_pod("a container that is killed in the middle of its output ends at once", killed_talking),
    Row::alone("when containerd is killed, the log goes on and no line is lost or doubled", containerd_killed),
    Row::alone("input and terminal work after containerd was killed", attached_after_restart),
    Row::alone("what a container says and how it ends while containerd is down is told afterwards", exit_while_down),
    Row::alone("a pod can be removed after containerd was killed under an exec", exec_under_restart),
];

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], &[Runtime::BulkheadStreaming], ROWS)
}

const SOON: Duration = Duration::from_secs(20);

/// Sockets that the pod's shim has open.
fn sockets(pod: &Pod) -> Result<usize> {
    let pid = faults::find(&pod.node, &pod.id, Part::Shim)?.pid;
    let mut count = 0;
    for file in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that was closed meanwhile is not counted.
        let target = std::fs::read_link(file?.path());
        count += usize::from(target.is_ok_and(|target| target.to_string_lossy().starts_with("socket:")));
    }
    Ok(count)
}

/// [`sockets`] when none is just being closed: twice the same, a while apart.
fn sockets_at_rest(pod: &Pod) -> Result<usize> {
    wait_for("the shim's sockets to stay as they are", SOON, || {
        let before = sockets(pod)?;
        pause(Duration::from_millis(300));
        let count = sockets(pod)?;
        ensure!(count == before, "the shim has {count} sockets, {before} before");
        Ok(count)
    })
}

fn wait_for_sockets(pod: &Pod, expected: usize) -> Result<()> {
    wait_for("the shim's sockets to be closed", SOON, || {
        let count = sockets(pod)?;
        ensure!(count == expected, "the shim has {count} sockets, expected {expected}");
        Ok(())
    })
}

fn streams_of_shim(_: &Context, pod: &Pod) -> Result<()> {
    // The first container brings what stays: containerd's connection for its calls.
    pod.run(ContainerSpec::idle())?.remove_by_force()?;
    let before = sockets_at_rest(pod)?;
    let container = pod.run(ContainerSpec::idle().stdin())?;
    // Each of the three streams is a connection of containerd's, and one of the guest's unless those come by AF_VSOCK.
    ensure!(sockets(pod)? >= before + 3, "{} sockets with a container, {before} before", sockets(pod)?);
    for _ in 0..5 {
        container.exec(&["true"])?.success()?;
        container.exec_streamed(&["cat"], "in and out")?.success()?;
    }
    container.remove_by_force()?;
    wait_for_sockets(pod, before)
}

fn late_start(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.create(ContainerSpec::script("echo well; echo bad >&2"))?;
    // Longer than a client may take to say which stream it wants.
    pause(Duration::from_secs(12));
    container.start()?;
    let (exit, log) = container.finish(SOON)?;
    ensure!(exit.code == 0, "exit {exit:?}");
    ensure!(text_of(&log, "stdout") == "well" && text_of(&log, "stderr") == "bad", "the log is {log:?}");
    Ok(())
}

fn never_started(_: &Context, pod: &Pod) -> Result<()> {
    pod.run(ContainerSpec::idle())?.remove_by_force()?;
    let before = sockets_at_rest(pod)?;
    let container = pod.create(ContainerSpec::idle().stdin())?;
    ensure!(sockets(pod)? == before + 3, "{} sockets with a container, {before} before", sockets(pod)?);
    container.remove()?;
    wait_for_sockets(pod, before)
}

fn killed_talking(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::script("while :; do echo again and again; done"))?;
    container.wait_for_log("again and again", SOON)?;
    let took = container.stop(0)?.elapsed;
    ensure!(took < Duration::from_secs(8), "the stop took {took:?}");
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 137, "exit {exit:?}");
    container.remove()
}

fn restart(pod: &Pod, away: Duration) -> Result<()> {
    pod.node.kill_daemon()?;
    pause(away);
    pod.node.start_daemon()
}

fn containerd_killed(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let script = "n=0; while :; do echo tick $n; echo tock $n >&2; n=$((n+1)); sleep 0.2; done";
    let container = pod.run(ContainerSpec::script(script))?;
    let numbers = |stream: &str, word: &str| -> Result<Vec<u32>> {
        let text = container.log_text(stream)?;
        Ok(text.lines().filter_map(|line| line.strip_prefix(word)?.trim().parse().ok()).collect())
    };
    for _ in 0..3 {
        let wanted = numbers("stdout", "tick")?.last().unwrap_or(&0) + 5;
        // What containerd has taken and not yet written is lost with it, as it is with runc: it is killed between two lines.
        wait_for("both outputs to get on", SOON, || {
            let (ticks, tocks) = (numbers("stdout", "tick")?, numbers("stderr", "tock")?);
            ensure!(ticks.contains(&wanted) && tocks.contains(&wanted), "they have {ticks:?} and {tocks:?}");
            Ok(())
        })?;
        restart(&pod, Duration::from_secs(1))?;
        ensure!(container.state()? == "CONTAINER_RUNNING", "the container does not run");
    }
    let last = *numbers("stdout", "tick")?.last().context("no tick")?;
    container.wait_for_log(&format!("tick {}", last + 10), SOON)?;
    container.stop(0)?;
    for (stream, word) in [("stdout", "tick"), ("stderr", "tock")] {
        let told = numbers(stream, word)?;
        let expected: Vec<u32> = (0..u32::try_from(told.len())?).collect();
        ensure!(told == expected, "{stream} lost lines, or has some twice: {told:?}");
    }
    container.remove()?;
    pod.remove()
}

fn attached_after_restart(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let echo = "while read line; do echo \"got $line\"; done; exit 8";
    let container = pod.run(ContainerSpec::script(echo).stdin())?;
    let shell = pod.run(ContainerSpec::new(&["sh"]).terminal())?;
    restart(&pod, Duration::from_secs(1))?;
    for (container, line, answer) in [(&container, "line", "got line"), (&shell, "echo $((6*7)); tty", "/dev/pts/")] {
        let mut terminal = Terminal::behind_pipe(&container.crictl(&["attach", "-i", &container.id]))?;
        // The answer can come before the output is attached; it is asked for until it is seen.
        wait_for("an answer", SOON, || {
            terminal.send(&format!("{line}\n"))?;
            terminal.expect(answer, Duration::from_millis(500))
        })?;
    }
    let output = container.exec_streamed(&["sh", "-c", "cat; exit 3"], "through")?.exited(3)?;
    ensure!(output.text() == "through", "it said {:?}", output.text());
    ensure!(container.state()? == "CONTAINER_RUNNING", "a client that left has ended the input");
    container.remove_by_force()?;
    shell.remove_by_force()?;
    pod.remove()
}

fn exit_while_down(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.create(ContainerSpec::script("echo first; sleep 6; echo last; echo bad >&2; exit 5"))?;
    // Three megabytes, which is more than all buffers on the way hold.
    let lines = 30_000;
    let rest = "-".repeat(90);
    let script = format!("sleep 6; n=0; while [ $n -lt {lines} ]; do echo line $n {rest}; n=$((n+1)); done; exit 6");
    let talker = pod.create(ContainerSpec::script(&script))?;
    // One right behind the other: containerd has to be gone before the second talks and the first ends.
    container.start()?;
    talker.start()?;
    container.wait_for_log("first", SOON)?;
    restart(&pod, Duration::from_secs(9))?;
    let (exit, log) = container.finish(SOON)?;
    ensure!(exit.code == 5, "exit {exit:?}");
    ensure!(text_of(&log, "stdout") == "first\nlast" && text_of(&log, "stderr") == "bad", "the log is {log:?}");
    let (exit, log) = talker.finish(Duration::from_mins(1))?;
    ensure!(exit.code == 6, "exit {exit:?}");
    let expected = (0..lines).map(|n| format!("line {n} {rest}")).collect::<Vec<_>>().join("\n");
    ensure!(text_of(&log, "stdout") == expected, "{} lines of {lines} arrived, or others", log.len());
    pod.remove()
}

fn exec_under_restart(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    // It goes on talking when nobody will ever read it again.
    let running =
        container.exec_streamed_command(&["sh", "-c", "touch /tmp/talks; while :; do echo talk; done"], "").start()?;
    wait_for("the exec to run", SOON, || container.exec(&["test", "-e", "/tmp/talks"])?.success())?;
    restart(&pod, Duration::from_secs(1))?;
    drop(running.terminate()?);
    ensure!(container.shell("echo well")? == "well");
    let took = container.stop(5)?.elapsed;
    ensure!(took < Duration::from_secs(20), "the stop took {took:?}");
    container.remove()?;
    pod.remove()
}
