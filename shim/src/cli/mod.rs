//! The node CLI, `bulkhead`: what an administrator asks a node about its pods.
//!
//! It reads what lies on the node (configuration, journals, `/proc`) and needs neither containerd nor a shim to answer: it is
//! for the hour at which one of them does not. Only `inspect` asks a shim as well, with a deadline, and only `gc` changes
//! anything. Each command yields a plain structure, shown as text for people or as JSON ([`Format`]).

pub mod check;
pub mod console;
pub mod gc;
pub mod inspect;
pub mod list;
pub mod sandbox;
pub mod table;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::config::{Config, RuntimeOptions};

/// Looks at Bulkhead's pods on this node, and at the node itself.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, arg_required_else_help = true)]
struct Arguments {
    /// Bulkhead's configuration; without it that of BULKHEAD_CONFIG, else /etc/bulkhead/config.toml, else the defaults.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How the answer is written.
    #[arg(long, short, global = true, value_enum, default_value_t = Format::Text)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What this node has and lacks; the exit status is 0 if a pod could start, and 1 if not.
    Check(check::Options),
    /// The sandboxes on this node.
    #[command(visible_alias = "ls")]
    List,
    /// Everything that is known of one sandbox.
    Inspect {
        /// The sandbox's id, or a beginning of it that no other has.
        id: String,
    },
    /// The guest's console, from its first line or from the oldest that is kept (64 to 128 KiB).
    Console {
        /// The sandbox's id, or a beginning of it that no other has.
        id: String,
        /// Go on as the guest writes, until the sandbox is gone.
        #[arg(long, short)]
        follow: bool,
    },
    /// Clears what is left of sandboxes whose shim is dead: processes, cgroups, redirects, sockets, directories.
    ///
    /// A sandbox whose shim lives is not touched, nor is one whose shim lives and whose containerd is gone: its pod runs, and
    /// containerd takes it over again when it is back. What containerd itself keeps of a pod (bundle, network namespace) is left
    /// to containerd.
    Gc {
        /// Tell what would be removed, and remove nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

/// The whole program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        // Help and version are errors to clap.
        Err(error) if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            error.exit()
        }
        Err(error) => {
            eprintln!("bulkhead: {}", sentence(&error));
            return ExitCode::from(MISUSED);
        }
    };
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bulkhead: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Exit status for a wrong command line, as clap has it.
const MISUSED: u8 = 2;

/// clap's error on one line, with what is accepted where clap does not say.
fn sentence(error: &clap::Error) -> String {
    let rendered = error.to_string();
    let lines = rendered.lines().map(str::trim).take_while(|line| !line.is_empty());
    let said = lines.collect::<Vec<_>>().join(" ");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    if error.kind() == ErrorKind::InvalidSubcommand {
        let arguments = Arguments::command();
        let commands: Vec<&str> = arguments.get_subcommands().map(clap::Command::get_name).collect();
        return format!("{said}, accepted are {}", commands.join(", "));
    }
    format!("{said}; see --help")
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let uid = rustix::process::geteuid();
    if !uid.is_root() {
        bail!("this user has uid {uid}, accepted is root: run state, devices and namespaces are root's alone");
    }
    let format = arguments.output;
    if let Command::Check(options) = &arguments.command {
        return check::run(arguments.config.as_deref(), options, format);
    }
    let config = load_config(arguments.config.as_deref())?;
    match &arguments.command {
        Command::Check(_) => {}
        Command::List => list::run(&config.state_dir, format)?,
        Command::Inspect { id } => inspect::run(&sandbox::find(&config.state_dir, id)?, format)?,
        Command::Console { id, follow } => console::run(&sandbox::find(&config.state_dir, id)?, *follow, format)?,
        Command::Gc { dry_run } => return gc::run(&config.state_dir, *dry_run, format),
    }
    Ok(ExitCode::SUCCESS)
}

/// The configuration that the shim would take, were `path` its `ConfigPath`.
fn load_config(path: Option<&std::path::Path>) -> anyhow::Result<Config> {
    let path = path.map(std::path::absolute).transpose().context("find the configuration")?;
    let config_path = path.map(|path| path.display().to_string()).unwrap_or_default();
    Ok(Config::load(&RuntimeOptions { config_path, ..RuntimeOptions::default() })?)
}

/// Shows `answer`, for people as `text` puts it.
fn show<T: Serialize>(format: Format, answer: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    match format {
        Format::Text => print(&text(answer)),
        Format::Json => print(&(serde_json::to_string_pretty(answer).context("encode the answer")? + "\n")),
    }
}

/// Writes to stdout; a reader that has gone away has seen enough.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.context("write to stdout"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::try_parse_from(line.split(' ')).map_err(|error| sentence(&error))
    }

    #[test]
    fn options_are_taken_before_and_after_the_command() {
        for line in ["bulkhead --output json --config /c list", "bulkhead list -o json --config /c"] {
            let arguments = parse(line).expect(line);
            assert_eq!((arguments.output, arguments.config), (Format::Json, Some(PathBuf::from("/c"))));
            assert!(matches!(arguments.command, Command::List));
        }
        let Command::Console { id, follow } = parse("bulkhead console web --follow").expect("parses").command else {
            panic!("another command");
        };
        assert!(id == "web" && follow);
    }

    #[test]
    fn what_is_not_accepted_is_named_with_what_is() {
        for (line, words) in [
            ("bulkhead --output yaml list", &["'yaml'", "--output", "text, json"][..]),
            ("bulkhead inspect", &["<ID>"]),
            ("bulkhead lost", &["'lost'", "list"]),
            ("bulkhead gc --force", &["'--force'"]),
        ] {
            let said = parse(line).expect_err(line);
            assert!(!said.contains('\n'), "{said}");
            assert!(words.iter().all(|word| said.contains(word)), "{line}: {said}");
        }
    }

    #[test]
    fn a_configuration_that_does_not_exist_is_named() {
        let said = load_config(Some("/no/such/config.toml".as_ref())).expect_err("is refused").to_string();
        assert!(said.contains("/no/such/config.toml") && said.contains("does not exist"), "{said}");
    }
}
