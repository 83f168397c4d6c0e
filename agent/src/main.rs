//! PID 1 of a Bulkhead guest, and the spawner of its containers when PID 1 re-executes it.

use std::process::ExitCode;

use bulkhead_agent::{init, runtime};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(runtime::SPAWNER_ARGUMENT) {
        return match runtime::spawner::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bulkhead-agent: spawner: {error}");
                ExitCode::FAILURE
            }
        };
    }
    if std::process::id() == 1 {
        init::main();
    }
    eprintln!("bulkhead-agent {} runs as PID 1 of a guest, not here", env!("CARGO_PKG_VERSION"));
    ExitCode::FAILURE
}
