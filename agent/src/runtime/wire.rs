//! How PID 1 and a worker talk: one length-prefixed request with its descriptors, then lines of JSON until the end.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::{Line, Request};

/// Descriptors that travel at once.
const MAX_FDS: usize = 4;
/// Longest request: a spec of containerd's is below 100 KiB, the kernel takes arguments of 2 MiB.
const MAX_REQUEST: usize = 16 << 20;

/// Sends `bytes` with `fds` attached to the first of them.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let sent = sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    let mut rest = &bytes[sent..];
    while !rest.is_empty() {
        let count = rustix::net::send(&socket, rest, SendFlags::NOSIGNAL)?;
        rest = &rest[count..];
    }
    Ok(())
}

/// Receives once; descriptors are appended to `fds`.
pub fn receive(socket: impl AsFd, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(message.bytes)
}

/// PID 1's side: sends a request.
pub fn send_request(socket: &UnixStream, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let body = serde_json::to_vec(request)?;
    let mut bytes = Vec::with_capacity(body.len() + 4);
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(body);
    send(socket, &bytes, fds)
}

/// The worker's side: receives the request.
pub fn receive_request(socket: &UnixStream) -> io::Result<(Request, Vec<OwnedFd>)> {
    let mut fds = Vec::new();
    let mut length = [0; 4];
    let first = receive(socket, &mut length, &mut fds)?;
    (&mut &*socket).read_exact(&mut length[first..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_REQUEST {
        return Err(io::Error::other(format!("request of {length} bytes, at most {MAX_REQUEST} are accepted")));
    }
    let mut body = vec![0; length];
    (&mut &*socket).read_exact(&mut body)?;
    Ok((serde_json::from_slice(&body)?, fds))
}

/// The worker's side: tells a line.
pub fn send_line(socket: &UnixStream, line: &Line, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    if fds.is_empty() {
        return (&mut &*socket).write_all(&bytes);
    }
    send(socket, &bytes, fds)
}

/// PID 1's side: calls `take` with each line until it returns false or the worker and its process have let go.
pub fn receive_lines(
    socket: &UnixStream,
    fds: &mut Vec<OwnedFd>,
    mut take: impl FnMut(Line) -> bool,
) -> io::Result<()> {
    let mut pending = Vec::new();
    let mut chunk = vec![0; 4096];
    loop {
        let count = receive(socket, &mut chunk, fds)?;
        if count == 0 {
            return Ok(());
        }
        pending.extend_from_slice(&chunk[..count]);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if !take(serde_json::from_slice(&line)?) {
                return Ok(());
            }
        }
    }
}
