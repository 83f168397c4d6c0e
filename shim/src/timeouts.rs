//! Every deadline of the shim, in one table. An error that comes of one says what was awaited.

use std::time::Duration;

/// From QEMU's start to the agent's first connection. Long, for TCG on a busy machine.
pub const GUEST_BOOT: Duration = Duration::from_mins(1);
/// A preamble, once a connection is accepted.
pub const PREAMBLE: Duration = Duration::from_secs(10);
/// A call of the agent that starts nothing heavy.
pub const AGENT_CALL: Duration = Duration::from_secs(30);
/// `CreateContainer` and `StartProcess` in the guest.
pub const AGENT_CREATE: Duration = Duration::from_mins(1);
/// The guest's side of a stream dials in. It begins before the call that has the guest dial, and so is longer than that may
/// take: a container with a hundredth of a CPU needs half a minute for an exec.
pub const STREAM_DIAL: Duration = Duration::from_mins(2);
/// A forwarded connection is up: the guest has dialled the port, which it tries for five seconds on each of two addresses,
/// and both streams.
pub const FORWARD_OPEN: Duration = Duration::from_secs(20);
/// Silence of the guest (events carry a heartbeat each two seconds) after which it counts as hung.
pub const HEARTBEAT: Duration = Duration::from_secs(30);
/// Output that is still on its way when a process has exited.
pub const DRAIN: Duration = Duration::from_secs(10);
/// containerd opens an output FIFO, which it begins before it asks for the process. Long, for a starved machine; its own
/// shim waits for ever.
pub const FIFO_OPENED: Duration = Duration::from_secs(10);
/// containerd reads what an output FIFO holds, before it is told of the exit.
pub const FIFO_READ: Duration = Duration::from_millis(500);
/// A connection of containerd's says by its first request whether it is a stream, and a stream which one it is.
pub const STREAM_INIT: Duration = Duration::from_secs(10);
/// A containerd that is away opens the streams of a container that has exited, to read the last output before it hears
/// of that.
pub const STREAM_REOPEN: Duration = Duration::from_mins(1);
/// One QMP command.
pub const QMP_COMMAND: Duration = Duration::from_secs(10);
/// A helper (virtiofsd, vsock) listens after its start.
pub const HELPER_READY: Duration = Duration::from_secs(20);
/// A logging binary is ready for the process that it serves. containerd's own shim waits for ever.
pub const LOGGER_READY: Duration = Duration::from_secs(30);
/// A logging binary ends by itself when its streams have ended; with [`LOGGER_TERM`] as long as containerd's own shim waits.
pub const LOGGER_END: Duration = Duration::from_secs(2);
/// A logging binary ends after SIGTERM.
pub const LOGGER_TERM: Duration = Duration::from_secs(10);
/// The guest powers off by itself after Shutdown; then QEMU is killed.
pub const GUEST_SHUTDOWN: Duration = Duration::from_secs(5);
/// A child ends after SIGKILL.
pub const CHILD_EXIT: Duration = Duration::from_secs(5);
/// containerd takes one event.
pub const EVENT_FORWARD: Duration = Duration::from_secs(5);
/// Everything that is asked of the kernel about a pod's network, in one visit of its namespace.
pub const NETWORK: Duration = Duration::from_secs(10);
/// An OCI hook without a `timeout` of its own. runc waits for ever.
pub const HOOK: Duration = Duration::from_mins(1);
/// The guest's farewell and the whole of a teardown, with time to spare.
pub const STOP: Duration = Duration::from_secs(30);
/// The whole of a teardown; containerd gives `delete` five seconds.
pub const TEARDOWN: Duration = Duration::from_secs(4);
/// containerd closes its connections once it has the answer to its shutdown.
pub const HANG_UP: Duration = Duration::from_secs(1);
/// A helper that follows another process's end does so.
pub const HELPER_EXIT: Duration = Duration::from_millis(500);
/// A shim without a task is asked for something: containerd follows `start` by Create and the last Delete by Shutdown at once.
pub const UNCLAIMED: Duration = Duration::from_mins(1);
/// A shim tells the node CLI what it knows.
pub const REPORT: Duration = Duration::from_secs(2);
/// A program that the node CLI asks for its version, or for its configuration, answers.
pub const PROGRAM_ANSWER: Duration = Duration::from_secs(20);
/// A directory of a sandbox is about to get its journal, which a shim writes as soon as it has made the directory.
pub const JOURNAL_BEGINS: Duration = Duration::from_mins(1);
/// A shim answers a Shutdown that `delete` sends it.
pub const DISMISSAL: Duration = Duration::from_millis(500);
