//! `bulkhead-vsock`: serves the vsock device of one VM until QEMU hangs up. The shim runs it; people need not.

use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use anyhow::{Context, bail};
use bulkhead_vsock::device::{SOCKETS, VsockDevice};
use vhost::vhost_user;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

const USAGE: &str = "usage: bulkhead-vsock --guest-cid=N --socket=PATH --uds-path=PATH";

/// The lowest address that a guest may have (vsock(7)).
const FIRST_GUEST_CID: u64 = 3;

struct Arguments {
    guest_cid: u64,
    /// Where QEMU connects.
    socket: PathBuf,
    /// Stem of where the guest's connections lead.
    uds_path: PathBuf,
}

fn parse(words: impl Iterator<Item = String>) -> anyhow::Result<Arguments> {
    let (mut guest_cid, mut socket, mut uds_path) = (None, None, None);
    for word in words {
        let (name, value) = word.split_once('=').with_context(|| format!("argument {word:?}: {USAGE}"))?;
        match name {
            "--guest-cid" => {
                let cid = value.parse().ok().filter(|cid| (FIRST_GUEST_CID..u64::from(u32::MAX)).contains(cid));
                guest_cid = Some(cid.with_context(|| {
                    format!("--guest-cid is {value:?}, accepted are {FIRST_GUEST_CID} to {}", u32::MAX - 1)
                })?);
            }
            "--socket" => socket = Some(value.into()),
            "--uds-path" => uds_path = Some(value.into()),
            _ => bail!("argument {word:?}: {USAGE}"),
        }
    }
    Ok(Arguments {
        guest_cid: guest_cid.context(USAGE)?,
        socket: socket.context(USAGE)?,
        uds_path: uds_path.context(USAGE)?,
    })
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let listener =
        UnixListener::bind(&arguments.socket).with_context(|| format!("listen on {}", arguments.socket.display()))?;
    let device = VsockDevice::new(arguments.guest_cid, arguments.uds_path).context("make the device")?;
    let sockets = device.sockets();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
    let device = Arc::new(Mutex::new(device));
    let mut daemon = VhostUserDaemon::new("vsock".to_owned(), Arc::clone(&device), memory)
        .map_err(|error| anyhow::anyhow!("make the vhost-user back end: {error}"))?;
    for worker in daemon.get_epoll_handlers() {
        worker.register_listener(sockets.as_raw_fd(), EventSet::IN, u64::from(SOCKETS)).context("watch the sockets")?;
    }
    let mut listener = vhost_user::Listener::from(listener);
    daemon.start(&mut listener).map_err(|error| anyhow::anyhow!("wait for QEMU: {error}"))?;
    match daemon.wait() {
        Ok(()) => Ok(()),
        // QEMU has ended, in the middle of a message or not.
        Err(vhost_user_backend::Error::HandleRequest(
            vhost_user::Error::Disconnected | vhost_user::Error::PartialMessage | vhost_user::Error::SocketBroken(_),
        )) => Ok(()),
        Err(error) => bail!("serve QEMU: {error}"),
    }
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-vsock: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(words: &[&str]) -> String {
        match parse(words.iter().map(|word| (*word).to_owned())) {
            Ok(_) => String::new(),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn all_three_arguments_are_needed_and_checked() {
        assert_eq!(refusal(&["--guest-cid=3", "--socket=a", "--uds-path=b"]), "");
        assert_eq!(refusal(&["--guest-cid=3", "--socket=a"]), USAGE);
        assert_eq!(
            refusal(&["--guest-cid=2", "--socket=a", "--uds-path=b"]),
            "--guest-cid is \"2\", accepted are 3 to 4294967294"
        );
        assert!(refusal(&["--queue=3"]).contains("--queue=3"));
    }
}
