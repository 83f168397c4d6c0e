//! Accepts what the guest dials and sorts it by its preamble.
//!
//! Control connections go to one queue ([`ControlConnections`]); a stream goes to whoever registered its token
//! ([`Listener::register`]), or is closed. The peer is the guest, which is hostile: a preamble has a deadline, and only so
//! many connections may be without one.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bulkhead_proto::vsock;
use bulkhead_proto::wire::{Kind, Preamble, Token};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_vsock::{VsockListener, VsockStream};

use crate::timeouts;

/// Connections that have not said yet what they are.
const MAX_UNSORTED: usize = 128;

/// How long accepting rests when files or memory have run out.
const BREATH: Duration = Duration::from_millis(100);

/// Where the guest's connections arrive.
#[derive(Debug)]
pub enum Acceptor {
    /// The socket that bulkhead-vsock connects to.
    Unix(UnixListener),
    /// A port of the host's AF_VSOCK.
    Vsock {
        /// Bound and listening.
        listener: VsockListener,
        /// The only peer that is let in.
        guest_cid: u32,
    },
}

/// A connection that the guest dialled, past its preamble.
#[derive(Debug)]
pub enum GuestStream {
    /// By way of bulkhead-vsock.
    Unix(UnixStream),
    /// By way of the kernel.
    Vsock(VsockStream),
}

type Waiting = Arc<Mutex<HashMap<Token, oneshot::Sender<GuestStream>>>>;

/// Where streams are registered. Clones reach the same one.
#[derive(Debug, Clone)]
pub struct Listener {
    waiting: Waiting,
}

/// The task that accepts; [`ListenerTask::close`] ends it.
#[derive(Debug)]
pub struct ListenerTask {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// The agent's control connections, in the order in which they came.
#[derive(Debug)]
pub struct ControlConnections {
    queue: mpsc::Receiver<(Token, GuestStream)>,
}

/// A token's claim on the stream that will be dialled with it. Dropping it gives the token up.
#[derive(Debug)]
pub struct StreamTicket {
    token: Token,
    stream: oneshot::Receiver<GuestStream>,
    waiting: Waiting,
}

impl Listener {
    /// Starts accepting.
    pub fn start(acceptor: Acceptor) -> (Self, ControlConnections, ListenerTask) {
        let waiting = Waiting::default();
        // One connection at a time is of use; more than a few waiting ones are a guest's mischief.
        let (control, queue) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let sorter = Sorter { waiting: waiting.clone(), control };
        #[expect(clippy::disallowed_methods, reason = "joined by ListenerTask::close")]
        let task = tokio::spawn(accept_all(acceptor, sorter, stop.clone()));
        (Self { waiting }, ControlConnections { queue }, ListenerTask { stop, task })
    }

    /// Claims the stream that the guest will dial with `token`. Must come before the guest is told the token.
    pub fn register(&self, token: Token) -> StreamTicket {
        let (sender, stream) = oneshot::channel();
        lock(&self.waiting).insert(token, sender);
        StreamTicket { token, stream, waiting: self.waiting.clone() }
    }
}

impl ListenerTask {
    /// Ends the task, closes the socket, and waits for that.
    pub async fn close(self) {
        self.stop.cancel();
        // A panic was reported where it happened; nothing is left to close.
        drop(self.task.await);
    }
}

impl ControlConnections {
    /// The next control connection that carries `secret`; others are closed. Cancel safe.
    pub async fn next(&mut self, secret: Token) -> anyhow::Result<GuestStream> {
        loop {
            let (token, stream) = self.queue.recv().await.context("the guest's connections are no longer accepted")?;
            if token == secret {
                return Ok(stream);
            }
            tracing::warn!("a control connection with a wrong secret is closed");
        }
    }
}

impl StreamTicket {
    /// The stream, once the guest has dialled it, within [`timeouts::STREAM_DIAL`].
    pub async fn wait(mut self) -> anyhow::Result<GuestStream> {
        match timeout(timeouts::STREAM_DIAL, &mut self.stream).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(_)) => bail!("the guest's connections are no longer accepted"),
            Err(_) => bail!("the guest did not dial the stream in {:?}", timeouts::STREAM_DIAL),
        }
    }
}

impl Drop for StreamTicket {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.token);
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<Token, oneshot::Sender<GuestStream>>> {
    // Every change of the map is one call, so a panic elsewhere cannot have left it half done.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone)]
struct Sorter {
    waiting: Waiting,
    control: mpsc::Sender<(Token, GuestStream)>,
}

impl Sorter {
    async fn sort(&self, mut stream: GuestStream) {
        let mut bytes = [0; Preamble::LEN];
        match timeout(timeouts::PREAMBLE, stream.read_exact(&mut bytes)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return tracing::debug!(%error, "a connection of the guest ended before its preamble"),
            Err(_) => return tracing::warn!("a connection of the guest sent no preamble in time"),
        }
        let preamble = match Preamble::decode(&bytes) {
            Ok(preamble) => preamble,
            Err(error) => return tracing::warn!(%error, "a connection of the guest is closed"),
        };
        match preamble.kind {
            Kind::Control => {
                if self.control.try_send((preamble.token, stream)).is_err() {
                    tracing::warn!("a control connection of the guest is closed: too many wait");
                }
            }
            Kind::Stream => {
                let claimed = lock(&self.waiting).remove(&preamble.token);
                match claimed {
                    // The ticket may have been given up meanwhile; then the stream closes.
                    Some(ticket) => drop(ticket.send(stream)),
                    None => tracing::warn!("a stream of the guest with an unknown token is closed"),
                }
            }
        }
    }
}

async fn accept_all(acceptor: Acceptor, sorter: Sorter, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_UNSORTED));
    let mut sorting = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = sorting.join_next() => {}
            accepted = accept(&acceptor) => match accepted {
                Ok(Some(stream)) => {
                    let Ok(place) = places.clone().try_acquire_owned() else {
                        tracing::warn!("a connection of the guest is closed: {MAX_UNSORTED} others have sent no preamble");
                        continue;
                    };
                    let sorter = sorter.clone();
                    sorting.spawn(async move {
                        sorter.sort(stream).await;
                        drop(place);
                    });
                }
                Ok(None) => {}
                // Descriptors become free without telling, and a pod whose streams are never accepted again is lost.
                Err(error) if is_shortage(&error) => {
                    tracing::warn!(%error, "a connection of the guest has to wait");
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(BREATH) => {}
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "connections of the guest cannot be accepted");
                    break;
                }
            },
        }
    }
    sorting.shutdown().await;
}

/// The next connection; None for one that was turned away.
async fn accept(acceptor: &Acceptor) -> io::Result<Option<GuestStream>> {
    let accepted = match acceptor {
        Acceptor::Unix(listener) => listener.accept().await.map(|(stream, _)| Some(GuestStream::Unix(stream))),
        Acceptor::Vsock { listener, guest_cid } => listener.accept().await.map(|(stream, address)| {
            // Every VM of the host can reach the port.
            if address.cid() == *guest_cid {
                Some(GuestStream::Vsock(stream))
            } else {
                tracing::warn!(guest_cid = address.cid(), "a connection of another VM is closed");
                None
            }
        }),
    };
    match accepted {
        // The peer gave up between its dial and our accept.
        Err(error) if is_passing(&error) => {
            tracing::warn!(%error, "a connection of the guest was not accepted");
            Ok(None)
        }
        other => other,
    }
}

/// Whether files or memory have run out, which passes.
fn is_shortage(error: &io::Error) -> bool {
    use libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
    error.raw_os_error().is_some_and(|errno| [EMFILE, ENFILE, ENOBUFS, ENOMEM].contains(&errno))
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

impl GuestStream {
    /// Lets `bytes` be under way to the guest, if that offers as many. bulkhead-vsock always does.
    pub fn send_ahead(&self, bytes: usize) -> io::Result<()> {
        match self {
            Self::Unix(_) => Ok(()),
            Self::Vsock(stream) => vsock::set_buffer(stream, bytes as u64),
        }
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Vsock(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Vsock(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
            Self::Vsock(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Vsock(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    struct Host {
        _dir: tempfile::TempDir,
        path: std::path::PathBuf,
        listener: Listener,
        control: ControlConnections,
        task: ListenerTask,
    }

    fn host() -> Host {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("vsock_1024");
        let acceptor = Acceptor::Unix(UnixListener::bind(&path).expect("binds"));
        let (listener, control, task) = Listener::start(acceptor);
        Host { _dir: dir, path, listener, control, task }
    }

    async fn dial(host: &Host, bytes: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(&host.path).await.expect("connects");
        stream.write_all(bytes).await.expect("writes");
        stream
    }

    #[tokio::test]
    async fn a_stream_reaches_the_one_who_registered_its_token() {
        let host = host();
        let ticket = host.listener.register([5; 16]);
        let mut guest = dial(&host, &Preamble { kind: Kind::Stream, token: [5; 16] }.encode()).await;
        guest.write_all(b"hello").await.expect("writes");
        guest.shutdown().await.expect("half-closes");
        let mut stream = ticket.wait().await.expect("arrives");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("reads");
        assert_eq!(text, "hello");
        host.task.close().await;
    }

    #[tokio::test]
    async fn unknown_tokens_and_broken_preambles_are_closed() {
        let host = host();
        drop(host.listener.register([9; 16]));
        for bytes in [Preamble { kind: Kind::Stream, token: [9; 16] }.encode(), *b"GET / HTTP/1.1\r\nHost: ab"] {
            let mut guest = dial(&host, &bytes).await;
            assert_eq!(guest.read(&mut [0; 1]).await.expect("sees the close"), 0);
        }
        host.task.close().await;
    }

    #[test]
    fn a_shortage_passes_and_a_broken_socket_does_not() {
        assert!(is_shortage(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(!is_shortage(&io::Error::from_raw_os_error(libc::EBADF)));
    }

    #[tokio::test]
    async fn a_control_connection_needs_the_secret() {
        let mut host = host();
        let mut stranger = dial(&host, &Preamble { kind: Kind::Control, token: [0; 16] }.encode()).await;
        let _agent = dial(&host, &Preamble { kind: Kind::Control, token: [1; 16] }.encode()).await;
        host.control.next([1; 16]).await.expect("the agent's arrives");
        assert_eq!(stranger.read(&mut [0; 1]).await.expect("sees the close"), 0);
        host.task.close().await;
    }
}
