//! Root file systems on block devices: the guest mounts them itself, and they come and go with their containers.
//!
//! containerd's blockfile snapshotter makes them, an ext4 image file each. Its erofs snapshotter needs newer erofs-utils than
//! Debian 12 has; a disk with erofs takes the same way.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::config::BLOCK_HANDLER;
use bulkhead_tests::container::{Container, ContainerSpec};
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use serde_json::json;

const ROWS: &[Row] = &[
    Row::alone(
        "a root file system in an image file is mounted where the container runs, and keeps what is written",
        lone,
    )
    .releases(SINCE_1_7),
    Row::alone("disks come and go with the containers of a pod that lives on", in_a_pod)
        .only(&[Runtime::Bulkhead])
        .releases(SINCE_1_7),
    Row::alone("a guest that mounts the share itself finds nothing of containers that are gone", share_forgets)
        .only(&[Runtime::Bulkhead])
        .releases(SINCE_1_7),
];

/// 1.6 has no blockfile snapshotter.
const SINCE_1_7: &[Version] = &[Version::V1_7, Version::V2_4];

fn main() -> ExitCode {
    suite::run(SINCE_1_7, &[Runtime::Runc, Runtime::Bulkhead], ROWS)
}

const SOON: Duration = Duration::from_secs(20);

/// Loop devices of the host whose files are this node's.
fn loop_devices(context: &Context) -> Result<usize> {
    let devices = fs::read_dir("/sys/block").context("list block devices")?.flatten();
    let files = devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    Ok(files.filter(|file| Path::new(file.trim()).starts_with(&context.node.layout.root)).count())
}

fn lone(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("disk");
    let idle = "trap 'exit 0' TERM; while :; do sleep 1000000 & wait $!; done";
    ctr.run(&["-d", "--snapshotter", "blockfile"], &id, &["sh", "-c", idle]).success()?;
    let exec = |script: &str| {
        let exec_id = ctr.new_id("look");
        Ok::<_, anyhow::Error>(
            ctr.command(&["task", "exec", "--exec-id", &exec_id, &id, "sh", "-c", script]).success()?.text(),
        )
    };
    let root = exec("grep ' / ' /proc/mounts")?;
    let words: Vec<&str> = root.split_whitespace().collect();
    ensure!(words.get(2) == Some(&"ext4"), "the root file system is {root:?}");
    if context.runtime.is_bulkhead() {
        ensure!(words[0].starts_with("/dev/sd"), "the root file system is {root:?}, a disk of the guest was expected");
        ensure!(loop_devices(context)? == 0, "the host has a loop device although the guest has the file");
    } else {
        ensure!(loop_devices(context)? == 1, "the check does not see the loop device that there is");
    }
    // Nobody asks for it to be on the disk: the end of the container, or of the guest, sees to that.
    exec("echo kept > /written")?;
    ctr.command(&["task", "kill", "--signal", "SIGTERM", &id]).success()?;
    wait_for("the task to stop", SOON, || {
        let tasks = ctr.command(&["task", "ls"]).success()?.text();
        ensure!(tasks.lines().any(|line| line.starts_with(&id) && line.contains("STOPPED")), "{tasks}");
        Ok(())
    })?;
    ctr.command(&["task", "delete", &id]).success()?;
    // What was written is in the container's snapshot, where its next task finds it.
    ctr.command(&["task", "start", "-d", &id]).success()?;
    ensure!(exec("cat /written")? == "kept", "what was written is gone");
    ctr.remove(&id)
}

/// Image files that the pod's QEMU has open.
fn images(pod: &Pod) -> Result<usize> {
    let qemu = faults::find(&pod.node, &pod.id, Part::Qemu)?;
    let files = fs::read_dir(format!("/proc/{}/fd", qemu.pid)).context("list QEMU's files")?.flatten();
    let paths = files.filter_map(|file| fs::read_link(file.path()).ok());
    Ok(paths.filter(|path| path.to_string_lossy().contains("blockfile")).count())
}

fn in_a_pod(context: &Context) -> Result<()> {
    let pod = Pod::start(&context.node, BLOCK_HANDLER, PodSpec::new())?;
    let first = pod.run(ContainerSpec::idle())?;
    let root = |container: &Container<'_>| container.shell("grep ' / ' /proc/mounts");
    ensure!(root(&first)?.starts_with("/dev/sd"), "the root file system is {:?}", root(&first)?);
    let disks = || -> Result<usize> { Ok(first.shell("ls /sys/block | grep -c '^sd'")?.parse()?) };
    let before = (disks()?, images(&pod)?);
    for _ in 0..3 {
        let second = pod.run(ContainerSpec::idle())?;
        ensure!(root(&second)?.starts_with("/dev/sd"), "the root file system is {:?}", root(&second)?);
        second.shell("test ! -e /written && echo mine > /written && sync")?;
        ensure!(disks()? == before.0 + 1, "{} disks beside {} of one container", disks()?, before.0);
        second.remove_by_force()?;
        wait_for("the disk to go", SOON, || {
            let after = (disks()?, images(&pod)?);
            ensure!(after == before, "disks and open images were {before:?} and are {after:?}");
            Ok(())
        })?;
    }
    ensure!(loop_devices(context)? == 0, "the host has loop devices although the guest has the files");
    first.remove_by_force()?;
    pod.remove()
}

/// Here, since a container whose own root file system is in the share cannot see the top of it: to Linux each shared mount is
/// a file system of the same device, and mounting that again yields the one that was mounted last.
fn share_forgets(context: &Context) -> Result<()> {
    let data = context.scratch.join("data");
    fs::create_dir(&data)?;
    fs::write(data.join("told-to-one"), "secret")?;
    let pod = Pod::start(&context.node, BLOCK_HANDLER, PodSpec::new())?;
    let mighty = ContainerSpec::idle()
        .security("capabilities", json!({"add_capabilities": ["SYS_ADMIN"]}))
        .security("seccomp", json!({"profile_type": 1}));
    let looking = pod.run(mighty)?;
    let names = || -> Result<BTreeSet<String>> {
        // Mounted anew for each look, so that it is the host that answers and not a cache.
        let script = "mkdir -p /mnt/s; mount -t virtiofs share /mnt/s && (cd /mnt/s; find .); umount /mnt/s";
        Ok(looking.shell(script)?.lines().map(str::to_owned).collect())
    };
    let before = names()?;
    ensure!(before.iter().any(|name| name.contains(&looking.id)), "the looking container is not in {before:?}");
    for _ in 0..2 {
        let other = pod.run(ContainerSpec::idle().mount(&data, "/data", false))?;
        other.shell("test -f /data/told-to-one")?;
        let with = names()?;
        ensure!(with.iter().any(|name| name.ends_with("told-to-one")), "the volume is not in {with:?}");
        other.remove_by_force()?;
        let failed = Container::create(&pod, ContainerSpec::new(&["/no/such/program"]).mount(&data, "/data", false))?;
        ensure!(failed.try_start()?.code != 0, "a program that does not exist runs");
        failed.remove_by_force()?;
        let after = names()?;
        ensure!(after == before, "the share had {before:?} and has {after:?}");
    }
    looking.remove_by_force()?;
    pod.remove()
}
