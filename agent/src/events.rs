//! Everything that happens in the guest, in order, kept until the shim has seen it.
//!
//! Numbered events (exits, OOMs) are kept and repeated after a reconnect, until what they tell of is deleted; statistics and
//! heartbeats are not. A statistics sample is delivered before any numbered event that was appended after it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_proto::agent::{Event, Exit, Heartbeat, Oom, Stats, event};
use tokio::sync::Notify;

use crate::clock;

/// Time between heartbeats; the shim is promised one every two seconds.
const HEARTBEAT: Duration = Duration::from_millis(1500);
/// Numbered events kept for a shim that is away: more than one pod produces while a shim reconnects.
const KEPT: usize = 4096;
/// Samples that wait for a slow reader; the oldest goes first.
const SAMPLES: usize = 256;

/// The log; one per agent.
#[derive(Default)]
pub struct Events {
    log: Mutex<Log>,
    changed: Notify,
}

#[derive(Default)]
struct Log {
    last_seq: u64,
    kept: VecDeque<Event>,
    samples: VecDeque<Stats>,
    readers: usize,
}

impl Events {
    /// Appends the exit of a process.
    pub fn exit(&self, exit: Exit) {
        self.append(event::Event::Exit(exit));
    }

    /// Appends an OOM kill in a container.
    pub fn oom(&self, container_id: &str) {
        self.append(event::Event::Oom(Oom { container_id: container_id.to_owned() }));
    }

    /// Hands a sample to the reader; dropped when there is none.
    pub fn stats(&self, sample: Stats) {
        let mut log = self.log();
        if log.readers > 0 {
            if log.samples.len() == SAMPLES {
                log.samples.pop_front();
            }
            log.samples.push_back(sample);
            drop(log);
            self.changed.notify_waiters();
        }
    }

    /// True while somebody reads, so that samples are worth taking.
    pub fn watched(&self) -> bool {
        self.log().readers > 0
    }

    fn append(&self, event: event::Event) {
        let mut log = self.log();
        log.last_seq += 1;
        let seq = log.last_seq;
        if log.kept.len() == KEPT {
            log.kept.pop_front();
            tracing::warn!("event log is full, oldest event dropped");
        }
        log.kept.push_back(Event { seq, event: Some(event) });
        drop(log);
        self.changed.notify_waiters();
    }

    /// Drops what was told of an exec, or of a container and all its execs if `exec_id` is empty.
    ///
    /// Whoever deletes a process has seen its exit, or will not ask for it: without this a pod that is never reconnected
    /// would keep the exit of every exec that it ever had.
    pub fn forget(&self, container_id: &str, exec_id: &str) {
        self.log().kept.retain(|event| match &event.event {
            Some(event::Event::Exit(exit)) => {
                exit.container_id != container_id || !(exec_id.is_empty() || exit.exec_id == exec_id)
            }
            Some(event::Event::Oom(oom)) => oom.container_id != container_id || !exec_id.is_empty(),
            _ => true,
        });
    }

    /// Reads everything after `seq`, then what comes; forgets what was seen.
    pub fn read(self: &Arc<Self>, after_seq: u64) -> Reader {
        let mut log = self.log();
        log.readers += 1;
        while log.kept.front().is_some_and(|event| event.seq <= after_seq) {
            log.kept.pop_front();
        }
        drop(log);
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Reader { events: Arc::clone(self), seq: after_seq, heartbeat }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One subscription; see [`Events::read`].
pub struct Reader {
    events: Arc<Events>,
    seq: u64,
    heartbeat: tokio::time::Interval,
}

impl Reader {
    /// The next event; never ends. Cancel safe.
    pub async fn next(&mut self) -> Event {
        loop {
            let events = Arc::clone(&self.events);
            let changed = events.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that an event between look and wait is not missed.
            changed.as_mut().enable();
            if let Some(event) = self.take() {
                return event;
            }
            tokio::select! {
                () = &mut changed => {}
                _ = self.heartbeat.tick() => {
                    let beat = Heartbeat { uptime_us: clock::uptime_us() };
                    return Event { seq: 0, event: Some(event::Event::Heartbeat(beat)) };
                }
            }
        }
    }

    fn take(&mut self) -> Option<Event> {
        let mut log = self.events.log();
        if let Some(sample) = log.samples.pop_front() {
            return Some(Event { seq: 0, event: Some(event::Event::Stats(sample)) });
        }
        let event = log.kept.iter().find(|event| event.seq > self.seq).cloned()?;
        self.seq = event.seq;
        Some(event)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut log = self.events.log();
        log.readers -= 1;
        if log.readers == 0 {
            log.samples.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { container_id: "c".into(), exit_status: status, ..Exit::default() }
    }

    async fn next_numbered(reader: &mut Reader) -> Event {
        loop {
            let event = reader.next().await;
            if event.seq != 0 {
                return event;
            }
        }
    }

    #[tokio::test]
    async fn events_are_repeated_until_they_were_asked_past() {
        let events = Arc::new(Events::default());
        events.exit(exit(1));
        events.exit(exit(2));
        let mut first = events.read(0);
        assert_eq!(next_numbered(&mut first).await.seq, 1);
        drop(first);
        let mut again = events.read(0);
        assert_eq!(next_numbered(&mut again).await.seq, 1);
        assert_eq!(next_numbered(&mut again).await.seq, 2);
        let mut past = events.read(1);
        assert_eq!(next_numbered(&mut past).await.seq, 2);
        assert_eq!(events.log().kept.len(), 1);
    }

    #[tokio::test]
    async fn events_of_what_was_deleted_are_forgotten_and_the_others_are_not() {
        let events = Arc::new(Events::default());
        for (container_id, exec_id) in [("a", "one"), ("a", "two"), ("b", "one"), ("a", "")] {
            events.exit(Exit { container_id: container_id.into(), exec_id: exec_id.into(), ..Exit::default() });
        }
        events.oom("a");
        let seqs = || events.log().kept.iter().map(|event| event.seq).collect::<Vec<_>>();
        events.forget("a", "one");
        assert_eq!(seqs(), [2, 3, 4, 5]);
        events.forget("a", "");
        assert_eq!(seqs(), [3]);
        assert_eq!(next_numbered(&mut events.read(0)).await.seq, 3);
    }

    #[tokio::test]
    async fn the_last_sample_comes_before_the_exit() {
        let events = Arc::new(Events::default());
        let mut reader = events.read(0);
        events.stats(Stats { container_id: "c".into(), ..Stats::default() });
        events.exit(exit(0));
        let mut seen = Vec::new();
        while seen.len() < 2 {
            match reader.next().await.event {
                Some(event::Event::Stats(_)) => seen.push("stats"),
                Some(event::Event::Exit(_)) => seen.push("exit"),
                _ => {}
            }
        }
        assert_eq!(seen, ["stats", "exit"]);
    }

    #[tokio::test]
    async fn a_heartbeat_comes_when_nothing_else_does() {
        let events = Arc::new(Events::default());
        let mut reader = events.read(0);
        assert!(matches!(reader.next().await.event, Some(event::Event::Heartbeat(_))));
    }
}
