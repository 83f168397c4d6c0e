//! The tap: the host's end of one network card of the guest, in the pod's network namespace.
//!
//! Not persistent: it ends with its last file, so with the virtual machine or with the shim, whichever goes last. An orderly
//! end leaves that to the shim ([`TapFiles`]).
//! See <https://docs.kernel.org/networking/tuntap.html>.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;

use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use rtnetlink::{Handle, LinkUnspec};

use super::netns::{self, FoundInterface};
use crate::error::{Error, Kind, Result, WithKind};
use crate::sys;

/// A network card's backend, for the virtual machine.
#[derive(Debug)]
pub struct Tap {
    /// The tap, with virtio-net headers (`IFF_VNET_HDR`) and one queue.
    pub fd: OwnedFd,
    /// The kernel's virtio-net worker; `None` where there is none.
    pub vhost: Option<OwnedFd>,
    /// Of the card in the guest: the CNI's own.
    pub mac: [u8; 6],
    /// Of the card in the guest, in bytes.
    pub mtu: u32,
    /// In the pod's network namespace.
    pub name: String,
}

/// The files that keep the taps of a pod alive when its virtual machine has ended.
///
/// Whoever closes the last file of a tap waits until the kernel has unregistered it, for several of its RCU grace periods,
/// which is longer than all else that a pod's end takes. QEMU's end would; as it is nobody waits, since nothing depends on
/// it: the tap is in the pod's network namespace, and no longer joined to the CNI's link.
#[derive(Debug, Default)]
#[must_use = "closing them blocks"]
pub struct TapFiles(Vec<OwnedFd>);

impl TapFiles {
    /// Keeps the tap of `file` as well.
    pub fn keep(&mut self, file: &OwnedFd) -> Result<()> {
        self.0.push(file.try_clone().or_kind(Kind::Internal, "keep a tap's file")?);
        Ok(())
    }

    /// Ends the taps. The work goes on to its end when the future is dropped.
    pub async fn close(self) {
        // A panic in it was reported by the panic hook.
        drop(tokio::task::spawn_blocking(move || drop(self.0)).await);
    }
}

/// The kernel's virtio-net worker.
pub const VHOST_NET: &str = "/dev/vhost-net";

/// How the names of all taps begin.
pub const PREFIX: &str = "bhtap";

/// Name of the tap that belongs to the link with `index`: unique in a namespace, since an index is.
pub fn name(index: u32) -> String {
    format!("{PREFIX}{index}")
}

impl Tap {
    /// Makes the tap for `interface` in the calling thread's network namespace and brings it up; also returns its index.
    pub async fn create(netlink: &Handle, interface: &FoundInterface) -> Result<(Self, u32)> {
        let name = name(interface.index);
        let at = |step: &str| format!("tap {name}: {step}");
        let fd = sys::open_tap(&name).or_kind(Kind::Internal, at("create"))?;
        let index = netns::find_link(netlink, &name).await?;
        let index = index.ok_or_else(|| Error::internal(at("vanished while it was made")))?;
        let set = |message| netlink.link().set(message).execute();
        set(LinkUnspec::new_with_index(index).mtu(interface.mtu).build())
            .await
            .or_kind(Kind::Internal, at("set its MTU"))?;
        // Else the host's IPv6 would speak on it as soon as it is up, to the guest.
        let silent = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let silent = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![silent])]);
        let silenced = set(LinkUnspec::new_with_index(index).append_extra_attribute(silent).build()).await;
        if let Err(error) = silenced {
            tracing::debug!(%error, "the host has no IPv6 to silence on a tap");
        }
        set(LinkUnspec::new_with_index(index).up().build()).await.or_kind(Kind::Internal, at("bring it up"))?;
        let vhost = OpenOptions::new().read(true).write(true).open(VHOST_NET);
        Ok((Self { fd, vhost: vhost.ok().map(OwnedFd::from), mac: interface.mac, mtu: interface.mtu, name }, index))
    }
}
