//! Nothing of a program's input and output is lost, duplicated or held back.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::container::{ContainerSpec, exec_result, text_of};
use bulkhead_tests::image::hex;
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::row::{ALL, ALL_AND_STREAMING, Context, Row};
use bulkhead_tests::suite;
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::tools::Version;
use sha2::{Digest, Sha256};

const ROWS: &[Row] = &[
    Row::in_pod("a program that ends within a millisecond loses no line and no exit", short_lived),
    Row::in_pod("an exec that ends within a millisecond loses no line and no exit", short_lived_exec),
    Row::in_pod("50 MB of log arrive whole", large_log),
    Row::in_pod("a log without a last line end keeps its last line", last_line),
    Row::in_pod("stdout and stderr of a log keep apart", two_streams),
    Row::in_pod("3 MB through exec -i arrive whole, and the way back too", large_exec),
    Row::in_pod("the end of exec's stdin reaches the program", end_of_input),
    Row::in_pod("an exec whose program does not read ends all the same", unread_input),
    Row::in_pod("an exec that leaves a child in the background returns at once", background_child),
    Row::in_pod("a container whose child outlives it exits at once and whole", outliving_child),
    Row::in_pod("forty execs run side by side", parallel_execs),
    Row::in_pod("exec -t has a terminal that follows its size", exec_terminal),
    Row::in_pod("control-C on exec -t interrupts the program", interrupt),
    Row::in_pod("attach -i reads and writes the program's streams", attach),
    Row::in_pod("a container with a terminal logs what it shows", container_terminal),
    Row::in_pod("two attached see the same output", attach_twice),
    Row::alone("a container restarted a hundred times in one pod leaves nothing", hundred_restarts).only(ALL),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], ALL_AND_STREAMING, ROWS)
}

const SOON: Duration = Duration::from_secs(20);

fn short_lived(_: &Context, pod: &Pod) -> Result<()> {
    for round in 0..20 {
        let (exit, log) = pod.run(ContainerSpec::new(&["echo", &format!("line {round}")]))?.finish(SOON)?;
        ensure!(exit.code == 0, "round {round}: exit {exit:?}");
        ensure!(text_of(&log, "stdout") == format!("line {round}"), "round {round}: the log is {log:?}");
    }
    let (exit, log) = pod.run(ContainerSpec::new(&["false"]))?.finish(SOON)?;
    ensure!(exit.code == 1 && log.is_empty(), "exit {exit:?}, log {log:?}");
    Ok(())
}

fn short_lived_exec(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    for round in 0..20 {
        let line = format!("line {round}");
        let output = container.exec(&["echo", &line])?.success()?;
        ensure!(output.text() == line, "round {round}: exec --sync said {}", output.describe());
        let output = container.exec_streamed(&["sh", "-c", &format!("echo {line}; exit 7")], "")?.exited(7)?;
        ensure!(output.text() == line, "round {round}: exec said {}", output.describe());
    }
    container.remove_by_force()
}

/// Lines of a hundred bytes with their end, numbered, so that a lost, doubled or misplaced one changes the sum.
const LINE: &str = "abcdefghijklmnopqrstuvwxyz0123456789-+.ABCDEFGHIJKLMNOPQRSTUVWXYZ/abcdefghijklmnopqrstuvw";
const LINES_PER_BLOCK: u32 = 10_000;
const BLOCKS: u32 = 50;

fn large_log(_: &Context, pod: &Pod) -> Result<()> {
    // One block is made once and written many times: the test is about the way out, not about awk.
    let script = format!(
        "awk 'BEGIN {{ for (n = 0; n < {LINES_PER_BLOCK}; n++) printf \"%09d {LINE}\\n\", n }}' > /tmp/block; \
         n=0; while [ $n -lt {BLOCKS} ]; do echo block $n; cat /tmp/block; n=$((n+1)); done"
    );
    let started = Instant::now();
    let container = pod.run(ContainerSpec::script(&script))?;
    let exit = container.wait(Duration::from_mins(3))?;
    let took = started.elapsed();
    ensure!(exit.code == 0, "exit {exit:?}");
    let log = container.log()?;
    let (mut expected, mut found) = (Sha256::new(), Sha256::new());
    for block in 0..BLOCKS {
        expected.update(format!("block {block}\n"));
        for number in 0..LINES_PER_BLOCK {
            expected.update(format!("{number:09} {LINE}\n"));
        }
    }
    let mut bytes = 0;
    for line in &log {
        found.update(&line.text);
        found.update("\n");
        bytes += line.text.len() + 1;
    }
    ensure!(
        expected.finalize() == found.finalize(),
        "{} lines and {bytes} bytes arrived of {} lines; the sums differ",
        log.len(),
        BLOCKS * (LINES_PER_BLOCK + 1)
    );
    ensure!(bytes >= 50_000_000, "only {bytes} bytes");
    print!("({} MB/s) ", bytes as u128 / took.as_micros().max(1));
    container.remove()
}

fn last_line(_: &Context, pod: &Pod) -> Result<()> {
    let (_, log) = pod.run(ContainerSpec::new(&["printf", "first\\nlast"]))?.finish(SOON)?;
    ensure!(text_of(&log, "stdout") == "first\nlast", "the log is {log:?}");
    // Longer than a record of CRI's log and than a pipe.
    let long = "x".repeat(100_000);
    let script = "head -c 100000 /dev/zero | tr '\\0' x";
    let (_, log) = pod.run(ContainerSpec::script(script))?.finish(SOON)?;
    ensure!(text_of(&log, "stdout") == long, "a line of 100000 bytes arrived with {}", text_of(&log, "stdout").len());
    Ok(())
}

fn two_streams(_: &Context, pod: &Pod) -> Result<()> {
    let script = "for n in 1 2 3 4 5 6 7 8 9; do echo out $n; echo err $n >&2; done";
    let (_, log) = pod.run(ContainerSpec::script(script))?.finish(SOON)?;
    let expected = |word: &str| (1..10).map(|n| format!("{word} {n}")).collect::<Vec<_>>().join("\n");
    ensure!(text_of(&log, "stdout") == expected("out"), "stdout of {log:?}");
    ensure!(text_of(&log, "stderr") == expected("err"), "stderr of {log:?}");
    Ok(())
}

/// Bytes that do not repeat, from a small generator (xorshift).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn large_exec(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let input = noise(3_000_000);
    let sum = hex(&Sha256::digest(&input));
    let script = "cat > /tmp/received; sha256sum < /tmp/received";
    let output = container.exec_streamed(&["sh", "-c", script], input.clone())?.success()?;
    ensure!(output.text().starts_with(&sum), "the sum inside is {:?}, outside {sum}", output.text());
    let output = container.exec_streamed(&["cat", "/tmp/received"], "")?.success()?;
    ensure!(output.stdout == input, "{} of {} bytes came back, or others", output.stdout.len(), input.len());
    let output = container.exec_streamed(&["cat"], input.clone())?.success()?;
    ensure!(output.stdout == input, "an echo gave {} of {} bytes, or others", output.stdout.len(), input.len());
    container.remove_by_force()
}

fn end_of_input(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    for input in ["", "x", "two\nlines\n"] {
        let output = container.exec_streamed(&["sh", "-c", "wc -c; echo end; exit 3"], input)?.exited(3)?;
        ensure!(output.text() == format!("{}\nend", input.len()), "for {input:?} it said {:?}", output.text());
    }
    container.remove_by_force()
}

fn unread_input(context: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    // With runc no more than a pipe holds: containerd then waits for ever to get rid of the rest.
    let length = if context.runtime.is_bulkhead() { 1_000_000 } else { 10_000 };
    let output = container.exec_streamed(&["sh", "-c", "echo done; exit 4"], noise(length))?.exited(4)?;
    ensure!(output.text() == "done", "it said {:?}", output.text());
    ensure!(container.shell("echo well")? == "well");
    container.remove_by_force()
}

fn background_child(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    // The child gave up the streams, as a daemon does.
    let output = container.exec(&["sh", "-c", "sleep 100 >/dev/null 2>&1 </dev/null & echo started"])?.success()?;
    ensure!(output.text() == "started" && output.elapsed < Duration::from_secs(5), "{:?}", output.elapsed);
    let output =
        container.exec_streamed(&["sh", "-c", "sleep 100 >/dev/null 2>&1 </dev/null & echo started"], "")?.success()?;
    ensure!(output.text() == "started" && output.elapsed < Duration::from_secs(5), "{:?}", output.elapsed);
    // Until it runs its program, a child has its parent's arguments.
    wait_for("both children to run", SOON, || {
        let processes = container.shell("ps -o args")?;
        ensure!(processes.matches("sleep 100\n").count() == 2, "the children are gone: {processes}");
        Ok(())
    })?;
    container.remove_by_force()
}

fn outliving_child(_: &Context, pod: &Pod) -> Result<()> {
    let started = Instant::now();
    let (exit, log) = pod.run(ContainerSpec::script("sleep 100 & echo last words; exit 6"))?.finish(SOON)?;
    ensure!(exit.code == 6, "exit {exit:?}");
    ensure!(text_of(&log, "stdout") == "last words", "the log is {log:?}");
    ensure!(started.elapsed() < Duration::from_secs(8), "it took {:?}", started.elapsed());
    Ok(())
}

fn parallel_execs(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let running: Vec<_> = (0..40)
        .map(|n| {
            let script = format!("sleep 1; echo number {n}; exit {n}");
            container.exec_streamed_command(&["sh", "-c", &script], "").deadline(Duration::from_secs(90)).start()
        })
        .collect::<Result<_>>()?;
    for (n, running) in running.into_iter().enumerate() {
        let output = exec_result(running.finish()?)?.exited(i32::try_from(n)?)?;
        ensure!(output.text() == format!("number {n}"), "exec {n} said {:?}", output.text());
    }
    container.remove_by_force()
}

fn exec_terminal(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let run = container.crictl(&["exec", "-i", "-t", &container.id, "sh"]);
    let mut terminal = Terminal::of(&run, 30, 90)?;
    let type_until = |terminal: &mut Terminal, line: &str, needle: &str| {
        // The size is set a moment after the program has started, so it is asked for until it is right.
        wait_for(&format!("{needle:?} on the terminal"), SOON, || {
            terminal.send(line)?;
            terminal.expect(needle, Duration::from_millis(500))
        })
    };
    type_until(&mut terminal, "stty size\n", "30 90")?;
    type_until(&mut terminal, "tty\n", "/dev/pts/")?;
    terminal.resize(41, 101)?;
    type_until(&mut terminal, "stty size\n", "41 101")?;
    terminal.send("exit 6\n")?;
    terminal.expect("exit code 6", SOON)?;
    container.remove_by_force()
}

fn interrupt(_: &Context, pod: &Pod) -> Result<()> {
    let container = pod.run(ContainerSpec::idle())?;
    let script = "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 1; done";
    let run = container.crictl(&["exec", "-i", "-t", &container.id, "sh", "-c", script]);
    let mut terminal = Terminal::of(&run, 24, 80)?;
    terminal.expect("ready", SOON)?;
    terminal.send("\u{3}")?;
    terminal.expect("interrupted", SOON)?;
    terminal.expect("exit code 9", SOON)?;
    container.remove_by_force()
}

fn attach(_: &Context, pod: &Pod) -> Result<()> {
    let spec =
        ContainerSpec::script("while read line; do echo \"got $line\"; echo \"err $line\" >&2; done; exit 8").stdin();
    let container = pod.run(spec)?;
    let mut terminal = Terminal::behind_pipe(&container.crictl(&["attach", "-i", &container.id]))?;
    let mut number = 0;
    // CRI attaches stdin before stdout, so the first answers may be missed: it is told again and again. Whichever answer
    // comes will do, since one may take longer than a try.
    wait_for("an answer", SOON, || {
        number += 1;
        terminal.send(&format!("line {number}\n"))?;
        terminal.expect("got line ", Duration::from_millis(500))?;
        terminal.expect("err line ", Duration::from_millis(500))
    })?;
    drop(terminal);
    // Detaching is not an end of input unless that was asked for.
    ensure!(container.state()? == "CONTAINER_RUNNING", "the program ended with its client");
    container.wait_for_log("got line 1", SOON)?;
    container.remove_by_force()
}

fn container_terminal(_: &Context, pod: &Pod) -> Result<()> {
    // The size is told a moment after the terminal is attached.
    let script = "tty; until stty size | grep '35 95'; do sleep 0.1; done; read line; echo \"got $line\"; exit 2";
    let container = pod.run(ContainerSpec::script(script).terminal())?;
    container.wait_for_log("/dev/pts/", SOON)?;
    let run = container.crictl(&["attach", "-i", "-t", &container.id]);
    let mut terminal = Terminal::of(&run, 35, 95)?;
    container.wait_for_log("35 95", SOON)?;
    // The answer can come before the output is attached; the log has it anyway.
    terminal.send("hello\n")?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 2, "exit {exit:?}");
    let log = container.log_text("stdout")?;
    ensure!(log.contains("got hello") && log.contains("35 95"), "the log is {log:?}");
    container.remove()
}

fn attach_twice(_: &Context, pod: &Pod) -> Result<()> {
    let script = "until read -t 1 line; do echo waiting; done; echo \"got $line\"; sleep 1";
    let container = pod.run(ContainerSpec::script(script).stdin())?;
    let mut watching: Vec<_> =
        (0..2).map(|_| container.crictl(&["attach", &container.id]).start()).collect::<Result<_>>()?;
    // A client says nothing itself when it is attached.
    for watcher in &mut watching {
        watcher.expect("waiting", SOON)?;
    }
    let typing = container.attach("hello\n")?;
    let exit = container.wait(SOON)?;
    ensure!(exit.code == 0, "exit {exit:?}");
    for watcher in watching {
        let output = watcher.finish()?;
        ensure!(output.text().replace("waiting\n", "") == "got hello", "one of them saw {}", output.describe());
    }
    typing.finish()?;
    container.remove()
}

fn hundred_restarts(context: &Context) -> Result<()> {
    let pod = context.start(PodSpec::new())?;
    let before = bulkhead_tests::leaks::Snapshot::take(&pod.node)?;
    let data = context.scratch.join("data");
    fs::create_dir(&data)?;
    for attempt in 0..100 {
        let spec = ContainerSpec::script(&format!("cat /data/note; echo {attempt} > /data/note"))
            .mount(&data, "/data", false)
            .set("/metadata/attempt", attempt);
        let (exit, log) = pod.run(spec)?.finish(SOON)?;
        ensure!(exit.code == 0, "attempt {attempt}: exit {exit:?}");
        if attempt > 0 {
            ensure!(text_of(&log, "stdout") == format!("{}", attempt - 1), "attempt {attempt}: {log:?}");
        }
    }
    let left = before.leaks(&pod.node)?;
    ensure!(left.is_empty(), "while the pod runs, there is more than before: {left:?}");
    pod.remove()
}
