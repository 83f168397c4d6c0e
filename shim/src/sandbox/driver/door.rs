//! What only the sandbox API asks: status, and the pod's end, in one call each. Its new limits: `limits`.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use super::{Container, Door, Driver};
use crate::container::process::{Exit, Phase};
use crate::container::{ContainerId, ProcessId};
use crate::error::{Error, Result};
use crate::sandbox::pod::Farewell;
use crate::sandbox::state::State;
use crate::sandbox::{Reply, SandboxStatus};

impl Driver {
    pub(super) fn sandbox(&self, id: &ContainerId) -> Result<&Container> {
        let found = self.containers.get(id).filter(|container| container.door == Door::SandboxApi);
        found.ok_or_else(|| Error::not_found(format!("sandbox {id} does not exist")))
    }

    pub(super) fn status(&self, id: &ContainerId) -> Result<SandboxStatus> {
        let sandbox = self.sandbox(id)?;
        Ok(SandboxStatus {
            pid: sandbox.init.pid(),
            ready: self.state == State::Ready && sandbox.init.phase() == Phase::Running,
            created_at: sandbox.created_at,
            exit: sandbox.init.exit(),
            oci_spec: Arc::clone(&sandbox.oci_spec),
        })
    }

    /// Begins the end, unless it has begun; the answer tells when it is through.
    pub(super) fn stop_sandbox(&mut self, id: &ContainerId) -> Result<watch::Receiver<Option<Exit>>> {
        let stopped = self.sandbox(id)?.init.subscribe();
        self.stop_if_up();
        Ok(stopped)
    }

    /// Ends everything, whatever state it is in: nobody will ask for anything any more.
    pub(super) fn shutdown_sandbox(&mut self, reply: Reply<()>) {
        self.stop_if_up();
        self.ending = true;
        self.farewells.push(reply);
    }

    fn stop_if_up(&mut self) {
        if matches!(self.state, State::Booting | State::Ready) {
            self.begin_stop(Exit { status: 0, at: SystemTime::now() }, Farewell::Asked);
        }
    }

    /// Whether the driver is to end, and everything that is to be told before has been.
    pub(super) fn is_done(&self) -> bool {
        self.ending
            && matches!(self.state, State::Planned | State::Stopped)
            && self.containers.keys().all(|id| self.has_ended(id))
    }

    fn has_ended(&self, id: &ContainerId) -> bool {
        self.process(&ProcessId::init(id)).is_ok_and(|init| init.phase() == Phase::Exited)
    }
}
