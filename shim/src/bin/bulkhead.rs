//! The node CLI; see `bulkhead_shim::cli` for its commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_shim::cli::main()
}
