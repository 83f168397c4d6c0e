//! The specs that are run with every change: of each matter the one that breaks first, in a few minutes under TCG. Pure.

use crate::ginkgo::report::Report;

/// Regular expressions of ginkgo's on the names of specs, by matter.
const SAMPLE: [&str; 24] = [
    // Lifecycle.
    "PodSandbox runtime should support .* stopping PodSandbox",
    "Container .* removing running container",
    "Idempotence StopContainer should not return an error if already stopped",
    "OOMKilled",
    "reopening container log",
    "listing stats for started containers \\[",
    // Exec and streams.
    "execSync with timeout",
    "exec with tty=true and stdin=true",
    "runtime should support attach",
    "runtime should support portforward \\[",
    // Network and names.
    "DNS config",
    "set hostname",
    "port mapping with host port",
    "support safe sysctls",
    // Mounts.
    "starting container with volume when host path is a symlink",
    "mount with 'rslave'",
    "support recursive readonly mounts",
    // Namespaces.
    "support HostPID",
    "support PodPID",
    "HostIpc is false",
    // Security context.
    "RunAsUserName",
    "ReadOnlyRootfs is true",
    "seccomp localhost profile",
    "not allow privilege escalation when true",
];

/// The sample as one regular expression.
pub fn focus() -> String {
    SAMPLE.join("|")
}

/// How many specs a run of the sample has at least: with fewer, the suite has other names for them by now.
pub fn is_whole(report: &Report) -> bool {
    report.specs.len() >= SAMPLE.len()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ginkgo::report::Outcome;

    #[test]
    fn a_sample_that_lost_a_spec_is_not_whole() {
        let specs: BTreeMap<_, _> = SAMPLE.iter().map(|name| ((*name).to_owned(), Outcome::Passed)).collect();
        let mut report = Report { specs };
        assert!(is_whole(&report));
        report.specs.pop_first();
        assert!(!is_whole(&report));
    }
}
