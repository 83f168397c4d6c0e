//! What the node CLI is told: the driver's data as they are at this moment.

use super::{Container, Driver};
use crate::container::process::Process;
use crate::container::spec::Role;
use crate::control;

impl Driver {
    pub(super) fn report(&self) -> control::Report {
        control::Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: self.state.name().to_owned(),
            containers: self.containers.iter().map(|(id, container)| told(&id.0, container)).collect(),
        }
    }
}

fn told(id: &str, container: &Container) -> control::Container {
    let role = match container.role {
        Role::Sandbox => "sandbox",
        Role::PodContainer => "container",
        Role::Single => "single",
    };
    control::Container {
        id: id.to_owned(),
        role: role.to_owned(),
        init: Some(process("", &container.init)),
        execs: container.execs.iter().map(|(id, exec)| process(&id.0, exec)).collect(),
        paused: container.paused,
        bundle: container.bundle.display().to_string(),
    }
}

fn process(exec_id: &str, process: &Process) -> control::Process {
    control::Process {
        exec_id: exec_id.to_owned(),
        phase: process.phase().name().to_owned(),
        host_pid: process.pid(),
        exit_status: process.exit().map(|exit| exit.status),
    }
}
