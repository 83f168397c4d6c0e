//! containerd's Streaming service, `containerd.services.streaming.v1.Streaming`, with the one method `Stream`.
//!
//! containerd dials the shim anew for each stream, so a connection is either one stream or carries calls, and its first
//! request says which. Streams go to [`Streams`]; everything else, as if it had not been looked at, to the server of
//! the other services, whose streams would not do ([`crate::container::stdio::streaming::Link`]).

use std::io;
use std::time::Duration;

use bytes::{BufMut as _, Bytes};
use containerd_shim_protos::ttrpc::r#async::transport::{Listener, Socket};
use containerd_shim_protos::ttrpc::proto::{
    Codec as _, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MessageHeader, Request,
};
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::connection::{Connection, Connections};
use crate::container::stdio::streaming::{Link, Streams};
use crate::timeouts;

const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const METHOD: &str = "Stream";

/// A request that opens a stream has two names in it, and now and then some metadata. A longer one is another's.
const MAX_REQUEST: usize = 4096;

/// Connections that wait for the server of the other services to take them.
const QUEUE: usize = 16;

/// How long accepting rests when it has failed, as it does when files have run out.
const BREATH: Duration = Duration::from_millis(100);

/// The task that accepts connections; [`StreamingService::close`] ends it.
#[derive(Debug)]
pub struct StreamingService {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// What a connection turned out to be.
enum First {
    /// A stream of this number.
    Stream(Connection, u32),
    /// Calls.
    Calls(Connection),
    /// It ended before one could tell.
    Nothing,
}

impl StreamingService {
    /// Starts accepting. Connections without a stream come out of the listener that is returned; `connections` counts
    /// all.
    pub fn start(listener: UnixListener, connections: Connections, streams: Streams) -> (Listener, Self) {
        let (calls, queue) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        let accepting = accept_all(listener, connections, streams, calls, stop.clone());
        #[expect(clippy::disallowed_methods, reason = "joined by StreamingService::close")]
        let task = tokio::spawn(accepting);
        (Listener::new(ReceiverStream::new(queue)), Self { stop, task })
    }

    /// Ends the task and every stream that no process has claimed, and waits for that. The server of the other services
    /// must have ended: it does not expect its listener to.
    pub async fn close(self) {
        self.stop.cancel();
        // A panic was reported where it happened; nothing is left to close.
        drop(self.task.await);
    }
}

async fn accept_all(
    listener: UnixListener,
    connections: Connections,
    streams: Streams,
    calls: mpsc::Sender<io::Result<Socket>>,
    stop: CancellationToken,
) {
    let mut serving = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = serving.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    serving.spawn(serve(connections.count(stream), streams.clone(), calls.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection of containerd's has to wait");
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(BREATH) => {}
                    }
                }
            },
        }
    }
    serving.shutdown().await;
}

async fn serve(connection: Connection, streams: Streams, calls: mpsc::Sender<io::Result<Socket>>) {
    match first_request(connection).await {
        First::Stream(connection, stream_id) => streams.receive(Link::new(Box::new(connection), stream_id)).await,
        // An error is a server that has ended, and the connection with it.
        First::Calls(connection) => drop(calls.send(Ok(Socket::new(connection))).await),
        First::Nothing => {}
    }
}

/// Looks at the first request. Who sends none in time will not want a stream: containerd opens one when it has
/// connected.
async fn first_request(mut connection: Connection) -> First {
    let mut read = Vec::new();
    let stream_id = match timeout(timeouts::STREAM_INIT, opens_stream(&mut connection, &mut read)).await {
        Ok(Ok(stream_id)) => stream_id,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a connection of containerd's ended before its first request");
            return First::Nothing;
        }
        Err(_elapsed) => None,
    };
    match stream_id {
        Some(stream_id) => First::Stream(connection, stream_id),
        None => First::Calls(connection.unread(Bytes::from(read))),
    }
}

/// The number of the stream that the first request opens; None if it is another request. `read` is what was read, at
/// every moment. Cancel safe.
async fn opens_stream(connection: &mut Connection, read: &mut Vec<u8>) -> io::Result<Option<u32>> {
    fill(connection, read, MESSAGE_HEADER_LENGTH).await?;
    let header = MessageHeader::from(read.as_slice());
    let length = header.length as usize;
    if header.type_ != MESSAGE_TYPE_REQUEST || length > MAX_REQUEST {
        return Ok(None);
    }
    fill(connection, read, MESSAGE_HEADER_LENGTH + length).await?;
    let request = Request::decode(&read[MESSAGE_HEADER_LENGTH..]).ok();
    let is_stream = request.is_some_and(|request| request.service == SERVICE && request.method == METHOD);
    Ok(is_stream.then_some(header.stream_id))
}

/// Reads until `buffer` has `length` bytes, and not a byte more. Cancel safe.
async fn fill(connection: &mut Connection, buffer: &mut Vec<u8>, length: usize) -> io::Result<()> {
    while buffer.len() < length {
        let missing = length - buffer.len();
        if connection.read_buf(&mut (&mut *buffer).limit(missing)).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::UnixStream;

    use super::*;

    /// A request as Go's client writes it.
    fn request(service: &str, method: &str, payload: &[u8]) -> Vec<u8> {
        let request =
            Request { service: service.into(), method: method.into(), payload: payload.into(), ..Request::default() };
        let bytes = request.encode().expect("encodes");
        let mut header = MessageHeader::new_request(3, bytes.len() as u32);
        header.set_flags(2);
        [Vec::from(header), bytes].concat()
    }

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("makes a pair");
        (Connections::default().count(ours), theirs)
    }

    #[tokio::test]
    async fn a_stream_is_told_by_its_request_and_what_follows_stays() {
        let (connection, mut client) = pair();
        let bytes = [request(SERVICE, METHOD, b""), b"next".to_vec()].concat();
        // However the bytes come.
        client.write_all(&bytes[..15]).await.expect("writes");
        let (first, ()) = tokio::join!(first_request(connection), async {
            tokio::task::yield_now().await;
            client.write_all(&bytes[15..]).await.expect("writes");
        });
        let First::Stream(mut connection, 3) = first else { panic!("is a stream") };
        let mut next = [0; 4];
        connection.read_exact(&mut next).await.expect("reads");
        assert_eq!(&next, b"next");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_stream_is_passed_on_whole() {
        for bytes in [
            request("containerd.task.v3.Task", "Create", &vec![7; MAX_REQUEST]),
            request("containerd.task.v3.Task", "Connect", b"x"),
            request(SERVICE, "Other", b""),
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            // The rest of it does not come in time.
            vec![0, 0],
        ] {
            let (connection, mut client) = pair();
            client.write_all(&bytes).await.expect("writes");
            let First::Calls(mut connection) = first_request(connection).await else { panic!("are calls") };
            client.shutdown().await.expect("closes");
            let mut read = Vec::new();
            connection.read_to_end(&mut read).await.expect("reads");
            assert_eq!(read, bytes);
        }
    }

    #[tokio::test]
    async fn a_connection_without_a_request_is_nothing() {
        let (connection, client) = pair();
        drop(client);
        assert!(matches!(first_request(connection).await, First::Nothing));
    }
}
