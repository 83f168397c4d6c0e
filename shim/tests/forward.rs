//! Port-forward against an agent in this process: a client in a network namespace, a service on the host's loopback.

#![allow(clippy::disallowed_methods, reason = "tasks of a test end with the test")]

#[allow(dead_code, reason = "this test breaks no connection")]
#[path = "support/agent.rs"]
mod agent;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use agent::FakeAgent;
use bulkhead_shim::guest::client::Guest;
use bulkhead_shim::guest::listener::{Acceptor, Listener};
use bulkhead_shim::network::forward::Forward;
use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

/// A pod's namespace with nothing in it but what the port-forward brings.
struct Pod {
    name: String,
    forward: Option<Forward>,
    _directory: tempfile::TempDir,
}

impl Pod {
    /// None, with a printed reason, where that cannot be.
    async fn start(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return None;
        }
        let name = format!("bh-forward-{name}-{}", std::process::id());
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        let directory = tempfile::tempdir().expect("makes a directory");
        let socket = directory.path().join("vsock_1024");
        let mut pod = Self { name, forward: None, _directory: directory };
        let acceptor = Acceptor::Unix(UnixListener::bind(&socket).expect("binds"));
        let (streams, control, _task) = Listener::start(acceptor);
        let _agent = FakeAgent::serve(&socket).await;
        let (events, _) = mpsc::channel(16);
        let (guest, _guest_task, _hello) = Guest::connect(control, events).await.expect("greets");
        pod.forward = Some(Forward::start(&pod.path(), guest, streams).await.expect("forwards"));
        Some(pod)
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Dials the pod's loopback as containerd does.
    async fn dial(&self, port: u16) -> io::Result<TcpStream> {
        let netns = File::open(self.path()).expect("is there");
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let dialling = std::thread::spawn(move || {
            setns(netns, CloneFlags::CLONE_NEWNET).expect("enters");
            std::net::TcpStream::connect_timeout(&address, SOON)
        });
        let stream = tokio::task::spawn_blocking(|| dialling.join().expect("does not panic")).await.expect("runs")?;
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.name]);
    }
}

fn ip(args: &[&str]) {
    assert!(Command::new("ip").args(args).status().expect("ip runs").success(), "ip {args:?}");
}

async fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("ends in time")?;
    Ok(bytes)
}

/// Answers each connection with the number of bytes that it sent until its half-close, until the test ends.
async fn counter() -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let port = listener.local_addr().expect("has an address").port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut serving = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            serving.spawn(async move {
                let bytes = read_all(&mut stream).await.expect("comes whole");
                stream.write_all(bytes.len().to_string().as_bytes()).await.expect("is taken");
            });
        }
    });
    (port, tasks)
}

#[tokio::test]
async fn many_clients_are_each_answered_after_their_half_close() {
    let Some(pod) = Pod::start("many").await else { return };
    let (port, _serving) = counter().await;
    let mut clients = JoinSet::new();
    for number in 0..100_usize {
        let mut client = pod.dial(port).await.expect("connects");
        clients.spawn(async move {
            client.write_all(&vec![1; number * 1000]).await.expect("is taken");
            client.shutdown().await.expect("half-closes");
            let answer = read_all(&mut client).await.expect("is whole");
            assert_eq!(String::from_utf8_lossy(&answer), (number * 1000).to_string());
        });
    }
    while let Some(done) = clients.join_next().await {
        done.expect("is answered");
    }
}

#[tokio::test]
async fn a_port_that_nothing_listens_on_is_reset_and_the_next_one_works() {
    let Some(pod) = Pod::start("refused").await else { return };
    let unused = TcpListener::bind("127.0.0.1:0").await.expect("listens").local_addr().expect("has one").port();
    // It is accepted before anybody knows; the reset may still be there before the client has seen that it is connected.
    let error = match pod.dial(unused).await {
        Ok(mut client) => read_all(&mut client).await.expect_err("is reset"),
        Err(error) => error,
    };
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let (port, _serving) = counter().await;
    let mut client = pod.dial(port).await.expect("connects");
    client.shutdown().await.expect("half-closes");
    assert_eq!(read_all(&mut client).await.expect("is whole"), b"0");
}

#[tokio::test]
async fn what_is_open_at_the_end_is_reset_and_nothing_is_left() {
    let Some(mut pod) = Pod::start("end").await else { return };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let port = listener.local_addr().expect("has an address").port();
    let mut client = pod.dial(port).await.expect("connects");
    let (mut service, _) = timeout(SOON, listener.accept()).await.expect("in time").expect("accepts");
    client.write_all(b"ping").await.expect("is taken");
    service.read_exact(&mut [0; 4]).await.expect("is heard");
    pod.forward.take().expect("forwards").close().await.expect("closes");
    assert_eq!(read_all(&mut client).await.expect_err("is reset").kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(read_all(&mut service).await.expect_err("is reset").kind(), io::ErrorKind::ConnectionReset);
    let refused = pod.dial(port).await.expect_err("nothing listens any more");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
}
