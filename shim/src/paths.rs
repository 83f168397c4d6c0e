//! Ids, and where a sandbox's run state lies.
//!
//! Each sandbox has one directory, `<state_dir>/<sandbox-id>`. `state_dir` is configuration, and `delete` gets none: so every
//! bundle of a pod has a link to that directory, made by whoever meets the bundle first.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::error::{Error, Result};

/// Name of the link in a bundle.
const LINK: &str = "bulkhead";

/// Longest id, as in containerd.
const MAX_ID_BYTES: usize = 76;

/// Refuses an id that containerd would not make: letters and digits, with single `.`, `_` or `-` between them.
///
/// Ids become file names; `what` says in the error whose id it is. The rule is a bit wider than containerd's
/// (<https://github.com/containerd/containerd/blob/main/pkg/identifiers/validate.go>): several separators may follow each
/// other, as in the exec ids of some clients.
pub fn check_id(what: &str, id: &str) -> Result<()> {
    let separator = |byte: u8| b"._-".contains(&byte);
    let known = |byte: u8| byte.is_ascii_alphanumeric() || separator(byte);
    let bytes = id.as_bytes();
    let edges = [bytes.first(), bytes.last()];
    let good = bytes.len() <= MAX_ID_BYTES
        && bytes.iter().all(|byte| known(*byte))
        && edges.iter().all(|edge| edge.is_some_and(|byte| !separator(*byte)));
    if good {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{what} {id:?} is not accepted: an id has 1 to {MAX_ID_BYTES} letters and digits, with '.', '_' or '-' between them"
    )))
}

/// Directory of a sandbox's run state. `sandbox_id` must have passed [`check_id`].
pub fn sandbox_dir(state_dir: &Path, sandbox_id: &str) -> PathBuf {
    state_dir.join(sandbox_id)
}

/// Makes `bundle` point at the run state of its sandbox, which need not exist yet. Safe to repeat.
pub fn link_bundle(bundle: &Path, sandbox_dir: &Path) -> anyhow::Result<()> {
    let link = bundle.join(LINK);
    let made = match symlink(sandbox_dir, &link) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            if fs::read_link(&link).is_ok_and(|target| target == sandbox_dir) {
                return Ok(());
            }
            fs::remove_file(&link).and_then(|()| symlink(sandbox_dir, &link))
        }
        made => made,
    };
    made.with_context(|| format!("link {} to {}", link.display(), sandbox_dir.display()))
}

/// Directory of the run state of the sandbox that `bundle` belongs to; `None` if it was never linked.
pub fn linked_sandbox_dir(bundle: &Path) -> anyhow::Result<Option<PathBuf>> {
    let link = bundle.join(LINK);
    match fs::read_link(&link) {
        Ok(target) => Ok(Some(target)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read link {}", link.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_safe_file_names_are_accepted() {
        for id in ["a", "0", "web-1", "a.b_c-d", "a--b", &"x".repeat(76)] {
            check_id("container id", id).expect(id);
        }
    }

    #[test]
    fn ids_that_could_leave_their_directory_are_refused() {
        for id in ["", ".", "..", "../x", "a/b", "-a", "a-", "_", "a b", "a\n", "ä", &"x".repeat(77)] {
            let said = check_id("sandbox id", id).expect_err(id).to_string();
            assert!(said.starts_with(&format!("sandbox id {id:?} is not accepted")), "{said}");
        }
    }

    #[test]
    fn a_bundle_is_linked_again_and_again() {
        let dir = tempfile::tempdir().expect("makes a directory");
        assert_eq!(linked_sandbox_dir(dir.path()).expect("reads"), None);
        for target in ["/run/bulkhead/a", "/run/bulkhead/a", "/elsewhere/a"] {
            link_bundle(dir.path(), Path::new(target)).expect("links");
            assert_eq!(linked_sandbox_dir(dir.path()).expect("reads").as_deref(), Some(Path::new(target)));
        }
    }
}
