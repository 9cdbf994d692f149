//! Device rules: text for v1 `devices.allow`/`devices.deny`, an eBPF program for v2. Pure.

use crate::resources::DeviceSpec;
use keel_sys::bpf::Insn;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    All,
    Block,
    Char,
}

/// Bits 1 mknod, 2 read, 4 write, as in the kernel's `BPF_DEVCG_ACC_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access(pub u8);

/// A rule as the kernel's device filter sees it; `None` is a wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRule {
    pub allow: bool,
    pub kind: DeviceKind,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub access: Access,
}

impl DeviceRule {
    pub fn from_spec(spec: &DeviceSpec) -> Result<DeviceRule, String> {
        let kind = match spec.kind.as_deref() {
            None | Some("" | "a") => DeviceKind::All,
            Some("b") => DeviceKind::Block,
            Some("c" | "u") => DeviceKind::Char,
            Some(other) => return Err(format!("device type {other:?} is none of a, b, c")),
        };
        let number = |v: Option<i64>, what: &str| match v {
            None | Some(-1) => Ok(None),
            Some(n) => u32::try_from(n).map(Some).map_err(|_| format!("device {what} {n} is out of range")),
        };
        let mut access = 0;
        for letter in spec.access.as_deref().unwrap_or("").chars() {
            access |= match letter {
                'm' => 1,
                'r' => 2,
                'w' => 4,
                // Beside another letter it adds nothing, as for other runtimes; alone nobody can say what it means.
                'a' if spec.access.as_deref() != Some("a") => 0,
                other => return Err(format!("device access {other:?} is none of r, w, m")),
            };
        }
        if access == 0 {
            access = 7;
        }
        Ok(DeviceRule {
            allow: spec.allow,
            kind,
            major: number(spec.major, "major")?,
            minor: number(spec.minor, "minor")?,
            access: Access(access),
        })
    }

    pub fn is_everything(&self) -> bool {
        self.kind == DeviceKind::All && self.access.0 == 7 && self.major.is_none() && self.minor.is_none()
    }

    /// The line for `devices.allow` or `devices.deny`.
    fn v1_line(&self) -> String {
        let number = |n: Option<u32>| n.map_or("*".to_owned(), |n| n.to_string());
        let kind = if self.kind == DeviceKind::Block { 'b' } else { 'c' };
        let mut line = format!("{kind} {}:{} ", number(self.major), number(self.minor));
        for (bit, letter) in [(2, 'r'), (4, 'w'), (1, 'm')] {
            if self.access.0 & bit != 0 {
                line.push(letter);
            }
        }
        line
    }

    /// v1 and systemd take "all" for everything, whatever numbers and access go with it.
    pub fn kinds(self) -> impl Iterator<Item = DeviceRule> {
        let kinds = match self.kind {
            DeviceKind::All => vec![DeviceKind::Block, DeviceKind::Char],
            kind => vec![kind],
        };
        kinds.into_iter().map(move |kind| DeviceRule { kind, ..self })
    }

    fn meets(&self, other: &DeviceRule) -> bool {
        let common = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
        self.kind == other.kind
            && common(self.major, other.major)
            && common(self.minor, other.minor)
            && self.access.0 & other.access.0 != 0
    }

    fn covers(&self, other: &DeviceRule) -> bool {
        let within = |a: Option<u32>, b: Option<u32>| a.is_none() || a == b;
        within(self.major, other.major) && within(self.minor, other.minor)
    }
}

/// What v1 is told, in order: allow or deny, and the line for that file. One answer for all devices, and exceptions from
/// it. The kernel drops an exception only by its very numbers and passes any other change over in silence, so that which
/// it cannot express is an error here.
pub(crate) fn lower_v1_devices(rules: &[DeviceRule]) -> Result<Vec<(bool, String)>, String> {
    let mut all = false;
    let mut exceptions: Vec<DeviceRule> = Vec::new();
    for rule in rules {
        if rule.is_everything() {
            all = rule.allow;
            exceptions.clear();
            continue;
        }
        for rule in rule.kinds() {
            if rule.allow != all {
                exceptions.push(rule);
                continue;
            }
            for known in exceptions.iter_mut().filter(|known| rule.meets(known)) {
                if !rule.covers(known) {
                    let (line, known) = (rule.v1_line(), known.v1_line());
                    return Err(format!("{line:?} is a part of {known:?}: cgroup v1 cannot take it out"));
                }
                known.access.0 &= !rule.access.0;
            }
            exceptions.retain(|known| known.access.0 != 0);
        }
    }
    let mut out = vec![(all, "a".to_owned())];
    out.extend(exceptions.iter().map(|rule| (rule.allow, rule.v1_line())));
    Ok(out)
}

/// The v2 program for a list of rules, in which a later rule wins; what no rule names is denied.
pub fn device_program(rules: &[DeviceRule]) -> Vec<Insn> {
    // Registers: r1 = context {u32 access_type, u32 major, u32 minor}; access_type = access << 16 | type.
    let mut out = vec![
        load(2, 0),           // r2 = access_type
        alu(0x54, 2, 0xffff), // r2 &= 0xffff (device type)
        load(3, 0),           // r3 = access_type
        alu(0x74, 3, 16),     // r3 >>= 16 (access)
        load(4, 4),           // r4 = major
        load(5, 8),           // r5 = minor
    ];
    // The last rule that matches decides, so they are tried from the end, up to the last one that matches everything.
    for rule in rules.iter().rev() {
        block(rule, &mut out);
        if rule.is_everything() {
            return out;
        }
    }
    out.extend([alu(0xb4, 0, 0), EXIT]);
    out
}

const EXIT: Insn = Insn { code: 0x95, regs: 0, off: 0, imm: 0 };

fn load(dst: u8, offset: i16) -> Insn {
    Insn { code: 0x61, regs: dst | (1 << 4), off: offset, imm: 0 }
}

fn alu(code: u8, dst: u8, imm: i32) -> Insn {
    Insn { code, regs: dst, off: 0, imm }
}

/// Conditions that jump over `r0 = allow; exit` when the rule does not match.
fn block(rule: &DeviceRule, out: &mut Vec<Insn>) {
    const BPF_DEVCG_DEV_BLOCK: i32 = 1;
    const BPF_DEVCG_DEV_CHAR: i32 = 2;
    let mut conditions = Vec::new();
    match rule.kind {
        DeviceKind::All => {}
        DeviceKind::Block => conditions.push(alu(0x56, 2, BPF_DEVCG_DEV_BLOCK)),
        DeviceKind::Char => conditions.push(alu(0x56, 2, BPF_DEVCG_DEV_CHAR)),
    }
    if rule.access.0 != 7 {
        conditions.push(Insn { code: 0xbc, regs: 1 | (3 << 4), off: 0, imm: 0 }); // r1 = r3
        if rule.allow {
            // Allowed only when nothing beyond the rule's access is asked for.
            conditions.push(alu(0x54, 1, i32::from(rule.access.0 ^ 7)));
            conditions.push(alu(0x56, 1, 0)); // if r1 != 0 skip
        } else {
            // Denied when anything of the rule's access is asked for.
            conditions.push(alu(0x54, 1, i32::from(rule.access.0)));
            conditions.push(alu(0x16, 1, 0)); // if r1 == 0 skip
        }
    }
    if let Some(major) = rule.major {
        conditions.push(alu(0x56, 4, major as i32));
    }
    if let Some(minor) = rule.minor {
        conditions.push(alu(0x56, 5, minor as i32));
    }
    let total = conditions.len();
    for (i, mut insn) in conditions.into_iter().enumerate() {
        if matches!(insn.code, 0x56 | 0x16) {
            insn.off = (total - i + 1) as i16;
        }
        out.push(insn);
    }
    out.extend([alu(0xb4, 0, i32::from(rule.allow)), EXIT]);
    // r1 was the context; loads are all done before the first block, so it is free.
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allow: bool, kind: &str, major: Option<i64>, minor: Option<i64>, access: &str) -> DeviceRule {
        DeviceRule::from_spec(&DeviceSpec {
            allow,
            kind: Some(kind.to_owned()),
            major,
            minor,
            access: Some(access.to_owned()),
        })
        .unwrap()
    }

    /// Runs the few instructions that the generator emits.
    fn run(program: &[Insn], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [(access << 16) | kind, major, minor];
        let mut r = [0u32; 11];
        let mut pc = 0;
        loop {
            let i = program[pc];
            let (dst, src) = ((i.regs & 15) as usize, (i.regs >> 4) as usize);
            pc += 1;
            match i.code {
                0x61 => r[dst] = context[i.off as usize / 4],
                0x54 => r[dst] &= i.imm as u32,
                0x74 => r[dst] >>= i.imm,
                0xb4 => r[dst] = i.imm as u32,
                0xbc => r[dst] = r[src],
                0x56 if r[dst] != i.imm as u32 => pc += i.off as usize,
                0x16 if r[dst] == i.imm as u32 => pc += i.off as usize,
                0x56 | 0x16 => {}
                0x95 => return r[0] != 0,
                other => panic!("unexpected instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn later_rules_win() {
        let rules = [
            rule(false, "a", None, None, "rwm"),
            rule(true, "c", Some(1), Some(3), "rwm"),
            rule(true, "c", Some(5), None, "rw"),
            rule(false, "c", Some(5), Some(9), "w"),
        ];
        let program = device_program(&rules);
        assert!(run(&program, 2, 2, 1, 3));
        assert!(!run(&program, 1, 2, 1, 3), "block device of the same number");
        assert!(run(&program, 2, 2 | 4, 5, 1));
        assert!(!run(&program, 2, 1, 5, 1), "mknod is not in rw");
        assert!(!run(&program, 2, 4, 5, 9), "denied by the later rule");
        assert!(run(&program, 2, 2, 5, 9), "reading is not denied");
        assert!(!run(&program, 2, 2, 9, 9));
    }

    #[test]
    fn allow_all() {
        let program =
            device_program(&[rule(false, "a", None, None, "rwm"), rule(true, "a", None, None, "rwm")]);
        assert!(run(&program, 1, 7, 8, 0));
    }

    #[test]
    fn the_kernel_accepts_the_program() {
        let rules = [rule(false, "a", None, None, "rwm"), rule(true, "c", Some(1), Some(3), "rm")];
        match keel_sys::bpf::load_device_filter(&device_program(&rules)) {
            Ok(_) => {}
            Err(e) if [libc::EPERM, libc::ENOSYS, libc::EINVAL].contains(&keel_sys::errno(&e)) && !root() => {
                eprintln!("skipped: loading needs root: {e}")
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn root() -> bool {
        keel_sys::process::geteuid() == 0
    }

    #[test]
    fn the_letter_a_adds_nothing_to_an_access() {
        assert_eq!(rule(false, "c", Some(1), Some(11), "rwa").access, Access(6));
        let alone = DeviceSpec {
            allow: true,
            kind: Some("c".to_owned()),
            major: Some(1),
            minor: Some(11),
            access: Some("a".to_owned()),
        };
        assert!(DeviceRule::from_spec(&alone).is_err());
    }

    #[test]
    fn v1_gets_one_answer_and_its_exceptions() {
        let nothing = rule(false, "a", None, None, "rwm");
        let everything = rule(true, "a", None, None, "rwm");
        let check = |rules: &[DeviceRule], want: &str| {
            let said = lower_v1_devices(rules).map(|lines| {
                let lines =
                    lines.into_iter().map(|(allow, l)| format!("{}{l}", if allow { '+' } else { '-' }));
                lines.collect::<Vec<_>>().join(", ")
            });
            assert_eq!(said.unwrap_or_else(|e| e), want);
        };
        check(&[], "-a");
        check(&[nothing, rule(true, "c", Some(10), None, "mr")], "-a, +c 10:* rm");
        check(&[nothing, everything], "+a");
        check(&[nothing, rule(true, "a", None, None, "r")], "-a, +b *:* r, +c *:* r");
        check(&[rule(true, "a", Some(7), None, "rwm")], "-a, +b 7:* rwm, +c 7:* rwm");
        check(&[everything, rule(false, "b", Some(7), None, "w")], "+a, -b 7:* w");
        let narrow = rule(true, "c", Some(1), Some(3), "rwm");
        check(&[nothing, narrow, rule(false, "c", Some(1), None, "w")], "-a, +c 1:3 rm");
        check(&[nothing, narrow, rule(false, "c", None, None, "rwm")], "-a");
        let hole = "\"c 1:3 w\" is a part of \"c 1:* rwm\": cgroup v1 cannot take it out";
        let wide = rule(true, "c", Some(1), None, "rwm");
        check(&[nothing, wide, rule(false, "c", Some(1), Some(3), "w")], hole);
        check(&[nothing, wide, rule(false, "c", Some(2), Some(3), "w")], "-a, +c 1:* rwm");
    }
}
