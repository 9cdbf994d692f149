//! What a process monitor needs and std lacks: pidfds, `wait4`, inherited descriptors, buffers that can be given back.

use std::fs::File;
use std::io;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::process::{Cloned, clone, close_range, exit_now};

/// One reaped child.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    pub pid: i32,
    /// As `wait(2)` gives it: see [`Status`].
    pub status: i32,
    pub user_us: u64,
    pub system_us: u64,
    pub max_rss_kb: u64,
}

/// A decoded wait status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Exited(i32),
    Signaled { signal: i32, core: bool },
}

impl Status {
    /// `None` for a stop or continue, which are not ends.
    pub fn decode(raw: i32) -> Option<Status> {
        if libc::WIFEXITED(raw) {
            Some(Status::Exited(libc::WEXITSTATUS(raw)))
        } else if libc::WIFSIGNALED(raw) {
            Some(Status::Signaled { signal: libc::WTERMSIG(raw), core: libc::WCOREDUMP(raw) })
        } else {
            None
        }
    }
}

/// Reaps `pid` (or any child for -1) if it has ended; never blocks. `None`: nothing to reap now.
/// `ECHILD` is an error: the caller has no such child.
pub fn reap(pid: i32) -> io::Result<Option<Reaped>> {
    let mut status = 0;
    // SAFETY: an all-zero rusage is a valid value of that plain C struct.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: both pointers are to live, writable locals of the right type.
    let got = unsafe { libc::wait4(pid, &mut status, libc::WNOHANG, &mut usage) };
    match got {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Reaped {
            pid,
            status,
            user_us: micros(usage.ru_utime),
            system_us: micros(usage.ru_stime),
            max_rss_kb: u64::try_from(usage.ru_maxrss).unwrap_or(0),
        })),
    }
}

fn micros(t: libc::timeval) -> u64 {
    u64::try_from(t.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(t.tv_usec).unwrap_or(0)
}

/// `struct pidfd_info` of `linux/pidfd.h` as of 6.15; the kernel copies only as much as it knows.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    ids: [u32; 11],
    exit_code: i32,
    coredump_mask: u32,
    coredump_signal: u32,
}

const PIDFD_INFO_EXIT: u64 = 1 << 3;
/// `_IOWR(0xFF, 11, struct pidfd_info)`.
const PIDFD_GET_INFO: libc::c_ulong =
    (3 << 30) | ((mem::size_of::<PidfdInfo>() as libc::c_ulong) << 16) | (0xFF << 8) | 11;

/// Wait status of the process behind `pidfd`, for those who are not its parent.
///
/// `Ok(None)`: it has not been reaped by its parent yet. `ENOTTY` and `EINVAL` come from kernels before 6.15, which
/// keep no exit information; `ESRCH` from those that had none by the time the process was gone.
pub fn pidfd_exit_status(pidfd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the request encodes the size of `info`, which is live and writable for the call.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &mut info) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok((info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code))
}

/// Makes the kernel send SIGKILL to the spawned process when the thread that spawns it ends.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    let hook = move || {
        // SAFETY: prctl with integers; async-signal-safe.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the line above took effect.
        // SAFETY: getppid has no preconditions; async-signal-safe.
        if u32::try_from(unsafe { libc::getppid() }) != Ok(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the hook makes two async-signal-safe calls and allocates nothing.
    unsafe { command.pre_exec(hook) }
}

/// Lets the spawned process have these descriptors, by the numbers that they have here; nobody else who is spawned
/// meanwhile gets them.
pub fn give(command: &mut Command, fds: Vec<OwnedFd>) -> &mut Command {
    let hook = move || {
        for fd in &fds {
            // SAFETY: fcntl with integers, of the child's own copy of the descriptor; async-signal-safe.
            if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the hook makes async-signal-safe calls and allocates nothing.
    unsafe { command.pre_exec(hook) }
}

/// A second process with a copy of this one's memory and `kept` for its only descriptor, which has the number of standard
/// error. It does `main` and ends. Returns its number.
pub fn spawn_helper(kept: OwnedFd, main: impl FnOnce(BorrowedFd<'_>) -> i32) -> io::Result<i32> {
    fork(0, || {
        // SAFETY: plain numbers. Whoever owns what is closed or replaced is in frames that this process never returns to.
        let alone = unsafe {
            match libc::dup3(kept.as_raw_fd(), libc::STDERR_FILENO, libc::O_CLOEXEC) {
                -1 => Err(io::Error::last_os_error()),
                _ => close_range(0, 1).and_then(|()| close_range(3, u32::MAX)),
            }
        };
        // Its number is closed, and may be another descriptor's soon.
        mem::forget(kept);
        // SAFETY: it was opened above, and nothing of this process closes it.
        alone.map_or(1, |()| main(unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) }))
    })
}

/// As `fork`, but the new process is a child of this one's parent. It does `main`, to execute a program most likely.
pub fn spawn_sibling(main: impl FnOnce() -> i32) -> io::Result<i32> {
    fork(libc::CLONE_PARENT as u64, main)
}

fn fork(flags: u64, main: impl FnOnce() -> i32) -> io::Result<i32> {
    // Field 20, of those that follow the parenthesis of the program's name from 3 on.
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let threads = stat.rsplit(')').next().and_then(|fields| fields.split_ascii_whitespace().nth(20 - 3));
    if threads != Some("1") {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // SAFETY: there is one thread (checked), so the copy has no lock that nobody gives back.
    match unsafe { clone(flags, None) }? {
        Cloned::Parent { pid, .. } => Ok(pid),
        Cloned::Child => exit_now(main()),
    }
}

/// Descriptors below this can be claimed. A process that re-executes itself passes a handful of small ones; one that holds
/// what others left open for it has a descriptor for each published port of a container.
pub const CLAIMABLE: RawFd = 4096;
static CLAIMED: [AtomicU64; CLAIMABLE as usize / 64] = [const { AtomicU64::new(0) }; CLAIMABLE as usize / 64];

/// Takes ownership of a descriptor that came through `execve`, and sets close-on-exec on it again.
///
/// Each number can be taken once, standard streams never: two owners of one descriptor cannot come from here. To be
/// called first thing in `main`, before anything else opens files.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    if !(3..CLAIMABLE).contains(&fd) {
        return Err(invalid());
    }
    let (word, bit) = (fd as usize / 64, 1u64 << (fd % 64));
    if CLAIMED[word].fetch_or(bit, Ordering::Relaxed) & bit != 0 {
        return Err(invalid());
    }
    // SAFETY: F_SETFD takes an integer; a bad number gives EBADF.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open (checked above) and was claimed by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Moves a descriptor to the number of standard output or error, which is replaced. It is closed by `execve`, and a program
/// of std then finds `/dev/null` there.
///
/// Only for what nothing harmful can be written to: std, its panics and the C library write to these numbers. Each number
/// can be taken once.
pub fn move_to_standard(fd: OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    claim_standard(number)?;
    // SAFETY: plain numbers; std does not own what it replaces.
    if unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened, and was claimed by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes ownership of what came through `execve` under the number of standard output or error, and closes it at the next.
pub fn take_standard(number: RawFd) -> io::Result<OwnedFd> {
    claim_standard(number)?;
    // SAFETY: F_SETFD takes an integer; a bad number gives EBADF.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open (checked above) and was claimed by nobody else; std does not own it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn claim_standard(number: RawFd) -> io::Result<()> {
    let is_free = (libc::STDOUT_FILENO..=libc::STDERR_FILENO).contains(&number)
        && CLAIMED[0].fetch_or(1 << number, Ordering::Relaxed) & (1 << number) == 0;
    is_free.then_some(()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Puts `/dev/null` in place of the three standard streams.
pub fn null_standard_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for target in 0..3 {
        // SAFETY: both numbers are valid; what was at `target` is closed by the kernel, std does not own it.
        if unsafe { libc::dup2(null.as_raw_fd(), target) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Eight numbers in a file, mapped shared: each store is on file at once, whatever happens to the process.
pub struct SharedCells {
    start: ptr::NonNull<AtomicU64>,
}

impl SharedCells {
    pub const LEN: usize = 8;

    /// The file is given the needed size.
    pub fn map(file: &File) -> io::Result<SharedCells> {
        let len = Self::LEN * size_of::<AtomicU64>();
        if file.metadata()?.len() < len as u64 {
            file.set_len(len as u64)?;
        }
        // SAFETY: a fresh mapping at an address the kernel picks.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(SharedCells { start })
    }
}

impl Deref for SharedCells {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is that long, page-aligned, lives as long as self, and is only reached as atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), Self::LEN) }
    }
}

impl Drop for SharedCells {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; no reference outlives self.
        unsafe { libc::munmap(self.start.as_ptr().cast(), Self::LEN * size_of::<AtomicU64>()) };
    }
}

/// Duplicates up to `len` bytes that wait in one pipe into another, without taking them out: `tee(2)`, never waiting.
/// 0: the source is at its end. `WouldBlock`: it is empty.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    // SAFETY: plain numbers.
    let got = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), len, libc::SPLICE_F_NONBLOCK) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Moves up to `len` bytes from a pipe to a file, or the other way round: `splice(2)`, never waiting on the pipe.
pub fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    // SAFETY: plain numbers; null offsets mean the files' own.
    let got = unsafe {
        libc::splice(
            from.as_raw_fd(),
            ptr::null_mut(),
            to.as_raw_fd(),
            ptr::null_mut(),
            len,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Gives back the memory of a program that is about to sleep for long: its code, which is read in again page by page as
/// it is used, and the part of the stack below the current frame.
///
/// The kernel maps code generously ahead; of a megabyte of that a sleeping program uses a few pages.
pub fn shed_memory() {
    // SAFETY: the callback only reads what it is given, and its data pointer is not used.
    unsafe { libc::dl_iterate_phdr(Some(shed_segments), ptr::null_mut()) };
    shed_stack();
}

/// Inlined, the caller's frame is its own: only the register tells where the part in use ends. The address of a local
/// variable may be kilobytes above it.
#[inline(always)]
fn shed_stack() {
    // Far enough below this frame for the call of madvise itself.
    const MARGIN: usize = 2 << 10;
    const DEPTH: usize = 256 << 10;
    const PAGE: usize = 4096;
    let top = stack_pointer().saturating_sub(MARGIN) & !(PAGE - 1);
    let bottom = top.saturating_sub(DEPTH);
    // SAFETY: nothing below the stack pointer and its red zone is in use by this thread, and a single-threaded program
    // has nothing else right below its stack: a gap is kept there. Unmapped pages in the range only give ENOMEM.
    unsafe { libc::madvise(bottom as *mut _, top - bottom, libc::MADV_DONTNEED) };
}

#[inline(always)]
fn stack_pointer() -> usize {
    let pointer: usize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: copies a register.
    unsafe {
        std::arch::asm!("mov {}, rsp", out(reg) pointer, options(nomem, nostack, preserves_flags));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: copies a register.
    unsafe {
        std::arch::asm!("mov {}, sp", out(reg) pointer, options(nomem, nostack, preserves_flags));
    }
    pointer
}

/// Drops the pages of the read-only segments: private, never written, so the file has the same contents.
unsafe extern "C" fn shed_segments(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut libc::c_void,
) -> i32 {
    const PAGE: usize = 4096;
    // SAFETY: the caller is dl_iterate_phdr, which passes a valid record with `dlpi_phnum` program headers.
    let (base, headers) = unsafe {
        let info = &*info;
        (info.dlpi_addr as usize, std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)))
    };
    for header in headers {
        let writable = header.p_flags & libc::PF_W != 0;
        if header.p_type != libc::PT_LOAD || writable {
            continue;
        }
        let start = base + header.p_vaddr as usize;
        let end = (start + header.p_filesz as usize) & !(PAGE - 1);
        let start = start.next_multiple_of(PAGE);
        if start < end {
            // SAFETY: the range lies within a private, never written mapping of the program's file. What is needed of
            // it, this very code included, is mapped again from the file at the next touch.
            unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_DONTNEED) };
        }
    }
    0
}

/// Standard input, once [`null_standard_streams`] has made it `/dev/null`.
pub fn null_stream() -> BorrowedFd<'static> {
    // SAFETY: nobody owns descriptor 0, so nobody closes it; `take_inherited` refuses it too.
    unsafe { BorrowedFd::borrow_raw(0) }
}

/// Anonymous memory that takes no page until touched, and gives its pages back on request.
pub struct Buffer {
    start: ptr::NonNull<u8>,
    len: usize,
}

impl Buffer {
    pub fn new(len: usize) -> io::Result<Buffer> {
        // SAFETY: a fresh anonymous mapping at an address the kernel picks.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Buffer { start, len })
    }

    /// Gives the pages back; the contents are zero afterwards.
    pub fn discard(&mut self) {
        // SAFETY: the range is exactly our private anonymous mapping. A failure only keeps the memory.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `len` readable bytes, initialised (zero) by the kernel, and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, writable, and the borrow of self is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; no reference outlives self.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{pidfd_open, pidfd_send_signal};
    use std::os::fd::{AsFd, IntoRawFd};
    use std::time::{Duration, Instant};

    #[test]
    fn wait_status_is_decoded() {
        assert_eq!(Status::decode(0x2a00), Some(Status::Exited(42)));
        let killed = Status::Signaled { signal: 9, core: false };
        assert_eq!(Status::decode(0x09), Some(killed));
        let dumped = Status::Signaled { signal: 11, core: true };
        assert_eq!(Status::decode(0x8b), Some(dumped));
        assert_eq!(Status::decode(0x137f), None);
    }

    #[test]
    fn child_is_reaped_with_its_usage_and_its_pidfd_still_tells_the_status() {
        #[expect(clippy::zombie_processes, reason = "reaped by the function under test")]
        let child = Command::new("/bin/sh").args(["-c", "exit 7"]).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let pidfd = pidfd_open(pid).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let reaped = loop {
            if let Some(reaped) = reap(pid).unwrap() {
                break reaped;
            }
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        };
        assert_eq!(Status::decode(reaped.status), Some(Status::Exited(7)));
        assert!(reaped.max_rss_kb > 0);
        match pidfd_exit_status(pidfd.as_fd()) {
            Ok(status) => assert_eq!(status, Some(7 << 8)),
            Err(e) => eprintln!("skipped: this kernel keeps no exit status in a pidfd: {e}"),
        }
        assert!(pidfd_send_signal(&pidfd, 0).is_err());
    }

    #[test]
    fn a_descriptor_is_taken_once() {
        let fd = File::open("/dev/null").unwrap();
        let number = fd.into_raw_fd();
        let taken = take_inherited(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(take_inherited(number).is_err());
        assert!(take_inherited(1).is_err());
        assert!(take_inherited(-1).is_err());
    }

    #[test]
    fn cells_are_in_the_file_and_pipes_are_read_without_taking() {
        let path = std::env::temp_dir().join(format!("keel-cells-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let cells = SharedCells::map(&file).unwrap();
        cells[1].store(0x0102, Ordering::Release);
        drop(cells);
        assert_eq!(std::fs::read(&path).unwrap()[8..10], [2, 1]);
        std::fs::remove_file(&path).unwrap();

        let (reader, writer) = crate::file::pipe().unwrap();
        let (copy, copy_writer) = crate::file::pipe().unwrap();
        crate::file::write_once(&writer, b"hello").unwrap();
        assert_eq!(tee(reader.as_fd(), copy_writer.as_fd(), 100).unwrap(), 5);
        let mut buffer = [0; 8];
        assert_eq!(crate::file::read(&copy, &mut buffer).unwrap(), 5);
        let null = File::options().write(true).open("/dev/null").unwrap();
        assert_eq!(splice(reader.as_fd(), null.as_fd(), 4).unwrap(), 4);
        assert_eq!(crate::file::read(&reader, &mut buffer).unwrap(), 1);
        assert_eq!(buffer[0], b'o');
        let empty = tee(reader.as_fd(), copy_writer.as_fd(), 100).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(writer);
        // A child that another test is just forking has the writing end until it executes its program.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let end = loop {
            match tee(reader.as_fd(), copy_writer.as_fd(), 100) {
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && std::time::Instant::now() < deadline =>
                {
                    std::thread::yield_now();
                }
                end => break end,
            }
        };
        assert_eq!(end.unwrap(), 0);
    }

    #[test]
    fn a_program_works_on_after_shedding_its_memory() {
        // The stack part is left out: what is below a test thread's stack may be another thread's.
        // SAFETY: as in `shed_memory`.
        unsafe { libc::dl_iterate_phdr(Some(shed_segments), ptr::null_mut()) };
        assert_eq!(format!("{:?}", vec![1, 2, 3]), "[1, 2, 3]");
    }

    #[test]
    fn the_stack_in_use_stays_whatever_the_size_and_place_of_the_frame() {
        /// Each level lies elsewhere in its page, the large variable above or below the small ones.
        #[inline(never)]
        fn level(left: u8) {
            let mut filled = [left; 3 << 10];
            std::hint::black_box(&mut filled);
            shed_stack();
            assert!(std::hint::black_box(&filled).iter().all(|byte| *byte == left));
            if left > 0 {
                level(left - 1);
            }
        }
        // Its own stack goes on below the deepest level for longer than is given back.
        let thread = std::thread::Builder::new().stack_size(4 << 20).spawn(|| level(200)).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn buffer_is_zero_after_discard() {
        let mut buffer = Buffer::new(8192).unwrap();
        buffer[5000] = 9;
        assert_eq!(buffer[5000], 9);
        buffer.discard();
        assert_eq!(buffer[5000], 0);
        assert_eq!(buffer.len(), 8192);
    }
}
