//! Shows one pod from its start to its end, for somebody who has never seen Bulkhead.
//!
//! Every command is printed before it runs, and what is said about its effect has been checked.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{Output, Run, wait_for};
use bulkhead_tests::containerd::Node;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::image;
use bulkhead_tests::leaks::{self, Snapshot};
use bulkhead_tests::tools::{BulkheadTools, ContainerdTools, Version};
use serde_json::{Value, json};

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<()> {
    let tools = BulkheadTools::find()?;
    let version = Version::ALL.into_iter().rev().find(|version| ContainerdTools::find(*version).is_ok());
    let version = version.context("no containerd: run make setup")?;
    say("A containerd of its own is started for this, so that the machine's own (if any) is left alone.");
    let node = Arc::new(Node::start(version, Some(&tools))?);
    println!("containerd {version}, everything of it in {}\n", node.layout.root.display());
    let shown = Demo { node: Arc::clone(&node), directory: node.scratch()? };
    let result = shown.run();
    if let Err(error) = &result {
        eprintln!("\ncontainerd's log ends with\n{}\n\n{error:#}", node.log_since(0, 30));
    }
    let stopped = node.stop();
    let left = leaks::after_stop(&node);
    leaks::clean_up(&node);
    result?;
    stopped?;
    let left = left?;
    ensure!(left.is_empty(), "left behind after containerd's end: {}", left.join("\n"));
    say("containerd has ended, and of it too nothing is left: checked.");
    Ok(())
}

struct Demo {
    node: Arc<Node>,
    directory: std::path::PathBuf,
}

impl Demo {
    fn run(&self) -> Result<()> {
        let node = &self.node;
        let cgroup = node.make_pod_cgroup("demo")?;
        let pod = json!({
            "metadata": {"name": "demo", "namespace": "default", "uid": "demo", "attempt": 0},
            "hostname": "compartment",
            "log_directory": self.directory,
            "linux": {"cgroup_parent": cgroup},
        });
        let container = json!({
            "metadata": {"name": "web", "attempt": 0},
            "image": {"image": image::BUSYBOX},
            "command": ["sh", "-c", "echo \"hello from $(hostname), kernel $(uname -r)\"; exec httpd -f -p 8080 -h /www"],
            "log_path": "web.log",
            "linux": {"resources": {"memory_limit_in_bytes": 64 << 20}},
        });
        self.write("pod.json", &pod)?;
        self.write("web.json", &container)?;
        let before = Snapshot::take(node)?;

        say("A pod is one line away from any other: its runtime is called \"bulkhead\".");
        let started = self.crictl(&["runp", "--runtime", "bulkhead", "pod.json"])?;
        let pod_id = started.text();
        println!("(took {:.2} s: a virtual machine booted)\n", started.elapsed.as_secs_f32());
        let short = |id: &str| id.chars().take(13).collect::<String>();
        let container_id = self.crictl(&["create", "--no-pull", &short(&pod_id), "web.json", "pod.json"])?.text();
        let web = short(&container_id);
        self.crictl(&["start", &web])?;

        say("Two kernels: the machine's and the pod's.");
        let host_kernel = host(&["uname", "-r"])?.text();
        let guest = self.crictl(&["exec", &web, "uname", "-r"])?.text();
        println!("  host  {host_kernel}\n  pod   {guest}\n");
        let boot_ids = (
            fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
            self.quiet(&["exec", "--sync", &web, "cat", "/proc/sys/kernel/random/boot_id"])?.text(),
        );
        ensure!(boot_ids.0.trim() != boot_ids.1, "the pod runs on the host's kernel");
        let qemu = faults::find(node, &pod_id, Part::Qemu)?;
        host(&["ps", "-o", "pid,uid,rss,comm", "-p", &qemu.pid.to_string()])?;

        say("Its log.");
        wait_for("the log", Duration::from_secs(20), || {
            let text = self.quiet(&["logs", &web])?.text();
            ensure!(text.contains("hello from compartment"), "the log is {text:?}");
            Ok(())
        })?;
        self.crictl(&["logs", &web])?;

        say("A command in the running container, and its exit code.");
        let exec = self.attempt(&["exec", &web, "sh", "-c", "ps; exit 7"])?;
        ensure!(exec.stderr.contains("exit code 7"), "the exit code 7 did not arrive: {}", exec.describe());

        say("What it uses.");
        wait_for("statistics", Duration::from_secs(20), || {
            let stats = self.quiet(&["stats", "-o", "json", "--id", &container_id])?;
            let stats: Value = serde_json::from_slice(&stats.stdout)?;
            let memory = stats["stats"][0]["memory"]["workingSetBytes"]["value"].as_str().unwrap_or("0").to_owned();
            ensure!(memory != "0", "no memory yet");
            Ok(())
        })?;
        self.crictl(&["stats", "--id", &container_id])?;

        say("A web page from the pod's own address, fetched from the host.");
        let status: Value = serde_json::from_slice(&self.quiet(&["inspectp", "-o", "json", &pod_id])?.stdout)?;
        let address = status["status"]["network"]["ip"].as_str().context("the pod has no address")?.to_owned();
        let page = host(&["busybox", "wget", "-q", "-O", "-", &format!("http://{address}:8080/")])?.text();
        ensure!(page == "a page from inside the pod", "the page reads {page:?}");

        say("A clean stop.");
        self.crictl(&["stop", "--timeout", "5", &web])?;
        self.crictl(&["stopp", &short(&pod_id)])?;
        self.crictl(&["rmp", &short(&pod_id)])?;
        node.forget_pod_cgroup("demo");
        node.remember(bulkhead_tests::containerd::CRI_NAMESPACE, &pod_id);
        node.remember(bulkhead_tests::containerd::CRI_NAMESPACE, &container_id);
        let left = before.leaks(node)?;
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        say(
            "Nothing left behind: no process, mount, network link, address, cgroup, socket, directory or loop device that \
             was not there before (checked one by one).",
        );
        Ok(())
    }

    fn write(&self, name: &str, content: &Value) -> Result<()> {
        fs::write(self.directory.join(name), serde_json::to_vec_pretty(content)?)
            .with_context(|| format!("write {name}"))
    }

    fn crictl(&self, args: &[&str]) -> Result<Output> {
        self.attempt(args)?.success()
    }

    /// Runs and prints a command that may fail.
    fn attempt(&self, args: &[&str]) -> Result<Output> {
        let output = show(self.crictl_run(args), "crictl", args)?;
        Ok(output)
    }

    /// Runs a command without a word.
    fn quiet(&self, args: &[&str]) -> Result<Output> {
        self.crictl_run(args).success()
    }

    fn crictl_run(&self, args: &[&str]) -> Run {
        // Relative file names in the commands mean the demo's directory.
        let args: Vec<String> = args
            .iter()
            .map(|arg| {
                let path = self.directory.join(arg);
                if Path::new(arg).extension().is_some_and(|e| e == "json") && path.is_file() {
                    path.display().to_string()
                } else {
                    (*arg).to_owned()
                }
            })
            .collect();
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        self.node.crictl(&args)
    }
}

/// Runs and prints a command of the host.
fn host(command: &[&str]) -> Result<Output> {
    let (program, args) = command.split_first().context("an empty command")?;
    let path = ["/bin", "/usr/bin"].map(|directory| Path::new(directory).join(program));
    let path = path.into_iter().find(|path| path.is_file()).with_context(|| format!("no program {program}"))?;
    show(Run::new(path).args(args), program, args)?.success()
}

fn show(run: Run, program: &str, args: &[&str]) -> Result<Output> {
    println!("$ {}", Run::new(program).args(args).line());
    let output = run.output()?;
    for text in [output.text(), output.stderr.trim().to_owned()] {
        // crictl stats clears the screen before it prints.
        let text = text.trim_start_matches("\u{1b}[2J\u{1b}[H");
        if !text.is_empty() {
            println!("{text}");
        }
    }
    println!();
    Ok(output)
}

fn say(text: &str) {
    println!("# {text}");
}
