//! Containers from their start to their end: order, hooks, restarts and last words; and what those of a pod share.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::cluster::NODE;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, container_status, wait_for};
use bulkhead_tests::image::BUSYBOX;
use serde_json::{Value, json};

use crate::talk::{logs_of, wait_event};
use crate::volumes::host_directory;

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("init containers run one after another before the others, which a failed one keeps from running", init),
    Row::new("a sidecar is up before the containers start and ends after them", sidecar),
    Row::new("hooks run after the start and before the end, and the grace period is the program's", hooks),
    Row::new("exit codes, reasons and last words of containers are told", exits),
    Row::new("containers restart as their policy says, and a pod ends at its deadline", restarts),
    Row::new("containers of a pod share localhost, and one another's processes where asked", together),
    Row::new("a pod has the hostname, hosts and DNS that it asks for", names),
    Row::new(
        "environment variables come from wherever the pod says, under any name, and DNS is the cluster's",
        environment,
    ),
];

/// What a web server of the image serves as its first page.
pub const PAGE: &str = "a page from inside the pod";

/// A container that runs a shell script; Kubernetes makes one dollar sign of two that stand together.
pub fn script(name: &str, script: &str) -> Value {
    json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script]})
}

/// A container that waits to be ended, which takes a SIGKILL.
pub fn idle(name: &str) -> Value {
    json!({"name": name, "image": BUSYBOX, "command": ["sleep", "1000000"]})
}

/// `object` with more fields.
pub fn with(mut object: Value, more: Value) -> Value {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}

/// Exit code and reason of a container that has ended; an error if it has not.
pub fn ended(pod: &Value, container: &str) -> Result<(i64, String)> {
    let status = container_status(pod, container)?;
    let end = &status["state"]["terminated"];
    let code = end["exitCode"].as_i64().with_context(|| format!("container {container} has not ended: {status}"))?;
    Ok((code, end["reason"].as_str().unwrap_or_default().to_owned()))
}

fn init(user: &User) -> Result<()> {
    let step = |name: &str, text: &str| {
        with(script(name, text), json!({"volumeMounts": [{"name": "work", "mountPath": "/scratch"}]}))
    };
    // Were they to run side by side, the first would come last.
    let first = step("first", "sleep 1; echo first >> /scratch/list");
    let second = step("second", "echo second >> /scratch/list");
    let main = step("main", "echo main >> /scratch/list; cat /scratch/list");
    let spec = |init: &[Value], main: Value| {
        let volumes = json!([{"name": "work", "emptyDir": {}}]);
        json!({"restartPolicy": "Never", "volumes": volumes, "initContainers": init, "containers": [main]})
    };
    user.pod("orderly", spec(&[first, second], main))?;
    user.pod("broken", spec(&[step("broken", "exit 6")], idle("main")))?;
    let pod = user.finished("orderly")?;
    ensure!(pod["status"]["phase"] == "Succeeded", "the status is {}", pod["status"]);
    let order = logs_of(user, "orderly", "main")?;
    ensure!(order == "first\nsecond\nmain", "they ran in the order {order:?}");
    let pod = user.finished("broken")?;
    ensure!(pod["status"]["phase"] == "Failed", "the status is {}", pod["status"]);
    let end = ended(&pod, "broken")?;
    ensure!(end == (6, "Error".into()), "the init container ended with {end:?}");
    let main = container_status(&pod, "main")?;
    ensure!(main["containerID"].is_null(), "after a failed init container the main one was made: {main}");
    Ok(())
}

fn sidecar(user: &User) -> Result<()> {
    let up = json!({"exec": {"command": ["test", "-e", "/tmp/up"]}, "periodSeconds": 1, "failureThreshold": 60});
    // The server takes its time, which the main container, that asks once, has to be given.
    let server = script(
        "server",
        "trap 'echo bye; exit 3' TERM; sleep 2; httpd -p 8080 -h /www; touch /tmp/up; \
         while :; do sleep 1000 & wait $!; done",
    );
    let server = with(server, json!({"restartPolicy": "Always", "startupProbe": up}));
    let pod = user.finished_pod(
        "helped",
        json!({
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 30, "initContainers": [server],
            "containers": [script("main", "wget -q -O - http://127.0.0.1:8080/; sleep 1")],
        }),
    )?;
    ensure!(pod["status"]["phase"] == "Succeeded", "the status is {}", pod["status"]);
    let page = logs_of(user, "helped", "main")?;
    ensure!(page == PAGE, "the sidecar served {page:?}");
    let end = ended(&pod, "server")?;
    ensure!(end == (3, "Error".into()), "the sidecar ended with {end:?}");
    let finished = |container: &str| -> Result<String> {
        let status = container_status(&pod, container)?;
        Ok(status["state"]["terminated"]["finishedAt"].as_str().context("no time of its end")?.to_owned())
    };
    let (main, server) = (finished("main")?, finished("server")?);
    ensure!(main <= server, "the sidecar ended at {server}, the main container at {main}");
    Ok(())
}

fn hooks(user: &User) -> Result<()> {
    let out = host_directory(user)?;
    let mount = json!({"volumeMounts": [{"name": "out", "mountPath": "/out"}]});
    let waiting = "while :; do sleep 1000 & wait $!; done";
    // The exit code tells whether the hook had run when the signal came.
    let by_command = script("command", &format!("trap 'test -e /out/stopping && exit 7; exit 8' TERM; {waiting}"));
    let lifecycle = json!({
        "postStart": {"exec": {"command": ["sh", "-c", "sleep 1; echo started > /out/started"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "sleep 1; touch /out/stopping"]}},
    });
    let by_command = with(with(by_command, mount.clone()), json!({"lifecycle": lifecycle}));
    // It answers when it has been asked: the first to close the connection may lose what the other says.
    let answer = "mkfifo /tmp/answer; nc -l -p 8080 <> /tmp/answer | { read -r line; echo \"$line\" > /out/request; \
                  printf 'HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n' > /tmp/answer; }";
    let by_http = script("http", &format!("trap 'exit 9' TERM; {answer} & {waiting}"));
    let lifecycle = json!({"preStop": {"httpGet": {"path": "/bye", "port": 8080}}});
    let by_http = with(with(by_http, mount), json!({"lifecycle": lifecycle}));
    let mut pod = user.manifest(
        "hooked",
        json!({
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 5,
            "volumes": [{"name": "out", "hostPath": {"path": out}}],
            "containers": [by_command, by_http, script("deaf", "trap '' TERM; while :; do sleep 1; done")],
        }),
    );
    // It keeps the object, which tells how the containers ended, when the pod has gone.
    pod["metadata"]["finalizers"] = json!(["bulkhead.test/keep"]);
    user.apply(&pod)?;
    let failing = json!({"lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", "exit 4"]}}}});
    user.pod("unlucky", json!({"restartPolicy": "Never", "containers": [with(idle("main"), failing)]}))?;

    let checked = hooked(user, &out.join("started"));
    let released =
        user.kubectl(&["patch", "pod", "hooked", "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#]);
    let released = released.success();
    checked?;
    released?;
    let request = fs::read_to_string(out.join("request")).context("read what the HTTP hook sent")?;
    ensure!(request.starts_with("GET /bye HTTP/1.1\r\n"), "the HTTP hook sent {request:?}");
    let end = ended(&user.finished("unlucky")?, "main")?;
    ensure!(end == (137, "Error".into()), "the container whose hook failed ended with {end:?}");
    wait_event(user, "unlucky", "FailedPostStartHook", "PostStartHook failed")
}

/// Deletes the pod of the hooks and sees how it ends.
fn hooked(user: &User, started: &Path) -> Result<()> {
    user.ready("hooked")?;
    wait_for("the hook after the start", SOON, || {
        let said = fs::read_to_string(started)?;
        ensure!(said == "started\n", "it wrote {said:?}");
        Ok(())
    })?;
    let deleted = Instant::now();
    user.kubectl(&["delete", "pod", "hooked", "--wait=false"]).success()?;
    let ends = user.wait_pod("hooked", "to end", SOON, |pod| {
        ["command", "http", "deaf"].iter().map(|container| ended(pod, container)).collect::<Result<Vec<_>>>()
    })?;
    let took = deleted.elapsed();
    ensure!(ends == [7_i64, 9, 137].map(|code| (code, "Error".to_owned())), "the containers ended with {ends:?}");
    ensure!(took >= Duration::from_secs(5), "five seconds of grace were over in {took:?}");
    Ok(())
}

fn exits(user: &User) -> Result<()> {
    let last_lines = json!({"terminationMessagePolicy": "FallbackToLogsOnError"});
    let in_a_file = json!({"terminationMessagePath": "/tmp/end"});
    let small = json!({"resources": {"limits": {"memory": "24Mi"}}});
    // It keeps what it reads until a line ends, and /dev/zero has no line.
    let greedy = json!({"name": "greedy", "image": BUSYBOX, "command": ["tail", "/dev/zero"]});
    // Exit code, reason and message of each.
    let containers = [
        (script("fine", "exit 0"), 0, "Completed", ""),
        (script("three", "exit 3"), 3, "Error", ""),
        (script("most", "exit 255"), 255, "Error", ""),
        (script("crashed", "sh -c 'kill -SEGV $$$$'; exit $?"), 139, "Error", ""),
        (script("note", "echo gone wrong > /dev/termination-log; exit 1"), 1, "Error", "gone wrong"),
        (with(script("elsewhere", "echo in a file > /tmp/end"), in_a_file), 0, "Completed", "in a file"),
        (with(script("lines", "echo last words >&2; exit 1"), last_lines.clone()), 1, "Error", "last words"),
        (with(script("content", "echo all is well"), last_lines), 0, "Completed", ""),
        (with(greedy, small), 137, "OOMKilled", ""),
    ];
    let mut specs: Vec<_> = containers.iter().map(|(spec, ..)| spec.clone()).collect();
    specs.push(json!({"name": "missing", "image": BUSYBOX, "command": ["/no/such/program"]}));
    let pod = user.finished_pod("ends", json!({"restartPolicy": "Never", "containers": specs}))?;
    ensure!(pod["status"]["phase"] == "Failed", "the status is {}", pod["status"]);
    let end_of = |name: &str| -> Result<_> {
        let (code, reason) = ended(&pod, name)?;
        let status = container_status(&pod, name)?;
        let message = status["state"]["terminated"]["message"].as_str().unwrap_or_default().trim().to_owned();
        Ok((code, reason, message))
    };
    for (spec, code, reason, message) in containers {
        let name = spec["name"].as_str().context("a container without a name")?;
        let end = end_of(name)?;
        ensure!(end == (code, reason.into(), message.into()), "container {name} ended with {end:?}");
    }
    let (code, reason, message) = end_of("missing")?;
    ensure!(code == 128 && reason == "StartError", "a program that does not exist ended with {code}, {reason}");
    ensure!(message.contains("/no/such/program"), "the message does not name the program: {message:?}");
    Ok(())
}

fn restarts(user: &User) -> Result<()> {
    let second_try = with(
        script("main", "test -e /scratch/tried && exit 0; touch /scratch/tried; exit 5"),
        json!({"volumeMounts": [{"name": "work", "mountPath": "/scratch"}]}),
    );
    let work = json!([{"name": "work", "emptyDir": {}}]);
    user.pod("always", json!({"containers": [script("main", "exit 4")]}))?;
    user.pod("on-failure", json!({"restartPolicy": "OnFailure", "volumes": work, "containers": [second_try]}))?;
    user.pod("never", json!({"restartPolicy": "Never", "containers": [script("main", "exit 5")]}))?;
    user.pod("limited", json!({"activeDeadlineSeconds": 10, "containers": [idle("main")]}))?;

    let status = user.wait_pod("always", "to wait before its next start", SOON, |pod| {
        let status = container_status(pod, "main")?;
        ensure!(status["state"]["waiting"]["reason"] == "CrashLoopBackOff", "its status is {status}");
        Ok(status)
    })?;
    ensure!(status["restartCount"].as_i64() >= Some(1), "it was not restarted before: {status}");
    ensure!(status["lastState"]["terminated"]["exitCode"] == 4, "it ended otherwise: {status}");
    for (name, phase, restarts, code) in [("on-failure", "Succeeded", 1, 0), ("never", "Failed", 0, 5)] {
        let pod = user.finished(name)?;
        ensure!(pod["status"]["phase"] == phase, "{name}: the status is {}", pod["status"]);
        let (status, end) = (container_status(&pod, "main")?, ended(&pod, "main")?.0);
        ensure!(status["restartCount"] == restarts && end == code, "{name}: the status is {status}");
    }
    let pod = user.finished("limited")?;
    ensure!(pod["status"]["reason"] == "DeadlineExceeded", "the status is {}", pod["status"]);
    Ok(())
}

fn together(user: &User) -> Result<()> {
    let command = ["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"];
    let containers = json!([idle("client"), {"name": "server", "image": BUSYBOX, "command": command}]);
    user.pod("apart", json!({"containers": containers}))?;
    user.pod("open", json!({"restartPolicy": "Never", "shareProcessNamespace": true, "containers": containers}))?;
    for (pod, shared) in [("apart", false), ("open", true)] {
        user.ready(pod)?;
        let page =
            wait_for("the other container's page", SOON, || user.sh(pod, "wget -q -O - http://127.0.0.1:8080/"))?;
        ensure!(page == PAGE, "{pod}: the other container served {page:?}");
        let processes = user.sh(pod, "ps -o args")?;
        ensure!(processes.contains("httpd -f") == shared, "{pod}: the client sees {processes}");
    }
    user.sh("open", "kill -TERM $(pidof httpd)")?;
    let end = user.wait_pod("open", "to have lost its server", SOON, |pod| ended(pod, "server"))?;
    ensure!(end == (143, "Error".into()), "a program ended by its neighbour's signal ended with {end:?}");
    Ok(())
}

fn names(user: &User) -> Result<()> {
    let spec = json!({
        "restartPolicy": "Never", "hostname": "web-0", "subdomain": "inner",
        "hostAliases": [{"ip": "10.1.2.3", "hostnames": ["one.example", "two.example"]}],
        "dnsPolicy": "None",
        "dnsConfig": {
            "nameservers": ["10.9.8.7"], "searches": ["a.example", "b.example"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "rotate"}],
        },
        "containers": [script("main", "hostname; cat /etc/hostname /etc/hosts"), script("dns", "cat /etc/resolv.conf")],
    });
    let pod = user.finished_pod("named", spec)?;
    let address = pod["status"]["podIP"].as_str().context("the pod has no address")?;
    let said = logs_of(user, "named", "main")?;
    ensure!(said.starts_with("web-0\nweb-0\n"), "hostname and /etc/hostname are {said:?}");
    let own = format!("\n{address}\tweb-0.inner.{}.svc.cluster.local\tweb-0", user.namespace);
    for line in ["\n10.1.2.3\tone.example\ttwo.example", "\n127.0.0.1\tlocalhost", &own] {
        ensure!(said.contains(line), "/etc/hosts has no line {line:?} but {said:?}");
    }
    let said = logs_of(user, "named", "dns")?;
    let lines: Vec<_> = said.lines().collect();
    // The kubelet merges options in a map, and writes them in whatever order that has.
    let is_as_asked = |options| lines == ["search a.example b.example", "nameserver 10.9.8.7", options];
    let options = ["options ndots:2 rotate", "options rotate ndots:2"];
    ensure!(options.into_iter().any(is_as_asked), "/etc/resolv.conf is {said:?}");
    Ok(())
}

fn environment(user: &User) -> Result<()> {
    let data = json!({"colour": "teal", "with-dash": "kept", "with.dot": "kept"});
    user.apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": data}))?;
    let data = json!({"word": "open sesame"});
    user.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": data}))?;
    let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
    let resource = |name: &str, unit: &str| json!({"resourceFieldRef": {"resource": name, "divisor": unit}});
    // The program itself writes its environment: a shell would leave out names that it cannot use.
    let container = json!({
        "name": "main", "image": BUSYBOX, "command": ["env"],
        "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}},
        "envFrom": [{"prefix": "all-", "configMapRef": {"name": "settings"}}],
        "env": [
            {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
            {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "key", "key": "word"}}},
            {"name": "ABSENT", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "x", "optional": true}}},
            {"name": "ADDRESS", "valueFrom": field("status.podIP")},
            {"name": "NODE", "valueFrom": field("spec.nodeName")},
            {"name": "APP", "valueFrom": field("metadata.labels['app']")},
            {"name": "MEMORY", "valueFrom": resource("limits.memory", "1Mi")},
            {"name": "CPU", "valueFrom": resource("requests.cpu", "1m")},
            {"name": "GREETING", "value": "a $(COLOUR) \"day\", $$(COLOUR) $(ABSENT)"},
            {"name": "a-b.c", "value": "d=e"},
        ],
    });
    let containers = [container, script("dns", "hostname; cat /etc/resolv.conf")];
    let pod = user.finished_pod("told", json!({"restartPolicy": "Never", "containers": containers}))?;
    let address = pod["status"]["podIP"].as_str().context("the pod has no address")?;
    let said = logs_of(user, "told", "main")?;
    let lines: Vec<_> = said.lines().collect();
    for line in [
        "COLOUR=teal",
        "WORD=open sesame",
        &format!("ADDRESS={address}"),
        &format!("NODE={NODE}"),
        "APP=told",
        "MEMORY=64",
        "CPU=100",
        "GREETING=a teal \"day\", $(COLOUR) $(ABSENT)",
        "a-b.c=d=e",
        "all-with-dash=kept",
        "all-with.dot=kept",
        "KUBERNETES_SERVICE_PORT=443",
    ] {
        ensure!(lines.contains(&line), "there is no {line:?} in {said}");
    }
    ensure!(!said.contains("ABSENT="), "what is nowhere has become a variable: {said}");
    let said = logs_of(user, "told", "dns")?;
    let domains = format!("told\nsearch {}.svc.cluster.local svc.cluster.local cluster.local", user.namespace);
    let plain = said.starts_with(&domains) && said.ends_with("options ndots:5");
    ensure!(plain, "hostname and /etc/resolv.conf of a pod that asks for nothing are {said:?}");
    Ok(())
}
