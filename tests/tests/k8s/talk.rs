//! What people say to their pods through `kubectl`: logs, exec, attach, cp, port-forward, run and debug.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, container_status, wait_for};
use bulkhead_tests::image::{BUSYBOX, hex};
use bulkhead_tests::network::fetch;
use bulkhead_tests::terminal::Terminal;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::life::{PAGE, ended, idle, script, with};

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("logs can be followed, cut, dated, told apart by container, and had of the life before", logs),
    Row::new("exec passes input, both outputs and the exit code, and names what does not exist", exec),
    Row::new("a terminal has the size of the user's, also when that changes, and Control-C interrupts", terminal),
    Row::new("attach and run -i carry lines both ways, and run tells the exit code and cleans up", attach),
    Row::new("cp carries fifty megabytes into a pod and back", copy),
    Row::new("port-forward leads to a pod and to a Service, also to what listens on 127.0.0.1 only", port_forward),
    Row::new("a debug container sees the processes, files and network of its target", debug),
];

/// What a shell in one of a pod's containers writes to its stdout; it has to exit with 0.
pub fn sh_in(user: &User, pod: &str, container: &str, script: &str) -> Result<String> {
    Ok(user.kubectl(&["exec", pod, "-c", container, "--", "sh", "-c", script]).success()?.text())
}

/// What one of a pod's containers wrote.
pub fn logs_of(user: &User, pod: &str, container: &str) -> Result<String> {
    Ok(user.kubectl(&["logs", pod, "-c", container]).success()?.text())
}

/// Waits for an event of a pod with `text` in its message.
pub fn wait_event(user: &User, pod: &str, reason: &str, text: &str) -> Result<()> {
    let selector = format!("involvedObject.name={pod},reason={reason}");
    wait_for(&format!("an event {reason} of pod {pod} with {text:?}"), SOON, || {
        let events = user.get(&["events", "--field-selector", &selector])?;
        let events = events["items"].as_array().cloned().unwrap_or_default();
        let messages: Vec<_> = events.iter().filter_map(|event| event["message"].as_str()).collect();
        ensure!(messages.iter().any(|message| message.contains(text)), "such events say {messages:?}");
        Ok(())
    })
}

/// Bytes without a pattern, the same ones every time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    words.take(length / 8).flat_map(u64::to_le_bytes).collect()
}

fn logs(user: &User) -> Result<()> {
    let steady = "for n in 1 2 3; do echo line $n; done; echo a complaint >&2; \
                  until test -e /tmp/go; do sleep 0.2; done; echo line 4";
    let reborn = "test -e /scratch/mark && { echo second life; exec sleep 1000000; }; touch /scratch/mark; \
                  echo first life; exit 1";
    let reborn = with(script("reborn", reborn), json!({"volumeMounts": [{"name": "work", "mountPath": "/scratch"}]}));
    user.pod(
        "writer",
        json!({
            "restartPolicy": "OnFailure", "volumes": [{"name": "work", "emptyDir": {}}],
            "containers": [script("steady", steady), reborn],
        }),
    )?;
    user.wait_pod("writer", "to be restarted in part", SOON, |pod| {
        let status = container_status(pod, "reborn")?;
        ensure!(status["restartCount"] == 1 && status["ready"] == true, "its status is {status}");
        Ok(())
    })?;
    user.ready("writer")?;
    let following = user.kubectl(&["logs", "writer", "-c", "steady", "--follow"]).start()?;
    // The container may end before the exec does, and takes it along.
    user.kubectl(&["exec", "writer", "-c", "steady", "--", "touch", "/tmp/go"]).output()?;
    let followed = following.finish()?.success()?.text();
    let (complaints, lines): (Vec<_>, Vec<_>) = followed.lines().partition(|line| *line == "a complaint");
    ensure!(complaints.len() == 1 && lines == ["line 1", "line 2", "line 3", "line 4"], "followed: {followed:?}");

    let of = |args: &[&str]| -> Result<String> { Ok(user.kubectl(&["logs", "writer"]).args(args).success()?.text()) };
    ensure!(of(&["-c", "steady", "--tail=1"])? == "line 4", "the tail is {:?}", of(&["-c", "steady", "--tail=1"])?);
    wait_for("the log of the second life", SOON, || {
        let (now, before) = (of(&["-c", "reborn"])?, of(&["-c", "reborn", "--previous"])?);
        ensure!(now == "second life" && before == "first life", "the logs are {now:?}, and {before:?} before");
        Ok(())
    })?;
    let dated = of(&["-c", "reborn", "--timestamps"])?;
    let (date, text) = dated.split_once(' ').with_context(|| format!("no date in {dated:?}"))?;
    let is_date = date.len() >= 20 && date.starts_with("20") && date.as_bytes().get(10) == Some(&b'T');
    ensure!(is_date && text == "second life", "with its date, the log is {dated:?}");
    let all = of(&["--all-containers", "--prefix", "--tail=1"])?;
    for line in ["[pod/writer/steady] line 4", "[pod/writer/reborn] second life"] {
        ensure!(all.lines().any(|other| other == line), "the log of all containers has no {line:?}: {all:?}");
    }
    Ok(())
}

fn exec(user: &User) -> Result<()> {
    let other = with(idle("other"), json!({"env": [{"name": "WHO", "value": "the other"}]}));
    user.ready_pod("listener", json!({"containers": [idle("main"), other]}))?;
    let output = user.exec("listener", &["sh", "-c", "echo out; echo err >&2; exit 42"]).output()?.exited(42)?;
    ensure!(output.text() == "out" && output.stderr.starts_with("err\n"), "{}", output.describe());
    let killed = user.exec("listener", &["sh", "-c", "kill -9 $$"]).output()?;
    ensure!(killed.code == 137, "after SIGKILL: {}", killed.describe());
    let input = noise(4_000_000);
    let digest = hex(&Sha256::digest(&input));
    let hashing = user.kubectl(&["exec", "-i", "listener", "-c", "main", "--", "sha256sum"]).input(input);
    let said = hashing.success()?.text();
    ensure!(said.starts_with(&digest), "of other bytes came {said:?}");
    // What was not put in is not there, and the end of the input is seen.
    let said = user.kubectl(&["exec", "-i", "listener", "-c", "main", "--", "wc", "-c"]).input("").success()?.text();
    ensure!(said == "0", "of no input came {said:?}");
    let said = sh_in(user, "listener", "other", "echo $WHO")?;
    ensure!(said == "the other", "the other container said {said:?}");
    let said = user.exec("listener", &["no-such-program"]).output()?.failure()?;
    ensure!(said.contains("no-such-program") && said.contains("not found"), "kubectl said {said:?}");
    let said = user.sh("listener", "echo well")?;
    ensure!(said == "well", "after that, exec said {said:?}");
    Ok(())
}

fn terminal(user: &User) -> Result<()> {
    user.ready_pod("listener", json!({"containers": [idle("main")]}))?;
    let script = "trap 'echo \"now $(stty size)\"' WINCH; trap 'exit 9' INT; tty; \
                  while :; do echo \"size $(stty size)\"; sleep 0.3; done";
    let run = user.kubectl(&["exec", "-i", "-t", "listener", "--", "sh", "-c", script]);
    let mut terminal = Terminal::of(&run, 31, 97)?;
    terminal.expect("/dev/pts/", SOON)?;
    // The size comes a moment after the program has started.
    terminal.expect("size 31 97", SOON)?;
    terminal.resize(40, 101)?;
    terminal.expect("now 40 101", SOON)?;
    terminal.send("\u{3}")?;
    let code = terminal.wait(SOON)?;
    ensure!(code == 9, "after Control-C, kubectl exited with {code}");
    Ok(())
}

fn attach(user: &User) -> Result<()> {
    let answering = "while read -r line; do echo \"heard $line\"; test \"$line\" = bye && exit 7; done";
    let main = with(script("main", answering), json!({"stdin": true}));
    user.ready_pod("listener", json!({"containers": [main]}))?;
    let mut attached = Terminal::behind_pipe(&user.kubectl(&["attach", "-i", "listener"]))?;
    converse(&mut attached)?;
    drop(attached);
    let status = container_status(&user.get(&["pod", "listener"])?, "main")?;
    let runs_on = status["restartCount"] == 0 && status["state"]["running"].is_object();
    ensure!(runs_on, "the program ended with its client: {status}");
    ensure!(user.logs("listener")?.starts_with("heard line 1"), "the log is {:?}", user.logs("listener")?);

    let overrides = json!({"apiVersion": "v1", "spec": user.pod_spec(json!({}))}).to_string();
    let run = user.kubectl(&["run", "passing", "--image", BUSYBOX, "--restart=Never", "--rm", "-i", "--overrides"]);
    let run = run.arg(overrides).args(["--command", "--", "sh", "-c", answering]);
    let mut running = Terminal::behind_pipe(&run)?;
    converse(&mut running)?;
    running.send("bye\n")?;
    running.expect("heard bye", SOON)?;
    // The end of the input of what stands before the pipe.
    running.send("\u{4}")?;
    let code = running.wait(SOON)?;
    ensure!(code == 7, "kubectl run exited with {code}");
    wait_for("the pod of kubectl run to be gone", SOON, || {
        let said = user.kubectl(&["get", "pod", "passing"]).output()?.failure()?;
        ensure!(said.contains("NotFound"), "kubectl said {said:?}");
        Ok(())
    })
}

/// Says lines until one is answered: stdin is attached before stdout, so that the first answers may be missed.
fn converse(terminal: &mut Terminal) -> Result<()> {
    let mut number = 0;
    wait_for("an answer", SOON, || {
        number += 1;
        terminal.send(&format!("line {number}\n"))?;
        terminal.expect(&format!("heard line {number}"), Duration::from_secs(1))
    })
}

fn copy(user: &User) -> Result<()> {
    user.ready_pod("keeper", json!({"containers": [idle("main")]}))?;
    let directory = tempfile::tempdir().context("make a directory")?;
    let (there, back) = (directory.path().join("there"), directory.path().join("back"));
    let content = noise(50_000_000);
    fs::write(&there, &content)?;
    let copy = |from: &str, to: &str| user.kubectl(&["cp", from, to]).deadline(Duration::from_mins(4)).success();
    copy(&there.display().to_string(), "keeper:/tmp/file")?;
    let digest = hex(&Sha256::digest(&content));
    let said = user.sh("keeper", "sha256sum /tmp/file")?;
    ensure!(said.starts_with(&digest), "other bytes came to the pod: {said:?}");
    copy("keeper:/tmp/file", &back.display().to_string())?;
    ensure!(fs::read(&back)? == content, "other bytes came back");
    Ok(())
}

/// A `kubectl port-forward` that runs, and the port on this machine.
fn forward(user: &User, target: &str, port: &str) -> Result<(Terminal, u16)> {
    const SAID: &str = "Forwarding from 127.0.0.1:";
    let terminal = Terminal::of(&user.kubectl(&["port-forward", target, port]), 24, 200)?;
    terminal.expect(SAID, SOON)?;
    terminal.expect(" -> ", SOON)?;
    let shown = terminal.shown();
    let local = shown.split_once(SAID).and_then(|(_, rest)| rest.split_once(" -> ")?.0.parse::<u16>().ok());
    let local = local.with_context(|| format!("no local port in {shown:?}"))?;
    Ok((terminal, local))
}

fn port_forward(user: &User) -> Result<()> {
    let server = |name: &str, listen: &str| {
        let command = ["httpd", "-f", "-p", listen, "-h", "/www"];
        json!({"name": name, "image": BUSYBOX, "command": command})
    };
    let mut open = server("open", "8080");
    // The Service knows the port by its name.
    open["ports"] = json!([{"name": "web", "containerPort": 8080}]);
    user.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "pages"},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": "web"}]},
    }))?;
    user.ready_pod("server", json!({"containers": [open, server("closed", "127.0.0.1:8081")]}))?;

    // Nothing listens here, which is no harm to the others.
    let (dead, port) = forward(user, "pod/server", ":9999")?;
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("dial kubectl's port")?;
    client.set_read_timeout(Some(SOON))?;
    let mut answer = Vec::new();
    // It ends or is reset, and does not hang.
    if let Err(error) = client.read_to_end(&mut answer) {
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "the connection was not closed: {error}");
    }
    ensure!(answer.is_empty(), "where nothing listens, there was an answer of {} bytes", answer.len());
    drop(dead);
    for (target, port) in [("pod/server", ":8080"), ("pod/server", ":8081"), ("service/pages", ":80")] {
        let (terminal, local) = forward(user, target, port)?;
        for _ in 0..2 {
            let page = fetch(IpAddr::V4(Ipv4Addr::LOCALHOST), local);
            let page = page.with_context(|| format!("{target} {port}; kubectl showed {:?}", terminal.shown()))?;
            ensure!(page.trim_end() == PAGE, "from {target} {port} came {page:?}");
        }
    }
    Ok(())
}

fn debug(user: &User) -> Result<()> {
    let command = ["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"];
    user.ready_pod("subject", json!({"containers": [{"name": "main", "image": BUSYBOX, "command": command}]}))?;
    user.sh("subject", "echo evidence > /tmp/note")?;
    let look = "cat /proc/1/root/tmp/note; tr '\\0' ' ' < /proc/1/cmdline; echo; \
                wget -q -O - http://127.0.0.1:8080/";
    let debug = user.kubectl(&["debug", "subject", "--image", BUSYBOX, "--target=main", "--container=debugger"]);
    debug.args(["--profile=general", "--", "sh", "-c", look]).success()?;
    let end = user.wait_pod("subject", "to have been looked into", SOON, |pod| ended(pod, "debugger"))?;
    let said = logs_of(user, "subject", "debugger")?;
    ensure!(end.0 == 0, "the debug container ended with {end:?} and wrote {said:?}");
    let lines: Vec<_> = said.lines().map(str::trim_end).collect();
    ensure!(lines == ["evidence", "httpd -f -p 127.0.0.1:8080 -h /www", PAGE], "it found {said:?}");
    let main = container_status(&user.get(&["pod", "subject"])?, "main")?;
    ensure!(main["restartCount"] == 0 && main["ready"] == true, "the target is the worse for it: {main}");
    Ok(())
}
