//! QMP events that somebody waits for.
//!
//! <https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html>

use serde_json::Value;

/// An asynchronous message of QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// `SHUTDOWN`: the machine has stopped, or would have been reset (`-no-reboot`).
    Shutdown {
        /// The guest asked for it, rather than the host.
        guest: bool,
        /// A `ShutdownCause`, such as `guest-shutdown`, `guest-reset`, `guest-panic`, `host-qmp-quit`.
        reason: String,
    },
    /// `DEVICE_DELETED`: a device is gone. Parts of a device come without an id and are not reported.
    DeviceDeleted {
        /// As in `device_add`.
        device: String,
    },
    /// `GUEST_PANICKED`, told by a pvpanic device.
    GuestPanicked,
    /// `BLOCK_IO_ERROR`: a read or write of the guest failed on the host.
    BlockIoError {
        /// Name of the block node.
        node_name: String,
        /// Text of the error.
        reason: String,
    },
    /// Any other, by its name.
    Other(String),
}

impl Event {
    /// The event of a QMP message, if it is one.
    pub fn parse(message: &Value) -> Option<Self> {
        let name = message.get("event")?.as_str()?;
        let data = message.get("data").unwrap_or(&Value::Null);
        let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Some(match name {
            "SHUTDOWN" => Self::Shutdown {
                guest: data.get("guest").and_then(Value::as_bool).unwrap_or_default(),
                reason: text("reason"),
            },
            "DEVICE_DELETED" if data.get("device").is_some() => Self::DeviceDeleted { device: text("device") },
            "GUEST_PANICKED" => Self::GuestPanicked,
            "BLOCK_IO_ERROR" => Self::BlockIoError { node_name: text("node-name"), reason: text("reason") },
            other => Self::Other(other.to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_are_told_from_answers_and_from_each_other() {
        let parse = |message: Value| Event::parse(&message);
        assert_eq!(parse(json!({"return": {}, "id": 1})), None);
        assert_eq!(
            parse(json!({"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}})),
            Some(Event::Shutdown { guest: true, reason: "guest-reset".into() })
        );
        assert_eq!(
            parse(json!({"event": "DEVICE_DELETED", "data": {"device": "disk-0", "path": "/x"}})),
            Some(Event::DeviceDeleted { device: "disk-0".into() })
        );
        assert_eq!(
            parse(json!({"event": "DEVICE_DELETED", "data": {"path": "/x/virtio-backend"}})),
            Some(Event::Other("DEVICE_DELETED".into()))
        );
        assert_eq!(parse(json!({"event": "RTC_CHANGE"})), Some(Event::Other("RTC_CHANGE".into())));
    }
}
