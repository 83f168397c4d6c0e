//! What a pod costs beyond its containers stays within what the `RuntimeClass` says.
//!
//! Kubernetes adds `overhead.podFixed` to the requests and limits of each pod; were it too small, pods would be placed on
//! nodes that cannot hold them, and killed for memory that is not theirs.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::command::pause;
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::overhead::{self, PodFixed};
use bulkhead_tests::pod::PodSpec;
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;

const ROWS: &[Row] = &[
    Row::alone("an idle pod of one container costs no more than the RuntimeClass says", one_container),
    Row::alone("an idle pod of five containers costs no more than the RuntimeClass says", five_containers),
];

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], &[Runtime::Bulkhead], ROWS)
}

fn one_container(context: &Context) -> Result<()> {
    idle_pod(context, 1)
}

fn five_containers(context: &Context) -> Result<()> {
    idle_pod(context, 5)
}

fn idle_pod(context: &Context, containers: usize) -> Result<()> {
    let fixed = PodFixed::of_manifest()?;
    let pod = context.start(PodSpec::new())?;
    let containers = (0..containers).map(|_| pod.run(ContainerSpec::idle())).collect::<Result<Vec<_>>>()?;
    // What was needed only to start is given back a moment later.
    pause(Duration::from_secs(5));
    let cpu_milli = overhead::cpu_milli(&pod, Duration::from_secs(5))?;
    let host = overhead::host_memory(&pod)?;
    let guest_kib = overhead::guest_memory(&pod, &containers[0].shell("cat /proc/meminfo")?)?;
    let total_kib = guest_kib + host.iter().map(|(_, kib)| kib).sum::<u64>();
    let mut found = format!("guest's kernel and agent {guest_kib} KiB");
    for (name, kib) in &host {
        // Writing to a String cannot fail.
        let _ = write!(found, ", {name} {kib} KiB");
    }
    println!("{} containers: {total_kib} KiB ({found}), {cpu_milli}m CPU", containers.len());
    ensure!(total_kib <= fixed.memory_kib, "{total_kib} KiB, podFixed is {} KiB: {found}", fixed.memory_kib);
    ensure!(cpu_milli <= fixed.cpu_milli, "{cpu_milli}m CPU, podFixed is {}m", fixed.cpu_milli);
    pod.remove_by_force()
}
