//! One end of a forwarded TCP connection: a socket here, and a framed stream each way to the other end.
//!
//! The shim has the client's socket and the agent the service's; both run [`bridge`]. It keeps what TCP tells apart. The
//! end of one direction is an end frame there and a half-close here, and the other direction goes on. A reset is
//! [`RESET`], behind everything that was received before it; and whatever ends a connection in any other way (a deadline,
//! a lost stream, a guest that dies, a process that is killed) is a reset too, since a socket that was [`arm`]ed is reset
//! by being dropped. A reader is never told that it has everything when it has not.
//!
//! A bridge lasts as long as its connection, which may be for ever, so its waits have no deadlines of their own. What can
//! be seen of a peer that has gone is seen: by keep-alive probes on the socket, by the ends of the streams to the other
//! side.

use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::wire::{Deframer, END, FRAME_HEADER, FrameTooLong, ONE_PACKET, RESET, frame_header};

/// How long a socket that has broken may take to yield what it received before, and to have that sent.
const GRACE: Duration = Duration::from_secs(2);
/// How long the other side may take to receive a reset.
const FAREWELL: Duration = Duration::from_secs(5);
/// A silent peer is probed after this, and given up after three probes.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(15));

/// Why a connection ended by a reset.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// This side's socket.
    #[error("the socket broke: {0}")]
    Socket(io::Error),
    /// The other side's socket.
    #[error("the connection was reset on the other side")]
    Reset,
    /// The other side, or the way to it.
    #[error("a stream ended without its end frame")]
    Lost,
    /// The other side does not keep to the framing.
    #[error(transparent)]
    Frame(FrameTooLong),
}

/// Makes a drop of `socket` a reset, until [`bridge`] has carried the connection to its end; and sets what else it needs.
pub fn arm(socket: &TcpStream) -> io::Result<()> {
    socket.set_zero_linger()?;
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEP_ALIVE.0)?;
    sockopt::set_tcp_keepintvl(socket, KEEP_ALIVE.1)?;
    sockopt::set_tcp_keepcnt(socket, 3)?;
    Ok(())
}

/// Carries what `socket` receives to `outbound` and what comes by `inbound` to `socket`, until both have ended.
///
/// `socket` is [`arm`]ed. On an error it has been reset, and the other side was told if it still could be. Dropping the
/// future resets both sides.
pub async fn bridge<S>(mut socket: TcpStream, inbound: S, outbound: S) -> Result<(), Broken>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut outbound = Outbound { stream: outbound, between_frames: true };
    let mut inbound = Some(inbound);
    let carried = {
        let (mut reader, mut writer) = socket.split();
        let received = Notify::new();
        let sending = async {
            outbound.send_all(&mut reader).await?;
            // Nothing reads the socket any more, so nothing else would notice its end.
            tokio::select! {
                error = broken(reader.as_ref()) => Err(Broken::Socket(error)),
                () = received.notified() => Ok(()),
            }
        };
        let receiving = async {
            if let Some(stream) = &mut inbound {
                receive_all(stream, &mut writer).await?;
            }
            // The close tells the other side that everything has arrived.
            inbound = None;
            received.notify_one();
            Ok(())
        };
        tokio::try_join!(sending, receiving)
    };
    match carried {
        Ok(_) => {
            sockopt::set_socket_linger(&socket, None).map_err(|errno| Broken::Socket(errno.into()))?;
            Ok(())
        }
        Err(cause) => {
            drop(socket);
            if let Broken::Socket(_) = &cause {
                // The inbound stream stays open meanwhile: its close would overtake what is on its way before the reset.
                let told = async { tokio::join!(outbound.reset(), drain(inbound)) };
                drop(timeout(FAREWELL, told).await);
            }
            Err(cause)
        }
    }
}

struct Outbound<S> {
    stream: S,
    /// Not ended, and not inside a frame: [`RESET`] would be understood.
    between_frames: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Outbound<S> {
    /// Sends what the socket receives, then the end, and waits until the other side has taken it.
    async fn send_all(&mut self, reader: &mut ReadHalf<'_>) -> Result<(), Broken> {
        // The header stands before the bytes in one buffer, so that a frame is one write.
        let mut frame = vec![0; FRAME_HEADER + ONE_PACKET];
        loop {
            let count = tokio::select! {
                read = reader.read(&mut frame[FRAME_HEADER..]) => read.map_err(Broken::Socket)?,
                () = closed(&mut self.stream) => return Err(Broken::Lost),
            };
            self.between_frames = false;
            if count == 0 {
                break;
            }
            frame[..FRAME_HEADER].copy_from_slice(&frame_header(count));
            tokio::select! {
                written = self.stream.write_all(&frame[..FRAME_HEADER + count]) => written.map_err(|_| Broken::Lost)?,
                // A service that takes nothing must not hold a client's connection when the client is gone.
                error = async { let error = broken(reader.as_ref()).await; sleep(GRACE).await; error } => {
                    return Err(Broken::Socket(error));
                }
            }
            self.between_frames = true;
        }
        self.stream.write_all(&END).await.map_err(|_| Broken::Lost)?;
        closed(&mut self.stream).await;
        Ok(())
    }

    async fn reset(&mut self) {
        if self.between_frames && self.stream.write_all(&RESET).await.is_ok() {
            closed(&mut self.stream).await;
        }
    }
}

/// Waits for the other side's close. Nothing else may come this way, so whatever comes is as good.
async fn closed(stream: &mut (impl AsyncRead + Unpin)) {
    drop(stream.read(&mut [0]).await);
}

/// Waits for the socket to break, and takes nothing of what it has received. Cancel safe.
async fn broken(socket: &TcpStream) -> io::Error {
    match socket.ready(Interest::ERROR).await {
        Ok(_) => io::ErrorKind::ConnectionReset.into(),
        Err(error) => error,
    }
}

/// Hands the socket what comes, then a half-close.
async fn receive_all(stream: &mut (impl AsyncRead + Unpin), writer: &mut WriteHalf<'_>) -> Result<(), Broken> {
    let mut buffer = vec![0; ONE_PACKET];
    let mut deframer = Deframer::default();
    while !deframer.ended() {
        let count = stream.read(&mut buffer).await.map_err(|_| Broken::Lost)?;
        if count == 0 {
            return Err(Broken::Lost);
        }
        let mut input = &buffer[..count];
        loop {
            match deframer.next(&mut input) {
                Ok(Some(payload)) => match writer.write_all(payload).await {
                    Ok(()) => {}
                    Err(error) => {
                        // What the socket received before it broke is still to be sent; its reader ends the bridge then.
                        sleep(GRACE).await;
                        return Err(Broken::Socket(error));
                    }
                },
                Ok(None) => break,
                Err(error) if error.is_reset() => return Err(Broken::Reset),
                Err(error) => return Err(Broken::Frame(error)),
            }
        }
    }
    writer.shutdown().await.map_err(Broken::Socket)
}

/// Takes what the other side still sends, so that it is not stuck in a write, and closes the stream behind it.
async fn drain(stream: Option<impl AsyncRead + Unpin>) {
    let Some(mut stream) = stream else { return };
    let mut buffer = vec![0; ONE_PACKET];
    let mut deframer = Deframer::default();
    while !deframer.ended() {
        let count = stream.read(&mut buffer).await.unwrap_or(0);
        let mut input = &buffer[..count];
        loop {
            match deframer.next(&mut input) {
                Ok(Some(_)) => {}
                Ok(None) if count > 0 => break,
                Ok(None) | Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::{TcpListener, UnixStream};
    use tokio::task::JoinSet;

    use super::*;

    const SOON: Duration = Duration::from_secs(30);

    /// The two ends of one TCP connection.
    async fn tcp() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listens");
        let address = listener.local_addr().expect("has an address");
        let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (dialled.expect("dials"), accepted.expect("accepts").0)
    }

    /// A client and a service with a whole forwarded connection between them.
    struct Forwarded {
        client: TcpStream,
        service: TcpStream,
        bridges: JoinSet<Result<(), Broken>>,
    }

    async fn forwarded() -> Forwarded {
        let ((client, near), (service, far)) = (tcp().await, tcp().await);
        let (to_far, from_near) = UnixStream::pair().expect("a pair");
        let (to_near, from_far) = UnixStream::pair().expect("a pair");
        arm(&near).expect("arms");
        arm(&far).expect("arms");
        let mut bridges = JoinSet::new();
        bridges.spawn(bridge(near, from_far, to_far));
        bridges.spawn(bridge(far, from_near, to_near));
        Forwarded { client, service, bridges }
    }

    impl Forwarded {
        /// How both bridges ended.
        async fn ends(mut self) -> Vec<Result<(), Broken>> {
            drop((self.client, self.service));
            let mut ends = Vec::new();
            while let Some(end) = timeout(SOON, self.bridges.join_next()).await.expect("ends in time") {
                ends.push(end.expect("does not panic"));
            }
            ends
        }
    }

    async fn read_all(socket: &mut TcpStream) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        timeout(SOON, socket.read_to_end(&mut bytes)).await.expect("ends in time")?;
        Ok(bytes)
    }

    fn noise(length: usize) -> Vec<u8> {
        (0..length as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
    }

    #[tokio::test]
    async fn a_client_that_has_said_everything_still_gets_the_whole_answer() {
        let mut pair = forwarded().await;
        let (question, answer) = (noise(300_000), noise(3_000_000));
        let asking = async {
            pair.client.write_all(&question).await.expect("is taken");
            pair.client.shutdown().await.expect("half-closes");
            read_all(&mut pair.client).await.expect("is whole")
        };
        let answering = async {
            let asked = read_all(&mut pair.service).await.expect("is whole");
            pair.service.write_all(&answer).await.expect("is taken");
            pair.service.shutdown().await.expect("half-closes");
            asked
        };
        let (answered, asked) = tokio::join!(asking, answering);
        assert!(asked == question && answered == answer);
        assert!(pair.ends().await.iter().all(Result::is_ok));
    }

    #[tokio::test]
    async fn a_service_that_has_said_everything_is_still_told_the_rest() {
        let mut pair = forwarded().await;
        pair.service.write_all(b"enough").await.expect("is taken");
        pair.service.shutdown().await.expect("half-closes");
        assert_eq!(read_all(&mut pair.client).await.expect("is whole"), b"enough");
        pair.client.write_all(b"and yet").await.expect("is taken");
        pair.client.shutdown().await.expect("half-closes");
        assert_eq!(read_all(&mut pair.service).await.expect("is whole"), b"and yet");
        assert!(pair.ends().await.iter().all(Result::is_ok));
    }

    #[tokio::test]
    async fn a_reset_arrives_as_a_reset_behind_what_came_before_it() {
        for half_closed in [false, true] {
            let mut pair = forwarded().await;
            if half_closed {
                pair.client.shutdown().await.expect("half-closes");
                assert_eq!(read_all(&mut pair.service).await.expect("ends"), b"");
            }
            pair.service.write_all(b"last words").await.expect("is taken");
            let mut heard = [0; 10];
            pair.client.read_exact(&mut heard).await.expect("is heard");
            pair.service.set_zero_linger().expect("can be reset");
            let Forwarded { mut client, service, bridges } = pair;
            drop(service);
            let error = read_all(&mut client).await.expect_err("is no clean end");
            assert_eq!((&heard, error.kind()), (b"last words", io::ErrorKind::ConnectionReset));
            let (client, service) = (client, tcp().await.0);
            assert!(Forwarded { client, service, bridges }.ends().await.iter().all(Result::is_err));
        }
    }

    #[tokio::test]
    async fn an_early_answer_to_an_upload_is_heard_before_the_reset() {
        let mut pair = forwarded().await;
        // The service answers without reading, and its close with unread bytes is a reset.
        pair.client.write_all(&noise(50_000)).await.expect("is taken");
        pair.service.readable().await.expect("has come");
        pair.service.write_all(b"413").await.expect("is taken");
        drop(pair.service);
        let mut heard = [0; 3];
        timeout(SOON, pair.client.read_exact(&mut heard)).await.expect("in time").expect("is heard");
        assert_eq!(&heard, b"413");
        let ended = read_all(&mut pair.client).await;
        assert!(ended.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset), "{ended:?}");
    }

    #[tokio::test]
    async fn a_client_that_vanishes_frees_a_service_that_does_not_read() {
        let mut pair = forwarded().await;
        let flood = noise(1 << 20);
        let stuck = async { while pair.client.write_all(&flood).await.is_ok() {} };
        assert!(timeout(Duration::from_millis(500), stuck).await.is_err(), "buffers have no end");
        pair.client.set_zero_linger().expect("can be reset");
        let Forwarded { client, service: _unread, mut bridges } = pair;
        drop(client);
        for _ in 0..2 {
            let end = timeout(SOON, bridges.join_next()).await.expect("ends in time").expect("there are two");
            assert!(end.expect("does not panic").is_err());
        }
    }

    #[tokio::test]
    async fn a_lost_stream_is_no_clean_end() {
        let (mut client, near) = tcp().await;
        arm(&near).expect("arms");
        let (to_far, _from_near) = UnixStream::pair().expect("a pair");
        let (mut to_near, from_far) = UnixStream::pair().expect("a pair");
        let mut bridges = JoinSet::new();
        bridges.spawn(bridge(near, from_far, to_far));
        to_near.write_all(&[frame_header(4).as_slice(), b"half"].concat()).await.expect("is taken");
        client.read_exact(&mut [0; 4]).await.expect("is heard");
        drop(to_near);
        let error = read_all(&mut client).await.expect_err("is no clean end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let end = bridges.join_next().await.expect("ends").expect("does not panic");
        assert!(matches!(end, Err(Broken::Lost)), "{end:?}");
    }

    #[tokio::test]
    async fn a_bridge_that_is_dropped_resets_both() {
        let mut pair = forwarded().await;
        pair.bridges.shutdown().await;
        for socket in [&mut pair.client, &mut pair.service] {
            let error = read_all(socket).await.expect_err("is no clean end");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }
}
