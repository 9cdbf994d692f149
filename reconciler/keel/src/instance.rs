//! One instance with everything that acts on it, in this process: lock, host, engine, controller.

use std::sync::Arc;

use keel_api::{ControlError, ErrorCode};
use keel_engine::{Engine, EventKind, Settings};
use keel_host::{EventLog, ExitPoll, ExitWatch, FilterWatch, HostConfig, HostError, Lock, RealHost};
use tokio::sync::watch;

use crate::context::Context;
use crate::control::Controller;

pub(crate) struct Instance {
    pub(crate) controller: Arc<Controller>,
    engine: Engine,
    _lock: Lock,
}

impl Instance {
    /// Must run inside the process' tokio runtime. `watches`: a directory is going to be read.
    pub(crate) fn open(context: &Context, watches: bool) -> Result<Instance, ControlError> {
        let lock = Lock::take(&context.paths).map_err(refused)?;
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
        let controller =
            Controller::new(host, engine.handle(), events, recorded, watches).map_err(refused)?;
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
            watch("usage", "volumes over their limit", engine.handle(), move || usage.wait())?;
            watch("filter", "changes of the packet filter", engine.handle(), move || filter.wait())?;
        }
        Ok(Instance { controller, engine, _lock: lock })
    }

    pub(crate) fn engine(&self) -> keel_engine::Handle {
        self.engine.handle()
    }

    /// Containers go on.
    pub(crate) async fn close(self) {
        self.controller.flush().await;
        // The thread is joined where waiting is allowed.
        let _ = tokio::task::spawn_blocking(move || self.engine.stop()).await;
    }
}

pub(crate) fn host_config(context: &Context) -> HostConfig {
    let settings = &context.settings;
    HostConfig {
        runtime: settings.runtime.clone(),
        shim: settings.shim.clone(),
        subnet: settings.subnet,
        log_max_bytes: settings.log_max_bytes,
        log_max_files: settings.log_max_files,
        registries: registries(context),
    }
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
