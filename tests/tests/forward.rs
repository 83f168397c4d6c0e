//! Port-forward reaches what listens on the pod's loopback, whole and to both ends, and leaves nothing.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bulkhead_tests::command::{Run, wait_for};
use bulkhead_tests::container::{Container, ContainerSpec};
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::image::hex;
use bulkhead_tests::network::fetch;
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::{ALL, BULKHEAD, Context, Row};
use bulkhead_tests::suite;
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::tools::Version;
use nix::sched::{CloneFlags, setns};
use sha2::{Digest, Sha256};

const ROWS: &[Row] = &[
    Row::in_pod("port-forward reaches a service on 127.0.0.1, on ::1 and on all addresses", reaches_each_loopback),
    Row::in_pod("forty connections through one port-forward are each answered", many_at_once),
    Row::in_pod("a client that half-closes on the pod's loopback gets the whole answer", half_close),
    Row::in_pod("a large file comes whole through port-forward", large_file),
    Row::in_pod("port-forward to a port that nothing listens on fails, and others go on to work", nothing_listens),
    Row::alone("port-forward works after a restart of containerd", after_restart),
    // With runc, containerd's own socket waits in the namespace for an answer that a loopback taken down never gives.
    Row::alone("a pod stopped under an open port-forward leaves no network namespace", stopped_while_open)
        .only(BULKHEAD),
    Row::alone("when the shim is killed, nothing steers the loopback and no network namespace is left", shim_killed)
        .only(BULKHEAD),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], ALL, ROWS)
}

const SOON: Duration = Duration::from_secs(20);
const PAGE: &str = "a page from inside the pod\n";

/// A `crictl port-forward` that runs.
struct Forwarding {
    terminal: Terminal,
    local: SocketAddr,
}

fn forward(pod: &Pod, port: u16) -> Result<Forwarding> {
    const SAID: &str = "Forwarding from 127.0.0.1:";
    let terminal = Terminal::of(&pod.crictl(&["port-forward", &pod.id, &format!(":{port}")]), 24, 200)?;
    let to = format!(" -> {port}");
    terminal.expect(SAID, SOON)?;
    terminal.expect(&to, SOON)?;
    let shown = terminal.shown();
    let local = shown.split_once(SAID).and_then(|(_, rest)| rest.split_once(&to)?.0.parse::<u16>().ok());
    let local = local.with_context(|| format!("no local port in {shown:?}"))?;
    Ok(Forwarding { terminal, local: SocketAddr::from((Ipv4Addr::LOCALHOST, local)) })
}

impl Forwarding {
    fn dial(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.local, SOON).context("dial crictl's port")?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(stream)
    }

    fn page(&self) -> Result<String> {
        let page = fetch(self.local.ip(), self.local.port());
        page.map_err(|error| anyhow!("{error:#}; crictl showed {:?}", self.terminal.shown()))
    }
}

/// Runs a program that listens on `port` and waits until it does.
fn service(pod: &Pod, port: u16, spec: ContainerSpec) -> Result<Container<'_>> {
    let container = pod.run(spec)?;
    wait_for(&format!("a service on port {port}"), SOON, || {
        let listening = container.shell("netstat -ltn")?;
        ensure!(listening.contains(&format!(":{port} ")), "there is only {listening}");
        Ok(())
    })?;
    Ok(container)
}

fn web<'a>(pod: &'a Pod, address: &str, port: u16) -> Result<Container<'a>> {
    service(pod, port, ContainerSpec::new(&["httpd", "-f", "-h", "/www", "-p", &format!("{address}:{port}")]))
}

/// The network namespace that containerd made for the pod.
fn netns(pod: &Pod) -> Result<PathBuf> {
    let inspected = pod.inspect()?;
    let namespaces = inspected["info"]["runtimeSpec"]["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
    let network = namespaces.iter().find(|namespace| namespace["type"] == "network");
    Ok(network.and_then(|namespace| namespace["path"].as_str()).context("the pod has no network namespace")?.into())
}

/// What `job` returns inside a network namespace.
fn inside<T: Send>(netns: &Path, job: impl FnOnce() -> T + Send) -> Result<T> {
    let file = fs::File::open(netns).with_context(|| format!("open {}", netns.display()))?;
    thread::scope(|scope| {
        let thread = scope.spawn(move || setns(&file, CloneFlags::CLONE_NEWNET).map(|()| job()));
        thread.join().map_err(|_| anyhow!("a thread panicked"))?.context("enter a network namespace")
    })
}

/// Dials the pod's loopback as containerd does.
fn dial_inside(netns: &Path, port: u16) -> Result<std::io::Result<TcpStream>> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    inside(netns, || TcpStream::connect_timeout(&address, SOON))
}

fn noise(length: usize) -> Vec<u8> {
    let word = |n: u64| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (0..length as u64 / 8).flat_map(|n| word(n).to_le_bytes()).collect()
}

fn reaches_each_loopback(context: &Context, pod: &Pod) -> Result<()> {
    // containerd asks the host what "localhost" is in IPv6; for Bulkhead, which looks in the guest, it need not know.
    let hosts = fs::read_to_string("/etc/hosts").context("read /etc/hosts")?;
    let known = hosts.lines().any(|line| line.starts_with("::1") && line.contains("localhost"));
    for (address, port) in [("127.0.0.1", 8081), ("[::1]", 8082), ("0.0.0.0", 8083)] {
        if address == "[::1]" && !known && !context.runtime.is_bulkhead() {
            continue;
        }
        let container = web(pod, address, port)?;
        let forwarding = forward(pod, port)?;
        for _ in 0..2 {
            let page = forwarding.page().with_context(|| format!("a service on {address}"))?;
            ensure!(page == PAGE, "from {address} came {page:?}");
        }
        container.remove_by_force()?;
    }
    Ok(())
}

fn many_at_once(_: &Context, pod: &Pod) -> Result<()> {
    let container = web(pod, "127.0.0.1", 8084)?;
    let forwarding = forward(pod, 8084)?;
    // All are connected before any asks.
    let clients: Vec<TcpStream> = (0..40).map(|_| forwarding.dial()).collect::<Result<_>>()?;
    let answers: Vec<_> = thread::scope(|scope| {
        let asking = clients.into_iter().map(|mut client| {
            scope.spawn(move || -> Result<String> {
                client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                client.read_to_string(&mut answer)?;
                Ok(answer)
            })
        });
        let asking: Vec<_> = asking.collect();
        asking.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
    });
    for (number, answer) in answers.into_iter().enumerate() {
        let answer: String = answer.with_context(|| format!("connection {number}"))?;
        ensure!(answer.ends_with(PAGE), "connection {number} was answered {answer:?}");
    }
    container.remove_by_force()
}

fn half_close(_: &Context, pod: &Pod) -> Result<()> {
    // It answers when it has read everything, and can know that only by the half-close. containerd itself passes none on,
    // so this dials where containerd does.
    let container = service(pod, 9000, ContainerSpec::new(&["nc", "-ll", "-p", "9000", "-e", "sha256sum"]))?;
    let netns = netns(pod)?;
    for length in [0, 8, 20_000_000] {
        let question = noise(length);
        let mut client = dial_inside(&netns, 9000)?.context("dial the pod's loopback")?;
        client.set_read_timeout(Some(Duration::from_mins(1)))?;
        client.write_all(&question)?;
        client.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        client.read_to_string(&mut answer).context("read the answer")?;
        let digest = hex(&Sha256::digest(&question));
        ensure!(answer.starts_with(&digest), "of {length} bytes it said {answer:?}");
    }
    container.remove_by_force()
}

fn large_file(context: &Context, pod: &Pod) -> Result<()> {
    // Emulated, the larger one takes half a minute.
    let length = if context.node.version == Version::V2_4 { 100_000_000 } else { 20_000_000 };
    let content = noise(length);
    let digest = Sha256::digest(&content);
    fs::write(context.scratch.join("file"), content)?;
    let spec = ContainerSpec::new(&["nc", "-ll", "-p", "9001", "-e", "cat", "/data/file"]);
    let container = service(pod, 9001, spec.mount(&context.scratch, "/data", true))?;
    let forwarding = forward(pod, 9001)?;
    let mut client = forwarding.dial()?;
    let (mut sum, mut total, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 16]);
    loop {
        match client.read(&mut buffer).with_context(|| format!("read on after {total} bytes"))? {
            0 => break,
            count => {
                sum.update(&buffer[..count]);
                total += count;
            }
        }
    }
    ensure!(total == length, "{total} of {length} bytes came; crictl showed {:?}", forwarding.terminal.shown());
    ensure!(sum.finalize() == digest, "they are other bytes");
    container.remove_by_force()
}

fn nothing_listens(context: &Context, pod: &Pod) -> Result<()> {
    // What containerd itself meets: a dial has succeeded before anybody can ask the guest.
    let dialled = dial_inside(&netns(pod)?, 9999)?;
    let ended = dialled.and_then(|mut client| {
        client.set_read_timeout(Some(SOON))?;
        client.read_to_end(&mut Vec::new())
    });
    let expected =
        if context.runtime.is_bulkhead() { ErrorKind::ConnectionReset } else { ErrorKind::ConnectionRefused };
    ensure!(ended.as_ref().is_err_and(|error| error.kind() == expected), "a dial inside the pod ended with {ended:?}");
    let position = pod.node.log_position();
    let forwarding = forward(pod, 9999)?;
    let mut client = forwarding.dial()?;
    let mut answer = Vec::new();
    match client.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => bail!("the connection was not closed: {error}"),
    }
    ensure!(answer.is_empty(), "it was answered {answer:?}");
    // crictl prints it unless the end of the data outruns the error, as it can with any runtime; containerd always logs it.
    wait_for("the failure to be told", SOON, || {
        let (shown, log) = (forwarding.terminal.shown(), pod.node.log_since(position, 1000));
        let told = shown.contains("an error occurred forwarding") || log.contains("forwarding port 9999 failed");
        ensure!(told, "crictl showed {shown:?}");
        Ok(())
    })?;
    let container = web(pod, "127.0.0.1", 8085)?;
    ensure!(forward(pod, 8085)?.page()? == PAGE);
    container.remove_by_force()
}

fn after_restart(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = web(&pod, "127.0.0.1", 8086)?;
    ensure!(forward(&pod, 8086)?.page()? == PAGE);
    pod.node.kill_daemon()?;
    pod.node.start_daemon()?;
    ensure!(forward(&pod, 8086)?.page()? == PAGE);
    container.remove_by_force()?;
    pod.remove()
}

/// A link between the pod's network namespace and the host's: its host end goes when the namespace does, and nothing else
/// tells of a namespace that has no name and no process any more.
struct Witness(String);

impl Witness {
    fn new(pod: &Pod, netns: &Path) -> Result<Self> {
        let witness = Self(format!("{}w", pod.node.name));
        let other = format!("{}p", pod.node.name);
        let add = ["link", "add", &witness.0, "type", "veth", "peer", "name", &other, "netns"];
        Run::new("/sbin/ip").args(add).arg(netns).success()?;
        Ok(witness)
    }

    fn exists(&self) -> bool {
        Path::new("/sys/class/net").join(&self.0).exists()
    }

    fn wait_for_end(&self) -> Result<()> {
        wait_for("the network namespace to end", SOON, || {
            ensure!(!self.exists(), "something keeps it");
            Ok(())
        })
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        if self.exists() {
            // The failure that led here is being reported.
            let _ = Run::new("/sbin/ip").args(["link", "del", &self.0]).output();
        }
    }
}

/// What steers the loopback of a network namespace: BPF links of any process, and tables of ours.
fn steering(netns: &Path) -> Result<Vec<String>> {
    let inode = format!("netns_ino:\t{}\n", fs::metadata(netns)?.ino());
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        // Processes come and go; one that has gone has no files.
        let Ok(files) = fs::read_dir(process.path().join("fdinfo")) else { continue };
        for file in files.flatten() {
            if fs::read_to_string(file.path()).is_ok_and(|text| text.contains(&inode)) {
                found.push(format!("BPF link {}", file.path().display()));
            }
        }
    }
    if Path::new("/usr/sbin/nft").exists() {
        let tables = inside(netns, || Run::new("/usr/sbin/nft").args(["list", "tables"]).success())??.text();
        found.extend(tables.lines().filter(|line| line.contains("bulkhead")).map(str::to_owned));
    }
    Ok(found)
}

fn stopped_while_open(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let netns = netns(&pod)?;
    let witness = Witness::new(&pod, &netns)?;
    let container = service(&pod, 9002, ContainerSpec::new(&["nc", "-ll", "-p", "9002", "-e", "cat"]))?;
    let forwarding = forward(&pod, 9002)?;
    let mut client = forwarding.dial()?;
    client.write_all(b"echo")?;
    let mut heard = [0; 4];
    client.read_exact(&mut heard)?;
    ensure!(&heard == b"echo", "it said {heard:?}");
    ensure!(!steering(&netns)?.is_empty(), "nothing is seen to steer the loopback of a running pod");
    ensure!(witness.exists(), "the witness is gone too early");
    drop(container);
    pod.stop()?;
    ensure!(!netns.exists(), "{} is still there", netns.display());
    let mut rest = Vec::new();
    // An end or a reset: either is fine, an open connection is not.
    if let Err(error) = client.read_to_end(&mut rest) {
        ensure!(error.kind() == ErrorKind::ConnectionReset, "the connection outlives its pod: {error}");
    }
    witness.wait_for_end()?;
    pod.remove()
}

fn shim_killed(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let netns = netns(&pod)?;
    let witness = Witness::new(&pod, &netns)?;
    let container = service(&pod, 9003, ContainerSpec::new(&["nc", "-ll", "-p", "9003", "-e", "cat"]))?;
    let mut client = dial_inside(&netns, 9003)?.context("dial the pod's loopback")?;
    client.set_read_timeout(Some(SOON))?;
    client.write_all(b"echo")?;
    client.read_exact(&mut [0; 4]).context("hear the echo")?;
    faults::kill(&pod.node, &pod.id, Part::Shim)?;
    let ended = client.read_to_end(&mut Vec::new()).map_err(|error| error.kind());
    ensure!(ended == Err(ErrorKind::ConnectionReset), "the client saw {ended:?}");
    drop(client);
    // containerd may be quicker than this test and take the namespace with it.
    if netns.exists() {
        let left = steering(&netns)?;
        ensure!(left.iter().all(|thing| thing.starts_with("table")), "there is still {left:?}");
        let refused = dial_inside(&netns, 9003)?.map(drop).map_err(|error| error.kind());
        ensure!(refused == Err(ErrorKind::ConnectionRefused), "a dial ended with {refused:?}");
    }
    container.wait(SOON)?;
    wait_for("the pod to be not ready", SOON, || {
        ensure!(!pod.is_ready()?, "it is ready");
        Ok(())
    })?;
    pod.remove_by_force()?;
    witness.wait_for_end()
}
