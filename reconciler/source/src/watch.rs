//! Watches a directory and says what it holds when that has settled.
//!
//! ```text
//!            event, relist, poll            quiet for `settle`         two looks agree
//!   Idle ───────────────────────► Settling ───────────────────► Confirming ────────────► publish ─► Idle
//!                                    ▲  ▲─────── event ─────────────┘  │
//!                                    └── looks differ, file is open ───┤
//!                                                                      └─ `hold` is over: publish the others,
//!                                                                         unsettled files keep their old version
//! ```
//! A look that finds nothing new goes straight back to Idle.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{Config, Event, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::watch;

use crate::list::{Condition, Entry, FileState, ListError, Options, Scan, Snapshot, Stamp, scan};
use crate::names::is_manifest_name;

/// Files whose writers are remembered. When more are being written at once, the two looks must do.
const MAX_WRITING: usize = 10_000;
/// Pause between looks while something is held back.
const RECHECK: Duration = Duration::from_secs(1);

/// Said of a file without contents.
const EMPTY: &str = "the file is empty; delete it, or write a comment into it, when that is meant";

/// A watched directory. Dropping it ends the thread.
#[derive(Debug)]
pub struct Watcher {
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How changes are noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The kernel tells; looks come in between.
    Events,
    /// Only looks, for this reason.
    Polling(String),
}

impl Watcher {
    /// Starts to watch. The directory need not exist yet.
    pub fn new(dir: &Path, options: Options) -> io::Result<Watcher> {
        let (sender, snapshots) = watch::channel(None);
        let shared = Arc::new(Shared::default());
        let worker = Worker::new(dir, options, sender, Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("keel-source".into()).spawn(move || worker.run())?;
        Ok(Watcher { snapshots, shared, thread: Some(thread) })
    }

    /// Waits for the next snapshot that differs from the last one returned; the first call returns the first. Several
    /// changes in between are one. `None` when the watching thread is gone. Cancel-safe.
    pub async fn next(&mut self) -> Option<Arc<Snapshot>> {
        loop {
            self.snapshots.changed().await.ok()?;
            if let Some(snapshot) = self.snapshots.borrow_and_update().clone() {
                return Some(snapshot);
            }
        }
    }

    /// The newest snapshot, if there is one yet.
    pub fn latest(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow().clone()
    }

    /// Looks again now.
    pub fn relist(&self) {
        self.shared.lock().dirty = true;
        self.shared.wake.notify_all();
    }

    /// Takes an empty directory at its word, once: what was declared in it is gone.
    pub fn accept_empty(&self) {
        let mut hints = self.shared.lock();
        hints.accept_empty = true;
        hints.dirty = true;
        drop(hints);
        self.shared.wake.notify_all();
    }

    pub fn mode(&self) -> Mode {
        let reason = self.shared.lock().polling.clone();
        reason.map_or(Mode::Events, Mode::Polling)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches manifests has panicked");
        }
    }
}

/// What the event thread tells the worker. Bounded: a flag, and a capped set.
#[derive(Debug, Default)]
struct Shared {
    hints: Mutex<Hints>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Hints {
    /// Something may have changed.
    dirty: bool,
    last_event: Option<Instant>,
    /// The last event that was no rename of a whole file into place.
    last_unfinished: Option<Instant>,
    /// Files with a write that no close has followed yet, and since when.
    writing: BTreeMap<PathBuf, Instant>,
    accept_empty: bool,
    stop: bool,
    polling: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Hints> {
        // Every change of the hints is one assignment: a panic in between leaves them usable.
        self.hints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self, roots: &BTreeSet<PathBuf>, event: notify::Result<Event>) {
        let mut hints = self.lock();
        let mut is_placed = false;
        match event {
            Ok(event) if event.need_rescan() => hints.writing.clear(),
            Ok(event) => {
                if !hints.note(roots, &event) {
                    return;
                }
                is_placed = places(&event);
            }
            Err(error) => tracing::debug!(%error, "watching a manifest directory"),
        }
        let now = Some(Instant::now());
        hints.dirty = true;
        hints.last_event = now;
        if !is_placed {
            hints.last_unfinished = now;
        }
        drop(hints);
        self.wake.notify_all();
    }
}

/// A rename that made a manifest appear and none disappear. What an editor moves away comes back under its old name a
/// moment later, so that is worth the longer wait.
fn places(event: &Event) -> bool {
    let is_manifest =
        |path: &PathBuf| path.file_name().is_some_and(|n| is_manifest_name(&n.to_string_lossy()));
    match (event.kind, event.paths.as_slice()) {
        (EventKind::Modify(ModifyKind::Name(RenameMode::To)), [to]) => is_manifest(to),
        (EventKind::Modify(ModifyKind::Name(RenameMode::From)), [from]) => {
            !is_manifest(from) && !from.is_dir()
        }
        (EventKind::Modify(ModifyKind::Name(RenameMode::Both)), [from, to]) => {
            is_manifest(to) && !is_manifest(from)
        }
        _ => false,
    }
}

impl Hints {
    /// Remembers writers; answers whether looking is worth it.
    fn note(&mut self, roots: &BTreeSet<PathBuf>, event: &Event) -> bool {
        let counts =
            |path: &PathBuf| path.file_name().is_some_and(|n| is_manifest_name(&n.to_string_lossy()));
        // Events of the parent directory are about the root itself, or about somebody else.
        let inside = |path: &PathBuf| roots.iter().any(|root| path.starts_with(root));
        if !event.paths.iter().any(inside) {
            return false;
        }
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
                for path in &event.paths {
                    self.writing.remove(path);
                }
                event.paths.iter().any(counts)
            }
            EventKind::Access(_) => false,
            EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => {
                for path in event.paths.iter().filter(|p| counts(p)) {
                    if self.writing.len() < MAX_WRITING {
                        self.writing.entry(path.clone()).or_insert_with(Instant::now);
                    }
                }
                event.paths.iter().any(counts)
            }
            EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => {
                // A writer follows its file to the new name; two looks that agree must do for it.
                for path in &event.paths {
                    self.writing.remove(path);
                }
                true
            }
            EventKind::Create(_) | EventKind::Modify(_) | EventKind::Any | EventKind::Other => true,
        }
    }
}

struct Worker {
    dir: PathBuf,
    options: Options,
    sender: watch::Sender<Option<Arc<Snapshot>>>,
    shared: Arc<Shared>,
    events: Option<Events>,
    /// What the published snapshot was made from.
    accepted: Scan,
    /// The newest look, to read only what changed.
    cache: Scan,
    /// Files that the last round did not wait for any more; they hold nobody up.
    held: BTreeSet<String>,
    had_files: bool,
}

/// A running kernel watch, and what it watches.
struct Events {
    identity: Identity,
    /// Dropping it ends the watch.
    _watcher: RecommendedWatcher,
}

/// The directory behind the path: another one under the same name needs another watch.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    /// Path, device, inode, and birth, because an inode number is used again.
    real: Option<(PathBuf, u64, u64, Option<SystemTime>)>,
}

/// What a round of looking came to.
enum Round {
    Unchanged,
    Settled(Scan),
    /// These files have not settled: (the look, their names).
    Held(Scan, BTreeSet<String>),
    Failed(ListError),
    Stop,
}

impl Worker {
    fn new(
        dir: &Path,
        options: Options,
        sender: watch::Sender<Option<Arc<Snapshot>>>,
        shared: Arc<Shared>,
    ) -> Worker {
        Worker {
            dir: dir.to_owned(),
            had_files: options.had_files,
            options,
            sender,
            shared,
            events: None,
            accepted: Scan::default(),
            cache: Scan::default(),
            held: BTreeSet::new(),
        }
    }

    fn run(mut self) {
        loop {
            self.ensure_events();
            let round = self.round();
            let next = match &round {
                Round::Held(..) => RECHECK,
                _ if self.events.is_none() => self.options.poll,
                _ => self.options.relist,
            };
            match round {
                Round::Stop => return,
                Round::Unchanged => self.publish(Condition::Ok),
                Round::Settled(scan) => {
                    self.accepted = scan;
                    self.held.clear();
                    self.publish(Condition::Ok);
                }
                Round::Held(scan, held) => {
                    self.accept_except(scan, &held);
                    self.held = held;
                    self.publish(Condition::Ok);
                }
                Round::Failed(ListError::Missing { .. }) => self.publish(Condition::Missing),
                Round::Failed(error) => self.publish(Condition::Unreadable(chain(&error))),
            }
            // A directory that came while it was looked for has been read, but nobody would hear of its changes yet.
            if self.is_outdated() {
                continue;
            }
            if self.wait(next) {
                return;
            }
        }
    }

    /// Whether the watch is on another directory than the one that is there now.
    fn is_outdated(&self) -> bool {
        self.events.as_ref().is_some_and(|events| events.identity != Identity::of(&self.dir))
    }

    /// Looks until two looks agree, or time is up.
    fn round(&mut self) -> Round {
        let start = Instant::now();
        let is_first = self.sender.borrow().is_none();
        loop {
            if self.settle(start) {
                return Round::Stop;
            }
            let first = match self.look() {
                Ok(scan) => scan,
                Err(error) => return Round::Failed(error),
            };
            let changed = self.unsettled(&first, &first);
            if first.agrees(&self.accepted) && !is_first {
                return Round::Unchanged;
            }
            let is_old = first.files.values().all(|e| !e.stamp.is_fresh());
            if is_first && is_old && changed.is_empty() {
                return Round::Settled(first);
            }
            if self.pause(self.confirm()) {
                return Round::Stop;
            }
            let second = match self.look() {
                Ok(scan) => scan,
                Err(error) => return Round::Failed(error),
            };
            let unsettled = self.unsettled(&first, &second);
            if unsettled.is_empty() && !self.shared.lock().dirty {
                return Round::Settled(second);
            }
            let is_known = !unsettled.is_empty() && unsettled.is_subset(&self.held);
            if is_known || start.elapsed() >= self.options.hold {
                return Round::Held(second, unsettled);
            }
        }
    }

    /// Waits until nothing has happened for a while. True: stop.
    fn settle(&self, start: Instant) -> bool {
        loop {
            let quiet_at = {
                let hints = self.shared.lock();
                if hints.stop {
                    return true;
                }
                let placed = hints.last_event.map(|at| at + self.options.settle_placed);
                placed.max(hints.last_unfinished.map(|at| at + self.options.settle))
            };
            let now = Instant::now();
            let Some(left) = quiet_at.and_then(|at| at.checked_duration_since(now)) else { break };
            if left.is_zero() || start.elapsed() >= self.options.hold {
                break;
            }
            if self.pause(left) {
                return true;
            }
        }
        self.shared.lock().dirty = false;
        false
    }

    /// Time between the two looks.
    fn confirm(&self) -> Duration {
        let hints = self.shared.lock();
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() < self.options.settle * 2);
        // Nobody told of a change that is not recent: it may be half of anything.
        let is_placed = is_recent(hints.last_event) && !is_recent(hints.last_unfinished);
        if is_placed { Duration::ZERO } else { self.options.confirm }
    }

    fn look(&mut self) -> Result<Scan, ListError> {
        let mut scan = scan(&self.dir, &self.options, &self.cache)?;
        for entry in scan.files.values_mut().filter(|e| is_cut(e)) {
            entry.state = FileState::Unreadable(EMPTY.into());
        }
        self.cache = scan.clone();
        Ok(scan)
    }

    /// Files that are new or changed and still moving: different in two looks, open for writing, or cut to nothing.
    fn unsettled(&self, first: &Scan, second: &Scan) -> BTreeSet<String> {
        let mut hints = self.shared.lock();
        let limit = self.options.hold_open;
        hints.writing.retain(|_, since| since.elapsed() < limit);
        let names: BTreeSet<&String> = first.files.keys().chain(second.files.keys()).collect();
        let is_unsettled = |name: &&&String| {
            let (first, second) = (first.files.get(**name), second.files.get(**name));
            let accepted = self.accepted.files.get(**name);
            match (first, second) {
                (Some(first), Some(second)) => {
                    let is_known = accepted.is_some_and(|a| a.stamp == second.stamp);
                    let is_moving = !first.same(second) || hints.writing.contains_key(&second.real);
                    !is_known && (is_moving || (is_cut(second) && second.stamp.is_fresh()))
                }
                _ => true,
            }
        };
        names.iter().filter(is_unsettled).map(|name| (**name).clone()).collect()
    }

    /// Takes a look over, but leaves the files that have not settled as they were.
    fn accept_except(&mut self, scan: Scan, held: &BTreeSet<String>) {
        let mut files = scan.files;
        for name in held {
            let before = self.accepted.files.get(name);
            match (before, files.get_mut(name)) {
                (Some(before), Some(entry)) => *entry = before.clone(),
                (Some(before), None) => {
                    files.insert(name.clone(), before.clone());
                }
                (None, Some(entry)) => {
                    entry.state = FileState::Unreadable("the file is still being written".into());
                    entry.stamp = Stamp::default();
                }
                (None, None) => {}
            }
        }
        self.accepted = Scan { files };
    }

    /// Sends a snapshot if it says anything new.
    fn publish(&mut self, condition: Condition) {
        let accept_empty = std::mem::take(&mut self.shared.lock().accept_empty) || self.options.allow_empty;
        let mut condition = condition;
        if condition == Condition::Ok {
            let is_empty = self.accepted.files.is_empty();
            if is_empty && self.had_files && !accept_empty {
                condition = Condition::SuddenlyEmpty;
            } else {
                self.had_files = !is_empty;
            }
        }
        let last = self.sender.borrow().clone();
        let files = match (&condition, &last) {
            (Condition::Ok, _) => self.accepted.states(),
            (_, Some(last)) => last.files.clone(),
            (_, None) => BTreeMap::new(),
        };
        let snapshot = Snapshot { files, condition };
        if last.is_some_and(|l| *l == snapshot) {
            return;
        }
        if snapshot.condition != Condition::Ok {
            tracing::warn!(dir = %self.dir.display(), condition = ?snapshot.condition, "manifests are not readable; what runs stays");
        }
        // An error means that nobody listens any more; the next wait ends the thread.
        let _ = self.sender.send(Some(Arc::new(snapshot)));
    }

    /// Sets the kernel watch up, again when another directory stands behind the path.
    fn ensure_events(&mut self) {
        if self.options.force_polling {
            self.shared.lock().polling = Some("asked for".into());
            return;
        }
        let identity = Identity::of(&self.dir);
        if self.events.as_ref().is_some_and(|e| e.identity == identity) {
            return;
        }
        self.events = None;
        let shared = Arc::clone(&self.shared);
        let polling = match Events::start(&self.dir, identity, shared) {
            Ok(events) => {
                self.events = Some(events);
                None
            }
            Err(reason) => Some(reason),
        };
        let mut hints = self.shared.lock();
        // Writers were followed through the old watch.
        hints.writing.clear();
        if hints.polling != polling
            && let Some(reason) = &polling
        {
            tracing::warn!(dir = %self.dir.display(), %reason, "no file events; looking every {:?}", self.options.poll);
        }
        hints.polling = polling;
    }

    /// Waits for a hint, at most so long. True: stop.
    fn wait(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        let mut hints = self.shared.lock();
        while !hints.stop && !hints.dirty {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|l| !l.is_zero()) else {
                break;
            };
            hints = self.shared.wake.wait_timeout(hints, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        hints.stop
    }

    /// Waits a fixed time. True: stop.
    fn pause(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut hints = self.shared.lock();
        while !hints.stop {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|l| !l.is_zero()) else {
                break;
            };
            hints = self.shared.wake.wait_timeout(hints, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        hints.stop
    }
}

impl Identity {
    fn of(dir: &Path) -> Identity {
        let real = fs::canonicalize(dir).ok().and_then(|real| {
            let meta = fs::metadata(&real).ok()?;
            Some((real, meta.dev(), meta.ino(), meta.created().ok()))
        });
        Identity { real }
    }
}

impl Events {
    fn start(dir: &Path, identity: Identity, shared: Arc<Shared>) -> Result<Events, String> {
        let absolute = std::path::absolute(dir).map_err(|e| e.to_string())?;
        let real = identity.real.as_ref().map(|(path, ..)| path.clone());
        let roots: BTreeSet<PathBuf> = [Some(absolute.clone()), real.clone()].into_iter().flatten().collect();
        let watched = roots.clone();
        let handler = move |event| shared.event(&watched, event);
        let config = Config::default().with_follow_symlinks(false);
        let mut watcher = RecommendedWatcher::new(handler, config).map_err(|e| words(&e))?;
        // The parents tell when the directory comes, goes, or is another.
        let parents: BTreeSet<&Path> = roots.iter().filter_map(|r| r.parent()).collect();
        for parent in parents {
            let result = watcher.watch(parent, RecursiveMode::NonRecursive);
            if let (Err(error), None) = (&result, &real) {
                return Err(words(error));
            }
        }
        if let Some(real) = &real {
            watcher.watch(real, RecursiveMode::Recursive).map_err(|e| words(&e))?;
        }
        Ok(Events { identity, _watcher: watcher })
    }
}

/// No contents: a writer has just begun, or has died, or the disk is full. Nobody means "delete" by it.
fn is_cut(entry: &Entry) -> bool {
    match &entry.state {
        FileState::Text(text) => text.is_empty(),
        FileState::Unreadable(reason) => reason == EMPTY,
        FileState::TooLarge => false,
    }
}

fn words(error: &notify::Error) -> String {
    match &error.kind {
        notify::ErrorKind::MaxFilesWatch => {
            "the limit of watches is reached; raise fs.inotify.max_user_watches".to_owned()
        }
        notify::ErrorKind::Io(source) if source.raw_os_error() == Some(libc::EMFILE) => {
            "the limit of watchers is reached; raise fs.inotify.max_user_instances".to_owned()
        }
        _ => error.to_string(),
    }
}

/// The whole chain of causes on one line.
fn chain(error: &ListError) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
