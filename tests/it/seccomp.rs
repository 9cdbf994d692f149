//! Our filters against those of libseccomp: both are run for every system call number with sampled arguments.
//!
//! Three differences are meant, and taken out before the comparison:
//! - A call newer than all that the profile names answers ENOSYS, as other runtimes add to libseccomp's filter.
//! - A call of an architecture that is not in the profile kills the process, not only the thread.
//! - We compare arguments whole everywhere. libseccomp looks at the lower half only where pointers have 32 bits, so
//!   there only such arguments are sampled.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use keel_tests::{Instance, manifest};
use serde_json::{Value, json};

const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const ERRNO: u32 = 0x0005_0000;
const ENOSYS: u32 = 38;
const X32_BIT: u32 = 0x4000_0000;

/// Above every number that any architecture here has.
const NUMBERS: u32 = 1000;

/// Name in profiles, libseccomp's token, the kernel's audit number.
const ARCHITECTURES: &[(&str, u32, u32)] = &[
    ("SCMP_ARCH_X86_64", 0xc000_003e, 0xc000_003e),
    ("SCMP_ARCH_X86", 0x4000_0003, 0x4000_0003),
    ("SCMP_ARCH_X32", 0x4000_003e, 0xc000_003e),
];

#[derive(Clone, Copy, Debug)]
struct Insn {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

/// What a filter sees of one call.
#[derive(Clone, Copy, Debug)]
struct Call {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

/// Runs a program as the kernel does; panics at an instruction that no filter needs.
fn evaluate(program: &[Insn], call: &Call) -> u32 {
    let load = |offset: u32| match offset {
        0 => call.number,
        4 => call.architecture,
        16..64 => {
            let argument = call.arguments[(offset as usize - 16) / 8];
            (argument >> (offset % 8 * 8)) as u32
        }
        other => panic!("load from {other}"),
    };
    let (mut a, mut at) = (0u32, 0usize);
    loop {
        let i = program[at];
        at += 1;
        let holds = match i.code {
            0x20 => {
                a = load(i.k);
                continue;
            }
            0x54 => {
                a &= i.k;
                continue;
            }
            0x05 => {
                at += i.k as usize;
                continue;
            }
            0x06 => return i.k,
            0x15 => a == i.k,
            0x25 => a > i.k,
            0x35 => a >= i.k,
            0x45 => a & i.k != 0,
            other => panic!("instruction {other:#x}"),
        };
        at += usize::from(if holds { i.jt } else { i.jf });
    }
}

fn ours(profile: &Value) -> Vec<Insn> {
    let spec = serde_json::from_value(profile.clone()).expect("a profile");
    let filter = keel_oci::seccomp::compile(&spec).expect("the profile compiles");
    filter.program.iter().map(|i| Insn { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect()
}

struct Reference {
    program: Vec<Insn>,
    unknown: BTreeSet<String>,
    /// The largest number that the profile names, by architecture in the order of [`ARCHITECTURES`].
    newest: Vec<Option<u32>>,
}

/// Builds the helper; `None`, with the reason said, where that is not possible.
fn helper() -> Option<(tempfile::TempDir, PathBuf)> {
    if std::env::consts::ARCH != "x86_64" {
        eprintln!("skipped: the architectures compared are those of x86-64");
        return None;
    }
    if !Path::new("/usr/include/seccomp.h").exists() {
        eprintln!("skipped: libseccomp-dev is not installed");
        return None;
    }
    let dir = tempfile::Builder::new().prefix("keel-seccomp-").tempdir().expect("a temporary directory");
    let binary = dir.path().join("reference");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("it/seccomp/reference.c");
    match Command::new("cc").arg("-o").arg(&binary).arg(source).arg("-lseccomp").output() {
        Ok(output) if output.status.success() => Some((dir, binary)),
        Ok(output) => panic!("cc: {}", String::from_utf8_lossy(&output.stderr)),
        Err(e) => {
            eprintln!("skipped: no C compiler: {e}");
            None
        }
    }
}

fn reference(helper: &Path, profile: &Value) -> Reference {
    let mut child = Command::new(helper)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the helper starts");
    let mut input = child.stdin.take().expect("piped");
    // More than a pipe holds, in both directions.
    let commands = commands(profile);
    let writer = std::thread::spawn(move || input.write_all(commands.as_bytes()).expect("the helper reads"));
    let output = child.wait_with_output().expect("the helper ends");
    writer.join().expect("the helper has read all");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let insn = |b: &[u8]| Insn {
        code: u16::from_le_bytes([b[0], b[1]]),
        jt: b[2],
        jf: b[3],
        k: u32::from_le_bytes([b[4], b[5], b[6], b[7]]),
    };
    let newest = ARCHITECTURES.iter().map(|(_, token, _)| {
        let prefix = format!("number {token} ");
        let numbers = said.lines().filter_map(|line| line.strip_prefix(prefix.as_str()));
        // Negative: a name that only other architectures have.
        numbers.filter_map(|rest| rest.rsplit_once(' ')?.1.parse::<i32>().ok()).filter(|n| *n >= 0).max()
    });
    Reference {
        program: output.stdout.chunks_exact(8).map(insn).collect(),
        newest: newest.map(|n| n.map(|n| n as u32)).collect(),
        unknown: said.lines().filter_map(|l| l.strip_prefix("unknown ")).map(str::to_string).collect(),
    }
}

/// The profile in the helper's words.
fn commands(profile: &Value) -> String {
    let mut text = String::new();
    let default = action(&profile["defaultAction"], &profile["defaultErrnoRet"]);
    writeln!(text, "default {default}").expect("a string");
    for (name, token, _) in architectures(profile) {
        if name != ARCHITECTURES[0].0 {
            writeln!(text, "arch {token}").expect("a string");
        }
    }
    for call in list(&profile["syscalls"]) {
        let action = action(&call["action"], &call["errnoRet"]);
        for name in list(&call["names"]).iter().filter_map(Value::as_str) {
            for (_, token, _) in ARCHITECTURES {
                writeln!(text, "number {token} {name}").expect("a string");
            }
            // libseccomp refuses a rule that says what the default says.
            if action == default {
                continue;
            }
            for alternative in alternatives(list(&call["args"])) {
                write!(text, "rule {action} {name} {}", alternative.len()).expect("a string");
                for argument in alternative {
                    let number = |key: &str| argument[key].as_u64().unwrap_or(0);
                    let operator = operator(&argument["op"]);
                    let (value, second) = (number("value"), number("valueTwo"));
                    write!(text, " {} {operator} {value} {second}", number("index")).expect("a string");
                }
                text.push('\n');
            }
        }
    }
    text
}

/// Conditions on one argument are alternatives of each other, in every runtime.
fn alternatives(arguments: &[Value]) -> Vec<Vec<&Value>> {
    let indices: BTreeSet<Option<u64>> = arguments.iter().map(|a| a["index"].as_u64()).collect();
    if indices.len() < arguments.len() {
        arguments.iter().map(|a| vec![a]).collect()
    } else {
        vec![arguments.iter().collect()]
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn action(name: &Value, errno: &Value) -> u32 {
    match name.as_str().expect("an action") {
        "SCMP_ACT_ALLOW" => 0x7fff_0000,
        "SCMP_ACT_LOG" => 0x7ffc_0000,
        "SCMP_ACT_ERRNO" => ERRNO | errno.as_u64().unwrap_or(1) as u32,
        "SCMP_ACT_TRAP" => 0x0003_0000,
        "SCMP_ACT_KILL" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        other => panic!("action {other}"),
    }
}

fn operator(name: &Value) -> u32 {
    let names = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    let name = name.as_str().and_then(|n| n.strip_prefix("SCMP_CMP_")).expect("an operator");
    names.iter().position(|n| *n == name).expect("a known operator") as u32 + 1
}

fn architectures(profile: &Value) -> Vec<(&'static str, u32, u32)> {
    let named = |name: &str| list(&profile["architectures"]).iter().any(|a| a == name);
    ARCHITECTURES.iter().copied().filter(|(name, ..)| *name == ARCHITECTURES[0].0 || named(name)).collect()
}

/// Values at and around all that the profile compares with.
fn samples(profile: &Value) -> Vec<u64> {
    let mut values = vec![0, 1, 2, 0xffff_ffff, 1 << 32, 0x7e02_0000 << 8, u64::MAX];
    for argument in list(&profile["syscalls"]).iter().flat_map(|call| list(&call["args"])) {
        for key in ["value", "valueTwo"] {
            let value = argument[key].as_u64().unwrap_or(0);
            values.extend([value, value.wrapping_add(1), value.wrapping_sub(1), value | 1 << 32, value >> 1]);
        }
    }
    values.sort_unstable();
    values.dedup();
    values
}

/// Names that this libseccomp does not know are left out: it is older than the kernel's newest calls.
fn without(profile: &Value, unknown: &BTreeSet<String>) -> Value {
    let mut profile = profile.clone();
    for call in profile["syscalls"].as_array_mut().expect("a list") {
        let names = call["names"].as_array_mut().expect("a list");
        names.retain(|name| !name.as_str().is_some_and(|name| unknown.contains(name)));
    }
    profile
}

#[track_caller]
fn compare(helper: &Path, profile: &Value) {
    let unknown = reference(helper, profile).unknown;
    let profile = without(profile, &unknown);
    let theirs = reference(helper, &profile);
    let ours = ours(&profile);
    let values = samples(&profile);
    let present = architectures(&profile);
    let mut compared = 0u32;
    for (index, (name, _, audit)) in ARCHITECTURES.iter().enumerate() {
        let x32 = *name == "SCMP_ARCH_X32";
        let first = if x32 { X32_BIT } else { 0 };
        let known = present.iter().any(|(n, ..)| n == name);
        let narrow = *name != ARCHITECTURES[0].0;
        let newest = theirs.newest[index].unwrap_or(u32::MAX);
        for number in first..first + NUMBERS {
            for (turn, value) in values.iter().enumerate() {
                let mut arguments = [0; 6];
                for (i, argument) in arguments.iter_mut().enumerate() {
                    *argument = values[(turn + i * (number as usize + turn)) % values.len()];
                }
                arguments[turn % 6] = *value;
                if narrow {
                    arguments = arguments.map(|a| a & 0xffff_ffff);
                }
                let call = Call { number, architecture: *audit, arguments };
                let mut want = evaluate(&theirs.program, &call);
                if !known {
                    assert_eq!(want, KILL_THREAD, "libseccomp's answer to a foreign architecture");
                    want = KILL_PROCESS;
                } else if number > newest && refuses(&profile) {
                    want = ERRNO | ENOSYS;
                }
                let got = evaluate(&ours, &call);
                let rules = || list(&profile["syscalls"]).iter().filter(|c| !list(&c["args"]).is_empty());
                assert_eq!(
                    got,
                    want,
                    "ours {got:#x}, libseccomp's {want:#x}: {name} {call:x?}, default {}, rules {:?}",
                    profile["defaultAction"],
                    rules().map(Value::to_string).collect::<Vec<_>>()
                );
                compared += 1;
            }
        }
    }
    eprintln!(
        "{compared} calls are judged alike; {} instructions, libseccomp's {}; it does not know {unknown:?}",
        ours.len(),
        theirs.program.len()
    );
}

fn refuses(profile: &Value) -> bool {
    !matches!(profile["defaultAction"].as_str(), Some("SCMP_ACT_ALLOW" | "SCMP_ACT_LOG" | "SCMP_ACT_TRACE"))
}

#[test]
fn the_default_profile_is_filtered_as_libseccomp_would() {
    let Some((_dir, helper)) = helper() else { return };
    let instance = Instance::new();
    instance.import_busybox();
    let security = "    securityContext: {capabilities: {add: [SYS_ADMIN, SYS_TIME]}}\n";
    for (name, extra) in [("plain", ""), ("admin", security)] {
        instance.apply(&manifest::pod(name, &format!("{}{extra}", manifest::SLEEP))).expect_code(0);
    }
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(instance.run_dir().join("containers")).expect("containers").flatten() {
        let text = std::fs::read(entry.path().join("config.json")).expect("the container's specification");
        let config: Value = serde_json::from_slice(&text).expect("JSON");
        let profile = &config["linux"]["seccomp"];
        if profile.is_object() && seen.insert(profile.to_string()) {
            compare(&helper, profile);
        }
    }
    assert_eq!(seen.len(), 2, "a profile for each set of capabilities");
}

#[test]
fn the_profile_of_other_engines_is_filtered_as_libseccomp_would() {
    let Some((_dir, helper)) = helper() else { return };
    const PATH: &str = "/usr/share/containers/seccomp.json";
    let Ok(text) = std::fs::read(PATH) else {
        eprintln!("skipped: no {PATH} (golang-github-containers-common)");
        return;
    };
    let profile: Value = serde_json::from_slice(&text).expect("JSON");
    compare(&helper, &for_container(&profile, &[]));
    compare(&helper, &for_container(&profile, &["CAP_SYS_ADMIN", "CAP_AUDIT_WRITE", "CAP_SYS_CHROOT"]));
}

/// What an engine makes of its profile for a container that holds `capabilities`.
fn for_container(profile: &Value, capabilities: &[&str]) -> Value {
    let held = |c: &Value| capabilities.iter().any(|held| c == held);
    let here = |c: &Value| c == "amd64";
    let calls = list(&profile["syscalls"]).iter().filter(|call| {
        let (with, but) = (&call["includes"], &call["excludes"]);
        let arches = list(&with["arches"]);
        list(&with["caps"]).iter().all(held)
            && (arches.is_empty() || arches.iter().any(here))
            && !list(&but["caps"]).iter().any(held)
            && !list(&but["arches"]).iter().any(here)
    });
    let calls: Vec<Value> = calls
        .map(|call| {
            let mut call = call.clone();
            let object = call.as_object_mut().expect("an object");
            object.retain(|key, value| {
                ["names", "action", "args", "errnoRet"].contains(&key.as_str()) && !value.is_null()
            });
            call
        })
        .collect();
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": calls,
    })
}

#[test]
fn every_operator_is_filtered_as_libseccomp_would() {
    let Some((_dir, helper)) = helper() else { return };
    for operator in ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"] {
        for value in [0u64, 5, 0xffff_ffff, 1 << 32, 0x5_0000_0007] {
            for default in ["SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW"] {
                let action = if default == "SCMP_ACT_ALLOW" { "SCMP_ACT_KILL" } else { "SCMP_ACT_ALLOW" };
                compare(
                    &helper,
                    &json!({"defaultAction": default, "syscalls": [
                        {"names": ["read", "mmap"], "action": action},
                        {"names": ["ioctl"], "action": action, "args": [
                            {"index": 1, "value": value, "valueTwo": value & 5, "op": format!("SCMP_CMP_{operator}")},
                            {"index": 3, "value": value, "op": "SCMP_CMP_LE"}]},
                        {"names": ["prctl"], "action": action, "args": [
                            {"index": 0, "value": value, "valueTwo": 5, "op": format!("SCMP_CMP_{operator}")},
                            {"index": 0, "value": 77, "op": "SCMP_CMP_EQ"}]}]}),
                );
            }
        }
    }
}
