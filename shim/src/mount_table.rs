//! What is mounted where: `/proc/<pid>/mountinfo`, proc_pid_mountinfo(5). A snapshot; pure but for reading it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Kind, Result, WithKind};

/// The mounts of one mount namespace, the earliest first.
#[derive(Debug)]
pub struct MountTable(Vec<Mount>);

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `<major>:<minor>` of its file system.
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// `ext4`, `tmpfs`, ...
    pub fstype: String,
    /// Options of the file system.
    pub options: String,
}

impl MountTable {
    /// That of the calling thread, which may have another mount namespace than its process. Blocks.
    pub fn of_thread() -> Result<Self> {
        Self::read("/proc/thread-self/mountinfo")
    }

    /// That of the process. Blocks.
    pub fn of_process() -> Result<Self> {
        Self::read("/proc/self/mountinfo")
    }

    fn read(path: &str) -> Result<Self> {
        Ok(Self::parse(&fs::read(path).or_kind(Kind::Internal, format!("read the mount table {path}"))?))
    }

    /// Parses the content of a `mountinfo`; a line that is none is passed over.
    pub fn parse(text: &[u8]) -> Self {
        Self(text.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect())
    }

    /// All mounts.
    pub fn mounts(&self) -> &[Mount] {
        &self.0
    }

    /// The mount that `path` (canonical) is on: of those at one place the latest.
    pub fn mount_of(&self, path: &Path) -> Option<&Mount> {
        let above = self.0.iter().filter(|mount| path.starts_with(&mount.mount_point));
        above.max_by_key(|mount| mount.mount_point.components().count())
    }

    /// Whether other mounts lie below `source`, whose links are followed; not if there is no such file. Blocks.
    pub fn has_mounts_below(&self, source: &Path) -> bool {
        let Ok(source) = fs::canonicalize(source) else { return false };
        self.0.iter().any(|mount| mount.mount_point != source && mount.mount_point.starts_with(&source))
    }
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        let mut fields = line.split(|byte| *byte == b' ');
        let device = text(fields.nth(2)?);
        let (root, mount_point) = (unescape(fields.next()?), unescape(fields.next()?));
        // A variable number of fields ends at a dash of its own; the source comes between type and options.
        fields.find(|field| *field == b"-")?;
        let (fstype, options) = (text(fields.next()?), text(fields.nth(1)?));
        Some(Self { device, root, mount_point, fstype, options })
    }

    /// What a path on this mount is called in its file system.
    pub fn in_file_system(&self, path: &Path) -> Option<PathBuf> {
        Some(self.root.join(path.strip_prefix(&self.mount_point).ok()?))
    }
}

/// Reads the octal escapes of a path.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let value = octal.filter(|_| byte == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(value.unwrap_or(byte));
        rest = if value.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c\011"), Path::new("/a b\\c\t"));
        assert_eq!(unescape(br"/a\0"), Path::new(r"/a\0"));
    }

    #[test]
    fn a_line_is_read_whatever_fields_are_between() {
        let text = "30 24 0:50 /deep/a\\040b /mnt rw,relatime shared:9 master:2 - tmpfs none rw,size=64k\nno line\n\
                    31 24 0:51 / /mnt rw - ext4 /dev/sda1 rw\n";
        let table = MountTable::parse(text.as_bytes());
        assert_eq!(table.mounts().len(), 2);
        let first = &table.mounts()[0];
        assert_eq!((first.device.as_str(), first.fstype.as_str()), ("0:50", "tmpfs"));
        assert_eq!((first.root.as_path(), first.options.as_str()), (Path::new("/deep/a b"), "rw,size=64k"));
        assert_eq!(first.in_file_system(Path::new("/mnt/x")).as_deref(), Some(Path::new("/deep/a b/x")));
        assert_eq!(table.mount_of(Path::new("/mnt/x")).expect("the latest").device, "0:51");
    }

    #[test]
    fn mounts_below_are_seen_and_what_is_missing_has_none() {
        let plain = tempfile::tempdir().expect("makes a directory");
        let table = MountTable::of_thread().expect("reads the table");
        assert!(!table.has_mounts_below(plain.path()));
        assert!(!table.has_mounts_below(&plain.path().join("missing")));
        assert!(table.has_mounts_below(Path::new("/")));
    }
}
