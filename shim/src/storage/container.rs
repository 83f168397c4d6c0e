//! Everything of the host's that one container has: its volumes in the share, its rootfs there or on a disk, its block
//! volumes. Detached as one.

use std::path::Path;
use std::sync::Arc;

use bulkhead_proto::agent::{BlockDevice, GuestMount, MemoryVolume};
use serde_json::Value;

use super::bind;
use super::block_volume::{self, BlockVolume, BlockVolumes, Lease};
use super::common::CommonVolumes;
use super::plan::{self, Mount, RootfsPlan};
use super::volume::{self, Owner};
use super::{common, disk, empty_dir, memory, rootfs};
use crate::device::block::PluggedDisk;
use crate::error::{Error, Result};
use crate::host::HostThread;
use crate::mount_table::MountTable;
use crate::namespace::ShareRoot;
use crate::vm::disks::Disks;

/// Where a pod's storage is: the thread in whose mount namespace it lives, the share, the VM's disks, and those of them that
/// containers have in common.
#[derive(Debug, Clone)]
pub struct Place {
    /// Owns the mount namespace.
    pub host: HostThread,
    /// What virtiofsd serves.
    pub share: ShareRoot,
    /// `None` where there is no VM to attach one to.
    pub disks: Option<Disks>,
    /// Of all its containers.
    pub block_volumes: BlockVolumes,
    /// Directories in the share that are not one container's.
    pub common_volumes: CommonVolumes,
}

/// What a container has until [`ContainerStorage::detach`], or until the pod ends.
#[derive(Debug)]
#[must_use = "the pod keeps it until it is detached"]
pub struct ContainerStorage {
    container_id: String,
    disk: Option<PluggedDisk>,
    block_volumes: Vec<Lease>,
    common_volumes: Vec<common::Lease>,
}

/// What the agent makes for a container, in the words of its API.
#[derive(Debug)]
pub struct InGuest {
    /// How the rootfs comes about.
    pub rootfs: Vec<GuestMount>,
    /// Volumes of the pod that the container has.
    pub memory_volumes: Vec<MemoryVolume>,
}

impl ContainerStorage {
    /// Attaches rootfs and volumes of `spec` and writes the guest's `mounts` into it. On an error nothing is left.
    ///
    /// Returns what the agent is to make of it. Not cancel safe: run it as a job.
    pub async fn attach(
        place: &Place,
        owner: Owner<'_>,
        mounts: &[Mount],
        root_path: Option<&Path>,
        spec: &mut Value,
    ) -> Result<(Self, InGuest)> {
        let rootfs_plan = plan::plan_rootfs(mounts, root_path)?;
        let mut volume_plan = volume::plan_volumes(spec, owner)?;
        // Not on the host thread: a source is what the host's own mount table says now.
        let table = tokio::task::spawn_blocking(MountTable::of_thread).await;
        let table = Arc::new(table.map_err(|error| Error::internal(format!("read the mount table: {error}")))??);
        let empty_dirs = empty_dir::look(owner, &volume_plan, &table).await?;
        let memory_volumes = memory::claim(owner, &empty_dirs, &mut volume_plan).await?;
        for note in &volume_plan.notes {
            tracing::info!(container_id = owner.container_id, note, "a mount means something else in the guest");
        }
        let (disk, rootfs) = match (&rootfs_plan, &place.disks) {
            (RootfsPlan::Device(device), Some(disks)) if disk::fits(device) => {
                let (disk, mount) = disk::attach(disks, owner.container_id, device).await?;
                (Some(disk), vec![mount])
            }
            _ => (None, rootfs::attach(&place.host, &place.share, owner.container_id, &rootfs_plan).await?),
        };
        let mut storage = Self {
            container_id: owner.container_id.to_owned(),
            disk,
            block_volumes: Vec::new(),
            common_volumes: Vec::new(),
        };
        let attached = async {
            storage.common_volumes = common::attach(place, owner, &empty_dirs, &table, &mut volume_plan).await?;
            volume::spare_mounts_below(owner.container_id, &mut volume_plan, &table).await?;
            bind::attach(&place.host, &place.share, owner.container_id, &volume_plan.binds).await?;
            let object = spec.as_object_mut().ok_or_else(|| Error::invalid("spec is not a JSON object"))?;
            object.insert("mounts".into(), Value::Array(volume_plan.guest_mounts));
            Ok(())
        };
        match attached.await {
            Ok(()) => Ok((storage, InGuest { rootfs, memory_volumes })),
            Err(error) => {
                if let Err(left) = storage.detach(place).await {
                    tracing::warn!(container_id = owner.container_id, error = %left, "the rootfs of a container that failed stays until the pod ends");
                }
                Err(error)
            }
        }
    }

    /// Attaches those of `volumes` that were asked for, and returns what the agent is told of them. What is attached before an
    /// error stays until [`Self::detach`].
    ///
    /// Not cancel safe: run it as a job.
    pub async fn attach_block_volumes(&mut self, place: &Place, volumes: &[BlockVolume]) -> Result<Vec<BlockDevice>> {
        let found = block_volume::find(volumes).await?;
        let left_out = volumes.len() - found.len();
        if left_out > 0 {
            tracing::info!(
                container_id = self.container_id,
                left_out,
                "disks of the host's that nobody asked for are left out"
            );
        }
        let mut devices = Vec::new();
        for (volume, device) in found {
            let disks = place.disks.as_ref();
            let disks = disks.ok_or_else(|| Error::unimplemented(format!("{volume}: this VM takes no disks")))?;
            let attached = place.block_volumes.attach(disks, &device).await;
            let (lease, serial) = attached.map_err(|error| error.context(volume.to_string()))?;
            self.block_volumes.push(lease);
            devices.push(volume.in_guest(serial));
        }
        Ok(devices)
    }

    /// Takes rootfs and volumes from the guest, which must have let go of them before. Tries all.
    pub async fn detach(self, place: &Place) -> Result<()> {
        let mut detached = rootfs::detach(&place.host, &place.share, &self.container_id).await;
        detached = detached.and(common::detach(place, self.common_volumes).await);
        let Some(disks) = &place.disks else { return detached };
        if let Some(disk) = &self.disk {
            detached = detached.and(disk::detach(disks, disk).await);
        }
        for lease in self.block_volumes {
            detached = detached.and(place.block_volumes.detach(disks, lease).await);
        }
        detached
    }
}
