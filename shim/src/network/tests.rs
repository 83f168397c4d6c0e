//! Real namespaces, links and CNI plugins; skipped with a printed reason without root.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use serde_json::json;

use super::*;
use crate::error::Kind;

/// A named network namespace that goes with the value.
pub(super) struct Netns(String);

impl Netns {
    pub(super) fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return None;
        }
        let name = format!("bh-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        run("ip", &["netns", "add", &name]);
        Some(Self(name))
    }

    pub(super) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    /// `ip` with `args`, separated by spaces, in this namespace.
    pub(super) fn ip(&self, args: &str) -> String {
        let args: Vec<&str> = ["-n", &self.0].into_iter().chain(args.split(' ')).collect();
        run("ip", &args)
    }

    /// Addresses, without what the kernel does to a link by itself while it comes up.
    fn settled(&self) -> String {
        self.ip("-o addr show scope global")
    }

    /// Number of qdiscs that are ours.
    fn ingress_count(&self) -> usize {
        run("tc", &["-n", &self.0, "qdisc", "show"]).matches("ingress").count()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        run("ip", &["netns", "del", &self.0]);
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("is text")
}

/// The pod's namespace with `eth0`, whose other end `outside` lies in a second namespace.
fn pair() -> Option<(Netns, Netns)> {
    let (pod, outside) = (Netns::new()?, Netns::new()?);
    pod.ip(&format!("link add eth0 mtu 1400 type veth peer name outside netns {}", outside.0));
    pod.ip("link set lo up");
    pod.ip("addr add 10.99.0.2/24 dev eth0");
    pod.ip("addr add fd99::2/64 dev eth0 nodad");
    pod.ip("link set eth0 up");
    pod.ip("route add default via 10.99.0.1 dev eth0 mtu 1300");
    pod.ip("route add 10.98.0.0/16 via 192.0.2.1 dev eth0 onlink metric 7");
    pod.ip("route add fd98::/64 via fd99::1 dev eth0");
    pod.ip("neigh add 10.99.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
    outside.ip("addr add 10.99.0.1/24 dev outside");
    outside.ip("link set outside up");
    Some((pod, outside))
}

async fn attach_all(pod: &Netns) -> Result<PodNetwork> {
    read_and_attach(&pod.path(), |_| Ok(())).await
}

#[tokio::test]
async fn the_cni_s_work_is_read_whole() {
    let Some((pod, _outside)) = pair() else { return };
    let network = attach_all(&pod).await.expect("attaches");
    let [interface] = network.interfaces.as_slice() else { panic!("one interface: {:?}", network.interfaces) };
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1400));
    let shown = pod.ip("-br link show eth0");
    let mac: Vec<String> = interface.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(shown.contains(&mac.join(":")), "{shown}");
    let addresses: Vec<(&[u8], u32)> =
        interface.addresses.iter().map(|ip| (ip.address.as_slice(), ip.prefix_length)).collect();
    let v6 = "fd99::2".parse::<std::net::Ipv6Addr>().expect("an address").octets();
    assert_eq!(addresses, [(&[10, 99, 0, 2][..], 24), (&v6[..], 64)]);

    let told: Vec<String> = network
        .routes
        .iter()
        .map(|route| {
            let to = route.destination.as_ref().map(|ip| format!("{}/{}", dotted(&ip.address), ip.prefix_length));
            format!(
                "{} via {} src {} dev {} scope {} onlink {} metric {} mtu {}",
                to.unwrap_or_else(|| "default".into()),
                dotted(&route.gateway),
                dotted(&route.source),
                route.interface,
                route.scope,
                route.onlink,
                route.metric,
                route.mtu
            )
        })
        .collect();
    let expected = [
        "10.99.0.0/24 via - src 10.99.0.2 dev eth0 scope 253 onlink false metric 0 mtu 0",
        "fd99::/64 via - src - dev eth0 scope 0 onlink false metric 256 mtu 0",
        "default via 10.99.0.1 src - dev eth0 scope 0 onlink false metric 0 mtu 1300",
        "10.98.0.0/16 via 192.0.2.1 src - dev eth0 scope 0 onlink true metric 7 mtu 0",
        "fd98::/64 via fd99::1 src - dev eth0 scope 0 onlink false metric 1024 mtu 0",
    ];
    assert_eq!(told, expected);
    let [neighbour] = network.neighbours.as_slice() else { panic!("one neighbour: {:?}", network.neighbours) };
    assert_eq!(
        (neighbour.address.as_slice(), neighbour.mac.as_slice()),
        (&[10, 99, 0, 1][..], &[2, 0, 0, 0, 0, 1][..])
    );
    assert_eq!((network.taps[0].mtu, network.taps[0].mac.as_slice()), (1400, interface.mac.as_slice()));
}

fn dotted(address: &[u8]) -> String {
    match address.len() {
        0 => "-".into(),
        4 => Ipv4Addr::from_octets(address.try_into().expect("4 bytes")).to_string(),
        _ => std::net::Ipv6Addr::from_octets(address.try_into().expect("16 bytes")).to_string(),
    }
}

#[tokio::test]
async fn frames_pass_between_the_outside_and_the_tap_both_ways() {
    let Some((pod, outside)) = pair() else { return };
    let network = attach_all(&pod).await.expect("attaches");
    let mac = network.interfaces[0].mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
    outside.ip(&format!("neigh replace 10.99.0.2 lladdr {mac} dev outside"));

    let path = outside.path();
    let asked = std::thread::spawn(move || {
        setns(File::open(path).expect("open"), CloneFlags::CLONE_NEWNET).expect("enter");
        let socket = UdpSocket::bind("10.99.0.1:7000").expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
        socket.send_to(b"are you the guest?", "10.99.0.2:7").expect("send");
        let mut buffer = [0; 100];
        socket.recv(&mut buffer).map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned())
    });
    // The guest's part, by hand: take the datagram out of the tap, turn it round, and send it back.
    let mut tap = File::from(network.taps[0].fd.try_clone().expect("dup"));
    tokio::task::spawn_blocking(move || echo_one(&mut tap)).await.expect("echoes");
    assert_eq!(asked.join().expect("runs").expect("an answer arrives"), "are you the guest?");

    drop(network.taps);
    assert!(pod.ip("-br link").contains("bhtap"), "the tap stays while a file of it is kept");
    network.tap_files.close().await;
    until("the tap goes with its last file", || !pod.ip("-br link").contains("bhtap")).await;
}

/// Waits for what the last file of a tap takes along: a child that another test is starting has a copy of each until it
/// executes its program.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let settled = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), settled).await.expect(what);
}

/// Echoes the first UDP datagram to port 7; a virtio-net header of ten bytes precedes each frame.
fn echo_one(tap: &mut File) {
    const HEADER: usize = 10;
    let mut buffer = [0; 2000];
    loop {
        let length = tap.read(&mut buffer).expect("read");
        let frame = &mut buffer[HEADER..length];
        let is_udp = frame.len() > 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == [0, 7];
        if !is_udp {
            continue;
        }
        let copy = frame.to_vec();
        frame[..6].copy_from_slice(&copy[6..12]);
        frame[6..12].copy_from_slice(&copy[..6]);
        frame[26..30].copy_from_slice(&copy[30..34]);
        frame[30..34].copy_from_slice(&copy[26..30]);
        frame[34..36].copy_from_slice(&copy[36..38]);
        frame[36..38].copy_from_slice(&copy[34..36]);
        // No checksum: the sum of the addresses is the same, but the sender may have left it to its hardware.
        frame[40..42].fill(0);
        buffer[..HEADER].fill(0);
        tap.write_all(&buffer[..length]).expect("write");
        return;
    }
}

#[tokio::test]
async fn detaching_leaves_the_namespace_as_the_cni_made_it() {
    let Some((pod, _outside)) = pair() else { return };
    let before = pod.settled();
    let network = attach_all(&pod).await.expect("attaches");
    assert_eq!(pod.ingress_count(), 2);
    let again = attach_all(&pod).await.expect_err("one virtual machine at a time");
    assert_eq!(again.kind(), Kind::FailedPrecondition, "{again}");
    assert_eq!(pod.ingress_count(), 2, "a refused attempt takes nothing from the first");
    let links = network.links.clone();
    drop(network);
    until("the tap takes its qdisc along", || pod.ingress_count() == 1).await;
    for link in links.iter().chain(&links) {
        detach(link).await.expect("detaches");
    }
    assert_eq!(pod.ingress_count(), 0);
    assert_eq!(pod.settled(), before);
    // Nor does it mind when the namespace is gone.
    let path = pod.path();
    drop(pod);
    assert!(netns::is_gone(&path));
    detach(&links[0]).await.expect("there is nothing to do");
}

#[tokio::test]
async fn nothing_is_changed_when_the_journal_cannot_be_written() {
    let Some((pod, _outside)) = pair() else { return };
    let path = pod.path();
    let error = read_and_attach(&path, |links| {
        assert_eq!(links.len(), 1);
        Err(Error::internal("disk full"))
    });
    assert!(error.await.expect_err("fails").to_string().contains("disk full"));
    assert_eq!(pod.ingress_count(), 0);
    assert!(!pod.ip("-br link").contains("bhtap"));
}

#[tokio::test]
async fn a_namespace_with_only_a_loopback_has_no_network() {
    let Some(pod) = Netns::new() else { return };
    pod.ip("link set lo up");
    let network = attach_all(&pod).await.expect("attaches");
    assert!(network.interfaces.is_empty() && network.taps.is_empty() && network.routes.is_empty());
}

#[tokio::test]
async fn what_a_virtual_machine_cannot_take_over_is_refused_by_name() {
    let Some(pod) = Netns::new() else { return };
    pod.ip("tuntap add mode tun name tun7");
    pod.ip("link set tun7 up");
    let error = attach_all(&pod).await.expect_err("is refused");
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert!(error.to_string().contains("interface tun7 is of type"), "{error}");

    for path in ["/proc/self/ns/net", "/no/such/netns", "/etc/hostname", "/proc/self/ns/uts"] {
        let error = read_and_attach(Path::new(path), |_| Ok(())).await.expect_err(path);
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[tokio::test]
async fn a_network_made_by_the_bridge_plugin_is_taken_over() {
    let plugins = Path::new("/usr/lib/cni");
    if !plugins.join("bridge").exists() || !plugins.join("host-local").exists() {
        println!("skipped: no CNI plugins in /usr/lib/cni");
        return;
    }
    let (Some(node), Some(pod)) = (Netns::new(), Netns::new()) else { return };
    let data = tempfile::tempdir().expect("a directory");
    let config = json!({
        "cniVersion": "1.0.0", "name": "bh-test", "type": "bridge", "bridge": "bhbr0", "isGateway": true, "mtu": 1450,
        "ipam": {
            "type": "host-local", "dataDir": data.path(),
            "ranges": [[{"subnet": "10.97.0.0/24"}], [{"subnet": "fd97::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
        }
    });
    // In a namespace of its own in the host's place, so that the host's stays as it is.
    let mut plugin = Command::new("ip");
    plugin.args(["netns", "exec", &node.0, "/usr/lib/cni/bridge"]);
    plugin.envs([("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "bh-test"), ("CNI_IFNAME", "eth0")]);
    plugin.env("CNI_NETNS", pod.path()).env("CNI_PATH", plugins);
    let mut plugin = plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
    plugin.stdin.take().expect("is piped").write_all(config.to_string().as_bytes()).expect("write");
    let output = plugin.wait_with_output().expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));

    let network = attach_all(&pod).await.expect("attaches");
    assert_eq!(network.interfaces[0].mtu, 1450);
    assert_eq!(network.interfaces[0].addresses.len(), 2);
    let defaults: Vec<String> =
        network.routes.iter().filter(|route| route.destination.is_none()).map(|route| dotted(&route.gateway)).collect();
    assert_eq!(defaults, ["10.97.0.1", "fd97::1"]);
    for link in &network.links {
        detach(link).await.expect("detaches");
    }
}

#[test]
fn the_spec_tells_host_network_from_no_network() {
    let spec = |namespaces| json!({"linux": {"namespaces": namespaces}});
    let path = netns_of(&spec(json!([{"type": "pid"}, {"type": "network", "path": "/run/netns/a"}])));
    assert_eq!(path.expect("is there"), Some("/run/netns/a".into()));
    assert_eq!(netns_of(&spec(json!([{"type": "network"}]))).expect("is there"), None);
    let refused = netns_of(&spec(json!([{"type": "pid"}]))).expect_err("is refused");
    assert_eq!(refused.kind(), Kind::InvalidArgument);
    assert!(refused.to_string().contains("hostNetwork"));
    assert!(netns_of(&json!({})).is_err());
}
