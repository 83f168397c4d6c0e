//! The pod's network namespace: entering it, and reading what the CNI left in it.
//!
//! A namespace is entered by a thread of its own that ends with the job (setns(2) changes one thread), never by a worker of
//! the runtime; nothing of it stays open afterwards but the taps. See rtnetlink(7).

use std::collections::BTreeMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_proto::agent::{Interface, IpAddress, Neighbour, Route};
use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHopFlags, RouteType,
    RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, route::RouteProtocol};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::error::{Error, Kind, Result, WithKind};
use crate::timeouts;

/// Path of the calling thread's network namespace.
pub(super) const OWN: &str = "/proc/thread-self/ns/net";

/// Index of the loopback of every network namespace.
const LOOPBACK: u32 = 1;

/// Runs `job` inside the network namespace at `path`, with a netlink connection to it, under a deadline.
///
/// Refuses the namespace that the shim itself is in. Cancel safe: the job runs to its end all the same.
pub async fn enter<T: Send + 'static>(
    path: &Path,
    job: impl AsyncFnOnce(Handle) -> Result<T> + Send + 'static,
) -> Result<T> {
    let path = path.to_owned();
    // The blocking worker only waits; it must not change its namespace, for it will serve others.
    let waiter = tokio::task::spawn_blocking(move || {
        let thread = std::thread::Builder::new().name("netns".into());
        let thread = thread.spawn(move || run_inside(&path, job)).or_kind(Kind::Internal, "start a thread")?;
        thread.join().map_err(|_| Error::internal("the thread in the network namespace panicked"))?
    });
    waiter.await.or_kind(Kind::Internal, "wait for the thread in the network namespace")?
}

fn run_inside<T>(path: &Path, job: impl AsyncFnOnce(Handle) -> Result<T>) -> Result<T> {
    let file = File::open(path).or_kind(Kind::InvalidArgument, "open")?;
    let (wanted, own) = (file.metadata(), std::fs::metadata(OWN));
    let wanted = wanted.or_kind(Kind::Internal, "stat")?;
    let own = own.or_kind(Kind::Internal, "stat the shim's own")?;
    if (wanted.dev(), wanted.ino()) == (own.dev(), own.ino()) {
        return Err(super::host_network_refused());
    }
    setns(&file, CloneFlags::CLONE_NEWNET).or_kind(Kind::InvalidArgument, "enter")?;
    drop(file);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.or_kind(Kind::Internal, "start a runtime")?.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().or_kind(Kind::Internal, "open netlink")?;
        tokio::select! {
            done = tokio::time::timeout(timeouts::NETWORK, job(handle)) => done.unwrap_or_else(|_| {
                Err(Error::deadline(format!("netlink did not answer within {:?}", timeouts::NETWORK)))
            }),
            () = connection => Err(Error::internal("the netlink connection ended")),
        }
    })
}

/// A network namespace of the shim's own making. It lives as long as this, and what was moved into it.
#[derive(Debug)]
pub struct NewNetns {
    file: File,
}

impl NewNetns {
    /// A new one, empty but for a loopback, which is up.
    pub async fn create() -> Result<Self> {
        let made = tokio::task::spawn_blocking(|| {
            // A thread of its own again, which ends in the new namespace.
            let thread = std::thread::Builder::new().name("netns".into()).spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).or_kind(Kind::Internal, "make a network namespace")?;
                File::open(OWN).or_kind(Kind::Internal, "open a new network namespace")
            });
            let thread = thread.or_kind(Kind::Internal, "start a thread")?;
            thread.join().map_err(|_| Error::internal("the thread that makes a network namespace panicked"))?
        });
        let file = made.await.or_kind(Kind::Internal, "wait for the thread that makes a network namespace")??;
        let netns = Self { file };
        enter(&netns.path(), async |netlink| {
            let up = netlink.link().set(LinkUnspec::new_with_index(LOOPBACK).up().build()).execute();
            up.await.or_kind(Kind::Internal, "bring the loopback of a new network namespace up")
        })
        .await?;
        Ok(netns)
    }

    /// Where every process of the host's finds it, while the shim lives.
    pub fn path(&self) -> PathBuf {
        let pid = rustix::process::getpid().as_raw_nonzero();
        format!("/proc/{pid}/fd/{}", self.file.as_raw_fd()).into()
    }
}

/// Whether there is no network namespace at `path` (any more): no file, or the plain file that it was mounted on.
pub fn is_gone(path: &Path) -> bool {
    File::open(path).is_err()
        || rustix::fs::statfs(path)
            .is_ok_and(|statfs| statfs.f_type != libc::NSFS_MAGIC && statfs.f_type != libc::PROC_SUPER_MAGIC)
}

/// What there is to take over.
#[derive(Debug, Default)]
pub struct Found {
    /// Ethernet links that are up, by index.
    pub interfaces: Vec<FoundInterface>,
    /// See [`super::PodNetwork::routes`].
    pub routes: Vec<Route>,
    /// See [`super::PodNetwork::neighbours`].
    pub neighbours: Vec<Neighbour>,
}

/// A link of the CNI.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundInterface {
    /// Index in the namespace.
    pub index: u32,
    /// Name in the namespace, and in the guest.
    pub name: String,
    /// The pod's address in the link layer.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// Without IPv6 link-local ones, which the guest's kernel derives from the MAC as the host's did.
    pub addresses: Vec<IpAddress>,
}

impl FoundInterface {
    /// In the agent's words.
    pub fn into_guest(self) -> Interface {
        Interface { name: self.name, mac: self.mac.to_vec(), mtu: self.mtu, addresses: self.addresses }
    }
}

/// Reads links, addresses, routes and neighbours.
pub async fn read(netlink: &Handle) -> Result<Found> {
    let links: Vec<LinkMessage> =
        netlink.link().get().execute().try_collect().await.or_kind(Kind::Internal, "list links")?;
    let mut interfaces = BTreeMap::new();
    for link in &links {
        if let Some(interface) = plan_interface(link)? {
            interfaces.insert(interface.index, interface);
        }
    }
    if interfaces.is_empty() {
        return Ok(Found::default());
    }
    let mut addresses = netlink.address().get().execute();
    while let Some(message) = addresses.try_next().await.or_kind(Kind::Internal, "list addresses")? {
        let Some(interface) = interfaces.get_mut(&message.header.index) else { continue };
        // On a point-to-point link `Address` is the peer's.
        let own = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        };
        let any = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        };
        let address = message.attributes.iter().find_map(own).or_else(|| message.attributes.iter().find_map(any));
        if let Some(address) = address.filter(|address| !is_link_local_v6(*address)) {
            interface.addresses.push(ip_address(address, message.header.prefix_len));
        }
    }
    let mut routes = Vec::new();
    for query in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let messages: Vec<RouteMessage> =
            netlink.route().get(query).execute().try_collect().await.or_kind(Kind::Internal, "list routes")?;
        routes.extend(messages.iter().filter_map(|message| plan_route(message, &interfaces)));
    }
    // A gateway can be set only once there is a route to it. The sort is stable: the kernel's order stays within each half.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    let neighbours: Vec<NeighbourMessage> =
        netlink.neighbours().get().execute().try_collect().await.or_kind(Kind::Internal, "list neighbours")?;
    let neighbours = neighbours.iter().filter_map(|message| plan_neighbour(message, &interfaces)).collect();
    Ok(Found { interfaces: interfaces.into_values().collect(), routes, neighbours })
}

/// Index of the link `name`, if there is one.
pub async fn find_link(netlink: &Handle, name: &str) -> Result<Option<u32>> {
    let mut found = netlink.link().get().match_name(name).execute();
    match found.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error).or_kind(Kind::Internal, format!("find link {name}")),
    }
}

/// The kernel's answer in a netlink error.
pub(super) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}

/// `None` for links that are not the pod's: loopback, and what is down (the kernel puts idle tunnel devices into every
/// namespace).
fn plan_interface(link: &LinkMessage) -> Result<Option<FoundInterface>> {
    if link.header.flags.contains(LinkFlags::Loopback) || !link.header.flags.contains(LinkFlags::Up) {
        return Ok(None);
    }
    let (mut name, mut mac, mut mtu) = (String::new(), None, 0);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name.clone_from(value),
            LinkAttribute::Address(value) => mac = value.as_slice().try_into().ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            _ => {}
        }
    }
    if name.starts_with(super::tap::PREFIX) {
        return Err(Error::failed_precondition("a running virtual machine has taken over this network already"));
    }
    match mac {
        Some(mac) if link.header.link_layer_type == LinkLayerType::Ether => {
            Ok(Some(FoundInterface { index: link.header.index, name, mac, mtu, addresses: Vec::new() }))
        }
        _ => Err(Error::invalid(format!(
            "interface {name} is of type {:?}: a virtual machine can take over Ethernet interfaces only",
            link.header.link_layer_type
        ))),
    }
}

fn plan_route(message: &RouteMessage, interfaces: &BTreeMap<u32, FoundInterface>) -> Option<Route> {
    let header = &message.header;
    let mut route = Route { scope: u32::from(u8::from(header.scope)), ..Route::default() };
    route.ipv6 = header.address_family == AddressFamily::Inet6;
    route.onlink = header.flags.contains(RouteFlags::Onlink);
    let (mut table, mut oif) = (u32::from(header.table), None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Destination(address) => {
                route.destination = route_ip(address).map(|ip| ip_address(ip, header.destination_prefix_length));
            }
            RouteAttribute::PrefSource(address) => route.source = route_ip(address).map(octets).unwrap_or_default(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                route.mtu = mtu.unwrap_or(0);
            }
            RouteAttribute::MultiPath(hops) => {
                // The agent's routes have one way each; the first that is the pod's own serves.
                let hop = hops.iter().find(|hop| interfaces.contains_key(&hop.interface_index))?;
                oif = Some(hop.interface_index);
                route.onlink |= hop.flags.contains(RouteNextHopFlags::Onlink);
                route.gateway = hop.attributes.iter().find_map(gateway).unwrap_or_default();
            }
            other => route.gateway = gateway(other).unwrap_or(route.gateway),
        }
    }
    let is_unicast = header.kind == RouteType::Unicast && table == u32::from(RouteHeader::RT_TABLE_MAIN);
    let link_local = header.protocol == RouteProtocol::Kernel && is_link_local_route(&route);
    route.interface.clone_from(&interfaces.get(&oif?)?.name);
    (is_unicast && !header.flags.contains(RouteFlags::Cloned) && !link_local).then_some(route)
}

fn gateway(attribute: &RouteAttribute) -> Option<Vec<u8>> {
    match attribute {
        RouteAttribute::Gateway(address) => route_ip(address).map(octets),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some(address.octets().to_vec()),
        // An IPv4 route through an IPv6 neighbour (RFC 5549).
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some(address.octets().to_vec()),
        _ => None,
    }
}

fn plan_neighbour(message: &NeighbourMessage, interfaces: &BTreeMap<u32, FoundInterface>) -> Option<Neighbour> {
    let interface = interfaces.get(&message.header.ifindex)?.name.clone();
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour =
        Neighbour { interface, state: u32::from(u16::from(message.header.state)), ..Neighbour::default() };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                neighbour.address = address.octets().to_vec();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                neighbour.address = address.octets().to_vec();
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac.clone_from(mac),
            _ => {}
        }
    }
    (neighbour.mac.len() == 6 && !neighbour.address.is_empty()).then_some(neighbour)
}

/// The prefix that the guest's kernel adds for its own link-local address.
fn is_link_local_route(route: &Route) -> bool {
    route.ipv6 && route.destination.as_ref().is_some_and(|to| to.address.starts_with(&[0xfe, 0x80]))
}

fn is_link_local_v6(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn route_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn ip_address(address: IpAddr, prefix_length: u8) -> IpAddress {
    IpAddress { address: octets(address), prefix_length: u32::from(prefix_length) }
}
