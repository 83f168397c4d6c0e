//! A dialled stream as an open file, for system calls that tokio does not know.
//!
//! Everything is tried before it is waited for, and only what is certainly not there now: readiness is told once, when it comes.
//! splice(2) does not say which of its two files made it stop, so that is asked for ([`is`]); a guess would now and then wait
//! for ever for what had come in between.

use std::io;
use std::os::fd::OwnedFd;

use bulkhead_proto::vsock;
use nix::sys::socket::setsockopt;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_vsock::VsockStream;

use crate::sys;

mod option {
    use nix::{setsockopt_impl, sockopt_impl};

    sockopt_impl!(ReceiveLowWater, SetOnly, libc::SOL_SOCKET, libc::SO_RCVLOWAT, i32);
}

/// One stream's connection to the host.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes over a connection that was dialled.
    pub fn new(stream: VsockStream) -> io::Result<Self> {
        sys::watch(stream.into(), Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// Lets each side send `bytes` ahead, so that pipes are filled and emptied in few turns. It is for sending as well: the
    /// kernel sends no more than it would hold itself.
    pub fn widen(&self, bytes: usize) -> io::Result<()> {
        vsock::set_buffer(self.fd(), bytes as u64)
    }

    /// The connection.
    pub fn fd(&self) -> &OwnedFd {
        self.0.get_ref()
    }

    /// Whether the connection is ready for `wanted` now, or has failed.
    pub fn is(&self, wanted: PollFlags) -> io::Result<bool> {
        is(self.fd(), wanted)
    }

    /// Waits until there may be something to read. Only what was tried in vain may be waited for.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut ready| ready.clear_ready())
    }

    /// Has [`readable`](Self::readable) wait for so many bytes (socket(7)), or for the connection's end; more than the peer can
    /// send ahead never are there.
    pub fn wait_for(&self, bytes: usize) -> io::Result<()> {
        Ok(setsockopt(self.fd(), option::ReceiveLowWater, &(bytes as i32))?)
    }

    /// Waits until there may be room. Only what was tried in vain may be waited for.
    pub async fn writable(&self) -> io::Result<()> {
        self.0.writable().await.map(|mut ready| ready.clear_ready())
    }

    /// Sends all of `bytes`.
    pub async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(self.fd(), bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::AGAIN) => self.writable().await?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives what there is, at most `buffer`; 0 is the end. Cancel safe.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(self.fd(), &mut *buffer) {
                Ok(count) => return Ok(count),
                Err(Errno::AGAIN) => self.readable().await?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether `fd` is ready for `wanted` now, or has failed.
pub fn is(fd: &OwnedFd, wanted: PollFlags) -> io::Result<bool> {
    let mut watched = [PollFd::new(fd, wanted)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::event::poll(&mut watched, Some(&now))? > 0)
}
