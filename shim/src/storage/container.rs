//! Everything that one container has in the share: its rootfs and its volumes, attached and detached as one.

use std::path::Path;

use bulkhead_proto::agent::GuestMount;
use serde_json::Value;

use super::plan::{self, Mount};
use super::rootfs;
use super::volume::{self, Owner};
use crate::error::{Error, Result};
use crate::host::HostThread;
use crate::namespace::ShareRoot;

/// Where a pod's storage is: the thread in whose mount namespace it lives, and the share.
#[derive(Debug, Clone)]
pub struct Place {
    /// Owns the mount namespace.
    pub host: HostThread,
    /// What virtiofsd serves.
    pub share: ShareRoot,
}

/// What a container has in the share until [`ContainerStorage::detach`], or until the pod ends.
#[derive(Debug)]
#[must_use = "the share keeps it until it is detached"]
pub struct ContainerStorage {
    container_id: String,
}

impl ContainerStorage {
    /// Attaches rootfs and volumes of `spec` and writes the guest's `mounts` into it. On an error nothing is left.
    ///
    /// Returns what the agent mounts as the rootfs. Not cancel safe: run it as a job.
    pub async fn attach(
        place: &Place,
        owner: Owner<'_>,
        mounts: &[Mount],
        root_path: Option<&Path>,
        spec: &mut Value,
    ) -> Result<(Self, Vec<GuestMount>)> {
        let rootfs_plan = plan::plan_rootfs(mounts, root_path)?;
        let volume_plan = volume::plan_volumes(spec, owner)?;
        for note in &volume_plan.notes {
            tracing::info!(container_id = owner.container_id, note, "a mount means something else in the guest");
        }
        let object = spec.as_object_mut().ok_or_else(|| Error::invalid("spec is not a JSON object"))?;
        object.insert("mounts".into(), Value::Array(volume_plan.guest_mounts.clone()));
        let rootfs = rootfs::attach(&place.host, &place.share, owner.container_id, &rootfs_plan).await?;
        let storage = Self { container_id: owner.container_id.to_owned() };
        match volume::attach(&place.host, &place.share, owner.container_id, &volume_plan).await {
            Ok(()) => Ok((storage, rootfs)),
            Err(error) => {
                if let Err(left) = storage.detach(place).await {
                    tracing::warn!(container_id = owner.container_id, error = %left, "the rootfs of a container that failed stays until the pod ends");
                }
                Err(error)
            }
        }
    }

    /// Takes rootfs and volumes out of the share. The guest must have let go of them before.
    pub async fn detach(self, place: &Place) -> Result<()> {
        rootfs::detach(&place.host, &place.share, &self.container_id).await
    }
}
