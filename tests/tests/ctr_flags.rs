//! Flags of `ctr run` change the container as they do with runc, with every supported containerd.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::ctr::make_root;
use bulkhead_tests::loop_device::LoopDevice;
use bulkhead_tests::mounts::HostMount;
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

/// Shows a container its own cgroup.
const CGROUP: &str = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";

const ROWS: &[Row] = &[
    Row::alone("--env, --env-file and --cwd reach the program", environment),
    Row::alone("--user makes the program that user", user).releases(&[Version::V1_7, Version::V2_4]),
    Row::alone("--cap-add and --cap-drop change what the program may do", capabilities),
    Row::alone("--privileged gives the program what it takes to administer, and to mount", privileged),
    Row::alone("--seccomp filters system calls, by the default profile or a given one", seccomp),
    Row::alone("--read-only keeps the rootfs as it is", read_only),
    Row::alone("--cpus and --memory-limit are the limits of the container's cgroup", limits),
    Row::alone("--detach returns at once, and --pid-file holds the pid of the task", pid_file),
    Row::alone("--null-io runs the program with its output nowhere", null_io),
    Row::alone("--mount can be read-only, of one file, and with mounts below it", binds),
    Row::alone("--rootfs takes a directory as it is and writes to it", rootfs),
    Row::alone("--device gives a device that every kernel has", devices),
    Row::alone("--device gives a disk of the host's, under every name that it is asked for by", disk),
    Row::alone("a disk that has no room left says so to the program, which goes on", full_disk),
    Row::alone("--privileged gives no disk of the host's", no_disks).only(&[Runtime::Bulkhead]),
    Row::alone("--device refuses by name what the guest cannot have", foreign_device).only(&[Runtime::Bulkhead]),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], &[Runtime::Runc, Runtime::Bulkhead], ROWS)
}

/// What `script` says in a container with `options`.
fn said(context: &Context, options: &[&str], script: &str) -> Result<String> {
    let ctr = context.ctr();
    let id = ctr.new_id("flags");
    let options: Vec<_> = ["--rm"].iter().chain(options).copied().collect();
    Ok(ctr.run(&options, &id, &["sh", "-c", script]).success()?.text())
}

fn environment(context: &Context) -> Result<()> {
    let file = context.scratch.join("env");
    fs::write(&file, "SHAPE=round\nCOLOUR=red\n")?;
    let file = file.display().to_string();
    let options = ["--env-file", &file, "--env", "COLOUR=teal", "--env", "EMPTY=", "--cwd", "/tmp/deep"];
    let said = said(context, &options, "echo $SHAPE $COLOUR ${EMPTY-unset}.; pwd")?;
    ensure!(said == "round teal .\n/tmp/deep", "the program says {said:?}");
    Ok(())
}

fn user(context: &Context) -> Result<()> {
    let said = said(context, &["--user", "1234:2345"], "id -u; id -g; touch /tmp/mine && stat -c %u:%g /tmp/mine")?;
    ensure!(said == "1234\n2345\n1234:2345", "the program says {said:?}");
    Ok(())
}

/// The capability sets of a process, inheritable to bounding, as hexadecimal numbers.
const SETS: &str = "awk '/^Cap(Prm|Eff|Bnd)/ {print $2}' /proc/self/status";

fn capabilities(context: &Context) -> Result<()> {
    let default = said(context, &[], SETS)?;
    let bits = |text: &str| -> Result<Vec<u64>> {
        text.lines().map(|line| u64::from_str_radix(line, 16).with_context(|| format!("{text:?}"))).collect()
    };
    let (chown, sys_time) = (1 << 0, 1 << 25);
    let wanted: Vec<_> = bits(&default)?.into_iter().map(|set| set & !chown | sys_time).collect();
    let changed = said(context, &["--cap-add", "CAP_SYS_TIME", "--cap-drop", "CAP_CHOWN"], SETS)?;
    ensure!(wanted.len() == 3 && bits(&changed)? == wanted, "{default:?} became {changed:?}");
    let refused = said(context, &["--cap-drop", "CAP_CHOWN"], "chown 1:1 /etc 2>&1; true")?;
    ensure!(refused.contains("not permitted"), "chown without CAP_CHOWN says {refused:?}");
    Ok(())
}

fn privileged(context: &Context) -> Result<()> {
    let script = format!("{SETS}; mkdir /m && mount -t tmpfs none /m && touch /m/file && echo mounted");
    let said = said(context, &["--privileged"], &script)?;
    let sets: Vec<_> = said.lines().collect();
    // Not every one: the machine itself may lack some.
    let (net_admin, sys_admin) = (1 << 12, 1 << 21);
    let all = |set: &&str| u64::from_str_radix(set, 16).is_ok_and(|set| set & net_admin != 0 && set & sys_admin != 0);
    ensure!(sets.len() == 4 && sets[..3].iter().all(all) && sets[3] == "mounted", "it says {said:?}");
    Ok(())
}

fn seccomp(context: &Context) -> Result<()> {
    let mode = "awk '/^Seccomp:/ {print $2}' /proc/self/status";
    ensure!(said(context, &[], mode)? == "0", "there is a filter that nobody asked for");
    ensure!(said(context, &["--seccomp"], mode)? == "2", "there is no filter");
    let profile = context.scratch.join("profile.json");
    let rules = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    });
    fs::write(&profile, serde_json::to_vec(&rules)?)?;
    let options = ["--seccomp", "--seccomp-profile", &profile.display().to_string()];
    let said = said(context, &options, "mkdir /tmp/new 2>&1; touch /tmp/file && echo touched")?;
    // Error 95.
    ensure!(said.contains("not supported") && said.ends_with("touched"), "under the profile it says {said:?}");
    Ok(())
}

fn read_only(context: &Context) -> Result<()> {
    let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1048576";
    let script = "touch /file 2>&1; touch /bin/file 2>&1; touch /scratch/file /run/file /dev/shm/file && echo written";
    let said = said(context, &["--read-only", "--mount", mount], script)?;
    ensure!(
        said.matches("Read-only file system").count() == 2 && said.ends_with("written"),
        "the program says {said:?}"
    );
    Ok(())
}

fn limits(context: &Context) -> Result<()> {
    let script = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes 2>/dev/null || cat memory.max; \
                  cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us 2>/dev/null || cat cpu.max";
    let options = ["--mount", CGROUP, "--cpus", "0.25", "--memory-limit", "50331648"];
    let said = said(context, &options, script)?;
    let numbers: Vec<_> = said.split_whitespace().collect();
    ensure!(numbers == ["50331648", "25000", "100000"], "the cgroup says {said:?}");
    let ctr = context.ctr();
    let id = ctr.new_id("limits");
    let hog = ["sh", "-c", "dd if=/dev/zero of=/dev/shm/file bs=1M count=60 && echo survived"];
    let run = ctr.run(&["--rm", "--memory-limit", "50331648"], &id, &hog).output()?;
    ensure!(run.code != 0 && !run.text().contains("survived"), "beyond its memory the program said {:?}", run.text());
    Ok(())
}

fn pid_file(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("detached");
    let path = context.scratch.join("pid");
    let run = ctr.run(&["--detach", "--pid-file", &path.display().to_string()], &id, &["sleep", "1000"]).success()?;
    ensure!(run.text().is_empty(), "ctr says {:?}", run.text());
    let pid = fs::read_to_string(&path)?;
    let tasks = ctr.command(&["task", "ls"]).success()?.text();
    let task = tasks.lines().find(|line| line.starts_with(&id)).context("ctr task ls does not list it")?.to_owned();
    let words: Vec<_> = task.split_whitespace().collect();
    let lives = Path::new("/proc").join(&pid).is_dir();
    ctr.remove(&id)?;
    ensure!(words == [&id, &pid, "RUNNING"] && lives, "--pid-file has {pid:?}, ctr task ls says {task:?}");
    Ok(())
}

fn null_io(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("null");
    let script = "seq 1 100000; echo wrong >&2; read line || exit 4";
    let output = ctr.run(&["--rm", "--null-io"], &id, &["sh", "-c", script]).output()?.exited(4)?;
    ensure!(output.stdout.is_empty() && !output.stderr.contains("wrong"), "{}", output.describe());
    Ok(())
}

fn binds(context: &Context) -> Result<()> {
    let path = |name: &str| context.scratch.join(name);
    fs::create_dir_all(path("dir/below"))?;
    fs::write(path("dir/file"), "in the directory")?;
    fs::write(path("single"), "alone")?;
    fs::write(path("secret"), "beside it")?;
    let read_only = format!("type=bind,src={},dst=/dir,options=rbind:ro", path("dir").display());
    let below = "type=tmpfs,src=tmpfs,dst=/dir/below,options=size=1048576";
    let file = format!("type=bind,src={},dst=/etc/single,options=bind:rw", path("single").display());
    let script = "cat /dir/file /etc/single; echo; touch /dir/new 2>&1; touch /dir/below/new && echo below; \
                  echo changed >/etc/single; ls /etc/secret 2>/dev/null; true";
    let said = said(context, &["--mount", &read_only, "--mount", below, "--mount", &file], script)?;
    let lines: Vec<_> = said.lines().collect();
    ensure!(
        lines.len() == 3
            && lines[0] == "in the directoryalone"
            && lines[1].contains("Read-only file system")
            && lines[2] == "below",
        "the program says {said:?}"
    );
    let changed = fs::read_to_string(path("single"))?;
    ensure!(changed == "changed\n", "the file that was written inside reads {changed:?}");
    Ok(())
}

fn rootfs(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("rootfs");
    let root = context.scratch.join("rootfs");
    make_root(&root)?;
    let run = ctr.bare_run().args(["--rm", "--rootfs"]).arg(&root).arg(&id);
    let run = run.args(["/bin/sh", "-c", "echo made inside >/made; echo *"]).success()?;
    ensure!(run.text() == "bin dev made proc run sys tmp", "the program sees {:?}", run.text());
    let made = fs::read_to_string(root.join("made"))?;
    ensure!(made == "made inside\n", "the file made inside reads {made:?}");
    Ok(())
}

fn devices(context: &Context) -> Result<()> {
    let options = ["--device", "/dev/net/tun", "--device", "/dev/kmsg", "--device", "/dev/null"];
    let script =
        "stat -c %F:%t:%T /dev/net/tun /dev/kmsg /dev/null; exec 3<>/dev/net/tun && exec 4>/dev/kmsg && echo opened";
    let said = said(context, &options, script)?;
    let wanted = ["a:c8", "1:b", "1:3"].map(|numbers| format!("character special file:{numbers}"));
    ensure!(said == format!("{}\nopened", wanted.join("\n")), "the program says {said:?}");
    Ok(())
}

fn disk(context: &Context) -> Result<()> {
    let device = LoopDevice::here(&context.scratch.join("file"))?;
    // Another node of it, which is not below /dev.
    let other = context.scratch.join("node");
    let number = fs::metadata(&device.path)?.rdev();
    mknodat(CWD, &other, FileType::BlockDevice, Mode::RUSR, number)?;
    fs::set_permissions(&other, fs::Permissions::from_mode(0o640))?;
    let (path, other) = (&device.path, other.display().to_string());
    // Open all the time, so that what was read of it by one name is remembered when it is written to by the other.
    let script = format!(
        "exec 3<{other}; test -b {path} && head -c 6 <&3; echo; blockdev --getsize64 {path}; stat -c %a {other}; \
         echo after | dd of={path} bs=512 seek=1 conv=sync,fsync,notrunc 2>/dev/null; \
         dd if={other} bs=512 skip=1 count=1 2>/dev/null | head -n 1"
    );
    let said = said(context, &["--device", path, "--device", &other], &script)?;
    ensure!(said == "before\n8388608\n640\nafter", "of the disk the program says {said:?}");
    device.written("after\n")
}

fn full_disk(context: &Context) -> Result<()> {
    let small = context.scratch.join("small");
    let _mounted = HostMount::tmpfs_with(&small, "size=1m")?;
    let device = LoopDevice::sparse_here(&small.join("file"))?;
    let script = format!(
        "dd if=/dev/zero of={} bs=1M count=4 conv=fsync 2>&1 | grep -c -e 'No space left on device' -e 'Input/output error'; \
         echo alive",
        device.path
    );
    let said = said(context, &["--device", &device.path], &script)?;
    ensure!(said == "1\nalive", "errors of dd, and life after: {said:?}");
    Ok(())
}

fn no_disks(context: &Context) -> Result<()> {
    let device = LoopDevice::here(&context.scratch.join("file"))?;
    let said = said(context, &["--privileged"], "find /dev -type b; ls /sys/block | grep -c '^sd'; true")?;
    ensure!(said == "0", "although {} is on the host, there is {said:?}", device.path);
    Ok(())
}

fn foreign_device(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    for (name, kind, number, sentence) in [
        ("memory", FileType::CharacterDevice, makedev(1, 1), "(c 1:1) of the host is not available in the guest"),
        ("disk", FileType::BlockDevice, makedev(4000, 77), "(b 4000:77): the host has no such block device"),
    ] {
        let id = ctr.new_id("device");
        let device = context.scratch.join(name);
        mknodat(CWD, &device, kind, Mode::RUSR | Mode::WUSR, number)?;
        let device = device.display().to_string();
        let said = ctr.run(&["--rm", "--device", &device], &id, &["true"]).output()?.failure()?;
        ctr.remove(&id)?;
        let sentence = format!("device \"{device}\" {sentence}");
        ensure!(said.contains(&sentence.replace('"', "\\\"")) || said.contains(&sentence), "ctr said {said:?}");
    }
    Ok(())
}
