//! Start, exec, signals and the rest of what containerd asks of one process.

use std::time::SystemTime;

use bulkhead_proto::agent;
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use futures::future::join_all;
use serde_json::Value;

use super::{Container, Done, Door, Driver, Stage, answer, deleted};
use crate::container::process::{Exit, Phase, Process, Step};
use crate::container::spec::{self, Role};
use crate::container::stdio::{Logged, Stdio, StdioPaths};
use crate::container::{ContainerId, ProcessId};
use crate::error::{Error, Kind, Result, WithKind};
use crate::hooks::Moment;
use crate::sandbox::pod::{Access, Farewell};
use crate::sandbox::state::State;
use crate::sandbox::{Deleted, ExecTask, Reply};
use crate::service::convert::timestamp;
use crate::stopwatch::Stopwatch;

/// Result of a start's job.
pub(super) struct StartDone {
    id: ProcessId,
    /// The copies of an exec, which are opened with its start.
    result: Result<Option<Stdio>>,
    reply: Reply<u32>,
}

/// Result of a deletion's job.
pub(super) struct DeleteDone {
    id: ProcessId,
    deleted: Deleted,
    /// How long each step took.
    stages: String,
    result: Result<()>,
    reply: Reply<Deleted>,
}

/// What the start of an exec needs.
struct ExecStart {
    paths: StdioPaths,
    height: u32,
    width: u32,
    spec: Value,
}

/// Exit status of a process that could not be started.
const NEVER_RAN: u32 = 255;

const SIGINT: u32 = 2;
const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

impl Driver {
    pub(super) fn start(&mut self, id: ProcessId, reply: Reply<u32>) {
        let is_pod = self.container(&id.container).is_ok_and(|container| container.role == Role::Sandbox);
        if is_pod {
            answer(reply, self.start_pod(&id));
            return;
        }
        let begin = |driver: &mut Self| {
            driver.made(&id.container)?;
            let access = driver.access("start")?;
            let process = driver.process_mut(&id)?;
            process.step(Step::Start, &id)?;
            Ok::<_, Error>((access, process.pid()))
        };
        let (access, pid) = match begin(self) {
            Ok(begun) => begun,
            Err(error) => return answer(reply, Err(error)),
        };
        let exec = id.exec.as_ref().and_then(|exec| {
            let container = self.containers.get_mut(&id.container)?;
            let process = container.execs.get(exec)?;
            let (height, width) = process.size.unwrap_or_default();
            let spec = container.exec_specs.get(exec)?.clone();
            Some(ExecStart { paths: process.paths.clone(), height, width, spec })
        });
        self.jobs.spawn(async move {
            let result = start_in_guest(&access, &id, exec).await;
            if let (Ok(_), Some(hooks), None) = (&result, &access.hooks, &id.exec)
                && let Err(error) = hooks.run(Moment::Start, None, Some(pid)).await
            {
                // The specification has the container live on.
                tracing::warn!(container_id = %id.container, %error, "a poststart hook failed");
            }
            Done::Started(StartDone { id, result, reply })
        });
    }

    /// The pod runs since its creation; containerd is only told so.
    fn start_pod(&mut self, id: &ProcessId) -> Result<u32> {
        self.access("start")?;
        let process = self.process_mut(id)?;
        process.step(Step::Start, id)?;
        process.step(Step::Started, id)?;
        let pid = process.pid();
        if self.container(&id.container)?.door == Door::Task {
            self.publish_started(id, pid);
        }
        Ok(pid)
    }

    fn publish_started(&self, id: &ProcessId, pid: u32) {
        let container_id = id.container.0.clone();
        match &id.exec {
            None => self.events.publish("/tasks/start", &TaskStart { container_id, pid, ..Default::default() }),
            Some(exec) => self.events.publish(
                "/tasks/exec-started",
                &TaskExecStarted { container_id, exec_id: exec.0.clone(), pid, ..Default::default() },
            ),
        }
        tracing::info!(container_id = %id.container, exec_id = id.exec_id(), "process started");
    }

    pub(super) fn on_started(&mut self, done: StartDone) {
        let StartDone { id, result, reply } = done;
        let outcome = match result {
            Ok(stdio) => self.process_mut(&id).and_then(|process| {
                if let Some(stdio) = stdio {
                    process.set_stdio(stdio);
                }
                process.step(Step::Started, &id)?;
                Ok(process.pid())
            }),
            Err(error) => {
                if let Ok(process) = self.process_mut(&id)
                    && process.step(Step::StartFailed, &id).is_ok()
                {
                    process.set_exit(Exit { status: NEVER_RAN, at: SystemTime::now() });
                }
                let error = self.explained(error);
                // The words by which people and tools know a failed exec from runc.
                Err(if id.exec.is_some() { error.context("OCI runtime exec failed: exec failed") } else { error })
            }
        };
        if let Ok(pid) = outcome {
            self.publish_started(&id, pid);
        }
        answer(reply, outcome);
        self.advance_exits(&id.container);
    }

    /// Refuses a container whose creation or deletion is under way.
    pub(super) fn made(&self, id: &ContainerId) -> Result<&Container> {
        let container = self.container(id)?;
        match container.stage {
            Stage::Made => Ok(container),
            Stage::Creating => Err(Error::failed_precondition(format!("container {id} is being created"))),
            Stage::Deleting => Err(Error::failed_precondition(format!("container {id} is being deleted"))),
        }
    }

    pub(super) fn exec(&mut self, task: ExecTask) -> Result<()> {
        let ExecTask { id, stdio, process } = task;
        let container = self.made(&id.container)?;
        if container.role == Role::Sandbox {
            return Err(Error::failed_precondition(
                "exec: the sandbox has no process of its own; name one of its containers",
            ));
        }
        if container.init.phase() != Phase::Running {
            return Err(Error::failed_precondition(format!("exec: container {} is not running", id.container)));
        }
        if container.paused {
            return Err(Error::failed_precondition(format!("exec: container {} is paused", id.container)));
        }
        let exec = id.exec.clone().ok_or_else(|| Error::invalid("exec: the exec id is empty"))?;
        if container.execs.contains_key(&exec) {
            return Err(Error::already_exists(format!("{id} exists")));
        }
        let process = spec::translate_process(process)?;
        let entry = Process::new(stdio)?;
        let container = self.container_mut(&id.container)?;
        container.execs.insert(exec.clone(), entry);
        container.exec_specs.insert(exec.clone(), process);
        self.events.publish(
            "/tasks/exec-added",
            &TaskExecAdded { container_id: id.container.0, exec_id: exec.0, ..Default::default() },
        );
        Ok(())
    }

    pub(super) fn kill(&mut self, id: &ProcessId, signal: u32, all: bool, reply: Reply<()>) {
        let check = |driver: &Self| {
            let process = driver.process(id)?;
            if process.phase() == Phase::Exited || process.held_exit.is_some() {
                // The one error that CRI's StopContainer takes for success.
                return Err(Error::not_found(format!("{id}: process already finished")));
            }
            if id.exec.is_some() && process.phase() == Phase::Created {
                return Err(Error::not_found(format!("{id}: process not started")));
            }
            Ok(driver.container(&id.container)?.role)
        };
        let role = match check(self) {
            Ok(role) => role,
            Err(error) => return answer(reply, Err(error)),
        };
        let own = role != Role::PodContainer && id.exec.is_none();
        if own && (role == Role::Sandbox || self.state != State::Ready) {
            self.kill_pod(signal);
            return answer(reply, Ok(()));
        }
        let access = match self.access("kill") {
            Ok(access) => access,
            // The pod is on its way down and takes the process with it.
            Err(_) if matches!(self.state, State::Stopping | State::Stopped) => return answer(reply, Ok(())),
            Err(error) => return answer(reply, Err(error)),
        };
        let request = agent::SignalProcessRequest {
            container_id: id.container.0.clone(),
            exec_id: id.exec_id().to_owned(),
            signal,
            all,
        };
        self.jobs.spawn(async move {
            answer(reply, access.guest.signal_process(request).await);
            Done::Nothing
        });
    }

    /// A signal to the pod itself does what it does to the pause process of other runtimes: INT and TERM end it with 0, KILL
    /// ends it, everything else is ignored.
    fn kill_pod(&mut self, signal: u32) {
        let status = match signal {
            SIGKILL => 128 + SIGKILL,
            SIGINT | SIGTERM => 0,
            _ => return,
        };
        if matches!(self.state, State::Booting | State::Ready) {
            self.begin_stop(Exit { status, at: SystemTime::now() }, Farewell::Asked);
        }
    }

    pub(super) fn delete(&mut self, id: &ProcessId, reply: Reply<Deleted>) {
        let begin = |driver: &mut Self| {
            let container = driver.container(&id.container)?;
            if container.stage != Stage::Made {
                driver.made(&id.container)?;
            }
            let never_ran = container.role == Role::PodContainer || id.exec.is_some();
            let process = driver.process(id)?;
            match process.phase() {
                Phase::Exited => {}
                Phase::Created if never_ran => {}
                _ => return Err(Error::failed_precondition(format!("cannot delete {id}: it has not stopped"))),
            }
            let gone = deleted(process);
            let container = driver.container_mut(&id.container)?;
            if let Some(exec) = &id.exec {
                container.exec_specs.remove(exec);
                let process = container.execs.remove(exec);
                let was_started = gone.exit.is_some();
                return Ok((gone, vec![process.and_then(|process| process.stdio)], None, was_started));
            }
            container.stage = Stage::Deleting;
            let stdio = container.execs.values_mut().map(|exec| exec.stdio.take());
            let stdio: Vec<_> = stdio.chain(std::iter::once(container.init.stdio.take())).collect();
            let in_guest = container.role != Role::Sandbox;
            Ok((gone, stdio, container.storage.take(), in_guest))
        };
        let (gone, stdio, storage, in_guest) = match begin(self) {
            Ok(begun) => begun,
            Err(error) => return answer(reply, Err(error)),
        };
        let access = self.access("delete").ok();
        let id = id.clone();
        self.jobs.spawn(async move {
            let mut stopwatch = Stopwatch::start();
            join_all(stdio.into_iter().flatten().map(Stdio::close)).await;
            stopwatch.lap("stdio");
            let mut result = Ok(());
            if let Some(access) = access {
                if in_guest {
                    let request =
                        agent::DeleteRequest { container_id: id.container.0.clone(), exec_id: id.exec_id().to_owned() };
                    let answer = access.guest.delete(request).await;
                    stopwatch.lap("guest");
                    match answer {
                        Ok(answer) => stopwatch.note_guest("guest", &answer.stages),
                        Err(error) if error.kind() == Kind::NotFound => {}
                        Err(error) => result = Err(error),
                    }
                }
                // What the guest still has is not pulled from under it: it goes with the pod.
                if let Some(storage) = storage.filter(|_| result.is_ok()) {
                    let detached = storage.detach(&access.place).await;
                    result = result.and(detached);
                    stopwatch.lap("storage");
                }
            }
            Done::Deleted(DeleteDone { id, deleted: gone, stages: stopwatch.told().to_owned(), result, reply })
        });
    }

    pub(super) fn on_deleted(&mut self, done: DeleteDone) {
        let DeleteDone { id, deleted, stages, result, reply } = done;
        if let Err(error) = &result {
            // The container is gone for containerd all the same; what is left goes with the pod.
            self.guest_holds |= id.exec.is_none();
            tracing::warn!(container_id = %id.container, exec_id = id.exec_id(), %error, "deletion is incomplete");
        }
        if id.exec.is_none() {
            self.containers.remove(&id.container);
            let exit = deleted.exit;
            self.events.publish(
                "/tasks/delete",
                &TaskDelete {
                    container_id: id.container.0.clone(),
                    pid: deleted.pid,
                    exit_status: exit.map_or(0, |exit| exit.status),
                    exited_at: MessageField::some(timestamp(exit.map_or_else(SystemTime::now, |exit| exit.at))),
                    ..Default::default()
                },
            );
            tracing::info!(container_id = %id.container, stages, "container deleted");
        }
        answer(reply, Ok(deleted));
    }

    pub(super) fn pause(&mut self, id: ContainerId, pause: bool, reply: Reply<()>) {
        let verb = if pause { "pause" } else { "resume" };
        let check = |driver: &Self| {
            let container = driver.made(&id)?;
            if container.role == Role::Sandbox {
                return Err(Error::unimplemented(format!("{verb}: a sandbox cannot be paused, only its containers")));
            }
            if container.init.phase() != Phase::Running || container.paused == pause {
                let is = if container.paused { "paused" } else { "not running" };
                return Err(Error::failed_precondition(format!("{verb}: container {id} is {is}")));
            }
            driver.access(verb)
        };
        let access = match check(self) {
            Ok(access) => access,
            Err(error) => return answer(reply, Err(error)),
        };
        self.jobs.spawn(async move {
            let container_id = id.0.clone();
            let result = if pause {
                access.guest.pause_container(agent::PauseContainerRequest { container_id }).await
            } else {
                access.guest.resume_container(agent::ResumeContainerRequest { container_id }).await
            };
            Done::Paused(id, pause, result, reply)
        });
    }

    pub(super) fn on_paused(&mut self, id: &ContainerId, paused: bool, result: Result<()>, reply: Reply<()>) {
        if result.is_ok()
            && let Some(container) = self.containers.get_mut(id)
        {
            container.paused = paused;
            let container_id = id.0.clone();
            if paused {
                self.events.publish("/tasks/paused", &TaskPaused { container_id, ..Default::default() });
            } else {
                self.events.publish("/tasks/resumed", &TaskResumed { container_id, ..Default::default() });
            }
        }
        answer(reply, result);
    }

    pub(super) fn resize_pty(&mut self, id: &ProcessId, height: u32, width: u32, reply: Reply<()>) {
        let check = |driver: &mut Self| {
            let access = driver.access("resize pty")?;
            let container = driver.container_mut(&id.container)?;
            let process = match &id.exec {
                None => &mut container.init,
                Some(exec) => {
                    container.execs.get_mut(exec).ok_or_else(|| Error::not_found(format!("{id} does not exist")))?
                }
            };
            // kubelet may send the size before it starts the process: it is kept for the start.
            process.size = Some((height, width));
            Ok((access, process.phase() == Phase::Running || (id.exec.is_none() && process.phase() == Phase::Created)))
        };
        let access = match check(self) {
            Ok((access, true)) => access,
            Ok((_, false)) => return answer(reply, Ok(())),
            Err(error) => return answer(reply, Err(error)),
        };
        let request = agent::ResizePtyRequest {
            container_id: id.container.0.clone(),
            exec_id: id.exec_id().to_owned(),
            height,
            width,
        };
        self.jobs.spawn(async move {
            answer(reply, access.guest.resize_pty(request).await);
            Done::Nothing
        });
    }

    pub(super) fn close_stdin(&mut self, id: &ProcessId) -> Result<()> {
        let process = self.process_mut(id)?;
        process.close_stdin();
        Ok(())
    }
}

/// JSON bytes of `value`.
pub(super) fn encode(value: &Value, what: &'static str) -> Result<Vec<u8>> {
    serde_json::to_vec(value).or_kind(Kind::Internal, format!("encode {what}"))
}

async fn start_in_guest(access: &Access, id: &ProcessId, exec: Option<ExecStart>) -> Result<Option<Stdio>> {
    let start = agent::StartProcessRequest { container_id: id.container.0.clone(), exec_id: id.exec_id().to_owned() };
    let Some(exec) = exec else {
        access.guest.start_process(start).await?;
        return Ok(None);
    };
    let logged = Logged { id: id.exec_id(), namespace: &access.namespace };
    let (stdio, told) = Stdio::open(&exec.paths, logged, &access.listener, &access.streams).await?;
    let told = agent::Stdio { height: exec.height, width: exec.width, ..told };
    let started = async {
        access
            .guest
            .create_process(agent::CreateProcessRequest {
                container_id: id.container.0.clone(),
                exec_id: id.exec_id().to_owned(),
                process_json: encode(&exec.spec, "exec spec")?,
                stdio: Some(told),
            })
            .await?;
        access.guest.start_process(start).await
    };
    match started.await {
        Ok(_) => Ok(Some(stdio)),
        Err(error) => {
            stdio.close().await;
            let request =
                agent::DeleteRequest { container_id: id.container.0.clone(), exec_id: id.exec_id().to_owned() };
            if let Err(error) = access.guest.delete(request).await
                && error.kind() != Kind::NotFound
            {
                tracing::warn!(container_id = %id.container, exec_id = id.exec_id(), %error, "exec that failed to start stays in the guest");
            }
            Err(error)
        }
    }
}
