//! Memory-backed `emptyDir`s: a tmpfs of the guest in the place of the one that kubelet has mounted on the host.
//!
//! What a container writes to one is in its own memory then, as under runc, and its limit and the volume's size hold. All
//! containers of the pod have the same tmpfs, which lasts as long as the VM. kubelet's stays empty but for directories that
//! it makes for `subPath`.
//!
//! Other tmpfs volumes (Secrets, tokens) have content of kubelet's own and are shared. kubelet's layout:
//! `<root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<volume>`, and for a `subPath` a bind of a directory in it below
//! `<root>/pods/<uid>/volume-subpaths`.
//! See <https://kubernetes.io/docs/concepts/storage/volumes/#emptydir>.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_proto::MEMORY_SCHEME;
use bulkhead_proto::agent::MemoryVolume;
use serde_json::json;

use super::volume::{Ids, Owner, VolumePlan};
use crate::error::{Error, Kind, Result, WithKind};
use crate::idmap::IdMapping;
use crate::namespace::unescape;

/// Directory of a pod's `emptyDir`s, below the pod's own.
const EMPTY_DIRS: [&str; 2] = ["volumes", "kubernetes.io~empty-dir"];
/// Permissions and set-ID bits of `st_mode`.
const PERMISSIONS: u32 = 0o7777;
/// What an id without a mapping is seen as (`/proc/sys/fs/overflowuid`).
const OVERFLOW: u32 = 65534;

/// Where a bind leads.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// The volume's name in the pod's spec.
    volume: String,
    /// The volume on the host.
    host_path: PathBuf,
    /// Path in the volume; empty for the whole.
    below: String,
}

/// Takes the pod's memory-backed volumes out of the plan's binds and has their mounts name them; returns each once.
pub async fn claim(owner: Owner<'_>, plan: &mut VolumePlan) -> Result<Vec<MemoryVolume>> {
    let Some(pod_uid) = owner.pod_uid else { return Ok(Vec::new()) };
    let in_pod = |path: &Path| path.iter().any(|part| part == pod_uid);
    let candidates: Vec<(usize, PathBuf, Option<Ids>)> = plan
        .binds
        .iter()
        .filter(|bind| in_pod(&bind.source))
        .map(|bind| (bind.index, bind.source.clone(), bind.ids.clone()))
        .collect();
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    let pod_uid = pod_uid.to_owned();
    // Not on the host thread: a source is what the host's own mount table says now.
    let looked = tokio::task::spawn_blocking(move || look(candidates, &pod_uid)).await;
    let mut volumes: Vec<MemoryVolume> = Vec::new();
    for (index, found, volume) in looked.map_err(|error| Error::internal(format!("look at the volumes: {error}")))?? {
        let source = match found.below.as_str() {
            "" => format!("{MEMORY_SCHEME}{}", found.volume),
            below => format!("{MEMORY_SCHEME}{}/{below}", found.volume),
        };
        if let Some(mount) = plan.guest_mount_of(owner.container_id, index) {
            mount.insert("source".into(), json!(source));
        }
        plan.binds.retain(|bind| bind.index != index);
        if !volumes.iter().any(|known| known.name == volume.name) {
            volumes.push(volume);
        }
    }
    Ok(volumes)
}

/// Those of `candidates` (index, source, owners' maps) that are memory-backed volumes of the pod.
fn look(candidates: Vec<(usize, PathBuf, Option<Ids>)>, pod_uid: &str) -> Result<Vec<(usize, Found, MemoryVolume)>> {
    let table = fs::read("/proc/thread-self/mountinfo").or_kind(Kind::Internal, "read the mount table")?;
    let mut volumes = Vec::new();
    for (index, source, ids) in candidates {
        // One that does not exist is refused by who attaches it.
        let Ok(source) = fs::canonicalize(source) else { continue };
        let Some(found) = find(&table, &source, pod_uid) else { continue };
        let volume = measure(&found, ids.as_ref())?;
        volumes.push((index, found, volume));
    }
    Ok(volumes)
}

/// Where `source` (canonical) leads by a mount table as in `/proc/<pid>/mountinfo` (proc(5)); None where it is no
/// memory-backed `emptyDir` of the pod, nor in one.
fn find(table: &[u8], source: &Path, pod_uid: &str) -> Option<Found> {
    let mounts: Vec<Mount> = table.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect();
    // The latest of those at one place is what a path leads to.
    let on = mounts
        .iter()
        .filter(|mount| source.starts_with(&mount.mount_point))
        .max_by_key(|mount| mount.mount_point.components().count())?;
    if !on.is_tmpfs {
        return None;
    }
    let volume = mounts.iter().find(|mount| {
        mount.device == on.device && mount.root == Path::new("/") && is_empty_dir(&mount.mount_point, pod_uid)
    })?;
    let below = on.root.join(source.strip_prefix(&on.mount_point).ok()?);
    let below = below.strip_prefix("/").ok()?;
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    Some(Found {
        volume: volume.mount_point.file_name()?.to_str()?.to_owned(),
        host_path: volume.mount_point.clone(),
        below: below.to_str().filter(|_| plain)?.to_owned(),
    })
}

/// One line of a mount table.
struct Mount {
    device: Vec<u8>,
    root: PathBuf,
    mount_point: PathBuf,
    is_tmpfs: bool,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let device = fields.nth(2)?.to_owned();
        let (root, mount_point) = (unescape(fields.next()?), unescape(fields.next()?));
        // A variable number of fields ends at a dash of its own.
        fields.find(|field| *field == b"-")?;
        Some(Self { device, root, mount_point, is_tmpfs: fields.next()? == b"tmpfs" })
    }
}

/// Whether kubelet has an `emptyDir` of the pod at `path`.
fn is_empty_dir(path: &Path, pod_uid: &str) -> bool {
    let end: PathBuf = ["pods", pod_uid].iter().chain(&EMPTY_DIRS).collect();
    path.parent().is_some_and(|directory| directory.ends_with(end))
}

/// What the guest's tmpfs has to be like.
fn measure(found: &Found, ids: Option<&Ids>) -> Result<MemoryVolume> {
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

    const UID: &str = "8f2c";
    const TABLE: &str = "\
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 20 0:50 / /var/lib/kubelet/pods/8f2c/volumes/kubernetes.io~empty-dir/cache rw shared:9 - tmpfs tmpfs rw,size=1024k
31 20 0:51 / /var/lib/kubelet/pods/8f2c/volumes/kubernetes.io~secret/key rw shared:10 - tmpfs tmpfs rw,size=64k
32 20 0:52 / /var/lib/kubelet/pods/77aa/volumes/kubernetes.io~empty-dir/cache rw shared:11 - tmpfs tmpfs rw
33 20 0:50 /deep/a\\040b /var/lib/kubelet/pods/8f2c/volume-subpaths/cache/main/0 rw shared:9 - tmpfs tmpfs rw,size=1024k
34 20 0:53 / /var/lib/kubelet/pods/8f2c/volumes/kubernetes.io~empty-dir/disk/below rw - tmpfs tmpfs rw
";

    fn found(below_pods: &str) -> Option<(String, String)> {
        let source = Path::new("/var/lib/kubelet/pods").join(below_pods);
        find(TABLE.as_bytes(), &source, UID).map(|found| (found.volume, found.below))
    }

    #[test]
    fn a_tmpfs_that_is_an_empty_dir_of_the_pod_is_found_whole_and_in_parts() {
        for (path, below) in [
            ("8f2c/volumes/kubernetes.io~empty-dir/cache", ""),
            ("8f2c/volumes/kubernetes.io~empty-dir/cache/x/y", "x/y"),
            ("8f2c/volume-subpaths/cache/main/0", "deep/a b"),
        ] {
            assert_eq!(found(path), Some(("cache".into(), below.into())), "{path}");
        }
    }

    #[test]
    fn what_the_host_has_content_for_stays_shared() {
        for other in [
            "8f2c/volumes/kubernetes.io~secret/key",
            "8f2c/volumes/kubernetes.io~empty-dir/disk",
            "8f2c/volumes/kubernetes.io~empty-dir/disk/below",
            "8f2c/etc-hosts",
            "77aa/volumes/kubernetes.io~empty-dir/cache",
        ] {
            assert_eq!(found(other), None, "{other}");
        }
    }

    #[test]
    fn owners_are_those_that_an_id_mapped_mount_shows() {
        let map = [IdMapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        assert_eq!([0, 2345, 70_000].map(|id| mapped(id, &map)), [100_000, 102_345, OVERFLOW]);
    }
}
