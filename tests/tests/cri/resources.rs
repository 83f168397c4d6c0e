//! Statistics and limits.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::Context;

use crate::{SOON, outcome};

/// A number of CRI's statistics, which protobuf's JSON writes as text.
fn counter(stats: &serde_json::Value, pointer: &str) -> Result<u64> {
    let value = stats.pointer(pointer).and_then(|value| value["value"].as_str()).unwrap_or("0");
    value.parse().with_context(|| format!("{pointer} is {value:?} in {stats}"))
}

pub fn statistics(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let read = || -> Result<(u64, u64)> {
        let stats = container.stats()?;
        Ok((counter(&stats, "/cpu/usageCoreNanoSeconds")?, counter(&stats, "/memory/workingSetBytes")?))
    };
    let (cpu, memory) = wait_for("first statistics", SOON, || {
        let (cpu, memory) = read()?;
        ensure!(cpu > 0 && memory > 0, "CPU {cpu} ns, memory {memory} bytes");
        Ok((cpu, memory))
    })?;
    // The pages of a file in /dev/shm count for whoever wrote them.
    container.shell(
        "dd if=/dev/zero of=/dev/shm/fill bs=1M count=20 2>/dev/null; i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done",
    )?;
    wait_for("statistics to rise", SOON, || {
        let (cpu_now, memory_now) = read()?;
        let (used, grown) = (Duration::from_nanos(cpu_now.saturating_sub(cpu)), memory_now.saturating_sub(memory));
        ensure!(used >= Duration::from_millis(20), "only {used:?} of CPU were counted");
        // The working set leaves out what the kernel could take back, which may be a little of what was there before.
        ensure!(grown >= 16 << 20, "memory grew by {grown} bytes for 20 MiB written");
        Ok(())
    })?;
    container.shell("rm /dev/shm/fill")?;
    container.remove_by_force()
}

pub fn pod_statistics(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    container.shell("dd if=/dev/zero of=/dev/shm/fill bs=1M count=20 2>/dev/null")?;
    wait_for("statistics of the pod", SOON, || {
        let said = pod.crictl(&["statsp", "-o", "json", "--id", &pod.id]).success()?.text();
        let all: serde_json::Value =
            serde_json::from_str(&said).with_context(|| format!("crictl statsp said {said}"))?;
        let stats = all["stats"].get(0).with_context(|| format!("no statistics in {all}"))?;
        let memory = counter(stats, "/linux/memory/workingSetBytes")?;
        ensure!(memory >= 16 << 20, "{memory} bytes of memory for 20 MiB written");
        let cpu = counter(stats, "/linux/cpu/usageCoreNanoSeconds")?;
        ensure!(cpu > 0, "no CPU time in {stats}");
        Ok(())
    })?;
    container.shell("rm /dev/shm/fill")?;
    container.remove_by_force()
}

pub fn oom(_: &Context, pod: &Pod) -> Result<()> {
    // `tail` keeps what it reads until a line ends, and /dev/zero has no line.
    let container = pod.run(ContainerSpec::new(&["tail", "/dev/zero"]).memory(24))?;
    container.wait_for_oom_kill(Duration::from_mins(1))?;
    container.remove()?;
    // The rest of the pod is none the worse.
    ensure!(outcome(pod, ContainerSpec::script("echo well"))? == "well");
    Ok(())
}

pub fn no_room(context: &Context) -> Result<()> {
    // A guest that has booted and its QEMU take twice as much.
    let (pod, output) = context.try_start(PodSpec::new().cgroup_memory(48 << 20))?;
    if let Some(pod) = pod {
        pod.remove_by_force()?;
        bail!("the pod was started");
    }
    let said = output.failure()?;
    let parts = ["the memory limit of 48 MiB of cgroup /", context.node.name.as_str(), "overhead.podFixed.memory"];
    ensure!(parts.iter().all(|part| said.contains(*part)), "crictl said {said:?}");
    Ok(())
}

pub fn outgrown(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    let position = pod.node.log_position();
    pod.limit_memory(4 << 20)?;
    // It ends with the guest, which has far more memory than that to give it.
    container.exec(&["tail", "/dev/zero"])?.failure()?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 137, "exit {exit:?}");
    wait_for("the log to name the limit", SOON, || {
        let log = pod.node.log_since(position, 1000);
        let is_told =
            |line: &str| line.contains("level=error") && line.contains("of cgroup /") && line.contains("was reached");
        ensure!(log.lines().any(is_told), "the log does not tell: {log}");
        Ok(())
    })?;
    pod.remove_by_force()
}
