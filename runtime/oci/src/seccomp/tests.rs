use super::*;

/// The kernel's view of one call.
#[derive(Clone, Copy)]
struct Data {
    number: u32,
    arch: u32,
    args: [u64; 6],
}

/// Runs a program as the kernel would, for the instructions that occur.
fn interpret(program: &[Insn], data: &Data) -> u32 {
    let word = |offset: u32| match offset {
        0 => data.number,
        4 => data.arch,
        16..64 => {
            let arg = data.args[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) { arg as u32 } else { (arg >> 32) as u32 }
        }
        other => panic!("load from {other}"),
    };
    let mut a = 0u32;
    let mut pc = 0usize;
    loop {
        let i = program[pc];
        pc += 1;
        let taken = match i.code {
            LD_W_ABS => {
                a = word(i.k);
                continue;
            }
            AND => {
                a &= i.k;
                continue;
            }
            RET => return i.k,
            JA => {
                pc += i.k as usize;
                continue;
            }
            JEQ => a == i.k,
            JGT => a > i.k,
            JGE => a >= i.k,
            other => panic!("instruction {other:#x}"),
        };
        pc += usize::from(if taken { i.jt } else { i.jf });
    }
}

/// What the rules mean, said directly.
fn expected(spec: &Seccomp, data: &Data) -> u32 {
    let default = action("", &spec.default_action, spec.default_errno_ret).unwrap();
    let mut archs = vec![Arch::native()];
    archs.extend(spec.architectures.iter().filter_map(|a| Arch::parse(a)));
    let x32 = data.number >= X32_BIT && data.arch == Arch::X86_64.audit();
    let arch = archs.iter().find(|a| a.audit() == data.arch && (**a == Arch::X32) == x32);
    let Some(arch) = arch else { return RET_KILL_PROCESS };
    let named = |call: &&Syscall| call.names.iter().any(|n| arch.number(n) == Some(data.number));
    let calls: Vec<&Syscall> = spec.syscalls.iter().filter(named).collect();
    let verdict = |c: &Syscall| action("", &c.action, c.errno_ret).unwrap();
    if let Some(plain) = calls.iter().find(|c| c.args.is_empty()) {
        return verdict(plain);
    }
    for call in &calls {
        for rule in parse_rules(call).unwrap() {
            if rule.conditions.iter().all(|c| holds(c, data.args[c.argument as usize])) {
                return rule.action;
            }
        }
    }
    let all = spec.syscalls.iter().flat_map(|c| &c.names).filter_map(|n| arch.number(n));
    let newer = all.max().is_some_and(|last| data.number > last);
    if newer && !matches!(default & 0xffff_0000, RET_ALLOW | RET_LOG | RET_TRACE) {
        return RET_ERRNO | 38;
    }
    default
}

fn holds(c: &Condition, value: u64) -> bool {
    match c.op {
        Compare::Ne => value != c.value,
        Compare::Lt => value < c.value,
        Compare::Le => value <= c.value,
        Compare::Eq => value == c.value,
        Compare::Ge => value >= c.value,
        Compare::Gt => value > c.value,
        Compare::MaskedEq => value & c.value == c.second & c.value,
    }
}

fn check(spec: &Seccomp) -> Filter {
    let filter = compile(spec).unwrap();
    let mut values = vec![0, 1, 2, 8, 0x20000, 0x20008, 0xffff_ffff, 1 << 32, (1 << 32) + 1, u64::MAX];
    for arg in spec.syscalls.iter().flat_map(|s| &s.args) {
        values.extend([
            arg.value,
            arg.value.wrapping_add(1),
            arg.value.wrapping_sub(1),
            arg.value_two,
            arg.value << 32,
        ]);
    }
    values.sort_unstable();
    values.dedup();
    let numbers = (0..700).chain(X32_BIT..X32_BIT + 700).chain([u32::MAX]);
    for number in numbers {
        for arch in [Arch::X86_64.audit(), Arch::X86.audit(), Arch::Aarch64.audit(), 0] {
            for (i, value) in values.iter().enumerate() {
                let mut args = [*value; 6];
                args[i % 6] = values[(i * 7 + 3) % values.len()];
                let data = Data { number, arch, args };
                assert_eq!(
                    interpret(&filter.program, &data),
                    expected(spec, &data),
                    "number {number:#x} arch {arch:#x} args {args:x?}"
                );
            }
        }
    }
    filter
}

fn spec(json: &str) -> Seccomp {
    serde_json::from_str(json).unwrap()
}

#[test]
fn table_is_sorted_and_right_where_it_can_be_checked() {
    assert!(SYSCALLS.windows(2).all(|w| w[0].0 < w[1].0));
    assert!(X32_ONLY.windows(2).all(|w| w[0].0 < w[1].0));
    assert!(X32_ONLY.iter().all(|(name, _)| Arch::X86_64.number(name).is_some()));
    if Arch::native() == Arch::X86_64 {
        assert_eq!(Arch::X32.number("execve"), Some(X32_BIT | 520));
        assert_eq!(Arch::X32.number("read"), Some(X32_BIT));
    }
    let known = [
        ("read", libc::SYS_read),
        ("clone3", libc::SYS_clone3),
        ("openat2", libc::SYS_openat2),
        ("seccomp", libc::SYS_seccomp),
        ("mount_setattr", libc::SYS_mount_setattr),
    ];
    for (name, number) in known {
        assert_eq!(Arch::native().number(name).map(i64::from), Some(number), "{name}");
    }
}

#[test]
fn allow_list_with_arguments_and_foreign_architectures() {
    let filter = check(&spec(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
        "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
        "syscalls":[
         {"names":["read","write","openat","close","no_such_call"],"action":"SCMP_ACT_ALLOW"},
         {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"}]},
         {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":131080,"op":"SCMP_CMP_EQ"}]},
         {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
         {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
         {"names":["ptrace"],"action":"SCMP_ACT_KILL"}]}"#,
    ));
    assert_eq!(filter.flags, FLAG_SPEC_ALLOW);
}

#[test]
fn only_a_list_of_flags_decides_them() {
    let flags =
        |list: &str| compile(&spec(&format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW"{list}}}"#))).unwrap().flags;
    assert_eq!(flags(""), FLAG_SPEC_ALLOW);
    assert_eq!(flags(r#","flags":null"#), FLAG_SPEC_ALLOW);
    assert_eq!(flags(r#","flags":[]"#), 0);
    assert_eq!(flags(r#","flags":["SECCOMP_FILTER_FLAG_LOG"]"#), FLAG_LOG);
}

#[test]
fn every_operator_on_both_halves() {
    for op in ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"] {
        for value in [0u64, 5, 0xffff_ffff, 0x1_0000_0000, 0x5_0000_0007] {
            check(&spec(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["socket"],"action":"SCMP_ACT_ERRNO",
                "args":[{{"index":1,"value":{value},"valueTwo":5,"op":"SCMP_CMP_{op}"}},
                        {{"index":3,"value":{value},"op":"SCMP_CMP_LE"}}]}}]}}"#
            )));
        }
    }
}

#[test]
fn conditions_on_one_argument_are_alternatives() {
    check(&spec(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["socket"],"action":"SCMP_ACT_ERRNO",
        "args":[{"index":0,"value":40,"op":"SCMP_CMP_EQ"},{"index":0,"value":38,"op":"SCMP_CMP_EQ"}]}]}"#,
    ));
}

#[test]
fn a_rule_without_conditions_beats_the_others() {
    check(&spec(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
        {"names":["socket"],"action":"SCMP_ACT_KILL","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW"},
        {"names":["socket"],"action":"SCMP_ACT_LOG"}]}"#,
    ));
}

#[test]
fn neighbours_are_coalesced() {
    let names: Vec<String> = SYSCALLS.iter().map(|(n, _)| format!("{n:?}")).collect();
    let filter = compile(&spec(&format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":[{}],"action":"SCMP_ACT_ALLOW"}}]}}"#,
        names.join(",")
    )))
    .unwrap();
    assert!(filter.program.len() < 40, "{} instructions", filter.program.len());
}

#[test]
fn unknown_words_are_errors() {
    for json in [
        r#"{"defaultAction":"SCMP_ACT_NOPE"}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["z80"]}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["NOPE"]}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_KILL","args":[{"index":6,"op":"SCMP_CMP_EQ"}]}]}"#,
    ] {
        assert!(compile(&spec(json)).is_err(), "{json}");
    }
}
