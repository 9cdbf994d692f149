//! Unix sockets and passing of descriptors.

use crate::{check, check_fd, file};
use std::ffi::{CStr, CString};
use std::io::{self, IoSlice};
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// A connected pair of `SOCK_SEQPACKET` sockets, close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: fds has room for two numbers.
    check(i64::from(unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    }))?;
    Ok((check_fd(i64::from(fds[0]))?, check_fd(i64::from(fds[1]))?))
}

fn address(path: &[u8]) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all-zero is a valid address structure.
    let mut addr: libc::sockaddr_un = unsafe { zeroed() };
    addr.sun_family = libc::AF_UNIX as u16;
    if path.len() >= addr.sun_path.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in addr.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    Ok(addr)
}

fn in_dir(dir: &OwnedFd, name: &CStr) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    path
}

fn socket(kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    check_fd(i64::from(unsafe { libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0) }))
}

/// Listens on `dir/name`. The path may be longer than a socket address: it goes through the descriptor.
pub fn listen_at(dir: &OwnedFd, name: &CStr, kind: i32) -> io::Result<OwnedFd> {
    let addr = address(&in_dir(dir, name))?;
    let fd = socket(kind)?;
    // SAFETY: addr is a valid address of the given size.
    check(i64::from(unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), size_of::<libc::sockaddr_un>() as u32)
    }))?;
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::listen(fd.as_raw_fd(), 8) }))?;
    Ok(fd)
}

/// Connects to `dir/name`.
pub fn connect_at(dir: &OwnedFd, name: &CStr, kind: i32) -> io::Result<OwnedFd> {
    connect_addr(&address(&in_dir(dir, name))?, kind)
}

/// Connects to a socket by path; long paths go through a descriptor of the directory.
pub fn connect(path: &Path, kind: i32) -> io::Result<OwnedFd> {
    let whole = file::c_path(path)?;
    if whole.as_bytes().len() < 100 {
        return connect_addr(&address(whole.as_bytes())?, kind);
    }
    let name = path.file_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = file::openat(file::cwd(), &file::c_path(parent)?, libc::O_PATH | libc::O_DIRECTORY, 0)?;
    let name: CString = file::c_path(name)?;
    connect_at(&dir, &name, kind)
}

fn connect_addr(addr: &libc::sockaddr_un, kind: i32) -> io::Result<OwnedFd> {
    let fd = socket(kind)?;
    // SAFETY: addr is a valid address of the given size.
    check(i64::from(unsafe {
        libc::connect(fd.as_raw_fd(), (&raw const *addr).cast(), size_of::<libc::sockaddr_un>() as u32)
    }))?;
    Ok(fd)
}

pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    loop {
        // SAFETY: the peer's address is not wanted.
        let ret = unsafe {
            libc::accept4(
                listener.as_fd().as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        match check_fd(i64::from(ret)) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => return other,
        }
    }
}

/// Sends one record; no signal when the peer is gone.
pub fn send(fd: impl AsFd, data: &[u8]) -> io::Result<()> {
    loop {
        // SAFETY: the buffer's length is given.
        let ret = unsafe {
            libc::send(fd.as_fd().as_raw_fd(), data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL)
        };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) if n as usize == data.len() => return Ok(()),
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::EMSGSIZE)),
        }
    }
}

/// Receives one record; 0 when the peer has closed.
pub fn recv(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer's length is given.
        let ret = unsafe { libc::recv(fd.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) => return Ok(n as usize),
        }
    }
}

/// The peer reads an end after what has been sent.
pub fn shut_down_writing(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), libc::SHUT_WR) }))?;
    Ok(())
}

#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends a record together with one descriptor.
pub fn send_fd(socket: impl AsFd, data: &[u8], fd: impl AsFd) -> io::Result<()> {
    send_parts_with_fd(socket, &[IoSlice::new(data)], fd)
}

/// As [`send_fd`]; the parts go as one record, which a stream waits for room for.
pub fn send_parts_with_fd(socket: impl AsFd, parts: &[IoSlice<'_>], fd: impl AsFd) -> io::Result<()> {
    let mut control = Control([0; 64]);
    // SAFETY: all-zero is a valid message header; its pointers are set below and live for the call.
    let mut msg: libc::msghdr = unsafe { zeroed() };
    // An `IoSlice` is an `iovec` by its documentation.
    msg.msg_iov = parts.as_ptr() as *mut _;
    msg.msg_iovlen = parts.len();
    msg.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: the control buffer has room for one descriptor (CMSG_SPACE(4) is 24 bytes).
    unsafe {
        msg.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&msg);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd.as_fd().as_raw_fd());
    }
    loop {
        // SAFETY: msg is complete.
        let ret = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &msg, libc::MSG_NOSIGNAL) };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) if n as usize == parts.iter().map(|p| p.len()).sum::<usize>() => return Ok(()),
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::EMSGSIZE)),
        }
    }
}

/// Receives a record and the descriptor that came with it.
pub fn recv_fd(socket: impl AsFd, data: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut msg = MaybeUninit::<libc::msghdr>::zeroed();
    // SAFETY: all-zero is a valid message header.
    let msg = unsafe { msg.assume_init_mut() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = control.0.len();
    let n = loop {
        // SAFETY: msg is complete and its buffers live for the call.
        let ret = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), msg, libc::MSG_CMSG_CLOEXEC) };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) => break n as usize,
        }
    };
    // SAFETY: the kernel has filled the control buffer up to msg_controllen; a SCM_RIGHTS header is followed by
    // descriptors that are now ours.
    let fd = unsafe {
        let header = libc::CMSG_FIRSTHDR(msg);
        if !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_RIGHTS
            && (*header).cmsg_len >= libc::CMSG_LEN(4) as usize
        {
            let raw = libc::CMSG_DATA(header).cast::<i32>().read_unaligned();
            Some(OwnedFd::from_raw_fd(raw))
        } else {
            None
        }
    };
    Ok((n, fd))
}

/// Process, user and group of the peer of a connected socket.
pub fn peer(fd: impl AsFd) -> io::Result<(i32, u32, u32)> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as u32;
    // SAFETY: cred is as large as len says.
    check(i64::from(unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &mut len,
        )
    }))?;
    Ok((cred.pid, cred.uid, cred.gid))
}

/// Sets the loopback interface of the current network namespace up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: plain numbers.
    let socket = check_fd(i64::from(unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    }))?;
    // SAFETY: all-zero is a valid request.
    let mut request: libc::ifreq = unsafe { zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: request lives for the call and names an interface.
    check(i64::from(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request)
    }))?;
    Ok(())
}
