//! One process the shim knows: a container's init or an exec.
//!
//! ```text
//! Created ── start ──> Starting ── pid known ──> Running ── reaped ──> Stopped
//!                          └────── it failed ────────────────────────────^
//! ```
//!
//! An init is `Created` with a pid: it waits for its start. Owned by its [`crate::container::Container`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent as api;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::reaper::{ExitStatus, Reaper};
use crate::stdio::{Plan, Streams};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Known; nothing runs but, for an init, what waits for the start.
    Created,
    /// A worker is making it.
    Starting,
    /// It runs.
    Running,
    /// It has exited, or never came to run.
    Stopped,
}

/// A process; see the module's documentation.
pub struct Process {
    /// Empty for the init.
    pub exec_id: String,
    /// Its streams as requested.
    pub stdio: Plan,
    reaper: Arc<Reaper>,
    phase: watch::Sender<Phase>,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    pid: Option<i32>,
    streams: Option<Arc<Streams>>,
}

impl Process {
    /// A process that does not run yet.
    pub fn new(exec_id: String, stdio: Plan, reaper: Arc<Reaper>) -> Self {
        Self { exec_id, stdio, reaper, phase: watch::Sender::new(Phase::Created), live: Mutex::default() }
    }

    /// Where it is now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves from `from` to `to`, or says what it is instead.
    pub fn advance(&self, from: Phase, to: Phase) -> Result<()> {
        let mut found = from;
        let moved = self.phase.send_if_modified(|phase| {
            found = *phase;
            let fits = *phase == from;
            if fits {
                *phase = to;
            }
            fits
        });
        if moved {
            return Ok(());
        }
        Err(Error::precondition(format!("process is {found:?}, expected {from:?}").to_lowercase()))
    }

    /// Its guest pid, once it has one.
    pub fn pid(&self) -> Option<i32> {
        self.live().pid
    }

    /// The pid is known and the streams run.
    pub fn attach(&self, pid: i32, streams: Streams) {
        *self.live() = Live { pid: Some(pid), streams: Some(Arc::new(streams)) };
    }

    /// Follows the phases.
    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Waits until it has stopped, or was never started. Cancel safe.
    pub async fn settled(&self) {
        let mut phase = self.phase.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        drop(phase.wait_for(|phase| matches!(phase, Phase::Created | Phase::Stopped)).await);
    }

    /// The exit was reaped: takes what it had written and words the event.
    pub fn exited(&self, container_id: &str, status: ExitStatus) -> api::Exit {
        let (pid, streams) = {
            let live = self.live();
            (live.pid.unwrap_or(0), live.streams.clone())
        };
        let (stdout_bytes, stderr_bytes) = streams.map_or((0, 0), |streams| streams.settle());
        api::Exit {
            container_id: container_id.to_owned(),
            exec_id: self.exec_id.clone(),
            exit_status: status,
            guest_pid: pid as u32,
            stdout_bytes,
            stderr_bytes,
        }
    }

    /// Nothing will change any more; call after the exit event was appended.
    pub fn stop(&self) {
        self.phase.send_replace(Phase::Stopped);
    }

    /// Sends a signal to it alone; not found once it has exited.
    pub fn signal(&self, number: i32) -> Result<()> {
        let gone = || Error::not_found("process already finished");
        let pid = match (self.phase(), self.pid()) {
            (Phase::Stopped, _) => return Err(gone()),
            (_, None) => return Err(Error::precondition("process has not been started")),
            (_, Some(pid)) => pid,
        };
        match self.reaper.signal(pid, number) {
            Ok(true) => Ok(()),
            Ok(false) => Err(gone()),
            Err(nix::errno::Errno::EINVAL) => Err(Error::invalid(format!("{number} is not a signal number"))),
            Err(error) => Err(Error::internal(format!("send signal {number}: {error}"))),
        }
    }

    /// Resizes its pty.
    pub fn resize(&self, height: u32, width: u32) -> Result<()> {
        let streams = self.live().streams.clone();
        let streams = streams.ok_or_else(|| Error::precondition("process has not been started"))?;
        streams.resize(height.min(u16::MAX.into()) as u16, width.min(u16::MAX.into()) as u16)
    }

    /// Ends its streams; what was settled is still sent.
    pub async fn close(&self) {
        let streams = self.live().streams.take();
        if let Some(streams) = streams {
            streams.close().await;
        }
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tasks and children of a test end with the test")]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new("e".into(), Plan::parse(None).expect("plan"), Arc::default())
    }

    #[test]
    fn a_process_is_started_once() {
        let process = process();
        assert!(process.advance(Phase::Created, Phase::Starting).is_ok());
        let error = process.advance(Phase::Created, Phase::Starting).expect_err("twice");
        assert_eq!(error.to_string(), "process is starting, expected created");
    }

    #[test]
    fn a_signal_to_an_exited_process_finds_nothing() {
        let process = process();
        assert_eq!(process.signal(15).expect_err("created").code(), tonic::Code::FailedPrecondition);
        process.stop();
        assert_eq!(process.signal(15).expect_err("stopped").code(), tonic::Code::NotFound);
    }

    #[tokio::test]
    async fn settled_waits_for_a_running_process_only() {
        let process = Arc::new(process());
        process.settled().await;
        process.advance(Phase::Created, Phase::Running).expect("advance");
        let waiter = Arc::clone(&process);
        let wait = tokio::spawn(async move { waiter.settled().await });
        process.stop();
        assert!(wait.await.is_ok());
    }
}
