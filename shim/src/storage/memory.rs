//! Memory-backed `emptyDir`s: a tmpfs of the guest in the place of the one that kubelet has mounted on the host.
//!
//! What a container writes to one is in its own memory then, as under runc, and its limit and the volume's size hold. All
//! containers of the pod have the same tmpfs, which lasts as long as the VM. kubelet's stays empty but for directories that
//! it makes for `subPath`. Other tmpfs volumes (Secrets, tokens) have content of kubelet's own and are shared.

use std::fs;
use std::os::unix::fs::MetadataExt;

use bulkhead_proto::MEMORY_SCHEME;
use bulkhead_proto::agent::MemoryVolume;
use serde_json::json;

use super::bind::Ids;
use super::empty_dir::InEmptyDir;
use super::volume::{Owner, VolumePlan};
use crate::error::{Error, Kind, Result, WithKind};
use crate::idmap::IdMapping;

/// Permissions and set-ID bits of `st_mode`.
const PERMISSIONS: u32 = 0o7777;
/// What an id without a mapping is seen as (`/proc/sys/fs/overflowuid`).
const OVERFLOW: u32 = 65534;

/// Takes those of `found` that are in memory out of the plan's binds and has their mounts name them; returns each volume once.
pub async fn claim(owner: Owner<'_>, found: &[InEmptyDir], plan: &mut VolumePlan) -> Result<Vec<MemoryVolume>> {
    let mut volumes: Vec<MemoryVolume> = Vec::new();
    for found in found.iter().filter(|found| found.in_memory) {
        let Some(bind) = plan.take_bind(found.index) else { continue };
        let source = match found.below.as_str() {
            "" => format!("{MEMORY_SCHEME}{}", found.volume),
            below => format!("{MEMORY_SCHEME}{}/{below}", found.volume),
        };
        if let Some(mount) = plan.guest_mount_of(owner.container_id, found.index) {
            mount.insert("source".into(), json!(source));
        }
        if volumes.iter().any(|known| known.name == found.volume) {
            continue;
        }
        let found = found.clone();
        let measured = tokio::task::spawn_blocking(move || measure(&found, bind.ids.as_ref())).await;
        volumes.push(measured.map_err(|error| Error::internal(format!("look at a volume: {error}")))??);
    }
    Ok(volumes)
}

/// What the guest's tmpfs has to be like.
fn measure(found: &InEmptyDir, ids: Option<&Ids>) -> Result<MemoryVolume> {
    let what = || format!("look at volume {:?}", found.volume);
    let size = rustix::fs::statvfs(&found.host_path).or_kind(Kind::Internal, what())?;
    let root = fs::metadata(&found.host_path).or_kind(Kind::Internal, what())?;
    let seen = |id: u32, mappings: fn(&Ids) -> &[IdMapping]| ids.map_or(id, |ids| mapped(id, mappings(ids)));
    Ok(MemoryVolume {
        name: found.volume.clone(),
        size_bytes: size.f_blocks.saturating_mul(size.f_frsize),
        inodes: size.f_files,
        mode: root.mode() & PERMISSIONS,
        uid: seen(root.uid(), |ids| &ids.mappings.uids),
        gid: seen(root.gid(), |ids| &ids.mappings.gids),
    })
}

/// `id` of a file as an id-mapped mount shows it.
fn mapped(id: u32, mappings: &[IdMapping]) -> u32 {
    let find = |mapping: &IdMapping| {
        let offset = id.checked_sub(mapping.container_id)?;
        (offset < mapping.size).then(|| mapping.host_id.saturating_add(offset))
    };
    mappings.iter().find_map(find).unwrap_or(OVERFLOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_those_that_an_id_mapped_mount_shows() {
        let map = [IdMapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        assert_eq!([0, 2345, 70_000].map(|id| mapped(id, &map)), [100_000, 102_345, OVERFLOW]);
    }
}
