//! The way to the host: every connection is dialled from here and opens with the preamble of `bulkhead_proto::wire`.

use std::io;
use std::time::Duration;

use bulkhead_proto::wire::{Kind, Preamble, Token};
use tokio::io::AsyncWriteExt;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

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
    pub async fn dial(&self, kind: Kind, token: Token) -> io::Result<VsockStream> {
        let dial = async {
            let mut stream = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, self.port)).await?;
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
