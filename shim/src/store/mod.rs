//! The journal of a sandbox: what exists of it on the host, written down before it is made.
//!
//! One file, `state.json` in the sandbox's directory, replaced whole and atomically at every change. The shim that owns the
//! sandbox is its only writer. After the shim's death the journal is all that `delete` and `bulkhead gc` know, and it is
//! enough: see [`teardown`]. A program meets journals of older and newer ones, so the file carries a version.
//!
//! What is not in it needs no removal: mounts end with the pod's mount namespace, taps with their file, children with the
//! shim. Processes are in it all the same, since nothing should depend on one mechanism. A process is recorded as soon as it
//! has a pid; in the moment before, its cgroup is what names it.

pub mod teardown;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::network::Link;
use crate::paths;
use crate::process::{has_not_ended, start_time_of};

/// Version of the format. Raised when an older program would misread a journal; fields and kinds of entries are only added
/// under a new one.
pub const VERSION: u32 = 2;

/// Name of the journal in a sandbox's directory.
const FILE: &str = "state.json";

/// A process that can be told from any later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// On the host.
    pub pid: i32,
    /// As in [`start_time_of`].
    pub start_time: u64,
}

impl ProcessId {
    /// The calling process.
    pub fn own() -> anyhow::Result<Self> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let start_time = start_time_of(pid).context("read the start time of this process")?;
        Ok(Self { pid, start_time })
    }

    /// Whether it is still there and has not ended.
    pub fn lives(self) -> bool {
        start_time_of(self.pid) == Some(self.start_time) && has_not_ended(self.pid)
    }
}

/// Something of the sandbox that outlives a killed shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Entry {
    /// A child of the shim.
    Process {
        /// What it is to the sandbox: `QEMU`, `virtiofsd`.
        role: String,
        /// Which one it is.
        #[serde(flatten)]
        id: ProcessId,
    },
    /// A link of the CNI with a redirect on it.
    Link(Link),
    /// A cgroup that holds processes of this sandbox only.
    Cgroup {
        /// Its directory.
        path: PathBuf,
    },
    /// A cgroup above one of ours that did not exist before; it goes when nobody else has come to use it.
    CgroupParent {
        /// Its directory.
        path: PathBuf,
    },
    /// A directory inside the sandbox's own, with all that is in it.
    Directory {
        /// Absolute.
        path: PathBuf,
    },
    /// A Unix socket.
    Socket {
        /// Absolute.
        path: PathBuf,
    },
    /// A container without a pod whose creation has run hooks: its `poststop` hooks undo what those did. Since version 2.
    Hooks {
        /// containerd's id.
        id: String,
        /// Its bundle, with the spec that has the hooks: they have environments, which belong into no journal.
        bundle: PathBuf,
    },
    /// A container of the pod.
    Container {
        /// containerd's id.
        id: String,
        /// Its bundle.
        bundle: PathBuf,
    },
}

/// Everything in a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`VERSION`] of the program that wrote it.
    pub version: u32,
    /// containerd's id of the sandbox.
    pub sandbox_id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's bundle.
    pub bundle: PathBuf,
    /// The shim that owns the sandbox.
    pub shim: ProcessId,
    /// Boot of the host that pids and cgroups belong to, as in `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Configuration file that the sandbox was started with; `None` for the default.
    pub config: Option<PathBuf>,
    /// In the order in which things were made.
    pub entries: Vec<Entry>,
}

impl State {
    /// The state of a sandbox of which nothing exists yet but the shim that calls this.
    pub fn new(sandbox_id: &str, namespace: &str, bundle: &Path, config: Option<&Path>) -> anyhow::Result<Self> {
        Ok(Self {
            version: VERSION,
            sandbox_id: sandbox_id.into(),
            namespace: namespace.into(),
            bundle: bundle.into(),
            shim: ProcessId::own()?,
            boot_id: boot_id()?,
            config: config.map(Path::to_owned),
            entries: Vec::new(),
        })
    }
}

/// The journal of the sandbox that this process owns. Its methods block for the time of one small write.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    state: State,
}

impl Journal {
    /// Begins the journal of a new sandbox in `dir`, which is made, for root alone.
    ///
    /// Fails if there is a journal already: a sandbox is torn down before its directory is used again.
    pub fn create(dir: &Path, state: State) -> anyhow::Result<Self> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.with_context(|| format!("make the sandbox's directory {}", dir.display()))?;
        anyhow::ensure!(
            !dir.join(FILE).exists(),
            "sandbox {} has a journal in {} already: it exists, or was not torn down",
            state.sandbox_id,
            dir.display()
        );
        let journal = Self { dir: dir.into(), state };
        journal.write()?;
        Ok(journal)
    }

    /// What is in it.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The sandbox's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes down what is about to be made. Recording the same twice changes nothing.
    pub fn record(&mut self, entry: Entry) -> anyhow::Result<()> {
        self.record_all([entry])
    }

    /// [`Self::record`] of several, in one write.
    pub fn record_all(&mut self, entries: impl IntoIterator<Item = Entry>) -> anyhow::Result<()> {
        let before = self.state.entries.len();
        for entry in entries {
            if !self.state.entries.contains(&entry) {
                self.state.entries.push(entry);
            }
        }
        if self.state.entries.len() == before {
            return Ok(());
        }
        let written = self.write();
        if written.is_err() {
            self.state.entries.truncate(before);
        }
        written
    }

    /// Strikes out what is gone for certain. Safe to call twice.
    pub fn forget(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let before = self.state.entries.len();
        self.state.entries.retain(|recorded| recorded != entry);
        if self.state.entries.len() == before { Ok(()) } else { self.write() }
    }

    fn write(&self) -> anyhow::Result<()> {
        let path = self.dir.join(FILE);
        let replace = || {
            let unfinished = self.dir.join(format!("{FILE}.new"));
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&unfinished)?;
            file.write_all(&serde_json::to_vec_pretty(&self.state)?)?;
            file.sync_all()?;
            fs::rename(&unfinished, &path)
        };
        replace().with_context(|| format!("write journal {}", path.display()))
    }
}

/// Reads the journal in `dir`; `None` if there is none. Reads older versions too, and refuses newer ones.
pub fn read(dir: &Path) -> anyhow::Result<Option<State>> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let path = dir.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read journal {}", path.display())),
    };
    let what = || format!("journal {} is not readable", path.display());
    let Versioned { version } = serde_json::from_slice(&text).with_context(what)?;
    anyhow::ensure!(
        (1..=VERSION).contains(&version),
        "journal {} has version {version} and this program reads versions up to {VERSION}: use the program that wrote it",
        path.display()
    );
    serde_json::from_slice(&text).map(Some).with_context(what)
}

/// Directories of sandboxes below `state_dir`, by name; none if there is no `state_dir`.
pub fn directories(state_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let what = || format!("list the state directory {}", state_dir.display());
    let entries = match fs::read_dir(state_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(what),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(what)?.path();
        if path.is_dir() && paths::id_of_dir(&path).is_some() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Which boot of the host this is.
pub fn boot_id() -> anyhow::Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the host's boot id")?;
    Ok(id.trim().to_owned())
}

/// The right to tear a sandbox down; one holder at a time, over all processes.
///
/// It is a lock on the directory itself: a file for it would be one more thing that a late comer makes again.
#[derive(Debug)]
struct Lock {
    _dir: File,
}

impl Lock {
    /// Waits until `deadline`. `None`: the sandbox's directory is gone, so somebody else has done the work.
    fn acquire(path: &Path, deadline: Instant) -> anyhow::Result<Option<Self>> {
        let dir = match File::open(path) {
            Ok(dir) => dir,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
        };
        // flock(2) has no deadline of its own; whoever holds the lock has one for all its work.
        while let Err(errno) = flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            anyhow::ensure!(errno == rustix::io::Errno::WOULDBLOCK, "lock {}: {errno}", path.display());
            anyhow::ensure!(Instant::now() < deadline, "{} is being torn down by somebody else", path.display());
            #[allow(
                clippy::disallowed_methods,
                reason = "flock(2) tells nobody when a lock becomes free but who blocks on it"
            )]
            std::thread::sleep(Duration::from_millis(5));
        }
        // The holder before us may have removed what we locked, and a new sandbox may have come to its place.
        let same = fs::metadata(path).is_ok_and(|now| dir.metadata().is_ok_and(|locked| locked.ino() == now.ino()));
        Ok(same.then_some(Self { _dir: dir }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(dir: &Path) -> Journal {
        let state = State::new("web", "k8s.io", Path::new("/bundle"), None).expect("a state");
        Journal::create(dir, state).expect("a journal")
    }

    #[test]
    fn what_is_recorded_is_read_back_in_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path().join("web-123456");
        let mut journal = journal(&dir);
        let entries = [
            Entry::Cgroup { path: "/sys/fs/cgroup/pod/web".into() },
            Entry::CgroupParent { path: "/sys/fs/cgroup/pod".into() },
            Entry::Link(Link { netns: "/run/netns/a".into(), ifname: "eth0".into(), tap: "bhtap2".into() }),
            Entry::Process { role: "QEMU".into(), id: ProcessId { pid: 7, start_time: 99 } },
            Entry::Directory { path: dir.join("share") },
            Entry::Socket { path: "/run/containerd/s/1".into() },
            Entry::Container { id: "c1".into(), bundle: "/bundles/c1".into() },
        ];
        for entry in &entries {
            journal.record(entry.clone()).expect("records");
            journal.record(entry.clone()).expect("records the same again");
        }
        let state = read(&dir).expect("is readable").expect("is there");
        assert_eq!(state.entries, entries);
        assert_eq!(&state, journal.state());
        journal.forget(&entries[3]).expect("forgets");
        journal.forget(&entries[3]).expect("forgets again");
        assert_eq!(read(&dir).expect("is readable").expect("is there").entries.len(), entries.len() - 1);
    }

    #[test]
    fn the_format_is_the_one_in_the_golden_file() {
        // Journals of this version lie on nodes: an older or newer program must read them.
        let golden = include_str!("testdata/state-1.json");
        let state: State = serde_json::from_str(golden).expect("this program reads version 1");
        assert_eq!(serde_json::to_string_pretty(&state).expect("is JSON") + "\n", golden);
    }

    #[test]
    fn a_journal_of_another_version_or_in_pieces_is_refused_in_a_sentence() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join(FILE), r#"{"version": 7, "future": true}"#).expect("write");
        let error = format!("{:#}", read(dir.path()).expect_err("is refused"));
        assert!(error.contains("has version 7 and this program reads versions up to 2"), "{error}");
        fs::write(dir.path().join(FILE), r#"{"version": 1, "sand"#).expect("write");
        let error = format!("{:#}", read(dir.path()).expect_err("is refused"));
        assert!(error.contains("is not readable"), "{error}");
        assert!(read(Path::new("/no/such/dir")).expect("is no error").is_none());
    }

    #[test]
    fn a_process_that_ended_or_was_another_one_does_not_live() {
        let own = ProcessId::own().expect("has a start time");
        assert!(own.lives());
        assert!(!ProcessId { start_time: own.start_time + 1, ..own }.lives());
        let mut child = std::process::Command::new("true").spawn().expect("runs");
        let pid = child.id().cast_signed();
        let ended = ProcessId { pid, start_time: start_time_of(pid).expect("is there") };
        rustix::process::waitid(
            rustix::process::WaitId::Pid(rustix::process::Pid::from_child(&child)),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .expect("ends");
        assert!(start_time_of(pid).is_some() && !ended.lives(), "a process that nobody has reaped has ended");
        child.wait().expect("is reaped");
    }

    #[test]
    fn only_directories_of_sandboxes_are_listed() {
        let state_dir = tempfile::tempdir().expect("a directory");
        for name in ["web-123456", "db-abcdef", "web", "web-12345", "lost+found"] {
            fs::create_dir(state_dir.path().join(name)).expect("mkdir");
        }
        fs::write(state_dir.path().join("file-123456"), "").expect("write");
        let names = ["db-abcdef", "web-123456"].map(|name| state_dir.path().join(name));
        assert_eq!(directories(state_dir.path()).expect("lists"), names);
        assert!(directories(Path::new("/no/such/dir")).expect("is no error").is_empty());
    }

    #[test]
    fn a_sandbox_that_was_not_torn_down_is_not_overwritten() {
        let dir = tempfile::tempdir().expect("a directory");
        journal(dir.path());
        let state = State::new("web", "k8s.io", Path::new("/bundle"), None).expect("a state");
        let error = Journal::create(dir.path(), state).expect_err("is refused").to_string();
        assert!(error.contains("sandbox web has a journal"), "{error}");
    }

    #[test]
    fn a_write_that_fails_leaves_the_journal_as_it_was() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut journal = journal(dir.path());
        // A directory where the new file would go.
        fs::create_dir(dir.path().join("state.json.new")).expect("mkdir");
        let entry = Entry::Socket { path: "/s".into() };
        assert!(journal.record(entry.clone()).is_err());
        assert!(journal.state().entries.is_empty(), "memory and file agree");
        fs::remove_dir(dir.path().join("state.json.new")).expect("rmdir");
        journal.record(entry.clone()).expect("records");
        assert_eq!(read(dir.path()).expect("is readable").expect("is there").entries, [entry]);
    }
}
