//! Limits and annotations lowered to properties of a unit. Pure.
//!
//! The limits are also written to the cgroup's files, with what systemd has no word for. They are told to systemd
//! because it writes its own idea of them again when it is reloaded.

use crate::Property;
use keel_cgroup::{Cpu, DeviceKind, DeviceRule, Memory, Mode, Resources, shares_to_weight};
use zbus::Variant;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PropertyError {
    #[error("unified resource {key:?}: {value:?} is no value of it")]
    Unified { key: String, value: String },
    #[error("cpuset {0:?} is no list of numbers")]
    CpuSet(String),
    #[error("annotation {name}: {problem}")]
    Annotation { name: String, problem: &'static str },
    #[error("device rule: {0}")]
    Device(String),
}

/// A CPU set above this is no set of CPUs.
const CPU_MAX: usize = 8191;
const DEFAULT_PERIOD_US: u64 = 100_000;
/// From here systemd takes a weight of 0 as idle.
const IDLE_SINCE: u32 = 252;
/// From here it knows a scope's `OOMPolicy`.
const OOM_POLICY_SINCE: u32 = 253;

fn property(name: &str, value: impl Into<Variant<'static>>) -> Property {
    (name.to_owned(), value.into())
}

/// `devices` is the text of `/proc/devices`, which names the majors. The quota is rounded up in `resources`, so that the
/// files get what systemd will write.
pub fn limits(
    resources: &mut Resources,
    mode: Mode,
    version: u32,
    devices: &str,
) -> Result<Vec<Property>, PropertyError> {
    let mut out = Vec::new();
    if let Some(rules) = device_properties(resources, devices)? {
        out.extend(rules);
    }
    if let Some(memory) = &resources.memory {
        memory_properties(memory, mode, &mut out);
    }
    if let Some(cpu) = &mut resources.cpu {
        cpu_properties(cpu, mode, version, &mut out)?;
    }
    if let Some(limit) = resources.pids.as_ref().and_then(|p| p.limit) {
        let limit = if limit < 0 { u64::MAX } else { limit.max(1) as u64 };
        out.push(property("TasksMax", limit));
    }
    if let (false, Some(weight)) = (mode == Mode::V2, resources.block_io.as_ref().and_then(|b| b.weight))
        && weight != 0
    {
        out.push(property("BlockIOWeight", u64::from(weight)));
    }
    if mode == Mode::V2 {
        unified_properties(resources, version, &mut out)?;
    }
    Ok(out)
}

fn memory_properties(memory: &Memory, mode: Mode, out: &mut Vec<Property>) {
    let given = |v: Option<i64>| v.filter(|v| *v != 0).map(|v| u64::try_from(v).unwrap_or(u64::MAX));
    if mode != Mode::V2 {
        out.extend(given(memory.limit).map(|limit| property("MemoryLimit", limit)));
        return;
    }
    out.extend(given(memory.limit).map(|limit| property("MemoryMax", limit)));
    out.extend(given(memory.reservation).map(|low| property("MemoryLow", low)));
    let swap = match (given(memory.limit), given(memory.swap)) {
        (_, Some(u64::MAX)) | (Some(u64::MAX), None) => Some(u64::MAX),
        (Some(limit), Some(swap)) if swap >= limit => Some(swap - limit),
        (_, swap) => swap,
    };
    out.extend(swap.map(|swap| property("MemorySwapMax", swap)));
}

fn cpu_properties(
    cpu: &mut Cpu,
    mode: Mode,
    version: u32,
    out: &mut Vec<Property>,
) -> Result<(), PropertyError> {
    let shares = cpu.shares.filter(|s| *s != 0);
    if mode != Mode::V2 {
        out.extend(shares.map(|shares| property("CPUShares", shares)));
    } else if cpu.idle == Some(1) && version >= IDLE_SINCE {
        out.push(property("CPUWeight", 0u64));
    } else {
        out.extend(shares.map(|shares| property("CPUWeight", shares_to_weight(shares))));
    }
    if let Some(quota) = quota(cpu.quota.filter(|q| *q != 0), cpu.period.filter(|p| *p != 0), out) {
        cpu.quota = Some(quota);
    }
    for (name, list) in [("AllowedCPUs", &cpu.cpus), ("AllowedMemoryNodes", &cpu.mems)] {
        if let Some(list) = list.as_ref().filter(|l| !l.is_empty()) {
            out.push(property(name, cpu_mask(list)?));
        }
    }
    Ok(())
}

/// systemd keeps whole percents: the answer is the quota that it will write, when it is another.
fn quota(quota: Option<i64>, period: Option<u64>, out: &mut Vec<Property>) -> Option<i64> {
    if let Some(period) = period {
        out.push(property("CPUQuotaPeriodUSec", period));
    }
    if quota.is_none() && period.is_none() {
        return None;
    }
    let period = period.unwrap_or(DEFAULT_PERIOD_US);
    let Some(wanted) = quota.and_then(|q| u64::try_from(q).ok()) else {
        out.push(property("CPUQuotaPerSecUSec", u64::MAX));
        return None;
    };
    let per_second = (wanted.saturating_mul(1_000_000) / period).next_multiple_of(10_000);
    out.push(property("CPUQuotaPerSecUSec", per_second));
    let rounded = i64::try_from(u128::from(per_second) * u128::from(period) / 1_000_000).ok()?;
    (rounded != wanted as i64).then_some(rounded)
}

/// `0-2,7` as bits, the lowest first.
fn cpu_mask(list: &str) -> Result<Vec<u8>, PropertyError> {
    let wrong = || PropertyError::CpuSet(list.to_owned());
    let mut mask = Vec::new();
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| wrong())?;
        let last: usize = last.trim().parse().map_err(|_| wrong())?;
        if first > last || last > CPU_MAX {
            return Err(wrong());
        }
        for cpu in first..=last {
            if mask.len() <= cpu / 8 {
                mask.resize(cpu / 8 + 1, 0);
            }
            mask[cpu / 8] |= 1 << (cpu % 8);
        }
    }
    if mask.is_empty() { Err(wrong()) } else { Ok(mask) }
}

/// Those files that systemd has a word for; the others are only written.
fn unified_properties(
    resources: &Resources,
    version: u32,
    out: &mut Vec<Property>,
) -> Result<(), PropertyError> {
    for (key, value) in &resources.unified {
        let value = value.trim();
        let wrong = || PropertyError::Unified { key: key.clone(), value: value.to_owned() };
        let number = || -> Result<u64, PropertyError> {
            if value == "max" { Ok(u64::MAX) } else { value.parse().map_err(|_| wrong()) }
        };
        let name = match key.as_str() {
            "memory.min" => "MemoryMin",
            "memory.low" => "MemoryLow",
            "memory.high" => "MemoryHigh",
            "memory.max" => "MemoryMax",
            "memory.swap.max" => "MemorySwapMax",
            "pids.max" => "TasksMax",
            "cpu.weight" => "CPUWeight",
            "cpu.idle" if value == "1" && version >= IDLE_SINCE => {
                out.retain(|(name, _)| name != "CPUWeight");
                out.push(property("CPUWeight", 0u64));
                continue;
            }
            "cpu.max" => {
                let mut words = value.split_whitespace();
                let quota_text = words.next().unwrap_or_default();
                let given = match quota_text {
                    "max" => None,
                    text => Some(text.parse::<i64>().map_err(|_| wrong())?),
                };
                let period = words.next().map(|w| w.parse().map_err(|_| wrong())).transpose()?;
                out.retain(|(name, _)| !name.starts_with("CPUQuota"));
                // The file keeps the exact value.
                quota(given, Some(period.unwrap_or(DEFAULT_PERIOD_US)), out);
                continue;
            }
            "cpuset.cpus" | "cpuset.mems" => {
                let name = if key.ends_with("cpus") { "AllowedCPUs" } else { "AllowedMemoryNodes" };
                out.retain(|(known, _)| known != name);
                out.push(property(name, cpu_mask(value)?));
                continue;
            }
            "memory.oom.group" if version >= OOM_POLICY_SINCE => {
                out.push(property("OOMPolicy", if value == "1" { "kill" } else { "continue" }));
                continue;
            }
            _ => continue,
        };
        let number = number()?;
        out.retain(|(known, _)| known != name);
        out.push(property(name, number));
    }
    Ok(())
}

/// A list of what may be opened, if the rules can be said as one: systemd has no exceptions.
fn device_properties(resources: &Resources, devices: &str) -> Result<Option<Vec<Property>>, PropertyError> {
    if resources.devices.is_empty() {
        return Ok(None);
    }
    let rules = resources.devices.iter().map(DeviceRule::from_spec).collect::<Result<Vec<_>, _>>();
    let Some(allowed) = allow_list(&rules.map_err(PropertyError::Device)?) else {
        return Ok(Some(vec![
            property("DevicePolicy", "auto"),
            property("DeviceAllow", Vec::<(String, String)>::new()),
        ]));
    };
    let mut list: Vec<(String, String)> = Vec::new();
    for rule in &allowed {
        let letters: String = [(2, 'r'), (4, 'w'), (1, 'm')]
            .iter()
            .filter(|(b, _)| rule.access.0 & b != 0)
            .map(|(_, l)| l)
            .collect();
        let kind = if rule.kind == DeviceKind::Block { "block" } else { "char" };
        match (rule.major, rule.minor) {
            (Some(major), Some(minor)) => list.push((format!("/dev/{kind}/{major}:{minor}"), letters)),
            (Some(major), None) => {
                list.extend(
                    major_names(devices, kind, major).map(|name| (format!("{kind}-{name}"), letters.clone())),
                );
            }
            (None, None) => list.push((format!("{kind}-*"), letters)),
            // Every major with one minor: systemd cannot say it, the files do.
            (None, Some(_)) => {}
        }
    }
    Ok(Some(vec![property("DevicePolicy", "strict"), property("DeviceAllow", list)]))
}

/// The rules as what they allow together; `None` when everything is allowed but for exceptions.
fn allow_list(rules: &[DeviceRule]) -> Option<Vec<DeviceRule>> {
    let mut open = true;
    let mut allowed: Vec<DeviceRule> = Vec::new();
    for rule in rules {
        if rule.is_everything() {
            open = rule.allow;
            allowed.clear();
        } else if rule.allow {
            allowed.extend(rule.kinds());
        } else {
            for known in &mut allowed {
                if rule.kinds().any(|r| (known.kind, known.major, known.minor) == (r.kind, r.major, r.minor))
                {
                    known.access.0 &= !rule.access.0;
                }
            }
            allowed.retain(|known| known.access.0 != 0);
        }
    }
    (!open).then_some(allowed)
}

/// A major number may have several names in `/proc/devices`.
fn major_names<'a>(devices: &'a str, kind: &str, major: u32) -> impl Iterator<Item = &'a str> {
    let (chars, blocks) = devices.split_once("Block devices:").unwrap_or((devices, ""));
    let section = if kind == "block" { blocks } else { chars };
    section.lines().filter_map(move |line| {
        let (number, name) = line.trim().split_once(' ')?;
        (number.parse() == Ok(major)).then_some(name)
    })
}

/// Annotations `org.systemd.property.NAME` with a value in GVariant's text form, as other runtimes take them.
pub fn annotated<'a>(
    annotations: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<Vec<Property>, PropertyError> {
    let mut out = Vec::new();
    for (key, text) in annotations {
        let Some(name) = key.strip_prefix("org.systemd.property.") else { continue };
        let wrong = |problem| PropertyError::Annotation { name: key.clone(), problem };
        if name.len() < 3 || !name.bytes().all(|c| c.is_ascii_alphabetic()) {
            return Err(wrong("the name of a property has three letters or more, and nothing else"));
        }
        let value = parse_value(text.trim()).ok_or_else(|| wrong("the value is not understood"))?;
        let (name, value) = match name.strip_suffix("Sec") {
            Some(stem) if stem.ends_with(|c: char| c.is_ascii_lowercase()) => {
                let micros = seconds(&value).ok_or_else(|| wrong("a number of seconds is expected"))?;
                (format!("{stem}USec"), Variant::from(micros))
            }
            _ => (name.to_owned(), value),
        };
        out.push((name, value));
    }
    Ok(out)
}

/// systemd documents times in seconds; its interface takes microseconds.
fn seconds(value: &Variant<'_>) -> Option<u64> {
    match value {
        Variant::I32(n) => u64::try_from(*n).ok()?.checked_mul(1_000_000),
        Variant::I64(n) => u64::try_from(*n).ok()?.checked_mul(1_000_000),
        Variant::U32(n) => Some(u64::from(*n) * 1_000_000),
        Variant::U64(n) => n.checked_mul(1_000_000),
        Variant::F64(n) if *n >= 0.0 && *n < 1e12 => Some((n * 1e6) as u64),
        _ => None,
    }
}

/// A string, a boolean, a number with or without its type, an array of strings.
fn parse_value(text: &str) -> Option<Variant<'static>> {
    if let Some(string) = quoted(text) {
        return Some(string.into());
    }
    if let Some(list) = text.strip_prefix("@as").map(str::trim_start).or(Some(text))
        && let Some(list) = list.strip_prefix('[').and_then(|l| l.strip_suffix(']'))
    {
        let parts = list.split(',').map(str::trim).filter(|p| !p.is_empty());
        let strings: Option<Vec<String>> = parts.map(quoted).collect();
        return strings.map(Variant::from);
    }
    match text {
        "true" => return Some(true.into()),
        "false" => return Some(false.into()),
        _ => {}
    }
    if let Some((kind, number)) = text.split_once(' ') {
        let number = number.trim();
        return Some(match kind {
            "byte" | "@y" => number.parse::<u8>().ok()?.into(),
            "int16" | "@n" => number.parse::<i16>().ok()?.into(),
            "uint16" | "@q" => number.parse::<u16>().ok()?.into(),
            "int32" | "@i" => number.parse::<i32>().ok()?.into(),
            "uint32" | "@u" => number.parse::<u32>().ok()?.into(),
            "int64" | "@x" => number.parse::<i64>().ok()?.into(),
            "uint64" | "@t" => number.parse::<u64>().ok()?.into(),
            "double" | "@d" => number.parse::<f64>().ok()?.into(),
            _ => return None,
        });
    }
    match text.parse::<i32>() {
        Ok(number) => Some(number.into()),
        Err(_) => text.parse::<f64>().ok().filter(|n| n.is_finite()).map(Variant::from),
    }
}

/// A string in single or double quotes; the only escapes are of a quote and of the backslash.
fn quoted(text: &str) -> Option<String> {
    let mut chars = text.chars();
    let quote = chars.next().filter(|c| matches!(c, '\'' | '"'))?;
    let mut out = String::new();
    loop {
        match chars.next()? {
            c if c == quote => return chars.next().is_none().then_some(out),
            '\\' => out.push(chars.next().filter(|c| matches!(c, '\'' | '"' | '\\'))?),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_cgroup::{DeviceSpec, Pids};

    fn render(properties: &[Property]) -> String {
        properties.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
    }

    const DEVICES: &str =
        "Character devices:\n  1 mem\n  5 /dev/tty\n136 pts\n\nBlock devices:\n  8 sd\n259 blkext\n";

    #[test]
    fn a_typical_container_on_both_versions() {
        let resources = Resources {
            memory: Some(Memory { limit: Some(64 << 20), swap: Some(96 << 20), ..Memory::default() }),
            cpu: Some(Cpu {
                shares: Some(1024),
                quota: Some(12_345),
                cpus: Some("0-1,9".to_owned()),
                ..Cpu::default()
            }),
            pids: Some(Pids { limit: Some(-1) }),
            unified: [("memory.high", "max"), ("memory.oom.group", "1"), ("hugetlb.2MB.max", "0")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            ..Resources::default()
        };
        let mut v2 = resources.clone();
        assert_eq!(
            render(&limits(&mut v2, Mode::V2, 255, DEVICES).unwrap()),
            "MemoryMax=uint64 67108864\nMemorySwapMax=uint64 33554432\nCPUWeight=uint64 100\n\
             CPUQuotaPerSecUSec=uint64 130000\nAllowedCPUs=[byte 0x03, 0x02]\nTasksMax=uint64 18446744073709551615\n\
             MemoryHigh=uint64 18446744073709551615\nOOMPolicy=\"kill\"\n"
        );
        assert_eq!(v2.cpu.unwrap().quota, Some(13_000), "the file gets what systemd will write");
        assert_eq!(
            render(&limits(&mut resources.clone(), Mode::Hybrid, 255, DEVICES).unwrap()),
            "MemoryLimit=uint64 67108864\nCPUShares=uint64 1024\nCPUQuotaPerSecUSec=uint64 130000\n\
             AllowedCPUs=[byte 0x03, 0x02]\nTasksMax=uint64 18446744073709551615\n"
        );
    }

    #[test]
    fn devices_are_an_allow_list_or_nothing() {
        let rule = |allow, kind: &str, major, minor, access: &str| DeviceSpec {
            allow,
            kind: Some(kind.to_owned()),
            major,
            minor,
            access: Some(access.to_owned()),
        };
        let show = |devices: Vec<DeviceSpec>| {
            let mut resources = Resources { devices, ..Resources::default() };
            render(&limits(&mut resources, Mode::V2, 252, DEVICES).unwrap())
        };
        let deny = rule(false, "a", None, None, "rwm");
        assert_eq!(
            show(vec![
                deny.clone(),
                rule(true, "c", Some(1), Some(3), "rwm"),
                rule(true, "c", Some(136), None, "rw"),
                rule(true, "b", Some(-1), None, "m"),
                rule(true, "b", Some(8), Some(1), "rw"),
                rule(false, "b", Some(8), Some(1), "w"),
            ]),
            "DevicePolicy=\"strict\"\nDeviceAllow=[(\"/dev/char/1:3\", \"rwm\"), (\"char-pts\", \"rw\"), \
             (\"block-*\", \"m\"), (\"/dev/block/8:1\", \"r\")]\n"
        );
        assert_eq!(
            show(vec![deny, rule(true, "a", None, None, "rwm"), rule(false, "b", Some(8), None, "rwm")]),
            "DevicePolicy=\"auto\"\nDeviceAllow=@a(ss) []\n",
            "an exception cannot be said"
        );
    }

    #[test]
    fn annotations_are_values_of_their_type() {
        let one = |name: &str, value: &str| {
            let map: std::collections::BTreeMap<String, String> =
                [(format!("org.systemd.property.{name}"), value.to_owned())].into();
            annotated(map.iter()).map(|list| render(&list))
        };
        for (name, value, want) in [
            ("TimeoutStopUSec", "uint64 5000", "TimeoutStopUSec=uint64 5000\n"),
            ("TimeoutStopSec", "7", "TimeoutStopUSec=uint64 7000000\n"),
            ("TimeoutStopSec", "0.5", "TimeoutStopUSec=uint64 500000\n"),
            ("CollectMode", "'inactive-or-failed'", "CollectMode=\"inactive-or-failed\"\n"),
            ("SendSIGKILL", "true", "SendSIGKILL=true\n"),
            ("After", "['a.service', \"b.service\"]", "After=[\"a.service\", \"b.service\"]\n"),
        ] {
            assert_eq!(one(name, value).as_deref(), Ok(want), "{name}={value}");
        }
        for (name, value) in
            [("Xx", "true"), ("Ta-b", "true"), ("TasksMax", "lots"), ("After", "['a"), ("TimeoutSec", "'x'")]
        {
            assert!(one(name, value).is_err(), "{name}={value}");
        }
    }

    #[test]
    fn masks_have_bounds() {
        assert_eq!(cpu_mask("0").unwrap(), [1]);
        for wrong in ["", "3-1", "a", "99999999", "1-", "-1"] {
            assert!(cpu_mask(wrong).is_err(), "{wrong:?}");
        }
    }
}
