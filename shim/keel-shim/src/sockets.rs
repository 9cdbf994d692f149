//! Sockets that outlive the runs of their container.
//!
//! A shim opens them once, in the pod's network, and hands them to the container as a service manager would
//! (sd_listen_fds(3)). It keeps copies: who connects while the container ends and starts again waits in the socket's
//! queue and is not refused. The shim of the next run asks that of the last one for them.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use keel_proto::Client;
use keel_sys::file::{dup_above, dup2, set_cloexec};
use keel_sys::monitor::take_inherited;
use keel_sys::process::{pidfd_getfd, setns};

use crate::args::{Call, Options};
use crate::error::{Context, Error};

/// As many as one message carries.
pub(crate) const MOST: usize = keel_sys::seqpacket::MAX_FDS;
/// The first of them in the container.
const FIRST: i32 = 3;
const OWN_NETWORK: &str = "/proc/self/ns/net";
const CLONE_NEWNET: i32 = 0x4000_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

/// `name=tcp:address:port`, as on the command line.
pub(crate) fn check(text: &str) -> Result<(), Error> {
    parse(text)
        .map(drop)
        .ok_or_else(|| Error::new(format!("--listen {text:?} is not NAME=tcp|udp:ADDRESS:PORT")))
}

fn parse(text: &str) -> Option<(Protocol, SocketAddr)> {
    let (name, place) = text.split_once('=')?;
    let (protocol, address) = place.split_once(':')?;
    let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    Some((protocol, address.parse().ok().filter(|_| plain)?))
}

/// What is held, with the network that it was opened in: the same address elsewhere is another socket.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) names: Vec<String>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// From the shim of the run before, where it has them; else opened anew.
pub(crate) fn obtain(options: &Options) -> Result<Held, Error> {
    let mut held = Held::default();
    if options.listen.is_empty() {
        return Ok(held);
    }
    let network = options.netns.as_deref().unwrap_or(Path::new(OWN_NETWORK));
    let inode = std::fs::metadata(network).at("look at", network)?.ino();
    let from = options.listen_from.as_ref();
    let before = from.and_then(|dir| Client::connect(dir).ok()?.sockets().ok());
    let mut before = before.unwrap_or_default();
    for wanted in &options.listen {
        let name = format!("{wanted}@{inode}");
        let fd = match before.iter().position(|(name_before, _)| *name_before == name) {
            Some(at) => before.swap_remove(at).1,
            None => open(wanted, options.netns.as_deref())?,
        };
        held.names.push(name);
        held.fds.push(fd);
    }
    Ok(held)
}

fn open(wanted: &str, network: Option<&Path>) -> Result<OwnedFd, Error> {
    let Some((protocol, address)) = parse(wanted) else {
        return Err(Error::new(format!("{wanted} is no socket")));
    };
    let home = Path::new(OWN_NETWORK);
    let home = File::open(home).at("open", home)?;
    if let Some(network) = network {
        let there = File::open(network).at("open", network)?;
        setns(&there, CLONE_NEWNET).at("enter", network)?;
    }
    let opened = match protocol {
        Protocol::Tcp => TcpListener::bind(address).map(OwnedFd::from),
        Protocol::Udp => UdpSocket::bind(address).map(OwnedFd::from),
    };
    if network.is_some() {
        setns(&home, CLONE_NEWNET).doing("return to the own network")?;
    }
    opened.doing(&format!("open the socket {wanted}"))
}

/// After a crash, from the container itself, which was given them; those that it has closed are lost.
pub(crate) fn recover(container: &OwnedFd, names: &[String]) -> Held {
    let mut held = Held::default();
    for (name, number) in names.iter().zip(FIRST..) {
        let socket = pidfd_getfd(container, number).ok().filter(|fd| is_that(fd, name));
        if let Some(fd) = socket {
            held.names.push(name.clone());
            held.fds.push(fd);
        }
    }
    held
}

/// The container may have put something else under the number.
fn is_that(fd: &OwnedFd, name: &str) -> bool {
    let text = name.rsplit_once('@').map_or(name, |(text, _)| text);
    let (Some((protocol, address)), Ok(fd)) = (parse(text), fd.try_clone()) else { return false };
    match protocol {
        Protocol::Tcp => {
            let bound = TcpListener::from(fd);
            let is_there = bound.local_addr().is_ok_and(|at| at == address);
            // A connection that it has accepted has the same address.
            is_there && TcpStream::from(OwnedFd::from(bound)).peer_addr().is_err()
        }
        Protocol::Udp => UdpSocket::from(fd).local_addr().is_ok_and(|at| at == address),
    }
}

/// The words before a program that is to have the sockets, and then the other descriptors, from 3 on.
pub(crate) fn call(held: &Held, others: &[OwnedFd]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["call".into(), "--listen".into(), held.fds.len().to_string().into()];
    for fd in held.fds.iter().chain(others) {
        words.extend(["--fd".into(), fd.as_raw_fd().to_string().into()]);
    }
    words.push("--".into());
    words
}

/// Lets a child have them, or no longer.
pub(crate) fn inheritable(held: &Held, others: &[OwnedFd], on: bool) -> Result<(), Error> {
    held.fds.iter().chain(others).try_for_each(|fd| set_cloexec(fd, !on)).doing("pass descriptors on")
}

/// The process that was told to: puts descriptors in their places and becomes the program. Only it knows the pid that
/// sockets are meant for.
pub(crate) fn become_program(call: &Call) -> Result<ExitCode, Error> {
    let (program, arguments) = call.words.split_first().ok_or_else(|| Error::new("no program given"))?;
    let above = FIRST + i32::try_from(call.fds.len()).unwrap_or(i32::MAX - FIRST);
    let fds = call.fds.iter().map(|fd| dup_above(take_inherited(*fd)?, above)).collect::<Result<Vec<_>, _>>();
    for (fd, number) in fds.doing("take inherited descriptor")?.iter().zip(FIRST..) {
        dup2(fd, number).doing("put a descriptor in its place")?;
    }
    let mut command = Command::new(program);
    command.args(arguments);
    if call.listen > 0 {
        let pid = std::process::id().to_string();
        command.env("LISTEN_FDS", call.listen.to_string()).env("LISTEN_PID", pid);
    }
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    Err(error).at("run", Path::new(OsStr::from_bytes(program.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_named_whole_or_refused() {
        for good in ["http=tcp:0.0.0.0:80", "a-b_c.1=udp:127.0.0.1:53", "v6=tcp:[::1]:1"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "http",
            "=tcp:0.0.0.0:80",
            "a=sctp:0.0.0.0:1",
            "a=tcp:80",
            "a=tcp:0.0.0.0:70000",
            "a b=tcp:0.0.0.0:1",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_accepted_connection_is_not_taken_for_its_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = format!("a=tcp:{}@1", listener.local_addr().unwrap());
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(is_that(&listener.into(), &name));
        assert!(!is_that(&accepted.into(), &name));
    }
}
