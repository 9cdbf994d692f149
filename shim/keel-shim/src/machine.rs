//! A container's end, as a table.
//!
//! ```text
//!             Stop                Deadline
//!  Running ─────────> Stopping ─────────────> Killing ⟲ Deadline (kill again)
//!     │                  │                       │
//!     └──────────────────┴───────── Exited ──────┘
//!                                      v
//!                                  Draining
//!                                      │ Drained or Deadline
//!                                      v
//!                                  Recording ⟲ RecordFailed, Deadline (write again)
//!                                      │ Recorded
//!                                      v
//!                                  Deleting
//!                                      │ Deleted or Deadline
//!                                      v
//!                                   Resting ⟲ OwnerGone, Deadline (look who restarts)
//!                                      │ Released
//!                                      v
//!                                    Gone
//! ```
//!
//! There is one deadline; every state that has one arms it on entry. Nobody is told of the end before the record is
//! durable, and nothing that the record is read from (the cgroup) goes before it.

use keel_proto::Phase;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A client asked for a stop.
    Stop,
    /// The container's first process has ended.
    Exited,
    /// The armed deadline has passed.
    Deadline,
    /// Both output streams reached their end.
    Drained,
    Recorded,
    RecordFailed,
    /// The runtime's `delete` has ended, well or not.
    Deleted,
    /// Who would have restarted the container is no more.
    OwnerGone,
    /// Nothing is to be restarted by this shim, or not any more.
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    SendStopSignal,
    /// The end of the grace period; a later request can only bring it nearer.
    ArmGrace,
    KillCgroup,
    ArmKillAgain,
    ArmDrain,
    /// Read what is left of the output, and end the log properly.
    CloseStreams,
    WriteRecord,
    ArmWriteAgain,
    TellClients,
    StartDelete,
    ArmDelete,
    /// Somebody who lives, then their end is awaited; else the command that restarts is run.
    LookWhoRestarts,
    Disarm,
    Quit,
}

pub(crate) type Row = (Phase, Event, Phase, &'static [Effect]);

/// Pairs that are absent change nothing.
pub(crate) const TABLE: &[Row] = {
    use Effect::*;
    use Event::*;
    use Phase::*;
    // What still lives in the cgroup after its first process is no longer wanted, and would hold the streams open.
    const EXITED: &[Effect] = &[KillCgroup, ArmDrain];
    const DRAINED: &[Effect] = &[CloseStreams, Disarm, WriteRecord];
    const DELETED: &[Effect] = &[Disarm, LookWhoRestarts];
    &[
        (Running, Stop, Stopping, &[SendStopSignal, ArmGrace]),
        (Running, Exited, Draining, EXITED),
        (Stopping, Stop, Stopping, &[SendStopSignal, ArmGrace]),
        (Stopping, Exited, Draining, EXITED),
        (Stopping, Deadline, Killing, &[KillCgroup, ArmKillAgain]),
        (Killing, Exited, Draining, EXITED),
        (Killing, Deadline, Killing, &[KillCgroup, ArmKillAgain]),
        (Draining, Drained, Recording, DRAINED),
        (Draining, Deadline, Recording, DRAINED),
        (Recording, RecordFailed, Recording, &[ArmWriteAgain]),
        (Recording, Deadline, Recording, &[WriteRecord]),
        (Recording, Recorded, Deleting, &[TellClients, StartDelete, ArmDelete]),
        (Deleting, Deleted, Resting, DELETED),
        (Deleting, Deadline, Resting, DELETED),
        (Resting, OwnerGone, Resting, &[LookWhoRestarts]),
        (Resting, Deadline, Resting, &[LookWhoRestarts]),
        (Resting, Released, Gone, &[Disarm, Quit]),
    ]
};

/// The state after `event`, and what to do, in order.
pub(crate) fn step(phase: Phase, event: Event) -> (Phase, &'static [Effect]) {
    TABLE.iter().find(|row| row.0 == phase && row.1 == event).map_or((phase, &[]), |row| (row.2, row.3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Effect::*;

    const EVENTS: [Event; 9] = [
        Event::Stop,
        Event::Exited,
        Event::Deadline,
        Event::Drained,
        Event::Recorded,
        Event::RecordFailed,
        Event::Deleted,
        Event::OwnerGone,
        Event::Released,
    ];

    fn pairs() -> impl Iterator<Item = (Phase, Event, Phase, &'static [Effect])> {
        Phase::ALL.into_iter().flat_map(|phase| {
            EVENTS.into_iter().map(move |event| {
                let (next, effects) = step(phase, event);
                (phase, event, next, effects)
            })
        })
    }

    #[test]
    fn no_pair_is_listed_twice_and_every_row_is_reached() {
        for (i, a) in TABLE.iter().enumerate() {
            assert!(TABLE[..i].iter().all(|b| (a.0, a.1) != (b.0, b.1)), "{a:?}");
            assert_eq!(step(a.0, a.1), (a.2, a.3));
        }
    }

    #[test]
    fn a_container_never_comes_back_and_its_end_is_never_skipped() {
        for (phase, event, next, effects) in pairs() {
            assert!(next >= phase, "{phase:?} {event:?}");
            if phase < Phase::Draining && next >= Phase::Draining {
                assert_eq!((event, next), (Event::Exited, Phase::Draining));
            }
            if next == Phase::Deleting && phase != next {
                assert_eq!((phase, event), (Phase::Recording, Event::Recorded));
            }
            assert_eq!(effects.contains(&TellClients), (phase, event) == (Phase::Recording, Event::Recorded));
            assert_eq!(effects.contains(&Quit), next == Phase::Gone && phase != Phase::Gone);
        }
    }

    #[test]
    fn nothing_is_killed_or_signalled_once_the_record_is_due() {
        for (phase, event, _, effects) in pairs().filter(|p| p.0 >= Phase::Draining) {
            let hits = effects.iter().any(|e| matches!(e, KillCgroup | SendStopSignal));
            assert!(!hits, "{phase:?} {event:?}");
        }
    }

    #[test]
    fn every_state_with_a_deadline_leaves_it_or_arms_it_again() {
        for phase in Phase::ALL {
            let (next, effects) = step(phase, Event::Deadline);
            let arms = |e: &Effect| {
                matches!(
                    e,
                    ArmGrace
                        | ArmKillAgain
                        | ArmDrain
                        | ArmWriteAgain
                        | ArmDelete
                        | WriteRecord
                        | LookWhoRestarts
                )
            };
            let none = matches!(phase, Phase::Running | Phase::Gone);
            assert_eq!(effects.is_empty(), none, "{phase:?}");
            assert!(none || next > phase || effects.iter().any(arms), "{phase:?}");
        }
    }

    /// The world that the effects act on, written without the table: what may be true, and when.
    #[derive(Default)]
    struct World {
        dead: bool,
        drained: bool,
        on_disk: bool,
        told: bool,
        deleted: bool,
        quit: bool,
    }

    impl World {
        /// Events that can happen now. A deadline can pass at any time, be it armed or not.
        fn possible(&self) -> Vec<Event> {
            let mut events = vec![Event::Stop, Event::Deadline];
            if !self.dead {
                events.push(Event::Exited);
            } else if !self.drained {
                events.push(Event::Drained);
            }
            if self.deleted {
                events.extend([Event::Deleted, Event::OwnerGone, Event::Released]);
            }
            events
        }

        fn perform(&mut self, effect: Effect, disk_works: bool) -> Option<Event> {
            match effect {
                SendStopSignal => assert!(!self.dead, "a signal to a number that may be another's"),
                WriteRecord => {
                    assert!(self.dead && self.drained && !self.on_disk);
                    self.on_disk = disk_works;
                    return Some(if disk_works { Event::Recorded } else { Event::RecordFailed });
                }
                CloseStreams => self.drained = true,
                TellClients => {
                    assert!(self.on_disk && !self.told, "told what a power failure could undo");
                    self.told = true;
                }
                StartDelete => {
                    assert!(self.on_disk, "the cgroup went before it was read");
                    self.deleted = true;
                }
                LookWhoRestarts => assert!(self.told && self.deleted, "two runs at once"),
                Quit => {
                    assert!(self.told && self.deleted);
                    self.quit = true;
                }
                _ => {}
            }
            None
        }
    }

    #[test]
    fn any_order_of_events_keeps_the_promises_and_ends() {
        for seed in 1..=2000u64 {
            // xorshift: every run is the same, and a failing seed is its own replay.
            let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mut random = |below: usize| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state % below as u64) as usize
            };
            let mut world = World::default();
            let mut phase = Phase::Running;
            for _ in 0..200 {
                let events = world.possible();
                let mut event = Some(events[random(events.len())]);
                world.dead |= event == Some(Event::Exited);
                world.drained |= event == Some(Event::Drained);
                while let Some(next) = event.take() {
                    let (to, effects) = step(phase, next);
                    phase = to;
                    for effect in effects {
                        event = world.perform(*effect, random(3) > 0).or(event);
                    }
                }
                if world.quit {
                    break;
                }
            }
            assert!(world.quit && phase == Phase::Gone, "seed {seed} stays in {phase:?}");
        }
    }

    #[test]
    fn gone_is_final() {
        assert!(pairs().filter(|p| p.0 == Phase::Gone).all(|p| p.2 == Phase::Gone && p.3.is_empty()));
    }
}
