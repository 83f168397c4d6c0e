//! Probes by command, HTTP, TCP and gRPC, and what the kubelet does about them.

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::cluster::images::AGNHOST;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, condition, container_status};
use serde_json::{Value, json};

use crate::life::{idle, script, with};
use crate::talk::{sh_in, wait_event};

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("a container is ready when its probe says so, by command, HTTP, TCP and gRPC", readiness),
    Row::new("a container whose liveness probe fails is restarted, by command, HTTP, TCP and gRPC", liveness),
    Row::new("a startup probe holds the others back, and one that fails or hangs ends the container", startup),
];

/// One container of each kind of probe; they share the pod's ports.
const KINDS: [&str; 4] = ["command", "http", "tcp", "grpc"];

/// A probe that asks what the container of this kind offers, every second.
fn probe(kind: &str, failures: u32) -> Value {
    let handler = match kind {
        "http" => json!({"httpGet": {"path": "/up", "port": 8081}}),
        "tcp" => json!({"tcpSocket": {"port": 8082}}),
        "grpc" => json!({"grpc": {"port": 5000}}),
        _ => json!({"exec": {"command": ["test", "-e", "/tmp/up"]}}),
    };
    // An answer that takes long is right on a busy machine.
    with(handler, json!({"periodSeconds": 1, "timeoutSeconds": 20, "failureThreshold": failures}))
}

/// A server of gRPC's health protocol, which is told by HTTP what to answer.
fn health_server() -> Value {
    let command = ["/agnhost", "grpc-health-checking", "--port=5000", "--http-port=8083"];
    json!({"name": "grpc", "image": AGNHOST, "command": command})
}

/// Has the gRPC server answer that it does not serve.
fn stop_serving(user: &User, pod: &str) -> Result<()> {
    sh_in(user, pod, "command", "wget -q -O - http://127.0.0.1:8083/make-not-serving")?;
    Ok(())
}

/// Waits until the containers of all kinds run, and are ready or not as said.
fn wait_ready(user: &User, pod: &str, expected: [bool; 4]) -> Result<Value> {
    user.wait_pod(pod, &format!("to be ready in {expected:?} of {KINDS:?}"), SOON, |pod| {
        for (kind, ready) in KINDS.into_iter().zip(expected) {
            let status = container_status(pod, kind)?;
            ensure!(status["state"]["running"].is_object() && status["ready"] == ready, "{kind}: {status}");
        }
        let all = if expected == [true; 4] { "True" } else { "False" };
        ensure!(condition(pod, "Ready") == all, "the pod's conditions are {}", pod["status"]["conditions"]);
        Ok(pod.clone())
    })
}

fn restart_count(pod: &Value, container: &str) -> Result<i64> {
    container_status(pod, container)?["restartCount"].as_i64().context("no count of restarts")
}

fn readiness(user: &User) -> Result<()> {
    let containers = [
        idle("command"),
        script("http", "exec httpd -f -p 8081 -h /tmp"),
        script("tcp", "until test -e /tmp/up; do sleep 0.2; done; exec httpd -f -p 8082 -h /tmp"),
        health_server(),
    ];
    let probed = |(container, kind): (Value, &str)| with(container, json!({"readinessProbe": probe(kind, 1)}));
    let containers: Vec<_> = containers.into_iter().zip(KINDS).map(probed).collect();
    user.pod("probed", json!({"containers": containers}))?;

    wait_ready(user, "probed", [false, false, false, true])?;
    for kind in ["command", "http", "tcp"] {
        sh_in(user, "probed", kind, "touch /tmp/up")?;
    }
    wait_ready(user, "probed", [true; 4])?;
    for kind in ["command", "http"] {
        sh_in(user, "probed", kind, "rm /tmp/up")?;
    }
    stop_serving(user, "probed")?;
    let pod = wait_ready(user, "probed", [false, false, true, false])?;
    for kind in KINDS {
        let count = restart_count(&pod, kind)?;
        ensure!(count == 0, "container {kind} was restarted {count} times for not being ready");
    }
    Ok(())
}

fn liveness(user: &User) -> Result<()> {
    let containers = [
        script("command", "touch /tmp/up; exec sleep 1000000"),
        script("http", "touch /tmp/up; exec httpd -f -p 8081 -h /tmp"),
        script("tcp", "httpd -p 8082 -h /tmp; exec sleep 1000000"),
        health_server(),
    ];
    // Without the first, the second would end whoever is slow to start.
    let probed = |(container, kind): (Value, &str)| {
        let probes = json!({"startupProbe": probe(kind, 90), "livenessProbe": probe(kind, 2)});
        with(container, probes)
    };
    let containers: Vec<_> = containers.into_iter().zip(KINDS).map(probed).collect();
    user.pod("probed", json!({"containers": containers}))?;

    let pod = wait_ready(user, "probed", [true; 4])?;
    for kind in KINDS {
        ensure!(restart_count(&pod, kind)? == 0, "container {kind} was restarted while it was well: {pod}");
    }
    stop_serving(user, "probed")?;
    for (kind, harm) in [("command", "rm /tmp/up"), ("http", "rm /tmp/up"), ("tcp", "killall httpd")] {
        sh_in(user, "probed", kind, harm)?;
    }
    let counts = user.wait_pod("probed", "to be restarted in all parts", SOON, |pod| {
        let counts = KINDS.into_iter().map(|kind| restart_count(pod, kind)).collect::<Result<Vec<_>>>()?;
        ensure!(counts.iter().all(|count| *count > 0), "the containers were restarted {counts:?} times");
        Ok(counts)
    })?;
    ensure!(counts == [1; 4], "of {KINDS:?} each should have been restarted once, it was {counts:?} times");
    wait_ready(user, "probed", [true; 4])?;
    Ok(())
}

fn startup(user: &User) -> Result<()> {
    let slow = json!({"startupProbe": probe("command", 200), "livenessProbe": probe("command", 1)});
    let never = json!({"exec": {"command": ["test", "-e", "/no/such"]}});
    let never = with(never, json!({"periodSeconds": 1, "timeoutSeconds": 20, "failureThreshold": 2}));
    let hangs = json!({"exec": {"command": ["sleep", "1000"]}});
    let hangs = with(hangs, json!({"periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 1}));
    let containers = [
        with(idle("slow"), slow),
        with(idle("stuck"), json!({"startupProbe": never})),
        with(idle("hung"), json!({"livenessProbe": hangs})),
    ];
    user.pod("probed", json!({"containers": containers}))?;
    // Long after its liveness probe, which has no patience, would have ended it.
    let slow = user.wait_pod("probed", "to be restarted in part", SOON, |pod| {
        for container in ["stuck", "hung"] {
            let status = container_status(pod, container)?;
            ensure!(restart_count(pod, container)? > 0, "{container} was not restarted: {status}");
        }
        container_status(pod, "slow")
    })?;
    let waits = slow["started"] == false && slow["ready"] == false && slow["restartCount"] == 0;
    ensure!(waits && slow["state"]["running"].is_object(), "the slow container's status is {slow}");
    wait_event(user, "probed", "Unhealthy", "Startup probe failed")?;
    wait_event(user, "probed", "Unhealthy", "timed out")?;
    sh_in(user, "probed", "slow", "touch /tmp/up")?;
    let slow = user.wait_pod("probed", "to have started", SOON, |pod| {
        let status = container_status(pod, "slow")?;
        ensure!(status["started"] == true && status["ready"] == true, "the slow container's status is {status}");
        Ok(status)
    })?;
    ensure!(slow["restartCount"] == 0, "the slow container was restarted: {slow}");
    Ok(())
}
