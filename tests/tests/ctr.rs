//! `ctr` runs single containers, from one shim binary, with every supported containerd.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{Output, wait_for};
use bulkhead_tests::ctr::make_root;
use bulkhead_tests::process::namespace_of;
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::tools::Version;
use serde_json::{Value, json};

const ROWS: &[Row] = &[
    Row::alone("ctr run --rm ends with the exit code of the program", exit_code),
    Row::alone("stdout and stderr of ctr run arrive apart and whole", both_streams),
    Row::alone("stdin of ctr run reaches the program", stdin),
    Row::alone("ctr run -t gives the program a terminal that follows its size", terminal),
    Row::alone("ctr task exec runs beside the program and tells its exit code", exec),
    Row::alone("ctr task kill ends the program with 128 and the signal", kill),
    // runc's own shim ends at times before it has sent its last events.
    Row::alone("events come in the order create, start, exit, delete", events).only(&[Runtime::Bulkhead]),
    Row::alone("resource limits of the spec reach the program", rlimits),
    Row::alone("tmpfs and bind mounts of ctr are there", mounts),
    // Debian's runc runs them when it has created the container.
    Row::alone("poststart hooks run on the host once the program has started", poststart).only(&[Runtime::Bulkhead]),
    Row::alone("the pid of a container that has no network leads to none of the host's", pid_without_network),
    Row::alone("a program that does not exist is an error that names it", not_found),
    Row::alone("a bind mount whose source does not exist is an error that names it", missing_mount_source),
];

fn main() -> ExitCode {
    suite::run(&Version::ALL, &[Runtime::Runc, Runtime::Bulkhead], ROWS)
}

fn exit_code(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    for code in [42, 0] {
        let id = ctr.new_id("exit");
        ctr.run(&["--rm"], &id, &["sh", "-c", &format!("exit {code}")]).output()?.exited(code)?;
    }
    Ok(())
}

fn both_streams(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("streams");
    let output = ctr.run(&["--rm"], &id, &["sh", "-c", "seq 1 20000; echo wrong >&2"]).success()?;
    let expected = (1..=20_000).map(|n| n.to_string()).collect::<Vec<_>>().join("\n") + "\n";
    ensure!(output.stdout == expected.as_bytes(), "{} of {} bytes arrived", output.stdout.len(), expected.len());
    ensure!(output.stderr.contains("wrong\n"), "stderr is {:?}", output.stderr);
    Ok(())
}

fn stdin(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("stdin");
    // ctr 1.6 does not pass the end of its own stdin on, so the program must not wait for it.
    let script = "read a; read b; echo $b $a";
    let output = ctr.run(&["--rm"], &id, &["sh", "-c", script]).input("one\ntwo\n").success()?;
    ensure!(output.text() == "two one", "stdout is {:?}", output.text());
    Ok(())
}

fn terminal(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("terminal");
    // Every size is told until the keyboard says that it was right.
    let script = "tty; while ! read -t 1 line; do stty size; done; echo \"got $line\"; exit 5";
    let run = ctr.run(&["--rm", "-t"], &id, &["sh", "-c", script]);
    let mut terminal = Terminal::of(&run, 30, 90)?;
    terminal.expect("/dev/pts/", Duration::from_secs(30))?;
    terminal.expect("30 90", Duration::from_secs(10))?;
    terminal.resize(40, 100)?;
    terminal.expect("40 100", Duration::from_secs(10))?;
    terminal.send("hello\n")?;
    terminal.expect("got hello", Duration::from_secs(10))?;
    ensure!(terminal.wait(Duration::from_secs(20))? == 5);
    Ok(())
}

fn exec(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("exec");
    ctr.run(&["-d", "--env", "COLOUR=teal"], &id, &["sleep", "1000"]).success()?;
    let exec = |exec_id: &str, script: &str| {
        ctr.command(&["task", "exec", "--exec-id", exec_id, &id, "sh", "-c", script]).output()
    };
    let output = exec("first", "echo $COLOUR; exit 3")?.exited(3)?;
    ensure!(output.text() == "teal", "stdout is {:?}", output.text());
    let tasks = ctr.command(&["task", "ls"]).success()?.text();
    let line = tasks.lines().find(|line| line.starts_with(&id)).context("ctr task ls does not list it")?;
    ensure!(line.contains("RUNNING"), "ctr task ls says {line}");
    let output = exec("second", "ps -o args | grep -c '[s]leep 1000'")?.success()?;
    ensure!(output.text() == "1", "the exec sees {:?} programs", output.text());
    ctr.remove(&id)
}

fn kill(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("kill");
    let script = "trap 'echo stopped; exit 9' USR1; echo ready; while :; do sleep 1000 & wait $!; done";
    let running = ctr.run(&["--rm"], &id, &["sh", "-c", script]).start()?;
    wait_for("the task to run", Duration::from_secs(30), || {
        let tasks = ctr.command(&["task", "ls"]).success()?.text();
        ensure!(tasks.lines().any(|line| line.starts_with(&id) && line.contains("RUNNING")), "tasks: {tasks}");
        Ok(())
    })?;
    // The shell may not have set its trap yet; an untrapped USR1 is ignored by PID 1.
    let output = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| running.finish());
        wait_for("the trap to end the program", Duration::from_secs(20), || {
            ctr.command(&["task", "kill", "--signal", "SIGUSR1", &id]).output()?;
            ensure!(waiter.is_finished(), "ctr run still waits");
            Ok(())
        })?;
        waiter.join().map_err(|_| anyhow::anyhow!("the waiting thread panicked"))?
    })?
    .exited(9)?;
    // A signal between the trap and the next word ends it without that word, and a second one may come while the first is handled.
    ensure!(output.text().contains("stopped"), "stdout is {:?}", output.text());

    let id = ctr.new_id("kill");
    ctr.run(&["-d"], &id, &["sleep", "1000"]).success()?;
    let waiting = ctr.command(&["task", "kill", "--signal", "SIGKILL", &id]).success();
    let stopped = wait_for("the task to stop", Duration::from_secs(10), || {
        let tasks = ctr.command(&["task", "ls"]).success()?.text();
        ensure!(tasks.lines().any(|line| line.starts_with(&id) && line.contains("STOPPED")), "tasks: {tasks}");
        Ok(())
    });
    let deleted = ctr.command(&["task", "delete", &id]).output()?;
    ctr.remove(&id)?;
    waiting?;
    stopped?;
    // ctr tells the code of the task as a warning.
    let said = deleted.success()?.stderr;
    ensure!(said.contains("exit code 137"), "ctr task delete said {said:?}");
    Ok(())
}

fn events(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let listener = ctr.command(&["events"]).start()?;
    let mut ids = Vec::new();
    // `ctr events` says nothing when it is ready: run containers until it has seen one whole life.
    for _ in 0..4 {
        let id = ctr.new_id("events");
        ctr.run(&["--rm"], &id, &["true"]).success()?;
        ids.push(id);
    }
    // What it says of the last one may still be under way when it is ended.
    let judged = &ids[ids.len() - 2];
    let seen = listener.terminate()?.text();
    let topics: Vec<_> = seen
        .lines()
        .filter(|line| line.contains(&format!("\"{judged}\"")))
        .filter_map(|line| line.split_whitespace().find_map(|word| word.strip_prefix("/tasks/")))
        .collect();
    ensure!(topics == ["create", "start", "exit", "delete"], "the events of {judged} are {topics:?} in\n{seen}");
    Ok(())
}

/// `ctr run` of the default specification with `change` made to it, to its end.
fn run_spec(context: &Context, id: &str, change: impl FnOnce(&mut Value)) -> Result<Output> {
    let ctr = context.ctr();
    // `ctr oci spec` prints the default specification, which `--config` takes back.
    let mut spec: Value = serde_json::from_slice(&ctr.command(&["oci", "spec"]).success()?.stdout)?;
    // With --config ctr neither unpacks the image nor fills in its command, so the root is a directory of ours.
    let root = context.scratch.join("rootfs");
    make_root(&root)?;
    spec["root"] = json!({"path": root, "readonly": false});
    spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", context.node.name));
    change(&mut spec);
    let path = context.scratch.join("config.json");
    fs::write(&path, serde_json::to_vec(&spec)?)?;
    ctr.bare_run().args(["--rm", "--config"]).arg(&path).arg(id).success()
}

fn rlimits(context: &Context) -> Result<()> {
    let id = context.ctr().new_id("rlimits");
    let output = run_spec(context, &id, |spec| {
        spec["process"]["args"] = json!(["/bin/sh", "-c", "ulimit -n; ulimit -c"]);
        spec["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 321, "hard": 654},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ]);
    })?;
    ensure!(output.text() == "321\n0", "ulimit says {:?}", output.text());
    Ok(())
}

fn poststart(context: &Context) -> Result<()> {
    let id = context.ctr().new_id("hooked");
    let (shared, private) = (context.scratch.join("shared"), context.scratch.join("private"));
    fs::create_dir(&shared).and_then(|()| fs::create_dir(&private))?;
    // Each waits for the other: a hook that came before the program would wait for its end.
    let hook = "until test -e \"$0/started\"; do sleep 0.1; done; cat > \"$1/state\"; touch \"$0/hooked\"";
    let hook = json!({
        "path": "/bin/sh", "args": ["sh", "-c", hook, shared, private],
        "env": ["PATH=/usr/bin:/bin"], "timeout": 20,
    });
    let output = run_spec(context, &id, |spec| {
        let program = "touch /shared/started; \
                       timeout 20 sh -c 'until test -e /shared/hooked; do sleep 0.1; done' && echo told";
        spec["process"]["args"] = json!(["/bin/sh", "-c", program]);
        spec["hooks"] = json!({"poststart": [hook]});
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            let options = ["rbind", "rw"];
            mounts.push(json!({"destination": "/shared", "type": "bind", "source": shared, "options": options}));
        }
    })?;
    ensure!(output.text() == "told", "stdout is {:?}", output.text());
    let state: Value = serde_json::from_slice(&fs::read(private.join("state")).context("the hook wrote nothing")?)?;
    ensure!(state["id"] == id && state["status"] == "running", "the hook was told {state}");
    Ok(())
}

fn mounts(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("mounts");
    fs::write(context.scratch.join("file"), "from the host")?;
    let bind = format!("type=bind,src={},dst=/host,options=rbind:rw", context.scratch.display());
    let tmpfs = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1048576";
    let script = "cat /host/file; echo made > /host/new; df -k /scratch | tail -1 | awk '{print \" \" $2}'";
    let output = ctr.run(&["--rm", "--mount", &bind, "--mount", tmpfs], &id, &["sh", "-c", script]).success()?;
    ensure!(output.text() == "from the host 1024", "stdout is {:?}", output.text());
    let made = fs::read_to_string(context.scratch.join("new"))?;
    ensure!(made == "made\n", "the file made inside reads {made:?}");
    Ok(())
}

fn not_found(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("missing");
    let said = ctr.run(&["--rm"], &id, &["no-such-program"]).output()?.failure()?;
    ctr.remove(&id)?;
    ensure!(said.contains("no-such-program") && said.contains("not found"), "ctr said {said:?}");
    Ok(())
}

fn missing_mount_source(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("mount");
    let missing = context.scratch.join("nothing-here");
    let bind = format!("type=bind,src={},dst=/host,options=rbind:rw", missing.display());
    let said = ctr.run(&["--rm", "--mount", &bind], &id, &["true"]).output()?.failure()?;
    ctr.remove(&id)?;
    ensure!(said.contains("nothing-here"), "ctr said {said:?}");
    Ok(())
}

/// `ctr run --cni` has plugins configure, and in the end clear, the network that the pid leads to.
fn pid_without_network(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("alone");
    ctr.run(&["-d"], &id, &["sleep", "1000"]).success()?;
    let tasks = ctr.command(&["task", "ls"]).success()?.text();
    let line = tasks.lines().find(|line| line.starts_with(&id)).context("ctr task ls does not list it")?;
    let pid = line.split_whitespace().nth(1).with_context(|| format!("no pid in {line}"))?;
    let (own, hosts) = (namespace_of(pid, "net")?, namespace_of("self", "net")?);
    ensure!(own != hosts, "{pid} is in the host's network namespace, {hosts}");
    ctr.remove(&id)
}
