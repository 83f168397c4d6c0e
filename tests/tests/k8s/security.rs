//! Who a pod's programs are, what they may do, and what of the node they may have.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::cluster::images::AGNHOST;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, wait_for};
use bulkhead_tests::image::BUSYBOX;
use bulkhead_tests::row::Runtime;
use serde_json::{Value, json};

use crate::life::{idle, script, with};
use crate::talk::{logs_of, sh_in, wait_event};

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("users and groups are as the pod or the container asks, and those of the image by policy", users),
    Row::new("capabilities, new privileges, a read-only root and privilege are as asked", rights),
    Row::new("seccomp profiles of the runtime and of the node hold, or none", seccomp),
    Row::new("safe sysctls hold in the pod, and one that is not keeps it from starting", sysctls),
    // Debian's runc 1.1 knows no user namespaces of pods.
    Row::new("with a user namespace root is nobody outside, and may have all of /proc", user_namespace)
        .only(&[Runtime::Bulkhead]),
    Row::new("the node's network and IPC are refused in a sentence, and its processes are not seen", of_the_node)
        .only(&[Runtime::Bulkhead]),
    Row::new("a pod talks to the apiserver with its service account's token", service_account),
];

/// Runs a script under each security context, side by side in one pod; what each wrote.
fn outcomes(user: &User, pod: &str, more: Value, containers: &[(&str, Value, &str)]) -> Result<Vec<String>> {
    let container = |(name, context, text): &(&str, Value, &str)| {
        let mounts = json!([{"name": "work", "mountPath": "/scratch"}]);
        with(script(name, text), json!({"securityContext": context, "volumeMounts": mounts}))
    };
    let specs: Vec<_> = containers.iter().map(container).collect();
    let volumes = json!([{"name": "work", "emptyDir": {}}]);
    let spec = with(json!({"restartPolicy": "Never", "volumes": volumes, "containers": specs}), more);
    let ended = user.finished_pod(pod, spec)?;
    ensure!(ended["status"]["phase"] == "Succeeded", "pod {pod} has failed\n{}", user.describe(pod));
    containers.iter().map(|(name, ..)| logs_of(user, pod, name)).collect()
}

/// A line of /proc/PID/status, without its name.
fn field<'a>(status: &'a str, name: &str) -> Result<&'a str> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(value.with_context(|| format!("no {name} in {status}"))?.trim())
}

fn users(user: &User) -> Result<()> {
    let ids = "id -u; id -g; id -G";
    // The image has its user 1000 in group 29.
    for (pod, policy, of_image) in [("merged", "Merge", Some("29")), ("strict", "Strict", None)] {
        let context = json!({"securityContext": {
            "runAsUser": 1000, "runAsGroup": 3000, "fsGroup": 5000, "supplementalGroups": [4000],
            "supplementalGroupsPolicy": policy,
        }});
        let own = json!({"runAsUser": 1, "runAsGroup": 7});
        let said = outcomes(user, pod, context, &[("pods", json!({}), ids), ("own", own, ids)])?;
        for (said, uid, gid, of_image) in [(&said[0], "1000", "3000", of_image), (&said[1], "1", "7", None)] {
            let lines: Vec<_> = said.lines().collect();
            let groups: BTreeSet<_> = lines.last().context("no groups")?.split(' ').collect();
            let expected: BTreeSet<_> = [gid, "4000", "5000"].into_iter().chain(of_image).collect();
            ensure!(lines[..lines.len() - 1] == [uid, gid] && groups == expected, "by policy {policy}: {said:?}");
        }
    }
    Ok(())
}

fn rights(user: &User) -> Result<()> {
    /// What containerd gives to containers that say nothing.
    const USUAL: u64 = 0xa804_25fb;
    const CHOWN_AND_NET_ADMIN: u64 = 1 | (1 << 12);
    const SYS_ADMIN: u64 = 1 << 21;
    let status = "cat /proc/self/status";
    let mount = "mkdir -p /mnt; mount -t tmpfs none /mnt 2>&1 && echo mounted";
    let try_mount = format!("{mount}; {status}");
    let try_kernel = format!("{mount}; cat /proc/sys/kernel/random/boot_id; {status}");
    let containers = [
        ("usual", json!({}), try_mount.as_str()),
        ("bare", json!({"capabilities": {"drop": ["ALL"]}}), status),
        ("picked", json!({"capabilities": {"drop": ["ALL"], "add": ["CHOWN", "NET_ADMIN"]}}), status),
        ("meek", json!({"allowPrivilegeEscalation": false}), status),
        ("plain", json!({"runAsUser": 1000}), status),
        (
            "fixed",
            json!({"readOnlyRootFilesystem": true}),
            "touch /new 2>&1; touch /scratch/new && echo written && touch /dev/shm/new && echo shared",
        ),
        ("mighty", json!({"privileged": true}), try_kernel.as_str()),
    ];
    let said = outcomes(user, "rights", json!({}), &containers)?;
    for ((name, ..), said, capabilities, no_new) in [
        (&containers[0], &said[0], USUAL, "0"),
        (&containers[1], &said[1], 0, "0"),
        (&containers[2], &said[2], CHOWN_AND_NET_ADMIN, "0"),
        (&containers[3], &said[3], USUAL, "1"),
        (&containers[4], &said[4], 0, "0"),
    ] {
        let found = u64::from_str_radix(field(said, "CapEff")?, 16)?;
        ensure!(found == capabilities, "container {name} has capabilities {found:x}, not {capabilities:x}");
        let found = field(said, "NoNewPrivs")?;
        ensure!(found == no_new, "container {name} has NoNewPrivs {found}, not {no_new}");
    }
    let usual = &said[0];
    let refused = usual.contains("denied") || usual.contains("not permitted");
    ensure!(refused && !usual.contains("mounted\n"), "the usual container's mount said {usual:?}");
    let expected = "touch: /new: Read-only file system\nwritten\nshared";
    ensure!(said[5] == expected, "with a read-only root: {:?}", said[5]);
    let mighty = &said[6];
    let found = u64::from_str_radix(field(mighty, "CapEff")?, 16)?;
    let allowed = found & SYS_ADMIN != 0 && mighty.starts_with("mounted\n") && field(mighty, "Seccomp")? == "0";
    ensure!(allowed, "a privileged container has capabilities {found:x} and said {mighty:?}");
    // With all the power it has, whose kernel is it?
    let kernel = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the machine's boot id")?;
    let same_kernel = mighty.lines().nth(1) == Some(kernel.trim());
    ensure!(same_kernel != user.is_bulkhead(), "the machine's boot id is {kernel:?}, the container said {mighty:?}");
    Ok(())
}

fn seccomp(user: &User) -> Result<()> {
    let names = ["chmod", "fchmod", "fchmodat", "fchmodat2"];
    let rules = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    });
    let profile = format!("{}.json", user.namespace);
    let path = user.cluster.layout.seccomp.join(&profile);
    fs::write(&path, rules.to_string()).with_context(|| format!("write {}", path.display()))?;
    let of = |kind: &str| json!({"seccompProfile": {"type": kind}});
    let local = json!({"seccompProfile": {"type": "Localhost", "localhostProfile": profile}});
    let status = "cat /proc/self/status";
    let change = "chmod 700 /scratch 2>&1; echo code $?";
    let said = outcomes(
        user,
        "filtered",
        json!({"securityContext": of("RuntimeDefault")}),
        &[("usual", json!({}), status), ("none", of("Unconfined"), status), ("local", local, change)],
    )?;
    ensure!(field(&said[0], "Seccomp")? == "2", "by the runtime's profile: {}", said[0]);
    ensure!(field(&said[1], "Seccomp")? == "0", "without a profile: {}", said[1]);
    let expected = "chmod: /scratch: Operation not permitted\ncode 1";
    ensure!(said[2] == expected, "by the node's profile, which forbids it, chmod said {:?}", said[2]);
    Ok(())
}

fn sysctls(user: &User) -> Result<()> {
    let of = |name: &str, value: &str| json!({"name": name, "value": value});
    let unsafe_one = json!({"securityContext": {"sysctls": [of("kernel.msgmax", "65536")]}});
    user.pod("daring", with(json!({"containers": [idle("main")]}), unsafe_one))?;
    let safe = json!({"securityContext": {
        "sysctls": [of("kernel.shm_rmid_forced", "1"), of("net.ipv4.ip_unprivileged_port_start", "80")],
    }});
    let text = "cd /proc/sys; cat kernel/shm_rmid_forced net/ipv4/ip_unprivileged_port_start; \
                httpd -p 80 && echo open; httpd -p 79 2>/dev/null || echo closed";
    let said = outcomes(user, "tuned", safe, &[("main", json!({"runAsUser": 1000}), text)])?;
    ensure!(said == ["1\n80\nopen\nclosed"], "the sysctls, and ports 80 and 79 of a plain user, are {said:?}");
    let pod = user.finished("daring")?;
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    let refused = pod["status"]["reason"] == "SysctlForbidden" && message.contains("kernel.msgmax");
    ensure!(refused, "the status is {}", pod["status"]);
    Ok(())
}

fn user_namespace(user: &User) -> Result<()> {
    let unmasked = json!({"securityContext": {"procMount": "Unmasked"}});
    let refused = user.pod("careless", json!({"containers": [with(idle("main"), unmasked.clone())]})).err();
    let refused = refused.context("a pod without a user namespace may have all of /proc")?.to_string();
    ensure!(refused.contains("`hostUsers` must be false to use `Unmasked`"), "the refusal is {refused}");
    user.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"colour": "teal"},
    }))?;
    let mounts = json!([
        {"name": "scratch", "mountPath": "/scratch"}, {"name": "settings", "mountPath": "/settings"},
        {"name": "memory", "mountPath": "/memory"}, {"name": "memory", "mountPath": "/part", "subPath": "part"},
    ]);
    let spec = json!({
        "hostUsers": false,
        "volumes": [
            {"name": "scratch", "emptyDir": {}}, {"name": "settings", "configMap": {"name": "settings"}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        ],
        "containers": [with(idle("main"), json!({"volumeMounts": mounts})), with(idle("unmasked"), unmasked)],
    });
    let pod = user.ready_pod("mapped", spec)?;
    let map = user.sh("mapped", "cat /proc/self/uid_map")?;
    let words: Vec<_> = map.split_whitespace().collect();
    let mapped = words.len() == 3 && words[0] == "0" && words[1] != "0" && words[2] == "65536";
    ensure!(mapped, "the namespace's map is {map:?}");
    let said = user
        .sh("mapped", "id -u; echo mine > /scratch/file; stat -c %u /scratch/file /settings; cat /settings/colour")?;
    ensure!(said == "0\n0\n0\nteal", "root, its file, its settings and what they say are {said:?}");
    let said =
        user.sh("mapped", "echo > /part/file; stat -c '%u %g %a' /memory /part; stat -c %u /memory/part/file")?;
    ensure!(said == "0 0 1777\n0 0 1777\n0", "owners and modes of its memory-backed volume are {said:?}");
    let uid = pod["metadata"]["uid"].as_str().context("the pod has no uid")?;
    let volume = format!("kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/scratch/file");
    let owner = fs::metadata(user.cluster.layout.root.join(volume)).context("look at the volume's file")?.uid();
    ensure!(owner == 0, "outside, the file that its root has written is that of user {owner}");
    let masks = "grep -c ' /proc/' /proc/self/mounts || true";
    let (usual, all) = (user.sh("mapped", masks)?, sh_in(user, "mapped", "unmasked", masks)?);
    ensure!(usual != "0" && all == "0", "{usual} mounts hide something of /proc, and {all} where none should");
    Ok(())
}

fn of_the_node(user: &User) -> Result<()> {
    for (pod, field) in [("networked", "hostNetwork"), ("talking", "hostIPC")] {
        let mut spec = json!({"containers": [idle("main")]});
        spec[field] = json!(true);
        user.pod(pod, spec)?;
    }
    let server = json!({"name": "server", "image": BUSYBOX, "command": ["httpd", "-f", "-p", "8080", "-h", "/www"]});
    user.ready_pod("watching", json!({"hostPID": true, "containers": [idle("main"), server]}))?;
    let processes = user.sh("watching", "ps -o args")?;
    ensure!(processes.contains("httpd -f"), "containers do not see one another, but {processes}");
    for name in ["kubelet", "containerd", "qemu", "bulkhead"] {
        ensure!(!processes.contains(name), "there is {name} in {processes}");
    }
    for (pod, sentence) in [
        ("networked", "(hostNetwork: true) is not available to a pod in a virtual machine"),
        ("talking", "(hostIPC: true) is not available to a pod in a virtual machine"),
    ] {
        wait_event(user, pod, "FailedCreatePodSandBox", sentence)?;
        let status = user.get(&["pod", pod])?["status"].clone();
        ensure!(status["phase"] == "Pending", "pod {pod}: the status is {status}");
    }
    Ok(())
}

fn service_account(user: &User) -> Result<()> {
    let command = ["/agnhost", "inclusterclient", "--poll-interval=1"];
    user.pod("caller", json!({"containers": [{"name": "main", "image": AGNHOST, "command": command}]}))?;
    // A call follows the one before it: the second has ended when the third begins.
    let log = wait_for("three calls of the apiserver", SOON, || {
        let log = user.logs("caller")?;
        ensure!(log.matches("calling /healthz").count() >= 3, "the log is {log:?}");
        Ok(log)
    })?;
    let token = log.contains("authz_header=") && !log.contains("authz_header=<empty>");
    ensure!(token && !log.contains("status=failed"), "the log is {log}");
    Ok(())
}
