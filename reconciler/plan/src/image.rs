//! Image references in the form that the store uses as its key.

/// `busybox` is `docker.io/library/busybox:latest`. Only normalises: what is not a reference comes back as it is, and
/// the pull says what is wrong with it.
pub fn canonical_image(reference: &str) -> String {
    let (name, digest) = match reference.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (reference, None),
    };
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let (path, tag) = match name[last..].split_once(':') {
        Some((component, tag)) => (&name[..last + component.len()], Some(tag)),
        None => (name, None),
    };
    let (registry, repository) = match path.split_once('/') {
        Some((first, rest)) if is_registry(first) => (first, rest),
        _ => ("docker.io", path),
    };
    let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
    let library = if registry == "docker.io" && !repository.contains('/') { "library/" } else { "" };
    let mut out = format!("{registry}/{library}{repository}");
    match (tag, digest) {
        (Some(tag), _) => out.extend([":", tag]),
        (None, None) => out.push_str(":latest"),
        (None, Some(_)) => {}
    }
    if let Some(digest) = digest {
        out.extend(["@", digest]);
    }
    out
}

/// Kubernetes' default policy depends on it: a moving tag is looked up at each start.
pub(crate) fn is_latest(canonical: &str) -> bool {
    canonical.ends_with(":latest")
}

/// The first component is a registry when it cannot be a user's name.
fn is_registry(component: &str) -> bool {
    component == "localhost"
        || component.contains(['.', ':'])
        || component.bytes().any(|b| b.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_become_the_stores_keys() {
        let check = |reference: &str, expected: &str| {
            assert_eq!(canonical_image(reference), expected);
            assert_eq!(canonical_image(expected), expected, "stable");
        };
        check("busybox", "docker.io/library/busybox:latest");
        check("user/app:1", "docker.io/user/app:1");
        check("index.docker.io/busybox", "docker.io/library/busybox:latest");
        check("localhost:5000/app", "localhost:5000/app:latest");
        check("[::1]:5000/app:v1", "[::1]:5000/app:v1");
        check("REGISTRY/app", "REGISTRY/app:latest");
        check("busybox@sha256:aa", "docker.io/library/busybox@sha256:aa");
        check("busybox:1@sha256:aa", "docker.io/library/busybox:1@sha256:aa");
        check("evenkeel.dev/hello", "evenkeel.dev/hello:latest");
    }
}
