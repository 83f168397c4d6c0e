//! Which sandbox a bundle belongs to, by the annotations of its `config.json`.
//!
//! containerd's CRI and CRI-O mark sandboxes and their containers; whatever has no marks (`ctr`, nerdctl, a sandbox of the
//! Sandbox API, which has no `config.json` at all) is a sandbox of its own.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;

/// Place of a container in its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Group {
    /// It is the sandbox, or alone.
    Sandbox,
    /// It belongs to the sandbox with this id.
    Member(String),
}

/// Annotations that say what a container is, and whose.
const MARKS: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// A spec larger than this is none.
const MAX_SPEC_BYTES: u64 = 32 << 20;

#[derive(Deserialize)]
struct Marked {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

impl Group {
    /// Reads `config.json` in `bundle`, which need not exist.
    pub fn of_bundle(bundle: &Path) -> anyhow::Result<Self> {
        let path = bundle.join("config.json");
        let context = || format!("read spec {}", path.display());
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::Sandbox),
            Err(error) => return Err(error).with_context(context),
        };
        let mut json = Vec::new();
        file.take(MAX_SPEC_BYTES + 1).read_to_end(&mut json).with_context(context)?;
        if json.len() as u64 > MAX_SPEC_BYTES {
            bail!("spec {} is larger than {MAX_SPEC_BYTES} bytes", path.display());
        }
        // serde would take a list for the fields of a structure in their order.
        if json.trim_ascii_start().first() != Some(&b'{') {
            bail!("spec {} is not a JSON object of the OCI runtime spec", path.display());
        }
        let spec: Marked = serde_json::from_slice(&json).with_context(context)?;
        Self::of_annotations(&spec.annotations.unwrap_or_default()).with_context(|| format!("spec {}", path.display()))
    }

    fn of_annotations(annotations: &HashMap<String, String>) -> anyhow::Result<Self> {
        for (type_name, id_name) in MARKS {
            match annotations.get(type_name).map(String::as_str) {
                None => {}
                Some("sandbox") => return Ok(Self::Sandbox),
                Some("container") => {
                    let id = annotations.get(id_name).filter(|id| !id.is_empty());
                    return Ok(Self::Member(id.with_context(|| format!("annotation {id_name} is missing"))?.clone()));
                }
                Some(other) => {
                    bail!("annotation {type_name}={other:?} is not known, accepted are sandbox and container")
                }
            }
        }
        Ok(Self::Sandbox)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(config: Option<&str>) -> anyhow::Result<Group> {
        let dir = tempfile::tempdir().expect("makes a directory");
        if let Some(config) = config {
            fs::write(dir.path().join("config.json"), config).expect("writes");
        }
        Group::of_bundle(dir.path())
    }

    #[test]
    fn whatever_is_not_marked_is_its_own_sandbox() {
        for config in [None, Some("{}"), Some(r#"{"annotations": null}"#), Some(r#"{"annotations": {"a": "b"}}"#)] {
            assert_eq!(group(config).expect("reads"), Group::Sandbox, "{config:?}");
        }
    }

    #[test]
    fn both_kinds_of_marks_are_understood() {
        for (config, expected) in [
            (
                r#"{"annotations": {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "p"}}"#,
                Group::Sandbox,
            ),
            (
                r#"{"annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"}}"#,
                Group::Member("p".into()),
            ),
            (
                r#"{"annotations": {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "q"}}"#,
                Group::Member("q".into()),
            ),
        ] {
            assert_eq!(group(Some(config)).expect("reads"), expected, "{config}");
        }
    }

    #[test]
    fn a_container_without_its_sandbox_is_refused() {
        let error = group(Some(r#"{"annotations": {"io.kubernetes.cri.container-type": "container"}}"#));
        let said = format!("{:#}", error.expect_err("is refused"));
        assert!(said.ends_with("annotation io.kubernetes.cri.sandbox-id is missing"), "{said}");
    }

    #[test]
    fn an_unreadable_spec_is_told_with_its_path() {
        let said = format!("{:#}", group(Some("{")).expect_err("is refused"));
        assert!(said.starts_with("read spec /") && said.contains("config.json: EOF while parsing"), "{said}");
    }
}
