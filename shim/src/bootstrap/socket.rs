//! The socket of a sandbox's server: where it is, whose it is.
//!
//! `start` binds it and hands it to the server, so it answers (from the kernel's backlog) before the server has come up,
//! and whoever loses the race for it finds it answering.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use sha2::{Digest, Sha256};

/// Where containerd's shims have their sockets, unless containerd says otherwise.
const DEFAULT_DIR: &str = "/run/containerd/s";

/// `sun_path` of unix(7), less the final zero; a few bytes are spared as containerd does.
const MAX_PATH_BYTES: usize = 106;

/// The lock is held for as long as a bind takes.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Path of the socket of a sandbox: the same for the same containerd, namespace and sandbox.
pub fn path(dir: Option<&str>, grpc_address: &str, namespace: &str, sandbox_id: &str) -> anyhow::Result<PathBuf> {
    let digest = Sha256::digest(format!("{grpc_address}/{namespace}/{sandbox_id}"));
    let hex = |nibble: u8| char::from_digit(u32::from(nibble), 16);
    let name: String = digest.iter().flat_map(|byte| [hex(byte >> 4), hex(byte & 0xf)]).flatten().collect();
    let path = Path::new(dir.unwrap_or(DEFAULT_DIR)).join(name);
    if !path.is_absolute() || path.as_os_str().len() > MAX_PATH_BYTES {
        bail!("socket path {} is not absolute or longer than {MAX_PATH_BYTES} bytes", path.display());
    }
    Ok(path)
}

/// Outcome of [`claim`].
#[derive(Debug)]
pub enum Claim {
    /// Bound and listening; only root may connect.
    Ours(UnixListener),
    /// A living server answers.
    Taken,
}

/// Binds the socket at `path`, unless a server answers there already. A socket that nobody serves is replaced.
///
/// Its mode is 0600; the caller's umask should say as much, for the moment between.
pub fn claim(path: &Path) -> anyhow::Result<Claim> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("make socket directory {}", dir.display()))?;
    // Without the lock, of two that find a dead socket the slower would remove what the faster has just bound.
    let _lock = lock(dir)?;
    for _ in 0..2 {
        match UnixListener::bind(path) {
            Ok(listener) => {
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))
                    .with_context(|| format!("set the mode of socket {}", path.display()))?;
                return Ok(Claim::Ours(listener));
            }
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).with_context(|| format!("bind socket {}", path.display())),
        }
        if answers(path)? {
            return Ok(Claim::Taken);
        }
        remove(path)?;
    }
    bail!("bind socket {}: it is bound again and again, and nobody answers", path.display())
}

/// Removes the socket at `path`, which need not exist; anything but a socket is refused.
pub fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => bail!("{} is not a socket", path.display()),
        Ok(_) | Err(_) => {}
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove socket {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Whether a server listens at `path`. Does not block: a full backlog counts as an answer.
pub fn answers(path: &Path) -> anyhow::Result<bool> {
    let context = || format!("connect to socket {}", path.display());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).with_context(context)?;
    let address = SocketAddrUnix::new(path).with_context(context)?;
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(false),
        Err(errno) => Err(io::Error::from(errno)).with_context(context),
    }
}

fn lock(dir: &Path) -> anyhow::Result<impl AsFd> {
    let context = || format!("lock socket directory {}", dir.display());
    let file = fs::File::open(dir).with_context(context)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                #[expect(clippy::disallowed_methods, reason = "flock(2) that waits has no deadline")]
                thread::sleep(Duration::from_millis(2));
            }
            Err(errno) => return Err(io::Error::from(errno)).with_context(context),
        }
    }
}

/// Leaves a socket at `path` that nobody serves.
///
/// It never listened: a child that another test is starting has a copy of every listener, also of one that was dropped,
/// and so answers for it until it executes its program.
#[cfg(test)]
pub(crate) fn bind_dead(path: &Path) {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("opens");
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).expect("fits")).expect("binds");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_depends_on_everything_that_tells_sandboxes_apart() {
        let base = path(None, "/run/c.sock", "ns", "a").expect("is a path");
        assert!(base.starts_with("/run/containerd/s"));
        assert_eq!(base.file_name().map(std::ffi::OsStr::len), Some(64));
        for other in [
            path(None, "/run/d.sock", "ns", "a"),
            path(None, "/run/c.sock", "other", "a"),
            path(None, "/run/c.sock", "ns", "b"),
            path(Some("/run/s"), "/run/c.sock", "ns", "a"),
        ] {
            assert_ne!(other.expect("is a path"), base);
        }
        assert_eq!(path(None, "/run/c.sock", "ns", "a").expect("is a path"), base);
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let long = format!("/{}", "x".repeat(60));
        assert!(path(Some(&long), "", "ns", "a").is_err());
        assert!(path(Some("relative"), "", "ns", "a").is_err());
    }

    #[test]
    fn a_socket_is_claimed_once_while_it_is_served_and_again_after() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("deeper/sock");
        let first = claim(&path).expect("claims");
        assert!(matches!(first, Claim::Ours(_)));
        assert!(answers(&path).expect("asks"));
        assert!(matches!(claim(&path).expect("claims"), Claim::Taken));
        drop(first);
        // A child that another test is starting has a copy of the listener until it executes its program.
        let deadline = Instant::now() + Duration::from_secs(10);
        while answers(&path).expect("asks") {
            assert!(Instant::now() < deadline, "the file is still there, the server is not");
            thread::yield_now();
        }
        assert!(matches!(claim(&path).expect("claims"), Claim::Ours(_)));
    }

    #[test]
    fn of_many_that_claim_a_dead_socket_at_once_one_wins() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("sock");
        bind_dead(&path);
        let barrier = std::sync::Barrier::new(8);
        let claims: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        claim(&path).expect("claims")
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("does not panic")).collect()
        });
        assert_eq!(claims.iter().filter(|claim| matches!(claim, Claim::Ours(_))).count(), 1);
    }

    #[test]
    fn a_full_backlog_counts_as_an_answer() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("sock");
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("opens");
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("fits")).expect("binds");
        rustix::net::listen(&listener, 0).expect("listens");
        for _ in 0..4 {
            assert!(answers(&path).expect("asks"));
        }
    }

    #[test]
    fn only_sockets_are_removed() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("file");
        remove(&path).expect("nothing is fine");
        fs::write(&path, "x").expect("writes");
        assert!(remove(&path).is_err());
        assert!(claim(&path).is_err());
        assert!(path.exists());
    }
}
