//! sd_notify messages from the container's services: what may be passed on to the host's service manager, and that the
//! container is ready.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use keel_proto::file;

use crate::error::{Context, Error};

const NAME: &str = "notify.sock";
/// Services in the container may run as any user.
const MODE: u32 = 0o777;
/// Service managers read no more either.
const LONGEST: usize = 4096;
const READY: &[u8] = b"READY=1";
/// A container that never stops talking must not keep its monitor from anything else.
const AT_ONCE: usize = 8;

/// What a container may say of itself. Anything else, such as which process is the main one or which descriptors to
/// keep, would have the host act on the container's word.
const WHOLE: [&[u8]; 5] = [READY, b"RELOADING=1", b"STOPPING=1", b"WATCHDOG=1", b"WATCHDOG=trigger"];
const BEGINNINGS: [&[u8]; 5] =
    [b"STATUS=", b"ERRNO=", b"BUSERROR=", b"MONOTONIC_USEC=", b"EXTEND_TIMEOUT_USEC="];

/// In a directory of `bundle` that the caller mounts into the container.
pub(crate) fn listen(bundle: &Path) -> Result<UnixDatagram, Error> {
    let dir = bundle.join(file::NOTIFY);
    let path = dir.join(NAME);
    let opened = File::open(&dir).at("open", &dir)?;
    let _ = fs::remove_file(&path);
    // Socket paths end at 107 bytes, the directory's may be longer.
    let short = format!("/proc/self/fd/{}/{NAME}", opened.as_raw_fd());
    let socket = UnixDatagram::bind(short).at("listen on", &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(MODE)).at("open to everybody", &path)?;
    socket.set_nonblocking(true).at("make non-blocking", &path)?;
    Ok(socket)
}

/// Passes on some of what waits, as far as it may be. True: the container is ready.
#[inline(never)]
pub(crate) fn forward(from: &UnixDatagram, to: Option<&OsString>) -> bool {
    let mut buffer = [0; LONGEST];
    let mut ready = false;
    for _ in 0..AT_ONCE {
        let Ok(got) = from.recv(&mut buffer) else { break };
        let message = allowed(&buffer[..got]);
        ready |= message.split(|b| *b == b'\n').any(|line| line == READY);
        if let Some(to) = to.filter(|_| !message.is_empty()) {
            // The service manager does not wait for us, nor we for it.
            let _ = send(to, &message);
        }
    }
    ready
}

fn send(to: &OsStr, message: &[u8]) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let address = match to.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(to)?,
    };
    socket.send_to_addr(message, &address).map(drop)
}

fn allowed(message: &[u8]) -> Vec<u8> {
    let lines = message.split(|b| matches!(b, b'\n' | b'\r'));
    let lines = lines.filter(|line| WHOLE.contains(line) || BEGINNINGS.iter().any(|b| line.starts_with(b)));
    lines.collect::<Vec<_>>().join(&b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_lines_pass() {
        let check = |message: &str, expected: &str| {
            assert_eq!(String::from_utf8(allowed(message.as_bytes())).unwrap(), expected);
        };
        check("READY=1", "READY=1");
        check("MAINPID=1\nREADY=1\r\nSTATUS=at work\nFDSTORE=1\n", "READY=1\nSTATUS=at work");
        check("STOPPING=1\nEXTEND_TIMEOUT_USEC=5", "STOPPING=1\nEXTEND_TIMEOUT_USEC=5");
        check("READY=10\nXREADY=1\nBARRIER=1", "");
    }

    #[test]
    fn a_container_that_does_not_stop_talking_does_not_stop_its_monitor() {
        let dir = std::env::temp_dir().join(format!("keel-notify-{}", std::process::id()));
        fs::create_dir_all(dir.join(file::NOTIFY)).unwrap();
        let socket = listen(&dir).unwrap();
        let container = UnixDatagram::unbound().unwrap();
        container.connect(dir.join(file::NOTIFY).join(NAME)).unwrap();
        container.set_nonblocking(true).unwrap();
        // As many as wait at once on any host.
        let sent = (0..AT_ONCE + 2).take_while(|_| container.send(b"READY=1").is_ok()).count();
        assert!(sent > AT_ONCE);
        assert!(forward(&socket, None));
        assert_eq!((0..sent).take_while(|_| socket.recv(&mut [0; 8]).is_ok()).count(), sent - AT_ONCE);
        fs::remove_dir_all(dir).unwrap();
    }
}
