//! The way to the host: every connection is dialled from here and opens with the preamble of `bulkhead_proto::wire`.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bulkhead_proto::wire::{Kind, Preamble, Token};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// Most that one write hands to the kernel.
///
/// Since 6.12.4x the guest's driver splits a packet above 32 KiB over several buffers, and `vhost-device-vsock` 0.3 drops
/// such a packet without a word: <https://github.com/rust-vmm/vhost-device/tree/main/vhost-device-vsock> reads one header
/// and one data descriptor. This leaves room for the driver's own overhead.
pub const PACKET: usize = 31 * 1024;

/// Longest wait for one connection to the host.
const DIAL: Duration = Duration::from_secs(10);

/// Where the shim listens.
#[derive(Debug, Clone)]
pub struct Host {
    port: u32,
}

impl Host {
    /// The host's `port`.
    pub fn new(port: u32) -> Self {
        Self { port }
    }

    /// Connects and introduces the connection.
    pub async fn dial(&self, kind: Kind, token: Token) -> io::Result<HostStream> {
        let dial = async {
            let mut stream = HostStream(VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, self.port)).await?);
            stream.write_all(&Preamble { kind, token }.encode()).await?;
            Ok(stream)
        };
        match tokio::time::timeout(DIAL, dial).await {
            Ok(dialled) => dialled,
            Err(_) => {
                let text = format!("no answer from the host's vsock port {} within {} s", self.port, DIAL.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }
        }
    }
}

/// A connection to the host whose writes stay within [`PACKET`].
#[derive(Debug)]
pub struct HostStream(VsockStream);

impl AsyncRead for HostStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for HostStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, &bytes[..bytes.len().min(PACKET)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
