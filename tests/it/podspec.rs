//! Every field of a PodSpec, seen from inside a real container or in the kernel's own files.

use std::fs;
use std::path::PathBuf;

use keel_tests::image::{self, BUSYBOX};
use keel_tests::{Instance, Ran, eventually_or};
use serde_json::Value;

mod lifecycle;
mod namespaces;
mod probes;
mod process;
mod resources;
mod runc;
mod security;
mod users;
mod volumes;

/// What a container runs that only waits.
const WAIT: &str = "command: [sh, -c, 'trap \"exit 0\" TERM; sleep 100000 & wait']";

/// A pod of one container `main` from the busybox image. `fields` are fields of the pod's spec and `container` of that
/// container, each as YAML of its own, flow or block, not indented.
fn pod(name: &str, fields: &str, container: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}-app}}}}\nspec:\n  \
         terminationGracePeriodSeconds: 2\n{}  containers:\n  - name: main\n    image: {BUSYBOX}\n{}",
        indented(fields, 2),
        indented(container, 4),
    )
}

/// Runs once and ends.
fn job(name: &str, fields: &str, container: &str) -> String {
    pod(name, &format!("restartPolicy: Never\n{fields}"), container)
}

fn indented(text: &str, by: usize) -> String {
    text.lines().map(|line| format!("{:by$}{line}\n", "")).collect()
}

/// An instance with the busybox image and nothing running.
fn fresh() -> Instance {
    let instance = Instance::new();
    instance.import_busybox();
    instance
}

/// An instance in which these manifests are up.
fn up(manifests: &str) -> Instance {
    let instance = fresh();
    instance.apply(manifests).expect_code(0);
    instance
}

/// What a shell in the container `main` prints.
#[track_caller]
fn sh(instance: &Instance, pod: &str, script: &str) -> String {
    sh_in(instance, pod, "main", script)
}

#[track_caller]
fn sh_in(instance: &Instance, pod: &str, container: &str, script: &str) -> String {
    let ran = instance.keel(&["exec", pod, "-c", container, "--", "sh", "-c", script]).expect_code(0);
    ran.stdout.trim_end().to_string()
}

/// What a pod that runs once has printed, after its end.
#[track_caller]
fn logs(instance: &Instance, pod: &str) -> String {
    eventually_or(
        || format!("{pod} ends: {:#}", instance.pod(pod)["status"]),
        || ["Succeeded", "Failed"].iter().find(|phase| instance.pod(pod)["status"]["phase"] == **phase),
    );
    instance.keel(&["logs", pod]).expect_code(0).stdout.trim_end().to_string()
}

/// Applies what cannot run and returns all that is said about it.
#[track_caller]
fn refused(instance: &Instance, manifest: &str) -> String {
    let ran: Ran = instance.keel_with_input(&["apply", "-f", "-", "--wait", "--timeout", "3s"], manifest);
    assert_ne!(ran.code(), 0, "{}", ran.all());
    ran.all()
}

#[track_caller]
fn pid_of(instance: &Instance, container: &str) -> u32 {
    let pids = instance.pids();
    let found = pids.iter().find(|(id, _)| id.contains(&format!(".{container}.")));
    *found.unwrap_or_else(|| panic!("{container} does not run: {pids:?}")).1
}

/// A field of `/proc/<pid>/status` as the host sees it.
fn proc_status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Imports an image made of busybox, of what `change` does to its files, and of `config`.
fn import(instance: &Instance, reference: &str, config: &Value, change: impl FnOnce(&std::path::Path)) {
    let rootfs = instance.path().join("made-rootfs");
    image::busybox_rootfs(&rootfs);
    change(&rootfs);
    let archive: PathBuf = instance.path().join("made.tar");
    image::docker_archive(&archive, &rootfs, reference, config);
    instance.keel(&["image", "import", archive.to_str().expect("UTF-8")]).expect_code(0);
    fs::remove_dir_all(rootfs).expect("remove the root file system");
}

/// The status of the container `main`.
fn main_status(instance: &Instance, pod: &str) -> Value {
    container_status(instance, pod, "containerStatuses", "main")
}

fn container_status(instance: &Instance, pod: &str, list: &str, name: &str) -> Value {
    let pod = instance.pod(pod);
    let all = pod["status"][list].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|status| status["name"] == name).unwrap_or(Value::Null)
}

#[track_caller]
fn await_phase(instance: &Instance, pod: &str, phase: &str) -> Value {
    eventually_or(
        || format!("{pod} is {phase}: {:#}", instance.pod(pod)["status"]),
        || Some(instance.pod(pod)).filter(|found| found["status"]["phase"] == phase),
    )
}
