//! A process's input by a stream of containerd's.
//!
//! containerd closes the stream and then calls `CloseIO`. Closing alone is the end of input; `CloseIO` alone is not, as
//! it is not with a FIFO that containerd still holds open: it only says that a stream that breaks will not be opened
//! again.
//!
//! containerd's writer waits for its window without a look at anything else, even at the end of the connection. So a
//! client whose bytes have no reader any more is served all the same, or `exec -i` would never return.

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::Claim;
use super::link::{Link, Said, WINDOW};

/// Takes input from whoever has opened the stream.
#[derive(Debug)]
pub struct Input {
    claim: Claim,
    /// None: nobody has opened the stream, or it broke.
    link: Option<Link>,
    /// Bytes that its client may still send.
    allowed: u64,
    /// No other client will come.
    last: CancellationToken,
}

impl Input {
    /// The input that `claim` is for; cancelling `last` says that a stream that breaks stays so.
    pub fn new(claim: Claim, last: CancellationToken) -> Self {
        Self { claim, link: None, allowed: 0, last }
    }

    /// The next bytes; None at the end of input.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            let Some(link) = &mut self.link else {
                tokio::select! {
                    biased;
                    link = self.claim.next() => self.adopt(link),
                    () = self.last.cancelled() => return None,
                }
                continue;
            };
            if self.allowed < WINDOW {
                if let Err(error) = link.allow_window().await {
                    // What it has sent before it went is still to be read.
                    tracing::debug!(%error, "containerd's end of an input stream is gone");
                }
                self.allowed += WINDOW;
            }
            tokio::select! {
                biased;
                said = link.next() => match said {
                    Ok(Said::Data(data)) => {
                        // One that sends more than it may waits for the socket instead: nothing is held here.
                        self.allowed = self.allowed.saturating_sub(data.len() as u64);
                        return Some(data);
                    }
                    Ok(Said::Closed) => {
                        self.link = None;
                        return None;
                    }
                    other => {
                        tracing::debug!(?other, "containerd's end of an input stream is gone");
                        self.link = None;
                    }
                },
                newer = self.claim.next() => self.adopt(newer),
            }
        }
    }

    /// Takes whatever comes, for ever, and does nothing with it.
    pub async fn discard(mut self) -> ! {
        self.last = CancellationToken::new();
        loop {
            while self.next().await.is_some() {}
        }
    }

    fn adopt(&mut self, link: Link) {
        self.link = Some(link);
        self.allowed = 0;
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::super::link::DATA_BYTES;
    use super::super::tests::{PATIENCE, dial, streams};
    use super::*;

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        timeout(PATIENCE, what).await.expect("in time")
    }

    /// Writes as containerd does.
    async fn write(client: &mut Link, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(bytes.len().min(client.credit()).min(DATA_BYTES));
            if piece.is_empty() {
                assert_eq!(soon(client.next()).await.expect("is open"), Said::Credit);
            } else {
                client.send_data(piece).await.expect("sends");
            }
            bytes = rest;
        }
    }

    #[tokio::test]
    async fn input_comes_whole_and_ends_when_the_stream_is_closed() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let mut input = Input::new(streams.claim("a").expect("is free"), CancellationToken::new());
        let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
        let bytes: Vec<u8> = (0..300_000).map(|n| (n / 7) as u8).collect();
        let sent = bytes.clone();
        let mut writer = JoinSet::new();
        writer.spawn(async move {
            write(&mut client, &sent).await;
            client.send_close().await.expect("sends");
            // containerd closes the connection at once.
        });
        let mut got = Vec::new();
        while let Some(piece) = soon(input.next()).await {
            got.extend_from_slice(&piece);
        }
        assert!(got == bytes, "{} of {} bytes, or others", got.len(), bytes.len());
        soon(writer.join_next()).await.expect("is there").expect("writes");
    }

    #[tokio::test]
    async fn a_stream_that_breaks_is_no_end_until_close_io() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let last = CancellationToken::new();
        let mut input = Input::new(streams.claim("a").expect("is free"), last.clone());
        for text in ["before", "after"] {
            let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
            write_while(&mut input, &mut client, text).await;
        }
        let more = timeout(std::time::Duration::from_millis(100), input.next()).await;
        assert!(more.is_err(), "{more:?}");
        last.cancel();
        assert_eq!(soon(input.next()).await, None);
    }

    /// Writes `text` while `input` is read, and sees it arrive.
    async fn write_while(input: &mut Input, client: &mut Link, text: &str) {
        let (got, ()) = tokio::join!(soon(input.next()), write(client, text.as_bytes()));
        assert_eq!(got.as_deref(), Some(text.as_bytes()));
    }
}
