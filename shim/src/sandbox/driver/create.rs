//! Create: the first one boots the VM, every other makes a container in it.

use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_proto::agent;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use tokio_util::sync::CancellationToken;

use super::process::encode;
use super::{Container, Done, Door, Driver, Holding, Stage, answer};
use crate::container::ContainerId;
use crate::container::limits::ContainerLimits;
use crate::container::spec::{self, PidNamespace, Role};
use crate::container::stdio::{Logged, Stdio, StdioPaths};
use crate::error::{Error, Kind, Result, WithKind};
use crate::network::TapFiles;
use crate::sandbox::boot::BootRequest;
use crate::sandbox::pod::{Access, Farewell, Pod};
use crate::sandbox::spec::SandboxSpec;
use crate::sandbox::state::{State, Step};
use crate::sandbox::{CreateTask, Reply};
use crate::stopwatch::Stopwatch;
use crate::storage::container::ContainerStorage;
use crate::storage::plan::Mount;
use crate::storage::volume::Owner;

/// Result of the boot's job.
pub(super) struct BootDone {
    id: ContainerId,
    /// The Create that asked for it; None if the sandbox API did.
    task: Option<Arc<CreateTask>>,
    result: Result<Pod>,
    reply: Reply<u32>,
}

/// Result of a container's job.
pub(super) struct MadeDone {
    id: ContainerId,
    /// What the create event tells.
    told: Told,
    result: Result<Made>,
    reply: Reply<u32>,
}

struct Made {
    storage: ContainerStorage,
    stdio: Stdio,
}

struct Told {
    bundle: PathBuf,
    rootfs: Vec<Mount>,
    stdio: StdioPaths,
}

impl Driver {
    pub(super) fn create(&mut self, task: CreateTask, reply: Reply<u32>) {
        let role = match self.admit(&task) {
            Ok(role) => role,
            Err(error) => return answer(reply, Err(error)),
        };
        let spec = match role {
            Role::PodContainer => None,
            Role::Sandbox | Role::Single => match SandboxSpec::of_task(&task, role) {
                Ok(spec) => Some(spec),
                Err(error) => return answer(reply, Err(error.context(format!("create sandbox {}", task.id)))),
            },
        };
        let limits = ContainerLimits::of_spec(&task.spec);
        let entry = match Container::new(role, Door::Task, task.bundle.clone(), task.stdio.clone()) {
            Ok(entry) => Container { limits, ..entry },
            Err(error) => return answer(reply, Err(error)),
        };
        self.containers.insert(task.id.clone(), entry);
        let task = Arc::new(task);
        match spec {
            None => self.make_container(task, reply),
            Some(spec) => self.boot(spec, Some(task), reply),
        }
    }

    /// The second door: the same boot, for a sandbox that is no task.
    pub(super) fn create_sandbox(&mut self, spec: SandboxSpec, reply: Reply<u32>) {
        if self.containers.contains_key(&spec.id) {
            return answer(reply, Err(Error::already_exists(format!("sandbox {} exists", spec.id))));
        }
        if self.state != State::Planned {
            let error = format!("create sandbox {}: sandbox is {}", spec.id, self.state.name());
            return answer(reply, Err(Error::failed_precondition(error)));
        }
        match Container::new(Role::Sandbox, Door::SandboxApi, PathBuf::new(), StdioPaths::default()) {
            Ok(entry) => {
                let entry = Container { oci_spec: Arc::new(spec.to_oci()), ..entry };
                self.containers.insert(spec.id.clone(), entry)
            }
            Err(error) => return answer(reply, Err(error)),
        };
        self.boot(spec, None, reply);
    }

    fn admit(&self, task: &CreateTask) -> Result<Role> {
        if self.containers.contains_key(&task.id) {
            return Err(Error::already_exists(format!("container {} exists", task.id)));
        }
        let role = match spec::role(&task.spec)? {
            // Whoever made a sandbox by the sandbox API says by the door, and not by annotations, what is a container of it.
            Role::Single if self.containers.values().any(|c| c.door == Door::SandboxApi) => Role::PodContainer,
            role => role,
        };
        let fits = match role {
            Role::PodContainer => self.state == State::Ready,
            Role::Sandbox | Role::Single => self.state == State::Planned,
        };
        if fits {
            Ok(role)
        } else {
            Err(Error::failed_precondition(format!("create container {}: sandbox is {}", task.id, self.state.name())))
        }
    }

    fn boot(&mut self, spec: SandboxSpec, task: Option<Arc<CreateTask>>, reply: Reply<u32>) {
        let id = spec.id.clone();
        if let Err(error) = self.step(Step::Boot) {
            self.containers.remove(&id);
            return answer(reply, Err(error));
        }
        // The pid can be asked for from now on, and who takes statistics by it would take the host's for the pod's.
        if let (Some(container), Some(netns)) = (self.containers.get_mut(&id), &spec.netns)
            && let Err(error) = container.init.enter_network(Some(netns))
        {
            tracing::debug!(%id, error = %format_args!("{error:#}"), "the boot will fail for the pod's network namespace");
        }
        let cancel = CancellationToken::new();
        self.holding = Holding::Boot(cancel.clone());
        let guest_events = self.guest_events_in.clone();
        let booting = (self.booter)(BootRequest { spec: Arc::new(spec), guest_events, cancel });
        self.jobs.spawn(async move {
            let result = booting.await;
            Done::Booted(Box::new(BootDone { id, task, result, reply }))
        });
    }

    pub(super) fn on_booted(&mut self, done: BootDone) {
        let BootDone { id, task, result, reply } = done;
        match (result, self.state) {
            (Ok(pod), State::Booting) => {
                if let Err(error) = self.step(Step::Booted) {
                    return answer(reply, Err(error));
                }
                self.watch_children(&pod);
                self.holding = Holding::Pod(Box::new(pod));
                let single = self.containers.get(&id).is_some_and(|container| container.role == Role::Single);
                let task = match task {
                    Some(task) if single => return self.make_container(task, reply),
                    task => task,
                };
                if let Err(error) = self.enter_network(&id) {
                    return self.fail_create(&id, reply, error);
                }
                match task {
                    Some(task) => self.created(&id, &Told::of(&task)),
                    None => {
                        if let Some(sandbox) = self.containers.get_mut(&id) {
                            sandbox.stage = Stage::Made;
                        }
                    }
                }
                let pid = self.container(&id).map(|container| container.init.pid());
                answer(reply, pid);
            }
            (Err(error), State::Booting) => {
                tracing::error!(%error, "sandbox failed to start");
                if let Err(error) = self.step(Step::BootFailed) {
                    tracing::error!(%error, "a failed boot cannot be taken back");
                }
                self.holding = Holding::Nothing;
                self.containers.remove(&id);
                answer(reply, Err(error));
            }
            // It was killed meanwhile. The boot either saw that and has unwound, or was already through. The task stays, to
            // exit when the teardown is through: who killed it waits for that exit, and deletes it.
            (result, _) => {
                if let Ok(container) = self.container_mut(&id) {
                    container.stage = Stage::Made;
                }
                answer(reply, Err(Error::unavailable(format!("create container {id}: sandbox was killed"))));
                self.jobs.spawn(async move {
                    Done::TornDown(match result {
                        Ok(pod) => pod.tear_down(Farewell::Killed).await,
                        Err(_) => TapFiles::default(),
                    })
                });
            }
        }
    }

    /// The end of a child is an event from now on.
    fn watch_children(&mut self, pod: &Pod) {
        for ended in pod.children_ended() {
            self.jobs.spawn(async move { Done::ChildExited(ended.await) });
        }
    }

    fn make_container(&mut self, task: Arc<CreateTask>, reply: Reply<u32>) {
        let begin = |driver: &mut Self| {
            let access = driver.access("create container")?;
            driver.enter_network(&task.id)?;
            let pid_of =
                |role: Role| driver.containers.values().find(|container| container.role == role).map(|c| c.init.pid());
            spec::check_user_namespace(&task.spec, access.user_namespace.as_ref())?;
            let mut guest = spec::translate(task.spec.clone(), pid_of(Role::Sandbox))?;
            guest.dropped.retain(|key| key != "hooks" || access.hooks.is_none());
            let target = match guest.pid_namespace {
                PidNamespace::OfHostPid(pid) => driver.container_of_pid(pid)?,
                PidNamespace::Own | PidNamespace::Pod => String::new(),
            };
            Ok::<_, Error>((access, guest, target))
        };
        let (access, guest, target) = match begin(self) {
            Ok(begun) => begun,
            Err(error) => return self.fail_create(&task.id, reply, error),
        };
        if !guest.dropped.is_empty() {
            tracing::info!(
                container_id = %task.id,
                dropped = guest.dropped.join(","),
                "parts of the spec that concern the host are dropped"
            );
        }
        self.jobs.spawn(async move {
            let told = Told::of(&task);
            let result = make(&access, &task, guest, target).await;
            Done::ContainerMade(Box::new(MadeDone { id: task.id.clone(), told, result, reply }))
        });
    }

    /// `kubectl debug --target` names a container by the pid that containerd has for it.
    fn container_of_pid(&self, pid: u32) -> Result<String> {
        self.containers
            .iter()
            .find(|(_, container)| container.role != Role::Sandbox && container.init.pid() == pid)
            .map(|(id, _)| id.0.clone())
            .ok_or_else(|| {
                Error::invalid(format!(
                    "PID namespace of process {pid} in linux.namespaces, expected that of a container of this pod"
                ))
            })
    }

    pub(super) fn on_container_made(&mut self, done: MadeDone) {
        let MadeDone { id, told, result, reply } = done;
        let made = match result {
            Ok(made) => made,
            Err(error) => {
                let error = self.explained(error);
                // The words by which people and tools know a failed create from runc.
                self.fail_create(&id, reply, error.context("OCI runtime create failed"));
                self.finish_stop();
                return;
            }
        };
        match self.container_mut(&id) {
            Ok(container) => {
                container.storage = Some(made.storage);
                container.init.set_stdio(made.stdio);
            }
            Err(error) => return answer(reply, Err(error)),
        }
        self.created(&id, &told);
        let pid = self.container(&id).map(|container| container.init.pid());
        answer(reply, pid);
        if self.state != State::Ready {
            // The pod was lost between the guest's answer and here.
            self.end_all();
            self.finish_stop();
        }
    }

    /// Drops a container that was not made and says so; a sandbox takes its VM with it, and is answered when that is gone.
    fn fail_create(&mut self, id: &ContainerId, reply: Reply<u32>, error: Error) {
        let role = self.containers.remove(id).map(|container| container.role);
        if matches!(role, Some(Role::Single | Role::Sandbox)) && self.state == State::Ready {
            self.failed_creates.push((reply, error));
            self.begin_stop(super::killed_now(), Farewell::Killed);
        } else {
            answer(reply, Err(error));
        }
    }

    /// Has the pid of a container or sandbox lead to the pod's network, or to an empty one where the pod has none.
    ///
    /// Only in the latter case is there an error: whoever configured a network by the pid would change the host's. In the
    /// former a pid that leads elsewhere misleads who goes by it, and the container is none the worse.
    fn enter_network(&mut self, id: &ContainerId) -> Result<()> {
        let Holding::Pod(pod) = &self.holding else { return Ok(()) };
        let Some(container) = self.containers.get_mut(id) else { return Ok(()) };
        match container.init.enter_network(pod.netns()) {
            Err(error) if pod.netns().is_some() => {
                tracing::warn!(container_id = %id, error = %format_args!("{error:#}"), "its pid is not in the pod's network");
                Ok(())
            }
            entered => {
                entered.or_kind(Kind::Internal, "keep the pid of a container without a network out of the host's")
            }
        }
    }

    fn created(&mut self, id: &ContainerId, told: &Told) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.stage = Stage::Made;
        let pid = container.init.pid();
        tracing::info!(container_id = %id, "container created");
        self.events.publish(
            "/tasks/create",
            &TaskCreate {
                container_id: id.0.clone(),
                bundle: told.bundle.display().to_string(),
                rootfs: told.rootfs.iter().map(crate::service::convert::mount_message).collect(),
                io: MessageField::some(TaskIO {
                    stdin: told.stdio.stdin.clone(),
                    stdout: told.stdio.stdout.clone(),
                    stderr: told.stdio.stderr.clone(),
                    terminal: told.stdio.terminal,
                    ..Default::default()
                }),
                pid,
                ..Default::default()
            },
        );
    }
}

impl Told {
    fn of(task: &CreateTask) -> Self {
        Self { bundle: task.bundle.clone(), rootfs: task.rootfs.clone(), stdio: task.stdio.clone() }
    }
}

/// Makes a container: storage on the host, streams, then the guest. On an error nothing of it is left.
async fn make(access: &Access, task: &CreateTask, guest: spec::GuestSpec, target: String) -> Result<Made> {
    let mut stopwatch = Stopwatch::start();
    let mut guest_spec = guest.spec;
    if let Some(etc) = &access.etc {
        etc.add_to(&mut guest_spec, access.user_namespace.as_ref());
    }
    let pod_uid = spec::pod_uid(&task.spec);
    let owner = Owner {
        container_id: &task.id.0,
        sandbox_id: &access.sandbox_id,
        pod_uid: pod_uid.as_deref(),
        bundle: &task.bundle,
        user_namespace: access.user_namespace.as_ref(),
    };
    let root_path = PathBuf::from(spec::string(&task.spec, "/root/path"));
    let premounted = (!root_path.as_os_str().is_empty()).then_some(root_path.as_path());
    let (mut storage, in_guest) =
        ContainerStorage::attach(&access.place, owner, &task.rootfs, premounted, &mut guest_spec).await?;
    let block_devices = storage.attach_block_volumes(&access.place, &guest.block_volumes).await;
    stopwatch.lap("storage");
    let made = async {
        let block_devices = block_devices?;
        let logged = Logged { id: &task.id.0, namespace: &access.namespace };
        let (stdio, told) = Stdio::open(&task.stdio, logged, &access.listener, &access.streams).await?;
        let request = agent::CreateContainerRequest {
            container_id: task.id.0.clone(),
            spec_json: encode(&guest_spec, "spec")?,
            rootfs: in_guest.rootfs,
            memory_volumes: in_guest.memory_volumes,
            stdio: Some(told),
            pid_namespace: match guest.pid_namespace {
                PidNamespace::Own => agent::PidNamespace::Container,
                PidNamespace::Pod => agent::PidNamespace::Pod,
                PidNamespace::OfHostPid(_) => agent::PidNamespace::Target,
            }
            .into(),
            pid_namespace_target: target,
            block_devices,
        };
        match access.guest.create_container(request).await {
            Ok(answer) => Ok((stdio, answer)),
            Err(error) => {
                stdio.close().await;
                Err(error)
            }
        }
    };
    match made.await {
        Ok((stdio, answer)) => {
            stopwatch.lap("guest");
            stopwatch.note_guest("guest", &answer.stages);
            tracing::info!(container_id = %task.id, stages = stopwatch.told(), "container made");
            Ok(Made { storage, stdio })
        }
        Err(error) => {
            if let Err(left) = storage.detach(&access.place).await {
                tracing::warn!(container_id = %task.id, error = %left, "storage of a failed container is left to the pod's teardown");
            }
            Err(error)
        }
    }
}
