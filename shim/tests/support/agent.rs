//! An agent in the test's own process: it dials like a guest and runs "programs" that are a few words.
//!
//! `args` of a process: `print TEXT`, `exit CODE`, `cat` (stdin to stdout, ends at EOF), `hang` (ends by a signal),
//! `noisy N` (N bytes of output, then exit 0), `refuse` (cannot be started).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bulkhead_proto::agent::agent_server::{Agent, AgentServer};
use bulkhead_proto::agent::{self, Event, event};
use bulkhead_proto::bridge;
use bulkhead_proto::wire::{self, Deframer, Kind, Preamble, Token};
use futures::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

#[derive(Clone)]
pub struct FakeAgent {
    socket: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    processes: HashMap<(String, String), Process>,
    events: Option<mpsc::UnboundedSender<Result<Event, Status>>>,
    /// Everything that happened; event n is the n-th.
    log: Vec<Event>,
    secret: Token,
    /// Carries the control connection's bytes; with its end the connection breaks.
    wire: Option<tokio::task::JoinHandle<()>>,
    /// The next start takes effect, and its answer never leaves.
    withheld: bool,
    starts: u32,
    pod_limits: Vec<String>,
    container_limits: Vec<String>,
    mounts: HashMap<String, serde_json::Value>,
}

struct Process {
    args: Vec<String>,
    stdio: agent::Stdio,
    kill: Option<oneshot::Sender<u32>>,
    started: bool,
    exited: bool,
}

impl FakeAgent {
    /// Dials the host's `socket` and serves.
    pub async fn serve(socket: &Path) -> Self {
        let agent = Self { socket: socket.to_owned(), state: Arc::default() };
        agent.dial_control().await;
        agent
    }

    /// Dials as an agent does that has lost its connection: with the secret that the last `Hello` gave.
    pub async fn dial_control(&self) {
        let secret = self.lock().secret;
        let mut host = dial(&self.socket, Kind::Control, secret).await;
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let wire = tokio::task::spawn(async move {
            // However it ends, it is a broken connection.
            drop(tokio::io::copy_bidirectional(&mut host, &mut theirs).await);
        });
        self.lock().wire = Some(wire);
        let server = tonic::transport::Server::builder().add_service(AgentServer::new(self.clone()));
        let incoming = futures::stream::once(async { Ok::<_, std::io::Error>(ours) });
        tokio::task::spawn(async move {
            // Its end is the end of the connection.
            drop(server.serve_with_incoming(incoming).await);
        });
    }

    /// Breaks the control connection and returns when that is done.
    pub async fn cut(&self) {
        let wire = self.lock().wire.take().expect("is connected");
        wire.abort();
        drop(wire.await);
    }

    /// Has the next start take effect without an answer.
    pub fn withhold_next_start(&self) {
        self.lock().withheld = true;
    }

    /// How many starts were asked for, repetitions included.
    pub fn starts(&self) -> u32 {
        self.lock().starts
    }

    /// Ends a process, as if by itself.
    pub fn end(&self, container: &str, status: u32) {
        let kill = self.lock().processes.get_mut(&(container.to_owned(), String::new())).and_then(|p| p.kill.take());
        kill.expect("runs").send(status).expect("runs");
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }

    fn emit(&self, event: event::Event) {
        let mut state = self.lock();
        let event = Event { seq: state.log.len() as u64 + 1, event: Some(event) };
        state.log.push(event.clone());
        if let Some(events) = &state.events {
            drop(events.send(Ok(event)));
        }
    }

    async fn run(self, id: (String, String), args: Vec<String>, stdio: agent::Stdio, kill: oneshot::Receiver<u32>) {
        let token = |bytes: &[u8]| Token::try_from(bytes).ok();
        let mut stdout = match token(&stdio.stdout_token) {
            Some(token) => Some(dial(&self.socket, Kind::Stream, token).await),
            None => None,
        };
        let stdin = match token(&stdio.stdin_token) {
            Some(token) => Some(dial(&self.socket, Kind::Stream, token).await),
            None => None,
        };
        let mut written = 0u64;
        let mut status = 0;
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["print", text] => {
                if let Some(stdout) = &mut stdout {
                    send(stdout, text.as_bytes()).await;
                    written = text.len() as u64;
                }
            }
            ["noisy", count] => {
                let mut left: usize = count.parse().expect("a number");
                let stdout = stdout.as_mut().expect("has stdout");
                while left > 0 {
                    let chunk = vec![b'x'; left.min(wire::ONE_PACKET)];
                    send(stdout, &chunk).await;
                    left -= chunk.len();
                    written += chunk.len() as u64;
                }
            }
            ["exit", code] => status = code.parse().expect("a number"),
            ["cat"] => {
                let (mut stdin, stdout) = (stdin.expect("has stdin"), stdout.as_mut().expect("has stdout"));
                let (mut deframer, mut buffer) = (Deframer::default(), vec![0; wire::ONE_PACKET]);
                while !deframer.ended() {
                    let length = stdin.read(&mut buffer).await.expect("host sends");
                    assert_ne!(length, 0, "stdin ends with its end frame");
                    let mut input = &buffer[..length];
                    while let Some(payload) = deframer.next(&mut input).expect("frames") {
                        send(stdout, payload).await;
                        written += payload.len() as u64;
                    }
                }
            }
            ["hang"] => status = kill.await.unwrap_or(137),
            other => panic!("the fake agent does not know {other:?}"),
        }
        {
            let mut state = self.lock();
            if let Some(process) = state.processes.get_mut(&id) {
                process.exited = true;
            }
        }
        self.emit(event::Event::Exit(agent::Exit {
            container_id: id.0,
            exec_id: id.1,
            exit_status: status,
            guest_pid: 7,
            stdout_bytes: written,
            stderr_bytes: 0,
        }));
        if let Some(mut stdout) = stdout {
            drop(stdout.write_all(&wire::END).await);
            let mut rest = [0; 1];
            drop(stdout.read(&mut rest).await);
        }
    }

    /// Limits of the pod that were set, each as JSON, in order.
    pub fn pod_limits(&self) -> Vec<String> {
        self.state.lock().expect("not poisoned").pod_limits.clone()
    }

    /// Resources of containers that were updated, each as JSON, in order.
    pub fn container_limits(&self) -> Vec<String> {
        self.lock().container_limits.clone()
    }

    /// Mounts of a container's spec.
    pub fn mounts_of(&self, container: &str) -> serde_json::Value {
        self.state.lock().expect("not poisoned").mounts.get(container).cloned().unwrap_or_default()
    }

    fn register(&self, container_id: String, exec_id: String, process: &serde_json::Value, stdio: agent::Stdio) {
        let args = process["args"].as_array().expect("args").iter();
        let args = args.map(|arg| arg.as_str().expect("a string").to_owned()).collect();
        let process = Process { args, stdio, kill: None, started: false, exited: false };
        self.lock().processes.insert((container_id, exec_id), process);
    }
}

async fn send(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(&wire::frame_header(bytes.len())).await.expect("host reads");
    stream.write_all(bytes).await.expect("host reads");
}

pub async fn dial(socket: &Path, kind: Kind, token: Token) -> UnixStream {
    let mut stream = UnixStream::connect(socket).await.expect("host listens");
    stream.write_all(&Preamble { kind, token }.encode()).await.expect("host reads");
    stream
}

#[tonic::async_trait]
impl Agent for FakeAgent {
    async fn hello(&self, request: Request<agent::HelloRequest>) -> Answer<agent::HelloResponse> {
        let request = request.into_inner();
        self.lock().secret = request.session_secret.try_into().expect("16 bytes");
        let api_version = request.api_version;
        Ok(Response::new(agent::HelloResponse { api_version, agent_version: "fake".into(), ..Default::default() }))
    }

    async fn create_sandbox(&self, _: Request<agent::CreateSandboxRequest>) -> Answer<agent::CreateSandboxResponse> {
        Ok(Response::new(agent::CreateSandboxResponse::default()))
    }

    async fn create_container(
        &self,
        request: Request<agent::CreateContainerRequest>,
    ) -> Answer<agent::CreateContainerResponse> {
        let request = request.into_inner();
        let spec: serde_json::Value = serde_json::from_slice(&request.spec_json).expect("spec is JSON");
        let mounts = spec["mounts"].clone();
        self.state.lock().expect("not poisoned").mounts.insert(request.container_id.clone(), mounts);
        self.register(request.container_id, String::new(), &spec["process"], request.stdio.unwrap_or_default());
        Ok(Response::new(agent::CreateContainerResponse { guest_pid: 7, ..Default::default() }))
    }

    async fn create_process(
        &self,
        request: Request<agent::CreateProcessRequest>,
    ) -> Answer<agent::CreateProcessResponse> {
        let request = request.into_inner();
        let process: serde_json::Value = serde_json::from_slice(&request.process_json).expect("process is JSON");
        self.register(request.container_id, request.exec_id, &process, request.stdio.unwrap_or_default());
        Ok(Response::new(agent::CreateProcessResponse {}))
    }

    async fn start_process(&self, request: Request<agent::StartProcessRequest>) -> Answer<agent::StartProcessResponse> {
        let request = request.into_inner();
        let id = (request.container_id, request.exec_id);
        let (kill, killed) = oneshot::channel();
        let (args, stdio, withheld, again) = {
            let mut state = self.lock();
            state.starts += 1;
            let withheld = std::mem::take(&mut state.withheld);
            let process = state.processes.get_mut(&id).ok_or_else(|| Status::not_found("no such process"))?;
            let again = std::mem::replace(&mut process.started, true);
            if !again {
                process.kill = Some(kill);
            }
            (process.args.clone(), process.stdio.clone(), withheld, again)
        };
        if again {
            return Ok(Response::new(agent::StartProcessResponse { guest_pid: 7, ..Default::default() }));
        }
        if args == ["refuse"] {
            return Err(Status::invalid_argument("exec: \"refuse\": executable file not found in $PATH"));
        }
        // Ends with the test; a panic in it fails the test by what is then missing.
        tokio::task::spawn(self.clone().run(id, args, stdio, killed));
        if withheld {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(agent::StartProcessResponse { guest_pid: 7, ..Default::default() }))
    }

    async fn signal_process(
        &self,
        request: Request<agent::SignalProcessRequest>,
    ) -> Answer<agent::SignalProcessResponse> {
        let request = request.into_inner();
        let mut state = self.lock();
        let process = state
            .processes
            .get_mut(&(request.container_id, request.exec_id))
            .filter(|process| !process.exited)
            .ok_or_else(|| Status::not_found("process already finished"))?;
        if let Some(kill) = process.kill.take() {
            // It may have ended by itself meanwhile.
            let _ended = kill.send(128 + request.signal);
        }
        Ok(Response::new(agent::SignalProcessResponse {}))
    }

    async fn resize_pty(&self, _: Request<agent::ResizePtyRequest>) -> Answer<agent::ResizePtyResponse> {
        Ok(Response::new(agent::ResizePtyResponse {}))
    }

    async fn delete(&self, request: Request<agent::DeleteRequest>) -> Answer<agent::DeleteResponse> {
        let request = request.into_inner();
        let mut state = self.lock();
        state
            .processes
            .remove(&(request.container_id, request.exec_id))
            .map(|_| Response::new(agent::DeleteResponse::default()))
            .ok_or_else(|| Status::not_found("no such process"))
    }

    async fn update_sandbox(
        &self,
        request: Request<agent::UpdateSandboxRequest>,
    ) -> Answer<agent::UpdateSandboxResponse> {
        let json = String::from_utf8(request.into_inner().resources_json).expect("is text");
        self.state.lock().expect("not poisoned").pod_limits.push(json);
        Ok(Response::new(agent::UpdateSandboxResponse {}))
    }

    async fn update_container(
        &self,
        request: Request<agent::UpdateContainerRequest>,
    ) -> Answer<agent::UpdateContainerResponse> {
        let json = String::from_utf8(request.into_inner().resources_json).expect("is text");
        self.lock().container_limits.push(json);
        Ok(Response::new(agent::UpdateContainerResponse {}))
    }

    async fn pause_container(&self, _: Request<agent::PauseContainerRequest>) -> Answer<agent::PauseContainerResponse> {
        Ok(Response::new(agent::PauseContainerResponse {}))
    }

    async fn resume_container(
        &self,
        _: Request<agent::ResumeContainerRequest>,
    ) -> Answer<agent::ResumeContainerResponse> {
        Ok(Response::new(agent::ResumeContainerResponse {}))
    }

    async fn list_processes(&self, _: Request<agent::ListProcessesRequest>) -> Answer<agent::ListProcessesResponse> {
        Ok(Response::new(agent::ListProcessesResponse { guest_pids: vec![7] }))
    }

    async fn forward(&self, request: Request<agent::ForwardRequest>) -> Answer<agent::ForwardResponse> {
        let request = request.into_inner();
        let service = std::net::TcpStream::connect(("127.0.0.1", u16::try_from(request.port).expect("a port")));
        let service = service.map_err(|_| Status::failed_precondition("nothing listens"))?;
        service.set_nonblocking(true).expect("can be");
        let service = TcpStream::from_std(service).expect("can be watched");
        bridge::arm(&service).expect("arms");
        let token = |bytes: &[u8]| Token::try_from(bytes).expect("a token");
        let (inbound, outbound) = (token(&request.to_guest_token), token(&request.from_guest_token));
        let socket = self.socket.clone();
        // Ends with its connection.
        tokio::task::spawn(async move {
            let inbound = dial(&socket, Kind::Stream, inbound).await;
            let outbound = dial(&socket, Kind::Stream, outbound).await;
            // The test sees how it ended from the other side.
            drop(bridge::bridge(service, inbound, outbound).await);
        });
        Ok(Response::new(agent::ForwardResponse {}))
    }

    type EventsStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn events(&self, request: Request<agent::EventsRequest>) -> Answer<Self::EventsStream> {
        let seen = request.into_inner().after_seq;
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.lock();
        for event in state.log.iter().filter(|event| event.seq > seen) {
            sender.send(Ok(event.clone())).expect("is open");
        }
        state.events = Some(sender);
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
    }

    async fn shutdown(&self, _: Request<agent::ShutdownRequest>) -> Answer<agent::ShutdownResponse> {
        Ok(Response::new(agent::ShutdownResponse {}))
    }
}
