//! An asynchronous QMP client: commands with a deadline each, answers matched by id, events for whoever subscribed.
//!
//! One task owns the socket; handles are cheap. QEMU runs a guest that is not trusted, so what it says is bounded and parsed.
//! <https://www.qemu.org/docs/master/interop/qmp-spec.html>

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::qemu::commands::{Command, QmpCapabilities};
use crate::qemu::event::Event;
use crate::timeouts;

/// The longest message that is accepted, in bytes.
const MESSAGE_LIMIT: usize = 1 << 20;
/// Events that a slow subscriber may be behind before it loses the oldest.
const EVENT_BACKLOG: usize = 64;

/// Why a command has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// QEMU said no.
    #[error("qmp {command}: {text}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's class of the error, such as `GenericError`, `DeviceNotFound`.
        class: String,
        /// QEMU's own words.
        text: String,
    },
    /// The connection has ended, so QEMU has, or is about to.
    #[error("qmp {command}: the connection to QEMU is closed")]
    Closed {
        /// The command.
        command: &'static str,
    },
    /// Nothing came in time.
    #[error("qmp {command}: no answer within {deadline:?}")]
    Deadline {
        /// The command.
        command: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
    /// The answer is not of the shape that the schema promises.
    #[error("qmp {command}: answer not understood: {text}")]
    Malformed {
        /// The command.
        command: &'static str,
        /// What is wrong.
        text: String,
    },
}

/// Handle of a connection to QEMU's monitor; clones share it. The connection ends when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Qmp {
    requests: mpsc::Sender<Request>,
    events: broadcast::Sender<Event>,
    tasks: TaskTracker,
}

impl Qmp {
    /// Greets QEMU over `stream` and negotiates capabilities. Not cancel safe.
    pub async fn connect(stream: UnixStream) -> Result<Self, QmpError> {
        let (requests, queue) = mpsc::channel(16);
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let (greeted, greeting) = oneshot::channel();
        let connection = Connection {
            stream,
            input: Vec::new(),
            outbox: VecDeque::new(),
            pending: HashMap::new(),
            next_id: 0,
            greeted: Some(greeted),
            events: events.clone(),
        };
        let tasks = TaskTracker::new();
        tasks.spawn(connection.run(queue));
        tasks.close();
        let qmp = Self { requests, events, tasks };
        let command = QmpCapabilities::NAME;
        match tokio::time::timeout(timeouts::QMP_COMMAND, greeting).await {
            Err(_) => return Err(QmpError::Deadline { command, deadline: timeouts::QMP_COMMAND }),
            Ok(Err(_)) => return Err(QmpError::Closed { command }),
            Ok(Ok(())) => {}
        }
        qmp.execute(QmpCapabilities {}).await?;
        Ok(qmp)
    }

    /// Sends `command` and awaits its answer. Cancel safe in that QEMU carries it out or not; the answer is lost.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Return, QmpError> {
        self.request(command, None).await
    }

    /// Like [`Self::execute`], with an open file for QEMU (`SCM_RIGHTS`).
    pub async fn execute_with_file<C: Command>(&self, command: C, file: OwnedFd) -> Result<C::Return, QmpError> {
        self.request(command, Some(file)).await
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Waits until the connection has ended, by QEMU's end or by the last other handle's drop.
    pub async fn closed(self) {
        let Self { requests, events, tasks } = self;
        drop((requests, events));
        tasks.wait().await;
    }

    async fn request<C: Command>(&self, arguments: C, file: Option<OwnedFd>) -> Result<C::Return, QmpError> {
        let command = C::NAME;
        let malformed = |error: serde_json::Error| QmpError::Malformed { command, text: error.to_string() };
        let arguments = serde_json::to_value(&arguments).map_err(malformed)?;
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let request = Request { command, arguments, file, reply };
            self.requests.send(request).await.map_err(|_| QmpError::Closed { command })?;
            answer.await.map_err(|_| QmpError::Closed { command })?
        };
        let deadline = timeouts::QMP_COMMAND;
        let answer = tokio::time::timeout(deadline, exchange).await;
        let answer = answer.map_err(|_| QmpError::Deadline { command, deadline })??;
        serde_json::from_value(answer).map_err(malformed)
    }
}

type Reply = oneshot::Sender<Result<Value, QmpError>>;

struct Request {
    command: &'static str,
    arguments: Value,
    file: Option<OwnedFd>,
    reply: Reply,
}

/// What is still to be written: the file travels with the first byte.
struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
    file: Option<OwnedFd>,
}

struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    outbox: VecDeque<Outgoing>,
    pending: HashMap<u64, (&'static str, Reply)>,
    next_id: u64,
    greeted: Option<oneshot::Sender<()>>,
    events: broadcast::Sender<Event>,
}

impl Connection {
    /// Serves requests until either side ends; dropping what is pending tells its callers.
    async fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        loop {
            let wanted =
                if self.outbox.is_empty() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
            tokio::select! {
                request = queue.recv() => match request {
                    Some(request) => self.enqueue(request),
                    None => return,
                },
                ready = self.stream.ready(wanted) => {
                    let result = ready.and_then(|ready| {
                        if ready.is_writable() {
                            self.write()?;
                        }
                        if ready.is_readable() || ready.is_read_closed() { self.read() } else { Ok(()) }
                    });
                    if let Err(error) = result {
                        tracing::debug!(%error, "the connection to QEMU's monitor has ended");
                        return;
                    }
                }
            }
        }
    }

    fn enqueue(&mut self, request: Request) {
        let id = self.next_id;
        self.next_id += 1;
        let message = json!({ "execute": request.command, "arguments": request.arguments, "id": id });
        tracing::debug!(command = request.command, id, "qmp command");
        let mut bytes = message.to_string().into_bytes();
        bytes.push(b'\n');
        self.outbox.push_back(Outgoing { bytes, written: 0, file: request.file });
        self.pending.insert(id, (request.command, request.reply));
    }

    fn write(&mut self) -> io::Result<()> {
        while let Some(outgoing) = self.outbox.front_mut() {
            match send(&self.stream, &outgoing.bytes[outgoing.written..], outgoing.file.as_ref()) {
                Ok(sent) => {
                    outgoing.written += sent;
                    outgoing.file = None;
                    if outgoing.written == outgoing.bytes.len() {
                        self.outbox.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.try_read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.input.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                if !line.trim_ascii().is_empty() {
                    self.receive(&serde_json::from_slice(&line)?);
                }
            }
            if self.input.len() > MESSAGE_LIMIT {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "message longer than 1 MiB"));
            }
        }
    }

    fn receive(&mut self, message: &Value) {
        if let Some(event) = Event::parse(message) {
            tracing::debug!(?event, "qmp event");
            // Nobody has to listen.
            let _subscribers = self.events.send(event);
        } else if message.get("QMP").is_some() {
            if let Some(greeted) = self.greeted.take() {
                // Whoever connects may have given up.
                let _waiting = greeted.send(());
            }
        } else if let Some((command, reply)) =
            message.get("id").and_then(Value::as_u64).and_then(|id| self.pending.remove(&id))
        {
            let answer = match (message.get("return"), message.get("error")) {
                (Some(value), _) => Ok(value.clone()),
                (None, Some(error)) => {
                    let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                    Err(QmpError::Refused { command, class: text("class"), text: text("desc") })
                }
                (None, None) => Err(QmpError::Malformed { command, text: "neither return nor error".into() }),
            };
            // A caller whose deadline has passed is gone.
            let _waiting = reply.send(answer);
        }
    }
}

/// Sends a part of `bytes`, and `file` along with it.
fn send(stream: &UnixStream, bytes: &[u8], file: Option<&OwnedFd>) -> io::Result<usize> {
    stream.try_io(Interest::WRITABLE, || {
        let files = file.map(|file| [file.as_raw_fd()]);
        let rights = files.as_ref().map(|files| [ControlMessage::ScmRights(files)]);
        let control = rights.as_ref().map_or(&[][..], |rights| &rights[..]);
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        Ok(sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?)
    })
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tasks and children of a test end with the test")]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    use crate::qemu::commands::{AddFd, Cont, DeviceDel, Empty, QueryStatus, StatusInfo, Stop};
    use nix::sys::socket::{ControlMessageOwned, recvmsg};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";

    /// A peer that says `greeting`, then answers each command with the next line of the script (`ID` replaced).
    fn scripted(
        greeting: &'static str,
        script: Vec<(&'static str, &'static str)>,
    ) -> (UnixStream, tokio::task::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let peer = tokio::spawn(async move {
            let (read, mut write) = theirs.into_split();
            write.write_all(greeting.as_bytes()).await.expect("writes");
            let mut lines = BufReader::new(read).lines();
            for (expected, answer) in script {
                let line = lines.next_line().await.expect("reads").expect("a command");
                let message: Value = serde_json::from_str(&line).expect("json");
                assert_eq!(message["execute"], expected);
                write.write_all(answer.replace("ID", &message["id"].to_string()).as_bytes()).await.expect("writes");
            }
            // Held open until the client goes.
            while let Ok(Some(_)) = lines.next_line().await {}
        });
        (ours, peer)
    }

    const HELLO: (&str, &str) = ("qmp_capabilities", "{\"return\": {}, \"id\": ID}\r\n");

    #[tokio::test]
    async fn a_command_gets_its_typed_answer() {
        let status = "{\"return\": {\"status\": \"running\", \"running\": true, \"new\": 1}, \"id\": ID}\r\n";
        let (stream, peer) = scripted(GREETING, vec![HELLO, ("query-status", status)]);
        let qmp = Qmp::connect(stream).await.expect("connects");
        let answer = qmp.execute(QueryStatus {}).await;
        assert_eq!(answer, Ok(StatusInfo { running: true, status: "running".into() }));
        qmp.closed().await;
        peer.await.expect("keeps to the script");
    }

    #[tokio::test]
    async fn events_between_command_and_answer_reach_the_subscriber() {
        let answer =
            "{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"d\"}}\r\n{\"return\": {}, \"id\": ID}\r\n";
        let (stream, _peer) = scripted(GREETING, vec![HELLO, ("device_del", answer)]);
        let qmp = Qmp::connect(stream).await.expect("connects");
        let mut events = qmp.events();
        assert_eq!(qmp.execute(DeviceDel { id: "d".into() }).await, Ok(Empty {}));
        assert_eq!(events.try_recv(), Ok(Event::DeviceDeleted { device: "d".into() }));
    }

    #[tokio::test]
    async fn a_refusal_carries_qemus_words() {
        let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such device\"}, \"id\": ID}\r\n";
        let (stream, _peer) = scripted(GREETING, vec![HELLO, ("stop", refusal)]);
        let qmp = Qmp::connect(stream).await.expect("connects");
        let error = qmp.execute(Stop {}).await.expect_err("refused");
        assert_eq!(error.to_string(), "qmp stop: no such device");
    }

    #[tokio::test]
    async fn answers_in_another_order_find_their_commands() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let peer = async {
            let (read, mut write) = theirs.into_split();
            let mut lines = BufReader::new(read).lines();
            write.write_all(GREETING.as_bytes()).await.expect("writes");
            lines.next_line().await.expect("capabilities");
            write.write_all(b"{\"return\": {}, \"id\": 0}\n").await.expect("writes");
            lines.next_line().await.expect("first");
            lines.next_line().await.expect("second");
            write
                .write_all(b"{\"error\": {\"desc\": \"second\"}, \"id\": 2}\n{\"return\": {}, \"id\": 1}\n")
                .await
                .expect("writes");
        };
        let client = async {
            let qmp = Qmp::connect(ours).await.expect("connects");
            tokio::join!(qmp.execute(Stop {}), qmp.execute(Cont {}))
        };
        let (answers, ()) = tokio::join!(client, peer);
        assert_eq!(answers.0, Ok(Empty {}));
        assert_eq!(answers.1.expect_err("refused").to_string(), "qmp cont: second");
    }

    #[tokio::test]
    async fn the_end_of_qemu_fails_what_is_pending_and_what_comes() {
        let (ours, mut theirs) = UnixStream::pair().expect("socket pair");
        theirs.write_all(GREETING.as_bytes()).await.expect("writes");
        let connect = Qmp::connect(ours);
        let peer = async {
            let mut lines = BufReader::new(&mut theirs).lines();
            lines.next_line().await.expect("capabilities");
            lines.get_mut().write_all(b"{\"return\": {}, \"id\": 0}\n").await.expect("writes");
            lines.next_line().await.expect("stop");
            drop(theirs);
        };
        let client = async {
            let qmp = connect.await.expect("connects");
            (qmp.execute(Stop {}).await, qmp.execute(Cont {}).await)
        };
        let (answers, ()) = tokio::join!(client, peer);
        assert_eq!(answers.0, Err(QmpError::Closed { command: "stop" }));
        assert_eq!(answers.1, Err(QmpError::Closed { command: "cont" }));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_at_the_deadline() {
        let (stream, _peer) = scripted(GREETING, vec![HELLO, ("stop", "")]);
        let qmp = Qmp::connect(stream).await.expect("connects");
        let error = qmp.execute(Stop {}).await.expect_err("no answer");
        assert_eq!(error.to_string(), "qmp stop: no answer within 10s");
        let (silent, _theirs) = UnixStream::pair().expect("socket pair");
        let error = Qmp::connect(silent).await.expect_err("no greeting");
        assert_eq!(error.to_string(), "qmp qmp_capabilities: no answer within 10s");
    }

    #[tokio::test]
    async fn rubbish_and_endless_lines_end_the_connection() {
        for rubbish in ["nonsense\n".to_owned(), "x".repeat(MESSAGE_LIMIT + 8192)] {
            let (ours, mut theirs) = UnixStream::pair().expect("socket pair");
            let write = async {
                // Fails when the client has hung up in the middle.
                let _cut_off = theirs.write_all(rubbish.as_bytes()).await;
            };
            let (result, ()) = tokio::join!(Qmp::connect(ours), write);
            assert_eq!(result.expect_err("hangs up"), QmpError::Closed { command: "qmp_capabilities" });
        }
    }

    #[tokio::test]
    async fn a_file_travels_with_its_command() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        theirs.try_write(GREETING.as_bytes()).expect("writes");
        // Whatever a child of another test keeps open of it would keep the pipe from ending.
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
        let client = async {
            let qmp = Qmp::connect(ours).await.expect("connects");
            qmp.execute_with_file(AddFd { opaque: "disk".into() }, writer).await.expect("is answered")
        };
        let peer = async {
            let mut received = Vec::new();
            for answer in ["{\"return\": {}, \"id\": 0}\n", "{\"return\": {\"fdset-id\": 4, \"fd\": 20}, \"id\": 1}\n"]
            {
                theirs
                    .async_io(Interest::READABLE, || {
                        let mut buffer = [0; 1024];
                        let mut space = nix::cmsg_space!([i32; 1]);
                        let mut slices = [io::IoSliceMut::new(&mut buffer)];
                        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
                        let message = recvmsg::<()>(theirs.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
                        for control in message.cmsgs()? {
                            if let ControlMessageOwned::ScmRights(files) = control {
                                received.extend(files);
                            }
                        }
                        Ok(())
                    })
                    .await
                    .expect("receives");
                theirs.try_write(answer.as_bytes()).expect("writes");
            }
            received
        };
        let (info, received) = tokio::join!(client, peer);
        assert_eq!((info.fdset_id, info.fd), (4, 20));
        assert_eq!(received.len(), 1);
        // What is written into the received file comes out of the pipe.
        let path = format!("/proc/self/fd/{}", received[0]);
        std::fs::write(path, b"same file").expect("writes");
        nix::unistd::close(received[0]).expect("closes");
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).expect("reads");
        assert_eq!(text, "same file");
    }
}
