//! A container's statistics as containerd reads them: the guest's cgroup v2 figures in the message of the host's version.
//!
//! CRI takes either message, but containerd's own metrics collector wants that of the host. The figures come from the guest
//! and are passed on as they are: they decide nothing on the host. They are bounded in number, since a reply of the task
//! service that is too large fails.
//!
//! <https://docs.kernel.org/admin-guide/cgroup-v2.html>, <https://docs.kernel.org/admin-guide/cgroup-v1/memory.html>

use bulkhead_proto::agent;
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::error::{Kind, Result, WithKind};

/// No limit, for every reader: CRI takes the difference of limit and usage, which a zero would turn negative.
const UNLIMITED: u64 = u64::MAX;

/// Block devices of one container that are told at most.
const MAX_DEVICES: usize = 64;

/// Which message statistics are told in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `io.containerd.cgroups.v1.Metrics`.
    V1,
    /// `io.containerd.cgroups.v2.Metrics`.
    V2,
}

impl Format {
    /// That of the host's cgroups: version 2 only where `/sys/fs/cgroup` itself is one.
    pub fn of_host() -> Self {
        match statfs("/sys/fs/cgroup") {
            Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC => Self::V2,
            _ => Self::V1,
        }
    }
}

/// Encodes a sample.
pub fn encode(stats: &agent::Stats, format: Format) -> Result<Any> {
    let (type_url, value) = match format {
        Format::V1 => ("io.containerd.cgroups.v1.Metrics", v1_metrics(stats).write_to_bytes()),
        Format::V2 => ("io.containerd.cgroups.v2.Metrics", v2_metrics(stats).write_to_bytes()),
    };
    let value = value.or_kind(Kind::Internal, "encode statistics")?;
    Ok(Any { type_url: type_url.into(), value, ..Any::default() })
}

fn v2_metrics(stats: &agent::Stats) -> v2::Metrics {
    let cpu = stats.cpu.unwrap_or_default();
    let memory = stats.memory.clone().unwrap_or_default();
    let stat = |name: &str| memory.stat.get(name).copied().unwrap_or_default();
    let event = |name: &str| memory.events.get(name).copied().unwrap_or_default();
    let entry = |io: &agent::IoStats| v2::IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    };
    v2::Metrics {
        pids: some(v2::PidsStat { current: stats.pids_current, limit: stats.pids_limit, ..Default::default() }),
        cpu: some(v2::CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            psi: pressure(stats.cpu_pressure.as_ref()),
            ..Default::default()
        }),
        memory: some(v2::MemoryStat {
            anon: stat("anon"),
            file: stat("file"),
            kernel_stack: stat("kernel_stack"),
            slab: stat("slab"),
            sock: stat("sock"),
            shmem: stat("shmem"),
            file_mapped: stat("file_mapped"),
            file_dirty: stat("file_dirty"),
            file_writeback: stat("file_writeback"),
            anon_thp: stat("anon_thp"),
            inactive_anon: stat("inactive_anon"),
            active_anon: stat("active_anon"),
            inactive_file: stat("inactive_file"),
            active_file: stat("active_file"),
            unevictable: stat("unevictable"),
            slab_reclaimable: stat("slab_reclaimable"),
            slab_unreclaimable: stat("slab_unreclaimable"),
            pgfault: stat("pgfault"),
            pgmajfault: stat("pgmajfault"),
            // Linux 5.9 split these two by anon and file.
            workingset_refault: stat("workingset_refault_anon").saturating_add(stat("workingset_refault_file")),
            workingset_activate: stat("workingset_activate_anon").saturating_add(stat("workingset_activate_file")),
            workingset_nodereclaim: stat("workingset_nodereclaim"),
            pgrefill: stat("pgrefill"),
            pgscan: stat("pgscan"),
            pgsteal: stat("pgsteal"),
            pgactivate: stat("pgactivate"),
            pgdeactivate: stat("pgdeactivate"),
            pglazyfree: stat("pglazyfree"),
            pglazyfreed: stat("pglazyfreed"),
            thp_fault_alloc: stat("thp_fault_alloc"),
            thp_collapse_alloc: stat("thp_collapse_alloc"),
            usage: memory.usage_bytes,
            usage_limit: limit(memory.usage_limit_bytes),
            max_usage: memory.max_usage_bytes,
            swap_usage: memory.swap_usage_bytes,
            swap_limit: memory.swap_limit_bytes,
            psi: pressure(stats.memory_pressure.as_ref()),
            ..Default::default()
        }),
        memory_events: some(v2::MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            oom_group_kill: event("oom_group_kill"),
            ..Default::default()
        }),
        io: some(v2::IOStat {
            usage: stats.io.iter().take(MAX_DEVICES).map(entry).collect(),
            psi: pressure(stats.io_pressure.as_ref()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn v1_metrics(stats: &agent::Stats) -> v1::Metrics {
    let cpu = stats.cpu.unwrap_or_default();
    let memory = stats.memory.clone().unwrap_or_default();
    let stat = |name: &str| memory.stat.get(name).copied().unwrap_or_default();
    let event = |name: &str| memory.events.get(name).copied().unwrap_or_default();
    let nanos = |usec: u64| usec.saturating_mul(1000);
    let usage_limit = limit(memory.usage_limit_bytes);
    v1::Metrics {
        pids: some(v1::PidsStat { current: stats.pids_current, limit: stats.pids_limit, ..Default::default() }),
        cpu: some(v1::CPUStat {
            usage: some(v1::CPUUsage {
                total: nanos(cpu.usage_usec),
                kernel: nanos(cpu.system_usec),
                user: nanos(cpu.user_usec),
                ..Default::default()
            }),
            throttling: some(v1::Throttle {
                periods: cpu.nr_periods,
                throttled_periods: cpu.nr_throttled,
                throttled_time: nanos(cpu.throttled_usec),
                ..Default::default()
            }),
            ..Default::default()
        }),
        // The fields of version 1 without "total" do not count children; a container's cgroup and its tree are one here.
        memory: some(v1::MemoryStat {
            cache: stat("file"),
            rss: stat("anon"),
            rss_huge: stat("anon_thp"),
            mapped_file: stat("file_mapped"),
            dirty: stat("file_dirty"),
            writeback: stat("file_writeback"),
            pg_fault: stat("pgfault"),
            pg_maj_fault: stat("pgmajfault"),
            inactive_anon: stat("inactive_anon"),
            active_anon: stat("active_anon"),
            inactive_file: stat("inactive_file"),
            active_file: stat("active_file"),
            unevictable: stat("unevictable"),
            hierarchical_memory_limit: usage_limit,
            hierarchical_swap_limit: usage_limit.saturating_add(memory.swap_limit_bytes),
            total_cache: stat("file"),
            total_rss: stat("anon"),
            total_rss_huge: stat("anon_thp"),
            total_mapped_file: stat("file_mapped"),
            total_dirty: stat("file_dirty"),
            total_writeback: stat("file_writeback"),
            total_pg_fault: stat("pgfault"),
            total_pg_maj_fault: stat("pgmajfault"),
            total_inactive_anon: stat("inactive_anon"),
            total_active_anon: stat("active_anon"),
            total_inactive_file: stat("inactive_file"),
            total_active_file: stat("active_file"),
            total_unevictable: stat("unevictable"),
            usage: some(v1::MemoryEntry {
                limit: usage_limit,
                usage: memory.usage_bytes,
                max: memory.max_usage_bytes,
                failcnt: event("max"),
                ..Default::default()
            }),
            // memory.memsw of version 1 counts memory and swap together.
            swap: some(v1::MemoryEntry {
                limit: usage_limit.saturating_add(memory.swap_limit_bytes),
                usage: memory.usage_bytes.saturating_add(memory.swap_usage_bytes),
                ..Default::default()
            }),
            kernel: some(v1::MemoryEntry { limit: UNLIMITED, usage: stat("kernel"), ..Default::default() }),
            kernel_tcp: some(v1::MemoryEntry { limit: UNLIMITED, usage: stat("sock"), ..Default::default() }),
            ..Default::default()
        }),
        memory_oom_control: some(v1::MemoryOomControl { oom_kill: event("oom_kill"), ..Default::default() }),
        blkio: some(v1::BlkIOStat {
            io_service_bytes_recursive: block_entries(&stats.io, |io| (io.rbytes, io.wbytes)),
            io_serviced_recursive: block_entries(&stats.io, |io| (io.rios, io.wios)),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn block_entries(devices: &[agent::IoStats], figures: fn(&agent::IoStats) -> (u64, u64)) -> Vec<v1::BlkIOEntry> {
    let entries =
        |io: &agent::IoStats| {
            let (read, write) = figures(io);
            let (major, minor) = (io.major, io.minor);
            [("Read", read), ("Write", write), ("Total", read.saturating_add(write))]
                .map(|(op, value)| v1::BlkIOEntry { op: op.into(), major, minor, value, ..Default::default() })
        };
    devices.iter().take(MAX_DEVICES).flat_map(entries).collect()
}

fn limit(limit: u64) -> u64 {
    if limit == 0 { UNLIMITED } else { limit }
}

/// Unset where the guest's kernel has no PSI.
fn pressure(pressure: Option<&agent::Pressure>) -> MessageField<v2::PSIStats> {
    let line = |line: Option<&agent::PressureLine>| {
        MessageField::from_option(line.map(|line| v2::PSIData {
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
            total: line.total,
            ..Default::default()
        }))
    };
    MessageField::from_option(pressure.map(|pressure| v2::PSIStats {
        some: line(pressure.some.as_ref()),
        full: line(pressure.full.as_ref()),
        ..Default::default()
    }))
}

fn some<T>(message: T) -> MessageField<T> {
    MessageField::some(message)
}

/// The figures of two containers as those of one; limits and pressure, which do not add up, are left as none.
pub fn sum(a: agent::Stats, b: &agent::Stats) -> agent::Stats {
    let cpu = |stats: &agent::Stats| stats.cpu.unwrap_or_default();
    let (a_cpu, b_cpu) = (cpu(&a), cpu(b));
    let mut memory = a.memory.unwrap_or_default();
    if let Some(more) = &b.memory {
        memory.usage_bytes = memory.usage_bytes.saturating_add(more.usage_bytes);
        for (key, value) in &more.stat {
            let sum = memory.stat.entry(key.clone()).or_default();
            *sum = sum.saturating_add(*value);
        }
    }
    memory.usage_limit_bytes = u64::MAX;
    agent::Stats {
        container_id: a.container_id,
        cpu: Some(agent::CpuStats {
            usage_usec: a_cpu.usage_usec.saturating_add(b_cpu.usage_usec),
            user_usec: a_cpu.user_usec.saturating_add(b_cpu.user_usec),
            system_usec: a_cpu.system_usec.saturating_add(b_cpu.system_usec),
            ..Default::default()
        }),
        memory: Some(memory),
        pids_current: a.pids_current.saturating_add(b.pids_current),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> agent::Stats {
        let numbers = |pairs: &[(&str, u64)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let line = |total| Some(agent::PressureLine { avg10: 1.5, avg60: 2.5, avg300: 3.5, total });
        agent::Stats {
            container_id: "web".into(),
            cpu: Some(agent::CpuStats {
                usage_usec: 30,
                user_usec: 20,
                system_usec: 10,
                nr_periods: 5,
                nr_throttled: 4,
                throttled_usec: 3,
            }),
            memory: Some(agent::MemoryStats {
                usage_bytes: 1000,
                usage_limit_bytes: 4096,
                stat: numbers(&[
                    ("anon", 600),
                    ("file", 300),
                    ("inactive_file", 200),
                    ("pgfault", 77),
                    ("workingset_refault_anon", 1),
                    ("workingset_refault_file", 2),
                    ("kernel", 55),
                ]),
                events: numbers(&[("max", 9), ("oom", 2), ("oom_kill", 1)]),
                max_usage_bytes: 2000,
                swap_usage_bytes: 10,
                swap_limit_bytes: 100,
            }),
            pids_current: 3,
            pids_limit: 50,
            io: vec![agent::IoStats { major: 8, minor: 1, rbytes: 11, wbytes: 22, rios: 1, wios: 2 }],
            cpu_pressure: Some(agent::Pressure { some: line(7), full: line(8) }),
            memory_pressure: Some(agent::Pressure { some: line(9), full: None }),
            io_pressure: None,
        }
    }

    fn v2_of(stats: &agent::Stats) -> v2::Metrics {
        let any = encode(stats, Format::V2).expect("encodes");
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        v2::Metrics::parse_from_bytes(&any.value).expect("decodes")
    }

    fn v1_of(stats: &agent::Stats) -> v1::Metrics {
        let any = encode(stats, Format::V1).expect("encodes");
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        v1::Metrics::parse_from_bytes(&any.value).expect("decodes")
    }

    #[test]
    fn version_2_has_what_cri_reads() {
        let metrics = v2_of(&sample());
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec, metrics.cpu.system_usec), (30, 20, 10));
        assert_eq!((metrics.cpu.nr_periods, metrics.cpu.nr_throttled, metrics.cpu.throttled_usec), (5, 4, 3));
        let memory = &metrics.memory;
        assert_eq!((memory.usage, memory.usage_limit, memory.max_usage), (1000, 4096, 2000));
        assert_eq!((memory.anon, memory.inactive_file, memory.pgfault), (600, 200, 77));
        assert_eq!((memory.workingset_refault, memory.swap_usage, memory.swap_limit), (3, 10, 100));
        assert_eq!((metrics.memory_events.oom_kill, metrics.memory_events.max), (1, 9));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 50));
        let io = &metrics.io.usage[0];
        assert_eq!((io.major, io.minor, io.rbytes, io.wbytes, io.rios, io.wios), (8, 1, 11, 22, 1, 2));
    }

    #[test]
    fn pressure_is_told_where_the_guest_has_it() {
        let metrics = v2_of(&sample());
        assert_eq!((metrics.cpu.psi.some.total, metrics.cpu.psi.full.total), (7, 8));
        assert!((metrics.cpu.psi.some.avg60 - 2.5).abs() < f64::EPSILON);
        assert_eq!(metrics.memory.psi.some.total, 9);
        assert!(metrics.memory.psi.full.is_none());
        assert!(metrics.io.psi.is_none());
    }

    #[test]
    fn version_1_has_the_same_in_its_own_units() {
        let metrics = v1_of(&sample());
        let usage = &metrics.cpu.usage;
        assert_eq!((usage.total, usage.user, usage.kernel), (30_000, 20_000, 10_000));
        let throttling = &metrics.cpu.throttling;
        assert_eq!((throttling.periods, throttling.throttled_periods, throttling.throttled_time), (5, 4, 3000));
        let memory = &metrics.memory;
        assert_eq!(
            (memory.usage.usage, memory.usage.limit, memory.usage.max, memory.usage.failcnt),
            (1000, 4096, 2000, 9)
        );
        assert_eq!((memory.swap.usage, memory.swap.limit), (1010, 4196));
        assert_eq!(
            (memory.rss, memory.total_rss, memory.total_cache, memory.total_inactive_file),
            (600, 600, 300, 200)
        );
        assert_eq!((memory.total_pg_fault, memory.kernel.usage), (77, 55));
        assert_eq!(metrics.memory_oom_control.oom_kill, 1);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 50));
        let block: Vec<_> =
            metrics.blkio.io_service_bytes_recursive.iter().map(|entry| (&*entry.op, entry.value)).collect();
        assert_eq!(block, [("Read", 11), ("Write", 22), ("Total", 33)]);
    }

    #[test]
    fn no_limit_is_told_as_the_largest_number() {
        for unlimited in [0, u64::MAX] {
            let mut stats = sample();
            stats.memory.as_mut().expect("is set").usage_limit_bytes = unlimited;
            assert_eq!(v2_of(&stats).memory.usage_limit, u64::MAX);
            assert_eq!(v1_of(&stats).memory.usage.limit, u64::MAX);
            assert_eq!(v1_of(&stats).memory.swap.limit, u64::MAX);
        }
        assert_eq!(v2_of(&agent::Stats::default()).memory.usage_limit, u64::MAX, "before the first sample as well");
    }

    #[test]
    fn a_guest_cannot_make_the_reply_large_or_overflow_it() {
        let mut stats = sample();
        stats.io = vec![agent::IoStats { rbytes: u64::MAX, wbytes: 1, ..agent::IoStats::default() }; 100_000];
        stats.cpu.as_mut().expect("is set").usage_usec = u64::MAX;
        assert!(encode(&stats, Format::V1).expect("encodes").value.len() < 16 << 10);
        assert!(encode(&stats, Format::V2).expect("encodes").value.len() < 16 << 10);
        assert_eq!(v1_of(&stats).cpu.usage.total, u64::MAX);
    }
}
