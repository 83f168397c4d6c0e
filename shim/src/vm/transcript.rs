//! The guest's console on disk, for who looks at a running pod: `bulkhead console`.
//!
//! Two files in the sandbox's directory, which is root's alone and takes them along when it goes. The newer one grows and, once
//! it is full, takes the older one's place: a guest that writes for ever costs a fixed amount of space, and a reader finds the
//! last [`HALF_BYTES`] at least. The shim writes, and asks nobody; a reader needs no shim, so that one that hangs, or has
//! died, hides nothing. The bytes are the guest's: whoever shows them makes them harmless first.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::io::AsyncWriteExt;

/// Bytes that each of the two files has at most.
pub const HALF_BYTES: usize = 64 << 10;

/// The file that grows.
const NEWER: &str = "console.log";
/// What it was before.
const OLDER: &str = "console.log.1";

/// The writer: one for each VM.
#[derive(Debug)]
pub struct Transcript {
    directory: PathBuf,
    newer: Option<tokio::fs::File>,
    length: usize,
}

impl Transcript {
    /// One in `directory`, where nothing is made before the guest has said something.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, newer: None, length: 0 }
    }

    /// Appends `bytes`, no more than [`HALF_BYTES`]. Not cancel safe.
    pub async fn append(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let path = self.directory.join(NEWER);
        let what = || format!("write {}", path.display());
        if self.length + bytes.len() > HALF_BYTES
            && let Some(mut full) = self.newer.take()
        {
            full.flush().await.with_context(what)?;
            tokio::fs::rename(&path, self.directory.join(OLDER)).await.with_context(what)?;
        }
        let newer = match &mut self.newer {
            Some(newer) => newer,
            None => {
                let mut options = tokio::fs::OpenOptions::new();
                let opened = options.write(true).create(true).truncate(true).mode(0o600).open(&path).await;
                self.length = 0;
                self.newer.insert(opened.with_context(what)?)
            }
        };
        newer.write_all(bytes).await.with_context(what)?;
        // The file is written to in the background, and tells of it here.
        newer.flush().await.with_context(what)?;
        self.length += bytes.len();
        Ok(())
    }
}

/// A reader, which goes on where it was.
#[derive(Debug)]
pub struct Reader {
    directory: PathBuf,
    current: Option<fs::File>,
}

impl Reader {
    /// One of what was recorded in `directory`, from the oldest byte that is kept.
    pub fn new(directory: &Path) -> io::Result<Self> {
        Ok(Self { current: open(&directory.join(OLDER))?, directory: directory.to_owned() })
    }

    /// What has been recorded since the last call; empty for nothing. Blocks on the file system.
    ///
    /// A reader that is slower than the guest misses what was replaced meanwhile.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        loop {
            // Looked for before the rest of the current one is read: once there is a newer file, this one has its last byte.
            let newer = self.newer()?;
            if let Some(current) = &mut self.current {
                current.read_to_end(&mut bytes)?;
            }
            match newer {
                Some(newer) => self.current = Some(newer),
                None => return Ok(bytes),
            }
        }
    }

    /// The file that grows, if it is another one than the current.
    fn newer(&self) -> io::Result<Option<fs::File>> {
        let Some(newer) = open(&self.directory.join(NEWER))? else { return Ok(None) };
        let current = self.current.as_ref().map(fs::File::metadata).transpose()?;
        let same = current.is_some_and(|current| newer.metadata().is_ok_and(|newer| newer.ino() == current.ino()));
        Ok((!same).then_some(newer))
    }
}

fn open(path: &Path) -> io::Result<Option<fs::File>> {
    match fs::File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read_and_so_is_what_follows() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut reader = Reader::new(directory.path()).expect("opens");
        assert_eq!(reader.read().expect("reads"), b"");
        let mut transcript = Transcript::new(directory.path().into());
        for text in [&b"first\n"[..], b"second\n"] {
            transcript.append(text).await.expect("writes");
            assert_eq!(reader.read().expect("reads"), text);
        }
        assert_eq!(Reader::new(directory.path()).expect("opens").read().expect("reads"), b"first\nsecond\n");
    }

    #[tokio::test]
    async fn a_guest_that_writes_for_ever_leaves_a_bounded_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut transcript = Transcript::new(directory.path().into());
        let mut follower = Reader::new(directory.path()).expect("opens");
        let (mut written, mut followed) = (Vec::new(), Vec::new());
        for number in 0..100_u8 {
            let chunk = [number; 4096];
            transcript.append(&chunk).await.expect("writes");
            written.extend(chunk);
            followed.extend(follower.read().expect("reads"));
        }
        assert!(followed == written, "who reads along misses nothing");
        let kept = Reader::new(directory.path()).expect("opens").read().expect("reads");
        assert!((HALF_BYTES..=2 * HALF_BYTES).contains(&kept.len()) && written.ends_with(&kept), "{}", kept.len());
        let on_disk: u64 = fs::read_dir(directory.path())
            .expect("lists")
            .map(|entry| entry.and_then(|entry| entry.metadata()).expect("is there").len())
            .sum();
        assert!(on_disk <= 2 * HALF_BYTES as u64, "{on_disk}");
    }
}
