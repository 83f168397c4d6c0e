//! A cold start.
//!
//! [`boot`] goes through the phases in order and puts each thing it makes into [`Parts`] at once; what can outlive a crash is
//! in the journal before it is made. On an error, or when the sandbox is killed meanwhile, [`Parts::tear_down`] removes
//! what is there, which is also how a running pod ends. What does not depend on each other runs at the same time: the
//! network, virtiofsd, the vsock helper.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::{PORT_PARAMETER, SHARE_TAG, agent};
use futures::FutureExt as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::annotations::Annotations;
use crate::bootstrap::ServeConfig;
use crate::cgroup::PodCgroup;
use crate::config::{Asset, Config};
use crate::container::pid::HostPid;
use crate::container::stdio::streaming::Streams;
use crate::device::balloon::Balloon;
use crate::device::block::ScsiController;
use crate::device::file::FileRole;
use crate::device::fs::Fs;
use crate::device::net::{MacAddress, Net};
use crate::device::rng::Rng;
use crate::device::vsock::Vsock;
use crate::device::{Device, DeviceId};
use crate::error::{Error, Kind, Result, WithKind};
use crate::guest::client::{Guest, GuestEvent};
use crate::guest::listener::Listener;
use crate::guest::transport::{Transport, TransportLaunch};
use crate::hooks::Moment;
use crate::host::HostThread;
use crate::idmap::IdMapping;
use crate::namespace::{self, ShareRoot};
use crate::network::forward::Forward;
use crate::network::netns::NewNetns;
use crate::network::{self, PodNetwork};
use crate::process::{Child, ChildExit, Credentials};
use crate::sandbox::ledger::Ledger;
use crate::sandbox::pod::{Access, Farewell, Parts, Pod};
use crate::sandbox::spec::SandboxSpec;
use crate::sizing::{self, Ceiling, Host, VmSize};
use crate::stopwatch::Stopwatch;
use crate::storage::block_volume::BlockVolumes;
use crate::storage::common::CommonVolumes;
use crate::storage::container::Place;
use crate::storage::etc::EtcFiles;
use crate::storage::share::{Share, ShareLaunch};
use crate::store::Entry;
use crate::timeouts;
use crate::vm::accel::{self, Choice};
use crate::vm::config::VmConfig;
use crate::vm::{Vm, VmLaunch};

/// Which sandbox this shim is for, and how it was told to make one.
#[derive(Debug)]
pub struct SandboxIdentity {
    /// The sandbox's id; for a container without a pod, the container's.
    pub sandbox_id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's bundle.
    pub bundle: PathBuf,
    /// Directory of the run state; made by the boot.
    pub directory: PathBuf,
    /// Where containerd reaches the shim.
    pub socket_path: PathBuf,
    /// The streams that it opens there.
    pub streams: Streams,
    /// Path of this binary, beside which an installation has its files.
    pub exe: PathBuf,
    /// The configuration that `start` read.
    pub config: Config,
    /// It came of the runtime's options; if not, those of the first Create count.
    pub options_given: bool,
}

impl SandboxIdentity {
    /// What `start` handed over.
    pub fn new(config: &ServeConfig) -> Self {
        Self {
            sandbox_id: config.sandbox_id.clone(),
            namespace: config.namespace.clone(),
            bundle: config.bundle.clone(),
            directory: config.sandbox_dir.clone(),
            socket_path: config.socket_path.clone(),
            streams: Streams::new(config.socket_path.clone()),
            exe: config.exe.clone(),
            config: config.config.clone(),
            options_given: config.options_given,
        }
    }

    /// The configuration that counts: `start`'s, or where it was given none, that of the first Create's options.
    fn config_for(&self, spec: &SandboxSpec) -> Result<Config> {
        match &spec.options {
            Some((type_url, value)) if !self.options_given => self.config.adopt(type_url, value),
            _ => Ok(self.config.clone()),
        }
    }
}

/// What a boot has decided before it touches anything.
struct Plan {
    config: Config,
    size: VmSize,
    accel: Choice,
    kernel: PathBuf,
    initramfs: PathBuf,
    qemu: PathBuf,
    virtiofsd: PathBuf,
    cgroup: Vec<PathBuf>,
    oom_score_adj: Option<i32>,
    /// QEMU and the vsock helper run as this user and group, which no other pod has.
    uid: u32,
}

impl Plan {
    /// Blocks on the file system.
    fn make(identity: &SandboxIdentity, spec: &SandboxSpec) -> Result<Self> {
        let config = identity.config_for(spec)?;
        let pairs = spec.annotations.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let annotations = Annotations::parse(pairs, &config.allowed_annotations)?;
        let size = sizing::size(spec.limits, &annotations, &config, Host::measure()?);
        let accel = accel::detect(config.qemu.accel)?;
        let find = |asset| config.find(asset, &identity.exe);
        Ok(Self {
            size,
            accel,
            kernel: find(Asset::Kernel)?,
            initramfs: find(Asset::Initramfs)?,
            qemu: find(Asset::Qemu)?,
            virtiofsd: find(Asset::Virtiofsd)?,
            cgroup: PodCgroup::plan(&spec.cgroups_path, &identity.sandbox_id)?,
            oom_score_adj: spec.oom_score_adj,
            uid: rand::random_range(FIRST_UID..=LAST_UID),
            config: Config { machine: annotations.machine.unwrap_or(config.machine), ..config },
        })
    }
}

/// Range of the users of pods: above what systemd and kubelet hand out.
const FIRST_UID: u32 = 0x6000_0000;
const LAST_UID: u32 = 0x6fff_ffff;

/// What a boot is asked for.
#[derive(Debug)]
pub struct BootRequest {
    /// The sandbox.
    pub spec: Arc<SandboxSpec>,
    /// Where the guest's events go.
    pub guest_events: mpsc::Sender<GuestEvent>,
    /// Fires when the sandbox is killed meanwhile.
    pub cancel: CancellationToken,
}

/// Boots the pod that the request describes. On an error, or when its `cancel` fires, nothing of it is left.
///
/// Not cancel safe itself: run it as a job.
pub async fn boot(identity: Arc<SandboxIdentity>, request: BootRequest) -> Result<Pod> {
    let mut parts = Parts::default();
    let mut stopwatch = Stopwatch::start();
    match assemble(&identity, request, &mut parts, &mut stopwatch).await {
        Ok(access) => {
            tracing::info!(
                sandbox_id = %identity.sandbox_id,
                elapsed_ms = stopwatch.total().as_millis(),
                stages = stopwatch.told(),
                "sandbox started"
            );
            Ok(Pod { parts, access })
        }
        Err(error) => {
            if let Some(console) = parts.vm.as_ref().map(Vm::console_line).filter(|console| !console.is_empty()) {
                tracing::error!(sandbox_id = %identity.sandbox_id, console, "the guest's console ends before the boot does");
            }
            // Whatever the boot fell over, it could not go on without that process. The counters go with the cgroup.
            let error = match parts.out_of_memory() {
                Some(cause) => error.because(cause),
                None => error,
            };
            parts.tear_down(Farewell::Killed).await.close().await;
            Err(error.context(format!("boot of sandbox {} ({})", identity.sandbox_id, stopwatch.told())))
        }
    }
}

/// The phases in order.
async fn assemble(
    identity: &Arc<SandboxIdentity>,
    request: BootRequest,
    parts: &mut Parts,
    stopwatch: &mut Stopwatch,
) -> Result<Access> {
    let plan = {
        let (identity, spec) = (Arc::clone(identity), Arc::clone(&request.spec));
        blocking("plan the sandbox", move || Plan::make(&identity, &spec)).await?
    };
    if let Some(reason) = &plan.accel.no_kvm {
        tracing::warn!(reason, "no hardware virtualisation: QEMU emulates, which is slow");
    }
    let share = ShareRoot::new(identity.directory.join("share"));
    let journal = {
        let identity = Arc::clone(identity);
        blocking("begin the journal", move || Ledger::begin(&identity)).await?
    };
    let journal = parts.journal.insert(journal).clone();
    let etc = {
        let (identity, spec) = (Arc::clone(identity), Arc::clone(&request.spec));
        let write = move || Ok(spec.etc.as_ref().map(|etc| EtcFiles::write(&identity.directory, etc)).transpose()?);
        blocking("write the pod's files of /etc", write).await?
    };
    let host = {
        let root = identity.directory.join("share");
        blocking("prepare the pod's mount namespace", move || Ok(HostThread::start(namespace::prepare(root))?)).await?
    };
    journal.record(plan.cgroup.iter().map(|path| Entry::Cgroup { path: path.clone() }).collect()).await?;
    let directories = plan.cgroup.clone();
    parts.cgroup = Some(blocking("make the pod's cgroup", || PodCgroup::create(directories)).await?);
    stopwatch.lap("plan");
    alive(&request.cancel)?;

    let netns = network_namespace(&request.spec, &identity.bundle, parts, &journal).await?;
    if request.spec.hooks.is_some() {
        stopwatch.lap("hooks");
        alive(&request.cancel)?;
    }
    let cgroup = parts.cgroup.as_ref().ok_or_else(|| Error::internal("the pod's cgroup is gone"))?;
    let launch = ShareLaunch {
        program: plan.virtiofsd.clone(),
        share: share.clone(),
        directory: identity.directory.clone(),
        cgroup: cgroup.procs()?,
        oom_score_adj: plan.oom_score_adj,
        user_namespace: request.spec.user_namespace.is_some(),
    };
    let transport = TransportLaunch {
        program: {
            let (config, exe) = (plan.config.clone(), identity.exe.clone());
            move || config.find(Asset::VsockHelper, &exe)
        },
        directory: identity.directory.clone(),
        credentials: Credentials::unprivileged(plan.uid, plan.uid),
        cgroup: cgroup.procs()?,
        oom_score_adj: plan.oom_score_adj,
    };
    let (network, started_share, transport) = tokio::join!(
        attach_network(netns.as_deref(), &journal),
        Share::start(&host, launch),
        Transport::start(&host, transport)
    );
    // All three before any `?`: what was made must be in `parts` when another one failed.
    let network = network.map(|network| parts.network.insert(network));
    let started_share = started_share.map(|share| parts.share.insert(share));
    let transport = transport.map(|transport| parts.transport.insert(transport));
    let (network, started_share, transport) = (network?, started_share?, transport?);
    journal.record_child(started_share.child()).await?;
    if let Some(child) = transport.child() {
        journal.record_child(child).await?;
    }
    let (listener, connections, listener_task) = Listener::start(transport.take_acceptor()?);
    parts.listener_task = Some(listener_task);
    stopwatch.lap("helpers");
    alive(&request.cancel)?;

    let (vm_config, files) = vm_config(identity, &plan, network, started_share, transport)?;
    let launch = VmLaunch {
        qemu: plan.qemu.clone(),
        credentials: Credentials::unprivileged(plan.uid, plan.uid),
        cgroup: cgroup.procs()?,
        oom_score_adj: plan.oom_score_adj,
        files,
        transcript: Some(identity.directory.clone()),
    };
    let vm = match Vm::boot(&host, &vm_config, launch).await {
        Ok(vm) => parts.vm.insert(vm),
        Err(error) => {
            // QEMU ends when a helper does, and complains of a broken connection: the helper's words are the reason. But
            // virtiofsd also ends, with 0, when it has no QEMU any more: then what befell QEMU is the reason.
            let failed = helper_failed([Some(started_share.child()), transport.child()]);
            return Err(match timeout(timeouts::HELPER_EXIT, failed).await {
                Ok(failed) => Error::unavailable(failed),
                Err(_) => error.into(),
            });
        }
    };
    journal.record_child(vm.child()).await?;
    stopwatch.lap("qemu");
    alive(&request.cancel)?;

    let greeted = async {
        tokio::select! {
            greeted = Guest::connect(connections, request.guest_events) => greeted,
            () = request.cancel.cancelled() => Err(killed()),
            ended = helper_ended([Some(started_share.child()), transport.child()]) => {
                // Helpers end with QEMU, and may be seen first: then QEMU's end is the reason.
                Err(match timeout(timeouts::HELPER_EXIT, vm.child().wait()).await {
                    Ok(_) => Error::unavailable(vm.obituary()).context("wait for the guest"),
                    Err(_) => Error::unavailable(ended),
                })
            }
        }
    };
    let (guest, guest_task, hello) = vm.while_alive("wait for the guest", timeouts::GUEST_BOOT, greeted).await??;
    parts.guest_task = Some(guest_task);
    let guest = parts.guest.insert(guest).clone();
    stopwatch.lap("guest");
    stopwatch.note("guest.kernel", Duration::from_micros(hello.init_started_us));
    stopwatch.note("guest.init", Duration::from_micros(hello.hello_answered_us.saturating_sub(hello.init_started_us)));

    let create = create_sandbox(&request.spec, network);
    let created = vm.while_alive("make the guest a pod", timeouts::AGENT_CREATE, guest.create_sandbox(create));
    let forward = start_forward(netns.as_deref(), &guest, &listener);
    let (created, forward) = tokio::join!(created, forward);
    // Before any `?`, as above.
    parts.forward = forward;
    let created = created??;
    stopwatch.lap("pod");
    stopwatch.note_guest("pod", &created.stages);
    alive(&request.cancel)?;
    Ok(Access {
        sandbox_id: identity.sandbox_id.clone(),
        namespace: identity.namespace.clone(),
        guest,
        listener,
        streams: identity.streams.clone(),
        place: Place {
            host,
            share,
            disks: vm.disks(),
            block_volumes: BlockVolumes::default(),
            common_volumes: CommonVolumes::default(),
        },
        etc,
        user_namespace: request.spec.user_namespace.clone(),
        ceiling: Ceiling { limits: request.spec.limits, size: plan.size },
        hooks: request.spec.hooks.clone(),
        netns,
    })
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal(format!("{what}: {error}")))?
}

fn killed() -> Error {
    Error::unavailable("the sandbox was killed while it booted")
}

fn alive(cancel: &CancellationToken) -> Result<()> {
    if cancel.is_cancelled() { Err(killed()) } else { Ok(()) }
}

/// Ends when one of the helpers does, with its last words.
async fn helper_ended(children: [Option<&Child>; 2]) -> String {
    let ends = children.into_iter().flatten().map(|child| {
        async move {
            child.wait().await;
            child.obituary()
        }
        .boxed()
    });
    futures::future::select_all(ends).await.0
}

/// Waits until a helper ends in any other way than by exiting with 0.
async fn helper_failed(children: [Option<&Child>; 2]) -> String {
    let ends = children.into_iter().flatten().map(|child| {
        async move {
            if child.wait().await == ChildExit::Exited(0) {
                futures::future::pending::<()>().await;
            }
            child.obituary()
        }
        .boxed()
    });
    futures::future::select_all(ends).await.0
}

/// The network namespace of the pod, after the hooks that may fill it: the given one, or where there is none, a new one for
/// them. None without either.
async fn network_namespace(
    spec: &SandboxSpec,
    bundle: &Path,
    parts: &mut Parts,
    journal: &Ledger,
) -> Result<Option<PathBuf>> {
    let Some(hooks) = &spec.hooks else { return Ok(spec.netns.clone()) };
    journal.record(vec![Entry::Hooks { id: spec.id.0.clone(), bundle: bundle.to_owned() }]).await?;
    // Also those of a creation that fails are undone.
    parts.hooks = Some(hooks.clone());
    let netns = match &spec.netns {
        None if hooks.prepare_network() => Some(parts.netns.insert(NewNetns::create().await?).path()),
        given => given.clone(),
    };
    // Whose pid a hook is told must lead to no network of the host's: links are moved by it.
    let mut pid = HostPid::allocate().or_kind(Kind::Internal, "take a pid for hooks")?;
    match &netns {
        Some(netns) => pid.enter_network(netns),
        None => pid.enter_empty_network(),
    }
    .or_kind(Kind::InvalidArgument, "the container's network namespace")?;
    hooks.run(Moment::Create, netns.as_deref(), Some(pid.get())).await?;
    Ok(netns)
}

async fn attach_network(netns: Option<&Path>, journal: &Ledger) -> Result<PodNetwork> {
    let Some(netns) = netns else { return Ok(PodNetwork::default()) };
    let journal = journal.clone();
    network::read_and_attach(netns, move |links| {
        journal.record_blocking(links.iter().cloned().map(Entry::Link).collect())
    })
    .await
}

/// A pod without port-forward is a pod all the same: what stands in the way is told once.
async fn start_forward(netns: Option<&Path>, guest: &Guest, streams: &Listener) -> Option<Forward> {
    match Forward::start(netns?, guest.clone(), streams.clone()).await {
        Ok(forward) => Some(forward),
        Err(error) => {
            tracing::warn!(%error, "port-forward does not work in this pod: its loopback cannot be steered");
            None
        }
    }
}

/// The VM's devices, in the order of their slots, and the files behind them.
fn vm_config(
    identity: &SandboxIdentity,
    plan: &Plan,
    network: &mut PodNetwork,
    share: &mut Share,
    transport: &mut Transport,
) -> Result<(VmConfig, Vec<(FileRole, std::os::fd::OwnedFd)>)> {
    let id = |name: &str| DeviceId::new(name).or_kind(Kind::Internal, "name a device");
    let (mut devices, mut files) = (Vec::new(), Vec::new());
    for (index, tap) in network.taps.drain(..).enumerate() {
        let id = id(&format!("net{index}"))?;
        devices.push(Device::Net(Net { id: id.clone(), mac: MacAddress(tap.mac), vhost: tap.vhost.is_some() }));
        files.push((FileRole::Tap(id.clone()), tap.fd));
        files.extend(tap.vhost.map(|vhost| (FileRole::VhostNet(id), vhost)));
    }
    let fs = id("share")?;
    let socket = share.take_socket().ok_or_else(|| Error::internal("virtiofsd's socket is taken already"))?;
    devices.push(Device::Fs(Fs { id: fs.clone(), tag: SHARE_TAG.into() }));
    files.push((FileRole::VhostUser(fs), socket));
    let vsock = id("vsock")?;
    devices.push(Device::Vsock(Vsock { id: vsock.clone(), backend: transport.backend() }));
    files.push(transport.take_file(vsock)?);
    devices.push(Device::Scsi(ScsiController { id: id("scsi")? }));
    devices.push(Device::Rng(Rng { id: id("rng")? }));
    devices.push(Device::Balloon(Balloon { id: id("balloon")? }));
    let config = VmConfig {
        name: identity.sandbox_id.clone(),
        machine: plan.config.machine,
        accel: plan.accel.accel,
        vcpus: plan.size.vcpus,
        memory_mib: plan.size.memory_mib,
        kernel: plan.kernel.clone(),
        initramfs: plan.initramfs.clone(),
        kernel_params: vec![format!("{PORT_PARAMETER}={}", transport.port())],
        devices,
    };
    Ok((config, files))
}

fn create_sandbox(spec: &SandboxSpec, network: &PodNetwork) -> agent::CreateSandboxRequest {
    agent::CreateSandboxRequest {
        hostname: spec.hostname.clone(),
        sysctls: spec.sysctls.clone().into_iter().collect(),
        interfaces: network.interfaces.clone(),
        routes: network.routes.clone(),
        neighbours: network.neighbours.clone(),
        shm_size_bytes: spec.shm_bytes,
        share_tag: SHARE_TAG.into(),
        user_namespace: spec.user_namespace.as_ref().map(|mappings| {
            // Ids outside are in the guest what they are on the host.
            let ranges = |map: &[IdMapping]| {
                map.iter()
                    .map(|&IdMapping { container_id, host_id, size }| agent::IdMapping {
                        container_id,
                        guest_id: host_id,
                        size,
                    })
                    .collect()
            };
            agent::UserNamespace { uids: ranges(&mappings.uids), gids: ranges(&mappings.gids) }
        }),
    }
}
