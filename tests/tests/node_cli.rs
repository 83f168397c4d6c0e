//! The node CLI, `bulkhead`: it tells what is there, and clears what nobody needs any more.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{Output, wait_for};
use bulkhead_tests::config::Bulkhead;
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::containerd::Node;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::process::Process;
use bulkhead_tests::row::{BULKHEAD, Context, Row};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use nix::sys::signal::Signal;
use serde_json::Value;

const ROWS: &[Row] = &[
    Row::alone("check says what the machine has, and that a pod can start", check_ready),
    Row::alone("check says what is missing, and that no pod can start", check_lacking),
    Row::in_pod("list shows a running pod with its processes and its size", list_shows_a_pod),
    Row::in_pod("inspect tells of journal, processes and containers, by the beginning of an id", inspect_tells),
    Row::in_pod("an id that is not there is refused in a sentence", unknown_id),
    Row::alone("a shim that hangs is told, and hides nothing else", shim_hangs),
    Row::alone("the console is shown harmless, and followed until the pod ends", console),
    Row::alone("gc touches no pod whose shim lives, with containerd and without", gc_spares_the_living),
    Row::alone("gc beside the delete of containerd leaves nothing of a dead shim", gc_beside_delete),
    Row::alone("gc removes what shim and QEMU left while containerd is gone", gc_without_containerd),
];

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], BULKHEAD, ROWS)
}

const SOON: Duration = Duration::from_secs(20);

fn json(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| format!("parse the answer of {}", output.describe()))
}

/// The answer of a command that succeeds, as JSON.
fn ask(node: &Node, args: &[&str]) -> Result<Value> {
    json(&node.bulkhead(&["--output", "json"]).args(args).success()?)
}

/// What `list` has of `pod`; None if it has nothing.
fn listed(pod: &Pod) -> Result<Option<Value>> {
    let list = ask(&pod.node, &["list"])?;
    Ok(list.as_array().and_then(|list| list.iter().find(|sandbox| sandbox["id"] == *pod.id)).cloned())
}

fn finding<'a>(findings: &'a Value, what: &str) -> Result<&'a Value> {
    let all = findings["findings"].as_array().context("check has no findings")?;
    all.iter()
        .find(|finding| finding["what"] == what)
        .with_context(|| format!("check does not look at {what}: {findings}"))
}

fn containerd_config(node: &Node) -> String {
    node.layout.root.join("containerd.toml").display().to_string()
}

fn check_ready(context: &Context) -> Result<()> {
    let node = &context.node;
    let config = containerd_config(node);
    let findings = ask(node, &["check", "--containerd-config", &config])?;
    ensure!(findings["ready"] == true, "{findings}");
    let virtualises =
        std::fs::read_to_string("/proc/cpuinfo")?.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let expected = |there: bool| if there { "ok" } else { "warning" };
    for (what, verdict) in [
        ("configuration", "ok"),
        ("state directory", "ok"),
        ("virtualisation", expected(virtualises && Path::new("/dev/kvm").exists())),
        ("QEMU", "ok"),
        ("guest kernel", "ok"),
        ("guest initramfs", "ok"),
        ("virtiofsd", "ok"),
        ("shim", "ok"),
        ("vsock", expected(Path::new("/dev/vhost-vsock").exists())),
        ("vhost-net", expected(Path::new("/dev/vhost-net").exists())),
        ("pod network", "ok"),
        ("cgroups", "ok"),
        ("namespaces", "ok"),
        ("containerd handler", "ok"),
    ] {
        let finding = finding(&findings, what)?;
        ensure!(finding["verdict"] == verdict, "{verdict} was expected: {finding}");
        ensure!(finding["mend"].is_string() == (verdict != "ok"), "what is not ok can be mended: {finding}");
    }
    let text = node.bulkhead(&["check", "--containerd-config", &config]).success()?.text();
    ensure!(text.ends_with("A pod can start."), "{text}");
    // It is true.
    context.start(PodSpec::new())?.remove()
}

fn check_lacking(context: &Context) -> Result<()> {
    let node = &context.node;
    let settings = Bulkhead { kernel: Some("/no/such/vmlinux".into()), ..Bulkhead::default() };
    node.configure_bulkhead("lacking.toml", &settings)?;
    let config = containerd_config(node);
    let args = ["check", "--containerd-config", &config, "--output", "json"];
    let findings = json(&node.bulkhead_with("lacking.toml", &args).output()?.exited(1)?)?;
    ensure!(findings["ready"] == false, "{findings}");
    let kernel = finding(&findings, "guest kernel")?;
    ensure!(kernel["verdict"] == "missing", "{kernel}");
    ensure!(kernel["found"].as_str().is_some_and(|found| found.contains("/no/such/vmlinux")), "{kernel}");

    std::fs::write(node.layout.root.join("lacking.toml"), "vcpu = 1\n")?;
    let findings = json(&node.bulkhead_with("lacking.toml", &args).output()?.exited(1)?)?;
    let configuration = finding(&findings, "configuration")?;
    ensure!(configuration["found"].as_str().is_some_and(|found| found.contains("vcpu")), "{configuration}");

    let empty = context.scratch.join("containerd.toml");
    std::fs::write(&empty, "version = 3\n")?;
    let output = node.bulkhead(&["check", "--containerd-config", &empty.display().to_string()]).output()?.exited(1)?;
    ensure!(output.text().ends_with("No pod can start."), "{}", output.text());
    ensure!(output.text().contains("none of type io.containerd.bulkhead.v2"), "{}", output.text());
    Ok(())
}

fn list_shows_a_pod(_: &Context, pod: &Pod) -> Result<()> {
    let sandbox = listed(pod)?.context("the pod is not listed")?;
    let pid = |part| faults::find(&pod.node, &pod.id, part).map(|process: Process| process.pid);
    ensure!(sandbox["state"] == "running" && sandbox["namespace"] == "k8s.io", "{sandbox}");
    ensure!(sandbox["qemu_pid"] == pid(Part::Qemu)? && sandbox["shim_pid"] == pid(Part::Shim)?, "{sandbox}");
    ensure!(sandbox["vcpus"] == 1 && sandbox["memory_mib"] == 256, "{sandbox}");
    ensure!(sandbox["age_seconds"].as_u64().is_some_and(|age| age < 3600), "{sandbox}");
    let text = pod.node.bulkhead(&["list"]).success()?.text();
    let line = text.lines().find(|line| line.starts_with(&pod.id)).context("the pod is not in the table")?;
    ensure!(line.contains(" running ") && line.contains(" 256Mi"), "{text}");
    Ok(())
}

fn inspect_tells(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let sandbox = ask(&pod.node, &["inspect", &pod.id[..12]])?;
    ensure!(sandbox["id"] == *pod.id && sandbox["state"] == "running", "{sandbox}");
    let qemu = faults::find(&pod.node, &pod.id, Part::Qemu)?.pid;
    let processes = sandbox["processes"].as_array().context("there are no processes")?;
    ensure!(processes.iter().any(|p| p["role"] == "QEMU" && p["pid"] == qemu && p["lives"] == true), "{sandbox}");
    let kinds: Vec<_> =
        sandbox["entries"].as_array().context("no entries")?.iter().map(|entry| &entry["kind"]).collect();
    ensure!(kinds.contains(&&Value::from("cgroup")) && kinds.contains(&&Value::from("link")), "{sandbox}");
    ensure!(sandbox["shim"]["state"] == "ready", "{sandbox}");
    let containers = sandbox["shim"]["containers"].as_array().context("there are no containers")?;
    let told = containers.iter().find(|told| told["id"] == *container.id).context("the container is not told")?;
    ensure!(told["role"] == "container" && told["init"]["phase"] == "running", "{told}");
    let text = pod.node.bulkhead(&["inspect", &pod.id]).success()?.text();
    ensure!(text.contains("shim says:    ready") && text.contains(&container.id), "{text}");
    container.remove_by_force()
}

fn unknown_id(_: &Context, pod: &Pod) -> Result<()> {
    for args in [&["inspect", "nobody"][..], &["console", "nobody"]] {
        let said = pod.node.bulkhead(args).output()?.failure()?;
        ensure!(said.contains("sandbox \"nobody\" is not on this node") && said.trim().lines().count() == 1, "{said}");
    }
    Ok(())
}

fn shim_hangs(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let shim = faults::find(&pod.node, &pod.id, Part::Shim)?;
    shim.signal(Signal::SIGSTOP)?;
    let told = ask(&pod.node, &["inspect", &pod.id]);
    let console = pod.node.bulkhead(&["console", &pod.id]).output();
    shim.signal(Signal::SIGCONT)?;
    let told = told?;
    console?.success()?;
    ensure!(told["state"] == "running" && told["shim"].is_null(), "{told}");
    let problem = told["shim_problem"].as_str().context("it is not told")?;
    ensure!(problem.contains(&format!("pid {}", shim.pid)) && problem.contains("no answer within 2s"), "{problem}");
    pod.remove()
}

fn console(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new().set("/linux/security_context/privileged", true))?;
    let container = pod.run(ContainerSpec::idle().security("privileged", true))?;
    // Both have the kernel write on the console, however quiet it is otherwise.
    let write_help = "echo h > /proc/sysrq-trigger";
    let write_memory = "echo m > /proc/sysrq-trigger";
    container.shell(write_help)?;
    let shown = || -> Result<String> { Ok(pod.node.bulkhead(&["console", &pod.id]).success()?.text()) };
    let text = wait_for("the console to have the first line", SOON, || {
        let text = shown()?;
        ensure!(text.contains("sysrq: HELP"), "it has {text:?}");
        Ok(text)
    })?;
    ensure!(!text.chars().any(|c| c.is_control() && c != '\n') && !text.contains("^M"), "{text:?}");
    let document = ask(&pod.node, &["console", &pod.id[..12]])?;
    ensure!(document["console"].as_str().is_some_and(|console| console.contains("sysrq: HELP")), "{document}");

    let following = pod.node.bulkhead(&["console", "--follow", &pod.id]).deadline(Duration::from_mins(2)).start()?;
    container.shell(write_memory)?;
    wait_for("the console to have more", SOON, || {
        ensure!(shown()?.contains("sysrq: Show Memory"), "it has not");
        Ok(())
    })?;
    pod.remove_by_force()?;
    let followed = following.finish()?.success()?.text();
    ensure!(followed.contains("sysrq: HELP") && followed.contains("sysrq: Show Memory"), "{followed:?}");
    Ok(())
}

fn gc_spares_the_living(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    let spared = || -> Result<()> {
        let cleared = ask(&pod.node, &["gc"])?;
        ensure!(cleared["sandboxes"].as_array().is_some_and(Vec::is_empty), "{cleared}");
        ensure!(cleared["living"].as_u64() >= Some(1) && listed(&pod)?.is_some(), "{cleared}");
        Ok(())
    };
    let before = Snapshot::take(&pod.node)?;
    spared()?;
    ensure!(container.shell("echo well")? == "well");
    pod.node.kill_daemon()?;
    let without = spared();
    pod.node.start_daemon()?;
    without?;
    ensure!(pod.is_ready()? && container.shell("echo well")? == "well", "the pod has suffered");
    let after = Snapshot::take(&pod.node)?;
    let lost: Vec<_> = before.things().filter(|thing| !after.things().any(|other| other == *thing)).collect();
    ensure!(lost.is_empty(), "gc has removed {lost:?}");
    pod.remove_by_force()
}

fn gc_beside_delete(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    faults::kill(&pod.node, &pod.id, Part::Shim)?;
    // containerd has seen the death as well, and works on the same journal or has done so.
    pod.node.bulkhead(&["gc"]).success()?;
    ensure!(listed(&pod)?.is_none(), "the sandbox is still listed");
    // Until containerd has taken in the exit, it refuses to remove the container.
    container.wait(SOON)?;
    pod.remove_by_force()
}

fn gc_without_containerd(context: &Context) -> Result<()> {
    let node = &context.node;
    let before = Snapshot::take(node)?;
    let pod = context.start(PodSpec::new())?;
    pod.run(ContainerSpec::idle())?;
    node.kill_daemon()?;
    let cleared = clear_after_crash(&pod);
    let left = Snapshot::take(node);
    // Nobody but containerd can remove what is its own, whatever was found.
    node.start_daemon()?;
    cleared?;
    let left = left?;
    let root = &node.layout.root;
    let is_containerds = |thing: &str| {
        let (kind, name) = thing.split_once(' ').unwrap_or_default();
        match kind {
            // Its records of sandboxes and containers, and the network namespace with what the CNI made.
            "directory" | "mount" => ["root", "state"].iter().any(|side| Path::new(name).starts_with(root.join(side))),
            "link" | "CNI" => true,
            // The pod's own, made by who made the pod; the VM's was below.
            "cgroup" => !name.contains(&pod.id),
            _ => false,
        }
    };
    let left: Vec<_> =
        left.things().filter(|thing| !is_containerds(thing) && !before.things().any(|other| other == *thing)).collect();
    ensure!(left.is_empty(), "gc has left {left:?}");
    pod.remove_by_force()
}

/// Kills shim and QEMU, and has the CLI tell of them and clear.
fn clear_after_crash(pod: &Pod) -> Result<()> {
    let qemu = faults::find(&pod.node, &pod.id, Part::Qemu)?;
    faults::find(&pod.node, &pod.id, Part::Shim)?.signal(Signal::SIGSTOP)?;
    qemu.signal(Signal::SIGKILL)?;
    faults::kill(&pod.node, &pod.id, Part::Shim)?;
    let sandbox = listed(pod)?.context("the pod is not listed")?;
    ensure!(sandbox["state"] == "dead-shim" && sandbox["qemu_pid"].is_null(), "{sandbox}");
    let told = ask(&pod.node, &["inspect", &pod.id])?;
    ensure!(
        told["shim_problem"].as_str().is_some_and(|problem| problem.contains("no shim of this sandbox lives")),
        "{told}"
    );

    let dry = ask(&pod.node, &["gc", "--dry-run"])?;
    // Helpers die with the shim, each in its own time, and virtiofsd takes its socket along if it sees QEMU's end first: whether
    // one is still there is another matter with each look. That none stays is looked for after this.
    let things = |cleared: &Value| -> Vec<String> {
        let removed = cleared["sandboxes"][0]["removed"].as_array().into_iter().flatten();
        let lasts = |what: &&str| !["process ", "socket "].iter().any(|kind| what.starts_with(kind));
        removed.filter_map(Value::as_str).filter(lasts).map(str::to_owned).collect()
    };
    for kind in ["directory ", "redirect on eth0", "cgroup "] {
        let told = things(&dry).iter().any(|what| what.starts_with(kind));
        ensure!(told, "a dry run does not tell of {kind:?}: {dry}");
    }
    ensure!(listed(pod)?.is_some(), "a dry run has removed the sandbox");
    let cleared = ask(&pod.node, &["gc"])?;
    ensure!(things(&cleared) == things(&dry), "{cleared} differs from {dry}");
    ensure!(listed(pod)?.is_none(), "the sandbox is still listed");
    let again = pod.node.bulkhead(&["gc"]).success()?.text();
    ensure!(again.starts_with("nothing is left"), "{again}");
    Ok(())
}
