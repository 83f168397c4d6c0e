//! Files and directories of the host in the share: each opened and checked as what it is, mapped, and attached.
//!
//! Which there are, and how the guest mounts them, is for [`super::volume`] to say.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::error::{Error, Result};
use crate::host::HostThread;
use crate::idmap::IdMappings;
use crate::namespace::{Access, Propagation, ShareRoot, Tree};

/// A file or directory of the host that goes into the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Names it in the share: `<container>/<index>`.
    pub index: usize,
    /// On the host; symbolic links are followed when it is attached.
    pub source: PathBuf,
    /// In the container, for messages.
    pub destination: String,
    /// With the mounts below it.
    pub recursive: bool,
    /// What the share lets the guest do.
    pub access: Access,
    /// Whether later mounts below the source arrive.
    pub propagation: Propagation,
    /// How owners are seen; `None` is as they are.
    pub ids: Option<Ids>,
}

/// Maps through which the owners of a bind's files are seen and set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    /// The maps.
    pub mappings: IdMappings,
    /// For the mounts below the bind too (`ridmap`).
    pub recursive: bool,
}

/// Path of volume `index` below the share.
pub fn share_path(container_id: &str, index: usize) -> String {
    format!("{container_id}/{index}")
}

/// Puts `binds` of a container into the share; on error none is left there.
///
/// A source that does not exist is refused in runc's words. Not cancel safe: run it as a job.
pub async fn attach(host: &HostThread, share: &ShareRoot, container_id: &str, binds: &[Bind]) -> Result<()> {
    if binds.is_empty() {
        return Ok(());
    }
    let binds = binds.to_vec();
    // Not on the host thread: a source is what the host's own mount table says now.
    let opened = tokio::task::spawn_blocking(move || {
        let mut namespaces = Vec::new();
        binds.into_iter().map(|bind| open(bind, &mut namespaces)).collect::<Result<Vec<_>>>()
    });
    let trees = opened.await.map_err(|error| Error::internal(format!("open the volumes: {error}")))??;
    let (share, container_id) = (share.clone(), container_id.to_owned());
    let attached = host.run(move || {
        let attach_one = |(bind, tree): (Bind, Tree)| -> Result<()> {
            let relative = PathBuf::from(share_path(&container_id, bind.index));
            let target = share.mount_point(&relative, tree.is_dir())?;
            tree.attach(&target, bind.access, bind.propagation).map_err(|error| {
                error.context(format!("mount \"{}\" to {:?}", bind.source.display(), bind.destination))
            })
        };
        let indexes: Vec<usize> = trees.iter().map(|(bind, _)| bind.index).collect();
        let attached = trees.into_iter().try_for_each(attach_one);
        if attached.is_err() {
            for index in indexes {
                if let Err(error) = share.remove(Path::new(&share_path(&container_id, index))) {
                    tracing::warn!(%error, "a volume of a container that failed is left in the share");
                }
            }
        }
        Ok(attached?)
    });
    Ok(attached.await?)
}

/// User namespaces for id-mapped volumes, by their maps.
pub(super) type Namespaces = Vec<(IdMappings, OwnedFd)>;

/// Clones a bind's source; `namespaces` are those of the container's id-mapped volumes, most often one for all of them.
pub(super) fn open(bind: Bind, namespaces: &mut Namespaces) -> Result<(Bind, Tree)> {
    let context = || format!("error mounting \"{}\" to rootfs at {:?}", bind.source.display(), bind.destination);
    let tree = Tree::open(&bind.source, bind.recursive).map_err(|error| error.context(context()))?;
    // A symbolic link may have led to where the plan would not have gone.
    if tree.is_kernel_file_system() || matches!(tree.file_type(), FileType::BlockDevice | FileType::CharacterDevice) {
        return Err(refusal(&bind.source, &bind.destination));
    }
    if let Some(ids) = &bind.ids {
        if !namespaces.iter().any(|(mappings, _)| *mappings == ids.mappings) {
            namespaces.push((ids.mappings.clone(), ids.mappings.namespace()?));
        }
        for (_, namespace) in namespaces.iter().filter(|(mappings, _)| *mappings == ids.mappings) {
            tree.map_ids(namespace, ids.recursive).map_err(|error| error.context(context()))?;
        }
    }
    Ok((bind, tree))
}

/// Why a device or a kernel file of the host cannot be a volume.
pub(super) fn refusal(source: &Path, destination: &str) -> Error {
    Error::invalid(format!(
        "mount \"{}\" to {destination:?}: devices and kernel files of the host are not available in the guest",
        source.display()
    ))
}
