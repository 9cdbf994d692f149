//! What is kept of running containers, so that nothing is lost should their shims be killed: the descriptors that tell
//! how they end, hold what they wrote last, and are their terminals.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keel_plan::ContainerId;
use keel_proto::SpareReaders;
use nix::sys::resource::{Resource, getrlimit};

use crate::observe;
use crate::paths::Paths;

/// A terminal comes from the shim itself; one that hangs must not hold up a look at the host.
const SHIM_TIMEOUT: Duration = Duration::from_millis(200);
/// One container's part of the descriptors that this process may have: three, and as many for everything else.
const PART: u64 = 8;

#[derive(Default)]
pub(crate) struct Kept {
    containers: Mutex<BTreeMap<ContainerId, Spares>>,
}

struct Spares {
    /// Of the first process.
    pidfd: OwnedFd,
    /// Never read from: output that nobody has read yet lives as long as somebody could.
    _output: Option<SpareReaders>,
    terminal: Option<OwnedFd>,
}

impl Kept {
    /// Of these containers, and no others. What cannot be had is done without.
    pub(crate) fn follow(&self, paths: &Paths, containers: &BTreeSet<&ContainerId>) {
        let mut kept = self.lock();
        kept.retain(|id, _| containers.contains(id));
        let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft / PART);
        for id in containers {
            if kept.len() as u64 >= most {
                return;
            }
            if !kept.contains_key(*id)
                && let Some(spares) = Spares::of(&paths.container(id))
            {
                kept.insert((*id).clone(), spares);
            }
        }
    }

    pub(crate) fn has(&self, id: &ContainerId) -> bool {
        self.lock().contains_key(id)
    }

    /// For a new shim: the names of its options, and what they stand for.
    pub(crate) fn copies(&self, id: &ContainerId) -> Vec<(&'static str, OwnedFd)> {
        let kept = self.lock();
        let Some(spares) = kept.get(id) else { return Vec::new() };
        let all = [("--pidfd", Some(&spares.pidfd)), ("--terminal", spares.terminal.as_ref())];
        let copies = all.into_iter().filter_map(|(name, fd)| Some((name, fd?.try_clone().ok()?)));
        copies.filter(|(_, fd)| fd.as_raw_fd() < keel_sys::monitor::CLAIMABLE).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Spares>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spares {
    fn of(dir: &Path) -> Option<Spares> {
        let mark = observe::read_mark(&dir.join(keel_proto::file::PID)).ok()??;
        let pidfd = keel_sys::process::pidfd_open(mark.pid.cast_signed()).ok()?;
        // Asked after the descriptor was opened: it is that process, or one that has gone.
        if !observe::is_alive(mark) {
            return None;
        }
        let (output, terminal) = match SpareReaders::open(dir) {
            Ok(readers) => (Some(readers), None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let spares =
                    keel_proto::Client::connect_within(dir, SHIM_TIMEOUT).and_then(|mut c| c.spares());
                (None, spares.ok()?.terminal)
            }
            Err(_) => (None, None),
        };
        Some(Spares { pidfd, _output: output, terminal })
    }
}
