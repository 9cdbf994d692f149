//! Message sockets in the file system (`AF_UNIX`, `SOCK_SEQPACKET`), whose directory may have a path of any length.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr;
use std::time::Duration;

/// Descriptors that one message may carry.
pub const MAX_FDS: usize = 8;

/// Binds `dir/name` and listens; non-blocking. An old socket of that name is replaced.
pub fn listen(dir: &Path, name: &str, backlog: i32) -> io::Result<OwnedFd> {
    listen_kind(dir, name, backlog, libc::SOCK_SEQPACKET)
}

/// As [`listen`], for a byte stream.
pub fn listen_stream(dir: &Path, name: &str, backlog: i32) -> io::Result<OwnedFd> {
    listen_kind(dir, name, backlog, libc::SOCK_STREAM)
}

fn listen_kind(dir: &Path, name: &str, backlog: i32, kind: i32) -> io::Result<OwnedFd> {
    match std::fs::remove_file(dir.join(name)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let socket = new_socket(kind | libc::SOCK_NONBLOCK)?;
    let place = Place::new(dir, name)?;
    // SAFETY: the address and its length come from `Place` and are live for the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), place.as_ptr(), place.len) })?;
    // SAFETY: takes integers.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(socket)
}

/// Connects to `dir/name`; blocking, bounded by `timeout` for this and every later send and receive.
pub fn connect(dir: &Path, name: &str, timeout: Option<Duration>) -> io::Result<OwnedFd> {
    let socket = new_socket(libc::SOCK_SEQPACKET)?;
    set_timeout(&socket, libc::SO_SNDTIMEO, timeout)?;
    set_timeout(&socket, libc::SO_RCVTIMEO, timeout)?;
    let place = Place::new(dir, name)?;
    // SAFETY: the address and its length come from `Place` and are live for the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), place.as_ptr(), place.len) })?;
    Ok(socket)
}

/// A connected, blocking pair.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    check(unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    })?;
    // SAFETY: the kernel just gave us both; nobody else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// How long later receives on a blocking socket may wait; `None` for ever.
pub fn set_receive_timeout(socket: &OwnedFd, timeout: Option<Duration>) -> io::Result<()> {
    set_timeout(socket, libc::SO_RCVTIMEO, timeout)
}

fn set_timeout(socket: &OwnedFd, option: i32, timeout: Option<Duration>) -> io::Result<()> {
    // Zero means "for ever" to the kernel, so a tiny timeout is rounded up instead.
    let micros = timeout.map_or(0, |t| t.as_micros().max(1));
    let value = libc::timeval {
        tv_sec: (micros / 1_000_000).try_into().unwrap_or(i64::MAX),
        tv_usec: (micros % 1_000_000) as libc::suseconds_t,
    };
    // SAFETY: passes the address and the size of a live timeval.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            mem::size_of::<libc::timeval>() as libc::socklen_t,
        )
    })
}

/// Accepts one connection; the new socket is non-blocking. `WouldBlock` when there is none.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: null addresses ask for none.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            ptr::null_mut(),
            ptr::null_mut(),
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        )
    };
    check(fd)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The user who connected, as the kernel recorded it then.
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: passes the address and the size of a live ucred.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut len,
        )
    })?;
    Ok(peer.uid)
}

/// Sends one message made of two parts; never raises SIGPIPE. All or nothing, as the socket type promises.
pub fn send(socket: BorrowedFd<'_>, head: &[u8], body: &[u8]) -> io::Result<()> {
    send_fds(socket, head, body, &[])
}

/// As [`send`], with up to [`MAX_FDS`] descriptors, which the receiver gets copies of.
pub fn send_fds(socket: BorrowedFd<'_>, head: &[u8], body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut parts = [io_slice(head), io_slice(body)];
    let mut control = Control::default();
    let mut header = message_header(&mut parts);
    if !fds.is_empty() {
        let bytes = mem::size_of_val(fds) as u32;
        header.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: pure arithmetic.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: the control buffer is aligned and large enough for MAX_FDS, so the first header lies within it
        // and its data has room for the descriptors.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(bytes) as _;
            let data: *mut RawFd = libc::CMSG_DATA(first).cast();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    // SAFETY: every pointer in the header is to a live local or argument.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
    if sent == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// One received message.
#[derive(Debug)]
pub struct Received {
    /// 0: the peer has closed.
    pub len: usize,
    pub fds: Vec<OwnedFd>,
}

/// Receives one message. A message that does not fit is an `InvalidData` error: it is never cut silently.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut parts = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    let mut control = Control::default();
    let mut header = message_header(&mut parts);
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = mem::size_of::<Control>() as _;
    // SAFETY: every pointer in the header is to a live local or argument with the stated size.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
    let Ok(len) = usize::try_from(len) else {
        return Err(io::Error::last_os_error());
    };
    let fds = received_fds(&header);
    if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Received { len, fds })
}

fn received_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel filled the control buffer that the header points to; the walk stays within it, and each
    // descriptor in an SCM_RIGHTS record was given to us just now.
    unsafe {
        let mut record = libc::CMSG_FIRSTHDR(header);
        while !record.is_null() {
            if (*record).cmsg_level == libc::SOL_SOCKET && (*record).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*record).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data: *const RawFd = libc::CMSG_DATA(record).cast();
                for i in 0..bytes / mem::size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            record = libc::CMSG_NXTHDR(header, record);
        }
    }
    fds
}

/// Room for one record of [`MAX_FDS`] descriptors, aligned as `cmsghdr` must be.
#[derive(Default)]
#[repr(C)]
struct Control([u64; 8]);

fn io_slice(part: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }
}

fn message_header(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: an all-zero msghdr is valid: no address, no parts, no control data.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = parts.as_mut_ptr();
    header.msg_iovlen = parts.len() as _;
    header
}

/// A socket address that reaches `dir/name` through `/proc/self/fd`, because `sun_path` holds only 108 bytes.
struct Place {
    address: libc::sockaddr_un,
    len: libc::socklen_t,
    _dir: File,
}

impl Place {
    fn new(dir: &Path, name: &str) -> io::Result<Place> {
        let dir = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir)?;
        let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
        // SAFETY: an all-zero sockaddr_un is valid.
        let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let bytes = Path::new(&path).as_os_str().as_bytes();
        if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        Ok(Place { address, len: mem::size_of::<libc::sockaddr_un>() as libc::socklen_t, _dir: dir })
    }

    fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const self.address).cast()
    }
}

fn new_socket(kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes integers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32) -> io::Result<()> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn messages_keep_their_bounds_and_carry_descriptors() {
        let (a, b) = pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        send(a.as_fd(), b"he", b"llo").unwrap();
        send_fds(a.as_fd(), b"x", b"", &[null.as_fd(), null.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let first = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..first.len], first.fds.len()), (&b"hello"[..], 0));
        let second = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((second.len, second.fds.len()), (1, 2));
        send(a.as_fd(), &[0; 17], b"").unwrap();
        let cut = receive(b.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap().len, 0);
    }

    #[test]
    fn a_directory_with_a_long_path_works() {
        let base = std::env::temp_dir().join(format!("keel-seq-{}", std::process::id()));
        let dir = base.join("d".repeat(120)).join("e".repeat(120));
        std::fs::create_dir_all(&dir).unwrap();
        let listener = listen(&dir, "ctl.sock", 4).unwrap();
        let client = connect(&dir, "ctl.sock", Some(Duration::from_secs(5))).unwrap();
        let server = accept(listener.as_fd()).unwrap();
        // SAFETY: no preconditions.
        let me = unsafe { libc::geteuid() };
        assert_eq!(peer_uid(server.as_fd()).unwrap(), me);
        send(client.as_fd(), b"ping", b"").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(receive(server.as_fd(), &mut buffer).unwrap().len, 4);
        std::fs::remove_dir_all(&base).unwrap();
    }
}
