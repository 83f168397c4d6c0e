//! Devices that a spec gives to a container.
//!
//! The guest has a kernel and devices of its own. Of the host's, a container can have those that are the kernel's doing and
//! have the same numbers everywhere (<https://docs.kernel.org/admin-guide/devices.html>): the guest's take their place. Any
//! other is refused, since a program that was promised a device would fail later and say less.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Character devices of the guest's kernel: usual path, major and minor number.
const IN_GUEST: [(&str, i64, i64); 9] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/kmsg", 1, 11),
    ("/dev/tty", 5, 0),
    ("/dev/net/tun", 10, 200),
    ("/dev/fuse", 10, 229),
];

/// Leaves of `linux.devices` what the guest has; true if something was left out.
///
/// Where every device is allowed, all of the host's are in the spec and nobody asked for a certain one (`privileged`): the
/// others are left out. Elsewhere one is an error that names it.
pub(super) fn retain(linux: &mut Map<String, Value>) -> Result<bool> {
    let all_allowed = linux
        .get("resources")
        .and_then(|resources| resources.get("devices"))
        .and_then(Value::as_array)
        .is_some_and(|rules| rules.iter().any(allows_all));
    let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) else { return Ok(false) };
    let given = devices.len();
    if !all_allowed && let Some(device) = devices.iter().find(|device| !is_in_guest(device)) {
        return Err(refused(device));
    }
    devices.retain(is_in_guest);
    Ok(devices.len() < given)
}

/// Whether a device or a rule names one device that the guest has.
pub(super) fn is_in_guest(device: &Value) -> bool {
    let (kind, major, minor) = named(device);
    matches!(kind, "c" | "u") && IN_GUEST.iter().any(|(_, m, n)| (Some(*m), Some(*n)) == (major, minor))
}

fn allows_all(rule: &Value) -> bool {
    let (kind, major, minor) = named(rule);
    let allow = rule.get("allow").and_then(Value::as_bool) == Some(true);
    allow && matches!(kind, "" | "a") && major.is_none() && minor.is_none()
}

fn named(device: &Value) -> (&str, Option<i64>, Option<i64>) {
    let number = |key| device.get(key).and_then(Value::as_i64);
    (device.get("type").and_then(Value::as_str).unwrap_or_default(), number("major"), number("minor"))
}

fn refused(device: &Value) -> Error {
    let (kind, major, minor) = named(device);
    let path = device.get("path").and_then(Value::as_str).unwrap_or_default();
    Error::invalid(format!(
        "device {path:?} ({kind} {}:{}) of the host is not available in the guest, expected one of {}",
        major.unwrap_or_default(),
        minor.unwrap_or_default(),
        IN_GUEST.map(|(path, ..)| path).join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn linux(devices: Value, rules: Value) -> Map<String, Value> {
        let linux = json!({"devices": devices, "resources": {"devices": rules}});
        linux.as_object().expect("is an object").clone()
    }

    fn fuse() -> Value {
        json!({"path": "/dev/my-fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 432})
    }

    fn disk() -> Value {
        json!({"path": "/dev/vda", "type": "b", "major": 10, "minor": 229})
    }

    #[test]
    fn what_the_guest_has_stays_whatever_its_path() {
        let mut linux = linux(json!([fuse()]), json!([{"allow": false, "access": "rwm"}]));
        assert!(!retain(&mut linux).expect("is fine"));
        assert_eq!(linux["devices"], json!([fuse()]));
    }

    #[test]
    fn what_only_the_host_has_is_refused_by_name() {
        let mut linux = linux(json!([fuse(), disk()]), json!([{"allow": false, "access": "rwm"}]));
        assert_eq!(
            retain(&mut linux).expect_err("is refused").to_string(),
            "device \"/dev/vda\" (b 10:229) of the host is not available in the guest, expected one of /dev/null, \
             /dev/zero, /dev/full, /dev/random, /dev/urandom, /dev/kmsg, /dev/tty, /dev/net/tun, /dev/fuse"
        );
    }

    #[test]
    fn a_privileged_container_goes_without_the_host_s_devices() {
        let mut linux = linux(json!([disk(), fuse()]), json!([{"allow": true, "access": "rwm"}]));
        assert!(retain(&mut linux).expect("is fine"));
        assert_eq!(linux["devices"], json!([fuse()]));
    }

    #[test]
    fn a_spec_without_devices_has_none_left_out() {
        assert!(!retain(&mut Map::new()).expect("is fine"));
    }
}
