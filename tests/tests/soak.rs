//! What is done over and over costs no more the last time than the first.
//!
//! By itself a run is short, enough for what leaks with every cycle. `make soak` has the counts that find what leaks now and
//! then: `BULKHEAD_SOAK_CYCLES` containers in one pod and `BULKHEAD_SOAK_PODS` pods.

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::{BULKHEAD, Context, Row};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use bulkhead_tests::trend::{Gauge, Trends};
use bulkhead_tests::usage;

const ROWS: &[Row] = &[
    Row::alone("containers one after the other in a pod leave it as it was", containers),
    Row::alone("pods one after the other leave the host as it was", pods),
];

/// Containers in one pod, and pods, unless the environment says otherwise: half a minute each under TCG.
const CYCLES: u32 = 20;
const PODS: u32 = 8;

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], BULKHEAD, ROWS)
}

/// A count from the environment.
fn count(variable: &str, default: u32) -> Result<u32> {
    let Ok(text) = std::env::var(variable) else { return Ok(default) };
    let count = text.parse().ok().filter(|count| *count >= default);
    count.with_context(|| format!("{variable} is {text:?}, accepted is a number from {default} on"))
}

/// Cycles until pools, caches and the allocators' stocks are filled.
fn warm_up(cycles: u32) -> u32 {
    (cycles / 10).max(cycles.min(15) / 3)
}

/// One container from its creation to its removal, with one exec, by which the guest is read.
fn cycle(pod: &Pod) -> Result<Vec<(Gauge, f64)>> {
    let container = pod.run(ContainerSpec::idle())?;
    let said = container.shell(usage::GUEST_SCRIPT)?;
    container.stop(10)?;
    container.remove()?;
    usage::in_guest(&said)
}

fn containers(context: &Context) -> Result<()> {
    let cycles = count("BULKHEAD_SOAK_CYCLES", CYCLES)?;
    let pod = context.start(PodSpec::new())?;
    let mut trends = Trends::default();
    for number in 0..cycles {
        let mut readings = cycle(&pod).with_context(|| format!("cycle {number} of {cycles}"))?;
        readings.extend(usage::on_host(&pod)?);
        trends.add(number, &readings);
    }
    pod.remove()?;
    let (table, level) = trends.judge(warm_up(cycles));
    println!("{cycles} containers in one pod:\n{table}");
    level
}

fn pods(context: &Context) -> Result<()> {
    let pods = count("BULKHEAD_SOAK_PODS", PODS)?;
    let before = Snapshot::take(&context.node)?;
    let mut trends = Trends::default();
    for number in 0..pods {
        let pod = context.start(PodSpec::new())?;
        let mut readings = cycle(&pod).with_context(|| format!("pod {number} of {pods}"))?;
        readings.extend(usage::on_host(&pod)?);
        pod.remove()?;
        let left = before.leaks(&context.node)?;
        ensure!(left.is_empty(), "pod {number} of {pods} left behind:\n  {}", left.join("\n  "));
        readings.push(usage::of_daemon(context.node.daemon_pid().context("containerd does not run")?)?);
        trends.add(number, &readings);
    }
    let (table, level) = trends.judge(warm_up(pods));
    println!("{pods} pods, one after the other:\n{table}");
    level
}
