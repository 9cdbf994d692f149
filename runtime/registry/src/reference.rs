//! References as a client needs them: whom to ask, and for what.

use std::fmt;

use keel_store::Digest;

use crate::error::PullError;

/// The registry that references without a registry mean, and the host that serves it.
pub(crate) const DOCKER_HUB: &str = "docker.io";
pub(crate) const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// A reference that was checked and has its canonical text at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    parsed: keel_store::Reference,
    canonical: String,
}

impl Reference {
    pub(crate) fn parse(text: &str) -> Result<Self, PullError> {
        let parsed: keel_store::Reference = text.parse().map_err(|source| {
            let keel_store::ReferenceError { reference, problem } = source;
            PullError::Reference { text: reference, detail: problem }
        })?;
        Ok(Self { canonical: parsed.to_string(), parsed })
    }

    pub(crate) fn canonical(&self) -> &str {
        &self.canonical
    }

    /// As users write it and as logins are filed: `docker.io`, `127.0.0.1:5000`.
    pub(crate) fn registry(&self) -> &str {
        &self.parsed.registry
    }

    /// The host and port to connect to.
    pub(crate) fn host(&self) -> &str {
        match self.registry() {
            DOCKER_HUB => DOCKER_HUB_HOST,
            other => other,
        }
    }

    pub(crate) fn repository(&self) -> &str {
        &self.parsed.repository
    }

    pub(crate) fn digest(&self) -> Option<&Digest> {
        self.parsed.digest.as_ref()
    }

    pub(crate) fn tag(&self) -> Option<&str> {
        self.parsed.tag.as_deref()
    }

    /// What is asked for: the digest where there is one, because a tag may have moved since.
    pub(crate) fn selector(&self) -> String {
        match (self.digest(), self.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_owned(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, host: &str, repository: &str, selector: &str) {
        let reference = Reference::parse(text).unwrap();
        assert_eq!(reference.host(), host, "{text}");
        assert_eq!(reference.repository(), repository, "{text}");
        assert_eq!(reference.selector(), selector, "{text}");
    }

    #[test]
    fn references_name_host_repository_and_selector() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        check("busybox", "registry-1.docker.io", "library/busybox", "latest");
        check("docker.io/keel/x:1", "registry-1.docker.io", "keel/x", "1");
        check("127.0.0.1:5000/a/b/c:v1.0_x", "127.0.0.1:5000", "a/b/c", "v1.0_x");
        check("localhost/a", "localhost", "a", "latest");
        check(&format!("quay.io/a/b@{digest}"), "quay.io", "a/b", &digest);
        check(&format!("quay.io/a/b:tag@{digest}"), "quay.io", "a/b", &digest);
    }
}
