//! Pseudo terminals.

use crate::{check, check_fd};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Unlocks the other side of a master and opens it without a path, so that nothing in `/dev/pts` can stand in for it.
pub fn open_peer(master: impl AsFd) -> io::Result<OwnedFd> {
    let raw = master.as_fd().as_raw_fd();
    let unlock: i32 = 0;
    // SAFETY: the argument is a pointer to an int.
    check(i64::from(unsafe { libc::ioctl(raw, libc::TIOCSPTLCK, &raw const unlock) }))?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the argument is a number.
    check_fd(i64::from(unsafe { libc::ioctl(raw, libc::TIOCGPTPEER, flags) }))
}

/// Makes the terminal the controlling one of this session.
pub fn set_controlling(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(i64::from(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }))?;
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

pub fn set_size(fd: impl AsFd, size: Size) -> io::Result<()> {
    let ws = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the argument is a pointer to a winsize.
    check(i64::from(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const ws) }))?;
    Ok(())
}

pub fn size(fd: impl AsFd) -> io::Result<Size> {
    let mut ws = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the argument is a pointer to a winsize.
    check(i64::from(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut ws) }))?;
    Ok(Size { rows: ws.ws_row, columns: ws.ws_col })
}

/// The settings of a terminal, to be put back later.
pub struct Saved(libc::termios);

/// Switches a terminal to raw mode; the error for anything else is `ENOTTY`.
pub fn make_raw(fd: impl AsFd) -> io::Result<Saved> {
    let raw = fd.as_fd().as_raw_fd();
    let mut termios = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: termios is large enough.
    check(i64::from(unsafe { libc::tcgetattr(raw, termios.as_mut_ptr()) }))?;
    // SAFETY: the call succeeded, so termios is filled.
    let saved = unsafe { termios.assume_init() };
    let mut changed = saved;
    // SAFETY: changed is a complete structure.
    unsafe { libc::cfmakeraw(&mut changed) };
    // SAFETY: changed is a complete structure.
    check(i64::from(unsafe { libc::tcsetattr(raw, libc::TCSANOW, &changed) }))?;
    Ok(Saved(saved))
}

pub fn restore(fd: impl AsFd, saved: &Saved) -> io::Result<()> {
    // SAFETY: the structure came from tcgetattr.
    check(i64::from(unsafe { libc::tcsetattr(fd.as_fd().as_raw_fd(), libc::TCSANOW, &saved.0) }))?;
    Ok(())
}

/// Clears ONLCR, so that a terminal whose output is recorded does not grow carriage returns.
pub fn clear_onlcr(fd: impl AsFd) -> io::Result<()> {
    onlcr(fd, false)
}

/// Sets ONLCR: a terminal in raw mode that shows the output has no other way to the start of a line.
pub fn set_onlcr(fd: impl AsFd) -> io::Result<()> {
    onlcr(fd, true)
}

fn onlcr(fd: impl AsFd, on: bool) -> io::Result<()> {
    let raw = fd.as_fd().as_raw_fd();
    let mut termios = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: termios is large enough.
    check(i64::from(unsafe { libc::tcgetattr(raw, termios.as_mut_ptr()) }))?;
    // SAFETY: the call succeeded, so termios is filled.
    let mut termios = unsafe { termios.assume_init() };
    if on {
        termios.c_oflag |= libc::OPOST | libc::ONLCR;
    } else {
        termios.c_oflag &= !libc::ONLCR;
    }
    // SAFETY: a complete structure.
    check(i64::from(unsafe { libc::tcsetattr(raw, libc::TCSANOW, &termios) }))?;
    Ok(())
}
