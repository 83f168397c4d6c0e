//! Ids of containers and execs, as types, since they meet in one signature everywhere.

use std::fmt;

/// Id of a container, as containerd chose it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(pub String);

/// Id of an exec within its container, as containerd chose it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExecId(pub String);

/// A process that containerd can name: a container's init, or one of its execs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The container.
    pub container: ContainerId,
    /// None for the container's init.
    pub exec: Option<ExecId>,
}

impl ProcessId {
    /// From the two strings of a request; an empty `exec_id` means the init.
    pub fn new(container_id: impl Into<String>, exec_id: impl Into<String>) -> Self {
        let exec_id = exec_id.into();
        Self { container: ContainerId(container_id.into()), exec: (!exec_id.is_empty()).then_some(ExecId(exec_id)) }
    }

    /// The container's init.
    pub fn init(container: &ContainerId) -> Self {
        Self { container: container.clone(), exec: None }
    }

    /// The exec id as requests spell it: empty for the init.
    pub fn exec_id(&self) -> &str {
        self.exec.as_ref().map_or("", |exec| &exec.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ExecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}
