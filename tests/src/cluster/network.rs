//! The network of a node: a link to the machine, addresses of its own, and the pods' bridge behind it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::command::Run;
use crate::network::free_subnet;

/// Addresses of pods, IPv4 and IPv6.
pub const POD_RANGES: [&str; 2] = ["10.244.0.0/16", "fd44::/64"];
/// Addresses of Services, IPv4 and IPv6.
pub const SERVICE_RANGES: [&str; 2] = ["10.96.0.0/16", "fd96::/112"];
/// Address of the Service `kubernetes`: the first of its range.
pub const API_SERVICE: &str = "10.96.0.1";
/// Address of the cluster's DNS.
pub const DNS_SERVICE: &str = "10.96.0.10";
/// MTU of the pods' links: not the default, so that it shows whether a pod took it over.
pub const MTU: u32 = 1450;

/// Name of the link within the node.
const INSIDE: &str = "eth0";

/// The link between a node and the machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Link {
    /// Name of the machine's end.
    pub name: String,
    /// Number of the subnet, which no other link of the machine has.
    pub subnet: u8,
}

impl Link {
    /// Picks a subnet that is free. The link itself is made by [`Self::connect`].
    pub fn choose(name: &str) -> Result<Self> {
        Ok(Self { name: name.to_owned(), subnet: free_subnet([10, 213])? })
    }

    /// The node's address, IPv4.
    pub fn node(&self) -> std::net::Ipv4Addr {
        std::net::Ipv4Addr::new(10, 213, self.subnet, 2)
    }

    /// The node's address, IPv6.
    pub fn node_v6(&self) -> String {
        format!("fd13:{:x}::2", self.subnet)
    }

    /// Makes the link: one end here, the other in the network namespace of process `pid`. It goes with that namespace.
    pub fn connect(&self, pid: i32) -> Result<()> {
        let pid = pid.to_string();
        let ip = |args: &[&str]| Run::new("/sbin/ip").args(args).success();
        ip(&["link", "add", &self.name, "type", "veth", "peer", "name", INSIDE, "netns", &pid])?;
        ip(&["addr", "add", &format!("10.213.{}.1/24", self.subnet), "dev", &self.name])?;
        ip(&["addr", "add", &format!("fd13:{:x}::1/64", self.subnet), "dev", &self.name, "nodad"])?;
        ip(&["link", "set", &self.name, "up"])?;
        let inside = |args: &[&str]| {
            Run::new("/usr/bin/nsenter").args(["--target", &pid, "--net", "/sbin/ip"]).args(args).success()
        };
        inside(&["link", "set", "lo", "up"])?;
        inside(&["addr", "add", &format!("{}/24", self.node()), "dev", INSIDE])?;
        inside(&["addr", "add", &format!("{}/64", self.node_v6()), "dev", INSIDE, "nodad"])?;
        inside(&["link", "set", INSIDE, "up"])?;
        inside(&["route", "add", "default", "via", &format!("10.213.{}.1", self.subnet)])?;
        inside(&["-6", "route", "add", "default", "via", &format!("fd13:{:x}::1", self.subnet)])?;
        Ok(())
    }
}

/// Writes the CNI configuration of the pods' bridge. What the plugins remember of pods lies in `directory` too, as it would
/// on a disk.
pub fn configure(directory: &Path) -> Result<()> {
    let list = json!({
        "cniVersion": "1.0.0", "name": "pods",
        "plugins": [{
            "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "mtu": MTU,
            "ipam": {
                "type": "host-local", "dataDir": directory.join("leases"),
                "ranges": POD_RANGES.map(|range| json!([{"subnet": range}])),
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        }, {"type": "portmap", "capabilities": {"portMappings": true}}],
    });
    let path = directory.join("net.d/10-pods.conflist");
    fs::write(&path, serde_json::to_vec_pretty(&list)?).with_context(|| format!("write {}", path.display()))
}
