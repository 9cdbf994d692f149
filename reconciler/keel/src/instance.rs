//! One instance with everything that acts on it, in this process: lock, host, engine, controller.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use keel_api::{ControlError, ErrorCode};
use keel_engine::{Engine, EventKind, Settings};
use keel_host::{EventLog, ExitPoll, ExitWatch, FilterWatch, HostConfig, HostError, Lock, RealHost};
use tokio::sync::watch;

use crate::context::Context;
use crate::control::Controller;

/// On the way out, containers whose shim is gone may still get one.
const SETTLE: Duration = Duration::from_secs(10);

pub(crate) struct Instance {
    pub(crate) controller: Arc<Controller>,
    host: Arc<RealHost>,
    engine: Engine,
    _lock: Lock,
}

impl Instance {
    /// Must run inside the process' tokio runtime. `watches`: a directory is going to be read.
    pub(crate) async fn open(
        context: &Context,
        watches: bool,
        patience: Duration,
    ) -> Result<Instance, ControlError> {
        let lock = take_lock(context, patience).await?;
        let runtime = tokio::runtime::Handle::current();
        let host = RealHost::open(context.paths.clone(), host_config(context), runtime.clone());
        let host = Arc::new(host.map_err(refused)?);
        host.sweep();
        let events = Arc::new(EventLog::open(&context.paths));
        let recorded = Arc::new(watch::channel(0).0);
        let sink = event_sink(events.clone(), recorded.clone());
        let engine = Engine::start(host.clone(), Settings::default(), runtime, sink)
            .map_err(|e| ControlError::new(ErrorCode::Internal, format!("start the engine: {e}")))?;
        let mut usage = host.usage_watch();
        let changed = engine.handle();
        host.on_change(move || changed.hint());
        let shared = host.clone();
        let controller =
            Controller::new(shared, engine.handle(), events, recorded, watches).map_err(refused)?;
        let hints = engine.handle();
        if !watches {
            let mut exits = ExitPoll::new(&context.paths);
            watch("exits", "exits", hints, move || {
                exits.wait();
                Ok(())
            })?;
        } else {
            let mut exits = ExitWatch::new(&context.paths).map_err(refused)?;
            watch("exits", "exits", hints, move || exits.wait())?;
            // A command is over before somebody else's change matters.
            let mut filter = FilterWatch::new().map_err(refused)?;
            let mut shims = host.shim_watch().map_err(refused)?;
            watch("shims", "killed shims", engine.handle(), move || shims.wait())?;
            watch("usage", "volumes over their limit", engine.handle(), move || usage.wait())?;
            watch("filter", "changes of the packet filter", engine.handle(), move || filter.wait())?;
        }
        Ok(Instance { controller, host, engine, _lock: lock })
    }

    pub(crate) fn engine(&self) -> keel_engine::Handle {
        self.engine.handle()
    }

    /// Containers go on.
    pub(crate) async fn close(self) {
        self.controller.flush().await;
        // The thread is joined where waiting is allowed.
        let stop = move || {
            self.engine.stop();
            self.host.settle(SETTLE);
        };
        let _ = tokio::task::spawn_blocking(stop).await;
    }
}

/// Waits for another command to end. A daemon does not end, and a command through it would have been the better way.
pub(crate) async fn take_lock(context: &Context, patience: Duration) -> Result<Lock, ControlError> {
    /// Commands are over in tens of milliseconds, or take long.
    const PERIOD: Duration = Duration::from_millis(20);
    let deadline = tokio::time::Instant::now() + patience;
    let mut told = false;
    loop {
        let holder = match Lock::take(&context.paths) {
            Err(HostError::Locked { holder, .. })
                if tokio::time::Instant::now() < deadline && context.client().probe().is_err() =>
            {
                holder
            }
            taken => return taken.map_err(refused),
        };
        if let (Some(pid), false) = (holder, told) {
            told = true;
            context.term.note(&format!("waiting for pid {pid}\n"));
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// How long a command waits for another one.
pub(crate) const COMMAND_PATIENCE: Duration = Duration::from_secs(60);
/// How long a daemon waits: a command that ends just now, or a shim's restart of a container, is no reason to fail.
pub(crate) const DAEMON_PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn host_config(context: &Context) -> HostConfig {
    let settings = &context.settings;
    HostConfig {
        runtime: settings.runtime.clone(),
        shim: settings.shim.clone(),
        subnet: settings.subnet,
        logs: settings.logs.clone(),
        registries: registries(context),
        eviction: settings.eviction,
        volatile_rootfs: settings.volatile_rootfs,
        restart_command: restart_command(context),
    }
}

/// This program, with what makes it find the same instance.
fn restart_command(context: &Context) -> Vec<OsString> {
    let Ok(program) = std::env::current_exe() else { return Vec::new() };
    let settings = &context.settings;
    let mut words: Vec<OsString> = vec![program.into()];
    if let Some(config) = &settings.config {
        words.extend(["--config".into(), config.into()]);
    }
    for (option, path) in [
        ("--root", &settings.root),
        ("--run", &settings.run),
        ("--runtime", &settings.runtime),
        ("--shim", &settings.shim),
    ] {
        words.extend([option.into(), path.into()]);
    }
    words.push("restart-run".into());
    words
}

pub(crate) fn registries(context: &Context) -> keel_host::Registries {
    let settings = &context.settings.registries;
    keel_host::Registries {
        insecure: settings.insecure.clone(),
        certs_dir: settings.certs_dir.clone(),
        auth_file: settings.auth_file.clone(),
    }
}

pub(crate) fn refused(error: HostError) -> ControlError {
    let code = match &error {
        HostError::Locked { .. } | HostError::OtherRun { .. } => ErrorCode::Unavailable,
        HostError::Foreign { .. } => ErrorCode::Invalid,
        HostError::NoBinary { .. } => ErrorCode::Invalid,
        _ => ErrorCode::Internal,
    };
    error.hint().into_iter().fold(ControlError::new(code, error.chain()), ControlError::hint)
}

fn event_sink(log: Arc<EventLog>, recorded: Arc<watch::Sender<u64>>) -> keel_engine::EventSink {
    Box::new(move |event| {
        let warning = event.kind == EventKind::Warning;
        crate::control::record(&log, &recorded, warning, &event.object, &event.reason, &event.message);
    })
}

/// A thread that sleeps in the kernel; it ends with the process.
fn watch(
    name: &str,
    what: &'static str,
    engine: keel_engine::Handle,
    mut wait: impl FnMut() -> Result<(), HostError> + Send + 'static,
) -> Result<(), ControlError> {
    let run = move || {
        while wait().is_ok() {
            engine.hint();
        }
        tracing::warn!("the watch for {what} is lost; they are noticed by the periodic look only");
    };
    let thread = std::thread::Builder::new().name(name.into()).spawn(run);
    thread.map(drop).map_err(|e| ControlError::new(ErrorCode::Internal, format!("start a thread: {e}")))
}
