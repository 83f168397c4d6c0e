//! The agent as the shim calls it: gRPC on connections that the guest dials.
//!
//! One task ([`Guest::connect`] starts it, [`Guest::close`] joins it) takes control connections from the listener one after
//! the other, greets each, and follows its event stream. A connection that breaks is no end: the agent dials again, calls
//! in flight are repeated (every request of the API may be), and events go on where they stopped. Silence is: when neither
//! an event nor a heartbeat has come for [`timeouts::HEARTBEAT`], the guest counts as hung.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bulkhead_proto::agent::agent_client::AgentClient;
use bulkhead_proto::agent::{self, event};
use bulkhead_proto::wire::Token;
use hyper_util::rt::TokioIo;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tower::service_fn;

use crate::error::{Error, Kind, Result};
use crate::guest::listener::{ControlConnections, GuestStream};
use crate::timeouts;

type Client = AgentClient<Channel>;

/// A gRPC message: a spec may be large, and containerd itself allows 4 MiB.
const MESSAGE_LIMIT: usize = 8 * 1024 * 1024;

/// What the guest tells by itself.
#[derive(Debug, Clone, PartialEq)]
pub enum GuestEvent {
    /// A process has ended.
    Exit(agent::Exit),
    /// The kernel killed a process of the container for want of memory.
    Oom(agent::Oom),
    /// A sample of a container's statistics.
    Stats(Box<agent::Stats>),
    /// Nothing was heard for [`timeouts::HEARTBEAT`].
    Silent,
}

/// The connected guest. Clones reach the same one.
#[derive(Debug, Clone)]
pub struct Guest {
    client: watch::Receiver<Option<Client>>,
}

/// The task behind a [`Guest`].
#[derive(Debug)]
pub struct GuestTask {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl GuestTask {
    /// Ends the task and waits for it.
    pub async fn close(self) {
        self.stop.cancel();
        // A panic in it was reported by the panic hook; there is nothing left to end.
        drop(self.task.await);
    }
}

impl Guest {
    /// Waits for the first control connection and greets the agent, then follows it in a task.
    ///
    /// The caller bounds the wait (it races it against QEMU's end). Events go to `events` in order.
    pub async fn connect(
        mut connections: ControlConnections,
        events: mpsc::Sender<GuestEvent>,
    ) -> Result<(Self, GuestTask, agent::HelloResponse)> {
        let secret: Token = rand::random();
        let stream = connections.next([0; 16]).await.context("wait for the agent's connection")?;
        let (client, hello) = greet(stream, secret).await?;
        let (publish, current) = watch::channel(Some(client.clone()));
        let stop = CancellationToken::new();
        let follower = Follower { connections, secret, publish, events, last_seq: 0 };
        #[expect(clippy::disallowed_methods, reason = "joined by GuestTask::close")]
        let task = tokio::spawn(follower.run(client, stop.clone()));
        Ok((Self { client: current }, GuestTask { stop, task }, hello))
    }

    /// Calls the agent, again after a reconnect, until `deadline` has passed.
    async fn call<T, F>(&self, what: &'static str, deadline: Duration, call: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<tonic::Response<T>, Status>>,
    {
        let attempts = async {
            let mut current = self.client.clone();
            loop {
                let client = current
                    .wait_for(Option::is_some)
                    .await
                    .map_err(|_| Error::unavailable(format!("{what}: the guest is gone")))?
                    .clone();
                let Some(client) = client else { continue };
                match call(client).await {
                    Ok(response) => return Ok(response.into_inner()),
                    // The connection broke under the call; the next one carries it again.
                    Err(status) if is_transport(&status) => {
                        current
                            .changed()
                            .await
                            .map_err(|_| Error::unavailable(format!("{what}: the guest is gone")))?;
                    }
                    Err(status) => return Err(from_status(&status)),
                }
            }
        };
        timeout(deadline, attempts)
            .await
            .map_err(|_| Error::deadline(format!("{what}: no answer from the guest in {deadline:?}")))?
    }

    /// Makes the guest a pod.
    pub async fn create_sandbox(&self, request: agent::CreateSandboxRequest) -> Result<agent::CreateSandboxResponse> {
        self.call("create sandbox in the guest", timeouts::AGENT_CREATE, |mut client| {
            let request = request.clone();
            async move { client.create_sandbox(request).await }
        })
        .await
    }

    /// Prepares a container.
    pub async fn create_container(
        &self,
        request: agent::CreateContainerRequest,
    ) -> Result<agent::CreateContainerResponse> {
        self.call("create container in the guest", timeouts::AGENT_CREATE, |mut client| {
            let request = request.clone();
            async move { client.create_container(request).await }
        })
        .await
    }

    /// Registers an exec.
    pub async fn create_process(&self, request: agent::CreateProcessRequest) -> Result<()> {
        self.call("create exec in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.create_process(request).await }
        })
        .await
        .map(drop)
    }

    /// Runs an init or an exec.
    pub async fn start_process(&self, request: agent::StartProcessRequest) -> Result<agent::StartProcessResponse> {
        self.call("start process in the guest", timeouts::AGENT_CREATE, |mut client| {
            let request = request.clone();
            async move { client.start_process(request).await }
        })
        .await
    }

    /// Sends a signal.
    pub async fn signal_process(&self, request: agent::SignalProcessRequest) -> Result<()> {
        self.call("signal process in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.signal_process(request).await }
        })
        .await
        .map(drop)
    }

    /// Resizes a pty.
    pub async fn resize_pty(&self, request: agent::ResizePtyRequest) -> Result<()> {
        self.call("resize pty in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.resize_pty(request).await }
        })
        .await
        .map(drop)
    }

    /// Forgets an exited process.
    pub async fn delete(&self, request: agent::DeleteRequest) -> Result<agent::DeleteResponse> {
        self.call("delete in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.delete(request).await }
        })
        .await
    }

    /// Changes a container's limits.
    pub async fn update_container(&self, request: agent::UpdateContainerRequest) -> Result<()> {
        self.call("update container in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.update_container(request).await }
        })
        .await
        .map(drop)
    }

    /// Changes what the pod's containers may use together.
    pub async fn update_sandbox(&self, request: agent::UpdateSandboxRequest) -> Result<()> {
        self.call("update sandbox in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.update_sandbox(request).await }
        })
        .await
        .map(drop)
    }

    /// Freezes a container.
    pub async fn pause_container(&self, request: agent::PauseContainerRequest) -> Result<()> {
        self.call("pause container in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.pause_container(request).await }
        })
        .await
        .map(drop)
    }

    /// Thaws a container.
    pub async fn resume_container(&self, request: agent::ResumeContainerRequest) -> Result<()> {
        self.call("resume container in the guest", timeouts::AGENT_CALL, |mut client| {
            let request = request.clone();
            async move { client.resume_container(request).await }
        })
        .await
        .map(drop)
    }

    /// Connects to a port of the pod's loopback; the guest then dials the two streams. Tried once: see the API.
    pub async fn forward(&self, port: u16, to_guest: Token, from_guest: Token) -> Result<()> {
        let request = agent::ForwardRequest {
            port: port.into(),
            to_guest_token: to_guest.to_vec(),
            from_guest_token: from_guest.to_vec(),
        };
        let client = self.client.borrow().clone();
        let mut client = client.ok_or_else(|| Error::unavailable("the guest is not connected"))?;
        let answer = timeout(timeouts::AGENT_CALL, client.forward(request)).await;
        let answer = answer.map_err(|_| Error::deadline("forward: no answer from the guest"))?;
        answer.map(drop).map_err(|status| from_status(&status))
    }

    /// Ends every container, syncs, and powers the guest off.
    pub async fn shutdown(&self) -> Result<()> {
        self.call("shut the guest down", timeouts::GUEST_SHUTDOWN, |mut client| async move {
            client.shutdown(agent::ShutdownRequest {}).await
        })
        .await
        .map(drop)
    }
}

/// The state of the task that keeps the connection.
struct Follower {
    connections: ControlConnections,
    secret: Token,
    publish: watch::Sender<Option<Client>>,
    events: mpsc::Sender<GuestEvent>,
    last_seq: u64,
}

impl Follower {
    async fn run(mut self, mut client: Client, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                silent = self.follow(client) => {
                    if silent {
                        // The receiver is the driver; without it nobody is left to be told.
                        drop(self.events.send(GuestEvent::Silent).await);
                        return;
                    }
                }
            }
            self.publish.send_replace(None);
            tracing::warn!("connection to the agent broke, waiting for it to dial again");
            let next = async {
                loop {
                    let stream = self.connections.next(self.secret).await?;
                    match greet(stream, self.secret).await {
                        Ok((client, _)) => return Ok::<_, anyhow::Error>(client),
                        // It broke in its turn, and the agent dials again.
                        Err(error) => tracing::warn!(%error, "the agent's new connection is unusable"),
                    }
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                next = timeout(timeouts::HEARTBEAT, next) => match next {
                    Ok(Ok(next)) => client = next,
                    Ok(Err(_)) | Err(_) => {
                        drop(self.events.send(GuestEvent::Silent).await);
                        return;
                    }
                },
            }
            self.publish.send_replace(Some(client.clone()));
        }
    }

    /// Passes events on until the connection breaks (false) or the guest falls silent (true).
    async fn follow(&mut self, mut client: Client) -> bool {
        let opened =
            timeout(timeouts::HEARTBEAT, client.events(agent::EventsRequest { after_seq: self.last_seq })).await;
        let mut stream = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => {
                tracing::debug!(error = %status.message(), "event stream cannot be opened");
                return false;
            }
            Err(_) => return true,
        };
        loop {
            let message = match timeout(timeouts::HEARTBEAT, stream.message()).await {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return false,
                Ok(Err(status)) => {
                    tracing::debug!(error = %status.message(), "event stream broke");
                    return false;
                }
                Err(_) => return true,
            };
            if message.seq != 0 {
                if message.seq <= self.last_seq {
                    continue;
                }
                self.last_seq = message.seq;
            }
            let event = match message.event {
                Some(event::Event::Exit(exit)) => GuestEvent::Exit(exit),
                Some(event::Event::Oom(oom)) => GuestEvent::Oom(oom),
                Some(event::Event::Stats(stats)) => GuestEvent::Stats(Box::new(stats)),
                Some(event::Event::Heartbeat(_)) | None => continue,
            };
            if self.events.send(event).await.is_err() {
                return false;
            }
        }
    }
}

async fn greet(stream: GuestStream, secret: Token) -> Result<(Client, agent::HelloResponse)> {
    let mut stream = Some(stream);
    let connector = service_fn(move |_: Uri| {
        let stream = stream.take();
        async move {
            // A channel would dial again by itself; here only the guest dials, so a second call has nothing to give.
            stream.map(TokioIo::new).ok_or_else(|| std::io::Error::other("the agent's connection is closed"))
        }
    });
    let connect = async {
        let channel = Endpoint::from_static("http://agent")
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(1 << 20)
            .connect_with_connector(connector)
            .await
            .context("speak HTTP/2 with the agent")?;
        let mut client =
            AgentClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT).max_encoding_message_size(MESSAGE_LIMIT);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let hello = client
            .hello(Request::new(agent::HelloRequest {
                api_version: bulkhead_proto::API_VERSION,
                session_secret: secret.to_vec(),
                host_time_unix_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            }))
            .await
            .map_err(|status| from_status(&status).context("greet the agent"))?
            .into_inner();
        Ok((client, hello))
    };
    timeout(timeouts::AGENT_CALL, connect)
        .await
        .map_err(|_| Error::deadline("greet the agent: no answer from the guest"))?
}

/// True for a failure of the connection, not an answer of the agent.
fn is_transport(status: &Status) -> bool {
    // What tonic makes of a broken connection has a source; what the agent answered has none.
    std::error::Error::source(status).is_some()
        && matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
}

/// An answer of the agent as an error of ours. The text is the guest's: bounded, one line.
fn from_status(status: &Status) -> Error {
    const LONGEST: usize = 2048;
    let kind = match status.code() {
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists => Kind::AlreadyExists,
        Code::FailedPrecondition => Kind::FailedPrecondition,
        Code::InvalidArgument | Code::OutOfRange => Kind::InvalidArgument,
        Code::Unavailable => Kind::Unavailable,
        Code::DeadlineExceeded => Kind::DeadlineExceeded,
        Code::Unimplemented => Kind::Unimplemented,
        _ => Kind::Internal,
    };
    let text: String = status.message().chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect();
    Error::new(kind, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_words_are_bounded_and_on_one_line() {
        let error = from_status(&Status::not_found(format!("no such\nprocess{}", "x".repeat(10_000))));
        assert_eq!(error.kind(), Kind::NotFound);
        let text = error.to_string();
        assert!(text.starts_with("no such process") && text.len() <= 2048);
    }

    #[test]
    fn an_answer_is_not_taken_for_a_broken_connection() {
        assert!(!is_transport(&Status::unavailable("the agent says so")));
    }
}
