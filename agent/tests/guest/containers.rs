//! Containers: their start and end, what confines them, and a control connection that breaks meanwhile.

use bulkhead_proto::agent as api;
use serde_json::json;

use crate::machine::{self, Machine, read_all};
use crate::requests::{Exec, busybox, create, delete, kill, process, run, sandbox, sleeper, spec, start};

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
    // Samples of before may still be waiting, the more of them the slower the machine.
    let mut limits = Vec::new();
    let limited = async {
        while limits.last() != Some(&(33_554_432, 50, 1)) {
            if let Some(api::event::Event::Stats(stats)) = machine.events.recv().await.expect("events").event
                && stats.container_id == "c3"
            {
                limits.push((stats.memory.expect("memory").usage_limit_bytes, stats.pids_limit, stats.pids_current));
            }
        }
    };
    let done = tokio::time::timeout(machine::DEADLINE, limited).await;
    assert!(done.is_ok(), "the samples say {limits:?}");
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
