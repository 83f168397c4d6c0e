//! A Kubernetes of one node with runc and Bulkhead side by side, to try things on: `cluster up`, `cluster status`,
//! `cluster down`.
//!
//! It lies in `/var/tmp/bulkhead-cluster`, or where `BULKHEAD_CLUSTER` says.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use bulkhead_tests::cluster::{self, Cluster, Settings};
use bulkhead_tests::image::BUSYBOX;

fn main() -> ExitCode {
    cluster::be_the_node_if_asked();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["up"] => up(),
        ["status"] => status(),
        ["down"] => down(),
        _ => Err(anyhow::anyhow!("usage: cluster up | status | down")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn up() -> Result<()> {
    let begin = Instant::now();
    let settings = Settings::lasting();
    println!("cluster: starting a Kubernetes of one node in {} ...", settings.directory.display());
    let cluster = Cluster::up(&settings)?;
    println!("cluster: ready after {:.0} s", begin.elapsed().as_secs_f32());
    println!("\nTo use it:\n\n  {}\n", environment(&cluster));
    println!(
        "  kubectl run hello --image={BUSYBOX} --overrides='{{\"spec\": {{\"runtimeClassName\": \"bulkhead\"}}}}' \\\n    \
         --restart=Never -- uname -a\n  \
         kubectl wait pod/hello --for=jsonpath='{{.status.phase}}'=Succeeded && kubectl logs hello\n"
    );
    Ok(())
}

fn status() -> Result<()> {
    let cluster = Cluster::load(&Settings::lasting().directory)?;
    if !cluster.has_power() {
        bail!("the node in {} does not run: `make cluster-down` removes it", cluster.layout.root.display());
    }
    println!("{}\n", environment(&cluster));
    for args in [["get", "nodes", "-o", "wide"], ["get", "pods", "-A", "-owide"]] {
        println!("{}\n", cluster.kubectl(&args).success()?.text());
    }
    Ok(())
}

fn down() -> Result<()> {
    let cluster = Cluster::load(&Settings::lasting().directory)?;
    cluster.down()?;
    println!("cluster: gone, and nothing of it is left");
    Ok(())
}

/// The command after which `kubectl` is that of the cluster.
fn environment(cluster: &Cluster) -> String {
    format!(
        "export KUBECONFIG={} PATH={}:$PATH",
        cluster.layout.kubeconfig.display(),
        cluster.layout.root.join("bin").display()
    )
}
