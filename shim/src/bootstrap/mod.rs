//! The command line of `containerd-shim-bulkhead-v2`, as containerd 1.6 to 2.4 and CRI-O run it.
//!
//! - `start` (once per container) makes the server of a pod, or names the one there is, and ends within milliseconds.
//! - `serve` is that server; it is given its listening socket, so whoever was told the address can connect at once.
//! - `delete` removes what a container left, with no help from a server.
//! - `-info` and `-v` say what this is.
//!
//! What a server does, and what a pod consists of, is none of this module's business: `main` is given the functions to call.
//! Answers go to stdout, byte for byte; an error is one line on stderr and a non-zero exit.
//!
//! <https://github.com/containerd/containerd/blob/main/core/runtime/v2/README.md>

pub mod creator;
mod delete;
mod flags;
mod group;
mod info;
mod input;
mod serve;
pub mod socket;
mod start;

use std::future::Future;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use flags::{Action, Flags};
pub use serve::ServeConfig;

/// The whole program.
///
/// `serve` is run, on a runtime, in the process that is a pod's server. `teardown` gets the directory of a sandbox's run state
/// and removes everything that is written down there, the server's process first if it still lives, the directory last. It
/// may find half of it gone, and several may run at once for one sandbox.
pub fn main<F>(serve: impl FnOnce(ServeConfig) -> F, teardown: fn(&Path) -> anyhow::Result<()>) -> ExitCode
where
    F: Future<Output = anyhow::Result<()>>,
{
    match run(serve, teardown) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows this text to users as it is; a server's stderr is /dev/null.
            eprintln!("{}", one_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run<F>(serve: impl FnOnce(ServeConfig) -> F, teardown: fn(&Path) -> anyhow::Result<()>) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let words = std::env::args_os().skip(1).map(|word| {
        let shown = word.display().to_string();
        word.into_string().ok().with_context(|| format!("argument {shown:?} is not UTF-8"))
    });
    let flags = Flags::parse(words.collect::<anyhow::Result<Vec<_>>>()?)?;
    match flags.action {
        Action::Start => answer(&start::run(&flags)?),
        Action::Delete => answer(&delete::run(&flags, teardown)?),
        Action::Serve => serve::run(serve),
        Action::Info => answer(&info::run(&input::read_to_end(io::stdin(), input::INPUT_PATIENCE)?)?),
        Action::Version => {
            answer(format!("{}: version {}\n", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")).as_bytes())
        }
        Action::Help => answer(format!("{}\n", flags::USAGE).as_bytes()),
    }
}

fn answer(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).context("write the answer to stdout")
}

fn one_line(text: &str) -> String {
    text.split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        assert_eq!(one_line("a\n  b\n\nc\n"), "a; b; c");
    }
}
