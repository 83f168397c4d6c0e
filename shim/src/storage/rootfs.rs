//! The rootfs: executes a [`RootfsPlan`] on the host and tells the guest where to find the result.
//!
//! Mounted in the pod's namespace below the share, at `<container>/rootfs`. Owned by the container that it is for; gone
//! with [`detach`], or with the pod.

use std::path::{Path, PathBuf};

use bulkhead_proto::agent::{GuestMount, guest_mount::Source};
use rustix::mount::MountFlags;

use super::layers::Layers;
use super::plan::{Device, Overlay, RootfsPlan};
use crate::error::{Error, Result};
use crate::host::HostThread;
use crate::namespace::{self, Access, Propagation, ShareRoot, Tree};

/// Path of a container's rootfs below the share.
pub fn share_path(container_id: &str) -> String {
    format!("{container_id}/rootfs")
}

/// Mounts the rootfs into the share and returns what the guest mounts for it; on error nothing is left.
///
/// Not cancel safe: run it as a job.
pub async fn attach(
    host: &HostThread,
    share: &ShareRoot,
    container_id: &str,
    plan: &RootfsPlan,
) -> Result<Vec<GuestMount>> {
    let relative = share_path(container_id);
    let context = format!("rootfs of container {container_id}");
    let mounted = match plan.clone() {
        RootfsPlan::Bind { source, recursive, read_only, ids } => {
            let access = if read_only { Access::ReadOnly } else { Access::Writable };
            let opened = tokio::task::spawn_blocking(move || {
                let tree = Tree::open(&source, recursive)?;
                if let Some(ids) = ids {
                    tree.map_ids(&ids.namespace()?, recursive)?;
                }
                Ok::<_, Error>(tree)
            });
            let opened = opened.await.map_err(|error| Error::internal(format!("open the directory: {error}")))?;
            let tree = opened.map_err(|error| error.context(context.clone()))?;
            if !tree.is_dir() {
                return Err(Error::invalid(format!("{context}: the bind's source is not a directory")));
            }
            on_host(host, share, &relative, move |target| tree.attach(target, access, Propagation::Private)).await
        }
        RootfsPlan::Overlay(overlay) => match overlay.ids.clone() {
            None => on_host(host, share, &relative, move |target| mount_overlay(&overlay, target)).await,
            Some(ids) => {
                let opened = tokio::task::spawn_blocking(move || Ok((Layers::open(&overlay, &ids)?, overlay)));
                let opened: Result<_> =
                    opened.await.map_err(|error| Error::internal(format!("open the layers: {error}")))?;
                let (layers, overlay) = opened.map_err(|error| error.context(context.clone()))?;
                let (shared, container_id) = (share.clone(), container_id.to_owned());
                let mount = move |target: &Path| layers.mount(&overlay, &shared, &container_id, target);
                on_host(host, share, &relative, mount).await
            }
        },
        RootfsPlan::Device(device) => {
            on_host(host, share, &relative, move |target| mount_device(&device, target)).await
        }
    };
    mounted.map_err(|error| error.context(context))?;
    let options = if is_read_only(plan) { vec!["ro".to_owned()] } else { Vec::new() };
    Ok(vec![GuestMount {
        source: Some(Source::SharePath(relative)),
        target: "/".into(),
        fstype: String::new(),
        options,
    }])
}

/// Takes everything of a container out of the share: rootfs and volumes. Safe to call twice.
///
/// The guest has let go of them before, or does so when it notices; nothing waits for it.
pub async fn detach(host: &HostThread, share: &ShareRoot, container_id: &str) -> Result<()> {
    let (share, relative) = (share.clone(), PathBuf::from(container_id));
    Ok(host.run(move || Ok(share.remove(&relative)?)).await?)
}

/// Runs `mount` on the host thread with the rootfs' mount point, and removes that point if it fails.
async fn on_host(
    host: &HostThread,
    share: &ShareRoot,
    relative: &str,
    mount: impl FnOnce(&Path) -> Result<()> + Send + 'static,
) -> Result<()> {
    let (share, relative) = (share.clone(), PathBuf::from(relative));
    let done = host.run(move || {
        let target = share.mount_point(&relative, true)?;
        let mounted = mount(&target);
        if mounted.is_err()
            && let Err(error) = share.remove(&relative)
        {
            tracing::warn!(%error, "the mount point of a rootfs that failed is left in the share");
        }
        Ok(mounted?)
    });
    Ok(done.await?)
}

fn mount_overlay(overlay: &Overlay, target: &Path) -> Result<()> {
    let (data, directory) = overlay.data()?;
    namespace::mount("overlay", Path::new("overlay"), target, overlay.flags(), &data, directory.as_deref())
}

fn mount_device(device: &Device, target: &Path) -> Result<()> {
    let flags = if device.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    namespace::mount(&device.fstype, Path::new(&device.source), target, flags, &device.options.join(","), None)
}

fn is_read_only(plan: &RootfsPlan) -> bool {
    match plan {
        RootfsPlan::Overlay(overlay) => overlay.read_only,
        RootfsPlan::Bind { read_only, .. } => *read_only,
        RootfsPlan::Device(device) => device.read_only,
    }
}
