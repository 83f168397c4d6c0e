//! Ids, and where a sandbox's run state lies.
//!
//! Each sandbox has one directory, `<state_dir>/<sandbox-id>-<6 digits>`. The digits are of its socket's name: two namespaces, or
//! two containerds, may well use one id at once, and what one removes must not be the other's. `state_dir` is configuration,
//! and `delete` gets none: so every bundle of a pod has a link to that directory, made by whoever meets the bundle first.

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

/// Hexadecimal digits that tell sandboxes of the same id apart.
const DIGITS: usize = 6;

/// Longest path of a sandbox's directory: leaves names of 8 bytes for sockets in it, whose paths have 107 at most (unix(7)).
const MAX_DIR_BYTES: usize = 98;

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

/// Directory of the run state of the sandbox whose server has its socket at `socket_path`, a name of hexadecimal digits.
///
/// `sandbox_id` must have passed [`check_id`].
pub fn sandbox_dir(state_dir: &Path, sandbox_id: &str, socket_path: &Path) -> Result<PathBuf> {
    let name = socket_path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let digits = name.get(..DIGITS).unwrap_or_default();
    let dir = state_dir.join(format!("{sandbox_id}-{digits}"));
    if dir.as_os_str().len() > MAX_DIR_BYTES {
        return Err(Error::invalid(format!(
            "state directory {} of the sandbox is longer than {MAX_DIR_BYTES} bytes: choose a shorter state_dir or id",
            dir.display()
        )));
    }
    Ok(dir)
}

/// Whether `sandbox_dir` is that of the sandbox `id`, of whatever namespace.
pub fn is_dir_of(sandbox_dir: &Path, id: &str) -> bool {
    !id.is_empty() && id_of_dir(sandbox_dir) == Some(id)
}

/// The id of the sandbox that has its run state in `sandbox_dir`; `None` if no sandbox has a directory of such a name.
pub fn id_of_dir(sandbox_dir: &Path) -> Option<&str> {
    let (id, digits) = sandbox_dir.file_name()?.to_str()?.rsplit_once('-')?;
    let is_ours = digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_ours && check_id("sandbox id", id).is_ok()).then_some(id)
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

/// Writes the file by which containerd before 2.0 and CRI-O find the server again after a restart. All at once or not at all.
pub fn write_address(bundle: &Path, address: &str) -> anyhow::Result<()> {
    let path = bundle.join("address");
    // A name of this process's own: two starts of one sandbox may get here at once.
    let unfinished = bundle.join(format!(".address-{}", std::process::id()));
    fs::write(&unfinished, address)
        .and_then(|()| fs::rename(&unfinished, &path))
        .with_context(|| format!("write {}", path.display()))
}

/// Path of the socket in that file; `None` without one.
pub fn read_address(bundle: &Path) -> anyhow::Result<Option<PathBuf>> {
    let path = bundle.join("address");
    match fs::read_to_string(&path) {
        Ok(address) => Ok(address.trim().strip_prefix("unix://").map(PathBuf::from)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
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
    fn the_same_id_in_two_namespaces_has_two_directories() {
        let state_dir = Path::new("/run/bulkhead");
        let dir = |socket| sandbox_dir(state_dir, "web", Path::new(socket)).expect("is short");
        assert_eq!(dir("/run/s/0123456789"), Path::new("/run/bulkhead/web-012345"));
        assert_ne!(dir("/run/s/0123456789"), dir("/run/s/1123456789"));
    }

    #[test]
    fn the_longest_id_fits_the_default_place_and_not_a_deep_one() {
        let socket = Path::new("/run/s/0123456789");
        let id = "x".repeat(76);
        sandbox_dir(Path::new("/run/bulkhead"), &id, socket).expect("fits");
        assert!(sandbox_dir(Path::new("/var/lib/deep/bulkhead"), &id, socket).is_err());
    }

    #[test]
    fn a_directory_belongs_to_one_id() {
        let dir = Path::new("/run/bulkhead/web-0a1b2c");
        assert!(is_dir_of(dir, "web"));
        for other in ["we", "web-0a1b2c", "web-", "w", ""] {
            assert!(!is_dir_of(dir, other), "{other}");
        }
        assert!(is_dir_of(Path::new("/x/web-0a1b2c-ffffff"), "web-0a1b2c"));
        assert!(!is_dir_of(Path::new("/x/web-0a1b2c-ffffff"), "web"));
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
