//! Volumes, and the mounts in them.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::container::{ContainerSpec, text_of};
use bulkhead_tests::mounts::{HostMount, propagation};
use bulkhead_tests::pod::Pod;
use bulkhead_tests::row::Context;
use serde_json::json;

use crate::{SOON, outcome};

pub fn bind_directory(context: &Context, pod: &Pod) -> Result<()> {
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

pub fn rewritten_in_place(context: &Context, pod: &Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    let file = directory.join("file");
    fs::write(&file, "first.")?;
    let container = pod.run(ContainerSpec::idle().mount(&directory, "/data", true))?;
    // As long as before, longer, shorter: whatever is kept of the file, the next program that opens it reads what it holds.
    for text in ["first.", "second", "third.", "a fourth and longer one", "5"] {
        fs::write(&file, text)?;
        for _ in 0..2 {
            let seen = container.shell("cat /data/file")?;
            ensure!(seen == text, "the container reads {seen:?}, the file holds {text:?}");
        }
    }
    container.remove_by_force()
}

pub fn bind_read_only(context: &Context, pod: &Pod) -> Result<()> {
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

pub fn read_only_recursive(context: &Context, pod: &Pod) -> Result<()> {
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

pub fn propagation(context: &Context, pod: &Pod) -> Result<()> {
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

pub fn bind_file(context: &Context, pod: &Pod) -> Result<()> {
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

pub fn switched_link(context: &Context, pod: &Pod) -> Result<()> {
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

pub fn owners(context: &Context, pod: &Pod) -> Result<()> {
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
