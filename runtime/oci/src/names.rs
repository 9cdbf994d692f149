//! Words of the specification and the kernel's numbers for them.

/// Installing a system call filter needs it.
pub(crate) const CAP_SYS_ADMIN: u32 = 21;

/// Capability names without `CAP_`, by number.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The number of a capability, with or without `CAP_`, in any case.
pub fn capability(name: &str) -> Option<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    CAPABILITIES.iter().position(|c| *c == bare).map(|n| n as u32)
}

pub fn capability_names() -> impl Iterator<Item = String> {
    CAPABILITIES.iter().map(|c| format!("CAP_{c}"))
}

const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// `9`, `KILL`, `SIGKILL`, `RTMIN+3`; `None` for anything else.
pub fn signal(text: &str) -> Option<i32> {
    if let Ok(n) = text.parse::<i32>() {
        return (0..=64).contains(&n).then_some(n);
    }
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |text: &str| if text.is_empty() { Some(0) } else { text[1..].parse::<i32>().ok() };
    if let Some(rest) = bare.strip_prefix("RTMIN") {
        let signal = if rest.starts_with('+') || rest.is_empty() { 34 + offset(rest)? } else { return None };
        return (34..=64).contains(&signal).then_some(signal);
    }
    if let Some(rest) = bare.strip_prefix("RTMAX") {
        let signal = if rest.starts_with('-') || rest.is_empty() { 64 - offset(rest)? } else { return None };
        return (34..=64).contains(&signal).then_some(signal);
    }
    let bare = match bare {
        "CLD" => "CHLD",
        "POLL" => "IO",
        "IOT" => "ABRT",
        other => other,
    };
    SIGNALS.iter().position(|s| *s == bare).map(|n| n as i32 + 1)
}

const RLIMITS: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

pub fn rlimit(name: &str) -> Option<(u32, &'static str)> {
    RLIMITS.iter().position(|r| *r == name).map(|n| (n as u32, RLIMITS[n]))
}

/// `0-3,7` as a bit mask; `None` when it is not such a list.
pub fn number_list(text: &str) -> Option<Vec<u64>> {
    /// Far beyond any machine; bounds the memory that a hostile list can ask for.
    const MAX: usize = 8192;
    let mut mask = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (first, last) = match part.split_once('-') {
            Some((a, b)) => (a.parse::<usize>().ok()?, b.parse::<usize>().ok()?),
            None => (part.parse().ok()?, part.parse().ok()?),
        };
        if first > last || last >= MAX {
            return None;
        }
        for n in first..=last {
            if mask.len() <= n / 64 {
                mask.resize(n / 64 + 1, 0u64);
            }
            mask[n / 64] |= 1 << (n % 64);
        }
    }
    Some(mask)
}

/// Container ids: letters, digits and `_+-.`, not beginning with a dot.
pub fn valid_id(id: &str) -> bool {
    const MAX: usize = 1024;
    let word = |c: u8| c.is_ascii_alphanumeric() || b"_+-".contains(&c);
    let bytes = id.as_bytes();
    bytes.len() <= MAX
        && bytes.first().is_some_and(|c| word(*c))
        && bytes.iter().all(|c| word(*c) || *c == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals() {
        for (text, want) in [
            ("KILL", Some(9)),
            ("SIGKILL", Some(9)),
            ("sigterm", Some(15)),
            ("9", Some(9)),
            ("0", Some(0)),
            ("RTMIN+1", Some(35)),
            ("SIGRTMAX-1", Some(63)),
            ("65", None),
            ("-1", None),
            ("NOPE", None),
            ("RTMINx", None),
        ] {
            assert_eq!(signal(text), want, "{text}");
        }
    }

    #[test]
    fn capabilities_by_name() {
        assert_eq!(capability("CAP_SYS_ADMIN"), Some(21));
        assert_eq!(capability("net_raw"), Some(13));
        assert_eq!(capability("CAP_CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(capability("CAP_NOPE"), None);
    }

    #[test]
    fn ids() {
        for good in ["a", "A.b-c_d+1", "0", "_x"] {
            assert!(valid_id(good), "{good}");
        }
        for bad in ["", ".", "..", ".a", "a/b", "a b", "é", "a\0"] {
            assert!(!valid_id(bad), "{bad}");
        }
    }

    #[test]
    fn lists_of_numbers() {
        assert_eq!(number_list("0-1,3"), Some(vec![0b1011]));
        assert_eq!(number_list("64"), Some(vec![0, 1]));
        assert_eq!(number_list(""), Some(vec![]));
        for bad in ["x", "3-1", "1-", "99999"] {
            assert_eq!(number_list(bad), None, "{bad}");
        }
    }
}
