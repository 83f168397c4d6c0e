//! Mappings of user and group ids: what a pod's user namespace is, and what an id-mapped mount shows of its files.
//!
//! Parsed from the OCI spec, from CRI and from a snapshotter's options, always into the OCI's own shape. Everything but
//! [`IdMappings::namespace`] is pure.
//!
//! See user_namespaces(7), `mount_setattr(2)`, <https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md#user-namespace-mappings>.

use std::fmt;
use std::fs;
use std::os::fd::OwnedFd;

use rustix::process::{Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Kind, Result, WithKind};
use crate::sys;

/// As many lines as the kernel takes of one map.
const LINES_AT_MOST: usize = 340;

/// A range of ids inside and the range that it stands for outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id inside.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many ids.
    pub size: u32,
}

/// The two maps of a user namespace, neither of them empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMappings {
    /// Of users.
    pub uids: Vec<IdMapping>,
    /// Of groups.
    pub gids: Vec<IdMapping>,
}

impl IdMappings {
    /// The mappings in `object`, an OCI `linux` or a mount, by its `uidMappings` and `gidMappings`; `None` if it has neither.
    ///
    /// `at` is the object's name in the spec, for errors: the empty text, or one that ends in a dot.
    pub fn of_oci(object: &Value, at: &str) -> Result<Option<Self>> {
        let list = |key: &str| -> Result<Vec<IdMapping>> {
            match object.get(key) {
                None | Some(Value::Null) => Ok(Vec::new()),
                Some(list) => Vec::deserialize(list).or_kind(Kind::InvalidArgument, format!("read {at}{key}")),
            }
        };
        Self { uids: list("uidMappings")?, gids: list("gidMappings")? }
            .checked(&format!("{at}uidMappings"), &format!("{at}gidMappings"))
    }

    /// A snapshotter's `uidmap=` and `gidmap=`: lists of `<inside>:<outside>:<size>`; `None` if both are missing.
    pub fn of_mount_options(uidmap: Option<&str>, gidmap: Option<&str>) -> Result<Option<Self>> {
        Self { uids: triples("uidmap", uidmap)?, gids: triples("gidmap", gidmap)? }.checked("uidmap", "gidmap")
    }

    /// `self` if the kernel can take it, `None` if it is empty; `uids` and `gids` name its parts in errors.
    pub fn checked(self, uids: &str, gids: &str) -> Result<Option<Self>> {
        if self.uids.is_empty() && self.gids.is_empty() {
            return Ok(None);
        }
        check(uids, &self.uids)?;
        check(gids, &self.gids)?;
        Ok(Some(self))
    }

    /// `self` if it can be that of a container's user namespace; `uids` and `gids` name its parts in errors.
    pub fn with_root(self, uids: &str, gids: &str) -> Result<Self> {
        for (name, map) in [(uids, &self.uids), (gids, &self.gids)] {
            if !map.iter().any(|mapping| mapping.container_id == 0) {
                return Err(Error::invalid(format!("{name} does not map id 0, by which a container is set up")));
            }
        }
        Ok(self)
    }

    /// A user namespace of the host with these maps, for id-mapped mounts; it goes with its last user. Blocks for a moment.
    ///
    /// Nothing ever runs in it: the process that it takes to make one does nothing, and is gone when this returns.
    pub fn namespace(&self) -> Result<OwnedFd> {
        let (pid, pidfd) =
            sys::idle_in_user_namespace().or_kind(Kind::Internal, "make a user namespace for id-mapped mounts")?;
        let made = || -> Result<OwnedFd> {
            for (file, map) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
                // One write is all that the kernel accepts.
                fs::write(format!("/proc/{pid}/{file}"), lines(map))
                    .or_kind(Kind::Internal, format!("write {file} {:?} of a user namespace", lines(map)))?;
            }
            let namespace = fs::File::open(format!("/proc/{pid}/ns/user"));
            Ok(namespace.or_kind(Kind::Internal, "open a user namespace")?.into())
        };
        let made = made();
        // It is there until it is waited for, and nobody else does.
        rustix::process::pidfd_send_signal(&pidfd, Signal::KILL)
            .and_then(|()| {
                rustix::process::waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)), WaitIdOptions::EXITED)
            })
            .or_kind(Kind::Internal, "end the process of a user namespace")?;
        made
    }
}

impl fmt::Display for IdMappings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let triples = |map: &[IdMapping]| {
            let triple = |mapping: &IdMapping| format!("{}:{}:{}", mapping.container_id, mapping.host_id, mapping.size);
            map.iter().map(triple).collect::<Vec<_>>().join(",")
        };
        write!(f, "users {}, groups {}", triples(&self.uids), triples(&self.gids))
    }
}

/// The map as the kernel reads it, a line each.
fn lines(map: &[IdMapping]) -> String {
    let line = |mapping: &IdMapping| format!("{} {} {}\n", mapping.container_id, mapping.host_id, mapping.size);
    map.iter().map(line).collect()
}

fn triples(key: &str, text: Option<&str>) -> Result<Vec<IdMapping>> {
    let triple = |text: &str| {
        let numbers: Option<Vec<u32>> = text.split(':').map(|number| number.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[container_id, host_id, size]) => Ok(IdMapping { container_id, host_id, size }),
            _ => Err(Error::invalid(format!("{key} {text:?} is not <id inside>:<id outside>:<size>"))),
        }
    };
    text.map_or(Ok(Vec::new()), |text| text.split(',').map(triple).collect())
}

fn check(name: &str, map: &[IdMapping]) -> Result<()> {
    if map.is_empty() || map.len() > LINES_AT_MOST {
        return Err(Error::invalid(format!(
            "{name} has {} ranges of ids, expected are 1 to {LINES_AT_MOST}",
            map.len()
        )));
    }
    let ranges = |first: fn(&IdMapping) -> u32| -> Vec<(u64, u64)> {
        map.iter()
            .map(|mapping| (u64::from(first(mapping)), u64::from(first(mapping)) + u64::from(mapping.size)))
            .collect()
    };
    for (side, ranges) in
        [("inside", ranges(|mapping| mapping.container_id)), ("outside", ranges(|mapping| mapping.host_id))]
    {
        for (index, &(first, end)) in ranges.iter().enumerate() {
            // The last number of all means "unchanged" to the kernel and is no id.
            if first == end || end > u64::from(u32::MAX) {
                return Err(Error::invalid(format!(
                    "{name} has a range of {} ids from {first} {side}, expected are 1 or more below {}",
                    end - first,
                    u32::MAX
                )));
            }
            if ranges[..index].iter().any(|&(other, other_end)| first < other_end && other < end) {
                return Err(Error::invalid(format!("{name} has two ranges with id {first} {side}")));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use serde_json::json;

    use super::*;

    fn range(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping { container_id, host_id, size }
    }

    #[test]
    fn the_same_mapping_is_read_in_the_words_of_the_spec_and_of_a_snapshotter() {
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        let of_spec = IdMappings::of_oci(&json!({"uidMappings": map, "gidMappings": map}), "linux.").expect("reads");
        let of_mount = IdMappings::of_mount_options(Some("0:100000:65536"), Some("0:100000:65536")).expect("reads");
        let expected = IdMappings { uids: vec![range(0, 100_000, 65_536)], gids: vec![range(0, 100_000, 65_536)] };
        assert_eq!((of_spec.as_ref(), of_mount.as_ref()), (Some(&expected), Some(&expected)));
        assert_eq!(lines(&expected.uids), "0 100000 65536\n");
        assert_eq!(IdMappings::of_oci(&json!({}), "linux.").expect("reads"), None);
        assert_eq!(IdMappings::of_mount_options(None, None).expect("reads"), None);
        let two = IdMappings::of_mount_options(Some("0:5:1,1:7:2"), Some("0:0:1")).expect("reads").expect("is there");
        assert_eq!(two.uids, [range(0, 5, 1), range(1, 7, 2)]);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_by_the_name_of_the_field() {
        let refused = |uids: Vec<IdMapping>| {
            let mappings = IdMappings { uids, gids: vec![range(0, 1, 1)] };
            let error = mappings.checked("linux.uidMappings", "linux.gidMappings").expect_err("is refused");
            assert_eq!(error.kind(), Kind::InvalidArgument);
            error.to_string()
        };
        assert!(refused(vec![]).starts_with("linux.uidMappings has 0 ranges"));
        assert!(refused(vec![range(0, 100, 0)]).contains("a range of 0 ids from 0 inside"));
        assert!(refused(vec![range(0, u32::MAX - 5, 10)]).contains("a range of 10 ids from 4294967290 outside"));
        assert!(refused(vec![range(0, 100, 10), range(5, 200, 10)]).contains("two ranges with id 5 inside"));
        assert!(refused(vec![range(0, 100, 10), range(10, 105, 10)]).contains("two ranges with id 105 outside"));
        let mappings = IdMappings { uids: vec![range(0, 100, 10)], gids: vec![range(1, 100, 10)] };
        let error = mappings.with_root("linux.uidMappings", "linux.gidMappings").expect_err("is refused");
        assert_eq!(error.to_string(), "linux.gidMappings does not map id 0, by which a container is set up");
        let text = IdMappings::of_mount_options(Some("0:1"), None).expect_err("is refused").to_string();
        assert_eq!(text, "uidmap \"0:1\" is not <id inside>:<id outside>:<size>");
    }

    #[test]
    fn a_namespace_outlives_the_process_that_it_took() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mapping foreign ids needs root");
            return;
        }
        let mappings = IdMappings { uids: vec![range(0, 100_000, 10)], gids: vec![range(0, 100_000, 10)] };
        let namespace = mappings.namespace().expect("is made");
        let link = fs::read_link(format!("/proc/self/fd/{}", namespace.as_raw_fd())).expect("is open");
        assert!(link.to_string_lossy().starts_with("user:["), "{}", link.display());
        assert_ne!(link, fs::read_link("/proc/self/ns/user").expect("is there"));
    }
}
