//! `-info`: what the runtime can do, asked by containerd 2.x at its own start and before creating containers.
//!
//! Kubelet offers to pods what is claimed here, so only what is true is.
//!
//! User namespaces and id-mapped mounts are, and what they need of the host's kernel is checked where they are made, as runc
//! does; but not to a handler with options: containerd (2.4) takes the options of every container in a user namespace for
//! runc's, and fails to read them. Recursive read-only mounts are, since the share refuses writes on the host's side: like
//! runc's, they hold for what is mounted below when the container is created, and CRI has them private, so that nothing comes
//! later.
//!
//! <https://github.com/opencontainers/runtime-spec/blob/main/features.md>

use anyhow::Context;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::json;

use crate::RUNTIME_NAME;

const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer, a `RuntimeInfo`, to a handler whose options are on stdin: an `Any`, or nothing.
pub fn run(stdin: &[u8]) -> anyhow::Result<Vec<u8>> {
    let options = Any::parse_from_bytes(stdin).context("stdin holds no runtime options")?;
    let foreign = !matches!(options.type_url.rsplit('/').next(), None | Some("" | "containerd.runc.v1.Options"));
    let features = Any {
        type_url: FEATURES_TYPE.into(),
        value: serde_json::to_vec(&features(!foreign)).context("encode features")?,
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

fn features(user_namespaces: bool) -> serde_json::Value {
    let mut features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "idmap", "noatime", "nodev",
            "nodiratime", "noexec", "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime", "ridmap",
            "ro", "rprivate", "rro", "rslave", "rw", "slave", "strictatime", "suid", "sync"
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
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": false}
        }
    });
    if let Some(namespaces) = features["linux"]["namespaces"].as_array_mut().filter(|_| user_namespaces) {
        namespaces.push(json!("user"));
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_names_the_runtime_and_carries_features_that_parse() {
        let info = RuntimeInfo::parse_from_bytes(&run(&[]).expect("answers")).expect("decodes");
        assert_eq!((&*info.name, &*info.version.version), (RUNTIME_NAME, env!("CARGO_PKG_VERSION")));
        assert_eq!(info.features.type_url, FEATURES_TYPE);
        let features: oci_spec::runtime::Features = serde_json::from_slice(&info.features.value).expect("parses");
        assert_eq!(features.oci_version_min(), "1.0.0");
    }

    fn features_for(type_url: &str) -> serde_json::Value {
        let options = Any { type_url: type_url.into(), ..Any::default() }.write_to_bytes().expect("encodes");
        let info = RuntimeInfo::parse_from_bytes(&run(&options).expect("answers")).expect("decodes");
        serde_json::from_slice(&info.features.value).expect("parses")
    }

    fn lists(features: &serde_json::Value, pointer: &str, word: &str) -> bool {
        features.pointer(pointer).and_then(serde_json::Value::as_array).is_some_and(|list| list.contains(&json!(word)))
    }

    #[test]
    fn containerd_finds_what_it_looks_for_before_it_offers_user_namespaces_and_recursive_read_only_mounts() {
        for type_url in ["", "containerd.runc.v1.Options"] {
            let features = features_for(type_url);
            assert!(lists(&features, "/linux/namespaces", "user") && lists(&features, "/mountOptions", "rro"));
            assert_eq!(features.pointer("/linux/mountExtensions/idmap/enabled"), Some(&json!(true)));
        }
    }

    #[test]
    fn user_namespaces_are_not_offered_where_containerd_would_fail_to_start_their_containers() {
        let features = features_for("runtimeoptions.v1.Options");
        assert!(!lists(&features, "/linux/namespaces", "user") && lists(&features, "/mountOptions", "rro"));
    }
}
