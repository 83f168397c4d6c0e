//! A program run on a pseudo-terminal, as a person at a keyboard would.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::command::{Run, wait_until};

type Screen = Arc<(Mutex<Vec<u8>>, Condvar)>;

/// A running program and the keyboard's and screen's side of its terminal. Dropping it kills the program.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    screen: Screen,
    line: String,
}

impl Terminal {
    /// Starts `program` with a terminal of `rows` and `columns` as its controlling one.
    pub fn start(
        program: &Path,
        args: &[&str],
        environment: &[(&str, String)],
        rows: u16,
        columns: u16,
    ) -> Result<Self> {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("open a terminal")?;
        grantpt(&master).context("grant a terminal")?;
        unlockpt(&master).context("unlock a terminal")?;
        let name = ptsname(&master, Vec::new()).context("name of a terminal")?;
        resize(&master, rows, columns)?;
        let side = || -> Result<OwnedFd> {
            open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
                .context("open a terminal")
        };
        // setsid(1) makes its stdin the controlling terminal, which takes a call between fork and exec.
        let child = Command::new("/usr/bin/setsid")
            .arg("--ctty")
            .arg(program)
            .args(args)
            .envs(environment.iter().map(|(key, value)| (*key, value.as_str())))
            .stdin(side()?)
            .stdout(side()?)
            .stderr(side()?)
            .spawn()
            .context("start setsid")?;
        let master = File::from(master);
        let screen = Screen::default();
        let (mut reader, written) = (master.try_clone()?, Arc::clone(&screen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO is how a terminal tells that its last user has gone.
            while let Ok(n) = reader.read(&mut buffer) {
                let (text, changed) = &*written;
                text.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..n]);
                changed.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        Ok(Self { child, master, screen, line: format!("{} {}", program.display(), args.join(" ")) })
    }

    /// Starts the program of `run` on a terminal; its input and deadline do not apply.
    pub fn of(run: &Run, rows: u16, columns: u16) -> Result<Self> {
        let args: Vec<_> = run.arguments();
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let environment = run.environment();
        let environment: Vec<_> = environment.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        Self::start(&run.program(), &args, &environment, rows, columns)
    }

    /// Starts the program of `run` with a pipe for its input, into which goes what is typed, line by line.
    pub fn behind_pipe(run: &Run) -> Result<Self> {
        let mut args = vec!["-c".to_owned(), "cat | \"$0\" \"$@\"".to_owned(), run.program().display().to_string()];
        args.extend(run.arguments());
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let environment = run.environment();
        let environment: Vec<_> = environment.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        Self::start(Path::new("/bin/sh"), &args, &environment, 24, 80)
    }

    /// Types `text`.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).with_context(|| format!("type {text:?} into {}", self.line))
    }

    /// Changes the size; the program gets SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        resize(&self.master, rows, columns)
    }

    /// What was shown so far.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.screen.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until `needle` was shown.
    pub fn expect(&self, needle: &str, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let (text, changed) = &*self.screen;
        let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let shown = String::from_utf8_lossy(&text).into_owned();
            if shown.contains(needle) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{} did not show {needle:?} within {deadline:?}, but {shown:?}", self.line);
            }
            text = changed.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the program's end and returns its exit code.
    pub fn wait(mut self, deadline: Duration) -> Result<i32> {
        let Some(status) = wait_until(&mut self.child, Instant::now() + deadline)? else {
            bail!("still running after {deadline:?}: {}; it showed {:?}", self.line, self.shown());
        };
        status.code().with_context(|| format!("{} was ended by a signal", self.line))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(terminal: impl std::os::fd::AsFd, rows: u16, columns: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).context("set the size of a terminal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_sees_a_terminal_of_the_given_size() {
        let script = "stty size; read line; echo \"got $line\"; exit 4";
        let mut terminal = Terminal::start(Path::new("/bin/sh"), &["-c", script], &[], 33, 77).expect("it works");
        terminal.expect("33 77", Duration::from_secs(5)).expect("it works");
        terminal.send("hello\n").expect("it works");
        terminal.expect("got hello", Duration::from_secs(5)).expect("it works");
        assert_eq!(terminal.wait(Duration::from_secs(5)).expect("it works"), 4);
    }
}
