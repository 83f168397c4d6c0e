//! Whether the kernel has killed a process of a leaf for want of memory, and whose limit that was.
//!
//! A kill is counted in the cgroup of its victim, before the victim gets the signal. Whose limit led to it is to be seen where
//! the limit is, in the leaf or above: v2 counts there how often memory ran out, v1 how often it refused some.
//! v1: <https://docs.kernel.org/admin-guide/cgroup-v1/memory.html>
//! v2: <https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files>

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// What v1 shows where there is no limit is more, and no machine has as much.
const V1_UNLIMITED: u64 = 1 << 62;

const MIB: u64 = 1 << 20;

/// What the memory controller counts, and where.
#[derive(Debug)]
struct Interface {
    /// Processes of the cgroup that were killed for want of memory, whosever limit it was.
    kills: Counter,
    /// How often the cgroup's own limit was reached.
    reached: Counter,
    /// File of that limit.
    limit: &'static str,
}

/// A number in a file of a cgroup.
#[derive(Debug)]
struct Counter {
    file: &'static str,
    /// The word before it in its line; `None` where the number is all there is.
    key: Option<&'static str>,
}

static V1: Interface = Interface {
    kills: Counter { file: "memory.oom_control", key: Some("oom_kill") },
    reached: Counter { file: "memory.failcnt", key: None },
    limit: "memory.limit_in_bytes",
};

static V2: Interface = Interface {
    kills: Counter { file: "memory.events", key: Some("oom_kill") },
    // That of the cgroup itself: `memory.events` has those below it as well.
    reached: Counter { file: "memory.events.local", key: Some("oom") },
    limit: "memory.max",
};

/// The counters as they were before a leaf had any process of ours: it, or a cgroup above it, may be older.
#[derive(Debug)]
pub struct Counters {
    interface: &'static Interface,
    kills: u64,
    /// The leaf, and what is above it up to the mount point.
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    directory: PathBuf,
    reached: u64,
}

/// Why the kernel has killed a process, as the end of a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutOfMemory {
    /// A limit was reached.
    Limit {
        /// Whose, as its path below the mount point.
        cgroup: PathBuf,
        /// The limit.
        bytes: u64,
    },
    /// No limit was: there is no more.
    Node,
    /// The kernel does not count whose limit was reached.
    Unknown,
}

impl Counters {
    /// Reads the counters of the leaf that has these directories, one in each hierarchy. `None`: its memory is not counted.
    pub fn read(directories: &[PathBuf]) -> Option<Self> {
        directories.iter().find_map(|leaf| {
            let counted = |interface: &'static Interface| Some((interface, interface.kills.read(leaf)?));
            let (interface, kills) = [&V1, &V2].into_iter().find_map(counted)?;
            let cgroups = leaf.ancestors().take_while(|directory| directory.join("cgroup.procs").exists());
            let level = |directory: &Path| Level {
                directory: directory.to_owned(),
                // The root of v2 has no such file, and no limit either.
                reached: interface.reached.read(directory).unwrap_or_default(),
            };
            Some(Self { interface, kills, levels: cgroups.map(level).collect() })
        })
    }

    /// Why the kernel has killed a process of the leaf since; `None` if it has not.
    pub fn out_of_memory(&self) -> Option<OutOfMemory> {
        let (leaf, top) = (self.levels.first()?, self.levels.last()?);
        if self.interface.kills.read(&leaf.directory)? <= self.kills {
            return None;
        }
        let reached = self.levels.iter().find_map(|level| {
            let bytes = limit(&fs::read_to_string(level.directory.join(self.interface.limit)).ok()?)?;
            // `memory.events.local` came with Linux 5.2.
            let Some(reached) = self.interface.reached.read(&level.directory) else {
                return Some(OutOfMemory::Unknown);
            };
            let below = level.directory.strip_prefix(&top.directory).unwrap_or(&level.directory);
            (reached > level.reached).then(|| OutOfMemory::Limit { cgroup: Path::new("/").join(below), bytes })
        });
        Some(reached.unwrap_or(OutOfMemory::Node))
    }
}

impl Counter {
    fn read(&self, directory: &Path) -> Option<u64> {
        self.parse(&fs::read_to_string(directory.join(self.file)).ok()?)
    }

    fn parse(&self, text: &str) -> Option<u64> {
        let Some(key) = self.key else { return text.trim().parse().ok() };
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
    }
}

/// A limit in bytes; `None` for no limit.
fn limit(text: &str) -> Option<u64> {
    // v2 says "max", which is no number.
    text.trim().parse::<u64>().ok().filter(|bytes| *bytes < V1_UNLIMITED)
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limit { cgroup, bytes } => {
                let mib = bytes.is_multiple_of(MIB).then(|| format!("{} MiB", bytes / MIB));
                let size = mib.unwrap_or_else(|| format!("{bytes} bytes"));
                write!(
                    f,
                    "the memory limit of {size} of cgroup {} was reached, and a virtual machine takes memory beyond what its \
                     containers use: the pod needs a RuntimeClass with enough overhead.podFixed.memory, or a higher limit",
                    cgroup.display()
                )
            }
            Self::Node => f.write_str("the node ran out of memory"),
            Self::Unknown => f.write_str("the kernel killed it for want of memory, of the pod's limit or of the node"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_OOM_CONTROL: &str = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
    const V2_EVENTS: &str = "low 0\nhigh 0\nmax 1074\noom 12\noom_kill 2\noom_group_kill 1\nsock_throttled 0\n";

    #[test]
    fn counters_of_both_versions_are_read() {
        assert_eq!(V1.kills.parse(V1_OOM_CONTROL), Some(3));
        assert_eq!(V1.reached.parse("93\n"), Some(93));
        assert_eq!(V2.kills.parse(V2_EVENTS), Some(2));
        assert_eq!(V2.reached.parse(V2_EVENTS), Some(12));
        // Kernels before 4.13.
        assert_eq!(V1.kills.parse("oom_kill_disable 0\nunder_oom 0\n"), None);
    }

    #[test]
    fn no_limit_is_told_from_a_limit() {
        assert_eq!(limit("134217728\n"), Some(128 << 20));
        for none in ["max\n", "9223372036854771712\n", ""] {
            assert_eq!(limit(none), None, "{none:?}");
        }
    }

    #[test]
    fn the_sentence_has_the_limit_and_its_owner() {
        let told = |bytes| OutOfMemory::Limit { cgroup: "/kubepods/pod1".into(), bytes }.to_string();
        let begin = "the memory limit of 128 MiB of cgroup /kubepods/pod1 was reached, ";
        assert!(told(128 << 20).starts_with(begin), "{}", told(128 << 20));
        assert!(told(4096).contains(" 4096 bytes "), "{}", told(4096));
    }

    /// The files of one version in a directory, in the place of a mounted hierarchy.
    struct Hierarchy {
        mount_point: tempfile::TempDir,
    }

    impl Hierarchy {
        /// A leaf in a pod's cgroup, each without a limit.
        fn new(interface: &Interface) -> Self {
            let hierarchy = Self { mount_point: tempfile::tempdir().expect("makes one") };
            fs::create_dir_all(hierarchy.leaf()).expect("makes them");
            let unlimited = if interface.limit == V2.limit { "max\n" } else { "9223372036854771712\n" };
            for cgroup in ["", "kubepods", "kubepods/pod1", "kubepods/pod1/leaf"] {
                hierarchy.write(cgroup, "cgroup.procs", "");
                hierarchy.count(cgroup, &interface.kills, 0);
                hierarchy.count(cgroup, &interface.reached, 7);
                hierarchy.write(cgroup, interface.limit, unlimited);
            }
            hierarchy
        }

        fn leaf(&self) -> PathBuf {
            self.mount_point.path().join("kubepods/pod1/leaf")
        }

        fn write(&self, cgroup: &str, file: &str, text: &str) {
            fs::write(self.mount_point.path().join(cgroup).join(file), text).expect("writes");
        }

        fn count(&self, cgroup: &str, counter: &Counter, value: u64) {
            let text = counter.key.map_or_else(|| format!("{value}\n"), |key| format!("other 1\n{key} {value}\n"));
            self.write(cgroup, counter.file, &text);
        }
    }

    #[test]
    fn the_nearest_limit_that_was_reached_is_the_reason() {
        for interface in [&V1, &V2] {
            let hierarchy = Hierarchy::new(interface);
            for (cgroup, mib) in [("kubepods", 4096), ("kubepods/pod1", 48)] {
                hierarchy.write(cgroup, interface.limit, &format!("{}\n", mib * MIB));
            }
            let elsewhere = hierarchy.mount_point.path().join("none");
            let counters = Counters::read(&[elsewhere, hierarchy.leaf()]).expect("memory is counted");
            assert_eq!(counters.out_of_memory(), None, "nothing has happened");

            hierarchy.count("kubepods/pod1", &interface.reached, 8);
            assert_eq!(counters.out_of_memory(), None, "what could be taken back kept it alive");

            hierarchy.count("kubepods/pod1/leaf", &interface.kills, 1);
            let expected = OutOfMemory::Limit { cgroup: "/kubepods/pod1".into(), bytes: 48 * MIB };
            assert_eq!(counters.out_of_memory(), Some(expected));
        }
    }

    #[test]
    fn a_kill_without_a_limit_is_the_node_s() {
        for interface in [&V1, &V2] {
            let hierarchy = Hierarchy::new(interface);
            hierarchy.write("kubepods", interface.limit, "4294967296\n");
            let counters = Counters::read(&[hierarchy.leaf()]).expect("memory is counted");
            hierarchy.count("kubepods/pod1/leaf", &interface.kills, 1);
            assert_eq!(counters.out_of_memory(), Some(OutOfMemory::Node));
        }
    }

    #[test]
    fn memory_that_is_not_counted_has_no_reason() {
        let plain = tempfile::tempdir().expect("makes one");
        assert!(Counters::read(&[plain.path().to_owned()]).is_none());
    }
}
