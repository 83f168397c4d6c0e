//! What users do on Kubernetes, with runc and with Bulkhead on one node.
//!
//! `make test-k8s` runs it; see [`bulkhead_tests::cluster::table`] for how to narrow it.

use std::process::ExitCode;

use bulkhead_tests::cluster::table;

mod examples;
mod life;
mod net;
mod node;
mod probes;
mod resources;
mod security;
mod sharing;
mod talk;
mod volumes;
mod workloads;

fn main() -> ExitCode {
    // The last of `node` takes the node's power away.
    let subjects = [
        talk::ROWS,
        life::ROWS,
        probes::ROWS,
        volumes::ROWS,
        sharing::ROWS,
        security::ROWS,
        net::ROWS,
        workloads::ROWS,
        resources::ROWS,
        examples::ROWS,
        node::ROWS,
    ];
    table::run(subjects.into_iter().flatten().copied())
}
