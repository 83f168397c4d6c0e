//! The maps of the pod's user namespace: which ids of the guest stand for those that its containers speak of. Pure.
//!
//! user_namespaces(7)

use bulkhead_proto::agent as api;
use oci_spec::runtime::User;

use crate::error::{Error, Result};

/// A user and a group, as ids of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Owner {
    /// The one that `user` names where no user namespace is between.
    pub fn unmapped(user: &User) -> Self {
        Self { uid: user.uid(), gid: user.gid() }
    }
}

/// Maps that have been checked; see the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    uids: Vec<api::IdMapping>,
    gids: Vec<api::IdMapping>,
    root: Owner,
}

impl IdMap {
    /// Checks a request's maps.
    pub fn parse(namespace: &api::UserNamespace) -> Result<Self> {
        let root = |name: &str, map: &[api::IdMapping]| -> Result<u32> {
            for range in map {
                for first in [range.container_id, range.guest_id] {
                    if range.size == 0 || first.checked_add(range.size).is_none() {
                        let size = range.size;
                        return Err(Error::invalid(format!(
                            "{name} of the user namespace: {size} ids from {first} on"
                        )));
                    }
                }
            }
            let root = lookup(map, 0);
            root.ok_or_else(|| Error::invalid(format!("{name} of the user namespace: id 0 is not mapped")))
        };
        let (uids, gids) = (namespace.uids.clone(), namespace.gids.clone());
        let root = Owner { uid: root("uids", &uids)?, gid: root("gids", &gids)? };
        Ok(Self { uids, gids, root })
    }

    /// Who is root in the namespace.
    pub fn root(&self) -> Owner {
        self.root
    }

    /// Who `user` is. Every id of a process must be mapped, or the kernel would refuse it in words that nobody understands.
    pub fn owner(&self, user: &User) -> Result<Owner> {
        let find = |field: &str, map: &[api::IdMapping], id: u32| {
            lookup(map, id).ok_or_else(|| {
                Error::invalid(format!("process.user.{field} {id} is not mapped in the pod's user namespace"))
            })
        };
        for &gid in user.additional_gids().iter().flatten() {
            find("additionalGids", &self.gids, gid)?;
        }
        Ok(Owner { uid: find("uid", &self.uids, user.uid())?, gid: find("gid", &self.gids, user.gid())? })
    }

    /// Content of `/proc/<pid>/uid_map`.
    pub fn uid_map(&self) -> String {
        lines(&self.uids)
    }

    /// Content of `/proc/<pid>/gid_map`.
    pub fn gid_map(&self) -> String {
        lines(&self.gids)
    }
}

fn lookup(map: &[api::IdMapping], id: u32) -> Option<u32> {
    map.iter().find_map(|range| {
        let offset = id.checked_sub(range.container_id)?;
        (offset < range.size).then(|| range.guest_id + offset)
    })
}

fn lines(map: &[api::IdMapping]) -> String {
    let line = |range: &api::IdMapping| format!("{} {} {}\n", range.container_id, range.guest_id, range.size);
    map.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::UserBuilder;

    use super::*;

    fn range(container_id: u32, guest_id: u32, size: u32) -> api::IdMapping {
        api::IdMapping { container_id, guest_id, size }
    }

    fn map(ranges: &[api::IdMapping]) -> Result<IdMap> {
        IdMap::parse(&api::UserNamespace { uids: ranges.to_vec(), gids: ranges.to_vec() })
    }

    fn user(uid: u32, gids: &[u32]) -> User {
        UserBuilder::default().uid(uid).gid(gids[0]).additional_gids(&gids[1..]).build().expect("a user")
    }

    #[test]
    fn ids_are_found_in_their_ranges() {
        let map = map(&[range(0, 100_000, 1000), range(1000, 5000, 1)]).expect("is right");
        assert_eq!(map.root(), Owner { uid: 100_000, gid: 100_000 });
        assert_eq!(map.owner(&user(33, &[999, 0])).expect("is mapped"), Owner { uid: 100_033, gid: 100_999 });
        assert_eq!(map.owner(&user(1000, &[0])).expect("is mapped").uid, 5000);
        assert_eq!(map.uid_map(), "0 100000 1000\n1000 5000 1\n");
    }

    #[test]
    fn a_process_with_an_id_outside_is_refused_by_its_field() {
        let map = map(&[range(0, 100_000, 1000)]).expect("is right");
        for (user, field) in [
            (user(1000, &[0]), "process.user.uid 1000"),
            (user(0, &[70_000]), "process.user.gid 70000"),
            (user(0, &[0, 1001]), "process.user.additionalGids 1001"),
        ] {
            let error = map.owner(&user).expect_err(field);
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert_eq!(error.to_string(), format!("{field} is not mapped in the pod's user namespace"));
        }
    }

    #[test]
    fn maps_that_make_no_namespace_are_refused() {
        for wrong in [vec![], vec![range(1, 1, 1)], vec![range(0, 1, 0)], vec![range(0, u32::MAX, 1)]] {
            assert!(map(&wrong).is_err(), "{wrong:?}");
        }
    }
}
