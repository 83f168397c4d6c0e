//! The shim binary that containerd runs; see `bulkhead_shim::bootstrap` for its command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_shim::bootstrap::main(bulkhead_shim::service::run, bulkhead_shim::store::teardown::run)
}
