//! What a pod holds at one moment: its processes on the host, and its guest as a whole.
//!
//! No container sees the guest's PID 1, not even one with `hostPID`, and none shall: so the agent is read by what it cannot
//! hide from the guest's kernel, which counts open files, threads and mounts of all processes and containers together. What
//! the agent leaks shows there, and so does what it makes the kernel leak.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::faults::Part;
use crate::overhead;
use crate::pod::Pod;
use crate::process::{Process, namespace_of};
use crate::trend::Gauge;

/// Entries of /proc/PID/fd of the shim. A file that leaks is one in each cycle, or at least in each that loses some race;
/// what is off by a few is a stream that is just being closed.
const SHIM_FILES: Gauge = Gauge { name: "the shim's open files", unit: "files", per_cycle: 0.01, jitter: 4.0 };
/// Threads of the shim. Its pool for blocking calls ends threads only after ten idle seconds.
const SHIM_THREADS: Gauge = Gauge { name: "the shim's threads", unit: "threads", per_cycle: 0.01, jitter: 4.0 };
/// `VmRSS` of the shim. A container's entry in any of its tables takes a few KiB with its spec; the allocator keeps what was
/// freed, in pieces, and takes more from the system in steps of some hundred KiB.
const SHIM_MEMORY: Gauge = Gauge { name: "the shim's resident memory", unit: "KiB", per_cycle: 1.0, jitter: 768.0 };
/// Open files of QEMU, virtiofsd and the vsock helper. virtiofsd has a file for each inode that the guest remembers.
const HELPER_FILES: Gauge = Gauge { name: "its helpers' open files", unit: "files", per_cycle: 0.01, jitter: 8.0 };
/// Threads of the same. QEMU's pool for disk requests ends threads after ten idle seconds.
const HELPER_THREADS: Gauge = Gauge { name: "its helpers' threads", unit: "threads", per_cycle: 0.01, jitter: 4.0 };
/// `RssAnon` of virtiofsd and the vsock helper, so without the guest's RAM; a leaked inode or connection takes some hundred
/// bytes. QEMU's is left out: where it emulates, it keeps code that it has translated, as it likes.
const HELPER_MEMORY: Gauge =
    Gauge { name: "virtiofsd's and vsock helper's memory", unit: "KiB", per_cycle: 0.25, jitter: 512.0 };
/// Mounts of the pod's own, in whichever of its namespaces.
const MOUNTS: Gauge = Gauge { name: "mounts of the pod on the host", unit: "mounts", per_cycle: 0.01, jitter: 1.0 };
/// Ended processes that nobody has waited for, of those below the shim.
const ZOMBIES: Gauge = Gauge { name: "zombies below the shim", unit: "processes", per_cycle: 0.01, jitter: 1.0 };

/// Everything about `pod` that can be read on the host.
pub fn on_host(pod: &Pod) -> Result<Vec<(Gauge, f64)>> {
    let all = overhead::processes(pod)?;
    let (shim, helpers) = all.split_first().context("a pod without processes")?;
    let small: Vec<_> = helpers.iter().filter(|process| process.name != Part::Qemu.program()).collect();
    let sum = |numbers: Vec<Result<u32>>| -> Result<f64> { numbers.into_iter().sum::<Result<u32>>().map(f64::from) };
    let zombies = Process::descendants(shim.pid)?.iter().filter(|process| process.state == 'Z').count();
    Ok(vec![
        (SHIM_FILES, entries(shim, "fd")?.into()),
        (SHIM_THREADS, entries(shim, "task")?.into()),
        (SHIM_MEMORY, kib(shim, "VmRSS")?.into()),
        (HELPER_FILES, sum(helpers.iter().map(|helper| entries(helper, "fd")).collect())?),
        (HELPER_THREADS, sum(helpers.iter().map(|helper| entries(helper, "task")).collect())?),
        (HELPER_MEMORY, sum(small.iter().map(|helper| kib(helper, "RssAnon")).collect())?),
        (MOUNTS, private_mounts(&all)?.into()),
        (ZOMBIES, u32::try_from(zombies)?.into()),
    ])
}

/// containerd's open files: it holds a few for each shim and each stream that it believes to be alive.
const DAEMON_FILES: Gauge = Gauge { name: "containerd's open files", unit: "files", per_cycle: 0.1, jitter: 6.0 };

/// What containerd itself keeps for us.
pub fn of_daemon(pid: i32) -> Result<(Gauge, f64)> {
    let daemon = Process::read(pid).context("containerd does not run")?;
    Ok((DAEMON_FILES, entries(&daemon, "fd")?.into()))
}

/// Entries of a directory of /proc/PID.
fn entries(process: &Process, directory: &str) -> Result<u32> {
    let path = format!("/proc/{}/{directory}", process.pid);
    let entries = fs::read_dir(&path).with_context(|| format!("list {path} of {}", process.name))?;
    Ok(u32::try_from(entries.count())?)
}

fn kib(process: &Process, field: &str) -> Result<u32> {
    let value = process.status_field(field)?;
    value.trim_end_matches(" kB").parse().with_context(|| format!("{field} of {} is {value:?}", process.name))
}

/// Number of mounts in the mount namespaces of all threads of `processes`, each namespace once, that ours has not as well:
/// a pod's namespaces begin with copies of all that the host had mounted by then, for whomever.
fn private_mounts(processes: &[Process]) -> Result<u32> {
    fn points(table: &str) -> impl Iterator<Item = &str> {
        table.lines().filter_map(|line| line.split(' ').nth(4))
    }
    let ours = fs::read_to_string("/proc/self/mountinfo").context("read our mounts")?;
    let ours: BTreeSet<_> = points(&ours).collect();
    let mut seen = BTreeSet::from([PathBuf::from(namespace_of("self", "mnt")?)]);
    let mut count = 0;
    for process in processes {
        let tasks = format!("/proc/{}/task", process.pid);
        for task in fs::read_dir(&tasks).with_context(|| format!("list {tasks}"))?.flatten() {
            // A thread of a pool may have ended meanwhile; one that owns a namespace lives as long as the pod.
            let Ok(namespace) = fs::read_link(task.path().join("ns/mnt")) else { continue };
            let Ok(table) = fs::read_to_string(task.path().join("mountinfo")) else { continue };
            if seen.insert(namespace) {
                count += points(&table).filter(|point| !ours.contains(point)).count();
            }
        }
    }
    Ok(u32::try_from(count)?)
}

/// What a container runs for [`in_guest`]. The kernel counts all of the guest in the first three files.
pub const GUEST_SCRIPT: &str =
    "cat /proc/sys/fs/file-nr /proc/loadavg; cat /proc/meminfo; echo mounts; cut -d' ' -f1 /proc/self/mountinfo";

/// Open files of the whole guest (`file-nr`).
const GUEST_FILES: Gauge = Gauge { name: "open files in the guest", unit: "files", per_cycle: 0.01, jitter: 8.0 };
/// Threads and zombies of the whole guest (`loadavg`). The kernel's workers come and go.
const GUEST_THREADS: Gauge = Gauge { name: "threads in the guest", unit: "threads", per_cycle: 0.01, jitter: 6.0 };
/// `AnonPages`: the agent's heap, and what the script's processes have, which are always the same.
const GUEST_ANON: Gauge = Gauge { name: "processes' memory in the guest", unit: "KiB", per_cycle: 0.5, jitter: 512.0 };
/// `Shmem`: files on tmpfs and on the initramfs, such as one that the agent forgets to remove.
const GUEST_SHMEM: Gauge = Gauge { name: "tmpfs files in the guest", unit: "KiB", per_cycle: 0.5, jitter: 64.0 };
/// `SUnreclaim` and `Percpu`: the kernel's objects that no cache gives back, such as those of cgroups, which it frees late.
const GUEST_KERNEL: Gauge = Gauge { name: "kernel's memory in the guest", unit: "KiB", per_cycle: 1.0, jitter: 1024.0 };
/// The highest id of a mount in a container's namespace. A new mount has the lowest id that is free, so this is the number
/// of mounts in the guest, or a few more.
const GUEST_MOUNTS: Gauge = Gauge { name: "mounts in the guest", unit: "mounts", per_cycle: 0.01, jitter: 4.0 };

/// Everything about the guest, as [`GUEST_SCRIPT`] said it in a new container.
pub fn in_guest(said: &str) -> Result<Vec<(Gauge, f64)>> {
    let (kernel, mounts) = said.split_once("mounts\n").context("the script did not come to the mounts")?;
    let mut lines = kernel.lines();
    let number = |word: Option<&str>, what: &str| -> Result<u32> {
        word.and_then(|word| word.parse().ok()).with_context(|| format!("no {what} in {said:?}"))
    };
    let files = number(lines.next().and_then(|line| line.split_whitespace().next()), "file-nr")?;
    // `0.00 0.01 0.05 running/all last-pid`
    let threads = lines.next().and_then(|line| line.split_whitespace().nth(3)?.split_once('/'));
    let threads = number(threads.map(|(_, all)| all), "loadavg")?;
    let memory = |key: &str| {
        let line = kernel.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        number(line.and_then(|line| line.trim().strip_suffix(" kB")), key)
    };
    let ids = mounts.lines().map(|id| number(Some(id), "mount id")).collect::<Result<Vec<_>>>()?;
    Ok(vec![
        (GUEST_FILES, files.into()),
        (GUEST_THREADS, threads.into()),
        (GUEST_ANON, memory("AnonPages")?.into()),
        (GUEST_SHMEM, memory("Shmem")?.into()),
        (GUEST_KERNEL, (memory("SUnreclaim")? + memory("Percpu")?).into()),
        (GUEST_MOUNTS, ids.into_iter().max().context("no mounts")?.into()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_read_by_what_its_kernel_counts() {
        let said = "160\t0\t9223372036854775807\n0.00 0.01 0.05 2/57 31\nMemTotal: 200000 kB\nAnonPages:    3000 kB\n\
                    Shmem:  40 kB\nSUnreclaim:   9000 kB\nPercpu:  500 kB\nmounts\n41\n38\n";
        let values: Vec<_> = in_guest(said).expect("reads").into_iter().map(|(_, value)| value).collect();
        assert_eq!(values, [160.0, 57.0, 3000.0, 40.0, 9500.0, 41.0]);
        let broken = said.replace("2/57", "idle");
        assert!(in_guest(&broken).expect_err("no threads").to_string().contains("loadavg"));
    }
}
