//! The event log of this boot: one JSON object a line, bounded, readable without a daemon.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use keel_plan::Millis;
use serde::{Deserialize, Serialize};

use crate::paths::Paths;
use crate::state::{At, Keep, PathError, write_file};

/// Events that are kept; the oldest go first.
pub const MAX_EVENTS: usize = 1000;
/// The file is written anew when it holds this many lines more than are kept.
const SLACK: usize = 1000;

/// One thing that happened. `seq` counts up and is never reused while the run directory lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    pub seq: u64,
    pub time_ms: Millis,
    pub warning: bool,
    /// `Pod/default/web`.
    pub object: String,
    pub reason: String,
    pub message: String,
    pub count: u32,
}

/// Appends to the log and keeps its tail at hand.
#[derive(Debug)]
pub struct EventLog {
    paths: Paths,
    tail: Mutex<Tail>,
}

#[derive(Debug)]
struct Tail {
    events: VecDeque<Event>,
    next_seq: u64,
    lines: usize,
}

impl EventLog {
    pub fn open(paths: &Paths) -> EventLog {
        let events = read(paths);
        let next_seq = events.last().map_or(1, |event| event.seq + 1);
        let lines = events.len();
        EventLog { paths: paths.clone(), tail: Mutex::new(Tail { events: events.into(), next_seq, lines }) }
    }

    /// Repetitions of the newest event of an object raise its count: the log says so in a new line with the same number.
    pub fn record(
        &self,
        now: Millis,
        warning: bool,
        object: &str,
        reason: &str,
        message: &str,
    ) -> Result<Event, PathError> {
        let mut tail = self.tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let again =
            tail.events.iter_mut().rev().find(|event| event.object == object).filter(|event| {
                event.reason == reason && event.message == message && event.warning == warning
            });
        let event = match again {
            Some(event) => {
                event.count += 1;
                event.time_ms = now;
                event.clone()
            }
            None => {
                let event = Event {
                    seq: tail.next_seq,
                    time_ms: now,
                    warning,
                    object: object.to_string(),
                    reason: reason.to_string(),
                    message: message.to_string(),
                    count: 1,
                };
                tail.next_seq += 1;
                tail.events.push_back(event.clone());
                if tail.events.len() > MAX_EVENTS {
                    tail.events.pop_front();
                }
                event
            }
        };
        tail.lines += 1;
        if tail.lines > MAX_EVENTS + SLACK {
            let text: String = tail.events.iter().filter_map(line).collect();
            write_file(&self.paths.events(), text.as_bytes(), Keep::Boot)?;
            tail.lines = tail.events.len();
        } else if let Some(text) = line(&event) {
            let path = self.paths.events();
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(&path)
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .at("append to", &path)?;
        }
        Ok(event)
    }

    pub fn since(&self, after: u64) -> Vec<Event> {
        let tail = self.tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        tail.events.iter().filter(|event| event.seq > after).cloned().collect()
    }
}

fn line(event: &Event) -> Option<String> {
    serde_json::to_string(event).ok().map(|text| text + "\n")
}

/// The log as it is on disk, oldest first, each number once with its latest count. Lines that do not parse (a torn write)
/// are skipped.
pub fn read(paths: &Paths) -> Vec<Event> {
    let text = fs::read_to_string(paths.events()).unwrap_or_default();
    let mut events: Vec<Event> = Vec::new();
    for line in text.lines() {
        let Ok(event) = serde_json::from_str::<Event>(line) else { continue };
        match events.iter_mut().rev().find(|known| known.seq == event.seq) {
            Some(known) => *known = event,
            None => events.push(event),
        }
    }
    if events.len() > MAX_EVENTS {
        events.drain(..events.len() - MAX_EVENTS);
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_count_and_the_log_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(&dir.path().join("root"), &dir.path().join("run"));
        paths.create().unwrap();
        let log = EventLog::open(&paths);
        for _ in 0..3 {
            log.record(1, true, "Pod/a", "BackOff", "again").unwrap();
        }
        assert_eq!(log.since(0).len(), 1);
        assert_eq!(log.since(0)[0].count, 3);
        for n in 0..(MAX_EVENTS + SLACK + 10) {
            log.record(2, false, "Pod/b", "Started", &n.to_string()).unwrap();
        }
        let found = read(&paths);
        assert_eq!(found.len(), MAX_EVENTS);
        let reopened = EventLog::open(&paths);
        assert!(reopened.record(3, false, "Pod/c", "X", "y").unwrap().seq > found.last().unwrap().seq);
    }
}
