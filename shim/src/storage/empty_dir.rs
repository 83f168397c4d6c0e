//! Which of a container's binds are of the pod's `emptyDir`s. [`find`] is pure.
//!
//! kubelet's layout: `<root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<volume>`, a tmpfs if its medium is memory; and for a
//! `subPath` a bind of a directory or file in it at `<root>/pods/<uid>/volume-subpaths/<volume>/<container>/<number>`.
//! See <https://kubernetes.io/docs/concepts/storage/volumes/#emptydir>.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::volume::{Owner, VolumePlan};
use crate::error::{Error, Result};
use crate::mount_table::MountTable;

/// Directory of a pod's `emptyDir`s, below the pod's own.
const EMPTY_DIRS: [&str; 2] = ["volumes", "kubernetes.io~empty-dir"];
/// Directory of what is mounted for `subPath`s.
const SUBPATHS: &str = "volume-subpaths";

/// Where a bind leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InEmptyDir {
    /// Number of the bind.
    pub index: usize,
    /// The volume's name in the pod's spec.
    pub volume: String,
    /// The volume on the host.
    pub host_path: PathBuf,
    /// Path in the volume; empty for the whole.
    pub below: String,
    /// It is a tmpfs.
    pub in_memory: bool,
}

/// Looks for the pod's `emptyDir`s among the plan's binds; `table` has the host's mounts.
pub async fn look(owner: Owner<'_>, plan: &VolumePlan, table: &Arc<MountTable>) -> Result<Vec<InEmptyDir>> {
    let Some(pod_uid) = owner.pod_uid else { return Ok(Vec::new()) };
    let in_pod = |path: &Path| path.iter().any(|part| part == pod_uid);
    let binds = plan.binds.iter().filter(|bind| in_pod(&bind.source));
    let candidates: Vec<(usize, PathBuf)> = binds.map(|bind| (bind.index, bind.source.clone())).collect();
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    let (pod_uid, table) = (pod_uid.to_owned(), Arc::clone(table));
    let looked = tokio::task::spawn_blocking(move || {
        // A source that does not exist is refused by who attaches it.
        let canonical = candidates.into_iter().filter_map(|(index, path)| Some((index, fs::canonicalize(path).ok()?)));
        canonical.filter_map(|(index, source)| find(&table, index, &source, &pod_uid)).collect()
    });
    looked.await.map_err(|error| Error::internal(format!("look at the volumes: {error}")))
}

/// Where `source` (canonical) leads.
fn find(table: &MountTable, index: usize, source: &Path, pod_uid: &str) -> Option<InEmptyDir> {
    let pod = source.ancestors().find(|path| path.ends_with(Path::new("pods").join(pod_uid)))?;
    let mut rest = source.strip_prefix(pod).ok()?.components();
    let directory = pod.join(EMPTY_DIRS.iter().collect::<PathBuf>());
    let is_subpath = rest.as_path().starts_with(SUBPATHS);
    if is_subpath {
        rest.next();
    } else {
        rest = source.strip_prefix(&directory).ok()?.components();
    }
    let volume = rest.next()?.as_os_str().to_str()?.to_owned();
    let host_path = directory.join(&volume);
    let on = table.mount_of(&host_path)?;
    let below = if is_subpath {
        let from = table.mount_of(source)?;
        // Both by their paths in the file system that they are in.
        let whole = on.in_file_system(&host_path)?;
        (from.device == on.device).then_some(())?;
        from.in_file_system(source)?.strip_prefix(whole).ok()?.to_owned()
    } else {
        rest.as_path().to_owned()
    };
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    let below = below.to_str().filter(|_| plain)?.to_owned();
    let in_memory = on.fstype == "tmpfs" && on.mount_point == host_path;
    Some(InEmptyDir { index, volume, host_path, below, in_memory })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 20 0:50 / /var/lib/kubelet/pods/8f2c/volumes/kubernetes.io~empty-dir/cache rw shared:9 - tmpfs tmpfs rw,size=1024k
31 20 0:51 / /var/lib/kubelet/pods/8f2c/volumes/kubernetes.io~secret/key rw shared:10 - tmpfs tmpfs rw,size=64k
33 20 0:50 /deep/a\\040b /var/lib/kubelet/pods/8f2c/volume-subpaths/cache/main/0 rw shared:9 - tmpfs tmpfs rw,size=1024k
34 20 8:1 /var/lib/kubelet/pods/8f2c/volumes/kubernetes.io~empty-dir/disk/x /var/lib/kubelet/pods/8f2c/volume-subpaths/disk/main/1 rw shared:1 - ext4 /dev/sda1 rw
35 20 0:51 /deep /var/lib/kubelet/pods/8f2c/volume-subpaths/key/main/2 rw shared:10 - tmpfs tmpfs rw
";

    fn found(below_pods: &str) -> Option<(String, String, bool)> {
        let source = Path::new("/var/lib/kubelet/pods").join(below_pods);
        find(&MountTable::parse(TABLE.as_bytes()), 0, &source, "8f2c")
            .map(|found| (found.volume, found.below, found.in_memory))
    }

    #[test]
    fn empty_dirs_of_the_pod_are_found_whole_and_in_parts() {
        for (path, volume, below, in_memory) in [
            ("8f2c/volumes/kubernetes.io~empty-dir/cache", "cache", "", true),
            ("8f2c/volumes/kubernetes.io~empty-dir/cache/x/y", "cache", "x/y", true),
            ("8f2c/volume-subpaths/cache/main/0", "cache", "deep/a b", true),
            ("8f2c/volumes/kubernetes.io~empty-dir/disk", "disk", "", false),
            ("8f2c/volume-subpaths/disk/main/1", "disk", "x", false),
        ] {
            assert_eq!(found(path), Some((volume.into(), below.into(), in_memory)), "{path}");
        }
    }

    #[test]
    fn what_is_another_volume_or_another_pods_is_not() {
        for other in [
            "8f2c/volumes/kubernetes.io~secret/key",
            "8f2c/volume-subpaths/key/main/2",
            "8f2c/volumes/kubernetes.io~empty-dir",
            "8f2c/etc-hosts",
            "77aa/volumes/kubernetes.io~empty-dir/cache",
        ] {
            assert_eq!(found(other), None, "{other}");
        }
    }
}
