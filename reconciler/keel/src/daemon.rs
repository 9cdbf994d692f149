//! The loop: a directory, made true and kept true.

use std::collections::{BTreeMap, BTreeSet};
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
    controller.watch_disk();

    let keep = Keep::open(&context.paths.sources()).map_err(|error| Failure::of(&error))?;
    let kept = keep.repair().map_err(|error| Failure::of(&error))?;
    for problem in &kept.problems {
        tracing::warn!(problem, "last good manifests");
    }
    let options =
        Options { allow_empty: args.allow_empty, had_files: !kept.files.is_empty(), ..Options::default() };
    let watcher = Watcher::new(&manifests, options)
        .map_err(|error| Failure::io("watch", manifests.display(), &error))?;
    let watcher = Arc::new(tokio::sync::Mutex::new(watcher));
    let (relist_sender, relists) = watch::channel(Relist::default());
    controller.on_relist(Box::new(move |accept_removals| {
        relist_sender.send_modify(|relist| {
            relist.rounds = relist.rounds.wrapping_add(1);
            relist.accepted = relist.accepted.wrapping_add(u64::from(accept_removals));
        });
    }));
    let mut source = Source::new(&manifests, keep, kept.files);
    source.guards_removals = !args.allow_empty;
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
                tokio::spawn(async move { controller.reconcile(false).await });
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

/// What the directory declared when the last daemon ended.
pub(crate) fn last_declared(context: &Context) -> Outcome<Vec<keel_manifest::Object>> {
    if !context.paths.sources().exists() {
        return Ok(Vec::new());
    }
    let keep = Keep::open(&context.paths.sources()).map_err(|error| Failure::of(&error))?;
    let kept = keep.load().map_err(|error| Failure::of(&error))?;
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
    /// The disk does not know `kept` yet.
    unsaved: bool,
    /// A directory from which most objects go at once is a mistake until somebody says otherwise.
    guards_removals: bool,
    /// Somebody has, about the next look.
    accepts_removals: bool,
}

/// So many objects may go without a question, however few stay.
const FEW_REMOVALS: usize = 4;

/// A disk that was full or broken may be better by then.
const SAVE_AGAIN: Duration = Duration::from_secs(5);

/// What was asked of the reading of the directory, counted.
#[derive(Clone, Copy, Debug, Default)]
struct Relist {
    rounds: u64,
    accepted: u64,
}

impl Source {
    fn new(dir: &Path, keep: Keep, kept: BTreeMap<String, Vec<u8>>) -> Source {
        let parsed: BTreeMap<String, Parsed> =
            kept.iter().map(|(file, text)| (file.clone(), parse(file, text))).collect();
        let last_good = LastGood::restore(parsed.clone());
        let restored = effective(&last_good, parsed);
        let dir = dir.display().to_string();
        Source {
            dir,
            keep,
            kept,
            last_good,
            restored,
            cache: BTreeMap::new(),
            unsaved: false,
            guards_removals: true,
            accepts_removals: false,
        }
    }

    fn take(&mut self, snapshot: &Snapshot) -> Directory {
        if let Some(reason) = self.held(&snapshot.condition) {
            return self.as_before(reason);
        }
        let parsed = self.parse(snapshot);
        let now = effective(&self.last_good, parsed);
        let accepts = std::mem::take(&mut self.accepts_removals) || !self.guards_removals;
        if let Some(reason) = self.removal(&now).filter(|_| !accepts) {
            return self.as_before(reason);
        }
        self.remember(snapshot, &now);
        self.last_good = now.last_good.clone();
        self.restored = now.clone();
        Directory { objects: now.objects, frozen: now.frozen, conditions: now.conditions, held: None }
    }

    /// What was in force stays so.
    fn as_before(&self, reason: String) -> Directory {
        let objects = self.restored.objects.clone();
        Directory { objects, held: Some(reason), ..Directory::default() }
    }

    /// Whether most of what was declared would go. An object that moves to another file does not go.
    fn removal(&self, now: &Effective) -> Option<String> {
        let stays: BTreeSet<_> = now.objects.iter().map(|object| object.key()).collect();
        let before = self.restored.objects.len();
        let gone = self.restored.objects.iter().filter(|object| !stays.contains(&object.key())).count();
        (gone > FEW_REMOVALS && gone * 2 > before).then(|| {
            format!(
                "{gone} of the {before} objects in {} are gone at once; nothing changes until that is confirmed: keel \
                 reconcile --accept-removals",
                self.dir
            )
        })
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
                "{dir} is suddenly empty; nothing is deleted until that is confirmed: keel reconcile --accept-removals"
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
            self.kept = kept;
            self.save();
        }
    }

    /// What is in force, on disk for the next daemon and for commands that look.
    fn save(&mut self) {
        let stored = self.keep.store(&self.kept);
        self.unsaved = stored.is_err();
        if let Err(error) = stored {
            tracing::warn!(error = %crate::failure::chain(&error), "last good manifests could not be kept");
        }
    }
}

async fn follow_directory(
    watcher: Arc<tokio::sync::Mutex<Watcher>>,
    mut relists: watch::Receiver<Relist>,
    mut source: Source,
    controller: Arc<Controller>,
) {
    let mut accepted = 0;
    let mut last: Option<Arc<Snapshot>> = None;
    loop {
        let mut watcher = watcher.lock().await;
        let snapshot = tokio::select! {
            // Cancel-safe, both: an unread snapshot stays the newest one.
            snapshot = watcher.next() => snapshot,
            () = tokio::time::sleep(SAVE_AGAIN), if source.unsaved => {
                tokio::task::block_in_place(|| source.save());
                continue;
            }
            changed = relists.changed() => {
                if changed.is_err() {
                    return;
                }
                watcher.relist();
                let asked = relists.borrow_and_update().accepted;
                if std::mem::replace(&mut accepted, asked) == asked {
                    continue;
                }
                watcher.accept_empty();
                source.accepts_removals = true;
                match &last {
                    Some(last) if last.condition == Condition::Ok => Some(last.clone()),
                    _ => continue,
                }
            }
        };
        drop(watcher);
        let Some(snapshot) = snapshot else {
            tracing::error!("the manifest directory is no longer watched");
            return;
        };
        last = Some(snapshot.clone());
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
