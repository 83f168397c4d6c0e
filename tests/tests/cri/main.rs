//! Pods and containers through CRI behave as with runc, life cycle, isolation, resources and network.

mod life;
mod machine;
mod program;
mod resources;
mod together;
mod volumes;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::container::{ContainerSpec, text_of};
use bulkhead_tests::pod::Pod;
use bulkhead_tests::row::{ALL, BULKHEAD, Row};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;

const ROWS: &[Row] = &[
    // Life cycle.
    Row::alone("a pod starts, is ready, stops, is not ready and goes", life::pod_life),
    Row::alone("stop and remove may be repeated, and unknown ids are told", life::idempotence),
    Row::alone("a pod is removed by force with its containers running", life::force),
    Row::in_pod("a container is created, runs, exits and is removed", life::container_life),
    Row::in_pod("a container that was never started can be removed", life::never_started),
    Row::in_pod("exit codes come out as they are", life::exit_codes),
    Row::in_pod("a program killed by a signal exits with 128 and the signal", life::killed_by_signal),
    Row::in_pod("a program that does not exist fails its start with its name", life::program_not_found),
    Row::in_pod("stop lets the program end in its grace period", life::stop_in_grace),
    Row::in_pod("stop kills a program that outlives its grace period", life::stop_after_grace),
    Row::in_pod("inspect tells pid, times and mounts", life::inspect),
    Row::alone("a container restarted under the same name starts afresh", life::restarted),
    // Exec.
    Row::in_pod("exec runs beside the program and tells output and exit code", life::exec),
    Row::in_pod("exec of a program that does not exist names it", life::exec_not_found),
    Row::in_pod("exec gives up after its time-out", life::exec_timeout),
    // What the program finds.
    Row::in_pod("environment, working directory and arguments are as asked", program::environment),
    Row::in_pod("users and groups are as asked", program::users),
    Row::in_pod("capabilities are as asked", program::capabilities),
    Row::in_pod("the default seccomp profile is on, and off when unconfined", program::seccomp),
    Row::in_pod("a local seccomp profile refuses the call it names", program::seccomp_local),
    Row::in_pod("no new privileges is set when asked and only then", program::no_new_privileges),
    Row::in_pod("a program and an exec start with no signal ignored or blocked", program::signals),
    Row::in_pod("masked paths are empty and read-only paths refuse writes", program::masked_paths),
    Row::in_pod("a read-only root refuses writes, a volume on it takes them", program::read_only_root),
    Row::in_pod("a privileged container may mount", program::privileged),
    Row::in_pod("the devices are the usual ones and no others", program::devices),
    Row::alone("sysctls of the pod hold in its containers", program::sysctls),
    Row::in_pod("any user may listen on any port and ping", program::unprivileged_network).releases(&[Version::V2_4]),
    Row::in_pod("hostname, hosts and DNS are the pod's", program::names),
    Row::in_pod(
        "hosts is one file for the pod's containers, and writable unless the root is not",
        program::shared_hosts,
    ),
    Row::in_pod("shared memory is there and shared by the pod", program::shared_memory),
    // Volumes.
    Row::in_pod("a directory bound read-write shows changes on both sides", volumes::bind_directory),
    Row::in_pod("what the host writes into a file is read by the next program", volumes::rewritten_in_place),
    Row::in_pod("a directory bound read-only refuses writes", volumes::bind_read_only),
    Row::in_pod("read-only is for the topmost mount of a volume, or for all when asked", volumes::read_only_recursive)
        .releases(&[Version::V2_4]),
    Row::in_pod("mounts of the host arrive later in the volumes that ask for them", volumes::propagation),
    Row::in_pod("a bound file shows nothing of its directory", volumes::bind_file),
    Row::in_pod("a switched symbolic link in a volume is seen", volumes::switched_link),
    Row::in_pod("file owners and modes in a volume are kept", volumes::owners),
    // Resources.
    Row::in_pod("statistics follow the program's CPU and memory", resources::statistics),
    Row::in_pod("a program over its memory limit ends as OOMKilled", resources::oom),
    Row::in_pod("statistics of the pod are those of its containers", resources::pod_statistics)
        .releases(&[Version::V2_4])
        .only(BULKHEAD),
    Row::alone("a pod whose memory limit has no room for a virtual machine says so", resources::no_room).only(BULKHEAD),
    Row::alone("a pod that outgrows its memory limit says so in the log", resources::outgrown).only(BULKHEAD),
    // Together.
    Row::in_pod("two containers share localhost", together::localhost),
    Row::in_pod("with a PID namespace each, containers do not see one another", together::pid_container),
    Row::alone("with one PID namespace, containers see one another", together::pid_pod),
    Row::alone("with hostPID, containers see one another and nothing of the host", together::pid_host).only(BULKHEAD),
    Row::in_pod("two containers have file systems of their own", together::own_filesystems),
    // Network.
    Row::in_pod("a page is fetched from the pod's address, IPv4 and IPv6", together::page),
    Row::in_pod("the pod reaches the host, IPv4 and IPv6", together::reach_host),
    Row::in_pod("interface, MTU, addresses and routes are those of CNI", together::interface),
    Row::in_pod("by the pids of a pod and its container the pod's network is entered", together::network_by_pid),
    Row::alone("two pods reach one another", together::pod_to_pod),
    Row::alone("a host port leads to the pod", together::host_port),
    // What sets Bulkhead apart.
    Row::in_pod("the pod has a kernel of its own", machine::own_kernel).only(BULKHEAD),
    Row::in_pod("a program that has run is not read from the host again", machine::warm_program).only(BULKHEAD),
    Row::alone("annotations size the virtual machine and choose its type", machine::annotations).only(BULKHEAD),
    Row::alone("limits of the pod size the virtual machine", machine::pod_limits).only(BULKHEAD),
    Row::in_pod("the root file system lists, links and renames as it should", machine::root_filesystem),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], ALL, ROWS)
}

/// Long enough for what takes a moment, also while other pods boot.
const SOON: Duration = Duration::from_secs(20);

/// Long enough for hundreds of files and megabytes to reach the host's disk, also in a machine that is emulated twice over.
const PATIENTLY: Duration = Duration::from_secs(120);

/// Runs a script to its end, soon, and returns its stdout.
fn outcome(pod: &Pod, spec: ContainerSpec) -> Result<String> {
    outcome_within(pod, spec, SOON)
}

fn outcome_within(pod: &Pod, spec: ContainerSpec, deadline: Duration) -> Result<String> {
    let (exit, log) = pod.run(spec)?.finish(deadline)?;
    let said = text_of(&log, "stdout");
    ensure!(exit.code == 0, "exit {exit:?}, stdout {said:?}, stderr {:?}", text_of(&log, "stderr"));
    Ok(said)
}

/// One line of /proc/self/status of a container's program.
fn status_field(pod: &Pod, spec: impl FnOnce(ContainerSpec) -> ContainerSpec, field: &str) -> Result<String> {
    let said = outcome(pod, spec(ContainerSpec::new(&["grep", &format!("^{field}:"), "/proc/self/status"])))?;
    Ok(said.trim_start_matches(field).trim_start_matches(':').trim().to_owned())
}
