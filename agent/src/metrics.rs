//! A container's statistics from the files of its cgroup. Parsing is pure; [`sample`] reads.
//!
//! Kernel: <https://docs.kernel.org/admin-guide/cgroup-v2.html>. Files of controllers that are missing count as empty.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use bulkhead_proto::agent::{CpuStats, IoStats, MemoryStats, Pressure, PressureLine, Stats};

/// Reads one sample.
pub fn sample(container_id: &str, cgroup: &Path) -> Stats {
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    let number = |file: &str| read(file).trim().parse::<u64>().ok();
    Stats {
        container_id: container_id.to_owned(),
        cpu: Some(cpu(&read("cpu.stat"))),
        memory: Some(MemoryStats {
            usage_bytes: number("memory.current").unwrap_or(0),
            usage_limit_bytes: number("memory.max").unwrap_or(u64::MAX),
            stat: keys(&read("memory.stat")),
            events: keys(&read("memory.events")),
            max_usage_bytes: number("memory.peak").unwrap_or(0),
            swap_usage_bytes: number("memory.swap.current").unwrap_or(0),
            swap_limit_bytes: number("memory.swap.max").unwrap_or(u64::MAX),
        }),
        pids_current: number("pids.current").unwrap_or(0),
        pids_limit: number("pids.max").unwrap_or(0),
        io: io(&read("io.stat")),
        cpu_pressure: pressure(&read("cpu.pressure")),
        memory_pressure: pressure(&read("memory.pressure")),
        io_pressure: pressure(&read("io.pressure")),
    }
}

/// Files of `key value` lines.
pub fn keys(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

fn cpu(text: &str) -> CpuStats {
    let keys = keys(text);
    let get = |key: &str| keys.get(key).copied().unwrap_or(0);
    CpuStats {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
    }
}

fn io(text: &str) -> Vec<IoStats> {
    let device = |line: &str| {
        let mut words = line.split(' ');
        let (major, minor) = words.next()?.split_once(':')?;
        let values: HashMap<_, _> = words.filter_map(|word| word.split_once('=')).collect();
        let get = |key| values.get(key).and_then(|value: &&str| value.parse().ok()).unwrap_or(0);
        Some(IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: get("rbytes"),
            wbytes: get("wbytes"),
            rios: get("rios"),
            wios: get("wios"),
        })
    };
    text.lines().filter_map(device).collect()
}

fn pressure(text: &str) -> Option<Pressure> {
    let line = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        let values: HashMap<_, _> = line.split(' ').filter_map(|word| word.split_once('=')).collect();
        let get = |key| values.get(key).and_then(|value: &&str| value.parse::<f64>().ok()).unwrap_or(0.0);
        let total = values.get("total").and_then(|value| value.parse().ok()).unwrap_or(0);
        Some(PressureLine { avg10: get("avg10"), avg60: get("avg60"), avg300: get("avg300"), total })
    };
    let pressure = Pressure { some: line("some"), full: line("full") };
    (pressure.some.is_some() || pressure.full.is_some()).then_some(pressure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_files_are_parsed_and_junk_is_skipped() {
        let cpu = cpu("usage_usec 12\nuser_usec 5\nsystem_usec 7\nnr_periods x\nodd\n");
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec, cpu.nr_periods), (12, 5, 7, 0));
    }

    #[test]
    fn io_lines_name_their_device() {
        let io = io("8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\nbad\n");
        assert_eq!(io.len(), 1);
        assert_eq!((io[0].major, io[0].minor, io[0].rbytes, io[0].wios), (8, 16, 1_459_200, 353));
    }

    #[test]
    fn pressure_has_some_and_full() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.10 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n";
        let pressure = pressure(text).expect("pressure");
        assert_eq!(pressure.some.map(|line| (line.avg10, line.total)), Some((1.5, 42)));
        assert_eq!(pressure.full.map(|line| line.total), Some(1));
        assert_eq!(super::pressure(""), None);
    }

    #[test]
    fn a_missing_cgroup_yields_an_empty_sample() {
        let stats = sample("c", Path::new("/nonexistent"));
        assert_eq!(stats.pids_current, 0);
        assert_eq!(stats.memory.map(|memory| memory.usage_limit_bytes), Some(u64::MAX));
    }
}
