//! One run of a program, with a deadline.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long a command may take unless its caller says otherwise: longer than crictl waits for an answer.
pub const COMMAND_DEADLINE: Duration = Duration::from_mins(4);

/// What a program left when it ended.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub line: String,
    /// Exit code, or 128 plus the signal that ended it.
    pub code: i32,
    /// Everything written to stdout.
    pub stdout: Vec<u8>,
    /// Everything written to stderr.
    pub stderr: String,
    /// From the start of the program to its end and the end of its output.
    pub elapsed: Duration,
}

impl Output {
    /// Stdout as text, without surrounding white space.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Fails, with everything the program said, unless it exited with 0.
    pub fn success(self) -> Result<Self> {
        self.exited(0)
    }

    /// Fails, with everything the program said, unless it exited with `code`.
    pub fn exited(self, code: i32) -> Result<Self> {
        ensure!(self.code == code, "exit code {} instead of {code}\n{}", self.code, self.describe());
        Ok(self)
    }

    /// Fails if the program succeeded; otherwise returns what it said on stderr.
    pub fn failure(self) -> Result<String> {
        ensure!(self.code != 0, "it was expected to fail and did not\n{}", self.describe());
        Ok(self.stderr.trim().to_owned())
    }

    /// The command line and its output, cut to a size that can be read.
    pub fn describe(&self) -> String {
        let mut text = format!("$ {}\n", self.line);
        for (name, content) in [("stdout", self.text()), ("stderr", self.stderr.trim().to_owned())] {
            if !content.is_empty() {
                let shown: String = content.chars().take(4000).collect();
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{name}: {shown}");
            }
        }
        text
    }
}

/// A program about to be run.
#[derive(Debug)]
pub struct Run {
    command: Command,
    input: Option<Vec<u8>>,
    deadline: Duration,
}

impl Run {
    /// A run of `program` with the caller's environment.
    pub fn new(program: impl AsRef<Path>) -> Self {
        Self { command: Command::new(program.as_ref()), input: None, deadline: COMMAND_DEADLINE }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets one environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Feeds `input` to stdin and closes it. Without this, stdin is /dev/null.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// Kills the program when it takes longer.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The program.
    pub fn program(&self) -> PathBuf {
        self.command.get_program().into()
    }

    /// Its arguments.
    pub fn arguments(&self) -> Vec<String> {
        self.command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect()
    }

    /// The environment variables that were set for it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let text = |value: &std::ffi::OsStr| value.to_string_lossy().into_owned();
        self.command.get_envs().filter_map(|(key, value)| Some((text(key), text(value?)))).collect()
    }

    /// The command line as a person would type it.
    pub fn line(&self) -> String {
        let mut line = display_word(&self.command.get_program().to_string_lossy());
        for arg in self.command.get_args() {
            line.push(' ');
            line.push_str(&display_word(&arg.to_string_lossy()));
        }
        line
    }

    /// Runs it to its end; a non-zero exit is not an error here.
    pub fn output(self) -> Result<Output> {
        self.start()?.finish()
    }

    /// Runs it to its end and fails unless it exits with 0.
    pub fn success(self) -> Result<Output> {
        self.output()?.success()
    }

    /// Starts it; [`Running::finish`] waits for the end.
    pub fn start(mut self) -> Result<Running> {
        let line = self.line();
        // Its own process group, so that ending it also ends what it started.
        self.command
            .process_group(0)
            .stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = self.command.spawn().with_context(|| format!("start {line}"))?;
        if let (Some(input), Some(mut stdin)) = (self.input, child.stdin.take()) {
            thread::spawn(move || {
                // A program may end without reading all of its input; its exit code tells the rest.
                let _ = stdin.write_all(&input);
            });
        }
        let stdout = collect(child.stdout.take().context("no pipe for stdout")?);
        let stderr = collect(child.stderr.take().context("no pipe for stderr")?);
        Ok(Running { line, child, seen: Vec::new(), stdout, stderr, started, deadline: self.deadline, waited: false })
    }
}

/// A program that runs; dropping it kills it.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    /// What [`Running::expect`] has taken of stdout.
    seen: Vec<u8>,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
    started: Instant,
    deadline: Duration,
    waited: bool,
}

impl Running {
    /// Process id of the program.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until it has written `needle` to stdout.
    pub fn expect(&mut self, needle: &str, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let said = String::from_utf8_lossy(&self.seen).into_owned();
            if said.contains(needle) {
                return Ok(());
            }
            let chunk = self.stdout.recv_timeout(end.saturating_duration_since(Instant::now()));
            let chunk = chunk.with_context(|| format!("wait for {needle:?} of {}, which said {said:?}", self.line))?;
            self.seen.extend(chunk);
        }
    }

    /// Waits for the end of the program and of its output.
    pub fn finish(mut self) -> Result<Output> {
        let end = self.started + self.deadline;
        let Some(status) = wait_until(&mut self.child, end)? else {
            self.kill();
            let stdout = gather(std::mem::take(&mut self.seen), &self.stdout, grace());
            let stderr = gather(Vec::new(), &self.stderr, grace());
            bail!(
                "still running after {:?}: {}\nstdout: {}\nstderr: {}",
                self.deadline,
                self.line,
                String::from_utf8_lossy(&stdout.0).chars().take(2000).collect::<String>(),
                String::from_utf8_lossy(&stderr.0).chars().take(2000).collect::<String>()
            );
        };
        self.waited = true;
        let (stdout, stdout_ended) = gather(std::mem::take(&mut self.seen), &self.stdout, end);
        let (stderr, stderr_ended) = gather(Vec::new(), &self.stderr, end);
        ensure!(
            stdout_ended && stderr_ended,
            "its output was still open {:?} after it ended: {}",
            self.deadline,
            self.line
        );
        Ok(Output {
            line: self.line.clone(),
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            elapsed: self.started.elapsed(),
        })
    }

    /// Sends SIGTERM to the program and returns what it wrote until then.
    pub fn terminate(mut self) -> Result<Output> {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), nix::sys::signal::Signal::SIGTERM)
            .with_context(|| format!("terminate {}", self.line))?;
        self.deadline = self.started.elapsed() + Duration::from_secs(10);
        self.finish()
    }

    fn kill(&mut self) {
        // The group may have gone already; then there is nothing to end.
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(self.pid()), nix::sys::signal::Signal::SIGKILL);
        let _ = self.child.wait();
        self.waited = true;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.waited {
            self.kill();
        }
    }
}

fn grace() -> Instant {
    Instant::now() + Duration::from_secs(1)
}

/// Waits for `child` without polling; `None` when `end` came first.
pub fn wait_until(child: &mut Child, end: Instant) -> Result<Option<ExitStatus>> {
    let pid = Pid::from_raw(child.id().cast_signed()).context("process id 0")?;
    let fd = pidfd_open(pid, PidfdFlags::empty()).context("open a pidfd")?;
    loop {
        if let Some(status) = child.try_wait().context("wait for a child")? {
            return Ok(Some(status));
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout = rustix::event::Timespec::try_from(left).context("a deadline too far away")?;
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll a pidfd"),
        }
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => return,
                // The receiver is gone when nobody wants the output any more.
                Ok(n) => {
                    if sender.send(buffer[..n].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

/// `all`, and everything received until the other side ended (true) or `end` came (false).
fn gather(mut all: Vec<u8>, receiver: &mpsc::Receiver<Vec<u8>>, end: Instant) -> (Vec<u8>, bool) {
    loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(chunk) => all.extend(chunk),
            Err(mpsc::RecvTimeoutError::Disconnected) => return (all, true),
            Err(mpsc::RecvTimeoutError::Timeout) => return (all, false),
        }
    }
}

fn display_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

/// Lets time pass: between two looks at something that tells nobody when it changes, or because passing time is the test.
pub fn pause(duration: Duration) {
    thread::sleep(duration);
}

/// Calls `probe` until it returns a value, or fails with what it said last.
///
/// `what` completes the sentence "waited N s for ...".
pub fn wait_for<T>(what: &str, deadline: Duration, probe: impl FnMut() -> Result<T>) -> Result<T> {
    wait_at(Duration::from_millis(20), what, deadline, probe)
}

/// [`wait_for`] with another time between two calls, for what costs more to ask.
pub fn wait_at<T>(pace: Duration, what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => {
                return Err(error.context(format!("waited {:.1} s for {what}", deadline.as_secs_f32())));
            }
            Err(_) => pause(pace),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_exit_code_are_told() {
        let output =
            Run::new("/bin/sh").args(["-c", "cat; echo no >&2; exit 3"]).input("in").output().expect("it works");
        assert_eq!((output.code, output.text().as_str(), output.stderr.as_str()), (3, "in", "no\n"));
        assert!(output.exited(3).is_ok());
    }

    #[test]
    fn what_was_waited_for_is_part_of_the_output() {
        let run = Run::new("/bin/sh").args(["-c", "echo first; read line; echo last"]).input("\n");
        let mut running = run.start().expect("it works");
        running.expect("first", Duration::from_secs(5)).expect("it works");
        running.expect("never said", Duration::from_millis(100)).expect_err("it fails");
        assert_eq!(running.finish().expect("it works").text(), "first\nlast");
    }

    #[test]
    fn a_signal_reads_as_128_and_its_number() {
        let output = Run::new("/bin/sh").args(["-c", "kill -9 $$"]).output().expect("it works");
        assert_eq!(output.code, 137);
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed() {
        let run = Run::new("/bin/sleep").arg("60").deadline(Duration::from_millis(100));
        let error = run.output().expect_err("it fails");
        assert!(error.to_string().contains("still running after 100ms: /bin/sleep 60"), "{error}");
    }

    #[test]
    fn output_held_open_by_a_child_is_an_error() {
        let run = Run::new("/bin/sh").args(["-c", "sleep 5 & exit 0"]).deadline(Duration::from_millis(300));
        assert!(run.output().expect_err("it fails").to_string().contains("still open"));
    }
}
