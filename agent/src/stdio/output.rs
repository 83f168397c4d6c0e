//! One output of a process on its way to the host.
//!
//! What a pipe holds is announced as a frame, and the kernel then moves it (splice(2)): one copy instead of two, and copies
//! are most of what a stream costs on an emulated processor. What [`Output::settle`] has taken out of the pipe goes first,
//! and may well fill a frame that was announced before.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_proto::wire::{END, FRAME_HEADER, Kind, MAX_FRAME, Token, frame_header};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use tokio::io::unix::AsyncFd;
use tokio::task::coop;
use tokio_util::sync::CancellationToken;

use super::channel::Channel;
use crate::link::Host;

/// What [`Output::settle`] takes at most: a pipe's capacity, however fast a background child writes on.
const SETTLED_AT_MOST: usize = super::PIPE_BYTES;
/// How long a finished sender waits for the receiver to close.
const LINGER: Duration = Duration::from_secs(30);
/// So much is taken at once where bytes go through memory of ours.
const CHUNK: usize = 16 * 1024;

/// One output of a process: what it wrote, minus what was sent.
pub struct Output {
    fd: Arc<AsyncFd<OwnedFd>>,
    /// Else a pty.
    is_pipe: bool,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    /// What was taken out and not sent.
    chunks: VecDeque<Vec<u8>>,
    /// All that was taken out, sent or not.
    total: u64,
}

/// What a non-blocking look at an output yields.
enum Look {
    Bytes(usize),
    Nothing,
    End,
}

/// What became of a try to fill a frame from the pipe.
enum Spliced {
    Bytes(usize),
    /// The connection has no room.
    Full,
    /// The pipe has no byte, or what was announced has been settled meanwhile.
    Empty,
}

impl Output {
    /// An output that is read from `fd`, which does not block: a pipe, or else the master of a pty.
    pub fn new(fd: Arc<AsyncFd<OwnedFd>>, is_pipe: bool) -> Self {
        Self { fd, is_pipe, pending: Mutex::default() }
    }

    /// Reads until the source would block, keeps that for the pump, and returns how much the process has written in all.
    pub fn settle(&self) -> u64 {
        let mut pending = self.pending();
        let mut settled = 0;
        while settled < SETTLED_AT_MOST {
            let Look::Bytes(count) = self.look(&mut pending) else { break };
            settled += count;
        }
        pending.total
    }

    /// Sends everything until the end of the output, or until abandoned and nothing settled is left.
    pub async fn pump(&self, host: &Host, token: Token, abandon: &CancellationToken) -> io::Result<()> {
        let channel = Channel::new(host.dial(Kind::Stream, token).await?)?;
        if self.is_pipe {
            channel.widen(super::PIPE_BYTES)?;
        }
        loop {
            let frame = tokio::select! {
                biased;
                () = abandon.cancelled() => self.pending().settled(),
                some = self.some() => some?,
            };
            if frame == 0 {
                break;
            }
            coop::consume_budget().await;
            // A short frame is one write.
            let mut first = frame_header(frame).to_vec();
            first.append(&mut self.pending().take(frame));
            channel.send(&first).await?;
            self.fill(&channel, frame + FRAME_HEADER - first.len()).await?;
        }
        channel.send(&END).await?;
        // The receiver closes when it has everything; a connection closed earlier could take bytes with it.
        match tokio::time::timeout(LINGER, channel.receive(&mut [0; 1])).await {
            Ok(_closed) => Ok(()),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the host did not close the stream")),
        }
    }

    /// Takes everything until the end and drops it: a process must not block on a stream that nobody takes.
    pub async fn discard(&self) {
        while self.some().await.is_ok_and(|count| count > 0) {
            coop::consume_budget().await;
            let mut pending = self.pending();
            self.look(&mut pending);
            pending.chunks.clear();
        }
    }

    /// Waits until there is something and returns how much, at most a frame; 0 is the end. Cancel safe.
    async fn some(&self) -> io::Result<usize> {
        loop {
            if let Some(count) = self.glance() {
                return Ok(count);
            }
            self.fd.readable().await?.clear_ready();
        }
    }

    /// What [`some`](Self::some) returns, without waiting; None: nothing yet.
    fn glance(&self) -> Option<usize> {
        let mut pending = self.pending();
        if pending.chunks.is_empty() {
            // For less, two copies are cheaper than a packet for the header. An end and a pty have no count.
            if let (true, Ok(held)) = (self.is_pipe, rustix::io::ioctl_fionread(self.fd.get_ref()))
                && held as usize > CHUNK
            {
                return Some(MAX_FRAME.min(held as usize));
            }
            match self.look(&mut pending) {
                Look::Bytes(_) => {}
                Look::Nothing => return None,
                Look::End => return Some(0),
            }
        }
        Some(pending.settled())
    }

    /// Sends `left` bytes, which have been announced.
    async fn fill(&self, channel: &Channel, mut left: usize) -> io::Result<()> {
        while left > 0 {
            let chunk = self.pending().take(left);
            if !chunk.is_empty() {
                channel.send(&chunk).await?;
                left -= chunk.len();
                continue;
            }
            match self.splice(channel, left)? {
                Spliced::Bytes(count) => left -= count,
                Spliced::Full => channel.writable().await?,
                Spliced::Empty if self.some().await? > 0 => {}
                Spliced::Empty => return Err(io::Error::other("a process of the guest's took bytes out of an output")),
            }
        }
        Ok(())
    }

    /// Has the kernel move at most `most` bytes from the pipe to the connection.
    fn splice(&self, channel: &Channel, most: usize) -> io::Result<Spliced> {
        let mut pending = self.pending();
        while pending.chunks.is_empty() {
            match rustix::pipe::splice(self.fd.get_ref(), None, channel.fd(), None, most, SpliceFlags::NONBLOCK) {
                Ok(0) => return Ok(Spliced::Empty),
                Ok(count) => {
                    pending.total += count as u64;
                    return Ok(Spliced::Bytes(count));
                }
                Err(Errno::AGAIN) if !channel.is(PollFlags::OUT)? => return Ok(Spliced::Full),
                Err(Errno::AGAIN) if rustix::io::ioctl_fionread(self.fd.get_ref())? == 0 => return Ok(Spliced::Empty),
                // What was in the way is gone.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Spliced::Empty)
    }

    /// Reads once, without waiting, and keeps what comes.
    fn look(&self, pending: &mut Pending) -> Look {
        let mut chunk = vec![0; CHUNK];
        loop {
            return match rustix::io::read(self.fd.get_ref(), &mut chunk) {
                // A pty whose last slave has closed yields EIO.
                Ok(0) | Err(Errno::IO) => Look::End,
                Ok(count) => {
                    chunk.truncate(count);
                    pending.chunks.push_back(chunk);
                    pending.total += count as u64;
                    Look::Bytes(count)
                }
                Err(Errno::AGAIN) => Look::Nothing,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    tracing::warn!(%error, "reading a stream failed");
                    Look::End
                }
            };
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    /// How much was taken out and not sent, at most a frame.
    fn settled(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum::<usize>().min(MAX_FRAME)
    }

    /// Moves at most `most` bytes out of the oldest chunk; empty when there is none.
    fn take(&mut self, most: usize) -> Vec<u8> {
        let Some(mut chunk) = self.chunks.pop_front() else { return Vec::new() };
        if chunk.len() > most {
            self.chunks.push_front(chunk.split_off(most));
        }
        chunk
    }
}
