//! Directories that containers of a pod may have in common: each is in the share once, so that in the guest it is one file
//! system.
//!
//! Each mount below the share is a file system of its own in the guest. Through two of them one file would be two: locks,
//! watches, shared mappings, FIFOs and sockets would not reach from one container to the next, as sidecars expect it. So a
//! directory is attached for the first container that has it, and goes with the last.
//!
//! One with other mounts below it is not: what those are is decided anew for each container. Nor is a file: what is bound
//! from it is its content alone.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::SHARE_SCHEME;
use serde_json::json;

use super::bind::{self, Bind, Ids};
use super::container::Place;
use super::empty_dir::InEmptyDir;
use super::volume::{Owner, VolumePlan};
use crate::error::{Error, Result};
use crate::mount_table::MountTable;
use crate::namespace::{Access, Identity, Propagation, ShareRoot, Tree};

/// The directories that a pod's containers have in common; a clone is the same. Locked on the host thread only, which mounts
/// and unmounts them.
#[derive(Debug, Clone, Default)]
pub struct CommonVolumes(Arc<Mutex<Attached>>);

#[derive(Debug, Default)]
struct Attached {
    /// How many there ever were: no number is given twice, since the guest may not have forgotten yet what it meant.
    named: usize,
    there: Vec<Common>,
}

#[derive(Debug)]
struct Common {
    key: Key,
    number: usize,
    /// Binds of containers that have it.
    leases: usize,
}

/// A container's part in a directory, until [`detach`].
#[derive(Debug)]
#[must_use = "the directory stays until the last lease of it is given back"]
pub struct Lease(usize);

/// What two containers must want alike to have one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    source: PathBuf,
    identity: Identity,
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
/// plan; their mounts name them. `empty_dirs` are those among the binds that lie in one of the pod's own. On an error nothing
/// is left.
///
/// Not cancel safe: run it as a job.
pub async fn attach(
    place: &Place,
    owner: Owner<'_>,
    empty_dirs: &[InEmptyDir],
    table: &Arc<MountTable>,
    plan: &mut VolumePlan,
) -> Result<Vec<Lease>> {
    // A container by itself has nobody to have something in common with.
    if plan.binds.is_empty() || owner.sandbox_id == owner.container_id {
        return Ok(Vec::new());
    }
    let candidates: Vec<Candidate> = plan.binds.iter().map(|bind| Candidate::new(bind, empty_dirs)).collect();
    let table = Arc::clone(table);
    // Not on the host thread: a source is what the host has there.
    let opened = tokio::task::spawn_blocking(move || {
        let mut namespaces = Vec::new();
        let open = |candidate: Candidate| candidate.open(&table, &mut namespaces).transpose();
        candidates.into_iter().filter_map(open).collect::<Result<Vec<_>>>()
    });
    let opened = opened.await.map_err(|error| Error::internal(format!("open the volumes: {error}")))??;
    let (share, common) = (place.share.clone(), place.common_volumes.clone());
    let attached = place.host.run(move || {
        let mut attached = common.lock();
        let mut leases = Vec::new();
        for (candidate, key, tree) in opened {
            match attached.take(&share, &candidate, key, tree) {
                Ok(lease) => leases.push((candidate, lease)),
                Err(error) => {
                    for (_, lease) in leases {
                        if let Err(left) = attached.give_back(&share, lease) {
                            tracing::warn!(error = %left, "a volume of a container that failed is left in the share");
                        }
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(leases)
    });
    let mut leases = Vec::new();
    for (Candidate { bind, below }, lease) in attached.await? {
        let path = path(lease.0).join(below);
        let source = format!("{SHARE_SCHEME}{}", path.display().to_string().trim_end_matches('/'));
        if let Some(mount) = plan.guest_mount_of(owner.container_id, bind.index) {
            mount.insert("source".into(), json!(source));
        }
        plan.take_bind(bind.index);
        leases.push(lease);
    }
    Ok(leases)
}

/// Gives leases back; the guest must have let go of what they were for. Tries all.
///
/// Not cancel safe: run it as a job.
pub async fn detach(place: &Place, leases: Vec<Lease>) -> Result<()> {
    if leases.is_empty() {
        return Ok(());
    }
    let (share, common) = (place.share.clone(), place.common_volumes.clone());
    let detached = place.host.run(move || {
        let mut attached = common.lock();
        let given_back = leases.into_iter().map(|lease| attached.give_back(&share, lease));
        Ok(given_back.fold(Ok(()), Result::and)?)
    });
    Ok(detached.await?)
}

/// The directory in the share that is for one of them. No id of a container begins like this, and the guest, which may not
/// have forgotten those that are gone, finds none made again.
fn directory(number: usize) -> PathBuf {
    format!("_{number}").into()
}

/// Where it is mounted.
fn path(number: usize) -> PathBuf {
    directory(number).join("0")
}

impl CommonVolumes {
    fn lock(&self) -> MutexGuard<'_, Attached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attached {
    fn take(&mut self, share: &ShareRoot, candidate: &Candidate, key: Key, tree: Tree) -> Result<Lease> {
        if let Some(found) = self.there.iter_mut().find(|common| common.key == key) {
            found.leases += 1;
            return Ok(Lease(found.number));
        }
        let number = self.named;
        let target = share.mount_point(&path(number), true)?;
        self.named += 1;
        let Bind { source, destination, .. } = &candidate.bind;
        tree.attach(&target, key.access, key.propagation)
            .map_err(|error| error.context(format!("mount \"{}\" to {destination:?}", source.display())))?;
        self.there.push(Common { key, number, leases: 1 });
        Ok(Lease(number))
    }

    fn give_back(&mut self, share: &ShareRoot, Lease(number): Lease) -> Result<()> {
        let Some(at) = self.there.iter().position(|common| common.number == number) else { return Ok(()) };
        self.there[at].leases -= 1;
        if self.there[at].leases > 0 {
            return Ok(());
        }
        self.there.remove(at);
        share.remove(&directory(number))
    }
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
    fn open(self, table: &MountTable, namespaces: &mut bind::Namespaces) -> Result<Option<(Self, Key, Tree)>> {
        // One that does not exist is refused by who attaches the others.
        if !self.bind.source.is_dir() || table.has_mounts_below(&self.bind.source) {
            return Ok(None);
        }
        let (bind, tree) = bind::open(self.bind, namespaces)?;
        // A file system that tells nothing of itself is each container's own.
        let Ok(identity) = tree.identity() else { return Ok(None) };
        let key = Key {
            source: bind.source.clone(),
            identity,
            recursive: bind.recursive,
            access: bind.access,
            propagation: bind.propagation,
            ids: bind.ids.clone(),
        };
        Ok(Some((Self { bind, ..self }, key, tree)))
    }
}
