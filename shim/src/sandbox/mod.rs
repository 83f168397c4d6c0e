//! The sandbox: one pod, one VM, one owner.
//!
//! One driver task owns everything of the pod ([`driver`]); callers hold a [`SandboxHandle`], which sends a command and
//! awaits the typed answer. Long work (boot, creating a container, teardown) runs as a job that the driver joins, so that
//! `Kill`, `State` and `Wait` never wait behind it. Both doors of containerd, the pause container's Create and the sandbox
//! API, end here.
//!
//! Order is a promise, kept in one place each:
//! - create < start < exit < delete per task, exec exits before the init's: `driver::exit`;
//! - output before the exit: `driver::exit`, by the counts in the agent's exit event;
//! - teardown before the sandbox's exit: `driver::stop`.

pub mod boot;
pub mod driver;
mod ledger;
pub mod pod;
pub mod spec;
pub mod state;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bulkhead_proto::agent;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use crate::container::process::{Exit, Phase};
use crate::container::stdio::StdioPaths;
use crate::container::{ContainerId, ProcessId};
use crate::control::Report;
use crate::error::{Error, Kind, Result};
use crate::sandbox::spec::{PodResources, SandboxSpec};
use crate::storage::plan::Mount;
use crate::timeouts;

/// What Create asks for.
#[derive(Debug)]
pub struct CreateTask {
    /// The container's id; for the pause container of a pod, the sandbox's.
    pub id: ContainerId,
    /// Directory with `config.json` and `rootfs`.
    pub bundle: PathBuf,
    /// As containerd handed them over.
    pub rootfs: Vec<Mount>,
    /// FIFOs.
    pub stdio: StdioPaths,
    /// `config.json`.
    pub spec: Value,
    /// The runtime options of the handler: type URL and bytes of the `Any`; None where the handler has none.
    pub options: Option<(String, Vec<u8>)>,
}

/// What Exec asks for.
#[derive(Debug)]
pub struct ExecTask {
    /// Container and exec id.
    pub id: ProcessId,
    /// FIFOs.
    pub stdio: StdioPaths,
    /// OCI `process`.
    pub process: Value,
}

/// A process as `State` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// Host pid.
    pub pid: u32,
    /// Where it stands.
    pub phase: Phase,
    /// The container is frozen.
    pub paused: bool,
    /// FIFOs.
    pub stdio: StdioPaths,
    /// Set once the exit is published.
    pub exit: Option<Exit>,
    /// The container's bundle.
    pub bundle: PathBuf,
}

/// What Delete tells of what is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// Host pid it had.
    pub pid: u32,
    /// How it ended; None if it was never started.
    pub exit: Option<Exit>,
}

/// A sandbox of the sandbox API as its status tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxStatus {
    /// Host pid that stands for the pod: namespace paths of its containers name it.
    pub pid: u32,
    /// It was started, and its VM lives.
    pub ready: bool,
    /// When it was asked for.
    pub created_at: SystemTime,
    /// Set once nothing of it is left on the host.
    pub exit: Option<Exit>,
    /// See [`spec::SandboxSpec::to_oci`].
    pub oci_spec: Arc<Value>,
}

type Reply<T> = oneshot::Sender<Result<T>>;

/// One request to the driver.
#[derive(Debug)]
pub enum Command {
    /// See [`SandboxHandle::create`].
    Create(Box<CreateTask>, Reply<u32>),
    /// See [`SandboxHandle::create_sandbox`].
    CreateSandbox(Box<SandboxSpec>, Reply<u32>),
    /// See [`SandboxHandle::start`].
    Start(ProcessId, Reply<u32>),
    /// See [`SandboxHandle::exec`].
    Exec(Box<ExecTask>, Reply<()>),
    /// See [`SandboxHandle::state`].
    State(ProcessId, Reply<ProcessState>),
    /// See [`SandboxHandle::wait`].
    Wait(ProcessId, Reply<watch::Receiver<Option<Exit>>>),
    /// See [`SandboxHandle::kill`].
    Kill(ProcessId, u32, bool, Reply<()>),
    /// See [`SandboxHandle::delete`].
    Delete(ProcessId, Reply<Deleted>),
    /// See [`SandboxHandle::pids`].
    Pids(ContainerId, Reply<Vec<u32>>),
    /// See [`SandboxHandle::pause`].
    Pause(ContainerId, Reply<()>),
    /// See [`SandboxHandle::resume`].
    Resume(ContainerId, Reply<()>),
    /// See [`SandboxHandle::resize_pty`].
    ResizePty(ProcessId, u32, u32, Reply<()>),
    /// See [`SandboxHandle::close_stdin`].
    CloseStdin(ProcessId, Reply<()>),
    /// See [`SandboxHandle::update`].
    Update(ContainerId, Value, Reply<()>),
    /// See [`SandboxHandle::stats`].
    Stats(ContainerId, Reply<agent::Stats>),
    /// See [`SandboxHandle::task_pid`].
    TaskPid(ContainerId, Reply<u32>),
    /// See [`SandboxHandle::status`].
    Status(ContainerId, Reply<SandboxStatus>),
    /// See [`SandboxHandle::update_sandbox`].
    UpdateSandbox(ContainerId, PodResources, Reply<()>),
    /// See [`SandboxHandle::stop_sandbox`].
    StopSandbox(ContainerId, Reply<watch::Receiver<Option<Exit>>>),
    /// See [`SandboxHandle::report`].
    Report(Reply<Report>),
    /// See [`SandboxHandle::shutdown_sandbox`].
    ShutdownSandbox(Reply<()>),
    /// See [`SandboxHandle::shutdown`].
    Shutdown(Reply<bool>),
}

/// Cheap handle of the driver.
#[derive(Debug, Clone)]
pub struct SandboxHandle {
    commands: mpsc::Sender<Command>,
}

impl SandboxHandle {
    /// A handle, and the queue that the driver reads.
    pub fn new() -> (Self, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(64);
        (Self { commands }, queue)
    }

    /// What is asked of a sandbox that has gone is not found, as containerd calls it when a shim's connection has closed: the
    /// connection may outlive the driver by a moment.
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        self.ask_or(Error::not_found, command).await
    }

    async fn ask_or<T>(&self, gone: fn(&'static str) -> Error, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        const GONE: &str = "the sandbox is shut down";
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| gone(GONE))?;
        answer.await.map_err(|_| gone(GONE))?
    }

    /// Creates a task; the first one boots the VM. Returns its host pid. The create event is queued before this returns.
    pub async fn create(&self, task: CreateTask) -> Result<u32> {
        self.ask_or(Error::unavailable, |reply| Command::Create(Box::new(task), reply)).await
    }

    /// Boots the VM of a sandbox that is no task. Returns its host pid; no event tells of it.
    pub async fn create_sandbox(&self, spec: SandboxSpec) -> Result<u32> {
        self.ask_or(Error::unavailable, |reply| Command::CreateSandbox(Box::new(spec), reply)).await
    }

    /// Runs a created process. Returns its host pid. The start event is queued before this returns, and before its exit.
    pub async fn start(&self, id: ProcessId) -> Result<u32> {
        self.ask(|reply| Command::Start(id, reply)).await
    }

    /// Registers an exec; nothing runs yet.
    pub async fn exec(&self, task: ExecTask) -> Result<()> {
        self.ask(|reply| Command::Exec(Box::new(task), reply)).await
    }

    /// Where a process stands; answered from the host.
    pub async fn state(&self, id: ProcessId) -> Result<ProcessState> {
        self.ask(|reply| Command::State(id, reply)).await
    }

    /// Waits for the exit. Not found once deleted. Cancel safe.
    pub async fn wait(&self, id: ProcessId) -> Result<Exit> {
        let name = id.to_string();
        let mut exit = self.ask(|reply| Command::Wait(id, reply)).await?;
        let exit = exit.wait_for(Option::is_some).await.map_err(|_| Error::not_found(format!("{name} was deleted")))?;
        exit.ok_or_else(|| Error::internal("an exit was published empty"))
    }

    /// Sends `signal`; `all` means every process of the container. Not found once it has exited.
    pub async fn kill(&self, id: ProcessId, signal: u32, all: bool) -> Result<()> {
        self.ask(|reply| Command::Kill(id, signal, all, reply)).await
    }

    /// Forgets a process that has ended or never ran; an init takes its container's storage with it.
    pub async fn delete(&self, id: ProcessId) -> Result<Deleted> {
        self.ask(|reply| Command::Delete(id, reply)).await
    }

    /// Host pids of a container; never empty.
    pub async fn pids(&self, id: ContainerId) -> Result<Vec<u32>> {
        self.ask(|reply| Command::Pids(id, reply)).await
    }

    /// Freezes a container in the guest.
    pub async fn pause(&self, id: ContainerId) -> Result<()> {
        self.ask(|reply| Command::Pause(id, reply)).await
    }

    /// Thaws it.
    pub async fn resume(&self, id: ContainerId) -> Result<()> {
        self.ask(|reply| Command::Resume(id, reply)).await
    }

    /// Resizes the pty of a process.
    pub async fn resize_pty(&self, id: ProcessId, height: u32, width: u32) -> Result<()> {
        self.ask(|reply| Command::ResizePty(id, height, width, reply)).await
    }

    /// Lets stdin reach EOF behind what was written.
    pub async fn close_stdin(&self, id: ProcessId) -> Result<()> {
        self.ask(|reply| Command::CloseStdin(id, reply)).await
    }

    /// Changes limits: `resources` is OCI `linux.resources`.
    pub async fn update(&self, id: ContainerId, resources: Value) -> Result<()> {
        self.ask(|reply| Command::Update(id, resources, reply)).await
    }

    /// The last sample the guest has sent; for the sandbox's id the sum of its containers.
    pub async fn stats(&self, id: ContainerId) -> Result<agent::Stats> {
        self.ask(|reply| Command::Stats(id, reply)).await
    }

    /// The host pid of a container's init, or the shim's own for an id not created yet.
    pub async fn task_pid(&self, id: ContainerId) -> Result<u32> {
        self.ask(|reply| Command::TaskPid(id, reply)).await
    }

    /// Where the sandbox stands; answered from the host. Not found if it was never created.
    pub async fn status(&self, id: ContainerId) -> Result<SandboxStatus> {
        self.ask(|reply| Command::Status(id, reply)).await
    }

    /// Changes what the containers of a running pod may use together, inside what its VM has. Safe to repeat and to undo.
    pub async fn update_sandbox(&self, id: ContainerId, resources: PodResources) -> Result<()> {
        self.ask(|reply| Command::UpdateSandbox(id, resources, reply)).await
    }

    /// Ends the pod and returns when nothing of it is left on the host but its records. Safe to repeat.
    pub async fn stop_sandbox(&self, id: ContainerId) -> Result<()> {
        let mut exit = self.ask(|reply| Command::StopSandbox(id, reply)).await?;
        match tokio::time::timeout(timeouts::STOP, exit.wait_for(Option::is_some)).await {
            // An error means that the sandbox was forgotten meanwhile, as one that is killed while it boots.
            Ok(_) => Ok(()),
            Err(_) => Err(Error::deadline(format!("the pod did not end within {:?}", timeouts::STOP))),
        }
    }

    /// Everything the shim knows, for people; answered from the host, whatever the state.
    pub async fn report(&self) -> Result<Report> {
        self.ask(Command::Report).await
    }

    /// Ends the pod, forgets it and all its containers, and ends the driver; returns when that is done. Safe to repeat.
    pub async fn shutdown_sandbox(&self) -> Result<()> {
        match self.ask(Command::ShutdownSandbox).await {
            // Another one was first.
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Ends the driver if nothing lives any more; true if it ends.
    pub async fn shutdown(&self) -> Result<bool> {
        // Without a driver there is nothing left to end, and an error here would fail the Delete that it belongs to.
        Ok(self.ask(Command::Shutdown).await.unwrap_or(true))
    }
}
