//! What a virtual machine brings with it.

use std::fs;
use std::time::Instant;

use anyhow::{Result, ensure};
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::Context;
use serde_json::json;

use crate::{PATIENTLY, outcome, outcome_within};

pub fn own_kernel(_: &Context, pod: &Pod) -> Result<()> {
    let said = outcome(pod, ContainerSpec::script("uname -r; cat /proc/sys/kernel/random/boot_id"))?;
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(!said.contains(host.trim()), "the container runs on the host's kernel: {said}");
    Ok(())
}

pub fn warm_program(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    container.shell("true")?;
    let virtiofsd = faults::find(&context.node, &pod.id, Part::Virtiofsd)?;
    let before = virtiofsd.read_bytes()?;
    container.shell("for i in $(seq 20); do /bin/true; done")?;
    let read = virtiofsd.read_bytes()? - before;
    // One start alone takes more than a hundred kilobytes of its file.
    ensure!(read < 1 << 20, "virtiofsd read {read} bytes for twenty starts of a program");
    container.remove_by_force()
}

pub fn annotations(context: &Context) -> Result<()> {
    let spec = PodSpec::new()
        .set("/annotations/bulkhead.io~1vcpus", "2")
        .set("/annotations/bulkhead.io~1memory-mib", "384")
        .set("/annotations/bulkhead.io~1machine", "q35");
    let pod = context.start(spec)?;
    let said = outcome(
        &pod,
        ContainerSpec::script("nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; ls /sys/bus/pci/devices | wc -l"),
    )?;
    let numbers: Vec<u64> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let [cpus, memory_kib, pci_devices] = numbers[..] else { anyhow::bail!("the guest said {said:?}") };
    ensure!(cpus == 2, "{cpus} CPUs");
    ensure!((300 << 10..=384 << 10).contains(&memory_kib), "{memory_kib} KiB of memory");
    ensure!(pci_devices > 0, "a q35 without PCI devices");
    pod.remove()
}

pub fn pod_limits(context: &Context) -> Result<()> {
    let spec = PodSpec::new().set(
        "/linux/resources",
        json!({"cpu_period": 100_000, "cpu_quota": 200_000, "memory_limit_in_bytes": 512 << 20}),
    );
    let pod = context.start(spec)?;
    let said = outcome(&pod, ContainerSpec::script("nproc; awk '/MemTotal/ {print $2}' /proc/meminfo"))?;
    let numbers: Vec<u64> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let [cpus, memory_kib] = numbers[..] else { anyhow::bail!("the guest said {said:?}") };
    ensure!(cpus == 2, "{cpus} CPUs for a limit of two");
    ensure!(memory_kib >= 512 << 10, "{memory_kib} KiB of memory for a limit of 512 MiB");
    pod.remove()
}

pub fn root_filesystem(_: &Context, pod: &Pod) -> Result<()> {
    let started = Instant::now();
    let script = "set -e; cd /var; mkdir a; echo 1 > a/f; mv a b; ln -s b/f link; ln b/f hard; cat link hard; chmod 600 b/f; \
                  stat -c %a hard; rm /www/index.html; ls /www | wc -l; seq 1 300 | while read n; do echo $n > f$n; done; \
                  ls | wc -l; dd if=/dev/zero of=big bs=1M count=16 2>/dev/null; sync; stat -c %s big";
    let said = outcome_within(pod, ContainerSpec::script(script), PATIENTLY)?;
    ensure!(said == "1\n1\n600\n0\n303\n16777216", "the program found {said:?} after {:?}", started.elapsed());
    Ok(())
}
