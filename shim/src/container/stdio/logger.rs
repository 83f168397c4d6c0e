//! A logging binary: reads what one process writes, and does with it what it likes.
//!
//! It is containerd's contract, and nothing of the pod's: whoever made the container names a program of the host, which
//! runs as the shim's own child, in the host's namespaces and with the shim's rights. So it is not spawned on the host
//! thread, as the pod's helpers are, and does not die with the shim: it reads the end of its streams then and ends by itself.
//!
//! See <https://github.com/containerd/containerd/blob/main/docs/runtime-v2.md#logging>.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};
use command_fds::{CommandFdExt, FdMapping};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::time::timeout;

use super::{Logged, OUTPUT_BYTES, widen};
use crate::process::{ChildExit, reserve};
use crate::{sys, timeouts};

/// Numbers of the files that the binary gets.
const STDOUT: i32 = 3;
const STDERR: i32 = 4;
const READY: i32 = 5;

/// What a binary does to its file 5 when it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ready {
    /// `binary://`: it writes a byte, or closes the file.
    ByteOrClose,
    /// `binary-v2://`: it writes a byte.
    Byte,
}

/// A logging binary as a URI names it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Binary {
    path: PathBuf,
    args: Vec<String>,
    ready: Ready,
}

/// Without the arguments, which nobody is to find in a log.
impl std::fmt::Debug for Binary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binary").field("path", &self.path).field("ready", &self.ready).finish_non_exhaustive()
    }
}

impl Binary {
    /// `query` is the URI's, still encoded: its keys and values are the arguments.
    ///
    /// containerd takes them in no certain order, and the first value of a key that comes twice; here the order is the URI's.
    pub(super) fn new(path: PathBuf, query: &str, ready: Ready) -> Self {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            if pairs.iter().all(|(known, _)| *known != key) {
                pairs.push((key.into_owned(), value.into_owned()));
            }
        }
        Self { path, args: pairs.into_iter().flat_map(|(key, value)| [key, value]).collect(), ready }
    }
}

/// The shim's ends of a logger's pipes; a dropped one is the end of that stream.
#[derive(Debug)]
pub(super) struct Ends {
    pub stdout: pipe::Sender,
    pub stderr: pipe::Sender,
}

/// A logging binary that runs. Dropping it kills the process.
#[derive(Debug)]
pub(super) struct Logger {
    path: PathBuf,
    child: Child,
}

impl Logger {
    /// Runs `binary` and returns when it is ready. Errors name it.
    pub(super) async fn start(binary: &Binary, logged: Logged<'_>) -> anyhow::Result<(Self, Ends)> {
        let what = format!("start logging binary {}", binary.path.display());
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).with_context(|| format!("{what}: make a pipe"));
        let ((stdout_reader, stdout), (stderr_reader, stderr), (ready_reader, ready)) = (pipe()?, pipe()?, pipe()?);
        let sender = |end: OwnedFd| -> anyhow::Result<pipe::Sender> {
            let sender = pipe::Sender::from_owned_fd(end).with_context(|| format!("{what}: watch a pipe"))?;
            widen(&sender, OUTPUT_BYTES);
            Ok(sender)
        };
        let ends = Ends { stdout: sender(stdout)?, stderr: sender(stderr)? };
        let ready_reader =
            pipe::Receiver::from_owned_fd(ready_reader).with_context(|| format!("{what}: watch a pipe"))?;

        let mut command = Command::new(&binary.path);
        command
            .args(&binary.args)
            .env_clear()
            .env("CONTAINER_ID", logged.id)
            .env("CONTAINER_NAMESPACE", logged.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Its own, so that whatever it has started can be ended with it.
            .process_group(0);
        let files = vec![(stdout_reader, STDOUT), (stderr_reader, STDERR), (ready, READY)];
        // Fork and exec block, and a blocking thread is in the host's mount namespace as every thread but the host thread is.
        let child = tokio::task::spawn_blocking(move || spawn(command, files))
            .await
            .with_context(|| what.clone())?
            .with_context(|| what.clone())?;
        let mut logger = Self { path: binary.path.clone(), child };
        logger.ready(ready_reader, binary.ready).await?;
        Ok((logger, ends))
    }

    async fn ready(&mut self, mut file: pipe::Receiver, sign: Ready) -> anyhow::Result<()> {
        let name = format!("logging binary {}", self.path.display());
        let mut byte = [0];
        let read = timeout(timeouts::LOGGER_READY, file.read(&mut byte))
            .await
            .map_err(|_elapsed| anyhow!("{name} was not ready within {:?}", timeouts::LOGGER_READY))?
            .with_context(|| format!("{name}: wait until it is ready"))?;
        if read > 0 {
            return Ok(());
        }
        if self.has_no_files() {
            match timeout(timeouts::CHILD_EXIT, self.child.wait()).await {
                Ok(Ok(status)) => bail!("{name} {} before it was ready", ChildExit::from(status)),
                _ => bail!("{name} ended before it was ready"),
            }
        }
        if sign == Ready::Byte {
            bail!("{name} closed file {READY} without the byte by which binary-v2:// knows that it is ready");
        }
        Ok(())
    }

    /// True once the process is ending: a process lets go of its table of files before it closes them, and is a zombie only
    /// after. So when a pipe has reached its end, this tells whether that was a close or the process's end.
    fn has_no_files(&self) -> bool {
        let Some(pid) = self.child.id() else { return true };
        // Of a process that has gone altogether nothing can be read.
        std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(true, |mut files| !files.any(|file| file.is_ok()))
    }

    /// Sees the process end, once its streams have: by itself, by SIGTERM, or in the end by SIGKILL.
    ///
    /// containerd's shim sends SIGTERM at once; a logger that knows no signals would lose what it has not read yet.
    pub(super) async fn finish(mut self) {
        let name = self.path.display().to_string();
        let mut ended = timeout(timeouts::LOGGER_END, self.child.wait()).await;
        if ended.is_err() {
            self.signal(Signal::TERM);
            ended = timeout(timeouts::LOGGER_TERM, self.child.wait()).await;
        }
        if ended.is_err() {
            tracing::warn!(name, "a logging binary does not end and is killed");
            self.signal(Signal::KILL);
            ended = timeout(timeouts::CHILD_EXIT, self.child.wait()).await;
        }
        match ended {
            Ok(Ok(status)) if status.success() => {}
            Ok(Ok(status)) => tracing::warn!(name, "a logging binary {}", ChildExit::from(status)),
            Ok(Err(error)) => tracing::warn!(name, %error, "a logging binary cannot be waited for"),
            Err(_elapsed) => tracing::warn!(name, "a logging binary outlives SIGKILL"),
        }
    }

    /// Signals it and all that it has started. Nothing happens once it has been reaped: its id may be another's.
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()))
            && let Err(error) = rustix::process::kill_process_group(pid, signal)
        {
            tracing::debug!(%error, "a logging binary cannot be signalled");
        }
    }
}

/// Forks and executes; `files` go to the child under their numbers, and nothing else of the shim's does.
fn spawn(mut command: Command, files: Vec<(OwnedFd, i32)>) -> anyhow::Result<Child> {
    let reserved = reserve(&files)?;
    sys::before_exec(&mut command, || sys::close_on_exec_from(3));
    command.fd_mappings(files.into_iter().map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect())?;
    let child = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
    drop(reserved);
    Ok(child)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::time::{Duration, Instant};
    use tokio::io::AsyncWriteExt;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn shell(script: &str, ready: Ready) -> Binary {
        Binary { path: "/bin/sh".into(), args: vec!["-c".into(), script.into()], ready }
    }

    async fn start(binary: &Binary) -> anyhow::Result<(Logger, Ends)> {
        timeout(PATIENCE, Logger::start(binary, Logged { id: "a", namespace: "space" })).await.expect("in time")
    }

    async fn refused(binary: &Binary) -> String {
        format!("{:#}", start(binary).await.expect_err("is refused"))
    }

    fn read(dir: &Path, name: &str) -> String {
        std::fs::read_to_string(dir.join(name)).expect("reads")
    }

    #[test]
    fn arguments_are_the_query_decoded_in_its_order_and_stay_out_of_logs() {
        let binary = Binary::new("/bin/log".into(), "b=1+2&a=%2Fx%26y&b=3&flag", Ready::Byte);
        assert_eq!(binary.args, ["b", "1 2", "a", "/x&y", "flag", ""]);
        assert_eq!(format!("{binary:?}"), "Binary { path: \"/bin/log\", ready: Byte, .. }");
    }

    #[tokio::test]
    async fn a_logger_gets_both_streams_two_variables_and_nothing_else() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let at = dir.path().display();
        let script = format!(
            "ls /proc/self/fd | tr '\\n' ' ' >{at}/files; tr '\\0' '\\n' </proc/$$/environ | sort >{at}/env\n\
             readlink /proc/self/ns/mnt >{at}/mnt; printf x >&5; exec 5>&-; cat <&3 >{at}/out; cat <&4 >{at}/err"
        );
        let (logger, mut ends) = start(&shell(&script, Ready::Byte)).await.expect("starts");
        ends.stdout.write_all(b"to out\n").await.expect("writes");
        ends.stderr.write_all(b"to err\n").await.expect("writes");
        drop(ends);
        timeout(PATIENCE, logger.finish()).await.expect("ends with its streams");
        assert_eq!((read(dir.path(), "out").as_str(), read(dir.path(), "err").as_str()), ("to out\n", "to err\n"));
        assert_eq!(read(dir.path(), "env"), "CONTAINER_ID=a\nCONTAINER_NAMESPACE=space\n");
        // 6 is the directory that `ls` itself reads.
        assert_eq!(read(dir.path(), "files"), "0 1 2 3 4 5 6 ");
        let own = std::fs::read_link("/proc/self/ns/mnt").expect("reads");
        assert_eq!(read(dir.path(), "mnt").trim(), own.to_str().expect("is text"));
    }

    #[tokio::test]
    async fn a_closed_file_5_is_ready_for_binary_and_not_for_binary_v2() {
        let script = "exec 5>&-; cat <&3 >/dev/null";
        let (logger, ends) = start(&shell(script, Ready::ByteOrClose)).await.expect("starts");
        drop(ends);
        logger.finish().await;
        assert_eq!(
            refused(&shell(script, Ready::Byte)).await,
            "logging binary /bin/sh closed file 5 without the byte by which binary-v2:// knows that it is ready"
        );
    }

    #[tokio::test]
    async fn a_logger_that_is_missing_or_ends_at_once_is_told_in_a_sentence() {
        let missing = Binary::new("/nonexistent/logger".into(), "token=secret", Ready::ByteOrClose);
        assert_eq!(
            refused(&missing).await,
            "start logging binary /nonexistent/logger: No such file or directory (os error 2)"
        );
        for ready in [Ready::ByteOrClose, Ready::Byte] {
            assert_eq!(
                refused(&shell("exit 3", ready)).await,
                "logging binary /bin/sh exited with status 3 before it was ready"
            );
        }
    }

    #[tokio::test]
    async fn a_logger_that_ignores_the_end_of_its_streams_is_terminated() {
        let script = "exec 5>&-; sleep 1000";
        let (logger, ends) = start(&shell(script, Ready::ByteOrClose)).await.expect("starts");
        let pid = logger.child.id().expect("runs");
        drop(ends);
        let begun = Instant::now();
        logger.finish().await;
        assert!(begun.elapsed() >= timeouts::LOGGER_END && begun.elapsed() < timeouts::LOGGER_TERM, "{begun:?}");
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "is reaped");
    }

    #[tokio::test]
    async fn a_dropped_logger_is_killed() {
        let (logger, _ends) = start(&shell("exec 5>&-; exec sleep 1000", Ready::ByteOrClose)).await.expect("starts");
        let pid = Pid::from_raw(logger.child.id().expect("runs").cast_signed()).expect("is a pid");
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK).expect("opens");
        let ended = sys::watch(pidfd).expect("watches");
        drop(logger);
        let _ended = timeout(PATIENCE, ended.readable()).await.expect("in time").expect("is watched");
    }
}
