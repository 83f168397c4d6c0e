//! The pod's cgroup on the host, where QEMU and its helpers live, so that the pod's accounting and limits hold for them.
//!
//! It is the leaf that the sandbox's spec names (`linux.cgroupsPath`), the one in which another runtime would put the pause
//! process: below the pod's own cgroup, which kubelet makes and removes. v1, v2 and both side by side. Where the kernel kills
//! one of them for want of memory, [`memory`] tells whose limit that was.
//! Spec: <https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md#cgroups-path>

pub mod memory;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::cgroup::memory::{Counters, OutOfMemory};
use crate::error::{Error, Result};
use crate::mount_table::{Mount, MountTable};

/// Where a leaf goes when the spec names none, as `ctr` specs may.
const DEFAULT_PARENT: &str = "bulkhead";

/// Hierarchies of v1 that account for or limit something.
const V1_CONTROLLERS: [&str; 11] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "pids",
    "blkio",
    "devices",
    "freezer",
    "net_cls",
    "perf_event",
    // systemd's own, by which its tools find processes.
    "name=systemd",
];

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount_point: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Version {
    /// With its controllers; a named hierarchy has its name instead, as `name=systemd`.
    V1(Vec<String>),
    V2,
}

/// The leaf of one pod, in every hierarchy that has it.
#[derive(Debug)]
pub struct PodCgroup {
    directories: Vec<PathBuf>,
    /// From before anything was in it; `None` where memory is not counted.
    memory: Option<Counters>,
}

impl PodCgroup {
    /// The directories that [`PodCgroup::create`] will make, for the journal. Empty if no hierarchy is mounted.
    pub fn plan(cgroups_path: &str, sandbox_id: &str) -> Result<Vec<PathBuf>> {
        let relative = relative_path(cgroups_path, sandbox_id)?;
        let hierarchies = mounted()?;
        Ok(chosen(&hierarchies).into_iter().map(|hierarchy| hierarchy.mount_point.join(&relative)).collect())
    }

    /// Makes the planned directories. Blocks on the file system.
    pub fn create(directories: Vec<PathBuf>) -> Result<Self> {
        for directory in &directories {
            let made = make(directory).with_context(|| format!("make cgroup {}", directory.display()));
            if let Err(error) = made {
                remove_all(&directories);
                return Err(error.into());
            }
            hand_down(directory);
        }
        let memory = Counters::read(&directories);
        Ok(Self { directories, memory })
    }

    /// Why the kernel has killed a process of the pod for want of memory; `None` if it has not. Reads files of the kernel's
    /// memory, which does not block.
    pub fn out_of_memory(&self) -> Option<OutOfMemory> {
        self.memory.as_ref()?.out_of_memory()
    }

    /// The `cgroup.procs` files, open for a child to write itself into.
    pub fn procs(&self) -> Result<Vec<OwnedFd>> {
        let open = |directory: &PathBuf| {
            let path = directory.join("cgroup.procs");
            let file = OpenOptions::new().write(true).open(&path);
            file.map(OwnedFd::from).with_context(|| format!("open {}", path.display()))
        };
        Ok(self.directories.iter().map(open).collect::<anyhow::Result<_>>()?)
    }

    /// Removes the leaf; what kubelet made above it stays. Waits, bounded, for the kernel to have forgotten the processes.
    pub async fn remove(self) -> Result<()> {
        let removed = tokio::task::spawn_blocking(move || remove(&self.directories)).await;
        removed.map_err(|error| Error::internal(format!("remove cgroups: {error}")))?
    }
}

/// Where the cgroups of pods will be, for people: the mount points of the hierarchies in use, and whether they are of v2.
pub fn in_use() -> Result<(Vec<PathBuf>, bool)> {
    let hierarchies = mounted()?;
    let chosen = chosen(&hierarchies);
    let v2 = chosen.iter().any(|hierarchy| hierarchy.version == Version::V2);
    Ok((chosen.into_iter().map(|hierarchy| hierarchy.mount_point.clone()).collect(), v2))
}

/// Removes the leaves in `directories`, each once it is empty. What is not there is well removed. Blocks.
pub fn remove(directories: &[PathBuf]) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let deadline = Instant::now() + PATIENCE;
    for directory in directories {
        loop {
            match fs::remove_dir(directory) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                // A process that was reaped leaves its cgroup a moment later, and no event tells when.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                    #[expect(clippy::disallowed_methods, reason = "a v1 cgroup has no event for having become empty")]
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => {
                    return Err(Error::internal(format!("remove cgroup {}: {error}", directory.display())));
                }
            }
        }
    }
    Ok(())
}

fn remove_all(directories: &[PathBuf]) {
    for directory in directories {
        // The error that led here is the one to tell.
        drop(fs::remove_dir(directory));
    }
}

/// Makes `directory` and what is missing above it. A v1 cpuset is filled in from above, or no process could enter it.
fn make(directory: &Path) -> anyhow::Result<()> {
    let parent = directory.parent().context("a cgroup is below a mount point")?;
    if !parent.exists() {
        make(parent)?;
    }
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, above) = (directory.join(file), parent.join(file));
        // On v2 an empty file means "as above", and a leaf may not have the file at all.
        if directory.join("cgroup.clone_children").exists() && File::open(&own).is_ok() {
            let current = fs::read_to_string(&own)?;
            if current.trim().is_empty() {
                fs::write(&own, fs::read_to_string(&above)?.trim())?;
            }
        }
    }
    Ok(())
}

/// On v2, has every cgroup above `directory` hand its controllers down, as runc does: without, a pod has no accounting of its
/// own unless somebody else saw to it. One that has processes of its own may not, and keeps what it has.
/// <https://docs.kernel.org/admin-guide/cgroup-v2.html#no-internal-process-constraint>
fn hand_down(directory: &Path) {
    const CONTROL: &str = "cgroup.subtree_control";
    let above: Vec<&Path> = directory.ancestors().skip(1).take_while(|above| above.join(CONTROL).exists()).collect();
    for above in above.into_iter().rev() {
        let read = |file: &str| fs::read_to_string(above.join(file)).unwrap_or_default();
        let handed = read(CONTROL);
        for controller in read("cgroup.controllers").split_whitespace() {
            if handed.split_whitespace().any(|known| known == controller) {
                continue;
            }
            // One at a time: one that cannot be had must not keep the others.
            if let Err(error) = fs::write(above.join(CONTROL), format!("+{controller}")) {
                tracing::debug!(cgroup = %above.display(), controller, %error, "a controller is not handed down");
            }
        }
    }
}

/// What is used: every v1 hierarchy with a controller that matters; v2 where no v1 is.
fn chosen(hierarchies: &[Hierarchy]) -> Vec<&Hierarchy> {
    let v1: Vec<&Hierarchy> = hierarchies
        .iter()
        .filter(|hierarchy| {
            matches!(&hierarchy.version, Version::V1(controllers)
                if controllers.iter().any(|controller| V1_CONTROLLERS.contains(&controller.as_str())))
        })
        .collect();
    // An empty v2 beside v1 (systemd's hybrid mode) accounts for nothing.
    if v1.is_empty() { hierarchies.iter().filter(|hierarchy| hierarchy.version == Version::V2).collect() } else { v1 }
}

/// The hierarchies of this host.
fn mounted() -> Result<Vec<Hierarchy>> {
    Ok(hierarchies(&MountTable::of_process()?))
}

/// The first mount of each hierarchy counts.
fn hierarchies(table: &MountTable) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for Mount { mount_point, fstype, options, .. } in table.mounts() {
        let version = match fstype.as_str() {
            "cgroup2" => Version::V2,
            "cgroup" => Version::V1(options.split(',').map(str::to_owned).collect()),
            _ => continue,
        };
        if !found.iter().any(|hierarchy| hierarchy.version == version) {
            found.push(Hierarchy { mount_point: mount_point.clone(), version });
        }
    }
    found
}

/// `cgroupsPath` as a path below a hierarchy: a cgroupfs path as it is, `slice:prefix:name` as systemd would nest it.
fn relative_path(cgroups_path: &str, sandbox_id: &str) -> Result<PathBuf> {
    let refuse = || {
        Error::invalid(format!(
            "linux.cgroupsPath {cgroups_path:?}, expected a path without \"..\", or slice:prefix:name"
        ))
    };
    let path = match cgroups_path.split(':').collect::<Vec<_>>().as_slice() {
        [""] => PathBuf::from(DEFAULT_PARENT).join(sandbox_id),
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, prefix, name] => {
            let unit = if prefix.is_empty() { (*name).to_owned() } else { format!("{prefix}-{name}.scope") };
            expand_slice(slice).ok_or_else(refuse)?.join(unit)
        }
        _ => return Err(refuse()),
    };
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if plain && path.components().next().is_some() { Ok(path) } else { Err(refuse()) }
}

/// `a-b-c.slice` lies in `a.slice/a-b.slice/a-b-c.slice` (systemd.slice(5)).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    let name = match slice {
        "" => "system",
        other => other.strip_suffix(".slice")?,
    };
    if name == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        prefix = if prefix.is_empty() { part.to_owned() } else { format!("{prefix}-{part}") };
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroupfs_path_is_taken_as_it_is() {
        let path = relative_path("/kubepods/burstable/pod1/abc", "abc").expect("is accepted");
        assert_eq!(path, Path::new("kubepods/burstable/pod1/abc"));
        assert_eq!(relative_path("", "abc").expect("has a default"), Path::new("bulkhead/abc"));
    }

    #[test]
    fn a_slice_is_nested_as_systemd_does() {
        let path = relative_path("kubepods-burstable-pod1.slice:cri-containerd:abc", "abc").expect("is accepted");
        assert_eq!(
            path,
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope")
        );
    }

    #[test]
    fn a_path_that_leaves_the_hierarchy_is_refused_by_value() {
        for path in ["/a/../../b", "../x", "/", "a:b", "kube.slice:x", "a--b.slice:x:y", "kubepods:x:y"] {
            let error = relative_path(path, "abc").expect_err(path);
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    #[test]
    fn hierarchies_are_read_from_mountinfo_and_hybrid_means_v1() {
        let text = "30 24 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                    31 24 0:27 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n\
                    32 24 0:28 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
                    33 24 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
                    34 24 0:26 / /other/cpu rw,relatime - cgroup cgroup rw,cpu\n";
        let all = hierarchies(&MountTable::parse(text.as_bytes()));
        let points: Vec<&Path> = chosen(&all).iter().map(|hierarchy| hierarchy.mount_point.as_path()).collect();
        assert_eq!(points, ["cpu", "memory", "systemd"].map(|name| Path::new("/sys/fs/cgroup").join(name)));
        let unified = MountTable::parse(b"33 24 0:29 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n");
        let unified = hierarchies(&unified);
        assert_eq!(chosen(&unified)[0].mount_point, Path::new("/sys/fs/cgroup"));
    }

    #[tokio::test]
    async fn a_leaf_is_made_entered_by_a_child_and_removed() {
        let id = format!("bulkhead-test-{}", std::process::id());
        let directories = PodCgroup::plan(&format!("/{id}/leaf"), "leaf").expect("is planned");
        if directories.is_empty() || !rustix::process::geteuid().is_root() {
            eprintln!("skipped: no cgroup hierarchy is mounted, or not root");
            return;
        }
        let cgroup = PodCgroup::create(directories.clone()).expect("is made");
        assert_eq!(cgroup.procs().expect("opens").len(), directories.len());
        assert!(directories.iter().all(|directory| directory.exists()));
        cgroup.remove().await.expect("is removed");
        assert!(directories.iter().all(|directory| !directory.exists()));
        let parents: Vec<PathBuf> = directories.iter().filter_map(|d| d.parent().map(Path::to_owned)).collect();
        remove(&parents).expect("removes what only the test made");
    }
}
