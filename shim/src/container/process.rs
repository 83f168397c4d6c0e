//! One process that containerd can name, a container's init or an exec: its state, its exit, its stdio.
//!
//! ```text
//! Created --start--> Starting --started--> Running --exit--> Exited
//!    |                  |                                     ^
//!    |                  '-----------exit, start failed---------'   (it ended before its start was told, or never ran)
//!    '-- delete (never started)
//! ```
//!
//! The table is [`Phase::after`]; pausing belongs to the container, not to a process.

use std::path::Path;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::container::pid::HostPid;
use crate::container::stdio::{OutputCount, Stdio, StdioPaths};
use crate::error::{Error, Result};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// On the host's clock: the guest's may drift.
    pub at: SystemTime,
}

/// Where a process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Known, and for an init prepared; nothing has run.
    Created,
    /// The guest was asked to run it.
    Starting,
    /// It runs.
    Running,
    /// It has ended, and its end was published.
    Exited,
}

/// What can happen to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// containerd calls Start.
    Start,
    /// The guest has it running.
    Started,
    /// The guest refused to run it; no exit is published, since no start was.
    StartFailed,
    /// It ended, or the guest did.
    Exit,
}

impl Phase {
    /// The next phase, or None where `step` is not possible.
    pub fn after(self, step: Step) -> Option<Self> {
        match (self, step) {
            (Self::Created, Step::Start) => Some(Self::Starting),
            (Self::Starting, Step::Started) => Some(Self::Running),
            // Whoever waits for it must not wait for ever: containerd does, before it deletes what did not start.
            (Self::Starting, Step::StartFailed) => Some(Self::Exited),
            // A killed container may never have been started; it exits all the same.
            (Self::Created | Self::Starting | Self::Running, Step::Exit) => Some(Self::Exited),
            _ => None,
        }
    }

    /// As people are told it, in OCI's words where it has one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "stopped",
        }
    }
}

/// A process and what belongs to it.
#[derive(Debug)]
pub struct Process {
    phase: Phase,
    /// Its paths, which `State` echoes.
    pub paths: StdioPaths,
    /// The copies; None once deleted, or before the container was made.
    pub stdio: Option<Stdio>,
    pid: HostPid,
    /// An exit that arrived and is held back: until the start was told, the output passed on, and for an init until the
    /// exits of its execs are out.
    pub held_exit: Option<HeldExit>,
    /// Rows and columns that were asked for before the pty was there.
    pub size: Option<(u32, u32)>,
    stdin_closed: bool,
    exit: watch::Sender<Option<Exit>>,
}

/// An exit on its way to containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldExit {
    /// The exit itself.
    pub exit: Exit,
    /// Output to pass on before it; None when the guest is gone.
    pub output: Option<OutputCount>,
    /// How far it is.
    pub progress: Held,
}

/// How far a held exit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Waits for the start to be told.
    Arrived,
    /// Its output is being passed on.
    Draining,
    /// Ready to be published in its turn.
    Drained,
}

impl Process {
    /// A process in [`Phase::Created`].
    ///
    /// Fails if the host has no pid left for it.
    pub fn new(paths: StdioPaths) -> anyhow::Result<Self> {
        let pid = HostPid::allocate()?;
        Ok(Self {
            phase: Phase::Created,
            paths,
            stdio: None,
            pid,
            held_exit: None,
            size: None,
            stdin_closed: false,
            exit: watch::Sender::new(None),
        })
    }

    /// The host pid that containerd knows it by.
    pub fn pid(&self) -> u32 {
        self.pid.get()
    }

    /// See [`HostPid::enter_network`]; until it has ended. None: [`HostPid::enter_empty_network`].
    pub fn enter_network(&mut self, path: Option<&Path>) -> anyhow::Result<()> {
        match path {
            Some(path) => self.pid.enter_network(path),
            None => self.pid.enter_empty_network(),
        }
    }

    /// True from the call of Start to the exit.
    pub fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Running)
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Takes `step`, or says that it is not possible. `what` names the process.
    pub fn step(&mut self, step: Step, what: &dyn std::fmt::Display) -> Result<()> {
        match self.phase.after(step) {
            Some(next) => {
                self.phase = next;
                if next == Phase::Exited {
                    self.pid.leave_network();
                }
                Ok(())
            }
            None => Err(Error::failed_precondition(format!(
                "cannot {} {what}: it is {}",
                match step {
                    Step::Start => "start",
                    Step::Started | Step::StartFailed => "finish the start of",
                    Step::Exit => "end",
                },
                self.phase.name()
            ))),
        }
    }

    /// Takes the copies over; a `CloseIO` that came before them takes effect now.
    pub fn set_stdio(&mut self, mut stdio: Stdio) {
        if self.stdin_closed {
            stdio.close_stdin();
        }
        self.stdio = Some(stdio);
    }

    /// Lets stdin reach EOF behind what was written.
    pub fn close_stdin(&mut self) {
        self.stdin_closed = true;
        if let Some(stdio) = &mut self.stdio {
            stdio.close_stdin();
        }
    }

    /// Publishes the exit to every waiter.
    pub fn set_exit(&mut self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }

    /// The exit, once published.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Becomes `Some` when the exit is published; an error when the process is deleted unstarted.
    pub fn subscribe(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 4] = [Phase::Created, Phase::Starting, Phase::Running, Phase::Exited];
    const STEPS: [Step; 4] = [Step::Start, Step::Started, Step::StartFailed, Step::Exit];

    #[test]
    fn the_whole_table_is_as_drawn() {
        let allowed = [
            (Phase::Created, Step::Start, Phase::Starting),
            (Phase::Created, Step::Exit, Phase::Exited),
            (Phase::Starting, Step::Started, Phase::Running),
            (Phase::Starting, Step::StartFailed, Phase::Exited),
            (Phase::Starting, Step::Exit, Phase::Exited),
            (Phase::Running, Step::Exit, Phase::Exited),
        ];
        for phase in PHASES {
            for step in STEPS {
                let expected = allowed.iter().find(|(p, s, _)| (*p, *s) == (phase, step)).map(|(_, _, next)| *next);
                assert_eq!(phase.after(step), expected, "{phase:?} {step:?}");
            }
        }
    }

    #[test]
    fn a_refusal_names_the_process_and_where_it_stands() {
        let mut process = Process::new(StdioPaths::default()).expect("has a pid");
        process.step(Step::Start, &"container a").expect("starts");
        process.step(Step::Started, &"container a").expect("runs");
        let error = process.step(Step::Start, &"container a").expect_err("refused");
        assert_eq!(error.to_string(), "cannot start container a: it is running");
    }

    #[tokio::test]
    async fn a_waiter_that_comes_late_is_answered_at_once() {
        let mut process = Process::new(StdioPaths::default()).expect("has a pid");
        let exit = Exit { status: 3, at: SystemTime::now() };
        process.set_exit(exit);
        assert_eq!(*process.subscribe().wait_for(Option::is_some).await.expect("answered"), Some(exit));
    }
}
