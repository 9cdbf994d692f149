//! The end: the record, and the runtime's `delete`.

use keel_proto::ExitRecord;
use keel_sys::monitor::Reaped;

use crate::helper::Task;
use crate::hold::{Ended, exit_numbers, now_ms};
use crate::log::Lost;
use crate::machine::Event;
use crate::record::write_durably;

use super::Hold;

impl Hold {
    pub(super) fn write_record(&mut self) {
        let record = self.make_record().to_json();
        let event = match write_durably(&self.memory.options.exit_file, record.as_bytes()) {
            Ok(()) => {
                self.record = Some(record);
                Event::Recorded
            }
            Err(_) => Event::RecordFailed,
        };
        self.event(event);
    }

    pub(super) fn make_record(&self) -> ExitRecord {
        let ended = self.ended.unwrap_or(Ended { status: None, usage: Reaped::default(), at_ms: now_ms() });
        let (code, signal, core) = exit_numbers(ended.status);
        let lost = self.lost();
        ExitRecord {
            id: self.memory.options.id.clone(),
            pid: u32::try_from(self.memory.container.pid).unwrap_or(0),
            code,
            signal,
            core,
            oom: self.memory.cgroup.oom_killed(),
            lost: ended.status.is_none(),
            started_at_ms: self.memory.started_at_ms,
            finished_at_ms: ended.at_ms,
            user_us: ended.usage.user_us,
            system_us: ended.usage.system_us,
            max_rss_kb: ended.usage.max_rss_kb,
            log_lost_lines: lost.lines,
            log_lost_bytes: lost.bytes,
        }
    }

    pub(super) fn lost(&self) -> Lost {
        self.pump.lost()
    }

    pub(super) fn start_delete(&mut self) {
        match self.start(Task::Delete, [None; 3]) {
            Ok(child) => self.deleting = Some(child),
            // Whoever reads the record cleans up in any case.
            Err(_) => self.event(Event::Deleted),
        }
    }
}
