//! Directories that containers of a pod may have in common: each is in the share once, so that in the guest it is one file
//! system.
//!
//! Each mount below the share is a file system of its own in the guest. Through two of them one file would be two: locks,
//! watches, shared mappings, FIFOs and sockets would not reach from one container to the next, as sidecars expect it. So a
//! directory is attached for the first container that has it, and stays until the pod ends.
//!
//! One with other mounts below it is not: what those are is decided anew for each container. Nor is a file: what is bound
//! from it is its content alone.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::SHARE_SCHEME;
use serde_json::json;

use super::container::Place;
use super::empty_dir::InEmptyDir;
use super::volume::{self, Bind, Ids, Owner, VolumePlan};
use crate::error::{Error, Result};
use crate::namespace::{Access, Identity, Propagation, Tree};

/// Directory of them in the share; no id of a container begins like this.
const DIRECTORY: &str = "_volumes";

/// The directories that a pod's containers have in common; a clone is the same.
#[derive(Debug, Clone, Default)]
pub struct CommonVolumes(Arc<Mutex<Vec<Key>>>);

/// What two containers must want alike to have one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    source: Identity,
    recursive: bool,
    access: Access,
    propagation: Propagation,
    ids: Option<Ids>,
}

/// A bind of a container, and what it is to be bound from.
struct Candidate {
    bind: Bind,
    /// Path in the directory; empty for the whole.
    below: String,
}

/// Attaches those of the plan's binds that a pod's containers may have in common, or finds them, and takes them out of the
/// plan; their mounts name them. `empty_dirs` are those among the binds that lie in one of the pod's own.
///
/// Not cancel safe: run it as a job.
pub async fn attach(place: &Place, owner: Owner<'_>, empty_dirs: &[InEmptyDir], plan: &mut VolumePlan) -> Result<()> {
    // A container by itself has nobody to have something in common with.
    if plan.binds.is_empty() || owner.sandbox_id == owner.container_id {
        return Ok(());
    }
    let candidates: Vec<Candidate> = plan.binds.iter().map(|bind| Candidate::new(bind, empty_dirs)).collect();
    // Not on the host thread: a source is what the host's own mount table says now.
    let opened = tokio::task::spawn_blocking(move || {
        let mut namespaces = Vec::new();
        let open = |candidate: Candidate| candidate.open(&mut namespaces).transpose();
        candidates.into_iter().filter_map(open).collect::<Result<Vec<_>>>()
    });
    let opened = opened.await.map_err(|error| Error::internal(format!("open the volumes: {error}")))??;
    let (share, common) = (place.share.clone(), place.common_volumes.clone());
    let attached = place.host.run(move || {
        let attach = |(candidate, key, tree): (Candidate, Key, Tree)| -> Result<(usize, String)> {
            let mut common = common.0.lock().unwrap_or_else(PoisonError::into_inner);
            let found = common.iter().position(|known| *known == key);
            let number = found.unwrap_or(common.len());
            let path = Path::new(DIRECTORY).join(number.to_string());
            if found.is_none() {
                let target = share.mount_point(&path, true)?;
                let Bind { source, destination, .. } = &candidate.bind;
                tree.attach(&target, key.access, key.propagation)
                    .map_err(|error| error.context(format!("mount \"{}\" to {destination:?}", source.display())))?;
                common.push(key);
            }
            let source = path.join(&candidate.below);
            Ok((candidate.bind.index, format!("{SHARE_SCHEME}{}", source.display().to_string().trim_end_matches('/'))))
        };
        Ok(opened.into_iter().map(attach).collect::<Result<Vec<_>>>()?)
    });
    for (index, source) in attached.await? {
        if let Some(mount) = plan.guest_mount_of(owner.container_id, index) {
            mount.insert("source".into(), json!(source));
        }
        plan.take_bind(index);
    }
    Ok(())
}

impl Candidate {
    fn new(bind: &Bind, empty_dirs: &[InEmptyDir]) -> Self {
        let mut bind = bind.clone();
        let Some(found) = empty_dirs.iter().find(|found| found.index == bind.index) else {
            return Self { bind, below: String::new() };
        };
        bind.source = PathBuf::from(&found.host_path);
        // It is the pod's own, whatever it lets one of its containers do.
        bind.access = Access::Writable;
        Self { bind, below: found.below.clone() }
    }

    /// None if it is for this container alone.
    fn open(self, namespaces: &mut volume::Namespaces) -> Result<Option<(Self, Key, Tree)>> {
        // One that does not exist is refused by who attaches the others.
        if !self.bind.source.is_dir() || Tree::has_mounts_below(&self.bind.source)? {
            return Ok(None);
        }
        let (bind, tree) = volume::open(self.bind, namespaces)?;
        let key = Key {
            source: tree.identity()?,
            recursive: bind.recursive,
            access: bind.access,
            propagation: bind.propagation,
            ids: bind.ids.clone(),
        };
        Ok(Some((Self { bind, ..self }, key, tree)))
    }
}
