//! The pod's network in the guest: what the CNI made in the pod's network namespace, set again on the guest's devices.
//!
//! Request structures are parsed into std's address types first ([`plan`] is pure), then carried out over rtnetlink.
//! rtnetlink(7), <https://docs.kernel.org/networking/ip-sysctl.html>

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bulkhead_proto::agent as api;
use futures::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::error::{During, Error, Result};
use crate::namespaces::Namespaces;

/// `NUD_*` states of neighbours that are kept for ever.
const PERMANENT: u32 = 0x80;
const NOARP: u32 = 0x40;
/// Names the kernel accepts are shorter than this.
const NAME_AT_MOST: usize = 15;

/// A checked request.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

#[derive(Debug, PartialEq, Eq)]
struct Interface {
    name: String,
    mac: [u8; 6],
    mtu: u32,
    addresses: Vec<(IpAddr, u8)>,
}

#[derive(Debug, PartialEq, Eq)]
struct Route {
    destination: Option<(IpAddr, u8)>,
    gateway: Option<IpAddr>,
    interface: String,
    source: Option<IpAddr>,
    scope: u8,
    onlink: bool,
    metric: u32,
    mtu: u32,
    ipv6: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Neighbour {
    address: IpAddr,
    mac: [u8; 6],
    interface: String,
}

/// Checks the network part of a request and puts routes in the order they can be added.
pub fn plan(interfaces: &[api::Interface], routes: &[api::Route], neighbours: &[api::Neighbour]) -> Result<Plan> {
    let interfaces = interfaces.iter().map(parse_interface).collect::<Result<Vec<_>>>()?;
    let known = |name: &str| {
        if interfaces.iter().any(|interface| interface.name == name) || name == "lo" {
            Ok(())
        } else {
            Err(Error::invalid(format!("interface {name:?} is named by a route or neighbour but not given")))
        }
    };
    let mut routes = routes.iter().map(parse_route).collect::<Result<Vec<_>>>()?;
    routes.iter().try_for_each(|route| known(&route.interface))?;
    // A gateway must be reachable when its route is added: link routes, then routes through gateways, then defaults.
    routes.sort_by_key(|route| (route.gateway.is_some(), route.destination.is_none()));
    let neighbours = neighbours
        .iter()
        .filter(|neighbour| neighbour.state & (PERMANENT | NOARP) != 0)
        .map(parse_neighbour)
        .collect::<Result<Vec<_>>>()?;
    neighbours.iter().try_for_each(|neighbour| known(&neighbour.interface))?;
    Ok(Plan { interfaces, routes, neighbours })
}

fn parse_interface(interface: &api::Interface) -> Result<Interface> {
    let name = &interface.name;
    if name.is_empty() || name.len() > NAME_AT_MOST || name.contains(['/', ' ', ':']) || name == "." || name == ".." {
        return Err(Error::invalid(format!("{name:?} is not an interface name")));
    }
    let addresses = interface.addresses.iter().map(parse_prefix).collect::<Result<_>>()?;
    Ok(Interface { name: name.clone(), mac: parse_mac(&interface.mac)?, mtu: interface.mtu, addresses })
}

fn parse_route(route: &api::Route) -> Result<Route> {
    let destination = route.destination.as_ref().map(parse_prefix).transpose()?;
    let gateway = parse_optional(&route.gateway)?;
    let source = parse_optional(&route.source)?;
    let ipv6 = destination.map(|(address, _)| address).or(gateway).map_or(route.ipv6, |address| address.is_ipv6());
    for address in [gateway, source].into_iter().flatten() {
        // A route of one family through a gateway of the other (RTA_VIA) is the one mixture there is; it is IPv4's.
        if address.is_ipv6() != ipv6 && (ipv6 || Some(address) == source) {
            return Err(Error::invalid(format!("route mixes address families: {address}")));
        }
    }
    Ok(Route {
        destination: destination.filter(|&(_, length)| length != 0),
        gateway,
        interface: route.interface.clone(),
        source,
        scope: u8::try_from(route.scope)
            .map_err(|_| Error::invalid(format!("route scope {} is above 255", route.scope)))?,
        onlink: route.onlink,
        metric: route.metric,
        mtu: route.mtu,
        ipv6,
    })
}

fn parse_neighbour(neighbour: &api::Neighbour) -> Result<Neighbour> {
    Ok(Neighbour {
        address: parse_address(&neighbour.address)?,
        mac: parse_mac(&neighbour.mac)?,
        interface: neighbour.interface.clone(),
    })
}

fn parse_mac(bytes: &[u8]) -> Result<[u8; 6]> {
    bytes.try_into().map_err(|_| Error::invalid(format!("a MAC address has {} bytes, expected 6", bytes.len())))
}

fn parse_address(bytes: &[u8]) -> Result<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes)
        .map_err(|_| Error::invalid(format!("an IP address has {} bytes, expected 4 or 16", bytes.len())))?;
    Ok(Ipv6Addr::from(v6).into())
}

fn parse_optional(bytes: &[u8]) -> Result<Option<IpAddr>> {
    (!bytes.is_empty()).then(|| parse_address(bytes)).transpose()
}

fn parse_prefix(prefix: &api::IpAddress) -> Result<(IpAddr, u8)> {
    let address = parse_address(&prefix.address)?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    match u8::try_from(prefix.prefix_length) {
        Ok(length) if length <= most => Ok((address, length)),
        _ => Err(Error::invalid(format!("prefix length {} of {address} is above {most}", prefix.prefix_length))),
    }
}

/// Brings up loopback and carries out `plan`.
pub async fn configure(plan: &Plan) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().during(|| "open rtnetlink")?;
    let mut link = tokio::task::JoinSet::new();
    link.spawn(connection);
    let configured = Network { handle }.configure(plan).await;
    link.shutdown().await;
    configured
}

/// Moves the devices of `plan` into the network namespace of `namespaces`, and carries it out there.
pub async fn configure_inside(plan: Plan, namespaces: &Arc<Namespaces>) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().during(|| "open rtnetlink")?;
    let mut link = tokio::task::JoinSet::new();
    link.spawn(connection);
    let moved = Network { handle }.hand_over(&plan.interfaces, namespaces).await;
    link.shutdown().await;
    moved?;
    // Sockets and sysctls are those of the namespace that the thread is in, so all of it happens on one.
    let inside = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.during(|| "start a runtime")?.block_on(configure(&plan))
    };
    namespaces.run(inside).await?
}

struct Network {
    handle: Handle,
}

impl Network {
    async fn configure(&self, plan: &Plan) -> Result<()> {
        let links = self.links().await?;
        let loopback = links.iter().find(|link| link.name == "lo");
        let loopback = loopback.ok_or_else(|| Error::internal("the guest has no loopback device"))?.index;
        let mut indices = self.name_devices(&links, &plan.interfaces).await?;
        self.handle
            .link()
            .set(LinkUnspec::new_with_index(loopback).up().build())
            .execute()
            .await
            .during(|| "bring up lo")?;
        indices.insert("lo".to_owned(), loopback);

        for interface in &plan.interfaces {
            let index = indices[&interface.name];
            self.bring_up(interface, index)
                .await
                .map_err(|error| error.during(format!("interface {}", interface.name)))?;
        }
        for route in &plan.routes {
            let message = route_message(route, indices[&route.interface]);
            self.handle.route().add(message).replace().execute().await.during(|| format!("add {}", describe(route)))?;
        }
        for neighbour in &plan.neighbours {
            self.handle
                .neighbours()
                .add(indices[&neighbour.interface], neighbour.address)
                .link_layer_address(&neighbour.mac)
                .state(NeighbourState::Permanent)
                .replace()
                .execute()
                .await
                .during(|| format!("add neighbour {}", neighbour.address))?;
        }
        Ok(())
    }

    /// Moves each interface's device; those that an earlier attempt has moved are not here any more.
    async fn hand_over(&self, interfaces: &[Interface], namespaces: &Namespaces) -> Result<()> {
        for link in self.links().await? {
            if interfaces.iter().any(|interface| link.mac == interface.mac) {
                let fd = namespaces.net().as_raw_fd();
                let message = LinkUnspec::new_with_index(link.index).setns_by_fd(fd).build();
                let what = || format!("move {} into the pod's network namespace", link.name);
                self.handle.link().set(message).execute().await.during(what)?;
            }
        }
        Ok(())
    }

    /// Finds each interface's device among `links` by its MAC and gives it its name; returns indices by name.
    async fn name_devices(&self, links: &[Link], interfaces: &[Interface]) -> Result<HashMap<String, u32>> {
        let mut indices = HashMap::new();
        let mut renames = Vec::new();
        for interface in interfaces {
            let link = links.iter().find(|link| link.mac == interface.mac).ok_or_else(|| {
                let mac = interface.mac.map(|byte| format!("{byte:02x}")).join(":");
                Error::precondition(format!("no network device has the MAC {mac} of interface {}", interface.name))
            })?;
            indices.insert(interface.name.clone(), link.index);
            if link.name != interface.name {
                renames.push((link, &interface.name));
            }
        }
        // Two devices may have to swap names: all of them step aside first.
        for (link, _) in &renames {
            if link.up {
                let down = LinkUnspec::new_with_index(link.index).down().build();
                self.handle.link().set(down).execute().await.during(|| format!("take down {}", link.name))?;
            }
            if interfaces.iter().any(|interface| interface.name == link.name) {
                self.rename(link.index, &format!("bh-tmp{}", link.index)).await?;
            }
        }
        for (link, name) in &renames {
            self.rename(link.index, name).await?;
        }
        Ok(indices)
    }

    async fn rename(&self, index: u32, name: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).name(name).build();
        self.handle.link().set(message).execute().await.during(|| format!("rename a device to {name}"))
    }

    async fn bring_up(&self, interface: &Interface, index: u32) -> Result<()> {
        // The pod's namespace has done duplicate detection for these very addresses; here they would find themselves.
        let detection = format!("/proc/sys/net/ipv6/conf/{}/accept_dad", interface.name);
        if let Err(error) = std::fs::write(detection, "0") {
            tracing::debug!(%error, "duplicate address detection stays on");
        }
        let mut message = LinkUnspec::new_with_index(index).up();
        if interface.mtu != 0 {
            message = message.mtu(interface.mtu);
        }
        self.handle
            .link()
            .set(message.build())
            .execute()
            .await
            .during(|| format!("bring up with MTU {}", interface.mtu))?;
        for &(address, length) in &interface.addresses {
            let mut request = self.handle.address().add(index, address, length).replace();
            if address.is_ipv6() {
                request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            request.execute().await.during(|| format!("add address {address}/{length}"))?;
        }
        Ok(())
    }

    async fn links(&self) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        let mut stream = self.handle.link().get().execute();
        while let Some(message) = stream.try_next().await.during(|| "list network devices")? {
            let mut link = Link {
                index: message.header.index,
                up: message.header.flags.contains(LinkFlags::Up),
                ..Link::default()
            };
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => link.name = name,
                    LinkAttribute::Address(mac) => link.mac = mac,
                    _ => {}
                }
            }
            links.push(link);
        }
        Ok(links)
    }
}

#[derive(Debug, Default)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
    up: bool,
}

fn route_message(route: &Route, index: u32) -> RouteMessage {
    let mut message = if route.ipv6 {
        let mut builder = RouteMessageBuilder::<Ipv6Addr>::new();
        if let Some((IpAddr::V6(address), length)) = route.destination {
            builder = builder.destination_prefix(address, length);
        }
        if let Some(IpAddr::V6(gateway)) = route.gateway {
            builder = builder.gateway(gateway);
        }
        if let Some(IpAddr::V6(source)) = route.source {
            builder = builder.pref_source(source);
        }
        finish(builder, route, index)
    } else {
        let mut builder = RouteMessageBuilder::<Ipv4Addr>::new();
        if let Some((IpAddr::V4(address), length)) = route.destination {
            builder = builder.destination_prefix(address, length);
        }
        builder = match route.gateway {
            Some(IpAddr::V4(gateway)) => builder.gateway(gateway),
            Some(IpAddr::V6(gateway)) => builder.via(gateway),
            None => builder,
        };
        if let Some(IpAddr::V4(source)) = route.source {
            builder = builder.pref_source(source);
        }
        finish(builder, route, index)
    };
    if route.mtu != 0 {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    message
}

fn finish<T>(builder: RouteMessageBuilder<T>, route: &Route, index: u32) -> RouteMessage {
    let mut builder = builder.output_interface(index).scope(RouteScope::from(route.scope));
    if route.onlink {
        builder = builder.onlink();
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    builder.build()
}

fn describe(route: &Route) -> String {
    let destination = match route.destination {
        Some((address, length)) => format!("{address}/{length}"),
        None => "default".to_owned(),
    };
    match route.gateway {
        Some(gateway) => format!("route {destination} via {gateway} dev {}", route.interface),
        None => format!("route {destination} dev {}", route.interface),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eth0() -> api::Interface {
        api::Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1450,
            addresses: vec![api::IpAddress { address: vec![10, 0, 0, 5], prefix_length: 24 }],
        }
    }

    fn route(destination: Option<([u8; 4], u32)>, gateway: &[u8]) -> api::Route {
        api::Route {
            destination: destination
                .map(|(address, prefix_length)| api::IpAddress { address: address.into(), prefix_length }),
            gateway: gateway.to_vec(),
            interface: "eth0".into(),
            ..api::Route::default()
        }
    }

    #[test]
    fn routes_come_in_the_order_they_can_be_added() {
        let routes = [
            route(None, &[169, 254, 1, 1]),
            route(Some(([10, 1, 0, 0], 16)), &[10, 0, 0, 1]),
            route(Some(([169, 254, 1, 1], 32)), &[]),
        ];
        let plan = plan(&[eth0()], &routes, &[]).expect("plan");
        let order: Vec<_> = plan.routes.iter().map(describe).collect();
        assert_eq!(
            order,
            [
                "route 169.254.1.1/32 dev eth0",
                "route 10.1.0.0/16 via 10.0.0.1 dev eth0",
                "route default via 169.254.1.1 dev eth0"
            ]
        );
    }

    #[test]
    fn a_zero_prefix_is_the_default_route() {
        let plan = plan(&[eth0()], &[route(Some(([0; 4], 0)), &[10, 0, 0, 1])], &[]).expect("plan");
        assert_eq!(describe(&plan.routes[0]), "route default via 10.0.0.1 dev eth0");
    }

    #[test]
    fn only_permanent_neighbours_are_kept() {
        let neighbour =
            |state| api::Neighbour { address: vec![10, 0, 0, 1], mac: vec![2; 6], interface: "eth0".into(), state };
        let plan = plan(&[eth0()], &[], &[neighbour(2), neighbour(PERMANENT)]).expect("plan");
        assert_eq!(plan.neighbours.len(), 1);
    }

    #[test]
    fn wrong_input_is_named() {
        let mut wrong = eth0();
        wrong.mac = vec![1];
        let error = plan(&[wrong], &[], &[]).expect_err("mac");
        assert_eq!(error.to_string(), "a MAC address has 1 bytes, expected 6");
        let mut wrong = eth0();
        wrong.addresses[0].prefix_length = 33;
        assert!(plan(&[wrong], &[], &[]).is_err());
        assert!(plan(&[], &[route(None, &[10, 0, 0, 1])], &[]).is_err());
    }
}
