//! containerd's connections, counted while they are open.
//!
//! Go's ttrpc client may see the end of a connection before the answer that came just ahead of it, and tells a request that was
//! granted for one that failed. For `ShutdownSandbox` that is an error of the pod's removal. containerd closes its connections
//! by itself once it has that answer, so a server that ends waits for it to do so, for a while.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::timeouts;

/// Counts connections.
#[derive(Debug, Clone, Default)]
pub struct Connections {
    open: TaskTracker,
}

/// A connection that counts until it is dropped, which is when either side has closed it.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Read already, and to be read again.
    ahead: Bytes,
    _open: TaskTrackerToken,
}

impl Connections {
    /// Counts `stream` from here on.
    pub fn count(&self, stream: UnixStream) -> Connection {
        Connection { stream, ahead: Bytes::new(), _open: self.open.token() }
    }

    /// Returns when the last one is closed, or after [`timeouts::HANG_UP`]; true if none is open any more.
    pub async fn hung_up(&self) -> bool {
        self.open.close();
        tokio::time::timeout(timeouts::HANG_UP, self.open.wait()).await.is_ok()
    }
}

impl Connection {
    /// The same connection as if `bytes` had not been read yet.
    #[must_use]
    pub fn unread(self, bytes: Bytes) -> Self {
        Self { ahead: bytes, ..self }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.has_remaining() {
            let length = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead.split_to(length));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_wait_ends_with_the_last_connection_or_in_time() {
        let connections = Connections::default();
        assert!(connections.hung_up().await, "there was none");
        let (stream, _peer) = UnixStream::pair().expect("makes a pair");
        let connection = connections.count(stream);
        assert!(!connections.hung_up().await, "one is open");
        drop(connection);
        assert!(connections.hung_up().await);
    }
}
