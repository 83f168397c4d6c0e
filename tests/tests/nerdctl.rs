//! `nerdctl run` does with Bulkhead what it does with runc, its networks, its logs and its published ports included.

use std::fs;
use std::net::TcpListener;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::command::wait_for;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::loop_device::LoopDevice;
use bulkhead_tests::nerdctl::Nerdctl;
use bulkhead_tests::network;
use bulkhead_tests::row::{BULKHEAD, Context, Row, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::tools::Version;

const ROWS: &[Row] = &[
    Row::alone("a run ends as its program does, and both its outputs come out", outcome),
    Row::alone("input reaches the program, and its end too", input),
    Row::alone("a terminal has the size of the caller's and passes keys", terminal),
    Row::alone("a detached container is listed, entered, logged, stopped, started again and removed", detached),
    Row::alone("environment, directory, user, host name and read-only root are as asked", program),
    Row::alone("directories, files and memory are mounted where they are asked for", volumes),
    Row::alone("a disk of the host's has another name where that is asked for, and is read-only", disk),
    Row::alone("a container has an address on a CNI network, and reaches out from it", addressed),
    Row::alone("a published port of the host leads to the container", published),
    Row::alone("a hook that fails is told, and nothing is left of the container", failing_network),
    Row::alone("the network that hooks have made goes also when the shim is killed", shim_killed).only(BULKHEAD),
];

fn main() -> ExitCode {
    suite::run(&[Version::V2_4], &[Runtime::Runc, Runtime::Bulkhead], ROWS)
}

/// Long enough for what takes a moment, also while other pods boot.
const SOON: Duration = Duration::from_secs(20);

/// A page, and a server for it on port 80.
const PAGE: &str = "a page of nerdctl's";
const SERVER: &str = "mkdir /www; echo a page of nerdctl\\'s > /www/index.html; exec httpd -f -p 80 -h /www";

fn nerdctl(context: &Context) -> Result<Nerdctl> {
    Nerdctl::new(&context.node, context.runtime)
}

/// What `script` says in a container with `options`.
fn said(context: &Context, options: &[&str], script: &str) -> Result<String> {
    let options: Vec<_> = ["--rm"].iter().chain(options).copied().collect();
    Ok(nerdctl(context)?.run(&options, &["sh", "-c", script]).success()?.text())
}

fn outcome(context: &Context) -> Result<()> {
    let run = nerdctl(context)?.run(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 42"]).output()?;
    ensure!(run.code == 42 && run.text() == "out" && run.stderr.contains("err"), "{}", run.describe());
    let missing = nerdctl(context)?.run(&["--rm"], &["no-such-program"]).output()?.failure()?;
    ensure!(missing.contains("no-such-program") && missing.contains("not found"), "nerdctl says {missing:?}");
    Ok(())
}

fn input(context: &Context) -> Result<()> {
    let text = "first\nlast without an end";
    // With runc nerdctl may see the end before there is a task to tell, and then never tells it: there head asks for no end.
    let program = if context.runtime.is_bulkhead() { "cat" } else { "head -c 25" };
    let run = nerdctl(context)?.run(&["--rm", "-i"], &["sh", "-c", program]).input(text).success()?;
    ensure!(run.text() == text, "the program says {:?}", run.text());
    Ok(())
}

fn terminal(context: &Context) -> Result<()> {
    // nerdctl tells the size once the program runs.
    let script = "until stty size 2>/dev/null | grep '31 97'; do :; done; read line; echo got $line; exit 5";
    let run = nerdctl(context)?.run(&["--rm", "-it"], &["sh", "-c", script]);
    let mut terminal = Terminal::of(&run, 31, 97)?;
    terminal.expect("31 97", Duration::from_mins(1))?;
    terminal.send("key\n")?;
    terminal.expect("got key", SOON)?;
    let code = terminal.wait(SOON)?;
    ensure!(code == 5, "exit code {code}");
    Ok(())
}

fn detached(context: &Context) -> Result<()> {
    let nerdctl = nerdctl(context)?;
    let name = nerdctl.new_name();
    let script = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 1000 & wait $!; done";
    nerdctl.run(&["-d", "--name", &name], &["sh", "-c", script]).success()?;
    let inspect =
        |format: &str| Ok::<_, anyhow::Error>(nerdctl.command(&["inspect", "-f", format, &name]).success()?.text());
    let logs = |wanted: &str| {
        wait_for("the log", SOON, || {
            let said = nerdctl.command(&["logs", &name]).success()?.text();
            ensure!(said == wanted, "nerdctl logs says {said:?}");
            Ok(())
        })
    };
    logs("ready")?;
    let listed = nerdctl.command(&["ps", "--format", "{{.Names}}"]).success()?.text();
    ensure!(listed.lines().any(|line| line == name), "nerdctl ps lists {listed:?}");
    let entered =
        nerdctl.command(&["exec", "-e", "COLOUR=teal", &name, "sh", "-c", "echo $COLOUR; exit 9"]).output()?;
    // Its own exit code is 1, whatever the program's was.
    let told = entered.stderr.contains("exit code 9");
    ensure!(told && entered.text() == "teal", "{}", entered.describe());
    nerdctl.command(&["stop", "-t", "10", &name]).success()?;
    ensure!(inspect("{{.State.Status}} {{.State.ExitCode}}")? == "exited 7", "it is {}", inspect("{{.State}}")?);
    logs("ready\nbye")?;
    nerdctl.command(&["start", &name]).success()?;
    ensure!(inspect("{{.State.Status}}")? == "running", "it is {}", inspect("{{.State}}")?);
    logs("ready\nbye\nready")?;
    nerdctl.command(&["rm", "-f", &name]).success()?;
    let gone = nerdctl.command(&["inspect", &name]).output()?.failure()?;
    ensure!(gone.contains("no such object"), "nerdctl inspect says {gone:?}");
    Ok(())
}

fn program(context: &Context) -> Result<()> {
    let options =
        ["-e", "COLOUR=teal", "-w", "/tmp/deep", "-u", "1234:2345", "--hostname", "compartment", "--read-only"];
    let said = said(context, &options, "echo $COLOUR; pwd; id -u; id -g; hostname; touch /file 2>&1; true")?;
    let lines: Vec<_> = said.lines().collect();
    ensure!(lines.len() == 6 && lines[..5] == ["teal", "/tmp/deep", "1234", "2345", "compartment"], "{said:?}");
    ensure!(lines[5].contains("Read-only file system"), "the root is not read-only: {said:?}");
    Ok(())
}

fn volumes(context: &Context) -> Result<()> {
    let path = |name: &str| context.scratch.join(name);
    fs::create_dir(path("dir"))?;
    fs::write(path("dir/file"), "from the host")?;
    fs::write(path("single"), "alone")?;
    let (dir, single) = (format!("{}:/dir:ro", path("dir").display()), format!("{}:/single", path("single").display()));
    let script = "cat /dir/file; echo; touch /dir/new 2>/dev/null || echo refused; echo changed > /single; \
                  grep -c ' /memory tmpfs ' /proc/mounts";
    let said = said(context, &["-v", &dir, "-v", &single, "--tmpfs", "/memory"], script)?;
    ensure!(said == "from the host\nrefused\n1", "the program says {said:?}");
    ensure!(fs::read_to_string(path("single"))? == "changed\n", "the file on the host did not change");
    Ok(())
}

fn disk(context: &Context) -> Result<()> {
    let device = LoopDevice::here(&context.scratch.join("file"))?;
    let option = format!("{}:/dev/fixed:r", device.path);
    let script = "head -c 6 /dev/fixed; echo; echo after | dd of=/dev/fixed bs=512 seek=1 conv=sync,notrunc 2>&1; true";
    let said = said(context, &["--device", &option], script)?;
    ensure!(said.starts_with("before\n") && said.contains("Operation not permitted"), "the program says {said:?}");
    device.written("\0\0\0\0\0\0")
}

fn addressed(context: &Context) -> Result<()> {
    let nerdctl = nerdctl(context)?;
    let name = nerdctl.new_name();
    nerdctl.run(&["-d", "--name", &name], &["sh", "-c", SERVER]).success()?;
    let address = nerdctl.address(&name)?;
    let page = wait_for("a page from the container", SOON, || network::fetch(address, 80))?;
    ensure!(page.trim() == PAGE, "{address} answers {page:?}");
    let gateway = context.node.network.gateway().to_string();
    let inside =
        |script: &str| Ok::<_, anyhow::Error>(nerdctl.command(&["exec", &name, "sh", "-c", script]).success()?.text());
    let shown = inside("ip -4 -o addr show eth0; cat /sys/class/net/eth0/mtu; ip route show default")?;
    ensure!(
        shown.contains(&address.to_string()) && shown.contains(&network::MTU.to_string()) && shown.contains(&gateway),
        "inside there is {shown:?}"
    );
    inside(&format!("ping -c 1 -W 5 {gateway}"))?;
    nerdctl.remove(&name)
}

fn published(context: &Context) -> Result<()> {
    let nerdctl = nerdctl(context)?;
    let name = nerdctl.new_name();
    // Free a moment ago; nobody else on this machine publishes ports of that range meanwhile.
    let port = TcpListener::bind("0.0.0.0:0")?.local_addr()?.port();
    nerdctl.run(&["-d", "--name", &name, "-p", &format!("{port}:80")], &["sh", "-c", SERVER]).success()?;
    let gateway = context.node.network.gateway();
    let page = wait_for("a page from the port", SOON, || network::fetch(gateway.into(), port))?;
    ensure!(page.trim() == PAGE, "port {port} answers {page:?}");
    nerdctl.remove(&name)?;
    let left = network::fetch(gateway.into(), port);
    ensure!(left.is_err(), "port {port} still answers {left:?}");
    Ok(())
}

fn failing_network(context: &Context) -> Result<()> {
    let nerdctl = nerdctl(context)?;
    let name = nerdctl.new_name();
    // No address of that network, as CNI's host-local says.
    let said = nerdctl.run(&["--name", &name, "--ip", "192.0.2.1"], &["true"]).output()?.failure()?;
    nerdctl.remove(&name)?;
    ensure!(said.contains("192.0.2.1"), "nerdctl says {said:?}");
    Ok(())
}

fn shim_killed(context: &Context) -> Result<()> {
    let nerdctl = nerdctl(context)?;
    let name = nerdctl.new_name();
    let id = nerdctl.run(&["-d", "--name", &name], &["sleep", "1000"]).success()?.text();
    faults::kill(&nerdctl.node, &id, Part::Shim)?;
    // What is left, an address that CNI still counts as taken among it, is looked for after each row.
    nerdctl.remove(&name)
}
