//! Specs for every day: of each matter the one that breaks first, in a few minutes under TCG. Pure.

use crate::ginkgo::literally;
use crate::ginkgo::report::Report;

/// Whole names, by matter.
const SAMPLE: [&str; 24] = [
    // Lifecycle.
    "[sig-node] Container Runtime blackbox test on terminated container should report termination message if \
     TerminationMessagePath is set as non-root user and at a non-default path [NodeConformance] [Conformance]",
    "[sig-node] Containers should be able to override the image's default command and arguments [NodeConformance] \
     [Conformance]",
    "[sig-node] InitContainer [NodeConformance] should invoke init containers on a RestartNever pod [Conformance]",
    "[sig-node] Container Lifecycle Hook when create a pod with lifecycle hook should execute prestop exec hook \
     properly [NodeConformance] [Conformance]",
    "[sig-node] Ephemeral Containers [NodeConformance] will start an ephemeral container in an existing pod \
     [Conformance]",
    "[sig-node] Probing container should be restarted with a exec \"cat /tmp/health\" liveness probe [NodeConformance] \
     [Conformance]",
    "[sig-node] Pod InPlace Resize Container resize pod via the replace endpoint [MinimumKubeletVersion:1.34] \
     [Conformance]",
    "[sig-apps] ReplicaSet should serve a basic image on each replica with a public image [Conformance]",
    // Exec, logs and the command line.
    "[sig-node] Pods should support remote command execution over websockets [NodeConformance] [Conformance]",
    "[sig-node] Kubelet when scheduling a busybox command in a pod should print the output to logs [NodeConformance] \
     [Conformance]",
    "[sig-cli] Kubectl client Kubectl run pod should create a pod from an image when restart is Never [Conformance]",
    // Environment and kernel parameters.
    "[sig-node] Downward API should provide pod name, namespace and IP address as env vars [NodeConformance] \
     [Conformance]",
    "[sig-node] Secrets should be consumable via the environment [NodeConformance] [Conformance]",
    "[sig-node] Sysctls [LinuxOnly] [NodeConformance] should support sysctls [Environment:NotInUserNS] [Conformance]",
    // Security context.
    "[sig-node] Kubelet when scheduling a read only busybox container should not write to root filesystem [LinuxOnly] \
     [NodeConformance] [Conformance]",
    "[sig-node] Security Context should support pod.Spec.SecurityContext.RunAsUser And \
     pod.Spec.SecurityContext.RunAsGroup [LinuxOnly] [Conformance]",
    "[sig-node] Security Context when creating containers with AllowPrivilegeEscalation should not allow privilege \
     escalation when false [LinuxOnly] [NodeConformance] [Conformance]",
    // Volumes.
    "[sig-storage] EmptyDir volumes should support (non-root,0666,tmpfs) [LinuxOnly] [NodeConformance] [Conformance]",
    "[sig-storage] EmptyDir volumes pod should support shared volumes between containers [Conformance]",
    "[sig-storage] Projected combined should project all components that make up the projection API [Projection] \
     [NodeConformance] [Conformance]",
    "[sig-storage] Secrets should be consumable from pods in volume as non-root with defaultMode and fsGroup set \
     [LinuxOnly] [NodeConformance] [Conformance]",
    // Network and names.
    "[sig-network] DNS should provide DNS for the cluster [Conformance]",
    "[sig-network] Networking Granular Checks: Pods should function for intra-pod communication: http \
     [NodeConformance] [Conformance]",
    "[sig-network] Services should serve endpoints on same port and different protocols [Conformance]",
];

/// The sample as one regular expression of ginkgo's.
pub fn focus() -> String {
    literally(SAMPLE)
}

/// Specs of the sample that `report` has not: the suite has other names for them by now.
pub fn missing(report: &Report) -> Vec<&'static str> {
    SAMPLE.into_iter().filter(|name| !report.specs.contains_key(*name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ginkgo::report::Outcome;

    #[test]
    fn a_spec_that_is_not_there_is_told() {
        let specs = SAMPLE.iter().map(|name| ((*name).to_owned(), Outcome::Passed)).collect();
        let mut report = Report { specs };
        assert!(missing(&report).is_empty());
        report.specs.remove(SAMPLE[3]);
        assert_eq!(missing(&report), [SAMPLE[3]]);
    }
}
