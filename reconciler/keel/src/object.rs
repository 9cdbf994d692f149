//! Which objects a command line names, and finding them in a status.

use std::sync::Arc;

use keel_api::Status;
use keel_plan::PodStatus;

use crate::failure::{Failure, Outcome};

/// Kinds that can be named, as manifests spell them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Pod,
    Deployment,
    ConfigMap,
    Secret,
}

/// `pod/web`, or every object of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) kind: Kind,
    pub(crate) name: Option<String>,
}

impl Kind {
    pub(crate) const ALL: [Kind; 4] = [Kind::Pod, Kind::Deployment, Kind::ConfigMap, Kind::Secret];
    /// What `all` means: what runs.
    const RUNNING: [Kind; 2] = [Kind::Pod, Kind::Deployment];

    /// Plural and short forms too.
    pub(crate) fn parse(word: &str) -> Option<Kind> {
        match word.to_ascii_lowercase().as_str() {
            "pod" | "pods" | "po" => Some(Kind::Pod),
            "deployment" | "deployments" | "deploy" => Some(Kind::Deployment),
            "configmap" | "configmaps" | "cm" => Some(Kind::ConfigMap),
            "secret" | "secrets" => Some(Kind::Secret),
            _ => None,
        }
    }

    /// As manifests spell it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Pod => "Pod",
            Kind::Deployment => "Deployment",
            Kind::ConfigMap => "ConfigMap",
            Kind::Secret => "Secret",
        }
    }

    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Kind::Pod | Kind::ConfigMap | Kind::Secret => "v1",
            Kind::Deployment => "apps/v1",
        }
    }

    /// As commands spell it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Kind::Pod => "pod",
            Kind::Deployment => "deployment",
            Kind::ConfigMap => "configmap",
            Kind::Secret => "secret",
        }
    }

    fn unknown(word: &str) -> Failure {
        let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.word()).collect();
        Failure::invalid(format!("no kind `{word}`")).hint(format!("kinds: {}, all", known.join(", ")))
    }
}

/// `KIND`, `KIND/NAME`, `KIND NAME...`, `KIND,KIND`, `all`; nothing is all pods.
pub(crate) fn parse(words: &[String]) -> Outcome<Vec<Wanted>> {
    let Some((first, names)) = words.split_first() else {
        return Ok(vec![Wanted { kind: Kind::Pod, name: None }]);
    };
    if words.iter().any(|word| word.contains('/')) {
        return words.iter().map(|word| parse_one(word)).collect();
    }
    let mut kinds = Vec::new();
    for word in first.split(',') {
        match Kind::parse(word) {
            Some(kind) => kinds.push(kind),
            None if word == "all" => kinds.extend(Kind::RUNNING),
            None => return Err(Kind::unknown(word)),
        }
    }
    if names.is_empty() {
        return Ok(kinds.into_iter().map(|kind| Wanted { kind, name: None }).collect());
    }
    let named = |kind: &Kind| {
        names.iter().map(|name| Wanted { kind: *kind, name: Some(name.clone()) }).collect::<Vec<_>>()
    };
    Ok(kinds.iter().flat_map(named).collect())
}

/// `KIND/NAME`, or a bare name of a pod.
pub(crate) fn parse_one(word: &str) -> Outcome<Wanted> {
    let (kind, name) = match word.split_once('/') {
        None => (Kind::Pod, word),
        Some((kind, name)) => (Kind::parse(kind).ok_or_else(|| Kind::unknown(kind))?, name),
    };
    if name.is_empty() || name.contains('/') {
        return Err(
            Failure::invalid(format!("`{word}` names no object")).hint("write KIND/NAME, e.g. pod/web")
        );
    }
    Ok(Wanted { kind, name: Some(name.to_owned()) })
}

/// The pods that a word means: one by name, or all of an owner.
pub(crate) fn pods(status: &Status, namespace: &str, word: &str) -> Outcome<Vec<Arc<PodStatus>>> {
    let wanted = parse_one(word)?;
    let name = wanted.name.as_deref().unwrap_or_default();
    let fits = |pod: &&Arc<PodStatus>| {
        pod.key.namespace == namespace
            && match wanted.kind {
                Kind::Pod => pod.key.name == name,
                kind => pod.owner.kind == kind.name() && pod.owner.name == name,
            }
    };
    let found: Vec<_> = status.pods.iter().filter(fits).cloned().collect();
    if found.is_empty() {
        return Err(not_found(status, wanted.kind, namespace, name));
    }
    Ok(found)
}

/// Says where an object of that name is, when it is somewhere else.
pub(crate) fn not_found(status: &Status, kind: Kind, namespace: &str, name: &str) -> Failure {
    let failure = Failure::not_found(format!("no {} {name} in namespace {namespace}", kind.word()));
    let elsewhere = match kind {
        Kind::Pod => status.pods.iter().map(|pod| &pod.key).find(|key| key.name == name),
        Kind::Deployment => {
            status.deployments.iter().map(|deployment| &deployment.key).find(|key| key.name == name)
        }
        Kind::ConfigMap | Kind::Secret => None,
    };
    if let Some(key) = elsewhere {
        return failure.hint(format!("there is one in namespace {}: -n {}", key.namespace, key.namespace));
    }
    let owner = status.deployments.iter().find(|d| kind == Kind::Pod && d.key.name == name);
    match owner {
        Some(_) => failure.hint(format!("there is a deployment of that name: deployment/{name}")),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_named_in_kubectls_ways() {
        let check = |words: &[&str], expected: &[(Kind, Option<&str>)]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            let found = parse(&words).unwrap();
            let found: Vec<_> = found.iter().map(|w| (w.kind, w.name.as_deref())).collect();
            assert_eq!(found, expected, "{words:?}");
        };
        check(&[], &[(Kind::Pod, None)]);
        check(&["deploy"], &[(Kind::Deployment, None)]);
        check(&["all"], &[(Kind::Pod, None), (Kind::Deployment, None)]);
        check(&["po,deploy"], &[(Kind::Pod, None), (Kind::Deployment, None)]);
        check(&["pod", "a", "b"], &[(Kind::Pod, Some("a")), (Kind::Pod, Some("b"))]);
        check(&["pod/a", "deploy/b"], &[(Kind::Pod, Some("a")), (Kind::Deployment, Some("b"))]);
        for words in [&["web"][..], &["pod/"], &["x/y"], &["pod/a/b"]] {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            assert_eq!(parse(&words).unwrap_err().code, keel_api::exit::INVALID, "{words:?}");
        }
    }
}
