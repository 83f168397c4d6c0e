//! A supervised child of the shim: QEMU, virtiofsd, the vsock helper.
//!
//! It is born confined (user, capabilities, namespaces, limits, system-call filter, cgroups; all set between fork and exec),
//! gets its files by number, dies with the shim, and its end is seen at once. What the program is for, its user knows.
//!
//! See `pidfd_open(2)`, prctl(2) `PR_SET_PDEATHSIG`.

mod config;
mod confine;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use anyhow::Context;
use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

pub use self::config::{ChildConfig, Credentials, DeviceNode, Namespaces};
use self::confine::{Confine, Step};
use crate::host::HostThread;
use crate::tail::Tail;
use crate::{sys, timeouts};

/// How much of a child's stderr is kept.
const STDERR_TAIL: usize = 16 << 10;
/// Capacity of a pipe (pipe(7)).
const PIPE_BYTES: usize = 64 << 10;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildExit {
    /// It returned this status.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
    /// Somebody else took the status.
    Unknown,
}

impl fmt::Display for ChildExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Signaled(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "was ended by signal {signal} ({name})"),
                Err(_) => write!(f, "was ended by signal {signal}"),
            },
            Self::Unknown => f.write_str("ended with an unknown status"),
        }
    }
}

impl From<ExitStatus> for ChildExit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, Some(signal)) => Self::Signaled(signal),
            (None, None) => Self::Unknown,
        }
    }
}

/// A running, or ended, child. Dropping it kills the process.
#[derive(Debug)]
pub struct Child {
    role: &'static str,
    pid: Pid,
    start_time: u64,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    exit: watch::Receiver<Option<ChildExit>>,
    stderr: Tail,
    tasks: TaskTracker,
    /// The process ends with the thread that made it.
    _host: HostThread,
}

impl Child {
    /// Starts a process from the host thread, so that it ends with the shim at the latest.
    ///
    /// The error names the step that failed and the program. Not cancel safe: a process whose caller went away is killed
    /// as soon as it is there.
    pub async fn spawn(host: &HostThread, config: ChildConfig) -> anyhow::Result<Self> {
        let role = config.role;
        let oom_score_adj = config.oom_score_adj;
        let born = host.run(move || Born::spawn(config)).await?;
        if let Some(value) = oom_score_adj {
            let path = format!("/proc/{}/oom_score_adj", born.pid.as_raw_nonzero());
            if let Err(error) = tokio::fs::write(&path, value.to_string()).await {
                tracing::debug!(%error, path, value, "oom_score_adj is not accepted here");
            }
        }
        born.supervise(role, host.clone())
    }

    /// Process id on the host.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Start time as in [`start_time_of`]; with the pid it names this process for ever.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// What the child is to us.
    pub fn role(&self) -> &'static str {
        self.role
    }

    /// Becomes `Some` when the process has ended, been reaped, and its stderr read.
    pub fn exited(&self) -> watch::Receiver<Option<ChildExit>> {
        self.exit.clone()
    }

    /// Waits for the end; no deadline of its own. Cancel safe.
    pub async fn wait(&self) -> ChildExit {
        let mut exit = self.exit.clone();
        // The sender is gone without a value only if the runtime is shutting down.
        exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).unwrap_or(ChildExit::Unknown)
    }

    /// The end of its stderr, made harmless.
    pub fn stderr_tail(&self) -> String {
        self.stderr.text()
    }

    /// One sentence about an end that nobody asked for: how, and the end of stderr.
    pub fn obituary(&self) -> String {
        let exit = self.exit.borrow().map_or_else(|| "is running".to_owned(), |exit| exit.to_string());
        let said = self.stderr.line(600);
        if said.is_empty() { format!("{} {exit}", self.role) } else { format!("{} {exit}: {said}", self.role) }
    }

    /// Sends SIGKILL and waits for the end. Safe to call again, and when the process has ended long ago.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.signal(Signal::KILL)?;
        tokio::time::timeout(timeouts::CHILD_EXIT, self.wait()).await.with_context(|| {
            format!("{} (pid {}) did not end within {:?} of SIGKILL", self.role, self.pid(), timeouts::CHILD_EXIT)
        })?;
        self.tasks.wait().await;
        Ok(())
    }

    /// Sends `signal`; nothing happens if the process has ended.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("signal {} (pid {})", self.role, self.pid())),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The supervisor outlives this handle by the moment that the kernel takes to end the process, and reaps it.
        if let Err(error) = self.signal(Signal::KILL) {
            tracing::warn!(role = self.role, error = format!("{error:#}"), "a child could not be killed");
        }
    }
}

/// When the process `pid` started, in clock ticks after boot: field 22 of `/proc/<pid>/stat` (proc(5)). `None`: there is none.
pub fn start_time_of(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything, so counting begins after the last one.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Whether process `pid` is there and has not ended: one that has, and was not reaped yet, still has its number.
pub fn has_not_ended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().next());
    state.is_some_and(|state| !matches!(state, "Z" | "X"))
}

/// A process that has executed its program and is not supervised yet; dropping it ends the process.
struct Born {
    pid: Pid,
    start_time: u64,
    pidfd: Option<OwnedFd>,
    stderr: OwnedFd,
}

impl Drop for Born {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.pidfd {
            // Both fail only when there is nothing left to do.
            let _ended = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
            let _reaped = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        }
    }
}

impl Born {
    /// Forks and executes; blocks until the program is executed or an error is known.
    fn spawn(mut config: ChildConfig) -> anyhow::Result<Self> {
        let what = format!("start {} {}", config.role, config.program.display());
        let failed_step = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?);
        let mut command = Command::new(&config.program);
        command.args(&config.args).env_clear().envs(config.env.iter().map(|(key, value)| (key, value)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        if let Some(cwd) = &config.cwd {
            command.current_dir(cwd);
        }
        let fds = std::mem::take(&mut config.fds);
        let reserved = reserve(&fds)?;
        let confine = Arc::new(Confine::new(config)?);

        // Three hooks, in this order: what needs the shim's rights and files, the files, and the loss of the rights.
        let (first, step) = (confine.clone(), failed_step.clone());
        sys::before_exec(&mut command, move || first.with_rights().map_err(|failure| failure.report(&step)));
        let mappings = fds.into_iter().map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
        command.fd_mappings(mappings).with_context(|| format!("{what}: a file number is given twice"))?;
        let step = failed_step.clone();
        sys::before_exec(&mut command, move || confine.without_rights().map_err(|failure| failure.report(&step)));

        let spawned = command.spawn();
        drop((command, reserved));
        let child = spawned.map_err(|error| {
            let step = Step::failed(&failed_step).map_or("execute it", Step::told);
            anyhow::Error::new(error).context(format!("{what}: {step}"))
        })?;
        let pid = Pid::from_child(&child);
        let stderr = child.stderr.context("a piped stderr is there")?.into();
        // Nobody has waited for the child yet, so the pid cannot have been given to another process.
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).with_context(|| format!("{what}: pidfd"))?;
        let start_time = start_time_of(pid.as_raw_nonzero().get()).with_context(|| format!("{what}: no start time"))?;
        Ok(Self { pid, start_time, pidfd: Some(pidfd), stderr })
    }

    fn supervise(mut self, role: &'static str, host: HostThread) -> anyhow::Result<Child> {
        let stderr = self.stderr.try_clone().context("stderr")?;
        rustix::io::ioctl_fionbio(&stderr, true).context("stderr")?;
        let stderr = pipe::Receiver::from_owned_fd(stderr).context("watch stderr")?;
        let pidfd = self.pidfd.take().context("a born process has a pidfd")?;
        let pidfd = Arc::new(sys::watch(pidfd).context("watch pidfd")?);
        let (sender, exit) = watch::channel(None);
        let tail = Tail::new(STDERR_TAIL);
        let tasks = TaskTracker::new();
        tasks.spawn(supervise(pidfd.clone(), stderr, tail.clone(), sender));
        tasks.close();
        Ok(Child { role, pid: self.pid, start_time: self.start_time, pidfd, exit, stderr: tail, tasks, _host: host })
    }
}

/// Reads stderr until the process ends, then reaps it and tells.
async fn supervise(
    pidfd: Arc<AsyncFd<OwnedFd>>,
    stderr: pipe::Receiver,
    tail: Tail,
    exit: watch::Sender<Option<ChildExit>>,
) {
    let mut open = true;
    loop {
        tokio::select! {
            ended = pidfd.readable() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a child cannot be watched");
                }
                break;
            }
            readable = stderr.readable(), if open => open = readable.is_ok() && drain(&stderr, &tail),
        }
    }
    // What it wrote last is in the pipe already. A process of its own that still holds the pipe is not waited for.
    // The file itself is asked, since the runtime may not have heard yet that there is more; a pipe holds 64 KiB.
    let mut buffer = [0; 4096];
    for _ in 0..PIPE_BYTES.div_ceil(buffer.len()) {
        match rustix::io::read(&stderr, &mut buffer) {
            Ok(read) if read > 0 => tail.push(&buffer[..read]),
            _ => break,
        }
    }
    let status =
        rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    let ended = match status {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(status), _) => ChildExit::Exited(status),
            (None, Some(signal)) => ChildExit::Signaled(signal),
            (None, None) => ChildExit::Unknown,
        },
        Ok(None) | Err(_) => ChildExit::Unknown,
    };
    exit.send_replace(Some(ended));
}

/// Reads what is there, at most a little more than the tail keeps; false at the end of the stream.
fn drain(stderr: &pipe::Receiver, tail: &Tail) -> bool {
    let mut buffer = [0; 4096];
    for _ in 0..STDERR_TAIL.div_ceil(buffer.len()) {
        match stderr.try_read(&mut buffer) {
            Ok(0) => return false,
            Ok(read) => tail.push(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
    true
}

/// Keeps a child's file numbers busy in the shim while it forks; the result is to live as long.
///
/// `std::process` tells an error between fork and exec through a pipe of its own; were that pipe to get one of the numbers
/// that the child's files move to, an error would go into such a file and be lost.
pub(crate) fn reserve(fds: &[(OwnedFd, RawFd)]) -> anyhow::Result<Vec<OwnedFd>> {
    let mut reserved = Vec::new();
    for (fd, number) in fds {
        let copy =
            rustix::io::fcntl_dupfd_cloexec(fd, *number).with_context(|| format!("reserve file number {number}"))?;
        // Another number means that this one is taken by a file of the shim, which does as well.
        if copy.as_raw_fd() == *number {
            reserved.push(copy);
        }
    }
    Ok(reserved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    pub(super) fn host() -> HostThread {
        HostThread::start(|| Ok(())).expect("starts")
    }

    pub(super) fn shell(script: &str) -> ChildConfig {
        let mut config = ChildConfig::new("shell", "/bin/sh", Credentials::unprivileged(61_234, 61_235));
        config.args = vec!["-c".into(), script.into()];
        config
    }

    pub(super) async fn run(config: ChildConfig) -> (ChildExit, String) {
        let child = Child::spawn(&host(), config).await.expect("spawns");
        let exit = tokio::time::timeout(Duration::from_secs(20), child.wait()).await.expect("ends");
        (exit, child.stderr_tail())
    }

    #[tokio::test]
    async fn exit_status_and_last_words_are_kept() {
        let (exit, said) = run(shell("echo so long >&2; exit 7")).await;
        assert_eq!((exit, said.as_str()), (ChildExit::Exited(7), "so long\n"));
    }

    #[tokio::test]
    async fn a_child_that_floods_stderr_costs_no_more_than_the_tail() {
        let (exit, said) = run(shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; echo end >&2")).await;
        assert_eq!(exit, ChildExit::Exited(0));
        assert_eq!(said.len(), STDERR_TAIL);
        assert!(said.ends_with("xend\n"));
    }

    #[tokio::test]
    async fn files_arrive_under_their_numbers_and_no_others() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
        let mut config = shell("echo through 9 >&9; ls /proc/self/fd >&2");
        config.fds = vec![(writer, 9)];
        let (_, said) = run(config).await;
        let mut buffer = [0; 64];
        let read = rustix::io::read(&reader, &mut buffer).expect("reads");
        assert_eq!(&buffer[..read], b"through 9\n");
        // 3 is the directory that `ls` itself reads.
        assert_eq!(said.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3", "9"]);
    }

    #[tokio::test]
    async fn a_program_that_is_missing_is_named() {
        let config = ChildConfig::new("QEMU", "/nonexistent/qemu", Credentials::unprivileged(61_234, 61_234));
        let error = Child::spawn(&host(), config).await.expect_err("fails");
        assert_eq!(
            format!("{error:#}"),
            "start QEMU /nonexistent/qemu: execute it: No such file or directory (os error 2)"
        );
    }

    #[tokio::test]
    async fn kill_ends_and_reaps_and_may_be_repeated() {
        let child = Child::spawn(&host(), shell("while :; do sleep 1; done")).await.expect("spawns");
        assert_eq!(start_time_of(child.pid()), Some(child.start_time()));
        child.kill().await.expect("kills");
        assert_eq!(*child.exited().borrow(), Some(ChildExit::Signaled(9)));
        assert_eq!(start_time_of(child.pid()), None, "no zombie is left");
        child.kill().await.expect("is safe to repeat");
        assert_eq!(child.obituary(), "shell was ended by signal 9 (SIGKILL)");
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed() {
        let child = Child::spawn(&host(), shell("while :; do sleep 1; done")).await.expect("spawns");
        let mut exit = child.exited();
        drop(child);
        let ended = tokio::time::timeout(timeouts::CHILD_EXIT, exit.wait_for(Option::is_some)).await.expect("in time");
        assert_eq!(*ended.expect("is told"), Some(ChildExit::Signaled(9)));
    }
}
