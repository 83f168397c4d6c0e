//! A guest booted in QEMU, and the host's side of the agent's wire protocol: listen, take the control connection, hand
//! streams to whoever named their token.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_proto::agent::agent_client::AgentClient;
use bulkhead_proto::agent::{self as api, Event, event};
use bulkhead_proto::wire::{Deframer, END, Kind, ONE_PACKET, Preamble, Token, frame_header};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

/// Everything the host does ends within this.
pub const DEADLINE: Duration = Duration::from_secs(60);

type Streams = Arc<Mutex<HashMap<Token, oneshot::Sender<UnixStream>>>>;

/// A running guest. Dropping it kills it.
pub struct Machine {
    pub client: AgentClient<Channel>,
    pub events: mpsc::UnboundedReceiver<Event>,
    pub directory: tempfile::TempDir,
    pub hello: api::HelloResponse,
    streams: Streams,
    /// Control connections that the guest has dialled since, with the secret that each brought.
    controls: mpsc::Receiver<(UnixStream, Token)>,
    following: tokio::task::JoinHandle<()>,
    next_token: AtomicU64,
    children: Vec<Child>,
    tasks: JoinSet<()>,
}

/// What the host tells the guest in `Hello`, to be recognised by.
const SECRET: Token = [9; 16];

/// A disk that is there from the start.
pub struct Disk<'a> {
    pub serial: &'a str,
    pub image: &'a Path,
}

/// What a guest is booted from.
struct Assets {
    /// `vmlinux` and `initramfs`, from `BULKHEAD_TEST_ASSETS`.
    guest: PathBuf,
    /// `virtiofsd`, from `BULKHEAD_CACHE`.
    tools: PathBuf,
}

impl Assets {
    fn find() -> Option<Self> {
        let guest = PathBuf::from(std::env::var_os("BULKHEAD_TEST_ASSETS")?);
        let tools = PathBuf::from(std::env::var_os("BULKHEAD_CACHE")?).join("tools/bin");
        let complete = guest.join("vmlinux").exists() && guest.join("initramfs").exists() && tools.exists();
        complete.then_some(Self { guest, tools })
    }
}

impl Machine {
    /// Boots a guest with `memory_mib`; none, with a printed reason, where that cannot be.
    pub async fn boot(memory_mib: u32) -> Option<Self> {
        Self::boot_with_disks(memory_mib, &[]).await
    }

    /// Boots a guest with `disks`.
    pub async fn boot_with_disks(memory_mib: u32, disks: &[Disk<'_>]) -> Option<Self> {
        let Some(Assets { guest, tools }) = Assets::find() else {
            println!(
                "skipped: BULKHEAD_TEST_ASSETS (vmlinux, initramfs) and BULKHEAD_CACHE (tools/bin) are not set: run make test"
            );
            return None;
        };
        let directory = tempfile::tempdir().expect("tempdir");
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir(path("share")).expect("mkdir");

        let listener = UnixListener::bind(path("vsock_1024")).expect("listen");
        let mut children = Vec::new();
        let helper = |program: PathBuf, arguments: &[String], log: &str| {
            let log = File::create(path(log)).expect("log");
            Command::new(program)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("log"))
                .stderr(log)
                .spawn()
                .expect("start a helper")
        };
        let text = |name: &str| path(name).display().to_string();
        let vsock = [
            "--guest-cid=3".into(),
            format!("--uds-path={}", text("vsock")),
            format!("--socket={}", text("vsock.sock")),
        ];
        // `make` puts both below one directory.
        children.push(helper(guest.join("../release/bulkhead-vsock"), &vsock, "vsock.log"));
        let share = [
            "--shared-dir".into(),
            text("share"),
            "--socket-path".into(),
            text("fs.sock"),
            "--sandbox=none".into(),
            "--inode-file-handles=never".into(),
        ];
        children.push(helper(tools.join("virtiofsd"), &share, "virtiofsd.log"));
        for socket in ["vsock.sock", "fs.sock"] {
            wait_for(&path(socket)).await;
        }
        let qemu: Vec<String> = [
            "-M microvm,acpi=off,pit=on,pic=on,rtc=on,memory-backend=ram -accel tcg,tb-size=256 -cpu max,-erms,-fsrm -nodefaults -no-user-config",
            "-display none -no-reboot -serial stdio",
            &format!("-m {memory_mib} -object memory-backend-memfd,id=ram,share=on,size={memory_mib}M"),
            &format!("-kernel {} -initrd {}", guest.join("vmlinux").display(), guest.join("initramfs").display()),
            &format!("-chardev socket,id=v,path={} -device vhost-user-vsock-device,chardev=v", text("vsock.sock")),
            &format!("-chardev socket,id=f,path={} -device vhost-user-fs-device,chardev=f,tag=share", text("fs.sock")),
        ]
        .iter()
        .flat_map(|words| words.split(' ').map(str::to_owned).collect::<Vec<_>>())
        .chain(["-netdev".to_owned(), "user,id=n".to_owned()])
        .chain(["-device".to_owned(), "virtio-net-device,netdev=n,mac=02:00:00:00:00:05".to_owned()])
        .chain(["-append".to_owned(), "console=ttyS0 quiet panic=-1".to_owned()])
        .chain(["-device".to_owned(), "virtio-scsi-device,id=scsi".to_owned()])
        .chain(disks.iter().enumerate().flat_map(|(n, Disk { serial, image })| {
            let node = format!("driver=raw,node-name=disk{n},file.driver=file,file.filename={}", image.display());
            let device = format!("scsi-hd,bus=scsi.0,drive=disk{n},lun={n},serial={serial}");
            ["-blockdev".to_owned(), node, "-device".to_owned(), device]
        }))
        .collect();
        children.push(helper("qemu-system-x86_64".into(), &qemu, "console.log"));

        let streams: Streams = Arc::default();
        let mut tasks = JoinSet::new();
        let (control_sender, mut controls) = mpsc::channel(1);
        tasks.spawn(accept(listener, Arc::clone(&streams), control_sender));
        let Ok(Some((control, _))) = tokio::time::timeout(DEADLINE, controls.recv()).await else {
            panic!("no guest: {}", std::fs::read_to_string(path("console.log")).unwrap_or_default());
        };
        let (client, hello, events, following) = greet(control, 0).await;
        let next_token = AtomicU64::new(1);
        Some(Self { client, events, directory, hello, streams, controls, following, next_token, children, tasks })
    }

    /// Breaks the control connection, with every call on it, and takes the next one; events go on after `seen`.
    pub async fn reconnect(&mut self, seen: u64) {
        self.following.abort();
        // The old channel ends with its last clone.
        self.client = AgentClient::new(Endpoint::from_static("http://nobody").connect_lazy());
        let dialled = tokio::time::timeout(DEADLINE, self.controls.recv()).await.expect("in time");
        let (control, secret) = dialled.expect("the guest dials again");
        assert_eq!(secret, SECRET, "a later connection brings the secret");
        (self.client, self.hello, self.events, self.following) = greet(control, seen).await;
    }

    /// Reserves a token; the stream comes when the guest dials it.
    pub fn stream(&self) -> (Vec<u8>, oneshot::Receiver<UnixStream>) {
        let mut token = Token::default();
        token[..8].copy_from_slice(&self.next_token.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        let (sender, receiver) = oneshot::channel();
        self.streams.lock().expect("streams").insert(token, sender);
        (token.to_vec(), receiver)
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("console.log")).unwrap_or_default()
    }

    /// A path of the host below the share.
    pub fn share(&self, below: &str) -> PathBuf {
        self.directory.path().join("share").join(below)
    }

    /// The next exit; other events are passed to `other`.
    pub async fn exit(&mut self, mut other: impl FnMut(event::Event)) -> api::Exit {
        let wait = async {
            loop {
                match self.events.recv().await.and_then(|event| event.event) {
                    Some(event::Event::Exit(exit)) => return exit,
                    Some(event) => other(event),
                    None => panic!("the event stream ended"),
                }
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.expect("an exit within the deadline")
    }

    /// Waits for QEMU's end.
    pub async fn powered_off(&mut self) -> bool {
        let qemu = self.children.last_mut().expect("qemu");
        for _ in 0..600 {
            if qemu.try_wait().expect("wait").is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.following.abort();
        self.tasks.abort_all();
        for child in self.children.iter_mut().rev() {
            // One that has ended by itself is as good.
            drop(child.kill());
            drop(child.wait());
        }
        if std::thread::panicking() {
            println!("console:\n{}", self.console());
        }
    }
}

/// Waits until a helper listens at `path`. The file is there before that, and a dial is refused as long.
async fn wait_for(path: &Path) {
    let listening = async {
        while !is_listening(path) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let done = tokio::time::timeout(DEADLINE, listening).await;
    assert!(done.is_ok(), "nobody listens at {}", path.display());
}

/// Whether a socket that takes connections is bound to `path`, as proc_pid_net(5) tells.
fn is_listening(path: &Path) -> bool {
    // The names of others need not be text.
    let sockets = std::fs::read("/proc/net/unix").expect("sockets");
    String::from_utf8_lossy(&sockets).lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // The flag is the kernel's __SO_ACCEPTCON.
        matches!(fields[..], [_, _, _, "00010000", _, _, _, bound] if Path::new(bound) == path)
    })
}

/// Says hello on a control connection and follows its events.
async fn greet(
    control: UnixStream,
    seen: u64,
) -> (AgentClient<Channel>, api::HelloResponse, mpsc::UnboundedReceiver<Event>, tokio::task::JoinHandle<()>) {
    let mut client = client(control).await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock").as_nanos() as u64;
    let request = api::HelloRequest { api_version: 1, session_secret: SECRET.to_vec(), host_time_unix_ns: now };
    let hello = client.hello(request).await.expect("hello").into_inner();
    let mut stream = client.events(api::EventsRequest { after_seq: seen }).await.expect("events").into_inner();
    let (event_sender, events) = mpsc::unbounded_channel();
    #[allow(clippy::disallowed_methods, reason = "ends with the connection")]
    let following = tokio::spawn(async move {
        while let Ok(Some(event)) = stream.message().await {
            if event_sender.send(event).is_err() {
                return;
            }
        }
    });
    (client, hello, events, following)
}

async fn accept(listener: UnixListener, streams: Streams, controls: mpsc::Sender<(UnixStream, Token)>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { return };
        let (streams, controls) = (Arc::clone(&streams), controls.clone());
        connections.spawn(async move {
            let mut bytes = [0; Preamble::LEN];
            if stream.read_exact(&mut bytes).await.is_err() {
                return;
            }
            match Preamble::decode(&bytes).expect("preamble") {
                Preamble { kind: Kind::Control, token } => drop(controls.send((stream, token)).await),
                Preamble { kind: Kind::Stream, token } => {
                    if let Some(waiter) = streams.lock().expect("streams").remove(&token) {
                        drop(waiter.send(stream));
                    }
                }
            }
        });
    }
}

/// The gRPC client on a connection the guest dialled.
async fn client(stream: UnixStream) -> AgentClient<Channel> {
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    let connector = tower::service_fn(move |_| {
        let stream = stream.lock().expect("stream").take();
        async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    });
    let channel = Endpoint::from_static("http://agent").connect_with_connector(connector).await.expect("connect");
    AgentClient::new(channel)
}

/// Reads a stream the guest writes, to its end, and closes it.
pub async fn read_all(stream: oneshot::Receiver<UnixStream>) -> Vec<u8> {
    let read = async {
        let (mut stream, mut deframer, mut bytes) = (stream.await.expect("dialled"), Deframer::default(), Vec::new());
        let mut buffer = vec![0; 256 * 1024];
        while !deframer.ended() {
            let count = stream.read(&mut buffer).await.expect("read");
            assert!(count > 0, "the connection ended before the stream");
            let mut input = &buffer[..count];
            while let Some(payload) = deframer.next(&mut input).expect("frame") {
                bytes.extend_from_slice(payload);
            }
        }
        bytes
    };
    tokio::time::timeout(DEADLINE, read).await.expect("the stream's end within the deadline")
}

/// Writes a stream the guest reads, ends it and waits for the guest to close.
pub async fn write_all(stream: oneshot::Receiver<UnixStream>, bytes: &[u8]) {
    let write = async {
        let mut stream = stream.await.expect("dialled");
        for chunk in bytes.chunks(ONE_PACKET) {
            stream.write_all(&frame_header(chunk.len())).await.expect("write");
            stream.write_all(chunk).await.expect("write");
        }
        stream.write_all(&END).await.expect("write");
        stream.read_to_end(&mut Vec::new()).await.expect("closed");
    };
    tokio::time::timeout(DEADLINE, write).await.expect("everything taken within the deadline");
}

/// Reads exactly `length` bytes of payload from a stream that goes on; they must not end within a frame.
pub async fn read_payload(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = async {
        while bytes.len() < length {
            let size = stream.read_u32_le().await.expect("frame header") as usize;
            let start = bytes.len();
            bytes.resize(start + size, 0);
            stream.read_exact(&mut bytes[start..]).await.expect("frame");
        }
    };
    let done = tokio::time::timeout(DEADLINE, read).await;
    assert!(done.is_ok(), "{} of {length} bytes within the deadline", bytes.len());
    bytes
}

/// Writes one frame.
pub async fn write_payload(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(&frame_header(bytes.len())).await.expect("write");
    stream.write_all(bytes).await.expect("write");
}
