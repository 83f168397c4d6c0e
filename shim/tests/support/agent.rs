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
use bulkhead_proto::wire::{self, Deframer, Kind, Preamble, Token};
use futures::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
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
    sent: u64,
}

struct Process {
    args: Vec<String>,
    stdio: agent::Stdio,
    kill: Option<oneshot::Sender<u32>>,
    exited: bool,
}

impl FakeAgent {
    /// Dials the host's `socket` and serves until the connection ends.
    pub async fn serve(socket: &Path) -> (Self, tokio::task::JoinHandle<()>) {
        let agent = Self { socket: socket.to_owned(), state: Arc::default() };
        let connection = dial(socket, Kind::Control, [0; 16]).await;
        let server = tonic::transport::Server::builder().add_service(AgentServer::new(agent.clone()));
        let incoming = futures::stream::once(async { Ok::<_, std::io::Error>(connection) });
        let task = tokio::task::spawn(async move {
            // Its end is the end of the test.
            drop(server.serve_with_incoming(incoming).await);
        });
        (agent, task)
    }

    fn emit(&self, event: event::Event) {
        let mut state = self.state.lock().expect("not poisoned");
        state.sent += 1;
        let event = Event { seq: state.sent, event: Some(event) };
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
                    let chunk = vec![b'x'; left.min(wire::MAX_FRAME)];
                    send(stdout, &chunk).await;
                    left -= chunk.len();
                    written += chunk.len() as u64;
                }
            }
            ["exit", code] => status = code.parse().expect("a number"),
            ["cat"] => {
                let (mut stdin, stdout) = (stdin.expect("has stdin"), stdout.as_mut().expect("has stdout"));
                let (mut deframer, mut buffer) = (Deframer::default(), vec![0; wire::MAX_FRAME]);
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
            ["hang"] => status = kill.await.map_or(137, |signal| 128 + signal),
            other => panic!("the fake agent does not know {other:?}"),
        }
        {
            let mut state = self.state.lock().expect("not poisoned");
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

    fn register(&self, container_id: String, exec_id: String, process: &serde_json::Value, stdio: agent::Stdio) {
        let args = process["args"].as_array().expect("args").iter();
        let args = args.map(|arg| arg.as_str().expect("a string").to_owned()).collect();
        let process = Process { args, stdio, kill: None, exited: false };
        self.state.lock().expect("not poisoned").processes.insert((container_id, exec_id), process);
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
        let api_version = request.into_inner().api_version;
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
        let (args, stdio) = {
            let mut state = self.state.lock().expect("not poisoned");
            let process = state.processes.get_mut(&id).ok_or_else(|| Status::not_found("no such process"))?;
            process.kill = Some(kill);
            (process.args.clone(), process.stdio.clone())
        };
        if args == ["refuse"] {
            return Err(Status::invalid_argument("exec: \"refuse\": executable file not found in $PATH"));
        }
        // Ends with the test; a panic in it fails the test by what is then missing.
        tokio::task::spawn(self.clone().run(id, args, stdio, killed));
        Ok(Response::new(agent::StartProcessResponse { guest_pid: 7, ..Default::default() }))
    }

    async fn signal_process(
        &self,
        request: Request<agent::SignalProcessRequest>,
    ) -> Answer<agent::SignalProcessResponse> {
        let request = request.into_inner();
        let mut state = self.state.lock().expect("not poisoned");
        let process = state
            .processes
            .get_mut(&(request.container_id, request.exec_id))
            .filter(|process| !process.exited)
            .ok_or_else(|| Status::not_found("process already finished"))?;
        if let Some(kill) = process.kill.take() {
            // It may have ended by itself meanwhile.
            let _ended = kill.send(request.signal);
        }
        Ok(Response::new(agent::SignalProcessResponse {}))
    }

    async fn resize_pty(&self, _: Request<agent::ResizePtyRequest>) -> Answer<agent::ResizePtyResponse> {
        Ok(Response::new(agent::ResizePtyResponse {}))
    }

    async fn delete(&self, request: Request<agent::DeleteRequest>) -> Answer<agent::DeleteResponse> {
        let request = request.into_inner();
        let mut state = self.state.lock().expect("not poisoned");
        state
            .processes
            .remove(&(request.container_id, request.exec_id))
            .map(|_| Response::new(agent::DeleteResponse {}))
            .ok_or_else(|| Status::not_found("no such process"))
    }

    async fn update_container(
        &self,
        _: Request<agent::UpdateContainerRequest>,
    ) -> Answer<agent::UpdateContainerResponse> {
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

    type EventsStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn events(&self, _: Request<agent::EventsRequest>) -> Answer<Self::EventsStream> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.state.lock().expect("not poisoned").events = Some(sender);
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
    }

    async fn shutdown(&self, _: Request<agent::ShutdownRequest>) -> Answer<agent::ShutdownResponse> {
        Ok(Response::new(agent::ShutdownResponse {}))
    }
}
