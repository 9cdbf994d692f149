//! What a manifest asks for, as `describe` shows it. Values from Secrets are named, never shown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use keel_manifest::Quantity;
use keel_manifest::model::{
    Container, EnvFrom, EnvVar, IntOrString, ObjectRef, Probe, StorageMedium, Volume, VolumeMount,
};

use crate::render::objects::field;

/// Longer commands are programs; they are in `-o yaml`.
const MAX_COMMAND_CHARS: usize = 200;

pub(super) fn container(text: &mut String, container: &Container) {
    for (name, words) in [("Command", &container.command), ("Arguments", &container.args)] {
        if !words.is_empty() {
            field(text, 4, name, &command(words));
        }
    }
    if !container.ports.is_empty() {
        let ports = container.ports.iter().map(|port| {
            let inside = format!("{}/{}", port.container_port, port.protocol.unwrap_or_default().as_str());
            match (port.host_port, &port.host_ip) {
                (Some(outside), Some(ip)) => format!("{inside} on {ip}:{outside}"),
                (Some(outside), None) => format!("{inside} on host port {outside}"),
                (None, _) => inside,
            }
        });
        field(text, 4, "Ports", &ports.collect::<Vec<_>>().join(", "));
    }
    if let Some(resources) = &container.resources {
        for (name, amounts) in [("Limits", &resources.limits), ("Requests", &resources.requests)] {
            if !amounts.is_empty() {
                field(text, 4, name, &quantities(amounts));
            }
        }
    }
    let probes = [
        ("Startup", &container.startup_probe),
        ("Readiness", &container.readiness_probe),
        ("Liveness", &container.liveness_probe),
    ];
    for (name, probe) in probes {
        if let Some(probe) = probe {
            field(text, 4, name, &how(probe));
        }
    }
    if !container.env.is_empty() || !container.env_from.is_empty() {
        let _ = writeln!(text, "    Environment:");
        for from in &container.env_from {
            let _ = writeln!(text, "      {}", all_of(from));
        }
        for variable in &container.env {
            let _ = writeln!(text, "      {}: {}", variable.name, value(variable));
        }
    }
    if !container.volume_mounts.is_empty() {
        let _ = writeln!(text, "    Mounts:");
        for mount in &container.volume_mounts {
            let _ = writeln!(text, "      {}", mounted(mount));
        }
    }
}

pub(super) fn volumes(text: &mut String, volumes: &[Volume]) {
    if volumes.is_empty() {
        return;
    }
    text.push_str("Volumes:\n");
    for volume in volumes {
        let _ = writeln!(text, "  {}: {}", volume.name, source(volume));
    }
}

fn command(words: &[String]) -> String {
    let quoted = |word: &String| {
        let plain =
            !word.is_empty() && !word.contains(|c: char| c.is_whitespace() || "'\"$;&|<>()".contains(c));
        if plain { word.clone() } else { format!("{word:?}") }
    };
    let line = words.iter().map(quoted).collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_COMMAND_CHARS) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

fn quantities(amounts: &BTreeMap<String, Quantity>) -> String {
    amounts.iter().map(|(name, amount)| format!("{name} {amount}")).collect::<Vec<_>>().join(", ")
}

fn how(probe: &Probe) -> String {
    let port = |port: &IntOrString| match port {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(name) => name.clone(),
    };
    let way = match (&probe.exec, &probe.http_get, &probe.tcp_socket) {
        (Some(exec), _, _) => format!("exec {}", command(&exec.command)),
        (_, Some(http), _) => format!("http :{}{}", port(&http.port), http.path.as_deref().unwrap_or("/")),
        (_, _, Some(tcp)) => format!("tcp :{}", port(&tcp.port)),
        _ => "-".to_owned(),
    };
    let (delay, period, timeout) = probe.times_s();
    let (successes, failures) = probe.thresholds();
    format!("{way}, delay {delay} s, period {period} s, timeout {timeout} s, {successes} up, {failures} down")
}

fn value(variable: &EnvVar) -> String {
    let Some(from) = &variable.value_from else { return variable.value.clone().unwrap_or_default() };
    if let Some(key) = &from.secret_key_ref {
        return format!("<key {} of Secret {}>", key.key, key.name);
    }
    if let Some(key) = &from.config_map_key_ref {
        return format!("<key {} of ConfigMap {}>", key.key, key.name);
    }
    if let Some(field) = &from.field_ref {
        return format!("<{}>", field.field_path);
    }
    from.resource_field_ref.as_ref().map_or_else(String::new, |resource| format!("<{}>", resource.resource))
}

fn all_of(from: &EnvFrom) -> String {
    let named = |kind: &str, object: &ObjectRef| match &from.prefix {
        Some(prefix) => format!("<all of {kind} {}, names begin with {prefix}>", object.name),
        None => format!("<all of {kind} {}>", object.name),
    };
    match (&from.secret_ref, &from.config_map_ref) {
        (Some(secret), _) => named("Secret", secret),
        (None, Some(map)) => named("ConfigMap", map),
        (None, None) => String::new(),
    }
}

fn mounted(mount: &VolumeMount) -> String {
    let within = mount.sub_path.as_ref().map_or_else(String::new, |path| format!("/{path}"));
    let only = if mount.read_only { " (read-only)" } else { "" };
    format!("{} from {}{within}{only}", mount.mount_path, mount.name)
}

fn source(volume: &Volume) -> String {
    if let Some(host) = &volume.host_path {
        return format!("host path {}", host.path);
    }
    if let Some(map) = &volume.config_map {
        return format!("ConfigMap {}", map.name);
    }
    if let Some(secret) = &volume.secret {
        return format!("Secret {}", secret.secret_name);
    }
    match volume.empty_dir.as_ref().map(|empty| empty.medium.unwrap_or_default()) {
        Some(StorageMedium::Memory) => "empty directory in memory".to_owned(),
        Some(StorageMedium::Disk) => "empty directory".to_owned(),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_quoted_where_a_shell_would_need_it_and_cut() {
        let words = |words: &[&str]| command(&words.iter().map(|word| word.to_string()).collect::<Vec<_>>());
        assert_eq!(words(&["sh", "-c", "echo hi"]), "sh -c \"echo hi\"");
        assert_eq!(words(&[&"x".repeat(300)]).len(), MAX_COMMAND_CHARS + 3);
    }
}
