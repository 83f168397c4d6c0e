//! Devices that a spec gives to a container.
//!
//! The guest has a kernel and devices of its own. Of the host's character devices, a container can have those that are the
//! kernel's doing and have the same numbers everywhere (<https://docs.kernel.org/admin-guide/devices.html>): the guest's take
//! their place. Any other is refused, since a program that was promised a device would fail later and say less. Block devices
//! become disks of the VM, with numbers of their own there ([`crate::storage::block_volume`]).

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::storage::block_volume::BlockVolume;

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

/// Permission bits of a node whose spec names none, as runc has it.
const FILE_MODE: u64 = 0o666;

/// What is no longer among a spec's devices.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Taken {
    /// Block devices of the host.
    pub block_volumes: Vec<BlockVolume>,
    /// Something was left out that the guest cannot have.
    pub left_out: bool,
}

/// Leaves of `linux.devices` what the guest has, and takes the block devices.
///
/// Where every device is allowed, all of the host's may be in the spec without anybody's asking for a certain one
/// (`privileged`): what the guest cannot have is left out. Elsewhere it is an error that names it.
pub(super) fn take(linux: &mut Map<String, Value>) -> Result<Taken> {
    let rules = linux.get("resources").and_then(|resources| resources.get("devices")).and_then(Value::as_array);
    let rules = rules.cloned().unwrap_or_default();
    let among_all = rules.iter().any(allows_all);
    let mut taken = Taken::default();
    let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) else { return Ok(taken) };
    for device in std::mem::take(devices) {
        if is_in_guest(&device) {
            devices.push(device);
        } else if named(&device).0 == "b" {
            let volume = block_volume(&device, &rules, among_all)?;
            // Of two nodes at one path the first counts, as with runc.
            if taken.block_volumes.iter().all(|other| other.path != volume.path) {
                taken.block_volumes.push(volume);
            }
        } else if among_all {
            taken.left_out = true;
        } else {
            return Err(refused(&device));
        }
    }
    Ok(taken)
}

/// Whether a device or a rule names one device that the guest has.
pub(super) fn is_in_guest(device: &Value) -> bool {
    let (kind, major, minor) = named(device);
    matches!(kind, "c" | "u") && IN_GUEST.iter().any(|(_, m, n)| (Some(*m), Some(*n)) == (major, minor))
}

fn allows_all(rule: &Value) -> bool {
    let (kind, major, minor) = named(rule);
    allows(rule) && matches!(kind, "" | "a") && major.is_none() && minor.is_none()
}

fn allows(rule: &Value) -> bool {
    rule.get("allow").and_then(Value::as_bool) == Some(true)
}

fn named(device: &Value) -> (&str, Option<i64>, Option<i64>) {
    let number = |key| device.get(key).and_then(Value::as_i64);
    (device.get("type").and_then(Value::as_str).unwrap_or_default(), number("major"), number("minor"))
}

fn block_volume(device: &Value, rules: &[Value], among_all: bool) -> Result<BlockVolume> {
    let number = |key| device.get(key).and_then(Value::as_u64);
    let small = |number: u64| u32::try_from(number).ok();
    let path = device.get("path").and_then(Value::as_str).unwrap_or_default();
    let (Some(major), Some(minor)) = (number("major").and_then(small), number("minor").and_then(small)) else {
        return Err(Error::invalid(format!("device {path:?} in linux.devices has no major and minor number")));
    };
    let owner = |key| number(key).and_then(small).unwrap_or(0);
    Ok(BlockVolume {
        path: path.to_owned(),
        major,
        minor,
        file_mode: (number("fileMode").unwrap_or(FILE_MODE) & 0o7777) as u32,
        uid: owner("uid"),
        gid: owner("gid"),
        access: access(rules, major, minor),
        among_all,
    })
}

/// What `rules` let a container do with a block device, as letters of `rwm`: of the rules that say something about one of them,
/// the last counts.
fn access(rules: &[Value], major: u32, minor: u32) -> String {
    let decides = |rule: &&Value, letter: char| {
        let (kind, rule_major, rule_minor) = named(rule);
        let is = |given: Option<i64>, number: u32| given.is_none_or(|given| given < 0 || given == i64::from(number));
        let letters = rule.get("access").and_then(Value::as_str).filter(|letters| !letters.is_empty());
        matches!(kind, "" | "a" | "b")
            && is(rule_major, major)
            && is(rule_minor, minor)
            && letters.is_none_or(|letters| letters.contains(letter))
    };
    "rwm".chars().filter(|&letter| rules.iter().rfind(|rule| decides(rule, letter)).is_some_and(allows)).collect()
}

fn refused(device: &Value) -> Error {
    let (kind, major, minor) = named(device);
    let path = device.get("path").and_then(Value::as_str).unwrap_or_default();
    Error::invalid(format!(
        "device {path:?} ({kind} {}:{}) of the host is not available in the guest, expected a block device or one of {}",
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

    fn nothing_allowed() -> Value {
        json!([{"allow": false, "access": "rwm"}])
    }

    fn fuse() -> Value {
        json!({"path": "/dev/my-fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 432})
    }

    fn memory() -> Value {
        json!({"path": "/dev/memory", "type": "c", "major": 1, "minor": 1})
    }

    fn disk() -> Value {
        json!({"path": "/dev/data", "type": "b", "major": 10, "minor": 229, "fileMode": 432, "uid": 0, "gid": 6})
    }

    fn volume(access: &str, among_all: bool) -> BlockVolume {
        BlockVolume {
            path: "/dev/data".into(),
            major: 10,
            minor: 229,
            file_mode: 0o660,
            uid: 0,
            gid: 6,
            access: access.into(),
            among_all,
        }
    }

    #[test]
    fn what_the_guest_has_stays_whatever_its_path() {
        let mut linux = linux(json!([fuse()]), nothing_allowed());
        assert_eq!(take(&mut linux).expect("is fine"), Taken::default());
        assert_eq!(linux["devices"], json!([fuse()]));
    }

    #[test]
    fn what_only_the_host_has_is_refused_by_name() {
        let mut linux = linux(json!([fuse(), disk(), memory()]), nothing_allowed());
        assert_eq!(
            take(&mut linux).expect_err("is refused").to_string(),
            "device \"/dev/memory\" (c 1:1) of the host is not available in the guest, expected a block device or one of \
             /dev/null, /dev/zero, /dev/full, /dev/random, /dev/urandom, /dev/kmsg, /dev/tty, /dev/net/tun, /dev/fuse"
        );
    }

    #[test]
    fn a_fifo_is_refused_by_name() {
        let mut linux = linux(json!([{"path": "/dev/fifo", "type": "p"}]), nothing_allowed());
        let error = take(&mut linux).expect_err("is refused").to_string();
        assert!(error.starts_with("device \"/dev/fifo\" (p 0:0) of the host is not available"), "{error}");
    }

    #[test]
    fn a_block_device_is_taken_with_the_access_that_its_rule_gives() {
        for (letters, access) in [("mrw", "rwm"), ("r", "r"), ("", "rwm")] {
            let rule = json!({"allow": true, "type": "b", "major": 10, "minor": 229, "access": letters});
            let mut linux = linux(json!([disk(), fuse()]), json!([{"allow": false, "access": "rwm"}, rule]));
            let taken = take(&mut linux).expect("is fine");
            assert_eq!(taken, Taken { block_volumes: vec![volume(access, false)], left_out: false });
            assert_eq!(linux["devices"], json!([fuse()]));
        }
    }

    #[test]
    fn the_last_rule_about_a_letter_counts() {
        let rule = |allow: bool, minor: i64, access: &str| json!({"allow": allow, "type": "b", "major": 10, "minor": minor, "access": access});
        for (rules, letters) in [
            (vec![], ""),
            (vec![rule(true, 230, "rwm")], ""),
            (vec![json!({"allow": true, "type": "c", "access": "rwm"})], ""),
            (vec![json!({"allow": true, "type": "b", "major": 10, "access": "rm"})], "rm"),
            (vec![rule(true, -1, "rwm"), rule(false, 229, "w")], "rm"),
            (vec![rule(false, 229, "w"), rule(true, 229, "r"), rule(true, 229, "w")], "rw"),
        ] {
            assert_eq!(access(&rules, 10, 229), letters, "{rules:?}");
        }
    }

    #[test]
    fn a_privileged_container_goes_without_the_host_s_devices_but_may_have_asked_for_disks() {
        let mut linux = linux(json!([disk(), memory(), fuse()]), json!([{"allow": true, "access": "rwm"}]));
        let taken = take(&mut linux).expect("is fine");
        assert_eq!(taken, Taken { block_volumes: vec![volume("rwm", true)], left_out: true });
        assert_eq!(linux["devices"], json!([fuse()]));
    }

    #[test]
    fn of_two_nodes_at_one_path_the_first_counts() {
        let other = json!({"path": "/dev/data", "type": "b", "major": 8, "minor": 0});
        let taken = take(&mut linux(json!([disk(), other]), nothing_allowed())).expect("is fine");
        assert_eq!(taken.block_volumes, [volume("", false)]);
    }

    #[test]
    fn a_node_is_as_runc_makes_it_unless_its_spec_says_otherwise() {
        let device = json!({"path": "/dev/data", "type": "b", "major": 8, "minor": 0});
        let taken = take(&mut linux(json!([device]), nothing_allowed())).expect("is fine");
        let BlockVolume { file_mode, uid, gid, .. } = taken.block_volumes[0];
        assert_eq!((file_mode, uid, gid), (0o666, 0, 0));
        let device = json!({"path": "/dev/data", "type": "b", "major": 8});
        let error = take(&mut linux(json!([device]), nothing_allowed())).expect_err("is refused");
        assert_eq!(error.to_string(), "device \"/dev/data\" in linux.devices has no major and minor number");
    }

    #[test]
    fn a_spec_without_devices_has_none_left_out() {
        assert_eq!(take(&mut Map::new()).expect("is fine"), Taken::default());
    }
}
