//! The sandbox's journal as the boot's concurrent steps write it: one at a time, and never on a worker of the runtime.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;

use crate::error::{Error, Result};
use crate::process::Child;
use crate::sandbox::boot::SandboxIdentity;
use crate::store::{Entry, Journal, ProcessId, State};

/// Clones write the same journal.
#[derive(Debug, Clone)]
pub struct Ledger {
    journal: Arc<Mutex<Journal>>,
}

impl Ledger {
    /// Begins the journal of a new sandbox. Blocks.
    pub fn begin(identity: &SandboxIdentity) -> Result<Self> {
        let state = State::new(&identity.sandbox_id, &identity.namespace, &identity.bundle, None)?;
        let journal = Journal::create(&identity.directory, state)?;
        Ok(Self { journal: Arc::new(Mutex::new(journal)) })
    }

    /// Writes down what is about to be made. Blocks.
    pub fn record_blocking(&self, entries: Vec<Entry>) -> Result<()> {
        // An entry is appended whole or not at all, whatever panicked elsewhere.
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(journal.record_all(entries)?)
    }

    /// Writes down what is about to be made.
    pub async fn record(&self, entries: Vec<Entry>) -> Result<()> {
        let ledger = self.clone();
        let written = tokio::task::spawn_blocking(move || ledger.record_blocking(entries)).await;
        written.map_err(|error| Error::internal(format!("write the journal: {error}")))?
    }

    /// Writes a child down, as soon as it has a pid.
    pub async fn record_child(&self, child: &Child) -> Result<()> {
        let id = ProcessId { pid: child.pid(), start_time: child.start_time() };
        self.record(vec![Entry::Process { role: child.role().to_owned(), id }]).await
    }

    /// Removes the sandbox's directory, with the journal: nothing of the sandbox is left.
    pub async fn close(self) -> anyhow::Result<()> {
        tokio::task::spawn_blocking(move || {
            let journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
            match std::fs::remove_dir_all(journal.dir()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("remove {}", journal.dir().display()))
                }
                _ => Ok(()),
            }
        })
        .await
        .context("remove the sandbox's directory")?
    }
}
