//! One entry of an OCI spec's `mounts`, read and checked by itself.
//! Spec: <https://github.com/opencontainers/runtime-spec/blob/main/config.md#mounts>.

use serde_json::Value;

use super::bind::Ids;
use crate::error::{Error, Result};
use crate::idmap::IdMappings;
use crate::namespace::Access;

/// Options that say how a mount is made, propagates or maps ids, not what it allows; the guest gets its own.
const OF_THE_MOUNT: [&str; 12] = [
    "bind",
    "rbind",
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
    "idmap",
    "ridmap",
];

/// Options of the OCI spec that reach the mounts below, by the name that `mount(8)` has for one mount.
const RECURSIVE: [(&str, &str); 8] = [
    ("rro", "ro"),
    ("rrw", "rw"),
    ("rnosuid", "nosuid"),
    ("rnodev", "nodev"),
    ("rnoexec", "noexec"),
    ("rnoatime", "noatime"),
    ("rnodiratime", "nodiratime"),
    ("rrelatime", "relatime"),
];

/// One entry of the spec's `mounts`.
pub(super) struct SpecMount {
    /// In the container; never empty.
    pub(super) destination: String,
    /// `type`; empty if it has none.
    pub(super) fstype: String,
    /// Empty if it has none.
    pub(super) source: String,
    /// In the spec's order.
    pub(super) options: Vec<String>,
    /// `uidMappings` and `gidMappings`.
    pub(super) mappings: Option<IdMappings>,
}

impl SpecMount {
    /// Reads `value`; the error says what is wrong, not where.
    pub(super) fn parse(value: &Value) -> Result<Self> {
        let text = |key: &str| match value.get(key) {
            None | Some(Value::Null) => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(Error::invalid(format!("{key} is not a string"))),
        };
        let options = value.get("options").and_then(Value::as_array).into_iter().flatten();
        let string = |option: &Value| option.as_str().map(str::to_owned);
        let options = options.map(string).collect::<Option<Vec<_>>>();
        let options = options.ok_or_else(|| Error::invalid("options are not all strings"))?;
        let destination = text("destination")?;
        if destination.is_empty() {
            return Err(Error::invalid("destination is missing"));
        }
        Ok(Self {
            destination,
            fstype: text("type")?,
            source: text("source")?,
            options,
            mappings: IdMappings::of_oci(value, "")?,
        })
    }

    /// How a bind shows owners, in a container whose user namespace has the maps `user_namespace`.
    pub(super) fn ids(&self, user_namespace: Option<&IdMappings>) -> Result<Option<Ids>> {
        let recursive = self.has("ridmap");
        match (&self.mappings, user_namespace) {
            (Some(mappings), _) => Ok(Some(Ids { mappings: mappings.clone(), recursive })),
            (None, _) if !recursive && !self.has("idmap") => Ok(None),
            (None, Some(own)) => Ok(Some(Ids { mappings: own.clone(), recursive })),
            (None, None) => Err(Error::invalid(format!(
                "mount at {:?}: option {} needs uidMappings and gidMappings, or a container with a user namespace",
                self.destination,
                if recursive { "ridmap" } else { "idmap" }
            ))),
        }
    }

    /// Whether the kernel would be asked for a bind: by the type's name, or by an option, as runc sees it.
    pub(super) fn is_bind(&self) -> bool {
        matches!(self.fstype.as_str(), "bind" | "rbind") || self.has("bind") || self.has("rbind")
    }

    /// Whether `option` is among its options, by its letters.
    pub(super) fn has(&self, option: &str) -> bool {
        self.options.iter().any(|given| given == option)
    }

    /// What the guest may do; the last of several contradicting options counts, as in mount(8).
    pub(super) fn access(&self) -> Access {
        self.options.iter().fold(Access::Writable, |access, option| match option.as_str() {
            "rw" | "rrw" => Access::Writable,
            "ro" => Access::ReadOnly,
            "rro" => Access::ReadOnlyRecursive,
            _ => access,
        })
    }

    /// The options that mean something in the guest.
    pub(super) fn guest_options(&self) -> Vec<String> {
        let plain = |option: &String| {
            let found = RECURSIVE.iter().find(|(recursive, _)| recursive == option);
            found.map_or_else(|| option.clone(), |(_, plain)| (*plain).to_owned())
        };
        self.options.iter().filter(|option| !OF_THE_MOUNT.contains(&option.as_str())).map(plain).collect()
    }
}
