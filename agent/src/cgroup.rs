//! One container's cgroup (v2): made before its init, removed after its last process.
//!
//! [`plan`] turns OCI resources into file contents and is pure. The layout is `/sys/fs/cgroup/bulkhead/<container id>`.
//! Kernel: <https://docs.kernel.org/admin-guide/cgroup-v2.html>; OCI runtime `config-linux.md#control-groups`.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;

use crate::error::{During, Error, Result};
use crate::{filter, sys};

/// Where cgroup v2 is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// Parent of the containers' cgroups, as their path in the hierarchy.
pub const PARENT: &str = "/bulkhead";

/// How long a cgroup may take to lose its killed processes.
const EMPTIED: Duration = Duration::from_secs(10);

/// Mounted cgroup v2 gives all its controllers to the containers' parent.
pub fn delegate() -> Result<()> {
    let root = Path::new(MOUNT);
    let parent = root.join(&PARENT[1..]);
    let available = fs::read_to_string(root.join("cgroup.controllers")).during(|| "read cgroup.controllers")?;
    fs::create_dir_all(&parent).during(|| "create the containers' cgroup")?;
    for directory in [root, &parent] {
        for controller in available.split_whitespace() {
            // One at a time: a controller that refuses (cpuset without CPUs, say) must not take the others with it.
            if let Err(error) = fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}")) {
                tracing::warn!(controller, %error, "cgroup controller is not available");
            }
        }
    }
    Ok(())
}

/// A container's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of `container_id`, which must be fit for a file name.
    pub fn create(container_id: &str) -> Result<Self> {
        let directory = Path::new(MOUNT).join(&PARENT[1..]).join(container_id);
        match fs::create_dir(&directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::internal(format!("create cgroup {}: {error}", directory.display()))),
        }
        Ok(Self { directory })
    }

    /// The one above those of all containers.
    pub fn of_all() -> Self {
        Self { directory: Path::new(MOUNT).join(&PARENT[1..]) }
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Sets limits; what `resources` does not mention stays.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        for setting in plan(resources) {
            let path = self.directory.join(&setting.file);
            if let Err(error) = fs::write(&path, &setting.value) {
                if setting.optional && error.kind() == io::ErrorKind::NotFound {
                    continue;
                }
                return Err(Error::invalid(format!("set {} to {:?}: {error}", setting.file, setting.value)));
            }
        }
        Ok(())
    }

    /// Enforces the device rules of `resources`.
    pub fn filter_devices(&self, resources: &LinuxResources) -> Result<()> {
        let rules = resources.devices().as_deref().unwrap_or_default();
        let directory = fs::File::open(&self.directory).during(|| "open the container's cgroup")?;
        sys::attach_device_filter(directory.as_fd(), &filter::compile(rules)).during(|| "attach the device filter")
    }

    /// Stops or continues every process; returns when the kernel has done so.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        fs::write(self.directory.join("cgroup.freeze"), value).during(|| "write cgroup.freeze")?;
        self.wait_for("frozen", value)
    }

    /// Kills every process with SIGKILL, frozen ones too.
    pub fn kill(&self) -> Result<()> {
        fs::write(self.directory.join("cgroup.kill"), "1").during(|| "write cgroup.kill")
    }

    /// Process ids in it and below it.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        collect(&self.directory, &mut found).during(|| "list the container's processes")?;
        Ok(found)
    }

    /// Kills what is left and removes the cgroup with those that the container made below. Blocks until it is empty.
    pub fn remove(&self) -> Result<()> {
        if !self.directory.exists() {
            return Ok(());
        }
        self.kill()?;
        self.wait_for("populated", "0")?;
        remove_tree(&self.directory).during(|| "remove the container's cgroup")
    }

    /// Waits until `key` of cgroup.events has `value`; the kernel signals each change of the file.
    fn wait_for(&self, key: &str, value: &str) -> Result<()> {
        let path = self.directory.join("cgroup.events");
        let file = fs::File::open(&path).during(|| "open cgroup.events")?;
        let deadline = Instant::now() + EMPTIED;
        loop {
            let events = read_at_start(&file).during(|| "read cgroup.events")?;
            if events.lines().any(|line| line.split_once(' ') == Some((key, value))) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::deadline(format!(
                    "the container's cgroup did not report {key} {value} within {} s",
                    EMPTIED.as_secs()
                )));
            }
            let timeout =
                rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut poll = [rustix::event::PollFd::new(&file, rustix::event::PollFlags::PRI)];
            match rustix::event::poll(&mut poll, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::internal(format!("wait for cgroup.events: {error}"))),
            }
        }
    }
}

/// The whole content of a file of the kernel's, which must be read anew from its start.
pub fn read_at_start(file: impl AsFd) -> io::Result<String> {
    let mut buffer = vec![0; 4096];
    let mut length = 0;
    loop {
        let count = rustix::io::pread(&file, &mut buffer[length..], length as u64)?;
        length += count;
        if count == 0 {
            break;
        }
        if length == buffer.len() {
            buffer.resize(length * 2, 0);
        }
    }
    buffer.truncate(length);
    String::from_utf8(buffer).map_err(io::Error::other)
}

fn collect(directory: &Path, found: &mut Vec<i32>) -> io::Result<()> {
    match fs::read_to_string(directory.join("cgroup.procs")) {
        Ok(pids) => found.extend(pids.lines().filter_map(|pid| pid.parse::<i32>().ok()).filter(|&pid| pid > 0)),
        // A threaded cgroup below: its threads are listed where its domain is.
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
        Err(error) => return Err(error),
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), found)?;
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// One file of a cgroup and what goes into it.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// Name of the file.
    pub file: String,
    /// Its new content.
    pub value: String,
    /// Nothing is wrong when the kernel does not have the file.
    optional: bool,
}

/// The files that `resources` asks for, in the order they must be written.
pub fn plan(resources: &LinuxResources) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String| {
        settings.push(Setting { file: file.to_owned(), value, optional: file.contains("swap") });
    };
    let limit = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };

    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
            set("cpu.weight", weight(shares).to_string());
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = cpu.quota().filter(|&quota| quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
            set("cpu.max", format!("{quota} {}", cpu.period().filter(|&period| period != 0).unwrap_or(100_000)));
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
    if let Some(pids) = resources.pids() {
        let most = pids.limit();
        set("pids.max", if most > 0 { most.to_string() } else { "max".to_owned() });
    }
    for page in resources.hugepage_limits().iter().flatten() {
        set(&format!("hugetlb.{}.max", page.page_size()), page.limit().to_string());
    }
    if let Some(unified) = resources.unified() {
        let mut keys: Vec<_> = unified.iter().filter(|(key, _)| !key.contains('/')).collect();
        keys.sort();
        for (key, value) in keys {
            set(key, value.clone());
        }
    }
    settings
}

/// cgroup v1's 2..=262144 shares as v2's 1..=10000 weight; runc's formula.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(json: &str) -> Vec<(String, String)> {
        let resources: LinuxResources = serde_json::from_str(json).expect("resources");
        plan(&resources).into_iter().map(|setting| (setting.file, setting.value)).collect()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn limits_become_v2_files() {
        let json = r#"{"cpu":{"shares":1024,"quota":50000,"period":100000},
                       "memory":{"limit":67108864,"swap":67108864},"pids":{"limit":100},
                       "unified":{"memory.high":"50000000"}}"#;
        assert_eq!(
            files(json),
            [
                pair("cpu.weight", "39"),
                pair("cpu.max", "50000 100000"),
                pair("memory.swap.max", "0"),
                pair("memory.max", "67108864"),
                pair("pids.max", "100"),
                pair("memory.high", "50000000"),
            ]
        );
    }

    #[test]
    fn no_limit_is_said_in_words() {
        let json = r#"{"cpu":{"quota":-1,"period":100000},"memory":{"limit":-1},"pids":{"limit":-1}}"#;
        assert_eq!(files(json), [pair("cpu.max", "max 100000"), pair("memory.max", "max"), pair("pids.max", "max")]);
    }

    #[test]
    fn what_is_not_mentioned_is_not_written() {
        assert_eq!(files("{}"), []);
        assert_eq!(files(r#"{"cpu":{"shares":0},"memory":{}}"#), []);
    }

    #[test]
    fn shares_span_the_whole_range_of_weights() {
        assert_eq!((weight(2), weight(262_144), weight(0)), (1, 10_000, 1));
    }
}
