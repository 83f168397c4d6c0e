//! Everything of the one pod in this guest: the verbs of the API, on containers by id.
//!
//! A verb runs as a job of its own, so that a broken connection does not stop it half way; who repeats the request after
//! a reconnect waits for the same job and gets the same answer.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bulkhead_proto::agent as api;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use oci_spec::runtime::{LinuxResources, User};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cgroup::Cgroup;
use crate::container::{Container, check_id};
use crate::error::{During, Error, Result};
use crate::events::Events;
use crate::idmap::{IdMap, Owner};
use crate::link::Host;
use crate::mount::CommonMounts;
use crate::namespaces::Namespaces;
use crate::reaper::{ExitStatus, Reaper};
use crate::runtime::spawner::Spawner;
use crate::runtime::{Request, Started};
use crate::sandbox;
use crate::stdio::Carrier;
use crate::volume::MemoryVolumes;

/// Time between two samples of statistics.
const SAMPLING: Duration = Duration::from_secs(1);
/// By then the answer that the pod is ready has left a machine with one CPU; a container that comes sooner does not wait.
const ANSWERED: Duration = Duration::from_millis(10);
/// How long killed containers may take to report their end at shutdown.
const KILLED: Duration = Duration::from_secs(5);

/// What containers and processes need of the agent.
pub struct Services {
    /// Where streams go.
    pub host: Host,
    /// What moves them.
    pub carrier: Carrier,
    /// Waits for processes.
    pub reaper: Arc<Reaper>,
    /// Where events go.
    pub events: Arc<Events>,
    /// Holds every task.
    pub tracker: TaskTracker,
    /// The agent's end.
    pub cancel: CancellationToken,
    /// Volumes that are the guest's own.
    pub volumes: MemoryVolumes,
    /// Volumes in the share that containers have in common.
    pub common: Arc<CommonMounts>,
    spawner: Arc<Spawner>,
    namespaces: OnceLock<Arc<Namespaces>>,
}

impl Services {
    /// Services that reach the host by `host`.
    pub fn start(host: Host) -> Result<Self> {
        Ok(Self {
            host,
            carrier: Carrier::start()?,
            reaper: Arc::default(),
            events: Arc::default(),
            tracker: TaskTracker::new(),
            cancel: CancellationToken::new(),
            volumes: MemoryVolumes::default(),
            common: Arc::default(),
            spawner: Arc::default(),
            namespaces: OnceLock::new(),
        })
    }

    /// The pod's own namespaces; none if it has no user namespace.
    pub fn namespaces(&self) -> Option<&Arc<Namespaces>> {
        self.namespaces.get()
    }

    /// Makes the pod's own namespaces, or finds those that an earlier attempt has made.
    pub async fn isolate(self: &Arc<Self>, request: &api::UserNamespace) -> Result<Arc<Namespaces>> {
        let ids = IdMap::parse(request)?;
        if let Some(made) = self.namespaces() {
            return Ok(Arc::clone(made));
        }
        let unable = |error: Error| error.during("make the pod's user namespace");
        // The process ends by itself; the files keep what it made.
        let (_made, _exit) = self.spawn(Namespaces::request(&ids)?, Vec::new()).await.map_err(unable)?;
        let made = Arc::new(Namespaces::open(ids)?);
        Ok(Arc::clone(self.namespaces.get_or_init(|| made)))
    }

    /// Who `user` is in the guest.
    pub fn owner(&self, user: &User) -> Result<Owner> {
        self.namespaces().map_or_else(|| Ok(Owner::unmapped(user)), |namespaces| namespaces.ids.owner(user))
    }

    /// Sets sysctls of the pod's namespaces.
    pub async fn set_sysctls(&self, sysctls: BTreeMap<String, String>) -> Result<()> {
        let set = move || sysctls.iter().try_for_each(|(name, value)| sandbox::set_sysctl(name, value));
        match self.namespaces() {
            None => set(),
            Some(namespaces) => namespaces.run_as_root(set).await,
        }
    }

    /// Has the spawner start a process; the exit of that process comes through the receiver.
    pub async fn spawn(
        self: &Arc<Self>,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<(Started, oneshot::Receiver<ExitStatus>)> {
        let spawning = self.reaper.spawning();
        let spawner = Arc::clone(&self.spawner);
        let started = tokio::task::spawn_blocking(move || spawner.run(&request, &fds)).await.during(|| "spawn")??;
        let exit = spawning.claim(started.pid);
        Ok((started, exit))
    }

    /// Starts the spawner, after `delay`, before the first container needs it. Returns at once.
    fn warm_up(self: &Arc<Self>, delay: Duration) {
        let services = Arc::clone(self);
        self.tracker.spawn(async move {
            tokio::select! {
                () = services.cancel.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
            let spawner = Arc::clone(&services.spawner);
            let started = tokio::task::spawn_blocking(move || spawner.warm_up()).await;
            if let Err(error) = started.during(|| "start the spawner").flatten() {
                tracing::warn!(%error, "the spawner will be started by the first request");
            }
        });
    }
}

type Job<T> = Shared<BoxFuture<'static, Result<T>>>;

/// The pod; see the module's documentation.
pub struct Pod {
    services: Arc<Services>,
    slots: Mutex<HashMap<String, Slot>>,
    sandbox: Mutex<Option<Job<api::CreateSandboxResponse>>>,
    /// Guest path of the pod-wide PID namespace.
    holder: Mutex<Option<Job<String>>>,
    /// Of all containers together.
    cgroup: Cgroup,
}

/// A container's id is taken from the moment its creation begins.
struct Slot {
    created: Job<Created>,
    started: Option<Job<api::StartProcessResponse>>,
    /// Starts of execs, until those are deleted.
    execs: HashMap<String, Job<api::StartProcessResponse>>,
}

#[derive(Clone)]
struct Created {
    container: Arc<Container>,
    response: api::CreateContainerResponse,
}

impl Pod {
    /// An empty pod.
    pub fn new(services: Arc<Services>) -> Arc<Self> {
        Arc::new(Self {
            services,
            slots: Mutex::default(),
            sandbox: Mutex::default(),
            holder: Mutex::default(),
            cgroup: Cgroup::of_all(),
        })
    }

    /// What the pod works with.
    pub fn services(&self) -> &Arc<Services> {
        &self.services
    }

    fn job<T: Clone + Send + Sync + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Job<T> {
        let handle = self.services.tracker.spawn(work);
        async move { handle.await.unwrap_or_else(|error| Err(Error::internal(format!("the agent failed: {error}")))) }
            .boxed()
            .shared()
    }

    /// Makes the guest a pod; a failure may be tried again.
    pub async fn create_sandbox(&self, request: api::CreateSandboxRequest) -> Result<api::CreateSandboxResponse> {
        let job = {
            let mut sandbox = self.sandbox.lock().unwrap_or_else(PoisonError::into_inner);
            let failed = sandbox.as_ref().and_then(|job| job.peek()).is_some_and(Result::is_err);
            match sandbox.as_ref() {
                Some(job) if !failed => job.clone(),
                _ => {
                    let services = Arc::clone(&self.services);
                    let job = self.job(async move {
                        let created = sandbox::create(&services, request).await?;
                        services.warm_up(ANSWERED);
                        Ok(created)
                    });
                    sandbox.insert(job).clone()
                }
            }
        };
        job.await
    }

    /// Creates a container.
    pub async fn create_container(
        self: &Arc<Self>,
        request: api::CreateContainerRequest,
    ) -> Result<api::CreateContainerResponse> {
        check_id(&request.container_id)?;
        let id = request.container_id.clone();
        let job = {
            let mut slots = self.slots();
            match slots.get(&id) {
                Some(slot) => slot.created.clone(),
                None => {
                    let pod = Arc::clone(self);
                    let created = self.job(async move { pod.make_container(request).await });
                    slots.insert(id.clone(), Slot { created: created.clone(), started: None, execs: HashMap::new() });
                    created
                }
            }
        };
        job.await.map(|created| created.response)
    }

    async fn make_container(self: Arc<Self>, request: api::CreateContainerRequest) -> Result<Created> {
        let id = request.container_id.clone();
        let created = async {
            let pid_namespace = self.pid_namespace(&request).await?;
            let (container, response) = Container::create(&self.services, request, pid_namespace).await?;
            Ok(Created { container, response })
        };
        let created = created.await;
        if created.is_err() {
            // The id is free again; who waits for this job still gets its answer.
            self.slots().remove(&id);
        }
        created
    }

    async fn pid_namespace(&self, request: &api::CreateContainerRequest) -> Result<Option<String>> {
        match request.pid_namespace() {
            api::PidNamespace::Container => Ok(None),
            api::PidNamespace::Target => self.container(&request.pid_namespace_target).await?.pid_namespace().map(Some),
            api::PidNamespace::Pod => {
                let job = {
                    let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
                    let failed = holder.as_ref().and_then(|job| job.peek()).is_some_and(Result::is_err);
                    match holder.as_ref() {
                        Some(job) if !failed => job.clone(),
                        _ => {
                            let services = Arc::clone(&self.services);
                            let job = self.job(async move { hold(&services).await });
                            holder.insert(job).clone()
                        }
                    }
                };
                job.await.map(Some)
            }
        }
    }

    /// The created container with this id; waits for a creation under way.
    async fn container(&self, id: &str) -> Result<Arc<Container>> {
        let created = self.slots().get(id).map(|slot| slot.created.clone());
        let missing = || Error::not_found(format!("container {id} does not exist"));
        created.ok_or_else(missing)?.await.map(|created| created.container).map_err(|_| missing())
    }

    /// Registers an exec.
    pub async fn create_process(&self, request: api::CreateProcessRequest) -> Result<()> {
        self.container(&request.container_id).await?.create_process(&self.services, request)
    }

    /// Runs a created process.
    pub async fn start_process(
        self: &Arc<Self>,
        container_id: &str,
        exec_id: &str,
    ) -> Result<api::StartProcessResponse> {
        let container = self.container(container_id).await?;
        if !exec_id.is_empty() {
            // One that was never registered must not take the id.
            container.process(exec_id)?;
        }
        let job = {
            let mut slots = self.slots();
            let slot = slots
                .get_mut(container_id)
                .ok_or_else(|| Error::not_found(format!("container {container_id} does not exist")))?;
            if exec_id.is_empty() {
                slot.started.get_or_insert_with(|| self.job(async move { container.start().await })).clone()
            } else {
                let start = || {
                    let (services, exec_id) = (Arc::clone(&self.services), exec_id.to_owned());
                    self.job(async move { container.start_exec(&services, &exec_id).await })
                };
                slot.execs.entry(exec_id.to_owned()).or_insert_with(start).clone()
            }
        };
        job.await
    }

    /// Signals a process or all of a container.
    pub async fn signal(&self, request: &api::SignalProcessRequest) -> Result<()> {
        let number = i32::try_from(request.signal).ok().filter(|number| (0..=64).contains(number));
        let number = number.ok_or_else(|| Error::invalid(format!("{} is not a signal number", request.signal)))?;
        self.container(&request.container_id).await?.signal(&request.exec_id, number, request.all)
    }

    /// Resizes a pty.
    pub async fn resize(&self, request: &api::ResizePtyRequest) -> Result<()> {
        let container = self.container(&request.container_id).await?;
        container.process(&request.exec_id)?.resize(request.height, request.width)
    }

    /// Forgets a process or a container.
    pub async fn delete(self: &Arc<Self>, container_id: &str, exec_id: &str) -> Result<api::DeleteResponse> {
        let container = self.container(container_id).await?;
        let (pod, exec_id) = (Arc::clone(self), exec_id.to_owned());
        self.job(async move {
            if !exec_id.is_empty() {
                container.delete_exec(&exec_id).await?;
                pod.services.events.forget(&container.id, &exec_id);
                if let Some(slot) = pod.slots().get_mut(&container.id) {
                    slot.execs.remove(&exec_id);
                }
                return Ok(api::DeleteResponse::default());
            }
            let answer = container.delete().await?;
            pod.services.events.forget(&container.id, "");
            pod.slots().remove(&container.id);
            Ok(answer)
        })
        .await
    }

    /// Changes a container's limits.
    pub async fn update(&self, container_id: &str, resources_json: &[u8]) -> Result<()> {
        let resources = resources(resources_json)?;
        let container = self.container(container_id).await?;
        // The kernel takes memory back before it returns.
        tokio::task::spawn_blocking(move || container.update(&resources)).await.during(|| "change limits")?
    }

    /// Changes what all containers together may use.
    pub async fn update_all(&self, resources_json: &[u8]) -> Result<()> {
        let resources = resources(resources_json)?;
        let cgroup = self.cgroup.clone();
        tokio::task::spawn_blocking(move || cgroup.apply(&resources)).await.during(|| "change the pod's limits")?
    }

    /// Stops or continues a container.
    pub async fn freeze(&self, container_id: &str, frozen: bool) -> Result<()> {
        let container = self.container(container_id).await?;
        tokio::task::spawn_blocking(move || container.freeze(frozen)).await.during(|| "freeze")?
    }

    /// Guest pids of a container.
    pub async fn processes(&self, container_id: &str) -> Result<Vec<u32>> {
        let processes = self.container(container_id).await?.processes()?;
        Ok(processes.into_iter().map(|pid| pid as u32).collect())
    }

    /// Samples every container each second while somebody listens; until the agent's end.
    pub async fn sample(self: Arc<Self>) {
        let mut tick = tokio::time::interval(SAMPLING);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.services.cancel.cancelled() => return,
            }
            if !self.services.events.watched() {
                continue;
            }
            for container in self.containers() {
                let sampled = tokio::task::spawn_blocking(move || container.sample()).await;
                if let Ok(Some(sample)) = sampled {
                    self.services.events.stats(sample);
                }
            }
        }
    }

    /// Kills every container and waits, bounded, for their exits to be reported.
    pub async fn kill_all(&self) {
        let containers = self.containers();
        for container in &containers {
            if let Err(error) = container.kill() {
                tracing::warn!(container_id = container.id, %error, "container was not killed");
            }
        }
        let ended = async {
            for container in &containers {
                container.stopped().await;
            }
        };
        if tokio::time::timeout(KILLED, ended).await.is_err() {
            tracing::warn!("containers outlive their kill");
        }
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        let slots = self.slots();
        let created = slots.values().filter_map(|slot| slot.created.peek());
        created.filter_map(|created| created.as_ref().ok()).map(|created| Arc::clone(&created.container)).collect()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the pod-wide PID namespace; returns its guest path.
async fn hold(services: &Arc<Services>) -> Result<String> {
    let namespaces = services.namespaces();
    let request = Request::Hold { user_namespace: namespaces.map(|namespaces| namespaces.user()) };
    let (Started { pid, .. }, _exit) = services.spawn(request, Vec::new()).await?;
    match namespaces {
        None => Ok(format!("/proc/{pid}/ns/pid")),
        Some(namespaces) => namespaces.keep_pid(pid).map(|path| path.display().to_string()),
    }
}

fn resources(json: &[u8]) -> Result<LinuxResources> {
    serde_json::from_slice(json).map_err(|error| Error::invalid(format!("OCI resources: {error}")))
}
