//! What one container may use at most: as it was made, and as updates have left it. Pure.
//!
//! A limit that the VM cannot give is refused only when it is new. At creation it is let pass, since kubelet's sum of the
//! limits, by which the VM is sized, may be cut to what the host has; and then each request of kubelet's repeats it.

use serde_json::Value;

use crate::container::ContainerId;
use crate::error::Result;
use crate::sizing::{Ceiling, Limits};

/// See the module's documentation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContainerLimits {
    made_with: Limits,
    now: Values,
}

/// In OCI's units, microseconds and bytes; zero is no limit, for the period the kernel's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Values {
    quota: i64,
    period: i64,
    memory: i64,
}

impl ContainerLimits {
    /// Those in an OCI spec; values that are no numbers count as none, the agent refuses them.
    pub fn of_spec(spec: &Value) -> Self {
        let resources = spec.pointer("/linux/resources").unwrap_or(&Value::Null);
        let now = Values::default().after(resources);
        Self { made_with: now.limits(), now }
    }

    /// What they are now.
    pub fn now(&self) -> Limits {
        self.now.limits()
    }

    /// What they will be after an update by OCI `linux.resources`, in which what is missing or zero stays as it is.
    ///
    /// Fails for what neither the VM has nor container `id` was made with.
    pub fn after(self, resources: &Value, id: &ContainerId, ceiling: &Ceiling) -> Result<Self> {
        let after = Self { now: self.now.after(resources), ..self };
        ceiling.admit(&format!("container {id}"), after.now(), self.made_with)?;
        Ok(after)
    }
}

impl Values {
    fn after(self, resources: &Value) -> Self {
        let changed = |pointer: &str, now: i64| {
            let value = resources.pointer(pointer).and_then(Value::as_i64).unwrap_or_default();
            if value == 0 { now } else { value }
        };
        Self {
            quota: changed("/cpu/quota", self.quota),
            period: changed("/cpu/period", self.period),
            memory: changed("/memory/limit", self.memory),
        }
    }

    fn limits(self) -> Limits {
        Limits::new(self.quota, self.period, self.memory)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Kind;
    use crate::sizing::VmSize;

    const MIB: u64 = 1 << 20;

    /// Two CPUs, and 192 MiB for containers.
    const VM: Ceiling =
        Ceiling { limits: Limits { cpu_milli: None, memory_bytes: None }, size: VmSize { vcpus: 2, memory_mib: 256 } };

    fn made(resources: Value) -> ContainerLimits {
        ContainerLimits::of_spec(&json!({"linux": {"resources": resources}}))
    }

    fn update(limits: ContainerLimits, resources: Value) -> Result<ContainerLimits> {
        limits.after(&resources, &ContainerId("web".into()), &VM)
    }

    #[test]
    fn limits_go_up_and_down_inside_the_vm_and_off() {
        let mut limits = made(json!({"cpu": {"quota": 50_000, "period": 100_000}, "memory": {"limit": 64 * MIB}}));
        for (resources, cpu_milli, memory_mib) in [
            (json!({"cpu": {"quota": 50_000, "period": 100_000}, "memory": {"limit": 64 * MIB}}), Some(500), Some(64)),
            (json!({"cpu": {"quota": 200_000}, "memory": {"limit": 192 * MIB}}), Some(2000), Some(192)),
            (json!({"cpu": {"period": 200_000}}), Some(1000), Some(192)),
            (json!({"cpu": {"quota": 0, "shares": 5}, "memory": {"limit": 0}}), Some(1000), Some(192)),
            (json!({"cpu": {"quota": -1}, "memory": {"limit": -1}}), None, None),
            (json!({}), None, None),
            (json!({"cpu": {"quota": 50_000}, "memory": {"limit": 64 * MIB}}), Some(250), Some(64)),
        ] {
            limits = update(limits, resources.clone()).expect("fits");
            let expected = Limits { cpu_milli, memory_bytes: memory_mib.map(|mib: u64| mib * MIB) };
            assert_eq!(limits.now(), expected, "after {resources}");
        }
    }

    #[test]
    fn what_the_vm_does_not_have_is_refused_with_its_name_and_both_values() {
        let limits = made(json!({}));
        let said = update(limits, json!({"memory": {"limit": 1 << 30}})).expect_err("is refused");
        assert_eq!(said.kind(), Kind::FailedPrecondition);
        assert_eq!(
            said.to_string(),
            "memory limit 1073741824 of container web is more than its virtual machine has, which stays as it started; \
             accepted is up to 201326592 bytes"
        );
        let said = update(limits, json!({"cpu": {"quota": 200_001, "period": 100_000}})).expect_err("is refused");
        assert_eq!(
            said.to_string(),
            "CPU limit 2001m of container web is more than its virtual machine has, which stays as it started; \
             accepted is up to 2000m"
        );
        // By its period alone.
        let half = made(json!({"cpu": {"quota": 200_000, "period": 100_000}}));
        update(half, json!({"cpu": {"period": 50_000}})).expect_err("is refused");
    }

    #[test]
    fn what_a_container_was_made_with_is_never_refused() {
        let large = json!({"cpu": {"quota": 400_000, "period": 100_000}, "memory": {"limit": 4096 * MIB}});
        let limits = made(large.clone());
        let limits = update(limits, large.clone()).expect("is no change");
        let limits = update(limits, json!({"cpu": {"quota": 50_000}, "memory": {"limit": 64 * MIB}})).expect("is less");
        let limits = update(limits, large).expect("is as before");
        update(limits, json!({"memory": {"limit": 4096 * MIB + 1}})).expect_err("is more");
    }
}
