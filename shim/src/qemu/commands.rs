//! The QMP commands in use, each named and shaped as in QEMU's QAPI schema.
//!
//! <https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html>

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A QMP command: its arguments are the fields.
pub trait Command: Serialize {
    /// What `execute` says.
    const NAME: &'static str;
    /// What `return` holds.
    type Return: DeserializeOwned;
}

/// A `return` without content: `{}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Empty {}

/// Ends capabilities negotiation.
#[derive(Debug, Serialize)]
pub struct QmpCapabilities {}

impl Command for QmpCapabilities {
    const NAME: &'static str = "qmp_capabilities";
    type Return = Empty;
}

/// Asks what the virtual machine does.
#[derive(Debug, Serialize)]
pub struct QueryStatus {}

/// Answer of [`QueryStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct StatusInfo {
    /// Whether the vCPUs run.
    pub running: bool,
    /// A `RunState`, such as `running`, `paused`, `shutdown`, `guest-panicked`.
    pub status: String,
}

impl Command for QueryStatus {
    const NAME: &'static str = "query-status";
    type Return = StatusInfo;
}

/// Stops all vCPUs.
#[derive(Debug, Serialize)]
pub struct Stop {}

impl Command for Stop {
    const NAME: &'static str = "stop";
    type Return = Empty;
}

/// Lets the vCPUs run again.
#[derive(Debug, Serialize)]
pub struct Cont {}

impl Command for Cont {
    const NAME: &'static str = "cont";
    type Return = Empty;
}

/// Ends QEMU, in order.
#[derive(Debug, Serialize)]
pub struct Quit {}

impl Command for Quit {
    const NAME: &'static str = "quit";
    type Return = Empty;
}

/// Adds a device; the properties are those of `-device`.
#[derive(Debug, Serialize)]
pub struct DeviceAdd {
    /// Name of the device's type.
    pub driver: String,
    /// Name of this one.
    pub id: String,
    /// Everything else.
    #[serde(flatten)]
    pub properties: Map<String, Value>,
}

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Return = Empty;
}

/// Asks for the removal of a device; it is gone at `DEVICE_DELETED`.
#[derive(Debug, Serialize)]
pub struct DeviceDel {
    /// As in [`DeviceAdd`].
    pub id: String,
}

impl Command for DeviceDel {
    const NAME: &'static str = "device_del";
    type Return = Empty;
}

/// Adds a block node; `options` are a `BlockdevOptions`.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd {
    /// With `driver` and `node-name`.
    pub options: Value,
}

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Return = Empty;
}

/// Removes a block node that nothing uses.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel {
    /// As in [`BlockdevAdd`].
    pub node_name: String,
}

impl Command for BlockdevDel {
    const NAME: &'static str = "blockdev-del";
    type Return = Empty;
}

/// Puts the file that comes with the command into a new set, whose name is `/dev/fdset/<fdset-id>`.
#[derive(Debug, Serialize)]
pub struct AddFd {
    /// Anything, for people.
    pub opaque: String,
}

/// Answer of [`AddFd`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddfdInfo {
    /// Number of the set.
    pub fdset_id: i64,
    /// The file's number in QEMU.
    pub fd: i64,
}

impl Command for AddFd {
    const NAME: &'static str = "add-fd";
    type Return = AddfdInfo;
}

/// Closes the files of a set as soon as nothing uses them.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RemoveFd {
    /// As in [`AddfdInfo`].
    pub fdset_id: i64,
}

impl Command for RemoveFd {
    const NAME: &'static str = "remove-fd";
    type Return = Empty;
}
