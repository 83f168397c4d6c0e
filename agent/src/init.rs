//! PID 1 of the guest, from the kernel's first call to power-off.
//!
//! The initramfs stays the root, without a copy: a bind of it over `/` is enough for `pivot_root(2)` to work in
//! containers, which refuses only the kernel's own rootfs mount. So the one copy of this binary serves every re-execution.

use std::ffi::CStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use bulkhead_proto::{DEFAULT_PORT, PORT_PARAMETER};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use rustix::fs::OFlags;
use tracing_subscriber::filter::LevelFilter;

use crate::error::{During, Error, Result};
use crate::link::Host;
use crate::pod::{Pod, Services};
use crate::server::Session;
use crate::{cgroup, clock, mount as mounts, sandbox};

/// Open files that containers may have unless their spec says less; what node daemons grant.
const OPEN_FILES: u64 = 1 << 20;

/// What a node sets for its pods, since the guest is their node.
const SYSCTLS: [(&str, &str); 5] = [
    ("vm.overcommit_memory", "1"),
    ("fs.inotify.max_user_instances", "8192"),
    ("fs.inotify.max_user_watches", "524288"),
    ("kernel.pid_max", "4194304"),
    ("vm.max_map_count", "262144"),
];

/// Runs the guest; never returns.
pub fn main() -> ! {
    let started_us = clock::uptime_us();
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("bulkhead-agent: {panic}");
        stop();
    }));
    if let Err(error) = run(started_us) {
        eprintln!("bulkhead-agent: {error}");
    }
    stop()
}

/// Resets the machine, which ends QEMU: it runs with `-no-reboot`, and a guest without ACPI has no other way to power off.
fn stop() -> ! {
    mounts::sync_all();
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    eprintln!("bulkhead-agent: reboot: {error}");
    // PID 1 must not return; the kernel panics and resets.
    std::process::exit(1)
}

fn run(started_us: u64) -> Result<()> {
    prepare_root()?;
    let parameters = fs::read_to_string("/proc/cmdline").during(|| "read the kernel's command line")?;
    let debug = parameter(&parameters, "bulkhead.log") == Some("debug");
    tracing_subscriber::fmt()
        .with_max_level(if debug { LevelFilter::DEBUG } else { LevelFilter::WARN })
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
    let port = port(&parameters)?;
    cgroup::delegate()?;
    for (name, value) in SYSCTLS {
        if let Err(error) = sandbox::set_sysctl(name, value) {
            tracing::warn!(%error, "guest-wide sysctl was not set");
        }
    }
    // Mounts and namespaces come and go with each container; on the one or two CPUs of a pod haste costs nothing.
    if let Err(error) = fs::write("/sys/kernel/rcu_expedited", "1") {
        tracing::warn!(%error, "RCU grace periods were not expedited");
    }
    umask(Mode::from_bits_truncate(0o022));
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).during(|| "raise the limit of open files")?;
    fs::write("/proc/self/oom_score_adj", "-1000").during(|| "hide from the OOM killer")?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().during(|| "start the runtime")?;
    runtime.block_on(serve(port, started_us))
}

async fn serve(port: u32, started_us: u64) -> Result<()> {
    let services = Arc::new(Services::start(Host::new(port))?);
    let pod = Pod::new(Arc::clone(&services));
    services.tracker.spawn({
        let (reaper, cancel) = (Arc::clone(&services.reaper), services.cancel.clone());
        async move {
            if let Err(error) = reaper.run(cancel).await {
                // Without exits nothing works; the host sees the machine stop and tells this line.
                eprintln!("bulkhead-agent: wait for processes: {error}");
                stop();
            }
        }
    });
    services.tracker.spawn(Arc::clone(&pod).sample());
    let served = Session::new(pod, started_us).serve().await;
    services.cancel.cancel();
    served
}

/// Mounts what the kernel and containers need, and makes the initramfs a root that can be pivoted from.
fn prepare_root() -> Result<()> {
    fs::create_dir_all("/.root").during(|| "create a mount point")?;
    let bind = MsFlags::MS_BIND;
    mount(Some("/"), "/.root", None::<&str>, bind, None::<&str>).during(|| "bind the root")?;
    nix::unistd::chdir("/.root").during(|| "enter the root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).during(|| "move the root")?;
    nix::unistd::chroot(".").during(|| "change the root")?;
    nix::unistd::chdir("/").during(|| "enter the root")?;

    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let devices = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    for (fstype, target, flags, data) in [
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
        ("devpts", "/dev/pts", devices, "mode=0620,ptmxmode=0666,gid=5"),
        ("proc", "/proc", plain, ""),
        ("sysfs", "/sys", plain, ""),
        // Without favordynmods each process that joins a cgroup waits for an RCU grace period: every exec does.
        ("cgroup2", cgroup::MOUNT, plain, "nsdelegate,favordynmods"),
        ("tmpfs", "/run", MsFlags::MS_NODEV, "mode=0755"),
        ("tmpfs", "/tmp", plain, "mode=1777"),
    ] {
        fs::create_dir_all(target).during(|| format!("create {target}"))?;
        mounts::attach(Path::new(fstype), Path::new(target), fstype, flags, data)?;
        if target == "/dev" {
            // From here on errors have a place to go, even from an initramfs without device nodes.
            open_console();
        }
    }
    Ok(())
}

/// Makes the console stdin, stdout and stderr.
fn open_console() {
    let Ok(console) =
        rustix::fs::open(c"/dev/console" as &CStr, OFlags::RDWR | OFlags::NOCTTY, rustix::fs::Mode::empty())
    else {
        return;
    };
    // Without them there is nothing to tell it to.
    let _ = rustix::stdio::dup2_stdin(&console);
    let _ = rustix::stdio::dup2_stdout(&console);
    let _ = rustix::stdio::dup2_stderr(&console);
}

/// The last value of a parameter of the kernel's command line.
fn parameter<'a>(command_line: &'a str, name: &str) -> Option<&'a str> {
    command_line.split_whitespace().rev().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn port(command_line: &str) -> Result<u32> {
    match parameter(command_line, PORT_PARAMETER) {
        None => Ok(DEFAULT_PORT),
        Some(text) => text.parse().map_err(|_| {
            Error::invalid(format!("kernel parameter {PORT_PARAMETER}={text:?} is not a vsock port number"))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_comes_from_the_command_line() {
        assert_eq!(port("console=ttyS0 quiet").expect("default"), DEFAULT_PORT);
        assert_eq!(port("a bulkhead.port=77 b\n").expect("given"), 77);
        assert_eq!(port("bulkhead.port=1 bulkhead.port=2").expect("last"), 2);
        assert!(port("bulkhead.port=x").is_err());
    }
}
