//! The thread that carries streams.
//!
//! It is scheduled as a batch job (`SCHED_BATCH`, sched(7)): it does not take the processor from the process that feeds it as
//! soon as a pipe has its first bytes, but when that process has filled the pipe or waits. On a guest with one CPU a burst
//! then costs a turn in place of one for each write. Requests of the host are served by another thread, as promptly as ever.

use std::thread::JoinHandle;

use tokio::runtime::{Builder, EnterGuard, Handle};
use tokio_util::sync::CancellationToken;

use crate::error::{During, Result};
use crate::sys;

/// Runs every stream's task. Dropping it ends them and joins the thread.
#[derive(Debug)]
pub struct Carrier {
    handle: Handle,
    end: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Carrier {
    /// Starts the thread.
    pub fn start() -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().during(|| "start the streams' runtime")?;
        let (handle, end) = (runtime.handle().clone(), CancellationToken::new());
        let ended = end.clone();
        let run = move || {
            if let Err(error) = sys::become_batch() {
                tracing::warn!(%error, "streams are scheduled like anything else");
            }
            runtime.block_on(ended.cancelled());
        };
        let thread =
            std::thread::Builder::new().name("streams".into()).spawn(run).during(|| "start the streams' thread")?;
        Ok(Self { handle, end, thread: Some(thread) })
    }

    /// What is spawned or watched while the guard lives belongs to this thread.
    pub fn enter(&self) -> EnterGuard<'_> {
        self.handle.enter()
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.end.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been told by itself.
            let _ = thread.join();
        }
    }
}
