//! The bytes of one process: pipes or a pty in the guest on one side, raw vsock streams on the other.
//!
//! Owned by the process it belongs to. Each stream is a connection of its own, opened by the guest and named by a token
//! (`bulkhead_proto::wire`). Exits never wait for streams: [`Output::settle`] takes what a process had written when it was
//! reaped and says how much that was, while a background child may go on holding the pipe.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_proto::agent as api;
use bulkhead_proto::wire::{Deframer, END, FRAME_HEADER, Kind, MAX_FRAME, Token, frame_header};
use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::{During, Error, Result};
use crate::link::Host;
use crate::sys;

/// Capacity of a process's pipes.
const PIPE_BYTES: usize = 256 * 1024;
/// What [`Output::settle`] takes at most: a pipe's capacity, however fast a background child writes on.
const SETTLED_AT_MOST: usize = 1024 * 1024;
/// How long the host may take to receive the rest of the streams of a process that is deleted.
const CLOSED: Duration = Duration::from_secs(5);
/// How long a finished sender waits for the receiver to close.
const LINGER: Duration = Duration::from_secs(30);

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

/// Makes the pipes that `plan` asks for, owned by `uid` and `gid` so that the process may reopen `/dev/stdout`.
pub fn open(plan: &Plan, uid: u32, gid: u32) -> Result<(Child, Ends)> {
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
        let (owner, group) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
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
    /// Connects the streams of `plan` and moves bytes until each ends. `terminal` is the master of the process's pty.
    pub fn run(plan: &Plan, ends: Ends, terminal: Option<OwnedFd>, host: &Host) -> Result<Self> {
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

        if let (Some(token), Some(fd)) = (plan.stdin, stdin) {
            let (host, abandon) = (host.clone(), streams.abandon.clone());
            streams.pumps.spawn(async move {
                tokio::select! {
                    ended = pump_in(&host, token, &fd) => report("stdin", ended),
                    () = abandon.cancelled() => {}
                }
            });
        }
        let pump_output = |name: &'static str, token: Option<Token>, fd: Option<Arc<AsyncFd<OwnedFd>>>| {
            let output = Arc::new(Output { fd: fd?, pending: Mutex::default() });
            let (host, abandon, source) = (host.clone(), streams.abandon.clone(), Arc::clone(&output));
            let cut = streams.cut.clone();
            streams.pumps.spawn(async move {
                if let Some(token) = token {
                    tokio::select! {
                        ended = pump_out(&host, token, &source, &abandon) => report(name, ended),
                        () = cut.cancelled() => return,
                    }
                }
                // A process must not block on a stream that nobody takes.
                tokio::select! {
                    () = discard(&source) => {}
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

/// One output of a process: what it wrote, minus what was sent.
struct Output {
    fd: Arc<AsyncFd<OwnedFd>>,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    chunks: VecDeque<Vec<u8>>,
    total: u64,
}

/// What a non-blocking look at an output yields.
enum Look {
    Bytes(usize),
    Nothing,
    End,
}

impl Output {
    /// Reads until the source would block, keeps that for the pump, and returns how much the process has written in all.
    fn settle(&self) -> u64 {
        let mut pending = self.pending();
        let mut settled = 0;
        let mut chunk = vec![0; 16 * 1024];
        while settled < SETTLED_AT_MOST {
            let Look::Bytes(count) = look(&self.fd, &mut chunk) else { break };
            pending.chunks.push_back(chunk[..count].to_vec());
            pending.total += count as u64;
            settled += count;
        }
        pending.total
    }

    /// Waits for bytes; 0 is the end. Cancel safe.
    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(count) = self.take(buffer) {
                return Ok(count);
            }
            let mut ready = self.fd.readable().await?;
            let mut pending = self.pending();
            if !pending.chunks.is_empty() {
                continue;
            }
            match look(&self.fd, buffer) {
                Look::Bytes(count) => {
                    pending.total += count as u64;
                    return Ok(count);
                }
                Look::End => return Ok(0),
                Look::Nothing => ready.clear_ready(),
            }
        }
    }

    /// Moves settled bytes into `buffer`.
    fn take(&self, buffer: &mut [u8]) -> Option<usize> {
        let mut pending = self.pending();
        let chunk = pending.chunks.front_mut()?;
        let count = chunk.len().min(buffer.len());
        buffer[..count].copy_from_slice(&chunk[..count]);
        chunk.drain(..count);
        if chunk.is_empty() {
            pending.chunks.pop_front();
        }
        Some(count)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> Look {
    loop {
        return match rustix::io::read(fd.get_ref(), &mut *buffer) {
            // A pty whose last slave has closed yields EIO.
            Ok(0) | Err(Errno::IO) => Look::End,
            Ok(count) => Look::Bytes(count),
            Err(Errno::AGAIN) => Look::Nothing,
            Err(Errno::INTR) => continue,
            Err(error) => {
                tracing::warn!(%error, "reading a stream failed");
                Look::End
            }
        };
    }
}

/// Sends an output until its end, or until abandoned and nothing settled is left.
async fn pump_out(host: &Host, token: Token, source: &Output, abandon: &CancellationToken) -> io::Result<()> {
    let mut stream = host.dial(Kind::Stream, token).await?;
    let mut frame = vec![0; FRAME_HEADER + MAX_FRAME];
    loop {
        let count = tokio::select! {
            biased;
            () = abandon.cancelled() => source.take(&mut frame[FRAME_HEADER..]).unwrap_or(0),
            read = source.read(&mut frame[FRAME_HEADER..]) => read?,
        };
        if count == 0 {
            break;
        }
        frame[..FRAME_HEADER].copy_from_slice(&frame_header(count));
        stream.write_all(&frame[..FRAME_HEADER + count]).await?;
    }
    stream.write_all(&END).await?;
    // The receiver closes when it has everything; a connection closed earlier could take bytes with it.
    match tokio::time::timeout(LINGER, stream.read(&mut [0; 1])).await {
        Ok(_closed) => Ok(()),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the host did not close the stream")),
    }
}

async fn discard(source: &Output) {
    let mut buffer = vec![0; 4096];
    while source.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}

/// Feeds a process until the end frame, or until the process takes no more.
async fn pump_in(host: &Host, token: Token, sink: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut stream = host.dial(Kind::Stream, token).await?;
    let mut deframer = Deframer::default();
    let mut buffer = vec![0; MAX_FRAME];
    while !deframer.ended() {
        let count = tokio::select! {
            read = stream.read(&mut buffer) => read?,
            // Nobody reads the pipe any more: the host learns it by the connection's end.
            () = closed(sink) => return Ok(()),
        };
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the host closed the stream before its end"));
        }
        let mut input = &buffer[..count];
        while let Some(mut rest) = deframer.next(&mut input).map_err(io::Error::other)? {
            while !rest.is_empty() {
                // The write comes before the wait: `closed` may have taken the readiness that was there.
                match rustix::io::write(sink.get_ref(), rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(Errno::AGAIN) => sink.writable().await?.clear_ready(),
                    Err(Errno::INTR) => {}
                    Err(Errno::PIPE | Errno::IO) => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    Ok(())
}

/// Waits until a pipe has no reader left; for a pty, until its slave side is gone.
async fn closed(sink: &AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut ready) = sink.ready(Interest::WRITABLE).await else { return };
        if ready.ready().is_write_closed() {
            return;
        }
        ready.clear_ready();
    }
}

fn set_nonblocking(fd: &impl AsFd) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd).during(|| "read a stream's flags")?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).during(|| "set a stream's flags")
}
