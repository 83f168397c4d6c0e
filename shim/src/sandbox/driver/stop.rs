//! The end of a sandbox: asked for, or suffered.
//!
//! Teardown runs as a job; meanwhile the exits of the pod's containers go out. The sandbox's own exit is published last,
//! when nothing of the pod is left on the host but its taps: containerd removes the network namespace on that word, which has
//! nothing of ours in it then but a link that is being unregistered.

use super::{Done, Driver, Holding, answer, killed_now};
use crate::container::ProcessId;
use crate::container::process::{Exit, Phase, Process};
use crate::container::spec::Role;
use crate::error::{Error, Kind};
use crate::network::TapFiles;
use crate::sandbox::pod::Farewell;
use crate::sandbox::state::{State, Step};

impl Driver {
    /// Begins the end. `exit` is what the sandbox's own process will have ended with.
    pub(super) fn begin_stop(&mut self, exit: Exit, farewell: Farewell) {
        let was = self.state;
        if self.step(Step::Stop).is_err() {
            return;
        }
        let holding = std::mem::replace(&mut self.holding, Holding::Stop { exit, torn_down: false });
        match holding {
            Holding::Pod(pod) => {
                let farewell = if self.guest_is_empty() { Farewell::Killed } else { farewell };
                self.jobs.spawn(async move { Done::TornDown(pod.tear_down(farewell).await) });
            }
            // The boot's job unwinds by itself; its end is the end of the teardown.
            Holding::Boot(cancel) => cancel.cancel(),
            Holding::Nothing | Holding::Stop { .. } => {
                tracing::error!(state = was.name(), "sandbox has nothing to stop");
                self.jobs.spawn(async { Done::TornDown(TapFiles::default()) });
            }
        }
    }

    /// Whether every container of the pod has been deleted: then each of its file systems was unmounted, and there is nothing
    /// to ask of the guest.
    fn guest_is_empty(&self) -> bool {
        !self.guest_holds && self.containers.values().all(|container| container.role == Role::Sandbox)
    }

    /// QEMU, a helper or the guest is gone without having been asked to go.
    pub(super) fn pod_lost(&mut self, what: &str) {
        if self.state != State::Ready {
            // A teardown ends the children one by one; that is no news.
            return;
        }
        let (console, obituary) = match &self.holding {
            Holding::Pod(pod) => (pod.console_tail(), pod.obituary(what)),
            _ => (String::new(), what.to_owned()),
        };
        tracing::error!(error = obituary, console = %last_lines(&console), "the pod's virtual machine is lost");
        self.obituary = Some(obituary);
        self.begin_stop(killed_now(), Farewell::Killed);
    }

    /// `error`, with what the virtual machine was lost by if that is why it came about: the log is not where users look.
    pub(super) fn explained(&self, error: Error) -> Error {
        let found = || match &self.holding {
            // Its end is there, and the news of it still on the way.
            Holding::Pod(pod) => pod.is_lost().then(|| pod.obituary("")),
            _ => None,
        };
        match self.obituary.clone().or_else(found) {
            Some(cause) if error.kind() == Kind::Unavailable => error.because(cause),
            _ => error,
        }
    }

    pub(super) fn on_torn_down(&mut self, tap_files: TapFiles) {
        if self.step(Step::TornDown).is_err() {
            return;
        }
        if let Holding::Stop { torn_down, .. } = &mut self.holding {
            *torn_down = true;
        }
        for container in self.containers.values_mut() {
            // It went with the pod.
            container.storage = None;
        }
        for (reply, error) in self.failed_creates.drain(..) {
            answer(reply, Err(error));
        }
        self.end_all();
        self.finish_stop();
        self.jobs.spawn(async move {
            tap_files.close().await;
            Done::Nothing
        });
    }

    /// Publishes the sandbox's exit once it is the last one.
    pub(super) fn finish_stop(&mut self) {
        let Holding::Stop { exit, torn_down: true } = self.holding else { return };
        let own = |role: Role| matches!(role, Role::Sandbox | Role::Single);
        let others_live = self
            .containers
            .values()
            .any(|c| (!own(c.role) && c.init.phase() != Phase::Exited) || c.execs.values().any(Process::is_live));
        if others_live {
            return;
        }
        let sandbox = self.containers.iter().find(|(_, c)| own(c.role)).map(|(id, _)| id.clone());
        if let Some(id) = sandbox {
            self.publish_exit(&ProcessId::init(&id), exit);
        }
    }
}

/// The end of a console's text on one line, for a log line.
fn last_lines(console: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<&str> = console.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_told_by_its_last_lines_on_one() {
        let console = (0..40).map(|i| format!("line {i}\r\n\n")).collect::<Vec<_>>().concat();
        let told = last_lines(&console);
        assert!(told.ends_with("line 38 | line 39") && !told.contains("line 27 "));
        assert_eq!(last_lines(""), "");
    }
}
