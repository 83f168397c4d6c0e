//! New limits: of a container, which are its cgroup's in the guest, or of the pod, which are those of the one above them all.
//!
//! The VM stays as large as it started, so what it cannot give is refused here, before anything has changed. What the guest
//! refuses it takes back itself.

use bulkhead_proto::agent;
use serde_json::Value;

use super::process::encode;
use super::{Done, Driver, answer};
use crate::container::ContainerId;
use crate::container::limits::ContainerLimits;
use crate::container::process::Phase;
use crate::container::spec::{self, Role};
use crate::error::{Error, Result};
use crate::sandbox::Reply;
use crate::sandbox::pod::Access;
use crate::sandbox::spec::PodResources;
use crate::sizing::Limits;

/// Result of a container's update.
pub(super) struct UpdateDone {
    id: ContainerId,
    /// What the container has if it worked.
    limits: ContainerLimits,
    result: Result<()>,
    reply: Reply<()>,
}

/// An update that may be sent.
struct Update {
    access: Access,
    request: agent::UpdateContainerRequest,
    limits: ContainerLimits,
    dropped: Vec<String>,
}

impl Driver {
    pub(super) fn update(&mut self, id: &ContainerId, resources: Value, reply: Reply<()>) {
        let update = match self.admit_update(id, resources) {
            Ok(Some(update)) => update,
            Ok(None) => return answer(reply, Ok(())),
            Err(error) => return answer(reply, Err(error)),
        };
        let Update { access, request, limits, dropped } = update;
        if !dropped.is_empty() {
            tracing::info!(container_id = %id, dropped = dropped.join(","), "resources that concern the host are dropped");
        }
        let id = id.clone();
        self.jobs.spawn(async move {
            let result = access.guest.update_container(request).await;
            Done::Updated(UpdateDone { id, limits, result, reply })
        });
    }

    /// What to send for an update; None if it needs nothing.
    fn admit_update(&self, id: &ContainerId, resources: Value) -> Result<Option<Update>> {
        let container = self.made(id)?;
        if container.role == Role::Sandbox {
            // The pause container's limits mean nothing in a VM, and containerd may set them.
            return Ok(None);
        }
        if container.init.phase() == Phase::Exited || container.init.held_exit.is_some() {
            // CRI's UpdateContainerResources takes this error for success: the container has ended meanwhile.
            return Err(Error::not_found(format!("container {id}: process already finished")));
        }
        let access = self.access("update")?;
        let (resources, dropped) = spec::translate_resources(resources)?;
        let limits = container.limits.after(&resources, id, &access.ceiling)?;
        let resources_json = encode(&resources, "resources")?;
        let request = agent::UpdateContainerRequest { container_id: id.0.clone(), resources_json };
        Ok(Some(Update { access, request, limits, dropped }))
    }

    pub(super) fn on_updated(&mut self, done: UpdateDone) {
        let UpdateDone { id, limits, result, reply } = done;
        if result.is_ok()
            && let Ok(container) = self.container_mut(&id)
        {
            container.limits = limits;
            tracing::info!(container_id = %id, limits = ?limits.now(), "limits of the container changed");
        }
        answer(reply, result);
    }

    pub(super) fn update_sandbox(&mut self, id: &ContainerId, resources: PodResources, reply: Reply<()>) {
        let check = |driver: &Self| {
            driver.sandbox(id)?;
            let access = driver.access("update sandbox")?;
            access.ceiling.admit("the pod", resources.limits(), Limits::default())?;
            let resources_json = encode(&resources.to_oci(), "resources")?;
            Ok::<_, Error>((access, agent::UpdateSandboxRequest { resources_json }))
        };
        let (access, request) = match check(self) {
            Ok(checked) => checked,
            Err(error) => return answer(reply, Err(error)),
        };
        tracing::info!(sandbox_id = %id, limits = ?resources.limits(), "limits of the pod change");
        self.jobs.spawn(async move {
            answer(reply, access.guest.update_sandbox(request).await);
            Done::Nothing
        });
    }
}
