//! The one place that waits for processes: every exit in the guest's root PID namespace arrives here and is routed by pid.
//!
//! PID 1 owns it. Nothing else may call `wait*(2)` or use `tokio::process`. A process that exits before its starter knows
//! its pid is not lost: exits without a claimant are kept while any [`Spawning`] lives.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{self, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Exit code, or 128 + signal.
pub type ExitStatus = u32;

/// Waits for all processes; see the module's documentation.
#[derive(Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Living processes somebody waits for.
    claimed: HashMap<i32, oneshot::Sender<ExitStatus>>,
    /// Exits of processes nobody has claimed yet; kept only while `spawning` is not zero.
    unclaimed: HashMap<i32, ExitStatus>,
    spawning: usize,
}

/// While this lives, exits of unknown processes are kept for [`Spawning::claim`].
pub struct Spawning {
    reaper: Arc<Reaper>,
}

impl Spawning {
    /// The exit of `pid`, a process that came to life while `self` lived.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.reaper.table();
        match table.unclaimed.remove(&pid) {
            Some(status) => drop(sender.send(status)),
            None => drop(table.claimed.insert(pid, sender)),
        }
        receiver
    }
}

impl Drop for Spawning {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.spawning -= 1;
        if table.spawning == 0 {
            table.unclaimed.clear();
        }
    }
}

impl Reaper {
    /// Call before anything that starts a process.
    pub fn spawning(self: &Arc<Self>) -> Spawning {
        self.table().spawning += 1;
        Spawning { reaper: Arc::clone(self) }
    }

    /// Sends `number` to `pid` if it is claimed and not reaped yet: so a reused pid is never hit. False if it is gone.
    pub fn signal(&self, pid: i32, number: i32) -> Result<bool, Errno> {
        let table = self.table();
        if !table.claimed.contains_key(&pid) {
            return Ok(false);
        }
        match kill(pid, number) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Reaps until cancelled. There may be one only.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> std::io::Result<()> {
        let mut child = signal(SignalKind::child())?;
        loop {
            self.reap();
            tokio::select! {
                _ = child.recv() => {}
                () = cancel.cancelled() => return Ok(()),
            }
        }
    }

    /// Collects every process that has exited by now.
    pub fn reap(&self) {
        loop {
            // The lock is taken first: between wait and delivery a pid is free for reuse, and `signal` must not see it then.
            let mut table = self.table();
            let (pid, status) = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code as u32),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as u32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "waiting for processes failed");
                    return;
                }
            };
            match table.claimed.remove(&pid.as_raw()) {
                // A starter that lost interest needs no exit.
                Some(sender) => drop(sender.send(status)),
                None if table.spawning > 0 => drop(table.unclaimed.insert(pid.as_raw(), status)),
                None => {}
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `kill(2)` with any signal number the kernel knows, real-time ones included.
fn kill(pid: i32, number: i32) -> Result<(), Errno> {
    if let Ok(named) = Signal::try_from(number) {
        return signal::kill(Pid::from_raw(pid), named);
    }
    crate::sys::kill(pid, number).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EINVAL)))
}

#[cfg(test)]
#[allow(
    clippy::zombie_processes,
    clippy::disallowed_methods,
    reason = "tasks and children of a test end with the test"
)]
mod tests {
    use std::process::Command;

    use super::*;

    // One test only: a reaper takes every child of the process, those of other tests included.
    #[tokio::test]
    async fn an_exit_before_its_claim_is_not_lost_and_a_reaped_pid_is_not_signalled() {
        let reaper = Arc::new(Reaper::default());
        let spawning = reaper.spawning();
        let child = Command::new("/bin/sh").args(["-c", "exit 7"]).spawn().expect("spawn");
        let pid = child.id() as i32;
        for _ in 0..1000 {
            reaper.reap();
            if !reaper.table().unclaimed.is_empty() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert_eq!(spawning.claim(pid).await, Ok(7));
        assert_eq!(reaper.signal(pid, 0), Ok(false));
        drop(spawning);

        let spawning = reaper.spawning();
        let child = Command::new("/bin/sh").args(["-c", "kill -9 $$"]).spawn().expect("spawn");
        let exit = spawning.claim(child.id() as i32);
        drop(spawning);
        let cancel = CancellationToken::new();
        let run = tokio::spawn(Arc::clone(&reaper).run(cancel.clone()));
        assert_eq!(exit.await, Ok(137));
        cancel.cancel();
        assert!(run.await.is_ok_and(|ended| ended.is_ok()));
    }
}
