//! The pipes to the caller, named by number in the environment.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};

use keel_proto::json;
use keel_sys::file::set_cloexec;
use keel_sys::monitor::take_inherited;

use super::cli::Options;
use crate::error::{Context, Error};

pub(crate) const START: &str = "_OCI_STARTPIPE";
pub(crate) const SYNC: &str = "_OCI_SYNCPIPE";
pub(crate) const ATTACH: &str = "_OCI_ATTACHPIPE";

pub(crate) fn take(name: &str) -> Result<Option<OwnedFd>, Error> {
    let Some(value) = std::env::var_os(name) else { return Ok(None) };
    let number = value.to_str().and_then(|text| text.parse().ok());
    let number = number.ok_or_else(|| Error::new(format!("unable to parse {name}")))?;
    take_inherited(number).map(Some).doing(&format!("take descriptor {number} of {name}"))
}

/// Waits until the caller has done what has to come first, such as putting us in a cgroup.
pub(crate) fn wait_for_start(pipe: &OwnedFd) -> Result<(), Error> {
    let mut file = File::from(pipe.try_clone().doing("copy the start pipe")?);
    let mut buffer = [0; 8192];
    loop {
        match file.read(&mut buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop).doing("read the start pipe"),
        }
    }
}

/// Leaves the descriptor open for the program that is executed next, under its number.
pub(crate) fn leave_open(fd: OwnedFd) -> Result<i32, Error> {
    set_cloexec(&fd, false).doing("leave a descriptor open")?;
    let number = fd.as_raw_fd();
    std::mem::forget(fd);
    Ok(number)
}

/// One answer. A caller that has gone away needs none.
pub(crate) fn tell(options: &Options, pipe: &OwnedFd, value: i64, message: Option<&str>) {
    let key = match (options.api, options.exec) {
        (true, _) => "data",
        (false, true) => "exit_code",
        (false, false) => "pid",
    };
    let mut json = json::Writer::default();
    json.raw(key, value);
    if let Some(message) = message.filter(|m| !m.is_empty()) {
        json.text("message", message);
    }
    let line = json.finish() + "\n";
    if let Ok(copy) = pipe.try_clone() {
        let _ = File::from(copy).write_all(line.as_bytes());
    }
}
