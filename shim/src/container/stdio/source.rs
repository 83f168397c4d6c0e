//! A process's stdin: from a FIFO of containerd's to the guest.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use bulkhead_proto::wire;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::{BUFFER, INPUT_BYTES, widen};
use crate::guest::listener::StreamTicket;

/// Opens a stdin FIFO: the end to read, and the handle that keeps it from EOF.
pub(super) fn open(path: &Path) -> anyhow::Result<(pipe::Receiver, pipe::Sender)> {
    let name = || format!("open stdin FIFO {}", path.display());
    let receiver = pipe::OpenOptions::new().open_receiver(path).with_context(name)?;
    let sender = pipe::OpenOptions::new().open_sender(path).with_context(name)?;
    widen(&sender, INPUT_BYTES);
    Ok((receiver, sender))
}

/// Host to guest, until EOF of the FIFO or until the guest's reader is gone.
pub(super) async fn copy(mut source: pipe::Receiver, ticket: StreamTicket) {
    let Ok(mut stream) = ticket.wait().await.inspect_err(|error| {
        tracing::debug!(error = %format_args!("{error:#}"), "stdin stream was not dialled");
    }) else {
        return;
    };
    // The header stands before the bytes in one buffer, so that a small frame is one write.
    let mut frame = vec![0; wire::FRAME_HEADER + BUFFER];
    loop {
        match source.read(&mut frame[wire::FRAME_HEADER..]).await {
            Ok(0) => break,
            Ok(length) => {
                // What else is there belongs to the same frame: the guest then takes it in one go.
                let held = rustix::io::ioctl_fionread(&source).unwrap_or(0);
                let more = usize::try_from(held).unwrap_or(0).min(wire::MAX_FRAME - length);
                frame[..wire::FRAME_HEADER].copy_from_slice(&wire::frame_header(length + more));
                // The process may have closed its stdin or ended: what is left has no reader.
                if stream.write_all(&frame[..wire::FRAME_HEADER + length]).await.is_err() {
                    return;
                }
                if let Err(error) = copy_exactly(&mut source, &mut stream, more, &mut frame).await {
                    return tracing::debug!(%error, "stdin stream broke");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "stdin FIFO cannot be read");
                break;
            }
        }
    }
    finish_sending(&mut stream).await;
}

/// Moves `left` bytes, piece by piece through `buffer`.
async fn copy_exactly(
    source: &mut pipe::Receiver,
    stream: &mut (impl AsyncWrite + Unpin),
    mut left: usize,
    buffer: &mut [u8],
) -> io::Result<()> {
    while left > 0 {
        let most = left.min(BUFFER);
        let count = source.read(&mut buffer[..most]).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        stream.write_all(&buffer[..count]).await?;
        left -= count;
    }
    Ok(())
}

/// Sends the end and waits, bounded, for the peer's close: so nothing in flight is lost.
async fn finish_sending(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    const PEER_CLOSE: Duration = Duration::from_secs(30);
    if stream.write_all(&wire::END).await.is_ok() {
        let mut rest = [0; 64];
        // The direction is never used, so whatever comes is the peer's close or a peer that does not keep to the rules.
        drop(timeout(PEER_CLOSE, stream.read(&mut rest)).await);
    }
}
