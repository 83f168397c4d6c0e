//! One promise and the test of it: a row of the table that runs against every runtime.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;

use crate::command::Output;
use crate::config::{
    BAD_HANDLER, BAD_SANDBOXER_HANDLER, BARE_HANDLER, BARE_SANDBOXER_HANDLER, SANDBOXER_HANDLER, STREAMING_HANDLER,
};
use crate::containerd::Node;
use crate::ctr::Ctr;
use crate::pod::{self, Pod, PodSpec};
use crate::tools::Version;

/// Bulkhead through either of containerd's doors.
pub const BULKHEAD: &[Runtime] = &[Runtime::Bulkhead, Runtime::BulkheadSandbox];

/// runc, and Bulkhead through either door.
pub const ALL: &[Runtime] = &[Runtime::Runc, Runtime::Bulkhead, Runtime::BulkheadSandbox];

/// [`ALL`], and Bulkhead with streaming IO: for what concerns a program's input and output.
pub const ALL_AND_STREAMING: &[Runtime] =
    &[Runtime::Runc, Runtime::Bulkhead, Runtime::BulkheadSandbox, Runtime::BulkheadStreaming];

/// What runs the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// Debian's runc: the measure.
    Runc,
    /// Bulkhead, as the pause container's runtime.
    Bulkhead,
    /// Bulkhead through containerd's sandbox API, without a pause container.
    BulkheadSandbox,
    /// The same with containerd's streaming IO.
    BulkheadStreaming,
}

impl Runtime {
    /// Name in test names and in `BULKHEAD_TEST_RUNTIMES`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
            Self::BulkheadSandbox => "bulkhead-sandbox",
            Self::BulkheadStreaming => "bulkhead-streaming",
        }
    }

    /// Name of the handler in containerd's configuration.
    pub fn handler(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
            Self::BulkheadSandbox => SANDBOXER_HANDLER,
            Self::BulkheadStreaming => STREAMING_HANDLER,
        }
    }

    /// The handler whose configuration a test may break; there is none for runc, which has no such configuration.
    pub fn bad_handler(self) -> &'static str {
        if self.by_sandbox_api() { BAD_SANDBOXER_HANDLER } else { BAD_HANDLER }
    }

    /// The handler without options; there is none for runc.
    pub fn bare_handler(self) -> &'static str {
        if self.by_sandbox_api() { BARE_SANDBOXER_HANDLER } else { BARE_HANDLER }
    }

    /// containerd's name of the runtime.
    pub fn runtime_type(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Bulkhead | Self::BulkheadSandbox | Self::BulkheadStreaming => "io.containerd.bulkhead.v2",
        }
    }

    /// Whether pods come by containerd's sandbox API, which 2.x has.
    pub fn by_sandbox_api(self) -> bool {
        matches!(self, Self::BulkheadSandbox | Self::BulkheadStreaming)
    }

    /// Whether pods are virtual machines.
    pub fn is_bulkhead(self) -> bool {
        self != Self::Runc
    }
}

/// Where a row runs.
#[derive(Debug)]
pub struct Context {
    /// The containerd.
    pub node: Arc<Node>,
    /// The runtime.
    pub runtime: Runtime,
    /// An empty directory for the row's files.
    pub scratch: PathBuf,
}

impl Context {
    /// Starts a pod of this runtime.
    pub fn start(&self, spec: PodSpec) -> Result<Pod> {
        Pod::start(&self.node, self.runtime.handler(), spec)
    }

    /// Starts a pod of this runtime and returns what `crictl` said, whether it worked or not.
    pub fn try_start(&self, spec: PodSpec) -> Result<(Option<Pod>, Output)> {
        pod::try_start(&self.node, self.runtime.handler(), spec)
    }

    /// `ctr` for this runtime.
    pub fn ctr(&self) -> Ctr {
        Ctr::new(&self.node, self.runtime)
    }
}

/// The function of a row.
#[derive(Debug, Clone, Copy)]
pub enum Test {
    /// Makes what it needs itself.
    Alone(fn(&Context) -> Result<()>),
    /// Runs containers in a pod that it shares with other rows, and removes them.
    InPod(fn(&Context, &Pod) -> Result<()>),
}

/// One promise.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The promise, as a sentence.
    pub name: &'static str,
    /// Its test.
    pub test: Test,
    /// The only runtimes it holds for; empty: all of the suite.
    pub only: &'static [Runtime],
    /// The only releases of containerd it holds for; empty: all of the suite.
    pub releases: &'static [Version],
}

impl Row {
    /// A row that makes its own pods.
    pub const fn alone(name: &'static str, test: fn(&Context) -> Result<()>) -> Self {
        Self { name, test: Test::Alone(test), only: &[], releases: &[] }
    }

    /// A row whose containers may live in a pod with others.
    pub const fn in_pod(name: &'static str, test: fn(&Context, &Pod) -> Result<()>) -> Self {
        Self { name, test: Test::InPod(test), only: &[], releases: &[] }
    }

    /// Restricts the row to some releases of containerd.
    #[must_use]
    pub const fn releases(self, releases: &'static [Version]) -> Self {
        Self { releases, ..self }
    }

    /// Restricts the row to some runtimes.
    #[must_use]
    pub const fn only(self, only: &'static [Runtime]) -> Self {
        Self { only, ..self }
    }
}
