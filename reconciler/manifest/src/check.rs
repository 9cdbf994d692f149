//! Rules between objects, also of different files.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::diagnostic::{Diagnostic, Related, Severity};
use crate::model::{Container, ContainerPort, EnvVar, PodSpec, Protocol, Volume};
use crate::object::{Kind, Object, ObjectKey, Place};
use crate::report::Path;

/// Every problem between these objects, sorted by place: objects declared twice, host ports taken twice (errors), and
/// ConfigMaps, Secrets and keys that nothing declares (warnings: they may come later, and pods wait for them).
pub fn check(objects: &[Object]) -> Vec<Diagnostic> {
    let mut found = duplicates(objects);
    found.extend(host_ports(objects));
    found.extend(missing_references(objects));
    found.sort();
    found
}

/// Puts objects that name no namespace into this one. Those that name another one are errors.
pub fn place_in(objects: &mut [Object], namespace: &str) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for object in objects {
        match &object.metadata().namespace {
            None => object.metadata_mut().namespace = Some(namespace.to_owned()),
            Some(own) if own == namespace => {}
            Some(own) => {
                let message =
                    format!("{} is of namespace {own}, and {namespace} was asked for", object.key());
                let help = "leave --namespace out, or the namespace of the manifest";
                found.push(error(object, place(object, 0), message, Some(help), None));
            }
        }
    }
    found
}

/// What a new version of an object may not change: the contents of a ConfigMap or Secret that says it is immutable.
pub fn check_change(before: &Object, after: &Object) -> Option<Diagnostic> {
    let is_changed = match (&before.kind, &after.kind) {
        (Kind::ConfigMap(old), Kind::ConfigMap(new)) => {
            old.immutable == Some(true)
                && (new.immutable != old.immutable
                    || new.data != old.data
                    || new.binary_data != old.binary_data)
        }
        (Kind::Secret(old), Kind::Secret(new)) => {
            old.immutable == Some(true)
                && (new.immutable != old.immutable
                    || new.kind != old.kind
                    || new.data != old.data
                    || new.string_data != old.string_data)
        }
        _ => false,
    };
    is_changed.then(|| {
        let message = format!("{} is immutable: it cannot be changed any more", after.key());
        let help = "give the changed one another name and refer to that, or delete this one first";
        error(after, place(after, 0), message, Some(help), related(before, 0, "immutable since here"))
    })
}

/// Something in a pod that concerns other objects.
pub(crate) enum Use<'a> {
    HostPort {
        port: u16,
        protocol: Protocol,
        host_ip: Option<&'a str>,
    },
    Contents {
        kind: &'static str,
        name: &'a str,
        keys: Vec<&'a str>,
        optional: bool,
    },
    /// Logins for registries; as in Kubernetes, images are pulled without one that is missing.
    PullSecret {
        name: &'a str,
    },
}

/// Visits everything in an object that concerns other objects, always in the same order.
pub(crate) fn visit<'a>(kind: &'a Kind, base: &Path<'_>, f: &mut dyn FnMut(&Path<'_>, Use<'a>)) {
    match kind {
        Kind::Pod(pod) => visit_spec(&pod.spec, &base.key("spec"), f),
        Kind::Deployment(deployment) => {
            visit_spec(&deployment.spec.template.spec, &base.key("spec").key("template").key("spec"), f);
        }
        Kind::ConfigMap(_) | Kind::Secret(_) => {}
    }
}

fn visit_spec<'a>(spec: &'a PodSpec, path: &Path<'_>, f: &mut dyn FnMut(&Path<'_>, Use<'a>)) {
    for (field, containers) in [("initContainers", &spec.init_containers), ("containers", &spec.containers)] {
        let list = path.key(field);
        for (index, container) in containers.iter().enumerate() {
            visit_container(container, spec.host_network, &list.index(index), f);
        }
    }
    let list = path.key("volumes");
    for (index, volume) in spec.volumes.iter().enumerate() {
        visit_volume(volume, &list.index(index), f);
    }
    let list = path.key("imagePullSecrets");
    for (index, secret) in spec.image_pull_secrets.iter().enumerate() {
        f(&list.index(index).key("name"), Use::PullSecret { name: &secret.name });
    }
}

fn visit_container<'a>(
    container: &'a Container,
    host_network: bool,
    path: &Path<'_>,
    f: &mut dyn FnMut(&Path<'_>, Use<'a>),
) {
    let list = path.key("ports");
    for (index, port) in container.ports.iter().enumerate() {
        if let Some(number) = host_port(port, host_network) {
            let here = list.index(index);
            let field = if port.host_port.is_some() { "hostPort" } else { "containerPort" };
            let protocol = port.protocol.unwrap_or_default();
            f(&here.key(field), Use::HostPort { port: number, protocol, host_ip: port.host_ip.as_deref() });
        }
    }
    let list = path.key("envFrom");
    for (index, source) in container.env_from.iter().enumerate() {
        let here = list.index(index);
        let refs = [
            ("ConfigMap", "configMapRef", &source.config_map_ref),
            ("Secret", "secretRef", &source.secret_ref),
        ];
        for (kind, field, target) in refs {
            if let Some(target) = target {
                let optional = target.optional == Some(true);
                f(
                    &here.key(field).key("name"),
                    Use::Contents { kind, name: &target.name, keys: Vec::new(), optional },
                );
            }
        }
    }
    let list = path.key("env");
    for (index, var) in container.env.iter().enumerate() {
        visit_env(var, &list.index(index), f);
    }
}

fn visit_env<'a>(var: &'a EnvVar, path: &Path<'_>, f: &mut dyn FnMut(&Path<'_>, Use<'a>)) {
    let Some(source) = &var.value_from else { return };
    let from = path.key("valueFrom");
    let refs = [
        ("ConfigMap", "configMapKeyRef", &source.config_map_key_ref),
        ("Secret", "secretKeyRef", &source.secret_key_ref),
    ];
    for (kind, field, target) in refs {
        if let Some(target) = target {
            let optional = target.optional == Some(true);
            let found = Use::Contents { kind, name: &target.name, keys: vec![&target.key], optional };
            f(&from.key(field).key("name"), found);
        }
    }
}

fn visit_volume<'a>(volume: &'a Volume, path: &Path<'_>, f: &mut dyn FnMut(&Path<'_>, Use<'a>)) {
    if let Some(map) = &volume.config_map {
        let keys = map.items.iter().map(|i| i.key.as_str()).collect();
        let found =
            Use::Contents { kind: "ConfigMap", name: &map.name, keys, optional: map.optional == Some(true) };
        f(&path.key("configMap").key("name"), found);
    }
    if let Some(secret) = &volume.secret {
        let keys = secret.items.iter().map(|i| i.key.as_str()).collect();
        let optional = secret.optional == Some(true);
        f(
            &path.key("secret").key("secretName"),
            Use::Contents { kind: "Secret", name: &secret.secret_name, keys, optional },
        );
    }
}

/// The port of the host that a container port takes: on the host's network that is the port itself.
pub(crate) fn host_port(port: &ContainerPort, host_network: bool) -> Option<u16> {
    port.host_port.or(host_network.then_some(port.container_port))
}

/// Whether two publications of one port number get in each other's way.
pub(crate) fn addresses_overlap(a: Option<&str>, b: Option<&str>) -> bool {
    let any = |ip: Option<&str>| {
        ip.is_none_or(|i| i.is_empty() || i.parse::<IpAddr>().is_ok_and(|i| i.is_unspecified()))
    };
    any(a) || any(b) || a == b
}

/// Objects that are declared more than once; each later one is reported.
pub(crate) fn duplicates(objects: &[Object]) -> Vec<Diagnostic> {
    let mut first: BTreeMap<ObjectKey, &Object> = BTreeMap::new();
    let mut found = Vec::new();
    for object in objects {
        let key = object.key();
        match first.get(&key) {
            None => {
                first.insert(key, object);
            }
            Some(earlier) => {
                let message = format!("{key} is declared twice");
                let help = "give one of them another name or namespace, or delete it";
                found.push(error(
                    object,
                    place(object, 0),
                    message,
                    Some(help),
                    related(earlier, 0, "first declared here"),
                ));
            }
        }
    }
    found
}

struct Publication<'a> {
    object: &'a Object,
    /// Index into the object's places.
    place: usize,
    host_ip: Option<&'a str>,
}

fn host_ports(objects: &[Object]) -> Vec<Diagnostic> {
    let mut taken: BTreeMap<(u16, Protocol), Vec<Publication<'_>>> = BTreeMap::new();
    let mut found = Vec::new();
    for object in objects {
        each_use(object, &mut |index, used| {
            let Use::HostPort { port, protocol, host_ip } = used else { return };
            let holders = taken.entry((port, protocol)).or_default();
            // Twice in one object is found when its file is read.
            let clash = holders
                .iter()
                .find(|h| h.object.key() != object.key() && addresses_overlap(h.host_ip, host_ip));
            if let Some(holder) = clash {
                let message = format!(
                    "host port {port}/{} is already taken by {}",
                    protocol.as_str(),
                    holder.object.key()
                );
                let other = related(holder.object, holder.place, "taken here");
                found.push(error(
                    object,
                    place(object, index),
                    message,
                    Some("choose another hostPort"),
                    other,
                ));
            }
            holders.push(Publication { object, place: index, host_ip });
        });
    }
    found
}

const PULLED_WITHOUT: &str = "images are pulled without it";
/// The keys of the two types of Secret that hold logins.
const PULL_SECRET_KEYS: [&str; 2] = [".dockerconfigjson", ".dockercfg"];

fn missing_references(objects: &[Object]) -> Vec<Diagnostic> {
    let mut contents: BTreeMap<ObjectKey, &Object> = BTreeMap::new();
    for object in objects {
        if matches!(object.kind, Kind::ConfigMap(_) | Kind::Secret(_)) {
            contents.entry(object.key()).or_insert(object);
        }
    }
    let mut found = Vec::new();
    for object in objects {
        each_use(object, &mut |index, used| {
            let (kind, name, keys, outcome) = match used {
                Use::Contents { kind, name, keys, optional: false } => {
                    (kind, name, keys, "the pod waits until it is")
                }
                Use::PullSecret { name } => ("Secret", name, Vec::new(), PULLED_WITHOUT),
                Use::Contents { optional: true, .. } | Use::HostPort { .. } => return,
            };
            let key = ObjectKey {
                kind: kind.to_owned(),
                namespace: object.namespace().to_owned(),
                name: name.to_owned(),
            };
            let Some(target) = contents.get(&key) else {
                found.push(missing_object(object, index, &key, &contents, outcome));
                return;
            };
            if outcome == PULLED_WITHOUT && !PULL_SECRET_KEYS.iter().any(|k| has_key(&target.kind, k)) {
                let message = format!("{key} holds no logins for registries; {outcome}");
                let help = format!("it needs the key {}", PULL_SECRET_KEYS.join(" or "));
                let other = related(target, 0, "declared here");
                let mut warning = error(object, place(object, index), message, Some(&help), other);
                warning.severity = Severity::Warning;
                found.push(warning);
            }
            for wanted in keys.into_iter().filter(|k| !has_key(&target.kind, k)) {
                let message = format!("{key} has no key \"{wanted}\"; the pod waits until it has");
                let near = crate::known::nearest(wanted, keys_of(&target.kind).into_iter());
                let help = near.map(|n| format!("did you mean \"{n}\"?"));
                let other = related(target, 0, "declared here");
                let mut warning = error(object, place(object, index), message, help.as_deref(), other);
                warning.severity = Severity::Warning;
                found.push(warning);
            }
        });
    }
    found
}

fn missing_object(
    object: &Object,
    index: usize,
    key: &ObjectKey,
    contents: &BTreeMap<ObjectKey, &Object>,
    outcome: &str,
) -> Diagnostic {
    let alike = contents.keys().filter(|k| k.kind == key.kind);
    let elsewhere = alike.clone().find(|k| k.name == key.name);
    let near = crate::known::nearest(
        &key.name,
        alike.filter(|k| k.namespace == key.namespace).map(|k| k.name.as_str()),
    );
    let help = match (near, elsewhere) {
        (Some(near), _) => format!("did you mean \"{near}\"?"),
        (None, Some(other)) => {
            format!("there is one in namespace {}; pods see only their own namespace", other.namespace)
        }
        (None, None) if outcome == PULLED_WITHOUT => "declare it, or remove it from the list".to_owned(),
        (None, None) => "declare it, or set optional: true".to_owned(),
    };
    let message = format!("{key} is not declared; {outcome}");
    let mut warning = error(object, place(object, index), message, Some(&help), None);
    warning.severity = Severity::Warning;
    warning
}

fn each_use<'a>(object: &'a Object, f: &mut dyn FnMut(usize, Use<'a>)) {
    let mut index = 0;
    visit(&object.kind, &Path::Root, &mut |_, used| {
        index += 1;
        f(index, used);
    });
}

fn has_key(kind: &Kind, key: &str) -> bool {
    keys_of(kind).contains(&key)
}

fn keys_of(kind: &Kind) -> Vec<&str> {
    let (one, two) = match kind {
        Kind::ConfigMap(map) => (&map.data, &map.binary_data),
        Kind::Secret(secret) => (&secret.data, &secret.string_data),
        Kind::Pod(_) | Kind::Deployment(_) => return Vec::new(),
    };
    one.keys().chain(two.keys()).map(String::as_str).collect()
}

/// The recorded place, or the object's start for one that was not read from text.
fn place(object: &Object, index: usize) -> Place {
    object.places.get(index).cloned().unwrap_or_else(|| Place {
        line: object.origin.line,
        column: object.origin.column,
        width: 1,
        path: String::new(),
        source_line: String::new(),
    })
}

fn related(object: &Object, index: usize, message: &str) -> Option<Related> {
    let place = place(object, index);
    Some(Related {
        file: object.origin.file.clone(),
        line: place.line,
        column: place.column,
        message: message.to_owned(),
    })
}

fn error(
    object: &Object,
    place: Place,
    message: String,
    help: Option<&str>,
    related: Option<Related>,
) -> Diagnostic {
    Diagnostic {
        file: object.origin.file.clone(),
        line: place.line,
        column: place.column,
        severity: Severity::Error,
        path: place.path,
        message,
        help: help.map(str::to_owned),
        width: place.width,
        source_line: place.source_line,
        related,
    }
}
