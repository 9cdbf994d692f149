//! `linux.seccomp` compiled to a classic BPF program. Pure.
//!
//! Numbers with the same verdict are coalesced into ranges and found by binary search: the kernel runs the filter once
//! per system call number when it is loaded and on each call that its cache cannot answer, so length costs twice. A
//! name that no architecture knows is skipped, as profiles are written for many kernels.

mod table;

use crate::lower::{SpecError, invalid, unsupported};
use crate::spec::{Seccomp, Syscall, SyscallArg};
use keel_sys::seccomp::{FLAG_LOG, FLAG_NEW_LISTENER, FLAG_SPEC_ALLOW, FLAG_WAIT_KILLABLE_RECV, Insn};
use std::collections::BTreeMap;
use table::{NONE, SYSCALLS, X32_ONLY, X86_64_ONLY};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub program: Vec<Insn>,
    pub flags: u32,
}

pub(crate) const RET_KILL_PROCESS: u32 = 0x8000_0000;
pub(crate) const RET_KILL_THREAD: u32 = 0;
pub(crate) const RET_TRAP: u32 = 0x0003_0000;
pub(crate) const RET_ERRNO: u32 = 0x0005_0000;
pub(crate) const RET_NOTIFY: u32 = 0x7fc0_0000;
pub(crate) const RET_TRACE: u32 = 0x7ff0_0000;
pub(crate) const RET_LOG: u32 = 0x7ffc_0000;
pub(crate) const RET_ALLOW: u32 = 0x7fff_0000;

/// The bit that marks a call of the x32 interface.
const X32_BIT: u32 = 0x4000_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arch {
    X86_64,
    X86,
    X32,
    Aarch64,
}

impl Arch {
    fn native() -> Arch {
        if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 }
    }

    /// `None` for an architecture of another family: its calls cannot occur on this machine.
    fn parse(name: &str) -> Option<Arch> {
        let arch = match name {
            "SCMP_ARCH_X86_64" => Arch::X86_64,
            "SCMP_ARCH_X86" => Arch::X86,
            "SCMP_ARCH_X32" => Arch::X32,
            "SCMP_ARCH_AARCH64" => Arch::Aarch64,
            "SCMP_ARCH_NATIVE" => Arch::native(),
            _ => return None,
        };
        let foreign = (arch == Arch::Aarch64) != (Arch::native() == Arch::Aarch64);
        (!foreign).then_some(arch)
    }

    fn audit(self) -> u32 {
        match self {
            Arch::X86_64 | Arch::X32 => 0xc000_003e,
            Arch::X86 => 0x4000_0003,
            Arch::Aarch64 => 0xc000_00b7,
        }
    }

    fn number(self, name: &str) -> Option<u32> {
        if self == Arch::X32 {
            if X86_64_ONLY.contains(&name) {
                return None;
            }
            if let Ok(row) = X32_ONLY.binary_search_by(|(n, _)| (*n).cmp(name)) {
                return Some(u32::from(X32_ONLY[row].1) | X32_BIT);
            }
        }
        let row = SYSCALLS.binary_search_by(|(n, _)| (*n).cmp(name)).ok()?;
        let numbers = SYSCALLS[row].1;
        let number = match self {
            Arch::X86_64 | Arch::X32 => numbers[0],
            Arch::X86 => numbers[1],
            Arch::Aarch64 => numbers[2],
        };
        let bit = if self == Arch::X32 { X32_BIT } else { 0 };
        (number != NONE).then_some(u32::from(number) | bit)
    }
}

/// What a number leads to.
#[derive(Clone, PartialEq, Eq)]
enum Verdict {
    Return(u32),
    /// Conditions in order, each with its action; the default when none holds.
    Conditional(Vec<Rule>),
}

#[derive(Clone, PartialEq, Eq)]
struct Rule {
    conditions: Vec<Condition>,
    action: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Condition {
    argument: u32,
    op: Compare,
    value: u64,
    second: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compare {
    Ne,
    Lt,
    Le,
    Eq,
    Ge,
    Gt,
    MaskedEq,
}

pub fn compile(spec: &Seccomp) -> Result<Filter, SpecError> {
    let default = action("linux.seccomp.defaultAction", &spec.default_action, spec.default_errno_ret)?;
    if default == RET_NOTIFY {
        let why = "the listener would be asked before there is one";
        return Err(unsupported("linux.seccomp.defaultAction SCMP_ACT_NOTIFY", why));
    }
    let mut archs = vec![Arch::native()];
    for name in &spec.architectures {
        if !name.starts_with("SCMP_ARCH_") {
            return Err(invalid("linux.seccomp.architectures", format!("unknown architecture {name:?}")));
        }
        archs.extend(Arch::parse(name).filter(|a| !archs.contains(a)));
    }
    let rules = spec.syscalls.iter().map(parse_rules).collect::<Result<Vec<_>, _>>()?;
    let mut flags = parse_flags(spec)?;
    if uses_notify(spec) {
        if spec.listener_path.as_deref().unwrap_or("").is_empty() {
            return Err(invalid("linux.seccomp.listenerPath", "is needed for SCMP_ACT_NOTIFY"));
        }
        let notified = spec.syscalls.iter().filter(|s| s.action == "SCMP_ACT_NOTIFY");
        if notified.flat_map(|s| &s.names).any(|name| name == "sendmsg") {
            return Err(unsupported(
                "linux.seccomp: SCMP_ACT_NOTIFY for sendmsg",
                "the listener is sent by it",
            ));
        }
        flags |= FLAG_NEW_LISTENER;
    }
    let section = |arch: Arch| {
        let mut map = BTreeMap::new();
        for (call, rules) in spec.syscalls.iter().zip(&rules) {
            for number in call.names.iter().filter_map(|n| arch.number(n)) {
                add(&mut map, number, rules);
            }
        }
        search_tree(&ranges(&map, default, arch), default)
    };
    Ok(Filter { program: assemble(&archs, section), flags })
}

fn parse_flags(spec: &Seccomp) -> Result<u32, SpecError> {
    // What the filter costs without it, on kernels that then switch off speculation, nobody has asked for.
    let Some(words) = &spec.flags else { return Ok(FLAG_SPEC_ALLOW) };
    let mut flags = 0;
    for flag in words {
        flags |= match flag.as_str() {
            // One thread: there is nobody to synchronise with.
            "SECCOMP_FILTER_FLAG_TSYNC" => 0,
            "SECCOMP_FILTER_FLAG_LOG" => FLAG_LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => FLAG_SPEC_ALLOW,
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => FLAG_WAIT_KILLABLE_RECV,
            other => return Err(unsupported(format!("linux.seccomp.flags {other:?}"), "unknown flag")),
        };
    }
    Ok(flags)
}

fn uses_notify(spec: &Seccomp) -> bool {
    spec.syscalls.iter().any(|s| s.action == "SCMP_ACT_NOTIFY" && !s.names.is_empty())
}

fn action(field: &str, name: &str, errno: Option<u32>) -> Result<u32, SpecError> {
    const EPERM: u32 = 1;
    let data = errno.unwrap_or(EPERM);
    if data > 0xffff {
        return Err(invalid(field, format!("errno {data} is out of range")));
    }
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => RET_TRAP,
        "SCMP_ACT_ERRNO" => RET_ERRNO | data,
        "SCMP_ACT_TRACE" => RET_TRACE | data,
        "SCMP_ACT_ALLOW" => RET_ALLOW,
        "SCMP_ACT_LOG" => RET_LOG,
        "SCMP_ACT_NOTIFY" => RET_NOTIFY,
        other => return Err(invalid(field, format!("unknown action {other:?}"))),
    })
}

/// The alternatives of one entry. Conditions on different arguments must all hold; of several on the same argument
/// one is enough.
fn parse_rules(call: &Syscall) -> Result<Vec<Rule>, SpecError> {
    let action = action("linux.seccomp.syscalls[].action", &call.action, call.errno_ret)?;
    let conditions = call.args.iter().map(parse_condition).collect::<Result<Vec<_>, _>>()?;
    let repeated =
        conditions.iter().enumerate().any(|(i, a)| conditions[..i].iter().any(|b| a.argument == b.argument));
    if repeated {
        return Ok(conditions.into_iter().map(|c| Rule { conditions: vec![c], action }).collect());
    }
    Ok(vec![Rule { conditions, action }])
}

fn parse_condition(arg: &SyscallArg) -> Result<Condition, SpecError> {
    const FIELD: &str = "linux.seccomp.syscalls[].args";
    let op = match arg.op.as_str() {
        "SCMP_CMP_NE" => Compare::Ne,
        "SCMP_CMP_LT" => Compare::Lt,
        "SCMP_CMP_LE" => Compare::Le,
        "SCMP_CMP_EQ" => Compare::Eq,
        "SCMP_CMP_GE" => Compare::Ge,
        "SCMP_CMP_GT" => Compare::Gt,
        "SCMP_CMP_MASKED_EQ" => Compare::MaskedEq,
        other => return Err(invalid(FIELD, format!("unknown operator {other:?}"))),
    };
    if arg.index > 5 {
        return Err(invalid(FIELD, format!("index {} is above 5", arg.index)));
    }
    Ok(Condition { argument: arg.index, op, value: arg.value, second: arg.value_two })
}

/// A rule without conditions beats all others of its number, whichever comes first; of two such the first stays.
fn add(map: &mut BTreeMap<u32, Verdict>, number: u32, rules: &[Rule]) {
    for rule in rules {
        match map.get_mut(&number) {
            Some(Verdict::Return(_)) => return,
            Some(Verdict::Conditional(list)) if !rule.conditions.is_empty() => list.push(rule.clone()),
            _ if rule.conditions.is_empty() => {
                map.insert(number, Verdict::Return(rule.action));
            }
            _ => {
                map.insert(number, Verdict::Conditional(vec![rule.clone()]));
            }
        }
    }
}

/// The whole number line as (first number, verdict), neighbours differing.
fn ranges(map: &BTreeMap<u32, Verdict>, default: u32, arch: Arch) -> Vec<(u32, Verdict)> {
    const ENOSYS: u32 = 38;
    let mut line: Vec<(u32, Verdict)> = Vec::new();
    let mut push = |first: u32, verdict: Verdict| {
        // Nothing lies between this number and the one before: its "otherwise" is empty.
        line.pop_if(|(at, _)| *at == first);
        if line.last().is_none_or(|(_, last)| *last != verdict) {
            line.push((first, verdict));
        }
    };
    let start = if arch == Arch::X32 { X32_BIT } else { 0 };
    push(start, Verdict::Return(default));
    for (number, verdict) in map {
        push(*number, verdict.clone());
        push(number + 1, Verdict::Return(default));
    }
    // A call newer than the profile: "no such call" lets the C library fall back, "not permitted" would not.
    if let Some((last, _)) = map.last_key_value()
        && !matches!(default & 0xffff_0000, RET_ALLOW | RET_LOG | RET_TRACE)
    {
        push(last + 1, Verdict::Return(RET_ERRNO | ENOSYS));
    }
    line
}

const LD_W_ABS: u16 = 0x20;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const JA: u16 = 0x05;
const AND: u16 = 0x54;
const RET: u16 = 0x06;
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

fn insn(code: u16, jt: u8, jf: u8, k: u32) -> Insn {
    Insn { code, jt, jf, k }
}

/// `if A >= k { high } else { low }`, whatever the lengths.
fn branch_ge(k: u32, low: Vec<Insn>, high: Vec<Insn>) -> Vec<Insn> {
    let mut out = Vec::with_capacity(low.len() + high.len() + 2);
    match u8::try_from(low.len()) {
        Ok(skip) => out.push(insn(JGE, skip, 0, k)),
        Err(_) => out.extend([insn(JGE, 0, 1, k), insn(JA, 0, 0, low.len() as u32)]),
    }
    out.extend(low);
    out.extend(high);
    out
}

fn search_tree(line: &[(u32, Verdict)], default: u32) -> Vec<Insn> {
    match line {
        [] => vec![insn(RET, 0, 0, default)],
        [(_, verdict)] => leaf(verdict, default),
        _ => {
            let (low, high) = line.split_at(line.len() / 2);
            branch_ge(high[0].0, search_tree(low, default), search_tree(high, default))
        }
    }
}

fn leaf(verdict: &Verdict, default: u32) -> Vec<Insn> {
    match verdict {
        Verdict::Return(action) => vec![insn(RET, 0, 0, *action)],
        Verdict::Conditional(rules) => {
            let mut out = Vec::new();
            for rule in rules {
                emit_rule(rule, &mut out);
            }
            out.push(insn(RET, 0, 0, default));
            out
        }
    }
}

/// Placeholders for jumps that are known only when the rule is complete.
const TO_NEXT_RULE: u8 = 0xff;
const TO_NEXT_CONDITION: u8 = 0xfe;

fn emit_rule(rule: &Rule, out: &mut Vec<Insn>) {
    let begin = out.len();
    for condition in &rule.conditions {
        let start = out.len();
        emit_condition(condition, out);
        let end = out.len();
        patch(&mut out[start..end], TO_NEXT_CONDITION);
    }
    out.push(insn(RET, 0, 0, rule.action));
    patch(&mut out[begin..], TO_NEXT_RULE);
}

/// Jumps with this placeholder go behind the slice.
fn patch(code: &mut [Insn], placeholder: u8) {
    let len = code.len();
    for (i, insn) in code.iter_mut().enumerate() {
        if matches!(insn.code, JEQ | JGT | JGE) {
            // At most six conditions of seven instructions: always below the placeholders.
            let distance = (len - i - 1) as u8;
            if insn.jt == placeholder {
                insn.jt = distance;
            }
            if insn.jf == placeholder {
                insn.jf = distance;
            }
        }
    }
}

/// Compares a 64-bit argument by its two halves; falls through when the condition holds.
fn emit_condition(c: &Condition, out: &mut Vec<Insn>) {
    let offset = OFFSET_ARGS + 8 * c.argument;
    let (low_at, high_at) =
        if cfg!(target_endian = "big") { (offset + 4, offset) } else { (offset, offset + 4) };
    let (high, low) = ((c.value >> 32) as u32, c.value as u32);
    let load_high = insn(LD_W_ABS, 0, 0, high_at);
    let load_low = insn(LD_W_ABS, 0, 0, low_at);
    use {TO_NEXT_CONDITION as HOLDS, TO_NEXT_RULE as FAILS};
    match c.op {
        Compare::Eq => {
            out.extend([load_high, insn(JEQ, 0, FAILS, high), load_low, insn(JEQ, 0, FAILS, low)]);
        }
        Compare::Ne => {
            out.extend([load_high, insn(JEQ, 0, HOLDS, high), load_low, insn(JEQ, FAILS, 0, low)]);
        }
        Compare::Gt | Compare::Ge => {
            let last = if c.op == Compare::Gt { JGT } else { JGE };
            out.extend([load_high, insn(JGT, HOLDS, 0, high), insn(JEQ, 0, FAILS, high)]);
            out.extend([load_low, insn(last, 0, FAILS, low)]);
        }
        Compare::Lt | Compare::Le => {
            let last = if c.op == Compare::Lt { JGE } else { JGT };
            out.extend([load_high, insn(JGT, FAILS, 0, high), insn(JEQ, 0, HOLDS, high)]);
            out.extend([load_low, insn(last, FAILS, 0, low)]);
        }
        Compare::MaskedEq => {
            // seccomp_rule_add(3): "equal to the masked datum value".
            let wanted = c.second & c.value;
            let (want_high, want_low) = ((wanted >> 32) as u32, wanted as u32);
            out.extend([load_high, insn(AND, 0, 0, high), insn(JEQ, 0, FAILS, want_high)]);
            out.extend([load_low, insn(AND, 0, 0, low), insn(JEQ, 0, FAILS, want_low)]);
        }
    }
}

/// Sections of the architectures behind a dispatch. A call of any other architecture kills the process: it would be
/// judged by the wrong numbers.
fn assemble(archs: &[Arch], section: impl Fn(Arch) -> Vec<Insn>) -> Vec<Insn> {
    let kill = || vec![insn(RET, 0, 0, RET_KILL_PROCESS)];
    let load_number = insn(LD_W_ABS, 0, 0, OFFSET_NUMBER);
    let mut out = vec![insn(LD_W_ABS, 0, 0, OFFSET_ARCH)];
    for arch in archs.iter().filter(|a| **a != Arch::X32) {
        let mut body = vec![load_number];
        if *arch == Arch::X86_64 {
            let x32 = if archs.contains(&Arch::X32) { section(Arch::X32) } else { kill() };
            body.extend(branch_ge(X32_BIT, section(Arch::X86_64), x32));
        } else {
            body.extend(section(*arch));
        }
        match u8::try_from(body.len()) {
            Ok(skip) => out.push(insn(JEQ, 0, skip, arch.audit())),
            Err(_) => out.extend([insn(JEQ, 1, 0, arch.audit()), insn(JA, 0, 0, body.len() as u32)]),
        }
        out.extend(body);
    }
    out.extend(kill());
    out
}

#[cfg(test)]
mod tests;
