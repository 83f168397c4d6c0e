//! Execs, and the streams of every process.

use bulkhead_proto::agent as api;
use serde_json::json;

use crate::machine::{self, Machine, read_all, write_all};
use crate::requests::{Exec, busybox, create, delete, process, run, sandbox, sleeper, spec, start};

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
