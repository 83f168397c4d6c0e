//! What pods may use, what they are said to use, and what the cluster counts for them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_tests::cluster::NODE;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, container_status, wait_for};
use bulkhead_tests::command::Output;
use serde_json::{Value, json};

use crate::life::{idle, script, with};
use crate::talk::sh_in;

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("limits of a running container change in place, as far as its machine goes", resize),
    Row::new("limits of the pod hold for all its containers, and change in place", pod_level),
    Row::new("statistics of the kubelet agree with what is seen inside", statistics),
    Row::new("overhead counts for the scheduler, for quotas and for the pod's cgroup", overhead),
    Row::new("classes of quality of service and ranges of limits are kept", quality),
];

const MIB: i64 = 1 << 20;

/// The kubelet's statistics are up to so old, and a few more seconds.
const SAMPLED: Duration = Duration::from_secs(120);

/// `resources` of a container or a pod.
fn resources(requests: [&str; 2], limits: [&str; 2]) -> Value {
    let list = |[cpu, memory]: [&str; 2]| json!({"cpu": cpu, "memory": memory});
    json!({"resources": {"requests": list(requests), "limits": list(limits)}})
}

/// MiB of memory and thousandths of a CPU, as Kubernetes writes them.
fn limits((memory, cpu): (i64, i64)) -> Value {
    json!({"memory": format!("{memory}Mi"), "cpu": format!("{cpu}m")})
}

/// What the cgroup of a container says: its limit of memory in MiB, and that of CPU in thousandths.
fn limits_in(user: &User, pod: &str, container: &str) -> Result<(i64, i64)> {
    let read = "cd /sys/fs/cgroup; if [ -e memory.max ]; then cat memory.max cpu.max; \
                else cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us; fi";
    let said = sh_in(user, pod, container, read)?;
    let numbers: Vec<i64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [memory, quota, period] = numbers[..] else { bail!("the limits of {container} are {said:?}") };
    ensure!(memory % MIB == 0, "the limit of memory is {memory}");
    Ok((memory / MIB, quota * 1000 / period))
}

/// What the RuntimeClass adds: thousandths of a CPU, and MiB.
fn overhead_of(user: &User) -> (i64, i64) {
    if user.is_bulkhead() { (150, 224) } else { (0, 0) }
}

/// Waits until the limit of memory of the pod's own cgroup on the node is so many MiB and the overhead's.
fn wait_pod_limit(user: &User, mib: i64) -> Result<()> {
    let pod = user.get(&["pod", "web"])?;
    let uid = pod["metadata"]["uid"].as_str().context("a pod without uid")?;
    // In version 1 that of memory is one of many.
    let find = format!("find /sys/fs/cgroup/memory /sys/fs/cgroup -type d -name pod{uid} 2>/dev/null | head -n 1");
    let read = format!("cd $({find}) && cat memory.limit_in_bytes 2>/dev/null || cat memory.max");
    let expected = ((mib + overhead_of(user).1) * MIB).to_string();
    wait_for("the limit of the pod's cgroup", SOON, || {
        let bytes = user.cluster.inside(&["/bin/sh", "-c", &read]).success()?.text();
        ensure!(bytes == expected, "it is {bytes} and not {expected}");
        Ok(())
    })
}

/// New limits of the pod, or of one of its containers; requests stay as they are.
fn patch_limits(user: &User, container: Option<&str>, limits: Value) -> Result<()> {
    let resources = json!({"resources": {"limits": limits}});
    let spec = match container {
        Some(name) => json!({"containers": [with(json!({"name": name}), resources)]}),
        None => resources,
    };
    let patch = json!({"spec": spec}).to_string();
    user.kubectl(&["patch", "pod", "web", "--subresource=resize", "--patch", &patch]).success()?;
    Ok(())
}

fn find_condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a Value> {
    pod["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

/// Waits until nothing is left to be done about new limits, a container has them, and the status tells them.
fn wait_limits(user: &User, container: &str, expected: (i64, i64)) -> Result<()> {
    user.wait_pod("web", "to have its new limits", SOON, |pod| {
        for kind in ["PodResizePending", "PodResizeInProgress"] {
            ensure!(find_condition(pod, kind).is_none(), "it is on the way: {}", pod["status"]["conditions"]);
        }
        let found = limits_in(user, "web", container)?;
        ensure!(found == expected, "the limits of {container} are {found:?} and not {expected:?}");
        let told = container_status(pod, container)?["resources"]["limits"].clone();
        // One with the limits of its pod has none of its own.
        ensure!(told.is_null() || told == limits(expected), "the status of {container} tells of limits of {told}");
        Ok(())
    })
}

/// Waits until the kubelet says why it cannot do what was asked for.
fn wait_refusal(user: &User, sentences: [&str; 2]) -> Result<()> {
    user.wait_pod("web", "to be refused new limits", SOON, |pod| {
        let found = find_condition(pod, "PodResizeInProgress").context("it is not being resized")?;
        let said = found["message"].as_str().unwrap_or_default();
        let all = sentences.iter().all(|sentence| said.contains(sentence));
        ensure!(found["reason"] == "Error" && all, "the condition is {found}");
        Ok(())
    })
}

fn resize(user: &User) -> Result<()> {
    let restart = json!({"resizePolicy": [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]});
    let again = script("again", "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done");
    let again = with(with(again, restart), resources(["10m", "32Mi"], ["200m", "64Mi"]));
    let main = with(idle("main"), resources(["100m", "64Mi"], ["500m", "128Mi"]));
    // A virtual machine gets one CPU for these, and 192 MiB for the containers.
    let before = user.ready_pod("web", json!({"containers": [main, again]}))?;
    wait_limits(user, "main", (128, 500))?;
    for (memory, cpu) in [(192, 900), (96, 300)] {
        patch_limits(user, Some("main"), limits((memory, cpu)))?;
        wait_limits(user, "main", (memory, cpu))?;
    }
    let memory = ["memory limit 268435456 of container", "accepted is up to 201326592 bytes"];
    let cpu = ["CPU limit 1500m of container", "accepted is up to 1000m"];
    for (memory, cpu, refused) in [(256, 300, memory), (96, 1500, cpu)] {
        patch_limits(user, Some("main"), limits((memory, cpu)))?;
        if user.is_bulkhead() {
            wait_refusal(user, refused)?;
            let found = limits_in(user, "web", "main")?;
            ensure!(found == (96, 300), "what was refused left limits of {found:?}");
        } else {
            wait_limits(user, "main", (memory, cpu))?;
        }
        patch_limits(user, Some("main"), limits((96, 300)))?;
        wait_limits(user, "main", (96, 300))?;
    }

    patch_limits(user, Some("again"), json!({"memory": "48Mi"}))?;
    wait_limits(user, "again", (48, 200))?;
    let pod = user.get(&["pod", "web"])?;
    let (old, new) = (container_status(&before, "main")?, container_status(&pod, "main")?);
    ensure!(old["containerID"] == new["containerID"] && new["restartCount"] == 0, "the container restarted: {new}");
    user.wait_pod("web", "to have counted a restart", SOON, |pod| {
        let again = container_status(pod, "again")?;
        ensure!(again["restartCount"] == 1, "the container that is to restart is {again}");
        Ok(())
    })
}

fn pod_level(user: &User) -> Result<()> {
    let side = with(idle("side"), resources(["10m", "16Mi"], ["100m", "64Mi"]));
    let pod = with(json!({"containers": [idle("main"), side]}), resources(["100m", "64Mi"], ["900m", "320Mi"]));
    user.ready_pod("web", pod)?;
    wait_limits(user, "main", (320, 900))?;
    wait_limits(user, "side", (64, 100))?;
    wait_pod_limit(user, 320)?;
    if user.is_bulkhead() {
        let kib = user.sh("web", "awk '/^MemTotal/ {print $2}' /proc/meminfo")?;
        let mib = kib.parse::<i64>().with_context(|| format!("the memory is {kib:?}"))? / 1024;
        ensure!((320..=384).contains(&mib), "the virtual machine has {mib} MiB for a limit of 320");
    }
    patch_limits(user, None, limits((256, 600)))?;
    wait_limits(user, "main", (256, 600))?;
    wait_pod_limit(user, 256)?;
    wait_limits(user, "side", (64, 100))
}

/// The kubelet's summary of the pod.
fn summary(user: &User) -> Result<Value> {
    let path = format!("/api/v1/nodes/{NODE}/proxy/stats/summary");
    let summary: Value = serde_json::from_slice(&user.kubectl(&["get", "--raw", &path]).success()?.stdout)?;
    let pods = summary["pods"].as_array().context("no pods in the summary")?;
    let found = pods.iter().find(|pod| pod["podRef"]["namespace"] == user.namespace.as_str());
    found.cloned().context("the pod is not in the summary")
}

/// A number of the summary of a container.
fn figure(summary: &Value, container: &str, pointer: &str) -> Result<i64> {
    let all = summary["containers"].as_array().context("no containers in the summary")?;
    let found = all.iter().find(|entry| entry["name"] == container).context("no such container in the summary")?;
    found.pointer(pointer).and_then(Value::as_i64).with_context(|| format!("no {pointer} in {found}"))
}

/// A metric of a container of the pod, in `/metrics/resource`.
fn metric(user: &User, name: &str, container: &str) -> Result<f64> {
    let text = user.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{NODE}/proxy/metrics/resource")]).success()?;
    let labels = format!("{{container=\"{container}\",namespace=\"{}\",pod=\"web\"}}", user.namespace);
    let text = text.text();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(&labels));
    let value = value.with_context(|| format!("no {name}{labels}"))?.split_whitespace().next().unwrap_or_default();
    value.parse().with_context(|| format!("{name}{labels} is {value:?}"))
}

fn statistics(user: &User) -> Result<()> {
    let spins = with(script("spins", "while :; do :; done"), resources(["10m", "16Mi"], ["500m", "64Mi"]));
    // `dd` fills the whole of its buffer, and nobody takes it.
    let holds = "mkfifo /tmp/held; sleep 1000000 < /tmp/held & exec dd if=/dev/zero of=/tmp/held bs=40M count=1";
    let serves = "dd if=/dev/zero of=/www/big bs=1M count=16 2>/dev/null; exec httpd -f -p 8080 -h /www";
    let containers = json!([script("serves", serves), script("holds", holds), spins]);
    user.ready_pod("web", json!({"containers": containers}))?;

    let used = "cd /sys/fs/cgroup; if [ -e cpu.stat ]; then sed -n 's/^usage_usec \\(.*\\)/\\1000/p' cpu.stat; \
                else cat cpuacct/cpuacct.usage; fi";
    let used = || -> Result<i64> { Ok(sh_in(user, "web", "spins", used)?.parse()?) };
    let before = used()?;
    let told = wait_for("the CPU time of a busy container", SAMPLED, || {
        let summary = summary(user)?;
        let told = figure(&summary, "spins", "/cpu/usageCoreNanoSeconds")?;
        ensure!(told >= before, "{told} ns are told, {before} were used before");
        let rate = figure(&summary, "spins", "/cpu/usageNanoCores")?;
        ensure!((300_000_000..=650_000_000).contains(&rate), "{rate} billionths of a CPU are told for half of one");
        Ok(told)
    })?;
    let after = used()?;
    ensure!(told <= after, "{told} ns were told, {after} are used");

    let current = "cd /sys/fs/cgroup; cat memory.current 2>/dev/null || cat memory/memory.usage_in_bytes";
    wait_for("the memory and the files of containers", SAMPLED, || {
        let summary = summary(user)?;
        let told = figure(&summary, "holds", "/memory/workingSetBytes")?;
        let inside: i64 = sh_in(user, "web", "holds", current)?.parse()?;
        ensure!((40 * MIB..64 * MIB).contains(&told), "of 40 MiB that are held {told} bytes are told");
        ensure!((told - inside).abs() < 16 * MIB, "{told} bytes are told, {inside} are used");
        let metric = metric(user, "container_memory_working_set_bytes", "holds")?;
        ensure!((metric - told as f64).abs() < 8.0 * MIB as f64, "{told} bytes are told, and elsewhere {metric}");
        let told = figure(&summary, "serves", "/rootfs/usedBytes")?;
        ensure!((16 * MIB..20 * MIB).contains(&told), "of 16 MiB that were written {told} bytes are told");
        let whole = summary["ephemeral-storage"]["usedBytes"].as_i64().context("no ephemeral storage")?;
        ensure!(whole >= told, "the pod uses {whole} bytes, a container of it {told}");
        Ok(())
    })?;
    let seconds = metric(user, "container_cpu_usage_seconds_total", "spins")?;
    ensure!(seconds >= before as f64 / 1e9, "{seconds} s of CPU time are told, {before} ns were used before");

    let sent = || -> Result<i64> {
        let summary = summary(user)?;
        summary["network"]["txBytes"].as_i64().with_context(|| format!("no bytes in {}", summary["network"]))
    };
    let before = wait_for("a figure of what was sent", SAMPLED, sent)?;
    let page = format!("http://{}:8080/big", user.address("web", false)?);
    user.cluster.inside(&["/bin/busybox", "wget", "-q", "-O", "/dev/null", &page]).success()?;
    wait_for("the 16 MiB that were sent", SAMPLED, || {
        let more = sent()? - before;
        ensure!((16 * MIB..20 * MIB).contains(&more), "{more} bytes are told");
        Ok(())
    })
}

/// What holds for all of the namespace.
fn of_namespace(kind: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": "all"}, "spec": spec})
}

/// What the apiserver would answer to a new pod.
fn dry_run(user: &User, pod: &Value) -> Result<Output> {
    user.kubectl(&["create", "--dry-run=server", "-f", "-"]).input(pod.to_string()).output()
}

fn overhead(user: &User) -> Result<()> {
    let (cpu, memory) = overhead_of(user);
    if user.is_bulkhead() {
        // As much as the node has, but for less than the overhead. Nothing of it is set aside.
        let has = user.get(&["node", NODE])?["status"]["allocatable"].clone();
        let (cpus, kib) = (has["cpu"].as_str(), has["memory"].as_str().and_then(|memory| memory.strip_suffix("Ki")));
        let (cpus, kib) = cpus.zip(kib).with_context(|| format!("the node has {has}"))?;
        let cpu = format!("{}m", cpus.parse::<i64>()? * 1000 - 100);
        let memory = format!("{}Ki", kib.parse::<i64>()? - (150 << 10));
        let requests = json!({"resources": {"requests": {"cpu": cpu, "memory": memory}}});
        user.pod("large", json!({"containers": [with(idle("main"), requests)]}))?;
        user.wait_pod("large", "to be refused", SOON, |pod| {
            let scheduled = find_condition(pod, "PodScheduled").context("it is not looked at")?;
            let said = scheduled["message"].as_str().unwrap_or_default();
            let all = said.contains("Insufficient cpu") && said.contains("Insufficient memory");
            ensure!(pod["status"]["phase"] == "Pending" && all, "the scheduler said {said:?}");
            Ok(())
        })?;
        user.delete("pod", "large")?;
    }
    let hard = json!({"requests.cpu": "300m", "requests.memory": "1Gi"});
    user.apply(&of_namespace("ResourceQuota", json!({"hard": hard})))?;
    let used = || -> Result<Value> { Ok(user.get(&["resourcequota", "all"])?["status"]["used"].clone()) };
    wait_for("the quota to be counted", SOON, || {
        let used = used()?;
        ensure!(used == json!({"requests.cpu": "0", "requests.memory": "0"}), "{used} is used");
        Ok(())
    })?;
    let small = json!({"containers": [with(idle("main"), resources(["10m", "64Mi"], ["500m", "128Mi"]))]});
    let pod = user.ready_pod("web", small.clone())?;
    let expected = if user.is_bulkhead() { limits((memory, cpu)) } else { Value::Null };
    ensure!(pod["spec"]["overhead"] == expected, "the overhead of the pod is {}", pod["spec"]["overhead"]);
    let (cpu, requested) = (format!("{}m", 10 + cpu), format!("{}Mi", 64 + memory));
    let used = used()?;
    ensure!(used == json!({"requests.cpu": cpu, "requests.memory": requested}), "of the quota {used} is used");
    // Twice as much is above the quota with the overhead, and far below it without.
    let second = dry_run(user, &user.manifest("second", small))?;
    if user.is_bulkhead() {
        let said = second.failure()?;
        ensure!(said.contains("exceeded quota: all, requested: requests.cpu=160m"), "a second pod: {said:?}");
    } else {
        second.success()?;
    }
    let text = user.kubectl(&["describe", "node", NODE]).success()?.text();
    let mut rows = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.starts_with(&[user.namespace.as_str(), "web"]));
    let row = row.with_context(|| format!("no line about the pod in {text}"))?;
    let counted = (row.get(2).copied(), row.get(6).copied());
    ensure!(counted == (Some(&*cpu), Some(&*requested)), "the node counts {row:?}");
    wait_pod_limit(user, 128)
}

fn quality(user: &User) -> Result<()> {
    let classes = [
        ("guaranteed", resources(["500m", "64Mi"], ["500m", "64Mi"])),
        ("burstable", resources(["10m", "16Mi"], ["500m", "64Mi"])),
        ("besteffort", json!({})),
    ];
    for (name, resources) in classes.clone() {
        user.pod(name, json!({"containers": [with(idle("main"), resources)]}))?;
    }
    for (name, _) in &classes {
        let pod = user.ready(name)?;
        let class = pod["status"]["qosClass"].as_str().unwrap_or_default().to_lowercase();
        ensure!(class == *name, "the class of {name} is {class}");
        // Those of the first class lie above the directories of the others.
        let parent = if *name == "guaranteed" { "kubepods" } else { *name };
        let uid = pod["metadata"]["uid"].as_str().context("a pod without uid")?;
        let processes = user.cluster.processes()?;
        let groups = processes.iter().flat_map(|process| &process.cgroups).filter(|group| group.contains(uid));
        let (right, wrong): (Vec<_>, Vec<_>) = groups.partition(|group| group.contains(&format!("/{parent}/pod{uid}")));
        ensure!(!right.is_empty() && wrong.is_empty(), "processes of {name} are in {right:?} and {wrong:?}");
    }

    let range = json!({
        "type": "Container", "default": {"cpu": "400m", "memory": "96Mi"},
        "defaultRequest": {"cpu": "10m", "memory": "32Mi"}, "max": {"memory": "128Mi"},
    });
    user.apply(&of_namespace("LimitRange", json!({"limits": [range]})))?;
    let large = json!({"containers": [with(idle("main"), resources(["10m", "16Mi"], ["400m", "256Mi"]))]});
    wait_for("the range to hold", SOON, || {
        let said = dry_run(user, &user.manifest("large", large.clone()))?.failure()?;
        let sentence = "maximum memory usage per Container is 128Mi, but limit is 256Mi";
        ensure!(said.contains(sentence), "the pod is refused with {said:?}");
        Ok(())
    })?;
    user.ready_pod("web", json!({"containers": [idle("main")]}))?;
    wait_limits(user, "main", (96, 400))
}
