//! One place that may have a repository: its address, and how it is spoken to.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

use crate::error::PullError;
use crate::reference::{DOCKER_HUB, DOCKER_HUB_HOST, Reference};

/// Where a repository is asked for: the registry that its name says, or a mirror of it.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// As logins are filed and messages say it: `docker.io`, `mirror.local:5000`.
    pub(crate) registry: String,
    pub(crate) repository: String,
    /// Addresses of the API's root, with a slash at the end; the second where plain http may be tried as well.
    pub(crate) roots: Vec<Url>,
    /// What a mirror is told that it stands for (`?ns=`).
    pub(crate) namespace: Option<String>,
    pub(crate) link: Option<Link>,
    /// May say what a tag means.
    pub(crate) resolves: bool,
    pub(crate) pulls: bool,
    /// Has the last word about what exists; never a mirror.
    pub(crate) origin: bool,
}

/// Settings of the connection to one host, from the configuration of mirrors.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Link {
    /// The only host (`name` or `name:port`) that this is about: a redirect to another one is on its own.
    pub(crate) host: String,
    /// Certificates are not checked, and plain http will do.
    pub(crate) skip_verify: bool,
    pub(crate) authorities: Vec<PathBuf>,
    pub(crate) client: Option<(PathBuf, PathBuf)>,
    pub(crate) connect: Option<Duration>,
    /// Sent with each request; they may hold secrets.
    pub(crate) headers: Vec<(String, String)>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Link {
    /// What the connection depends on.
    pub(crate) fn without_headers(&self) -> Self {
        Self { headers: Vec::new(), ..self.clone() }
    }
}

impl Endpoint {
    /// The registry that the reference names. `insecure`: without checks, over http if need be.
    pub(crate) fn origin(reference: &Reference, insecure: bool) -> Result<Self, PullError> {
        let endpoint = Self::at(reference, reference.registry(), reference.repository(), insecure)?;
        Ok(Self { origin: true, ..endpoint })
    }

    /// A registry by name (`host[:port]`) and the repository there.
    pub(crate) fn at(
        reference: &Reference,
        registry: &str,
        repository: &str,
        insecure: bool,
    ) -> Result<Self, PullError> {
        let host = match registry {
            DOCKER_HUB => DOCKER_HUB_HOST,
            other => other,
        };
        let root = |scheme: &str| {
            Url::parse(&format!("{scheme}://{host}/v2/")).map_err(|e| PullError::Reference {
                text: reference.canonical().to_owned(),
                detail: e.to_string(),
            })
        };
        let mut roots = vec![root("https")?];
        let may_be_plain = insecure || crate::transport::is_loopback(&roots[0]);
        if may_be_plain {
            roots.push(root("http")?);
        }
        let link = insecure.then(|| Link {
            host: crate::transport::host_of(&roots[0]),
            skip_verify: true,
            ..Link::default()
        });
        Ok(Self {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            roots,
            namespace: None,
            link,
            resolves: true,
            pulls: true,
            origin: false,
        })
    }
}
