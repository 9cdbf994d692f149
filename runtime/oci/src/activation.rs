//! Readiness and socket activation as systemd speaks them (sd_notify(3), sd_listen_fds(3)), passed on between the
//! runtime's caller and the container.

use crate::error::{RuntimeError, io_error};
use crate::spec::{Mount, Spec};
use crate::state::ContainerDir;
use keel_sys::file;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

/// Where the container finds its socket.
const INSIDE: &str = "/run/notify";
const SOCKET: &str = "notify.sock";
/// The directory in the container's state that is bound there.
const DIRECTORY: &str = "notify";
/// sd_notify sends one small datagram; systemd itself reads no more than a page.
const MESSAGE_BYTES: usize = 4096;

/// Gives the container a socket of its own in place of the caller's.
pub(crate) fn prepare(spec: &mut Spec, dir: &Path) {
    spec.mounts.push(Mount {
        destination: INSIDE.to_owned(),
        kind: Some("bind".to_owned()),
        source: Some(dir.join(DIRECTORY).to_string_lossy().into_owned()),
        options: ["bind", "nosuid", "noexec", "nodev", "ro"].map(str::to_owned).to_vec(),
        ..Mount::default()
    });
    if let Some(process) = &mut spec.process {
        process.env.retain(|e| !e.starts_with("NOTIFY_SOCKET="));
        process.env.push(format!("NOTIFY_SOCKET={INSIDE}/{SOCKET}"));
    }
}

/// The directory for the socket, which the start makes. `reachable`: the container's root is another user.
pub(crate) fn make_directory(dir: &ContainerDir, reachable: bool) -> Result<(), RuntimeError> {
    let path = dir.file(DIRECTORY);
    fs::create_dir(&path).map_err(io_error("create", &path))?;
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_error("set the mode of", path))
    };
    mode(&path, 0o755)?;
    // The files beside it are for the owner alone.
    if reachable { mode(&dir.path, 0o711) } else { Ok(()) }
}

/// The container's socket and where its messages go.
pub struct Notify {
    socket: UnixDatagram,
    host: PathBuf,
    pid: i32,
}

impl Notify {
    /// `None` when the container was not made for it.
    pub(crate) fn bind(dir: &ContainerDir, host: &Path, pid: i32) -> Result<Option<Notify>, RuntimeError> {
        let path = dir.file(DIRECTORY);
        if !path.is_dir() {
            return Ok(None);
        }
        let c_path = file::c_path(&path).map_err(io_error("open", &path))?;
        let fd = file::openat(file::cwd(), &c_path, libc::O_PATH | libc::O_DIRECTORY, 0)
            .map_err(io_error("open", &path))?;
        // Through the descriptor: the path may be longer than a socket address.
        let short = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", fd.as_raw_fd()));
        let socket = UnixDatagram::bind(&short).map_err(io_error("bind", path.join(SOCKET)))?;
        // Whoever the container's user is may speak.
        fs::set_permissions(&short, fs::Permissions::from_mode(0o777))
            .map_err(io_error("set the mode of", path.join(SOCKET)))?;
        socket.set_nonblocking(true).map_err(io_error("set up", path.join(SOCKET)))?;
        Ok(Some(Notify { socket, host: host.to_owned(), pid }))
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Passes everything on that has come; true when the container has said that it is ready.
    pub(crate) fn pass_on(&self) -> bool {
        let mut buffer = [0u8; MESSAGE_BYTES];
        let mut ready = false;
        while let Ok(n) = self.socket.recv(&mut buffer) {
            let message = &buffer[..n];
            if message.split(|b| *b == b'\n').any(|line| line == b"READY=1") {
                ready = true;
                // Messages come from this process, but the service is the container.
                self.send(&[format!("MAINPID={}\n", self.pid).as_bytes(), message].concat());
            } else {
                self.send(message);
            }
        }
        ready
    }

    /// A manager that does not listen is no reason to fail the container.
    fn send(&self, message: &[u8]) {
        let address = match self.host.as_os_str().as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&self.host),
        };
        if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
            let _ = socket.send_to_addr(message, &address);
        }
    }

    /// Until the container is ready or has ended.
    pub(crate) fn wait_ready(&self, init: impl AsFd) -> Result<(), RuntimeError> {
        loop {
            let sources = [Some(self.as_fd()), Some(init.as_fd())];
            let [spoken, ended] = file::poll_readable(&sources)
                .map_err(|source| RuntimeError::Sys { what: "wait for the container to be ready", source })?;
            if (spoken && self.pass_on()) || ended {
                return Ok(());
            }
        }
    }
}
