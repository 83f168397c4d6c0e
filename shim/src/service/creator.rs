//! The containerd that had this shim started: a process whose end can be awaited.
//!
//! It follows `start` by Create. If it dies between the two, nobody creates the task any more, and the one that is started in
//! its place may not even know of the shim: 1.6 loads it, finds no task in it, and forgets it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

use crate::sys;

/// containerd takes a connection at once.
const CONNECT: Duration = Duration::from_secs(5);

/// Ends when the process has that listens at `ttrpc_address`; never if there is no telling. Cancel safe.
pub async fn gone(ttrpc_address: Option<String>) {
    let Some(address) = ttrpc_address else { return std::future::pending().await };
    let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(&address));
    if let Err(error) = process_ended(path).await {
        tracing::debug!(error = %format_args!("{error:#}"), "containerd's end will not be noticed");
        std::future::pending::<()>().await;
    }
}

async fn process_ended(path: PathBuf) -> anyhow::Result<()> {
    let connection = tokio::time::timeout(CONNECT, UnixStream::connect(&path)).await;
    let connection = connection.context("no answer").and_then(|made| Ok(made?));
    let connection = connection.with_context(|| format!("connect to containerd at {}", path.display()))?;
    // The credentials of a listening socket are those of the process that made it listen.
    let pid = connection.peer_cred().context("ask whose socket it is")?.pid();
    let pid = pid.and_then(Pid::from_raw).context("containerd's process is not visible from here")?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).context("watch containerd's process")?;
    drop(connection);
    let pidfd = sys::watch(pidfd).context("watch containerd's process")?;
    pidfd.readable().await.context("watch containerd's process").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    /// Set for the run of this test that plays containerd: the socket to listen at.
    const LISTEN: &str = "BULKHEAD_TEST_LISTEN";

    #[tokio::test]
    async fn the_end_of_the_process_that_listens_is_noticed() {
        if let Some(path) = std::env::var_os(LISTEN) {
            let _listener = std::os::unix::net::UnixListener::bind(path).expect("listens");
            std::io::stdin().read_to_end(&mut Vec::new()).expect("waits for its end");
            return;
        }
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("socket");
        let name = "service::creator::tests::the_end_of_the_process_that_listens_is_noticed";
        let mut child = Command::new(std::env::current_exe().expect("has a path"))
            .args(["--exact", name])
            .env(LISTEN, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("runs");
        let patience = Duration::from_secs(20);
        let listening = async {
            while UnixStream::connect(&path).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(patience, listening).await.expect("listens");
        let gone = gone(Some(format!("unix://{}", path.display())));
        tokio::pin!(gone);
        assert!(tokio::time::timeout(Duration::from_millis(200), &mut gone).await.is_err(), "it lives");
        drop(child.stdin.take());
        child.wait().expect("ends");
        tokio::time::timeout(patience, gone).await.expect("is noticed");
    }

    #[tokio::test]
    async fn where_there_is_no_containerd_none_ends() {
        for address in [None, Some("/no/such/socket".to_owned())] {
            assert!(tokio::time::timeout(Duration::from_millis(100), gone(address)).await.is_err());
        }
    }
}
