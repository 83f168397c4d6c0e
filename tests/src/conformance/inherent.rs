//! The specs that no microVM passes. Pure.

use crate::ginkgo::verdict::Inherent;

/// What all of them want.
const HOST_NETWORK: &str = "a VM has no place in the host's network namespace";

/// Ends of their names, and what of the host each needs: they are pods with `hostNetwork`, or ask from one.
pub const INHERENT: [Inherent; 6] = [
    (
        "Downward API should provide host IP and pod IP as an env var if pod uses host network [LinuxOnly] \
         [NodeConformance]",
        HOST_NETWORK,
    ),
    ("should write entries to /etc/hosts when hostNetwork is enabled [NodeConformance]", HOST_NETWORK),
    (
        "KubeletManagedEtcHosts should test kubelet managed /etc/hosts file [NodeConformance] [Conformance]",
        HOST_NETWORK,
    ),
    (
        "HostPort validates that there is no conflict between pods with same hostPort but different hostIP and \
         protocol [LinuxOnly] [Conformance]",
        HOST_NETWORK,
    ),
    ("Pods should function for node-pod communication: http [LinuxOnly] [NodeConformance] [Conformance]", HOST_NETWORK),
    ("Pods should function for node-pod communication: udp [LinuxOnly] [NodeConformance] [Conformance]", HOST_NETWORK),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_in_the_page_of_differences() {
        let page = include_str!("../../../docs/differences.md");
        let (_, section) = page.split_once("## Kubernetes' own conformance suite").expect("has the section");
        for (name, _) in INHERENT {
            assert!(section.contains(&format!("- `{name}`")), "{name}");
        }
        assert_eq!(section.lines().filter(|line| line.starts_with("- `")).count(), INHERENT.len());
    }
}
