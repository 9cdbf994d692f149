//! Kubernetes' phase of a pod, case for case.

use keel_manifest::model::RestartPolicy;
use serde::{Deserialize, Serialize};

use crate::status::{ContainerStatus, State};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Pending => "Pending",
            Phase::Running => "Running",
            Phase::Succeeded => "Succeeded",
            Phase::Failed => "Failed",
        })
    }
}

/// A main container as the phase counts it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Count {
    Running,
    /// Never started.
    Waiting,
    Stopped,
    Succeeded,
}

pub(crate) fn phase(policy: RestartPolicy, init: &[ContainerStatus], main: &[ContainerStatus]) -> Phase {
    let init_failed = init.iter().any(failed_init);
    let init_pending = init.iter().any(pending_init);
    let counts: Vec<Count> = main.iter().map(count).collect();
    let any = |wanted| counts.contains(&wanted);
    let all_succeeded = counts.iter().all(|count| *count == Count::Succeeded);
    if init_failed && policy == RestartPolicy::Never {
        Phase::Failed
    } else if init_pending || any(Count::Waiting) || counts.is_empty() {
        Phase::Pending
    } else if any(Count::Running) || policy == RestartPolicy::Always {
        Phase::Running
    } else if all_succeeded {
        Phase::Succeeded
    } else if policy == RestartPolicy::Never {
        Phase::Failed
    } else {
        // OnFailure: the failed ones are about to be restarted.
        Phase::Running
    }
}

fn count(container: &ContainerStatus) -> Count {
    match (&container.state, &container.last_state) {
        (State::Running { .. }, _) => Count::Running,
        (State::Terminated { exit_code: 0, .. }, _) => Count::Succeeded,
        (State::Terminated { .. }, _) | (State::Waiting { .. }, Some(State::Terminated { .. })) => {
            Count::Stopped
        }
        (State::Waiting { .. }, _) => Count::Waiting,
    }
}

fn failed_init(container: &ContainerStatus) -> bool {
    let ended = match (&container.state, &container.last_state) {
        (State::Waiting { .. }, Some(last)) => last,
        (state, _) => state,
    };
    matches!(ended, State::Terminated { exit_code, .. } if *exit_code != 0)
}

fn pending_init(container: &ContainerStatus) -> bool {
    match (&container.state, &container.last_state) {
        (State::Running { .. }, _) => true,
        (State::Terminated { .. }, _) => false,
        (State::Waiting { .. }, last) => !matches!(last, Some(State::Terminated { .. })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `r` running, `0`/`1` terminated with that code, `w` waiting for the first run, `b` waiting after a failure.
    fn containers(states: &str) -> Vec<ContainerStatus> {
        let ended = |exit_code| State::Terminated {
            exit_code,
            signal: 0,
            reason: String::new(),
            started_at: 0,
            finished_at: 0,
        };
        let waiting = || State::Waiting { reason: String::new(), message: String::new() };
        let make = |character| {
            let (state, last_state) = match character {
                'r' => (State::Running { started_at: 0 }, None),
                'b' => (waiting(), Some(ended(1))),
                'w' => (waiting(), None),
                code => (ended(i32::from(code != '0')), None),
            };
            ContainerStatus {
                name: "c".into(),
                image: String::new(),
                image_id: String::new(),
                container_id: String::new(),
                restart_count: 0,
                ready: false,
                started: false,
                state,
                last_state,
                attempt: None,
                pid: None,
            }
        };
        states.chars().map(make).collect()
    }

    #[test]
    fn the_phase_is_the_kubelets() {
        use Phase::{Failed, Pending, Running, Succeeded};
        let check = |init: &str, main: &str, expected: [Phase; 3]| {
            let policies = [RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never];
            let phases = policies.map(|policy| phase(policy, &containers(init), &containers(main)));
            assert_eq!(phases, expected, "init {init:?} main {main:?}");
        };
        check("", "w", [Pending; 3]);
        check("", "r", [Running; 3]);
        check("", "rw", [Pending; 3]);
        check("", "rr", [Running; 3]);
        check("", "r0", [Running; 3]);
        check("", "r1", [Running; 3]);
        check("", "0", [Running, Succeeded, Succeeded]);
        check("", "00", [Running, Succeeded, Succeeded]);
        check("", "1", [Running, Running, Failed]);
        check("", "01", [Running, Running, Failed]);
        check("", "b", [Running, Running, Failed]);
        check("", "rb", [Running; 3]);
        check("r", "w", [Pending; 3]);
        check("w", "w", [Pending; 3]);
        check("0w", "w", [Pending; 3]);
        check("1", "w", [Pending, Pending, Failed]);
        check("b", "w", [Pending, Pending, Failed]);
        check("0", "w", [Pending; 3]);
        check("0", "r", [Running; 3]);
        check("0", "0", [Running, Succeeded, Succeeded]);
    }
}
