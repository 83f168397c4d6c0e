//! The bytes of one process: pipes or a pty in the guest on one side, framed vsock streams on the other.
//!
//! Owned by the process it belongs to. Each stream is a connection of its own, opened by the guest and named by a token
//! (`bulkhead_proto::wire`). Exits never wait for streams: [`Output::settle`] takes what a process had written when it was
//! reaped and says how much that was, while a background child may go on holding the pipe.

mod carrier;
mod channel;
mod input;
mod output;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent as api;
use bulkhead_proto::wire::Token;
use rustix::fs::OFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::carrier::Carrier;
use self::input::Input;
use self::output::Output;
use crate::error::{During, Error, Result};
use crate::idmap::Owner;
use crate::link::Host;
use crate::sys;

/// Capacity of a process's pipes.
const PIPE_BYTES: usize = 1024 * 1024;
/// How long the host may take to receive the rest of the streams of a process that is deleted.
const CLOSED: Duration = Duration::from_secs(5);

/// Tokens of a process's streams; `None` is /dev/null.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The process runs on a pty.
    pub terminal: bool,
    /// Initial size of the pty, rows and columns.
    pub size: Option<(u16, u16)>,
    stdin: Option<Token>,
    stdout: Option<Token>,
    stderr: Option<Token>,
}

impl Plan {
    /// Checks a request's tokens.
    pub fn parse(stdio: Option<api::Stdio>) -> Result<Self> {
        let stdio = stdio.unwrap_or_default();
        let token = |name: &str, bytes: &[u8]| match bytes.len() {
            0 => Ok(None),
            _ => Token::try_from(bytes)
                .map(Some)
                .map_err(|_| Error::invalid(format!("{name} token has {} bytes, expected 16 or none", bytes.len()))),
        };
        let plan = Self {
            terminal: stdio.terminal,
            size: window_size(stdio.height, stdio.width),
            stdin: token("stdin", &stdio.stdin_token)?,
            stdout: token("stdout", &stdio.stdout_token)?,
            stderr: token("stderr", &stdio.stderr_token)?,
        };
        if plan.terminal && plan.stderr.is_some() {
            return Err(Error::invalid("a process with a terminal has no stderr stream of its own"));
        }
        Ok(plan)
    }
}

/// Rows and columns, unless both are zero.
pub fn window_size(height: u32, width: u32) -> Option<(u16, u16)> {
    (height != 0 || width != 0).then(|| (height.min(u16::MAX.into()) as u16, width.min(u16::MAX.into()) as u16))
}

/// The process's ends of its pipes, in the order of the descriptors; none with a terminal.
#[derive(Debug)]
pub struct Child(pub Vec<OwnedFd>);

/// The agent's ends, before the process runs.
#[derive(Debug, Default)]
pub struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Makes the pipes that `plan` asks for, of the process's user so that it may reopen `/dev/stdout`.
pub fn open(plan: &Plan, owner: Owner) -> Result<(Child, Ends)> {
    if plan.terminal {
        return Ok((Child(Vec::new()), Ends::default()));
    }
    let mut child = Vec::with_capacity(3);
    let mut ends = Ends::default();
    let null = |flags| {
        rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, rustix::fs::Mode::empty()).during(|| "open /dev/null")
    };
    let pipe = || -> Result<(OwnedFd, OwnedFd)> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during(|| "make a pipe")?;
        let (owner, group) = (rustix::fs::Uid::from_raw(owner.uid), rustix::fs::Gid::from_raw(owner.gid));
        rustix::fs::fchown(&read, Some(owner), Some(group)).during(|| "give a pipe to the process's user")?;
        Ok((read, write))
    };
    if plan.stdin.is_some() {
        let (read, write) = pipe()?;
        rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES).during(|| "size a pipe")?;
        child.push(read);
        ends.stdin = Some(write);
    } else {
        child.push(null(OFlags::RDONLY)?);
    }
    for (wanted, end) in [(plan.stdout, &mut ends.stdout), (plan.stderr, &mut ends.stderr)] {
        if wanted.is_some() {
            let (read, write) = pipe()?;
            // A burst then costs fewer turns between the process and the agent; the kernel takes pages as they fill.
            rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES).during(|| "size a pipe")?;
            child.push(write);
            *end = Some(read);
        } else {
            child.push(null(OFlags::WRONLY)?);
        }
    }
    Ok((Child(child), ends))
}

/// The running streams of one process.
pub struct Streams {
    stdout: Option<Arc<Output>>,
    stderr: Option<Arc<Output>>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    pumps: TaskTracker,
    /// What comes from now on is not sent.
    abandon: CancellationToken,
    /// Nothing is sent any more.
    cut: CancellationToken,
}

impl Streams {
    /// Connects the streams of `plan` and has `carrier` move bytes until each ends. `terminal` is the master of the process's
    /// pty.
    pub fn run(plan: &Plan, ends: Ends, terminal: Option<OwnedFd>, host: &Host, carrier: &Carrier) -> Result<Self> {
        let _carried = carrier.enter();
        let watch = |fd: OwnedFd| -> Result<Arc<AsyncFd<OwnedFd>>> {
            set_nonblocking(&fd)?;
            sys::watch(fd, Interest::READABLE | Interest::WRITABLE).map(Arc::new).during(|| "watch a stream")
        };
        let terminal = terminal.map(watch).transpose()?;
        let mut streams = Self {
            stdout: None,
            stderr: None,
            terminal,
            pumps: TaskTracker::new(),
            abandon: CancellationToken::new(),
            cut: CancellationToken::new(),
        };
        let stdin = ends.stdin.map(watch).transpose()?.or_else(|| streams.terminal.clone());
        let stdout = ends.stdout.map(watch).transpose()?.or_else(|| streams.terminal.clone());
        let stderr = ends.stderr.map(watch).transpose()?;

        let is_pipe = streams.terminal.is_none();
        if let (Some(token), Some(fd)) = (plan.stdin, stdin) {
            let (host, abandon, input) = (host.clone(), streams.abandon.clone(), Input::new(fd, is_pipe));
            streams.pumps.spawn(async move {
                tokio::select! {
                    ended = input.pump(&host, token) => report("stdin", ended),
                    () = abandon.cancelled() => {}
                }
            });
        }
        let pump_output = |name: &'static str, token: Option<Token>, fd: Option<Arc<AsyncFd<OwnedFd>>>| {
            let output = Arc::new(Output::new(fd?, is_pipe));
            let (host, abandon, source) = (host.clone(), streams.abandon.clone(), Arc::clone(&output));
            let cut = streams.cut.clone();
            streams.pumps.spawn(async move {
                if let Some(token) = token {
                    tokio::select! {
                        ended = source.pump(&host, token, &abandon) => report(name, ended),
                        () = cut.cancelled() => return,
                    }
                }
                tokio::select! {
                    () = source.discard() => {}
                    () = abandon.cancelled() => {}
                }
            });
            Some(output)
        };
        streams.stdout = pump_output("stdout", plan.stdout, stdout);
        streams.stderr = pump_output("stderr", plan.stderr, stderr);
        streams.pumps.close();
        if let Some((rows, columns)) = plan.size {
            streams.resize(rows, columns)?;
        }
        Ok(streams)
    }

    /// Sets the pty's size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let terminal = self.terminal.as_ref().ok_or_else(|| Error::precondition("the process has no terminal"))?;
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal.get_ref(), size).during(|| "resize the pty")
    }

    /// Takes what the reaped process had written and returns the totals of stdout and stderr.
    pub fn settle(&self) -> (u64, u64) {
        let total = |output: &Option<Arc<Output>>| output.as_ref().map_or(0, |output| output.settle());
        (total(&self.stdout), total(&self.stderr))
    }

    /// Ends every stream: what was settled is still sent, within a deadline; what comes later is not.
    pub async fn close(&self) {
        self.abandon.cancel();
        if tokio::time::timeout(CLOSED, self.pumps.wait()).await.is_err() {
            tracing::warn!("the host did not take a stream to its end");
            self.cut.cancel();
            self.pumps.wait().await;
        }
    }
}

fn report(stream: &'static str, ended: io::Result<()>) {
    if let Err(error) = ended {
        tracing::warn!(stream, %error, "stream ended early");
    }
}

fn set_nonblocking(fd: &impl AsFd) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd).during(|| "read a stream's flags")?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).during(|| "set a stream's flags")
}
