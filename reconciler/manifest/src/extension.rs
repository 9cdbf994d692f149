//! What Kubernetes has no field for: annotations of a pod under `evenkeel.dev/`.

use std::collections::BTreeMap;

use crate::known::nearest;
use crate::logging;
use crate::model::{Container, ContainerPort, PodSpec, Probe, Protocol};
use crate::report::{Path, Report};

/// Names of ports whose sockets are opened before the container starts, handed to it as by a service manager
/// (`LISTEN_FDS`), and kept while it restarts.
const HELD_PORTS: &str = "evenkeel.dev/held-ports";
/// Names of containers that count as started once they have said `READY=1` (sd_notify).
const NOTIFY: &str = "evenkeel.dev/notify";
const PREFIX: &str = "evenkeel.dev/";
/// Written by `keel get -o yaml`, and of no effect when it comes back.
const DECLARED_IN: &str = "evenkeel.dev/declared-in";
/// As many as a shim holds.
const MAX_HELD: usize = 8;

/// Stands for the startup probe of a container that says itself when it has started: asked every second, and never a
/// reason to kill.
pub static STARTED_BY_NOTIFY: Probe = Probe {
    exec: None,
    http_get: None,
    tcp_socket: None,
    initial_delay_seconds: None,
    period_seconds: Some(1),
    timeout_seconds: None,
    success_threshold: None,
    failure_threshold: Some(u32::MAX),
    termination_grace_period_seconds: None,
};

type Annotations = BTreeMap<String, String>;

/// In the order of the container's `ports`, which is that of its descriptors.
pub fn held_ports<'a>(
    annotations: &'a Annotations,
    container: &'a Container,
) -> impl Iterator<Item = (&'a str, &'a ContainerPort)> {
    let named = container.ports.iter().filter_map(|port| Some((port.name.as_deref()?, port)));
    named.filter(|(name, _)| words(annotations, HELD_PORTS).any(|word| word == *name))
}

pub fn notifies(annotations: &Annotations, container: &Container) -> bool {
    words(annotations, NOTIFY).any(|word| word == container.name)
}

fn words<'a>(annotations: &'a Annotations, key: &str) -> impl Iterator<Item = &'a str> {
    let text = annotations.get(key).map_or("", String::as_str);
    text.split(',').map(str::trim).filter(|word| !word.is_empty())
}

/// Of the pod, or of the template that pods are made from.
pub(crate) fn check(r: &mut Report<'_>, annotations: &Annotations, spec: &PodSpec, path: &Path<'_>) {
    for key in annotations.keys().filter(|key| key.starts_with(PREFIX)) {
        let here = path.key(key);
        match key.as_str() {
            HELD_PORTS => held(r, annotations, spec, &here),
            NOTIFY => notify(r, annotations, spec, &here),
            DECLARED_IN => {}
            key if key.starts_with(logging::PREFIX) => {}
            _ => {
                let message = format!("unknown annotation \"{key}\"");
                let near = nearest(key, [HELD_PORTS, NOTIFY].into_iter());
                let known = format!("{HELD_PORTS} and {NOTIFY} are known");
                r.error_key(&here, message, near.map_or(known, |near| format!("did you mean \"{near}\"?")));
            }
        }
    }
}

fn held(r: &mut Report<'_>, annotations: &Annotations, spec: &PodSpec, path: &Path<'_>) {
    let ports = || spec.containers.iter().flat_map(|c| &c.ports);
    for word in words(annotations, HELD_PORTS) {
        let mut found = ports().filter(|port| port.name.as_deref() == Some(word));
        match (found.next(), found.next()) {
            (None, _) => {
                let message = format!("no container has a port named \"{word}\"");
                match nearest(word, ports().filter_map(|port| port.name.as_deref())) {
                    Some(near) => r.error_help(path, message, format!("did you mean \"{near}\"?")),
                    None => r.error_help(path, message, "name the port: containers[].ports[].name"),
                }
            }
            (Some(_), Some(_)) => r.error(path, format!("two containers have a port named \"{word}\"")),
            (Some(port), None) if port.protocol == Some(Protocol::Sctp) => {
                r.error(path, format!("the port \"{word}\" is SCTP; TCP and UDP sockets can be held"));
            }
            (Some(_), None) => {}
        }
    }
    for container in &spec.containers {
        let count = held_ports(annotations, container).count();
        if count > MAX_HELD {
            let name = &container.name;
            r.error(path, format!("{count} ports of container \"{name}\"; at most {MAX_HELD} can be held"));
        }
    }
}

fn notify(r: &mut Report<'_>, annotations: &Annotations, spec: &PodSpec, path: &Path<'_>) {
    for word in words(annotations, NOTIFY) {
        match spec.containers.iter().find(|container| container.name == word) {
            Some(container) if container.startup_probe.is_some() => {
                let message = format!("container \"{word}\" has a startupProbe");
                r.error_help(path, message, "one of them says when it has started: remove the other");
            }
            Some(_) => {}
            None => {
                let message = format!("the pod has no container \"{word}\"");
                match nearest(word, spec.containers.iter().map(|c| c.name.as_str())) {
                    Some(near) => r.error_help(path, message, format!("did you mean \"{near}\"?")),
                    None => r.error(path, message),
                }
            }
        }
    }
}
