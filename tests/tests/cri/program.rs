//! What a program finds around it.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::container::{ContainerSpec, text_of};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::Context;
use serde_json::json;

use crate::{SOON, outcome, status_field};

pub fn environment(_: &Context, pod: &Pod) -> Result<()> {
    let spec = ContainerSpec::script("pwd; echo \"$GREETING\"; echo \"$0|$1|$2\"; echo \"$PATH\"")
        .env("GREETING", "good day, \"world\" $HOME")
        .set("/working_dir", "/var")
        .set("/args", json!(["zero", "one two", "drei ü"]));
    let said = outcome(pod, spec)?;
    let expected = "/var\ngood day, \"world\" $HOME\nzero|one two|drei ü\n/usr/local/bin:/usr/bin:/bin:/sbin";
    ensure!(said == expected, "the program found {said:?}");
    Ok(())
}

pub fn users(_: &Context, pod: &Pod) -> Result<()> {
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

pub fn capabilities(_: &Context, pod: &Pod) -> Result<()> {
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

pub fn seccomp(_: &Context, pod: &Pod) -> Result<()> {
    // CRI: 0 is the runtime's default profile, 1 none.
    for (profile, expected) in [(0, "2"), (1, "0")] {
        let found = status_field(pod, |spec| spec.security("seccomp", json!({"profile_type": profile})), "Seccomp")?;
        ensure!(found == expected, "profile type {profile} gives Seccomp: {found}");
    }
    Ok(())
}

pub fn seccomp_local(context: &Context, pod: &Pod) -> Result<()> {
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

pub fn no_new_privileges(_: &Context, pod: &Pod) -> Result<()> {
    for (asked, expected) in [(true, "1"), (false, "0")] {
        let found = status_field(pod, |spec| spec.security("no_new_privs", asked), "NoNewPrivs")?;
        ensure!(found == expected, "no_new_privs {asked} gives NoNewPrivs: {found}");
    }
    Ok(())
}

pub fn signals(_: &Context, pod: &Pod) -> Result<()> {
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

pub fn masked_paths(_: &Context, pod: &Pod) -> Result<()> {
    let script =
        "wc -c < /proc/timer_list; ls /sys/firmware | wc -l; echo x > /proc/sys/kernel/domainname || echo refused";
    let spec = ContainerSpec::script(script)
        .security("masked_paths", json!(["/proc/timer_list", "/sys/firmware"]))
        .security("readonly_paths", json!(["/proc/sys"]));
    let said = outcome(pod, spec)?;
    ensure!(said == "0\n0\nrefused", "the program found {said:?}");
    Ok(())
}

pub fn read_only_root(context: &Context, pod: &Pod) -> Result<()> {
    let script = "touch /x 2>&1; touch /data/y && echo written; touch /dev/shm/z && echo shm";
    let spec = ContainerSpec::script(script).security("readonly_rootfs", true).mount(&context.scratch, "/data", false);
    let said = outcome(pod, spec)?;
    ensure!(said.contains("Read-only file system") && said.ends_with("written\nshm"), "the program found {said:?}");
    Ok(())
}

pub fn privileged(_: &Context, pod: &Pod) -> Result<()> {
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

pub fn devices(_: &Context, pod: &Pod) -> Result<()> {
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

pub fn sysctls(context: &Context) -> Result<()> {
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

pub fn names(_: &Context, pod: &Pod) -> Result<()> {
    let said =
        outcome(pod, ContainerSpec::script("hostname; cat /etc/hostname; cat /etc/resolv.conf; cat /etc/hosts"))?;
    ensure!(said.starts_with("compartment\ncompartment\n"), "hostname: {said}");
    for line in ["search tests.local", "nameserver 10.0.0.10", "options ndots:2"] {
        ensure!(said.contains(line), "resolv.conf lacks {line:?}: {said}");
    }
    ensure!(said.contains("localhost"), "hosts: {said}");
    Ok(())
}

pub fn unprivileged_network(_: &Context, pod: &Pod) -> Result<()> {
    let names = ["ip_unprivileged_port_start", "ping_group_range"].map(|name| format!("/proc/sys/net/ipv4/{name}"));
    let said = outcome(pod, ContainerSpec::new(&["cat", &names[0], &names[1]]))?;
    ensure!(said.split_whitespace().eq(["0", "0", "2147483647"]), "the sysctls are {said:?}");
    Ok(())
}

pub fn shared_hosts(_: &Context, pod: &Pod) -> Result<()> {
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

pub fn shared_memory(_: &Context, pod: &Pod) -> Result<()> {
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
