//! The VM layer with real QEMU and a guest of a hundred lines: boot, confinement, every way to end, disks that come and go.
#![allow(clippy::unwrap_used, missing_docs)]

mod vm_support;

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_shim::config::Machine;
use bulkhead_shim::device::block::{Disk, DiskSource, ScsiController};
use bulkhead_shim::device::rng::Rng;
use bulkhead_shim::device::{Device, DeviceId};
use bulkhead_shim::process::ChildExit;
use bulkhead_shim::vm::VmError;
use bulkhead_shim::vm::accel::Accel;
use vm_support::{Bench, until_console};

const MACHINES: [Machine; 2] = [Machine::Microvm, Machine::Q35];

fn id(id: &str) -> DeviceId {
    DeviceId::new(id).unwrap()
}

#[tokio::test]
async fn a_guest_boots_and_powers_off() {
    let Some(bench) = Bench::new() else { return };
    for machine in MACHINES {
        let begun = Instant::now();
        let vm = bench.boot(&bench.config(machine, "test=up", vec![Device::Rng(Rng { id: id("rng") })])).await.unwrap();
        let answered = begun.elapsed();
        until_console(&vm, "mini guest: up").await;
        println!("{machine:?}: monitor after {answered:?}, userspace after {:?}", begun.elapsed());
        let exit = vm.shutdown(Duration::from_secs(20)).await.unwrap();
        assert_eq!(exit, ChildExit::Exited(0), "{}", vm.obituary());
        assert!(vm.obituary().starts_with("the guest powered off; its console ends with:"), "{}", vm.obituary());
    }
}

#[tokio::test]
async fn qemu_has_no_root_no_capabilities_a_filter_and_namespaces_of_its_own() {
    let Some(bench) = Bench::new() else { return };
    let vm = bench.boot(&bench.config(Machine::Microvm, "test=idle", Vec::new())).await.unwrap();
    until_console(&vm, "mini guest: idle").await;
    let pid = vm.child().pid();
    let mut seen = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        // A thread may have ended since it was listed.
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        seen += 1;
        let field = |name: &str| {
            let line =
                status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {status}"));
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(field("Uid:"), "1610617396 1610617396 1610617396 1610617396");
        assert_eq!(field("Gid:"), "1610617396 1610617396 1610617396 1610617396");
        assert_eq!(field("Groups:"), "");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Seccomp:"), "2");
    }
    assert!(seen > 0, "QEMU has no threads");
    for namespace in ["net", "ipc", "uts", "mnt"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let mut devices: Vec<_> =
        fs::read_dir(format!("/proc/{pid}/root/dev")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    devices.sort();
    let expected: &[&str] = match bench.accel {
        Accel::Kvm => &["kvm", "null", "urandom"],
        Accel::Tcg => &["null", "urandom"],
    };
    assert_eq!(devices, expected);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_panic_of_the_guest_is_told_in_its_own_words() {
    let Some(bench) = Bench::new() else { return };
    let vm = bench.boot(&bench.config(Machine::Microvm, "test=panic", Vec::new())).await.unwrap();
    let waited = vm.while_alive("wait for the agent", Duration::from_mins(1), std::future::pending::<()>()).await;
    let text = waited.unwrap_err().to_string();
    let expected =
        "wait for the agent: the guest's kernel gave up: Kernel panic - not syncing: Attempted to kill init!";
    assert!(text.starts_with(expected), "{text}");
}

#[tokio::test]
async fn a_killed_qemu_is_noticed_at_once() {
    let Some(bench) = Bench::new() else { return };
    let vm = bench.boot(&bench.config(Machine::Microvm, "test=idle", Vec::new())).await.unwrap();
    until_console(&vm, "mini guest: idle").await;
    let pid = rustix::process::Pid::from_raw(vm.child().pid()).unwrap();
    let begun = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let waited = vm.while_alive("exec", Duration::from_mins(1), std::future::pending::<()>()).await;
    assert_eq!(waited.unwrap_err().to_string(), "exec: QEMU was ended by signal 9 (SIGKILL)");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_says_nothing_runs_into_the_deadline_with_its_console() {
    let Some(bench) = Bench::new() else { return };
    let vm = bench.boot(&bench.config(Machine::Microvm, "test=idle", Vec::new())).await.unwrap();
    until_console(&vm, "mini guest: idle").await;
    let waited = vm.while_alive("wait for the agent", Duration::from_millis(50), std::future::pending::<()>()).await;
    let text = waited.unwrap_err().to_string();
    assert!(text.starts_with("wait for the agent: nothing within 50ms; its console ends with: "), "{text}");
    assert!(text.ends_with("mini guest: idle"), "{text}");
}

#[tokio::test]
async fn what_qemu_needs_and_does_not_find_is_named() {
    let Some(bench) = Bench::new() else { return };
    let good = bench.config(Machine::Microvm, "test=up", Vec::new());

    let mut config = good.clone();
    config.kernel = bench.directory().join("nothing");
    let error = bench.boot(&config).await.unwrap_err();
    assert!(matches!(error, VmError::Asset(_)), "{error}");
    assert!(error.to_string().contains("nothing: No such file or directory"), "{error}");

    // The head of a kernel is enough for our own look at it, but not for QEMU.
    let mut config = good.clone();
    config.kernel = bench.directory().join("vmlinux-cut");
    fs::write(&config.kernel, &fs::read(&good.kernel).unwrap()[..4096]).unwrap();
    let error = bench.boot(&config).await.unwrap_err().to_string();
    assert!(error.starts_with("start the VM: QEMU exited with status 1: "), "{error}");

    let mut launch = Bench::launch();
    launch.qemu = bench.directory().join("no-qemu");
    let error = bulkhead_shim::vm::Vm::boot(&bench.host, &good, launch).await.unwrap_err().to_string();
    assert!(
        error.starts_with("start QEMU /") && error.ends_with("execute it: No such file or directory (os error 2)"),
        "{error}"
    );

    let mut launch = Bench::launch();
    launch.qemu = "/bin/true".into();
    let error = bulkhead_shim::vm::Vm::boot(&bench.host, &good, launch).await.unwrap_err().to_string();
    assert_eq!(error, "start the VM: QEMU exited with status 0");
}

#[tokio::test]
async fn disks_come_and_go_while_the_guest_runs() {
    let Some(bench) = Bench::new() else { return };
    for machine in MACHINES {
        let devices = vec![Device::Scsi(ScsiController { id: id("scsi") })];
        let vm = bench.boot(&bench.config(machine, "test=disk", devices)).await.unwrap();
        until_console(&vm, "waiting for a disk").await;
        let image = bench.directory().join("image");
        let mut content = b"on the very disk".to_vec();
        content.resize(1 << 20, 0);
        fs::write(&image, &content).unwrap();
        let file = fs::File::open(&image).unwrap();
        let disk = Disk { id: id("disk-0"), serial: "rootfs-of-web".into(), source: DiskSource::File, read_only: true };
        let disks = vm.disks().expect("has a controller");
        let plugged = disks.plug(&disk, file.into()).await.unwrap();
        until_console(&vm, "content on the very disk").await;
        assert!(vm.console_tail().contains("serial rootfs-of-web"), "{}", vm.console_tail());
        until_console(&vm, "disk is let go").await;
        let holds = |pid: i32| {
            let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            files.filter_map(|file| fs::read_link(file.unwrap().path()).ok()).any(|path| path == image)
        };
        assert!(holds(vm.child().pid()));
        disks.unplug(&plugged).await.unwrap();
        assert!(!holds(vm.child().pid()), "QEMU has closed the image");
        disks.unplug(&plugged).await.unwrap();
        let file = fs::File::open(&image).unwrap();
        let again = disks.plug(&disk, file.into()).await.unwrap();
        assert_eq!(again.lun, plugged.lun);
        vm.kill().await.unwrap();
    }
}
