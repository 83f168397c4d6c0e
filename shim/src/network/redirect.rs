//! The redirect: every frame that arrives at one link leaves at another.
//!
//! An ingress queueing discipline with one u32 filter that matches everything and one mirred action, as
//! `tc filter add dev A ingress u32 match u32 0 0 action mirred egress redirect dev B` does. See tc-u32(8), tc-mirred(8).

use rtnetlink::Handle;
use rtnetlink::packet_route::tc::TcHandle;

use super::netns::errno;
use crate::error::{Error, Kind, Result, WithKind};

/// Handle of every ingress discipline, as the parent of filters.
const INGRESS: u32 = 0xffff_0000;

/// Sends what arrives at link `from` out of link `to`. If the filter is refused the discipline goes again.
pub async fn add(netlink: &Handle, from: u32, to: u32) -> Result<()> {
    let index = from.cast_signed();
    match netlink.qdisc().add(index).ingress().execute().await {
        Ok(()) => {}
        Err(error) if errno(&error) == Some(libc::EEXIST) => {
            return Err(Error::failed_precondition(
                "the interface has an ingress queueing discipline already: it belongs to another virtual machine or to the CNI",
            ));
        }
        Err(error) => return Err(error).or_kind(Kind::Internal, "add an ingress queueing discipline"),
    }
    // The kernel wants the protocol in network order here.
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    let filter = netlink.traffic_filter(index).add().parent(INGRESS).protocol(every_protocol).redirect(to);
    let added = match filter {
        Ok(filter) => filter.execute().await,
        Err(error) => Err(error),
    };
    if let Err(error) = added {
        remove(netlink, from).await?;
        return Err(error).or_kind(Kind::Internal, "add a redirecting filter");
    }
    Ok(())
}

/// Removes the ingress discipline of link `from`, with its filters. Safe to call twice.
pub async fn remove(netlink: &Handle, from: u32) -> Result<()> {
    let mut discipline = netlink.qdisc();
    let mut request = discipline.del(from.cast_signed());
    let header = &mut request.message_mut().header;
    header.parent = TcHandle::INGRESS;
    header.handle = INGRESS.into();
    match request.execute().await {
        Ok(()) => Ok(()),
        // Without one the kernel says ENOENT or, since there is no ingress queue at all, EINVAL.
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => Ok(()),
        Err(error) => Err(error).or_kind(Kind::Internal, "remove the ingress queueing discipline"),
    }
}
