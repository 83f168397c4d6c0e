//! One connection of the guest's: a Unix socket on the host's side, credit in both directions.
//!
//! Credit (virtio 1.3, 5.10.6.3): each side tells how large its receive buffer is (`buf_alloc`) and how much it has taken out
//! (`fwd_cnt`); the other never has more in flight than fits. What the host's reader does not take at once waits here, so a
//! guest that keeps to its credit never holds more than [`BUFFER`] bytes of ours, and one that does not is cut off.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use crate::packet::{HOST_CID, Header, STREAM, op, shutdown};

/// Receive buffer of a connection in bytes, as it is told to the guest.
pub const BUFFER: u32 = 1024 * 1024;

/// A connection is named by its ports: `(guest's, host's)`.
pub type Ports = (u32, u32);

/// What became of bytes from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The connection goes on.
    Kept,
    /// It is over: the guest is to be told by a reset.
    Broken,
}

/// What the host's side yields for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Yield {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing ever again.
    End,
    /// The socket failed.
    Broken,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    guest_cid: u64,
    ports: Ports,
    /// Bytes from the guest that the host's reader has not taken yet.
    waiting: VecDeque<u8>,
    /// Bytes from the guest that were passed on, modulo 2^32.
    passed_on: u32,
    /// `passed_on` as the guest knows it.
    told: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// The guest sends no more: the socket's writing side is shut down once `waiting` is empty.
    guest_sends_no_more: bool,
    /// The guest takes no more, or the host's side has ended.
    host_is_done: bool,
    /// The socket may yield bytes: cleared when it would block.
    pub readable: bool,
    /// The connection is in the device's list of those to be served.
    pub listed: bool,
}

impl Connection {
    /// A connection that `request` asked for and that `stream` (non-blocking) leads on.
    pub fn new(stream: UnixStream, request: &Header) -> Self {
        Self {
            stream,
            guest_cid: request.src_cid,
            ports: (request.src_port, request.dst_port),
            waiting: VecDeque::new(),
            passed_on: 0,
            told: 0,
            sent: 0,
            peer_buf_alloc: request.buf_alloc,
            peer_fwd_cnt: request.fwd_cnt,
            guest_sends_no_more: false,
            host_is_done: false,
            readable: false,
            listed: false,
        }
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// A packet to the guest; it carries our credit, which counts as told.
    pub fn header(&mut self, op: u16, len: u32, flags: u32) -> Header {
        self.told = self.passed_on;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.1,
            dst_port: self.ports.0,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.passed_on,
        }
    }

    /// Takes the credit that every packet of the guest's carries.
    pub fn learn_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
    }

    /// How many bytes the guest has room for.
    pub fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// The guest wants bytes and the socket may have some.
    pub fn may_yield(&self) -> bool {
        self.readable && !self.host_is_done && self.credit() > 0
    }

    /// The guest has used up enough of its credit that it should hear of what was passed on since: often enough that it never
    /// runs dry, seldom enough that it costs nothing.
    ///
    /// Newer kernels of guests send no more ahead than they would hold themselves, however much we do.
    pub fn owes_update(&self) -> bool {
        self.passed_on.wrapping_sub(self.told) >= BUFFER.min(self.peer_buf_alloc).div_ceil(2)
    }

    /// Passes `bytes` of the guest's on, or keeps what the host's reader does not take yet.
    pub fn accept(&mut self, bytes: &[u8]) -> Fate {
        if self.guest_sends_no_more || self.waiting.len() + bytes.len() > BUFFER as usize {
            return Fate::Broken;
        }
        let mut rest = bytes;
        if self.waiting.is_empty() {
            match write(&self.stream, rest) {
                Ok(count) => {
                    self.passed_on = self.passed_on.wrapping_add(count as u32);
                    rest = &rest[count..];
                }
                Err(_) => return Fate::Broken,
            }
        }
        self.waiting.extend(rest);
        Fate::Kept
    }

    /// Passes on what waits, as far as the host's reader takes it.
    pub fn flush(&mut self) -> Fate {
        while !self.waiting.is_empty() {
            let (first, _) = self.waiting.as_slices();
            match write(&self.stream, first) {
                Ok(0) => return Fate::Kept,
                Ok(count) => {
                    self.waiting.drain(..count);
                    self.passed_on = self.passed_on.wrapping_add(count as u32);
                }
                Err(_) => return Fate::Broken,
            }
        }
        // A burst is over: an idle connection keeps nothing.
        self.waiting = VecDeque::new();
        if self.guest_sends_no_more {
            // The peer may be gone already, which is no news.
            drop(self.stream.shutdown(Shutdown::Write));
        }
        Fate::Kept
    }

    /// The guest said what it will no longer do. [`Fate::Broken`]: nothing is left to do, and a reset ends it.
    pub fn shut_down(&mut self, flags: u32) -> Fate {
        self.host_is_done |= flags & shutdown::RECEIVE != 0;
        self.guest_sends_no_more |= flags & shutdown::SEND != 0;
        let fate = self.flush();
        if self.is_over() { Fate::Broken } else { fate }
    }

    /// Both directions have ended and nothing waits.
    pub fn is_over(&self) -> bool {
        self.guest_sends_no_more && self.host_is_done && self.waiting.is_empty()
    }

    /// Reads at most `buffer` bytes and the guest's credit from the socket.
    pub fn read(&mut self, buffer: &mut [u8]) -> Yield {
        let most = buffer.len().min(self.credit());
        loop {
            return match (&self.stream).read(&mut buffer[..most]) {
                Ok(0) => {
                    self.host_is_done = true;
                    Yield::End
                }
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    Yield::Bytes(count)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Yield::Nothing
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => Yield::Broken,
            };
        }
    }

    /// The packet that tells the guest that the host sends no more.
    pub fn end(&mut self) -> Header {
        self.header(op::SHUTDOWN, 0, shutdown::SEND)
    }
}

/// Writes what the socket takes; 0 if it would block.
fn write(mut stream: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    loop {
        match stream.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Header = Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: 77,
        dst_port: 1024,
        len: 0,
        kind: STREAM,
        op: op::REQUEST,
        flags: 0,
        buf_alloc: 10,
        fwd_cnt: 0,
    };

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("non-blocking");
        (Connection::new(ours, &REQUEST), theirs)
    }

    #[test]
    fn the_guest_never_gets_more_than_it_has_room_for() {
        let (mut connection, mut host) = pair();
        connection.readable = true;
        host.write_all(&[7; 64]).expect("writes");
        let mut buffer = [0; 64];
        assert_eq!(connection.read(&mut buffer), Yield::Bytes(10));
        assert_eq!(connection.credit(), 0);
        assert!(!connection.may_yield());
        connection.learn_credit(&Header { fwd_cnt: 4, ..REQUEST });
        assert_eq!(connection.read(&mut buffer), Yield::Bytes(4));
    }

    #[test]
    fn a_guest_that_shrinks_its_buffer_below_what_is_in_flight_has_no_credit() {
        let (mut connection, mut host) = pair();
        host.write_all(&[7; 8]).expect("writes");
        assert_eq!(connection.read(&mut [0; 8]), Yield::Bytes(8));
        connection.learn_credit(&Header { buf_alloc: 3, ..REQUEST });
        assert_eq!(connection.credit(), 0);
    }

    #[test]
    fn what_the_reader_does_not_take_waits_and_is_whole() {
        let (mut connection, mut host) = pair();
        let bytes: Vec<u8> = (0..=255).cycle().take(BUFFER as usize).collect();
        let (mut accepted, mut taken) = (0, Vec::new());
        for chunk in bytes.chunks(60_000) {
            assert_eq!(connection.accept(chunk), Fate::Kept);
            accepted += chunk.len();
        }
        host.set_nonblocking(true).expect("non-blocking");
        while taken.len() < accepted {
            let mut buffer = vec![0; 50_000];
            match host.read(&mut buffer) {
                Ok(count) => taken.extend_from_slice(&buffer[..count]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            assert_eq!(connection.flush(), Fate::Kept);
        }
        assert_eq!(taken, bytes);
        assert!(connection.owes_update());
        assert_eq!(connection.header(op::CREDIT_UPDATE, 0, 0).fwd_cnt, BUFFER);
        assert!(!connection.owes_update());
    }

    #[test]
    fn a_guest_that_would_hold_little_itself_hears_sooner() {
        let (mut connection, _host) = pair();
        // The most that such a guest sends before it hears of what was passed on.
        let least = BUFFER / 8;
        connection.learn_credit(&Header { buf_alloc: least, ..REQUEST });
        assert_eq!(connection.accept(&vec![0; least as usize]), Fate::Kept);
        assert!(connection.owes_update());
    }

    #[test]
    fn a_guest_that_ignores_its_credit_is_cut_off() {
        let (mut connection, _host) = pair();
        let chunk = vec![0; 64 * 1024];
        // The socket itself takes some, so more than the buffer is sent before anything is refused.
        let refused = (0..64).any(|_| connection.accept(&chunk) == Fate::Broken);
        assert!(refused);
        assert!(connection.waiting.len() <= BUFFER as usize);
    }

    #[test]
    fn a_half_close_of_the_guests_reaches_the_host_and_leaves_the_way_back_open() {
        let (mut connection, mut host) = pair();
        assert_eq!(connection.accept(b"question"), Fate::Kept);
        assert_eq!(connection.shut_down(shutdown::SEND), Fate::Kept);
        let mut said = String::new();
        host.read_to_string(&mut said).expect("ends");
        assert_eq!(said, "question");
        host.write_all(b"answer").expect("writes");
        assert_eq!(connection.read(&mut [0; 64]), Yield::Bytes(6));
        drop(host);
        connection.learn_credit(&Header { fwd_cnt: 6, ..REQUEST });
        assert_eq!(connection.read(&mut [0; 64]), Yield::End);
        assert!(connection.is_over());
    }

    #[test]
    fn a_close_waits_for_what_the_host_has_not_taken() {
        let (mut connection, mut host) = pair();
        let chunk = vec![1; 60_000];
        while connection.waiting.is_empty() {
            assert_eq!(connection.accept(&chunk), Fate::Kept);
        }
        assert_eq!(connection.shut_down(shutdown::BOTH), Fate::Kept);
        assert!(!connection.is_over());
        host.set_nonblocking(true).expect("non-blocking");
        while !connection.is_over() {
            let _taken = host.read(&mut vec![0; 60_000]);
            assert_eq!(connection.flush(), Fate::Kept);
        }
    }

    #[test]
    fn a_reader_that_is_gone_breaks_the_connection() {
        let (mut connection, host) = pair();
        drop(host);
        assert_eq!(connection.accept(b"x"), Fate::Broken);
    }
}
