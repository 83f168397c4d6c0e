//! Containers of one pod beside one another, and the network.

use std::net::{IpAddr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{Run, wait_for};
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::network::{self, MTU};
use bulkhead_tests::pod::{Pod, PodSpec, namespace_mode};
use bulkhead_tests::row::Context;
use serde_json::json;

use crate::SOON;

/// A web server for `/www` on a port.
fn server(port: u16, listen: &str) -> ContainerSpec {
    ContainerSpec::new(&["httpd", "-f", "-p", &format!("{listen}{port}"), "-h", "/www"])
}

const PAGE: &str = "a page from inside the pod";

pub fn localhost(_: &Context, pod: &Pod) -> Result<()> {
    let serving = pod.run(server(8081, "127.0.0.1:"))?;
    let client = pod.run(ContainerSpec::idle())?;
    wait_for("the other container's page", SOON, || {
        let said = client.shell("wget -q -O - http://127.0.0.1:8081/")?;
        ensure!(said == PAGE, "wget got {said:?}");
        Ok(())
    })?;
    serving.remove_by_force()?;
    client.remove_by_force()
}

pub fn pid_container(_: &Context, pod: &Pod) -> Result<()> {
    let first = pod.run(ContainerSpec::new(&["sleep", "12345"]))?;
    let second = pod.run(ContainerSpec::new(&["sleep", "54321"]))?;
    let seen = second.shell("tr '\\0' ' ' < /proc/1/cmdline; ps -o args | grep -c '[s]leep 12345' || true")?;
    ensure!(seen == "sleep 54321 0", "the second container sees {seen:?}");
    first.remove_by_force()?;
    second.remove_by_force()
}

pub fn pid_pod(context: &Context) -> Result<()> {
    let spec = PodSpec::new().set("/linux/security_context/namespace_options/pid", namespace_mode::POD);
    let pod = context.start(spec)?;
    let shared = |spec: ContainerSpec| spec.security("namespace_options", json!({"pid": namespace_mode::POD}));
    let first = pod.run(shared(ContainerSpec::new(&["sleep", "12345"])))?;
    let second = pod.run(shared(ContainerSpec::new(&["sleep", "54321"])))?;
    let seen = second.shell("ps -o pid,args")?;
    ensure!(seen.contains("sleep 12345") && seen.contains("sleep 54321"), "the second container sees {seen}");
    let first_line = seen.lines().find(|line| line.split_whitespace().next() == Some("1")).unwrap_or_default();
    ensure!(
        !first_line.contains("sleep 54321") && !first_line.contains("sleep 12345"),
        "PID 1 is a container's program: {seen}"
    );
    // One container can signal the other's program, and its exit is told as usual.
    second.shell(
        "kill -TERM $(pidof sleep | tr ' ' '\\n' | while read p; do grep -q 12345 /proc/$p/cmdline && echo $p; done)",
    )?;
    let exit = first.wait(SOON)?;
    ensure!(exit.code == 143, "a program ended by SIGTERM from its neighbour: {exit:?}");
    ensure!(second.state()? == "CONTAINER_RUNNING");
    first.remove()?;
    second.remove_by_force()?;
    pod.remove()
}

pub fn pid_host(context: &Context) -> Result<()> {
    let pod =
        context.start(PodSpec::new().set("/linux/security_context/namespace_options/pid", namespace_mode::NODE))?;
    let of_host = |spec: ContainerSpec| spec.security("namespace_options", json!({"pid": namespace_mode::NODE}));
    let first = pod.run(of_host(ContainerSpec::new(&["sleep", "12345"])))?;
    let second = pod.run(of_host(ContainerSpec::idle()))?;
    let seen = second.shell("ps -o pid,args")?;
    ensure!(seen.contains("sleep 12345"), "the second container sees {seen}");
    ensure!(!seen.contains("containerd") && !seen.contains("bulkhead-agent"), "the second container sees {seen}");
    first.remove_by_force()?;
    second.remove_by_force()?;
    pod.remove()
}

pub fn own_filesystems(_: &Context, pod: &Pod) -> Result<()> {
    let first = pod.run(ContainerSpec::idle())?;
    let second = pod.run(ContainerSpec::idle())?;
    first.shell("echo mine > /tmp/note")?;
    let seen = second.shell("ls /tmp")?;
    ensure!(seen.is_empty(), "the second container sees {seen:?}");
    first.remove_by_force()?;
    second.remove_by_force()
}

pub fn page(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(server(8080, ""))?;
    let addresses = pod.addresses()?;
    ensure!(addresses.iter().any(IpAddr::is_ipv4) && addresses.iter().any(IpAddr::is_ipv6), "addresses {addresses:?}");
    for address in addresses {
        let page = wait_for("the page", SOON, || network::fetch(address, 8080))?;
        ensure!(page.trim() == PAGE, "the page at {address} reads {page:?}");
    }
    container.remove_by_force()
}

pub fn reach_host(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let network = &context.node.network;
    for address in [IpAddr::V4(network.gateway()), IpAddr::V6(network.gateway_v6())] {
        let listener =
            TcpListener::bind(SocketAddr::new(address, 0)).with_context(|| format!("listen on {address}"))?;
        let port = listener.local_addr()?.port();
        let peer = std::thread::spawn(move || -> std::io::Result<SocketAddr> {
            let (mut stream, peer) = listener.accept()?;
            std::io::Write::write_all(&mut stream, b"hello from the host\n")?;
            Ok(peer)
        });
        let said = container.shell(&format!("nc {address} {port} < /dev/null"))?;
        ensure!(said == "hello from the host", "nc to {address} got {said:?}");
        let peer = peer.join().map_err(|_| anyhow::anyhow!("the listener panicked"))??;
        ensure!(pod.addresses()?.contains(&peer.ip()), "the host saw {peer}");
    }
    container.remove_by_force()
}

pub fn interface(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let mtu = container.shell("cat /sys/class/net/eth0/mtu")?;
    ensure!(mtu == MTU.to_string(), "the MTU is {mtu}");
    let addresses = container.shell("ip addr show dev eth0")?;
    for address in pod.addresses()? {
        ensure!(addresses.contains(&format!(" {address}/")), "{address} is missing in {addresses}");
    }
    let gateway = context.node.network.gateway();
    let routes = container.shell("ip route")?;
    ensure!(routes.contains(&format!("default via {gateway} dev eth0")), "the routes are {routes}");
    let routes = container.shell("ip -6 route")?;
    let gateway = context.node.network.gateway_v6();
    ensure!(routes.contains(&format!("default via {gateway} dev eth0")), "the IPv6 routes are {routes}");
    let loopback = container.shell("ip addr show dev lo")?;
    ensure!(loopback.contains("127.0.0.1/8") && loopback.contains("::1/128"), "loopback is {loopback}");
    // A packet larger than an Ethernet's default MTU arrives in pieces or as one, but arrives.
    container.shell(&format!("ping -c 1 -W 5 -s 4000 {}", context.node.network.gateway()))?;
    container.remove_by_force()
}

pub fn network_by_pid(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    for known in [pod.inspect()?, container.inspect()?] {
        let pid = known["info"]["pid"].as_u64().context("crictl shows no pid")?;
        let entered =
            Run::new("nsenter").arg(format!("--net=/proc/{pid}/ns/net")).args(["ip", "addr", "show", "dev", "eth0"]);
        let found = entered.success()?.text();
        for address in pod.addresses()? {
            ensure!(found.contains(&format!(" {address}/")), "{address} is missing where process {pid} is: {found}");
        }
    }
    container.remove_by_force()
}

pub fn pod_to_pod(context: &Context) -> Result<()> {
    let (first, second) = (context.start(PodSpec::new())?, context.start(PodSpec::new())?);
    let serving = first.run(server(8080, ""))?;
    let client = second.run(ContainerSpec::idle())?;
    for address in first.addresses()? {
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        wait_for("the other pod's page", SOON, || {
            let said = client.shell(&format!("wget -q -O - http://{host}:8080/"))?;
            ensure!(said == PAGE, "wget got {said:?}");
            Ok(())
        })?;
    }
    serving.remove_by_force()?;
    client.remove_by_force()?;
    first.remove()?;
    second.remove()
}

pub fn host_port(context: &Context) -> Result<()> {
    // A port that was free a moment ago.
    let host_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mapping = json!([{"protocol": 0, "container_port": 8080, "host_port": host_port}]);
    let pod = context.start(PodSpec::new().set("/port_mappings", mapping))?;
    let container = pod.run(server(8080, ""))?;
    let gateway = IpAddr::V4(context.node.network.gateway());
    let page = wait_for("the page at the host port", SOON, || network::fetch(gateway, host_port))?;
    ensure!(page.trim() == PAGE, "the page reads {page:?}");
    container.remove_by_force()?;
    pod.remove()
}
