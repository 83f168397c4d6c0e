//! The agent's API on the control connection: decodes, calls [`crate::pod`], encodes. The only user of tonic's server.
//!
//! The guest dials and then serves: HTTP/2 runs with the roles reversed on the dialled connection.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_proto::agent as api;
use bulkhead_proto::agent::agent_server::{Agent, AgentServer};
use bulkhead_proto::wire::{Kind, Token};
use futures::Stream;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::Notify;
use tokio_vsock::VsockStream;
use tonic::{Request, Response, Status};

use crate::error::{During, Error, Result};
use crate::pod::Pod;
use crate::{clock, forward, mount};

/// First and longest pause between two attempts to reach the host.
const REDIAL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// A guest without a host for so long is of no use.
const ABANDONED: Duration = Duration::from_secs(120);
/// HTTP/2 pings show a dead host, which vsock alone does not.
const PING: Duration = Duration::from_secs(10);
/// Largest message: a spec with every ConfigMap key in its environment stays far below.
const MESSAGE_AT_MOST: usize = 16 << 20;

/// What outlives a connection.
pub struct Session {
    pod: Arc<Pod>,
    secret: Mutex<Token>,
    started_us: u64,
    shutdown: Notify,
}

impl Session {
    /// A session that waits for its first `Hello`; the agent's main began at `started_us`.
    pub fn new(pod: Arc<Pod>, started_us: u64) -> Arc<Self> {
        Arc::new(Self { pod, secret: Mutex::default(), started_us, shutdown: Notify::new() })
    }

    /// Serves the host, connection after connection, until it asks for shutdown or stays away.
    pub async fn serve(self: &Arc<Self>) -> Result<()> {
        loop {
            let stream = self.reach_host().await?;
            let service = Connection { session: Arc::clone(self), greeted: AtomicBool::new(false) };
            let service = AgentServer::new(service).max_decoding_message_size(MESSAGE_AT_MOST);
            let mut http = http2::Builder::new(TokioExecutor::new());
            http.timer(TokioTimer::new()).keep_alive_interval(PING).keep_alive_timeout(PING);
            let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
            tokio::pin!(connection);
            tokio::select! {
                ended = connection.as_mut() => {
                    let error = ended.err().map(|error| error.to_string()).unwrap_or_default();
                    tracing::warn!(error, "control connection ended");
                }
                () = self.shutdown.notified() => {
                    // The reply and the exits that the kill brought are still to be delivered.
                    connection.as_mut().graceful_shutdown();
                    drop(tokio::time::timeout(Duration::from_millis(500), connection).await);
                    return Ok(());
                }
            }
        }
    }

    async fn reach_host(&self) -> Result<VsockStream> {
        let mut pause = REDIAL.0;
        let mut waited = Duration::ZERO;
        loop {
            let secret = *self.secret.lock().unwrap_or_else(PoisonError::into_inner);
            match self.pod.services().host.dial(Kind::Control, secret).await {
                Ok(stream) => return Ok(stream),
                Err(error) if waited >= ABANDONED => return Err(error).during(|| "reach the host"),
                Err(error) => tracing::debug!(%error, "host does not answer"),
            }
            // There is no event for "the host listens now": it does before the guest starts, this is for its restarts.
            tokio::time::sleep(pause).await;
            waited += pause;
            pause = (pause * 2).min(REDIAL.1);
        }
    }
}

struct Connection {
    session: Arc<Session>,
    greeted: AtomicBool,
}

impl Connection {
    fn pod(&self) -> Result<&Arc<Pod>> {
        if self.greeted.load(Ordering::Acquire) {
            Ok(&self.session.pod)
        } else {
            Err(Error::precondition("Hello must be the first call of a connection"))
        }
    }
}

type Reply<T> = std::result::Result<Response<T>, Status>;

#[tonic::async_trait]
impl Agent for Connection {
    async fn hello(&self, request: Request<api::HelloRequest>) -> Reply<api::HelloResponse> {
        let request = request.into_inner();
        if request.api_version != bulkhead_proto::API_VERSION {
            let (theirs, ours) = (request.api_version, bulkhead_proto::API_VERSION);
            return Err(
                Error::precondition(format!("API version {theirs} is not known, the agent speaks {ours}")).into()
            );
        }
        let secret = Token::try_from(request.session_secret.as_slice()).map_err(|_| {
            Error::invalid(format!("session secret has {} bytes, expected 16", request.session_secret.len()))
        })?;
        clock::set_wall_clock(request.host_time_unix_ns)?;
        *self.session.secret.lock().unwrap_or_else(PoisonError::into_inner) = secret;
        self.greeted.store(true, Ordering::Release);
        let memory = nix::sys::sysinfo::sysinfo().during(|| "read the guest's memory size")?;
        let system = rustix::system::uname();
        Ok(Response::new(api::HelloResponse {
            api_version: bulkhead_proto::API_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: system.release().to_string_lossy().into_owned(),
            init_started_us: self.session.started_us,
            hello_answered_us: clock::uptime_us(),
            memory_total_bytes: memory.ram_total(),
        }))
    }

    async fn create_sandbox(&self, request: Request<api::CreateSandboxRequest>) -> Reply<api::CreateSandboxResponse> {
        Ok(Response::new(self.pod()?.create_sandbox(request.into_inner()).await?))
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Reply<api::CreateContainerResponse> {
        Ok(Response::new(self.pod()?.create_container(request.into_inner()).await?))
    }

    async fn create_process(&self, request: Request<api::CreateProcessRequest>) -> Reply<api::CreateProcessResponse> {
        self.pod()?.create_process(request.into_inner()).await?;
        Ok(Response::new(api::CreateProcessResponse {}))
    }

    async fn start_process(&self, request: Request<api::StartProcessRequest>) -> Reply<api::StartProcessResponse> {
        let request = request.into_inner();
        Ok(Response::new(self.pod()?.start_process(&request.container_id, &request.exec_id).await?))
    }

    async fn signal_process(&self, request: Request<api::SignalProcessRequest>) -> Reply<api::SignalProcessResponse> {
        self.pod()?.signal(&request.into_inner()).await?;
        Ok(Response::new(api::SignalProcessResponse {}))
    }

    async fn resize_pty(&self, request: Request<api::ResizePtyRequest>) -> Reply<api::ResizePtyResponse> {
        self.pod()?.resize(&request.into_inner()).await?;
        Ok(Response::new(api::ResizePtyResponse {}))
    }

    async fn delete(&self, request: Request<api::DeleteRequest>) -> Reply<api::DeleteResponse> {
        let request = request.into_inner();
        Ok(Response::new(self.pod()?.delete(&request.container_id, &request.exec_id).await?))
    }

    async fn update_sandbox(&self, request: Request<api::UpdateSandboxRequest>) -> Reply<api::UpdateSandboxResponse> {
        self.pod()?.update_all(&request.into_inner().resources_json).await?;
        Ok(Response::new(api::UpdateSandboxResponse {}))
    }

    async fn update_container(
        &self,
        request: Request<api::UpdateContainerRequest>,
    ) -> Reply<api::UpdateContainerResponse> {
        let request = request.into_inner();
        self.pod()?.update(&request.container_id, &request.resources_json).await?;
        Ok(Response::new(api::UpdateContainerResponse {}))
    }

    async fn pause_container(
        &self,
        request: Request<api::PauseContainerRequest>,
    ) -> Reply<api::PauseContainerResponse> {
        self.pod()?.freeze(&request.into_inner().container_id, true).await?;
        Ok(Response::new(api::PauseContainerResponse {}))
    }

    async fn resume_container(
        &self,
        request: Request<api::ResumeContainerRequest>,
    ) -> Reply<api::ResumeContainerResponse> {
        self.pod()?.freeze(&request.into_inner().container_id, false).await?;
        Ok(Response::new(api::ResumeContainerResponse {}))
    }

    async fn list_processes(&self, request: Request<api::ListProcessesRequest>) -> Reply<api::ListProcessesResponse> {
        let guest_pids = self.pod()?.processes(&request.into_inner().container_id).await?;
        Ok(Response::new(api::ListProcessesResponse { guest_pids }))
    }

    async fn forward(&self, request: Request<api::ForwardRequest>) -> Reply<api::ForwardResponse> {
        forward::open(self.pod()?.services(), &request.into_inner()).await?;
        Ok(Response::new(api::ForwardResponse {}))
    }

    type EventsStream = Pin<Box<dyn Stream<Item = std::result::Result<api::Event, Status>> + Send>>;

    async fn events(&self, request: Request<api::EventsRequest>) -> Reply<Self::EventsStream> {
        let reader = self.pod()?.services().events.read(request.into_inner().after_seq);
        let stream = futures::stream::unfold(reader, async |mut reader| {
            let event = reader.next().await;
            Some((Ok(event), reader))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn shutdown(&self, _: Request<api::ShutdownRequest>) -> Reply<api::ShutdownResponse> {
        self.pod()?.kill_all().await;
        // The host ends the machine on the answer. A panic in it was reported by the panic hook.
        drop(tokio::task::spawn_blocking(mount::sync_all).await);
        self.session.shutdown.notify_one();
        Ok(Response::new(api::ShutdownResponse {}))
    }
}
