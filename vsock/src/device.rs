//! The device: its queues, its connections, and who is served when.
//!
//! The framework's worker thread calls [`VsockDevice::handle_event`] for the guest's notifications and, through one nested
//! epoll, for the sockets. Whatever woke it, everything that can be done is done: packets of the guest's are taken until
//! there are none, then answers and bytes are sent until nothing is left to send or the guest has no buffer, and the guest
//! is notified once for all of it. Connections take turns, one packet each.
//!
//! Bounds against a guest that is hostile: [`MAX_CONNECTIONS`], a receive buffer each ([`connection::BUFFER`]), and
//! [`MAX_REPLIES`] answers that it has no buffers for, beyond which nothing more of it is taken.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_queue::{QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::connection::{Connection, Fate, Ports, Yield};
use crate::packet::{HOST_CID, Header, MAX_PAYLOAD, STREAM, op};

/// Receive, transmit and event queue; the last carries nothing without migration.
const QUEUES: usize = 3;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The event of the sockets; the numbers below are the queues' and the framework's own.
pub const SOCKETS: u16 = QUEUES as u16 + 1;

/// Most descriptors of a queue.
const QUEUE_SIZE: usize = 1024;

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 1024;

/// Most answers that wait for buffers of the guest's.
const MAX_REPLIES: usize = 2 * MAX_CONNECTIONS;

/// The guest frees what it has sent when it is told that it was taken, which costs it an interrupt: it is told of so many
/// packets at a time, a fraction of a queue.
const TOLD_TOGETHER: usize = 16;

/// Of fewer packets it is told after this time, so that it never waits for room in its queue.
const TOLD_AFTER: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 4_000_000 };

// Feature bits (virtio 1.3, section 6).
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Loaded = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// The vsock device of one VM.
#[derive(Debug)]
pub struct VsockDevice {
    guest_cid: u64,
    /// Stem of the sockets that the guest's connections lead to.
    uds_path: PathBuf,
    memory: Option<Memory>,
    event_idx: bool,
    epoll: OwnedFd,
    /// Goes off [`TOLD_AFTER`] a packet that the guest was not told of.
    timer: OwnedFd,
    /// Packets that were taken, and that the guest was not told of. The timer runs while there are any.
    untold: usize,
    connections: HashMap<Ports, Connection>,
    replies: VecDeque<Header>,
    /// Connections that may have bytes for the guest, in the order of their turns.
    turns: VecDeque<Ports>,
    /// Bytes on their way through.
    scratch: Vec<u8>,
}

/// What epoll calls the timer: connections to port 2^32-1, `VMADDR_PORT_ANY`, are refused.
const TIMER: u64 = u64::MAX;

/// Connections are told apart in epoll by their ports.
fn event_data(ports: Ports) -> epoll::EventData {
    epoll::EventData::new_u64(u64::from(ports.0) << 32 | u64::from(ports.1))
}

fn ports_of(data: epoll::EventData) -> Ports {
    let data = data.u64();
    ((data >> 32) as u32, data as u32)
}

impl VsockDevice {
    /// A device for the guest with address `guest_cid`, whose connections to port `P` lead to the Unix socket `<uds_path>_P`.
    pub fn new(guest_cid: u64, uds_path: PathBuf) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        Ok(Self {
            guest_cid,
            uds_path,
            memory: None,
            event_idx: false,
            epoll,
            timer,
            untold: 0,
            connections: HashMap::new(),
            replies: VecDeque::new(),
            turns: VecDeque::new(),
            scratch: vec![0; MAX_PAYLOAD],
        })
    }

    /// What becomes readable when a socket needs service: to be registered for [`SOCKETS`].
    pub fn sockets(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Does all that can be done.
    fn serve(&mut self, vrings: &[VringRwLock]) -> io::Result<()> {
        let Some(memory) = self.memory.as_ref().map(GuestMemoryAtomic::memory) else { return Ok(()) };
        let (Some(receive), Some(transmit)) = (vrings.get(RECEIVE), vrings.get(TRANSMIT)) else { return Ok(()) };
        let mut idle = false;
        loop {
            let taken = self.take_packets(&memory, transmit)?;
            let sent = self.send_packets(&memory, receive)?;
            if taken || sent {
                idle = false;
                continue;
            }
            // The guest may have filled the queue between the last look and the wish to be notified again. Two looks in vain
            // are enough: a guest can claim packets that are none for ever.
            if idle || !transmit.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
            idle = true;
        }
    }

    /// Takes the guest's packets until there are none. True if there was one.
    fn take_packets(&mut self, memory: &Loaded, vring: &VringRwLock) -> io::Result<bool> {
        let mut state = vring.get_mut();
        let before = self.untold;
        while self.replies.len() < MAX_REPLIES {
            let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.clone()) else { break };
            let head = chain.head_index();
            // A chain that is no packet is given back unread: the guest's driver is broken, and nobody else's concern.
            if let Ok(mut reader) = chain.reader(memory) {
                self.take_packet(&mut reader);
            }
            state.add_used(head, 0).map_err(io::Error::other)?;
            self.untold += 1;
        }
        let taken = self.untold > before;
        drop(state);
        if self.untold >= TOLD_TOGETHER {
            self.tell(vring)?;
        } else if taken && before == 0 {
            self.set_timer(TOLD_AFTER)?;
        }
        Ok(taken)
    }

    /// Tells the guest of the packets that were taken.
    fn tell(&mut self, vring: &VringRwLock) -> io::Result<()> {
        if self.untold == 0 {
            return Ok(());
        }
        self.untold = 0;
        self.set_timer(rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })?;
        if !self.event_idx || vring.needs_notification().map_err(io::Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(())
    }

    /// Lets the timer go off once after `time`; zero stops it.
    fn set_timer(&self, time: rustix::event::Timespec) -> io::Result<()> {
        let once = Itimerspec { it_interval: rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: time };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }

    fn take_packet(&mut self, reader: &mut Reader<'_>) {
        let mut bytes = [0; Header::LEN];
        if reader.read_exact(&mut bytes).is_err() {
            return;
        }
        let header = Header::decode(&bytes);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = (header.src_port, header.dst_port);
        if header.kind != STREAM {
            return self.refuse(&header);
        }
        if header.op == op::REQUEST {
            return self.open(ports, &header);
        }
        let Some(connection) = self.connections.get_mut(&ports) else { return self.refuse(&header) };
        connection.learn_credit(&header);
        let fate = match header.op {
            op::RW => {
                let length = header.len as usize;
                match self.scratch.get_mut(..length).map(|payload| reader.read_exact(payload)) {
                    Some(Ok(())) => connection.accept(&self.scratch[..length]),
                    // Longer than any packet may be, or than the chain is.
                    _ => Fate::Broken,
                }
            }
            op::CREDIT_UPDATE => Fate::Kept,
            op::CREDIT_REQUEST => {
                let update = connection.header(op::CREDIT_UPDATE, 0, 0);
                self.replies.push_back(update);
                Fate::Kept
            }
            op::SHUTDOWN => connection.shut_down(header.flags),
            op::RST => {
                self.close(ports);
                return;
            }
            // A response to a request that was never made, or nonsense.
            _ => Fate::Broken,
        };
        self.settle(ports, fate);
    }

    /// Follows up on what was done for a connection: an end, an update that is owed, a turn.
    fn settle(&mut self, ports: Ports, fate: Fate) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        if fate == Fate::Broken {
            let reset = connection.header(op::RST, 0, 0);
            self.replies.push_back(reset);
            return self.close(ports);
        }
        if connection.owes_update() {
            let update = connection.header(op::CREDIT_UPDATE, 0, 0);
            self.replies.push_back(update);
        }
        if connection.may_yield() && !connection.listed {
            connection.listed = true;
            self.turns.push_back(ports);
        }
    }

    /// Answers a packet that belongs to no connection; a reset is never answered.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.replies.push_back(header.reset());
        }
    }

    fn open(&mut self, ports: Ports, request: &Header) {
        if event_data(ports).u64() == TIMER
            || self.connections.contains_key(&ports)
            || self.connections.len() >= MAX_CONNECTIONS
        {
            return self.refuse(request);
        }
        let Ok(stream) = self.dial(ports) else { return self.refuse(request) };
        let mut connection = Connection::new(stream, request);
        self.replies.push_back(connection.header(op::RESPONSE, 0, 0));
        self.connections.insert(ports, connection);
    }

    /// Connects to the host's socket and watches it. Does not block: a listener whose backlog is full refuses.
    fn dial(&self, ports: Ports) -> io::Result<UnixStream> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
        let mut path = self.uds_path.clone().into_os_string();
        path.push(format!("_{}", ports.1));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(&*path)?)?;
        let interest =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, socket.as_fd(), event_data(ports), interest)?;
        Ok(UnixStream::from(socket))
    }

    fn close(&mut self, ports: Ports) {
        // Closing the socket takes it out of the epoll; its turn, if it has one, finds nobody.
        self.connections.remove(&ports);
    }

    /// Sends answers and bytes until there are none or the guest has no buffer. True if something was sent.
    fn send_packets(&mut self, memory: &Loaded, vring: &VringRwLock) -> io::Result<bool> {
        let mut state = vring.get_mut();
        let mut sent = false;
        let mut starved = false;
        while !self.replies.is_empty() || !self.turns.is_empty() {
            let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                // Look once more after asking to be notified, or a buffer that came in between is never seen.
                if !starved && state.get_queue().ready() && state.enable_notification().map_err(io::Error::other)? {
                    starved = true;
                    continue;
                }
                break;
            };
            starved = false;
            let head = chain.head_index();
            let used = match chain.writer(memory) {
                Ok(mut writer) if writer.available_bytes() > Header::LEN => self.send_packet(&mut writer),
                // No buffer of a driver that keeps to the specification.
                _ => Some(0),
            };
            match used {
                Some(length) => {
                    state.add_used(head, length).map_err(io::Error::other)?;
                    sent = true;
                }
                None => state.get_queue_mut().go_to_previous_position(),
            }
        }
        if sent && (!self.event_idx || state.needs_notification().map_err(io::Error::other)?) {
            state.signal_used_queue()?;
        }
        Ok(sent)
    }

    /// Writes the next packet and returns its length; None: there was nothing to send after all.
    fn send_packet(&mut self, writer: &mut Writer<'_>) -> Option<u32> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(put(writer, &reply, &[]));
        }
        while let Some(ports) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else { continue };
            connection.listed = false;
            if !connection.may_yield() {
                continue;
            }
            let room = (writer.available_bytes() - Header::LEN).min(MAX_PAYLOAD);
            match connection.read(&mut self.scratch[..room]) {
                Yield::Bytes(count) => {
                    let header = connection.header(op::RW, count as u32, 0);
                    let used = put(writer, &header, &self.scratch[..count]);
                    self.settle(ports, Fate::Kept);
                    return Some(used);
                }
                Yield::Nothing => {}
                Yield::End => {
                    let end = connection.end();
                    if connection.is_over() {
                        self.close(ports);
                    }
                    return Some(put(writer, &end, &[]));
                }
                Yield::Broken => {
                    let reset = connection.header(op::RST, 0, 0);
                    self.close(ports);
                    return Some(put(writer, &reset, &[]));
                }
            }
        }
        None
    }

    /// Takes note of what happened to the sockets and the timer, and passes on what waited for them.
    fn look_at_sockets(&mut self, transmit: Option<&VringRwLock>) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now)) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                if event.data.u64() == TIMER {
                    transmit.map_or(Ok(()), |vring| self.tell(vring))?;
                    continue;
                }
                let (ports, flags) = (ports_of(event.data), event.flags);
                let Some(connection) = self.connections.get_mut(&ports) else { continue };
                let ends = epoll::EventFlags::HUP | epoll::EventFlags::RDHUP | epoll::EventFlags::ERR;
                connection.readable |= flags.intersects(epoll::EventFlags::IN | ends);
                let mut fate = Fate::Kept;
                if flags.intersects(epoll::EventFlags::OUT | ends) {
                    fate = connection.flush();
                    if connection.is_over() {
                        fate = Fate::Broken;
                    }
                }
                self.settle(ports, fate);
            }
        }
    }
}

/// Fills a buffer of the guest's with a packet; the length of what was written.
fn put(writer: &mut Writer<'_>, header: &Header, payload: &[u8]) -> u32 {
    let written = writer.write_all(&header.encode()).and_then(|()| writer.write_all(payload));
    // The room was measured before; a buffer that fails all the same is used up as an empty one.
    written.map_or(0, |()| (Header::LEN + payload.len()) as u32)
}

impl VhostUserBackendMut for VsockDevice {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.guest_cid.to_le_bytes();
        let begin = (offset as usize).min(config.len());
        let end = (begin + size as usize).min(config.len());
        config[begin..end].to_vec()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        if event == SOCKETS {
            self.look_at_sockets(vrings.get(TRANSMIT))?;
        }
        self.serve(vrings)
    }
}
