//! The agent in a real guest: one file of promises, each kept by a container in QEMU.
//!
//! Needs a kernel and helpers (`BULKHEAD_ASSETS`) and a static agent (`BULKHEAD_AGENT`); skipped with a reason without.

mod machine;

use bulkhead_proto::agent as api;
use machine::{Machine, read_all, write_all};
use serde_json::{Value, json};

/// Puts a busybox image at `<name>/rootfs` below the share.
fn busybox(machine: &Machine, name: &str) {
    let rootfs = machine.share(&format!("{name}/rootfs"));
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        std::fs::create_dir_all(rootfs.join(directory)).expect("mkdir");
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static");
    for applet in ["sh", "cat", "echo", "sleep", "sha256sum", "id", "env", "head", "ps", "kill", "stty", "dd", "pwd", "true", "ls", "grep"] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).expect("symlink");
    }
    std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n").expect("passwd");
}

fn process(args: &[&str]) -> Value {
    json!({
        "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 }, "noNewPrivileges": false,
        "capabilities": { "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL", "CAP_CHOWN"] },
    })
}

fn spec(process: Value) -> Value {
    json!({
        "ociVersion": "1.1.0", "process": process, "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "bind", "source": "shm:", "options": ["rbind", "rw"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }],
            "maskedPaths": ["/proc/kcore", "/proc/keys"], "readonlyPaths": ["/proc/sys"],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        },
    })
}

fn create(id: &str, spec: &Value, stdio: api::Stdio) -> api::CreateContainerRequest {
    let rootfs = api::GuestMount {
        source: Some(api::guest_mount::Source::SharePath(format!("{id}/rootfs"))),
        target: "/".into(),
        ..api::GuestMount::default()
    };
    api::CreateContainerRequest {
        container_id: id.into(),
        spec_json: spec.to_string().into_bytes(),
        rootfs: vec![rootfs],
        stdio: Some(stdio),
        ..api::CreateContainerRequest::default()
    }
}

fn start(id: &str, exec: &str) -> api::StartProcessRequest {
    api::StartProcessRequest { container_id: id.into(), exec_id: exec.into() }
}

fn delete(id: &str, exec: &str) -> api::DeleteRequest {
    api::DeleteRequest { container_id: id.into(), exec_id: exec.into() }
}

async fn sandbox(machine: &mut Machine) {
    let request = api::CreateSandboxRequest { hostname: "pod".into(), share_tag: "share".into(), ..Default::default() };
    machine.client.create_sandbox(request).await.expect("sandbox");
}

#[tokio::test]
async fn a_container_runs_prints_and_exits() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    busybox(&machine, "c1");
    let (stdout_token, stdout) = machine.stream();
    let spec = spec(process(&["sh", "-c", "echo hi; exit 42"]));
    let request = create("c1", &spec, api::Stdio { stdout_token, ..Default::default() });
    let created = machine.client.create_container(request).await.expect("create").into_inner();
    println!("hello {:?}\ncreated {created:?}", machine.hello);
    let started = machine.client.start_process(start("c1", "")).await.expect("start").into_inner();
    println!("started {started:?}");
    let exit = machine.exit(|_| ()).await;
    assert_eq!((exit.exit_status, exit.stdout_bytes), (42, 3));
    assert_eq!(read_all(stdout).await, b"hi\n");
    machine.client.delete(delete("c1", "")).await.expect("delete");
    machine.client.shutdown(api::ShutdownRequest {}).await.expect("shutdown");
    assert!(machine.powered_off().await);
}
