//! The header of every vsock packet (virtio 1.3, 5.10.6).

/// The host's address.
pub const HOST_CID: u64 = 2;

/// Type of a stream socket, the only one that is served.
pub const STREAM: u16 = 1;

/// Longest payload of a packet in bytes; Linux sends no longer ones.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Operations; others exist in no version of the specification.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Grants it.
    pub const RESPONSE: u16 = 2;
    /// Ends it at once, or refuses it.
    pub const RST: u16 = 3;
    /// Says what the sender will no longer do: see [`super::shutdown`].
    pub const SHUTDOWN: u16 = 4;
    /// Carries bytes.
    pub const RW: u16 = 5;
    /// Tells the sender's buffer space.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for the peer's.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`].
pub mod shutdown {
    /// The sender receives no more.
    pub const RECEIVE: u32 = 1;
    /// The sender sends no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// A packet's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's address.
    pub src_cid: u64,
    /// Receiver's address.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// Kind of socket.
    pub kind: u16,
    /// See [`op`].
    pub op: u16,
    /// See [`shutdown`].
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection in bytes.
    pub buf_alloc: u32,
    /// How many bytes the sender has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Length on the wire in bytes.
    pub const LEN: usize = 44;

    /// The bytes to send.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Reads what a guest wrote; every value is possible.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
            let (field, left) = rest.split_first_chunk().expect("the fields are as long as the header");
            *rest = left;
            *field
        }
        let mut rest: &[u8] = bytes;
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The refusal of this packet of a guest's.
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: STREAM,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 1024,
            len: 7,
            kind: STREAM,
            op: op::RW,
            flags: 9,
            buf_alloc: 0xffff_ffff,
            fwd_cnt: 11,
        };
        let bytes = header.encode();
        assert_eq!(bytes[16..20], [4, 3, 2, 1], "little endian, at the specification's offset");
        assert_eq!(Header::decode(&bytes), header);
    }

    #[test]
    fn a_reset_goes_back_to_the_sender() {
        let request =
            Header { src_cid: 3, dst_cid: 2, src_port: 5, dst_port: 1024, op: op::REQUEST, ..Header::default() };
        let reset = request.reset();
        assert_eq!((reset.src_cid, reset.dst_cid, reset.src_port, reset.dst_port), (2, 3, 1024, 5));
        assert_eq!(reset.op, op::RST);
    }
}
