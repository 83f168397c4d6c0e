//! A node in trouble: drained, tainted, crowded, with its daemons killed, and without power.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, condition, container_status, wait_for};
use bulkhead_tests::cluster::{NODE, leaks};
use bulkhead_tests::row::Runtime;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::life::{ended, idle, script, with};
use crate::volumes::host_directory;
use crate::workloads::{one_of, pods_of, rolled_out, template, workload};

/// The rows of this subject; the last takes the node's power away.
pub const ROWS: &[Row] = &[
    Row::new("a drain empties the node as far as a budget of disruption lets it, and uncordon fills it again", drain),
    Row::new("taints keep pods away and drive them out, but for those that tolerate them", taints),
    Row::new("a static pod runs as long as its manifest is there", static_pod),
    Row::new("twenty pods of both kinds start at once, each virtual machine with a kernel of its own", twenty)
        .only(&[Runtime::Bulkhead]),
    Row::new("pods outlive the kubelet, which learns how those ended that did not", kubelet_killed),
    Row::new("pods outlive containerd, those deleted meanwhile go, and new ones come", containerd_killed),
    Row::new("after a loss of power all pods run again, and nothing of the old ones is left", power)
        .only(&[Runtime::Bulkhead]),
];

/// For twenty pods to start.
const CROWDED: Duration = Duration::from_mins(5);

/// A container that counts in its log, a line in half a second.
fn counting() -> Value {
    script("main", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.5; done")
}

fn gone(user: &User, pod: &str) -> Result<()> {
    wait_for(&format!("pod {pod} to be gone"), SOON, || {
        let found = user.kubectl(&["get", "pod", pod, "--ignore-not-found", "--output=name"]).success()?.text();
        ensure!(found.is_empty(), "{found} is there");
        Ok(())
    })
}

/// What undoes a change of the node, whatever becomes of the row.
struct Undo<'a> {
    user: &'a User,
    command: &'static [&'static str],
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // The rows that follow would tell, for want of a node.
        let _ = self.user.kubectl(self.command).output();
    }
}

const UNCORDON: &[&str] = &["uncordon", NODE];
const UNTAINT: &[&str] = &["taint", "node", NODE, "bulkhead.test/reserved-"];

fn drain(user: &User) -> Result<()> {
    let template = template(user, "web", json!({"containers": [idle("main")]}));
    user.apply(&workload("Deployment", "web", &template, json!({"replicas": 2})))?;
    user.apply(&one_of("web"))?;
    rolled_out(user, "deployment/web")?;
    wait_for("the budget to allow a disruption", SOON, || {
        let status = user.get(&["pdb", "web"])?["status"].clone();
        ensure!(status["disruptionsAllowed"] == 1, "its status is {status}");
        Ok(())
    })?;
    let uids = || -> Result<BTreeSet<String>> {
        let on_node = pods_of(user, "web")?.into_iter().filter(|pod| pod["spec"]["nodeName"] == NODE);
        Ok(on_node.filter_map(|pod| Some(pod["metadata"]["uid"].as_str()?.to_owned())).collect())
    };
    let before = uids()?;
    // Only the pods of this row: the cluster's own are to serve the others meanwhile.
    let run = |timeout: &str| user.kubectl(&["drain", NODE, "--pod-selector=app=web", timeout]).output();
    let cordoned = Undo { user, command: UNCORDON };
    let said = run("--timeout=12s")?.failure()?;
    ensure!(said.contains("violate the pod's disruption budget"), "the drain said {said:?}");
    let left = uids()?;
    ensure!(left.len() == 1 && left.is_subset(&before), "of {before:?} the drain left {left:?}");
    drop(cordoned);
    rolled_out(user, "deployment/web")?;
    ensure!(left.is_subset(&uids()?), "the pod that was left is gone");

    user.delete("pdb", "web")?;
    let cordoned = Undo { user, command: UNCORDON };
    run("--timeout=50s")?.success()?;
    let left = uids()?;
    ensure!(left.is_empty(), "the drained node has {left:?}");
    drop(cordoned);
    rolled_out(user, "deployment/web")
}

fn taints(user: &User) -> Result<()> {
    let taint = |effect: &str| {
        let taint = format!("bulkhead.test/reserved=yes:{effect}");
        user.kubectl(&["taint", "node", NODE, &taint]).success()
    };
    let spec = |tolerations: Value| json!({"containers": [idle("main")], "tolerations": tolerations});
    user.ready_pod("resident", spec(json!([])))?;
    let tainted = Undo { user, command: UNTAINT };
    taint("NoSchedule")?;
    user.pod("stranger", spec(json!([])))?;
    let always = json!({"key": "bulkhead.test/reserved", "operator": "Exists"});
    let awhile = with(always.clone(), json!({"effect": "NoExecute", "tolerationSeconds": 3}));
    let enter = with(always.clone(), json!({"effect": "NoSchedule"}));
    user.pod("guest", spec(json!([always])))?;
    user.pod("visitor", spec(json!([awhile, enter])))?;
    user.wait_pod("stranger", "to be refused", SOON, |pod| {
        let conditions = pod["status"]["conditions"].as_array().context("no conditions")?;
        let scheduled = conditions.iter().find(|condition| condition["type"] == "PodScheduled");
        let said = scheduled.and_then(|condition| condition["message"].as_str()).unwrap_or_default();
        ensure!(said.contains("untolerated taint"), "the scheduler said {said:?}");
        Ok(())
    })?;
    let guest = container_status(&user.ready("guest")?, "main")?["containerID"].clone();
    user.ready("visitor")?;
    let resident = user.get(&["pod", "resident"])?;
    ensure!(condition(&resident, "Ready") == "True", "a taint for others drove it out: {}", resident["status"]);

    taint("NoExecute")?;
    gone(user, "resident")?;
    gone(user, "visitor")?;
    let pod = user.get(&["pod", "guest"])?;
    let now = container_status(&pod, "main")?["containerID"].clone();
    ensure!(condition(&pod, "Ready") == "True" && now == guest, "the guest's status is {}", pod["status"]);
    drop(tainted);
    user.ready("stranger")?;
    Ok(())
}

/// The manifest of a static pod, which goes with this value.
struct Manifest(PathBuf);

impl Drop for Manifest {
    fn drop(&mut self) {
        // It may have been removed already.
        let _ = fs::remove_file(&self.0);
    }
}

fn static_pod(user: &User) -> Result<()> {
    let mut pod = user.manifest("fixed", json!({"containers": [counting()]}));
    pod["metadata"]["namespace"] = json!(user.namespace);
    let manifest = Manifest(user.cluster.layout.manifests.join(format!("{}.json", user.namespace)));
    // The kubelet passes over names that begin with a dot: it is to read the whole of it.
    let aside = manifest.0.with_file_name(format!(".{}", user.namespace));
    fs::write(&aside, pod.to_string())?;
    fs::rename(&aside, &manifest.0)?;
    let name = format!("fixed-{NODE}");
    let found = user.ready(&name)?;
    let annotations = &found["metadata"]["annotations"];
    ensure!(annotations["kubernetes.io/config.source"] == "file", "the annotations are {annotations}");
    user.wait_log(&name, "line 2\n")?;
    let said = user.sh(&name, "echo from $(hostname)")?;
    ensure!(said == format!("from {name}"), "a program in it said {said:?}");
    drop(manifest);
    gone(user, &name)
}

/// Ten pods of each kind, in a Deployment each. What they request leaves room for their overhead on two CPUs.
fn crowd(user: &User) -> Result<()> {
    let text = "echo $(hostname) $(cat /proc/sys/kernel/random/boot_id); exec sleep 1000000";
    let small = with(script("main", text), json!({"resources": {"requests": {"cpu": "1m", "memory": "16Mi"}}}));
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let mut template = template(user, runtime.handler(), json!({"containers": [small]}));
        template["metadata"]["labels"]["set"] = json!("crowd");
        template["spec"]["runtimeClassName"] = json!(runtime.handler());
        user.apply(&workload("Deployment", runtime.handler(), &template, json!({"replicas": 10})))?;
    }
    Ok(())
}

/// Waits until at least so many pods of the crowd are ready, none of them with a container of `old`; their containers.
fn crowded(user: &User, least: usize, old: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    wait_for(&format!("{least} pods of the crowd to be ready"), CROWDED, || {
        let mut ready = BTreeSet::new();
        for runtime in [Runtime::Runc, Runtime::Bulkhead] {
            for pod in pods_of(user, runtime.handler())?.iter().filter(|pod| condition(pod, "Ready") == "True") {
                ready.extend(container_status(pod, "main")?["containerID"].as_str().map(str::to_owned));
            }
        }
        // Until the kubelet has looked at a pod the apiserver tells what it was.
        let stale = ready.intersection(old).count();
        ensure!(ready.len() >= least && stale == 0, "{} are, {stale} of them as they were before", ready.len());
        Ok(ready)
    })
}

fn twenty(user: &User) -> Result<()> {
    crowd(user)?;
    crowded(user, 20, &BTreeSet::new())?;
    let node = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    // A container is ready when it has started, and says something when its program gets to it.
    wait_for("all pods to name their kernels", SOON, || {
        let logs = user.kubectl(&["logs", "--selector=set=crowd", "--tail=-1"]).success()?.text();
        let lines: Vec<_> = logs.lines().filter_map(|line| line.split_once(' ')).collect();
        let names: BTreeSet<_> = lines.iter().map(|(name, _)| name).collect();
        let kernels: BTreeSet<_> = lines.iter().map(|(_, kernel)| *kernel).collect();
        let found = (names.len(), kernels.len(), kernels.contains(node.trim()));
        // The kernels of ten virtual machines, and the node's for all the others.
        ensure!(found == (20, 11, true), "pods, kernels, and whether the node's is one of them: {found:?}\n{logs}");
        Ok(())
    })
}

/// Kills one of the node's daemons.
fn kill(user: &User, daemon: &str) -> Result<i32> {
    let process = user.cluster.daemon(daemon)?;
    process.signal(Signal::SIGKILL)?;
    Ok(process.pid)
}

/// Waits until a daemon that was killed runs again, and the node is ready and takes commands for a pod.
fn back(user: &User, daemon: &str, old: i32, pod: &str) -> Result<()> {
    wait_for(&format!("{daemon} to be back"), SOON, || {
        let process = user.cluster.daemon(daemon)?;
        ensure!(process.pid != old, "it is the one that was killed");
        let said = user.sh(pod, "echo still here")?;
        ensure!(said == "still here", "a program in {pod} said {said:?}");
        let node = user.get(&["node", NODE])?;
        ensure!(condition(&node, "Ready") == "True", "the node's status is {}", node["status"]["conditions"]);
        Ok(())
    })
}

/// How far a counting container has come; an error if a line is missing.
fn count(user: &User, pod: &str) -> Result<usize> {
    let log = user.logs(pod)?;
    for (index, line) in log.lines().enumerate() {
        ensure!(line == format!("line {}", index + 1), "line {} of the log is {line:?}", index + 1);
    }
    Ok(log.lines().count())
}

/// Checks that a counting pod is what it was in `before`, and that it counts on.
fn lives_on(user: &User, pod: &str, before: &Value) -> Result<()> {
    let (old, new) = (container_status(before, "main")?, container_status(&user.get(&["pod", pod])?, "main")?);
    let same = new["containerID"] == old["containerID"] && new["restartCount"] == 0;
    ensure!(same && !new["state"]["running"].is_null(), "before the container was {old}, now {new}");
    let reached = count(user, pod)?;
    wait_for("the log to go on", SOON, || {
        let now = count(user, pod)?;
        ensure!(now > reached + 2, "it is at {now}, as before at {reached}");
        Ok(())
    })
}

fn kubelet_killed(user: &User) -> Result<()> {
    let directory = host_directory(user)?;
    let text = "while [ ! -e /flags/go ]; do sleep 0.1; done; echo going; exit 7";
    let ends = with(script("main", text), json!({"volumeMounts": [{"name": "flags", "mountPath": "/flags"}]}));
    let volumes = json!([{"name": "flags", "hostPath": {"path": directory, "type": "Directory"}}]);
    user.pod("ends", json!({"restartPolicy": "Never", "containers": [ends], "volumes": volumes}))?;
    let stays = user.ready_pod("stays", json!({"containers": [counting()]}))?;
    user.ready("ends")?;

    let old = kill(user, "kubelet")?;
    fs::write(directory.join("go"), "")?;
    back(user, "kubelet", old, "stays")?;
    let pod = user.finished("ends")?;
    let end = ended(&pod, "main")?;
    ensure!(end == (7, "Error".into()), "what ended while there was no kubelet ended with {end:?}");
    let said = user.logs("ends")?;
    ensure!(said == "going", "its log is {said:?}");
    lives_on(user, "stays", &stays)
}

fn containerd_killed(user: &User) -> Result<()> {
    user.pod("goes", json!({"containers": [idle("main")]}))?;
    let stays = user.ready_pod("stays", json!({"containers": [counting()]}))?;
    user.ready("goes")?;
    user.wait_log("stays", "line 2\n")?;

    let old = kill(user, "containerd")?;
    user.kubectl(&["delete", "pod", "goes", "--wait=false"]).success()?;
    back(user, "containerd", old, "stays")?;
    gone(user, "goes")?;
    lives_on(user, "stays", &stays)?;
    user.ready_pod("new", json!({"containers": [idle("main")]})).map(drop)
}

fn power(user: &User) -> Result<()> {
    crowd(user)?;
    // In the midst of their start.
    let before = crowded(user, 6, &BTreeSet::new())?;
    user.cluster.lose_power()?;
    user.cluster.restore_power()?;
    crowded(user, 20, &before)?;
    wait_for("nothing of the old pods to be there", CROWDED, || {
        let mut left = leaks::of_lost_pods(&user.cluster)?;
        left.extend(disagreements(user)?);
        ensure!(left.is_empty(), "{}", left.join("\n"));
        Ok(())
    })
}

/// Where what the node has is not what its ready sandboxes and running containers need, neither more nor less.
fn disagreements(user: &User) -> Result<Vec<String>> {
    let cluster = &user.cluster;
    let listed = |args: &[&str], key: &str| -> Result<Vec<Value>> {
        let list: Value = serde_json::from_slice(&cluster.crictl(args).success()?.stdout)?;
        Ok(list[key].as_array().cloned().unwrap_or_default())
    };
    let id = |object: &Value| object["id"].as_str().unwrap_or_default().to_owned();
    let names = |directory: &str| -> Result<BTreeSet<String>> {
        Ok(cluster.inside(&["ls", directory]).success()?.text().lines().map(str::to_owned).collect())
    };
    let sandboxes = listed(&["pods", "--state=ready", "--output=json"], "items")?;
    let machines = sandboxes.iter().filter(|sandbox| sandbox["runtimeHandler"] == Runtime::Bulkhead.handler());
    let machines: BTreeSet<_> = machines.map(id).collect();
    let mut tasks: BTreeSet<_> = sandboxes.iter().map(id).collect();
    tasks.extend(listed(&["ps", "--output=json"], "containers")?.iter().map(id));
    let processes = cluster.processes()?;
    let running = |name: &str| processes.iter().filter(|process| process.name == name && process.state != 'Z').count();
    let table = cluster.mount_table()?;
    let points: BTreeSet<_> = table.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    let leases = fs::read_dir(cluster.layout.root.join("cni/leases/pods"))?.flatten();
    // The plugin's own files have names that are no addresses.
    let leases = leases.filter(|entry| entry.file_name().to_string_lossy().parse::<std::net::IpAddr>().is_ok()).count();

    let mut found = Vec::new();
    for (what, has, needs) in [
        ("sandboxes with a shim", running("containerd-shim"), sandboxes.len()),
        ("virtual machines", running("qemu-system-x86"), machines.len()),
        ("network namespaces", points.iter().filter(|point| point.contains("/netns/")).count(), sandboxes.len()),
        ("ports of the bridge", names("/sys/class/net/cni0/brif")?.len(), sandboxes.len()),
        ("leases of addresses", leases, 2 * sandboxes.len()),
    ] {
        if has != needs {
            found.push(format!("{what}: {has} instead of {needs}"));
        }
    }
    let state = names(&cluster.layout.bulkhead_state.display().to_string())?;
    // The sandbox's id, and a part of its socket's name.
    let state: BTreeSet<_> = state.iter().filter_map(|name| Some(name.split_once('-')?.0.to_owned())).collect();
    let bundles = names("/run/containerd/io.containerd.runtime.v2.task/k8s.io")?;
    for (what, has, needs) in [("run state", state, machines), ("bundles", bundles, tasks)] {
        found.extend(has.symmetric_difference(&needs).map(|id| format!("{what} of {id} or the lack of it")));
    }
    Ok(found)
}
