//! A file as a block device of the machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::command::Run;

/// How large the file is.
pub const SIZE: usize = 8 << 20;
/// Where in it something is written; [`LoopDevice::new`] writes at the beginning.
pub const WRITTEN_AT: usize = 512;

/// A loop device and the file behind it, which is there until this value goes.
pub struct LoopDevice<'a> {
    /// The device's node.
    pub path: String,
    file: PathBuf,
    losetup: Losetup<'a>,
}

/// Runs losetup(8) with arguments where the device is to be.
type Losetup<'a> = Box<dyn Fn(&[&str]) -> Run + 'a>;

impl<'a> LoopDevice<'a> {
    /// Makes `file`, which begins with `before`, and its device, with the given `losetup`.
    pub fn new(file: &Path, losetup: impl Fn(&[&str]) -> Run + 'a) -> Result<Self> {
        let mut content = vec![0; SIZE];
        content[..6].copy_from_slice(b"before");
        fs::write(file, &content).with_context(|| format!("write {}", file.display()))?;
        Self::over(file, losetup)
    }

    /// The device of a `file` that is there.
    fn over(file: &Path, losetup: impl Fn(&[&str]) -> Run + 'a) -> Result<Self> {
        let path = losetup(&["--find", "--show", &file.display().to_string()]).success()?.text();
        Ok(Self { path, file: file.to_owned(), losetup: Box::new(losetup) })
    }

    /// A device of the machine that runs the tests.
    pub fn here(file: &Path) -> Result<Self> {
        Self::new(file, losetup)
    }

    /// The same, with nothing in its `file` yet: room for it is found when something is written.
    pub fn sparse_here(file: &Path) -> Result<Self> {
        let size = u64::try_from(SIZE)?;
        let made = fs::File::create(file).and_then(|file| file.set_len(size));
        made.with_context(|| format!("make {}", file.display()))?;
        Self::over(file, losetup)
    }

    /// Fails unless `text` is in the file at [`WRITTEN_AT`].
    pub fn written(&self, text: &str) -> Result<()> {
        let content = fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))?;
        let found = String::from_utf8_lossy(&content[WRITTEN_AT..WRITTEN_AT + text.len()]);
        ensure!(found == text, "the file behind {} has {found:?} where {text:?} was written", self.path);
        Ok(())
    }
}

/// losetup(8) of the machine that runs the tests.
fn losetup(args: &[&str]) -> Run {
    Run::new("/sbin/losetup").args(args)
}

impl Drop for LoopDevice<'_> {
    fn drop(&mut self) {
        // The kernel lets go of it when the last user has.
        let _ = (self.losetup)(&["--detach", &self.path]).output();
    }
}
