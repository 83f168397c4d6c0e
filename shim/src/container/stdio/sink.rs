//! Where a process's output goes on the host: a FIFO or a stream of containerd's, a file, or a logging binary.
//!
//! containerd's URIs and what its own shim does with them:
//! <https://github.com/containerd/containerd/blob/main/docs/runtime-v2.md#logging>.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use bulkhead_proto::wire::Deframer;
use percent_encoding::percent_decode_str;
use rustix::io::Errno;
use tokio::fs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::logger::{Binary, Ends, Logger, Ready};
use super::streaming::Streams;
use super::streaming::output::{Output, Presence};
use super::{BUFFER, Logged, OUTPUT_BYTES, Progress, StdioPaths, widen};
use crate::error::{Error, Result};
use crate::guest::listener::StreamTicket;
use crate::timeouts;

/// What output can be given as, for messages.
const ACCEPTED: &str = "a FIFO, file:///PATH, binary:///PATH?KEY=VALUE, binary-v2:///PATH?KEY=VALUE or \
                        ttrpc+unix://SOCKET?streaming_id=ID";

/// The opened ends of a process's output.
#[derive(Debug, Default)]
pub(super) struct Sinks {
    /// None: nobody wants it.
    pub stdout: Option<Sink>,
    /// None: nobody wants it, or it is a terminal's, which has one stream.
    pub stderr: Option<Sink>,
    /// Whoever reads the sinks that are theirs.
    pub loggers: Vec<Logger>,
    /// The FIFOs among them once more, to be looked at and never read: readers, which keep no end of the output from anyone.
    pub looks: Vec<pipe::Receiver>,
}

#[derive(Debug)]
pub(super) enum Sink {
    Pipe(pipe::Sender),
    File(fs::File),
    Stream(Output),
}

/// What `stdout` or `stderr` of a request says.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    Fifo(PathBuf),
    File(PathBuf),
    Binary(Binary),
    /// Scheme of a URI of another kind, and what stands behind `://`.
    Other(String, String),
}

impl Sinks {
    /// Opens what `paths` says. Where both outputs name the same logging binary, one process serves both.
    pub(super) async fn open(paths: &StdioPaths, logged: Logged<'_>, streams: &Streams) -> anyhow::Result<Self> {
        let stdout = Target::parse(&paths.stdout)?;
        let stderr = match &stdout {
            _ if paths.terminal => None,
            // containerd's shim looks at stdout alone for a URI.
            Some(Target::File(_) | Target::Binary(_)) if paths.stderr.is_empty() => stdout.clone(),
            _ => Target::parse(&paths.stderr)?,
        };
        let mut sinks = Self::default();
        if let Some(Target::Binary(binary)) = &stdout
            && stdout == stderr
        {
            let (logger, ends) = Logger::start(binary, logged).await?;
            sinks.stdout = Some(Sink::Pipe(ends.stdout));
            sinks.stderr = Some(Sink::Pipe(ends.stderr));
            sinks.loggers.push(logger);
            return Ok(sinks);
        }
        sinks.stdout = sinks.open_one(stdout, logged, streams, |ends| ends.stdout).await?;
        sinks.stderr = sinks.open_one(stderr, logged, streams, |ends| ends.stderr).await?;
        Ok(sinks)
    }

    async fn open_one(
        &mut self,
        target: Option<Target>,
        logged: Logged<'_>,
        streams: &Streams,
        end: fn(Ends) -> pipe::Sender,
    ) -> anyhow::Result<Option<Sink>> {
        Ok(Some(match target {
            None => return Ok(None),
            Some(Target::Fifo(path)) => {
                let sink = Sink::fifo(&path, timeouts::FIFO_OPENED).await?;
                let look = pipe::OpenOptions::new().open_receiver(&path);
                self.looks.push(look.with_context(|| format!("open output FIFO {} to look at it", path.display()))?);
                sink
            }
            Some(Target::File(path)) => Sink::file(&path).await?,
            Some(Target::Binary(binary)) => {
                let (logger, ends) = Logger::start(&binary, logged).await?;
                self.loggers.push(logger);
                Sink::Pipe(end(ends))
            }
            Some(Target::Other(scheme, rest)) => match streams.claim_uri(&scheme, &rest)? {
                Some(claim) => Sink::Stream(Output::new(claim)),
                None => {
                    let error = format!("output to {scheme}:// is not supported, expected {ACCEPTED}");
                    return Err(Error::invalid(error).into());
                }
            },
        }))
    }
}

impl Target {
    /// None for an empty text. Errors repeat no query: it may hold secrets.
    fn parse(text: &str) -> Result<Option<Self>> {
        if text.is_empty() {
            return Ok(None);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Some(Self::Fifo(text.into())));
        };
        let rest = rest.split_once('#').map_or(rest, |(rest, _fragment)| rest);
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let ready = match scheme {
            "file" => None,
            "binary" => Some(Ready::ByteOrClose),
            "binary-v2" => Some(Ready::Byte),
            _ => return Ok(Some(Self::Other(scheme.to_owned(), rest.to_owned()))),
        };
        // What stands before the path would be a host, which has no meaning here.
        if !path.starts_with('/') {
            let error = format!("path of {scheme}://{path} is not absolute, expected {scheme}:///PATH");
            return Err(Error::invalid(error));
        }
        let path = PathBuf::from(OsString::from_vec(percent_decode_str(path).collect()));
        Ok(Some(match ready {
            None => Self::File(path),
            Some(ready) => Self::Binary(Binary::new(path, query, ready)),
        }))
    }
}

impl Sink {
    /// Opens a FIFO once containerd has opened its end, or after `patience` without it.
    ///
    /// A reader that comes when the last writer has gone waits for another one for ever, and this end does not wait for
    /// readers: without waiting here, what ends at once would end unseen by a containerd that is short of time.
    async fn fifo(path: &Path, patience: Duration) -> anyhow::Result<Self> {
        let what = || format!("open output FIFO {}", path.display());
        // Kept until the other end for writing is there.
        let opened = timeout(patience, opened_by_reader(path)).await;
        let _writer = match opened {
            Ok(writer) => Some(writer.with_context(what)?),
            Err(_) => {
                tracing::warn!(path = %path.display(), "nobody has opened an output FIFO for reading");
                None
            }
        };
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(path).with_context(what)?;
        widen(&sender, OUTPUT_BYTES);
        Ok(Self::Pipe(sender))
    }

    /// As containerd's shim does it: the directories above are made, and what is in the file stays.
    async fn file(path: &Path) -> anyhow::Result<Self> {
        let name = || format!("open log file {}", path.display());
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).await.with_context(name)?;
        }
        let file = fs::OpenOptions::new().create(true).append(true).mode(0o644).open(path).await.with_context(name)?;
        Ok(Self::File(file))
    }

    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                // Until it is flushed the data is with a background thread, and must not be counted.
                file.flush().await
            }
            Self::Stream(output) => {
                output.write_all(bytes).await;
                Ok(())
            }
        }
    }

    /// Where the reader is; None where nobody need be.
    pub(super) fn presence(&self) -> Option<watch::Receiver<Presence>> {
        match self {
            Self::Stream(output) => Some(output.presence()),
            Self::Pipe(_) | Self::File(_) => None,
        }
    }
}

/// Waits until somebody has a FIFO open for reading, or waits in open(2) to have; opens it for writing.
///
/// No event tells of a reader, so it is tried: see `ENXIO` in fifo(7).
async fn opened_by_reader(path: &Path) -> io::Result<pipe::Sender> {
    const TRY: Duration = Duration::from_millis(2);
    loop {
        match pipe::OpenOptions::new().open_sender(path) {
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => tokio::time::sleep(TRY).await,
            opened => return opened,
        }
    }
}

/// Waits until nobody's output is left in `fifos`. No event tells that a pipe is empty, so it is looked at.
///
/// containerd 1.6 closes its ends some two milliseconds after it has heard of an exit, and loses what it has not read by then.
pub(super) async fn read_by_containerd(fifos: &[pipe::Receiver]) {
    const LOOK: Duration = Duration::from_millis(2);
    for fifo in fifos {
        while rustix::io::ioctl_fionread(fifo).is_ok_and(|held| held > 0) {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Copies until the end of the guest's stream or until `stop`, and then closes `sink`.
pub(super) async fn run(
    mut sink: Sink,
    ticket: StreamTicket,
    progress: watch::Sender<Progress>,
    stop: CancellationToken,
) {
    let copied = stop.run_until_cancelled(copy(ticket, &mut sink, &progress)).await.is_some();
    match sink {
        // Its end is told, and has come when it was read.
        Sink::Stream(mut output) => {
            if copied && stop.run_until_cancelled(output.finish()).await.is_some() {
                progress.send_modify(|progress| progress.ended = true);
                let _ = stop.run_until_cancelled(output.linger()).await;
            }
            output.hang_up().await;
        }
        Sink::Pipe(_) | Sink::File(_) => drop(sink),
    }
    progress.send_modify(|progress| progress.ended = true);
}

/// Guest to host, until the end of the stream.
async fn copy(ticket: StreamTicket, sink: &mut Sink, progress: &watch::Sender<Progress>) {
    let Ok(mut stream) = ticket.wait().await.inspect_err(|error| {
        tracing::warn!(error = %format_args!("{error:#}"), "the output of a process is lost");
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn refused(text: &str) -> String {
        Target::parse(text).expect_err("is refused").to_string()
    }

    #[test]
    fn paths_are_fifos_and_uris_are_decoded() {
        let target = |text| Target::parse(text).expect("parses");
        assert_eq!(target(""), None);
        assert_eq!(target("/run/fifo%20/1-stdout"), Some(Target::Fifo("/run/fifo%20/1-stdout".into())));
        assert_eq!(target("file:///var/log/a%20b"), Some(Target::File("/var/log/a b".into())));
        let binary = |ready| Target::Binary(Binary::new("/bin/log".into(), "a=b", ready));
        assert_eq!(target("binary:///bin/log?a=b"), Some(binary(Ready::ByteOrClose)));
        assert_eq!(target("binary-v2:///bin/log?a=b"), Some(binary(Ready::Byte)));
    }

    async fn not_opened(stdout: &str) -> Error {
        let paths = StdioPaths { stdout: stdout.into(), ..StdioPaths::default() };
        let opened = Sinks::open(&paths, LOGGED, &Streams::new("/run/s/x".into())).await;
        opened.expect_err("is refused").into()
    }

    const LOGGED: Logged<'_> = Logged { id: "a", namespace: "n" };

    #[tokio::test]
    async fn a_refused_uri_is_told_without_its_query() {
        for scheme in ["https", "grpc+unix", "ttrpc+vsock"] {
            let error = not_opened(&format!("{scheme}://example.com/?token=secret")).await;
            assert_eq!(error.kind(), crate::error::Kind::InvalidArgument);
            assert_eq!(
                error.to_string(),
                format!(
                    "output to {scheme}:// is not supported, expected a FIFO, file:///PATH, binary:///PATH?KEY=VALUE, \
                     binary-v2:///PATH?KEY=VALUE or ttrpc+unix://SOCKET?streaming_id=ID"
                )
            );
        }
        assert_eq!(
            not_opened("ttrpc+unix:///run/s/y?streaming_id=a").await.kind(),
            crate::error::Kind::InvalidArgument
        );
        assert_eq!(
            refused("binary://logger?token=secret"),
            "path of binary://logger is not absolute, expected binary:///PATH"
        );
    }

    #[tokio::test]
    async fn a_fifo_is_opened_once_somebody_reads_it() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("stdout");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("makes a fifo");
        let opening = Sink::fifo(&path, Duration::from_secs(60));
        tokio::pin!(opening);
        assert!(timeout(Duration::from_millis(50), &mut opening).await.is_err(), "it waits for a reader");
        let read = std::thread::spawn({
            let path = path.clone();
            move || std::fs::read_to_string(path).expect("reads")
        });
        let mut sink = opening.await.expect("opens");
        sink.write_all(b"out").await.expect("writes");
        drop(sink);
        assert_eq!(read.join().expect("ends"), "out");
    }

    #[tokio::test(start_paused = true)]
    async fn a_fifo_that_nobody_reads_is_waited_for_only_so_long() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("stdout");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("makes a fifo");
        let begun = tokio::time::Instant::now();
        let mut sink = Sink::fifo(&path, Duration::from_secs(10)).await.expect("opens");
        assert_eq!(begun.elapsed().as_secs(), 10);
        sink.write_all(b"out").await.expect("its own reader takes it");
        let absent = Sink::fifo(&dir.path().join("absent"), Duration::from_secs(10)).await;
        assert!(format!("{:#}", absent.expect_err("is refused")).contains("open output FIFO"));
    }

    #[tokio::test]
    async fn a_log_file_is_appended_to_and_its_directories_are_made() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("pods/a/log");
        let uri = format!("file://{}", path.display());
        let paths = StdioPaths { stdout: uri.clone(), stderr: uri, ..StdioPaths::default() };
        for _ in 0..2 {
            let sinks = Sinks::open(&paths, LOGGED, &Streams::new("/run/s/x".into())).await.expect("opens");
            sinks.stdout.expect("is there").write_all(b"out\n").await.expect("writes");
            sinks.stderr.expect("is there").write_all(b"err\n").await.expect("writes");
        }
        assert_eq!(std::fs::read_to_string(&path).expect("reads"), "out\nerr\nout\nerr\n");
        // Whatever the umask of the tests takes away.
        let mode = path.metadata().expect("is there").permissions().mode();
        assert_eq!(mode & 0o7777 & !0o644, 0, "{mode:o}");
    }
}
