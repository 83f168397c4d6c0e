//! A virtual machine: its configuration and command line (pure), and the running QEMU process.
//!
//! [`Vm`] owns the process, its monitor and its console. Nothing here knows what a container is; who answers for the guest is in
//! [`crate::guest`]. The end of QEMU is seen in every phase: whoever waits for the guest does so through [`Vm::while_alive`].

pub mod accel;
pub mod asset;
pub mod clock;
pub mod cmdline;
pub mod config;
pub mod disks;
pub mod transcript;

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio_util::task::TaskTracker;

use crate::device::Device;
use crate::device::file::FileRole;
use crate::device::slots::SlotError;
use crate::error;
use crate::host::HostThread;
use crate::process::{Child, ChildConfig, ChildExit, Credentials, Namespaces};
use crate::qemu::qmp::{Qmp, QmpError};
use crate::tail::Tail;
use crate::timeouts;
use crate::vm::cmdline::CommandLine;
use crate::vm::config::VmConfig;
use crate::vm::disks::Disks;
use crate::vm::transcript::Transcript;

/// How much of the console is kept.
const CONSOLE_TAIL: usize = 64 << 10;
/// How it is told that the guest's kernel gave up.
const PANICKED: &str = "the guest's kernel gave up";
/// How much of the console goes into an error.
const CONSOLE_IN_ERROR: usize = 1000;
/// How much of it goes into a log line, in characters.
const CONSOLE_IN_LOG: usize = 6000;

/// Why there is no VM, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `qemu.accel = "kvm"` on a machine without.
    #[error("qemu.accel = \"kvm\": {0}; accepted here are \"auto\" and \"tcg\"")]
    NoKvm(String),
    /// Kernel or initramfs is missing or not what it should be.
    #[error(transparent)]
    Asset(#[from] asset::AssetError),
    /// The devices do not fit.
    #[error(transparent)]
    Slots(#[from] SlotError),
    /// The process did not start.
    #[error("{0:#}")]
    Start(anyhow::Error),
    /// QEMU has ended.
    #[error("{what}: {how}")]
    Ended {
        /// What was waited for.
        what: String,
        /// How it ended, and its last words or the guest's.
        how: String,
    },
    /// QEMU runs, but what was awaited did not come.
    #[error("{what}: nothing within {deadline:?}{console}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        deadline: Duration,
        /// The end of the guest's console, as the end of the sentence.
        console: String,
    },
    /// QEMU refused.
    #[error("{what}: {source}")]
    Qmp {
        /// What was wanted.
        what: String,
        /// Its answer.
        source: QmpError,
    },
    /// Killing QEMU failed.
    #[error("{0:#}")]
    Kill(anyhow::Error),
}

impl From<VmError> for error::Error {
    fn from(error: VmError) -> Self {
        let kind = match &error {
            VmError::NoKvm(_) | VmError::Asset(_) => error::Kind::FailedPrecondition,
            VmError::Slots(_) => error::Kind::InvalidArgument,
            VmError::Ended { .. } | VmError::Qmp { source: QmpError::Closed { .. }, .. } => error::Kind::Unavailable,
            VmError::Deadline { .. } | VmError::Qmp { source: QmpError::Deadline { .. }, .. } => {
                error::Kind::DeadlineExceeded
            }
            VmError::Start(_) | VmError::Qmp { .. } | VmError::Kill(_) => error::Kind::Internal,
        };
        Self::new(kind, error)
    }
}

/// What a VM needs besides its configuration: things that exist only here and now.
#[derive(Debug)]
pub struct VmLaunch {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// Whom QEMU runs as.
    pub credentials: Credentials,
    /// As in [`ChildConfig::cgroup`].
    pub cgroup: Vec<OwnedFd>,
    /// As in [`ChildConfig::oom_score_adj`].
    pub oom_score_adj: Option<i32>,
    /// The file behind each role of the devices: taps, vhost devices, vhost-user sockets. Kernel, initramfs, console and
    /// monitor are opened here.
    pub files: Vec<(FileRole, OwnedFd)>,
    /// Directory where the console is recorded: see [`transcript`]. None: nowhere.
    pub transcript: Option<PathBuf>,
}

/// A running, or ended, VM. Dropping it kills QEMU.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    qmp: Qmp,
    console: Tail,
    disks: Option<Disks>,
    tasks: TaskTracker,
}

impl Vm {
    /// Starts QEMU and returns when its monitor answers; the guest boots meanwhile. Not cancel safe, but nothing is left:
    /// a VM that nobody holds is killed.
    pub async fn boot(host: &HostThread, config: &VmConfig, launch: VmLaunch) -> Result<Self, VmError> {
        let what = "start the VM";
        let command_line = cmdline::render(&clock::told(config).await)?;
        let (kernel, initramfs) = asset::open(&config.kernel, &config.initramfs).await?;
        let start = |error: std::io::Error| VmError::Start(anyhow::Error::new(error).context(what));
        let (monitor, monitor_peer) = UnixStream::pair().map_err(start)?;
        let (console, console_peer) = UnixStream::pair().map_err(start)?;
        let mut files = launch.files;
        files.extend([(FileRole::Kernel, kernel), (FileRole::Initramfs, initramfs)]);
        for (role, peer) in [(FileRole::Monitor, monitor_peer), (FileRole::Console, console_peer)] {
            let peer = peer.into_std().map_err(start)?;
            // QEMU chooses for itself; this end must not be left as the runtime had it.
            peer.set_nonblocking(false).map_err(start)?;
            files.push((role, peer.into()));
        }

        let mut child = ChildConfig::new("QEMU", launch.qemu, launch.credentials);
        child.cgroup = launch.cgroup;
        child.oom_score_adj = launch.oom_score_adj;
        child.namespaces = Namespaces { net: true, ipc: true, uts: true, mount: true };
        child.devices = Some(accel::device_nodes(config.accel).map_err(VmError::Start)?);
        child.fds = behind_numbers(&command_line, files)?;
        child.args = command_line.args.into();
        let child = Child::spawn(host, child).await.map_err(VmError::Start)?;

        // The console first: a guest that nobody reads stalls.
        let tail = Tail::new(CONSOLE_TAIL);
        let tasks = TaskTracker::new();
        tasks.spawn(read_console(console, tail.clone(), launch.transcript));
        tasks.close();
        let qmp = tokio::select! {
            biased;
            qmp = Qmp::connect(monitor) => qmp,
            _ = child.wait() => Err(QmpError::Closed { command: "qmp_capabilities" }),
        };
        let qmp = match qmp {
            Ok(qmp) => qmp,
            Err(source) => return Err(not_started(&child, &tail, what, source).await),
        };
        let disks = config.devices.iter().find_map(|device| match device {
            Device::Scsi(controller) => Some(Disks::new(qmp.clone(), controller.id.clone())),
            _ => None,
        });
        Ok(Self { child, qmp, console: tail, disks, tasks })
    }

    /// The QEMU process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// The monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// The end of what the guest wrote to its console, made harmless.
    pub fn console_tail(&self) -> String {
        self.console.text()
    }

    /// The end of [`Self::console_tail`] as one line for a log: long enough for an oops of the guest's kernel.
    pub fn console_line(&self) -> String {
        self.console.line(CONSOLE_IN_LOG)
    }

    /// One sentence about QEMU's end, or about the guest's if that is the reason.
    pub fn obituary(&self) -> String {
        obituary(&self.child, &self.console)
    }

    /// Awaits `future` for at most `deadline`, and no longer than QEMU lives; `what` says in an error what was awaited.
    /// As cancel safe as `future`.
    pub async fn while_alive<T>(
        &self,
        what: &str,
        deadline: Duration,
        future: impl Future<Output = T>,
    ) -> Result<T, VmError> {
        tokio::select! {
            biased;
            value = future => Ok(value),
            _ = self.child.wait() => Err(VmError::Ended { what: what.to_owned(), how: self.obituary() }),
            () = tokio::time::sleep(deadline) => {
                Err(VmError::Deadline { what: what.to_owned(), deadline, console: console_clause(&self.console) })
            }
        }
    }

    /// Where disks are attached; `None` for a VM without a controller for them.
    pub fn disks(&self) -> Option<Disks> {
        self.disks.clone()
    }

    /// Waits for a guest that was asked to power off, for at most `grace`, then kills QEMU. Safe to repeat.
    pub async fn shutdown(&self, grace: Duration) -> Result<ChildExit, VmError> {
        if tokio::time::timeout(grace, self.child.wait()).await.is_err() {
            tracing::warn!(qemu_pid = self.child.pid(), ?grace, "the guest did not power off and is killed");
        }
        self.kill().await?;
        Ok(self.child.wait().await)
    }

    /// Ends QEMU at once and waits for its end. Safe to repeat.
    pub async fn kill(&self) -> Result<(), VmError> {
        self.child.kill().await.map_err(VmError::Kill)?;
        // The console's other end went with the process.
        self.tasks.wait().await;
        Ok(())
    }
}

/// Reads the console until QEMU closes it, and records it in `directory`.
async fn read_console(mut console: UnixStream, tail: Tail, directory: Option<PathBuf>) {
    let mut buffer = [0; 4096];
    let mut transcript = directory.map(Transcript::new);
    while let Ok(read @ 1..) = console.read(&mut buffer).await {
        tail.push(&buffer[..read]);
        let Some(recorder) = &mut transcript else { continue };
        if let Err(error) = recorder.append(&buffer[..read]).await {
            tracing::warn!(error = %format_args!("{error:#}"), "the guest's console is no longer recorded");
            transcript = None;
        }
    }
}

/// Pairs each number of the command line with its file.
fn behind_numbers(
    command_line: &CommandLine,
    mut files: Vec<(FileRole, OwnedFd)>,
) -> Result<Vec<(OwnedFd, i32)>, VmError> {
    let mut numbered = Vec::new();
    for (role, number) in command_line.files.iter() {
        let index = files.iter().position(|(known, _)| known == role);
        let index = index.ok_or_else(|| VmError::Start(anyhow::anyhow!("start the VM: no file for {role:?}")))?;
        numbered.push((files.swap_remove(index).1, number));
    }
    Ok(numbered)
}

/// Why QEMU's monitor never answered: mostly because QEMU has ended, or is about to.
async fn not_started(child: &Child, console: &Tail, what: &str, source: QmpError) -> VmError {
    let what = what.to_owned();
    if matches!(source, QmpError::Closed { .. })
        && tokio::time::timeout(timeouts::CHILD_EXIT, child.wait()).await.is_ok()
    {
        // The monitor answers before the guest runs, so this is QEMU's end, whatever its status; except for a very fast panic.
        let how = panic_line(&console.text()).map_or_else(|| child.obituary(), |panic| format!("{PANICKED}: {panic}"));
        return VmError::Ended { what, how };
    }
    VmError::Qmp { what, source }
}

fn obituary(child: &Child, console: &Tail) -> String {
    // A guest that panics or powers off makes QEMU exit with 0 and say nothing.
    let quiet_exit = *child.exited().borrow() == Some(ChildExit::Exited(0)) && child.stderr_tail().is_empty();
    match panic_line(&console.text()) {
        Some(panic) => format!("{PANICKED}: {panic}"),
        None if quiet_exit => format!("the guest powered off{}", console_clause(console)),
        None => child.obituary(),
    }
}

/// The line in which a Linux guest says that it panics; bounded, since the guest writes it.
fn panic_line(console: &str) -> Option<String> {
    let start = console.rfind("Kernel panic - not syncing")?;
    let line = console[start..].lines().next()?;
    Some(line.chars().take(300).collect())
}

fn console_clause(console: &Tail) -> String {
    let said = console.line(CONSOLE_IN_ERROR);
    if said.is_empty() { "; its console is empty".to_owned() } else { format!("; its console ends with: {said}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_panic_of_a_guest_is_found_and_bounded() {
        let console =
            "[1] boot\n[2] Kernel panic - not syncing: No working init found.  Try passing init=\n[2] CPU: 0\n";
        assert_eq!(
            panic_line(console).as_deref(),
            Some("Kernel panic - not syncing: No working init found.  Try passing init=")
        );
        assert_eq!(panic_line("all is well\n"), None);
        let endless = format!("Kernel panic - not syncing{}", "é".repeat(10_000));
        assert_eq!(panic_line(&endless).map(|line| line.chars().count()), Some(300));
    }

    #[test]
    fn kinds_are_what_containerd_may_conclude() {
        let ended = VmError::Ended { what: "boot".into(), how: "QEMU was ended by signal 9 (SIGKILL)".into() };
        let error = error::Error::from(ended);
        assert_eq!(error.kind(), error::Kind::Unavailable);
        assert_eq!(error.to_string(), "boot: QEMU was ended by signal 9 (SIGKILL)");
    }
}
