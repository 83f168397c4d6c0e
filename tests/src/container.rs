//! A container in a pod, driven through `crictl`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::command::{Output, Run, Running, wait_for};
use crate::containerd::CRI_NAMESPACE;
use crate::image::BUSYBOX;
use crate::pod::{Pod, namespace_mode, set};

/// How long containerd may keep a log open after the end of its container.
const LOG_CLOSES: Duration = Duration::from_secs(5);

/// What a container is asked to be: CRI's `ContainerConfig` as JSON.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    config: Value,
}

impl ContainerSpec {
    /// A container that runs `command` from the busybox image, in a PID namespace of its own.
    pub fn new(command: &[&str]) -> Self {
        let config = json!({"metadata": {"attempt": 0}, "image": {"image": BUSYBOX}, "command": command});
        Self { config }.security("namespace_options", json!({"pid": namespace_mode::CONTAINER}))
    }

    /// A container that runs a shell script.
    pub fn script(script: &str) -> Self {
        Self::new(&["/bin/sh", "-c", script])
    }

    /// A container that waits to be stopped and ends at once when it is.
    pub fn idle() -> Self {
        Self::script("trap 'exit 0' TERM; while :; do sleep 1000000 & wait $!; done")
    }

    /// Sets the field at `pointer`, such as `/linux/resources/memory_limit_in_bytes`.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        set(&mut self.config, pointer, value.into());
        self
    }

    /// Sets a field of `linux.security_context`.
    #[must_use]
    pub fn security(self, field: &str, value: impl Into<Value>) -> Self {
        self.set(&format!("/linux/security_context/{field}"), value)
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(self, key: &str, value: &str) -> Self {
        self.push("envs", json!({"key": key, "value": value}))
    }

    /// Binds `host_path` to `container_path`.
    #[must_use]
    pub fn mount(self, host_path: &Path, container_path: &str, readonly: bool) -> Self {
        self.push("mounts", json!({"host_path": host_path, "container_path": container_path, "readonly": readonly}))
    }

    /// Binds `host_path` and what is mounted below it to `container_path`, all of it read-only (containerd 2.x).
    #[must_use]
    pub fn mount_all_read_only(self, host_path: &Path, container_path: &str) -> Self {
        let mount = json!({
            "host_path": host_path, "container_path": container_path, "readonly": true, "recursive_read_only": true,
        });
        self.push("mounts", mount)
    }

    /// Keeps stdin open for `attach`.
    #[must_use]
    pub fn stdin(self) -> Self {
        self.set("/stdin", true)
    }

    /// Gives it a terminal.
    #[must_use]
    pub fn terminal(self) -> Self {
        self.set("/tty", true).set("/stdin", true)
    }

    /// Limits its memory.
    #[must_use]
    pub fn memory(self, mib: u64) -> Self {
        self.set("/linux/resources/memory_limit_in_bytes", mib << 20)
    }

    /// Adds an entry to one of the lists of CRI's `ContainerConfig`.
    #[must_use]
    pub fn push(mut self, list: &str, value: Value) -> Self {
        match self.config[list].as_array_mut() {
            Some(entries) => entries.push(value),
            None => self.config[list] = json!([value]),
        }
        self
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 plus a signal.
    pub code: i64,
    /// CRI's word for it, such as `Completed`, `Error` or `OOMKilled`.
    pub reason: String,
    /// More, if the runtime said more.
    pub message: String,
}

/// One line of a container's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// The text, without line end.
    pub text: Vec<u8>,
}

/// A container of `pod`.
#[derive(Debug)]
pub struct Container<'a> {
    /// The pod it is in.
    pub pod: &'a Pod,
    /// CRI's id.
    pub id: String,
    log_path: PathBuf,
}

impl<'a> Container<'a> {
    /// `crictl create`.
    pub fn create(pod: &'a Pod, spec: ContainerSpec) -> Result<Self> {
        let number = pod.node.next_number();
        let name = format!("container-{number}");
        let mut config = spec.config;
        config["metadata"]["name"] = json!(name);
        config["log_path"] = json!(format!("{name}.log"));
        let path = pod.config_path.with_file_name(format!("{name}.json"));
        fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        let output = pod.crictl(&["create", "--no-pull", &pod.id]).arg(&path).arg(&pod.config_path).success()?;
        let id = output.text();
        pod.node.remember(CRI_NAMESPACE, &id);
        Ok(Self { pod, id, log_path: pod.log_directory.join(format!("{name}.log")) })
    }

    /// `crictl start`.
    pub fn start(&self) -> Result<()> {
        self.try_start()?.success()?;
        Ok(())
    }

    /// `crictl start`, whatever comes of it.
    pub fn try_start(&self) -> Result<Output> {
        self.crictl(&["start", &self.id]).output()
    }

    /// A command of `crictl` on the container's node.
    pub fn crictl(&self, args: &[&str]) -> Run {
        self.pod.crictl(args)
    }

    /// `crictl exec --sync`. Its stdout holds the program's stderr too, and is lost if the program fails.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        exec_result(self.exec_command(command).output()?)
    }

    /// The run behind [`Self::exec`].
    pub fn exec_command(&self, command: &[&str]) -> Run {
        self.crictl(&["exec", "--sync", &self.id]).args(command)
    }

    /// [`Self::exec`] of a shell script that must succeed; its stdout, trimmed.
    pub fn shell(&self, script: &str) -> Result<String> {
        Ok(self.exec(&["/bin/sh", "-c", script])?.success()?.text())
    }

    /// `crictl exec -i`: a stream for each of stdin, stdout and stderr.
    pub fn exec_streamed(&self, command: &[&str], input: impl Into<Vec<u8>>) -> Result<Output> {
        exec_result(self.exec_streamed_command(command, input).output()?)
    }

    /// The run behind [`Self::exec_streamed`].
    pub fn exec_streamed_command(&self, command: &[&str], input: impl Into<Vec<u8>>) -> Run {
        self.crictl(&["exec", "-i", &self.id]).args(command).input(input)
    }

    /// Status part of `crictl inspect`.
    pub fn status(&self) -> Result<Value> {
        Ok(self.inspect()?["status"].take())
    }

    /// `crictl inspect`, as JSON.
    pub fn inspect(&self) -> Result<Value> {
        let output = self.crictl(&["inspect", "-o", "json", &self.id]).success()?;
        serde_json::from_slice(&output.stdout).context("parse the answer of crictl inspect")
    }

    /// CRI's word for its state, such as `CONTAINER_RUNNING`.
    pub fn state(&self) -> Result<String> {
        Ok(self.status()?["state"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until it has ended and its log is written.
    pub fn wait(&self, deadline: Duration) -> Result<Exit> {
        let exit = wait_for(&format!("container {} to end", self.id), deadline, || {
            let status = self.status()?;
            ensure!(status["state"] == "CONTAINER_EXITED", "its state is {}", status["state"]);
            Ok(Exit {
                // protobuf's JSON leaves a zero out or writes it, depending on crictl's version.
                code: status["exitCode"].as_i64().unwrap_or(0),
                reason: status["reason"].as_str().unwrap_or_default().to_owned(),
                message: status["message"].as_str().unwrap_or_default().to_owned(),
            })
        })?;
        self.wait_for_closed_log();
        Ok(exit)
    }

    /// Waits until it has ended, killed for its memory.
    pub fn wait_for_oom_kill(&self, deadline: Duration) -> Result<()> {
        let exit = self.wait(deadline)?;
        ensure!(exit.code == 137, "exit {exit:?}");
        // containerd hears of the end and of its reason by two events, and may tell the end first.
        wait_for("the reason of the end", deadline, || {
            let status = self.status()?;
            ensure!(status["reason"] == "OOMKilled", "its status is {status}");
            Ok(())
        })
    }

    /// Waits a while for containerd to close the log: it tells the end when it may still have lines to write.
    fn wait_for_closed_log(&self) {
        let Some(daemon_pid) = self.pod.node.daemon_pid() else { return };
        let is_open = || {
            let files = fs::read_dir(format!("/proc/{daemon_pid}/fd")).into_iter().flatten().flatten();
            files.filter_map(|file| fs::read_link(file.path()).ok()).any(|target| target == self.log_path)
        };
        // A log that stays open is no failure by itself: who misses lines in it tells so.
        let _ = wait_for("the log to be closed", LOG_CLOSES, || {
            ensure!(!is_open(), "it is open");
            Ok(())
        });
    }

    /// `crictl stats`, as JSON: the entry of this container.
    pub fn stats(&self) -> Result<Value> {
        let output = self.crictl(&["stats", "-o", "json", "--id", &self.id]).success()?;
        let all: Value = serde_json::from_slice(&output.stdout).context("parse the answer of crictl stats")?;
        let mine =
            all["stats"].as_array().and_then(|list| list.iter().find(|e| e["attributes"]["id"] == self.id.as_str()));
        Ok(mine.with_context(|| format!("no statistics of {} in {all}", self.id))?.clone())
    }

    /// `crictl stop` with a grace period in seconds.
    pub fn stop(&self, grace_seconds: u32) -> Result<Output> {
        self.crictl(&["stop", "--timeout", &grace_seconds.to_string(), &self.id]).success()
    }

    /// `crictl rm`; the container must have ended.
    pub fn remove(self) -> Result<()> {
        self.crictl(&["rm", &self.id]).success()?;
        Ok(())
    }

    /// `crictl rm -f`.
    pub fn remove_by_force(self) -> Result<()> {
        self.crictl(&["rm", "-f", &self.id]).success()?;
        Ok(())
    }

    /// Waits for the end, removes the container and returns its exit and log.
    pub fn finish(self, deadline: Duration) -> Result<(Exit, Vec<LogLine>)> {
        let exit = self.wait(deadline)?;
        let log = self.log()?;
        self.remove()?;
        Ok((exit, log))
    }

    /// The log as the kubelet would read it, lines that CRI split joined again.
    pub fn log(&self) -> Result<Vec<LogLine>> {
        let content = match fs::read(&self.log_path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            content => content.with_context(|| format!("read {}", self.log_path.display()))?,
        };
        parse_log(&content)
    }

    /// The file that containerd writes the log to.
    pub fn log_path(&self) -> &Path {
        &self.log_path
    }

    /// Text of the log's lines on one stream, joined by line ends.
    pub fn log_text(&self, stream: &str) -> Result<String> {
        Ok(text_of(&self.log()?, stream))
    }

    /// Waits until the log's stdout holds `needle`, and returns how long that took.
    pub fn wait_for_log(&self, needle: &str, deadline: Duration) -> Result<Duration> {
        let started = Instant::now();
        wait_for(&format!("{needle:?} in the log"), deadline, || {
            let text = self.log_text("stdout")?;
            ensure!(text.contains(needle), "the log is {text:?}");
            Ok(started.elapsed())
        })
    }

    /// Starts `crictl attach -i` with `input` and leaves it running.
    pub fn attach(&self, input: impl Into<Vec<u8>>) -> Result<Running> {
        self.crictl(&["attach", "-i", &self.id]).input(input).start()
    }
}

/// What the program of an exec did, from what crictl did.
///
/// crictl exits with 1 whenever the program fails and tells the code in its last message. Here the code is that of the
/// program, and stderr is the program's own.
pub fn exec_result(mut output: Output) -> Result<Output> {
    // `... synchronously: command 'sh -c ...' exited with 5: STDERR`, where the text between the quotes can be anything,
    // or `STDERR time=... msg="execing command in container ID: command terminated with exit code 5"`.
    let said = output.stderr.clone();
    let (code, own) = if let Some((_, rest)) = said.rsplit_once("' exited with ") {
        rest.split_once(": ").with_context(|| output.describe())?
    } else if let Some((before, rest)) = said.rsplit_once(": command terminated with exit code ") {
        (rest.trim_end().trim_end_matches('"'), before.rsplit_once("time=").map_or("", |(own, _)| own))
    } else {
        return Ok(output);
    };
    own.clone_into(&mut output.stderr);
    output.code = code.parse().with_context(|| format!("exit code {code:?}"))?;
    Ok(output)
}

/// Text of a log's lines on one stream, joined by line ends.
pub fn text_of(log: &[LogLine], stream: &str) -> String {
    let lines = log.iter().filter(|line| line.stream == stream);
    lines.map(|line| String::from_utf8_lossy(&line.text).into_owned()).collect::<Vec<_>>().join("\n")
}

/// Parses CRI's log format: `TIME STREAM P|F TEXT`, where P says that the line goes on in the stream's next record.
fn parse_log(content: &[u8]) -> Result<Vec<LogLine>> {
    let mut lines: Vec<LogLine> = Vec::new();
    let mut partial: Vec<LogLine> = Vec::new();
    for record in content.split(|b| *b == b'\n').filter(|record| !record.is_empty()) {
        let mut fields = record.splitn(4, |b| *b == b' ').skip(1);
        let (Some(stream), Some(tag), Some(text)) = (fields.next(), fields.next(), fields.next()) else {
            anyhow::bail!("not a record of a CRI log: {}", String::from_utf8_lossy(record));
        };
        let stream = String::from_utf8_lossy(stream).into_owned();
        let mut line = match partial.iter().position(|line| line.stream == stream) {
            Some(index) => partial.swap_remove(index),
            None => LogLine { stream, text: Vec::new() },
        };
        line.text.extend_from_slice(text);
        if tag == b"P" { partial.push(line) } else { lines.push(line) }
    }
    lines.extend(partial);
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_lines_are_joined_per_stream() {
        let log = b"T stdout P one \nT stderr F error\nT stdout F two\nT stdout F \n";
        let lines = parse_log(log).expect("it works");
        assert_eq!(text_of(&lines, "stdout"), "one two\n");
        assert_eq!(text_of(&lines, "stderr"), "error");
    }

    #[test]
    fn a_torn_record_is_an_error() {
        assert!(parse_log(b"T stdout").is_err());
    }
}
