//! The host's end of forwarded connections: what is dialled on the pod's loopback is carried to the guest's.
//!
//! Owned by the sandbox. One task accepts what [`steer`] leads here and has a task for each connection: it asks the agent
//! to dial the same port in the guest and then carries the bytes (`bulkhead_proto::bridge`). By the time the guest can say
//! that nothing listens the client's dial has succeeded, so the client sees a reset where runc's sees a refusal; a
//! containerd that is told either tells its user that the port-forward failed.

use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::bridge::{arm, bridge};
use bulkhead_proto::wire::Token;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::steer::{self, Steering};
use crate::error::{Error, Kind, Result, WithKind};
use crate::guest::client::Guest;
use crate::guest::listener::{GuestStream, Listener};
use crate::timeouts;

/// Connections at a time; what comes beyond is reset. The agent has the same limit.
const CONNECTIONS: usize = 512;
/// Connections that are being opened at a time; others wait. A burst must not keep the agent from other calls.
const OPENING: usize = 32;
/// A connection has three files here; and the rest of the shim has as many as ever.
const OPEN_FILES: u64 = 3 * CONNECTIONS as u64 + 1024;

/// A pod's port-forward. [`Forward::close`] ends it.
#[derive(Debug)]
pub struct Forward {
    stop: CancellationToken,
    task: JoinHandle<Steering>,
}

impl Forward {
    /// Begins to forward what is dialled on the loopback of the namespace at `netns`.
    pub async fn start(netns: &Path, guest: Guest, streams: Listener) -> Result<Self> {
        let (steering, listener) = steer::steer(netns).await?;
        Self::serve(steering, listener, guest, streams)
    }

    /// [`Self::start`] with the steering done.
    pub fn serve(steering: Steering, listener: TcpListener, guest: Guest, streams: Listener) -> Result<Self> {
        let listener = tokio::net::TcpListener::from_std(listener).or_kind(Kind::Internal, "watch a listener")?;
        make_room();
        let stop = CancellationToken::new();
        let opener = Opener { guest, streams, turns: Arc::new(Semaphore::new(OPENING)) };
        #[expect(clippy::disallowed_methods, reason = "joined by Forward::close")]
        let task = tokio::spawn(accept_all(steering, listener, opener, stop.clone()));
        Ok(Self { stop, task })
    }

    /// Resets every connection and leaves the namespace as it was: nothing of ours is open in it afterwards.
    pub async fn close(self) -> Result<()> {
        self.stop.cancel();
        let steering = self.task.await.or_kind(Kind::Internal, "end the port-forward")?;
        steering.close().await
    }
}

/// Raises the limit of open files as far as it may be, where a service manager left the ancient 1024.
fn make_room() {
    let limit = getrlimit(Resource::Nofile);
    // None is no limit.
    let Some(current) = limit.current else { return };
    let wanted = limit.maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if current < wanted
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit })
    {
        tracing::warn!(%error, "the limit of open files stays low: many forwarded connections may fail");
    }
}

async fn accept_all(
    steering: Steering,
    listener: tokio::net::TcpListener,
    opener: Opener,
    stop: CancellationToken,
) -> Steering {
    /// Descriptors become free without telling.
    const BREATH: Duration = Duration::from_millis(100);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    // From here on every way out but the orderly end is a reset.
                    let port = arm(&socket).and_then(|()| steering.port_dialled(&socket));
                    match port {
                        Ok(_) if connections.len() >= CONNECTIONS => {
                            tracing::warn!("a forwarded connection is reset: {CONNECTIONS} others are open");
                        }
                        Ok(port) => {
                            connections.spawn(opener.clone().carry(socket, port));
                        }
                        Err(error) => tracing::debug!(%error, "a forwarded connection ended before it was accepted"),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "a forwarded connection cannot be accepted");
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(BREATH) => {}
                    }
                }
            },
        }
    }
    connections.shutdown().await;
    steering
}

/// What opens a connection's other end.
#[derive(Clone)]
struct Opener {
    guest: Guest,
    streams: Listener,
    turns: Arc<Semaphore>,
}

impl Opener {
    /// Carries one connection to its end.
    async fn carry(self, socket: TcpStream, port: u16) {
        let carried = async {
            let (inbound, outbound) = self.open(port).await?;
            bridge(socket, inbound, outbound).await.map_err(|error| Error::unavailable(error.to_string()))
        };
        if let Err(error) = carried.await {
            tracing::debug!(port, %error, "a forwarded connection was reset");
        }
    }

    /// Has the guest dial the port and both streams: what it sends, and what it receives.
    async fn open(&self, port: u16) -> Result<(GuestStream, GuestStream)> {
        let opening = async {
            let _turn = self.turns.acquire().await.or_kind(Kind::Internal, "wait for a turn")?;
            let (to_guest, from_guest): (Token, Token) = (rand::random(), rand::random());
            let (outbound, inbound) = (self.streams.register(to_guest), self.streams.register(from_guest));
            self.guest.forward(port, to_guest, from_guest).await?;
            Ok(tokio::try_join!(inbound.wait(), outbound.wait())?)
        };
        let opened = timeout(timeouts::FORWARD_OPEN, opening).await;
        opened.unwrap_or_else(|_| Err(Error::deadline(format!("not open after {:?}", timeouts::FORWARD_OPEN))))
    }
}
