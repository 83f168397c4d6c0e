//! containerd's streaming IO: instead of opening FIFOs, it dials the shim's own socket and opens a ttrpc stream for
//! each of a process's stdin, stdout and stderr (`io_type = "streaming"` of a runtime, with the sandbox API).
//!
//! Create and Exec name a stream by a URI, `ttrpc+unix://SOCKET?streaming_id=ID`, in the place of a FIFO. containerd
//! opens the stream first: for a container when CRI creates it, which may be long before the task; and once more after
//! a restart of containerd, under the same id. So [`Streams`] brings two together that come in any order: whoever
//! *announces* an id, a client, and whoever *claims* it, a process.
//!
//! - A client that nobody claims waits as long as it likes, for it is up to kubelet when a container is started. It
//!   goes with its connection; there are at most [`MAX_WAITING`].
//! - A claim whose client has gone waits for the next one with the same id, until the process is deleted.
//! - A second client with an id takes the place of the first.
//!
//! What a restart of containerd does to output: under runc, with FIFOs, the shim goes on writing until the FIFO is
//! full, then the process waits; the new containerd reads it all. Here nothing is sent without a client, the process
//! waits when its pipe and the way to the host are full, and the new stream goes on with the first byte that was not
//! sent. What *was* sent, and not yet read by the containerd that died, is lost: at most the two windows that it
//! allows, and nothing when its reader was idle. Nobody can tell what it has read of those, and a line that comes twice
//! would be no better.
//!
//! <https://github.com/containerd/containerd/blob/main/internal/cri/io/streaming.go>

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

pub use self::link::Link;
use self::link::Said;
use crate::error::{Error, Result};
use crate::timeouts;

pub(super) mod input;
mod link;
pub(super) mod output;

/// Clients whose id no process has claimed, at most. A container has three, from its creation by CRI to its start.
const MAX_WAITING: usize = 512;

/// Bytes of an id at most; containerd's are an id of a container or exec, and a word.
const MAX_ID: usize = 256;

/// The only kind of address that is ours.
const SCHEME: &str = "ttrpc+unix";

/// Where clients and processes find each other. Clones reach the same one.
#[derive(Debug, Clone)]
pub struct Streams {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket_path: PathBuf,
    entries: Mutex<HashMap<String, Entry>>,
}

#[derive(Debug)]
enum Entry {
    /// A client waits to be told where its link goes.
    Waiting(oneshot::Sender<Arc<Slot>>),
    /// A process has it.
    Claimed(Arc<Slot>),
}

/// Where a client leaves its link.
#[derive(Debug, Default)]
struct Slot {
    link: Mutex<Option<Link>>,
    left: Notify,
}

/// A process's right to an id: the links that come under it are its own. Dropping it gives the id up.
#[derive(Debug)]
pub(super) struct Claim {
    id: String,
    slot: Arc<Slot>,
    shared: Arc<Shared>,
}

/// A client's place in the table.
#[derive(Debug)]
enum Place {
    Waiting(Waiting),
    Claimed(Arc<Slot>),
}

/// Dropping it makes room, unless a later client has taken the place.
#[derive(Debug)]
struct Waiting {
    id: String,
    slot: oneshot::Receiver<Arc<Slot>>,
    shared: Arc<Shared>,
}

impl Streams {
    /// The streams of the shim that listens at `socket_path`.
    pub fn new(socket_path: PathBuf) -> Self {
        Self { shared: Arc::new(Shared { socket_path, entries: Mutex::default() }) }
    }

    /// Serves a client: learns the id, answers, and hands `link` over to the process that claims it. Returns when that
    /// has happened or the client has gone.
    pub async fn receive(&self, mut link: Link) {
        let id = match timeout(timeouts::STREAM_INIT, link.next()).await {
            Ok(Ok(Said::Init(id))) => id,
            Ok(Ok(_)) => return refuse(link, Error::invalid("the first message of a stream is no StreamInit")).await,
            Ok(Err(error)) => return tracing::debug!(%error, "a stream of containerd's ended before its StreamInit"),
            Err(_elapsed) => return tracing::warn!("a stream of containerd's sent no StreamInit in time"),
        };
        let place = match self.announce(&id) {
            Ok(place) => place,
            Err(error) => return refuse(link, error).await,
        };
        match timeout(timeouts::STREAM_INIT, link.acknowledge()).await {
            Ok(Ok(())) => tracing::debug!(id, "containerd opens a stream"),
            _ => return tracing::debug!(id, "a stream of containerd's ended before it was answered"),
        }
        match place {
            Place::Claimed(slot) => slot.leave(link),
            Place::Waiting(mut waiting) => {
                tokio::select! {
                    biased;
                    slot = &mut waiting.slot => match slot {
                        Ok(slot) => slot.leave(link),
                        Err(_) => tracing::debug!(id, "a stream of containerd's is replaced by a later one"),
                    },
                    () = hung_up(&mut link) => tracing::debug!(id, "a stream that no process claimed is closed"),
                }
            }
        }
    }

    fn announce(&self, id: &str) -> Result<Place> {
        if id.is_empty() || id.len() > MAX_ID {
            return Err(Error::invalid(format!("the id of a stream has {} bytes, expected 1 to {MAX_ID}", id.len())));
        }
        let mut entries = self.shared.entries();
        if let Some(Entry::Claimed(slot)) = entries.get(id) {
            return Ok(Place::Claimed(slot.clone()));
        }
        let waiting = entries.values().filter(|entry| matches!(entry, Entry::Waiting(_))).count();
        if waiting >= MAX_WAITING {
            return Err(Error::unavailable(format!(
                "{waiting} streams wait for their process, there may not be more of them"
            )));
        }
        let (sender, slot) = oneshot::channel();
        entries.insert(id.to_owned(), Entry::Waiting(sender));
        Ok(Place::Waiting(Waiting { id: id.to_owned(), slot, shared: self.shared.clone() }))
    }

    /// Claims the stream that `uri` names, of which `scheme` and `rest` are what stands before and behind `://`.
    ///
    /// None: it is a URI of another kind. Errors name what is wrong with it.
    pub(super) fn claim_uri(&self, scheme: &str, rest: &str) -> Result<Option<Claim>> {
        if scheme != SCHEME {
            return Ok(None);
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let own = &self.shared.socket_path;
        if own.as_path() != std::path::Path::new(path) {
            return Err(Error::invalid(format!(
                "stream at {scheme}://{path} is not served here, expected {scheme}://{}",
                own.display()
            )));
        }
        let id = form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == "streaming_id").map(|(_, id)| id);
        match id {
            Some(id) if !id.is_empty() => self.claim(&id).map(Some),
            _ => Err(Error::invalid(format!(
                "stream at {scheme}://{path} has no streaming_id, expected ?streaming_id=ID"
            ))),
        }
    }

    fn claim(&self, id: &str) -> Result<Claim> {
        let mut entries = self.shared.entries();
        if let Some(Entry::Claimed(_)) = entries.get(id) {
            return Err(Error::invalid(format!("stream {id} is another process's already")));
        }
        let slot = Arc::new(Slot::default());
        if let Some(Entry::Waiting(client)) = entries.insert(id.to_owned(), Entry::Claimed(slot.clone())) {
            // The client may have gone this moment; then the next one is awaited.
            drop(client.send(slot.clone()));
        }
        Ok(Claim { id: id.to_owned(), slot, shared: self.shared.clone() })
    }
}

/// Tells a client why not, if it still listens.
async fn refuse(mut link: Link, error: Error) {
    tracing::warn!(%error, "a stream of containerd's is refused");
    let code = match error.kind() {
        crate::error::Kind::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        _ => ttrpc::Code::RESOURCE_EXHAUSTED,
    };
    drop(timeout(timeouts::STREAM_INIT, link.refuse(code, error.to_string())).await);
}

/// Returns when the client has gone, or says what it must not yet: a reader's allowance is all that may come so early.
async fn hung_up(link: &mut Link) {
    while let Ok(Said::Credit) = link.next().await {}
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Every change of the map is one call, so a panic elsewhere cannot have left it half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Takes the place of a link that nobody has fetched.
    fn leave(&self, link: Link) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link);
        self.left.notify_one();
    }

    fn fetch(&self) -> Option<Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Claim {
    /// A link that has come since the last one.
    fn fetch(&self) -> Option<Link> {
        self.slot.fetch()
    }

    /// The next link, however long it takes. Cancel safe.
    async fn next(&self) -> Link {
        loop {
            // A link that was fetched in another way has left its notice behind.
            if let Some(link) = self.slot.fetch() {
                return link;
            }
            self.slot.left.notified().await;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.entries().remove(&self.id);
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.slot.close();
        let mut entries = self.shared.entries();
        if let Some(Entry::Waiting(sender)) = entries.get(&self.id)
            && sender.is_closed()
        {
            entries.remove(&self.id);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use tokio::task::JoinSet;

    use super::*;

    pub const PATIENCE: Duration = Duration::from_secs(10);

    pub fn streams() -> Streams {
        Streams::new("/run/s/x".into())
    }

    /// Opens stream `id` as containerd does; returns the client's end once it was answered, or the refusal.
    pub async fn dial(streams: &Streams, serving: &mut JoinSet<()>, id: &str) -> std::io::Result<Link> {
        // No sockets: a child that another test is starting has copies of them, and keeps open what was dropped here.
        let (ours, theirs) = tokio::io::duplex(256 * 1024);
        let streams = streams.clone();
        serving.spawn(async move { streams.receive(Link::new(Box::new(ours), 1)).await });
        let mut client = Link::new(Box::new(theirs), 1);
        client.send_init(id).await?;
        client.opened().await?;
        Ok(client)
    }

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        timeout(PATIENCE, what).await.expect("in time")
    }

    fn waiting(streams: &Streams) -> usize {
        streams.shared.entries().len()
    }

    #[tokio::test]
    async fn client_and_process_meet_whoever_comes_first() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let _early = dial(&streams, &mut serving, "a-stdout").await.expect("is answered");
        let claim = streams.claim("a-stdout").expect("is free");
        soon(claim.next()).await;
        let late = streams.claim("a-stderr").expect("is free");
        let _client = dial(&streams, &mut serving, "a-stderr").await.expect("is answered");
        soon(late.next()).await;
        drop((claim, late));
        assert_eq!(waiting(&streams), 0, "ids are free again");
    }

    #[tokio::test]
    async fn a_second_client_takes_the_place_of_the_first() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let mut first = dial(&streams, &mut serving, "a").await.expect("is answered");
        let mut second = dial(&streams, &mut serving, "a").await.expect("is answered");
        soon(first.next()).await.expect_err("is closed");
        let claim = streams.claim("a").expect("is free");
        let mut link = soon(claim.next()).await;
        link.send_close().await.expect("sends");
        assert_eq!(soon(second.next()).await.expect("is open"), Said::Closed);
        // And so it is once there is a process.
        let mut third = dial(&streams, &mut serving, "a").await.expect("is answered");
        soon(claim.next()).await.send_close().await.expect("sends");
        assert_eq!(soon(third.next()).await.expect("is open"), Said::Closed);
    }

    #[tokio::test]
    async fn a_client_that_goes_before_it_is_claimed_leaves_nothing() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let mut client = dial(&streams, &mut serving, "a").await.expect("is answered");
        // A reader allows its first window at once.
        client.allow_window().await.expect("sends");
        drop(client);
        soon(serving.join_next()).await.expect("was served").expect("in peace");
        assert_eq!(waiting(&streams), 0);
    }

    #[tokio::test]
    async fn only_so_many_clients_may_wait() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        let _places: Vec<_> = (0..MAX_WAITING).map(|n| streams.announce(&format!("{n}")).expect("has room")).collect();
        let refused = dial(&streams, &mut serving, "more").await.expect_err("is refused");
        assert!(refused.to_string().contains("512 streams wait for their process"), "{refused}");
        let _claim = streams.claim("other").expect("is free");
        dial(&streams, &mut serving, "other").await.expect("a claimed one needs no room");
    }

    #[tokio::test]
    async fn ids_that_are_no_ids_are_refused() {
        let (streams, mut serving) = (streams(), JoinSet::new());
        for id in [String::new(), "x".repeat(MAX_ID + 1)] {
            let refused = dial(&streams, &mut serving, &id).await.expect_err("is refused");
            assert!(refused.to_string().contains("expected 1 to 256"), "{refused}");
        }
        let _claim = streams.claim("a").expect("is free");
        assert_eq!(streams.claim("a").expect_err("is taken").to_string(), "stream a is another process's already");
    }

    #[test]
    fn uris_name_this_shim_and_an_id() {
        let streams = streams();
        let claim = |rest| streams.claim_uri(SCHEME, rest);
        assert_eq!(claim("/run/s/x?streaming_id=a-stdin").expect("is ours").expect("is one").id, "a-stdin");
        assert!(streams.claim_uri("grpc+vsock", "3:1024?streaming_id=a").expect("is nobody's").is_none());
        let refused = |rest| claim(rest).expect_err("is refused").to_string();
        assert_eq!(
            refused("/run/s/y?streaming_id=a"),
            "stream at ttrpc+unix:///run/s/y is not served here, expected ttrpc+unix:///run/s/x"
        );
        assert_eq!(
            refused("/run/s/x?stream_id=a"),
            "stream at ttrpc+unix:///run/s/x has no streaming_id, expected ?streaming_id=ID"
        );
    }
}
