//! What happened, in Kubernetes' words; repetitions are counted instead of repeated.

use std::collections::{BTreeMap, VecDeque};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    Normal,
    Warning,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub kind: EventKind,
    /// `Pod/default/web`, `Image/docker.io/library/nginx:1.27`, `Host`.
    pub object: String,
    /// CamelCase word.
    pub reason: String,
    pub message: String,
    /// How often it happened so far. Above 1 it replaces the event of the same object, reason and message.
    pub count: u32,
}

/// Distinct events whose counts are remembered; older ones start again at 1.
const REMEMBERED: usize = 1024;

type Key = (String, String, String);

#[derive(Default)]
pub(crate) struct Events {
    counts: BTreeMap<Key, u32>,
    order: VecDeque<Key>,
    pending: Vec<Event>,
}

impl Events {
    pub(crate) fn normal(&mut self, object: impl Into<String>, reason: &str, message: impl Into<String>) {
        self.add(EventKind::Normal, object.into(), reason, message.into());
    }

    pub(crate) fn warning(&mut self, object: impl Into<String>, reason: &str, message: impl Into<String>) {
        self.add(EventKind::Warning, object.into(), reason, message.into());
    }

    pub(crate) fn take(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.pending)
    }

    fn add(&mut self, kind: EventKind, object: String, reason: &str, message: String) {
        let key = (object.clone(), reason.to_owned(), message.clone());
        let count = match self.counts.get_mut(&key) {
            Some(count) => {
                *count = count.saturating_add(1);
                *count
            }
            None => {
                self.remember(key);
                1
            }
        };
        self.pending.push(Event { kind, object, reason: reason.to_owned(), message, count });
    }

    fn remember(&mut self, key: Key) {
        self.counts.insert(key.clone(), 1);
        self.order.push_back(key);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.counts.remove(&oldest);
        }
    }
}
