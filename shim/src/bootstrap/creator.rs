//! The containerd that had this shim started: a process whose end can be awaited.
//!
//! It follows `start` by Create. If it dies between the two, nobody creates the task any more, and the one that is started in
//! its place may not even know of the shim: 1.6 loads it, finds no task in it, and forgets it.

use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::bail;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::sys;

/// The process that listens at `ttrpc_address`, to be told of its end; `None` if there is no telling. Does not block.
///
/// For `start`, which that process has run this moment: later, another may listen there. Fails if nobody does any more.
pub fn find(ttrpc_address: Option<&str>) -> anyhow::Result<Option<OwnedFd>> {
    let Some(address) = ttrpc_address else { return Ok(None) };
    let path = Path::new(address.strip_prefix("unix://").unwrap_or(address));
    match watch_listener(path) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(Errno::CONNREFUSED | Errno::SRCH) => bail!("containerd at {} has ended", path.display()),
        // A shim that does not notice ends a minute later, by itself.
        Err(_) => Ok(None),
    }
}

fn watch_listener(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    // The credentials of a listening socket are those of the process that made it listen.
    let credentials = getsockopt(&socket, PeerCredentials).map_err(|error| Errno::from_raw_os_error(error as i32))?;
    // One of another PID namespace has no number here.
    pidfd_open(Pid::from_raw(credentials.pid()).ok_or(Errno::NOENT)?, PidfdFlags::NONBLOCK)
}

/// For the server: ends when the process behind `pidfd` has; never if there is none. Cancel safe.
pub async fn gone(pidfd: Option<OwnedFd>) {
    let Some(pidfd) = pidfd else { return pending().await };
    let ended: io::Result<()> = async { sys::watch(pidfd)?.readable().await.map(drop) }.await;
    if let Err(error) = ended {
        tracing::warn!(%error, "containerd's end will not be noticed");
        pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::process::{Command, Stdio};
    use std::time::Duration;
    use tokio::net::UnixStream;

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
        let name = "bootstrap::creator::tests::the_end_of_the_process_that_listens_is_noticed";
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
        let address = format!("unix://{}", path.display());
        let found = find(Some(&address)).expect("answers").expect("is found");
        let gone = gone(Some(found));
        tokio::pin!(gone);
        assert!(tokio::time::timeout(Duration::from_millis(200), &mut gone).await.is_err(), "it lives");
        drop(child.stdin.take());
        child.wait().expect("ends");
        tokio::time::timeout(patience, gone).await.expect("is noticed");
        let said = find(Some(&address)).expect_err("the socket of the dead").to_string();
        assert_eq!(said, format!("containerd at {} has ended", path.display()));
    }

    #[tokio::test]
    async fn where_there_is_no_containerd_none_ends() {
        for address in [None, Some("/no/such/socket")] {
            assert!(find(address).expect("is no error").is_none());
        }
        assert!(tokio::time::timeout(Duration::from_millis(100), gone(None)).await.is_err());
    }
}
