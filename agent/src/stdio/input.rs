//! The input of a process, as it comes from the host.
//!
//! Into a pipe the kernel moves a frame's bytes itself (splice(2)), which saves one of two copies.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_proto::wire::{FRAME_HEADER, INPUT_AHEAD, Kind, Token, frame_length};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::coop;

use super::channel::{Channel, is};
use crate::link::Host;

/// Bytes for a pty that are received at once.
const CHUNK: usize = 4096;
/// Bytes that are waited for and moved into a pipe at once, if a frame has as many: so the process is woken for a burst, and
/// not for each packet. The kernel takes pages for as many as it is asked for before it looks.
const BURST: usize = 512 * 1024;

// While a burst is passed on, and the reader works on the one before, others are under way.
const _: () = assert!(INPUT_AHEAD == 4 * BURST);

/// The input of one process.
pub struct Input {
    fd: Arc<AsyncFd<OwnedFd>>,
    /// Else a pty.
    is_pipe: bool,
}

impl Input {
    /// An input that is written to `fd`, which does not block: a pipe, or else the master of a pty.
    pub fn new(fd: Arc<AsyncFd<OwnedFd>>, is_pipe: bool) -> Self {
        Self { fd, is_pipe }
    }

    /// Feeds the process until the end frame, or until it takes no more: the host learns that by the connection's end.
    pub async fn pump(&self, host: &Host, token: Token) -> io::Result<()> {
        let channel = Channel::new(host.dial(Kind::Stream, token).await?)?;
        if self.is_pipe {
            channel.widen(INPUT_AHEAD)?;
        }
        loop {
            let Some(frame) = self.header(&channel).await? else { return Ok(()) };
            if frame == 0 {
                return Ok(());
            }
            let fed = if self.is_pipe { self.splice(&channel, frame).await } else { self.copy(&channel, frame).await };
            if !fed? {
                return Ok(());
            }
        }
    }

    /// Length of the next frame, 0 at the end. None: nobody reads any more.
    async fn header(&self, channel: &Channel) -> io::Result<Option<usize>> {
        let mut header = [0; FRAME_HEADER];
        let mut have = 0;
        while have < FRAME_HEADER {
            match self.receive(channel, &mut header[have..]).await? {
                Some(count) => have += count,
                None => return Ok(None),
            }
        }
        frame_length(header).map(Some).map_err(io::Error::other)
    }

    /// Receives some bytes. None: nobody reads any more.
    async fn receive(&self, channel: &Channel, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        tokio::select! {
            received = channel.receive(buffer) => match received? {
                0 => Err(cut_off()),
                count => Ok(Some(count)),
            },
            () = self.closed() => Ok(None),
        }
    }

    /// Has the kernel move `left` bytes from the connection to the pipe. False: nobody reads any more.
    async fn splice(&self, channel: &Channel, mut left: usize) -> io::Result<bool> {
        let mut awaited = 1;
        while left > 0 {
            coop::consume_budget().await;
            let most = left.min(BURST);
            match rustix::pipe::splice(channel.fd(), None, self.fd.get_ref(), None, most, SpliceFlags::NONBLOCK) {
                Ok(0) => return Err(cut_off()),
                Ok(count) => left -= count,
                Err(Errno::PIPE) => return Ok(false),
                Err(Errno::AGAIN) if !is(self.fd.get_ref(), PollFlags::OUT)? => self.fd.writable().await?.clear_ready(),
                Err(Errno::AGAIN) if !channel.is(PollFlags::IN)? => {
                    if awaited != left.min(BURST) {
                        awaited = left.min(BURST);
                        channel.wait_for(awaited)?;
                    }
                    tokio::select! {
                        waited = channel.readable() => waited?,
                        () = self.closed() => return Ok(false),
                    }
                }
                // What was in the way is gone.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if awaited != 1 {
            channel.wait_for(1)?;
        }
        Ok(true)
    }

    /// Moves `left` bytes by hand. False: nobody reads any more.
    async fn copy(&self, channel: &Channel, mut left: usize) -> io::Result<bool> {
        let mut buffer = [0; CHUNK];
        while left > 0 {
            let most = left.min(CHUNK);
            let Some(count) = self.receive(channel, &mut buffer[..most]).await? else { return Ok(false) };
            left -= count;
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                match rustix::io::write(self.fd.get_ref(), rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(Errno::AGAIN) => self.fd.writable().await?.clear_ready(),
                    Err(Errno::INTR) => {}
                    Err(Errno::PIPE | Errno::IO) => return Ok(false),
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(true)
    }

    /// Waits until a pipe has no reader left; for a pty, until its slave side is gone.
    async fn closed(&self) {
        loop {
            let Ok(mut ready) = self.fd.ready(Interest::WRITABLE).await else { return };
            if ready.ready().is_write_closed() {
                return;
            }
            ready.clear_ready();
        }
    }
}

fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the host closed the stream before its end")
}
