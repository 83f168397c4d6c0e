//! What the tests put into the share, and what they ask of the agent.

use bulkhead_proto::agent as api;
use serde_json::{Value, json};

use crate::machine::{Machine, read_all};

/// Puts a busybox image at `<name>/rootfs` below the share.
pub fn busybox(machine: &Machine, name: &str) {
    busybox_at(&machine.share(&format!("{name}/rootfs")));
}

pub fn busybox_at(rootfs: &std::path::Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        std::fs::create_dir_all(rootfs.join(directory)).expect("mkdir");
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static");
    for applet in [
        "sh",
        "cat",
        "echo",
        "sleep",
        "sha256sum",
        "id",
        "env",
        "head",
        "ps",
        "kill",
        "stty",
        "dd",
        "pwd",
        "true",
        "ls",
        "grep",
        "ip",
        "hostname",
        "mkdir",
        "touch",
        "mkfifo",
        "df",
        "sysctl",
        "ulimit",
    ] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).expect("symlink");
    }
    std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n")
        .expect("passwd");
}

pub fn process(args: &[&str]) -> Value {
    json!({
        "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 }, "noNewPrivileges": false,
        "capabilities": { "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL", "CAP_CHOWN"] },
    })
}

pub fn spec(process: Value) -> Value {
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

pub fn create(id: &str, spec: &Value, stdio: api::Stdio) -> api::CreateContainerRequest {
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

pub fn start(id: &str, exec: &str) -> api::StartProcessRequest {
    api::StartProcessRequest { container_id: id.into(), exec_id: exec.into() }
}

pub fn delete(id: &str, exec: &str) -> api::DeleteRequest {
    api::DeleteRequest { container_id: id.into(), exec_id: exec.into() }
}

pub async fn sandbox(machine: &mut Machine) {
    let request = api::CreateSandboxRequest { hostname: "pod".into(), share_tag: "share".into(), ..Default::default() };
    machine.client.create_sandbox(request).await.expect("sandbox");
}

/// What a test starts and follows.
pub struct Exec<'a> {
    pub id: &'a str,
    pub exec: &'a str,
    pub process: Value,
    pub stdio: api::Stdio,
}

impl Exec<'_> {
    pub async fn start(self, machine: &mut Machine) -> Result<api::StartProcessResponse, tonic::Status> {
        let request = api::CreateProcessRequest {
            container_id: self.id.into(),
            exec_id: self.exec.into(),
            process_json: self.process.to_string().into_bytes(),
            stdio: Some(self.stdio),
        };
        machine.client.create_process(request).await?;
        Ok(machine.client.start_process(start(self.id, self.exec)).await?.into_inner())
    }
}

/// Starts a container that sleeps.
pub async fn sleeper(machine: &mut Machine, id: &str) -> u32 {
    busybox(machine, id);
    let request = create(id, &spec(process(&["sleep", "1000"])), api::Stdio::default());
    let pid = machine.client.create_container(request).await.expect("create").into_inner().guest_pid;
    machine.client.start_process(start(id, "")).await.expect("start");
    pid
}

/// Runs an exec to its end: exit status and stdout.
pub async fn run(machine: &mut Machine, id: &str, exec: &str, process: Value) -> (u32, String) {
    let (stdout_token, stdout) = machine.stream();
    let stdio = api::Stdio { stdout_token, ..Default::default() };
    Exec { id, exec, process, stdio }.start(machine).await.expect("exec");
    let exit = machine.exit(|_| ()).await;
    assert_eq!(exit.exec_id, exec);
    let output = String::from_utf8(read_all(stdout).await).expect("text");
    machine.client.delete(delete(id, exec)).await.expect("delete");
    (exit.exit_status, output)
}

pub async fn kill(machine: &mut Machine, id: &str, signal: u32) -> Result<(), tonic::Status> {
    let request = api::SignalProcessRequest { container_id: id.into(), signal, ..Default::default() };
    machine.client.signal_process(request).await.map(drop)
}
