//! Exits on their way to containerd, in the promised order.
//!
//! An exit that the guest reports is held ([`crate::container::process::HeldExit`]) until:
//! 1. the start of the process was told (a process may end before its Start returns),
//! 2. its output was passed on, by the counts in the report,
//! 3. for an init: the exits of the container's execs are out; for a container that is its own sandbox: the pod is torn
//!    down.

use std::time::SystemTime;

use bulkhead_proto::agent;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::MessageField;

use super::{Done, Door, Driver, Stage, killed_now};
use crate::container::process::{Exit, Held, HeldExit, Phase, Process, Step};
use crate::container::spec::Role;
use crate::container::stdio::OutputCount;
use crate::container::{ContainerId, ProcessId};
use crate::sandbox::pod::Farewell;
use crate::sandbox::state::State;
use crate::service::convert::timestamp;
use crate::timeouts;

impl Driver {
    /// The guest reports an exit.
    pub(super) fn on_exit(&mut self, report: &agent::Exit) {
        let id = ProcessId::new(report.container_id.clone(), report.exec_id.clone());
        let Ok(process) = self.process_mut(&id) else {
            tracing::debug!(container_id = %id.container, exec_id = id.exec_id(), "exit of a process that is not known");
            return;
        };
        if process.held_exit.is_some() || process.phase() == Phase::Exited {
            return;
        }
        // The status comes from the guest: what no process can have is cut to what one can.
        let status = report.exit_status & 0xff;
        let output = OutputCount { stdout: report.stdout_bytes, stderr: report.stderr_bytes };
        process.held_exit = Some(HeldExit {
            exit: Exit { status, at: SystemTime::now() },
            output: Some(output),
            progress: Held::Arrived,
        });
        self.advance_exits(&id.container);
    }

    /// The guest is gone: every process that still lives has ended with it.
    pub(super) fn end_all(&mut self) {
        let ids: Vec<ContainerId> = self.containers.keys().cloned().collect();
        for id in ids {
            if let Some(container) = self.containers.get_mut(&id) {
                // One that is still being created was never told of: its job fails by itself.
                if container.stage == Stage::Creating {
                    continue;
                }
                let init = (container.role == Role::PodContainer).then_some(&mut container.init);
                for process in container.execs.values_mut().filter(|exec| exec.is_live()).chain(init) {
                    if process.phase() == Phase::Exited {
                        continue;
                    }
                    match &mut process.held_exit {
                        // Whatever the guest still owed will not come.
                        Some(held) => held.output = None,
                        None => {
                            process.held_exit =
                                Some(HeldExit { exit: killed_now(), output: None, progress: Held::Arrived });
                        }
                    }
                }
            }
            self.advance_exits(&id);
        }
    }

    /// Moves every held exit of a container as far as it may go.
    pub(super) fn advance_exits(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let execs = container.execs.iter_mut().map(|(exec, process)| (Some(exec.clone()), process));
        for (exec, process) in execs.chain(std::iter::once((None, &mut container.init))) {
            let starting = process.phase() == Phase::Starting;
            let Some(held) = &mut process.held_exit else { continue };
            if held.progress != Held::Arrived || starting {
                continue;
            }
            held.progress = Held::Draining;
            let process_id = ProcessId { container: id.clone(), exec };
            // A containerd that was restarted takes up its containers again, and forgets its execs.
            let reopens = process_id.exec.is_none();
            let drained = process.stdio.as_ref().map(|stdio| stdio.drained(held.output, reopens));
            self.jobs.spawn(async move {
                let complete = match drained {
                    Some(drained) => drained.await,
                    None => true,
                };
                Done::Drained(process_id, complete)
            });
        }
        self.publish_ready_exits(id);
    }

    pub(super) fn on_drained(&mut self, id: &ProcessId, complete: bool) {
        if !complete {
            tracing::warn!(
                container_id = %id.container,
                exec_id = id.exec_id(),
                deadline = ?timeouts::DRAIN,
                "output was still on its way when the wait for it ended"
            );
        }
        if let Ok(process) = self.process_mut(id)
            && let Some(held) = &mut process.held_exit
        {
            held.progress = Held::Drained;
        }
        let is_init = id.exec.is_none();
        self.publish_ready_exits(&id.container);
        if is_init && self.containers.get(&id.container).is_some_and(|c| c.init.phase() != Phase::Exited) {
            // The agent reports execs first, so this is for a guest that does not keep its word.
            let container = id.container.clone();
            self.jobs.spawn(async move {
                tokio::time::sleep(timeouts::DRAIN).await;
                Done::ExecsOverdue(container)
            });
        }
    }

    /// Gives the execs of a container whose init has long ended the exit that the guest did not report.
    pub(super) fn on_execs_overdue(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get_mut(id) else { return };
        if container.init.held_exit.is_none() {
            return;
        }
        for exec in container.execs.values_mut().filter(|exec| exec.is_live() && exec.held_exit.is_none()) {
            exec.held_exit = Some(HeldExit { exit: killed_now(), output: None, progress: Held::Drained });
        }
        self.publish_ready_exits(id);
    }

    fn publish_ready_exits(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get(id) else { return };
        let ready = |held: &Option<HeldExit>| held.filter(|held| held.progress == Held::Drained).map(|held| held.exit);
        let execs: Vec<(ProcessId, Exit)> = container
            .execs
            .iter()
            .filter(|(_, process)| process.phase() != Phase::Exited)
            .filter_map(|(exec, process)| {
                let exit = ready(&process.held_exit)?;
                Some((ProcessId { container: id.clone(), exec: Some(exec.clone()) }, exit))
            })
            .collect();
        for (process_id, exit) in execs {
            self.publish_exit(&process_id, exit);
        }
        let Some(container) = self.containers.get(id) else { return };
        if container.init.phase() == Phase::Exited || container.execs.values().any(Process::is_live) {
            return;
        }
        let Some(exit) = ready(&container.init.held_exit) else { return };
        match container.role {
            Role::PodContainer => self.publish_exit(&ProcessId::init(id), exit),
            // The container is the sandbox: its exit is the sandbox's, and comes when nothing is left.
            Role::Single if self.state == State::Ready => self.begin_stop(exit, Farewell::Asked),
            Role::Single | Role::Sandbox => {}
        }
        self.finish_stop();
    }

    /// Tells containerd and every waiter.
    pub(super) fn publish_exit(&mut self, id: &ProcessId, exit: Exit) {
        let Ok(process) = self.process_mut(id) else { return };
        if process.step(Step::Exit, id).is_err() {
            return;
        }
        let pid = process.pid();
        process.set_exit(exit);
        if self.container(&id.container).is_ok_and(|container| container.door == Door::SandboxApi) {
            tracing::info!(sandbox_id = %id.container, exit_status = exit.status, "sandbox ended");
            return;
        }
        tracing::info!(container_id = %id.container, exec_id = id.exec_id(), exit_status = exit.status, "process exited");
        self.events.publish(
            "/tasks/exit",
            &TaskExit {
                container_id: id.container.0.clone(),
                // The id of what has exited: containerd tells an exec from the init by it.
                id: id.exec.as_ref().map_or_else(|| id.container.0.clone(), |exec| exec.0.clone()),
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            },
        );
    }
}
