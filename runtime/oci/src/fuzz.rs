//! Hostile input for everything that parses: no panic, no allocation out of proportion, no endless loop.
//!
//! The loop is our own: seeds, a generator of numbers that a seed begins, and mutations that know JSON. What a fuzzer
//! guided by coverage would add needs a nightly compiler; this runs with every `cargo test`, and a failing round is
//! replayed by its number. `KEEL_FUZZ_ROUNDS` makes it longer.

use crate::exec::{parse_sub_cgroups, parse_user};
use crate::lower::lower;
use crate::lower::tests::{facts, request};
use crate::names;
use crate::spec::Spec;
use crate::template;
use keel_cgroup::{Mode, Resources};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A second or two of an unoptimised build.
const ROUNDS: u64 = 4000;
/// Operations are made of what the document holds: far more than this of a small one is an attack that worked.
const OPS_MAX: usize = 4096;

/// xorshift64*: the same seed, the same inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
}

/// Values that have broken parsers before.
const VALUES: [&str; 22] = [
    "null",
    "true",
    "0",
    "-1",
    "1",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551615",
    "1e308",
    "0.5",
    "\"\"",
    "\"/\"",
    "\"..\"",
    "\"/../../etc\"",
    "\"\\u0000\"",
    "\"0-8191\"",
    "\"=\"",
    "[]",
    "{}",
    "[[[[[[[[]]]]]]]]",
];

/// Documents that use most of the specification.
const SEEDS: [&str; 3] = [
    r#"{"ociVersion":"1.3.0","root":{"path":"r"},"hostname":"h","domainname":"d","annotations":{"a":"b"},
    "process":{"args":["a","b"],"cwd":"/","env":["PATH=/bin","A=b"],"user":{"uid":1,"gid":2,"umask":18,"additionalGids":[3]},
    "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2}],"scheduler":{"policy":"SCHED_DEADLINE","runtime":10000,"deadline":20000,"period":30000,"flags":["SCHED_FLAG_RECLAIM"]},
    "ioPriority":{"class":"IOPRIO_CLASS_BE","priority":3},"execCPUAffinity":{"initial":"0-3","final":"0"},"oomScoreAdj":5,
    "capabilities":{"bounding":["CAP_KILL"],"effective":["CAP_KILL"],"permitted":["CAP_KILL"],"inheritable":[],"ambient":["CAP_KILL"]},
    "consoleSize":{"height":1,"width":2}},
    "mounts":[{"destination":"/proc","type":"proc"},{"destination":"/m","type":"bind","source":"/s","options":["rbind","rro","idmap","nosuid"],
    "uidMappings":[{"containerID":0,"hostID":1,"size":2}],"gidMappings":[{"containerID":0,"hostID":1,"size":2}]},
    {"destination":"/t","type":"tmpfs","options":["size=1k","mode=755","tmpcopyup","ro"]},{"destination":"/c","type":"cgroup","options":["ro"]}],"linux":{"namespaces":[{"type":"mount"},{"type":"uts"}]}}"#,
    r#"{"ociVersion":"1.0.2","root":{"path":"r","readonly":true},"process":{"args":["a"],"cwd":"/x","terminal":true},
    "linux":{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"user"},{"type":"network","path":"/n"},{"type":"time"},{"type":"cgroup"}],
    "uidMappings":[{"containerID":0,"hostID":0,"size":4294967295}],"gidMappings":[{"containerID":0,"hostID":0,"size":1}],
    "timeOffsets":{"monotonic":{"secs":-5,"nanosecs":9}},"sysctl":{"net.core.somaxconn":"1"},"cgroupsPath":"/a/b",
    "devices":[{"path":"/dev/x","type":"c","major":1,"minor":3,"fileMode":438,"uid":0,"gid":0}],"rootfsPropagation":"rslave",
    "maskedPaths":["/proc/kcore"],"readonlyPaths":["/proc/sys"],"personality":{"domain":"LINUX32"},
    "memoryPolicy":{"mode":"MPOL_BIND","nodes":"0-3,7","flags":["MPOL_F_STATIC_NODES"]},
    "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":-1,"access":"r"}],
    "memory":{"limit":1,"swap":-1},"cpu":{"cpus":"0-3","shares":2,"quota":-1},"unified":{"memory.min":"1"},"pids":{"limit":5}}}}"#,
    r#"{"ociVersion":"1.0.2","root":{"path":"r"},"process":{"args":["a"],"cwd":"/"},
    "hooks":{"createRuntime":[{"path":"/h","args":["h"],"env":["A=b"],"timeout":5}],"startContainer":[{"path":"/h"}]},
    "linux":{"namespaces":[{"type":"mount"}],"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
    "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"flags":["SECCOMP_FILTER_FLAG_LOG"],"listenerPath":"/l",
    "syscalls":[{"names":["read","write","nope"],"action":"SCMP_ACT_ALLOW"},{"names":["clone","personality"],"action":"SCMP_ACT_ALLOW",
    "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}}}"#,
];

/// One change: a token exchanged for a strange one, a piece doubled, removed or cut off, a byte replaced.
fn mutate(text: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(text.len());
    let end = (at + random.below(40)).min(text.len());
    match random.below(6) {
        0 | 1 => {
            // A whole value after a colon, so that the document stays one.
            let colon = text[at..].iter().position(|b| *b == b':').map(|n| at + n + 1);
            let Some(from) = colon else { return };
            let len = text[from..].iter().position(|b| b",]}".contains(b)).unwrap_or(0);
            text.splice(from..from + len, random.of(&VALUES).bytes());
        }
        2 => {
            let piece = text[at..end].to_vec();
            text.splice(at..at, piece);
        }
        3 => drop(text.drain(at..end)),
        4 => text.truncate(at),
        _ => {
            if let Some(byte) = text.get_mut(at) {
                *byte = random.next() as u8;
            }
        }
    }
}

/// What every input must pass: an answer or an error, in proportion to the input.
fn try_document(text: &[u8]) {
    let _ = serde_json::from_slice::<Resources>(text);
    let Ok(spec) = serde_json::from_slice::<Spec>(text) else { return };
    for mode in [Mode::V1, Mode::V2] {
        let facts = facts(mode);
        let Ok(lowered) = lower(&spec, &request(), &facts) else { continue };
        assert!(lowered.ops.len() <= OPS_MAX, "{} operations", lowered.ops.len());
        // The texts of errors are made of the same input.
        lowered.ops.iter().for_each(|op| assert!(op.describe().len() <= 64 + 8 * text.len()));
    }
}

fn try_word(text: &str) {
    let _ = (parse_user(text), names::capability(text), names::rlimit(text));
    assert!(names::signal(text).is_none_or(|n| (0..=64).contains(&n)), "{text:?}");
    assert!(names::number_list(text).is_none_or(|mask| mask.len() <= 128), "{text:?}");
    if names::valid_id(text) {
        assert!(!text.contains(['/', '\0']) && text != ".." && !text.is_empty(), "{text:?}");
    }
    for (controllers, path) in parse_sub_cgroups(&[text.to_owned()]).unwrap_or_default() {
        assert!(!path.split('/').any(|part| part == ".."), "{text:?}: {path}");
        assert!(!path.starts_with('/') && controllers.iter().all(|c| !c.is_empty()), "{text:?}");
    }
    let quoted = serde_json::to_string(text).unwrap();
    let mount = format!(
        "{{\"destination\":\"/m\",\"source\":\"/s\",\"type\":\"tmpfs\",\"options\":[{quoted},\"ro\",{quoted}]}}"
    );
    let bind = mount.replace("tmpfs", "bind");
    try_document(
        format!(
            "{{\"ociVersion\":\"1.3.0\",\"root\":{{\"path\":\"r\"}},\"mounts\":[{mount},{bind}],\
             \"linux\":{{\"namespaces\":[{{\"type\":\"mount\"}}]}}}}"
        )
        .as_bytes(),
    );
}

fn rounds() -> u64 {
    std::env::var("KEEL_FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS)
}

/// Tells the round of a failure; the same round has the same input.
fn each_round(check: impl Fn(&mut Random)) {
    for round in 0..rounds() {
        let mut random = Random((round + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let tried = catch_unwind(AssertUnwindSafe(|| check(&mut random)));
        assert!(tried.is_ok(), "round {round} fails");
    }
}

#[test]
fn every_seed_is_a_document_that_is_carried_out() {
    for seed in SEEDS {
        let spec: Spec = serde_json::from_str(seed).unwrap();
        let lowered = lower(&spec, &request(), &facts(Mode::V2));
        assert!(lowered.is_ok(), "{:?}", lowered.unwrap_err());
    }
}

#[test]
fn a_hostile_document_is_answered_or_refused() {
    let templates = [template::config(false, true), template::config(true, true)];
    let mut seeds: Vec<&str> = SEEDS.to_vec();
    seeds.extend(templates.iter().map(String::as_str));
    seeds.iter().for_each(|seed| try_document(seed.as_bytes()));
    each_round(|random| {
        let mut text = random.of(&seeds).as_bytes().to_vec();
        for _ in 0..=random.below(4) {
            mutate(&mut text, random);
        }
        try_document(&text);
    });
}

#[test]
fn a_hostile_word_is_answered_or_refused() {
    const WORDS: [&str; 24] = [
        "1",
        "1:2",
        "root",
        "-1",
        "+1",
        "4294967296",
        "SIGKILL",
        "RTMIN+1",
        "RTMAX-99999999999",
        "RTMIN+",
        "RTMIN€",
        "0-3,7",
        "0-18446744073709551615",
        "5-",
        ",",
        "memory:a/b",
        "cpu,cpuacct:..",
        "/../x",
        "a/./b",
        "a.b-c_d+1",
        "mode=755,size=1k",
        "=",
        "rro",
        "idmap",
    ];
    WORDS.iter().for_each(|word| try_word(word));
    each_round(|random| {
        let mut word = random.of(&WORDS).as_bytes().to_vec();
        for _ in 0..=random.below(4) {
            match random.below(3) {
                0 => word.extend(random.of(&WORDS).bytes()),
                1 => word.insert(random.below(word.len() + 1), random.of(b"/.:,-+=\0 9\xff")),
                _ => mutate(&mut word, random),
            }
        }
        try_word(&String::from_utf8_lossy(&word));
    });
}
