//! `ctr run --log-uri`: output goes to a file or to a logging binary, as with runc.
//!
//! See <https://github.com/containerd/containerd/blob/main/docs/runtime-v2.md#logging>.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::row::{Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;

const SOON: Duration = Duration::from_secs(20);

const ROWS: &[Row] = &[
    // containerd's shim for runc closes the file under what it still copies ("error copying stderr", 1.6).
    Row::alone("a log file gets both streams, is made with its directories, and is appended to", file)
        .only(&[Runtime::Bulkhead]),
    Row::alone("a logging binary gets both streams whole, is told whose they are, and ends with them", binary),
    Row::alone("an exec has a logging binary of its own", exec),
    Row::alone("a logging binary that does not exist is an error that names it", missing),
    Row::alone("a log URI of an unknown scheme is an error that names it", unknown_scheme),
    // containerd's shim for runc takes the end of such a binary for its being ready.
    Row::alone("a logging binary that fails at once is an error that tells how", failing).only(&[Runtime::Bulkhead]),
    Row::alone("a logging binary of a killed shim reads what came and ends", shim_killed).only(&[Runtime::Bulkhead]),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], &[Runtime::Runc, Runtime::Bulkhead], ROWS)
}

/// A logging binary that writes what it gets into files of a directory of its own.
struct Logger {
    directory: PathBuf,
    uri: String,
}

impl Logger {
    fn new(context: &Context, name: &str) -> Result<Self> {
        let directory = context.scratch.join(name);
        fs::create_dir(&directory)?;
        // containerd's shim sends SIGTERM when the container is deleted, whatever is left to read.
        let script = "#!/bin/sh\ntrap '' TERM\ncd \"$2\" || exit 2\n\
                      echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $1 $#\" >who; echo $$ >pid\nprintf x >&5; exec 5>&-\n\
                      cat <&3 >out & cat <&4 >err & exec 3<&- 4<&-; wait; echo ended >end\n";
        let program = context.scratch.join(format!("{name}.sh"));
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let uri = format!("binary://{}?at%3A={}", program.display(), directory.display());
        Ok(Self { directory, uri })
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.directory.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// Waits until it has ended by itself, and is gone.
    fn ended(&self) -> Result<()> {
        wait_for("the logging binary to end", SOON, || {
            ensure!(self.read("end")? == "ended\n");
            let pid = self.read("pid")?;
            ensure!(!Path::new("/proc").join(pid.trim()).exists(), "process {pid} is there");
            Ok(())
        })
    }
}

fn file(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let path = context.scratch.join("logs/of a/log");
    let uri = format!("file://{}", path.display().to_string().replace(' ', "%20"));
    for _ in 0..2 {
        let id = ctr.new_id("file");
        let output = ctr.run(&["--rm", "--log-uri", &uri], &id, &["sh", "-c", "echo out; echo err >&2"]).success()?;
        ensure!(output.stdout.is_empty(), "ctr says {:?}", output.text());
    }
    let log = fs::read_to_string(&path)?;
    let mut lines: Vec<_> = log.lines().collect();
    lines.sort_unstable();
    ensure!(lines == ["err", "err", "out", "out"], "the log reads {log:?}");
    let mode = path.metadata()?.permissions().mode() & 0o777;
    ensure!(mode == 0o644, "the log's mode is {mode:o}");
    Ok(())
}

fn binary(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("binary");
    let logger = Logger::new(context, "logger")?;
    let script = "seq 1 20000; echo wrong >&2; exit 3";
    ctr.run(&["--rm", "--log-uri", &logger.uri], &id, &["sh", "-c", script]).output()?.exited(3)?;
    logger.ended()?;
    let who = logger.read("who")?;
    ensure!(who == format!("{} {id} at: 2\n", context.node.name), "it was told {who:?}");
    let expected = (1..=20_000).map(|n| n.to_string()).collect::<Vec<_>>().join("\n") + "\n";
    let (out, err) = (logger.read("out")?, logger.read("err")?);
    ensure!(out == expected, "{} of {} bytes arrived", out.len(), expected.len());
    ensure!(err == "wrong\n", "stderr is {err:?}");
    Ok(())
}

fn exec(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("exec");
    let (of_init, of_exec) = (Logger::new(context, "init")?, Logger::new(context, "exec")?);
    ctr.run(&["-d", "--log-uri", &of_init.uri], &id, &["sh", "-c", "echo init; exec sleep 1000"]).success()?;
    let exec = ["task", "exec", "--exec-id", "other", "--log-uri", &of_exec.uri, &id, "echo", "from the exec"];
    let ran = ctr.command(&exec).success();
    let ended = of_exec.ended();
    let init_has = wait_for("the init's words", SOON, || {
        ensure!(of_init.read("out")? == "init\n");
        Ok(())
    });
    let too_early = of_init.read("end").is_ok();
    ctr.remove(&id)?;
    ran?;
    ended?;
    init_has?;
    ensure!(!too_early, "the init's logger ended with the exec's");
    ensure!(of_exec.read("out")? == "from the exec\n", "the exec's logger got {:?}", of_exec.read("out"));
    let who = of_exec.read("who")?;
    ensure!(who == format!("{} other at: 2\n", context.node.name), "the exec's logger was told {who:?}");
    of_init.ended()
}

fn refused(context: &Context, uri: &str) -> Result<String> {
    let ctr = context.ctr();
    let id = ctr.new_id("refused");
    let said = ctr.run(&["--rm", "--log-uri", uri], &id, &["true"]).output()?.failure()?;
    ctr.remove(&id)?;
    Ok(said)
}

fn missing(context: &Context) -> Result<()> {
    let said = refused(context, "binary:///nonexistent/logger?token=secret")?;
    let lower = said.to_lowercase();
    ensure!(lower.contains("/nonexistent/logger: no such file or directory"), "ctr said {said:?}");
    ensure!(!said.contains("secret"), "ctr said {said:?}");
    Ok(())
}

fn unknown_scheme(context: &Context) -> Result<()> {
    let said = refused(context, "https://example.com/log")?;
    ensure!(said.contains("https"), "ctr said {said:?}");
    if context.runtime.is_bulkhead() {
        ensure!(said.contains("is not supported, expected a FIFO, file:///PATH, binary:///PATH"), "ctr said {said:?}");
    }
    Ok(())
}

fn failing(context: &Context) -> Result<()> {
    let said = refused(context, "binary:///bin/sh?-c=exit%203")?;
    ensure!(said.contains("logging binary /bin/sh exited with status 3 before it was ready"), "ctr said {said:?}");
    let said = refused(context, "binary-v2:///bin/sh?-c=exec%205%3E%26-;cat%20%3C%263")?;
    ensure!(said.contains("closed file 5 without the byte"), "ctr said {said:?}");
    Ok(())
}

fn shim_killed(context: &Context) -> Result<()> {
    let ctr = context.ctr();
    let id = ctr.new_id("killed");
    let logger = Logger::new(context, "logger")?;
    ctr.run(&["-d", "--log-uri", &logger.uri], &id, &["sh", "-c", "echo last; exec sleep 1000"]).success()?;
    wait_for("the program's words", SOON, || {
        ensure!(logger.read("out")? == "last\n");
        Ok(())
    })?;
    faults::kill(&context.node, &id, Part::Shim)?;
    let ended = logger.ended();
    ctr.remove(&id)?;
    ended
}
