//! Pods and containers through CRI behave as with runc, life cycle, isolation, resources and network.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::container::{ContainerSpec, text_of};
use bulkhead_tests::mounts::{HostMount, propagation};
use bulkhead_tests::network::{self, MTU};
use bulkhead_tests::pod::{Pod, PodSpec, namespace_mode};
use bulkhead_tests::row::{ALL, BULKHEAD, Context, Row};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use serde_json::json;

const ROWS: &[Row] = &[
    // Life cycle.
    Row::alone("a pod starts, is ready, stops, is not ready and goes", pod_life),
    Row::alone("stop and remove may be repeated, and unknown ids are told", idempotence),
    Row::alone("a pod is removed by force with its containers running", force),
    Row::in_pod("a container is created, runs, exits and is removed", container_life),
    Row::in_pod("a container that was never started can be removed", never_started),
    Row::in_pod("exit codes come out as they are", exit_codes),
    Row::in_pod("a program killed by a signal exits with 128 and the signal", killed_by_signal),
    Row::in_pod("a program that does not exist fails its start with its name", program_not_found),
    Row::in_pod("stop lets the program end in its grace period", stop_in_grace),
    Row::in_pod("stop kills a program that outlives its grace period", stop_after_grace),
    Row::in_pod("inspect tells pid, times and mounts", inspect),
    Row::alone("a container restarted under the same name starts afresh", restarted),
    // Exec.
    Row::in_pod("exec runs beside the program and tells output and exit code", exec),
    Row::in_pod("exec of a program that does not exist names it", exec_not_found),
    Row::in_pod("exec gives up after its time-out", exec_timeout),
    // What the program finds.
    Row::in_pod("environment, working directory and arguments are as asked", environment),
    Row::in_pod("users and groups are as asked", users),
    Row::in_pod("capabilities are as asked", capabilities),
    Row::in_pod("the default seccomp profile is on, and off when unconfined", seccomp),
    Row::in_pod("a local seccomp profile refuses the call it names", seccomp_local),
    Row::in_pod("no new privileges is set when asked and only then", no_new_privileges),
    Row::in_pod("a program and an exec start with no signal ignored or blocked", signals),
    Row::in_pod("masked paths are empty and read-only paths refuse writes", masked_paths),
    Row::in_pod("a read-only root refuses writes, a volume on it takes them", read_only_root),
    Row::in_pod("a privileged container may mount", privileged),
    Row::in_pod("the devices are the usual ones and no others", devices),
    Row::alone("sysctls of the pod hold in its containers", sysctls),
    Row::in_pod("any user may listen on any port and ping", unprivileged_network).releases(&[Version::V2_4]),
    Row::in_pod("hostname, hosts and DNS are the pod's", names),
    Row::in_pod("hosts is one file for the pod's containers, and writable unless the root is not", shared_hosts),
    Row::in_pod("shared memory is there and shared by the pod", shared_memory),
    // Volumes.
    Row::in_pod("a directory bound read-write shows changes on both sides", bind_directory),
    Row::in_pod("a directory bound read-only refuses writes", bind_read_only),
    Row::in_pod("read-only is for the topmost mount of a volume, or for all when asked", read_only_recursive)
        .releases(&[Version::V2_4]),
    Row::in_pod("mounts of the host arrive later in the volumes that ask for them", propagation),
    Row::in_pod("a bound file shows nothing of its directory", bind_file),
    Row::in_pod("a switched symbolic link in a volume is seen", switched_link),
    Row::in_pod("file owners and modes in a volume are kept", owners),
    // Resources.
    Row::in_pod("statistics follow the program's CPU and memory", statistics),
    Row::in_pod("a program over its memory limit ends as OOMKilled", oom),
    Row::in_pod("statistics of the pod are those of its containers", pod_statistics)
        .releases(&[Version::V2_4])
        .only(BULKHEAD),
    // Together.
    Row::in_pod("two containers share localhost", localhost),
    Row::in_pod("with a PID namespace each, containers do not see one another", pid_container),
    Row::alone("with one PID namespace, containers see one another", pid_pod),
    Row::alone("with hostPID, containers see one another and nothing of the host", pid_host).only(BULKHEAD),
    Row::in_pod("two containers have file systems of their own", own_filesystems),
    // Network.
    Row::in_pod("a page is fetched from the pod's address, IPv4 and IPv6", page),
    Row::in_pod("the pod reaches the host, IPv4 and IPv6", reach_host),
    Row::in_pod("interface, MTU, addresses and routes are those of CNI", interface),
    Row::alone("two pods reach one another", pod_to_pod),
    Row::alone("a host port leads to the pod", host_port),
    // What sets Bulkhead apart.
    Row::in_pod("the pod has a kernel of its own", own_kernel).only(BULKHEAD),
    Row::alone("annotations size the virtual machine and choose its type", annotations).only(BULKHEAD),
    Row::alone("limits of the pod size the virtual machine", pod_limits).only(BULKHEAD),
    Row::in_pod("the root file system lists, links and renames as it should", root_filesystem),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], ALL, ROWS)
}

/// Long enough for what takes a moment, also while other pods boot.
const SOON: Duration = Duration::from_secs(20);

/// Runs a script to its end and returns its stdout.
fn outcome(pod: &Pod, spec: ContainerSpec) -> Result<String> {
    let (exit, log) = pod.run(spec)?.finish(SOON)?;
    let said = text_of(&log, "stdout");
    ensure!(exit.code == 0, "exit {exit:?}, stdout {said:?}, stderr {:?}", text_of(&log, "stderr"));
    Ok(said)
}

/// One line of /proc/self/status of a container's program.
fn status_field(pod: &Pod, spec: impl FnOnce(ContainerSpec) -> ContainerSpec, field: &str) -> Result<String> {
    let said = outcome(pod, spec(ContainerSpec::new(&["grep", &format!("^{field}:"), "/proc/self/status"])))?;
    Ok(said.trim_start_matches(field).trim_start_matches(':').trim().to_owned())
}

fn pod_life(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    ensure!(pod.is_ready()?, "not ready after runp");
    let listed = pod.crictl(&["pods", "--no-trunc", "-o", "json", "--id", &pod.id]).success()?.text();
    ensure!(listed.contains("SANDBOX_READY"), "crictl pods says {listed}");
    pod.stop()?;
    ensure!(!pod.is_ready()?, "ready after stopp");
    let (node, id) = (std::sync::Arc::clone(&pod.node), pod.id.clone());
    pod.remove()?;
    Pod::check_unknown(&node, &id)
}

fn idempotence(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let container = pod.run(ContainerSpec::idle())?;
    container.stop(5)?;
    container.stop(5)?;
    let id = container.id.clone();
    container.remove()?;
    let said = pod.crictl(&["inspect", &id]).output()?.failure()?;
    ensure!(said.contains("not found") || said.contains("NotFound"), "crictl inspect said {said:?}");
    let said = pod.crictl(&["exec", "--sync", &id, "true"]).output()?.failure()?;
    ensure!(said.contains("not found") || said.contains("NotFound"), "crictl exec said {said:?}");
    pod.stop()?;
    pod.stop()?;
    let (node, id) = (std::sync::Arc::clone(&pod.node), pod.id.clone());
    pod.remove()?;
    // CRI wants a second removal to succeed or to say that there is nothing.
    let again = node.crictl(&["rmp", &id]).output()?;
    ensure!(
        again.code == 0 || again.stderr.contains("not found") || again.stderr.contains("NotFound"),
        "{}",
        again.describe()
    );
    Ok(())
}

fn force(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    pod.run(ContainerSpec::script("trap '' TERM; while :; do sleep 1; done"))?;
    pod.run(ContainerSpec::idle())?;
    pod.remove_by_force()
}

fn container_life(_: &Context, pod: &Pod) -> Result<()> {
    let script = "echo out; echo err >&2; read line < /run/go; echo \"$line\"; exit 3";
    let container = pod.create(ContainerSpec::script(&format!("mkfifo /run/go; {script}")))?;
    ensure!(container.state()? == "CONTAINER_CREATED", "state {}", container.state()?);
    ensure!(container.log()?.is_empty(), "it ran before its start");
    container.start()?;
    ensure!(container.state()? == "CONTAINER_RUNNING", "state {}", container.state()?);
    container.wait_for_log("out", SOON)?;
    container.shell("echo go on > /run/go")?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 3 && exit.reason == "Error", "exit {exit:?}");
    ensure!(container.log_text("stdout")? == "out\ngo on", "stdout {:?}", container.log_text("stdout"));
    ensure!(container.log_text("stderr")? == "err", "stderr {:?}", container.log_text("stderr"));
    let logs = container.crictl(&["logs", "--tail", "1", &container.id]).success()?;
    ensure!(logs.text() == "go on", "crictl logs says {}", logs.describe());
    let id = container.id.clone();
    container.remove()?;
    let left = pod.crictl(&["ps", "-a", "-q", "--no-trunc"]).success()?.text();
    ensure!(!left.contains(&id), "still listed");
    Ok(())
}

fn never_started(_: &Context, pod: &Pod) -> Result<()> {
    pod.create(ContainerSpec::idle())?.remove()
}

fn exit_codes(_: &Context, pod: &Pod) -> Result<()> {
    for (code, reason) in [(0, "Completed"), (1, "Error"), (255, "Error")] {
        let (exit, _) = pod.run(ContainerSpec::script(&format!("exit {code}")))?.finish(SOON)?;
        ensure!(exit.code == code && exit.reason == reason, "exit {code} became {exit:?}");
    }
    Ok(())
}

fn killed_by_signal(_: &Context, pod: &Pod) -> Result<()> {
    // PID 1 of a namespace ignores what it does not handle, so the shell dies of a signal only from outside.
    let (exit, _) = pod.run(ContainerSpec::script("sh -c 'kill -SEGV $$'; exit $?"))?.finish(SOON)?;
    ensure!(exit.code == 139, "a child's SIGSEGV became {exit:?}");
    let container = pod.run(ContainerSpec::new(&["sleep", "1000"]))?;
    container.stop(0)?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 137, "SIGKILL became {exit:?}");
    container.remove()
}

fn program_not_found(_: &Context, pod: &Pod) -> Result<()> {
    for (program, accepted) in [("no-such-program", "not found"), ("/no/such/path", "no such file"), ("/etc", "")] {
        let container = pod.create(ContainerSpec::new(&[program]))?;
        let said = container.try_start()?.failure()?;
        ensure!(said.contains(program) && said.contains(accepted), "crictl start of {program} said {said:?}");
        let status = container.status()?;
        ensure!(status["state"] == "CONTAINER_EXITED" && status["exitCode"] == 128, "its status is {status}");
        container.remove()?;
    }
    Ok(())
}

fn stop_in_grace(_: &Context, pod: &Pod) -> Result<()> {
    let script = "trap 'sleep 1; echo bye; exit 7' TERM; echo ready; while :; do sleep 1000 & wait $!; done";
    let container = pod.run(ContainerSpec::script(script))?;
    container.wait_for_log("ready", SOON)?;
    let took = container.stop(15)?.elapsed;
    ensure!((1.0..8.0).contains(&took.as_secs_f32()), "stop took {took:?}");
    let (exit, log) = container.finish(SOON)?;
    ensure!(exit.code == 7, "exit {exit:?}");
    ensure!(text_of(&log, "stdout") == "ready\nbye", "stdout {:?}", text_of(&log, "stdout"));
    Ok(())
}

fn stop_after_grace(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::script("trap '' TERM; echo ready; while :; do sleep 1; done"))?;
    container.wait_for_log("ready", SOON)?;
    let took = container.stop(2)?.elapsed;
    ensure!((1.9..10.0).contains(&took.as_secs_f32()), "stop took {took:?}");
    let (exit, _) = container.finish(SOON)?;
    ensure!(exit.code == 137, "exit {exit:?}");
    Ok(())
}

fn inspect(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle().mount(&context.scratch, "/data", false))?;
    let all = container.inspect()?;
    let pid = all["info"]["pid"].as_i64().context("no pid in crictl inspect")?;
    ensure!(fs::exists(format!("/proc/{pid}"))?, "process {pid} is not there");
    let status = &all["status"];
    for field in ["createdAt", "startedAt"] {
        let time = status[field].as_str().unwrap_or_default();
        ensure!(time.starts_with("20"), "{field} is {time:?}");
    }
    ensure!(status["mounts"][0]["containerPath"] == "/data", "mounts are {}", status["mounts"]);
    container.stop(5)?;
    let status = container.status()?;
    let time = status["finishedAt"].as_str().unwrap_or_default();
    ensure!(time.starts_with("20"), "finishedAt is {time:?}");
    container.remove()
}

fn restarted(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    for attempt in 0..3 {
        let spec =
            ContainerSpec::script("test -e /mark && exit 1; touch /mark; exit 0").set("/metadata/attempt", attempt);
        let (exit, _) = pod.run(spec)?.finish(SOON)?;
        ensure!(exit.code == 0, "attempt {attempt} found the mark of the one before: {exit:?}");
    }
    pod.remove()
}

fn exec(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle().env("COLOUR", "teal"))?;
    let script = "echo $COLOUR; echo wrong >&2; exit 5";
    let output = container.exec(&["sh", "-c", script])?.exited(5)?;
    ensure!(output.stderr.contains("wrong"), "stderr {:?}", output.stderr);
    let output = container.exec_streamed(&["sh", "-c", script], "")?.exited(5)?;
    ensure!(output.text() == "teal", "stdout {:?}", output.text());
    ensure!(output.stderr.contains("wrong"), "stderr {:?}", output.stderr);
    ensure!(container.shell(script.strip_suffix("exit 5").unwrap_or_default())? == "teal\n\nwrong");
    container.exec(&["sh", "-c", "kill -9 $$"])?.exited(137)?;
    ensure!(
        container.shell("ps -o pid,args | grep -c '^ *1 .*trap'")? == "1",
        "exec does not see the program as PID 1"
    );
    container.remove_by_force()
}

fn exec_not_found(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let said = container.exec(&["no-such-program"])?.failure()?;
    ensure!(said.contains("no-such-program") && said.contains("not found"), "crictl exec said {said:?}");
    ensure!(container.shell("echo well")? == "well", "exec does not work after a failed one");
    container.remove_by_force()
}

fn exec_timeout(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let output = container.crictl(&["exec", "--sync", "--timeout", "1", &container.id, "sleep", "321"]).output()?;
    let took = output.elapsed;
    let said = output.failure()?;
    ensure!(said.contains("timeout") || said.contains("Deadline"), "crictl exec said {said:?}");
    ensure!(took < Duration::from_secs(10), "it took {took:?}");
    wait_for("the program to be gone", SOON, || {
        let left = container.shell("ps -o args | grep -c '[s]leep 321' || true")?;
        ensure!(left == "0", "{left} of it run");
        Ok(())
    })?;
    container.remove_by_force()
}

fn environment(_: &Context, pod: &Pod) -> Result<()> {
    let spec = ContainerSpec::script("pwd; echo \"$GREETING\"; echo \"$0|$1|$2\"; echo \"$PATH\"")
        .env("GREETING", "good day, \"world\" $HOME")
        .set("/working_dir", "/var")
        .set("/args", json!(["zero", "one two", "drei ü"]));
    let said = outcome(pod, spec)?;
    let expected = "/var\ngood day, \"world\" $HOME\nzero|one two|drei ü\n/usr/local/bin:/usr/bin:/bin:/sbin";
    ensure!(said == expected, "the program found {said:?}");
    Ok(())
}

fn users(_: &Context, pod: &Pod) -> Result<()> {
    let ids = || ContainerSpec::script("echo $(id -u) $(id -g) $(id -G)");
    let by_number = ids()
        .security("run_as_user", json!({"value": 1234}))
        .security("run_as_group", json!({"value": 2345}))
        .security("supplemental_groups", json!([3456]));
    let said = outcome(pod, by_number)?;
    ensure!(said.starts_with("1234 2345 ") && said.contains("3456"), "ids by number: {said}");
    let by_name = ids().security("run_as_username", "tester");
    let said = outcome(pod, by_name)?;
    ensure!(said.starts_with("1000 1000") && said.contains("29"), "ids by name: {said}");
    // An exec runs as the container does.
    let container = pod.run(ContainerSpec::idle().security("run_as_user", json!({"value": 1234})))?;
    let said = container.shell("id -u")?;
    ensure!(said == "1234", "exec runs as {said}");
    container.remove_by_force()
}

fn capability_bits(pod: &Pod, security: serde_json::Value) -> Result<u64> {
    let text = status_field(pod, |spec| spec.security("capabilities", security), "CapEff")?;
    u64::from_str_radix(&text, 16).with_context(|| format!("CapEff {text}"))
}

fn capabilities(_: &Context, pod: &Pod) -> Result<()> {
    const CHOWN: u64 = 1 << 0;
    const SYS_PTRACE: u64 = 1 << 19;
    const DEFAULT: u64 = 0xa804_25fb;
    let bits = capability_bits(pod, json!({}))?;
    ensure!(bits == DEFAULT, "the default set is {bits:x}");
    let bits = capability_bits(pod, json!({"add_capabilities": ["SYS_PTRACE"], "drop_capabilities": ["CHOWN"]}))?;
    ensure!(bits == (DEFAULT | SYS_PTRACE) & !CHOWN, "added and dropped: {bits:x}");
    let bits = capability_bits(pod, json!({"drop_capabilities": ["ALL"]}))?;
    ensure!(bits == 0, "all dropped: {bits:x}");
    Ok(())
}

fn seccomp(_: &Context, pod: &Pod) -> Result<()> {
    // CRI: 0 is the runtime's default profile, 1 none.
    for (profile, expected) in [(0, "2"), (1, "0")] {
        let found = status_field(pod, |spec| spec.security("seccomp", json!({"profile_type": profile})), "Seccomp")?;
        ensure!(found == expected, "profile type {profile} gives Seccomp: {found}");
    }
    Ok(())
}

fn seccomp_local(context: &Context, pod: &Pod) -> Result<()> {
    let profile = context.scratch.join("profile.json");
    let names = ["chmod", "fchmod", "fchmodat", "fchmodat2"];
    let rules = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    });
    fs::write(&profile, serde_json::to_vec(&rules)?)?;
    let seccomp = json!({"profile_type": 2, "localhost_ref": profile});
    let spec = ContainerSpec::script("chmod 700 /tmp 2>&1; echo code $?").security("seccomp", seccomp);
    let said = outcome(pod, spec)?;
    ensure!(said.contains("Operation not permitted") && said.contains("code 1"), "chmod said {said:?}");
    Ok(())
}

fn no_new_privileges(_: &Context, pod: &Pod) -> Result<()> {
    for (asked, expected) in [(true, "1"), (false, "0")] {
        let found = status_field(pod, |spec| spec.security("no_new_privs", asked), "NoNewPrivs")?;
        ensure!(found == expected, "no_new_privs {asked} gives NoNewPrivs: {found}");
    }
    Ok(())
}

fn signals(_: &Context, pod: &Pod) -> Result<()> {
    // Shells tell which signals they found ignored, and cannot undo it: `yes | head` would never end.
    let container = pod.run(ContainerSpec::new(&["sleep", "1000"]))?;
    let of_program = container.shell("grep -E 'SigIgn|SigBlk' /proc/1/status")?;
    let of_exec = container.exec(&["grep", "-E", "SigIgn|SigBlk", "/proc/self/status"])?.success()?.text();
    for (who, said) in [("the program", of_program), ("an exec", of_exec)] {
        for line in said.lines() {
            let (name, mask) = line.split_once(':').with_context(|| format!("not a line of status: {line}"))?;
            // Signals 32 and 33 belong to the C library.
            let signals = u64::from_str_radix(mask.trim(), 16)? & 0x7fff_ffff;
            ensure!(signals == 0, "{who} starts with {name} {signals:x}");
        }
    }
    container.remove_by_force()
}

fn masked_paths(_: &Context, pod: &Pod) -> Result<()> {
    let script =
        "wc -c < /proc/timer_list; ls /sys/firmware | wc -l; echo x > /proc/sys/kernel/domainname || echo refused";
    let spec = ContainerSpec::script(script)
        .security("masked_paths", json!(["/proc/timer_list", "/sys/firmware"]))
        .security("readonly_paths", json!(["/proc/sys"]));
    let said = outcome(pod, spec)?;
    ensure!(said == "0\n0\nrefused", "the program found {said:?}");
    Ok(())
}

fn read_only_root(context: &Context, pod: &Pod) -> Result<()> {
    let script = "touch /x 2>&1; touch /data/y && echo written; touch /dev/shm/z && echo shm";
    let spec = ContainerSpec::script(script).security("readonly_rootfs", true).mount(&context.scratch, "/data", false);
    let said = outcome(pod, spec)?;
    ensure!(said.contains("Read-only file system") && said.ends_with("written\nshm"), "the program found {said:?}");
    Ok(())
}

fn privileged(_: &Context, pod: &Pod) -> Result<()> {
    let script = "mkdir -p /mnt && mount -t tmpfs none /mnt 2>&1 && echo mounted";
    let said = outcome(pod, ContainerSpec::script(&format!("{script} || true")))?;
    ensure!(said.contains("denied") || said.contains("not permitted"), "an ordinary container's mount said {said:?}");
    // A privileged container needs a pod that is; the sandbox's own flag only matters for that check.
    let spec = ContainerSpec::script(script)
        .security("capabilities", json!({"add_capabilities": ["SYS_ADMIN"]}))
        .security("seccomp", json!({"profile_type": 1}));
    let said = outcome(pod, spec)?;
    ensure!(said == "mounted", "a container with SYS_ADMIN said {said:?}");
    Ok(())
}

fn devices(_: &Context, pod: &Pod) -> Result<()> {
    let script = "ls /dev | tr '\\n' ' '; echo; head -c 16 /dev/urandom | wc -c; echo gone > /dev/null; mknod /tmp/disk b 8 0 \
                  && cat /tmp/disk 2>&1";
    let (_, log) = pod.run(ContainerSpec::script(script))?.finish(SOON)?;
    let said = text_of(&log, "stdout");
    let names: Vec<_> = said.lines().next().unwrap_or_default().split_whitespace().collect();
    for name in ["full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"]
    {
        ensure!(names.contains(&name), "/dev/{name} is missing in {names:?}");
    }
    for name in ["kmsg", "mem", "sda", "vda"] {
        ensure!(!names.contains(&name), "/dev/{name} is there");
    }
    ensure!(said.contains("\n16\n"), "reading urandom said {said:?}");
    ensure!(said.contains("not permitted"), "opening a disk that was not given said {said:?}");
    Ok(())
}

fn sysctls(context: &Context) -> Result<()> {
    let wanted = [("net.ipv4.ip_local_port_range", "20000 30000"), ("kernel.shm_rmid_forced", "1")];
    let mut spec = PodSpec::new();
    for (name, value) in wanted {
        spec = spec.set(&format!("/linux/sysctls/{name}"), value);
    }
    let pod = context.start(spec)?;
    for (name, value) in wanted {
        let said = outcome(&pod, ContainerSpec::new(&["cat", &format!("/proc/sys/{}", name.replace('.', "/"))]))?;
        ensure!(said.split_whitespace().eq(value.split(' ')), "{name} is {said:?}");
    }
    pod.remove()
}

fn names(_: &Context, pod: &Pod) -> Result<()> {
    let said =
        outcome(pod, ContainerSpec::script("hostname; cat /etc/hostname; cat /etc/resolv.conf; cat /etc/hosts"))?;
    ensure!(said.starts_with("compartment\ncompartment\n"), "hostname: {said}");
    for line in ["search tests.local", "nameserver 10.0.0.10", "options ndots:2"] {
        ensure!(said.contains(line), "resolv.conf lacks {line:?}: {said}");
    }
    ensure!(said.contains("localhost"), "hosts: {said}");
    Ok(())
}

fn unprivileged_network(_: &Context, pod: &Pod) -> Result<()> {
    let names = ["ip_unprivileged_port_start", "ping_group_range"].map(|name| format!("/proc/sys/net/ipv4/{name}"));
    let said = outcome(pod, ContainerSpec::new(&["cat", &names[0], &names[1]]))?;
    ensure!(said.split_whitespace().eq(["0", "0", "2147483647"]), "the sysctls are {said:?}");
    Ok(())
}

fn shared_hosts(_: &Context, pod: &Pod) -> Result<()> {
    let first = pod.run(ContainerSpec::idle())?;
    let second = pod.run(ContainerSpec::idle().security("readonly_rootfs", true))?;
    first.shell("echo 10.9.8.7 neighbour >> /etc/hosts")?;
    wait_for("the line to be seen", SOON, || {
        ensure!(second.shell("cat /etc/hosts")?.contains("neighbour"), "it is not there");
        Ok(())
    })?;
    let said = second.shell("echo x >> /etc/hosts 2>&1 || true")?;
    ensure!(said.contains("Read-only"), "with a read-only root, writing said {said:?}");
    first.shell("sed /neighbour/d /etc/hosts > /tmp/hosts; cat /tmp/hosts > /etc/hosts")?;
    first.remove_by_force()?;
    second.remove_by_force()
}

fn shared_memory(_: &Context, pod: &Pod) -> Result<()> {
    let writer = pod.run(ContainerSpec::script("echo here > /dev/shm/note; sleep 1000"))?;
    wait_for("a note in shared memory", SOON, || writer.exec(&["test", "-s", "/dev/shm/note"])?.success())?;
    let said = outcome(
        pod,
        ContainerSpec::script("cat /dev/shm/note; df -k /dev/shm | tail -1 | awk '{print $1, $2}'; rm /dev/shm/note"),
    )?;
    writer.remove_by_force()?;
    ensure!(said.starts_with("here\n"), "the other container found {said:?}");
    ensure!(said.ends_with(" 65536"), "/dev/shm is {said:?}, expected 64 MiB");
    Ok(())
}

fn bind_directory(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    fs::write(directory.join("before"), "old")?;
    let container = pod.run(ContainerSpec::idle().mount(&directory, "/data/deep", false))?;
    ensure!(container.shell("cat /data/deep/before")? == "old");
    fs::write(directory.join("later"), "new")?;
    ensure!(container.shell("cat /data/deep/later")? == "new", "a file made on the host later is not seen");
    container.shell("mkdir /data/deep/sub && echo inside > /data/deep/sub/file && rm /data/deep/before")?;
    ensure!(fs::read_to_string(directory.join("sub/file"))? == "inside\n");
    ensure!(!directory.join("before").exists(), "a file removed inside is still on the host");
    fs::write(directory.join("later"), "changed on the host")?;
    wait_for("a change on the host to be seen", Duration::from_secs(5), || {
        let seen = container.shell("cat /data/deep/later")?;
        ensure!(seen == "changed on the host", "the container sees {seen:?}");
        Ok(())
    })?;
    container.remove_by_force()
}

fn bind_read_only(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    fs::write(directory.join("file"), "kept")?;
    let script = "cat /data/file; echo; echo x > /data/file; rm -f /data/file; touch /data/new; mount -o remount,rw /data; \
                  echo y > /data/file";
    let spec = ContainerSpec::script(script).mount(&directory, "/data", true);
    let (_, log) = pod.run(spec)?.finish(SOON)?;
    ensure!(text_of(&log, "stdout") == "kept", "the program read {:?}", text_of(&log, "stdout"));
    let said = text_of(&log, "stderr");
    ensure!(said.matches("Read-only file system").count() >= 3, "the refusals were {said:?}");
    ensure!(fs::read_to_string(directory.join("file"))? == "kept", "the file was changed");
    ensure!(fs::read_dir(&directory)?.count() == 1, "a file was made");
    Ok(())
}

fn read_only_recursive(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    let _below = HostMount::tmpfs(&directory.join("below"))?;
    let script = "for file in /top/a /top/below/b /all/a /all/below/c; do touch $file && echo $file; done";
    let spec = ContainerSpec::script(script).mount(&directory, "/top", true).mount_all_read_only(&directory, "/all");
    let (_, log) = pod.run(spec)?.finish(SOON)?;
    ensure!(text_of(&log, "stdout") == "/top/below/b", "the program could write {:?}", text_of(&log, "stdout"));
    let said = text_of(&log, "stderr");
    ensure!(said.matches("Read-only file system").count() == 3, "the refusals were {said:?}");
    ensure!(directory.join("below/b").exists() && !directory.join("below/c").exists(), "the host sees something else");
    Ok(())
}

fn propagation(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    let _base = HostMount::shared_tmpfs(&directory)?;
    fs::create_dir(directory.join("later"))?;
    let start = |propagation: i32| {
        let mount = json!({"host_path": directory, "container_path": "/data", "propagation": propagation});
        pod.run(ContainerSpec::idle().push("mounts", mount))
    };
    let (closed, open) = (start(propagation::PRIVATE)?, start(propagation::HOST_TO_CONTAINER)?);
    let later = HostMount::tmpfs(&directory.join("later"))?;
    fs::write(directory.join("later/flag"), "")?;
    ensure!(open.shell("ls /data/later")? == "flag", "a mount of the host did not arrive");
    ensure!(closed.shell("ls /data/later")?.is_empty(), "a mount of the host arrived where it was not asked for");
    drop(later);
    wait_for("the unmount to arrive", SOON, || {
        ensure!(open.shell("ls /data/later")?.is_empty(), "it is still seen");
        Ok(())
    })?;
    for container in [closed, open] {
        container.remove_by_force()?;
    }
    Ok(())
}

fn bind_file(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    fs::write(directory.join("shown"), "one")?;
    fs::write(directory.join("secret"), "two")?;
    let spec = ContainerSpec::idle().mount(&directory.join("shown"), "/etc/shown.conf", false);
    let container = pod.run(spec)?;
    ensure!(container.shell("cat /etc/shown.conf")? == "one");
    container.shell("echo -n three > /etc/shown.conf")?;
    ensure!(fs::read_to_string(directory.join("shown"))? == "three");
    // Whatever the guest can see of the share, the file's neighbour is not in it.
    let found = container.shell("find / -xdev -name secret 2>/dev/null | head -1; ls /etc/shown.conf")?;
    ensure!(found == "/etc/shown.conf", "found {found:?}");
    container.remove_by_force()
}

fn switched_link(context: &Context, pod: &Pod) -> Result<()> {
    // As the kubelet updates a ConfigMap: a new directory, then one rename of a link to it.
    let directory = context.scratch.join("config");
    for (name, text) in [("..v1", "first"), ("..v2", "second")] {
        fs::create_dir_all(directory.join(name))?;
        fs::write(directory.join(name).join("key"), text)?;
    }
    std::os::unix::fs::symlink("..v1", directory.join("..data"))?;
    std::os::unix::fs::symlink("..data/key", directory.join("key"))?;
    let container = pod.run(ContainerSpec::idle().mount(&directory, "/config", true))?;
    ensure!(container.shell("cat /config/key")? == "first");
    std::os::unix::fs::symlink("..v2", directory.join("..data_tmp"))?;
    fs::rename(directory.join("..data_tmp"), directory.join("..data"))?;
    fs::remove_dir_all(directory.join("..v1"))?;
    wait_for("the new version to be seen", Duration::from_secs(10), || {
        let seen = container.shell("cat /config/key")?;
        ensure!(seen == "second", "the container sees {seen:?}");
        Ok(())
    })?;
    container.remove_by_force()
}

fn owners(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    fs::write(directory.join("file"), "x")?;
    std::os::unix::fs::chown(directory.join("file"), Some(1000), Some(29))?;
    let script = "stat -c '%u %g' /data/file; touch /data/mine; chown 7:8 /data/mine; chmod 640 /data/mine; ln /data/mine \
                  /data/twin; mkfifo /data/pipe; stat -c '%u %g %a %h' /data/mine";
    let said = outcome(pod, ContainerSpec::script(script).mount(&directory, "/data", false))?;
    ensure!(said == "1000 29\n7 8 640 2", "the container sees {said:?}");
    let seen = std::os::unix::fs::MetadataExt::uid(&fs::metadata(directory.join("mine"))?);
    ensure!(seen == 7, "the host sees owner {seen}");
    Ok(())
}

/// A number of CRI's statistics, which protobuf's JSON writes as text.
fn counter(stats: &serde_json::Value, pointer: &str) -> Result<u64> {
    let value = stats.pointer(pointer).and_then(|value| value["value"].as_str()).unwrap_or("0");
    value.parse().with_context(|| format!("{pointer} is {value:?} in {stats}"))
}

fn statistics(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let read = || -> Result<(u64, u64)> {
        let stats = container.stats()?;
        Ok((counter(&stats, "/cpu/usageCoreNanoSeconds")?, counter(&stats, "/memory/workingSetBytes")?))
    };
    let (cpu, memory) = wait_for("first statistics", SOON, || {
        let (cpu, memory) = read()?;
        ensure!(cpu > 0 && memory > 0, "CPU {cpu} ns, memory {memory} bytes");
        Ok((cpu, memory))
    })?;
    // The pages of a file in /dev/shm count for whoever wrote them.
    container.shell(
        "dd if=/dev/zero of=/dev/shm/fill bs=1M count=20 2>/dev/null; i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done",
    )?;
    wait_for("statistics to rise", SOON, || {
        let (cpu_now, memory_now) = read()?;
        let (used, grown) = (Duration::from_nanos(cpu_now.saturating_sub(cpu)), memory_now.saturating_sub(memory));
        ensure!(used >= Duration::from_millis(20), "only {used:?} of CPU were counted");
        // The working set leaves out what the kernel could take back, which may be a little of what was there before.
        ensure!(grown >= 16 << 20, "memory grew by {grown} bytes for 20 MiB written");
        Ok(())
    })?;
    container.shell("rm /dev/shm/fill")?;
    container.remove_by_force()
}

fn pod_statistics(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    container.shell("dd if=/dev/zero of=/dev/shm/fill bs=1M count=20 2>/dev/null")?;
    wait_for("statistics of the pod", SOON, || {
        let said = pod.crictl(&["statsp", "-o", "json", "--id", &pod.id]).success()?.text();
        let all: serde_json::Value =
            serde_json::from_str(&said).with_context(|| format!("crictl statsp said {said}"))?;
        let stats = all["stats"].get(0).with_context(|| format!("no statistics in {all}"))?;
        let memory = counter(stats, "/linux/memory/workingSetBytes")?;
        ensure!(memory >= 16 << 20, "{memory} bytes of memory for 20 MiB written");
        let cpu = counter(stats, "/linux/cpu/usageCoreNanoSeconds")?;
        ensure!(cpu > 0, "no CPU time in {stats}");
        Ok(())
    })?;
    container.shell("rm /dev/shm/fill")?;
    container.remove_by_force()
}

fn oom(_: &Context, pod: &Pod) -> Result<()> {
    // `tail` keeps what it reads until a line ends, and /dev/zero has no line.
    let (exit, _) = pod.run(ContainerSpec::new(&["tail", "/dev/zero"]).memory(24))?.finish(Duration::from_mins(1))?;
    ensure!(exit.code == 137 && exit.reason == "OOMKilled", "exit {exit:?}");
    // The rest of the pod is none the worse.
    ensure!(outcome(pod, ContainerSpec::script("echo well"))? == "well");
    Ok(())
}

/// A web server for `/www` on a port.
fn server(port: u16, listen: &str) -> ContainerSpec {
    ContainerSpec::new(&["httpd", "-f", "-p", &format!("{listen}{port}"), "-h", "/www"])
}

const PAGE: &str = "a page from inside the pod";

fn localhost(_: &Context, pod: &Pod) -> Result<()> {
    let serving = pod.run(server(8081, "127.0.0.1:"))?;
    let client = pod.run(ContainerSpec::idle())?;
    wait_for("the other container's page", SOON, || {
        let said = client.shell("wget -q -O - http://127.0.0.1:8081/")?;
        ensure!(said == PAGE, "wget got {said:?}");
        Ok(())
    })?;
    serving.remove_by_force()?;
    client.remove_by_force()
}

fn pid_container(_: &Context, pod: &Pod) -> Result<()> {
    let first = pod.run(ContainerSpec::new(&["sleep", "12345"]))?;
    let second = pod.run(ContainerSpec::new(&["sleep", "54321"]))?;
    let seen = second.shell("tr '\\0' ' ' < /proc/1/cmdline; ps -o args | grep -c '[s]leep 12345' || true")?;
    ensure!(seen == "sleep 54321 0", "the second container sees {seen:?}");
    first.remove_by_force()?;
    second.remove_by_force()
}

fn pid_pod(context: &Context) -> Result<()> {
    let spec = PodSpec::new().set("/linux/security_context/namespace_options/pid", namespace_mode::POD);
    let pod = context.start(spec)?;
    let shared = |spec: ContainerSpec| spec.security("namespace_options", json!({"pid": namespace_mode::POD}));
    let first = pod.run(shared(ContainerSpec::new(&["sleep", "12345"])))?;
    let second = pod.run(shared(ContainerSpec::new(&["sleep", "54321"])))?;
    let seen = second.shell("ps -o pid,args")?;
    ensure!(seen.contains("sleep 12345") && seen.contains("sleep 54321"), "the second container sees {seen}");
    let first_line = seen.lines().find(|line| line.split_whitespace().next() == Some("1")).unwrap_or_default();
    ensure!(
        !first_line.contains("sleep 54321") && !first_line.contains("sleep 12345"),
        "PID 1 is a container's program: {seen}"
    );
    // One container can signal the other's program, and its exit is told as usual.
    second.shell(
        "kill -TERM $(pidof sleep | tr ' ' '\\n' | while read p; do grep -q 12345 /proc/$p/cmdline && echo $p; done)",
    )?;
    let exit = first.wait(SOON)?;
    ensure!(exit.code == 143, "a program ended by SIGTERM from its neighbour: {exit:?}");
    ensure!(second.state()? == "CONTAINER_RUNNING");
    first.remove()?;
    second.remove_by_force()?;
    pod.remove()
}

fn pid_host(context: &Context) -> Result<()> {
    let pod =
        context.start(PodSpec::new().set("/linux/security_context/namespace_options/pid", namespace_mode::NODE))?;
    let of_host = |spec: ContainerSpec| spec.security("namespace_options", json!({"pid": namespace_mode::NODE}));
    let first = pod.run(of_host(ContainerSpec::new(&["sleep", "12345"])))?;
    let second = pod.run(of_host(ContainerSpec::idle()))?;
    let seen = second.shell("ps -o pid,args")?;
    ensure!(seen.contains("sleep 12345"), "the second container sees {seen}");
    ensure!(!seen.contains("containerd") && !seen.contains("bulkhead-agent"), "the second container sees {seen}");
    first.remove_by_force()?;
    second.remove_by_force()?;
    pod.remove()
}

fn own_filesystems(_: &Context, pod: &Pod) -> Result<()> {
    let first = pod.run(ContainerSpec::idle())?;
    let second = pod.run(ContainerSpec::idle())?;
    first.shell("echo mine > /tmp/note")?;
    let seen = second.shell("ls /tmp")?;
    ensure!(seen.is_empty(), "the second container sees {seen:?}");
    first.remove_by_force()?;
    second.remove_by_force()
}

fn page(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(server(8080, ""))?;
    let addresses = pod.addresses()?;
    ensure!(addresses.iter().any(IpAddr::is_ipv4) && addresses.iter().any(IpAddr::is_ipv6), "addresses {addresses:?}");
    for address in addresses {
        let page = wait_for("the page", SOON, || network::fetch(address, 8080))?;
        ensure!(page.trim() == PAGE, "the page at {address} reads {page:?}");
    }
    container.remove_by_force()
}

fn reach_host(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let network = &context.node.network;
    for address in [IpAddr::V4(network.gateway()), IpAddr::V6(network.gateway_v6())] {
        let listener =
            TcpListener::bind(SocketAddr::new(address, 0)).with_context(|| format!("listen on {address}"))?;
        let port = listener.local_addr()?.port();
        let peer = std::thread::spawn(move || -> std::io::Result<SocketAddr> {
            let (mut stream, peer) = listener.accept()?;
            std::io::Write::write_all(&mut stream, b"hello from the host\n")?;
            Ok(peer)
        });
        let said = container.shell(&format!("nc {address} {port} < /dev/null"))?;
        ensure!(said == "hello from the host", "nc to {address} got {said:?}");
        let peer = peer.join().map_err(|_| anyhow::anyhow!("the listener panicked"))??;
        ensure!(pod.addresses()?.contains(&peer.ip()), "the host saw {peer}");
    }
    container.remove_by_force()
}

fn interface(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let mtu = container.shell("cat /sys/class/net/eth0/mtu")?;
    ensure!(mtu == MTU.to_string(), "the MTU is {mtu}");
    let addresses = container.shell("ip addr show dev eth0")?;
    for address in pod.addresses()? {
        ensure!(addresses.contains(&format!(" {address}/")), "{address} is missing in {addresses}");
    }
    let gateway = context.node.network.gateway();
    let routes = container.shell("ip route")?;
    ensure!(routes.contains(&format!("default via {gateway} dev eth0")), "the routes are {routes}");
    let routes = container.shell("ip -6 route")?;
    let gateway = context.node.network.gateway_v6();
    ensure!(routes.contains(&format!("default via {gateway} dev eth0")), "the IPv6 routes are {routes}");
    let loopback = container.shell("ip addr show dev lo")?;
    ensure!(loopback.contains("127.0.0.1/8") && loopback.contains("::1/128"), "loopback is {loopback}");
    // A packet larger than an Ethernet's default MTU arrives in pieces or as one, but arrives.
    container.shell(&format!("ping -c 1 -W 5 -s 4000 {}", context.node.network.gateway()))?;
    container.remove_by_force()
}

fn pod_to_pod(context: &Context) -> Result<()> {
    let (first, second) = (context.start(PodSpec::new())?, context.start(PodSpec::new())?);
    let serving = first.run(server(8080, ""))?;
    let client = second.run(ContainerSpec::idle())?;
    for address in first.addresses()? {
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        wait_for("the other pod's page", SOON, || {
            let said = client.shell(&format!("wget -q -O - http://{host}:8080/"))?;
            ensure!(said == PAGE, "wget got {said:?}");
            Ok(())
        })?;
    }
    serving.remove_by_force()?;
    client.remove_by_force()?;
    first.remove()?;
    second.remove()
}

fn host_port(context: &Context) -> Result<()> {
    // A port that was free a moment ago.
    let host_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mapping = json!([{"protocol": 0, "container_port": 8080, "host_port": host_port}]);
    let pod = context.start(PodSpec::new().set("/port_mappings", mapping))?;
    let container = pod.run(server(8080, ""))?;
    let gateway = IpAddr::V4(context.node.network.gateway());
    let page = wait_for("the page at the host port", SOON, || network::fetch(gateway, host_port))?;
    ensure!(page.trim() == PAGE, "the page reads {page:?}");
    container.remove_by_force()?;
    pod.remove()
}

fn own_kernel(_: &Context, pod: &Pod) -> Result<()> {
    let said = outcome(pod, ContainerSpec::script("uname -r; cat /proc/sys/kernel/random/boot_id"))?;
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(!said.contains(host.trim()), "the container runs on the host's kernel: {said}");
    Ok(())
}

fn annotations(context: &Context) -> Result<()> {
    let spec = PodSpec::new()
        .set("/annotations/bulkhead.io~1vcpus", "2")
        .set("/annotations/bulkhead.io~1memory-mib", "384")
        .set("/annotations/bulkhead.io~1machine", "q35");
    let pod = context.start(spec)?;
    let said = outcome(
        &pod,
        ContainerSpec::script("nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; ls /sys/bus/pci/devices | wc -l"),
    )?;
    let numbers: Vec<u64> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let [cpus, memory_kib, pci_devices] = numbers[..] else { anyhow::bail!("the guest said {said:?}") };
    ensure!(cpus == 2, "{cpus} CPUs");
    ensure!((300 << 10..=384 << 10).contains(&memory_kib), "{memory_kib} KiB of memory");
    ensure!(pci_devices > 0, "a q35 without PCI devices");
    pod.remove()
}

fn pod_limits(context: &Context) -> Result<()> {
    let spec = PodSpec::new().set(
        "/linux/resources",
        json!({"cpu_period": 100_000, "cpu_quota": 200_000, "memory_limit_in_bytes": 512 << 20}),
    );
    let pod = context.start(spec)?;
    let said = outcome(&pod, ContainerSpec::script("nproc; awk '/MemTotal/ {print $2}' /proc/meminfo"))?;
    let numbers: Vec<u64> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let [cpus, memory_kib] = numbers[..] else { anyhow::bail!("the guest said {said:?}") };
    ensure!(cpus == 2, "{cpus} CPUs for a limit of two");
    ensure!(memory_kib >= 512 << 10, "{memory_kib} KiB of memory for a limit of 512 MiB");
    pod.remove()
}

fn root_filesystem(_: &Context, pod: &Pod) -> Result<()> {
    let started = Instant::now();
    let script = "set -e; cd /var; mkdir a; echo 1 > a/f; mv a b; ln -s b/f link; ln b/f hard; cat link hard; chmod 600 b/f; \
                  stat -c %a hard; rm /www/index.html; ls /www | wc -l; seq 1 300 | while read n; do echo $n > f$n; done; \
                  ls | wc -l; dd if=/dev/zero of=big bs=1M count=16 2>/dev/null; sync; stat -c %s big";
    let said = outcome(pod, ContainerSpec::script(script))?;
    ensure!(said == "1\n1\n600\n0\n303\n16777216", "the program found {said:?} after {:?}", started.elapsed());
    Ok(())
}
