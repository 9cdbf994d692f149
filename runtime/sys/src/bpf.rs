//! Device filters of cgroup v2: an eBPF program attached to the directory.

use crate::{check, check_fd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// One eBPF instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    pub code: u8,
    /// Destination register in the low, source register in the high four bits.
    pub regs: u8,
    pub off: i16,
    pub imm: i32,
}

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_DETACH: i32 = 9;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_PROG_QUERY: i32 = 16;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

#[repr(C, align(8))]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C, align(8))]
#[derive(Default)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

#[repr(C, align(8))]
#[derive(Default)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    reserved: u32,
}

#[repr(C, align(8))]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
    reserved: u32,
}

fn bpf<T>(cmd: i32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: attr is one of the structures above, of the size given; pointers inside live for the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, cmd, &raw mut *attr, size_of::<T>()) })
}

/// Loads a program of type `cgroup/dev`.
pub fn load_device_filter(insns: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: insns.len() as u32,
        insns: insns.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Default::default()
    };
    check_fd(bpf(BPF_PROG_LOAD, &mut attr)?)
}

/// Attaches a filter to a cgroup and removes those that were there before.
pub fn replace_device_filter(cgroup: impl AsFd, filter: impl AsFd) -> io::Result<()> {
    let target = cgroup.as_fd().as_raw_fd() as u32;
    let mut ids = [0u32; 64];
    let mut query = QueryAttr {
        target_fd: target,
        attach_type: BPF_CGROUP_DEVICE,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: ids.len() as u32,
        ..Default::default()
    };
    let old = match bpf(BPF_PROG_QUERY, &mut query) {
        Ok(_) => query.prog_cnt as usize,
        Err(_) => 0,
    };
    let mut attach = AttachAttr {
        target_fd: target,
        attach_bpf_fd: filter.as_fd().as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &mut attach)?;
    for id in ids.iter().take(old) {
        let mut by_id = IdAttr { id: *id, ..Default::default() };
        let program = check_fd(bpf(BPF_PROG_GET_FD_BY_ID, &mut by_id)?)?;
        let mut detach = AttachAttr {
            target_fd: target,
            attach_bpf_fd: program.as_raw_fd() as u32,
            attach_type: BPF_CGROUP_DEVICE,
            attach_flags: 0,
        };
        bpf(BPF_PROG_DETACH, &mut detach)?;
    }
    Ok(())
}
