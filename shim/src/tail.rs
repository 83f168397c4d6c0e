//! The last bytes of a stream that is not trusted: a guest's console, a helper's stderr.
//!
//! Bounded, so that a peer that writes for ever costs a fixed amount of memory, and made harmless before anybody sees it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// A ring of bytes; clones share it.
#[derive(Debug, Clone)]
pub struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    capacity: usize,
}

impl Tail {
    /// An empty ring that keeps the last `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self { bytes: Arc::default(), capacity }
    }

    /// Appends `bytes` and forgets the oldest beyond the capacity.
    pub fn push(&self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let mut ring = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let surplus = (ring.len() + bytes.len()).saturating_sub(self.capacity);
        ring.drain(..surplus);
        ring.extend(bytes);
    }

    /// What is kept, as text: invalid UTF-8 replaced, terminal escapes and control characters other than newline and tab removed.
    pub fn text(&self) -> String {
        let mut ring = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(ring.make_contiguous()).into_owned();
        drop(ring);
        strip_escapes(&text)
    }

    /// The end of [`Self::text`] on one line: at most `limit` characters, the lines joined by `"; "`.
    pub fn line(&self, limit: usize) -> String {
        let text = self.text();
        let joined = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        let surplus = joined.chars().count().saturating_sub(limit);
        joined.chars().skip(surplus).collect()
    }
}

/// Removes CSI sequences (ECMA-48 §5.4) whole, and every other control character by itself.
fn strip_escapes(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(character) = rest.next() {
        if character == '\u{1b}' {
            if rest.next_if_eq(&'[').is_some() {
                // Parameters and intermediates, then one final byte from '@' to '~'.
                while rest.next_if(|c| (' '..='?').contains(c)).is_some() {}
                let _final_byte = rest.next_if(|c| ('@'..='~').contains(c));
            }
        } else if matches!(character, '\n' | '\t') || !character.is_control() {
            plain.push(character);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_bytes_are_kept() {
        let tail = Tail::new(8);
        tail.push(b"0123456");
        tail.push(b"789");
        assert_eq!(tail.text(), "23456789");
        tail.push(b"a much longer write than the ring");
        assert_eq!(tail.text(), "the ring");
    }

    #[test]
    fn escapes_and_control_characters_do_not_reach_a_terminal() {
        let tail = Tail::new(100);
        tail.push(b"\x1b[31;1mred\x1b[0m\r\n\x07bell\x1b]0;title\x00\xff");
        assert_eq!(tail.text(), "red\nbell]0;title\u{fffd}");
    }

    #[test]
    fn the_line_is_the_end_of_the_text() {
        let tail = Tail::new(100);
        tail.push(b"first\n\n  second \nthird\n");
        assert_eq!(tail.line(100), "first; second; third");
        assert_eq!(tail.line(9), "ond; third"[1..].to_string());
    }
}
