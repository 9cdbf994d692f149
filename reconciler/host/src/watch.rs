//! Who holds the instance, and how the end of a container reaches the engine at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use inotify::{Inotify, WatchMask};
use keel_plan::ContainerId;
use keel_sys::epoll::{BATCH, Epoll, IN, Ready};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::error::HostError;
use crate::observe;
use crate::paths::{Paths, RUN_NAMES, STATE_NAMES};
use crate::state::{At, Keep, PathError, names, read_json, write_json};

/// Exclusive right to act on the instance. Given back by the kernel when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    /// Of the state of this boot, then of the state that outlives it: two instances may share neither.
    _files: [Flock<File>; 2],
}

impl Lock {
    pub fn take(paths: &Paths) -> Result<Lock, HostError> {
        refuse_foreign(paths.root(), STATE_NAMES)?;
        refuse_foreign(paths.run(), RUN_NAMES)?;
        paths.create().map_err(|source| PathError {
            operation: "create",
            path: paths.run().to_path_buf(),
            source,
        })?;
        let run = lock(&paths.lock())?;
        let root = lock(&paths.root_lock()).map_err(|held| holder_elsewhere(paths).unwrap_or(held))?;
        let lock = Lock { _files: [run, root] };
        refuse_second_run(paths)?;
        Ok(lock)
    }
}

/// A directory that holds only other things was named by mistake: nothing is made in it, so that nothing is ever removed.
fn refuse_foreign(dir: &Path, ours: &[&str]) -> Result<(), HostError> {
    let found = names(dir)?;
    let known = |name: &String| ours.contains(&name.as_str()) || name == "lock";
    if found.is_empty() || found.iter().any(known) {
        return Ok(());
    }
    Err(HostError::Foreign { dir: dir.to_owned() })
}

/// `instance.json`: cgroups, links and tables are named after the root alone, so a second run directory would take what
/// runs for leftovers.
#[derive(Serialize, Deserialize)]
struct InstanceRecord {
    run: PathBuf,
    boot: String,
}

fn refuse_second_run(paths: &Paths) -> Result<(), HostError> {
    let boot = this_boot();
    if let Some(last) = read_json::<InstanceRecord>(&paths.instance_record())? {
        if last.run == paths.run() && last.boot == boot {
            return Ok(());
        }
        let lives =
            last.boot == boot && last.run != paths.run() && !names(&last.run.join("pods"))?.is_empty();
        if lives {
            return Err(HostError::OtherRun { root: paths.root().to_owned(), run: last.run });
        }
    }
    write_json(&paths.instance_record(), &InstanceRecord { run: paths.run().to_owned(), boot }, Keep::Boot)?;
    Ok(())
}

/// Whoever holds the state works with another run directory: waiting does not help, for no socket appears in ours.
fn holder_elsewhere(paths: &Paths) -> Option<HostError> {
    let last = read_json::<InstanceRecord>(&paths.instance_record()).ok()??;
    let elsewhere = last.boot == this_boot() && last.run != paths.run();
    elsewhere.then(|| HostError::OtherRun { root: paths.root().to_owned(), run: last.run })
}

fn this_boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn lock(path: &Path) -> Result<Flock<File>, HostError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .at("open", path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut file) => {
            let pid = format!("{}\n", std::process::id());
            file.set_len(0).and_then(|()| file.write_all(pid.as_bytes())).at("write", path)?;
            Ok(file)
        }
        Err((mut file, nix::Error::EWOULDBLOCK)) => {
            let mut text = String::new();
            let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text));
            let holder = read.ok().and_then(|_| text.trim().parse().ok());
            Err(HostError::Locked { lock: path.to_owned(), holder })
        }
        Err((_, e)) => Err(e).at("lock", path)?,
    }
}

/// Wakes when an exit record appears. A hint only: the records are the truth, and every round reads them.
pub struct ExitWatch {
    inotify: Inotify,
}

impl ExitWatch {
    pub fn new(paths: &Paths) -> Result<ExitWatch, HostError> {
        let dir = paths.exits();
        let inotify = Inotify::init().at("watch", &dir)?;
        inotify.watches().add(&dir, WatchMask::MOVED_TO).at("watch", &dir)?;
        Ok(ExitWatch { inotify })
    }

    /// Blocks until there was at least one exit, then drains what else is queued, so that a burst is one wake-up.
    pub fn wait(&mut self) -> Result<(), HostError> {
        /// Exits that come together are handled together.
        const SETTLE: Duration = Duration::from_millis(2);
        let mut buffer = [0; 4096];
        self.inotify.read_events_blocking(&mut buffer).at("read watch of", "exits")?;
        std::thread::sleep(SETTLE);
        while self.inotify.read_events(&mut buffer).is_ok_and(|events| events.count() > 0) {}
        Ok(())
    }
}

/// The same for a command that is over soon. The kernel takes its time to close an inotify instance (an SRCU grace
/// period, 15 ms), which is as long as a start; so a command looks at the directory's time stamp instead.
pub struct ExitPoll {
    dir: PathBuf,
    seen: Option<SystemTime>,
    again: bool,
}

impl ExitPoll {
    pub fn new(paths: &Paths) -> ExitPoll {
        let dir = paths.exits();
        ExitPoll { seen: modified(&dir), dir, again: true }
    }

    /// Blocks until there may have been an exit.
    pub fn wait(&mut self) {
        /// One tick of the slowest clock that time stamps are taken from.
        const PERIOD: Duration = Duration::from_millis(10);
        loop {
            std::thread::sleep(PERIOD);
            let seen = modified(&self.dir);
            // Another exit within the same tick leaves the time stamp as it is: look once more after a change.
            let changed = seen != self.seen;
            self.seen = seen;
            if std::mem::replace(&mut self.again, changed) || changed {
                return;
            }
        }
    }
}

fn modified(dir: &Path) -> Option<SystemTime> {
    std::fs::metadata(dir).and_then(|found| found.modified()).ok()
}

/// Wakes when the packet filter of the host changes, whoever changed it. A hint only: the table is compared in every round.
pub struct FilterWatch(keel_net::FilterWatch);

impl FilterWatch {
    pub fn new() -> Result<FilterWatch, HostError> {
        keel_net::FilterWatch::open().map(FilterWatch).map_err(|error| HostError::Publish(Box::new(error)))
    }

    /// Blocks until there was at least one change, then drains what else is queued.
    pub fn wait(&mut self) -> Result<(), HostError> {
        /// A reload is many changes; and our own replacement of the table is one too.
        const SETTLE: Duration = Duration::from_millis(100);
        let mut waited = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waited, PollTimeout::NONE) {
            Err(nix::Error::EINTR) | Ok(_) => {}
            Err(error) => Err(error).at("wait for changes of", "the packet filter")?,
        }
        std::thread::sleep(SETTLE);
        self.0.changed().map(drop).map_err(|error| HostError::Publish(Box::new(error)))
    }
}

/// Wakes when a shim has gone without an exit record: it was killed, and its container needs another one. A hint only.
pub struct ShimWatch {
    paths: Paths,
    ends: Arc<ShimEnds>,
}

/// The shims that are waited for. A descriptor joins the set while the other thread sleeps on it.
pub(crate) struct ShimEnds {
    epoll: Epoll,
    shims: Mutex<BTreeMap<ContainerId, Shim>>,
}

struct Shim {
    token: u64,
    pidfd: OwnedFd,
}

impl ShimWatch {
    pub(crate) fn new(paths: &Paths) -> Result<ShimWatch, HostError> {
        let epoll = Epoll::new().at("watch", "shims")?;
        let ends = ShimEnds { epoll, shims: Mutex::default() };
        Ok(ShimWatch { paths: paths.clone(), ends: Arc::new(ends) })
    }

    pub(crate) fn ends(&self) -> Arc<ShimEnds> {
        self.ends.clone()
    }

    /// Blocks until a shim was killed. One that ends by itself has recorded the exit before, which [`ExitWatch`] tells.
    pub fn wait(&mut self) -> Result<(), HostError> {
        loop {
            let mut ready = [Ready::default(); BATCH];
            let got = self.ends.epoll.wait(&mut ready, None).at("wait for the end of", "shims")?;
            let gone = self.ends.take(&ready[..got]);
            if gone.iter().any(|id| !self.paths.exit_record(id).exists()) {
                return Ok(());
            }
        }
    }
}

impl ShimEnds {
    /// The shims of these containers, and no others. What cannot be watched is found by the periodic look.
    pub(crate) fn follow(&self, paths: &Paths, containers: &BTreeSet<&ContainerId>) {
        static TOKENS: AtomicU64 = AtomicU64::new(0);
        let mut shims = self.lock();
        shims.retain(|id, shim| {
            let stays = containers.contains(id);
            if !stays {
                let _ = self.epoll.remove(&shim.pidfd);
            }
            stays
        });
        for id in containers.iter().filter(|id| !shims.contains_key(**id)).collect::<Vec<_>>() {
            let Ok(Some(mark)) = observe::read_mark(&paths.container(id).join("shim.pid")) else { continue };
            let Ok(pidfd) = keel_sys::process::pidfd_open(mark.pid.cast_signed()) else { continue };
            // Asked after the descriptor was opened: it is that process, or one that has gone.
            if !observe::is_alive(mark) {
                continue;
            }
            let token = TOKENS.fetch_add(1, Ordering::Relaxed);
            if self.epoll.add(&pidfd, IN, token).is_ok() {
                shims.insert((*id).clone(), Shim { token, pidfd });
            }
        }
    }

    /// Those of the ready ones that are still wanted. They leave the set, which would tell of them for ever.
    fn take(&self, ready: &[Ready]) -> Vec<ContainerId> {
        let mut shims = self.lock();
        let is_ready = |shim: &Shim| ready.iter().any(|ready| ready.token == shim.token);
        let gone = shims.extract_if(.., |_, shim| is_ready(shim));
        let mut ids = Vec::new();
        for (id, shim) in gone {
            let _ = self.epoll.remove(&shim.pidfd);
            ids.push(id);
        }
        ids
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Shim>> {
        self.shims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
