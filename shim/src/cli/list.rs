//! `bulkhead list`: one line for each sandbox.

use std::path::Path;

use super::sandbox::{self, Sandbox};
use super::table::{self, age, or_dash};
use super::{Format, show};

/// Shows the sandboxes whose run state is below `state_dir`.
pub fn run(state_dir: &Path, format: Format) -> anyhow::Result<()> {
    show(format, &sandbox::all(state_dir)?, |sandboxes| text(sandboxes))
}

fn text(sandboxes: &[Sandbox]) -> String {
    let row = |sandbox: &Sandbox| {
        let vm = sandbox.vm.as_ref();
        [
            sandbox.id.clone(),
            or_dash(sandbox.namespace.as_deref()),
            or_dash(sandbox.age_seconds.map(age)),
            sandbox.state.name().to_owned(),
            or_dash(sandbox.shim_pid),
            or_dash(sandbox.qemu_pid),
            or_dash(vm.map(|vm| vm.vcpus)),
            or_dash(vm.map(|vm| format!("{}Mi", vm.memory_mib))),
        ]
    };
    let rows: Vec<_> = sandboxes.iter().map(row).collect();
    table::render(["ID", "NAMESPACE", "AGE", "STATE", "SHIM", "QEMU", "VCPUS", "MEMORY"], &rows)
}

#[cfg(test)]
mod tests {
    use super::super::sandbox::Standing;
    use super::*;
    use crate::vm::accel::Accel;
    use crate::vm::cmdline::Shape;

    #[test]
    fn a_sandbox_is_a_line_and_what_is_unknown_a_dash() {
        let running = Sandbox {
            id: "web".into(),
            namespace: Some("k8s.io".into()),
            state: Standing::Running,
            age_seconds: Some(300),
            shim_pid: Some(7),
            qemu_pid: Some(8),
            vm: Some(Shape { machine: "microvm".into(), accel: Some(Accel::Kvm), vcpus: 2, memory_mib: 512 }),
            problem: None,
            directory: "/run/bulkhead/web-123456".into(),
            journal: None,
        };
        let lost = Sandbox {
            id: "db".into(),
            namespace: None,
            state: Standing::NoJournal,
            age_seconds: None,
            shim_pid: None,
            qemu_pid: None,
            vm: None,
            ..running.clone()
        };
        let lines = "ID   NAMESPACE  AGE  STATE       SHIM  QEMU  VCPUS  MEMORY\n\
                     web  k8s.io     5m   running     7     8     2      512Mi\n\
                     db   -          -    no-journal  -     -     -      -\n";
        assert_eq!(text(&[running.clone(), lost]), lines);
        let json = serde_json::to_value(&running).expect("is JSON");
        assert_eq!(
            (&json["memory_mib"], &json["state"], &json["accel"]),
            (&512.into(), &"running".into(), &"kvm".into())
        );
    }
}
