//! Limits of a container as the files of its cgroup (v2) that set them. Pure.
//!
//! What runc makes of the same resources is the measure: zero and what is missing leave a limit as it is, -1 takes it away.
//! Kernel: <https://docs.kernel.org/admin-guide/cgroup-v2.html>; OCI runtime `config-linux.md#control-groups`.

use oci_spec::runtime::{LinuxCpu, LinuxResources};

/// One file of a cgroup and what goes into it.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// Name of the file.
    pub file: String,
    /// Its new content.
    pub value: String,
    /// Nothing is wrong when the kernel does not have the file.
    pub optional: bool,
}

/// The files that `resources` asks for, each once, in the order they must be written.
///
/// `cpu_max` is what `cpu.max` holds now; empty is as good as the kernel's default. The memory limit comes last: it is the
/// one that cannot be taken back, since the kernel kills to enforce it.
pub fn plan(resources: &LinuxResources, cpu_max: &str) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String| {
        settings.retain(|setting: &Setting| setting.file != file);
        settings.push(Setting { file: file.to_owned(), value, optional: file.contains("swap") });
    };
    let limit = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };

    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
            set("cpu.weight", weight(shares).to_string());
        }
        if let Some(value) = bandwidth(cpu, cpu_max) {
            set("cpu.max", value);
        }
        if let Some(idle) = cpu.idle() {
            set("cpu.idle", idle.to_string());
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                set(file, list.clone());
            }
        }
    }
    if let Some(pids) = resources.pids().as_ref().filter(|pids| pids.limit() != 0) {
        set("pids.max", limit(pids.limit()));
    }
    for page in resources.hugepage_limits().iter().flatten() {
        set(&format!("hugetlb.{}.max", page.page_size()), page.limit().to_string());
    }
    if let Some(memory) = resources.memory() {
        // OCI counts memory and swap together, the kernel's v2 files apart.
        if let Some(both) = memory.swap() {
            let swap = match memory.limit() {
                Some(limit) if both > 0 && limit > 0 => (both - limit).max(0),
                _ => both,
            };
            set("memory.swap.max", limit(swap));
        }
        if let Some(bytes) = memory.limit().filter(|&bytes| bytes != 0) {
            set("memory.max", limit(bytes));
        }
        if let Some(bytes) = memory.reservation().filter(|&bytes| bytes != 0) {
            set("memory.low", limit(bytes));
        }
    }
    if let Some(unified) = resources.unified() {
        let mut keys: Vec<_> = unified.iter().filter(|(key, _)| !key.contains('/')).collect();
        keys.sort();
        for (key, value) in keys {
            set(key, value.clone());
        }
    }
    settings.sort_by_key(|setting| setting.file == "memory.max");
    settings
}

/// The content of `cpu.max`; None if `cpu` does not mention it. The half that is not mentioned is that of `current`.
fn bandwidth(cpu: &LinuxCpu, current: &str) -> Option<String> {
    let quota = cpu.quota().filter(|&quota| quota != 0);
    let period = cpu.period().filter(|&period| period != 0);
    if quota.is_none() && period.is_none() {
        return None;
    }
    let (quota_now, period_now) = current.trim().split_once(' ').unwrap_or(("max", "100000"));
    let quota = match quota {
        None => quota_now.to_owned(),
        Some(quota) if quota < 0 => "max".to_owned(),
        Some(quota) => quota.to_string(),
    };
    let period = period.map_or_else(|| period_now.to_owned(), |period| period.to_string());
    Some(format!("{quota} {period}"))
}

/// cgroup v1's 2..=262144 shares as v2's 1..=10000 weight, so that 1024 becomes 100, the default of either.
///
/// runc's formula since 1.3.2, `ConvertCPUSharesToCgroupV2Value`:
/// <https://github.com/opencontainers/cgroups/blob/v0.0.8/utils.go>
fn weight(shares: u64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        shares => {
            let bits = (shares as f64).log2();
            let exponent = (bits * bits + 125.0 * bits) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(json: &str, cpu_max: &str) -> Vec<(String, String)> {
        let resources: LinuxResources = serde_json::from_str(json).expect("resources");
        plan(&resources, cpu_max).into_iter().map(|setting| (setting.file, setting.value)).collect()
    }

    fn files(json: &str) -> Vec<(String, String)> {
        changed(json, "")
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn limits_become_v2_files_and_that_of_memory_comes_last() {
        let json = r#"{"cpu":{"shares":1024,"quota":50000,"period":100000},
                       "memory":{"limit":67108864,"swap":67108864,"reservation":33554432},"pids":{"limit":100},
                       "unified":{"memory.high":"50000000"}}"#;
        assert_eq!(
            files(json),
            [
                pair("cpu.weight", "100"),
                pair("cpu.max", "50000 100000"),
                pair("pids.max", "100"),
                pair("memory.swap.max", "0"),
                pair("memory.low", "33554432"),
                pair("memory.high", "50000000"),
                pair("memory.max", "67108864"),
            ]
        );
    }

    #[test]
    fn no_limit_is_said_in_words() {
        let json = r#"{"cpu":{"quota":-1,"period":100000},"memory":{"limit":-1,"reservation":-1},"pids":{"limit":-1}}"#;
        assert_eq!(
            files(json),
            [
                pair("cpu.max", "max 100000"),
                pair("pids.max", "max"),
                pair("memory.low", "max"),
                pair("memory.max", "max")
            ]
        );
    }

    #[test]
    fn what_is_not_mentioned_or_zero_is_not_written() {
        assert_eq!(files("{}"), []);
        let zeros =
            r#"{"cpu":{"shares":0,"quota":0,"period":0},"memory":{"limit":0,"reservation":0},"pids":{"limit":0}}"#;
        assert_eq!(changed(zeros, "5000 10000"), []);
        assert_eq!(files(r#"{"cpu":{},"memory":{},"pids":{}}"#), []);
    }

    #[test]
    fn half_of_a_cpu_limit_keeps_the_other_half() {
        for (json, now, then) in [
            (r#"{"cpu":{"quota":20000}}"#, "5000 10000\n", "20000 10000"),
            (r#"{"cpu":{"quota":-1}}"#, "5000 10000\n", "max 10000"),
            (r#"{"cpu":{"period":50000}}"#, "5000 10000\n", "5000 50000"),
            (r#"{"cpu":{"quota":0,"period":50000}}"#, "max 100000\n", "max 50000"),
            (r#"{"cpu":{"quota":20000}}"#, "", "20000 100000"),
        ] {
            assert_eq!(changed(json, now), [pair("cpu.max", then)], "{json} after {now:?}");
        }
    }

    #[test]
    fn what_names_a_file_of_the_cgroup_goes_before_what_means_it() {
        let json = r#"{"memory":{"limit":100,"reservation":50},"unified":{"memory.max":"max","memory.low":"0"}}"#;
        assert_eq!(files(json), [pair("memory.low", "0"), pair("memory.max", "max")]);
    }

    #[test]
    fn shares_span_the_whole_range_of_weights() {
        for (shares, expected) in
            [(0, 1), (2, 1), (3, 2), (1024, 100), (262_143, 10_000), (262_144, 10_000), (262_145, 10_000)]
        {
            assert_eq!(weight(shares), expected, "{shares} shares");
        }
    }
}
