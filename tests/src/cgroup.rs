//! The control groups a node's pods live in: one subtree in every hierarchy of the host, version 1 and version 2.
//!
//! On a cluster the kubelet makes a pod's cgroup before the sandbox and removes it afterwards; here the harness does.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// A cgroup path below the root of every hierarchy.
#[derive(Debug, Clone)]
pub struct Subtree {
    name: String,
    hierarchies: Vec<PathBuf>,
}

impl Subtree {
    /// The subtree `name` (no slash at the front); nothing is made yet.
    pub fn new(name: &str) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let hierarchies = mounts.lines().filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            kind.starts_with("cgroup").then(|| PathBuf::from(path))
        });
        Ok(Self { name: name.to_owned(), hierarchies: hierarchies.collect() })
    }

    /// Makes `child` in every hierarchy and returns its path as CRI wants it.
    pub fn make(&self, child: &str) -> Result<String> {
        for hierarchy in &self.hierarchies {
            let mut path = hierarchy.clone();
            for part in [self.name.as_str(), child] {
                let parent = path.clone();
                path.push(part);
                if !path.exists() {
                    fs::create_dir(&path).with_context(|| format!("make the cgroup {}", path.display()))?;
                }
                // A new group of the cpuset hierarchy is empty and takes no process.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if path.join(file).exists() && hierarchy.ends_with("cpuset") {
                        let value = fs::read_to_string(parent.join(file))?;
                        fs::write(path.join(file), value.trim())
                            .with_context(|| format!("write {}/{file}", path.display()))?;
                    }
                }
            }
        }
        Ok(format!("/{}/{child}", self.name))
    }

    /// Limits the memory of `child`, as the kubelet does for a pod whose containers have limits.
    pub fn limit_memory(&self, child: &str, bytes: u64) -> Result<()> {
        let mut limited = false;
        for hierarchy in &self.hierarchies {
            let top = hierarchy.join(&self.name);
            // In version 2 a group has what is handed down to it.
            for above in [hierarchy, &top] {
                let has = fs::read_to_string(above.join("cgroup.controllers")).unwrap_or_default();
                if has.split_whitespace().any(|controller| controller == "memory") {
                    fs::write(above.join("cgroup.subtree_control"), "+memory")
                        .with_context(|| format!("hand memory down from {}", above.display()))?;
                }
            }
            // What goes to a swap would not be missed.
            for (file, value) in [("memory.limit_in_bytes", bytes), ("memory.swap.max", 0), ("memory.max", bytes)] {
                let path = top.join(child).join(file);
                if path.exists() {
                    fs::write(&path, value.to_string()).with_context(|| format!("write {}", path.display()))?;
                    limited = true;
                }
            }
        }
        ensure!(limited, "no hierarchy of this machine limits memory");
        Ok(())
    }

    /// Bytes of memory that `child` has in use.
    pub fn memory_usage(&self, child: &str) -> Result<u64> {
        let files = ["memory.usage_in_bytes", "memory.current"];
        let paths = self.hierarchies.iter().map(|hierarchy| hierarchy.join(&self.name).join(child));
        let text =
            paths.flat_map(|path| files.map(|file| path.join(file))).find_map(|path| fs::read_to_string(path).ok());
        let text = text.with_context(|| format!("nothing counts the memory of {child}"))?;
        text.trim().parse().with_context(|| format!("parse {text:?}"))
    }

    /// Removes `child` where it has become empty. What is not empty stays, and is then found by [`Self::list`].
    pub fn remove_if_empty(&self, child: &str) {
        for hierarchy in &self.hierarchies {
            // Refused while a process or a group is left in it.
            drop(fs::remove_dir(hierarchy.join(&self.name).join(child)));
        }
    }

    /// Every group below the subtree, as `hierarchy:path`.
    pub fn list(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for hierarchy in &self.hierarchies {
            let top = hierarchy.join(&self.name);
            for path in walk(&top) {
                if let Ok(below) = path.strip_prefix(&top) {
                    let hierarchy = hierarchy.file_name().unwrap_or_default().to_string_lossy();
                    found.insert(format!("{hierarchy}:/{}/{}", self.name, below.display()));
                }
            }
        }
        found
    }

    /// Whether `path`, a line of /proc/PID/cgroup, lies in the subtree.
    pub fn holds(&self, path: &str) -> bool {
        path.trim_start_matches('/').split('/').next() == Some(self.name.as_str())
    }

    /// Removes the whole subtree as far as it is free of processes.
    pub fn remove(&self) {
        for hierarchy in &self.hierarchies {
            let top = hierarchy.join(&self.name);
            let mut paths = walk(&top);
            // Parents come first in a walk.
            paths.reverse();
            paths.push(top);
            for path in paths {
                // Refused for a group in use; the leak check has told about that already.
                let _ = fs::remove_dir(path);
            }
        }
    }
}

/// Directories below `top`, parents before their children.
fn walk(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![top.to_owned()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
                pending.push(entry.path());
            }
        }
    }
    found
}
