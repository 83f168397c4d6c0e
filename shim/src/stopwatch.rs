//! Where the time of a sandbox's boot, a container's removal and the like has gone, for one log line each.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use bulkhead_proto::agent;

/// Stages and how long each took, in the order in which they ended.
#[derive(Debug)]
pub struct Stopwatch {
    begun: Instant,
    last: Instant,
    told: String,
}

impl Stopwatch {
    /// The clock runs from here.
    pub fn start() -> Self {
        let now = Instant::now();
        Self { begun: now, last: now, told: String::new() }
    }

    /// Ends the stage `name`.
    pub fn lap(&mut self, name: &str) {
        let now = Instant::now();
        self.note(name, now - self.last);
        self.last = now;
    }

    /// Notes a duration that was measured elsewhere, inside the current stage.
    pub fn note(&mut self, name: &str, elapsed: Duration) {
        // Writing to a string cannot fail.
        let _ = write!(
            self.told,
            "{}{name}={:.1}ms",
            if self.told.is_empty() { "" } else { " " },
            elapsed.as_secs_f64() * 1e3
        );
    }

    /// Notes what the agent measured, inside the current stage, as `stage.NAME`.
    pub fn note_guest(&mut self, stage: &str, measured: &[agent::Stage]) {
        // The names come from the guest: few, short, plain.
        const MOST: usize = 32;
        for part in measured.iter().take(MOST) {
            self.note(&format!("{stage}.{}", plain(&part.name)), Duration::from_micros(part.elapsed_us));
        }
    }

    /// Time since the start.
    pub fn total(&self) -> Duration {
        self.begun.elapsed()
    }

    /// `name=1.5ms other=0.2ms`.
    pub fn told(&self) -> &str {
        &self.told
    }
}

/// A name of the guest's as it may stand in a log line.
fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_guest_are_few_and_plain() {
        let mut stopwatch = Stopwatch::start();
        let stage = |name: &str| agent::Stage { name: name.into(), elapsed_us: 1500 };
        stopwatch.note_guest("pod", &[stage("net work\n\"="), stage("share")]);
        assert_eq!(stopwatch.told(), "pod.network=1.5ms pod.share=1.5ms");
        let mut stopwatch = Stopwatch::start();
        stopwatch.note_guest("pod", &vec![stage("x"); 1000]);
        assert_eq!(stopwatch.told().split(' ').count(), 32);
    }
}
