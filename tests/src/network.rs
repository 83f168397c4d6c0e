//! The pods' network of one node: a bridge, two subnets and the CNI configuration for them.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::command::Run;

/// MTU of the pods' interfaces; not the default, so that a test can tell that it was taken over.
pub const MTU: u32 = 1420;

/// A bridge network, made by the CNI plugins with the first pod and removed by [`Network::remove`].
#[derive(Debug)]
pub struct Network {
    name: String,
    subnet: u8,
    leases: PathBuf,
}

/// A number that no address or route of the machine has behind `start`.
///
/// The process id spreads what is started side by side: a number is in use only once there is a link with it.
pub fn free_subnet(start: [u8; 2]) -> Result<u8> {
    let [first, second] = start;
    let addresses = Run::new("/sbin/ip").args(["-o", "-4", "addr"]).success()?.text();
    let routes = Run::new("/sbin/ip").args(["-4", "route"]).success()?.text();
    let seed = std::process::id();
    let mut numbers = (0..200).map(|step| 20 + seed.wrapping_add(step) % 200);
    let subnet = numbers.find(|subnet| {
        let prefix = format!("{first}.{second}.{subnet}.");
        !addresses.contains(&prefix) && !routes.contains(&prefix)
    });
    let subnet = subnet.and_then(|subnet| u8::try_from(subnet).ok());
    subnet.with_context(|| format!("no free subnet in {first}.{second}.0.0/16"))
}

impl Network {
    /// Writes the configuration of a network `name` (at most 15 bytes) into `directory`.
    pub fn configure(name: &str, directory: &Path) -> Result<Self> {
        let subnet = free_subnet([10, 87])?;
        let network = Self { name: name.to_owned(), subnet, leases: directory.join("leases") };
        let conf = directory.join("conf");
        fs::create_dir_all(&conf).with_context(|| format!("make {}", conf.display()))?;
        let list = json!({
            "cniVersion": "0.4.0",
            "name": name,
            "plugins": [{
                "type": "bridge", "bridge": name, "isGateway": true, "ipMasq": false, "hairpinMode": true, "mtu": MTU,
                "ipam": {
                    "type": "host-local", "dataDir": network.leases,
                    "ranges": [
                        [{"subnet": format!("10.87.{subnet}.0/24")}],
                        [{"subnet": format!("fd87:{subnet:x}::/64")}],
                    ],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            }, {"type": "portmap", "capabilities": {"portMappings": true}}],
        });
        fs::write(conf.join("10-test.conflist"), serde_json::to_vec_pretty(&list)?).context("write the CNI list")?;
        Ok(network)
    }

    /// The host's own address in the pods' subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 87, self.subnet, 1)
    }

    /// The host's own IPv6 address in the pods' subnet.
    pub fn gateway_v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd87, u16::from(self.subnet), 0, 0, 0, 0, 0, 1)
    }

    /// Host ends of the pods' interfaces.
    pub fn links(&self) -> BTreeSet<String> {
        names_in(&PathBuf::from(format!("/sys/class/net/{}/brif", self.name)))
    }

    /// Addresses that are given out, and what libcni remembers of pods.
    pub fn records(&self) -> BTreeSet<String> {
        let mut found = names_in(&self.leases.join(&self.name));
        found.retain(|name| !name.starts_with("last_reserved_ip") && name != "lock");
        found.extend(names_in(Path::new("/var/lib/cni/results")).into_iter().filter(|n| n.starts_with(&self.name)));
        found
    }

    /// Removes the bridge.
    pub fn remove(&self) {
        if Path::new("/sys/class/net").join(&self.name).exists() {
            // Told by the last leak check if it cannot be removed.
            let _ = Run::new("/sbin/ip").args(["link", "del", &self.name]).output();
        }
    }

    /// Whether the bridge is there.
    pub fn exists(&self) -> bool {
        Path::new("/sys/class/net").join(&self.name).exists()
    }
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(directory) else { return BTreeSet::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The body of `http://address:port/`, fetched from the host.
pub fn fetch(address: IpAddr, port: u16) -> Result<String> {
    let target = SocketAddr::new(address, port);
    let mut stream =
        TcpStream::connect_timeout(&target, Duration::from_secs(2)).with_context(|| format!("dial {target}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").with_context(|| format!("ask {target} for a page"))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("read a page from {target}"))?;
    let (head, body) =
        answer.split_once("\r\n\r\n").with_context(|| format!("no HTTP answer from {target}: {answer}"))?;
    ensure!(head.contains(" 200 "), "{target} answered {head}");
    Ok(body.to_owned())
}
