//! The accelerator: KVM where the machine really has it, else translation in software (TCG).
//!
//! A `/dev/kvm` alone proves nothing: a software KVM (PVM) opens too, and QEMU aborts on it with `-cpu host`. So the CPU's own
//! flags decide first.

use std::io;

use serde::{Deserialize, Serialize};

use crate::config;
use crate::process::DeviceNode;
use crate::vm::VmError;

/// The kernel's interface to hardware virtualisation.
pub const KVM: &str = "/dev/kvm";

/// The accelerator of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Translation in software: the same, slower.
    Tcg,
}

impl Accel {
    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The accelerator.
    pub accel: Accel,
    /// Why it is not KVM although that would have been taken; to be said once, at `warn`.
    pub no_kvm: Option<String>,
}

/// Chooses for this machine; blocks for as long as it takes to read `/proc/cpuinfo` and to open `/dev/kvm`.
pub fn detect(wanted: config::Accel) -> Result<Choice, VmError> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(KVM).map(drop);
    choose(wanted, has_virtualisation(&cpuinfo), opened)
}

fn choose(wanted: config::Accel, cpu_offers: bool, opened: io::Result<()>) -> Result<Choice, VmError> {
    if wanted == config::Accel::Tcg {
        return Ok(Choice { accel: Accel::Tcg, no_kvm: None });
    }
    let missing = match (cpu_offers, opened) {
        (true, Ok(())) => return Ok(Choice { accel: Accel::Kvm, no_kvm: None }),
        (false, _) => {
            "this machine's CPU offers no hardware virtualisation (neither vmx nor svm in /proc/cpuinfo)".into()
        }
        (true, Err(error)) => format!("open {KVM}: {error}"),
    };
    if wanted == config::Accel::Kvm {
        return Err(VmError::NoKvm(missing));
    }
    Ok(Choice { accel: Accel::Tcg, no_kvm: Some(missing) })
}

/// Whether a CPU of `cpuinfo` (proc(5)) has Intel's or AMD's extension.
fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter_map(|line| line.split_once(':')).filter(|(key, _)| key.trim() == "flags");
    flags.flat_map(|(_, flags)| flags.split_whitespace()).any(|flag| flag == "vmx" || flag == "svm")
}

/// What QEMU's own `/dev` must have for `accel`.
pub fn device_nodes(accel: Accel) -> anyhow::Result<Vec<DeviceNode>> {
    match accel {
        Accel::Kvm => Ok(vec![DeviceNode::like(KVM.as_ref())?]),
        Accel::Tcg => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert!(has_virtualisation("processor\t: 0\nflags\t\t: fpu vme svm sse\n"));
        assert!(has_virtualisation("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualisation("flags\t\t: fpu svm_lock avmx\nvmx flags\t: vmx\nmodel name\t: svm\n"));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn kvm_is_taken_when_cpu_and_device_agree() {
        for wanted in [config::Accel::Auto, config::Accel::Kvm] {
            let choice = choose(wanted, true, Ok(())).expect("is there");
            assert_eq!(choice, Choice { accel: Accel::Kvm, no_kvm: None });
        }
        let choice = choose(config::Accel::Tcg, true, Ok(())).expect("is always there");
        assert_eq!(choice, Choice { accel: Accel::Tcg, no_kvm: None });
    }

    #[test]
    fn auto_falls_back_and_says_why_where_kvm_insists() {
        let cases = [
            (false, Ok(()), "neither vmx nor svm"),
            (true, Err(io::ErrorKind::PermissionDenied), "open /dev/kvm: permission denied"),
        ];
        for (cpu_offers, opened, reason) in cases {
            let choice = choose(config::Accel::Auto, cpu_offers, opened.map_err(Into::into)).expect("falls back");
            assert_eq!(choice.accel, Accel::Tcg);
            assert!(choice.no_kvm.expect("says why").contains(reason));
            let error = choose(config::Accel::Kvm, cpu_offers, opened.map_err(Into::into)).expect_err("insists");
            let text = error.to_string();
            assert!(text.starts_with("qemu.accel = \"kvm\": ") && text.contains(reason), "{text}");
        }
    }
}
