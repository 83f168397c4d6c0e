//! Kills of the kernel's out-of-memory killer in one container, by its cgroup's `memory.events`.
//!
//! The kernel wakes whoever polls the file at each change. [`Watch::check`] is also called when the init has exited, so
//! that an OOM event comes before the exit it caused.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cgroup::read_at_start;
use crate::error::{During, Result};
use crate::{metrics, sys};

/// Counts kills in a cgroup.
pub struct Watch {
    file: AsyncFd<OwnedFd>,
    seen: Mutex<u64>,
}

impl Watch {
    /// Watches the cgroup at `directory`.
    pub fn new(directory: &Path) -> Result<Self> {
        let file = File::open(directory.join("memory.events")).during(|| "open memory.events")?;
        let file = sys::watch(file.into(), Interest::PRIORITY).during(|| "watch memory.events")?;
        Ok(Self { file, seen: Mutex::new(0) })
    }

    /// Kills since the last call.
    pub fn check(&self) -> u64 {
        let Ok(text) = read_at_start(self.file.get_ref()) else { return 0 };
        let total = metrics::keys(&text).get("oom_kill").copied().unwrap_or(0);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let new = total.saturating_sub(*seen);
        *seen = total;
        new
    }

    /// Waits for kills and returns how many. Cancel safe.
    pub async fn next(&self) -> Result<u64> {
        loop {
            let mut ready = self.file.ready(Interest::PRIORITY).await.during(|| "wait for memory.events")?;
            ready.clear_ready();
            let new = self.check();
            if new > 0 {
                return Ok(new);
            }
        }
    }
}
