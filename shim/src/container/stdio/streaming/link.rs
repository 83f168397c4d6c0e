//! The bytes of containerd's streaming IO: one ttrpc stream of `google.protobuf.Any`, alone on its connection.
//!
//! A frame is a header of ten bytes (length, stream id, type, flags) and a message; see
//! <https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md>. What the messages are, and which side sends which, is
//! containerd's `core/transfer/streaming`: the side that reads sends `WindowUpdate`, the side that writes sends `Data`,
//! never more than it was allowed to, and says by a frame with the flag "remote closed" that there is no more.
//!
//! The frames are not left to the ttrpc library's server (0.10), which gives each incoming frame to a task of its own
//! and so may swap two of them, and does not tell a stream that its connection has ended.
//! <https://github.com/containerd/containerd/tree/main/core/transfer/streaming>

use std::io;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};
use ttrpc::proto::{
    Codec as _, FLAG_NO_DATA, FLAG_REMOTE_CLOSED, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MessageHeader, Response,
};

/// Bytes of one `Data` at most, as containerd cuts them. The window may be smaller.
pub const DATA_BYTES: usize = 32 * 1024;

/// What a reader allows at a time, as containerd's does.
pub const WINDOW: u64 = 64 * 1024;

/// The longest frame that is taken: a `Data` twice as large as containerd's, with its envelope.
const MAX_FRAME: usize = 2 * DATA_BYTES + 1024;

const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const EMPTY: &str = "google.protobuf.Empty";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// A connection's two directions.
pub trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

/// One opened stream.
pub struct Link {
    reader: FramedRead<ReadHalf<Box<dyn Socket>>, LengthDelimitedCodec>,
    writer: WriteHalf<Box<dyn Socket>>,
    /// Number of the ttrpc stream on its connection.
    stream_id: u32,
    /// Bytes that the client lets us send.
    credit: u64,
    frame: Vec<u8>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("stream_id", &self.stream_id).field("credit", &self.credit).finish_non_exhaustive()
    }
}

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// The name of the stream; the first word of every client, and never another.
    Init(String),
    /// Bytes of the process's input.
    Data(Bytes),
    /// It allowed more bytes, which [`Link::credit`] counts.
    Credit,
    /// Nothing more will come of it: it has closed the stream. An end without this word is a connection that broke.
    Closed,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct StreamInit {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Data {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct WindowUpdate {
    #[prost(int32, tag = "1")]
    update: i32,
}

impl Link {
    /// The stream `stream_id` of `socket`, whose request was read already.
    pub fn new(socket: Box<dyn Socket>, stream_id: u32) -> Self {
        let (reader, writer) = tokio::io::split(socket);
        let codec = LengthDelimitedCodec::builder()
            .length_field_length(4)
            // The length does not count the header, which is wanted whole.
            .length_adjustment(MESSAGE_HEADER_LENGTH as isize)
            .num_skip(0)
            .max_frame_length(MAX_FRAME)
            .new_codec();
        Self { reader: FramedRead::new(reader, codec), writer, stream_id, credit: 0, frame: Vec::new() }
    }

    /// Bytes that may be sent now.
    pub fn credit(&self) -> usize {
        usize::try_from(self.credit).unwrap_or(usize::MAX)
    }

    /// What the client says next. Cancel safe. An error is the end of the connection, or of what can be understood.
    pub async fn next(&mut self) -> io::Result<Said> {
        let frame = self.reader.next().await.ok_or(io::ErrorKind::UnexpectedEof)??;
        self.decode(frame)
    }

    fn decode(&mut self, mut frame: BytesMut) -> io::Result<Said> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let message = frame.split_off(MESSAGE_HEADER_LENGTH).freeze();
        let header = MessageHeader::from(&frame);
        if header.stream_id != self.stream_id || header.type_ != MESSAGE_TYPE_DATA {
            return Err(invalid(format!(
                "a frame of type {} for stream {}, expected data for stream {}",
                header.type_, header.stream_id, self.stream_id
            )));
        }
        if header.flags & FLAG_REMOTE_CLOSED != 0 {
            return Ok(Said::Closed);
        }
        let any = Any::decode(message)?;
        // A type may stand behind the address of a registry.
        match any.type_url.rsplit('/').next().unwrap_or_default() {
            INIT => Ok(Said::Init(StreamInit::decode(any.value)?.id)),
            DATA => Ok(Said::Data(Data::decode(any.value)?.data)),
            WINDOW_UPDATE => {
                let update = WindowUpdate::decode(any.value)?.update;
                let update =
                    u64::try_from(update).map_err(|_| invalid(format!("a window update of {update} bytes")))?;
                self.credit = self.credit.saturating_add(update);
                Ok(Said::Credit)
            }
            other => Err(invalid(format!("a message of type {other:?}, expected {DATA} or {WINDOW_UPDATE}"))),
        }
    }

    /// Tells the client that its stream is open: containerd reads one message of any kind.
    pub async fn acknowledge(&mut self) -> io::Result<()> {
        self.send(EMPTY, Bytes::new()).await
    }

    /// Sends `data`, at most [`Self::credit`] and [`DATA_BYTES`]. After an error, or when it is dropped half way, the
    /// client has not got it.
    pub async fn send_data(&mut self, data: &[u8]) -> io::Result<()> {
        debug_assert!(data.len() <= self.credit().min(DATA_BYTES), "{} of {:?}", data.len(), self);
        self.credit = self.credit.saturating_sub(data.len() as u64);
        self.send(DATA, Data { data: Bytes::copy_from_slice(data) }.encode_to_vec().into()).await
    }

    /// Allows the client [`WINDOW`] more bytes.
    pub async fn allow_window(&mut self) -> io::Result<()> {
        self.send(WINDOW_UPDATE, WindowUpdate { update: WINDOW as i32 }.encode_to_vec().into()).await
    }

    /// Says that nothing more will come; the client may still.
    pub async fn send_close(&mut self) -> io::Result<()> {
        let mut header = MessageHeader::new_data(self.stream_id, 0);
        header.set_flags(FLAG_REMOTE_CLOSED | FLAG_NO_DATA);
        self.writer.write_all(&Vec::from(header)).await
    }

    /// Ends the stream with an error that the client is told.
    pub async fn refuse(&mut self, code: ttrpc::Code, message: String) -> io::Result<()> {
        let mut response = Response::new();
        response.set_status(ttrpc::get_status(code, message));
        let payload = response.encode().map_err(io::Error::other)?;
        let header = MessageHeader::new_response(self.stream_id, payload.len() as u32);
        self.writer.write_all(&[Vec::from(header), payload].concat()).await
    }

    async fn send(&mut self, type_url: &str, value: Bytes) -> io::Result<()> {
        let any = Any { type_url: type_url.into(), value };
        let header = MessageHeader::new_data(self.stream_id, any.encoded_len() as u32);
        self.frame.clear();
        self.frame.extend(Vec::from(header));
        any.encode(&mut self.frame).map_err(io::Error::other)?;
        self.writer.write_all(&self.frame).await
    }
}

/// What only clients do.
#[cfg(test)]
impl Link {
    /// Names the stream.
    pub async fn send_init(&mut self, id: &str) -> io::Result<()> {
        self.send(INIT, StreamInit { id: id.into() }.encode_to_vec().into()).await
    }

    /// Waits for the answer; a refusal is an error with its text.
    pub async fn opened(&mut self) -> io::Result<()> {
        let mut frame = self.reader.next().await.ok_or(io::ErrorKind::UnexpectedEof)??;
        let message = frame.split_off(MESSAGE_HEADER_LENGTH);
        if MessageHeader::from(&frame).type_ == MESSAGE_TYPE_DATA {
            return Ok(());
        }
        let response = Response::decode(message).map_err(io::Error::other)?;
        Err(io::Error::other(response.status().message().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    use super::*;

    fn link() -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("makes a pair");
        (Link::new(Box::new(ours), 1), theirs)
    }

    /// A frame of data for stream 1.
    fn frame(flags: u8, message: &[u8]) -> Vec<u8> {
        [&(message.len() as u32).to_be_bytes()[..], &[0, 0, 0, 1, 3, flags], message].concat()
    }

    /// As containerd's typeurl encodes them.
    fn any(type_url: &str, value: &[u8]) -> Vec<u8> {
        [&[0x0a, type_url.len() as u8], type_url.as_bytes(), &[0x12, value.len() as u8], value].concat()
    }

    #[tokio::test]
    async fn what_containerd_sends_is_understood() {
        let (mut link, mut client) = link();
        for bytes in [
            frame(0, &any("containerd.services.streaming.v1.StreamInit", b"\x0a\x08a-stdout")),
            frame(0, &any("containerd.types.transfer.WindowUpdate", b"\x08\x80\x80\x04")),
            frame(0, &any("types.googleapis.com/containerd.types.transfer.Data", b"\x0a\x02hi")),
            frame(FLAG_REMOTE_CLOSED | FLAG_NO_DATA, b""),
        ] {
            client.write_all(&bytes).await.expect("writes");
        }
        drop(client);
        assert_eq!(link.next().await.expect("is one"), Said::Init("a-stdout".into()));
        assert_eq!(link.next().await.expect("is one"), Said::Credit);
        assert_eq!(link.credit(), 65536);
        assert_eq!(link.next().await.expect("is one"), Said::Data(Bytes::from_static(b"hi")));
        assert_eq!(link.next().await.expect("is one"), Said::Closed);
        assert_eq!(link.next().await.expect_err("is over").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn what_is_sent_is_what_containerd_reads() {
        let (mut link, mut client) = link();
        link.credit = 2;
        link.acknowledge().await.expect("sends");
        link.send_data(b"hi").await.expect("sends");
        link.allow_window().await.expect("sends");
        link.send_close().await.expect("sends");
        drop(link);
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.expect("reads");
        let empty = [&[0x0a, 21], &b"google.protobuf.Empty"[..]].concat();
        let expected = [
            frame(0, &empty),
            frame(0, &any("containerd.types.transfer.Data", b"\x0a\x02hi")),
            frame(0, &any("containerd.types.transfer.WindowUpdate", b"\x08\x80\x80\x04")),
            frame(FLAG_REMOTE_CLOSED | FLAG_NO_DATA, b""),
        ];
        assert_eq!(got, expected.concat());
    }

    #[tokio::test]
    async fn what_is_no_stream_is_refused_with_its_kind() {
        for (bytes, expected) in [
            (frame(0, &any("containerd.types.transfer.Progress", b"")), "a message of type"),
            (
                frame(
                    0,
                    &any(
                        "containerd.types.transfer.WindowUpdate",
                        &[8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1],
                    ),
                ),
                "a window update of -1 bytes",
            ),
            (frame(0, b"\xff"), "decode"),
            (vec![0, 0, 0, 0, 0, 0, 0, 3, 1, 0], "a frame of type 1 for stream 3"),
            (vec![0, 255, 255, 255, 0, 0, 0, 1, 3, 0], "frame size too big"),
        ] {
            let (mut link, mut client) = link();
            client.write_all(&bytes).await.expect("writes");
            let error = link.next().await.expect_err("is refused").to_string();
            assert!(error.contains(expected), "{error:?} for {bytes:?}");
        }
    }
}
