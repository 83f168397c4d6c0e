//! The agent in a real guest: one file of promises, each kept by a container in QEMU.
//!
//! Needs a guest (`BULKHEAD_TEST_ASSETS`) and helpers (`BULKHEAD_CACHE`), as `make test` sets them; skipped with a reason
//! without.

mod machine;

use bulkhead_proto::agent as api;
use machine::{Disk, Machine, read_all, write_all};
use serde_json::{Value, json};

/// Puts a busybox image at `<name>/rootfs` below the share.
fn busybox(machine: &Machine, name: &str) {
    busybox_at(&machine.share(&format!("{name}/rootfs")));
}

fn busybox_at(rootfs: &std::path::Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        std::fs::create_dir_all(rootfs.join(directory)).expect("mkdir");
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static");
    for applet in [
        "sh",
        "cat",
        "echo",
        "sleep",
        "sha256sum",
        "id",
        "env",
        "head",
        "ps",
        "kill",
        "stty",
        "dd",
        "pwd",
        "true",
        "ls",
        "grep",
        "ip",
        "hostname",
        "mkdir",
        "touch",
        "mkfifo",
        "df",
        "sysctl",
        "ulimit",
    ] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).expect("symlink");
    }
    std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n")
        .expect("passwd");
}

fn process(args: &[&str]) -> Value {
    json!({
        "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 }, "noNewPrivileges": false,
        "capabilities": { "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL", "CAP_CHOWN"] },
    })
}

fn spec(process: Value) -> Value {
    json!({
        "ociVersion": "1.1.0", "process": process, "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "bind", "source": "shm:", "options": ["rbind", "rw"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }],
            "maskedPaths": ["/proc/kcore", "/proc/keys"], "readonlyPaths": ["/proc/sys"],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        },
    })
}

fn create(id: &str, spec: &Value, stdio: api::Stdio) -> api::CreateContainerRequest {
    let rootfs = api::GuestMount {
        source: Some(api::guest_mount::Source::SharePath(format!("{id}/rootfs"))),
        target: "/".into(),
        ..api::GuestMount::default()
    };
    api::CreateContainerRequest {
        container_id: id.into(),
        spec_json: spec.to_string().into_bytes(),
        rootfs: vec![rootfs],
        stdio: Some(stdio),
        ..api::CreateContainerRequest::default()
    }
}

fn start(id: &str, exec: &str) -> api::StartProcessRequest {
    api::StartProcessRequest { container_id: id.into(), exec_id: exec.into() }
}

fn delete(id: &str, exec: &str) -> api::DeleteRequest {
    api::DeleteRequest { container_id: id.into(), exec_id: exec.into() }
}

async fn sandbox(machine: &mut Machine) {
    let request = api::CreateSandboxRequest { hostname: "pod".into(), share_tag: "share".into(), ..Default::default() };
    machine.client.create_sandbox(request).await.expect("sandbox");
}

#[tokio::test]
async fn a_container_runs_prints_and_exits() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    busybox(&machine, "c1");
    let (stdout_token, stdout) = machine.stream();
    let spec = spec(process(&["sh", "-c", "echo hi; exit 42"]));
    let request = create("c1", &spec, api::Stdio { stdout_token, ..Default::default() });
    let created = machine.client.create_container(request).await.expect("create").into_inner();
    println!("hello {:?}\ncreated {created:?}", machine.hello);
    let started = machine.client.start_process(start("c1", "")).await.expect("start").into_inner();
    println!("started {started:?}");
    let exit = machine.exit(|_| ()).await;
    assert_eq!((exit.exit_status, exit.stdout_bytes), (42, 3));
    assert_eq!(read_all(stdout).await, b"hi\n");
    machine.client.delete(delete("c1", "")).await.expect("delete");
    machine.client.shutdown(api::ShutdownRequest {}).await.expect("shutdown");
    assert!(machine.powered_off().await);
}

/// What a test starts and follows.
struct Exec<'a> {
    id: &'a str,
    exec: &'a str,
    process: Value,
    stdio: api::Stdio,
}

impl Exec<'_> {
    async fn start(self, machine: &mut Machine) -> Result<api::StartProcessResponse, tonic::Status> {
        let request = api::CreateProcessRequest {
            container_id: self.id.into(),
            exec_id: self.exec.into(),
            process_json: self.process.to_string().into_bytes(),
            stdio: Some(self.stdio),
        };
        machine.client.create_process(request).await?;
        Ok(machine.client.start_process(start(self.id, self.exec)).await?.into_inner())
    }
}

/// Starts a container that sleeps.
async fn sleeper(machine: &mut Machine, id: &str) -> u32 {
    busybox(machine, id);
    let request = create(id, &spec(process(&["sleep", "1000"])), api::Stdio::default());
    let pid = machine.client.create_container(request).await.expect("create").into_inner().guest_pid;
    machine.client.start_process(start(id, "")).await.expect("start");
    pid
}

/// Runs an exec to its end: exit status and stdout.
async fn run(machine: &mut Machine, id: &str, exec: &str, process: Value) -> (u32, String) {
    let (stdout_token, stdout) = machine.stream();
    let stdio = api::Stdio { stdout_token, ..Default::default() };
    Exec { id, exec, process, stdio }.start(machine).await.expect("exec");
    let exit = machine.exit(|_| ()).await;
    assert_eq!(exit.exec_id, exec);
    let output = String::from_utf8(read_all(stdout).await).expect("text");
    machine.client.delete(delete(id, exec)).await.expect("delete");
    (exit.exit_status, output)
}

async fn kill(machine: &mut Machine, id: &str, signal: u32) -> Result<(), tonic::Status> {
    let request = api::SignalProcessRequest { container_id: id.into(), signal, ..Default::default() };
    machine.client.signal_process(request).await.map(drop)
}

#[tokio::test]
async fn streams_arrive_whole() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    busybox(&machine, "c1");
    let (stdout_token, stdout) = machine.stream();
    let script = "dd if=/dev/zero bs=64k count=800; sleep 1000";
    let request =
        create("c1", &spec(process(&["sh", "-c", script])), api::Stdio { stdout_token, ..Default::default() });
    machine.client.create_container(request).await.expect("create");
    machine.client.start_process(start("c1", "")).await.expect("start");

    // 50 MB out of the container's log; a slow start of the reader makes every buffer on the way fill up.
    let began = std::time::Instant::now();
    let mut stream = stdout.await.expect("dialled");
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let received = machine::read_payload(&mut stream, 52_428_800).await;
    assert!(received.iter().all(|&byte| byte == 0));
    println!("50 MB out: {:?}", began.elapsed());

    // 3 MB in and out through an exec, with a checksum made in the guest.
    let (stdin_token, stdin) = machine.stream();
    let (stdout_token, stdout) = machine.stream();
    let data: Vec<u8> =
        (0..3_000_000_u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[..1].to_vec()).collect();
    let stdio = api::Stdio { stdin_token, stdout_token, ..Default::default() };
    Exec { id: "c1", exec: "e1", process: process(&["cat"]), stdio }.start(&mut machine).await.expect("exec");
    let began = std::time::Instant::now();
    let ((), echoed) = tokio::join!(write_all(stdin, &data), read_all(stdout));
    println!("3 MB through cat: {:?}", began.elapsed());
    assert!(echoed == data);
    let exit = machine.exit(|_| ()).await;
    assert_eq!((exit.exec_id.as_str(), exit.exit_status, exit.stdout_bytes), ("e1", 0, 3_000_000));

    // A background child keeps the stream, not the exit.
    let (stdout_token, stdout) = machine.stream();
    let stdio = api::Stdio { stdout_token, ..Default::default() };
    let script = process(&["sh", "-c", "sleep 500 & echo started"]);
    Exec { id: "c1", exec: "e2", process: script, stdio }.start(&mut machine).await.expect("exec");
    let exit = machine.exit(|_| ()).await;
    assert_eq!((exit.exec_id.as_str(), exit.exit_status, exit.stdout_bytes), ("e2", 0, 8));
    let mut stream = stdout.await.expect("dialled");
    assert_eq!(machine::read_payload(&mut stream, 8).await, b"started\n");
    drop(stream);
    machine.client.delete(delete("c1", "e2")).await.expect("delete");
}

#[tokio::test]
async fn an_exec_is_what_its_process_says() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    sleeper(&mut machine, "c1").await;

    let began = std::time::Instant::now();
    assert_eq!(run(&mut machine, "c1", "a", process(&["sh", "-c", "exit 3"])).await.0, 3);
    println!("first exec {:?}", began.elapsed());
    let began = std::time::Instant::now();
    for n in 0..10 {
        assert_eq!(run(&mut machine, "c1", &format!("b{n}"), process(&["true"])).await.0, 0);
    }
    println!("10 execs {:?}", began.elapsed());

    let mut user = process(&[
        "sh",
        "-c",
        "id -u; id -g; id -G; echo $HOME; pwd; grep CapEff /proc/self/status; echo to >/dev/stdout",
    ]);
    user["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [7, 8] });
    user["cwd"] = json!("/tmp");
    let (status, output) = run(&mut machine, "c1", "c", user).await;
    assert_eq!(
        (status, output.as_str()),
        (0, "1000\n1000\n1000 7 8\n/home/web\n/tmp\nCapEff:\t0000000000000000\nto\n")
    );
    let (_, output) = run(
        &mut machine,
        "c1",
        "d",
        process(&["sh", "-c", "grep -E 'CapEff|CapBnd|NoNew' /proc/self/status; echo $HOME"]),
    )
    .await;
    assert_eq!(output, "CapEff:\t0000000000000021\nCapBnd:\t0000000000000021\nNoNewPrivs:\t0\n/root\n");

    for (args, cwd, expected) in [
        (
            &["nosuch"][..],
            "/",
            "unable to start container process: exec: \"nosuch\": executable file not found in $PATH",
        ),
        (
            &["/nosuch"],
            "/",
            "unable to start container process: exec: \"/nosuch\": stat /nosuch: no such file or directory",
        ),
        (&["/etc/passwd"], "/", "unable to start container process: exec: \"/etc/passwd\": permission denied"),
        (
            &["true"],
            "/none",
            "unable to start container process: chdir to cwd (\"/none\") set in config.json failed: no such file or directory",
        ),
    ] {
        let mut process = process(args);
        process["cwd"] = json!(cwd);
        let error = Exec { id: "c1", exec: "x", process, stdio: api::Stdio::default() }.start(&mut machine).await;
        assert_eq!(error.expect_err("no such program").message(), expected);
        machine.client.delete(delete("c1", "x")).await.expect("delete");
    }

    // A pty: size, controlling terminal, echo of the input, resize.
    let (stdin_token, stdin) = machine.stream();
    let (stdout_token, stdout) = machine.stream();
    let stdio = api::Stdio { terminal: true, stdin_token, stdout_token, height: 33, width: 99, ..Default::default() };
    let script = process(&["sh", "-c", "stty size; read line; stty size; echo got $line; [ -t 0 ] && echo tty"]);
    Exec { id: "c1", exec: "t", process: script, stdio }.start(&mut machine).await.expect("exec");
    let resize = api::ResizePtyRequest { container_id: "c1".into(), exec_id: "t".into(), height: 40, width: 120 };
    let mut output = stdout.await.expect("dialled");
    assert_eq!(machine::read_payload(&mut output, 7).await, b"33 99\r\n");
    machine.client.resize_pty(resize).await.expect("resize");
    let mut input = stdin.await.expect("dialled");
    machine::write_payload(&mut input, b"hello\n").await;
    let expected = b"hello\r\n40 120\r\ngot hello\r\ntty\r\n";
    assert_eq!(machine::read_payload(&mut output, expected.len()).await, expected);
    let exit = machine.exit(|_| ()).await;
    assert_eq!((exit.exit_status, exit.stdout_bytes), (0, 7 + expected.len() as u64));
}

#[tokio::test]
async fn forty_execs_run_at_once() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    sleeper(&mut machine, "c1").await;
    let began = std::time::Instant::now();
    let mut outputs = std::collections::HashMap::new();
    let mut starts = tokio::task::JoinSet::new();
    for n in 0..40 {
        let (stdout_token, stdout) = machine.stream();
        outputs.insert(n.to_string(), stdout);
        let mut client = machine.client.clone();
        starts.spawn(async move {
            let request = api::CreateProcessRequest {
                container_id: "c1".into(),
                exec_id: n.to_string(),
                process_json: process(&["sh", "-c", &format!("echo {n}; exit {n}")]).to_string().into_bytes(),
                stdio: Some(api::Stdio { stdout_token, ..Default::default() }),
            };
            client.create_process(request).await.expect("create");
            client.start_process(start("c1", &n.to_string())).await.expect("start");
        });
    }
    while let Some(started) = starts.join_next().await {
        started.expect("started");
    }
    for _ in 0..40 {
        let exit = machine.exit(|_| ()).await;
        assert_eq!(exit.exit_status.to_string(), exit.exec_id);
        let output = outputs.remove(&exit.exec_id).expect("one exit each");
        assert_eq!(read_all(output).await, format!("{}\n", exit.exec_id).into_bytes());
    }
    println!("40 execs at once: {:?}", began.elapsed());
}

#[tokio::test]
async fn containers_are_signalled_paused_limited_and_watched() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    sleeper(&mut machine, "c1").await;

    // Execs exit before their container.
    let exec = Exec { id: "c1", exec: "e", process: process(&["sleep", "1000"]), stdio: api::Stdio::default() };
    exec.start(&mut machine).await.expect("exec");
    kill(&mut machine, "c1", 9).await.expect("kill");
    let (mut first, second) = (machine.exit(|_| ()).await, machine.exit(|_| ()).await);
    assert_eq!((first.exec_id.as_str(), first.exit_status), ("e", 137));
    assert_eq!((second.exec_id.as_str(), second.exit_status), ("", 137));
    assert_eq!(kill(&mut machine, "c1", 9).await.expect_err("gone").code(), tonic::Code::NotFound);
    machine.client.delete(delete("c1", "")).await.expect("delete");

    // One that was never started dies of the signals that end a program.
    busybox(&machine, "c2");
    let request = create("c2", &spec(process(&["sleep", "1000"])), api::Stdio::default());
    machine.client.create_container(request).await.expect("create");
    kill(&mut machine, "c2", 15).await.expect("kill");
    first = machine.exit(|_| ()).await;
    assert_eq!((first.container_id.as_str(), first.exit_status), ("c2", 137));
    machine.client.delete(delete("c2", "")).await.expect("delete");

    // Freezing stops it, also for a signal to all.
    sleeper(&mut machine, "c3").await;
    machine.client.pause_container(api::PauseContainerRequest { container_id: "c3".into() }).await.expect("pause");
    let exec = Exec { id: "c3", exec: "e", process: process(&["true"]), stdio: api::Stdio::default() };
    assert_eq!(exec.start(&mut machine).await.expect_err("paused").code(), tonic::Code::FailedPrecondition);
    machine.client.resume_container(api::ResumeContainerRequest { container_id: "c3".into() }).await.expect("resume");
    let resources = br#"{"memory":{"limit":33554432},"pids":{"limit":50}}"#.to_vec();
    let request = api::UpdateContainerRequest { container_id: "c3".into(), resources_json: resources };
    machine.client.update_container(request).await.expect("update");
    // A sample or two may have been on their way before.
    let mut limits = Vec::new();
    while limits.last() != Some(&(33_554_432, 50, 1)) {
        assert!(limits.len() < 5, "the samples say {limits:?}");
        if let Some(api::event::Event::Stats(stats)) = machine.events.recv().await.expect("events").event
            && stats.container_id == "c3"
        {
            limits.push((stats.memory.expect("memory").usage_limit_bytes, stats.pids_limit, stats.pids_current));
        }
    }
    let listed = api::ListProcessesRequest { container_id: "c3".into() };
    assert_eq!(machine.client.list_processes(listed).await.expect("list").into_inner().guest_pids.len(), 1);

    // Memory beyond the limit: the OOM comes before the exit.
    let exec = Exec {
        id: "c3",
        exec: "oom",
        process: process(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=100M count=1"]),
        stdio: api::Stdio::default(),
    };
    exec.start(&mut machine).await.expect("exec");
    let mut ooms = 0;
    machine.exit(|event| ooms += u32::from(matches!(event, api::event::Event::Oom(_)))).await;
    assert!(ooms > 0 || machine.console().contains("oom"), "no OOM event");
    let request = api::SignalProcessRequest { container_id: "c3".into(), signal: 9, all: true, ..Default::default() };
    machine.client.signal_process(request).await.expect("kill all");
    assert_eq!(machine.exit(|_| ()).await.exit_status, 137);
    machine.client.delete(delete("c3", "")).await.expect("delete");
}

#[tokio::test]
async fn pid_namespaces_are_as_asked() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    let list = || process(&["sh", "-c", "ls /proc | grep -c '^[0-9]'; echo $$"]);
    for (id, kind, target) in [("own", 0, ""), ("pod1", 1, ""), ("pod2", 1, ""), ("joined", 2, "own")] {
        busybox(&machine, id);
        let mut request = create(id, &spec(process(&["sleep", "1000"])), api::Stdio::default());
        request.pid_namespace = kind;
        request.pid_namespace_target = target.into();
        machine.client.create_container(request).await.expect("create");
        machine.client.start_process(start(id, "")).await.expect("start");
    }
    let seen = |output: String| output.lines().next().and_then(|line| line.parse::<u32>().ok()).expect("a count");
    // Each counts itself, the shell it may have forked, ls and grep on top of what is there.
    let own = seen(run(&mut machine, "own", "a", list()).await.1);
    let joined = seen(run(&mut machine, "joined", "a", list()).await.1);
    let pod = seen(run(&mut machine, "pod1", "a", list()).await.1);
    assert_eq!(own, joined, "own and joined are one namespace");
    assert_eq!(pod, own + 1, "the pod's namespace has a holder and two sleepers, the other one two sleepers");

    // A container of the shared namespace dies alone, with all that is its own.
    let exec = Exec { id: "pod1", exec: "bg", process: process(&["sleep", "1000"]), stdio: api::Stdio::default() };
    exec.start(&mut machine).await.expect("exec");
    kill(&mut machine, "pod1", 9).await.expect("kill");
    assert_eq!(machine.exit(|_| ()).await.exec_id, "bg");
    assert_eq!(machine.exit(|_| ()).await.container_id, "pod1");
    assert_eq!(run(&mut machine, "pod2", "b", process(&["true"])).await.0, 0);
    machine.client.delete(delete("pod1", "")).await.expect("delete");
}

#[tokio::test]
async fn a_container_can_be_made_again_and_again() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    busybox(&machine, "c1");
    let mut made = std::time::Duration::ZERO;
    for n in 0..20 {
        let (stdout_token, stdout) = machine.stream();
        let request =
            create("c1", &spec(process(&["echo", "once"])), api::Stdio { stdout_token, ..Default::default() });
        let began = std::time::Instant::now();
        let response = machine.client.create_container(request).await.expect("create").into_inner();
        machine.client.start_process(start("c1", "")).await.expect("start");
        made += began.elapsed();
        let exit = machine.exit(|_| ()).await;
        assert_eq!((exit.exit_status, exit.stdout_bytes), (0, 5), "round {n}");
        assert_eq!(read_all(stdout).await, b"once\n");
        machine.client.delete(delete("c1", "")).await.expect("delete");
        if n == 19 {
            println!("last: {response:?}");
        }
    }
    println!("create and start: {:?} each", made / 20);

    // A container that cannot start leaves nothing, and its id is free.
    let request = create("c1", &spec(process(&["nosuch"])), api::Stdio::default());
    let error = machine.client.create_container(request).await.expect_err("no program");
    let expected = "unable to start container process: exec: \"nosuch\": executable file not found in $PATH";
    assert_eq!(error.message(), expected);
    let mut process = process(&["pwd"]);
    process["cwd"] = json!("/made/for/me");
    let request = create("c1", &spec(process), api::Stdio::default());
    machine.client.create_container(request).await.expect("create");
    machine.client.start_process(start("c1", "")).await.expect("start");
    assert_eq!(machine.exit(|_| ()).await.exit_status, 0);
}

#[tokio::test]
async fn the_pods_network_and_sysctls_are_set() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    let address = |address: &[u8], prefix_length| api::IpAddress { address: address.into(), prefix_length };
    let v6 = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let route = |gateway: &[u8], onlink| api::Route {
        gateway: gateway.into(),
        interface: "net7".into(),
        onlink,
        ..Default::default()
    };
    let request = api::CreateSandboxRequest {
        hostname: "web-0".into(),
        share_tag: "share".into(),
        shm_size_bytes: 1 << 20,
        sysctls: [("net.ipv4.ip_unprivileged_port_start", "0"), ("net/ipv4/conf/net7/rp_filter", "2")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        interfaces: vec![api::Interface {
            name: "net7".into(),
            mac: vec![2, 0, 0, 0, 0, 5],
            mtu: 1400,
            addresses: vec![address(&[10, 9, 0, 5], 24), address(&v6(5), 64)],
        }],
        routes: vec![
            route(&[169, 254, 1, 1], true),
            route(&v6(1), false),
            api::Route { destination: Some(address(&[10, 8, 0, 0], 16)), ..route(&[10, 9, 0, 1], false) },
            api::Route {
                destination: Some(address(&[10, 9, 0, 0], 24)),
                source: vec![10, 9, 0, 5],
                scope: 253,
                ..route(&[], false)
            },
        ],
        neighbours: vec![api::Neighbour {
            address: vec![10, 9, 0, 1],
            mac: vec![2, 0, 0, 0, 0, 9],
            interface: "net7".into(),
            state: 0x80,
        }],
        user_namespace: None,
    };
    machine.client.create_sandbox(request.clone()).await.expect("sandbox");
    machine.client.create_sandbox(request).await.expect("a repeated request is answered as the first was");
    sleeper(&mut machine, "c1").await;
    let script = "hostname; ip addr show net7; ip route; ip -6 route show default; ip neigh; ip addr show lo; df /dev/shm; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/conf/net7/rp_filter";
    let (status, output) = run(&mut machine, "c1", "e", process(&["sh", "-c", script])).await;
    for expected in [
        "web-0\n",
        "mtu 1400",
        "inet 10.9.0.5/24",
        "inet6 fd00::5/64 scope global",
        "default via 169.254.1.1 dev net7",
        "10.8.0.0/16 via 10.9.0.1 dev net7",
        "default via fd00::1 dev net7",
        "10.9.0.1 dev net7 lladdr 02:00:00:00:00:09",
        "inet 127.0.0.1/8",
        "shm                       1024",
        "\n0\n2\n",
    ] {
        assert!(output.contains(expected), "{expected:?} is not in {output}");
    }
    assert!(!output.contains("tentative"), "{output}");
    assert_eq!(status, 0);
}

#[tokio::test]
async fn a_container_is_confined_as_its_spec_says() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    busybox(&machine, "c1");
    std::fs::create_dir(machine.share("c1/0")).expect("mkdir");
    std::fs::write(machine.share("c1/1"), "one file\n").expect("write");
    let mut spec = spec(process(&["sleep", "1000"]));
    spec["root"]["readonly"] = json!(true);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }],
    });
    spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 77 }]);
    for mount in [
        json!({ "destination": "/data", "type": "bind", "source": "share:c1/0", "options": ["rbind", "rw"] }),
        json!({ "destination": "/ro", "type": "bind", "source": "share:c1/0", "options": ["rbind", "rro"] }),
        json!({ "destination": "/etc/one", "type": "bind", "source": "share:c1/1", "options": ["bind", "ro"] }),
        json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1m", "mode=1777"] }),
    ] {
        spec["mounts"].as_array_mut().expect("mounts").push(mount);
    }
    machine.client.create_container(create("c1", &spec, api::Stdio::default())).await.expect("create");
    machine.client.start_process(start("c1", "")).await.expect("start");
    let script = "exec 2>&1; mkdir /data/x; touch /data/file && echo written; touch /ro/file; touch /root-is-ro; cat /etc/one; touch /etc/one; \
                  df /tmp; touch /tmp/t && echo tmp; cat /proc/kcore | head -c 1; ls -la /proc/keys; echo 1 > /proc/sys/kernel/pid_max; \
                  grep Seccomp: /proc/1/status /proc/self/status; ulimit -n";
    let mut exec = process(&["sh", "-c", script]);
    exec["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 88, "hard": 88 }]);
    let began = std::time::Instant::now();
    let (_, output) = run(&mut machine, "c1", "e", exec).await;
    println!("{:?} {output}", began.elapsed());
    for expected in [
        "can't create directory '/data/x': Function not implemented",
        "written\n",
        "/ro/file: Read-only file system",
        "/root-is-ro: Read-only file system",
        "one file\n",
        "/etc/one: Read-only file system",
        "1024",
        "tmp\n",
        "can't create /proc/sys/kernel/pid_max: Read-only file system",
        "/proc/1/status:Seccomp:\t2",
        "/proc/self/status:Seccomp:\t2",
        "\n88\n",
    ] {
        assert!(output.contains(expected), "{expected:?} is not in {output}");
    }
    assert!(machine.share("c1/0/file").exists(), "a write to a volume reaches the host");
}

#[tokio::test]
async fn a_control_connection_that_breaks_loses_no_event_and_no_call() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    busybox(&machine, "c1");
    // An init that ends takes its PID namespace with it, so it waits until the exec is gone by itself.
    let script = "mkfifo /tmp/go; read pid </tmp/go; while kill -0 $pid 2>/dev/null; do sleep 0.1; done; exit 7";
    let mut spec = spec(process(&["sh", "-c", script]));
    spec["root"]["readonly"] = json!(false);
    let request = create("c1", &spec, api::Stdio::default());

    // The connection breaks under the call, and after its answer: each repetition tells of the one container.
    let mut client = machine.client.clone();
    let breaking = client.create_container(request.clone());
    drop(tokio::time::timeout(std::time::Duration::from_millis(50), breaking).await);
    drop(client);
    machine.reconnect(0).await;
    let pid = machine.client.create_container(request.clone()).await.expect("create").into_inner().guest_pid;
    machine.reconnect(0).await;
    let again = machine.client.create_container(request).await.expect("create again").into_inner();
    assert_eq!(again.guest_pid, pid);
    let sandbox = api::CreateSandboxRequest { hostname: "pod".into(), share_tag: "share".into(), ..Default::default() };
    machine.client.create_sandbox(sandbox).await.expect("a pod stays one");

    let started = machine.client.start_process(start("c1", "")).await.expect("start").into_inner().guest_pid;
    let exec = api::CreateProcessRequest {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        process_json: process(&["sh", "-c", "while [ ! -p /tmp/go ]; do sleep 0.1; done; echo $$ >/tmp/go; exit 3"])
            .to_string()
            .into_bytes(),
        stdio: Some(api::Stdio::default()),
    };
    machine.client.create_process(exec.clone()).await.expect("exec");
    machine.reconnect(0).await;
    assert_eq!(machine.client.start_process(start("c1", "")).await.expect("again").into_inner().guest_pid, started);
    machine.client.create_process(exec).await.expect("exec again");
    let exec_pid = machine.client.start_process(start("c1", "e1")).await.expect("start").into_inner().guest_pid;

    // Both end while nobody listens, or just before.
    machine.reconnect(0).await;
    assert_eq!(machine.client.start_process(start("c1", "e1")).await.expect("again").into_inner().guest_pid, exec_pid);
    let mut exits = Vec::new();
    while exits.len() < 2 {
        let event = tokio::time::timeout(machine::DEADLINE, machine.events.recv()).await.expect("in time");
        let event = event.expect("events");
        if let Some(api::event::Event::Exit(exit)) = event.event {
            exits.push((event.seq, exit.exec_id, exit.exit_status));
        }
    }
    assert_eq!(exits, [(1, "e1".into(), 3), (2, String::new(), 7)], "the exec and then the init, each once");

    // What was seen does not come again, what was not does.
    machine.reconnect(1).await;
    let exit = machine.exit(|_| ()).await;
    assert_eq!((exit.exec_id.as_str(), exit.exit_status), ("", 7));
    machine.client.delete(delete("c1", "e1")).await.expect("delete");
    machine.client.delete(delete("c1", "")).await.expect("delete");
    machine.client.shutdown(api::ShutdownRequest {}).await.expect("shutdown");
    assert!(machine.powered_off().await);
}

/// Makes an ext4 image that holds what is below `content`.
fn ext4(image: &std::path::Path, content: &std::path::Path) {
    std::fs::File::create(image).and_then(|file| file.set_len(64 << 20)).expect("image");
    let made = std::process::Command::new("/sbin/mkfs.ext4").args(["-q", "-d"]).arg(content).arg(image).status();
    assert!(made.expect("mkfs.ext4, of e2fsprogs").success());
}

fn disk_mount(serial: &str, target: &str) -> api::GuestMount {
    api::GuestMount {
        source: Some(api::guest_mount::Source::DeviceSerial(serial.into())),
        target: target.into(),
        fstype: "ext4".into(),
        ..api::GuestMount::default()
    }
}

#[tokio::test]
async fn a_rootfs_lies_on_a_disk_or_is_an_overlay_of_disks() {
    let images = tempfile::tempdir().expect("tempdir");
    let path = |name: &str| images.path().join(name);
    busybox_at(&path("content"));
    ext4(&path("whole"), &path("content"));
    ext4(&path("lower"), &path("content"));
    std::fs::create_dir_all(path("second/etc")).expect("mkdir");
    std::fs::write(path("second/etc/layer"), "second\n").expect("write");
    ext4(&path("middle"), &path("second"));
    std::fs::create_dir(path("empty")).expect("mkdir");
    ext4(&path("upper"), &path("empty"));
    let names = ["whole", "lower", "middle", "upper"];
    let files = names.map(&path);
    let disks: Vec<_> =
        names.iter().zip(&files).map(|(serial, image)| Disk { serial, image: image.as_path() }).collect();
    let Some(mut machine) = Machine::boot_with_disks(256, &disks).await else { return };
    sandbox(&mut machine).await;

    let mut on_disk = create("disk", &spec(process(&["sleep", "1000"])), api::Stdio::default());
    on_disk.rootfs = vec![disk_mount("whole", "/")];
    let mut on_layers = create("layers", &spec(process(&["sleep", "1000"])), api::Stdio::default());
    on_layers.rootfs = vec![
        api::GuestMount { options: vec!["ro".into()], ..disk_mount("lower", "/l0") },
        api::GuestMount { options: vec!["ro".into()], ..disk_mount("middle", "/l1") },
        disk_mount("upper", "/rw"),
        api::GuestMount {
            source: Some(api::guest_mount::Source::None(true)),
            target: "/".into(),
            fstype: "overlay".into(),
            options: ["lowerdir=/l1:/l0", "upperdir=/rw/upper", "workdir=/rw/work"].map(str::to_owned).to_vec(),
        },
    ];
    for (id, request, fstype) in [("disk", on_disk, "ext4"), ("layers", on_layers, "overlay")] {
        machine.client.create_container(request).await.expect("create");
        machine.client.start_process(start(id, "")).await.expect("start");
        let script = "grep ' / ' /proc/mounts; echo kept >/written; cat /written; grep -s . /etc/layer; true";
        let (status, said) = run(&mut machine, id, "look", process(&["sh", "-c", script])).await;
        assert_eq!(status, 0, "{said}");
        assert!(said.split_whitespace().nth(2) == Some(fstype), "{said}");
        assert_eq!(said.ends_with("kept\nsecond\n"), id == "layers", "{said}");
        kill(&mut machine, id, 9).await.expect("kill");
        assert_eq!(machine.exit(|_| ()).await.container_id, id);
        machine.client.delete(delete(id, "")).await.expect("delete");
    }
    machine.client.shutdown(api::ShutdownRequest {}).await.expect("shutdown");
    assert!(machine.powered_off().await);
    let kept = |image: &str, request: &str| {
        let output = std::process::Command::new("/sbin/debugfs").args(["-R", request]).arg(path(image)).output();
        String::from_utf8_lossy(&output.expect("debugfs, of e2fsprogs").stdout).into_owned()
    };
    assert_eq!(kept("whole", "cat /written"), "kept\n", "what was written lies on the disk");
    assert_eq!(kept("upper", "cat /upper/written"), "kept\n", "what was written lies on the upper disk");
}

/// A user namespace whose ids begin at `first` in the guest.
fn user_namespace(first: u32) -> api::UserNamespace {
    let map = vec![api::IdMapping { container_id: 0, guest_id: first, size: 65_536 }];
    api::UserNamespace { uids: map.clone(), gids: map }
}

#[tokio::test]
async fn a_pod_with_a_user_namespace_has_its_containers_in_it_and_takes_no_others() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    let request = api::CreateSandboxRequest {
        hostname: "pod".into(),
        share_tag: "share".into(),
        user_namespace: Some(user_namespace(100_000)),
        sysctls: [("net.ipv4.ip_local_port_range", "20000 30000"), ("kernel.shm_rmid_forced", "1")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..Default::default()
    };
    machine.client.create_sandbox(request.clone()).await.expect("sandbox");
    machine.client.create_sandbox(request).await.expect("sandbox again");
    busybox(&machine, "c1");

    let plain = spec(process(&["sleep", "1000"]));
    let error =
        machine.client.create_container(create("c1", &plain, api::Stdio::default())).await.expect_err("refused");
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");

    let mut mapped = plain;
    mapped["linux"]["namespaces"].as_array_mut().expect("array").push(json!({ "type": "user" }));
    mapped["process"]["rlimits"] = json!([{ "type": "RLIMIT_MEMLOCK", "soft": 1_u64 << 30, "hard": 1_u64 << 40 }]);
    machine.client.create_container(create("c1", &mapped, api::Stdio::default())).await.expect("create");
    machine.client.start_process(start("c1", "")).await.expect("start");

    let script =
        "cat /proc/self/uid_map; id -u; hostname; ls /sys/class/net; grep -c mqueue /proc/filesystems; ulimit -H -l";
    let mut look = process(&["sh", "-c", script]);
    look["rlimits"] = mapped["process"]["rlimits"].clone();
    let (status, output) = run(&mut machine, "c1", "look", look).await;
    let words: Vec<_> = output.split_whitespace().collect();
    assert_eq!((status, words), (0, vec!["0", "100000", "65536", "0", "pod", "lo", "1", "1073741824"]));

    let mut outside = process(&["true"]);
    outside["user"]["uid"] = json!(70_000);
    let exec = Exec { id: "c1", exec: "outside", process: outside, stdio: api::Stdio::default() };
    let error = exec.start(&mut machine).await.expect_err("refused");
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    assert_eq!(error.message(), "process.user.uid 70000 is not mapped in the pod's user namespace");
}
