//! `bulkhead console`: what the guest's kernel and agent have written, as far as it is kept.
//!
//! It is the output of a guest that nobody trusts, on an administrator's terminal: whatever is not plain text is shown by
//! name, wherever the output goes, since a file is looked at later.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, bail};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use super::sandbox::Sandbox;
use super::{Format, print, show};
use crate::vm::transcript::Reader;

/// Shows the console of `sandbox`, and with `follow` what comes.
pub fn run(sandbox: &Sandbox, follow: bool, format: Format) -> anyhow::Result<()> {
    if follow && format == Format::Json {
        bail!("--follow has no end that a JSON document could have, accepted with it is --output text");
    }
    // Before the first read, so that nothing comes unnoticed in between.
    let changes = follow.then(|| Changes::of(sandbox)).transpose()?.flatten();
    let what = || format!("read the console in {}", sandbox.directory.display());
    let mut reader = Reader::new(&sandbox.directory).with_context(what)?;
    let mut visible = Visible::default();
    let kept = visible.push(&reader.read().with_context(what)?);
    if format == Format::Json {
        let console = kept + &visible.finish();
        return show(format, &json!({"id": sandbox.id, "console": console}), |_| String::new());
    }
    print(&kept)?;
    if let Some(changes) = changes {
        while changes.wait()? {
            print(&visible.push(&reader.read().with_context(what)?))?;
        }
        print(&visible.push(&reader.read().with_context(what)?))?;
    }
    print(&visible.finish())
}

/// Tells when there may be more to read.
struct Changes {
    directory: Inotify,
    shim: OwnedFd,
}

impl Changes {
    /// None where nothing will come, because no shim reads the guest's console any more.
    fn of(sandbox: &Sandbox) -> anyhow::Result<Option<Self>> {
        let Some(pid) = sandbox.shim_pid.and_then(Pid::from_raw) else { return Ok(None) };
        let Ok(shim) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(None) };
        // Looked up after the pidfd was opened: if this is the shim now, the pidfd is its as well.
        if !sandbox.journal.as_ref().is_some_and(|state| state.shim.lives()) {
            return Ok(None);
        }
        let directory = watch(&sandbox.directory)?;
        Ok(directory.map(|directory| Self { directory, shim }))
    }

    /// Waits for a change; false once there will be none, since the shim or the directory has gone.
    fn wait(&self) -> anyhow::Result<bool> {
        let mut files = [PollFd::new(&self.directory, PollFlags::IN), PollFd::new(&self.shim, PollFlags::IN)];
        match poll(&mut files, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("wait for the console"),
        }
        let [changed, shim_ended] = files.each_ref().map(|file| !file.revents().is_empty());
        if changed {
            let events = self.directory.read_events().context("wait for the console")?;
            if events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_DELETE_SELF)) {
                return Ok(false);
            }
        }
        Ok(!shim_ended)
    }
}

/// Watches what is written in `directory`; None if it is gone.
fn watch(directory: &Path) -> anyhow::Result<Option<Inotify>> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).context("wait for the console")?;
    let interest = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE_SELF;
    match inotify.add_watch(directory, interest) {
        Ok(_) => Ok(Some(inotify)),
        Err(nix::errno::Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno).with_context(|| format!("watch {}", directory.display())),
    }
}

/// Turns bytes that arrive in pieces into text that does nothing to a terminal.
#[derive(Debug, Default)]
struct Visible {
    /// The beginning of what the next piece may complete: of a character, or of the end of a line.
    rest: Vec<u8>,
}

impl Visible {
    /// The text of `bytes`, as far as it is complete.
    fn push(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let mut whole = self.rest.len() - incomplete(&self.rest);
        if self.rest[..whole].ends_with(b"\r") {
            whole -= 1;
        }
        let text: Vec<u8> = self.rest.drain(..whole).collect();
        visible(&text)
    }

    /// The text of what was never completed.
    fn finish(&mut self) -> String {
        visible(&std::mem::take(&mut self.rest))
    }
}

/// Length of the incomplete character that `bytes` end with; 0 for none.
fn incomplete(bytes: &[u8]) -> usize {
    // A character has four bytes at most, so three may be there of one that is not whole.
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    (1..=tail.len())
        .find(|length| {
            let end = &tail[tail.len() - length..];
            std::str::from_utf8(end).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .unwrap_or(0)
}

/// Text as it is but for control characters: `^[` for escape, `\u{9b}` for those above, and for the ones that turn the
/// direction of writing.
fn visible(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace("\r\n", "\n");
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            '\0'..='\u{1f}' | '\u{7f}' => {
                shown.push('^');
                shown.push(char::from(character as u8 ^ 0x40));
            }
            '\u{80}'..='\u{9f}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                shown.extend(character.escape_unicode());
            }
            _ => shown.push(character),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_by_name_and_do_nothing() {
        let shown = visible("\x1b[2J\x07ä\tb\r\nc\rd\x7f\u{9b}31m\u{202e}".as_bytes());
        assert_eq!(shown, "^[[2J^Gä\tb\nc^Md^?\\u{9b}31m\\u{202e}");
        assert_eq!(visible(b"\xff\xfe"), "\u{fffd}\u{fffd}");
    }

    #[test]
    fn pieces_are_joined_where_they_were_cut() {
        let bytes = "ä€𝄞\r\nx\r\n\x1b".as_bytes();
        for cut in 0..=bytes.len() {
            let mut visible = Visible::default();
            let text = visible.push(&bytes[..cut]) + &visible.push(&bytes[cut..]) + &visible.finish();
            assert_eq!(text, "ä€𝄞\nx\n^[", "cut at {cut}");
        }
        let mut visible = Visible::default();
        let text: String = bytes.iter().map(|byte| visible.push(&[*byte])).collect();
        assert_eq!(text + &visible.finish(), "ä€𝄞\nx\n^[");
    }

    #[test]
    fn what_is_never_completed_is_shown_at_the_end() {
        let mut visible = Visible::default();
        assert_eq!(visible.push(b"a\xf0\x9d"), "a");
        assert_eq!(visible.finish(), "\u{fffd}");
        assert_eq!(visible.push(b"b\r"), "b");
        assert_eq!(visible.finish(), "^M");
    }

    #[test]
    fn a_json_document_that_never_ends_is_refused() {
        let sandbox = Sandbox::read(Path::new("/no/such/web-123456")).expect("reads");
        let said = run(&sandbox, true, Format::Json).expect_err("is refused").to_string();
        assert!(said.starts_with("--follow") && said.ends_with("--output text"), "{said}");
    }
}
