//! One container's cgroup (v2): made before its init, removed after its last process.
//!
//! What limits become in its files is [`crate::limits`]' affair. The layout is `/sys/fs/cgroup/bulkhead/<container id>`.
//! Kernel: <https://docs.kernel.org/admin-guide/cgroup-v2.html>; OCI runtime `config-linux.md#control-groups`.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;

use crate::error::{During, Error, Result};
use crate::idmap::Owner;
use crate::{filter, limits, sys};

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

/// A container's cgroup, or the one above all of them; a clone is the same.
#[derive(Debug, Clone)]
pub struct Cgroup {
    directory: PathBuf,
    /// Held while limits change: a change builds on what it finds, and takes itself back if it fails.
    changing: Arc<Mutex<()>>,
}

impl Cgroup {
    /// Makes the cgroup of `container_id`, which must be fit for a file name.
    pub fn create(container_id: &str) -> Result<Self> {
        let cgroup = Self::of(container_id);
        match fs::create_dir(&cgroup.directory) {
            Ok(()) => Ok(cgroup),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(cgroup),
            Err(error) => Err(Error::internal(format!("create cgroup {}: {error}", cgroup.directory.display()))),
        }
    }

    /// The cgroup of `container_id`, which need not exist.
    pub fn of(container_id: &str) -> Self {
        Self { directory: Path::new(MOUNT).join(&PARENT[1..]).join(container_id), changing: Arc::default() }
    }

    /// The one above those of all containers.
    pub fn of_all() -> Self {
        Self { directory: Path::new(MOUNT).join(&PARENT[1..]), changing: Arc::default() }
    }

    /// Lets `owner` divide it (cgroup v2, "Delegation"): its directory and the files by which that is done are the owner's.
    pub fn give_to(&self, owner: Owner) -> Result<()> {
        for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            let path = self.directory.join(file);
            std::os::unix::fs::chown(&path, Some(owner.uid), Some(owner.gid))
                .during(|| format!("give {} to user {}", path.display(), owner.uid))?;
        }
        Ok(())
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Sets limits; what `resources` does not mention stays, and on an error everything does.
    ///
    /// Less memory than is in use is no error: as under runc, the kernel takes back what it can before this returns, and
    /// kills for the rest. Only `checkBeforeUpdate` asks to be refused then. Blocks.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_usage(resources)?;
        let cpu_max = fs::read_to_string(self.directory.join("cpu.max")).unwrap_or_default();
        let mut undo = Vec::new();
        for setting in limits::plan(resources, &cpu_max) {
            let path = self.directory.join(&setting.file);
            let before = fs::read_to_string(&path);
            match fs::write(&path, &setting.value) {
                Ok(()) => undo.extend(before.map(|before| (path, before))),
                Err(error) if setting.optional && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    for (path, before) in undo.into_iter().rev() {
                        if let Err(error) = fs::write(&path, before.trim_end()) {
                            tracing::warn!(path = %path.display(), %error, "a limit is not as it was before");
                        }
                    }
                    return Err(Error::invalid(format!("set {} to {:?}: {error}", setting.file, setting.value)));
                }
            }
        }
        Ok(())
    }

    fn check_usage(&self, resources: &LinuxResources) -> Result<()> {
        let Some(memory) = resources.memory() else { return Ok(()) };
        let limit = memory.limit().and_then(|limit| u64::try_from(limit).ok()).filter(|&limit| limit > 0);
        let Some(limit) = limit.filter(|_| memory.check_before_update() == Some(true)) else { return Ok(()) };
        let used = fs::read_to_string(self.directory.join("memory.current")).during(|| "read memory.current")?;
        let used: u64 = used.trim().parse().during(|| "read memory.current")?;
        if limit <= used {
            return Err(Error::precondition(format!("memory limit {limit} is not above the {used} bytes in use")));
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

    /// Removes the cgroup, with those that the container made below; kills what is left in it. Blocks until it is empty.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir(&self.directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Processes are left in it, or cgroups below.
            Err(_) => {}
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain files in the place of a cgroup's.
    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let directory = tempfile::tempdir().expect("makes a directory");
        for (file, content) in files {
            fs::write(directory.path().join(file), content).expect("writes");
        }
        let cgroup = Cgroup { directory: directory.path().to_owned(), changing: Arc::default() };
        (directory, cgroup)
    }

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).expect("resources")
    }

    #[test]
    fn a_change_that_is_refused_is_taken_back_whole() {
        let (directory, cgroup) =
            cgroup(&[("cpu.weight", "100\n"), ("cpu.max", "5000 10000\n"), ("memory.max", "max\n")]);
        // Cannot be written, as a value that the kernel refuses.
        fs::create_dir(directory.path().join("pids.max")).expect("makes a directory");
        let json = r#"{"cpu":{"shares":2,"quota":20000},"pids":{"limit":5},"memory":{"limit":4096}}"#;
        let error = cgroup.apply(&resources(json)).expect_err("is refused");
        assert!(error.to_string().starts_with("set pids.max to \"5\": "), "{error}");
        let read = |file: &str| fs::read_to_string(directory.path().join(file)).expect("reads");
        let found = [read("cpu.weight"), read("cpu.max"), read("memory.max")];
        assert_eq!(found.each_ref().map(|text| text.trim()), ["100", "5000 10000", "max"]);
    }

    #[test]
    fn memory_in_use_goes_before_a_limit_only_where_that_is_asked_for() {
        let (directory, cgroup) = cgroup(&[("memory.current", "4096\n"), ("memory.max", "max\n")]);
        let error =
            cgroup.apply(&resources(r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#)).expect_err("refused");
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        assert_eq!(error.to_string(), "memory limit 4096 is not above the 4096 bytes in use");
        cgroup.apply(&resources(r#"{"memory":{"limit":4097,"checkBeforeUpdate":true}}"#)).expect("is above");
        cgroup.apply(&resources(r#"{"memory":{"limit":4096}}"#)).expect("is the kernel's affair");
        assert_eq!(fs::read_to_string(directory.path().join("memory.max")).expect("reads"), "4096");
    }
}
