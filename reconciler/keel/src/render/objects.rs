//! Tables and descriptions of pods and deployments, made from one status.

use std::fmt::Write as _;

use keel_api::{Event, Status};
use keel_manifest::model::{Container, PodSpec};
use keel_plan::{Condition, ContainerStatus, DeploymentStatus, PodStatus, State};

use crate::render::spec;
use crate::render::table::Table;
use crate::term::Paint;
use crate::text::age;

/// What a table shows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Columns {
    pub(crate) headers: bool,
    pub(crate) wide: bool,
    pub(crate) namespace: bool,
    pub(crate) color: bool,
}

pub(crate) fn render_pods<'a>(
    pods: impl IntoIterator<Item = &'a PodStatus>,
    columns: Columns,
    now: u64,
) -> String {
    let mut names = vec!["NAME", "READY", "STATUS", "RESTARTS", "AGE"];
    if columns.namespace {
        names.insert(0, "NAMESPACE");
    }
    if columns.wide {
        names.extend(["IP", "IMAGE", "DECLARED-IN"]);
    }
    let mut table = Table::with_header(&names, columns.headers);
    for pod in pods {
        table.row(pod_row(pod, columns, now));
    }
    table.render(0)
}

fn pod_row(pod: &PodStatus, columns: Columns, now: u64) -> Vec<String> {
    let main = &pod.container_statuses;
    let ready = main.iter().filter(|container| container.ready).count();
    let restarts: u32 =
        main.iter().chain(&pod.init_container_statuses).map(|container| container.restart_count).sum();
    let mut row = vec![
        pod.key.name.clone(),
        format!("{ready}/{}", main.len()),
        tone(pod, Paint(columns.color)),
        restarts.to_string(),
        pod.start_time.map_or_else(|| "-".to_owned(), |start| age(now, start)),
    ];
    if columns.namespace {
        row.insert(0, pod.key.namespace.clone());
    }
    if columns.wide {
        let images: Vec<&str> = main.iter().map(|container| container.image.as_str()).collect();
        row.extend([
            pod.pod_ip.map_or_else(|| "-".to_owned(), |ip| ip.to_string()),
            or_dash(&images.join(",")),
            or_dash(&place(pod.origin.file.as_str(), pod.origin.line)),
        ]);
    }
    row
}

fn tone(pod: &PodStatus, paint: Paint) -> String {
    let word = status_word(pod);
    match word.as_str() {
        _ if pod.is_ready() => paint.green(&word),
        "Completed" | "Succeeded" => paint.faint(&word),
        "Pending" | "ContainerCreating" | "PodInitializing" | "Pulling" | "Queued" | "Running" => {
            paint.yellow(&word)
        }
        _ => paint.red(&word),
    }
}

/// One word for how a pod is, as kubectl finds it: the first init container that has not finished, else what the
/// containers wait for or ended with, else the phase.
pub(crate) fn status_word(pod: &PodStatus) -> String {
    if !pod.declared {
        return "Terminating".to_owned();
    }
    if let Some(word) = init_word(&pod.init_container_statuses) {
        return word;
    }
    let word = pod.container_statuses.iter().rev().find_map(|container| match &container.state {
        State::Waiting { reason, .. } => Some(reason.clone()),
        State::Terminated { reason, exit_code, signal, .. } => Some(ended(reason, *exit_code, *signal)),
        State::Running { .. } => None,
    });
    let running = pod.container_statuses.iter().any(|c| matches!(c.state, State::Running { .. }) && c.ready);
    match word {
        Some(word) if word == "Completed" && running => "Running".to_owned(),
        Some(word) => word,
        None => pod
            .reason
            .clone()
            .filter(|_| pod.container_statuses.is_empty())
            .unwrap_or_else(|| pod.phase.to_string()),
    }
}

fn init_word(init: &[ContainerStatus]) -> Option<String> {
    let (index, container) = init
        .iter()
        .enumerate()
        .find(|(_, container)| !matches!(container.state, State::Terminated { exit_code: 0, .. }))?;
    Some(match &container.state {
        State::Terminated { reason, exit_code, signal, .. } => {
            format!("Init:{}", ended(reason, *exit_code, *signal))
        }
        State::Waiting { reason, .. } if reason != "PodInitializing" => format!("Init:{reason}"),
        _ => format!("Init:{index}/{}", init.len()),
    })
}

fn ended(reason: &str, exit_code: i32, signal: i32) -> String {
    match (reason, signal) {
        ("", 0) => format!("ExitCode:{exit_code}"),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

pub(crate) fn render_deployments<'a>(
    deployments: impl IntoIterator<Item = &'a DeploymentStatus>,
    columns: Columns,
) -> String {
    let mut names = vec!["NAME", "READY", "UP-TO-DATE", "AVAILABLE"];
    if columns.namespace {
        names.insert(0, "NAMESPACE");
    }
    if columns.wide {
        names.push("DECLARED-IN");
    }
    let mut table = Table::with_header(&names, columns.headers);
    for deployment in deployments {
        let mut row = vec![
            deployment.key.name.clone(),
            format!("{}/{}", deployment.ready_replicas, deployment.replicas),
            deployment.updated_replicas.to_string(),
            deployment.available_replicas.to_string(),
        ];
        if columns.namespace {
            row.insert(0, deployment.key.namespace.clone());
        }
        if columns.wide {
            row.push(or_dash(&place(deployment.origin.file.as_str(), deployment.origin.line)));
        }
        table.row(row);
    }
    table.render(0)
}

/// The whole host at a glance.
pub(crate) fn render_status(status: &Status, daemon: Option<u32>, color: bool, now: u64) -> String {
    let paint = Paint(color);
    let declared = status.pods.iter().filter(|pod| pod.declared).count();
    let ready = status.pods.iter().filter(|pod| is_well(pod)).count();
    let daemon = daemon.map_or_else(|| "not running".to_owned(), |pid| format!("running (pid {pid})"));
    let mut text = format!("daemon  {daemon}\npods    {ready} of {declared} as declared\n");
    if !status.sources_complete {
        text.push_str(&format!(
            "{}\n",
            paint.yellow("manifests have not been read completely yet: nothing is deleted")
        ));
    }
    for problem in &status.problems {
        let _ = writeln!(text, "{} {problem}", paint.red("problem"));
    }
    for conflict in &status.conflicts {
        let place = |origin: &keel_plan::Origin| place(&origin.file, origin.line);
        let (kept, ignored) = (place(&conflict.kept), place(&conflict.ignored));
        let _ = writeln!(
            text,
            "{} {}: declared twice; {kept} counts, {ignored} does not",
            paint.red("conflict"),
            conflict.object
        );
    }
    if !status.pods.is_empty() {
        let columns = Columns { headers: true, wide: false, namespace: true, color };
        let _ = write!(text, "\n{}", render_pods(status.pods.iter().map(AsRef::as_ref), columns, now));
    }
    let troubled: Vec<_> = status.pods.iter().filter(|pod| !is_well(pod)).collect();
    if troubled.iter().any(|pod| !trouble(pod).is_empty()) {
        text.push('\n');
    }
    for pod in troubled {
        for line in trouble(pod) {
            let _ = writeln!(text, "{}: {line}", pod.key);
        }
    }
    text
}

/// Why a pod is not as it should be, one line each.
fn trouble(pod: &PodStatus) -> Vec<String> {
    let mut lines: Vec<String> =
        pod.waiting.iter().map(|waits| format!("{}: {}", waits.reason(), waits.message())).collect();
    if let (true, Some(message)) = (lines.is_empty(), &pod.message) {
        lines.push(reason(pod.reason.as_deref().unwrap_or("NotReady"), message));
    }
    lines
}

/// Ready, or finished as it was meant to.
pub(crate) fn is_well(pod: &PodStatus) -> bool {
    pod.declared && pod.up_to_date && (pod.is_ready() || pod.phase == keel_plan::Phase::Succeeded)
}

/// Everything is as declared.
pub(crate) fn all_well(status: &Status) -> bool {
    status.sources_complete
        && status.problems.is_empty()
        && status.conflicts.is_empty()
        && status.pods.iter().all(|pod| is_well(pod))
        && status.deployments.iter().all(|d| d.available_replicas >= d.replicas)
}

pub(crate) fn describe_pod(
    pod: &PodStatus,
    declared: Option<&PodSpec>,
    events: &[Event],
    now: u64,
) -> String {
    let mut text = String::new();
    field(&mut text, 0, "Name", &pod.key.name);
    field(&mut text, 0, "Namespace", &pod.key.namespace);
    field(&mut text, 0, "Status", &status_word(pod));
    if let Some(message) = &pod.message {
        field(&mut text, 0, "Reason", &reason(pod.reason.as_deref().unwrap_or_default(), message));
    }
    if pod.owner.kind != "Pod" {
        field(&mut text, 0, "Owner", &format!("{}/{}", pod.owner.kind, pod.owner.name));
    }
    field(&mut text, 0, "Declared in", &or_dash(&place(&pod.origin.file, pod.origin.line)));
    field(&mut text, 0, "IP", &pod.pod_ip.map_or_else(|| "-".to_owned(), |ip| ip.to_string()));
    field(&mut text, 0, "Started", &pod.start_time.map_or_else(|| "-".to_owned(), |start| when(start, now)));
    let labels: Vec<String> = pod.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    field(&mut text, 0, "Labels", &or_dash(&labels.join(", ")));
    field(&mut text, 0, "Up to date", if pod.up_to_date { "yes" } else { "no" });
    for waits in &pod.waiting {
        let until =
            waits.until().map_or_else(String::new, |until| format!(" (for another {})", age(until, now)));
        field(&mut text, 0, "Waiting", &format!("{}: {}{until}", waits.reason(), waits.message()));
    }
    let specs = declared.map(|spec| (spec.init_containers.as_slice(), spec.containers.as_slice()));
    let (init, main) = specs.unwrap_or_default();
    containers(&mut text, "Init containers", &pod.init_container_statuses, init, now);
    containers(&mut text, "Containers", &pod.container_statuses, main, now);
    if let Some(declared) = declared {
        spec::volumes(&mut text, &declared.volumes);
    }
    conditions(&mut text, &pod.conditions, now);
    events_section(&mut text, events, now);
    text
}

pub(crate) fn describe_deployment(
    deployment: &DeploymentStatus,
    pods: &[&PodStatus],
    events: &[Event],
    now: u64,
) -> String {
    let mut text = String::new();
    field(&mut text, 0, "Name", &deployment.key.name);
    field(&mut text, 0, "Namespace", &deployment.key.namespace);
    field(&mut text, 0, "Declared in", &or_dash(&place(&deployment.origin.file, deployment.origin.line)));
    let replicas = format!(
        "{} wanted, {} updated, {} ready, {} available, {} unavailable",
        deployment.replicas,
        deployment.updated_replicas,
        deployment.ready_replicas,
        deployment.available_replicas,
        deployment.unavailable_replicas
    );
    field(&mut text, 0, "Replicas", &replicas);
    conditions(&mut text, &deployment.conditions, now);
    if !pods.is_empty() {
        let mut table = Table::with_header(&["NAME", "READY", "STATUS", "RESTARTS", "AGE"], true);
        for pod in pods {
            table.row(pod_row(pod, Columns::default(), now));
        }
        let _ = write!(text, "Pods:\n{}", table.render(2));
    }
    events_section(&mut text, events, now);
    text
}

fn containers(
    text: &mut String,
    title: &str,
    containers: &[ContainerStatus],
    declared: &[Container],
    now: u64,
) {
    if containers.is_empty() {
        return;
    }
    let _ = writeln!(text, "{title}:");
    for container in containers {
        let _ = writeln!(text, "  {}:", container.name);
        field(text, 4, "Image", &container.image);
        field(text, 4, "Image ID", &or_dash(&container.image_id));
        field(text, 4, "Container ID", &or_dash(&container.container_id));
        if let Some(pid) = container.pid {
            field(text, 4, "Process", &pid.to_string());
        }
        state(text, "State", &container.state, now);
        if let Some(last) = &container.last_state {
            state(text, "Last state", last, now);
        }
        field(text, 4, "Ready", if container.ready { "yes" } else { "no" });
        field(text, 4, "Restarts", &container.restart_count.to_string());
        if let Some(declared) = declared.iter().find(|declared| declared.name == container.name) {
            spec::container(text, declared);
        }
    }
}

fn state(text: &mut String, title: &str, state: &State, now: u64) {
    match state {
        State::Waiting { reason: word, message } => {
            field(text, 4, title, &format!("Waiting: {}", reason(word, message)))
        }
        State::Running { started_at } => {
            field(text, 4, title, &format!("Running since {}", when(*started_at, now)))
        }
        State::Terminated { exit_code, signal, reason, started_at, finished_at } => {
            field(text, 4, title, &format!("Terminated: {}", ended(reason, *exit_code, *signal)));
            let how =
                if *signal == 0 { exit_code.to_string() } else { format!("{exit_code} (signal {signal})") };
            field(text, 6, "Exit code", &how);
            field(text, 6, "Started", &when(*started_at, now));
            field(text, 6, "Finished", &when(*finished_at, now));
        }
    }
}

fn conditions(text: &mut String, conditions: &[Condition], now: u64) {
    if conditions.is_empty() {
        return;
    }
    let mut table = Table::with_header(&["TYPE", "STATUS", "AGE", "REASON", "MESSAGE"], true);
    for condition in conditions {
        table.row(vec![
            condition.kind.clone(),
            condition.status.clone(),
            age(now, condition.last_transition_time),
            condition.reason.clone().unwrap_or_default(),
            condition.message.clone().unwrap_or_default(),
        ]);
    }
    let _ = write!(text, "Conditions:\n{}", table.render(2));
}

fn events_section(text: &mut String, events: &[Event], now: u64) {
    if events.is_empty() {
        text.push_str("Events: none\n");
        return;
    }
    let mut table = Table::with_header(&["LAST SEEN", "TYPE", "REASON", "MESSAGE"], true);
    for event in events {
        table.row(vec![age(now, event.time_ms), kind(event).to_owned(), event.reason.clone(), said(event)]);
    }
    let _ = write!(text, "Events:\n{}", table.render(2));
}

pub(crate) fn render_events(events: &[Event], headers: bool, color: bool, now: u64) -> String {
    let mut table = Table::with_header(&["LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"], headers);
    for event in events {
        let kind = if event.warning { Paint(color).yellow(kind(event)) } else { kind(event).to_owned() };
        table.row(vec![
            age(now, event.time_ms),
            kind,
            event.reason.clone(),
            event.object.clone(),
            said(event),
        ]);
    }
    table.render(0)
}

fn kind(event: &Event) -> &'static str {
    if event.warning { "Warning" } else { "Normal" }
}

fn said(event: &Event) -> String {
    match event.count {
        0 | 1 => event.message.clone(),
        count => format!("{} (x{count})", event.message),
    }
}

pub(super) fn field(text: &mut String, indent: usize, name: &str, value: &str) {
    let label = format!("{name}:");
    let _ = writeln!(text, "{:indent$}{label:14} {value}", "");
}

fn when(time: u64, now: u64) -> String {
    format!("{} ({} ago)", keel_plan::rfc3339(time), age(now, time))
}

fn reason(word: &str, message: &str) -> String {
    match (word, message) {
        (word, "") => word.to_owned(),
        ("", message) => message.to_owned(),
        (word, message) => format!("{word}: {message}"),
    }
}

fn place(file: &str, line: u32) -> String {
    if line == 0 { file.to_owned() } else { format!("{file}:{line}") }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_767_366_245_000;

    fn pod(value: serde_json::Value) -> PodStatus {
        let mut whole = serde_json::json!({
            "namespace": "default", "name": "web", "id": "web-0123456789",
            "owner": { "kind": "Pod", "name": "web" },
            "origin": { "file": "web.yaml", "line": 3, "column": 1 },
            "declared": true, "phase": "Running", "podIP": "10.88.0.2", "startTime": "2026-01-02T15:00:45Z",
            "conditions": [], "upToDate": true,
            "containerStatuses": [{
                "name": "app", "image": "nginx:1", "imageID": "sha256:ab", "containerID": "evenkeel://x",
                "restartCount": 2, "ready": true, "started": true, "pid": 77, "attempt": 2,
                "state": { "running": { "startedAt": "2026-01-02T15:00:45Z" } }
            }]
        });
        for (key, part) in value.as_object().unwrap() {
            whole[key] = part.clone();
        }
        serde_json::from_value(whole).unwrap()
    }

    fn with_state(state: serde_json::Value) -> serde_json::Value {
        serde_json::json!({ "containerStatuses": [{
            "name": "app", "image": "nginx:1", "imageID": "", "containerID": "", "restartCount": 0,
            "ready": false, "started": false, "state": state
        }] })
    }

    #[test]
    fn pods_are_listed_as_kubectl_does() {
        let ready = pod(serde_json::json!({ "conditions": [
            { "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-02T15:00:45Z" }
        ] }));
        let columns = Columns { headers: true, ..Columns::default() };
        assert_eq!(
            render_pods([&ready], columns, NOW),
            "NAME   READY   STATUS    RESTARTS   AGE\n\
             web    1/1     Running   2          3m20s\n"
        );
        let columns = Columns { headers: true, wide: true, namespace: true, color: false };
        assert_eq!(
            render_pods([&ready], columns, NOW),
            "NAMESPACE   NAME   READY   STATUS    RESTARTS   AGE     IP          IMAGE     DECLARED-IN\n\
             default     web    1/1     Running   2          3m20s   10.88.0.2   nginx:1   web.yaml:3\n"
        );
    }

    #[test]
    fn one_word_says_how_a_pod_is() {
        let word = |value| status_word(&pod(value));
        assert_eq!(word(serde_json::json!({})), "Running");
        assert_eq!(word(serde_json::json!({ "declared": false })), "Terminating");
        let waiting = serde_json::json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        assert_eq!(word(with_state(with_message(waiting))), "CrashLoopBackOff");
        let terminated = |reason: &str, code: i32, signal: i32| {
            with_state(serde_json::json!({ "terminated": {
                "exitCode": code, "signal": signal, "reason": reason,
                "startedAt": "2026-01-02T15:00:45Z", "finishedAt": "2026-01-02T15:00:45Z"
            } }))
        };
        assert_eq!(word(terminated("Completed", 0, 0)), "Completed");
        assert_eq!(word(terminated("", 3, 0)), "ExitCode:3");
        assert_eq!(word(terminated("", 137, 9)), "Signal:9");
        let init = serde_json::json!({ "initContainerStatuses": [{
            "name": "i", "image": "x", "imageID": "", "containerID": "", "restartCount": 0,
            "ready": false, "started": true, "state": { "running": { "startedAt": "2026-01-02T15:00:45Z" } }
        }] });
        assert_eq!(word(init), "Init:0/1");
    }

    fn with_message(mut state: serde_json::Value) -> serde_json::Value {
        state["waiting"]["message"] = serde_json::json!("");
        state
    }

    #[test]
    fn a_description_tells_the_whole_story() {
        let described = pod(serde_json::json!({
            "labels": { "app": "web" },
            "containerStatuses": [{
                "name": "app", "image": "nginx:1", "imageID": "sha256:ab", "containerID": "evenkeel://x",
                "restartCount": 1, "ready": false, "started": true, "pid": 77, "attempt": 1,
                "state": { "running": { "startedAt": "2026-01-02T15:04:00Z" } },
                "lastState": { "terminated": { "exitCode": 137, "signal": 9, "reason": "OOMKilled",
                    "startedAt": "2026-01-02T15:00:45Z", "finishedAt": "2026-01-02T15:04:00Z" } }
            }]
        }));
        let event = Event {
            seq: 1,
            time_ms: NOW - 5000,
            warning: true,
            object: "Pod/default/web".into(),
            reason: "BackOff".into(),
            message: "waits".into(),
            count: 3,
        };
        assert_eq!(
            describe_pod(&described, None, &[event], NOW),
            "\
Name:          web
Namespace:     default
Status:        Running
Declared in:   web.yaml:3
IP:            10.88.0.2
Started:       2026-01-02T15:00:45Z (3m20s ago)
Labels:        app=web
Up to date:    yes
Containers:
  app:
    Image:         nginx:1
    Image ID:      sha256:ab
    Container ID:  evenkeel://x
    Process:       77
    State:         Running since 2026-01-02T15:04:00Z (5s ago)
    Last state:    Terminated: OOMKilled
      Exit code:     137 (signal 9)
      Started:       2026-01-02T15:00:45Z (3m20s ago)
      Finished:      2026-01-02T15:04:00Z (5s ago)
    Ready:         no
    Restarts:      1
Events:
  LAST SEEN   TYPE      REASON    MESSAGE
  5s          Warning   BackOff   waits (x3)
"
        );
    }

    #[test]
    fn the_status_of_the_host_counts_and_explains() {
        let bad = pod(serde_json::json!({
            "waiting": [{ "reason": "Queued" }], "upToDate": false,
        }));
        let status =
            Status { pods: vec![std::sync::Arc::new(bad)], sources_complete: true, ..Status::default() };
        assert!(!all_well(&status));
        assert_eq!(
            render_status(&status, Some(12), false, NOW),
            "daemon  running (pid 12)\n\
             pods    0 of 1 as declared\n\n\
             NAMESPACE   NAME   READY   STATUS    RESTARTS   AGE\n\
             default     web    1/1     Running   2          3m20s\n\n\
             default/web: Queued: waiting for other actions to finish\n"
        );
    }
}
