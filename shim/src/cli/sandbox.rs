//! A sandbox as it can be seen from outside: by its journal and the processes that the journal names.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Serialize;

use crate::paths;
use crate::store::{self, Entry, ProcessId, State};
use crate::vm::cmdline::{self, Shape};

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Shim and QEMU live.
    Running,
    /// The shim lives and has no QEMU yet.
    Starting,
    /// The shim lives, its QEMU does not: the pod is being ended.
    Stopping,
    /// The shim has died, and nobody has cleared up after it.
    DeadShim,
    /// Its journal is of an earlier boot of the node.
    BeforeReboot,
    /// There is no journal: the shim is about to begin one, or died before it did.
    NoJournal,
    /// There is a journal that this program cannot read.
    Unreadable,
}

impl Standing {
    /// As text shows it, and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::DeadShim => "dead-shim",
            Self::BeforeReboot => "before-reboot",
            Self::NoJournal => "no-journal",
            Self::Unreadable => "unreadable",
        }
    }
}

/// One sandbox.
#[derive(Debug, Clone, Serialize)]
pub struct Sandbox {
    /// containerd's id.
    pub id: String,
    /// containerd's namespace; None without a journal.
    pub namespace: Option<String>,
    /// Where it stands.
    pub state: Standing,
    /// Since its shim started; None without a journal of this boot.
    pub age_seconds: Option<u64>,
    /// The shim's pid; None if it does not live.
    pub shim_pid: Option<i32>,
    /// QEMU's pid; None if it does not live.
    pub qemu_pid: Option<i32>,
    /// What QEMU was started as; None if it does not live.
    #[serde(flatten)]
    pub vm: Option<Shape>,
    /// Why the journal cannot be read.
    pub problem: Option<String>,
    /// Directory of its run state.
    pub directory: PathBuf,
    /// Its journal.
    #[serde(skip)]
    pub journal: Option<State>,
}

impl Sandbox {
    /// Looks at the sandbox in `directory`, one of [`store::directories`].
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        let id = paths::id_of_dir(directory).unwrap_or_default().to_owned();
        let (journal, problem) = match store::read(directory) {
            Ok(journal) => (journal, None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        let of_this_boot = journal.as_ref().map(|state| Ok::<_, anyhow::Error>(state.boot_id == store::boot_id()?));
        let of_this_boot = of_this_boot.transpose()?.unwrap_or_default();
        let living = journal.as_ref().filter(|_| of_this_boot);
        let shim = living.map(|state| state.shim);
        let qemu = living.and_then(qemu_of);
        let lives = |process: Option<ProcessId>| process.filter(|process| process.lives()).map(|process| process.pid);
        let (shim_pid, qemu_pid) = (lives(shim), lives(qemu));
        let state = match (&journal, of_this_boot, shim_pid, qemu, qemu_pid) {
            (None, ..) if problem.is_some() => Standing::Unreadable,
            (None, ..) => Standing::NoJournal,
            (_, false, ..) => Standing::BeforeReboot,
            (_, _, None, ..) => Standing::DeadShim,
            (_, _, _, None, _) => Standing::Starting,
            (_, _, _, _, None) => Standing::Stopping,
            _ => Standing::Running,
        };
        Ok(Self {
            id: journal.as_ref().map_or(id, |state| state.sandbox_id.clone()),
            namespace: journal.as_ref().map(|state| state.namespace.clone()),
            state,
            age_seconds: shim.and_then(age_of),
            shim_pid,
            qemu_pid,
            vm: qemu_pid.and_then(shape_of),
            problem,
            directory: directory.to_owned(),
            journal,
        })
    }
}

/// The QEMU of a journal: the one that was recorded last.
fn qemu_of(state: &State) -> Option<ProcessId> {
    state.entries.iter().rev().find_map(|entry| match entry {
        Entry::Process { role, id } if role == "QEMU" => Some(*id),
        _ => None,
    })
}

/// Seconds since the process started; its start time counts from the boot.
fn age_of(process: ProcessId) -> Option<u64> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: u64 = uptime.split('.').next()?.parse().ok()?;
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    Some(uptime.saturating_sub(process.start_time / u64::try_from(ticks).ok()?))
}

fn shape_of(qemu_pid: i32) -> Option<Shape> {
    let command_line = std::fs::read(format!("/proc/{qemu_pid}/cmdline")).ok()?;
    let words: Vec<_> = command_line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    cmdline::read_back(words.iter().map(|word| &**word))
}

/// Every sandbox of the node.
pub fn all(state_dir: &Path) -> anyhow::Result<Vec<Sandbox>> {
    store::directories(state_dir)?.iter().map(|directory| Sandbox::read(directory)).collect()
}

/// The sandbox that `wanted` names: its id, or a beginning of it that no other has, as with `crictl`.
pub fn find(state_dir: &Path, wanted: &str) -> anyhow::Result<Sandbox> {
    let directories = store::directories(state_dir)?;
    Sandbox::read(choose(&directories, wanted).with_context(|| format!("look in {}", state_dir.display()))?)
}

/// Names of directories begin with the id, so the whole name tells apart what two namespaces call the same.
fn choose<'a>(directories: &'a [PathBuf], wanted: &str) -> anyhow::Result<&'a Path> {
    let name =
        |directory: &Path| directory.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let exact: Vec<&PathBuf> = directories.iter().filter(|directory| paths::is_dir_of(directory, wanted)).collect();
    let begins = |directory: &&PathBuf| !wanted.is_empty() && name(directory).starts_with(wanted);
    let found = if exact.is_empty() { directories.iter().filter(begins).collect() } else { exact };
    match found.as_slice() {
        [] => bail!(
            "sandbox {wanted:?} is not on this node, accepted is an id that `bulkhead list` shows, or its beginning"
        ),
        [one] => Ok(one),
        several => {
            let names: Vec<String> = several.iter().map(|directory| name(directory)).collect();
            bail!(
                "sandbox {wanted:?} could be any of {}, accepted is a name that only one begins with",
                names.join(", ")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Journal;

    #[test]
    fn a_beginning_names_a_sandbox_if_it_names_one_only() {
        let directories = ["abc-123456", "abd-123456", "web-111111", "web-222222", "web-1-333333"].map(PathBuf::from);
        let chosen = |wanted: &str| choose(&directories, wanted).map(|path| path.display().to_string());
        assert_eq!(chosen("abc").expect("is one"), "abc-123456");
        assert_eq!(chosen("abd").expect("is one"), "abd-123456");
        assert_eq!(chosen("web-1-").expect("is one"), "web-1-333333");
        assert_eq!(chosen("web-2").expect("tells namespaces apart"), "web-222222");
        assert_eq!(chosen("web-1").expect("a whole id wins"), "web-1-333333");
        let said = chosen("ab").expect_err("is two").to_string();
        assert!(said.contains("abc-123456, abd-123456"), "{said}");
        assert!(chosen("web").expect_err("two namespaces").to_string().contains("web-111111, web-222222"));
        assert!(chosen("").expect_err("is none").to_string().contains("\"\" is not on this node"));
    }

    #[test]
    fn the_state_follows_the_journal_and_the_processes() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        std::fs::create_dir(&dir).expect("mkdir");
        let read = || Sandbox::read(&dir).expect("reads");
        assert_eq!((read().state, &*read().id), (Standing::NoJournal, "web"));

        let state = State::new("web", "k8s.io", Path::new("/bundle"), None).expect("a state");
        let mut journal = Journal::create(&dir, state.clone()).expect("a journal");
        assert_eq!(read().state, Standing::Starting);
        assert_eq!((read().namespace.as_deref(), read().shim_pid), (Some("k8s.io"), Some(state.shim.pid)));
        assert!(read().age_seconds.is_some_and(|age| age < 3600));
        // This test stands in for QEMU too.
        let qemu = |id| Entry::Process { role: "QEMU".into(), id };
        journal.record(qemu(state.shim)).expect("records");
        assert_eq!((read().state, read().qemu_pid), (Standing::Running, Some(state.shim.pid)));
        let dead = ProcessId { start_time: 1, ..state.shim };
        journal.record(qemu(dead)).expect("records");
        assert_eq!((read().state, read().qemu_pid), (Standing::Stopping, None));

        let write = |state: &State| {
            std::fs::write(dir.join("state.json"), serde_json::to_vec(state).expect("is JSON")).expect("writes");
        };
        write(&State { shim: dead, ..state.clone() });
        assert_eq!((read().state, read().shim_pid), (Standing::DeadShim, None));
        write(&State { boot_id: "another".into(), ..state });
        assert_eq!((read().state, read().shim_pid), (Standing::BeforeReboot, None));
        std::fs::write(dir.join("state.json"), "{").expect("writes");
        assert_eq!(read().state, Standing::Unreadable);
        assert!(read().problem.is_some_and(|problem| problem.contains("is not readable")));
    }

    #[test]
    fn standings_are_called_the_same_everywhere() {
        use Standing::{BeforeReboot, DeadShim, NoJournal, Running, Starting, Stopping, Unreadable};
        for standing in [Running, Starting, Stopping, DeadShim, BeforeReboot, NoJournal, Unreadable] {
            assert_eq!(serde_json::to_value(standing).expect("is JSON"), standing.name());
        }
    }
}
