//! The runtime called by an ordinary user.

use super::*;
use std::os::unix::fs::chown;

const USER: u32 = 54_321;
/// What /etc/subuid and /etc/subgid give to the user.
const SUB: u32 = 300_000;

/// A case that belongs to the user, in a user namespace with these maps of (inside, outside, count).
fn users_case(script: &str, maps: &[(u32, u32, u32)]) -> Case {
    let mut case = Case::new(script);
    let mut maps: Vec<Value> = maps
        .iter()
        .map(|(inside, outside, size)| json!({"containerID": inside, "hostID": outside, "size": size}))
        .collect();
    case.set("/linux/namespaces/-", json!({"type": "user"}));
    case.set("/linux/uidMappings", json!(maps));
    for map in &mut maps {
        if map["hostID"] == USER {
            map["hostID"] = json!(USER + 1);
        }
    }
    case.set("/linux/gidMappings", json!(maps));
    case.config["linux"].as_object_mut().unwrap().remove("resources");
    fs::create_dir(case.path("state")).unwrap();
    // Only the owner's entries are looked at: a user that the host does not have, in files that it does not see.
    for (name, line) in [
        ("passwd", format!("root:x:0:0::/:/bin/sh\nkeelit:x:{USER}:{}::/:/bin/sh\n", USER + 1)),
        ("group", format!("root:x:0:\nkeelit:x:{}:\n", USER + 1)),
        ("subuid", format!("keelit:{SUB}:65536\n")),
        ("subgid", format!("keelit:{SUB}:65536\n")),
    ] {
        fs::write(case.path(name), line).unwrap();
    }
    fs::write(case.path("runtime"), "").unwrap();
    let owned =
        Command::new("chown").args(["-R", &format!("{USER}:{}", USER + 1)]).arg(case.dir.path()).status();
    assert!(owned.unwrap().success());
    case
}

/// The command as the user, who has no right at all outside; `first` is run before, as root.
fn as_user(case: &Case, first: &str, args: &[&str]) -> Output {
    let inner = case.command(args);
    chown(case.path("config.json"), Some(USER), Some(USER + 1)).unwrap();
    let dir = case.dir.path().display();
    let script = format!(
        "{first}\n for f in passwd group subuid subgid; do test -e /etc/$f || exit 90; mount --bind {dir}/$f /etc/$f; done; \
         mount --bind {} {dir}/runtime; cd {dir}; \
         exec setpriv --reuid {USER} --regid {} --clear-groups -- {dir}/runtime \"$@\"",
        runtime().display(),
        USER + 1
    );
    let out = fs::File::create(case.path("out")).unwrap();
    let err = fs::File::create(case.path("err")).unwrap();
    for name in ["out", "err"] {
        chown(case.path(name), Some(USER), Some(USER + 1)).unwrap();
    }
    let status = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh"])
        .args(inner.get_args())
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .status()
        .unwrap();
    let read = |name: &str| fs::read(case.path(name)).unwrap();
    Output { status, stdout: read("out"), stderr: read("err") }
}

#[track_caller]
fn ok(case: &Case, args: &[&str]) -> String {
    let output = as_user(case, "true", args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn no_uidmap() -> bool {
    let missing = !Path::new("/usr/bin/newuidmap").exists() || !Path::new("/etc/subuid").exists();
    if missing {
        eprintln!("skipped: needs newuidmap and /etc/subuid (package uidmap)");
    }
    missing
}

const OWN: &[(u32, u32, u32)] = &[(0, USER, 1)];

#[test]
fn an_ordinary_user_runs_a_container_to_its_exit_code() {
    require!(ours);
    let case = users_case("id -u; id -g; touch /data/f; exit 5", OWN);
    let bundle = case.bundle();
    let output = as_user(&case, "true", &["run", "--bundle", &bundle, &case.id]);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "0\n0\n");
    assert_eq!(fs::metadata(case.rootfs().join("data/f")).unwrap().uid(), USER);
    assert_eq!(fs::read_dir(case.path("state")).unwrap().count(), 0);
}

#[test]
fn an_ordinary_user_creates_execs_kills_and_deletes() {
    require!(ours);
    let case = users_case("sleep 1000", OWN).with("/hostname", json!("inside"));
    let bundle = case.bundle();
    ok(&case, &["create", "--bundle", &bundle, &case.id]);
    ok(&case, &["start", &case.id]);
    assert_eq!(
        ok(&case, &["exec", &case.id, "sh", "-c", "id -u; hostname; ps | grep -c 'sleep 1000$'"]),
        "0\ninside\n1\n"
    );
    let output = as_user(&case, "true", &["exec", &case.id, "sh", "-c", "exit 9"]);
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    let pid =
        serde_json::from_str::<Value>(&ok(&case, &["state", &case.id])).unwrap()["pid"].as_i64().unwrap();
    ok(&case, &["kill", &case.id, "KILL"]);
    wait_for("the process to go", || !alive(pid as i32));
    ok(&case, &["delete", &case.id]);
    assert_eq!(fs::read_dir(case.path("state")).unwrap().count(), 0);
}

/// The process that waits cannot be traced by its user either, so it tells its namespaces itself.
#[test]
fn an_ordinary_user_executes_in_a_container_that_is_not_started() {
    require!(ours);
    let case = users_case("cat /data/made", OWN).with("/hostname", json!("early"));
    let bundle = case.bundle();
    ok(&case, &["create", "--bundle", &bundle, &case.id]);
    let state = ok(&case, &["state", &case.id]);
    let pid = serde_json::from_str::<Value>(&state).unwrap()["pid"].as_i64().unwrap();
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
    let of_init =
        kinds.map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().display().to_string());
    let script = "id -u; hostname; echo made > /data/made; \
                  for n in cgroup ipc mnt net pid user uts; do readlink /proc/self/ns/$n; done";
    let said = ok(&case, &["exec", &case.id, "sh", "-c", script]);
    assert_eq!(said, format!("0\nearly\n{}\n", of_init.join("\n")));
    assert_eq!(fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid(), 0, "it can be traced");
    let state = ok(&case, &["state", &case.id]);
    assert!(state.contains("\"created\""), "{state}");
    let output = as_user(&case, "true", &["exec", &case.id, "sh", "-c", "exit 9"]);
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    ok(&case, &["start", &case.id]);
    wait_for("the program to end", || !alive(pid as i32));
    ok(&case, &["delete", &case.id]);
}

#[test]
fn ranges_of_subordinate_ids_are_mapped_by_newuidmap() {
    require!(ours);
    if no_uidmap() {
        return;
    }
    let case =
        users_case("tr -s ' ' < /proc/self/uid_map; id; touch /tmp/f", &[(0, USER, 1), (1, SUB, 1000)])
            .with("/process/user", json!({"uid": 7, "gid": 8, "additionalGids": [9]}));
    fs::set_permissions(case.rootfs().join("tmp"), fs::Permissions::from_mode(0o777)).unwrap();
    let bundle = case.bundle();
    let said = ok(&case, &["run", "--bundle", &bundle, &case.id]);
    assert_eq!(
        said,
        format!(" 0 {USER} 1\n 1 {SUB} 1000\nuid=7 gid=8 groups=8,9\n").replace("groups=8,9", "groups=9")
    );
    let made = fs::metadata(case.rootfs().join("tmp/f")).unwrap();
    assert_eq!((made.uid(), made.gid()), (SUB + 6, SUB + 7));
}

#[test]
fn ids_that_the_user_was_not_given_are_refused_with_the_place_to_look() {
    require!(ours);
    if no_uidmap() {
        return;
    }
    let case = users_case("true", &[(0, USER, 1), (1, 1, 1000)]);
    let bundle = case.bundle();
    let output = as_user(&case, "true", &["run", "--bundle", &bundle, &case.id]);
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("newuidmap") && said.contains("/etc/subuid"), "{said}");
    assert_eq!(fs::read_dir(case.path("state")).unwrap().count(), 0);
}

#[test]
fn the_oom_score_of_an_ordinary_users_container_is_raised() {
    require!(ours);
    let case = users_case("cat /proc/self/oom_score_adj", OWN).with("/process/oomScoreAdj", json!(500));
    let bundle = case.bundle();
    assert_eq!(ok(&case, &["run", "--bundle", &bundle, &case.id]), "500\n");
}

/// CVE-2023-25809: without a cgroup namespace the caller's cgroups must not be writable inside.
#[test]
fn the_rootless_template_runs_and_leaves_the_cgroups_alone() {
    require!(ours);
    let mut case = users_case("true", OWN);
    let bundle = case.bundle();
    fs::remove_file(case.path("config.json")).unwrap_or_default();
    let spec =
        as_user(&case, &format!("rm {bundle}/config.json"), &["spec", "--rootless", "--bundle", &bundle]);
    assert!(spec.status.success(), "{}", text(&spec.stderr));
    case.config = serde_json::from_slice(&fs::read(case.path("config.json")).unwrap()).unwrap();
    assert_eq!(case.config["linux"]["uidMappings"][0]["hostID"], USER);
    case.set("/process/terminal", json!(false));
    let script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/keel-it-escape 2>/dev/null && echo $d; done; echo ran";
    case.set("/process/args", json!(["sh", "-c", script]));
    for keep in [true, false] {
        if !keep {
            case = case.without_namespace("cgroup");
        }
        let output = as_user(&case, "true", &["run", "--bundle", &bundle, &case.id]);
        assert_eq!(text(&output.stdout), "ran\n", "{keep}: {}", text(&output.stderr));
    }
}

/// Directories of every hierarchy that belong to the user, and go with the test.
struct Delegated(Vec<PathBuf>);

impl Drop for Delegated {
    fn drop(&mut self) {
        for dir in &self.0 {
            for below in ["c", "caller"] {
                let _ = fs::remove_dir(dir.join(below));
            }
            let _ = fs::remove_dir(dir);
        }
    }
}

#[test]
fn limits_hold_in_a_cgroup_that_was_delegated_to_the_user() {
    require!(ours);
    // Dropped after the case, which may still have processes there.
    let mut delegated = Delegated(Vec::new());
    let case = users_case("sleep 1000", OWN).with("/linux/resources", json!({"pids": {"limit": 7}}));
    let path = format!("/{}/c", case.id);
    let case = case.with("/linux/cgroupsPath", json!(path));
    delegated.0 = case.cgroup_dirs();
    let mut callers = String::new();
    for dir in &delegated.0 {
        fs::create_dir(dir).unwrap();
        fs::create_dir(dir.join("caller")).unwrap();
        for entry in [dir.clone(), dir.join("caller")] {
            chown(&entry, Some(USER), Some(USER + 1)).unwrap();
            for file in ["cgroup.procs", "tasks", "cgroup.threads", "cgroup.subtree_control"] {
                let _ = chown(entry.join(file), Some(USER), Some(USER + 1));
            }
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            // A v1 cpuset takes no process before it has these.
            let above = fs::read_to_string(dir.parent().unwrap().join(file)).unwrap_or_default();
            let _ = fs::write(dir.join(file), &above);
            let _ = fs::write(dir.join("caller").join(file), &above);
        }
        callers += &format!("echo $$ > {}/cgroup.procs; ", dir.join("caller").display());
    }
    let bundle = case.bundle();
    let output = as_user(&case, &callers, &["create", "--bundle", &bundle, &case.id]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("no cgroup"), "{}", text(&output.stderr));
    let pids = delegated.0.iter().find_map(|d| fs::read_to_string(d.join("c/pids.max")).ok());
    assert_eq!(pids.as_deref(), Some("7\n"));
    let output = as_user(&case, &callers, &["start", &case.id]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = as_user(&case, &callers, &["exec", &case.id, "cat", "/proc/self/cgroup"]);
    assert!(text(&output.stdout).contains("/c\n"), "{}{}", text(&output.stdout), text(&output.stderr));
    let output = as_user(&case, &callers, &["delete", "--force", &case.id]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(delegated.0.iter().all(|d| !d.join("c").exists()), "a cgroup is left");
}
