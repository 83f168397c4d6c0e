//! The life of a sandbox, as a pure table.
//!
//! ```text
//! Planned --boot--> Booting --booted--> Ready --stop--> Stopping --torn down--> Stopped
//!                      |                                   ^
//!                      |---------------stop----------------'     (a kill does not wait for a boot)
//!                      '--boot failed--> Stopped
//! ```
//!
//! The data of each state lives in the driver's `Stage`; this is only what may follow what.

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The shim serves, nothing was created yet.
    Planned,
    /// The VM is on its way up.
    Booting,
    /// Containers can be made.
    Ready,
    /// The VM is being ended, or has died, and its traces are being removed.
    Stopping,
    /// Nothing of the pod is left on the host but the shim.
    Stopped,
}

/// What can happen to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The first Create came.
    Boot,
    /// The guest is a pod.
    Booted,
    /// The boot failed; what it had made is gone again.
    BootFailed,
    /// A kill, the end of a single container, or the death of the VM or of a helper.
    Stop,
    /// Processes, links, cgroups and files are gone.
    TornDown,
}

impl State {
    /// The next state, or None where `step` is not possible.
    pub fn after(self, step: Step) -> Option<Self> {
        match (self, step) {
            (Self::Planned, Step::Boot) => Some(Self::Booting),
            (Self::Booting, Step::Booted) => Some(Self::Ready),
            (Self::Booting, Step::BootFailed) => Some(Self::Stopped),
            (Self::Booting | Self::Ready, Step::Stop) => Some(Self::Stopping),
            (Self::Stopping, Step::TornDown) => Some(Self::Stopped),
            _ => None,
        }
    }

    /// As error messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Planned => "not created yet",
            Self::Booting => "booting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 5] = [State::Planned, State::Booting, State::Ready, State::Stopping, State::Stopped];
    const STEPS: [Step; 5] = [Step::Boot, Step::Booted, Step::BootFailed, Step::Stop, Step::TornDown];

    #[test]
    fn the_whole_table_is_as_drawn() {
        let allowed = [
            (State::Planned, Step::Boot, State::Booting),
            (State::Booting, Step::Booted, State::Ready),
            (State::Booting, Step::BootFailed, State::Stopped),
            (State::Booting, Step::Stop, State::Stopping),
            (State::Ready, Step::Stop, State::Stopping),
            (State::Stopping, Step::TornDown, State::Stopped),
        ];
        for state in STATES {
            for step in STEPS {
                let expected = allowed.iter().find(|(from, by, _)| (*from, *by) == (state, step)).map(|(_, _, to)| *to);
                assert_eq!(state.after(step), expected, "{state:?} {step:?}");
            }
        }
    }

    #[test]
    fn nothing_leads_out_of_stopped() {
        assert!(STEPS.iter().all(|step| State::Stopped.after(*step).is_none()));
    }
}
