//! What a shim must remember to be re-executed or replaced: a file in its directory.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use keel_proto::file;

use crate::args::{Options, Restart};
use crate::cgroup::Cgroup;
use crate::error::{Context, Error};
use crate::log::Lost;
use crate::process::{Identity, replace};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) options: Options,
    pub(crate) container: Identity,
    /// 0: created and not started.
    pub(crate) started_at_ms: u64,
    pub(crate) cgroup: Cgroup,
    /// The container is not a child of this shim.
    pub(crate) adopted: bool,
    /// Another hold phase came before: the log may end within a line.
    pub(crate) resumed: bool,
    pub(crate) lost: Lost,
    /// The sockets that are held, in the order of their descriptors.
    pub(crate) held: Vec<String>,
}

impl Memory {
    pub(crate) fn save(&self) -> Result<(), Error> {
        replace(&self.options.dir.join(file::MEMORY), &self.to_bytes())
    }

    pub(crate) fn load(dir: &Path) -> Result<Memory, Error> {
        let path = dir.join(file::MEMORY);
        let bytes = std::fs::read(&path).at("read", &path)?;
        let parsed = Memory::parse(&bytes);
        parsed.ok_or_else(|| Error::new(format!("{} cannot be understood", path.display())))
    }

    /// `key=value` fields, each ended by a NUL: paths hold any other byte.
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Fields(Vec::new());
        let o = &self.options;
        out.put("version", 1.to_string());
        out.put("id", &o.id);
        out.put("dir", &o.dir);
        out.put("bundle", &o.bundle);
        out.put("runtime", &o.runtime);
        out.put_some("runtime_root", o.runtime_root.as_ref());
        o.runtime_args.iter().for_each(|arg| out.put("runtime_arg", arg));
        out.put("exit_file", &o.exit_file);
        for (name, value) in o.log.fields() {
            out.put(&name.replace('-', "_"), value.unwrap_or_default());
        }
        out.put("tty", o.tty.to_string());
        out.put("stdin", o.stdin.to_string());
        out.put("stdin_once", o.stdin_once.to_string());
        if let Some(restart) = o.restart {
            out.put("restart", restart.name());
        }
        out.put_some("restart_lock", o.restart_lock.as_ref());
        o.restart_command.iter().for_each(|word| out.put("restart_command", word));
        out.put("notify", o.notify.to_string());
        if let Some(to) = &o.notify_to {
            out.put("notify_to", to);
        }
        self.held.iter().for_each(|name| out.put("held", name));
        out.put("pid", self.container.pid.to_string());
        out.put("pid_start", self.container.start.to_string());
        out.put("started_at_ms", self.started_at_ms.to_string());
        out.put_some("unified", self.cgroup.unified.as_ref());
        out.put_some("memory", self.cgroup.memory.as_ref());
        out.put_some("freezer", self.cgroup.freezer.as_ref());
        out.put_some("pids", self.cgroup.pids.as_ref());
        out.put("adopted", self.adopted.to_string());
        out.put("resumed", self.resumed.to_string());
        out.put("lost_lines", self.lost.lines.to_string());
        out.put("lost_bytes", self.lost.bytes.to_string());
        out.0
    }

    fn parse(bytes: &[u8]) -> Option<Memory> {
        let mut memory = Memory::default();
        let bytes = bytes.strip_suffix(b"\0")?;
        for field in bytes.split(|b| *b == 0) {
            let at = field.iter().position(|b| *b == b'=')?;
            memory.set(&field[..at], &field[at + 1..])?;
        }
        (!memory.options.id.is_empty() && memory.container.pid > 0).then_some(memory)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let o = &mut self.options;
        let path = || PathBuf::from(OsStr::from_bytes(value));
        match key {
            b"id" => o.id = std::str::from_utf8(value).ok()?.to_owned(),
            b"dir" => o.dir = path(),
            b"bundle" => o.bundle = path(),
            b"runtime" => o.runtime = path(),
            b"runtime_root" => o.runtime_root = Some(path()),
            b"runtime_arg" => o.runtime_args.push(OsString::from_vec(value.to_vec())),
            b"exit_file" => o.exit_file = path(),
            b"tty" => o.tty = parse(value)?,
            b"stdin" => o.stdin = parse(value)?,
            b"stdin_once" => o.stdin_once = parse(value)?,
            b"restart" => o.restart = Restart::parse(value),
            b"restart_lock" => o.restart_lock = Some(path()),
            b"restart_command" => o.restart_command.push(OsString::from_vec(value.to_vec())),
            b"notify" => o.notify = parse(value)?,
            b"notify_to" => o.notify_to = Some(OsString::from_vec(value.to_vec())),
            b"held" => self.held.push(std::str::from_utf8(value).ok()?.to_owned()),
            b"pid" => self.container.pid = parse(value)?,
            b"pid_start" => self.container.start = parse(value)?,
            b"started_at_ms" => self.started_at_ms = parse(value)?,
            b"unified" => self.cgroup.unified = Some(path()),
            b"memory" => self.cgroup.memory = Some(path()),
            b"freezer" => self.cgroup.freezer = Some(path()),
            b"pids" => self.cgroup.pids = Some(path()),
            b"adopted" => self.adopted = parse(value)?,
            b"resumed" => self.resumed = parse(value)?,
            b"lost_lines" => self.lost.lines = parse(value)?,
            b"lost_bytes" => self.lost.bytes = parse(value)?,
            b"version" => (value == b"1").then_some(())?,
            // A log's, else a newer shim's.
            _ => {
                let name: Vec<u8> = key.iter().map(|b| if *b == b'_' { b'-' } else { *b }).collect();
                o.log.set(&name, || Ok(OsStr::from_bytes(value))).ok()?;
            }
        }
        Some(())
    }
}

fn parse<T: std::str::FromStr>(value: &[u8]) -> Option<T> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

struct Fields(Vec<u8>);

impl Fields {
    fn put(&mut self, key: &str, value: impl AsRef<OsStr>) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(b'=');
        self.0.extend_from_slice(value.as_ref().as_bytes());
        self.0.push(0);
    }

    fn put_some(&mut self, key: &str, value: Option<&PathBuf>) {
        if let Some(value) = value {
            self.put(key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::LogOptions;

    fn example() -> Memory {
        Memory {
            options: Options {
                id: "a".into(),
                dir: "/d = x\n".into(),
                bundle: "/b".into(),
                runtime: OsString::from_vec(b"/r\xff".to_vec()).into(),
                runtime_root: Some("/rr".into()),
                runtime_args: vec!["--debug".into(), "a=b".into()],
                exit_file: "/e".into(),
                log: LogOptions { file: Some("/l".into()), compress: true, ..LogOptions::default() },
                tty: true,
                stdin: true,
                stdin_once: false,
                restart: Some(Restart::OnFailure),
                restart_lock: Some("/l".into()),
                restart_command: vec!["/keel".into(), "--root=/x".into()],
                notify: true,
                notify_to: Some("@x".into()),
                // What only the start needs is not kept.
                ..Options::default()
            },
            container: Identity { pid: 7, start: 8 },
            started_at_ms: 9,
            cgroup: Cgroup { unified: Some("/u".into()), ..Cgroup::default() },
            adopted: true,
            resumed: true,
            lost: Lost { lines: 3, bytes: 4 },
            held: vec!["http=tcp:0.0.0.0:80@1".into()],
        }
    }

    #[test]
    fn memory_survives_its_file() {
        let memory = example();
        assert_eq!(Memory::parse(&memory.to_bytes()), Some(memory));
    }

    #[test]
    fn a_cut_or_foreign_file_is_refused_and_unknown_keys_are_not() {
        let bytes = example().to_bytes();
        let more = [&bytes[..], b"new=1\0"].concat();
        assert_eq!(Memory::parse(&more), Some(example()));
        assert_eq!(Memory::parse(&bytes[..bytes.len() - 1]), None);
        assert_eq!(Memory::parse(b""), None);
        assert_eq!(Memory::parse(b"version=2\0id=a\0pid=1\0"), None);
        assert_eq!(Memory::parse(b"id=a\0pid=x\0"), None);
    }
}
