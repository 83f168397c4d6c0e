//! The machine's processes, as /proc tells them.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process. It may end at any time after it was read.
#[derive(Debug, Clone)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Process id of the parent.
    pub parent: i32,
    /// Name of the program, at most 15 bytes (`comm`).
    pub name: String,
    /// State letter of /proc/PID/stat.
    pub state: char,
    /// The command line, words joined by blanks; empty for a zombie.
    pub command: String,
    /// Every cgroup path it is in.
    pub cgroups: Vec<String>,
}

impl Process {
    /// Reads one process; `None` when it is gone.
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in brackets and may itself hold brackets and blanks.
        let (name, rest) = (stat.find('(')?, stat.rfind(')')?);
        let mut fields = stat.get(rest + 1..)?.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command: Vec<_> = command.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        Some(Self {
            pid,
            parent,
            name: stat.get(name + 1..rest)?.to_owned(),
            state,
            command: command.join(" ").trim().to_owned(),
            cgroups: cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(str::to_owned).collect(),
        })
    }

    /// Every process of the machine.
    pub fn all() -> Result<Vec<Self>> {
        let entries = fs::read_dir("/proc").context("read /proc")?;
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Ok(pids.filter_map(Self::read).collect())
    }

    /// Children of `ancestor`, their children, and so on; nearest first.
    pub fn descendants(ancestor: i32) -> Result<Vec<Self>> {
        let all = Self::all()?;
        let mut found: Vec<Self> = Vec::new();
        let mut generation = vec![ancestor];
        while !generation.is_empty() {
            let next: Vec<_> = all.iter().filter(|process| generation.contains(&process.parent)).cloned().collect();
            generation = next.iter().map(|process| process.pid).collect();
            found.extend(next);
        }
        Ok(found)
    }

    /// Whether a process with this id exists and is not a zombie.
    pub fn lives(pid: i32) -> bool {
        Self::read(pid).is_some_and(|process| process.state != 'Z')
    }

    /// One line of /proc/PID/status, without its name: `status_field("CapEff")`.
    pub fn status_field(&self, field: &str) -> Result<String> {
        let path = format!("/proc/{}/status", self.pid);
        let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("{path} has no line {field}"))?.trim().to_owned())
    }

    /// Identity of one of its namespaces, for instance `mnt:[4026531841]`.
    pub fn namespace(&self, kind: &str) -> Result<String> {
        namespace_of(&self.pid.to_string(), kind)
    }

    /// Proportional share of memory in KiB, but for what lies in memfds: a virtual machine's RAM.
    pub fn pss_beyond_memfds_kib(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps", self.pid);
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let (mut counts, mut sum) = (true, 0);
        for line in text.lines() {
            let first = line.split_whitespace().next().unwrap_or_default();
            if first.contains('-') {
                counts = !line.contains(" /memfd:");
            } else if counts && first == "Pss:" {
                let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
                sum += kib.with_context(|| format!("{path}: {line}"))?;
            }
        }
        Ok(sum)
    }

    /// CPU time used so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid);
        let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        // utime and stime are fields 14 and 15 of proc(5), counted from 1; the name may hold blanks.
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2));
        let ticks = fields.into_iter().flatten().map(|field| field.parse::<u64>().ok()).sum::<Option<u64>>();
        let rate = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("the clock has no rate")?;
        Ok(Duration::from_millis(ticks.with_context(|| format!("{path}: {stat}"))? * 1000 / u64::try_from(rate)?))
    }

    /// Bytes that it has read so far by system calls: `rchar` of proc_pid_io(5).
    pub fn read_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/io", self.pid);
        let text = fs::read_to_string(&path).with_context(|| format!("read {path} of {}", self.name))?;
        let bytes = text.lines().find_map(|line| line.strip_prefix("rchar: "));
        bytes.with_context(|| format!("{path} has no rchar"))?.parse().with_context(|| format!("parse {path}"))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid), signal).with_context(|| format!("send {signal} to {} ({})", self.pid, self.name))
    }
}

/// Identity of a namespace of process `pid`, which may be `self`.
pub fn namespace_of(pid: &str, kind: &str) -> Result<String> {
    let path = format!("/proc/{pid}/ns/{kind}");
    Ok(fs::read_link(&path).with_context(|| format!("read {path}"))?.to_string_lossy().into_owned())
}
