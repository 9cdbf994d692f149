//! Resources lowered to writes of cgroup files. Pure.

use crate::layout::Mode;
use crate::resources::{BlockIo, Cpu, Memory, Resources, ThrottleDevice};

/// One value for one file of one controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub controller: &'static str,
    pub file: String,
    pub value: String,
    /// Whether a kernel without the file is no failure.
    pub optional: bool,
    /// What the file is called where it is not called so.
    pub or: Option<&'static str>,
}

fn set(controller: &'static str, file: impl Into<String>, value: impl ToString) -> Setting {
    Setting { controller, file: file.into(), value: value.to_string(), optional: false, or: None }
}

fn optional(controller: &'static str, file: impl Into<String>, value: impl ToString) -> Setting {
    Setting { optional: true, ..set(controller, file, value) }
}

/// A field of `linux.resources` for which this version of cgroups has no control, and why.
pub fn cannot_be_set(r: &Resources, mode: Mode) -> Option<(&'static str, &'static str)> {
    let memory = r.memory.clone().unwrap_or_default();
    if memory.use_hierarchy == Some(false) {
        return Some(("memory.useHierarchy", "no kernel since 5.11 can turn it off"));
    }
    // The number below zero is what callers write for "not set".
    if memory.swappiness.is_some_and(|s| s > 100 && s != u64::MAX) {
        return Some(("memory.swappiness", "it goes from 0 to 100"));
    }
    if mode != Mode::V2 {
        let wanted = mode == Mode::V1 && !r.unified.is_empty();
        return wanted.then_some(("unified", "this host has no cgroup v2"));
    }
    let why = "cgroup v2 has no such control";
    let cpu = r.cpu.clone().unwrap_or_default();
    let io = r.block_io.clone().unwrap_or_default();
    let network = r.network.clone().unwrap_or_default();
    let set = |n: Option<u64>| n.is_some_and(|n| n != 0);
    [
        ("memory.swappiness", memory.swappiness.is_some_and(|s| s <= 100)),
        ("memory.disableOOMKiller", memory.disable_oom_killer == Some(true)),
        ("cpu.realtimePeriod", set(cpu.realtime_period)),
        ("cpu.realtimeRuntime", cpu.realtime_runtime.is_some_and(|r| r != 0)),
        ("blockIO.leafWeight", set(io.leaf_weight.map(u64::from))),
        ("blockIO.weightDevice", io.weight_device.iter().any(|d| set(d.leaf_weight.map(u64::from)))),
        ("network.classID", set(network.class_id.map(u64::from))),
        ("network.priorities", !network.priorities.is_empty()),
    ]
    .into_iter()
    .find_map(|(field, there)| there.then_some((field, why)))
}

/// A field that present kernels no longer have a control for. The specification advises against it, callers still write it.
pub fn has_no_effect(r: &Resources, mode: Mode) -> Option<&'static str> {
    let memory = r.memory.as_ref()?;
    let set = |n: Option<i64>| n.is_some_and(|n| n != 0);
    match (set(memory.kernel), set(memory.kernel_tcp) && mode == Mode::V2) {
        (true, _) => Some("memory.kernel"),
        (_, true) => Some("memory.kernelTCP"),
        _ => None,
    }
}

/// Settings for v1 controllers, in an order that the kernel accepts for a new cgroup.
pub fn lower_v1(r: &Resources) -> Vec<Setting> {
    let mut out = Vec::new();
    if let Some(memory) = &r.memory {
        memory_v1(memory, &mut out);
    }
    if let Some(cpu) = &r.cpu {
        cpu_v1(cpu, &mut out);
    }
    if let Some(limit) = r.pids.as_ref().and_then(|p| p.limit) {
        out.push(set("pids", "pids.max", pids_limit(limit)));
    }
    if let Some(io) = &r.block_io {
        blkio_v1(io, &mut out);
    }
    for page in &r.hugepage_limits {
        out.push(set("hugetlb", format!("hugetlb.{}.limit_in_bytes", page.page_size), page.limit));
        out.push(optional("hugetlb", format!("hugetlb.{}.rsvd.limit_in_bytes", page.page_size), page.limit));
    }
    if let Some(network) = &r.network {
        if let Some(class) = network.class_id.filter(|class| *class != 0) {
            out.push(set("net_cls", "net_cls.classid", class));
        }
        for p in &network.priorities {
            out.push(set("net_prio", "net_prio.ifpriomap", format!("{} {}", p.name, p.priority)));
        }
    }
    rdma(r, &mut out);
    out
}

fn memory_v1(m: &Memory, out: &mut Vec<Setting>) {
    // A zero is what callers write for "not set".
    let given = |v: Option<i64>| v.filter(|v| *v != 0);
    if let Some(reservation) = given(m.reservation) {
        out.push(set("memory", "memory.soft_limit_in_bytes", reservation));
    }
    // The swap limit counts memory too, so it may never be below the memory limit, not even between two writes.
    match (given(m.limit), given(m.swap)) {
        (Some(-1), swap) => {
            out.push(optional("memory", "memory.memsw.limit_in_bytes", swap.unwrap_or(-1)));
            out.push(set("memory", "memory.limit_in_bytes", -1));
        }
        (Some(limit), swap) => {
            out.push(set("memory", "memory.limit_in_bytes", limit));
            if let Some(swap) = swap {
                out.push(optional("memory", "memory.memsw.limit_in_bytes", swap));
            }
        }
        (None, Some(swap)) => out.push(optional("memory", "memory.memsw.limit_in_bytes", swap)),
        (None, None) => {}
    }
    if let Some(tcp) = given(m.kernel_tcp) {
        out.push(optional("memory", "memory.kmem.tcp.limit_in_bytes", tcp));
    }
    if let Some(swappiness) = m.swappiness.filter(|s| *s <= 100) {
        out.push(set("memory", "memory.swappiness", swappiness));
    }
    if m.disable_oom_killer == Some(true) {
        out.push(set("memory", "memory.oom_control", 1));
    }
}

fn cpu_v1(c: &Cpu, out: &mut Vec<Setting>) {
    if let Some(idle) = c.idle {
        out.push(set("cpu", "cpu.idle", idle));
    }
    if let Some(shares) = c.shares.filter(|s| *s != 0) {
        out.push(set("cpu", "cpu.shares", shares));
    }
    // Burst above the old quota is refused, below it the new quota may be: clear it first.
    if c.burst.is_some() {
        out.push(optional("cpu", "cpu.cfs_burst_us", 0));
    }
    if let Some(period) = c.period.filter(|p| *p != 0) {
        out.push(set("cpu", "cpu.cfs_period_us", period));
    }
    if let Some(quota) = c.quota.filter(|q| *q != 0) {
        out.push(set("cpu", "cpu.cfs_quota_us", quota));
    }
    if let Some(burst) = c.burst.filter(|b| *b != 0) {
        out.push(set("cpu", "cpu.cfs_burst_us", burst));
    }
    if let Some(period) = c.realtime_period.filter(|p| *p != 0) {
        out.push(set("cpu", "cpu.rt_period_us", period));
    }
    if let Some(runtime) = c.realtime_runtime.filter(|r| *r != 0) {
        out.push(set("cpu", "cpu.rt_runtime_us", runtime));
    }
    if let Some(cpus) = c.cpus.as_ref().filter(|s| !s.is_empty()) {
        out.push(set("cpuset", "cpuset.cpus", cpus));
    }
    if let Some(mems) = c.mems.as_ref().filter(|s| !s.is_empty()) {
        out.push(set("cpuset", "cpuset.mems", mems));
    }
}

fn blkio_v1(io: &BlockIo, out: &mut Vec<Setting>) {
    if let Some(weight) = io.weight.filter(|w| *w != 0) {
        // Which of the two exists depends on the I/O scheduler that was built in.
        out.push(Setting { or: Some("blkio.bfq.weight"), ..set("blkio", "blkio.weight", weight) });
    }
    if let Some(weight) = io.leaf_weight.filter(|w| *w != 0) {
        out.push(set("blkio", "blkio.leaf_weight", weight));
    }
    for d in &io.weight_device {
        if let Some(weight) = d.weight {
            out.push(Setting {
                or: Some("blkio.bfq.weight_device"),
                ..set("blkio", "blkio.weight_device", format!("{}:{} {weight}", d.major, d.minor))
            });
        }
        if let Some(weight) = d.leaf_weight {
            out.push(set("blkio", "blkio.leaf_weight_device", format!("{}:{} {weight}", d.major, d.minor)));
        }
    }
    let mut throttle = |file: &str, devices: &[ThrottleDevice]| {
        for d in devices {
            out.push(set(
                "blkio",
                format!("blkio.throttle.{file}"),
                format!("{}:{} {}", d.major, d.minor, d.rate),
            ));
        }
    };
    throttle("read_bps_device", &io.throttle_read_bps_device);
    throttle("write_bps_device", &io.throttle_write_bps_device);
    throttle("read_iops_device", &io.throttle_read_iops_device);
    throttle("write_iops_device", &io.throttle_write_iops_device);
}

fn rdma(r: &Resources, out: &mut Vec<Setting>) {
    for (device, limit) in &r.rdma {
        let mut value = device.clone();
        if let Some(handles) = limit.hca_handles {
            value.push_str(&format!(" hca_handle={handles}"));
        }
        if let Some(objects) = limit.hca_objects {
            value.push_str(&format!(" hca_object={objects}"));
        }
        out.push(set("rdma", "rdma.max", value));
    }
}

/// 0 is a limit too. systemd knows none below 1, and for a container, whose process is there already, it is the same.
fn pids_limit(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.max(1).to_string() }
}

fn max_or(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// v1 shares (2..262144) on the scale of v2 weights (1..10000): the quadratic conversion in the logarithm that keeps
/// 2 -> 1, 1024 -> 100, 262144 -> 10000.
pub fn shares_to_weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let l = (shares as f64).log2();
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    10f64.powf(exponent).ceil() as u64
}

/// Settings for v2.
pub fn lower_v2(r: &Resources) -> Vec<Setting> {
    let mut out = Vec::new();
    if let Some(m) = &r.memory {
        memory_v2(m, &mut out);
    }
    if let Some(c) = &r.cpu {
        cpu_v2(c, &mut out);
    }
    if let Some(limit) = r.pids.as_ref().and_then(|p| p.limit) {
        out.push(set("pids", "pids.max", pids_limit(limit)));
    }
    if let Some(io) = &r.block_io {
        io_v2(io, &mut out);
    }
    for page in &r.hugepage_limits {
        out.push(set("hugetlb", format!("hugetlb.{}.max", page.page_size), page.limit));
        out.push(optional("hugetlb", format!("hugetlb.{}.rsvd.max", page.page_size), page.limit));
    }
    rdma(r, &mut out);
    for (file, value) in &r.unified {
        out.push(set(unified_controller(file), file.clone(), value));
    }
    out
}

fn unified_controller(file: &str) -> &'static str {
    const KNOWN: [&str; 9] = ["cpu", "cpuset", "io", "memory", "hugetlb", "pids", "rdma", "misc", "dmem"];
    let prefix = file.split('.').next().unwrap_or("");
    KNOWN.into_iter().find(|k| *k == prefix).unwrap_or("cgroup")
}

fn memory_v2(m: &Memory, out: &mut Vec<Setting>) {
    let given = |v: Option<i64>| v.filter(|v| *v != 0);
    if let Some(swap) = given(m.swap) {
        // The specification counts memory and swap together, v2 counts swap alone.
        let value = match given(m.limit) {
            _ if swap < 0 => "max".to_owned(),
            Some(limit) if limit > 0 && swap >= limit => (swap - limit).to_string(),
            _ => swap.to_string(),
        };
        out.push(optional("memory", "memory.swap.max", value));
    } else if given(m.limit) == Some(-1) {
        out.push(optional("memory", "memory.swap.max", "max"));
    }
    if let Some(limit) = given(m.limit) {
        out.push(set("memory", "memory.max", max_or(limit)));
    }
    if let Some(reservation) = given(m.reservation) {
        out.push(set("memory", "memory.low", max_or(reservation)));
    }
}

fn cpu_v2(c: &Cpu, out: &mut Vec<Setting>) {
    if let Some(idle) = c.idle {
        out.push(set("cpu", "cpu.idle", idle));
    }
    if let Some(shares) = c.shares.filter(|s| *s != 0)
        && c.idle != Some(1)
    {
        out.push(set("cpu", "cpu.weight", shares_to_weight(shares)));
    }
    let quota = c.quota.filter(|q| *q != 0);
    let period = c.period.filter(|p| *p != 0);
    if quota.is_some() || period.is_some() {
        let quota = quota.map_or("max".to_owned(), max_or);
        let value = match period {
            Some(period) => format!("{quota} {period}"),
            None => quota,
        };
        out.push(set("cpu", "cpu.max", value));
    }
    if let Some(burst) = c.burst {
        out.push(set("cpu", "cpu.max.burst", burst));
    }
    if let Some(cpus) = c.cpus.as_ref().filter(|s| !s.is_empty()) {
        out.push(set("cpuset", "cpuset.cpus", cpus));
    }
    if let Some(mems) = c.mems.as_ref().filter(|s| !s.is_empty()) {
        out.push(set("cpuset", "cpuset.mems", mems));
    }
}

fn io_v2(io: &BlockIo, out: &mut Vec<Setting>) {
    if let Some(weight) = io.weight.filter(|w| *w != 0) {
        // The two have different scales; a kernel may have both, and one must be there.
        out.push(optional("io", "io.bfq.weight", weight));
        out.push(Setting { or: Some("io.bfq.weight"), ..set("io", "io.weight", blkio_to_io_weight(weight)) });
    }
    for d in &io.weight_device {
        if let Some(weight) = d.weight {
            let line = |weight: u64| format!("{}:{} {weight}", d.major, d.minor);
            out.push(optional("io", "io.bfq.weight", line(weight.into())));
            let other = set("io", "io.weight", line(blkio_to_io_weight(weight)));
            out.push(Setting { or: Some("io.bfq.weight"), ..other });
        }
    }
    let mut throttle = |key: &str, devices: &[ThrottleDevice]| {
        for d in devices {
            let rate = if d.rate == 0 { "max".to_owned() } else { d.rate.to_string() };
            out.push(set("io", "io.max", format!("{}:{} {key}={rate}", d.major, d.minor)));
        }
    };
    throttle("rbps", &io.throttle_read_bps_device);
    throttle("wbps", &io.throttle_write_bps_device);
    throttle("riops", &io.throttle_read_iops_device);
    throttle("wiops", &io.throttle_write_iops_device);
}

/// 10..1000 on the scale 1..10000.
fn blkio_to_io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::Pids;

    fn render(settings: &[Setting]) -> String {
        settings
            .iter()
            .map(|s| {
                format!("{}/{}={}{}\n", s.controller, s.file, s.value, if s.optional { "?" } else { "" })
            })
            .collect()
    }

    #[test]
    fn both_versions_of_a_typical_pod() {
        let r = Resources {
            memory: Some(Memory { limit: Some(64 << 20), swap: Some(96 << 20), ..Default::default() }),
            cpu: Some(Cpu {
                shares: Some(1024),
                quota: Some(50_000),
                period: Some(100_000),
                ..Default::default()
            }),
            pids: Some(Pids { limit: Some(-1) }),
            ..Default::default()
        };
        assert_eq!(
            render(&lower_v1(&r)),
            "memory/memory.limit_in_bytes=67108864\nmemory/memory.memsw.limit_in_bytes=100663296?\n\
             cpu/cpu.shares=1024\ncpu/cpu.cfs_period_us=100000\ncpu/cpu.cfs_quota_us=50000\npids/pids.max=max\n"
        );
        assert_eq!(
            render(&lower_v2(&r)),
            "memory/memory.swap.max=33554432?\nmemory/memory.max=67108864\n\
             cpu/cpu.weight=100\ncpu/cpu.max=50000 100000\npids/pids.max=max\n"
        );
    }

    #[test]
    fn raising_to_unlimited_lifts_swap_first() {
        let r = Resources {
            memory: Some(Memory { limit: Some(-1), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(
            render(&lower_v1(&r)),
            "memory/memory.memsw.limit_in_bytes=-1?\nmemory/memory.limit_in_bytes=-1\n"
        );
    }

    #[test]
    fn weights_keep_their_corners() {
        assert_eq!(shares_to_weight(2), 1);
        assert_eq!(shares_to_weight(1024), 100);
        assert_eq!(shares_to_weight(262_144), 10_000);
        assert!((2..262_144).all(|s| shares_to_weight(s) <= shares_to_weight(s + 1)));
    }

    #[test]
    fn zero_is_not_set() {
        let r = Resources {
            memory: Some(Memory { limit: Some(0), ..Default::default() }),
            cpu: Some(Cpu { shares: Some(0), quota: Some(0), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(render(&lower_v1(&r)), "");
    }
}
