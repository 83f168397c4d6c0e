//! A process's output by a stream of containerd's.
//!
//! containerd's reader allows 64 KiB at a time, and once more when less than that is left. It stops reading the moment
//! that it hears of the exit (it cancels the stream's context in `Delete`), so an exit must wait until everything was
//! read. Only one thing tells that: having read to the end, which we say as soon as the process's pipe has one,
//! containerd closes the stream. A stream that ends without being closed is that of a containerd that died: it comes
//! back under the same id.
//!
//! Its ttrpc client gives up a stream when 64 messages are unread for a second; windows count bytes and cannot prevent
//! that. It takes somebody who attached to the container and does not read. Output is sent in pieces as large as they
//! come.

use tokio::sync::watch;
use tokio::time::timeout;

use super::Claim;
use super::link::{DATA_BYTES, Link, Said};
use crate::timeouts;

/// Where containerd is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Presence {
    /// Somebody reads.
    pub connected: bool,
    /// All of the output was given to be sent; what is left is that containerd reads it.
    pub at_end: bool,
}

/// Sends output to whoever has opened the stream.
#[derive(Debug)]
pub struct Output {
    claim: Claim,
    /// None: nobody has opened the stream, or it broke.
    link: Option<Link>,
    /// containerd has closed the stream and wants no more.
    dismissed: bool,
    presence: watch::Sender<Presence>,
}

impl Output {
    /// The output that `claim` is for.
    pub fn new(claim: Claim) -> Self {
        Self { claim, link: None, dismissed: false, presence: watch::Sender::default() }
    }

    /// Where containerd is, from now on.
    pub fn presence(&self) -> watch::Receiver<Presence> {
        self.presence.subscribe()
    }

    /// Sends `bytes`, waiting for windows and for clients as long as it takes. Returns as well if nobody wants them any
    /// more.
    pub async fn write_all(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // It is only put back whole: a frame that was cut short must not be followed by another.
            let Some(mut link) = self.take_link().await else { return };
            let (piece, rest) = bytes.split_at(bytes.len().min(link.credit()).min(DATA_BYTES));
            if piece.is_empty() {
                tokio::select! {
                    biased;
                    newer = self.claim.next() => self.link = Some(newer),
                    said = link.next() => match said {
                        Ok(Said::Credit) => self.link = Some(link),
                        Ok(Said::Closed) => self.dismissed = true,
                        other => tracing::debug!(?other, "containerd's end of an output stream is gone"),
                    },
                }
                continue;
            }
            tokio::select! {
                biased;
                newer = self.claim.next() => self.link = Some(newer),
                sent = link.send_data(piece) => match sent {
                    Ok(()) => {
                        bytes = rest;
                        self.link = Some(link);
                    }
                    Err(error) => {
                        self.dismissed = matches!(timeout(timeouts::STREAM_INIT, closed(&mut link)).await, Ok(true));
                        tracing::debug!(%error, self.dismissed, "containerd's end of an output stream is gone");
                    }
                },
            }
        }
    }

    /// Tells containerd that this was all, and returns when it has read it or wants no more.
    pub async fn finish(&mut self) {
        self.presence.send_modify(|presence| presence.at_end = true);
        while let Some(mut link) = self.take_link().await {
            // Whether it could be told or not: what counts is what the client has said before it went.
            drop(link.send_close().await);
            tokio::select! {
                biased;
                newer = self.claim.next() => self.link = Some(newer),
                closed = closed(&mut link) => if closed {
                    return;
                },
            }
        }
    }

    /// After [`Self::finish`], for ever: a containerd that was restarted opens all streams, also those that have ended.
    pub async fn linger(&mut self) -> ! {
        loop {
            self.link = Some(self.claim.next().await);
            self.finish().await;
        }
    }

    /// Ends the stream as it stands: the process is deleted.
    pub async fn hang_up(mut self) {
        if let Some(mut link) = self.claim.fetch().or_else(|| self.link.take()) {
            drop(timeout(timeouts::STREAM_INIT, link.send_close()).await);
        }
    }

    /// The newest link, awaited if there is none. None: nobody wants more.
    async fn take_link(&mut self) -> Option<Link> {
        if let Some(newer) = self.claim.fetch() {
            self.link = Some(newer);
        }
        if self.link.is_none() {
            self.presence.send_modify(|presence| presence.connected = false);
            if self.dismissed {
                return None;
            }
            self.link = Some(self.claim.next().await);
        }
        self.dismissed = false;
        self.presence.send_if_modified(|presence| !std::mem::replace(&mut presence.connected, true));
        self.link.take()
    }
}

/// Whether the client closes the stream, when it goes.
async fn closed(link: &mut Link) -> bool {
    loop {
        match link.next().await {
            Ok(Said::Credit) => {}
            Ok(Said::Closed) => return true,
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::task::JoinSet;

    use super::super::link::WINDOW;
    use super::super::tests::{PATIENCE, dial, streams};
    use super::*;

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        timeout(PATIENCE, what).await.expect("in time")
    }

    /// Reads as containerd does, until `length` bytes have come.
    async fn read(client: &mut Link, window: &mut u64, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            if *window < WINDOW {
                client.allow_window().await.expect("sends");
                *window += WINDOW;
            }
            match soon(client.next()).await.expect("is open") {
                Said::Data(data) => {
                    *window -= data.len() as u64;
                    bytes.extend_from_slice(&data);
                }
                other => panic!("{other:?}"),
            }
        }
        bytes
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n / 7) as u8).collect()
    }

    #[tokio::test]
    async fn no_more_is_sent_than_the_window_allows() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let mut output = Output::new(streams.claim("a").expect("is free"));
        let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
        let bytes = pattern(3 * WINDOW as usize);
        let sent = bytes.clone();
        let mut writer = tokio::task::JoinSet::new();
        writer.spawn(async move {
            output.write_all(&sent).await;
            output
        });
        client.allow_window().await.expect("sends");
        let mut got = Vec::new();
        while got.len() < WINDOW as usize {
            let Said::Data(data) = soon(client.next()).await.expect("is open") else { panic!("is data") };
            got.extend_from_slice(&data);
        }
        let silence = timeout(Duration::from_millis(100), client.next()).await;
        assert!(silence.is_err(), "{silence:?} came without being allowed");
        got.extend(read(&mut client, &mut 0, bytes.len() - got.len()).await);
        assert!(got == bytes, "the bytes are others");
        soon(writer.join_next()).await.expect("is there").expect("writes");
    }

    #[tokio::test]
    async fn a_stream_that_breaks_goes_on_where_it_was_when_it_is_opened_again() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let mut output = Output::new(streams.claim("a").expect("is free"));
        let presence = output.presence();
        let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
        client.allow_window().await.expect("sends");
        output.write_all(b"before").await;
        assert_eq!(read(&mut client, &mut { WINDOW }, 6).await, b"before");
        assert!(presence.borrow().connected);
        drop(client);
        let mut writer = JoinSet::new();
        let bytes = pattern(100_000);
        let sent = bytes.clone();
        writer.spawn(async move {
            output.write_all(&sent).await;
            output.finish().await;
        });
        let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
        assert!(read(&mut client, &mut 0, bytes.len()).await == bytes, "the bytes are others");
        assert_eq!(soon(client.next()).await.expect("is open"), Said::Closed);
        // Dying with the last byte is not having read it.
        drop(client);
        let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
        assert_eq!(soon(client.next()).await.expect("is open"), Said::Closed);
        assert!(writer.try_join_next().is_none(), "it has not been told yet");
        client.send_close().await.expect("sends");
        soon(writer.join_next()).await.expect("is there").expect("finishes");
    }

    #[tokio::test]
    async fn what_nobody_wants_any_more_is_dropped() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let mut output = Output::new(streams.claim("a").expect("is free"));
        let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
        client.send_close().await.expect("sends");
        drop(client);
        soon(output.write_all(&pattern(1_000_000))).await;
        soon(output.finish()).await;
    }
}
