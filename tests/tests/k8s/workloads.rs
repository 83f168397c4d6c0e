//! Controllers of pods: Deployments, StatefulSets, DaemonSets, Jobs, and budgets of disruption.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, condition, wait_for};
use bulkhead_tests::command::pause;
use bulkhead_tests::network::fetch;
use bulkhead_tests::row::Runtime;
use serde_json::{Value, json};

use crate::life::{idle, script, with};
use crate::net::server;
use crate::volumes::host_directory;

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("a rolling update of a Deployment leaves no question unanswered", rolling_update),
    Row::new("a Deployment goes from runc to Bulkhead and back, and leaves no question unanswered", both_kinds)
        .only(&[Runtime::Bulkhead]),
    Row::new("a StatefulSet starts its pods in order, and names and data outlive them", stateful),
    Row::new("a DaemonSet has one pod on the node, and updates it", daemon),
    Row::new("Jobs run to completion, and fail by their counts and exit codes", jobs),
    Row::new("a CronJob's work can be started by hand", cron),
    Row::new("a budget of disruption keeps a pod from eviction as long as it holds", budget),
];

/// For what takes several pods, one after another.
const PATIENTLY: Duration = Duration::from_mins(3);

/// A template of pods labelled `app: APP`.
pub fn template(user: &User, app: &str, spec: Value) -> Value {
    json!({"metadata": {"labels": {"app": app}}, "spec": user.pod_spec(spec)})
}

/// A Deployment, DaemonSet or StatefulSet of pods labelled with its name; `more` is the rest of its spec.
pub fn workload(kind: &str, name: &str, template: &Value, more: Value) -> Value {
    let spec = json!({"selector": {"matchLabels": {"app": name}}, "template": template});
    json!({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": with(spec, more)})
}

/// Waits until a Deployment, DaemonSet or StatefulSet, as `kind/name`, runs what it was last told.
pub fn rolled_out(user: &User, what: &str) -> Result<()> {
    let timeout = format!("--timeout={}s", PATIENTLY.as_secs());
    user.kubectl(&["rollout", "status", what, &timeout]).deadline(PATIENTLY + SOON).success()?;
    Ok(())
}

/// The pods of an app that are not about to go.
pub fn pods_of(user: &User, app: &str) -> Result<Vec<Value>> {
    let list = user.get(&["pods", "--selector", &format!("app={app}")])?;
    let mut pods = list["items"].as_array().cloned().context("no list of pods")?;
    pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    Ok(pods)
}

fn name_of(pod: &Value) -> String {
    pod["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

/// Waits until the pods of an app are so many, and those that were to go are gone; their names.
fn settled(user: &User, app: &str, count: usize) -> Result<BTreeSet<String>> {
    wait_for(&format!("{count} pods of {app} and no others"), SOON, || {
        let list = user.get(&["pods", "--selector", &format!("app={app}")])?;
        let names: BTreeSet<_> = list["items"].as_array().into_iter().flatten().map(name_of).collect();
        ensure!(names.len() == count, "there are {names:?}");
        Ok(names)
    })
}

/// Two web servers that take no harm from an update, and a Service at a port of the node, which is the answer.
fn web(user: &User, runtime: Runtime) -> Result<u16> {
    let life = json!({"lifecycle": {"preStop": {"sleep": {"seconds": 5}}}});
    let container = with(server(&["--http-override=/hostname"]), life);
    let mut template = template(user, "web", json!({"terminationGracePeriodSeconds": 20, "containers": [container]}));
    template["spec"]["runtimeClassName"] = json!(runtime.handler());
    let strategy = json!({"replicas": 2, "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}});
    user.apply(&workload("Deployment", "web", &template, strategy))?;
    let ports = json!([{"port": 80, "targetPort": 8080}]);
    user.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "selector": {"app": "web"}, "ports": ports},
    }))?;
    let port = user.get(&["service", "web"])?["spec"]["ports"][0]["nodePort"].as_u64();
    let port = u16::try_from(port.context("a Service without a port of the node")?)?;
    rolled_out(user, "deployment/web")?;
    wait_for("the Service to answer", SOON, || fetch(user.cluster.node_address().into(), port))?;
    Ok(port)
}

/// Asks a port of the node again and again until `change` is done, and fails if one question finds no answer; whoever
/// answered.
fn asked_throughout(node: Ipv4Addr, port: u16, change: impl FnOnce() -> Result<()>) -> Result<BTreeSet<String>> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            let (mut answered, mut failed, mut count) = (BTreeSet::new(), Vec::new(), 0);
            while !over.load(Ordering::Relaxed) {
                match fetch(IpAddr::V4(node), port) {
                    Ok(name) => {
                        answered.insert(name);
                    }
                    Err(error) => failed.push(format!("{error:#}")),
                }
                count += 1;
                pause(Duration::from_millis(50));
            }
            (answered, failed, count)
        });
        let changed = change();
        over.store(true, Ordering::Relaxed);
        let (answered, failed, count) = client.join().map_err(|_| anyhow!("the client panicked"))?;
        changed?;
        ensure!(failed.is_empty(), "{} of {count} questions found no answer: {failed:?}", failed.len());
        Ok(answered)
    })
}

fn rolling_update(user: &User) -> Result<()> {
    let port = web(user, user.runtime)?;
    let before = settled(user, "web", 2)?;
    let answered = asked_throughout(user.cluster.node_address(), port, || {
        user.kubectl(&["set", "env", "deployment/web", "VERSION=2"]).success()?;
        rolled_out(user, "deployment/web")?;
        settled(user, "web", 2).map(drop)
    })?;
    let after = settled(user, "web", 2)?;
    ensure!(before.is_disjoint(&after), "of {before:?} some are left: {after:?}");
    let all: BTreeSet<_> = before.union(&after).cloned().collect();
    ensure!(answered == all, "{answered:?} answered, the pods were {all:?}");
    let version = user.kubectl(&["exec", "deployment/web", "--", "sh", "-c", "echo $VERSION"]).success()?.text();
    ensure!(version == "2", "the version after the update is {version:?}");
    Ok(())
}

fn both_kinds(user: &User) -> Result<()> {
    let port = web(user, Runtime::Runc)?;
    let node = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    // How many kernels the pods have, and whether the node's is one of them.
    let kernels = |runtime: Runtime| -> Result<(usize, bool)> {
        rolled_out(user, "deployment/web")?;
        let mut kernels = BTreeSet::new();
        for name in settled(user, "web", 2)? {
            let class = user.get(&["pod", &name])?["spec"]["runtimeClassName"].clone();
            ensure!(class == runtime.handler(), "the RuntimeClass of pod {name} is {class}");
            kernels.insert(user.sh(&name, "cat /proc/sys/kernel/random/boot_id")?);
        }
        Ok((kernels.len(), kernels.contains(node.trim())))
    };
    let found = kernels(Runtime::Runc)?;
    ensure!(found == (1, true), "with runc the number of kernels, and whether the node's is there, are {found:?}");
    let answered = asked_throughout(user.cluster.node_address(), port, || {
        let class = json!({"spec": {"template": {"spec": {"runtimeClassName": Runtime::Bulkhead.handler()}}}});
        user.kubectl(&["patch", "deployment", "web", "--patch", &class.to_string()]).success()?;
        let found = kernels(Runtime::Bulkhead)?;
        ensure!(found == (2, false), "with Bulkhead the number of kernels, and whether it is the node's: {found:?}");
        user.kubectl(&["rollout", "undo", "deployment/web"]).success()?;
        let found = kernels(Runtime::Runc)?;
        ensure!(found == (1, true), "back with runc the number of kernels, and whether it is the node's: {found:?}");
        Ok(())
    })?;
    ensure!(answered.len() == 6, "of three times two pods {answered:?} answered");
    Ok(())
}

fn stateful(user: &User) -> Result<()> {
    let class = user.namespace.clone();
    let namespace = user.get(&["namespace", &class])?;
    let owner = &namespace["metadata"]["uid"];
    let directory = host_directory(user)?;
    for index in 0..2 {
        user.apply(&json!({
            "apiVersion": "v1", "kind": "PersistentVolume",
            "metadata": {
                "name": format!("{class}-{index}"),
                // So that it goes with the namespace.
                "ownerReferences": [{"apiVersion": "v1", "kind": "Namespace", "name": class, "uid": owner}],
            },
            "spec": {
                "capacity": {"storage": "10Mi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": class,
                "hostPath": {"path": directory.join(index.to_string()), "type": "DirectoryOrCreate"},
            },
        }))?;
    }
    let container = with(
        script("main", "hostname >> /data/log; exec sleep 1000000"),
        json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
    );
    let claim = json!({
        "metadata": {"name": "data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": class,
            "resources": {"requests": {"storage": "10Mi"}},
        },
    });
    user.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "db"},
        "spec": {"clusterIP": "None", "selector": {"app": "db"}, "ports": [{"port": 8080}]},
    }))?;
    let more = json!({"replicas": 2, "serviceName": "db", "volumeClaimTemplates": [claim]});
    let template = template(user, "db", json!({"containers": [container]}));
    user.apply(&workload("StatefulSet", "db", &template, more))?;
    rolled_out(user, "statefulset/db")?;
    let (first, second) = (user.get(&["pod", "db-0"])?, user.get(&["pod", "db-1"])?);
    let conditions = first["status"]["conditions"].as_array().context("no conditions")?;
    let ready = conditions.iter().find(|condition| condition["type"] == "Ready").context("it is not ready")?;
    let (ready, made) = (ready["lastTransitionTime"].as_str(), second["metadata"]["creationTimestamp"].as_str());
    ensure!(ready.is_some() && ready <= made, "db-0 was ready at {ready:?}, db-1 was made at {made:?}");

    user.delete("pod", "db-0")?;
    user.ready("db-0")?;
    let again = user.get(&["pod", "db-0"])?;
    ensure!(again["metadata"]["uid"] != first["metadata"]["uid"], "db-0 is the same pod");
    for (pod, expected) in [("db-0", "db-0\ndb-0"), ("db-1", "db-1")] {
        let log = user.sh(pod, "cat /data/log")?;
        ensure!(log == expected, "the log of {pod} is {log:?}");
    }
    let name = format!("db-0.db.{}.svc.cluster.local", user.namespace);
    let address = user.address("db-0", false)?;
    wait_for("DNS to know where db-0 is now", SOON, || {
        let told = user.sh("db-1", &format!("nslookup {name} || true"))?;
        ensure!(told.lines().any(|line| line == format!("Address: {address}")), "it is {address}, DNS tells {told}");
        Ok(())
    })?;
    user.kubectl(&["scale", "statefulset/db", "--replicas=1"]).success()?;
    let left = settled(user, "db", 1)?;
    ensure!(left.contains("db-0"), "of two pods scaled to one {left:?} is left");
    let claim = user.get(&["pvc", "data-db-1"])?;
    ensure!(claim["status"]["phase"] == "Bound", "the claim of the other is {}", claim["status"]);
    Ok(())
}

fn daemon(user: &User) -> Result<()> {
    let template = template(user, "agent", json!({"containers": [idle("main")]}));
    user.apply(&workload("DaemonSet", "agent", &template, json!({})))?;
    rolled_out(user, "daemonset/agent")?;
    let before = settled(user, "agent", 1)?;
    user.kubectl(&["set", "env", "daemonset/agent", "VERSION=2"]).success()?;
    rolled_out(user, "daemonset/agent")?;
    let after = settled(user, "agent", 1)?;
    ensure!(before != after, "the pod is still {before:?}");
    let version = user.kubectl(&["exec", "daemonset/agent", "--", "sh", "-c", "echo $VERSION"]).success()?.text();
    ensure!(version == "2", "the version after the update is {version:?}");
    Ok(())
}

/// The manifest of a Job whose pods run a shell script once; `more` is the rest of its spec.
fn job(user: &User, name: &str, text: &str, more: Value) -> Value {
    let spec = user.pod_spec(json!({"restartPolicy": "Never", "containers": [script("main", text)]}));
    let spec = with(json!({"template": {"spec": spec}}), more);
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec})
}

/// Waits until a Job is complete or has failed; its object, and the reason of that.
fn job_ended(user: &User, name: &str, kind: &str) -> Result<(Value, String)> {
    wait_for(&format!("{kind} of job {name}"), PATIENTLY, || {
        let job = user.get(&["job", name])?;
        ensure!(condition(&job, kind) == "True", "its status is {}", job["status"]);
        let conditions = job["status"]["conditions"].as_array().context("no conditions")?;
        let found = conditions.iter().find(|condition| condition["type"] == kind).context("no such condition")?;
        let reason = found["reason"].as_str().unwrap_or_default().to_owned();
        Ok((job, reason))
    })
}

fn jobs(user: &User) -> Result<()> {
    let many = json!({"completions": 3, "parallelism": 2, "completionMode": "Indexed"});
    user.apply(&job(user, "many", "echo index $JOB_COMPLETION_INDEX", many))?;
    user.apply(&job(user, "unlucky", "exit 1", json!({"backoffLimit": 1})))?;
    let on_code = json!({"containerName": "main", "operator": "In", "values": [42]});
    let policy = json!({"podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": on_code}]}});
    user.apply(&job(user, "hopeless", "exit 42", policy))?;

    let (many, _) = job_ended(user, "many", "Complete")?;
    let status = &many["status"];
    ensure!(status["succeeded"] == 3 && status["completedIndexes"] == "0-2", "the status is {status}");
    let selector = "--selector=batch.kubernetes.io/job-name=many";
    let said = user.kubectl(&["logs", selector, "--tail=-1"]).success()?.text();
    let said: BTreeSet<_> = said.lines().collect();
    ensure!(said == BTreeSet::from(["index 0", "index 1", "index 2"]), "its pods said {said:?}");
    for (name, failed, because) in [("unlucky", 2, "BackoffLimitExceeded"), ("hopeless", 1, "PodFailurePolicy")] {
        let (job, reason) = job_ended(user, name, "Failed")?;
        let status = &job["status"];
        ensure!(reason == because && status["failed"] == failed, "the status of {name} is {status}");
    }
    Ok(())
}

fn cron(user: &User) -> Result<()> {
    let work = job(user, "unused", "echo done", json!({}));
    user.apply(&json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "yearly"},
        "spec": {"schedule": "0 0 1 1 *", "jobTemplate": {"spec": work["spec"]}},
    }))?;
    user.kubectl(&["create", "job", "by-hand", "--from=cronjob/yearly"]).success()?;
    let (job, _) = job_ended(user, "by-hand", "Complete")?;
    let owner = &job["metadata"]["ownerReferences"][0];
    ensure!(owner["kind"] == "CronJob" && owner["name"] == "yearly", "the job belongs to {owner}");
    let class = &job["spec"]["template"]["spec"]["runtimeClassName"];
    ensure!(*class == user.runtime_class(), "its RuntimeClass is {class}");
    let said = user.kubectl(&["logs", "job/by-hand"]).success()?.text();
    ensure!(said == "done", "it said {said:?}");
    Ok(())
}

/// A budget that wants one pod of an app to be there.
pub fn one_of(app: &str) -> Value {
    json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": app},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": app}}},
    })
}

fn budget(user: &User) -> Result<()> {
    let pod = user.ready_pod("web", json!({"containers": [idle("main")]}))?;
    user.apply(&one_of("web"))?;
    wait_for("the budget to count the pod", SOON, || {
        let status = user.get(&["pdb", "web"])?["status"].clone();
        ensure!(status["currentHealthy"] == 1 && status["disruptionsAllowed"] == 0, "its status is {status}");
        Ok(())
    })?;
    let path = format!("/api/v1/namespaces/{}/pods/web/eviction", user.namespace);
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "web", "namespace": user.namespace},
    });
    let evict = || user.kubectl(&["create", "--raw", &path, "-f", "-"]).input(eviction.to_string()).output();
    let said = evict()?.failure()?;
    ensure!(said.contains("violate the pod's disruption budget"), "the eviction was refused with {said:?}");
    let now = user.get(&["pod", "web"])?;
    let going = &now["metadata"]["deletionTimestamp"];
    ensure!(now["metadata"]["uid"] == pod["metadata"]["uid"] && going.is_null(), "the pod went: {}", now["status"]);
    user.delete("pdb", "web")?;
    evict()?.success()?;
    settled(user, "web", 0).map(drop)
}
