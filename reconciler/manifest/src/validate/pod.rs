//! Rules for pods as a whole and for volumes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{container, data_key, label_name, object_name, syntax};
use crate::check::{addresses_overlap, host_port};
use crate::model::{
    Container, DnsPolicy, KeyToPath, PodSpec, Protocol, RestartPolicy, SeccompProfile, SeccompType, Volume,
};
use crate::report::{Path, Report};

/// The resolver of the C library reads no more.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;

pub(crate) fn spec(r: &mut Report<'_>, spec: &PodSpec, path: &Path<'_>) {
    let containers = path.key("containers");
    if spec.containers.is_empty() {
        r.error(&containers, "must have at least one container");
    }
    let volumes = volumes(r, spec, &path.key("volumes"));
    each_container(spec, path, &mut |container, here| {
        container::container(r, container, spec, &volumes, here)
    });
    unique_names(r, spec, path);
    unique_host_ports(r, spec, path);
    names_and_dns(r, spec, path);
    security(r, spec, path);
}

/// Rules for the pods of a Deployment.
pub(crate) fn of_owner(r: &mut Report<'_>, spec: &PodSpec, replicas: u32, path: &Path<'_>) {
    if spec.restart_policy.is_some_and(|p| p != RestartPolicy::Always) {
        r.error_help(
            &path.key("restartPolicy"),
            "must be Always in a Deployment",
            "for work that ends, write a Pod with restartPolicy: OnFailure",
        );
    }
    if replicas < 2 {
        return;
    }
    each_container(spec, path, &mut |container, here| {
        let ports = here.key("ports");
        for (index, port) in container.ports.iter().enumerate() {
            let field = if port.host_port.is_some() { "hostPort" } else { "containerPort" };
            if let Some(number) = host_port(port, spec.host_network) {
                let message = format!("{replicas} replicas cannot share host port {number}");
                r.error_help(&ports.index(index).key(field), message, "set replicas: 1, or remove hostPort");
            }
        }
    });
}

fn each_container<'a>(spec: &'a PodSpec, path: &Path<'_>, f: &mut dyn FnMut(&'a Container, &Path<'_>)) {
    for (field, containers) in [("initContainers", &spec.init_containers), ("containers", &spec.containers)] {
        let list = path.key(field);
        for (index, container) in containers.iter().enumerate() {
            f(container, &list.index(index));
        }
    }
}

fn unique_names(r: &mut Report<'_>, spec: &PodSpec, path: &Path<'_>) {
    let mut seen: BTreeMap<&str, String> = BTreeMap::new();
    each_container(spec, path, &mut |container, here| {
        if let Some(first) = seen.get(container.name.as_str()) {
            r.error(&here.key("name"), format!("container name \"{}\" is taken by {first}", container.name));
        } else {
            seen.insert(&container.name, here.render());
        }
    });
}

/// Init containers end before the others start, so that only the containers proper compete.
fn unique_host_ports(r: &mut Report<'_>, spec: &PodSpec, path: &Path<'_>) {
    type Taken<'a> = (u16, Protocol, Option<&'a str>, String);
    let mut taken: Vec<Taken<'_>> = Vec::new();
    let list = path.key("containers");
    for (index, container) in spec.containers.iter().enumerate() {
        let here = list.index(index);
        let ports = here.key("ports");
        for (index, port) in container.ports.iter().enumerate() {
            let Some(number) = host_port(port, spec.host_network) else { continue };
            let (protocol, address) = (port.protocol.unwrap_or_default(), port.host_ip.as_deref());
            let field = if port.host_port.is_some() { "hostPort" } else { "containerPort" };
            let place = ports.index(index);
            let clash =
                taken.iter().find(|t| t.0 == number && t.1 == protocol && addresses_overlap(t.2, address));
            if let Some((.., first)) = clash {
                let message = format!("host port {number}/{} is taken by {first}", protocol.as_str());
                r.error(&place.key(field), message);
            } else {
                taken.push((number, protocol, address, place.render()));
            }
        }
    }
}

fn names_and_dns(r: &mut Report<'_>, spec: &PodSpec, path: &Path<'_>) {
    if let Some(hostname) = &spec.hostname {
        label_name(r, hostname, &path.key("hostname"));
    }
    if spec.host_pid && spec.share_process_namespace {
        r.error(
            &path.key("shareProcessNamespace"),
            "must be absent when hostPID is true: the host's processes are shared",
        );
    }
    if spec.has_own_users() {
        for (name, shared) in
            [("hostNetwork", spec.host_network), ("hostPID", spec.host_pid), ("hostIPC", spec.host_ipc)]
        {
            if shared {
                r.error(&path.key(name), "must be absent when hostUsers is false");
            }
        }
    }
    let aliases = path.key("hostAliases");
    for (index, alias) in spec.host_aliases.iter().enumerate() {
        let here = aliases.index(index);
        ip(r, &alias.ip, &here.key("ip"));
        let names = here.key("hostnames");
        for (index, name) in alias.hostnames.iter().enumerate() {
            object_name(r, name, &names.index(index));
        }
    }
    let config = path.key("dnsConfig");
    let servers = spec.dns_config.as_ref().map_or(&[][..], |c| &c.nameservers);
    if spec.dns_policy == Some(DnsPolicy::None) && servers.is_empty() {
        r.error_help(&path.key("dnsPolicy"), "None needs a name server", "add dnsConfig.nameservers");
    }
    let servers_path = config.key("nameservers");
    if servers.len() > MAX_NAMESERVERS {
        r.error(&servers_path, format!("at most {MAX_NAMESERVERS} name servers are used"));
    }
    for (index, server) in servers.iter().enumerate() {
        ip(r, server, &servers_path.index(index));
    }
    let Some(dns) = &spec.dns_config else { return };
    let searches = config.key("searches");
    if dns.searches.len() > MAX_SEARCHES {
        r.error(&searches, format!("at most {MAX_SEARCHES} search domains are used"));
    }
    for (index, search) in dns.searches.iter().enumerate() {
        let bare = search.strip_suffix('.').unwrap_or(search);
        if search != "." {
            object_name(r, bare, &searches.index(index));
        }
    }
    let options = config.key("options");
    for (index, option) in dns.options.iter().enumerate() {
        if option.name.is_empty() || option.name.contains(char::is_whitespace) {
            r.error(&options.index(index).key("name"), "must be one word");
        }
    }
}

fn security(r: &mut Report<'_>, spec: &PodSpec, path: &Path<'_>) {
    let Some(context) = &spec.security_context else { return };
    let here = path.key("securityContext");
    seccomp(r, context.seccomp_profile.as_ref(), &here.key("seccompProfile"));
    if context.run_as_non_root == Some(true) && context.run_as_user == Some(0) {
        r.error(&here.key("runAsUser"), "must not be 0 when runAsNonRoot is true");
    }
}

pub(crate) fn seccomp(r: &mut Report<'_>, profile: Option<&SeccompProfile>, path: &Path<'_>) {
    let Some(profile) = profile else { return };
    let here = path.key("localhostProfile");
    match (profile.kind, &profile.localhost_profile) {
        (SeccompType::Localhost, None) => {
            r.error(&here, "field \"localhostProfile\" is missing for type Localhost")
        }
        (SeccompType::Localhost, Some(file)) => {
            if let Err(message) = syntax::inner_path(file) {
                r.error(&here, message);
            }
        }
        (SeccompType::RuntimeDefault | SeccompType::Unconfined, Some(_)) => {
            r.error(&here, "must be absent unless type is Localhost");
        }
        (SeccompType::RuntimeDefault | SeccompType::Unconfined, None) => {}
    }
}

/// Checks the volumes and returns their names.
fn volumes<'a>(r: &mut Report<'_>, spec: &'a PodSpec, path: &Path<'_>) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    for (index, volume) in spec.volumes.iter().enumerate() {
        let here = path.index(index);
        label_name(r, &volume.name, &here.key("name"));
        if !names.insert(volume.name.as_str()) {
            r.error(&here.key("name"), format!("volume name \"{}\" is used twice", volume.name));
        }
        self::volume(r, volume, &here);
    }
    for (index, volume) in spec.volumes.iter().enumerate() {
        let is_used = spec.all_containers().any(|c| c.volume_mounts.iter().any(|m| m.name == volume.name));
        if !is_used && !volume.name.is_empty() {
            let message = format!("no container mounts the volume \"{}\"", volume.name);
            r.warn(&path.index(index).key("name"), message, None);
        }
    }
    names
}

fn volume(r: &mut Report<'_>, volume: &Volume, path: &Path<'_>) {
    let sources = [
        volume.host_path.is_some(),
        volume.empty_dir.is_some(),
        volume.config_map.is_some(),
        volume.secret.is_some(),
    ];
    match sources.into_iter().filter(|s| *s).count() {
        1 => {}
        0 => source_missing(r, path),
        _ => r.error(path, "a volume must have exactly one source, this has several"),
    }
    if let Some(host) = &volume.host_path {
        let here = path.key("hostPath");
        if let Err(message) = syntax::absolute_path(&host.path) {
            r.error(&here.key("path"), message);
        }
    }
    if let Some(dir) = &volume.empty_dir
        && let Some(limit) = &dir.size_limit
    {
        let here = path.key("emptyDir");
        container::amount(r, limit, &here.key("sizeLimit"));
    }
    if let Some(map) = &volume.config_map {
        let here = path.key("configMap");
        object_name(r, &map.name, &here.key("name"));
        items(r, &map.items, &here.key("items"));
    }
    if let Some(secret) = &volume.secret {
        let here = path.key("secret");
        object_name(r, &secret.secret_name, &here.key("secretName"));
        items(r, &secret.items, &here.key("items"));
    }
}

fn source_missing(r: &mut Report<'_>, path: &Path<'_>) {
    // A source that is known and not done, or unknown, has been reported by its own name.
    let has_other = r.has_other_fields(path, &["name", "hostPath", "emptyDir", "configMap", "secret"]);
    if !has_other {
        r.error_help(
            path,
            "a volume must have a source",
            "add one of emptyDir: {}, configMap, secret or hostPath",
        );
    }
}

fn items(r: &mut Report<'_>, items: &[KeyToPath], path: &Path<'_>) {
    let mut paths = BTreeSet::new();
    for (index, item) in items.iter().enumerate() {
        let here = path.index(index);
        data_key(r, &item.key, &here.key("key"));
        let target = here.key("path");
        if let Err(message) = syntax::inner_path(&item.path) {
            r.error(&target, message);
        } else if item.path.starts_with("..") {
            r.error(&target, "must not start with \"..\"");
        } else if !paths.insert(item.path.as_str()) {
            r.error(&target, format!("path \"{}\" is used twice", item.path));
        }
    }
}

fn ip(r: &mut Report<'_>, text: &str, path: &Path<'_>) {
    if text.parse::<IpAddr>().is_err() {
        r.error_help(path, "must be an IP address", "for example: 10.0.0.1");
    }
}
