//! The life cycle of pods and containers, and exec.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::container::{ContainerSpec, text_of};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::Context;

use crate::SOON;

pub fn pod_life(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    ensure!(pod.is_ready()?, "not ready after runp");
    let listed = pod.crictl(&["pods", "--no-trunc", "-o", "json", "--id", &pod.id]).success()?.text();
    ensure!(listed.contains("SANDBOX_READY"), "crictl pods says {listed}");
    pod.stop()?;
    ensure!(!pod.is_ready()?, "ready after stopp");
    let (node, id) = (std::sync::Arc::clone(&pod.node), pod.id.clone());
    pod.remove()?;
    Pod::check_unknown(&node, &id)
}

pub fn idempotence(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    container.stop(5)?;
    container.stop(5)?;
    let id = container.id.clone();
    container.remove()?;
    let said = pod.crictl(&["inspect", &id]).output()?.failure()?;
    ensure!(said.contains("not found") || said.contains("NotFound"), "crictl inspect said {said:?}");
    let said = pod.crictl(&["exec", "--sync", &id, "true"]).output()?.failure()?;
    ensure!(said.contains("not found") || said.contains("NotFound"), "crictl exec said {said:?}");
    pod.stop()?;
    pod.stop()?;
    let (node, id) = (std::sync::Arc::clone(&pod.node), pod.id.clone());
    pod.remove()?;
    // CRI wants a second removal to succeed or to say that there is nothing.
    let again = node.crictl(&["rmp", &id]).output()?;
    ensure!(
        again.code == 0 || again.stderr.contains("not found") || again.stderr.contains("NotFound"),
        "{}",
        again.describe()
    );
    Ok(())
}

pub fn force(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    pod.run(ContainerSpec::script("trap '' TERM; while :; do sleep 1; done"))?;
    pod.run(ContainerSpec::idle())?;
    pod.remove_by_force()
}

pub fn container_life(_: &Context, pod: &Pod) -> Result<()> {
    let script = "echo out; echo err >&2; read line < /run/go; echo \"$line\"; exit 3";
    let container = pod.create(ContainerSpec::script(&format!("mkfifo /run/go; {script}")))?;
    ensure!(container.state()? == "CONTAINER_CREATED", "state {}", container.state()?);
    ensure!(container.log()?.is_empty(), "it ran before its start");
    container.start()?;
    ensure!(container.state()? == "CONTAINER_RUNNING", "state {}", container.state()?);
    container.wait_for_log("out", SOON)?;
    // The program may end before the exec does, and its PID namespace ends the exec with SIGKILL.
    let told = container.exec(&["/bin/sh", "-c", "echo go on > /run/go"])?;
    ensure!(matches!(told.code, 0 | 137), "the exec ended otherwise: {}", told.describe());
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 3 && exit.reason == "Error", "exit {exit:?}");
    ensure!(container.log_text("stdout")? == "out\ngo on", "stdout {:?}", container.log_text("stdout"));
    ensure!(container.log_text("stderr")? == "err", "stderr {:?}", container.log_text("stderr"));
    let logs = container.crictl(&["logs", "--tail", "1", &container.id]).success()?;
    ensure!(logs.text() == "go on", "crictl logs says {}", logs.describe());
    let id = container.id.clone();
    container.remove()?;
    let left = pod.crictl(&["ps", "-a", "-q", "--no-trunc"]).success()?.text();
    ensure!(!left.contains(&id), "still listed");
    Ok(())
}

pub fn never_started(_: &Context, pod: &Pod) -> Result<()> {
    pod.create(ContainerSpec::idle())?.remove()
}

pub fn exit_codes(_: &Context, pod: &Pod) -> Result<()> {
    for (code, reason) in [(0, "Completed"), (1, "Error"), (255, "Error")] {
        let (exit, _) = pod.run(ContainerSpec::script(&format!("exit {code}")))?.finish(SOON)?;
        ensure!(exit.code == code && exit.reason == reason, "exit {code} became {exit:?}");
    }
    Ok(())
}

pub fn killed_by_signal(_: &Context, pod: &Pod) -> Result<()> {
    // PID 1 of a namespace ignores what it does not handle, so the shell dies of a signal only from outside.
    let (exit, _) = pod.run(ContainerSpec::script("sh -c 'kill -SEGV $$'; exit $?"))?.finish(SOON)?;
    ensure!(exit.code == 139, "a child's SIGSEGV became {exit:?}");
    let container = pod.run(ContainerSpec::new(&["sleep", "1000"]))?;
    container.stop(0)?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 137, "SIGKILL became {exit:?}");
    container.remove()
}

pub fn program_not_found(_: &Context, pod: &Pod) -> Result<()> {
    for (program, accepted) in [("no-such-program", "not found"), ("/no/such/path", "no such file"), ("/etc", "")] {
        let container = pod.create(ContainerSpec::new(&[program]))?;
        let said = container.try_start()?.failure()?;
        ensure!(said.contains(program) && said.contains(accepted), "crictl start of {program} said {said:?}");
        let status = container.status()?;
        ensure!(status["state"] == "CONTAINER_EXITED" && status["exitCode"] == 128, "its status is {status}");
        container.remove()?;
    }
    Ok(())
}

pub fn stop_in_grace(_: &Context, pod: &Pod) -> Result<()> {
    let script = "trap 'sleep 1; echo bye; exit 7' TERM; echo ready; while :; do sleep 1000 & wait $!; done";
    let container = pod.run(ContainerSpec::script(script))?;
    container.wait_for_log("ready", SOON)?;
    let took = container.stop(15)?.elapsed;
    ensure!((1.0..8.0).contains(&took.as_secs_f32()), "stop took {took:?}");
    let (exit, log) = container.finish(SOON)?;
    ensure!(exit.code == 7, "exit {exit:?}");
    ensure!(text_of(&log, "stdout") == "ready\nbye", "stdout {:?}", text_of(&log, "stdout"));
    Ok(())
}

pub fn stop_after_grace(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::script("trap '' TERM; echo ready; while :; do sleep 1; done"))?;
    container.wait_for_log("ready", SOON)?;
    let took = container.stop(2)?.elapsed;
    ensure!((1.9..10.0).contains(&took.as_secs_f32()), "stop took {took:?}");
    let (exit, _) = container.finish(SOON)?;
    ensure!(exit.code == 137, "exit {exit:?}");
    Ok(())
}

pub fn inspect(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle().mount(&context.scratch, "/data", false))?;
    let all = container.inspect()?;
    let pid = all["info"]["pid"].as_i64().context("no pid in crictl inspect")?;
    ensure!(fs::exists(format!("/proc/{pid}"))?, "process {pid} is not there");
    let status = &all["status"];
    for field in ["createdAt", "startedAt"] {
        let time = status[field].as_str().unwrap_or_default();
        ensure!(time.starts_with("20"), "{field} is {time:?}");
    }
    ensure!(status["mounts"][0]["containerPath"] == "/data", "mounts are {}", status["mounts"]);
    container.stop(5)?;
    let status = container.status()?;
    let time = status["finishedAt"].as_str().unwrap_or_default();
    ensure!(time.starts_with("20"), "finishedAt is {time:?}");
    container.remove()
}

pub fn restarted(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    for attempt in 0..3 {
        let spec =
            ContainerSpec::script("test -e /mark && exit 1; touch /mark; exit 0").set("/metadata/attempt", attempt);
        let (exit, _) = pod.run(spec)?.finish(SOON)?;
        ensure!(exit.code == 0, "attempt {attempt} found the mark of the one before: {exit:?}");
    }
    pod.remove()
}

pub fn exec(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle().env("COLOUR", "teal"))?;
    let script = "echo $COLOUR; echo wrong >&2; exit 5";
    let output = container.exec(&["sh", "-c", script])?.exited(5)?;
    ensure!(output.stderr.contains("wrong"), "stderr {:?}", output.stderr);
    let output = container.exec_streamed(&["sh", "-c", script], "")?.exited(5)?;
    ensure!(output.text() == "teal", "stdout {:?}", output.text());
    ensure!(output.stderr.contains("wrong"), "stderr {:?}", output.stderr);
    ensure!(container.shell(script.strip_suffix("exit 5").unwrap_or_default())? == "teal\n\nwrong");
    container.exec(&["sh", "-c", "kill -9 $$"])?.exited(137)?;
    ensure!(
        container.shell("ps -o pid,args | grep -c '^ *1 .*trap'")? == "1",
        "exec does not see the program as PID 1"
    );
    container.remove_by_force()
}

pub fn exec_not_found(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let said = container.exec(&["no-such-program"])?.failure()?;
    ensure!(said.contains("no-such-program") && said.contains("not found"), "crictl exec said {said:?}");
    ensure!(container.shell("echo well")? == "well", "exec does not work after a failed one");
    container.remove_by_force()
}

pub fn exec_timeout(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let output = container.crictl(&["exec", "--sync", "--timeout", "1", &container.id, "sleep", "321"]).output()?;
    let took = output.elapsed;
    let said = output.failure()?;
    ensure!(said.contains("timeout") || said.contains("Deadline"), "crictl exec said {said:?}");
    ensure!(took < Duration::from_secs(10), "it took {took:?}");
    wait_for("the program to be gone", SOON, || {
        let left = container.shell("ps -o args | grep -c '[s]leep 321' || true")?;
        ensure!(left == "0", "{left} of it run");
        Ok(())
    })?;
    container.remove_by_force()
}
