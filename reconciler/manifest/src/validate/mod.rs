//! Rules about values, as the Kubernetes API server has them, and a few that it leaves to the node.

mod container;
mod image;
mod pod;
mod syntax;

use std::collections::BTreeMap;

use crate::extension;
use crate::logging::{self, LogSettings};
use crate::model::{
    ConfigMap, Deployment, IntOrString, LabelOperator, LabelSelector, ObjectMeta, Secret, StrategyType,
};
use crate::object::Kind;
use crate::report::{Path, Report};

/// Pods of one Deployment. One host runs some hundreds of pods; more is a typing mistake.
const MAX_REPLICAS: u32 = 1000;
/// Sum of keys and values of the annotations of one object.
const MAX_ANNOTATION_BYTES: usize = 256 * 1024;

/// Checks the values of one object at `path` of the current document.
pub(crate) fn object(r: &mut Report<'_>, kind: &Kind, path: &Path<'_>) {
    let metadata = path.key("metadata");
    match kind {
        Kind::Pod(pod) => {
            meta(r, &pod.metadata, &metadata);
            log_settings(r, &pod.metadata.annotations, &metadata.key("annotations"));
            pod::spec(r, &pod.spec, &path.key("spec"));
            extension::check(r, &pod.metadata.annotations, &pod.spec, &metadata.key("annotations"));
        }
        Kind::Deployment(deployment) => {
            meta(r, &deployment.metadata, &metadata);
            for key in deployment.metadata.annotations.keys().filter(|key| key.starts_with(logging::PREFIX)) {
                let help = "write it in spec.template.metadata.annotations";
                r.warn(
                    &metadata.key("annotations").key(key),
                    "has no effect on a Deployment",
                    Some(help.into()),
                );
            }
            self::deployment(r, deployment, &path.key("spec"));
        }
        Kind::ConfigMap(map) => {
            meta(r, &map.metadata, &metadata);
            config_map(r, map, path);
        }
        Kind::Secret(secret) => {
            meta(r, &secret.metadata, &metadata);
            self::secret(r, secret, path);
        }
    }
}

fn meta(r: &mut Report<'_>, meta: &ObjectMeta, path: &Path<'_>) {
    object_name(r, &meta.name, &path.key("name"));
    if let Some(namespace) = &meta.namespace {
        label_name(r, namespace, &path.key("namespace"));
    }
    labels(r, &meta.labels, &path.key("labels"));
    annotations(r, &meta.annotations, &path.key("annotations"));
}

fn labels(r: &mut Report<'_>, labels: &BTreeMap<String, String>, path: &Path<'_>) {
    for (key, value) in labels {
        let here = path.key(key);
        label_key(r, key, &here);
        label_value(r, value, &here);
    }
}

fn annotations(r: &mut Report<'_>, annotations: &BTreeMap<String, String>, path: &Path<'_>) {
    for key in annotations.keys() {
        label_key(r, key, &path.key(key));
    }
    let size: usize = annotations.iter().map(|(k, v)| k.len() + v.len()).sum();
    if size > MAX_ANNOTATION_BYTES {
        r.error(path, format!("annotations are larger than {MAX_ANNOTATION_BYTES} bytes together"));
    }
}

/// Of a pod: where its output is kept.
fn log_settings(r: &mut Report<'_>, annotations: &BTreeMap<String, String>, path: &Path<'_>) {
    let mut settings = LogSettings::default();
    let mut failed = false;
    for (key, value) in annotations.iter().filter(|(key, _)| key.starts_with(logging::PREFIX)) {
        let problems: Vec<String> = match key.as_str() {
            logging::DRIVER => settings.set_drivers(value).err().into_iter().collect(),
            logging::OPTIONS => {
                let words = logging::options(value);
                words.filter_map(|(name, value)| settings.set_option(name, value).err()).collect()
            }
            _ => vec![format!("is none of {}, {}", logging::DRIVER, logging::OPTIONS)],
        };
        failed |= !problems.is_empty();
        problems.into_iter().for_each(|problem| r.error(&path.key(key), problem));
    }
    if let (false, Err(problem)) = (failed, settings.check()) {
        let key = if annotations.contains_key(logging::OPTIONS) { logging::OPTIONS } else { logging::DRIVER };
        r.error(&path.key(key), problem);
    }
}

fn deployment(r: &mut Report<'_>, deployment: &Deployment, path: &Path<'_>) {
    let spec = &deployment.spec;
    let template = path.key("template");
    if spec.replicas.is_some_and(|n| n > MAX_REPLICAS) {
        r.error(&path.key("replicas"), format!("must be {MAX_REPLICAS} or less on one host"));
    }
    selector(r, &spec.selector, &path.key("selector"));
    strategy(r, deployment, &path.key("strategy"));
    let metadata = template.key("metadata");
    labels(r, &spec.template.metadata.labels, &metadata.key("labels"));
    annotations(r, &spec.template.metadata.annotations, &metadata.key("annotations"));
    log_settings(r, &spec.template.metadata.annotations, &metadata.key("annotations"));
    extension::check(
        r,
        &spec.template.metadata.annotations,
        &spec.template.spec,
        &metadata.key("annotations"),
    );
    template_matches(r, deployment, path);
    let pod = template.key("spec");
    pod::spec(r, &spec.template.spec, &pod);
    pod::of_owner(r, &spec.template.spec, spec.replicas.unwrap_or(1), &pod);
}

fn template_matches(r: &mut Report<'_>, deployment: &Deployment, path: &Path<'_>) {
    let spec = &deployment.spec;
    let template = path.key("template");
    let metadata = template.key("metadata");
    let have = &spec.template.metadata.labels;
    for (key, wanted) in &spec.selector.match_labels {
        let found = have.get(key);
        if found == Some(wanted) {
            continue;
        }
        let selector = path.key("selector");
        let message = match found {
            Some(found) => format!("selector wants {key}={wanted}, but the template has {key}={found}"),
            None => format!("selector wants {key}={wanted}, but the template has no such label"),
        };
        let help = "a Deployment must select its own pods: make the labels of template and selector equal";
        r.error_help(&selector.key("matchLabels").key(key), message, help);
    }
    let selector = path.key("selector");
    let rules = selector.key("matchExpressions");
    for (index, rule) in spec.selector.match_expressions.iter().enumerate() {
        let found = have.get(&rule.key);
        let here = rules.index(index);
        if r.is_covered(&here.key("operator"))
            || (rule.operator == LabelOperator::In && rule.values.is_empty())
        {
            continue;
        }
        let holds = match rule.operator {
            LabelOperator::In => found.is_some_and(|v| rule.values.contains(v)),
            LabelOperator::NotIn => found.is_none_or(|v| !rule.values.contains(v)),
            LabelOperator::Exists => found.is_some(),
            LabelOperator::DoesNotExist => found.is_none(),
        };
        if !holds {
            r.error(&here, "the template's labels do not satisfy this rule");
        }
    }
    if let Some(namespace) = &spec.template.metadata.namespace
        && namespace.as_str() != deployment.metadata.namespace.as_deref().unwrap_or("default")
    {
        r.error(&metadata.key("namespace"), "must be the namespace of the Deployment");
    }
}

fn selector(r: &mut Report<'_>, selector: &LabelSelector, path: &Path<'_>) {
    if selector.match_labels.is_empty() && selector.match_expressions.is_empty() {
        r.error_help(path, "selects nothing", "write matchLabels with a label of the template");
    }
    labels(r, &selector.match_labels, &path.key("matchLabels"));
    let list = path.key("matchExpressions");
    for (index, rule) in selector.match_expressions.iter().enumerate() {
        let here = list.index(index);
        if let Err(message) = syntax::qualified_name(&rule.key) {
            r.error(&here.key("key"), message);
        }
        if r.is_covered(&here.key("operator")) {
            continue;
        }
        let values = here.key("values");
        let needs_values = matches!(rule.operator, LabelOperator::In | LabelOperator::NotIn);
        if needs_values && rule.values.is_empty() {
            r.error(&values, "must not be empty for In and NotIn");
        }
        if !needs_values && !rule.values.is_empty() {
            r.error(&values, "must be empty for Exists and DoesNotExist");
        }
        for (index, value) in rule.values.iter().enumerate() {
            label_value(r, value, &values.index(index));
        }
    }
}

fn strategy(r: &mut Report<'_>, deployment: &Deployment, path: &Path<'_>) {
    let Some(strategy) = &deployment.spec.strategy else { return };
    let rolling = path.key("rollingUpdate");
    if strategy.kind == Some(StrategyType::Recreate) {
        if strategy.rolling_update.is_some() {
            r.error(&rolling, "must be absent when type is Recreate");
        }
        return;
    }
    if let Some(update) = &strategy.rolling_update {
        let mut zeros = 0;
        for (name, amount) in [("maxSurge", &update.max_surge), ("maxUnavailable", &update.max_unavailable)] {
            if let Some(amount) = amount {
                zeros += usize::from(share(r, amount, &rolling.key(name)) == Some(0));
            }
        }
        if zeros == 2 {
            r.error(&rolling, "maxSurge and maxUnavailable must not both be 0");
        }
    }
    if strategy.kind.is_some() || strategy.rolling_update.is_some() {
        let message =
            "rolling updates are not done yet: an update stops the old pods, then starts the new ones";
        r.warn(&path.key("type"), message, Some("write type: Recreate to say so".into()));
    }
}

/// A number or percentage.
fn share(r: &mut Report<'_>, amount: &IntOrString, path: &Path<'_>) -> Option<u32> {
    let number = match amount {
        IntOrString::Int(number) => u32::try_from(*number).ok(),
        IntOrString::String(text) => text
            .strip_suffix('%')
            .filter(|d| d.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|d| d.parse().ok()),
    };
    if number.is_none() {
        r.error(path, "must be a number from 0 up, or a percentage such as 25%");
    }
    number
}

fn config_map(r: &mut Report<'_>, map: &ConfigMap, path: &Path<'_>) {
    let (data, binary) = (path.key("data"), path.key("binaryData"));
    for key in map.data.keys() {
        own_data_key(r, key, &data.key(key));
    }
    for (key, value) in &map.binary_data {
        let here = binary.key(key);
        own_data_key(r, key, &here);
        if map.data.contains_key(key) {
            r.error(&here, "this key is in data too");
        }
        base64(r, value, &here);
    }
}

fn secret(r: &mut Report<'_>, secret: &Secret, path: &Path<'_>) {
    let (data, plain) = (path.key("data"), path.key("stringData"));
    for (key, value) in &secret.data {
        let here = data.key(key);
        own_data_key(r, key, &here);
        base64(r, value, &here);
    }
    for key in secret.string_data.keys() {
        own_data_key(r, key, &plain.key(key));
    }
    let wanted: &[&str] = match secret.kind.as_deref().unwrap_or("Opaque") {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    for key in
        wanted.iter().filter(|k| !secret.data.contains_key(**k) && !secret.string_data.contains_key(**k))
    {
        r.error(&path.key("type"), format!("this type needs the key {key}"));
    }
}

fn base64(r: &mut Report<'_>, value: &str, path: &Path<'_>) {
    if crate::model::decode_base64(value).is_none() {
        r.error_help(
            path,
            "is not base64",
            "encode it with `base64 -w0`, or put plain text under stringData (Secret) or data (ConfigMap)",
        );
    }
}

fn object_name(r: &mut Report<'_>, name: &str, path: &Path<'_>) {
    if let Err(problem) = syntax::subdomain(name) {
        let help = problem.help(name, '.');
        r.error_help(path, problem.message, help);
    }
}

/// A name without dots: containers, volumes, namespaces.
fn label_name(r: &mut Report<'_>, name: &str, path: &Path<'_>) {
    if let Err(problem) = syntax::dns_label(name) {
        let help = problem.help(name, '-');
        r.error_help(path, problem.message, help);
    }
}

fn label_key(r: &mut Report<'_>, key: &str, path: &Path<'_>) {
    if let Err(message) = syntax::qualified_name(key) {
        r.error_key(path, message, "for example: app, or example.com/app");
    }
}

fn label_value(r: &mut Report<'_>, value: &str, path: &Path<'_>) {
    if let Err(message) = syntax::label_value(value) {
        r.error(path, message);
    }
}

fn data_key(r: &mut Report<'_>, key: &str, path: &Path<'_>) {
    if let Err(message) = syntax::data_key(key) {
        let help = "letters, digits, \"-\", \"_\" and \".\", not \"..\"; a volume's items can give any path";
        r.error_help(path, message, help);
    }
}

/// A key where it is declared.
fn own_data_key(r: &mut Report<'_>, key: &str, path: &Path<'_>) {
    if let Err(message) = syntax::data_key(key) {
        r.error_key(path, message, "letters, digits, \"-\", \"_\" and \".\", not \"..\"");
    }
}
