//! A process's stdin: from a FIFO or a stream of containerd's to the guest.

use std::io;
use std::time::Duration;

use anyhow::Context;
use bulkhead_proto::wire;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::streaming::Streams;
use super::streaming::input::Input;
use super::{BUFFER, INPUT_BYTES, widen};
use crate::error::Error;
use crate::guest::listener::{GuestStream, StreamTicket};

/// Where input comes from.
#[derive(Debug)]
pub(super) enum Source {
    Fifo(pipe::Receiver),
    Stream(Input),
}

/// Keeps input from its end; dropped by `CloseIO`.
#[derive(Debug)]
pub(super) enum Hold {
    /// A writer besides containerd's.
    Fifo { _writer: pipe::Sender },
    /// The hope that containerd opens a broken stream again.
    Stream { _reopens: DropGuard },
}

/// Opens what `text` says. Errors repeat no query.
pub(super) fn open(text: &str, streams: &Streams) -> anyhow::Result<(Source, Hold)> {
    let Some((scheme, rest)) = text.split_once("://") else {
        let (receiver, sender) = open_fifo(text)?;
        return Ok((Source::Fifo(receiver), Hold::Fifo { _writer: sender }));
    };
    let Some(claim) = streams.claim_uri(scheme, rest)? else {
        let accepted = "a FIFO or ttrpc+unix://SOCKET?streaming_id=ID";
        return Err(Error::invalid(format!("input from {scheme}:// is not supported, expected {accepted}")).into());
    };
    let last = CancellationToken::new();
    Ok((Source::Stream(Input::new(claim, last.clone())), Hold::Stream { _reopens: last.drop_guard() }))
}

fn open_fifo(path: &str) -> anyhow::Result<(pipe::Receiver, pipe::Sender)> {
    let name = || format!("open stdin FIFO {path}");
    let receiver = pipe::OpenOptions::new().open_receiver(path).with_context(name)?;
    let sender = pipe::OpenOptions::new().open_sender(path).with_context(name)?;
    widen(&sender, INPUT_BYTES);
    Ok((receiver, sender))
}

/// Host to guest, until the end of input or until the guest's reader is gone; from a stream what comes after that is
/// taken and dropped, for ever.
pub(super) async fn copy(source: Source, ticket: StreamTicket) {
    let stream = dialled(ticket).await.inspect_err(|error| {
        tracing::debug!(error = %format_args!("{error:#}"), "there is no stdin stream");
    });
    match (source, stream) {
        (Source::Fifo(fifo), Ok(mut stream)) => copy_fifo(fifo, &mut stream).await,
        (Source::Fifo(_), Err(_)) => {}
        (Source::Stream(mut input), stream) => {
            if let Ok(mut stream) = stream {
                copy_stream(&mut input, &mut stream).await;
            }
            input.discard().await;
        }
    }
}

async fn dialled(ticket: StreamTicket) -> anyhow::Result<GuestStream> {
    let stream = ticket.wait().await?;
    stream.send_ahead(wire::INPUT_AHEAD).context("widen the stream")?;
    Ok(stream)
}

async fn copy_stream(input: &mut Input, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    while let Some(piece) = input.next().await {
        for payload in piece.chunks(BUFFER) {
            let frame = [&wire::frame_header(payload.len()), payload].concat();
            // The process may have closed its stdin or ended: what is left has no reader.
            if stream.write_all(&frame).await.is_err() {
                return;
            }
        }
    }
    finish_sending(stream).await;
}

async fn copy_fifo(mut source: pipe::Receiver, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
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
                if let Err(error) = copy_exactly(&mut source, stream, more, &mut frame).await {
                    return tracing::debug!(%error, "stdin stream broke");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "stdin FIFO cannot be read");
                break;
            }
        }
    }
    finish_sending(stream).await;
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
