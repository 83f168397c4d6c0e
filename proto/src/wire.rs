//! The first bytes of every connection between guest and host.
//!
//! The guest dials; the host never does (a host connection that arrives while the guest still boots can wedge
//! `vhost-device-vsock`, and a dial from the guest is at the same time the sign that it is up). A connection opens with a
//! [`Preamble`] of [`Preamble::LEN`] bytes from the guest, without an answer:
//!
//! ```text
//! 0      4       5      6      8                24
//! | BLKH | ver=1 | kind | zero | token (16 bytes) |
//! ```
//!
//! - [`Kind::Control`]: HTTP/2 follows. The *agent* is the gRPC server although it dialled. The token is zero on the first
//!   connection of a boot, which comes before any container runs, and the session secret of `Hello` on every later one.
//! - [`Kind::Stream`]: raw bytes of one stream of one process, in one direction. The token is the one that the shim named
//!   in the request; a connection with an unknown token is closed. The sender ends with `shutdown(SHUT_WR)`, the receiver
//!   then closes, and the sender waits for that with a deadline: so nothing in flight is lost.

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
}
