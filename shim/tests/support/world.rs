//! A driver with a pod that has an agent but no VM, real FIFOs, and a ttrpc server that takes its events.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_shim::container::stdio::StdioPaths;
use bulkhead_shim::container::stdio::streaming::Streams;
use bulkhead_shim::container::{ContainerId, ProcessId};
use bulkhead_shim::error::Result;
use bulkhead_shim::events::EventQueue;
use bulkhead_shim::guest::client::Guest;
use bulkhead_shim::guest::listener::{Acceptor, Listener};
use bulkhead_shim::host::HostThread;
use bulkhead_shim::namespace::{self, ShareRoot};
use bulkhead_shim::sandbox::boot::BootRequest;
use bulkhead_shim::sandbox::driver::Driver;
use bulkhead_shim::sandbox::pod::{Access, Pod};
use bulkhead_shim::sandbox::spec::{SHM_BYTES, SandboxSpec};
use bulkhead_shim::sandbox::{CreateTask, ExecTask, SandboxHandle};
use bulkhead_shim::sizing::{Ceiling, Limits, VmSize};
use bulkhead_shim::storage::block_volume::BlockVolumes;
use bulkhead_shim::storage::common::CommonVolumes;
use bulkhead_shim::storage::container::Place;
use bulkhead_shim::storage::etc::EtcFiles;
use bulkhead_shim::storage::plan::Mount;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Events, create_events};
use futures::FutureExt;
use nix::sys::stat::Mode;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use ttrpc::asynchronous::{Server, TtrpcContext};

use super::agent::FakeAgent;

const PATIENCE: Duration = Duration::from_secs(20);

pub struct World {
    pub sandbox: SandboxHandle,
    dir: TempDir,
    agent: SharedAgent,
    lost: CancellationToken,
    events: EventQueue,
    taken: Taken,
    driver: JoinHandle<()>,
    containerd: Server,
}

/// containerd's ends of a container's FIFOs.
pub struct Fifos {
    stdin: Option<pipe::Sender>,
    stdout: pipe::Receiver,
}

/// What the events say: topic, container id, and for an exit the id of what ended.
type Taken = Arc<Mutex<Vec<(String, String, String)>>>;

/// The agent, once the pod is booted.
type SharedAgent = Arc<Mutex<Option<FakeAgent>>>;

struct Recorder(Taken);

#[async_trait::async_trait]
impl Events for Recorder {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        // Field 1 of every task event is the container's id, so any of them decodes it.
        let event = TaskExit::parse_from_bytes(&envelope.event.value).unwrap_or_default();
        self.0.lock().expect("not poisoned").push((envelope.topic, event.container_id, event.id));
        Ok(Empty::new())
    }
}

impl World {
    /// Id of the pod.
    pub const POD: &str = "pod";

    /// A started pod without containers, whose first task is a pause container.
    pub async fn start() -> Self {
        let world = Self::planned().await;
        let pod = Self::pod(world.dir.path());
        world.sandbox.create(pod).await.expect("creates the pod");
        world.sandbox.start(Self::init(Self::POD)).await.expect("starts the pod");
        world
    }

    /// A started pod without containers, made by the sandbox API.
    pub async fn start_by_sandbox_api() -> Self {
        let world = Self::planned().await;
        world.sandbox.create_sandbox(Self::pod_spec()).await.expect("creates the pod");
        world.sandbox.start(Self::init(Self::POD)).await.expect("starts the pod");
        world
    }

    /// What the sandbox API says of the pod: nothing special.
    pub fn pod_spec() -> SandboxSpec {
        SandboxSpec {
            id: ContainerId(Self::POD.into()),
            options: None,
            netns: None,
            hostname: "compartment".into(),
            sysctls: BTreeMap::new(),
            cgroups_path: String::new(),
            limits: Limits::default(),
            annotations: BTreeMap::new(),
            oom_score_adj: None,
            shm_bytes: SHM_BYTES,
            user_namespace: None,
            etc: Some(bulkhead_shim::storage::etc::Etc { hostname: "compartment".into(), dns: None }),
            hooks: None,
        }
    }

    /// A driver to which nobody has spoken yet.
    pub async fn planned() -> Self {
        let dir = tempfile::tempdir().expect("makes a directory");
        let taken = Taken::default();
        let socket = dir.path().join("events.sock");
        let mut containerd = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .expect("binds")
            .register_service(create_events(Arc::new(Recorder(taken.clone()))));
        containerd.start().await.expect("serves");
        let events = EventQueue::start(socket.to_str(), "test");

        let lost = CancellationToken::new();
        let agent = SharedAgent::default();
        let (root, booter_lost, booter_agent) = (dir.path().to_owned(), lost.clone(), agent.clone());
        let booter = Box::new(move |request: BootRequest| {
            boot(root.clone(), booter_lost.clone(), booter_agent.clone(), request).boxed()
        });
        let (sandbox, commands) = SandboxHandle::new();
        let driver = tokio::task::spawn(Driver::new(booter, events.events()).run(commands));
        Self { sandbox, dir, agent, lost, events, taken, driver, containerd }
    }

    /// What containerd asks for a pod whose bundle is `bundle`.
    pub fn pod(bundle: &Path) -> CreateTask {
        CreateTask {
            id: ContainerId(Self::POD.into()),
            bundle: bundle.to_owned(),
            rootfs: Vec::new(),
            stdio: StdioPaths::default(),
            spec: json!({
                "ociVersion": "1.1.0",
                "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
                "linux": {"namespaces": [{"type": "network", "path": "/proc/self/ns/net"}, {"type": "ipc"}]}
            }),
            options: None,
        }
    }

    /// The agent of a booted pod.
    pub fn agent(&self) -> FakeAgent {
        self.agent.lock().expect("not poisoned").clone().expect("the pod is booted")
    }

    /// Whether the driver has ended.
    pub fn has_ended(&self) -> bool {
        self.driver.is_finished()
    }

    pub fn init(container: &str) -> ProcessId {
        ProcessId::new(container, "")
    }

    pub fn process(container: &str, exec: &str) -> ProcessId {
        ProcessId::new(container, exec)
    }

    /// Creates a container that runs the fake agent's program `args`.
    pub async fn create_container(&self, id: &str, args: Value) -> Result<Fifos> {
        let dir = self.dir.path().join(format!("{id}-{}", rand::random::<u32>()));
        std::fs::create_dir(&dir).expect("makes a bundle");
        let rootfs = dir.join("lower");
        std::fs::create_dir(&rootfs).expect("makes a rootfs");
        let path = |name: &str| dir.join(name).display().to_string();
        for name in ["stdin", "stdout"] {
            nix::unistd::mkfifo(Path::new(&path(name)), Mode::S_IRWXU).expect("makes a FIFO");
        }
        // containerd has its reading end open before it calls.
        let stdout = pipe::OpenOptions::new().open_receiver(path("stdout")).expect("opens");
        let task = CreateTask {
            id: ContainerId(id.into()),
            bundle: dir.clone(),
            rootfs: vec![Mount {
                fstype: "bind".into(),
                source: rootfs.display().to_string(),
                target: String::new(),
                options: vec!["rbind".into()],
            }],
            stdio: StdioPaths { stdin: path("stdin"), stdout: path("stdout"), stderr: String::new(), terminal: false },
            spec: json!({
                "annotations": {"io.kubernetes.cri.container-type": "container"},
                "process": {"args": args, "cwd": "/"},
                "root": {"path": "rootfs"},
                "linux": {"namespaces": [{"type": "pid"}]}
            }),
            options: None,
        };
        self.sandbox.create(task).await?;
        let stdin = pipe::OpenOptions::new().open_sender(path("stdin")).expect("the shim reads");
        Ok(Fifos { stdin: Some(stdin), stdout })
    }

    /// Registers an exec without stdio.
    pub async fn exec(&self, container: &str, exec: &str, args: Value) -> Result<()> {
        let process = json!({"args": args, "cwd": "/"});
        let task = ExecTask { id: Self::process(container, exec), stdio: StdioPaths::default(), process };
        self.sandbox.exec(task).await
    }

    /// What the death of QEMU is to the driver.
    pub fn lose_vm(&self) {
        self.lost.cancel();
    }

    /// Topics of the events of `container` so far, in order.
    pub async fn topics_of(&mut self, container: &str) -> Vec<String> {
        assert!(self.events.events().flush(PATIENCE).await, "events do not leave");
        let taken = self.taken.lock().expect("not poisoned");
        taken.iter().filter(|(_, id, _)| id == container).map(|(topic, ..)| topic.clone()).collect()
    }

    /// Ids of what has exited so far, in order.
    pub async fn exits(&mut self) -> Vec<String> {
        assert!(self.events.events().flush(PATIENCE).await, "events do not leave");
        let taken = self.taken.lock().expect("not poisoned");
        taken.iter().filter(|(topic, ..)| topic == "/tasks/exit").map(|(_, _, id)| id.clone()).collect()
    }

    /// Ends everything.
    pub async fn stop(self) {
        let Self { sandbox, driver, events, mut containerd, .. } = self;
        // With the last handle the driver's queue ends, and with it the driver; unless a shutdown was first.
        drop(sandbox);
        timeout(PATIENCE, driver).await.expect("ends in time").expect("does not panic");
        events.shutdown(PATIENCE).await;
        containerd.shutdown().await.expect("stops");
    }
}

impl Fifos {
    pub async fn write_stdin(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().expect("is open").write_all(bytes).await.expect("the shim reads");
    }

    pub fn drop_stdin(&mut self) {
        self.stdin = None;
    }

    /// Reads what has come, once something has.
    pub async fn read_some(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; 65_536];
        let length = timeout(PATIENCE, self.stdout.read(&mut buffer)).await.expect("in time").expect("reads");
        buffer.truncate(length);
        buffer
    }

    /// Reads to the end that the shim makes when it closes its end.
    pub async fn read_stdout(&mut self) -> Vec<u8> {
        let mut output = Vec::new();
        let mut buffer = vec![0; 65_536];
        loop {
            // A FIFO without a writer yet reads as ended; the shim's is there since the create.
            let length = timeout(PATIENCE, self.stdout.read(&mut buffer)).await.expect("in time").expect("reads");
            if length == 0 {
                return output;
            }
            output.extend_from_slice(&buffer[..length]);
        }
    }
}

async fn boot(root: PathBuf, lost: CancellationToken, shared: SharedAgent, request: BootRequest) -> Result<Pod> {
    let socket = root.join("vsock_1024");
    let acceptor = Acceptor::Unix(UnixListener::bind(&socket).expect("binds"));
    let (listener, control, _task) = Listener::start(acceptor);
    let agent = FakeAgent::serve(&socket).await;
    *shared.lock().expect("not poisoned") = Some(agent);
    let (guest, _guest_task, _hello) = Guest::connect(control, request.guest_events).await?;
    let share = root.join("share");
    let host = HostThread::start(namespace::prepare(share.clone()))?;
    let place = Place {
        host,
        share: ShareRoot::new(share),
        disks: None,
        block_volumes: BlockVolumes::default(),
        common_volumes: CommonVolumes::default(),
    };
    let etc = request.spec.etc.as_ref().map(|etc| EtcFiles::write(&root, etc).expect("writes"));
    let ceiling = Ceiling { limits: request.spec.limits, size: VmSize { vcpus: 1, memory_mib: 256 } };
    let access = Access {
        sandbox_id: World::POD.into(),
        namespace: "test".into(),
        guest,
        listener,
        streams: Streams::new("/run/s/x".into()),
        place,
        etc,
        user_namespace: None,
        ceiling,
        hooks: None,
        netns: None,
    };
    Ok(Pod::without_vm(access, lost))
}
