//! Teardown: from a journal to nothing left.
//!
//! [`plan`] decides from the journal and from which of its processes live, and touches nothing; [`run`] does it. Safe to
//! repeat, and to run many at a time: one works, the others wait and find nothing to do. Every step is tried and every error
//! told; only when all have succeeded does the sandbox's directory go, and with it the journal, so that a later attempt
//! knows what is left. The shim ends its own sandboxes by the same steps.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Entry, Lock, ProcessId, State};
use crate::hooks::{Hooks, Moment};
use crate::network::{self, Link};
use crate::process::start_time_of;
use crate::timeouts;

/// The OCI spec in a bundle.
const SPEC: &str = "config.json";

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// SIGKILL; a wait for the end of all such processes follows the last.
    Kill {
        /// For messages.
        role: String,
        /// Which one.
        id: ProcessId,
    },
    /// Take the redirect off a CNI's link.
    Detach(Link),
    /// Kill what is left in a cgroup and remove it.
    RemoveCgroup(PathBuf),
    /// Remove a cgroup if it is empty.
    RemoveCgroupParent(PathBuf),
    /// Unlink a socket.
    RemoveSocket(PathBuf),
    /// Remove a directory inside the sandbox's own.
    RemoveDirectory(PathBuf),
    /// Run the `poststop` hooks of a container without a pod, as its bundle has them.
    RunHooks {
        /// containerd's id.
        id: String,
        /// Where its spec is.
        bundle: PathBuf,
    },
}

impl Step {
    /// Whether there is anything to do: what a journal names may be long gone.
    pub fn has_work(&self) -> bool {
        match self {
            Self::Kill { id, .. } => id.lives(),
            Self::Detach(link) => !network::netns::is_gone(&link.netns),
            Self::RemoveCgroup(path)
            | Self::RemoveCgroupParent(path)
            | Self::RemoveSocket(path)
            | Self::RemoveDirectory(path) => path.symlink_metadata().is_ok(),
            Self::RunHooks { bundle, .. } => bundle.join(SPEC).exists(),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { role, id } => write!(f, "process {} ({role})", id.pid),
            Self::Detach(link) => write!(f, "redirect on {} in {}", link.ifname, link.netns.display()),
            Self::RemoveCgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::RemoveCgroupParent(path) => write!(f, "cgroup {}, if it is empty", path.display()),
            Self::RemoveSocket(path) => write!(f, "socket {}", path.display()),
            Self::RemoveDirectory(path) => write!(f, "directory {}", path.display()),
            Self::RunHooks { id, bundle } => write!(f, "poststop hooks of container {id} in {}", bundle.display()),
        }
    }
}

/// What [`plan`] has to know about the present.
#[derive(Debug, Clone, Copy)]
pub struct Present<'a> {
    /// Boot of the host.
    pub boot_id: &'a str,
    /// The caller, which does not kill itself.
    pub own: ProcessId,
    /// Recorded processes that still live.
    pub living: &'a [ProcessId],
}

/// The steps that remove what `state` tells of, in the order in which they must happen: processes before what they use,
/// the rest latest first.
pub fn plan(state: &State, present: Present<'_>) -> Vec<Step> {
    let newest_first = state.entries.iter().rev();
    // After a reboot the same pids, names and paths are somebody else's.
    let same_boot = state.boot_id == present.boot_id;
    let mut steps = Vec::new();
    if same_boot {
        let shim = Step::Kill { role: "shim".into(), id: state.shim };
        let children = newest_first.clone().filter_map(|entry| match entry {
            Entry::Process { role, id } => Some(Step::Kill { role: role.clone(), id: *id }),
            _ => None,
        });
        // The shim first: nobody then answers the death of the others.
        steps.extend(
            [shim].into_iter().chain(children).filter(
                |step| matches!(step, Step::Kill { id, .. } if *id != present.own && present.living.contains(id)),
            ),
        );
    }
    for entry in newest_first {
        match entry {
            Entry::Link(link) if same_boot => steps.push(Step::Detach(link.clone())),
            Entry::Cgroup { path } if same_boot => steps.push(Step::RemoveCgroup(path.clone())),
            Entry::CgroupParent { path } if same_boot => steps.push(Step::RemoveCgroupParent(path.clone())),
            Entry::Socket { path } => steps.push(Step::RemoveSocket(path.clone())),
            Entry::Directory { path } => steps.push(Step::RemoveDirectory(path.clone())),
            Entry::Hooks { id, bundle } => steps.push(Step::RunHooks { id: id.clone(), bundle: bundle.clone() }),
            Entry::Process { .. }
            | Entry::Container { .. }
            | Entry::Link(_)
            | Entry::Cgroup { .. }
            | Entry::CgroupParent { .. } => {}
        }
    }
    // A parent is empty only once all its children are gone, whatever the order of their making.
    steps.sort_by_key(|step| matches!(step, Step::RemoveCgroupParent(_)));
    steps
}

/// Tears down the sandbox whose directory is `dir`; within [`timeouts::TEARDOWN`], blocking.
///
/// Must not be called on a worker of an async runtime.
pub fn run(dir: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeouts::TEARDOWN;
    let Some(_lock) = Lock::acquire(dir, deadline)? else { return Ok(()) };
    let steps = match super::read(dir)? {
        Some(state) => {
            let boot_id = super::boot_id()?;
            let living = living(&state);
            plan(&state, Present { boot_id: &boot_id, own: ProcessId::own()?, living: &living })
        }
        None => Vec::new(),
    };
    clear(dir, &steps, deadline)
}

/// Does the steps, and removes the directory if all have succeeded.
fn clear(dir: &Path, steps: &[Step], deadline: Instant) -> anyhow::Result<()> {
    let failed = execute(steps, dir, deadline);
    if !failed.is_empty() {
        let failed: Vec<String> = failed.iter().map(|error| format!("{error:#}")).collect();
        anyhow::bail!("{}", failed.join("; "));
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// The steps that would remove a sandbox whose shim is gone; `None` if the shim lives, and has the say. Changes nothing.
///
/// Without a journal there are none: the shim died before it made anything, or is about to begin.
pub fn plan_abandoned(dir: &Path) -> anyhow::Result<Option<Vec<Step>>> {
    let Some(state) = super::read(dir)? else { return Ok(Some(Vec::new())) };
    let boot_id = super::boot_id()?;
    if state.boot_id == boot_id && state.shim.lives() {
        return Ok(None);
    }
    let living = living(&state);
    Ok(Some(plan(&state, Present { boot_id: &boot_id, own: ProcessId::own()?, living: &living })))
}

/// [`run`] for a sandbox whose shim is gone, and what there was to do; `None` if the shim lives: nothing is touched then.
pub fn run_abandoned(dir: &Path) -> anyhow::Result<Option<Vec<Step>>> {
    let deadline = Instant::now() + timeouts::TEARDOWN;
    // Asked under the lock: by now a new shim may have this directory, if somebody else has cleared it.
    let Some(_lock) = Lock::acquire(dir, deadline)? else { return Ok(Some(Vec::new())) };
    let Some(steps) = plan_abandoned(dir)? else { return Ok(None) };
    let there = steps.iter().filter(|step| step.has_work()).cloned().collect();
    clear(dir, &steps, deadline)?;
    Ok(Some(there))
}

/// Processes of the journal that are still the ones that were recorded.
fn living(state: &State) -> Vec<ProcessId> {
    let children = state.entries.iter().filter_map(|entry| match entry {
        Entry::Process { id, .. } => Some(*id),
        _ => None,
    });
    let recorded = children.chain([state.shim]);
    recorded.filter(|id| start_time_of(id.pid) == Some(id.start_time)).collect()
}

/// Does every step and returns what failed.
fn execute(steps: &[Step], dir: &Path, deadline: Instant) -> Vec<anyhow::Error> {
    let mut failed = Vec::new();
    let mut dying = Vec::new();
    for step in steps {
        if let Step::Kill { role, id } = step {
            match kill(*id) {
                Ok(Some(pidfd)) => dying.push((format!("{role} (pid {})", id.pid), pidfd)),
                Ok(None) => {}
                Err(error) => failed.push(error.context(format!("kill {role} (pid {})", id.pid))),
            }
        }
    }
    for (who, pidfd) in &dying {
        if let Err(error) = wait_for_end(pidfd, deadline) {
            failed.push(error.context(format!("wait for the end of {who}")));
        }
    }
    for step in steps {
        let done = match step {
            Step::Kill { .. } => Ok(()),
            Step::Detach(link) => detach(link, deadline),
            Step::RemoveCgroup(path) => remove_cgroup(path, deadline),
            Step::RemoveCgroupParent(path) => remove_cgroup_parent(path),
            Step::RemoveSocket(path) => remove_socket(path),
            Step::RemoveDirectory(path) => remove_directory(path, dir),
            Step::RunHooks { id, bundle } => run_hooks(id, bundle, deadline),
        };
        failed.extend(done.err());
    }
    failed
}

/// Kills the process, if it is still the one that was meant; the file becomes readable when it has ended.
fn kill(id: ProcessId) -> anyhow::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(id.pid) else { return Ok(None) };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    // Looked up after the pidfd was opened: if this is the process now, the pidfd is its as well.
    if start_time_of(id.pid) != Some(id.start_time) {
        return Ok(None);
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => Ok(Some(pidfd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn wait_for_end(pidfd: &OwnedFd, deadline: Instant) -> anyhow::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).context("a deadline is near")?;
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => anyhow::bail!("it did not end within {:?} of SIGKILL", timeouts::TEARDOWN),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Runs the hooks that undo what the creation's did. One that fails does not hold up the rest: it would fail again.
fn run_hooks(id: &str, bundle: &Path, deadline: Instant) -> anyhow::Result<()> {
    let path = bundle.join(SPEC);
    let text = match fs::read(&path) {
        Ok(text) => text,
        // containerd has removed the bundle: nobody knows the hooks any more.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let spec = serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
    let Some(hooks) = Hooks::of_spec(&spec, id, bundle)? else { return Ok(()) };
    let left = deadline.saturating_duration_since(Instant::now());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let ran = runtime.block_on(async { tokio::time::timeout(left, hooks.run(Moment::Stop, None, None)).await });
    match ran {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "a poststop hook failed"),
        Err(_elapsed) => tracing::warn!("poststop hooks were ended for want of time"),
    }
    Ok(())
}

fn detach(link: &Link, deadline: Instant) -> anyhow::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().context("start a runtime")?;
    let detached = runtime.block_on(async { tokio::time::timeout(left, network::detach(link)).await });
    // A thread that netlink never answers must not hold up the rest.
    runtime.shutdown_background();
    detached.with_context(|| format!("detach {} in {}: no answer", link.ifname, link.netns.display()))??;
    Ok(())
}

/// Kills what is in the cgroup `path`, which must be one of ours, and removes it. Safe to call twice.
///
/// A process leaves its cgroup a moment after its end can be seen, and not every hierarchy tells when: so the removal is
/// tried until it works or `deadline` has come.
pub fn remove_cgroup(path: &Path, deadline: Instant) -> anyhow::Result<()> {
    let what = || format!("remove cgroup {}", path.display());
    if !path.exists() {
        return Ok(());
    }
    let kind = rustix::fs::statfs(path).with_context(what)?.f_type;
    anyhow::ensure!(
        [libc::CGROUP_SUPER_MAGIC, libc::CGROUP2_SUPER_MAGIC].contains(&kind),
        "{}: it is not a cgroup",
        what()
    );
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                kill_members(path).with_context(what)?;
                #[allow(clippy::disallowed_methods, reason = "a v1 cgroup has no event for having become empty")]
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error).with_context(what),
        }
    }
}

fn kill_members(cgroup: &Path) -> anyhow::Result<()> {
    let members = || -> anyhow::Result<Vec<i32>> {
        let procs = fs::read_to_string(cgroup.join("cgroup.procs"))?;
        // 0 stands for processes of another pid namespace, which cannot be named from here.
        Ok(procs.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect())
    };
    for pid in members()? {
        let Some(pidfd) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            continue;
        };
        // Still a member once the pidfd is open: then the pidfd is that of the member.
        if members()?.contains(&pid) {
            match pidfd_send_signal(&pidfd, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(errno) => return Err(errno).with_context(|| format!("kill pid {pid}")),
            }
        }
    }
    Ok(())
}

fn remove_cgroup_parent(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(()),
        // Gone, or somebody else's by now.
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ResourceBusy | ErrorKind::DirectoryNotEmpty) =>
        {
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("remove cgroup {}", path.display())),
    }
}

fn remove_socket(path: &Path) -> anyhow::Result<()> {
    let what = || format!("remove socket {}", path.display());
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(what),
        Ok(metadata) => anyhow::ensure!(metadata.file_type().is_socket(), "{}: it is not a socket", what()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(what),
        _ => Ok(()),
    }
}

fn remove_directory(path: &Path, sandbox_dir: &Path) -> anyhow::Result<()> {
    // Whatever a journal says, nothing outside the sandbox's directory is removed with all that is in it.
    let plain = !path.components().any(|part| matches!(part, std::path::Component::ParentDir));
    anyhow::ensure!(
        plain && path.starts_with(sandbox_dir) && path != sandbox_dir,
        "{} is not inside the sandbox's directory {}",
        path.display(),
        sandbox_dir.display()
    );
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::store::Journal;

    /// A process that does nothing, and its identity.
    fn sleeper() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("1000").spawn().expect("sleep starts");
        let pid = child.id().cast_signed();
        (child, ProcessId { pid, start_time: start_time_of(pid).expect("it lives") })
    }

    /// A journal whose shim is a process that has ended.
    fn journal(dir: &Path) -> Journal {
        let (mut dead, id) = sleeper();
        dead.kill().expect("kill");
        dead.wait().expect("wait");
        let mut state = State::new("web", "k8s.io", Path::new("/bundle"), None).expect("a state");
        state.shim = id;
        Journal::create(dir, state).expect("a journal")
    }

    fn qemu(id: ProcessId) -> Entry {
        Entry::Process { role: "QEMU".into(), id }
    }

    #[test]
    fn the_plan_kills_first_and_removes_the_latest_first() {
        let mut state: State = serde_json::from_str(include_str!("testdata/state-1.json")).expect("a state");
        let own = ProcessId { pid: 1, start_time: 1 };
        let all = [state.shim, ProcessId { pid: 101, start_time: 5003 }];
        let steps = plan(&state, Present { boot_id: &state.boot_id, own, living: &all });
        let told: Vec<String> = steps.iter().map(|step| format!("{step:?}")).collect();
        let told: Vec<&str> = told.iter().map(|step| step.split(['(', ' ']).next().unwrap_or_default()).collect();
        let expected =
            ["Kill", "Kill", "RemoveSocket", "RemoveDirectory", "Detach", "RemoveCgroup", "RemoveCgroupParent"];
        assert_eq!(told, expected);
        assert!(matches!(&steps[0], Step::Kill { role, .. } if role == "shim"));

        // Only what lives, and never the caller.
        let shim_only = [state.shim];
        let steps = plan(&state, Present { boot_id: &state.boot_id, own, living: &shim_only });
        assert_eq!(steps.iter().filter(|step| matches!(step, Step::Kill { .. })).count(), 1);
        let steps = plan(&state, Present { boot_id: &state.boot_id, own: state.shim, living: &shim_only });
        assert_eq!(steps.iter().filter(|step| matches!(step, Step::Kill { .. })).count(), 0);

        // After a reboot only files are left of it.
        state.boot_id = "another".into();
        let steps = plan(&state, Present { boot_id: "this", own, living: &all });
        assert!(matches!(steps.as_slice(), [Step::RemoveSocket(_), Step::RemoveDirectory(_)]), "{steps:?}");
    }

    #[test]
    fn processes_files_and_directories_are_gone_afterwards_and_again_is_fine() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        let mut journal = journal(&dir);
        let (mut child, id) = sleeper();
        fs::create_dir_all(dir.join("share/export")).expect("mkdir");
        let socket = root.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("bind");
        let entries = [qemu(id), Entry::Directory { path: dir.join("share") }, Entry::Socket { path: socket.clone() }];
        journal.record_all(entries).expect("records");
        let began = Instant::now();
        run(&dir).expect("tears down");
        assert!(began.elapsed() < timeouts::TEARDOWN, "took {:?}", began.elapsed());
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().expect("wait")), Some(9));
        assert!(!dir.exists() && !socket.exists());
        run(&dir).expect("there is nothing to do");
    }

    #[test]
    fn a_process_that_only_has_the_same_pid_is_spared() {
        let root = tempfile::tempdir().expect("a directory");
        let mut journal = journal(root.path());
        let (mut child, id) = sleeper();
        journal.record(qemu(ProcessId { start_time: id.start_time + 1, ..id })).expect("records");
        run(root.path()).expect("tears down");
        assert!(child.try_wait().expect("wait").is_none(), "a stranger must live");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn many_at_once_do_the_work_once_and_all_succeed() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        let mut journal = journal(&dir);
        let (mut child, id) = sleeper();
        journal.record(qemu(id)).expect("records");
        let results: Vec<_> = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..16).map(|_| scope.spawn(|| run(&dir))).collect();
            runs.into_iter().map(|run| run.join().expect("does not panic")).collect()
        });
        for result in results {
            result.expect("tears down");
        }
        assert!(!dir.exists());
        child.wait().expect("wait");
    }

    #[test]
    fn a_step_that_fails_stops_no_other_and_keeps_the_journal() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        let outside = root.path().join("outside");
        fs::create_dir(&outside).expect("mkdir");
        fs::write(root.path().join("file"), "x").expect("write");
        let mut journal = journal(&dir);
        let (mut child, id) = sleeper();
        let entries = [
            qemu(id),
            Entry::Directory { path: outside.clone() },
            Entry::Directory { path: dir.join("../outside") },
            Entry::Socket { path: root.path().join("file") },
            Entry::Cgroup { path: outside.clone() },
        ];
        journal.record_all(entries).expect("records");
        let error = run(&dir).expect_err("fails").to_string();
        for part in ["is not inside", "is not a socket", "is not a cgroup"] {
            assert!(error.contains(part), "{part} in {error}");
        }
        child.wait().expect("the process is killed all the same");
        assert!(outside.exists() && root.path().join("file").exists());
        assert!(super::super::read(&dir).expect("is readable").is_some(), "the journal stays for the next attempt");
    }

    #[test]
    fn a_network_namespace_that_is_gone_needs_no_detaching() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        let link = Link { netns: root.path().join("netns"), ifname: "eth0".into(), tap: "bhtap2".into() };
        journal(&dir).record(Entry::Link(link)).expect("records");
        run(&dir).expect("tears down");
        assert!(!dir.exists());
    }

    #[test]
    fn a_sandbox_whose_shim_lives_is_not_abandoned() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        let (mut child, id) = sleeper();
        let state = State::new("web", "k8s.io", Path::new("/bundle"), None).expect("a state");
        Journal::create(&dir, state).expect("a journal").record(qemu(id)).expect("records");
        assert_eq!(plan_abandoned(&dir).expect("plans"), None);
        assert_eq!(run_abandoned(&dir).expect("looks"), None);
        assert!(dir.exists() && id.lives());
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn an_abandoned_sandbox_is_removed_and_what_there_was_is_told() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        let (mut child, id) = sleeper();
        let gone = Entry::Socket { path: root.path().join("no-such-socket") };
        journal(&dir).record_all([qemu(id), gone]).expect("records");
        assert_eq!(plan_abandoned(&dir).expect("plans").map(|steps| steps.len()), Some(2));
        assert!(dir.exists() && id.lives(), "a plan changes nothing");
        let waiter = std::thread::spawn(move || child.wait());
        let told = run_abandoned(&dir).expect("tears down").expect("is abandoned");
        assert_eq!(told.iter().map(ToString::to_string).collect::<Vec<_>>(), [format!("process {} (QEMU)", id.pid)]);
        assert!(!dir.exists());
        assert_eq!(run_abandoned(&dir).expect("again"), Some(Vec::new()));
        waiter.join().expect("runs").expect("was killed");
    }

    #[test]
    fn a_directory_without_a_journal_is_removed() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("web-123456");
        fs::create_dir(&dir).expect("mkdir");
        run(&dir).expect("tears down");
        assert!(!dir.exists());
    }

    #[test]
    fn a_cgroup_is_emptied_and_removed() {
        let name = format!("bh-test-{}", std::process::id());
        let candidates = ["/sys/fs/cgroup", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified"];
        let Some(cgroup) = candidates.iter().map(|root| Path::new(root).join(&name)).find(|path| {
            fs::create_dir(path).is_ok() && (path.join("cgroup.procs").exists() || fs::remove_dir(path).is_err())
        }) else {
            println!("skipped: no cgroup can be made here");
            return;
        };
        let (mut child, id) = sleeper();
        fs::write(cgroup.join("cgroup.procs"), id.pid.to_string()).expect("move the process");
        let deadline = Instant::now() + timeouts::TEARDOWN;
        let waiter = std::thread::spawn(move || child.wait());
        remove_cgroup(&cgroup, deadline).expect("removes");
        remove_cgroup(&cgroup, deadline).expect("removes again");
        assert!(!cgroup.exists());
        waiter.join().expect("runs").expect("the member was killed");
    }
}
