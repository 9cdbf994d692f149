//! Image references, by docker's rules.

/// What is wrong with a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("image reference {reference:?}: {problem}")]
pub struct ReferenceError {
    pub reference: String,
    pub problem: String,
}

/// A reference taken apart; every part is checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// Host with optional port, e.g. `docker.io` or `127.0.0.1:5000`.
    pub registry: String,
    /// Path below the registry, e.g. `library/busybox`.
    pub repository: String,
    pub tag: Option<String>,
    pub digest: Option<crate::Digest>,
}

/// docker's limit for host and path together.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// The canonical form: `busybox` is `docker.io/library/busybox:latest`.
pub fn canonical_reference(reference: &str) -> Result<String, ReferenceError> {
    reference.parse::<Reference>().map(|r| r.to_string())
}

impl std::str::FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        let fail = |problem: String| ReferenceError { reference: text.to_owned(), problem };
        if text.is_empty() {
            return Err(fail("it is empty".into()));
        }
        if crate::Digest::from_hex(text).is_ok() {
            return Err(fail("64 hex digits alone name no repository".into()));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(|e| fail(format!("{e}")))?)),
            None => (text, None),
        };
        // A colon after the last slash starts a tag; before it, it belongs to the registry's port.
        let name_start = rest.rfind('/').map_or(0, |i| i + 1);
        let (name, tag) = match rest[name_start..].find(':') {
            Some(i) => (&rest[..name_start + i], Some(&rest[name_start + i + 1..])),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag).map_err(fail)?;
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, path)) if is_registry(first) => (first, path.to_owned()),
            _ => ("docker.io", name.to_owned()),
        };
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        let repository = match registry {
            "docker.io" if !repository.contains('/') => format!("library/{repository}"),
            _ => repository,
        };
        check_registry(registry).map_err(fail)?;
        for component in repository.split('/') {
            check_component(component).map_err(fail)?;
        }
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err(fail(format!("the name is longer than {MAX_NAME} characters")));
        }
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// The first component is a registry when it cannot be a user's name: it has a dot or a port, is `localhost`, or has
/// capitals, which a path may not have.
fn is_registry(component: &str) -> bool {
    component == "localhost"
        || component.contains(['.', ':'])
        || component.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), String> {
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
                (None, port.strip_prefix(':').or((!port.is_empty()).then_some(port)))
            }
            _ => return Err(format!("{registry:?} is not a registry address")),
        },
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if host.is_some_and(|host| !host.split('.').all(label)) {
        return Err(format!("{registry:?} is not a registry host name"));
    }
    if port.is_some_and(|port| port.parse::<u16>().is_err() || port.starts_with('+')) {
        return Err(format!("{registry:?} has no valid port"));
    }
    Ok(())
}

fn check_component(component: &str) -> Result<(), String> {
    if component.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(format!("{component:?}: repository names are lower-case"));
    }
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let good_ends =
        bytes.first().copied().is_some_and(alphanumeric) && bytes.last().copied().is_some_and(alphanumeric);
    // Between alphanumerics: one dot, one or two underscores, or any number of dashes.
    let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let good_separators = separators
        .filter(|s| !s.is_empty())
        .all(|s| s == "." || s == "_" || s == "__" || s.bytes().all(|b| b == b'-'));
    if good_ends && good_separators {
        Ok(())
    } else {
        Err(format!("{component:?} is not a valid part of a repository name"))
    }
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = tag.as_bytes();
    if bytes.len() <= MAX_TAG
        && bytes.first().copied().is_some_and(word)
        && bytes.iter().all(|&b| word(b) || b == b'.' || b == b'-')
    {
        Ok(())
    } else {
        Err(format!("{tag:?} is not a valid tag"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reference: &str, expected: &str) {
        match canonical_reference(reference) {
            Ok(canonical) => {
                assert_eq!(canonical, expected, "{reference}");
                assert_eq!(canonical_reference(&canonical).as_deref(), Ok(expected), "stable");
            }
            Err(e) => assert_eq!(format!("error: {}", e.problem), expected, "{reference}"),
        }
    }

    #[test]
    fn dockers_rules() {
        let d = format!("sha256:{}", "a".repeat(64));
        check("busybox", "docker.io/library/busybox:latest");
        check("busybox:1.36", "docker.io/library/busybox:1.36");
        check("library/busybox", "docker.io/library/busybox:latest");
        check("user/app", "docker.io/user/app:latest");
        check("index.docker.io/busybox", "docker.io/library/busybox:latest");
        check("docker.io/busybox", "docker.io/library/busybox:latest");
        check("localhost/app", "localhost/app:latest");
        check("localhost:5000/app", "localhost:5000/app:latest");
        check("127.0.0.1:5000/keel/big:8", "127.0.0.1:5000/keel/big:8");
        check("[::1]:5000/app:v1", "[::1]:5000/app:v1");
        check("REGISTRY/app", "REGISTRY/app:latest");
        check("ghcr.io/a/b/c_d/e__f/g-h---i.j:T.a-g_1", "ghcr.io/a/b/c_d/e__f/g-h---i.j:T.a-g_1");
        check(&format!("busybox@{d}"), &format!("docker.io/library/busybox@{d}"));
        check(&format!("busybox:1@{d}"), &format!("docker.io/library/busybox:1@{d}"));
        check("evenkeel.dev/hello", "evenkeel.dev/hello:latest");
    }

    #[test]
    fn what_docker_refuses() {
        check("", "error: it is empty");
        check("Busybox", "error: \"Busybox\": repository names are lower-case");
        check("a//b", "error: \"\" is not a valid part of a repository name");
        check("/a", "error: \"\" is not a valid part of a repository name");
        check("a/..", "error: \"..\" is not a valid part of a repository name");
        check("a___b", "error: \"a___b\" is not a valid part of a repository name");
        check("a:", "error: \"\" is not a valid tag");
        check("a:-x", "error: \"-x\" is not a valid tag");
        check("a b", "error: \"a b\" is not a valid part of a repository name");
        check("host:99999/a", "error: \"host:99999\" has no valid port");
        check("-x.y/a", "error: \"-x.y\" is not a registry host name");
        check("a@sha256:12", "error: \"sha256:12\" is not a digest (expected sha256:<64 hex digits>)");
        check(&"a".repeat(64), "error: 64 hex digits alone name no repository");
        check(&"x/".repeat(200), "error: \"\" is not a valid part of a repository name");
        check(&format!("a:{}", "t".repeat(129)), &format!("error: {:?} is not a valid tag", "t".repeat(129)));
        check(&format!("q.io/{}", "b".repeat(251)), "error: the name is longer than 255 characters");
    }
}
