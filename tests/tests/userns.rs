//! Pods with a user namespace (`hostUsers: false`): root in the container is nobody in particular outside, on the host and in
//! the guest, and everything else is as ever.
//!
//! For Bulkhead alone: the measure, Debian's runc 1.1, knows no id-mapped mounts, and so containerd refuses such pods to it.
//! What is expected here is what the OCI spec and runc 1.2 do.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{Run, wait_for};
use bulkhead_tests::container::{Container, ContainerSpec, text_of};
use bulkhead_tests::loop_device::LoopDevice;
use bulkhead_tests::network::fetch;
use bulkhead_tests::pod::{self, Pod, PodSpec, namespace_mode};
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

const ROWS: &[Row] = &[
    Row::alone("the handler announces user namespaces and recursive read-only mounts", announced).releases(SINCE_2),
    Row::alone("a container's ids are mapped as asked, and the image belongs to its root", identity).releases(SINCE_2),
    Row::alone("containers of a pod and their execs share one user namespace", shared).releases(SINCE_2),
    Row::alone("volumes have the owners that their mapping says, on both sides", volumes).releases(SINCE_2),
    Row::alone("root in the container is root of its files, whoever owns them", powers).releases(SINCE_2),
    Row::alone("users and groups of a container are those inside its namespace", users).releases(SINCE_2),
    Row::alone("proc, sysfs, mqueue, devices, shared memory and cgroup are there", kernel_file_systems)
        .releases(SINCE_2),
    Row::alone("host name, sysctls and network are the pod's, and its root has power over them", network)
        .releases(SINCE_2),
    Row::alone("with a pod-wide PID namespace, containers see one another", pid_pod).releases(SINCE_2),
    Row::alone("logs, statistics, a terminal and being killed for memory are as ever", life).releases(SINCE_2),
    Row::alone("a lone container of ctr has the namespace that its flags say", lone)
        .only(&[Runtime::Bulkhead])
        .releases(SINCE_2),
    Row::alone("a disk given to a lone container has the owner that it has outside", disk)
        .only(&[Runtime::Bulkhead])
        .releases(SINCE_2),
    Row::alone("a mapping without root is refused by the name of the field", rootless).releases(SINCE_2),
    Row::alone("where containerd leaves the network to the runtime, such a pod is refused and the host's stays", late)
        .only(&[Runtime::Bulkhead])
        .releases(&[Version::V1_7]),
];

/// 1.6 knows no user namespaces, and 1.7 leaves the network namespace of such a pod to the runtime.
const SINCE_2: &[Version] = &[Version::V2_4];

fn main() -> ExitCode {
    suite::run(&[Version::V1_7, Version::V2_4], &[Runtime::Bulkhead, Runtime::BulkheadSandbox], ROWS)
}

const SOON: Duration = Duration::from_secs(20);

/// Where the ids of the namespace begin outside.
const FIRST: u32 = 100_000;
const COUNT: u32 = 65_536;

fn mapping() -> Value {
    json!([{"container_id": 0, "host_id": FIRST, "length": COUNT}])
}

fn user_namespace() -> Value {
    json!({"mode": namespace_mode::POD, "uids": mapping(), "gids": mapping()})
}

fn pod_spec() -> PodSpec {
    PodSpec::new().set("/linux/security_context/namespace_options/userns_options", user_namespace())
}

fn of(spec: ContainerSpec) -> ContainerSpec {
    spec.set("/linux/security_context/namespace_options/userns_options", user_namespace())
}

fn start(context: &Context) -> Result<Pod> {
    run(context, pod_spec())
}

fn run(context: &Context, spec: PodSpec) -> Result<Pod> {
    Pod::start(&context.node, context.runtime.bare_handler(), spec)
}

fn idle(pod: &Pod) -> Result<Container<'_>> {
    pod.run(of(ContainerSpec::idle()))
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let metadata = fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?;
    Ok((metadata.uid(), metadata.gid()))
}

fn announced(context: &Context) -> Result<()> {
    let info: Value = serde_json::from_slice(&context.node.crictl(&["info"]).success()?.stdout)?;
    let handlers = info["runtimeHandlers"].as_array().with_context(|| format!("no handlers in {info}"))?;
    for (handler, user_namespaces) in [(context.runtime.bare_handler(), true), (context.runtime.handler(), false)] {
        let found = handlers.iter().find(|found| found["name"] == handler);
        let features = &found.with_context(|| format!("{handler} is not in {handlers:?}"))?["features"];
        ensure!(features["recursive_read_only_mounts"] == true, "of {handler} is announced {features}");
        // Where a handler has options containerd could not start the containers.
        ensure!((features["user_namespaces"] == true) == user_namespaces, "of {handler} is announced {features}");
    }
    Ok(())
}

fn identity(context: &Context) -> Result<()> {
    let pod = start(context)?;
    let container = idle(&pod)?;
    for file in ["uid_map", "gid_map"] {
        let said = container.shell(&format!("cat /proc/self/{file} /proc/1/{file}"))?;
        let line = format!("0 {FIRST} {COUNT}");
        let lines: Vec<_> = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        ensure!(lines == [line.clone(), line], "{file} is {said:?}");
    }
    let said = container
        .shell("id -u; id -g; cat /proc/self/setgroups; stat -c %u:%g / /bin /bin/busybox /etc/passwd /etc/hosts")?;
    ensure!(said.lines().eq(["0", "0", "allow", "0:0", "0:0", "0:0", "0:0", "0:0"]), "the container says {said:?}");
    // What it writes there is its own, too.
    let said =
        container.shell("touch /of-root && mkdir /made && stat -c %u:%g /of-root /made && echo x >> /etc/hosts")?;
    ensure!(said == "0:0\n0:0", "what it has made belongs to {said:?}");
    // A directory that the runtime makes.
    let cwd = pod.run(of(ContainerSpec::script("stat -c %u:%g .").set("/working_dir", "/new/deep")))?;
    let (exit, log) = cwd.finish(SOON)?;
    ensure!(exit.code == 0 && text_of(&log, "stdout") == "0:0", "the working directory: {exit:?}, {log:?}");
    pod.remove()
}

fn shared(context: &Context) -> Result<()> {
    let pod = start(context)?;
    let (first, second) = (idle(&pod)?, idle(&pod)?);
    let look = "for file in 1/ns/user self/ns/user self/ns/net self/ns/ipc self/ns/uts; do readlink /proc/$file; done";
    let (ours, theirs) = (first.shell(look)?, second.shell(look)?);
    let lines: Vec<_> = ours.lines().collect();
    ensure!(lines.len() == 5 && lines[0] == lines[1], "an exec is not where the program is: {ours}");
    ensure!(ours == theirs, "one container is in {ours}, the other in {theirs}");
    // An exec with a terminal takes another way to its pty.
    let said = first.crictl(&["exec", "-i", "-t", &first.id, "sh", "-c", "id -u; stat -c %u $(tty)"]);
    let terminal = bulkhead_tests::terminal::Terminal::of(&said, 24, 80)?;
    terminal.expect("0\r\n0\r\n", SOON)?;
    pod.remove()
}

fn volumes(context: &Context) -> Result<()> {
    let (mapped, plain) = (context.scratch.join("mapped"), context.scratch.join("plain"));
    for (directory, first) in [(&mapped, 0), (&plain, FIRST)] {
        fs::create_dir(directory)?;
        for (name, id) in [("of-root", 0), ("of-user", 1000)] {
            fs::write(directory.join(name), name)?;
            chown(directory.join(name), Some(first + id), Some(first + id))?;
        }
        chown(directory, Some(first), Some(first))?;
    }
    fs::write(plain.join("of-host"), "")?;
    fs::set_permissions(plain.join("of-host"), fs::Permissions::from_mode(0o600))?;
    let pod = start(context)?;
    let spec = of(ContainerSpec::idle())
        .push(
            "mounts",
            json!({
                "host_path": mapped, "container_path": "/mapped", "uidMappings": mapping(), "gidMappings": mapping(),
            }),
        )
        .mount(&plain, "/plain", false);
    let container = pod.run(spec)?;
    for directory in ["/mapped", "/plain"] {
        let said = container.shell(&format!("cd {directory}; stat -c %u:%g . of-root of-user; cat of-root"))?;
        ensure!(said == "0:0\n0:0\n1000:1000\nof-root", "{directory} shows {said:?}");
        let script = format!(
            "cd {directory}; echo x > new && mkdir dir && ln -s new link && touch moved && chown 33:44 moved && chown 1000 of-root"
        );
        container.shell(&script)?;
    }
    let said = container
        .shell("stat -c %u:%g /plain/of-host; cat /plain/of-host 2>&1 || true; chown 0 /plain/of-host 2>&1 || true")?;
    ensure!(said.starts_with("65534:65534\n"), "a file of the host's root shows {said:?}");
    ensure!(
        said.matches("denied").count() + said.matches("permitted").count() >= 2,
        "a file of the host's root: {said:?}"
    );
    for (directory, first) in [(&mapped, 0), (&plain, FIRST)] {
        for (name, uid, gid) in [
            ("new", 0, 0),
            ("dir", 0, 0),
            ("link", 0, 0),
            ("moved", 33, 44),
            ("of-root", 1000, 0),
            ("of-user", 1000, 1000),
        ] {
            let found = owner(&directory.join(name))?;
            ensure!(found == (first + uid, first + gid), "{name} in {} belongs to {found:?}", directory.display());
        }
    }
    // Read-only, mapped, and a single file.
    let file = of(ContainerSpec::script("stat -c %u /file; echo x >> /file")).push(
        "mounts",
        json!({
            "host_path": mapped.join("of-user"), "container_path": "/file", "readonly": true,
            "uidMappings": mapping(), "gidMappings": mapping(),
        }),
    );
    let (exit, log) = pod.run(file)?.finish(SOON)?;
    ensure!(exit.code != 0 && text_of(&log, "stdout") == "1000", "a mapped file: {exit:?}, {log:?}");
    ensure!(text_of(&log, "stderr").contains("Read-only"), "a mapped file: {log:?}");
    pod.remove()
}

fn powers(context: &Context) -> Result<()> {
    let pod = start(context)?;
    let container = idle(&pod)?;
    // Directories that belong to somebody else in the container, as the programs of many images have.
    let script = "mkdir -m 700 /theirs && chown 1000:1000 /theirs && echo x > /theirs/file && mkdir /theirs/dir && mkfifo /theirs/fifo \
                  && stat -c %u:%g /theirs/file && rm -r /theirs/dir && mv /theirs/file /theirs/other && cat /theirs/other \
                  && cp /bin/busybox /tmp/id && chmod 4755 /tmp/id && chown 1234 /tmp/id && chmod 4755 /tmp/id && stat -c %a:%u /tmp/id";
    let said = container.shell(script)?;
    ensure!(said == "0:0\nx\n4755:1234", "root's files: {said:?}");
    pod.remove()
}

fn users(context: &Context) -> Result<()> {
    let pod = start(context)?;
    let script = "id -u; id -g; id -G; touch /tmp/mine && stat -c %u:%g /tmp/mine; cat /proc/self/uid_map; echo seen >/dev/stdout";
    let spec = of(ContainerSpec::script(script))
        .security("run_as_user", json!({"value": 1234}))
        .security("run_as_group", json!({"value": 2345}))
        .security("supplemental_groups", json!([3456]));
    let (exit, log) = pod.run(spec)?.finish(SOON)?;
    let said = text_of(&log, "stdout");
    let lines: Vec<_> = said.lines().collect();
    ensure!(exit.code == 0 && lines.len() == 6, "exit {exit:?}, log {log:?}");
    ensure!(lines[..2] == ["1234", "2345"] && lines[2].contains("3456") && lines[3] == "1234:2345", "ids: {said:?}");
    ensure!(lines[4].contains("100000") && lines[5] == "seen", "ids: {said:?}");
    let container = pod.run(of(ContainerSpec::idle()).security("run_as_user", json!({"value": 1234})))?;
    let said = container.shell("id -u; readlink /proc/1/ns/user; readlink /proc/self/ns/user")?;
    let lines: Vec<_> = said.lines().collect();
    ensure!(lines[0] == "1234" && lines[1] == lines[2], "an exec: {said:?}");
    // containerd looks as well, for the owner of the container's pipes.
    let outside = of(ContainerSpec::idle()).security("run_as_user", json!({"value": 70_000}));
    let output = pod.create(outside)?.try_start()?;
    ensure!(output.code != 0 && output.stderr.contains("70000"), "an unmapped user: {}", output.describe());
    pod.remove()
}

fn kernel_file_systems(context: &Context) -> Result<()> {
    let pod = start(context)?;
    let container = idle(&pod)?;
    let mounts = container.shell("cat /proc/mounts")?;
    for line in [
        " /proc proc rw",
        " /sys sysfs ro",
        " /dev tmpfs rw",
        " /dev/pts devpts rw",
        " /dev/mqueue mqueue rw",
        " /sys/fs/cgroup cgroup2 ro",
        " /dev/shm tmpfs rw",
    ] {
        ensure!(mounts.contains(line), "{line:?} is missing in {mounts}");
    }
    let script = "cat /sys/fs/cgroup/cgroup.controllers | grep -c memory; cat /proc/self/cgroup; ls /sys/class/net; \
                  echo x > /dev/null && head -c 4 /dev/zero | wc -c; stat -c %u:%a /dev/shm; touch /dev/mqueue/queue && stat -c %u /dev/mqueue/queue";
    let said = container.shell(script)?;
    ensure!(said.lines().eq(["1", "0::/", "eth0", "lo", "4", "0:1777", "0"]), "the container says {said:?}");
    let other = idle(&pod)?;
    container.shell("echo here > /dev/shm/note")?;
    ensure!(other.shell("cat /dev/shm/note; ls /dev/mqueue")? == "here\nqueue", "shared memory is not shared");
    for script in
        ["echo 1 > /proc/sys/net/ipv4/ip_forward", "mount -t tmpfs none /tmp", "echo x > /sys/kernel/mm/ksm/run"]
    {
        let denied = container.exec(&["sh", "-c", script])?;
        ensure!(denied.code != 0, "{script:?} worked");
    }
    pod.remove()
}

fn network(context: &Context) -> Result<()> {
    let spec = pod_spec()
        .set("/linux/sysctls/net.ipv4.ip_local_port_range", "20000 30000")
        .set("/linux/sysctls/kernel.shm_rmid_forced", "1");
    let pod = run(context, spec)?;
    let server =
        ContainerSpec::new(&["httpd", "-f", "-p", "80", "-h", "/www"]).security("run_as_user", json!({"value": 1234}));
    let _serving = pod.run(of(server))?;
    let address = pod.addresses()?.into_iter().next().context("the pod has no address")?;
    wait_for("the page", SOON, || {
        let page = fetch(address, 80)?;
        ensure!(page.contains("a page from inside the pod"), "the page is {page:?}");
        Ok(())
    })?;
    let container =
        pod.run(of(ContainerSpec::idle()).security("capabilities", json!({"add_capabilities": ["NET_ADMIN"]})))?;
    let said = container.shell("hostname; cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced; wget -q -O - http://127.0.0.1/")?;
    let words: Vec<_> = said.split_whitespace().collect();
    ensure!(
        words[..4] == ["compartment", "20000", "30000", "1"] && said.contains("a page"),
        "the container says {said:?}"
    );
    // Raw sockets are in containerd's default set, devices of one's own in the added one.
    container.shell(
        "ping -c 1 -W 5 127.0.0.1 && ip link add name veil type dummy && ip link set veil up && ip link del veil",
    )?;
    pod.remove()
}

fn pid_pod(context: &Context) -> Result<()> {
    let options = "/linux/security_context/namespace_options/pid";
    let pod = run(context, pod_spec().set(options, namespace_mode::POD))?;
    let spec = || of(ContainerSpec::idle()).set(options, namespace_mode::POD);
    let (first, _second) = (pod.run(spec())?, pod.run(spec())?);
    wait_for("both programs to be seen", SOON, || {
        let said = first.shell("ps -o args | grep -c '^sleep 1000000'; stat -c %u /proc/1")?;
        ensure!(said == "2\n0", "the container sees {said:?}");
        Ok(())
    })?;
    pod.remove()?;
    // `kubectl debug --target`: the namespace of one container is another's.
    let pod = start(context)?;
    let target = idle(&pod)?;
    let pid = json!({"pid": namespace_mode::TARGET, "target_id": target.id, "userns_options": user_namespace()});
    let debugger = pod.run(ContainerSpec::idle().security("namespace_options", pid))?;
    let script =
        "ps -o args | grep -c '^sleep 1000000'; (readlink /proc/1/ns/user; readlink /proc/self/ns/user) | uniq | wc -l";
    wait_for("both programs to be seen", SOON, || {
        let said = debugger.shell(script)?;
        ensure!(said == "2\n1", "the debugger sees {said:?}");
        Ok(())
    })?;
    pod.remove()
}

fn life(context: &Context) -> Result<()> {
    let pod = start(context)?;
    let (exit, log) = pod.run(of(ContainerSpec::script("echo out; echo err >&2; exit 7")))?.finish(SOON)?;
    ensure!(
        exit.code == 7 && text_of(&log, "stdout") == "out" && text_of(&log, "stderr") == "err",
        "{exit:?}, {log:?}"
    );
    let busy = idle(&pod)?;
    wait_for("statistics", SOON, || {
        let stats = busy.stats()?;
        let used = stats.pointer("/memory/workingSetBytes/value").and_then(Value::as_str).unwrap_or("0");
        ensure!(used != "0", "the statistics are {stats}");
        Ok(())
    })?;
    let greedy = pod.run(of(ContainerSpec::new(&["tail", "/dev/zero"]).memory(24)))?;
    greedy.wait_for_oom_kill(Duration::from_mins(1))?;
    greedy.remove()?;
    let terminal = pod.run(of(ContainerSpec::script("tty && stat -c %u $(tty)").terminal()))?;
    let (exit, log) = terminal.finish(SOON)?;
    ensure!(exit.code == 0 && text_of(&log, "stdout").contains('0'), "with a terminal: {exit:?}, {log:?}");
    busy.stop(5)?;
    pod.remove()
}

/// What `script` says in a lone container with `options` and a user namespace.
fn said_alone(context: &Context, options: &[&str], script: &str) -> Result<String> {
    let ctr = context.ctr();
    let map = format!("0:{FIRST}:{COUNT}");
    let id = ctr.new_id("mapped");
    // Without the options by which the other tests of ctr name their configuration.
    let run = ctr.command(&["run", "--runtime", context.runtime.runtime_type()]);
    let run = run.args(["--rm", "--uidmap", &map, "--gidmap", &map]).args(options);
    Ok(run.args([bulkhead_tests::image::BUSYBOX, &id, "sh", "-c", script]).success()?.text())
}

fn lone(context: &Context) -> Result<()> {
    let script = "cat /proc/self/uid_map; stat -c %u:%g / /bin/busybox; touch /new && stat -c %u /new";
    let said = said_alone(context, &[], script)?;
    let words: Vec<_> = said.split_whitespace().collect();
    ensure!(words == ["0", "100000", "65536", "0:0", "0:0", "0"], "the program says {said:?}");
    Ok(())
}

fn disk(context: &Context) -> Result<()> {
    let device = LoopDevice::here(&context.scratch.join("file"))?;
    let node = context.scratch.join("node");
    mknodat(CWD, &node, FileType::BlockDevice, Mode::RUSR, fs::metadata(&device.path)?.rdev())?;
    fs::set_permissions(&node, fs::Permissions::from_mode(0o620))?;
    chown(&node, Some(FIRST + 7), Some(FIRST))?;
    let path = node.display().to_string();
    // Root of the namespace is root of what belongs to users in it.
    let script = format!(
        "stat -c %u:%g:%a {path}; head -c 6 {path}; echo; \
         echo after | dd of={path} bs=512 seek=1 conv=sync,fsync,notrunc 2>/dev/null"
    );
    let said = said_alone(context, &["--device", &path], &script)?;
    ensure!(said == "7:0:620\nbefore", "of the disk the program says {said:?}");
    device.written("after\n")
}

fn rootless(context: &Context) -> Result<()> {
    let map = json!([{"container_id": 1, "host_id": FIRST, "length": COUNT}]);
    let options = json!({"mode": namespace_mode::POD, "uids": map, "gids": map});
    let spec = PodSpec::new().set("/linux/security_context/namespace_options/userns_options", options);
    let (pod, output) = pod::try_start(&context.node, context.runtime.bare_handler(), spec)?;
    ensure!(pod.is_none(), "a pod without a root runs");
    ensure!(output.stderr.contains("does not map id 0"), "the refusal is {}", output.describe());
    Ok(())
}

fn late(context: &Context) -> Result<()> {
    // Bridges and veths of other tests come and go meanwhile. Their taps do not show, but one of this pod's would.
    let counts =
        |line: &&str| line.starts_with("bhtap") || !["bh", "veth"].iter().any(|prefix| line.starts_with(prefix));
    let links = || {
        let all = Run::new("/sbin/ip").args(["-brief", "link"]).success()?.text();
        Ok::<_, anyhow::Error>(all.lines().filter(counts).collect::<Vec<_>>().join("\n"))
    };
    let before = links()?;
    let (pod, output) = pod::try_start(&context.node, context.runtime.bare_handler(), pod_spec())?;
    ensure!(pod.is_none(), "a pod without a network runs");
    ensure!(output.stderr.contains("(hostUsers: false)"), "the refusal is {}", output.describe());
    let after = links()?;
    ensure!(before == after, "the host's links were\n{before}\nand are\n{after}");
    Ok(())
}
