//! What the host's kernel allows of that which a pod's network takes, tried in a network namespace that goes at once.
//!
//! For the node CLI; nothing of it is on a pod's way.

use std::fs::File;
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};

use super::{netns, redirect, steer};
use crate::error::{Error, Kind, Result, WithKind};
use crate::sys;

/// What was tried; each error is the kernel's refusal.
#[derive(Debug)]
pub struct Offer {
    /// A tap whose frames are redirected: without it no pod has a network.
    pub redirect: Result<()>,
    /// A socket lookup by BPF, the first means of port-forward.
    pub lookup: Result<()>,
    /// A redirect by nftables, the second; tried where the first is refused.
    pub nftables: Result<()>,
}

/// Tries it; fails if there can be no network namespace at all.
pub async fn probe() -> Result<Offer> {
    let scratch =
        tokio::task::spawn_blocking(scratch_namespace).await.or_kind(Kind::Internal, "wait for a thread")??;
    let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&scratch)));
    let redirect = netns::enter(&path, async |netlink| {
        let mut taps = Vec::new();
        for name in ["bhprobe0", "bhprobe1"] {
            let tap = sys::open_tap(name).or_kind(Kind::Internal, "make a tap")?;
            let index = netns::find_link(&netlink, name).await?;
            taps.push((tap, index.ok_or_else(|| Error::internal("a tap vanished while it was made"))?));
        }
        redirect::add(&netlink, taps[0].1, taps[1].1).await
    });
    let redirect = redirect.await;
    let lookup = steer::by_lookup(&path).await.map(drop);
    let nftables = match &lookup {
        Ok(()) => Ok(()),
        Err(_) => steer::by_redirect(&path).await.map(drop),
    };
    Ok(Offer { redirect, lookup, nftables })
}

/// A new network namespace, which lasts as long as the file. Blocks.
fn scratch_namespace() -> Result<File> {
    // A thread of its own: this one will serve others.
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).or_kind(Kind::Internal, "make a network namespace")?;
        File::open(netns::OWN).or_kind(Kind::Internal, "open a network namespace")
    });
    made.join().map_err(|_| Error::internal("the thread that makes a network namespace panicked"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_pods_have_here_is_offered() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return;
        }
        let offer = probe().await.expect("there are network namespaces");
        offer.redirect.expect("pods have a network here");
        assert!(offer.lookup.is_ok() || offer.nftables.is_ok(), "pods have a port-forward here: {:?}", offer.lookup);
    }
}
