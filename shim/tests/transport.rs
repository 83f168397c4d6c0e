//! Vsock between a real guest and the shim, by whichever transport this machine has: connections, streams, confinement.
#![allow(clippy::unwrap_used, missing_docs)]

mod vm_support;

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_shim::config::Machine;
use bulkhead_shim::device::vsock::Vsock;
use bulkhead_shim::device::{Device, DeviceId};
use bulkhead_shim::guest::listener::{ControlConnections, GuestStream, Listener, ListenerTask, StreamTicket};
use bulkhead_shim::guest::transport::{Transport, TransportLaunch};
use bulkhead_shim::process::Credentials;
use bulkhead_shim::vm::{Vm, VmError};
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vm_support::{Bench, until_console};

const UID: u32 = 0x6000_4321;
const TOKEN: [u8; 16] = [0xa7; 16];
const LIMIT: Duration = Duration::from_mins(1);

struct Guest {
    vm: Vm,
    transport: Transport,
    ticket: StreamTicket,
    control: ControlConnections,
    task: ListenerTask,
    directory: tempfile::TempDir,
}

impl Guest {
    /// `None`, with a printed reason, on a machine without any transport.
    async fn boot(bench: &Bench, params: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let helper = bench.helper()?;
        let launch = TransportLaunch {
            program: move || Ok(helper),
            directory: directory.path().to_owned(),
            credentials: Credentials::unprivileged(UID, UID),
            cgroup: Vec::new(),
            oom_score_adj: None,
        };
        let mut transport = Transport::start(&bench.host, launch).await.unwrap();
        let (listener, control, task) = Listener::start(transport.take_acceptor().unwrap());
        let ticket = listener.register(TOKEN);
        let id = DeviceId::new("vsock").unwrap();
        let vsock = Device::Vsock(Vsock { id: id.clone(), backend: transport.backend() });
        let token = "a7".repeat(16);
        let params = format!("{params} token={token} bulkhead.port={}", transport.port());
        let config = bench.config(Machine::Microvm, &params, vec![vsock]);
        let mut qemu = Bench::launch();
        qemu.files.push(transport.take_file(id).unwrap());
        let vm = Vm::boot(&bench.host, &config, qemu).await.unwrap();
        Some(Self { vm, transport, ticket, control, task, directory })
    }

    async fn close(self) {
        self.vm.kill().await.unwrap();
        self.transport.close().await.unwrap();
        self.task.close().await;
        self.directory.close().unwrap();
    }
}

fn pattern(from: u64, length: usize) -> Vec<u8> {
    (from..).take(length).map(|at| (at % 251) as u8).collect()
}

#[tokio::test]
async fn the_guest_dials_and_bytes_go_both_ways() {
    let Some(bench) = Bench::new() else { return };
    let begun = Instant::now();
    let Some(mut guest) = Guest::boot(&bench, "test=dial").await else { return };
    let mut stream =
        guest.vm.while_alive("wait for the guest", LIMIT, guest.control.next([0; 16])).await.unwrap().unwrap();
    println!("dialled after {:?}", begun.elapsed());
    let mut echo = [0; 4];
    let rounds = 100;
    let begun = Instant::now();
    for _ in 0..rounds {
        stream.write_all(b"ping").await.unwrap();
        stream.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"ping");
    }
    println!("round trip {:?}", begun.elapsed() / rounds);
    // The guest sees the end of its input, and powers off.
    drop(stream);
    guest.vm.shutdown(Duration::from_secs(20)).await.unwrap();
    assert!(guest.vm.obituary().starts_with("the guest powered off"), "{}", guest.vm.obituary());
    guest.close().await;
}

#[tokio::test]
async fn megabytes_from_the_guest_arrive_whole_although_the_reader_is_slow_at_first() {
    let Some(bench) = Bench::new() else { return };
    let total: usize = 20 << 20;
    let Some(guest) = Guest::boot(&bench, &format!("test=stream bytes={total}")).await else { return };
    let mut stream = guest.ticket.wait().await.unwrap();
    // More than every buffer on the way holds is waiting by now.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let begun = Instant::now();
    let (mut seen, mut buffer) = (0, vec![0; 64 << 10]);
    while seen < total {
        let read = guest.vm.while_alive("read the stream", LIMIT, stream.read(&mut buffer)).await.unwrap().unwrap();
        assert!(read > 0, "ended after {seen} of {total} bytes");
        assert_eq!(buffer[..read], pattern(seen as u64, read), "after {seen}");
        seen += read;
    }
    println!("{:.1} MB/s", total as f64 / 1e6 / begun.elapsed().as_secs_f64());
    drop(stream);
    until_console(&guest.vm, "host has closed").await;
    guest.vm.kill().await.unwrap();
    guest.transport.close().await.unwrap();
    guest.task.close().await;
}

#[tokio::test]
async fn megabytes_to_the_guest_arrive_whole() {
    let Some(bench) = Bench::new() else { return };
    let total: usize = 8 << 20;
    let Some(guest) = Guest::boot(&bench, "test=sink").await else { return };
    let mut stream: GuestStream = guest.ticket.wait().await.unwrap();
    let begun = Instant::now();
    guest.vm.while_alive("write the stream", LIMIT, stream.write_all(&pattern(0, total))).await.unwrap().unwrap();
    println!("{:.1} MB/s", total as f64 / 1e6 / begun.elapsed().as_secs_f64());
    stream.shutdown().await.unwrap();
    until_console(&guest.vm, &format!("received {total} wrong 0")).await;
    guest.vm.kill().await.unwrap();
    guest.transport.close().await.unwrap();
    guest.task.close().await;
}

#[tokio::test]
async fn the_helper_has_no_root_no_capabilities_a_filter_and_namespaces_of_its_own() {
    let Some(bench) = Bench::new() else { return };
    let Some(mut guest) = Guest::boot(&bench, "test=dial").await else { return };
    let Some(helper) = guest.transport.child() else {
        println!("skipped: this machine's kernel has vhost-vsock, so there is no helper");
        return guest.close().await;
    };
    // Everything that it does in its life has been done by then.
    guest.vm.while_alive("wait for the guest", LIMIT, guest.control.next([0; 16])).await.unwrap().unwrap();
    let pid = helper.pid();
    let mut seen = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        // A thread may have ended since it was listed.
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        seen += 1;
        for expected in [
            format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n"),
            format!("Gid:\t{UID}\t{UID}\t{UID}\t{UID}\n"),
            "CapPrm:\t0000000000000000\n".into(),
            "CapEff:\t0000000000000000\n".into(),
            "CapBnd:\t0000000000000000\n".into(),
            "NoNewPrivs:\t1\n".into(),
            "Seccomp:\t2\n".into(),
        ] {
            assert!(status.contains(&expected), "{expected}{status}");
        }
    }
    assert!(seen > 0, "the helper has no threads");
    for namespace in ["net", "ipc", "uts", "mnt"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    guest.close().await;
}

#[tokio::test]
async fn a_killed_helper_is_noticed_and_ends_the_connections() {
    let Some(bench) = Bench::new() else { return };
    let Some(mut guest) = Guest::boot(&bench, "test=dial").await else { return };
    let Some(helper) = guest.transport.child() else {
        println!("skipped: this machine's kernel has vhost-vsock, so there is no helper");
        return guest.close().await;
    };
    let mut stream =
        guest.vm.while_alive("wait for the guest", LIMIT, guest.control.next([0; 16])).await.unwrap().unwrap();
    rustix::process::kill_process(Pid::from_raw(helper.pid()).unwrap(), Signal::KILL).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), async {
        helper.wait().await;
        while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
    });
    ended.await.unwrap();
    assert_eq!(helper.obituary(), "bulkhead-vsock was ended by signal 9 (SIGKILL)");
    guest.close().await;
}

#[tokio::test]
async fn a_helper_that_does_not_start_says_why() {
    let Some(bench) = Bench::new() else { return };
    if std::path::Path::new("/dev/vhost-vsock").exists() {
        println!("skipped: this machine's kernel has vhost-vsock, so there is no helper");
        return;
    }
    for (program, expected) in
        [("/nonexistent/helper", "No such file or directory"), ("/bin/false", "bulkhead-vsock exited with status 1")]
    {
        let directory = tempfile::tempdir().unwrap();
        let launch = TransportLaunch {
            program: move || Ok(program.into()),
            directory: directory.path().to_owned(),
            credentials: Credentials::unprivileged(UID, UID),
            cgroup: Vec::new(),
            oom_score_adj: None,
        };
        let error = Transport::start(&bench.host, launch).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn many_boots_all_dial() {
    let Some(bench) = Bench::new() else { return };
    for round in 0..5 {
        let Some(mut guest) = Guest::boot(&bench, "test=dial").await else { return };
        let dialled: Result<_, VmError> = guest.vm.while_alive("wait", LIMIT, guest.control.next([0; 16])).await;
        dialled.unwrap_or_else(|error| panic!("round {round}: {error}")).unwrap();
        guest.close().await;
    }
}
