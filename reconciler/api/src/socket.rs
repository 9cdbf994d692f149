//! Unix sockets at paths of any length, systemd's listeners, and who may talk to us.

use std::fs::{self, File, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::net::{TcpListener, UnixListener};

/// `sun_path` holds 108 bytes with the closing zero; a longer path goes through its directory's descriptor.
const MAX_SOCKET_PATH: usize = 107;

/// A listening socket that the server may take requests from.
#[derive(Debug)]
pub enum Listener {
    /// Peers are checked by their credentials: root and the daemon's own user.
    Unix(UnixListener),
    /// Loopback only. Peers are checked by the owner of their end of the connection.
    Tcp(TcpListener),
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("bind {}", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error("listen on {addr}")]
    Tcp { addr: SocketAddr, source: io::Error },
    #[error("{addr} is not a loopback address: the control API never listens on the network")]
    NotLoopback { addr: SocketAddr },
    #[error("socket {index} passed by the service manager")]
    Inherited { index: usize, source: io::Error },
}

impl Listener {
    /// Binds `path` with mode 0600 and replaces a stale socket there. The caller holds the lock of the run directory, so
    /// that a socket in the way is always stale. Must be called inside a tokio runtime.
    pub fn unix(path: &Path) -> Result<Listener, ListenError> {
        bind_private(path)
            .and_then(UnixListener::from_std)
            .map(Listener::Unix)
            .map_err(|source| ListenError::Bind { path: path.to_owned(), source })
    }

    pub async fn tcp(addr: SocketAddr) -> Result<Listener, ListenError> {
        if !addr.ip().is_loopback() {
            return Err(ListenError::NotLoopback { addr });
        }
        match TcpListener::bind(addr).await {
            Ok(listener) => Ok(Listener::Tcp(listener)),
            Err(source) => Err(ListenError::Tcp { addr, source }),
        }
    }

    /// Every stream socket that systemd passed (`LISTEN_FDS`). Empty when there are none or they were meant for another
    /// process. Call once, early: the descriptors are made close-on-exec here.
    pub fn inherited() -> Result<Vec<Listener>, ListenError> {
        let mut passed = ListenFd::from_env();
        (0..passed.len()).map(|index| take(&mut passed, index)).collect()
    }
}

fn take(passed: &mut ListenFd, index: usize) -> Result<Listener, ListenError> {
    let fail = |source| ListenError::Inherited { index, source };
    // Wrong family is an error of the first take, which leaves the descriptor for the second.
    if let Ok(Some(listener)) = passed.take_unix_listener(index) {
        private(&listener).map_err(fail)?;
        return UnixListener::from_std(listener).map(Listener::Unix).map_err(fail);
    }
    let listener = passed
        .take_tcp_listener(index)
        .map_err(fail)?
        .ok_or_else(|| fail(io::Error::from(io::ErrorKind::NotFound)))?;
    let addr = listener.local_addr().map_err(fail)?;
    if !addr.ip().is_loopback() {
        return Err(ListenError::NotLoopback { addr });
    }
    private(&listener).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    TcpListener::from_std(listener).map(Listener::Tcp).map_err(fail)
}

/// Containers must never inherit the daemon's listeners.
fn private(socket: &impl AsFd) -> io::Result<()> {
    fcntl(socket.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Binds beside the final name, then renames: no moment with a wider mode, none without a socket.
fn bind_private(path: &Path) -> io::Result<StdUnixListener> {
    let (directory, name) = split(path)?;
    let temporary = format!(".{}.new", name.to_string_lossy());
    let inside = format!("/proc/self/fd/{}", directory.as_raw_fd());
    let bound = Path::new(&inside).join(&temporary);
    match fs::remove_file(&bound) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = StdUnixListener::bind(&bound)?;
    fs::set_permissions(&bound, Permissions::from_mode(0o600))?;
    fs::rename(&bound, Path::new(&inside).join(name))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to a unix socket whose path may be longer than the kernel's address holds.
pub(crate) fn connect(path: &Path) -> io::Result<StdUnixStream> {
    if path.as_os_str().len() <= MAX_SOCKET_PATH {
        return StdUnixStream::connect(path);
    }
    let (directory, name) = split(path)?;
    StdUnixStream::connect(Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))
}

fn split(path: &Path) -> io::Result<(File, &std::ffi::OsStr)> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((File::open(parent)?, name))
}

/// Root, and whoever the daemon runs as. Everybody else could otherwise become root by starting a container.
pub(crate) fn may_control(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// Owner of the client's end of a loopback connection, read from the kernel's socket tables. `None`: not found, which is
/// how a client in another network namespace looks.
pub(crate) fn tcp_peer_uid(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    let table = if peer.is_ipv4() { "/proc/self/net/tcp" } else { "/proc/self/net/tcp6" };
    let text = fs::read_to_string(table).ok()?;
    find_uid(&text, &hex_address(peer), &hex_address(local))
}

/// The client's socket has our peer as its local address and us as the remote one.
fn find_uid(table: &str, client: &str, server: &str) -> Option<u32> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let matches = fields.next()? == client && fields.next()? == server;
        // st, queues, timer, retransmits, uid
        if matches { fields.nth(4)?.parse().ok() } else { None }
    })
}

/// As the kernel prints it: each 32-bit word of the address in host order, the port as a number.
fn hex_address(addr: SocketAddr) -> String {
    use std::fmt::Write;
    let octets: Vec<u8> = match addr.ip() {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut text = String::with_capacity(37);
    for word in octets.chunks_exact(4) {
        let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        let _ = write!(text, "{word:08X}");
    }
    let _ = write!(text, ":{:04X}", addr.port());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_addresses_print_as_the_kernel_does() {
        assert_eq!(hex_address("127.0.0.1:8080".parse().unwrap()), "0100007F:1F90");
        assert_eq!(hex_address("[::1]:22".parse().unwrap()), "00000000000000000000000001000000:0016");
    }

    #[test]
    fn the_owner_of_a_loopback_connection_is_found() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let uid = tcp_peer_uid(client.local_addr().unwrap(), client.peer_addr().unwrap());
        assert_eq!(uid, Some(nix::unistd::geteuid().as_raw()));
    }

    #[test]
    fn sockets_at_long_paths_bind_with_private_mode_and_replace_stale_ones() {
        let temp = tempfile::tempdir().unwrap();
        let directory = temp.path().join("d".repeat(120));
        fs::create_dir(&directory).unwrap();
        let path = directory.join("keel.sock");
        drop(bind_private(&path).unwrap());
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let _listener = bind_private(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        connect(&path).unwrap();
    }
}
