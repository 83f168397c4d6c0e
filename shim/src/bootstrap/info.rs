//! `-info`: what the runtime can do, asked by containerd 2.x at its own start and before creating containers.
//!
//! Kubelet offers to pods what is claimed here, so only what is true is: no user namespaces and no idmapped mounts (the host
//! part of them is missing). Recursive read-only mounts are, since the share refuses writes on the host's side: like runc's,
//! they hold for what is mounted below when the container is created, and CRI has them private, so that nothing comes later.
//!
//! <https://github.com/opencontainers/runtime-spec/blob/main/features.md>

use anyhow::Context;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::json;

use crate::RUNTIME_NAME;

const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer, a `RuntimeInfo`. The options on stdin change nothing in it and are not read.
pub fn run() -> anyhow::Result<Vec<u8>> {
    let features = Any {
        type_url: FEATURES_TYPE.into(),
        value: serde_json::to_vec(&features()).context("encode features")?,
        ..Any::default()
    };
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..RuntimeVersion::default() };
    let info = RuntimeInfo {
        name: RUNTIME_NAME.into(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes().context("encode runtime info")
}

fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime", "nodev",
            "nodiratime", "noexec", "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime", "ro",
            "rprivate", "rro", "rslave", "rw", "slave", "strictatime", "suid", "sync"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_X32"]
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
            "netDevices": {"enabled": false}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_names_the_runtime_and_carries_features_that_parse() {
        let info = RuntimeInfo::parse_from_bytes(&run().expect("answers")).expect("decodes");
        assert_eq!((&*info.name, &*info.version.version), (RUNTIME_NAME, env!("CARGO_PKG_VERSION")));
        assert_eq!(info.features.type_url, FEATURES_TYPE);
        let features: oci_spec::runtime::Features = serde_json::from_slice(&info.features.value).expect("parses");
        assert_eq!(features.oci_version_min(), "1.0.0");
    }

    #[test]
    fn nothing_is_claimed_that_kubelet_would_offer_in_vain() {
        let features = features();
        let list = |pointer: &str| features.pointer(pointer).and_then(serde_json::Value::as_array).cloned();
        assert!(!list("/linux/namespaces").expect("is there").contains(&json!("user")));
        assert_eq!(features.pointer("/linux/mountExtensions/idmap/enabled"), Some(&json!(false)));
    }
}
