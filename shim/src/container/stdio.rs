//! Copies the bytes of one process between containerd's FIFOs and the guest's streams.
//!
//! Nothing passes through the driver: each stream is a task of its own. Two rules come from containerd
//! (<https://github.com/containerd/containerd/blob/main/core/runtime/v2/README.md#io>):
//!
//! - Output FIFOs are opened for reading as well, so that a restart of containerd, which closes its ends for a while,
//!   neither raises EPIPE nor loses what was written: the writer waits.
//! - A second handle keeps the stdin FIFO open for writing until `CloseIO`, or the first `attach` that leaves would be EOF.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use bulkhead_proto::agent;
use bulkhead_proto::wire::{self, Deframer, Token};
use tokio::fs;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::guest::listener::{Listener, StreamTicket};
use crate::timeouts;

/// Large enough that a stream of log lines costs few system calls, small enough for forty execs at once.
const BUFFER: usize = wire::ONE_PACKET;
/// Capacity of a stdin FIFO: as much as the process's pipe in the guest holds.
const INPUT_BYTES: usize = 1024 * 1024;
/// Capacity of an output FIFO. containerd 1.6 closes it soon after the exit, whatever it still holds: the less the better.
const OUTPUT_BYTES: usize = 256 * 1024;

/// Where a process's bytes come from and go to on the host, as the request names them. Empty means none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// FIFO.
    pub stdin: String,
    /// FIFO, or `file://PATH`.
    pub stdout: String,
    /// FIFO, or `file://PATH`; empty with `terminal`.
    pub stderr: String,
    /// The process has a pty.
    pub terminal: bool,
}

/// Bytes passed on so far, and whether the stream has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    bytes: u64,
    ended: bool,
}

/// The running copies of one process. Dropping it stops them.
#[derive(Debug)]
pub struct Stdio {
    stdout: Option<watch::Receiver<Progress>>,
    stderr: Option<watch::Receiver<Progress>>,
    /// Kept until `CloseIO`.
    stdin_writer: Option<pipe::Sender>,
    stop: CancellationToken,
    copies: JoinSet<()>,
}

/// How much output came before an exit, as the guest counted it; see `Exit` in the agent's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputCount {
    /// Bytes of stdout, or of the pty.
    pub stdout: u64,
    /// Bytes of stderr.
    pub stderr: u64,
}

enum Sink {
    Pipe(pipe::Sender),
    File(fs::File),
}

impl Sink {
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                // Until it is flushed the data is with a background thread, and must not be counted.
                file.flush().await
            }
        }
    }
}

impl Stdio {
    /// Opens the host's ends and starts a copy for each stream; each waits for the guest to dial.
    ///
    /// Returns what the guest must be told. Errors name the path.
    pub async fn open(paths: &StdioPaths, listener: &Listener) -> anyhow::Result<(Self, agent::Stdio)> {
        let mut told = agent::Stdio { terminal: paths.terminal, ..Default::default() };
        let mut stdio = Self {
            stdout: None,
            stderr: None,
            stdin_writer: None,
            stop: CancellationToken::new(),
            copies: JoinSet::new(),
        };
        if !paths.stdin.is_empty() {
            let (source, writer) = open_source(Path::new(&paths.stdin))?;
            let token = new_token();
            let ticket = listener.register(token);
            stdio.stdin_writer = Some(writer);
            told.stdin_token = token.to_vec();
            let stop = stdio.stop.clone();
            stdio.copies.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = copy_in(source, ticket) => {}
                }
            });
        }
        if !paths.stdout.is_empty() {
            let (token, progress) = stdio.copy_out(open_sink(&paths.stdout).await?, listener);
            told.stdout_token = token;
            stdio.stdout = Some(progress);
        }
        if !paths.stderr.is_empty() && !paths.terminal {
            let (token, progress) = stdio.copy_out(open_sink(&paths.stderr).await?, listener);
            told.stderr_token = token;
            stdio.stderr = Some(progress);
        }
        Ok((stdio, told))
    }

    fn copy_out(&mut self, sink: Sink, listener: &Listener) -> (Vec<u8>, watch::Receiver<Progress>) {
        let token = new_token();
        let ticket = listener.register(token);
        let (progress, seen) = watch::channel(Progress::default());
        let stop = self.stop.clone();
        self.copies.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = copy_out(ticket, sink, &progress) => {}
            }
            progress.send_modify(|progress| progress.ended = true);
        });
        (token.to_vec(), seen)
    }

    /// Lets the stdin FIFO reach EOF once its last writer on containerd's side is gone.
    pub fn close_stdin(&mut self) {
        self.stdin_writer = None;
    }

    /// A future that ends when `count` bytes were passed on, or the streams have ended, or after [`timeouts::DRAIN`].
    ///
    /// Without `count` (the guest is gone) it waits for the ends of the streams. True if nothing was given up on.
    pub fn drained(&self, count: Option<OutputCount>) -> impl Future<Output = bool> + Send + use<> {
        let waits = [(self.stdout.clone(), count.map(|c| c.stdout)), (self.stderr.clone(), count.map(|c| c.stderr))];
        async move {
            let all = async {
                for (progress, bytes) in waits {
                    let Some(mut progress) = progress else { continue };
                    // An error means the copy is gone, which is an end too.
                    drop(progress.wait_for(|seen| seen.ended || bytes.is_some_and(|bytes| seen.bytes >= bytes)).await);
                }
            };
            timeout(timeouts::DRAIN, all).await.is_ok()
        }
    }

    /// Ends every copy and closes the host's ends.
    pub async fn close(mut self) {
        self.stop.cancel();
        while self.copies.join_next().await.is_some() {}
    }
}

fn new_token() -> Token {
    rand::random()
}

/// Opens a stdin FIFO: the end to read, and the handle that keeps it from EOF.
fn open_source(path: &Path) -> anyhow::Result<(pipe::Receiver, pipe::Sender)> {
    let name = || format!("open stdin FIFO {}", path.display());
    let receiver = pipe::OpenOptions::new().open_receiver(path).with_context(name)?;
    let sender = pipe::OpenOptions::new().open_sender(path).with_context(name)?;
    widen(&sender, INPUT_BYTES);
    Ok((receiver, sender))
}

/// Makes a FIFO hold a few frames, so that a burst costs fewer turns between containerd and us; it works without as well.
fn widen(fifo: &pipe::Sender, bytes: usize) {
    if let Err(error) = rustix::pipe::fcntl_setpipe_size(fifo, bytes) {
        tracing::debug!(%error, "a FIFO keeps its size");
    }
}

async fn open_sink(target: &str) -> anyhow::Result<Sink> {
    if let Some(path) = target.strip_prefix("file://") {
        let path = PathBuf::from(path);
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .await
            .with_context(|| format!("open log file {}", path.display()))?;
        return Ok(Sink::File(file));
    }
    if let Some((scheme, _)) = target.split_once("://") {
        bail!("output to {scheme}:// is not supported, expected a FIFO or file://PATH");
    }
    let sender = pipe::OpenOptions::new()
        .read_write(true)
        .open_sender(target)
        .with_context(|| format!("open output FIFO {target}"))?;
    widen(&sender, OUTPUT_BYTES);
    Ok(Sink::Pipe(sender))
}

/// Host to guest, until EOF of the FIFO or until the guest's reader is gone.
async fn copy_in(mut source: pipe::Receiver, ticket: StreamTicket) {
    let Ok(mut stream) = ticket.wait().await.inspect_err(|error| {
        tracing::debug!(error = %format_args!("{error:#}"), "stdin stream was not dialled");
    }) else {
        return;
    };
    // The header stands before the bytes in one buffer, so that a small frame is one write.
    let mut frame = vec![0; wire::FRAME_HEADER + BUFFER];
    loop {
        match source.read(&mut frame[wire::FRAME_HEADER..]).await {
            Ok(0) => break,
            Ok(length) => {
                // What else is there belongs to the same frame: the guest then takes it in one go.
                let held = rustix::io::ioctl_fionread(&source).unwrap_or(0);
                let more = usize::try_from(held).unwrap_or(0).min(wire::MAX_FRAME - length);
                frame[..wire::FRAME_HEADER].copy_from_slice(&wire::frame_header(length + more));
                // The process may have closed its stdin or ended: what is left has no reader.
                if stream.write_all(&frame[..wire::FRAME_HEADER + length]).await.is_err() {
                    return;
                }
                if let Err(error) = copy_exactly(&mut source, &mut stream, more, &mut frame).await {
                    return tracing::debug!(%error, "stdin stream broke");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "stdin FIFO cannot be read");
                break;
            }
        }
    }
    finish_sending(&mut stream).await;
}

/// Moves `left` bytes, piece by piece through `buffer`.
async fn copy_exactly(
    source: &mut pipe::Receiver,
    stream: &mut (impl AsyncWrite + Unpin),
    mut left: usize,
    buffer: &mut [u8],
) -> io::Result<()> {
    while left > 0 {
        let most = left.min(BUFFER);
        let count = source.read(&mut buffer[..most]).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        stream.write_all(&buffer[..count]).await?;
        left -= count;
    }
    Ok(())
}

/// Sends the end and waits, bounded, for the peer's close: so nothing in flight is lost.
async fn finish_sending(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    const PEER_CLOSE: Duration = Duration::from_secs(30);
    if stream.write_all(&wire::END).await.is_ok() {
        let mut rest = [0; 64];
        // The direction is never used, so whatever comes is the peer's close or a peer that does not keep to the rules.
        drop(timeout(PEER_CLOSE, stream.read(&mut rest)).await);
    }
}

/// Guest to host, until the end of the stream.
async fn copy_out(ticket: StreamTicket, mut sink: Sink, progress: &watch::Sender<Progress>) {
    let Ok(mut stream) = ticket.wait().await.inspect_err(|error| {
        tracing::debug!(error = %format_args!("{error:#}"), "output stream was not dialled");
    }) else {
        return;
    };
    let mut buffer = vec![0; BUFFER];
    let mut deframer = Deframer::default();
    let mut sink_is_open = true;
    while !deframer.ended() {
        let length = match stream.read(&mut buffer).await {
            Ok(0) => return tracing::debug!("output stream ended without its end frame"),
            Ok(length) => length,
            Err(error) => return tracing::debug!(%error, "output stream broke"),
        };
        let mut input = &buffer[..length];
        loop {
            let payload = match deframer.next(&mut input) {
                Ok(Some(payload)) => payload,
                Ok(None) => break,
                Err(error) => return tracing::warn!(%error, "the guest's output stream is closed"),
            };
            if sink_is_open && let Err(error) = sink.write_all(payload).await {
                // The process must not stall because its log cannot be written: the rest is dropped, and said once.
                tracing::warn!(%error, "output cannot be written, the rest of it is dropped");
                sink_is_open = false;
            }
            progress.send_modify(|progress| progress.bytes += payload.len() as u64);
        }
    }
}
