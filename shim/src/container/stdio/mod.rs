//! Copies the bytes of one process between where containerd wants them and the guest's streams.
//!
//! Nothing passes through the driver: each stream is a task of its own. Three rules come from containerd
//! (<https://github.com/containerd/containerd/blob/main/docs/runtime-v2.md#io>):
//!
//! - A process is not begun before containerd has opened its ends of the output FIFOs: one that it opens after ours have been
//!   closed would never end.
//! - Output FIFOs are opened for reading as well, so that a restart of containerd, which closes its ends for a while,
//!   neither raises EPIPE nor loses what was written: the writer waits.
//! - A second handle keeps the stdin FIFO open for writing until `CloseIO`, or the first `attach` that leaves would be EOF.
//!
//! Output may also go to a file (`sink`) or to a logging binary of the process's own (`logger`). Where containerd is
//! told to, it takes streams of its own in the place of FIFOs ([`streaming`]).

use std::sync::Arc;

use bulkhead_proto::agent;
use bulkhead_proto::wire::{self, Token};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::logger::Logger;
use self::sink::{Sink, Sinks};
use self::source::Hold;
use self::streaming::Streams;
use self::streaming::output::Presence;
use crate::guest::listener::Listener;
use crate::timeouts;

mod logger;
mod sink;
mod source;
pub mod streaming;

/// Large enough that a stream of log lines costs few system calls, small enough for forty execs at once.
const BUFFER: usize = wire::ONE_PACKET;
/// Capacity of a stdin FIFO: as much as the process's pipe in the guest holds.
const INPUT_BYTES: usize = 1024 * 1024;
/// Capacity of what output goes to. containerd 1.6 closes its FIFO soon after the exit, whatever it still holds: the less the
/// better.
const OUTPUT_BYTES: usize = 256 * 1024;

/// Where a process's bytes come from and go to on the host, as the request names them. Empty means none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// FIFO, or `ttrpc+unix://SOCKET?streaming_id=ID`.
    pub stdin: String,
    /// FIFO, or `file:///PATH`, `binary:///PATH?KEY=VALUE`, `binary-v2:///PATH?KEY=VALUE`,
    /// `ttrpc+unix://SOCKET?streaming_id=ID`.
    pub stdout: String,
    /// As `stdout`, and where that is a file or a binary normally the same; unused with `terminal`.
    pub stderr: String,
    /// The process has a pty.
    pub terminal: bool,
}

/// What a logging binary is told about the process that it serves.
#[derive(Debug, Clone, Copy)]
pub struct Logged<'a> {
    /// Id of the container; of the exec, if it is one: so do loggers know execs from containerd's shim for runc.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
}

/// Bytes passed on so far, and whether the stream has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    bytes: u64,
    ended: bool,
}

/// How far one output is.
#[derive(Debug, Clone)]
struct Outlet {
    progress: watch::Receiver<Progress>,
    /// Of the reader of a stream of containerd's.
    presence: Option<watch::Receiver<Presence>>,
}

/// The running copies of one process. Dropping it stops them.
#[derive(Debug)]
pub struct Stdio {
    stdout: Option<Outlet>,
    stderr: Option<Outlet>,
    /// The output FIFOs, to see whether they have been read.
    looks: Arc<Vec<pipe::Receiver>>,
    /// Kept until `CloseIO`.
    stdin_hold: Option<Hold>,
    stop: CancellationToken,
    copies: JoinSet<()>,
    /// Those whose output the copies are; more than one only if stdout and stderr name different binaries.
    loggers: Vec<Logger>,
}

/// How much output came before an exit, as the guest counted it; see `Exit` in the agent's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputCount {
    /// Bytes of stdout, or of the pty.
    pub stdout: u64,
    /// Bytes of stderr.
    pub stderr: u64,
}

impl Stdio {
    /// Opens the host's ends, starts logging binaries, and starts a copy for each stream; each waits for the guest to dial.
    ///
    /// Returns what the guest must be told. Errors name the path.
    pub async fn open(
        paths: &StdioPaths,
        logged: Logged<'_>,
        listener: &Listener,
        streams: &Streams,
    ) -> anyhow::Result<(Self, agent::Stdio)> {
        let mut told = agent::Stdio { terminal: paths.terminal, ..Default::default() };
        let mut stdio = Self {
            stdout: None,
            stderr: None,
            looks: Arc::default(),
            stdin_hold: None,
            stop: CancellationToken::new(),
            copies: JoinSet::new(),
            loggers: Vec::new(),
        };
        let sinks = Sinks::open(paths, logged, streams).await?;
        stdio.loggers = sinks.loggers;
        stdio.looks = Arc::new(sinks.looks);
        if !paths.stdin.is_empty() {
            let (source, hold) = source::open(&paths.stdin, streams)?;
            let token = new_token();
            let ticket = listener.register(token);
            stdio.stdin_hold = Some(hold);
            told.stdin_token = token.to_vec();
            let stop = stdio.stop.clone();
            stdio.copies.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = source::copy(source, ticket) => {}
                }
            });
        }
        if let Some(sink) = sinks.stdout {
            let (token, outlet) = stdio.copy_out(sink, listener);
            told.stdout_token = token;
            stdio.stdout = Some(outlet);
        }
        if let Some(sink) = sinks.stderr {
            let (token, outlet) = stdio.copy_out(sink, listener);
            told.stderr_token = token;
            stdio.stderr = Some(outlet);
        }
        Ok((stdio, told))
    }

    fn copy_out(&mut self, sink: Sink, listener: &Listener) -> (Vec<u8>, Outlet) {
        let token = new_token();
        let ticket = listener.register(token);
        let (progress, seen) = watch::channel(Progress::default());
        let outlet = Outlet { progress: seen, presence: sink.presence() };
        let stop = self.stop.clone();
        self.copies.spawn(sink::run(sink, ticket, progress, stop));
        (token.to_vec(), outlet)
    }

    /// Lets stdin reach its end: a FIFO once its last writer on containerd's side is gone, a stream when it ends or
    /// breaks.
    pub fn close_stdin(&mut self) {
        self.stdin_hold = None;
    }

    /// A future that ends when `count` bytes were passed on, or the streams have ended, or after [`timeouts::DRAIN`]; and
    /// containerd has read them, or did not within [`timeouts::FIFO_READ`].
    ///
    /// Without `count` (the guest is gone) it waits for the ends of the streams. With `reopens` a containerd that is
    /// away is given [`timeouts::STREAM_REOPEN`] to open its own streams again. True if nothing was given up on.
    pub fn drained(&self, count: Option<OutputCount>, reopens: bool) -> impl Future<Output = bool> + Send + use<> {
        let (stdout, stderr) = (self.stdout.clone(), self.stderr.clone());
        let looks = Arc::clone(&self.looks);
        async move {
            let passed_on = |outlet: Option<Outlet>, bytes| async move {
                match outlet {
                    Some(outlet) => outlet.passed_on(bytes, reopens).await,
                    None => true,
                }
            };
            let (stdout, stderr) =
                tokio::join!(passed_on(stdout, count.map(|c| c.stdout)), passed_on(stderr, count.map(|c| c.stderr)));
            // A containerd that is down reads nothing, and finds it all when it is back.
            drop(timeout(timeouts::FIFO_READ, sink::read_by_containerd(&looks)).await);
            stdout && stderr
        }
    }

    /// Ends every copy, closes the host's ends, and sees the loggers end.
    pub async fn close(mut self) {
        self.stop.cancel();
        while self.copies.join_next().await.is_some() {}
        futures::future::join_all(self.loggers.into_iter().map(Logger::finish)).await;
    }
}

impl Outlet {
    /// See [`Stdio::drained`].
    async fn passed_on(mut self, bytes: Option<u64>, reopens: bool) -> bool {
        if !self.reaches(reopens, |seen| seen.ended || bytes.is_some_and(|bytes| seen.bytes >= bytes)).await {
            return false;
        }
        let Some(presence) = &mut self.presence else { return true };
        // The end of the stream is the one thing that containerd acknowledges, by closing it. It has none while a child
        // in the background holds it.
        if timeout(timeouts::FIFO_READ, presence.wait_for(|presence| presence.at_end)).await.is_err() {
            return true;
        }
        self.reaches(reopens, |seen| seen.ended).await
    }

    /// Waits [`timeouts::DRAIN`] for `reached`; if nobody is there, longer for who may come back, and hardly for who will
    /// not.
    async fn reaches(&mut self, reopens: bool, reached: impl Fn(&Progress) -> bool) -> bool {
        // An error means the copy is gone, which is an end too.
        if timeout(timeouts::FIFO_READ, self.progress.wait_for(&reached)).await.is_ok() {
            return true;
        }
        let away = self.presence.as_ref().is_some_and(|presence| !presence.borrow().connected);
        let patience = match (away, reopens) {
            (false, _) => timeouts::DRAIN,
            (true, true) => timeouts::STREAM_REOPEN,
            (true, false) => return false,
        };
        timeout(patience, self.progress.wait_for(&reached)).await.is_ok()
    }
}

fn new_token() -> Token {
    rand::random()
}

/// Makes a pipe hold a few frames, so that a burst costs fewer turns between its reader and us; it works without as well.
fn widen(pipe: &pipe::Sender, bytes: usize) {
    if let Err(error) = rustix::pipe::fcntl_setpipe_size(pipe, bytes) {
        tracing::debug!(%error, "a pipe keeps its size");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;

    struct Copy {
        progress: watch::Sender<Progress>,
        presence: watch::Sender<Presence>,
    }

    /// A copy to a stream of containerd's that has passed `bytes` on.
    fn copy(bytes: u64, presence: Presence) -> (Copy, Outlet) {
        let (progress, seen) = watch::channel(Progress { bytes, ended: false });
        let (presence, present) = watch::channel(presence);
        (Copy { progress, presence }, Outlet { progress: seen, presence: Some(present) })
    }

    #[tokio::test(start_paused = true)]
    async fn an_exit_waits_until_containerd_has_read_to_the_end() {
        let (copy, outlet) = copy(5, Presence { connected: true, at_end: false });
        let waiting = outlet.passed_on(Some(5), true);
        let begun = Instant::now();
        let (complete, ()) = tokio::join!(waiting, async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            copy.presence.send_modify(|presence| presence.at_end = true);
            tokio::time::sleep(Duration::from_secs(3)).await;
            copy.progress.send_modify(|progress| progress.ended = true);
        });
        assert!(complete);
        assert_eq!(begun.elapsed(), Duration::from_millis(3100));
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_that_holds_the_stream_delays_an_exit_by_half_a_second() {
        let (_copy, outlet) = copy(5, Presence { connected: true, at_end: false });
        let begun = Instant::now();
        assert!(outlet.passed_on(Some(5), true).await);
        assert_eq!(begun.elapsed(), timeouts::FIFO_READ);
    }

    #[tokio::test(start_paused = true)]
    async fn a_containerd_that_is_away_is_waited_for_if_it_will_come_back() {
        let gone = Presence::default();
        let begun = Instant::now();
        let (_exec, outlet) = copy(4, gone);
        assert!(!outlet.passed_on(Some(5), false).await);
        assert_eq!(begun.elapsed(), timeouts::FIFO_READ);
        let (container, outlet) = copy(4, gone);
        let (complete, ()) = tokio::join!(outlet.passed_on(Some(5), true), async {
            tokio::time::sleep(Duration::from_secs(40)).await;
            container.progress.send_modify(|progress| progress.ended = true);
            container.presence.send_modify(|presence| presence.at_end = true);
        });
        assert!(complete);
    }
}
