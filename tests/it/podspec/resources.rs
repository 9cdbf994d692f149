//! CPU and memory as the kernel has them.

use std::fs;

use keel_tests::{Instance, eventually_or};

use super::{WAIT, fresh, main_status, pid_of, pod, proc_status, up};

/// A file of the container's cgroup: on v1 of that controller's hierarchy, on v2 of the only one.
fn cgroup_file(pid: u32, controller: &str, v1: &str, v2: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("the process lives");
    let of = |wanted: &str| {
        text.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let names = parts.next()?;
            names.split(',').any(|name| name == wanted).then(|| parts.next().unwrap_or_default().to_string())
        })
    };
    let path = match of(controller) {
        Some(dir) => {
            let mounted = [controller, "cpu,cpuacct"].map(|name| format!("/sys/fs/cgroup/{name}{dir}/{v1}"));
            mounted
                .into_iter()
                .find(|path| fs::exists(path).unwrap_or(false))
                .expect("the file of a v1 cgroup")
        }
        None => format!("/sys/fs/cgroup{}/{v2}", of("").expect("a v2 line")),
    };
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}")).trim().to_string()
}

fn is_v1(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("the process lives").contains(":memory:")
}

#[test]
fn limits_and_requests_are_the_cgroups_numbers() {
    let instance = up(&pod(
        "web",
        "",
        &format!(
            "{WAIT}\nresources: {{limits: {{cpu: 500m, memory: 64Mi}}, requests: {{cpu: 250m, memory: 32Mi}}}}"
        ),
    ));
    let pid = pid_of(&instance, "main");
    assert_eq!(cgroup_file(pid, "memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    let promised = cgroup_file(pid, "memory", "memory.soft_limit_in_bytes", "memory.low");
    assert_eq!(promised, (32 << 20).to_string());
    if is_v1(pid) {
        assert_eq!(cgroup_file(pid, "cpu", "cpu.cfs_quota_us", ""), "50000");
        assert_eq!(cgroup_file(pid, "cpu", "cpu.cfs_period_us", ""), "100000");
        assert_eq!(cgroup_file(pid, "cpu", "cpu.shares", ""), "256");
    } else {
        assert_eq!(cgroup_file(pid, "cpu", "", "cpu.max"), "50000 100000");
    }
    assert_eq!(cgroup_file(pid, "pids", "pids.max", "pids.max"), "2048");
    let adjust = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    let adjust: i64 = adjust.trim().parse().unwrap();
    assert!((2..1000).contains(&adjust), "burstable: {adjust}");
}

#[test]
fn without_resources_nothing_is_limited_but_processes() {
    let instance = up(&pod("web", "", WAIT));
    let pid = pid_of(&instance, "main");
    if is_v1(pid) {
        assert_eq!(cgroup_file(pid, "cpu", "cpu.cfs_quota_us", ""), "-1");
        assert_eq!(cgroup_file(pid, "cpu", "cpu.shares", ""), "2");
    } else {
        assert_eq!(cgroup_file(pid, "memory", "", "memory.max"), "max");
    }
    assert_eq!(cgroup_file(pid, "pids", "pids.max", "pids.max"), "2048");
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim(), "1000");
    assert_eq!(proc_status(pid, "Pid"), pid.to_string());
}

fn last_end(instance: &Instance, name: &str) -> Option<serde_json::Value> {
    let status = main_status(instance, name);
    [&status["state"]["terminated"], &status["lastState"]["terminated"]]
        .into_iter()
        .find(|ended| ended.is_object())
        .cloned()
}

#[test]
fn a_container_over_its_memory_is_reported_as_oom_killed() {
    let instance = fresh();
    // Its first process outgrows what the pod may have.
    let hog = "command: [sh, -c, 'x=$(yes | head -c 100000000); echo $x']";
    let manifest =
        pod("hog", "restartPolicy: Never", &format!("{hog}\nresources: {{limits: {{memory: 16Mi}}}}"));
    instance.apply(&manifest);
    let ended = eventually_or(
        || format!("the end is known: {:#}", instance.pod("hog")["status"]),
        || last_end(&instance, "hog"),
    );
    assert_eq!(ended["reason"], "OOMKilled", "{ended:#}");
    assert_eq!(ended["exitCode"], 137, "{ended:#}");
}
