//! Who a process is: its number alone is given to others after it has ended.

use std::fs;
use std::io;
use std::path::Path;

use crate::error::{Context, Error};

/// Where the kernel shows processes.
const PROC: &str = "/proc";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks since boot.
    pub(crate) start: u64,
}

impl Identity {
    pub(crate) fn of(pid: i32) -> io::Result<Identity> {
        let stat = fs::read_to_string(format!("{PROC}/{pid}/stat"))?;
        let start = start_time(&stat).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Identity { pid, start })
    }

    pub(crate) fn current() -> Result<Identity, Error> {
        let pid = i32::try_from(std::process::id()).unwrap_or(0);
        Identity::of(pid).doing("read own identity in /proc")
    }

    /// Whether this very process still exists, be it as a zombie.
    pub(crate) fn exists(self) -> bool {
        Identity::of(self.pid).is_ok_and(|now| now == self)
    }

    /// Whether it can still do anything: a zombie that nobody reaps cannot.
    pub(crate) fn runs(self) -> bool {
        let stat = fs::read_to_string(format!("{PROC}/{}/stat", self.pid)).unwrap_or_default();
        start_time(&stat) == Some(self.start) && !matches!(field(&stat, 3), Some("Z" | "X"))
    }

    pub(crate) fn to_line(self) -> String {
        format!("{} {}\n", self.pid, self.start)
    }

    pub(crate) fn parse(line: &str) -> Option<Identity> {
        let (pid, start) = line.trim().split_once(' ')?;
        Some(Identity { pid: pid.parse().ok()?, start: start.parse().ok()? })
    }
}

/// Whether it is the first of its process group, and that not the group of whoever started it.
pub(crate) fn leads_group(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("{PROC}/{pid}/stat")).unwrap_or_default();
    field(&stat, 5).and_then(|group| group.parse().ok()) == Some(pid)
}

fn start_time(stat: &str) -> Option<u64> {
    field(stat, 22)?.parse().ok()
}

/// Numbered as in proc(5), from 3. The command name before it is in parentheses and may hold anything, parentheses and
/// spaces too.
fn field(stat: &str, number: usize) -> Option<&str> {
    let after_name = &stat[stat.rfind(')')? + 1..];
    after_name.split_ascii_whitespace().nth(number - 3)
}

/// Readers see the old contents or the new ones. For files that need not outlive a power failure.
pub(crate) fn replace(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = Path::new(&temporary);
    fs::write(temporary, contents).at("write", temporary)?;
    fs::rename(temporary, path).at("rename to", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_program_cannot_forge_its_start_time() {
        let fields = (4..=30).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(start_time(&format!("7 (x) S {fields}")), Some(22));
        assert_eq!(start_time(&format!("7 (a) S 1 2 (b) S {fields}")), Some(22));
        assert_eq!(start_time("7 (x"), None);
        assert_eq!(start_time("7 (x) S 1"), None);
    }

    #[test]
    fn identity_survives_its_file_and_knows_the_dead() {
        let me = Identity::current().unwrap();
        assert_eq!(Identity::parse(&me.to_line()), Some(me));
        assert!(me.exists() && me.runs());
        let other = Identity { start: me.start + 1, ..me };
        assert!(!other.exists() && !other.runs());
        assert_eq!(Identity::parse("7"), None);
    }
}
