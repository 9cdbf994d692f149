//! Rules for one container.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use super::pod::seccomp;
use super::{data_key, image, label_name, object_name, syntax};
use crate::capability::CAPABILITIES;
use crate::known::nearest;
use crate::model::{
    Container, ContainerPort, EnvVar, EnvVarSource, ExecAction, FieldRef, HttpGetAction, IntOrString,
    PodSpec, Probe, ResourceFieldRef, Resources,
};
use crate::quantity::Quantity;
use crate::report::{Path, Report};

/// Less memory than this cannot hold one process; the unit was forgotten.
const LEAST_SENSIBLE_MEMORY_BYTES: u64 = 512 * 1024;

const POD_FIELDS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

const RESOURCE_FIELDS: &[&str] = &["limits.cpu", "limits.memory", "requests.cpu", "requests.memory"];

pub(crate) fn container(
    r: &mut Report<'_>,
    container: &Container,
    spec: &PodSpec,
    volumes: &BTreeSet<&str>,
    path: &Path<'_>,
) {
    label_name(r, &container.name, &path.key("name"));
    if let Err((message, help)) = image::reference(&container.image) {
        let here = path.key("image");
        match help {
            Some(help) => r.error_help(&here, message, help),
            None => r.error(&here, message),
        }
    }
    if let Some(dir) = &container.working_dir
        && let Err(message) = syntax::absolute_path(dir)
    {
        r.error(&path.key("workingDir"), message);
    }
    ports(r, container, spec, &path.key("ports"));
    env(r, container, spec, path);
    mounts(r, container, volumes, &path.key("volumeMounts"));
    if let Some(limits) = &container.resources {
        resources(r, limits, &path.key("resources"));
    }
    security(r, container, spec, &path.key("securityContext"));
    probes(r, container, spec, path);
}

fn ports(r: &mut Report<'_>, container: &Container, spec: &PodSpec, path: &Path<'_>) {
    let mut names = BTreeSet::new();
    for (index, port) in container.ports.iter().enumerate() {
        let here = path.index(index);
        if let Some(name) = &port.name {
            if let Err(message) = syntax::port_name(name) {
                r.error(&here.key("name"), message);
            } else if !names.insert(name.as_str()) {
                r.error(&here.key("name"), format!("port name \"{name}\" is used twice"));
            }
        }
        host_address(r, port, &here);
        if spec.host_network && port.host_port.is_some_and(|p| p != port.container_port) {
            r.error(&here.key("hostPort"), "must equal containerPort when hostNetwork is true");
        }
    }
}

fn host_address(r: &mut Report<'_>, port: &ContainerPort, path: &Path<'_>) {
    let Some(ip) = port.host_ip.as_deref().filter(|i| !i.is_empty()) else { return };
    let here = path.key("hostIP");
    match ip.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => {}
        Ok(IpAddr::V6(_)) => r.error(&here, "IPv6 is not done yet"),
        Err(_) => {
            r.error_help(&here, "must be an IP address", format!("for example: {}", Ipv4Addr::LOCALHOST))
        }
    }
}

fn env(r: &mut Report<'_>, container: &Container, spec: &PodSpec, path: &Path<'_>) {
    let list = path.key("envFrom");
    for (index, source) in container.env_from.iter().enumerate() {
        let here = list.index(index);
        if let Some(prefix) = source.prefix.as_deref().filter(|p| !p.is_empty())
            && let Err(message) = syntax::env_name(prefix)
        {
            r.error(&here.key("prefix"), message);
        }
        if source.config_map_ref.is_some() == source.secret_ref.is_some() {
            r.error(&here, "must have exactly one of configMapRef and secretRef");
        }
        for (field, target) in [("configMapRef", &source.config_map_ref), ("secretRef", &source.secret_ref)] {
            if let Some(target) = target {
                object_name(r, &target.name, &here.key(field).key("name"));
            }
        }
    }
    let list = path.key("env");
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, var) in container.env.iter().enumerate() {
        let here = list.index(index);
        variable(r, var, spec, &here);
        if let Some(first) = seen.insert(&var.name, index) {
            let message = format!("variable \"{}\" is set again; env[{first}] has no effect", var.name);
            r.warn(&here.key("name"), message, None);
        }
    }
}

fn variable(r: &mut Report<'_>, var: &EnvVar, spec: &PodSpec, path: &Path<'_>) {
    if let Err(message) = syntax::env_name(&var.name) {
        r.error(&path.key("name"), message);
    }
    let Some(source) = &var.value_from else { return };
    let from = path.key("valueFrom");
    if var.value.as_deref().is_some_and(|v| !v.is_empty()) {
        r.error(&from, "must be absent when value is given");
    }
    let EnvVarSource { config_map_key_ref, secret_key_ref, field_ref, resource_field_ref } = source;
    let sources = [
        config_map_key_ref.is_some(),
        secret_key_ref.is_some(),
        field_ref.is_some(),
        resource_field_ref.is_some(),
    ];
    let count = sources.into_iter().filter(|s| *s).count();
    let known = ["configMapKeyRef", "secretKeyRef", "fieldRef", "resourceFieldRef"];
    if count > 1 || (count == 0 && !r.has_other_fields(&from, &known)) {
        r.error(
            &from,
            "must have exactly one of configMapKeyRef, secretKeyRef, fieldRef and resourceFieldRef",
        );
    }
    for (field, target) in [("configMapKeyRef", config_map_key_ref), ("secretKeyRef", secret_key_ref)] {
        if let Some(target) = target {
            let here = from.key(field);
            object_name(r, &target.name, &here.key("name"));
            data_key(r, &target.key, &here.key("key"));
        }
    }
    if let Some(field) = field_ref {
        self::field_ref(r, field, &from.key("fieldRef"));
    }
    if let Some(resource) = resource_field_ref {
        self::resource_field_ref(r, resource, spec, &from.key("resourceFieldRef"));
    }
}

fn field_ref(r: &mut Report<'_>, field: &FieldRef, path: &Path<'_>) {
    if field.api_version.as_deref().is_some_and(|v| v != "v1" && !v.is_empty()) {
        r.error(&path.key("apiVersion"), "must be v1");
    }
    let here = path.key("fieldPath");
    let written = field.field_path.as_str();
    let of_map = ["metadata.labels['", "metadata.annotations['"]
        .into_iter()
        .find_map(|start| written.strip_prefix(start)?.strip_suffix("']"));
    if let Some(key) = of_map {
        if let Err(message) = syntax::qualified_name(key) {
            r.error(&here, message);
        }
        return;
    }
    if matches!(written, "metadata.labels" | "metadata.annotations") {
        r.error_help(&here, "names no single value", format!("for example: {written}['app']"));
    } else if !POD_FIELDS.contains(&written) {
        let message = format!("\"{written}\" is not a field that a variable can take");
        match nearest(written, POD_FIELDS.iter().copied()) {
            Some(near) => r.error_help(&here, message, format!("did you mean \"{near}\"?")),
            None => r.error_help(&here, message, format!("one of {}", POD_FIELDS.join(", "))),
        }
    }
}

fn resource_field_ref(r: &mut Report<'_>, field: &ResourceFieldRef, spec: &PodSpec, path: &Path<'_>) {
    if let Some(name) = &field.container_name
        && !spec.all_containers().any(|c| c.name == *name)
    {
        r.error(&path.key("containerName"), format!("the pod has no container \"{name}\""));
    }
    if !RESOURCE_FIELDS.contains(&field.resource.as_str()) {
        let help = format!("one of {}", RESOURCE_FIELDS.join(", "));
        r.error_help(&path.key("resource"), format!("\"{}\" is not known", field.resource), help);
    }
    if let Some(divisor) = &field.divisor {
        let here = path.key("divisor");
        if amount(r, divisor, &here) == Some(0) && divisor.0 != "0" {
            r.error(&here, "must be more than 0");
        }
    }
}

fn mounts(r: &mut Report<'_>, container: &Container, volumes: &BTreeSet<&str>, path: &Path<'_>) {
    let mut paths: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, mount) in container.volume_mounts.iter().enumerate() {
        let here = path.index(index);
        if !volumes.contains(mount.name.as_str()) && !mount.name.is_empty() {
            let message = format!("the pod has no volume \"{}\"", mount.name);
            match nearest(&mount.name, volumes.iter().copied()) {
                Some(near) => r.error_help(&here.key("name"), message, format!("did you mean \"{near}\"?")),
                None => r.error_help(&here.key("name"), message, "declare it under spec.volumes"),
            }
        } else if mount.name.is_empty() {
            r.error(&here.key("name"), "must not be empty");
        }
        let target = here.key("mountPath");
        let normal = mount.mount_path.trim_end_matches('/');
        if let Err(message) = syntax::absolute_path(&mount.mount_path) {
            r.error(&target, message);
        } else if normal.is_empty() {
            r.error(&target, "must not be \"/\": it would hide the whole image");
        } else if mount.mount_path.contains(':') {
            r.error(&target, "must not have \":\"");
        } else if let Some(first) = paths.insert(normal, index) {
            r.error(&target, format!("volumeMounts[{first}] is mounted at this path too"));
        }
        if let Some(sub_path) = mount.sub_path.as_deref().filter(|p| !p.is_empty())
            && let Err(message) = syntax::inner_path(sub_path)
        {
            r.error(&here.key("subPath"), message);
        }
    }
}

fn resources(r: &mut Report<'_>, resources: &Resources, path: &Path<'_>) {
    let (limits, requests) = (path.key("limits"), path.key("requests"));
    for (list, here) in [(&resources.limits, &limits), (&resources.requests, &requests)] {
        for (name, quantity) in list {
            resource(r, name, quantity, &here.key(name));
        }
    }
    for (name, request) in &resources.requests {
        let Some(limit) = resources.limits.get(name) else { continue };
        if let (Ok(request_amount), Ok(limit_amount)) = (request.millis(), limit.millis())
            && request_amount > limit_amount
        {
            r.error(&requests.key(name), format!("request {request} is more than the limit {limit}"));
        }
    }
}

fn resource(r: &mut Report<'_>, name: &str, quantity: &Quantity, path: &Path<'_>) {
    let Some(millis) = amount(r, quantity, path) else { return };
    match name {
        "cpu" => {}
        "memory" => memory(r, quantity, millis, path),
        "ephemeral-storage" => r.warn(path, "ephemeral-storage has no effect yet", None),
        _ => {
            let message = format!("resource \"{name}\" is not done yet");
            match nearest(name, ["cpu", "memory"].into_iter()) {
                Some(near) => r.error_help(
                    path,
                    format!("unknown resource \"{name}\""),
                    format!("did you mean \"{near}\"?"),
                ),
                None => r.error_help(path, message, "cpu and memory are done"),
            }
        }
    }
}

fn memory(r: &mut Report<'_>, quantity: &Quantity, millis: i64, path: &Path<'_>) {
    let bytes = quantity.bytes().unwrap_or(u64::MAX);
    if quantity.0.ends_with('m') {
        let fixed = quantity.0.trim_end_matches('m');
        r.warn(
            path,
            format!("{quantity} of memory is thousandths of a byte"),
            Some(format!("did you mean {fixed}Mi?")),
        );
    } else if millis > 0 && bytes < LEAST_SENSIBLE_MEMORY_BYTES {
        r.warn(
            path,
            format!("{quantity} of memory is {bytes} bytes"),
            Some("write a unit, for example 64Mi".into()),
        );
    }
}

/// Checks an amount that must not be negative and returns it in thousandths.
pub(crate) fn amount(r: &mut Report<'_>, quantity: &Quantity, path: &Path<'_>) -> Option<i64> {
    match quantity.millis() {
        Ok(millis) if millis >= 0 => Some(millis),
        Ok(_) => {
            r.error(path, "must not be negative");
            None
        }
        Err(problem) => {
            let help = unit_help(&quantity.0);
            match help {
                Some(help) => r.error_help(path, format!("\"{quantity}\" {problem}"), help),
                None => r.error(path, format!("\"{quantity}\" {problem}")),
            }
            None
        }
    }
}

/// `128MB`, `128mb`, `1K`, `128 Mi`: what was meant.
fn unit_help(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    let meant = match unit.trim().to_lowercase().trim_end_matches('b') {
        "k" => "k",
        "m" => "M",
        "g" => "G",
        "t" => "T",
        "ki" => "Ki",
        "mi" => "Mi",
        "gi" => "Gi",
        "ti" => "Ti",
        _ => return None,
    };
    (!number.is_empty()).then(|| format!("did you mean {number}{meant}?"))
}

fn security(r: &mut Report<'_>, container: &Container, spec: &PodSpec, path: &Path<'_>) {
    let pod = spec.security_context.as_ref();
    let own = container.security_context.as_ref();
    let non_root = own.and_then(|c| c.run_as_non_root).or(pod.and_then(|p| p.run_as_non_root));
    let own_user = own.and_then(|c| c.run_as_user);
    let user = own_user.or(pod.and_then(|p| p.run_as_user));
    let pod_says_both = pod.is_some_and(|p| p.run_as_non_root == Some(true) && p.run_as_user == Some(0));
    if non_root == Some(true) && user == Some(0) && (own_user.is_some() || !pod_says_both) {
        let field = if own_user.is_some() { "runAsUser" } else { "runAsNonRoot" };
        r.error(&path.key(field), "user 0 contradicts runAsNonRoot: true");
    }
    let Some(context) = own else { return };
    seccomp(r, context.seccomp_profile.as_ref(), &path.key("seccompProfile"));
    let added = context.capabilities.as_ref().map_or(&[][..], |c| &c.add);
    if context.allow_privilege_escalation == Some(false) {
        let here = path.key("allowPrivilegeEscalation");
        if context.privileged == Some(true) {
            r.error(&here, "must not be false when privileged is true");
        } else if added.iter().any(|c| c == "SYS_ADMIN") {
            r.error(&here, "must not be false when the capability SYS_ADMIN is added");
        }
    }
    if let Some(capabilities) = &context.capabilities {
        let list = path.key("capabilities");
        for (field, names) in [("add", &capabilities.add), ("drop", &capabilities.drop)] {
            let here = list.key(field);
            for (index, name) in names.iter().enumerate() {
                capability(r, name, &here.index(index));
            }
        }
    }
}

fn capability(r: &mut Report<'_>, name: &str, path: &Path<'_>) {
    let known = || CAPABILITIES.iter().copied().chain(["ALL"]);
    if known().any(|known| known == name) {
        return;
    }
    let upper = name.to_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let message = format!("\"{name}\" is not a capability");
    match nearest(bare, known()) {
        Some(near) => r.error_help(path, message, format!("did you mean {near}?")),
        None => r.error(path, message),
    }
}

fn probes(r: &mut Report<'_>, container: &Container, spec: &PodSpec, path: &Path<'_>) {
    let is_init = !spec.containers.iter().any(|c| std::ptr::eq(c, container));
    let all = [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ];
    for (field, probe) in all {
        let Some(probe) = probe else { continue };
        let here = path.key(field);
        if is_init {
            r.error(&here, "init containers have no probes");
            continue;
        }
        self::probe(r, probe, container, &here);
        if field != "readinessProbe" && probe.success_threshold.is_some_and(|n| n > 1) {
            r.error(&here.key("successThreshold"), "must be 1 for liveness and startup probes");
        }
        if field == "readinessProbe" && probe.termination_grace_period_seconds.is_some() {
            r.error(
                &here.key("terminationGracePeriodSeconds"),
                "must be absent: a readiness probe stops nothing",
            );
        }
        if probe.termination_grace_period_seconds == Some(0) {
            r.error(&here.key("terminationGracePeriodSeconds"), "must be 1 or more");
        }
    }
}

fn probe(r: &mut Report<'_>, probe: &Probe, container: &Container, path: &Path<'_>) {
    let handlers = [probe.exec.is_some(), probe.http_get.is_some(), probe.tcp_socket.is_some()];
    match handlers.into_iter().filter(|h| *h).count() {
        1 => {}
        0 => {
            if !r.has_field(path, "grpc") {
                r.error(path, "must have one of exec, httpGet and tcpSocket");
            }
        }
        _ => r.error(path, "must have exactly one of exec, httpGet and tcpSocket, this has several"),
    }
    if let Some(action) = &probe.exec {
        exec(r, action, &path.key("exec"));
    }
    if let Some(action) = &probe.http_get {
        http_get(r, action, container, &path.key("httpGet"));
    }
    if let Some(action) = &probe.tcp_socket {
        port(r, &action.port, container, &path.key("tcpSocket").key("port"));
    }
}

fn exec(r: &mut Report<'_>, action: &ExecAction, path: &Path<'_>) {
    if action.command.is_empty() {
        r.error(&path.key("command"), "must not be empty");
    }
}

fn http_get(r: &mut Report<'_>, action: &HttpGetAction, container: &Container, path: &Path<'_>) {
    port(r, &action.port, container, &path.key("port"));
    let headers = path.key("httpHeaders");
    let token = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
    };
    for (index, header) in action.http_headers.iter().enumerate() {
        let here = headers.index(index);
        if !token(&header.name) {
            r.error(&here.key("name"), "is not the name of an HTTP header");
        }
        if header.value.contains(['\r', '\n', '\0']) {
            r.error(&here.key("value"), "must be one line");
        }
    }
    if action.path.as_deref().is_some_and(|p| p.contains(['\r', '\n', ' '])) {
        r.error(&path.key("path"), "must not have spaces or line ends");
    }
}

/// A number, or the name of a port of the container.
fn port(r: &mut Report<'_>, port: &IntOrString, container: &Container, path: &Path<'_>) {
    match port {
        IntOrString::Int(number) if (1..=65535).contains(number) => {}
        IntOrString::Int(_) => r.error(path, "must be between 1 and 65535"),
        IntOrString::String(name) if name.parse::<u32>().is_ok() => {
            r.error_help(path, "must be a number, not text", "remove the quotes");
        }
        IntOrString::String(name) => {
            let names = || container.ports.iter().filter_map(|p| p.name.as_deref());
            if !names().any(|n| n == name) {
                let message = format!("the container has no port named \"{name}\"");
                match nearest(name, names()) {
                    Some(near) => r.error_help(path, message, format!("did you mean \"{near}\"?")),
                    None => r.error_help(path, message, "name one of its ports so, or write the number"),
                }
            }
        }
    }
}
