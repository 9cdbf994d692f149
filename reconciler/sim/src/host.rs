//! The world behind the engine's port: the driver can be tried without a kernel.

use std::sync::{Mutex, MutexGuard, PoisonError};

use keel_engine::ports::{ActionError, Done, Host, PortError, ProbeOutcome, ProbeRequest, Progress};
use keel_plan::{Action, Memory, Millis, Observed, PodId, PodMemory};

use crate::world::{World, steps};

/// A host in memory on which everything works. The time is the caller's.
pub struct SimHost {
    world: Mutex<World>,
    now: Box<dyn Fn() -> Millis + Send + Sync>,
}

impl SimHost {
    pub fn new(now: impl Fn() -> Millis + Send + Sync + 'static) -> SimHost {
        SimHost { world: Mutex::default(), now: Box::new(now) }
    }

    /// To look at it, or to change it behind the engine's back.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host for SimHost {
    fn observe(&self) -> Result<Observed, PortError> {
        Ok(self.world().observe())
    }

    fn perform(&self, action: &Action, _: &(dyn Fn(Progress) + Sync)) -> Result<Done, ActionError> {
        for step in steps(action) {
            let now = (self.now)();
            if self.world().apply(action, *step, now)? == Done::Stale {
                return Ok(Done::Stale);
            }
        }
        Ok(Done::Done)
    }

    fn probe(&self, request: &ProbeRequest) -> ProbeOutcome {
        let live = self.world().run(&request.pod.key, &request.container).is_some_and(|run| run.is_running());
        if live { ProbeOutcome::Success } else { ProbeOutcome::Failure("connection refused".into()) }
    }

    fn load_memory(&self) -> Memory {
        self.world().memory.clone()
    }

    fn save_memory(&self, pod: &PodId, memory: Option<&PodMemory>) -> Result<(), PortError> {
        let mut world = self.world();
        match memory {
            Some(memory) => drop(world.memory.pods.insert(pod.clone(), memory.clone())),
            None => drop(world.memory.pods.remove(pod)),
        }
        Ok(())
    }

    fn keep_memory(&self, _: &PodId, _: Option<&PodMemory>) -> Result<(), PortError> {
        Ok(())
    }
}
