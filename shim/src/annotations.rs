//! What one pod may ask for by annotations `bulkhead.io/<key>`.
//!
//! A table: one row per annotation. An annotation counts only if the administrator allows it by name
//! (`allowed_annotations` of [`crate::config`]); the default is none, since a pod's author is not the node's owner and a
//! size asked for here is one that the scheduler has not seen. Unknown, refused and malformed ones fail the pod: an
//! annotation that is silently ignored is worse. Nothing here can reach QEMU's or the kernel's command line as text.

use crate::config::{self, Machine};
use crate::error::{Error, Result};

/// What every annotation of ours begins with.
pub const PREFIX: &str = "bulkhead.io/";

/// What a pod asked for; `None` where it asked for nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Annotations {
    /// vCPUs of the VM.
    pub vcpus: Option<u32>,
    /// Memory of the VM in MiB, the guest's own need included.
    pub memory_mib: Option<u32>,
    /// Machine type of the VM.
    pub machine: Option<Machine>,
}

struct Row {
    name: &'static str,
    accepted: fn() -> String,
    /// `None` if the value is malformed.
    set: fn(&mut Annotations, &str) -> Option<()>,
}

const ROWS: [Row; 3] = [
    Row {
        name: "bulkhead.io/vcpus",
        accepted: || format!("a whole number from 1 to {}", config::MAX_VCPUS),
        set: |annotations, value| {
            annotations.vcpus = Some(whole(value, 1, config::MAX_VCPUS)?);
            Some(())
        },
    },
    Row {
        name: "bulkhead.io/memory-mib",
        accepted: || format!("a whole number from {} to {}", config::MIN_MEMORY_MIB, config::MAX_MEMORY_MIB),
        set: |annotations, value| {
            annotations.memory_mib = Some(whole(value, config::MIN_MEMORY_MIB, config::MAX_MEMORY_MIB)?);
            Some(())
        },
    },
    Row {
        name: "bulkhead.io/machine",
        accepted: || "auto, microvm or q35".into(),
        set: |annotations, value| {
            annotations.machine = Some(match value {
                "auto" => Machine::Auto,
                "microvm" => Machine::Microvm,
                "q35" => Machine::Q35,
                _ => return None,
            });
            Some(())
        },
    },
];

/// Digits only: `parse` alone would also take a sign.
fn whole(value: &str, least: u32, most: u32) -> Option<u32> {
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    value.parse().ok().filter(|number| digits && (least..=most).contains(number))
}

/// Whether `name` is the full name of an annotation of ours.
pub fn is_known(name: &str) -> bool {
    ROWS.iter().any(|row| row.name == name)
}

/// The full names of all annotations, for messages.
pub fn known() -> String {
    ROWS.map(|row| row.name).join(", ")
}

impl Annotations {
    /// Reads what concerns us of a pod's annotations; `allowed` holds the full names that the administrator allows.
    ///
    /// Annotations of others are skipped. Which wrong one is told does not depend on the order they come in.
    pub fn parse<'a>(annotations: impl IntoIterator<Item = (&'a str, &'a str)>, allowed: &[String]) -> Result<Self> {
        let mut ours: Vec<_> = annotations.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
        ours.sort_unstable();
        let mut parsed = Self::default();
        for (name, value) in ours {
            let row = ROWS.iter().find(|row| row.name == name).ok_or_else(|| {
                Error::invalid(format!("annotation {name}={value:?} is not known, accepted are {}", known()))
            })?;
            if !allowed.iter().any(|allowed| allowed == name) {
                return Err(Error::invalid(format!(
                    "annotation {name}={value:?} is not allowed on this node, accepted are {}",
                    if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") }
                )));
            }
            (row.set)(&mut parsed, value).ok_or_else(|| {
                Error::invalid(format!("annotation {name}={value:?} is malformed, accepted is {}", (row.accepted)()))
            })?;
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn all() -> Vec<String> {
        ROWS.iter().map(|row| row.name.to_owned()).collect()
    }

    fn refused(name: &str, value: &str, allowed: &[String]) -> String {
        let error = Annotations::parse([(name, value)], allowed).expect_err("is refused");
        assert_eq!(error.kind(), Kind::InvalidArgument);
        error.to_string()
    }

    #[test]
    fn every_row_is_named_with_the_prefix() {
        assert!(ROWS.iter().all(|row| row.name.starts_with(PREFIX)));
    }

    #[test]
    fn allowed_annotations_are_read_and_those_of_others_skipped() {
        let given = [
            ("io.kubernetes.cri.sandbox-id", "x"),
            ("bulkhead.io/vcpus", "4"),
            ("bulkhead.io/memory-mib", "1024"),
            ("bulkhead.io/machine", "q35"),
        ];
        let expected = Annotations { vcpus: Some(4), memory_mib: Some(1024), machine: Some(Machine::Q35) };
        assert_eq!(Annotations::parse(given, &all()).expect("parses"), expected);
    }

    #[test]
    fn an_unknown_annotation_is_refused_even_when_everything_is_allowed() {
        assert_eq!(
            refused("bulkhead.io/kernel-params", "quiet", &all()),
            "annotation bulkhead.io/kernel-params=\"quiet\" is not known, accepted are bulkhead.io/vcpus, \
             bulkhead.io/memory-mib, bulkhead.io/machine"
        );
    }

    #[test]
    fn an_annotation_that_is_not_allowed_is_refused() {
        assert_eq!(
            refused("bulkhead.io/vcpus", "2", &[]),
            "annotation bulkhead.io/vcpus=\"2\" is not allowed on this node, accepted are none"
        );
        let said = refused("bulkhead.io/vcpus", "2", &["bulkhead.io/machine".into()]);
        assert!(said.ends_with("accepted are bulkhead.io/machine"), "{said}");
    }

    #[test]
    fn malformed_values_are_refused_with_what_is_accepted() {
        for (name, values, accepted) in [
            ("bulkhead.io/vcpus", &["", "0", "256", "1.5", "-1", "+1", " 1", "99999999999"][..], "1 to 255"),
            ("bulkhead.io/memory-mib", &["127", "1Gi", "4194305"][..], "128 to 4194304"),
            ("bulkhead.io/machine", &["pc", "Q35", "q35,accel=kvm"][..], "auto, microvm or q35"),
        ] {
            for value in values {
                let said = refused(name, value, &all());
                assert!(said.contains(name) && said.contains(&format!("{value:?}")), "{said}");
                assert!(said.ends_with(accepted), "{said}");
            }
        }
    }
}
