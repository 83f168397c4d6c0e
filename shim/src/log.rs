//! The shim's log: lines that look like those of containerd's own shims, written to the FIFO `log` of the bundle.
//!
//! containerd reads the FIFO and copies it into its log. It may be away (a restart) or slow: a line that does not fit is
//! dropped and counted, writing never blocks and never fails. The FIFO is open for reading too, so that a containerd that
//! closes its end gives no SIGPIPE, and one that comes back finds what was written meanwhile.
//!
//! `start` and `delete` do not log: containerd takes what they print for their answer.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

use crate::config::LogLevel;

/// `PIPE_BUF`: a write of this size or less is whole or not at all, on a pipe that does not block. See pipe(7).
const MAX_LINE_BYTES: usize = 4096;

/// Ends a line that was cut.
const CUT: &str = "...\"\n";

/// Makes `log` in `bundle` this process's log. Once per process. Without that file nothing is logged.
///
/// Panics are logged as well; standard error of the server is /dev/null.
pub fn init(bundle: &Path, level: LogLevel) -> anyhow::Result<()> {
    let sink = Sink::open(&bundle.join("log"))?;
    let subscriber = tracing_subscriber::registry().with(Logfmt { sink: Mutex::new(sink) }.with_filter(filter(level)));
    tracing::subscriber::set_global_default(subscriber).context("the log is set up twice")?;
    std::panic::set_hook(Box::new(|info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = info.payload_as_str().unwrap_or("panic");
        tracing::error!(location, error = message, "panic");
    }));
    Ok(())
}

/// Our own events from `level` on, those of libraries from `warn` on: they log each frame.
fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new().with_default(level.min(LevelFilter::WARN)).with_target(env!("CARGO_CRATE_NAME"), level)
}

/// Where lines go.
struct Sink {
    file: Option<File>,
    /// Lines lost since the last one that fitted.
    dropped: u64,
}

impl Sink {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let context = || format!("open log {}", path.display());
        let file = match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(context),
            Ok(metadata) => {
                // Never O_WRONLY: on a FIFO it fails without a reader, and each write does once the reader is gone.
                let access =
                    if metadata.file_type().is_fifo() { OFlags::RDWR } else { OFlags::WRONLY | OFlags::APPEND };
                let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                Some(File::from(rustix::fs::open(path, flags, Mode::empty()).with_context(context)?))
            }
        };
        Ok(Self { file, dropped: 0 })
    }

    fn write(&mut self, line: &str) {
        let Some(file) = &mut self.file else {
            return;
        };
        if self.dropped > 0 {
            let mut notice = String::new();
            begin(&mut notice, Level::WARN, "log lines were dropped, the reader is slow or away");
            finish(&mut notice, &format!(" dropped={}", self.dropped));
            if file.write_all(notice.as_bytes()).is_ok() {
                self.dropped = 0;
            }
        }
        // An error is EAGAIN, or something that a log has no place to tell.
        if file.write_all(line.as_bytes()).is_err() {
            self.dropped += 1;
        }
    }
}

struct Logfmt {
    sink: Mutex<Sink>,
}

/// Fields of a span, rendered once.
struct SpanFields(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Logfmt {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(SpanFields(fields.rest));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        values.record(&mut fields);
        if let Some(span) = context.span(id)
            && let Some(known) = span.extensions_mut().get_mut::<SpanFields>()
        {
            known.0.push_str(&fields.rest);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut line = String::with_capacity(256);
        begin(&mut line, *event.metadata().level(), &fields.message);
        for span in context.event_scope(event).into_iter().flat_map(tracing_subscriber::registry::Scope::from_root) {
            if let Some(known) = span.extensions().get::<SpanFields>() {
                fields.rest.push_str(&known.0);
            }
        }
        finish(&mut line, &fields.rest);
        // A poisoned lock means a panic while writing a line; the next line is welcome all the same.
        self.sink.lock().unwrap_or_else(std::sync::PoisonError::into_inner).write(&line);
    }
}

fn begin(line: &mut String, level: Level, message: &str) {
    // As logrus spells them.
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    line.push_str("time=\"");
    timestamp(line, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    line.push_str("\" level=");
    line.push_str(level);
    field(line, "msg", message);
}

fn finish(line: &mut String, fields: &str) {
    line.push_str(fields);
    line.push('\n');
    if line.len() > MAX_LINE_BYTES {
        let mut end = MAX_LINE_BYTES - CUT.len();
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push_str(CUT);
    }
}

fn field(line: &mut String, name: &str, value: &str) {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/@^+".contains(&byte);
    line.push(' ');
    line.push_str(name);
    line.push('=');
    if !value.is_empty() && value.bytes().all(plain) {
        line.push_str(value);
    } else {
        // Writing to a String cannot fail.
        let _ = write!(line, "{value:?}");
    }
}

/// The message of an event apart from its other fields, which are rendered.
#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, name: &Field, value: &dyn fmt::Debug) {
        self.record_str(name, &format!("{value:?}"));
    }

    fn record_str(&mut self, name: &Field, value: &str) {
        if name.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            field(&mut self.rest, name.name(), value);
        }
    }

    fn record_error(&mut self, name: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_str(name, &value.to_string());
    }
}

/// RFC 3339 in UTC, with nanoseconds.
fn timestamp(line: &mut String, since_epoch: Duration) {
    const DAY: u64 = 86400;
    let seconds = since_epoch.as_secs();
    let (year, month, day) = date(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / 3600, seconds % 3600 / 60, seconds % 60);
    let nanos = since_epoch.subsec_nanos();
    // Writing to a String cannot fail.
    let _ = write!(line, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z");
}

/// Gregorian date of a day since 1970-01-01, counted in years that begin in March, so that the leap day comes last.
fn date(day: u64) -> (u64, u64, u64) {
    const FOUR_CENTURIES: u64 = 146_097;
    // From 0000-03-01 to 1970-01-01.
    let day = day + 719_468;
    let (era, day) = (day / FOUR_CENTURIES, day % FOUR_CENTURIES);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + carry, month, day)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::stat::Mode as FileMode;

    use super::*;

    fn fifo() -> (tempfile::TempDir, Sink, File) {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, FileMode::S_IRUSR | FileMode::S_IWUSR).expect("makes a fifo");
        let sink = Sink::open(&path).expect("opens without a reader");
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let reader = File::from(rustix::fs::open(&path, flags, Mode::empty()).expect("opens"));
        (dir, sink, reader)
    }

    fn drain(mut reader: &File) -> String {
        let mut bytes = Vec::new();
        // At the end of what is there, either nobody has it open for writing any more or the read would block.
        if let Err(error) = reader.read_to_end(&mut bytes) {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
        String::from_utf8(bytes).expect("is text")
    }

    fn logged(level: LogLevel, log: impl FnOnce()) -> String {
        let (_dir, sink, reader) = fifo();
        let layer = Logfmt { sink: Mutex::new(sink) }.with_filter(filter(level));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        drain(&reader)
    }

    #[test]
    fn a_line_has_time_level_message_and_the_fields_of_event_and_spans() {
        let text = logged(LogLevel::Info, || {
            let span = tracing::info_span!("rpc", rpc = "create", sandbox_id = "abc", later = tracing::field::Empty);
            let _entered = span.enter();
            span.record("later", 7);
            tracing::warn!(path = "/a b", elapsed_ms = 12, error = %"say \"no\"\n", "tap not found");
        });
        let (time, rest) = text.split_at("time=\"2026-01-01T00:00:00.000000000Z\"".len());
        assert!(time.starts_with("time=\"20") && time.ends_with("Z\""), "{text}");
        assert_eq!(
            rest,
            " level=warning msg=\"tap not found\" path=\"/a b\" elapsed_ms=12 error=\"say \\\"no\\\"\\n\" rpc=create \
             sandbox_id=abc later=7\n"
        );
    }

    #[test]
    fn the_level_is_for_our_own_events_and_libraries_stay_at_warn() {
        let log = || {
            tracing::debug!("own");
            tracing::debug!(target: "h2", "frame");
            tracing::warn!(target: "h2", "broken");
        };
        let messages = |level| -> Vec<String> {
            let text = logged(level, log);
            text.lines().map(|line| line.rsplit_once("msg=").map_or("", |(_, msg)| msg).to_owned()).collect()
        };
        assert_eq!(messages(LogLevel::Trace), ["own", "broken"]);
        assert_eq!(messages(LogLevel::Debug), ["own", "broken"]);
        assert_eq!(messages(LogLevel::Info), ["broken"]);
        assert_eq!(messages(LogLevel::Error), [""; 0]);
    }

    #[test]
    fn a_reader_that_is_away_never_blocks_and_is_told_what_it_missed() {
        let (_dir, mut sink, reader) = fifo();
        let line = format!("{}\n", "x".repeat(999));
        for _ in 0..200 {
            sink.write(&line);
        }
        let lost = sink.dropped;
        assert!(lost > 100, "{lost}");
        let text = drain(&reader);
        assert_eq!(text.len() % line.len(), 0, "lines are whole");
        assert_eq!(text.len() / line.len() + usize::try_from(lost).expect("fits"), 200);
        sink.write(&line);
        let text = drain(&reader);
        assert!(text.contains("log lines were dropped") && text.contains(&format!("dropped={lost}\n")), "{text}");
        assert!(text.ends_with(&line));
    }

    #[test]
    fn a_reader_that_closed_does_no_harm() {
        let (dir, mut sink, reader) = fifo();
        drop(reader);
        sink.write("one\n");
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let again = rustix::fs::open(dir.path().join("log"), flags, Mode::empty()).expect("opens");
        sink.write("two\n");
        assert_eq!(drain(&File::from(again)), "one\ntwo\n");
    }

    #[test]
    fn a_long_line_is_cut_to_what_a_pipe_takes_at_once() {
        let text = logged(LogLevel::Info, || tracing::info!("{}", "é".repeat(5000)));
        assert!(text.len() <= MAX_LINE_BYTES && text.len() > MAX_LINE_BYTES - 8, "{}", text.len());
        assert!(text.ends_with("é...\"\n"));
    }

    #[test]
    fn without_a_file_nothing_is_logged_and_a_plain_file_is_appended_to() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("log");
        Sink::open(&path).expect("opens").write("lost\n");
        assert!(!path.exists());
        std::fs::write(&path, "first\n").expect("writes");
        Sink::open(&path).expect("opens").write("second\n");
        assert_eq!(std::fs::read_to_string(&path).expect("reads"), "first\nsecond\n");
    }

    #[test]
    fn dates_are_right_at_the_edges() {
        for (day, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (364, (1970, 12, 31)),
            (789, (1972, 2, 29)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (19_782, (2024, 2, 29)),
            (20_453, (2025, 12, 31)),
            (20_454, (2026, 1, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(day), expected, "day {day}");
        }
        let mut text = String::new();
        timestamp(&mut text, Duration::new(1_767_225_599, 5));
        assert_eq!(text, "2025-12-31T23:59:59.000000005Z");
    }
}
