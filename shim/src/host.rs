//! The host thread: the one OS thread that outlives everything else in the shim.
//!
//! Children are spawned from it, because `PR_SET_PDEATHSIG` fires when the *thread* that spawned a child ends, not the
//! process (prctl(2)); and it has a private mount namespace, in which all of a pod's mounts are made, so that they vanish
//! with the last process that uses them and a dead shim leaves none behind.
//!
//! Jobs run one after the other and may block; none may wait for another job.

use std::sync::mpsc;
use std::thread;

use anyhow::Context;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// Handle of the host thread; clones reach the same thread. It ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct HostThread {
    jobs: mpsc::Sender<Job>,
}

impl HostThread {
    /// Starts the thread and runs `prepare` on it first; its error is returned and the thread ends.
    ///
    /// Blocks until `prepare` is done.
    pub fn start(prepare: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, is_ready) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("host".into())
            .spawn(move || {
                let prepared = prepare();
                let go_on = prepared.is_ok();
                // The receiver can only be gone if `start` was, and then there is nobody to serve.
                if ready.send(prepared).is_err() || !go_on {
                    return;
                }
                while let Ok(job) = queue.recv() {
                    job();
                }
            })
            .context("start the host thread")?;
        is_ready.recv().context("the host thread ended while it was prepared")??;
        Ok(Self { jobs })
    }

    /// Runs `job` on the thread and returns what it returns. Cancel safe: the job runs to its end all the same.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move || {
            // A caller that was cancelled does not want the answer.
            drop(reply.send(job()));
        });
        self.jobs.send(job).ok().context("the host thread has ended")?;
        answer.await.context("a job of the host thread panicked")?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn jobs_run_on_one_thread_that_is_not_the_callers() {
        let host = HostThread::start(|| Ok(())).expect("starts");
        let first = host.run(|| Ok(thread::current().id())).await.expect("runs");
        let second = host.run(|| Ok(thread::current().id())).await.expect("runs");
        assert_eq!(first, second);
        assert_ne!(first, thread::current().id());
    }

    #[test]
    fn a_failed_preparation_is_told() {
        let error = HostThread::start(|| anyhow::bail!("no namespace for you")).expect_err("fails");
        assert_eq!(error.to_string(), "no namespace for you");
    }
}
