//! The guest's end of forwarded connections: dials a port of the pod's loopback for a client of the host.
//!
//! The agent lives in the pod's network namespace, or enters it for the dial: its loopback is the one that the containers
//! listen on. Once a port has answered, a task of its own dials the host's two streams and carries the bytes
//! (`bulkhead_proto::bridge`).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent as api;
use bulkhead_proto::bridge::{arm, bridge};
use bulkhead_proto::wire::{Kind, Token};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;

use crate::error::{During, Error, Result};
use crate::link::Host;
use crate::namespaces::Namespaces;
use crate::pod::Services;

/// Connections at a time. The shim has the same limit; this one holds when the shim has lost count.
const CONNECTIONS: usize = 512;
static PLACES: Semaphore = Semaphore::const_new(CONNECTIONS);

/// Longest wait for a port that neither answers nor refuses, for each of the two addresses.
const DIAL: Duration = Duration::from_secs(5);

/// Where the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    port: u16,
    to_guest: Token,
    from_guest: Token,
}

impl Plan {
    fn parse(request: &api::ForwardRequest) -> Result<Self> {
        let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| Error::invalid(format!("port {} is not one of 1 to 65535", request.port)))?;
        let token = |name: &str, bytes: &[u8]| {
            Token::try_from(bytes)
                .map_err(|_| Error::invalid(format!("{name} token has {} bytes, expected 16", bytes.len())))
        };
        let to_guest = token("to-guest", &request.to_guest_token)?;
        let from_guest = token("from-guest", &request.from_guest_token)?;
        Ok(Self { port, to_guest, from_guest })
    }
}

/// Connects to the port, then carries the connection in a task. Cancel safe: before the answer nothing is left.
pub async fn open(services: &Services, request: &api::ForwardRequest) -> Result<()> {
    let plan = Plan::parse(request)?;
    let full = || Error::exhausted(format!("{CONNECTIONS} connections are forwarded already"));
    let place = PLACES.try_acquire().map_err(|_| full())?;
    let socket = dial(plan.port, services.namespaces()).await?;
    arm(&socket).during(|| "set up a forwarded connection")?;
    let (host, cancel) = (services.host.clone(), services.cancel.clone());
    services.tracker.spawn(async move {
        tokio::select! {
            () = carry(&host, plan, socket) => {}
            () = cancel.cancelled() => {}
        }
        drop(place);
    });
    Ok(())
}

async fn carry(host: &Host, plan: Plan, socket: TcpStream) {
    let streams = tokio::try_join!(host.dial(Kind::Stream, plan.to_guest), host.dial(Kind::Stream, plan.from_guest));
    let (inbound, outbound) = match streams {
        Ok(streams) => streams,
        Err(error) => return tracing::warn!(port = plan.port, %error, "the host does not take a forwarded connection"),
    };
    if let Err(error) = bridge(socket, inbound, outbound).await {
        tracing::debug!(port = plan.port, %error, "a forwarded connection was reset");
    }
}

/// Connects to the port on 127.0.0.1, or else on ::1, as containerd does in a pod of runc's.
async fn dial(port: u16, namespaces: Option<&Arc<Namespaces>>) -> Result<TcpStream> {
    let mut refused = true;
    let mut told = Vec::new();
    for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))] {
        let error = match tokio::time::timeout(DIAL, connect(address, namespaces)).await {
            // A port of the range that the kernel takes source ports from can be dialled from itself.
            Ok(Ok(socket)) if socket.local_addr().ok() == socket.peer_addr().ok() => {
                io::ErrorKind::ConnectionRefused.into()
            }
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
        // Without IPv6 there is no such address.
        refused &= matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::AddrNotAvailable);
        told.push(format!("{address}: {error}"));
    }
    if refused {
        return Err(Error::precondition(format!("nothing listens on port {port} of the pod's loopback")));
    }
    Err(Error::internal(format!("dial the pod's loopback: {}", told.join("; "))))
}

/// A socket is of the network namespace that its maker was in, wherever it is connected from.
async fn connect(address: SocketAddr, namespaces: Option<&Arc<Namespaces>>) -> io::Result<TcpStream> {
    let make = move || if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = match namespaces {
        None => make(),
        Some(namespaces) => namespaces.run(make).await.map_err(io::Error::other)?,
    };
    socket?.connect(address).await
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn request(port: u32, token: usize) -> api::ForwardRequest {
        api::ForwardRequest { port, to_guest_token: vec![1; token], from_guest_token: vec![2; token] }
    }

    #[test]
    fn a_request_names_a_port_and_two_tokens() {
        let plan = Plan::parse(&request(80, 16)).expect("is complete");
        assert_eq!(plan, Plan { port: 80, to_guest: [1; 16], from_guest: [2; 16] });
        for (request, said) in [
            (request(0, 16), "port 0 is not one of 1 to 65535"),
            (request(65_536, 16), "port 65536 is not one of 1 to 65535"),
            (request(80, 3), "to-guest token has 3 bytes, expected 16"),
        ] {
            assert_eq!(Plan::parse(&request).expect_err("is refused").to_string(), said);
        }
    }

    #[tokio::test]
    async fn either_loopback_is_dialled_and_silence_is_refused() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0"] {
            let Ok(listener) = TcpListener::bind(address).await else {
                println!("skipped: no {address} here");
                continue;
            };
            let port = listener.local_addr().expect("has an address").port();
            dial(port, None).await.expect(address);
            drop(listener);
            // A child that another test is starting has a copy of the listener until it executes its program.
            let silent = async {
                loop {
                    if let Err(error) = dial(port, None).await {
                        return error;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let error = tokio::time::timeout(Duration::from_secs(10), silent).await.expect("nothing listens");
            assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
            assert_eq!(error.to_string(), format!("nothing listens on port {port} of the pod's loopback"));
        }
    }
}
