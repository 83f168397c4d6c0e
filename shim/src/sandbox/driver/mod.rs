//! The one task that owns a sandbox.
//!
//! Commands, events of the guest, and finished jobs reach it through one `select!`; nothing else changes its data. It never
//! awaits anything long: boot, creation, start, deletion and teardown are jobs in its `JoinSet`, which bring their result
//! back as a [`Done`]. Replies travel with the job, and are sent when the driver has taken the result in, so that an event
//! is always queued before the answer that lets containerd go on.

mod create;
mod door;
mod exit;
mod limits;
mod process;
mod report;
mod stop;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bulkhead_proto::agent;
use containerd_shim_protos::events::task::TaskOOM;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::container::limits::ContainerLimits;
use crate::container::process::{Exit, Phase, Process};
use crate::container::spec::Role;
use crate::container::stdio::StdioPaths;
use crate::container::{ContainerId, ExecId, ProcessId};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::guest::client::GuestEvent;
use crate::network::TapFiles;
use crate::sandbox::boot::BootRequest;
use crate::sandbox::pod::{Access, Pod};
use crate::sandbox::state::{State, Step};
use crate::sandbox::{Command, Deleted, ProcessState, Reply};
use crate::storage::container::ContainerStorage;
use crate::timeouts;

/// A container of the sandbox; for [`Role::Sandbox`] the pod itself.
#[derive(Debug)]
struct Container {
    role: Role,
    door: Door,
    created_at: SystemTime,
    bundle: PathBuf,
    init: Process,
    execs: BTreeMap<ExecId, Process>,
    /// OCI `process` objects of the execs, for their starts.
    exec_specs: BTreeMap<ExecId, Value>,
    paused: bool,
    limits: ContainerLimits,
    stage: Stage,
    storage: Option<ContainerStorage>,
    /// The last sample.
    stats: Option<agent::Stats>,
    /// For [`Door::SandboxApi`], the pod as OCI would put it.
    oci_spec: Arc<Value>,
}

/// How containerd knows a container or sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    /// As a task, whose life events tell.
    Task,
    /// As a sandbox of the sandbox API, which has no events: containerd waits and asks.
    SandboxApi,
}

impl Container {
    /// One whose creation is about to begin.
    fn new(role: Role, door: Door, bundle: PathBuf, stdio: StdioPaths) -> Result<Self> {
        Ok(Self {
            role,
            door,
            created_at: SystemTime::now(),
            bundle,
            init: Process::new(stdio)?,
            execs: BTreeMap::new(),
            exec_specs: BTreeMap::new(),
            paused: false,
            limits: ContainerLimits::default(),
            stage: Stage::Creating,
            storage: None,
            stats: None,
            oci_spec: Arc::default(),
        })
    }
}

/// Whether a container can be worked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its job runs.
    Creating,
    /// The guest has it.
    Made,
    /// Its removal runs.
    Deleting,
}

/// What a state of the sandbox holds.
#[derive(Debug)]
enum Holding {
    Nothing,
    /// The boot's job looks at the token between its phases.
    Boot(CancellationToken),
    Pod(Box<Pod>),
    /// The exit that the sandbox's own process gets when everything is gone.
    Stop {
        exit: Exit,
        torn_down: bool,
    },
}

/// A finished job.
enum Done {
    Booted(Box<create::BootDone>),
    ContainerMade(Box<create::MadeDone>),
    Started(process::StartDone),
    /// Passed on all output of a process whose exit is held; false if some was given up on.
    Drained(ProcessId, bool),
    /// The execs of a container should have ended long ago.
    ExecsOverdue(ContainerId),
    Deleted(process::DeleteDone),
    /// A container was paused (true) or resumed.
    Paused(ContainerId, bool, Result<()>, Reply<()>),
    Updated(limits::UpdateDone),
    /// QEMU or a helper has ended; the text tells how.
    ChildExited(String),
    /// Nothing of the pod is left but its taps.
    TornDown(TapFiles),
    /// The job has answered by itself.
    Nothing,
}

/// How a pod comes up. [`crate::sandbox::boot::boot`] in the shim; tests of the driver bring an agent without a VM.
pub type Booter = Box<dyn Fn(BootRequest) -> BoxFuture<'static, Result<Pod>> + Send>;

/// See the module's documentation.
pub struct Driver {
    booter: Booter,
    state: State,
    holding: Holding,
    containers: BTreeMap<ContainerId, Container>,
    jobs: JoinSet<Done>,
    events: Events,
    /// Creates of a single container that failed: answered when its VM is gone.
    failed_creates: Vec<(Reply<u32>, Error)>,
    /// The guest may have something of a container that was deleted.
    guest_holds: bool,
    /// How the virtual machine was lost; None if it was not.
    obituary: Option<String>,
    /// containerd's Shutdown came, perhaps while the pod was on its way down.
    ending: bool,
    /// Shutdowns of the sandbox, answered at the very end.
    farewells: Vec<Reply<()>>,
    guest_events: mpsc::Receiver<GuestEvent>,
    guest_events_in: mpsc::Sender<GuestEvent>,
    /// Ends when whoever was to create the first task has died.
    creator_gone: BoxFuture<'static, ()>,
}

impl Driver {
    /// A driver of a planned sandbox.
    pub fn new(booter: Booter, events: Events) -> Self {
        let (guest_events_in, guest_events) = mpsc::channel(256);
        Self {
            booter,
            state: State::Planned,
            holding: Holding::Nothing,
            containers: BTreeMap::new(),
            jobs: JoinSet::new(),
            events,
            failed_creates: Vec::new(),
            guest_holds: false,
            obituary: None,
            ending: false,
            farewells: Vec::new(),
            guest_events,
            guest_events_in,
            creator_gone: std::future::pending().boxed(),
        }
    }

    /// Has the driver end when `gone` does before a task or sandbox was created: then none will be.
    #[must_use]
    pub fn created_by(self, gone: BoxFuture<'static, ()>) -> Self {
        Self { creator_gone: gone, ..self }
    }

    /// Serves commands until a shutdown is granted, or nobody wants anything of it any more, then returns with every job
    /// joined.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let unclaimed = self.is_unclaimed();
            tokio::select! {
                command = commands.recv() => {
                    let Some(command) = command else { break };
                    self.on_command(command);
                }
                Some(event) = self.guest_events.recv() => self.on_guest_event(event),
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.on_done(done),
                    Err(error) => tracing::error!(%error, "a job of the sandbox panicked"),
                },
                () = &mut self.creator_gone, if unclaimed && self.state == State::Planned => {
                    tracing::warn!("containerd ended before it created a task: the shim ends");
                    break;
                }
                () = tokio::time::sleep(timeouts::UNCLAIMED), if unclaimed => {
                    tracing::warn!(state = self.state.name(), "nobody has asked for anything since: the shim ends");
                    break;
                }
            }
            if self.is_done() {
                break;
            }
        }
        self.jobs.shutdown().await;
        for reply in self.farewells {
            answer(reply, Ok(()));
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Create(task, reply) => self.create(*task, reply),
            Command::CreateSandbox(spec, reply) => self.create_sandbox(*spec, reply),
            Command::Start(id, reply) => self.start(id, reply),
            Command::Exec(task, reply) => answer(reply, self.exec(*task)),
            Command::State(id, reply) => answer(reply, self.process_state(&id)),
            Command::Wait(id, reply) => answer(reply, self.process(&id).map(Process::subscribe)),
            Command::Kill(id, signal, all, reply) => self.kill(&id, signal, all, reply),
            Command::Delete(id, reply) => self.delete(&id, reply),
            Command::Pids(id, reply) => answer(reply, self.pids(&id)),
            Command::Pause(id, reply) => self.pause(id, true, reply),
            Command::Resume(id, reply) => self.pause(id, false, reply),
            Command::ResizePty(id, height, width, reply) => self.resize_pty(&id, height, width, reply),
            Command::CloseStdin(id, reply) => answer(reply, self.close_stdin(&id)),
            Command::Update(id, resources, reply) => self.update(&id, resources, reply),
            Command::Stats(id, reply) => answer(reply, self.stats(&id)),
            Command::TaskPid(id, reply) => answer(reply, Ok(self.task_pid(&id))),
            Command::Status(id, reply) => answer(reply, self.status(&id)),
            Command::UpdateSandbox(id, resources, reply) => self.update_sandbox(&id, resources, reply),
            Command::StopSandbox(id, reply) => answer(reply, self.stop_sandbox(&id)),
            Command::Report(reply) => answer(reply, Ok(self.report())),
            Command::ShutdownSandbox(reply) => self.shutdown_sandbox(reply),
            Command::Shutdown(reply) => {
                // With nothing left to ask about, a pod on its way down is waited for, and then the shim ends.
                self.ending |= self.containers.is_empty() && self.state != State::Ready && self.state != State::Booting;
                answer(reply, Ok(self.ending));
            }
        }
    }

    /// Whether the shim stands for no task: none was created yet, or what there was has ended and been deleted.
    ///
    /// containerd leaves that state within a breath, by Create or by Shutdown, unless it dies in between. Questions are no
    /// sign of either: any client's list of tasks asks about one that is just being created.
    fn is_unclaimed(&self) -> bool {
        self.containers.is_empty() && matches!(self.state, State::Planned | State::Stopped)
    }

    fn on_guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Exit(exit) => self.on_exit(&exit),
            GuestEvent::Oom(oom) => {
                let id = ContainerId(oom.container_id);
                if self.containers.contains_key(&id) {
                    tracing::warn!(container_id = %id, "a process was killed for want of memory");
                    self.events.publish("/tasks/oom", &TaskOOM { container_id: id.0, ..Default::default() });
                }
            }
            GuestEvent::Stats(stats) => {
                if let Some(container) = self.containers.get_mut(&ContainerId(stats.container_id.clone())) {
                    container.stats = Some(*stats);
                }
            }
            GuestEvent::Silent => {
                self.pod_lost(&format!("the guest has fallen silent: no heartbeat for {:?}", timeouts::HEARTBEAT));
            }
        }
    }

    fn on_done(&mut self, done: Done) {
        match done {
            Done::Booted(done) => self.on_booted(*done),
            Done::ContainerMade(done) => self.on_container_made(*done),
            Done::Started(done) => self.on_started(done),
            Done::Drained(id, complete) => self.on_drained(&id, complete),
            Done::ExecsOverdue(id) => self.on_execs_overdue(&id),
            Done::Deleted(done) => self.on_deleted(done),
            Done::Paused(id, paused, result, reply) => self.on_paused(&id, paused, result, reply),
            Done::Updated(done) => self.on_updated(done),
            Done::ChildExited(what) => self.pod_lost(&what),
            Done::TornDown(tap_files) => self.on_torn_down(tap_files),
            Done::Nothing => {}
        }
    }

    /// Takes `step`; the caller has asked the table before, so a refusal is a bug and is told as one.
    fn step(&mut self, step: Step) -> Result<()> {
        match self.state.after(step) {
            Some(next) => {
                tracing::debug!(from = self.state.name(), to = next.name(), "sandbox changes its state");
                self.state = next;
                Ok(())
            }
            None => Err(Error::failed_precondition(format!("sandbox is {}", self.state.name()))),
        }
    }

    /// What jobs may use of the pod, or the refusal of `what`.
    fn access(&self, what: &str) -> Result<Access> {
        match &self.holding {
            Holding::Pod(pod) if self.state == State::Ready => Ok(pod.access()),
            _ => Err(Error::failed_precondition(format!("{what}: sandbox is {}", self.state.name()))),
        }
    }

    fn container(&self, id: &ContainerId) -> Result<&Container> {
        self.containers.get(id).ok_or_else(|| Error::not_found(format!("container {id} does not exist")))
    }

    fn container_mut(&mut self, id: &ContainerId) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Error::not_found(format!("container {id} does not exist")))
    }

    fn process(&self, id: &ProcessId) -> Result<&Process> {
        let container = self.container(&id.container)?;
        match &id.exec {
            None => Ok(&container.init),
            Some(exec) => container.execs.get(exec).ok_or_else(|| Error::not_found(format!("{id} does not exist"))),
        }
    }

    fn process_mut(&mut self, id: &ProcessId) -> Result<&mut Process> {
        let container = self.container_mut(&id.container)?;
        match &id.exec {
            None => Ok(&mut container.init),
            Some(exec) => container.execs.get_mut(exec).ok_or_else(|| Error::not_found(format!("{id} does not exist"))),
        }
    }

    fn process_state(&self, id: &ProcessId) -> Result<ProcessState> {
        let container = self.container(&id.container)?;
        let process = self.process(id)?;
        Ok(ProcessState {
            pid: process.pid(),
            phase: process.phase(),
            paused: container.paused && process.phase() == Phase::Running,
            stdio: process.paths.clone(),
            exit: process.exit(),
            bundle: container.bundle.clone(),
        })
    }

    fn pids(&self, id: &ContainerId) -> Result<Vec<u32>> {
        let container = self.container(id)?;
        let execs = container.execs.values().filter(|exec| exec.is_live()).map(Process::pid);
        Ok(std::iter::once(container.init.pid()).chain(execs).collect())
    }

    /// containerd asks this of ids that it has not created yet, and takes an error for a dead shim.
    fn task_pid(&self, id: &ContainerId) -> u32 {
        self.containers.get(id).map_or_else(std::process::id, |container| container.init.pid())
    }

    fn stats(&self, id: &ContainerId) -> Result<agent::Stats> {
        let container = self.container(id)?;
        if container.role != Role::Sandbox {
            return Ok(container.stats.clone().unwrap_or_default());
        }
        let samples = self.containers.values().filter_map(|container| container.stats.as_ref());
        Ok(samples.fold(agent::Stats::default(), crate::metrics::sum))
    }
}

/// Answers a caller; one that has gone away does not want the answer.
fn answer<T>(reply: Reply<T>, result: Result<T>) {
    drop(reply.send(result));
}

/// An exit that nobody in the guest reported, because the guest is gone.
fn killed_now() -> Exit {
    Exit { status: 137, at: SystemTime::now() }
}

/// What Delete tells.
fn deleted(process: &Process) -> Deleted {
    Deleted { pid: process.pid(), exit: process.exit() }
}
