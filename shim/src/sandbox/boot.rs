//! A cold start, and its undoing.
//!
//! [`boot`] goes through the phases in order and puts each thing it makes into [`Parts`] at once; what can outlive a crash is
//! in the journal before it is made. On an error, or when the sandbox is killed meanwhile, [`Parts::tear_down`] removes
//! what is there, which is also how a running pod ends. What does not depend on each other runs at the same time: the
//! network, virtiofsd, the vsock helper.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_proto::{PORT_PARAMETER, SHARE_TAG, agent};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::annotations::Annotations;
use crate::bootstrap::ServeConfig;
use crate::cgroup::PodCgroup;
use crate::cgroup::memory::OutOfMemory;
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
use crate::guest::client::{Guest, GuestEvent, GuestTask};
use crate::guest::listener::{Listener, ListenerTask};
use crate::guest::transport::{Transport, TransportLaunch};
use crate::hooks::{Hooks, Moment};
use crate::host::HostThread;
use crate::idmap::{IdMapping, IdMappings};
use crate::namespace::{self, ShareRoot};
use crate::network::forward::Forward;
use crate::network::netns::NewNetns;
use crate::network::{self, PodNetwork, TapFiles};
use crate::process::{Child, ChildExit, Credentials};
use crate::sandbox::ledger::Ledger;
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

/// What jobs use of a running pod.
#[derive(Debug, Clone)]
pub struct Access {
    /// The sandbox's id.
    pub sandbox_id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The agent.
    pub guest: Guest,
    /// Where streams are registered.
    pub listener: Listener,
    /// The streams that containerd opens in the place of FIFOs.
    pub streams: Streams,
    /// Where storage goes.
    pub place: Place,
    /// Files that every container of the pod gets; None where containerd makes them.
    pub etc: Option<EtcFiles>,
    /// The maps of the pod's user namespace; None if it has none.
    pub user_namespace: Option<IdMappings>,
    /// What the VM can give.
    pub ceiling: Ceiling,
    /// Hooks of the container, which has no pod; None for none.
    pub hooks: Option<Hooks>,
    /// The pod's network namespace; None if it has none of its own.
    pub netns: Option<PathBuf>,
}

/// Everything of a running pod. [`Pod::tear_down`] ends it.
#[derive(Debug)]
pub struct Pod {
    parts: Parts,
    access: Access,
}

impl Pod {
    /// A pod without a VM, for tests of what stands above one; `lost` is the VM's death.
    pub fn without_vm(access: Access, lost: CancellationToken) -> Self {
        Self { parts: Parts { lost: Some(lost), ..Parts::default() }, access }
    }

    /// Its network namespace; None if it has none of its own.
    pub fn netns(&self) -> Option<&Path> {
        self.access.netns.as_deref()
    }

    /// What jobs use.
    pub fn access(&self) -> Access {
        self.access.clone()
    }

    /// The end of the guest's console.
    pub fn console_tail(&self) -> String {
        self.parts.vm.as_ref().map(Vm::console_tail).unwrap_or_default()
    }

    /// Whether the VM has ended.
    pub fn is_lost(&self) -> bool {
        self.parts.vm.as_ref().is_some_and(|vm| vm.child().exited().borrow().is_some())
    }

    /// Why the VM is lost, as far as QEMU, the console and the pod's cgroup tell; `seen` is what was noticed.
    pub fn obituary(&self, seen: &str) -> String {
        // The helpers end with QEMU, and sometimes are seen first.
        let ended = self.parts.vm.as_ref().filter(|_| self.is_lost());
        let how = ended.map_or_else(|| seen.to_owned(), Vm::obituary);
        match self.parts.out_of_memory() {
            Some(cause) => format!("{how}: {cause}"),
            None => how,
        }
    }

    /// One future for each child: it ends when the child does, and names it.
    pub fn children_ended(&self) -> Vec<BoxFuture<'static, String>> {
        let vm_exit = self.parts.vm.as_ref().map(|vm| vm.child().exited());
        let ended = |child: &Child| {
            let (role, mut exit, mut vm_exit) = (child.role(), child.exited(), vm_exit.clone());
            async move {
                let how = match exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit) {
                    Some(exit) => exit.to_string(),
                    None => "ended with the shim".to_owned(),
                };
                // A helper ends with QEMU, and may be seen first: then QEMU is the news.
                if let Some(vm_exit) = &mut vm_exit {
                    drop(timeout(timeouts::HELPER_EXIT, vm_exit.wait_for(Option::is_some)).await);
                }
                format!("{role} {how}")
            }
            .boxed()
        };
        let mut all: Vec<_> = self.parts.children().map(ended).collect();
        all.extend(self.parts.lost.clone().map(|lost| {
            async move {
                lost.cancelled().await;
                "the virtual machine ended".to_owned()
            }
            .boxed()
        }));
        all
    }

    /// Ends the pod, but for its taps, whose files are returned. Errors are logged; every step is tried.
    pub async fn tear_down(self, guest: Farewell) -> TapFiles {
        self.parts.tear_down(guest).await
    }
}

/// Whether the guest is asked to end before it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// It ends its containers and syncs.
    Asked,
    /// It is lost, or not to be waited for.
    Killed,
}

/// What a boot has made so far.
#[derive(Debug, Default)]
struct Parts {
    journal: Option<Ledger>,
    /// Those that have begun to run.
    hooks: Option<Hooks>,
    /// Made for hooks to fill.
    netns: Option<NewNetns>,
    cgroup: Option<PodCgroup>,
    network: Option<PodNetwork>,
    share: Option<Share>,
    transport: Option<Transport>,
    listener_task: Option<ListenerTask>,
    vm: Option<Vm>,
    guest: Option<Guest>,
    guest_task: Option<GuestTask>,
    forward: Option<Forward>,
    /// In place of a VM's end; see [`Pod::without_vm`].
    lost: Option<CancellationToken>,
}

impl Parts {
    fn children(&self) -> impl Iterator<Item = &Child> {
        let vm = self.vm.as_ref().map(Vm::child);
        let helper = self.transport.as_ref().and_then(Transport::child);
        vm.into_iter().chain(self.share.as_ref().map(Share::child)).chain(helper)
    }

    /// Why the kernel has killed one of the children for want of memory; `None` if it has not.
    fn out_of_memory(&self) -> Option<OutOfMemory> {
        self.cgroup.as_ref().and_then(PodCgroup::out_of_memory)
    }

    /// Removes what is there: the guest first, if it still lives; then QEMU, and beside it what does not serve it; then the
    /// rest.
    async fn tear_down(mut self, farewell: Farewell) -> TapFiles {
        let mut stopwatch = Stopwatch::start();
        if let (Some(guest), Some(vm), Farewell::Asked) = (&self.guest, &self.vm, farewell) {
            // The agent ends the containers and syncs before it answers, so nothing is lost when QEMU goes right after.
            let asked = vm.while_alive("shut the guest down", timeouts::GUEST_SHUTDOWN, guest.shutdown()).await;
            match asked {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the guest did not shut down and is killed"),
                Err(error) => tracing::warn!(%error, "the guest did not shut down and is killed"),
            }
        }
        stopwatch.lap("guest");
        // QEMU's end takes longest; it has been killed before anything else is.
        let mut network = self.network.take().unwrap_or_default();
        let tap_files = std::mem::take(&mut network.tap_files);
        let ((vm, vm_took), (share, share_took), (forward, forward_took), (network, network_took)) = tokio::join!(
            timed(end_vm(self.vm.take())),
            timed(end_share(self.share.take())),
            timed(end_forward(self.forward.take())),
            timed(end_network(network))
        );
        stopwatch.lap("vm");
        let parts = [("qemu", vm_took), ("share", share_took), ("forward", forward_took), ("network", network_took)];
        for (part, took) in parts {
            stopwatch.note(&format!("vm.{part}"), took);
        }
        // Before the helper goes, or it would be told that the connection broke.
        if let Some(task) = self.guest_task.take() {
            task.close().await;
        }
        let transport = end_transport(self.transport.take()).await;
        if let Some(task) = self.listener_task.take() {
            task.close().await;
        }
        stopwatch.lap("helpers");
        let mut failed: Vec<String> = [vm, forward, transport, share, network].into_iter().flatten().collect();
        if let Some(cgroup) = self.cgroup.take()
            && let Err(error) = cgroup.remove().await
        {
            failed.push(error.to_string());
        }
        stopwatch.lap("cgroup");
        if let Some(hooks) = self.hooks.take() {
            let netns = self.netns.as_ref().map(NewNetns::path);
            if let Err(error) = hooks.run(Moment::Stop, netns.as_deref(), None).await {
                tracing::warn!(%error, "a poststop hook failed");
            }
            stopwatch.lap("hooks");
        }
        // The journal goes last, and only when nothing is left that it names.
        match (failed.is_empty(), self.journal.take()) {
            (true, Some(journal)) => {
                if let Err(error) = journal.close().await {
                    tracing::error!(error = %format_args!("{error:#}"), "run state is left");
                }
            }
            (true, None) => {}
            (false, _) => tracing::error!(error = failed.join("; "), "teardown is incomplete; delete will try again"),
        }
        stopwatch.lap("journal");
        tracing::info!(elapsed_ms = stopwatch.total().as_millis(), stages = stopwatch.told(), "sandbox torn down");
        tap_files
    }
}

async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let begun = Instant::now();
    let done = work.await;
    (done, begun.elapsed())
}

async fn end_vm(vm: Option<Vm>) -> Option<String> {
    let vm = vm?;
    vm.kill().await.err().map(|error| format!("QEMU: {error}"))
}

async fn end_forward(forward: Option<Forward>) -> Option<String> {
    let forward = forward?;
    forward.close().await.err().map(|error| format!("port-forward: {error}"))
}

async fn end_transport(transport: Option<Transport>) -> Option<String> {
    let transport = transport?;
    transport.close().await.err().map(|error| format!("vsock helper: {error:#}"))
}

async fn end_share(share: Option<Share>) -> Option<String> {
    let share = share?;
    share.kill().await.err().map(|error| format!("virtiofsd: {error:#}"))
}

async fn end_network(network: PodNetwork) -> Option<String> {
    let mut failed = Vec::new();
    for link in &network.links {
        if let Err(error) = network::detach(link).await {
            failed.push(error.to_string());
        }
    }
    (!failed.is_empty()).then(|| failed.join("; "))
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
