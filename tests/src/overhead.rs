//! What a pod costs its host beyond what its containers use, and what the `RuntimeClass` says of it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::command::pause;
use crate::faults::{self, Part};
use crate::pod::Pod;
use crate::process::Process;

/// `overhead.podFixed` of a `RuntimeClass`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodFixed {
    /// Memory in KiB.
    pub memory_kib: u64,
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
}

impl PodFixed {
    /// Reads the manifest that this project installs.
    pub fn of_manifest() -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtimeclass/runtimeclass.yaml");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("read overhead.podFixed in {}", path.display()))
    }

    fn parse(manifest: &str) -> Result<Self> {
        let (_, fixed) = manifest.split_once("podFixed:").context("there is no podFixed")?;
        let value = |key: &str| {
            let line = fixed.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(':'));
            line.map(str::trim).with_context(|| format!("there is no {key}"))
        };
        let (memory, cpu) = (value("memory")?, value("cpu")?);
        let mib = memory.strip_suffix("Mi").and_then(|mib| mib.parse::<u64>().ok());
        let milli = cpu.strip_suffix('m').and_then(|milli| milli.parse().ok());
        Ok(Self {
            memory_kib: mib.with_context(|| format!("memory {memory:?} is not a number of Mi"))? << 10,
            cpu_milli: milli.with_context(|| format!("cpu {cpu:?} is not a number of m"))?,
        })
    }
}

/// The processes of a pod on the host: its shim first, then what that started.
pub fn processes(pod: &Pod) -> Result<Vec<Process>> {
    let mut found: Vec<Process> = Vec::new();
    for shim in faults::find_all(&pod.node, &pod.id, Part::Shim)? {
        let below = Process::descendants(shim.pid)?;
        found.push(shim);
        found.extend(below);
    }
    found.retain(|process| process.state != 'Z');
    ensure!(!found.is_empty(), "pod {} has no processes", pod.id);
    Ok(found)
}

/// Name and PSS in KiB of each of a pod's processes, without the guest's RAM, which several of them map.
pub fn host_memory(pod: &Pod) -> Result<Vec<(String, u64)>> {
    processes(pod)?.iter().map(|process| Ok((process.name.clone(), process.pss_beyond_memfds_kib()?))).collect()
}

/// What the guest does without before any workload, in KiB: the RAM it was given less what it says is available.
///
/// `meminfo` is the guest's /proc/meminfo.
pub fn guest_memory(pod: &Pod, meminfo: &str) -> Result<u64> {
    let qemu = faults::find(&pod.node, &pod.id, Part::Qemu)?;
    let words: Vec<&str> = qemu.command.split(' ').collect();
    let given = words.iter().position(|word| *word == "-m").and_then(|at| words.get(at + 1)?.strip_suffix('M'));
    let given: u64 = given.and_then(|mib| mib.parse().ok()).context("QEMU's command line does not say its memory")?;
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    let available: u64 = available.and_then(|kib| kib.parse().ok()).context("meminfo has no MemAvailable")?;
    (given << 10).checked_sub(available).context("the guest has more memory than it was given")
}

/// CPU that a pod's processes use over `period`, in thousandths of one.
pub fn cpu_milli(pod: &Pod, period: Duration) -> Result<u64> {
    let used = || -> Result<Duration> { processes(pod)?.iter().map(Process::cpu_time).sum() };
    let (before, started) = (used()?, Instant::now());
    pause(period);
    let share = used()?.saturating_sub(before).as_micros() * 1000 / started.elapsed().as_micros().max(1);
    Ok(u64::try_from(share)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_s_overhead_is_read() {
        let manifest = "overhead:\n  # memory: of what\n  podFixed:\n    memory: 160Mi\n    cpu: 250m\n";
        let read = PodFixed::parse(manifest).expect("reads");
        assert_eq!(read, PodFixed { memory_kib: 163_840, cpu_milli: 250 });
        assert!(PodFixed::parse("overhead: {}").is_err());
        assert!(PodFixed::parse("podFixed:\n  memory: 160\n  cpu: 250m").is_err());
        PodFixed::of_manifest().expect("this project's is readable");
    }
}
