//! One container: its rootfs, cgroup, init and execs, from creation to deletion.
//!
//! Owned by [`crate::pod::Pod`]. Order is a promise: an exec's exit comes before the init's, an OOM before the exit it
//! caused, the last statistics before the init's exit.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_proto::agent as api;
use oci_spec::runtime::{LinuxResources, LinuxSeccomp};
use tokio_util::sync::CancellationToken;

use crate::cgroup::Cgroup;
use crate::error::{During, Error, Result};
use crate::mount::{self, Stack};
use crate::pod::Services;
use crate::process::{Phase, Process};
use crate::reaper::ExitStatus;
use crate::runtime::{Exec, Request, Started, create::NOTIFY_FILE};
use crate::sandbox::Stages;
use crate::spec::{self, Guest, Source, Spec};
use crate::stdio::{self, Plan, Streams};
use crate::{metrics, node, oom, passwd, volume};

/// Directories of containers: rootfs, layers, bundle.
const CONTAINERS: &str = "/run/bulkhead/containers";
/// libcontainer's own state.
const STATE: &str = "/run/bulkhead/oci";
/// How long execs may take to die with their container.
const EXECS_GONE: Duration = Duration::from_secs(10);
/// Names of files end here; ids of containerd have 64 letters.
const ID_AT_MOST: usize = 200;

/// Signals that end a program which does not handle them.
const TERMINATING: [i32; 5] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGKILL];

/// A container; see the module's documentation.
pub struct Container {
    /// Its id.
    pub id: String,
    directory: PathBuf,
    cgroup: Cgroup,
    /// It has a PID namespace of its own, which the kernel empties when the init ends.
    ends_with_init: bool,
    remains: tokio::sync::Mutex<Remains>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Registered>>,
    seccomp: Option<LinuxSeccomp>,
    oom: oom::Watch,
    /// Its disks, by the guest's own nodes.
    disks: Vec<PathBuf>,
    paused: Mutex<bool>,
    cancel: CancellationToken,
}

/// What outlives a container's processes. Locked while it is being cleared away.
#[derive(Default)]
struct Remains {
    rootfs: Stack,
    cleared: bool,
    /// How long that took.
    stages: Vec<api::Stage>,
}

/// An exec and what it was registered with.
#[derive(Clone)]
struct Registered {
    process: Arc<Process>,
    spec: Arc<oci_spec::runtime::Process>,
    json: Vec<u8>,
}

/// Checks an id of the shim's: it becomes a file name.
pub fn check_id(id: &str) -> Result<()> {
    let fits = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '.' | '-' | '+');
    if id.is_empty() || id.len() > ID_AT_MOST || id.starts_with('.') || !id.chars().all(fits) {
        return Err(Error::invalid(format!(
            "{id:?} is not a container id: 1 to {ID_AT_MOST} letters, digits, '_', '-', '+' or '.', the first not '.'"
        )));
    }
    Ok(())
}

impl Container {
    /// Prepares a container up to its init waiting for the start. On error nothing is left.
    pub async fn create(
        services: &Arc<Services>,
        request: api::CreateContainerRequest,
        pid_namespace: Option<String>,
    ) -> Result<(Arc<Self>, api::CreateContainerResponse)> {
        let id = request.container_id.clone();
        let directory = Path::new(CONTAINERS).join(&id);
        let mut rootfs = Stack::default();
        let created = Self::build(services, request, pid_namespace, &directory, &mut rootfs).await;
        match created {
            Ok((mut container, exit, response)) => {
                container.remains.get_mut().rootfs = rootfs;
                container.directory = directory;
                let container = Arc::new(container);
                services.tracker.spawn(Arc::clone(&container).supervise(Arc::clone(services), exit));
                services.tracker.spawn(Arc::clone(&container).watch_oom(Arc::clone(services)));
                Ok((container, response))
            }
            Err(error) => {
                let undone = tokio::task::spawn_blocking(move || clean_up(&id, &directory, &mut rootfs)).await;
                if let Err(problem) = undone.during(|| "clean up").and_then(|undone| undone) {
                    tracing::warn!(error = %problem, "failed container left something behind");
                }
                Err(error)
            }
        }
    }

    async fn build(
        services: &Arc<Services>,
        request: api::CreateContainerRequest,
        pid_namespace: Option<String>,
        directory: &Path,
        mounts: &mut Stack,
    ) -> Result<(Self, tokio::sync::oneshot::Receiver<ExitStatus>, api::CreateContainerResponse)> {
        let id = request.container_id;
        let ends_with_init = pid_namespace.is_none();
        let mut stages = Stages::start();
        let stdio = Plan::parse(request.stdio)?;
        let rootfs = directory.join("rootfs");
        let namespaces = services.namespaces();
        let guest = Guest {
            container_id: &id,
            rootfs: &rootfs,
            pid_namespace,
            namespaces: namespaces.map(|namespaces| namespaces.directory()),
            terminal: stdio.terminal,
        };
        let mut spec = spec::rewrite(&request.spec_json, &guest)?;
        let owner = services.owner(spec.process.user())?;

        fs::create_dir_all(&rootfs).during(|| "create the container's directory")?;
        fs::create_dir_all(STATE).during(|| "create the runtime's directory")?;
        mounts.mount(request.rootfs, &directory.join("layers"), &rootfs).await?;
        let nodes = node::find(request.block_devices).await?;
        stages.done("rootfs");

        services.set_sysctls(std::mem::take(&mut spec.sysctls)).await?;
        let (mut stack, volumes) = (std::mem::take(mounts), request.memory_volumes);
        let (container_id, root, with) = (id.clone(), rootfs.clone(), Arc::clone(services));
        // What the share answers takes as long as the host likes.
        let prepared = tokio::task::spawn_blocking(move || {
            let prepared = prepare(&with, &container_id, &root, &volumes, &mut spec, &mut stack);
            (prepared, spec, stack)
        });
        let (prepared, mut spec, stack) = prepared.await.during(|| "prepare the container's mounts")?;
        *mounts = stack;
        prepared?;
        node::make(&node::enter(&nodes, &mut spec, &id, namespaces.is_some()))?;
        let cgroup = Cgroup::create(&id)?;
        cgroup.apply(&spec.resources)?;
        cgroup.filter_devices(&spec.resources)?;
        if let Some(namespaces) = namespaces.filter(|_| spec.cgroup_writable) {
            cgroup.give_to(namespaces.ids.root())?;
        }
        let oom = oom::Watch::new(cgroup.directory())?;
        let config = serde_json::to_vec(&spec.config).during(|| "write config.json")?;
        fs::write(directory.join("config.json"), config).during(|| "write config.json")?;
        stages.done("prepare");

        let (child, ends) = stdio::open(&stdio, owner)?;
        let run = Request::Create {
            id: id.clone(),
            bundle: directory.to_owned(),
            state: PathBuf::from(STATE),
            terminal: stdio.terminal,
            limits: spec.process.rlimits().clone().unwrap_or_default(),
        };
        let (started, exit) = services.spawn(run, child.0).await.map_err(unable)?;
        stages.done("create");

        let init = Arc::new(Process::new(String::new(), stdio, Arc::clone(&services.reaper)));
        let pid = started.pid;
        let attached = Streams::run(&init.stdio, ends, started.terminal, &services.host, &services.carrier);
        match attached {
            Ok(streams) => init.attach(pid, streams),
            Err(error) => {
                cgroup.kill()?;
                return Err(error);
            }
        }
        let container = Self {
            id,
            directory: PathBuf::new(),
            cgroup,
            ends_with_init,
            remains: tokio::sync::Mutex::default(),
            init,
            execs: Mutex::default(),
            seccomp: spec.seccomp,
            oom,
            disks: nodes.iter().map(|node| node.disk().to_owned()).collect(),
            paused: Mutex::new(false),
            cancel: services.cancel.child_token(),
        };
        let response = api::CreateContainerResponse { guest_pid: pid as u32, stages: stages.stages };
        Ok((container, exit, response))
    }

    /// The init, or an exec.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let found = self.execs().get(exec_id).map(|registered| Arc::clone(&registered.process));
        found.ok_or_else(|| Error::not_found(format!("exec {exec_id} of container {} does not exist", self.id)))
    }

    /// Lets the waiting init run its program.
    pub async fn start(&self) -> Result<api::StartProcessResponse> {
        let mut stages = Stages::start();
        self.init.advance(Phase::Created, Phase::Running)?;
        let socket = Path::new(STATE).join(&self.id).join(NOTIFY_FILE);
        let told = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
            let mut socket = UnixStream::connect(socket)?;
            socket.write_all(b"start container")
        });
        told.await.during(|| "start the container")?.during(|| "start the container")?;
        stages.done("start");
        Ok(api::StartProcessResponse { guest_pid: self.init.pid().unwrap_or(0) as u32, stages: stages.stages })
    }

    /// Registers an exec; the same registration may be repeated.
    pub fn create_process(&self, services: &Services, request: api::CreateProcessRequest) -> Result<()> {
        check_id(&request.exec_id)?;
        let stdio = Plan::parse(request.stdio)?;
        let spec = Arc::new(spec::exec_process(&request.process_json, stdio.terminal)?);
        services.owner(spec.user())?;
        let mut execs = self.execs();
        if let Some(existing) = execs.get(&request.exec_id) {
            if existing.json == request.process_json && existing.process.phase() == Phase::Created {
                return Ok(());
            }
            return Err(Error::exists(format!("exec {} of container {} exists", request.exec_id, self.id)));
        }
        self.check_running("exec")?;
        let process = Arc::new(Process::new(request.exec_id.clone(), stdio, Arc::clone(&services.reaper)));
        execs.insert(request.exec_id, Registered { process, spec, json: request.process_json });
        Ok(())
    }

    /// Runs a registered exec.
    pub async fn start_exec(
        self: &Arc<Self>,
        services: &Arc<Services>,
        exec_id: &str,
    ) -> Result<api::StartProcessResponse> {
        let registered = self.execs().get(exec_id).cloned();
        let Registered { process, spec, .. } = registered
            .ok_or_else(|| Error::not_found(format!("exec {exec_id} of container {} does not exist", self.id)))?;
        process.advance(Phase::Created, Phase::Starting)?;
        let started = self.run_exec(services, &process, &spec).await;
        if started.is_err() {
            process.stop();
        }
        started
    }

    async fn run_exec(
        self: &Arc<Self>,
        services: &Arc<Services>,
        process: &Arc<Process>,
        spec: &Arc<oci_spec::runtime::Process>,
    ) -> Result<api::StartProcessResponse> {
        let mut stages = Stages::start();
        self.check_running("exec")?;
        let init_pid = self.init.pid().ok_or_else(|| Error::internal("the init has no pid"))?;
        let (child, ends) = stdio::open(&process.stdio, services.owner(spec.user())?)?;
        let run = Request::Exec(Box::new(Exec {
            init_pid,
            cgroup: self.cgroup.directory().to_owned(),
            process: spec.as_ref().clone(),
            seccomp: self.seccomp.clone(),
            size: process.stdio.size,
        }));
        let (Started { pid, terminal }, exit) = services.spawn(run, child.0).await.map_err(unable)?;
        stages.done("spawn");
        match Streams::run(&process.stdio, ends, terminal, &services.host, &services.carrier) {
            Ok(streams) => process.attach(pid, streams),
            Err(error) => {
                // Without streams nobody would ever know of it. It may have ended by itself, which is as well.
                let _ = services.reaper.signal(pid, libc::SIGKILL);
                return Err(error);
            }
        }
        process.advance(Phase::Starting, Phase::Running)?;
        if self.init.phase() == Phase::Stopped || self.cancel.is_cancelled() {
            // It came to life while the container died.
            self.cgroup.kill()?;
        }
        let (container, reported) = (Arc::clone(self), Arc::clone(process));
        let events = Arc::clone(&services.events);
        services.tracker.spawn(async move {
            let status = exit.await.unwrap_or(255);
            events.exit(reported.exited(&container.id, status));
            reported.stop();
        });
        stages.done("streams");
        Ok(api::StartProcessResponse { guest_pid: pid as u32, stages: stages.stages })
    }

    /// Waits for the init's exit and reports it when all else has been reported.
    async fn supervise(self: Arc<Self>, services: Arc<Services>, exit: tokio::sync::oneshot::Receiver<ExitStatus>) {
        let status = exit.await.unwrap_or(255);
        // From here on no exec starts; those that run lose their container.
        self.cancel.cancel();
        if !self.ends_with_init
            && let Err(error) = self.cgroup.kill()
        {
            tracing::warn!(container_id = self.id, %error, "container's processes were not killed");
        }
        let execs: Vec<_> = self.execs().values().map(|registered| Arc::clone(&registered.process)).collect();
        let gone = async {
            for exec in &execs {
                exec.settled().await;
            }
        };
        if tokio::time::timeout(EXECS_GONE, gone).await.is_err() {
            tracing::error!(container_id = self.id, "execs outlive their container");
        }
        for _ in 0..self.oom.check() {
            services.events.oom(&self.id);
        }
        services.events.stats(metrics::sample(&self.id, self.cgroup.directory()));
        services.events.exit(self.init.exited(&self.id, status));
        self.init.stop();
        // The host learns of the exit and asks for the deletion meanwhile.
        if let Err(error) = self.clear().await {
            tracing::warn!(container_id = self.id, %error, "remains of a container stay until its deletion");
        }
    }

    /// Clears away what its processes have left, or waits until that is done; what failed is tried again.
    async fn clear(&self) -> Result<Vec<api::Stage>> {
        let mut remains = self.remains.lock().await;
        if !remains.cleared {
            // They may go at once after this.
            for disk in &self.disks {
                node::flush(disk).await;
            }
            let (id, directory) = (self.id.clone(), self.directory.clone());
            let mut rootfs = std::mem::take(&mut remains.rootfs);
            let clearing = tokio::task::spawn_blocking(move || (clean_up(&id, &directory, &mut rootfs), rootfs));
            let (cleared, rootfs) = clearing.await.during(|| "clear away the container's remains")?;
            remains.rootfs = rootfs;
            remains.stages = cleared?;
            remains.cleared = true;
        }
        Ok(remains.stages.clone())
    }

    async fn watch_oom(self: Arc<Self>, services: Arc<Services>) {
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return,
                kills = self.oom.next() => match kills {
                    Ok(kills) => (0..kills).for_each(|_| services.events.oom(&self.id)),
                    Err(error) => {
                        tracing::warn!(container_id = self.id, %error, "OOM kills are no longer watched");
                        return;
                    }
                }
            }
        }
    }

    /// Sends a signal to a process, or to all of the container.
    pub fn signal(&self, exec_id: &str, number: i32, all: bool) -> Result<()> {
        let process = self.process(exec_id)?;
        if !all {
            let waiting = exec_id.is_empty() && process.phase() == Phase::Created;
            // What waits for the start is the agent's own code, the first process of a PID namespace at that: it would
            // not notice any other signal.
            return process.signal(if waiting && TERMINATING.contains(&number) { libc::SIGKILL } else { number });
        }
        let processes = self.processes()?;
        if processes.is_empty() {
            return Err(Error::not_found("process already finished"));
        }
        if number == libc::SIGKILL {
            return self.kill();
        }
        for pid in processes {
            // One that has gone in the meantime wants no signal.
            drop(crate::sys::kill(pid, number));
        }
        Ok(())
    }

    /// Changes limits: [`Cgroup::apply`]. Blocks.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        match self.cgroup.apply(resources) {
            // Its cgroup goes with it.
            Err(_) if self.is_stopped() => Err(Error::not_found("process already finished")),
            applied => applied,
        }
    }

    /// Stops or continues every process. Blocks.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        if self.init.phase() != Phase::Running {
            return Err(Error::precondition(format!("container {} is not running", self.id)));
        }
        self.cgroup.freeze(frozen)?;
        *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = frozen;
        Ok(())
    }

    /// Guest pids of all its processes.
    pub fn processes(&self) -> Result<Vec<i32>> {
        if self.is_stopped() {
            return Ok(Vec::new());
        }
        match self.cgroup.processes() {
            // It was being listed when it went.
            Err(_) if self.is_stopped() => Ok(Vec::new()),
            processes => processes,
        }
    }

    /// A sample of its statistics; none before its start and after its end. Reads files.
    pub fn sample(&self) -> Option<api::Stats> {
        let runs = || self.init.phase() == Phase::Running && !self.cancel.is_cancelled();
        let sample = runs().then(|| metrics::sample(&self.id, self.cgroup.directory()))?;
        // Of one that has ended meanwhile the last sample is taken, and the files of this one may have gone half way.
        runs().then_some(sample)
    }

    /// Guest path of its PID namespace.
    pub fn pid_namespace(&self) -> Result<String> {
        match self.init.pid() {
            Some(pid) if self.init.phase() != Phase::Stopped => Ok(format!("/proc/{pid}/ns/pid")),
            _ => Err(Error::precondition(format!("container {} is not running", self.id))),
        }
    }

    /// Kills everything in it.
    pub fn kill(&self) -> Result<()> {
        match self.cgroup.kill() {
            Err(_) if self.is_stopped() => Ok(()),
            killed => killed,
        }
    }

    /// Whether its end was reported; from then on its cgroup goes.
    fn is_stopped(&self) -> bool {
        self.init.phase() == Phase::Stopped
    }

    /// Waits until the init's exit was reported. Cancel safe.
    pub async fn stopped(&self) {
        while self.init.phase() != Phase::Stopped {
            let mut phase = self.init.subscribe();
            // The sender lives as long as `self`.
            drop(phase.wait_for(|phase| *phase == Phase::Stopped).await);
        }
    }

    /// Forgets an exec that does not run.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<()> {
        let process = self.process(exec_id)?;
        if matches!(process.phase(), Phase::Running | Phase::Starting) {
            return Err(Error::precondition(format!("exec {exec_id} of container {} is running", self.id)));
        }
        process.close().await;
        self.execs().remove(exec_id);
        Ok(())
    }

    /// Removes everything of a container whose init has exited or never ran.
    pub async fn delete(&self) -> Result<api::DeleteResponse> {
        let mut stages = Stages::start();
        match self.init.phase() {
            Phase::Stopped => {}
            Phase::Created => {
                self.init.signal(libc::SIGKILL)?;
                self.stopped().await;
            }
            Phase::Starting | Phase::Running => {
                return Err(Error::precondition(format!("container {} is running", self.id)));
            }
        }
        let execs: Vec<_> = self.execs().drain().map(|(_, registered)| registered.process).collect();
        for process in execs.iter().chain([&self.init]) {
            process.close().await;
        }
        stages.done("streams");
        let cleared = self.clear().await?;
        stages.done("clear");
        stages.stages.extend(cleared);
        Ok(api::DeleteResponse { stages: stages.stages })
    }

    fn check_running(&self, what: &str) -> Result<()> {
        if self.init.phase() != Phase::Running || self.cancel.is_cancelled() {
            return Err(Error::precondition(format!("cannot {what} in a container that is not running")));
        }
        if *self.paused.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(Error::precondition(format!("cannot {what} in a paused container")));
        }
        Ok(())
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Registered>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The words runc has for a process that could not be made.
fn unable(error: Error) -> Error {
    error.during("unable to start container process")
}

/// Fills in what runc takes from the rootfs: `HOME`.
fn find_home(spec: &mut Spec, rootfs: &Path) {
    let env = spec.process.env().as_deref().unwrap_or_default();
    if !env.iter().any(|entry| entry.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        let file = mount::read_inside(rootfs, Path::new("/etc/passwd")).unwrap_or_default();
        let home = format!("HOME={}", passwd::home(&file, spec.process.user().uid()));
        let env = &mut spec.config["process"]["env"];
        if !env.is_array() {
            *env = serde_json::json!([]);
        }
        if let Some(env) = env.as_array_mut() {
            env.retain(|entry| !entry.as_str().is_some_and(|entry| entry.starts_with("HOME=")));
            env.push(home.into());
        }
    }
}

/// Has what the container's mounts are bound from ready, and in its rootfs what the spec leaves to the runtime. Blocks.
fn prepare(
    services: &Services,
    id: &str,
    rootfs: &Path,
    volumes: &[api::MemoryVolume],
    spec: &mut Spec,
    mounts: &mut Stack,
) -> Result<()> {
    for volume in volumes {
        services.volumes.make(volume)?;
    }
    let own = format!("{id}/");
    for source in spec.mounts.iter().filter_map(|mount| mount.source.as_ref()) {
        match source {
            Source::Share(path) if path.starts_with(&own) => drop(mount::shared(path)?),
            Source::Share(path) => drop(mounts.enter(&services.common, path)?),
            Source::InShare { path, at } => {
                let opened = mounts.enter(&services.common, path)?;
                mounts.bind(&opened, at)?;
            }
            Source::Memory { path, at } => mounts.bind(&volume::open(path)?, at)?,
            Source::Shm => {}
        }
    }
    find_home(spec, rootfs);
    match services.namespaces() {
        None => make_cwd(spec, rootfs),
        Some(namespaces) => namespaces.as_root(|| make_cwd(spec, rootfs))?,
    }
}

/// Makes the working directory, as runc does.
fn make_cwd(spec: &Spec, rootfs: &Path) -> Result<()> {
    let cwd = spec.process.cwd();
    let made = match spec.mount_of(cwd) {
        None => mount::make_directories(rootfs, cwd),
        // Where the container may not write, it is there or the program does not start.
        Some((_, mount)) if mount.read_only => Ok(()),
        Some((below, mount)) => match &mount.source {
            Some(Source::Share(path)) => mount::make_directories(&mount::shared(path)?, &below),
            Some(Source::InShare { at, .. } | Source::Memory { at, .. }) => mount::make_directories(at, &below),
            // A file system that does not exist yet; its own root is all there is.
            Some(Source::Shm) | None => Ok(()),
        },
    };
    made.map_err(|error| {
        let reason = crate::runtime::lookup::text(&error);
        unable(Error::internal(format!("error during container init: mkdir {}: {reason}", cwd.display())))
    })
}

/// Removes what a container consists of outside of its processes, and tells how long it took; safe to repeat. Blocks.
fn clean_up(id: &str, directory: &Path, rootfs: &mut Stack) -> Result<Vec<api::Stage>> {
    let mut stages = Stages::start();
    let unmounted = rootfs.unmount().and(mount::leave_share(id));
    stages.done("clear.rootfs");
    // Only now does the kernel let go of what it knows of the share.
    mount::forget_share()?;
    stages.done("clear.share");
    let cgroup = Cgroup::of(id).remove();
    stages.done("clear.cgroup");
    // What is still mounted would lose its content.
    unmounted?;
    for directory in [&Path::new(STATE).join(id), directory, &node::directory(id)] {
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::internal(format!("remove {}: {error}", directory.display())));
            }
            _ => {}
        }
    }
    stages.done("clear.files");
    cgroup.map(|()| stages.stages)
}
