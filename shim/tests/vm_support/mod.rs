//! Real QEMU with a guest of a hundred lines, for tests of everything below the agent.
//!
//! `BULKHEAD_TEST_ASSETS` names a directory with `vmlinux`; without it these tests say so and pass. bulkhead-vsock is taken
//! from there too, else from the tools of `BULKHEAD_CACHE`.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_shim::config::{self, Machine};
use bulkhead_shim::device::Device;
use bulkhead_shim::host::HostThread;
use bulkhead_shim::process::Credentials;
use bulkhead_shim::vm::accel::{self, Accel};
use bulkhead_shim::vm::config::VmConfig;
use bulkhead_shim::vm::{Vm, VmError, VmLaunch};

/// Where QEMU is on every distribution that the tests run on.
pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// A kernel, an initramfs of its own, and a host thread.
pub struct Bench {
    pub assets: PathBuf,
    pub host: HostThread,
    pub accel: Accel,
    directory: tempfile::TempDir,
}

impl Bench {
    /// `None`, with a printed reason, where there is nothing to boot.
    pub fn new() -> Option<Self> {
        let Some(assets) = std::env::var_os("BULKHEAD_TEST_ASSETS").map(PathBuf::from) else {
            println!("skipped: BULKHEAD_TEST_ASSETS does not name a directory with a vmlinux");
            return None;
        };
        for file in [&assets.join("vmlinux"), Path::new(QEMU)] {
            if !file.exists() {
                println!("skipped: {} is not there", file.display());
                return None;
            }
        }
        let directory = tempfile::tempdir().expect("directory");
        let init = directory.path().join("init");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/init.c");
        let built = Command::new("cc").args(["-static", "-Os", "-Wall", "-o"]).arg(&init).arg(source).status();
        assert!(built.expect("cc runs").success(), "the guest does not compile");
        let archive = cpio("init", &fs::read(&init).expect("init"));
        let initramfs = directory.path().join("initramfs");
        fs::write(&initramfs, archive).expect("writes");
        fs::set_permissions(&initramfs, fs::Permissions::from_mode(0o644)).expect("sets the mode");
        // The helper runs as a user of its own, who must be able to reach it.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).expect("sets the mode");
        // `make` puts both below one directory.
        let helper = assets.join("../release/bulkhead-vsock");
        if helper.exists() {
            // By a child: what this process writes cannot be executed while a child that another test is starting has a
            // copy of the file that was open for writing.
            let copied = Command::new("cp").arg("-p").arg(helper).arg(directory.path().join("bulkhead-vsock")).status();
            assert!(copied.expect("cp runs").success(), "the helper is not copied");
        }
        let host = HostThread::start(|| Ok(())).expect("host thread");
        let accel = accel::detect(config::Accel::Auto).expect("auto never fails").accel;
        println!("accelerator: {accel:?}");
        Some(Self { assets, host, accel, directory })
    }

    pub fn config(&self, machine: Machine, params: &str, devices: Vec<Device>) -> VmConfig {
        VmConfig {
            name: "test".into(),
            machine,
            accel: self.accel,
            vcpus: 1,
            memory_mib: 128,
            kernel: self.assets.join("vmlinux"),
            initramfs: self.directory.path().join("initramfs"),
            kernel_params: vec![params.to_owned()],
            devices,
        }
    }

    /// bulkhead-vsock. Says so if it is missed.
    pub fn helper(&self) -> Option<PathBuf> {
        let helper = self.directory.path().join("bulkhead-vsock");
        let usable = helper.exists() || Path::new("/dev/vhost-vsock").exists();
        if !usable {
            println!("skipped: neither a built bulkhead-vsock nor the kernel's vhost-vsock is there");
        }
        usable.then_some(helper)
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn launch() -> VmLaunch {
        VmLaunch {
            qemu: QEMU.into(),
            credentials: Credentials::unprivileged(0x6000_1234, 0x6000_1234),
            cgroup: Vec::new(),
            oom_score_adj: None,
            files: Vec::new(),
            transcript: None,
        }
    }

    pub async fn boot(&self, config: &VmConfig) -> Result<Vm, VmError> {
        Vm::boot(&self.host, config, Self::launch()).await
    }
}

/// Waits until `vm`'s console has said `text`.
pub async fn until_console(vm: &Vm, text: &str) {
    let said = async {
        while !vm.console_tail().contains(text) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let deadline = std::time::Duration::from_mins(1);
    if let Err(error) = vm.while_alive(&format!("wait for {text:?} on the console"), deadline, said).await {
        assert!(vm.console_tail().contains(text), "{error}");
    }
}

/// A newc archive with one executable file.
fn cpio(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, content) in [(name, 0o100_755, content), ("TRAILER!!!", 0, &[][..])] {
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend_from_slice(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        pad(&mut archive);
        archive.extend_from_slice(content);
        pad(&mut archive);
    }
    archive
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
