//! The pod's network: what the CNI set up in the pod's network namespace becomes the guest's, unchanged.
//!
//! [`read_and_attach`] reads the namespace once ([`netns`]), makes a [`tap`] for each interface, and joins the two by
//! [`redirect`], so that every frame that arrives for the pod reaches the guest and every frame of the guest leaves as the
//! pod's. The guest takes over addresses, routes and MAC; the namespace keeps its copies and never sees a packet.
//!
//! Owned by the sandbox. A tap ends with the last process that has its file; the queueing discipline on the CNI's link does
//! not, so it is journalled before it is made ([`Link`]) and [`detach`]ed at the end. Nothing here names a QEMU option.
//!
//! What the host dials on the namespace's own loopback, as a port-forward does, is [`steer`]ed to a proxy ([`forward`]).

pub mod forward;
pub mod netns;
pub mod probe;
pub mod redirect;
pub mod steer;
pub mod tap;

use std::path::{Path, PathBuf};

use bulkhead_proto::agent::{Interface, Neighbour, Route};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::tap::{Tap, TapFiles};
use crate::error::{Error, Result};

/// The pod's network as the guest gets it, and the host's ends of it.
#[derive(Debug, Default)]
pub struct PodNetwork {
    /// In the order of the namespace; as long as `taps`, and each belongs to the tap of the same index.
    pub interfaces: Vec<Interface>,
    /// Every unicast route of the main tables, those without a gateway first. Includes what the kernel derived from
    /// addresses, so the guest adds addresses without deriving any (`IFA_F_NOPREFIXROUTE`).
    pub routes: Vec<Route>,
    /// Permanent entries only.
    pub neighbours: Vec<Neighbour>,
    /// For the virtual machine.
    pub taps: Vec<Tap>,
    /// The same taps' files.
    pub tap_files: TapFiles,
    /// What [`detach`] undoes; the same that was given to `record`.
    pub links: Vec<Link>,
}

/// A link of the CNI that is joined to a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The network namespace, as a path.
    pub netns: PathBuf,
    /// The CNI's link in it.
    pub ifname: String,
    /// Name of the tap, for people who look.
    pub tap: String,
}

/// Error for a pod that asks for the host's network.
pub fn host_network_refused() -> Error {
    Error::invalid(
        "the host's network (hostNetwork: true) is not available to a pod in a virtual machine: a network namespace of its own is needed",
    )
}

/// Error for a pod whose network is to be configured only after its sandbox is there. Whoever does so goes by the sandbox's
/// pid, behind which a VM has no network.
pub fn late_network_refused() -> Error {
    Error::invalid(
        "spec: linux.namespaces gives no path of the pod's network namespace, but a pod in a virtual machine needs its network \
         before its sandbox: containerd 1.7 does this for user namespaces (hostUsers: false), which need containerd 2.0 or newer",
    )
}

/// The network namespace of a sandbox's OCI spec. `None`: a new, empty one is asked for, so there is no network.
///
/// Errors when the spec has no network namespace at all, which means the host's.
pub fn netns_of(spec: &Value) -> Result<Option<PathBuf>> {
    let namespaces = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    let is_network = |namespace: &&Value| namespace.get("type").and_then(Value::as_str) == Some("network");
    let Some(namespace) = namespaces.into_iter().flatten().find(is_network) else {
        return Err(host_network_refused());
    };
    match namespace.get("path").and_then(Value::as_str) {
        None | Some("") => Ok(None),
        Some(path) if path.starts_with('/') => Ok(Some(path.into())),
        Some(path) => Err(Error::invalid(format!("spec: path {path:?} of the network namespace is not absolute"))),
    }
}

/// Reads the namespace at `netns`, calls `record` with what is about to be changed, then attaches a tap to each interface.
///
/// `record` writes the journal; if it fails nothing is changed. On any later error everything is undone. A namespace with
/// nothing but a loopback gives an empty network. Errors: [`crate::error::Kind::InvalidArgument`] for a path that is no
/// network namespace, for the host's own, and for an interface that a virtual machine cannot take over. Cancel safe in so
/// far as the work goes on to its end; what it made is then in the journal.
pub async fn read_and_attach(
    netns: &Path,
    record: impl FnOnce(&[Link]) -> Result<()> + Send + 'static,
) -> Result<PodNetwork> {
    let path = netns.to_owned();
    netns::enter(netns, async move |netlink| {
        let found = netns::read(&netlink).await?;
        let links: Vec<Link> = found
            .interfaces
            .iter()
            .map(|interface| Link {
                netns: path.clone(),
                ifname: interface.name.clone(),
                tap: tap::name(interface.index),
            })
            .collect();
        record(&links)?;
        let (mut taps, mut tap_files) = (Vec::new(), TapFiles::default());
        for interface in &found.interfaces {
            match attach(&netlink, interface, &mut tap_files).await {
                Ok(tap) => taps.push(tap),
                Err(error) => {
                    // The links before this one; this one has undone itself.
                    for interface in &found.interfaces[..taps.len()] {
                        if let Err(error) = redirect::remove(&netlink, interface.index).await {
                            tracing::warn!(%error, "a failed network leaves a queueing discipline behind");
                        }
                    }
                    return Err(error.context(format!("attach interface {}", interface.name)));
                }
            }
        }
        let interfaces = found.interfaces.into_iter().map(netns::FoundInterface::into_guest).collect();
        Ok(PodNetwork { interfaces, routes: found.routes, neighbours: found.neighbours, taps, tap_files, links })
    })
    .await
    .map_err(|error| error.context(format!("network namespace {}", netns.display())))
}

/// Takes the redirect off a CNI's link. Safe to call twice, and when link or namespace are gone.
pub async fn detach(link: &Link) -> Result<()> {
    let ifname = link.ifname.clone();
    let done = netns::enter(&link.netns, async move |netlink| match netns::find_link(&netlink, &ifname).await? {
        Some(index) => redirect::remove(&netlink, index).await,
        None => Ok(()),
    });
    match done.await {
        Ok(()) => Ok(()),
        Err(error) if netns::is_gone(&link.netns) => {
            tracing::debug!(%error, "the network namespace is gone, and its links with it");
            Ok(())
        }
        Err(error) => Err(error.context(format!("detach {} in {}", link.ifname, link.netns.display()))),
    }
}

async fn attach(
    netlink: &rtnetlink::Handle,
    interface: &netns::FoundInterface,
    tap_files: &mut TapFiles,
) -> Result<Tap> {
    let (tap, tap_index) = Tap::create(netlink, interface).await?;
    // Before the CNI's link is touched, which nobody would undo.
    tap_files.keep(&tap.fd)?;
    redirect::add(netlink, tap_index, interface.index).await?;
    // If this fails the tap ends with its files, and its own redirect with it.
    redirect::add(netlink, interface.index, tap_index).await?;
    Ok(tap)
}

#[cfg(test)]
mod tests;
