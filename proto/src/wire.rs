//! The first bytes of every connection between guest and host.
//!
//! The guest dials; the host never does: a dial from the guest is at the same time the sign that it is up, and a device that
//! takes no requests of the host's has less that can go wrong while the guest boots. A connection opens with a [`Preamble`] of [`Preamble::LEN`] bytes from the guest, without an answer:
//!
//! ```text
//! 0      4       5      6      8                24
//! | BLKH | ver=1 | kind | zero | token (16 bytes) |
//! ```
//!
//! - [`Kind::Control`]: HTTP/2 follows. The *agent* is the gRPC server although it dialled. The token is zero on the first
//!   connection of a boot, which comes before any container runs, and the session secret of `Hello` on every later one.
//! - [`Kind::Stream`]: the bytes of one stream of one process, in one direction, in frames. The token is the one that the
//!   shim named in the request; a connection with an unknown token is closed.
//!
//! # Frames
//!
//! A frame is a length (32 bits, little endian, at most [`MAX_FRAME`]) and as many bytes. Length 0 is the end of the stream:
//! the receiver then closes the connection, and the sender waits for that, with a deadline, before it closes. Nobody calls
//! `shutdown(2)`. A connection that ends without the end frame has lost bytes. A sender may announce a frame before it has read
//! all of it, so that the kernel can move the bytes.
//!
//! A forwarded TCP connection is two streams, one each way ([`crate::bridge`]). There a stream can also end by [`RESET`].
//!
//! Why not plain bytes and a half-close: not every vsock device passes a half-close on (`vhost-device-vsock` 0.3 does not), a
//! connection that breaks must not look like one that ended, and Linux drops what a socket still holds when its peer closes
//! first. Framed, a stream is whole whatever lies between.

/// What follows a [`Preamble`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The agent's gRPC server.
    Control = 0,
    /// Raw bytes of one stream.
    Stream = 1,
}

/// Names a stream, or proves a control connection to be the agent's.
pub type Token = [u8; 16];

/// The opening of a connection; see the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What follows.
    pub kind: Kind,
    /// Stream token or session secret.
    pub token: Token,
}

/// Why the first bytes of a connection are not a [`Preamble`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// The magic number is another.
    #[error("connection does not open with the magic bytes BLKH")]
    Magic,
    /// A version this side does not know.
    #[error("connection preamble has version {0}, expected 1")]
    Version(u8),
    /// A kind this side does not know.
    #[error("connection preamble has kind {0}, expected 0 (control) or 1 (stream)")]
    Kind(u8),
    /// The reserved bytes are not zero.
    #[error("reserved bytes of the connection preamble are not zero")]
    Reserved,
}

impl Preamble {
    /// Length on the wire in bytes.
    pub const LEN: usize = 24;

    const MAGIC: [u8; 4] = *b"BLKH";
    const VERSION: u8 = 1;

    /// The bytes to send.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&Self::MAGIC);
        bytes[4] = Self::VERSION;
        bytes[5] = self.kind as u8;
        bytes[8..].copy_from_slice(&self.token);
        bytes
    }

    /// Parses bytes of a peer that is not trusted.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, PreambleError> {
        let [m0, m1, m2, m3, version, kind, r0, r1, token @ ..] = *bytes;
        if [m0, m1, m2, m3] != Self::MAGIC {
            return Err(PreambleError::Magic);
        }
        if version != Self::VERSION {
            return Err(PreambleError::Version(version));
        }
        if [r0, r1] != [0, 0] {
            return Err(PreambleError::Reserved);
        }
        let kind = match kind {
            0 => Kind::Control,
            1 => Kind::Stream,
            other => return Err(PreambleError::Kind(other)),
        };
        Ok(Self { kind, token })
    }
}

/// Longest payload of a frame in bytes. Nobody holds a whole one: it is passed on as it comes.
pub const MAX_FRAME: usize = 1024 * 1024;

/// Longest payload that is sent together with its header in one write: less than the 64 KiB that Linux makes one vsock packet
/// of.
pub const ONE_PACKET: usize = 60 * 1024;

/// Length of a frame's header in bytes.
pub const FRAME_HEADER: usize = 4;

/// The frame that ends a stream.
pub const END: [u8; FRAME_HEADER] = [0; FRAME_HEADER];

/// In the place of [`END`]: the sender's TCP connection was reset. What was sent before it counts.
pub const RESET: [u8; FRAME_HEADER] = [0xff; FRAME_HEADER];

/// Bytes of a process's input that are under way, at most. The guest waits for a part of it before it reads on, so the host must
/// be able to send as many ahead; and since 2026 Linux sends no more than the sending socket would hold itself, which is less
/// unless it is told ("vsock/virtio: cap TX credit to local buffer size").
pub const INPUT_AHEAD: usize = 2 * 1024 * 1024;

/// The header of a frame with `length` bytes, 1 to [`MAX_FRAME`].
pub fn frame_header(length: usize) -> [u8; FRAME_HEADER] {
    debug_assert!((1..=MAX_FRAME).contains(&length), "a frame has 1 to {MAX_FRAME} bytes, not {length}");
    (length as u32).to_le_bytes()
}

/// What a frame's header announces: 0 is [`END`].
pub fn frame_length(header: [u8; FRAME_HEADER]) -> Result<usize, FrameTooLong> {
    match u32::from_le_bytes(header) {
        length if length as usize <= MAX_FRAME => Ok(length as usize),
        length => Err(FrameTooLong(length)),
    }
}

/// A frame's header announces more than [`MAX_FRAME`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stream frame of {0} bytes, at most {MAX_FRAME} are allowed")]
pub struct FrameTooLong(pub u32);

impl FrameTooLong {
    /// True for [`RESET`], which only a forwarded connection has a use for.
    pub fn is_reset(self) -> bool {
        self.0 == u32::from_le_bytes(RESET)
    }
}

/// Takes frames apart, however the connection cuts them. Holds no payload.
#[derive(Debug, Default)]
pub struct Deframer {
    header: [u8; FRAME_HEADER],
    /// Bytes of `header` that have come.
    header_length: usize,
    /// Bytes of the current frame that are still to come.
    left: usize,
    ended: bool,
}

impl Deframer {
    /// Splits the next piece of payload off `input`. `None`: all of `input` is used up, or the stream has [ended].
    ///
    /// [ended]: Self::ended
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<&'a [u8]>, FrameTooLong> {
        while self.left == 0 && !self.ended {
            let Some((&byte, rest)) = input.split_first() else { return Ok(None) };
            *input = rest;
            self.header[self.header_length] = byte;
            self.header_length += 1;
            if self.header_length == FRAME_HEADER {
                self.header_length = 0;
                self.left = frame_length(self.header)?;
                self.ended = self.left == 0;
            }
        }
        if self.ended || input.is_empty() {
            return Ok(None);
        }
        let (payload, rest) = input.split_at(self.left.min(input.len()));
        *input = rest;
        self.left -= payload.len();
        Ok(Some(payload))
    }

    /// True once the end frame has come: close the connection now.
    pub fn ended(&self) -> bool {
        self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preamble_survives_the_wire() {
        for kind in [Kind::Control, Kind::Stream] {
            let preamble = Preamble { kind, token: [7; 16] };
            assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
    }

    #[test]
    fn each_wrong_field_is_named() {
        let good = Preamble { kind: Kind::Stream, token: [1; 16] }.encode();
        let with = |index: usize, value: u8| {
            let mut bytes = good;
            bytes[index] = value;
            Preamble::decode(&bytes)
        };
        assert_eq!(with(0, b'X'), Err(PreambleError::Magic));
        assert_eq!(with(4, 9), Err(PreambleError::Version(9)));
        assert_eq!(with(5, 2), Err(PreambleError::Kind(2)));
        assert_eq!(with(7, 1), Err(PreambleError::Reserved));
    }

    fn framed(chunks: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for chunk in chunks {
            bytes.extend(frame_header(chunk.len()));
            bytes.extend(*chunk);
        }
        bytes.extend(END);
        bytes
    }

    #[test]
    fn frames_come_apart_wherever_the_connection_cuts_them() {
        let bytes = framed(&[b"hello ", b"w", b"orld"]);
        for size in 1..=bytes.len() {
            let (mut deframer, mut payload) = (Deframer::default(), Vec::new());
            for mut piece in bytes.chunks(size) {
                while let Some(part) = deframer.next(&mut piece).expect("frames") {
                    payload.extend_from_slice(part);
                }
            }
            assert_eq!((payload.as_slice(), deframer.ended()), (&b"hello world"[..], true), "pieces of {size}");
        }
    }

    #[test]
    fn nothing_is_taken_after_the_end() {
        let mut deframer = Deframer::default();
        let mut input: &[u8] = &[0, 0, 0, 0, 1, 0, 0, 0, 7];
        assert_eq!(deframer.next(&mut input), Ok(None));
        assert!(deframer.ended());
        assert_eq!(input.len(), 5);
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused() {
        let header = (MAX_FRAME as u32 + 1).to_le_bytes();
        let refused = Deframer::default().next(&mut &header[..]).expect_err("is too long");
        assert_eq!(refused, FrameTooLong(MAX_FRAME as u32 + 1));
        assert!(!refused.is_reset());
    }

    #[test]
    fn a_reset_comes_behind_what_was_sent_before_it() {
        let bytes = [frame_header(2).as_slice(), b"hi", &RESET].concat();
        let mut input = bytes.as_slice();
        let mut deframer = Deframer::default();
        assert_eq!(deframer.next(&mut input), Ok(Some(&b"hi"[..])));
        assert!(deframer.next(&mut input).expect_err("is no frame").is_reset());
        assert!(!deframer.ended());
    }
}
