//! Usage figures in the shape of runc's `events --stats`.

use crate::group::Cgroup;
use crate::layout::Mode;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    pub cpu: CpuStats,
    pub cpuset: BTreeMap<String, Cpuset>,
    pub memory: MemoryStats,
    pub pids: PidsStats,
    pub blkio: BlkioStats,
    /// By page size.
    pub hugetlb: BTreeMap<String, Hugetlb>,
    pub intel_rdt: BTreeMap<String, u64>,
    pub network_interfaces: Option<Vec<u64>>,
}

/// `0-1,4` is `[0, 1, 4]`; a switch is a number.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Cpuset {
    List(Vec<u64>),
    Number(i64),
}

/// Bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Hugetlb {
    #[serde(skip_serializing_if = "is_zero")]
    pub usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub max: u64,
    pub failcnt: u64,
}

/// Nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CpuStats {
    pub usage: CpuUsage,
    pub throttling: Throttling,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CpuUsage {
    pub total: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu_kernel: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub percpu_user: Vec<u64>,
    pub kernel: u64,
    pub user: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttling {
    #[serde(skip_serializing_if = "is_zero")]
    pub periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub throttled_periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub throttled_time: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MemoryStats {
    #[serde(skip_serializing_if = "is_zero")]
    pub cache: u64,
    pub usage: MemoryEntry,
    pub swap: MemoryEntry,
    pub kernel: MemoryEntry,
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub raw: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MemoryEntry {
    pub limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub max: u64,
    pub failcnt: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PidsStats {
    #[serde(skip_serializing_if = "is_zero")]
    pub current: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub limit: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BlkioStats {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_service_bytes_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_serviced_recursive: Vec<BlkioEntry>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct BlkioEntry {
    pub major: u64,
    pub minor: u64,
    pub op: String,
    pub value: u64,
}

impl Cgroup {
    /// A file that is missing counts as zero: controllers differ between hosts.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        if self.mode == Mode::V2 {
            if let Some(entry) = self.v2() {
                stats_v2(&entry.dir, &mut stats);
            }
        } else {
            stats_v1(self, &mut stats);
        }
        stats
    }
}

fn text(dir: &Path, file: &str) -> String {
    fs::read_to_string(dir.join(file)).unwrap_or_default()
}

/// `max` and what does not parse is `u64::MAX`; a missing file is 0.
fn number(dir: &Path, file: &str) -> u64 {
    match text(dir, file).trim() {
        "" => 0,
        text => text.parse().unwrap_or(u64::MAX),
    }
}

fn flat(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn stats_v1(group: &Cgroup, stats: &mut Stats) {
    if let Some(dir) = group.dir_of("cpuacct") {
        stats.cpu.usage.total = number(dir, "cpuacct.usage");
        stats.cpu.usage.kernel = number(dir, "cpuacct.usage_sys");
        stats.cpu.usage.user = number(dir, "cpuacct.usage_user");
        stats.cpu.usage.percpu =
            text(dir, "cpuacct.usage_percpu").split_whitespace().filter_map(|n| n.parse().ok()).collect();
    }
    if let Some(dir) = group.dir_of("cpuacct") {
        // A line for each CPU: its number, time of user and of system.
        for line in text(dir, "cpuacct.usage_all").lines().skip(1) {
            let mut numbers = line.split_whitespace().skip(1).filter_map(|n| n.parse::<u64>().ok());
            stats.cpu.usage.percpu_user.extend(numbers.next());
            stats.cpu.usage.percpu_kernel.extend(numbers.next());
        }
    }
    if let Some(dir) = group.dir_of("cpuset") {
        stats.cpuset = cpuset(dir);
    }
    if let Some(dir) = group.dir_of("hugetlb") {
        stats.hugetlb = hugetlb(dir, |size, dir| Hugetlb {
            usage: number(dir, &format!("hugetlb.{size}.usage_in_bytes")),
            max: number(dir, &format!("hugetlb.{size}.max_usage_in_bytes")),
            failcnt: number(dir, &format!("hugetlb.{size}.failcnt")),
        });
    }
    if let Some(dir) = group.dir_of("cpu") {
        let map = flat(&text(dir, "cpu.stat"));
        let get = |key: &str| map.get(key).copied().unwrap_or(0);
        stats.cpu.throttling = Throttling {
            periods: get("nr_periods"),
            throttled_periods: get("nr_throttled"),
            throttled_time: get("throttled_time"),
        };
    }
    if let Some(dir) = group.dir_of("memory") {
        let entry = |prefix: &str| MemoryEntry {
            limit: number(dir, &format!("{prefix}.limit_in_bytes")),
            usage: number(dir, &format!("{prefix}.usage_in_bytes")),
            max: number(dir, &format!("{prefix}.max_usage_in_bytes")),
            failcnt: number(dir, &format!("{prefix}.failcnt")),
        };
        stats.memory.raw = flat(&text(dir, "memory.stat"));
        stats.memory.cache = stats.memory.raw.get("cache").copied().unwrap_or(0);
        stats.memory.usage = entry("memory");
        stats.memory.swap = entry("memory.memsw");
        stats.memory.kernel = entry("memory.kmem");
        stats.memory.kernel_tcp = entry("memory.kmem.tcp");
    }
    if let Some(dir) = group.dir_of("pids") {
        stats.pids = pids(dir);
    }
    if let Some(dir) = group.dir_of("blkio") {
        let entries = |file: &str| text(dir, file).lines().filter_map(blkio_line).collect::<Vec<_>>();
        stats.blkio.io_service_bytes_recursive = entries("blkio.throttle.io_service_bytes_recursive");
        stats.blkio.io_serviced_recursive = entries("blkio.throttle.io_serviced_recursive");
    }
}

/// Of v1; on v2 other runtimes say 0 for each.
const CPUSET_SWITCHES: [&str; 9] = [
    "cpu_exclusive",
    "mem_exclusive",
    "mem_hardwall",
    "memory_migrate",
    "memory_pressure",
    "memory_spread_page",
    "memory_spread_slab",
    "sched_load_balance",
    "sched_relax_domain_level",
];

fn cpuset(dir: &Path) -> BTreeMap<String, Cpuset> {
    let mut out = BTreeMap::new();
    for name in ["cpus", "mems"] {
        let numbers = text(dir, &format!("cpuset.{name}")).trim().split(',').flat_map(range).collect();
        out.insert(name.to_owned(), Cpuset::List(numbers));
    }
    for name in CPUSET_SWITCHES {
        let value = text(dir, &format!("cpuset.{name}")).trim().parse().unwrap_or(0);
        out.insert(name.to_owned(), Cpuset::Number(value));
    }
    out
}

/// `3` or `2-4`; nothing for what is neither.
fn range(text: &str) -> std::ops::RangeInclusive<u64> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) => first..=last,
        _ => std::ops::RangeInclusive::new(1, 0),
    }
}

/// One entry for each page size that has files.
fn hugetlb(dir: &Path, read: impl Fn(&str, &Path) -> Hugetlb) -> BTreeMap<String, Hugetlb> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
    let sizes = names.filter_map(|name| {
        let size = name.to_str()?.strip_prefix("hugetlb.")?.split('.').next()?;
        size.ends_with('B').then(|| size.to_owned())
    });
    sizes.map(|size| (size.clone(), read(&size, dir))).collect()
}

/// `8:0 Read 4096`
fn blkio_line(line: &str) -> Option<BlkioEntry> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    Some(BlkioEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        op: words.next()?.to_owned(),
        value: words.next()?.parse().ok()?,
    })
}

fn pids(dir: &Path) -> PidsStats {
    let limit = number(dir, "pids.max");
    PidsStats { current: number(dir, "pids.current"), limit: if limit == u64::MAX { 0 } else { limit } }
}

fn stats_v2(dir: &Path, stats: &mut Stats) {
    let cpu = flat(&text(dir, "cpu.stat"));
    let nanos = |key: &str| cpu.get(key).copied().unwrap_or(0) * 1000;
    stats.cpu.usage.total = nanos("usage_usec");
    stats.cpu.usage.user = nanos("user_usec");
    stats.cpu.usage.kernel = nanos("system_usec");
    stats.cpu.throttling = Throttling {
        periods: cpu.get("nr_periods").copied().unwrap_or(0),
        throttled_periods: cpu.get("nr_throttled").copied().unwrap_or(0),
        throttled_time: nanos("throttled_usec"),
    };
    stats.memory.raw = flat(&text(dir, "memory.stat"));
    stats.memory.cache = stats.memory.raw.get("file").copied().unwrap_or(0);
    stats.memory.usage = MemoryEntry {
        limit: number(dir, "memory.max"),
        usage: number(dir, "memory.current"),
        max: number(dir, "memory.peak"),
        failcnt: flat(&text(dir, "memory.events")).get("max").copied().unwrap_or(0),
    };
    // As on v1, which is how the figure is read: memory and swap together.
    let memory = &stats.memory.usage;
    stats.memory.swap = MemoryEntry {
        limit: number(dir, "memory.swap.max").saturating_add(memory.limit),
        usage: number(dir, "memory.swap.current").saturating_add(memory.usage),
        max: 0,
        failcnt: 0,
    };
    stats.cpuset = CPUSET_SWITCHES.into_iter().map(|name| (name.to_owned(), Cpuset::Number(0))).collect();
    stats.pids = pids(dir);
    stats.hugetlb = hugetlb(dir, |size, dir| Hugetlb {
        usage: number(dir, &format!("hugetlb.{size}.current")),
        max: 0,
        failcnt: flat(&text(dir, &format!("hugetlb.{size}.events"))).get("max").copied().unwrap_or(0),
    });
    for line in text(dir, "io.stat").lines() {
        io_stat_line(line, &mut stats.blkio);
    }
}

/// `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 ...`
fn io_stat_line(line: &str, blkio: &mut BlkioStats) {
    let mut words = line.split_whitespace();
    let Some((major, minor)) = words.next().and_then(|w| w.split_once(':')) else { return };
    let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { return };
    for (key, value) in words.filter_map(|w| w.split_once('=')) {
        let Ok(value) = value.parse() else { continue };
        let mut push = |list: fn(&mut BlkioStats) -> &mut Vec<BlkioEntry>, op: &str| {
            list(blkio).push(BlkioEntry { major, minor, op: op.to_owned(), value });
        };
        match key {
            "rbytes" => push(|b| &mut b.io_service_bytes_recursive, "Read"),
            "wbytes" => push(|b| &mut b.io_service_bytes_recursive, "Write"),
            "rios" => push(|b| &mut b.io_serviced_recursive, "Read"),
            "wios" => push(|b| &mut b.io_serviced_recursive, "Write"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_numbers_are_expanded() {
        let all = |text: &str| text.split(',').flat_map(range).collect::<Vec<u64>>();
        assert_eq!(all("0-2,7"), [0, 1, 2, 7]);
        assert_eq!(all(""), []);
        assert_eq!(all("x-1,3"), [3]);
    }
}
