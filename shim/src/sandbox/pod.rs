//! A running pod: what it is made of, what jobs use of it, and how all of it goes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::cgroup::PodCgroup;
use crate::cgroup::memory::OutOfMemory;
use crate::container::stdio::streaming::Streams;
use crate::guest::client::{Guest, GuestTask};
use crate::guest::listener::{Listener, ListenerTask};
use crate::guest::transport::Transport;
use crate::hooks::{Hooks, Moment};
use crate::idmap::IdMappings;
use crate::network::forward::Forward;
use crate::network::netns::NewNetns;
use crate::network::{self, PodNetwork, TapFiles};
use crate::process::Child;
use crate::sandbox::ledger::Ledger;
use crate::sizing::Ceiling;
use crate::stopwatch::Stopwatch;
use crate::storage::container::Place;
use crate::storage::etc::EtcFiles;
use crate::storage::share::Share;
use crate::timeouts;
use crate::vm::Vm;

/// What jobs use of a running pod.
#[derive(Debug, Clone)]
pub struct Access {
    /// The sandbox's id.
    pub sandbox_id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The agent.
    pub guest: Guest,
    /// Where streams are registered.
    pub listener: Listener,
    /// The streams that containerd opens in the place of FIFOs.
    pub streams: Streams,
    /// Where storage goes.
    pub place: Place,
    /// Files that every container of the pod gets; None where containerd makes them.
    pub etc: Option<EtcFiles>,
    /// The maps of the pod's user namespace; None if it has none.
    pub user_namespace: Option<IdMappings>,
    /// What the VM can give.
    pub ceiling: Ceiling,
    /// Hooks of the container, which has no pod; None for none.
    pub hooks: Option<Hooks>,
    /// The pod's network namespace; None if it has none of its own.
    pub netns: Option<PathBuf>,
}

/// Everything of a running pod. [`Pod::tear_down`] ends it.
#[derive(Debug)]
pub struct Pod {
    pub(super) parts: Parts,
    pub(super) access: Access,
}

impl Pod {
    /// A pod without a VM, for tests of what stands above one; `lost` is the VM's death.
    pub fn without_vm(access: Access, lost: CancellationToken) -> Self {
        Self { parts: Parts { lost: Some(lost), ..Parts::default() }, access }
    }

    /// Its network namespace; None if it has none of its own.
    pub fn netns(&self) -> Option<&Path> {
        self.access.netns.as_deref()
    }

    /// What jobs use.
    pub fn access(&self) -> Access {
        self.access.clone()
    }

    /// The end of the guest's console.
    pub fn console_tail(&self) -> String {
        self.parts.vm.as_ref().map(Vm::console_tail).unwrap_or_default()
    }

    /// Whether the VM has ended.
    pub fn is_lost(&self) -> bool {
        self.parts.vm.as_ref().is_some_and(|vm| vm.child().exited().borrow().is_some())
    }

    /// Why the VM is lost, as far as QEMU, the console and the pod's cgroup tell; `seen` is what was noticed.
    pub fn obituary(&self, seen: &str) -> String {
        // The helpers end with QEMU, and sometimes are seen first.
        let ended = self.parts.vm.as_ref().filter(|_| self.is_lost());
        let how = ended.map_or_else(|| seen.to_owned(), Vm::obituary);
        match self.parts.out_of_memory() {
            Some(cause) => format!("{how}: {cause}"),
            None => how,
        }
    }

    /// One future for each child: it ends when the child does, and names it.
    pub fn children_ended(&self) -> Vec<BoxFuture<'static, String>> {
        let vm_exit = self.parts.vm.as_ref().map(|vm| vm.child().exited());
        let ended = |child: &Child| {
            let (role, mut exit, mut vm_exit) = (child.role(), child.exited(), vm_exit.clone());
            async move {
                let how = match exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit) {
                    Some(exit) => exit.to_string(),
                    None => "ended with the shim".to_owned(),
                };
                // A helper ends with QEMU, and may be seen first: then QEMU is the news.
                if let Some(vm_exit) = &mut vm_exit {
                    drop(timeout(timeouts::HELPER_EXIT, vm_exit.wait_for(Option::is_some)).await);
                }
                format!("{role} {how}")
            }
            .boxed()
        };
        let mut all: Vec<_> = self.parts.children().map(ended).collect();
        all.extend(self.parts.lost.clone().map(|lost| {
            async move {
                lost.cancelled().await;
                "the virtual machine ended".to_owned()
            }
            .boxed()
        }));
        all
    }

    /// Ends the pod, but for its taps, whose files are returned. Errors are logged; every step is tried.
    pub async fn tear_down(self, guest: Farewell) -> TapFiles {
        self.parts.tear_down(guest).await
    }
}

/// Whether the guest is asked to end before it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// It ends its containers and syncs.
    Asked,
    /// It is lost, or not to be waited for.
    Killed,
}

/// What a boot has made so far.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) journal: Option<Ledger>,
    /// Those that have begun to run.
    pub(super) hooks: Option<Hooks>,
    /// Made for hooks to fill.
    pub(super) netns: Option<NewNetns>,
    pub(super) cgroup: Option<PodCgroup>,
    pub(super) network: Option<PodNetwork>,
    pub(super) share: Option<Share>,
    pub(super) transport: Option<Transport>,
    pub(super) listener_task: Option<ListenerTask>,
    pub(super) vm: Option<Vm>,
    pub(super) guest: Option<Guest>,
    pub(super) guest_task: Option<GuestTask>,
    pub(super) forward: Option<Forward>,
    /// In place of a VM's end; see [`Pod::without_vm`].
    pub(super) lost: Option<CancellationToken>,
}

impl Parts {
    pub(super) fn children(&self) -> impl Iterator<Item = &Child> {
        let vm = self.vm.as_ref().map(Vm::child);
        let helper = self.transport.as_ref().and_then(Transport::child);
        vm.into_iter().chain(self.share.as_ref().map(Share::child)).chain(helper)
    }

    /// Why the kernel has killed one of the children for want of memory; `None` if it has not.
    pub(super) fn out_of_memory(&self) -> Option<OutOfMemory> {
        self.cgroup.as_ref().and_then(PodCgroup::out_of_memory)
    }

    /// Removes what is there: the guest first, if it still lives; then QEMU, and beside it what does not serve it; then the
    /// rest.
    pub(super) async fn tear_down(mut self, farewell: Farewell) -> TapFiles {
        let mut stopwatch = Stopwatch::start();
        if let (Some(guest), Some(vm), Farewell::Asked) = (&self.guest, &self.vm, farewell) {
            // The agent ends the containers and syncs before it answers, so nothing is lost when QEMU goes right after.
            let asked = vm.while_alive("shut the guest down", timeouts::GUEST_SHUTDOWN, guest.shutdown()).await;
            match asked {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the guest did not shut down and is killed"),
                Err(error) => tracing::warn!(%error, "the guest did not shut down and is killed"),
            }
        }
        stopwatch.lap("guest");
        // QEMU's end takes longest; it has been killed before anything else is.
        let mut network = self.network.take().unwrap_or_default();
        let tap_files = std::mem::take(&mut network.tap_files);
        let ((vm, vm_took), (share, share_took), (forward, forward_took), (network, network_took)) = tokio::join!(
            timed(end_vm(self.vm.take())),
            timed(end_share(self.share.take())),
            timed(end_forward(self.forward.take())),
            timed(end_network(network))
        );
        stopwatch.lap("vm");
        let parts = [("qemu", vm_took), ("share", share_took), ("forward", forward_took), ("network", network_took)];
        for (part, took) in parts {
            stopwatch.note(&format!("vm.{part}"), took);
        }
        // Before the helper goes, or it would be told that the connection broke.
        if let Some(task) = self.guest_task.take() {
            task.close().await;
        }
        let transport = end_transport(self.transport.take()).await;
        if let Some(task) = self.listener_task.take() {
            task.close().await;
        }
        stopwatch.lap("helpers");
        let mut failed: Vec<String> = [vm, forward, transport, share, network].into_iter().flatten().collect();
        if let Some(cgroup) = self.cgroup.take()
            && let Err(error) = cgroup.remove().await
        {
            failed.push(error.to_string());
        }
        stopwatch.lap("cgroup");
        if let Some(hooks) = self.hooks.take() {
            let netns = self.netns.as_ref().map(NewNetns::path);
            if let Err(error) = hooks.run(Moment::Stop, netns.as_deref(), None).await {
                tracing::warn!(%error, "a poststop hook failed");
            }
            stopwatch.lap("hooks");
        }
        // The journal goes last, and only when nothing is left that it names.
        match (failed.is_empty(), self.journal.take()) {
            (true, Some(journal)) => {
                if let Err(error) = journal.close().await {
                    tracing::error!(error = %format_args!("{error:#}"), "run state is left");
                }
            }
            (true, None) => {}
            (false, _) => tracing::error!(error = failed.join("; "), "teardown is incomplete; delete will try again"),
        }
        stopwatch.lap("journal");
        tracing::info!(elapsed_ms = stopwatch.total().as_millis(), stages = stopwatch.told(), "sandbox torn down");
        tap_files
    }
}

async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let begun = Instant::now();
    let done = work.await;
    (done, begun.elapsed())
}

async fn end_vm(vm: Option<Vm>) -> Option<String> {
    let vm = vm?;
    vm.kill().await.err().map(|error| format!("QEMU: {error}"))
}

async fn end_forward(forward: Option<Forward>) -> Option<String> {
    let forward = forward?;
    forward.close().await.err().map(|error| format!("port-forward: {error}"))
}

async fn end_transport(transport: Option<Transport>) -> Option<String> {
    let transport = transport?;
    transport.close().await.err().map(|error| format!("vsock helper: {error:#}"))
}

async fn end_share(share: Option<Share>) -> Option<String> {
    let share = share?;
    share.kill().await.err().map(|error| format!("virtiofsd: {error:#}"))
}

async fn end_network(network: PodNetwork) -> Option<String> {
    let mut failed = Vec::new();
    for link in &network.links {
        if let Err(error) = network::detach(link).await {
            failed.push(error.to_string());
        }
    }
    (!failed.is_empty()).then(|| failed.join("; "))
}
