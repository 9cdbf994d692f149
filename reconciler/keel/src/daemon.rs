//! The loop: a directory, made true and kept true.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use keel_api::{Control, Listener, VersionInfo};
use keel_manifest::{Effective, LastGood, Parsed, effective, parse};
use keel_source::{Condition, FileState, Keep, Options, Snapshot, Watcher};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::Daemon;
use crate::context::Context;
use crate::control::{Controller, Directory};
use crate::failure::{Failure, Outcome};
use crate::instance::{DAEMON_PATIENCE, Instance};

/// Threads for sockets and timers; everything that blocks has threads of its own.
const WORKERS: usize = 2;
/// Parts of the heap. Actions on the host come in bursts, each on a thread of its own; they allocate little.
const ARENAS: i32 = 1;

pub(crate) fn run(context: &Context, args: &Daemon) -> Outcome {
    let manifests = args.manifests.clone().or_else(|| context.settings.manifests.clone());
    let Some(manifests) = manifests else {
        return Err(Failure::invalid("no directory of manifests")
            .hint("name it: keel daemon --manifests DIR, or `manifests:` in the configuration"));
    };
    if !keel_sys::heap::limit_arenas(ARENAS) {
        tracing::debug!("the allocator keeps an arena for each thread");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(|error| Failure::io("start", "the runtime of the daemon", &error))?;
    let served = runtime.block_on(serve(context, args, manifests));
    // A stop that is under way blocks a thread for the whole grace period; its shim carries it through without us.
    runtime.shutdown_background();
    served
}

async fn serve(context: &Context, args: &Daemon, manifests: PathBuf) -> Outcome {
    let mut terminate = listen_for(SignalKind::terminate())?;
    let mut interrupt = listen_for(SignalKind::interrupt())?;
    let mut hangup = listen_for(SignalKind::hangup())?;
    let instance = Instance::open(context, true, DAEMON_PATIENCE).await?;
    let controller = instance.controller.clone();
    controller.begin().await?;
    controller.verify_images();

    let (keep, kept) = open_keep(context)?;
    let options =
        Options { allow_empty: args.allow_empty, had_files: !kept.files.is_empty(), ..Options::default() };
    let watcher = Watcher::new(&manifests, options)
        .map_err(|error| Failure::io("watch", manifests.display(), &error))?;
    let watcher = Arc::new(tokio::sync::Mutex::new(watcher));
    let (relist_sender, relists) = watch::channel(0u64);
    controller.on_relist(Box::new(move || relist_sender.send_modify(|n| *n = n.wrapping_add(1))));
    let source = Source::new(&manifests, keep, kept.files);
    tokio::spawn(follow_directory(watcher, relists, source, controller.clone()));

    let (stop_sender, stop) = watch::channel(false);
    let about = VersionInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        api: "v1".into(),
        pid: std::process::id(),
        root: context.paths.root().display().to_string(),
        run: context.paths.run().display().to_string(),
    };
    let listeners = listeners(context, args).await?;
    let server = tokio::spawn(keel_api::serve(listeners, controller.clone(), about, stopped(stop)));
    tokio::spawn(notify_systemd(instance.engine()));
    tracing::info!(manifests = %manifests.display(), root = %context.paths.root().display(), "running");

    loop {
        tokio::select! {
            // All cancel-safe: signals are counted until they are received.
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                let controller = controller.clone();
                tokio::spawn(async move { controller.reconcile().await });
            }
        }
    }
    tracing::info!("stopping; containers go on");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop_sender.send_replace(true);
    let _ = server.await;
    instance.close().await;
    let _ = std::fs::remove_file(context.paths.socket());
    Ok(())
}

fn open_keep(context: &Context) -> Outcome<(Keep, keel_source::Kept)> {
    let keep = Keep::open(&context.paths.sources()).map_err(|error| Failure::of(&error))?;
    let kept = keep.load().map_err(|error| Failure::of(&error))?;
    for problem in &kept.problems {
        tracing::warn!(problem, "last good manifests");
    }
    Ok((keep, kept))
}

/// What the directory declared when the last daemon ended.
pub(crate) fn last_declared(context: &Context) -> Outcome<Vec<keel_manifest::Object>> {
    if !context.paths.sources().exists() {
        return Ok(Vec::new());
    }
    let (keep, kept) = open_keep(context)?;
    Ok(Source::new(Path::new(""), keep, kept.files).restored.objects)
}

fn listen_for(kind: SignalKind) -> Outcome<tokio::signal::unix::Signal> {
    signal(kind).map_err(|error| Failure::io("wait for", "signals", &error))
}

/// Sockets that systemd has opened take the place of ours.
async fn listeners(context: &Context, args: &Daemon) -> Outcome<Vec<Listener>> {
    let mut listeners = Listener::inherited().map_err(|error| Failure::of(&error))?;
    if listeners.is_empty() {
        listeners.push(Listener::unix(&context.paths.socket()).map_err(|error| Failure::of(&error))?);
    }
    if let Some(address) = args.listen.or(context.settings.listen) {
        listeners.push(Listener::tcp(address).await.map_err(|error| Failure::of(&error))?);
    }
    Ok(listeners)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The directory's last good versions, in memory and on disk.
struct Source {
    dir: String,
    keep: Keep,
    kept: BTreeMap<String, Vec<u8>>,
    last_good: LastGood,
    /// What was in force when an earlier daemon ended, for a directory that cannot be read now.
    restored: Effective,
    /// Reading a file again that has not changed is a waste.
    cache: BTreeMap<String, (FileState, Parsed)>,
}

impl Source {
    fn new(dir: &Path, keep: Keep, kept: BTreeMap<String, Vec<u8>>) -> Source {
        let parsed: BTreeMap<String, Parsed> =
            kept.iter().map(|(file, text)| (file.clone(), parse(file, text))).collect();
        let last_good = LastGood::restore(parsed.clone());
        let restored = effective(&last_good, parsed);
        let dir = dir.display().to_string();
        Source { dir, keep, kept, last_good, restored, cache: BTreeMap::new() }
    }

    fn take(&mut self, snapshot: &Snapshot) -> Directory {
        if let Some(reason) = self.held(&snapshot.condition) {
            return Directory {
                objects: self.restored.objects.clone(),
                held: Some(reason),
                ..Directory::default()
            };
        }
        let parsed = self.parse(snapshot);
        let now = effective(&self.last_good, parsed);
        self.remember(snapshot, &now);
        self.last_good = now.last_good.clone();
        self.restored = now.clone();
        Directory { objects: now.objects, frozen: now.frozen, conditions: now.conditions, held: None }
    }

    fn held(&self, condition: &Condition) -> Option<String> {
        let dir = &self.dir;
        match condition {
            Condition::Ok => None,
            Condition::Missing => {
                Some(format!("{dir} does not exist; nothing is deleted until it is there again"))
            }
            Condition::Unreadable(why) => {
                Some(format!("{dir} cannot be read; nothing is deleted until it can: {why}"))
            }
            Condition::SuddenlyEmpty => Some(format!(
                "{dir} is suddenly empty; nothing is deleted (if that is meant, start the daemon with --allow-empty)"
            )),
        }
    }

    fn parse(&mut self, snapshot: &Snapshot) -> BTreeMap<String, Parsed> {
        let mut cache = BTreeMap::new();
        for (file, state) in &snapshot.files {
            let parsed = match self.cache.remove(file) {
                Some((before, parsed)) if before == *state => parsed,
                _ => match state {
                    FileState::Text(text) => parse(file, text),
                    FileState::Unreadable(why) => Parsed::unreadable(file, why.clone(), None),
                    FileState::TooLarge => Parsed::too_large(file, None),
                },
            };
            for problem in parsed.diagnostics.iter().filter(|_| !cache.contains_key(file)) {
                tracing::debug!(file, line = problem.line, message = problem.message, "manifest");
            }
            cache.insert(file.clone(), (state.clone(), parsed));
        }
        self.cache = cache;
        self.cache.iter().map(|(file, (_, parsed))| (file.clone(), parsed.clone())).collect()
    }

    /// Keeps the text of every good file; a broken one keeps the text that it had when it was good.
    fn remember(&mut self, snapshot: &Snapshot, now: &Effective) {
        let mut kept = BTreeMap::new();
        for (file, state) in &snapshot.files {
            let good = self.cache.get(file).is_some_and(|(_, parsed)| !parsed.has_errors());
            match (state, good) {
                (FileState::Text(text), true) => drop(kept.insert(file.clone(), text.to_vec())),
                _ => {
                    if let Some(before) = self.kept.get(file) {
                        kept.insert(file.clone(), before.clone());
                    }
                }
            }
        }
        for file in now.last_good.files().filter(|file| !kept.contains_key(*file)).collect::<Vec<_>>() {
            if let Some(before) = self.kept.get(file) {
                kept.insert(file.to_string(), before.clone());
            }
        }
        if kept != self.kept {
            if let Err(error) = self.keep.store(&kept) {
                tracing::warn!(%error, "last good manifests could not be kept");
            }
            self.kept = kept;
        }
    }
}

async fn follow_directory(
    watcher: Arc<tokio::sync::Mutex<Watcher>>,
    mut relists: watch::Receiver<u64>,
    mut source: Source,
    controller: Arc<Controller>,
) {
    loop {
        let mut watcher = watcher.lock().await;
        let snapshot = tokio::select! {
            // Cancel-safe, both: an unread snapshot stays the newest one.
            snapshot = watcher.next() => snapshot,
            changed = relists.changed() => {
                if changed.is_err() {
                    return;
                }
                watcher.relist();
                continue;
            }
        };
        drop(watcher);
        let Some(snapshot) = snapshot else {
            tracing::error!("the manifest directory is no longer watched");
            return;
        };
        // Parsing and the disk are not for the threads that serve sockets.
        let taken = tokio::task::spawn_blocking(move || {
            let directory = source.take(&snapshot);
            (source, directory)
        });
        let Ok((back, directory)) = taken.await else { return };
        source = back;
        if controller.take_directory(directory).await.is_err() {
            return;
        }
    }
}

/// `READY=1` after the first complete round, the state in `STATUS=`, and the watchdog fed by answers of the engine itself.
async fn notify_systemd(engine: keel_engine::Handle) {
    let mut status = engine.status();
    if status.wait_for(|status| status.sources_complete).await.is_err() {
        return;
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let period = sd_notify::watchdog_enabled().map_or(STATUS_PERIOD, |limit| (limit / 2).min(STATUS_PERIOD));
    loop {
        if engine.standing(None).await.is_err() {
            return;
        }
        let text = {
            let status = status.borrow();
            let ready = status.pods.iter().filter(|pod| pod.is_ready() && pod.up_to_date).count();
            format!("{ready}/{} pods ready", status.pods.len())
        };
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog, sd_notify::NotifyState::Status(&text)]);
        tokio::time::sleep(period).await;
    }
}

const STATUS_PERIOD: Duration = Duration::from_secs(10);
