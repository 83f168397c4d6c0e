//! Task events on their way to containerd: one queue, in order, nothing lost while containerd restarts.
//!
//! [`EventQueue`] owns the one task that forwards; [`Events`] is what publishers hold. Events leave in the order of
//! [`Events::publish`], one at a time: while containerd is down the head of the queue is tried again and the rest waits
//! behind it. The queue is bounded; what does not fit any more is dropped and counted, since containerd asks `Wait` and
//! `State` for the truth after it was away. An event can arrive twice (containerd took it, the answer was lost), never out of
//! order.
//!
//! CRI-O has no address for events: then they are logged.
//!
//! <https://github.com/containerd/containerd/blob/main/core/runtime/v2/README.md#events>

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use ttrpc::context;

use crate::timeouts;

/// Events that wait at most; a pod with hundreds of execs while containerd restarts stays far below.
const CAPACITY: usize = 4096;

/// Bytes of waiting events at most.
const CAPACITY_BYTES: usize = 4 << 20;

/// Pause before the second try; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// Longest pause between two tries: a containerd that is back gets its events within this.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Tries of an event that containerd answers with an error, as opposed to not answering.
const REFUSALS: u32 = 5;

struct Item {
    size_bytes: usize,
    envelope: Envelope,
}

/// What publishers and the forwarding task share.
#[derive(Debug)]
struct Shared {
    namespace: String,
    /// Events that were queued so far.
    queued: AtomicU64,
    waiting_bytes: AtomicUsize,
    dropped: AtomicU64,
}

/// Publishes events; clones feed the same queue.
#[derive(Debug, Clone)]
pub struct Events {
    queue: mpsc::Sender<Item>,
    shared: Arc<Shared>,
    done: watch::Receiver<u64>,
}

/// Owner of the queue; [`EventQueue::shutdown`] ends it.
#[derive(Debug)]
pub struct EventQueue {
    events: Events,
    stop: CancellationToken,
    forwarder: JoinHandle<()>,
}

impl EventQueue {
    /// Starts forwarding to containerd's ttrpc socket at `address` (a path, or `unix://` and a path).
    ///
    /// `None` or an empty address: events are logged and go nowhere. Needs a tokio runtime.
    pub fn start(address: Option<&str>, namespace: impl Into<String>) -> Self {
        let (queue, waiting) = mpsc::channel(CAPACITY);
        let (done_sender, done) = watch::channel(0);
        let shared = Arc::new(Shared {
            namespace: namespace.into(),
            queued: AtomicU64::new(0),
            waiting_bytes: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
        });
        let stop = CancellationToken::new();
        let sink = match address.filter(|address| !address.is_empty()) {
            Some(address) => Sink::Containerd {
                address: format!("unix://{}", address.strip_prefix("unix://").unwrap_or(address)),
                client: None,
            },
            None => Sink::Log,
        };
        #[expect(clippy::disallowed_methods, reason = "joined by EventQueue::shutdown")]
        let forwarder = tokio::spawn(forward_all(waiting, sink, Arc::clone(&shared), done_sender, stop.clone()));
        Self { events: Events { queue, shared, done }, stop, forwarder }
    }

    /// A publisher.
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Gives waiting events `patience` to leave, then ends and joins the task. Returns whether all left.
    pub async fn shutdown(self, patience: Duration) -> bool {
        let flushed = self.events.flush(patience).await;
        self.stop.cancel();
        if let Err(error) = self.forwarder.await {
            tracing::error!(%error, "event queue failed");
        }
        flushed
    }
}

impl Events {
    /// Queues `event`, one of containerd's `containerd.events` messages, under `topic`. Never blocks.
    pub fn publish<M: Message>(&self, topic: &str, event: &M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(topic, %error, "event cannot be encoded");
                return;
            }
        };
        let size_bytes = value.len();
        let envelope = Envelope {
            timestamp: MessageField::some(Timestamp::now()),
            namespace: self.shared.namespace.clone(),
            topic: topic.to_owned(),
            // Go's typeurl knows these messages by their plain names, without "types.googleapis.com/".
            event: MessageField::some(Any {
                type_url: format!("containerd.events.{}", M::NAME),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        };
        // A permit first: only an event that is certain to be queued is counted, or `flush` would wait for ever.
        let fits = self.shared.waiting_bytes.load(Ordering::Relaxed).saturating_add(size_bytes) <= CAPACITY_BYTES;
        match self.queue.try_reserve() {
            Ok(permit) if fits => {
                self.shared.waiting_bytes.fetch_add(size_bytes, Ordering::Relaxed);
                self.shared.queued.fetch_add(1, Ordering::SeqCst);
                permit.send(Item { size_bytes, envelope });
            }
            _ => {
                let dropped = self.shared.dropped.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::warn!(topic, dropped, "event dropped, the queue is full or closed");
            }
        }
    }

    /// Waits until everything that was published before has left, `patience` at most. Returns whether it has.
    pub async fn flush(&self, patience: Duration) -> bool {
        let queued = self.shared.queued.load(Ordering::SeqCst);
        let mut done = self.done.clone();
        matches!(timeout(patience, done.wait_for(|done| *done >= queued)).await, Ok(Ok(_)))
    }
}

enum Sink {
    Log,
    Containerd { address: String, client: Option<EventsClient> },
}

/// Why an event did not leave.
enum Failure {
    /// Nobody answers: try again until somebody does.
    Away(String),
    /// containerd answered with an error.
    Refused(String),
}

async fn forward_all(
    mut waiting: mpsc::Receiver<Item>,
    mut sink: Sink,
    shared: Arc<Shared>,
    done: watch::Sender<u64>,
    stop: CancellationToken,
) {
    let work = async {
        while let Some(item) = waiting.recv().await {
            forward(&mut sink, item.envelope).await;
            shared.waiting_bytes.fetch_sub(item.size_bytes, Ordering::Relaxed);
            done.send_modify(|done| *done += 1);
        }
    };
    stop.run_until_cancelled(work).await;
}

/// Delivers one event, however long that takes.
async fn forward(sink: &mut Sink, envelope: Envelope) {
    let (address, client) = match sink {
        Sink::Log => {
            tracing::info!(topic = envelope.topic, "event");
            return;
        }
        Sink::Containerd { address, client } => (address, client),
    };
    let topic = envelope.topic.clone();
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
    let mut pause = FIRST_PAUSE;
    let mut refusals = 0;
    let mut tries = 0_u32;
    loop {
        tries += 1;
        let had_connection = client.is_some();
        let error = match try_forward(address, client, &request).await {
            Ok(()) => {
                if tries > 2 {
                    tracing::info!(topic, tries, "event forwarded after failures");
                }
                return;
            }
            Err(Failure::Away(error)) => {
                // The connection of a containerd that restarted meanwhile fails once, and the new one answers at once.
                *client = None;
                if had_connection {
                    continue;
                }
                error
            }
            Err(Failure::Refused(error)) => {
                refusals += 1;
                if refusals == REFUSALS {
                    tracing::error!(topic, error, "event refused by containerd");
                    return;
                }
                error
            }
        };
        tracing::debug!(topic, error, "event not forwarded, trying again");
        sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

async fn try_forward(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> Result<(), Failure> {
    let client = if let Some(client) = client {
        client
    } else {
        let connection = timeout(timeouts::EVENT_FORWARD, Client::connect(address))
            .await
            .map_err(|_| Failure::Away(format!("{address} did not accept a connection")))?
            .map_err(|error| Failure::Away(error.to_string()))?;
        client.insert(EventsClient::new(connection))
    };
    let answer = client.forward(context::with_duration(timeouts::EVENT_FORWARD), request).await;
    match answer {
        Ok(_) => Ok(()),
        Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::UNAVAILABLE => {
            Err(Failure::Refused(format!("{:?}: {}", status.code(), status.message())))
        }
        Err(error) => Err(Failure::Away(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;

    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::TaskStart;
    use containerd_shim_protos::shim_async::{Events as EventsService, create_events};
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Records what it takes; the first `refuse` calls are answered with an error.
    #[derive(Default)]
    struct Containerd {
        taken: Mutex<Vec<Envelope>>,
        refuse: AtomicU32,
    }

    #[async_trait::async_trait]
    impl EventsService for Recorder {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let refuse = self.0.refuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            if refuse.is_ok() {
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, "not today")));
            }
            self.0.taken.lock().expect("is not poisoned").push(request.envelope.unwrap_or_default());
            Ok(Empty::new())
        }
    }

    struct Recorder(Arc<Containerd>);

    impl Containerd {
        async fn listen(self: &Arc<Self>, socket: &Path) -> Server {
            let mut server = Server::new()
                .bind(&format!("unix://{}", socket.display()))
                .expect("binds")
                .register_service(create_events(Arc::new(Recorder(Arc::clone(self)))));
            server.start().await.expect("starts");
            server
        }

        fn taken(&self) -> Vec<String> {
            let envelopes = self.taken.lock().expect("is not poisoned");
            envelopes
                .iter()
                .map(|envelope| {
                    let start = TaskStart::parse_from_bytes(&envelope.event.value).expect("is a TaskStart");
                    start.container_id
                })
                .collect()
        }
    }

    fn start(number: usize) -> TaskStart {
        TaskStart { container_id: number.to_string(), pid: 1, ..TaskStart::default() }
    }

    fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|number| number.to_string()).collect()
    }

    #[tokio::test]
    async fn an_event_carries_namespace_topic_type_and_time() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let socket = dir.path().join("events");
        let containerd = Arc::new(Containerd::default());
        let mut server = containerd.listen(&socket).await;
        // The bare path is what containerd passes in its environment.
        let queue = EventQueue::start(socket.to_str(), "k8s.io");
        queue.events().publish("/tasks/start", &start(7));
        assert!(queue.shutdown(PATIENCE).await);
        let taken = std::mem::take(&mut *containerd.taken.lock().expect("is not poisoned"));
        assert_eq!(taken.len(), 1);
        assert_eq!((&*taken[0].namespace, &*taken[0].topic), ("k8s.io", "/tasks/start"));
        assert_eq!(taken[0].event.type_url, "containerd.events.TaskStart");
        assert!(taken[0].timestamp.seconds > 1_600_000_000);
        server.shutdown().await.expect("shuts down");
    }

    #[tokio::test]
    async fn order_is_kept_and_nothing_lost_across_refusals_and_restarts() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let socket = dir.path().join("events");
        let containerd = Arc::new(Containerd::default());
        let queue = EventQueue::start(socket.to_str(), "ns");
        let events = queue.events();

        // Not there yet.
        for number in 0..10 {
            events.publish("/tasks/start", &start(number));
        }
        assert!(!events.flush(Duration::from_millis(50)).await, "nobody listens");
        containerd.refuse.store(2, Ordering::SeqCst);
        let mut server = containerd.listen(&socket).await;
        assert!(events.flush(PATIENCE).await);
        assert_eq!(containerd.taken(), numbers(0..10));

        // Gone, and back: the connection that the queue holds is dead.
        server.shutdown().await.expect("shuts down");
        drop(server);
        std::fs::remove_file(&socket).expect("removes the socket");
        for number in 10..20 {
            events.publish("/tasks/start", &start(number));
        }
        let mut server = containerd.listen(&socket).await;
        for number in 20..30 {
            events.publish("/tasks/start", &start(number));
        }
        assert!(queue.shutdown(PATIENCE).await);
        assert_eq!(containerd.taken(), numbers(0..30));
        server.shutdown().await.expect("shuts down");
    }

    #[tokio::test]
    async fn an_event_that_is_always_refused_does_not_hold_up_the_next() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let socket = dir.path().join("events");
        let containerd = Arc::new(Containerd::default());
        containerd.refuse.store(REFUSALS, Ordering::SeqCst);
        let mut server = containerd.listen(&socket).await;
        let queue = EventQueue::start(socket.to_str(), "ns");
        queue.events().publish("/tasks/start", &start(0));
        queue.events().publish("/tasks/start", &start(1));
        assert!(queue.shutdown(PATIENCE).await);
        assert_eq!(containerd.taken(), ["1"]);
        server.shutdown().await.expect("shuts down");
    }

    #[tokio::test]
    async fn without_an_address_events_go_to_the_log() {
        for address in [None, Some("")] {
            let queue = EventQueue::start(address, "default");
            queue.events().publish("/tasks/start", &start(0));
            assert!(queue.shutdown(PATIENCE).await);
        }
    }

    #[tokio::test]
    async fn a_full_queue_drops_the_newest_and_never_blocks() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let socket = dir.path().join("events");
        let containerd = Arc::new(Containerd::default());
        let queue = EventQueue::start(socket.to_str(), "ns");
        let events = queue.events();
        for number in 0..CAPACITY + 10 {
            events.publish("/tasks/start", &start(number));
        }
        let dropped = usize::try_from(events.shared.dropped.load(Ordering::Relaxed)).expect("fits");
        assert!((9..=10).contains(&dropped), "{dropped} were dropped");
        let mut server = containerd.listen(&socket).await;
        // Thousands of calls, one after the other.
        assert!(queue.shutdown(3 * PATIENCE).await);
        assert_eq!(containerd.taken(), numbers(0..CAPACITY + 10 - dropped));
        server.shutdown().await.expect("shuts down");
    }

    #[tokio::test]
    async fn shutdown_gives_up_in_time_when_containerd_stays_away() {
        let queue = EventQueue::start(Some("/nonexistent/containerd.sock"), "ns");
        queue.events().publish("/tasks/start", &start(0));
        let begun = std::time::Instant::now();
        assert!(!queue.shutdown(Duration::from_millis(100)).await);
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
