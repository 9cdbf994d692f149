//! Writes what is remembered of pods to disk, on a thread of its own: a disk that takes its time must not hold up the
//! engine.
//!
//! ```text
//!             ┌── save ──┐            latest wins
//!             v          │
//! nothing ──> save ──────┘──> forget ──> forget, then save
//!                              a forget is never skipped: what it removes is not to be found by the next pod of that name
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use keel_plan::{PodId, PodMemory};

use crate::ports::{Host, PortError};

/// Cheap to clone. The thread ends when it is closed and has nothing left to do.
#[derive(Clone)]
pub(crate) struct MemoryWriter(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Bounded by the number of pods.
#[derive(Default)]
struct State {
    pending: BTreeMap<PodId, Pending>,
    /// Being written.
    busy: Option<PodId>,
    /// Of these, something is still to be removed.
    forgetting: BTreeSet<PodId>,
    closed: bool,
}

#[derive(Default)]
struct Pending {
    forget: bool,
    save: Option<PodMemory>,
}

impl MemoryWriter {
    pub(crate) fn start<H: Host + 'static>(host: Arc<H>) -> std::io::Result<(MemoryWriter, JoinHandle<()>)> {
        let writer = MemoryWriter(Arc::default());
        let mine = writer.clone();
        let thread =
            std::thread::Builder::new().name("memory".into()).spawn(move || mine.run(host.as_ref()))?;
        Ok((writer, thread))
    }

    /// Replaces what is not on disk yet.
    pub(crate) fn write(&self, pod: PodId, memory: Option<PodMemory>) {
        let mut state = self.lock();
        if memory.is_none() {
            state.forgetting.insert(pod.clone());
        }
        let pending = state.pending.entry(pod).or_default();
        pending.forget |= memory.is_none();
        pending.save = memory;
        self.0.changed.notify_all();
    }

    /// Waits until nothing of an earlier pod of that name is left to be removed.
    pub(crate) fn await_forgotten(&self, pod: &PodId) {
        let mut state = self.lock();
        while state.forgetting.contains(pod) {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Writes what is left, for so long; then the process may end.
    pub(crate) fn close(&self, patience: Duration) {
        let mut state = self.lock();
        state.closed = true;
        self.0.changed.notify_all();
        let unwritten = |state: &mut State| state.busy.is_some() || !state.pending.is_empty();
        let waited = self.0.changed.wait_timeout_while(state, patience, unwritten);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            tracing::warn!("restart counts are not all on disk");
        }
    }

    fn run(&self, host: &dyn Host) {
        while let Some((pod, pending)) = self.next() {
            if pending.forget {
                say(&pod, host.keep_memory(&pod, None));
                let mut state = self.lock();
                let again = state.pending.get(&pod).is_some_and(|pending| pending.forget);
                if !again {
                    state.forgetting.remove(&pod);
                }
                self.0.changed.notify_all();
            }
            if let Some(memory) = &pending.save {
                say(&pod, host.keep_memory(&pod, Some(memory)));
            }
            self.lock().busy = None;
            self.0.changed.notify_all();
        }
    }

    fn next(&self) -> Option<(PodId, Pending)> {
        let mut state = self.lock();
        loop {
            if let Some((pod, pending)) = state.pending.pop_first() {
                state.busy = Some(pod.clone());
                return Some((pod, pending));
            }
            if state.closed {
                return None;
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn say(pod: &PodId, kept: Result<(), PortError>) {
    if let Err(PortError(error)) = kept {
        tracing::warn!(%pod, error, "restart counts could not be kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::{ActionError, Done, ProbeOutcome, ProbeRequest, Progress};
    use keel_plan::{Action, Memory, Observed};
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// A disk that takes each write when it is told to.
    struct SlowDisk {
        told: Mutex<Receiver<()>>,
        written: Mutex<Vec<(PodId, Option<PodMemory>)>>,
    }

    impl Host for SlowDisk {
        fn observe(&self) -> Result<Observed, PortError> {
            Err(PortError("not asked here".into()))
        }

        fn perform(&self, _: &Action, _: &(dyn Fn(Progress) + Sync)) -> Result<Done, ActionError> {
            Ok(Done::Stale)
        }

        fn probe(&self, _: &ProbeRequest) -> ProbeOutcome {
            ProbeOutcome::Success
        }

        fn load_memory(&self) -> Memory {
            Memory::default()
        }

        fn save_memory(&self, _: &PodId, _: Option<&PodMemory>) -> Result<(), PortError> {
            Ok(())
        }

        fn keep_memory(&self, pod: &PodId, memory: Option<&PodMemory>) -> Result<(), PortError> {
            let _ = self.told.lock().unwrap().recv();
            self.written.lock().unwrap().push((pod.clone(), memory.cloned()));
            Ok(())
        }
    }

    fn slow_disk() -> (Arc<SlowDisk>, Sender<()>, MemoryWriter, JoinHandle<()>) {
        let (tell, told) = channel();
        let host = Arc::new(SlowDisk { told: Mutex::new(told), written: Mutex::default() });
        let (writer, thread) = MemoryWriter::start(host.clone()).unwrap();
        (host, tell, writer, thread)
    }

    fn counted(restarts: u32) -> PodMemory {
        let container = keel_plan::ContainerMemory { restarts, ..Default::default() };
        PodMemory {
            containers: [(keel_plan::ContainerName("c".into()), container)].into(),
            ..PodMemory::default()
        }
    }

    #[test]
    fn a_slow_disk_holds_up_nobody_and_gets_the_latest_of_each_pod() {
        let (host, tell, writer, thread) = slow_disk();
        let (first, second) = (PodId("a".into()), PodId("b".into()));
        for restarts in 0..100 {
            writer.write(first.clone(), Some(counted(restarts)));
        }
        writer.write(second.clone(), Some(counted(7)));
        drop(tell);
        writer.close(Duration::from_secs(60));
        thread.join().unwrap();
        let written = host.written.lock().unwrap();
        assert!(written.len() <= 3, "{written:?}");
        let last = |pod: &PodId| written.iter().rfind(|(of, _)| of == pod).unwrap().1.clone();
        assert_eq!(last(&first), Some(counted(99)));
        assert_eq!(last(&second), Some(counted(7)));
    }

    #[test]
    fn a_pod_comes_again_only_after_it_has_been_forgotten() {
        let (host, tell, writer, thread) = slow_disk();
        let pod = PodId("a".into());
        writer.write(pod.clone(), None);
        writer.write(pod.clone(), Some(counted(1)));
        let (waiting, again) = (writer.clone(), pod.clone());
        let waiter = std::thread::spawn(move || waiting.await_forgotten(&again));
        assert!(!waiter.is_finished());
        tell.send(()).unwrap();
        waiter.join().unwrap();
        assert_eq!(host.written.lock().unwrap()[0], (pod.clone(), None));
        drop(tell);
        writer.close(Duration::from_secs(60));
        thread.join().unwrap();
        assert_eq!(*host.written.lock().unwrap(), [(pod.clone(), None), (pod, Some(counted(1)))]);
    }
}
