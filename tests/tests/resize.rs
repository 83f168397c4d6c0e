//! Limits of running pods and containers change as kubelet's in-place resize expects, and as with runc.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::container::{Container, ContainerSpec};
use bulkhead_tests::cri::{Resources, update_container_resources, update_pod_resources};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::{ALL, BULKHEAD, Context, Row, Runtime};
use bulkhead_tests::tools::Version;
use bulkhead_tests::{suite, task};
use serde_json::json;

const ROWS: &[Row] = &[
    Row::in_pod("limits are those asked for, and crictl update changes them", update),
    Row::in_pod("limits of CPU and memory go up and down, again and back", up_and_down),
    Row::in_pod("minus one takes a limit away, zero and half of one leave the rest", off_and_partial),
    Row::in_pod("the limit on processes changes", processes),
    // runc sets what comes before the refused value (1.1.5), and means not to.
    Row::in_pod("a refused value leaves all limits as they were", refused_value).only(BULKHEAD),
    Row::in_pod("memory.high and the way of OOM kills are kubelet's, what is the node's is not", unified)
        .only(BULKHEAD),
    Row::in_pod("a memory limit below what is in use does as with runc", below_usage),
    Row::alone("a pod and its containers are resized in kubelet's order, up and down", kubelet_order),
    Row::alone("limits above the machine are refused with its size and change nothing", above_the_machine)
        .only(BULKHEAD),
    Row::alone("limits of a running pod shrink and grow inside its machine, and no further", pod_limits)
        .releases(&[Version::V2_4])
        .only(&[Runtime::BulkheadSandbox]),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], ALL, ROWS)
}

/// Long enough for what takes a moment, also while other pods boot.
const SOON: Duration = Duration::from_secs(20);

const MIB: i64 = 1 << 20;

/// Files of a container's own cgroup, version 2 and version 1.
const MEMORY: (&str, &str) = ("memory.max", "memory/memory.limit_in_bytes");
const MEMORY_USED: (&str, &str) = ("memory.current", "memory/memory.usage_in_bytes");
const QUOTA: (&str, &str) = ("cpu.max", "cpu/cpu.cfs_quota_us");
const PERIOD: (&str, &str) = ("cpu.max", "cpu/cpu.cfs_period_us");
const SHARES: (&str, &str) = ("cpu.weight", "cpu/cpu.shares");
const PIDS: (&str, &str) = ("pids.max", "pids/pids.max");

fn read(container: &Container<'_>, (v2, v1): (&str, &str)) -> Result<String> {
    container.shell(&format!("cat /sys/fs/cgroup/{v2} 2>/dev/null || cat /sys/fs/cgroup/{v1}"))
}

/// A limit as a number; None for no limit, which version 1 tells as -1 or as nearly 2^63.
fn number(text: &str) -> Result<Option<i64>> {
    if text == "max" {
        return Ok(None);
    }
    let value: i64 = text.parse().with_context(|| format!("limit {text:?}"))?;
    Ok(Some(value).filter(|value| (0..i64::MAX / 2).contains(value)))
}

/// What a container is limited to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    /// Bytes.
    memory: Option<i64>,
    /// Microseconds.
    quota: Option<i64>,
    /// Microseconds.
    period: i64,
}

impl Limits {
    /// As the container's own cgroup tells.
    fn of(container: &Container<'_>) -> Result<Self> {
        let (quota, period) = (read(container, QUOTA)?, read(container, PERIOD)?);
        let period = period.split_whitespace().last().and_then(|period| period.parse().ok());
        Ok(Self {
            memory: number(&read(container, MEMORY)?)?,
            quota: number(quota.split_whitespace().next().unwrap_or_default())?,
            period: period.context("no CPU period")?,
        })
    }

    fn check(container: &Container<'_>, memory: Option<i64>, quota: Option<i64>, period: i64) -> Result<()> {
        let (found, expected) = (Self::of(container)?, Self { memory, quota, period });
        ensure!(found == expected, "the limits are {found:?}, expected {expected:?}");
        Ok(())
    }
}

/// A container of 64 MiB and half a CPU that waits to be stopped.
fn limited() -> ContainerSpec {
    ContainerSpec::idle()
        .memory(64)
        .set("/linux/resources/cpu_period", 100_000)
        .set("/linux/resources/cpu_quota", 50_000)
        .set("/linux/resources/cpu_shares", 512)
}

fn cri(memory_mib: i64, cpu_quota: i64) -> Resources {
    Resources { cpu_period: 100_000, cpu_quota, memory_limit_in_bytes: memory_mib * MIB, ..Resources::default() }
}

/// `UpdatePodSandboxResources` as kubelet takes it: a containerd that does not have it is none the worse.
fn resize_pod(pod: &Pod, resources: Resources) -> Result<()> {
    match update_pod_resources(pod, resources) {
        Err(error) if !error.to_string().contains("unknown method") => Err(error),
        _ => Ok(()),
    }
}

fn update(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(limited())?;
    Limits::check(&container, Some(64 * MIB), Some(50_000), 100_000)?;
    let memory = (96 * MIB).to_string();
    let args = ["update", "--memory", &memory, "--cpu-quota", "80000", "--cpu-period", "100000", &container.id];
    container.crictl(&args).success()?;
    Limits::check(&container, Some(96 * MIB), Some(80_000), 100_000)?;
    container.remove_by_force()
}

fn up_and_down(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(limited())?;
    let shares_before = read(&container, SHARES)?;
    for (memory_mib, quota) in [(64, 50_000), (96, 80_000), (96, 80_000), (48, 25_000), (64, 50_000), (64, 50_000)] {
        update_container_resources(&container, cri(memory_mib, quota))?;
        Limits::check(&container, Some(memory_mib * MIB), Some(quota), 100_000)?;
    }
    for (shares, v2) in [(1024, "100"), (2, "1"), (2, "1"), (1024, "100")] {
        update_container_resources(&container, Resources { cpu_shares: shares, ..Resources::default() })?;
        let found = read(&container, SHARES)?;
        ensure!(found == v2 || found == shares.to_string(), "{shares} shares are {found}");
        ensure!(found != shares_before, "the shares stay {found}");
    }
    // The CPU manager repeats what it has said, and everything else stays.
    for _ in 0..2 {
        update_container_resources(&container, Resources { cpuset_cpus: "0".into(), ..Resources::default() })?;
    }
    Limits::check(&container, Some(64 * MIB), Some(50_000), 100_000)?;
    container.remove_by_force()
}

fn off_and_partial(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(limited())?;
    for (resources, memory_mib, quota, period) in [
        (
            json!({"cpu": {"quota": 0, "period": 0, "shares": 0}, "memory": {"limit": 0}}),
            Some(64),
            Some(50_000),
            100_000,
        ),
        (json!({}), Some(64), Some(50_000), 100_000),
        (json!({"cpu": {"quota": 40_000}}), Some(64), Some(40_000), 100_000),
        (json!({"cpu": {"period": 50_000}}), Some(64), Some(40_000), 50_000),
        (json!({"cpu": {"quota": -1}}), Some(64), None, 50_000),
        (json!({"cpu": {"quota": 50_000, "period": 100_000}}), Some(64), Some(50_000), 100_000),
        (json!({"memory": {"limit": -1}}), None, Some(50_000), 100_000),
        (json!({"memory": {"limit": 96 * MIB}}), Some(96), Some(50_000), 100_000),
    ] {
        task::update(&container, &resources).with_context(|| format!("update by {resources}"))?;
        Limits::check(&container, memory_mib.map(|mib: i64| mib * MIB), quota, period)
            .with_context(|| format!("after {resources}"))?;
    }
    container.remove_by_force()
}

fn processes(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let found = number(&read(&container, PIDS)?)?;
    ensure!(found.is_none_or(|most| most > 100), "the limit at first is {found:?}");
    for (limit, expected) in [(50, Some(50)), (0, Some(50)), (20, Some(20)), (20, Some(20)), (-1, None)] {
        task::update(&container, &json!({"pids": {"limit": limit}})).with_context(|| format!("update to {limit}"))?;
        let found = number(&read(&container, PIDS)?)?;
        ensure!(found == expected, "after an update to {limit} the limit is {found:?}");
    }
    container.remove_by_force()
}

fn refused_value(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(limited())?;
    // A period must be a millisecond to a second.
    let resources =
        json!({"pids": {"limit": 50}, "memory": {"limit": 32 * MIB}, "cpu": {"quota": 20_000, "period": 9}});
    ensure!(task::update(&container, &resources).is_err(), "a period of 9 µs was taken");
    Limits::check(&container, Some(64 * MIB), Some(50_000), 100_000)?;
    container.remove_by_force()
}

fn unified(context: &Context, pod: &Pod) -> Result<()> {
    let spec = limited().set("/linux/resources/unified", json!({"memory.high": "60000000", "memory.oom.group": "1"}));
    let container = pod.run(spec)?;
    let found = || container.shell("cd /sys/fs/cgroup; cat memory.high memory.oom.group memory.max");
    // The kernel counts in pages.
    ensure!(found()? == "59998208\n1\n67108864", "at first it is {:?}", found()?);
    let log_position = context.node.log_position();
    let unified = [("memory.high", "40960000"), ("io.max", "8:0 rbps=1048576")];
    let unified = unified.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    update_container_resources(&container, Resources { cpuset_cpus: "0".into(), unified, ..Resources::default() })?;
    ensure!(found()? == "40960000\n1\n67108864", "after the update it is {:?}", found()?);
    wait_for("a line about what was dropped", SOON, || {
        let log = context.node.log_since(log_position, usize::MAX);
        let said = |line: &&str| line.contains("cpu.cpus") && line.contains("unified.io.max");
        ensure!(log.lines().filter(said).count() == 1, "the log is {log}");
        Ok(())
    })?;
    container.remove_by_force()
}

fn below_usage(context: &Context, pod: &Pod) -> Result<()> {
    // `dd` writes the whole of what it has read at once, and nobody takes it.
    let script = "mkfifo /run/held; sleep 1000000 < /run/held & exec dd if=/dev/zero of=/run/held bs=40M count=1";
    let container = pod.run(ContainerSpec::script(script).memory(128))?;
    wait_for("40 MiB in use", SOON, || {
        let used = number(&read(&container, MEMORY_USED)?)?;
        ensure!(used.is_some_and(|used| used > 40 * MIB), "{used:?} bytes are in use");
        Ok(())
    })?;
    // Version 1 refuses what it cannot have back; version 2 kills for it, which kubelet looks out for.
    let v2 = context.runtime.is_bulkhead() || Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let memory = Resources { memory_limit_in_bytes: 16 * MIB, ..Resources::default() };
    match update_container_resources(&container, memory) {
        Ok(()) if v2 => container.wait_for_oom_kill(SOON)?,
        Err(_) if !v2 => ensure!(number(&read(&container, MEMORY)?)? == Some(128 * MIB), "the limit has changed"),
        other => bail!("the update came to {other:?}"),
    }
    container.remove_by_force()
}

fn kubelet_order(context: &Context) -> Result<()> {
    let asked = json!({"cpu_period": 100_000, "cpu_quota": 100_000, "memory_limit_in_bytes": 160 * MIB});
    let pod = context.start(PodSpec::new().set("/linux/resources", asked))?;
    let (first, second) = (pod.run(limited())?, pod.run(limited())?);
    for _ in 0..2 {
        // Growing: the pod, then its containers.
        resize_pod(&pod, cri(176, 100_000))?;
        for (container, memory_mib) in [(&first, 80), (&second, 96)] {
            update_container_resources(container, cri(memory_mib, 60_000))?;
            Limits::check(container, Some(memory_mib * MIB), Some(60_000), 100_000)?;
        }
        // Shrinking: the containers, then the pod.
        for container in [&first, &second] {
            update_container_resources(container, cri(64, 30_000))?;
            Limits::check(container, Some(64 * MIB), Some(30_000), 100_000)?;
        }
        resize_pod(&pod, cri(128, 60_000))?;
    }
    let status = first.status()?;
    let told = &status["resources"]["linux"]["memoryLimitInBytes"];
    // containerd 1.6 does not tell.
    ensure!(told.is_null() || told == &json!((64 * MIB).to_string()), "CRI tells a limit of {told}");
    first.remove_by_force()?;
    second.remove_by_force()?;
    pod.remove()
}

fn above_the_machine(context: &Context) -> Result<()> {
    let asked = json!({"cpu_period": 100_000, "cpu_quota": 100_000, "memory_limit_in_bytes": 192 * MIB});
    let pod = context.start(PodSpec::new().set("/linux/resources", asked))?;
    let container = pod.run(limited())?;
    for (resources, sentence) in [
        (cri(1024, 60_000), "memory limit 1073741824 of container"),
        (cri(32, 150_000), "CPU limit 1500m of container"),
    ] {
        let said = update_container_resources(&container, resources).err().context("it was not refused")?.to_string();
        ensure!(said.contains(sentence) && said.contains("accepted is up to"), "containerd said {said:?}");
        Limits::check(&container, Some(64 * MIB), Some(50_000), 100_000)?;
    }
    update_container_resources(&container, cri(192, 100_000))?;
    Limits::check(&container, Some(192 * MIB), Some(100_000), 100_000)?;
    container.remove_by_force()?;
    pod.remove()
}

fn pod_limits(context: &Context) -> Result<()> {
    let asked = json!({"cpu_period": 100_000, "cpu_quota": 100_000, "memory_limit_in_bytes": 256 * MIB});
    let pod = context.start(PodSpec::new().set("/linux/resources", asked))?;
    // Without a limit of its own.
    let container = pod.run(ContainerSpec::idle())?;
    let kept =
        || container.shell("dd if=/dev/zero of=/dev/null bs=40M count=1 2>/dev/null && echo kept || echo killed");
    ensure!(kept()? == "kept", "a program cannot hold 40 MiB in a pod of 256 MiB");
    for _ in 0..2 {
        update_pod_resources(&pod, cri(32, 100_000))?;
    }
    ensure!(kept()? == "killed", "a program holds 40 MiB in a pod of 32 MiB");
    let refused = update_pod_resources(&pod, cri(1024, 100_000)).err();
    let said = refused.context("a pod of 256 MiB became one of 1 GiB")?.to_string();
    ensure!(said.contains("memory limit 1073741824") && said.contains("accepted is up to"), "containerd said {said:?}");
    update_pod_resources(&pod, cri(256, 100_000))?;
    ensure!(kept()? == "kept", "the limit stays after it was taken back");
    container.remove_by_force()?;
    pod.remove()
}
