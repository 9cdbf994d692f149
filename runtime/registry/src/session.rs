//! One conversation with one registry about one repository: scheme, login, documents, blobs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use bytes::Bytes;
use reqwest::header::HeaderValue;
use reqwest::{Method, StatusCode, Url};

use crate::auth::{Challenge, TokenCache, TokenRequest, basic_header, bearer_header, challenges};
use crate::backoff::RetryPolicy;
use crate::client::Client;
use crate::credentials::Credential;
use crate::endpoint::Endpoint;
use crate::error::PullError;
use crate::manifest::{self, ACCEPT, Descriptor, Document, lower_document};
use keel_store::Digest;

use crate::progress::Tracker;
use crate::reference::Reference;
use crate::transport::{Incoming, Outgoing, Transport};

/// Larger manifests are refused by registries and engines alike; they cost memory on every host.
pub(crate) const MANIFEST_LIMIT: u64 = 4 << 20;
pub(crate) const CONFIG_LIMIT: u64 = 4 << 20;

/// What a session may do with the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Pull,
    Push,
}

pub(crate) struct Session<'a> {
    pub(crate) transport: &'a Transport,
    pub(crate) tokens: &'a TokenCache,
    pub(crate) retry: &'a RetryPolicy,
    pub(crate) tracker: &'a Tracker,
    pub(crate) reference: &'a Reference,
    pub(crate) endpoint: Endpoint,
    /// In the order to try them.
    credentials: Vec<Credential>,
    /// How many of them were refused.
    refused: AtomicUsize,
    access: Access,
    /// A repository of the same registry that has the blobs of a push.
    mount_from: Option<String>,
    /// Decided by the first answer: `https`, or `http` where that is allowed.
    base: OnceLock<Url>,
    /// The header that the registry accepted last.
    authorization: Mutex<Option<HeaderValue>>,
}

/// A document as it came, with its true digest.
#[derive(Clone)]
pub(crate) struct Fetched {
    pub(crate) document: Document,
    pub(crate) media_type: String,
    pub(crate) body: Bytes,
    pub(crate) digest: Digest,
}

/// The same, not looked into.
pub(crate) struct Raw {
    pub(crate) body: Bytes,
    pub(crate) digest: Digest,
    pub(crate) content_type: Option<String>,
}

impl Raw {
    /// What it calls itself, else what the registry calls it.
    pub(crate) fn media_type(&self) -> String {
        let called = || self.content_type.as_deref().map(manifest::essence).map(str::to_owned);
        manifest::own_media_type(&self.body).or_else(called).unwrap_or_default()
    }
}

impl<'a> Session<'a> {
    pub(crate) fn new(
        client: &'a Client,
        tracker: &'a Tracker,
        reference: &'a Reference,
        endpoint: Endpoint,
        credentials: Vec<Credential>,
        access: Access,
    ) -> Self {
        Self {
            transport: &client.transport,
            tokens: &client.tokens,
            retry: &client.options.retry,
            tracker,
            reference,
            endpoint,
            credentials,
            refused: AtomicUsize::new(0),
            access,
            mount_from: None,
            base: OnceLock::new(),
            authorization: Mutex::new(None),
        }
    }

    /// Fetches a manifest or index by tag or digest, checked against the digest.
    pub(crate) async fn document_once(
        &self,
        selector: &str,
        expected: Option<&Digest>,
        size: Option<u64>,
    ) -> Result<Fetched, PullError> {
        let raw = self.raw_once(selector, expected, size).await?;
        let document = lower_document(
            &raw.body,
            raw.content_type.as_deref(),
            self.reference.canonical(),
            &self.endpoint.registry,
        )?;
        Ok(Fetched { document, media_type: raw.media_type(), body: raw.body, digest: raw.digest })
    }

    /// The same, whatever it is a manifest of.
    pub(crate) async fn raw_once(
        &self,
        selector: &str,
        expected: Option<&Digest>,
        size: Option<u64>,
    ) -> Result<Raw, PullError> {
        let response = self.get(&format!("manifests/{selector}"), Some(ACCEPT), None).await?;
        let response = self.accept_document(response).await?;
        let content_type = response.header("content-type").map(str::to_owned);
        let announced = response.header("docker-content-digest").and_then(|text| text.parse().ok());
        let host = response.host().to_owned();
        let what = format!("the manifest of {}", self.reference);
        let body = response.body(&what, MANIFEST_LIMIT).await?;
        check_length(&what, &host, size, body.len() as u64)?;
        // Without a digest in the reference the registry's own word still catches a broken proxy.
        let digest = check_digest(&what, &host, expected.or(announced.as_ref()), &body)?;
        Ok(Raw { body, digest, content_type })
    }

    pub(crate) async fn config_once(&self, descriptor: &Descriptor, what: &str) -> Result<Bytes, PullError> {
        let response = self.get(&format!("blobs/{}", descriptor.digest), None, None).await?;
        let response = self.accept_blob(response, what).await?;
        let host = response.host().to_owned();
        let body = response.body(what, CONFIG_LIMIT).await?;
        check_length(what, &host, Some(descriptor.size), body.len() as u64)?;
        check_digest(what, &host, Some(&descriptor.digest), &body)?;
        Ok(body)
    }

    /// Opens a blob at an offset. The caller looks at the status: 200 is all of it, 206 the rest.
    pub(crate) async fn blob(
        &self,
        descriptor: &Descriptor,
        what: &str,
        from: u64,
    ) -> Result<Incoming, PullError> {
        let range = (from > 0).then_some(from);
        let path = format!("blobs/{}", descriptor.digest);
        let response = self.get(&path, None, range).await?;
        if response.status() == StatusCode::NOT_FOUND && !descriptor.urls.is_empty() {
            return self.foreign_blob(descriptor, what, range).await;
        }
        self.accept_blob(response, what).await
    }

    /// Layers that the publisher keeps elsewhere. No login goes there: the manifest's author chose the address.
    async fn foreign_blob(
        &self,
        descriptor: &Descriptor,
        what: &str,
        range: Option<u64>,
    ) -> Result<Incoming, PullError> {
        let mut last = None;
        for text in descriptor.urls.iter().take(MAX_FOREIGN_URLS) {
            let Some(url) = Url::parse(text).ok().filter(|u| matches!(u.scheme(), "http" | "https")) else {
                continue;
            };
            match self.transport.send(Outgoing { range_from: range, ..Outgoing::get(url) }).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => last = Some(response.into_error(what).await),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| self.missing(what, String::new())))
    }

    pub(crate) fn mount_from(&mut self, repository: &str) {
        self.mount_from = Some(repository.to_owned());
    }

    pub(crate) fn mountable(&self) -> Option<&str> {
        self.mount_from.as_deref()
    }

    pub(crate) async fn head(&self, path: &str) -> Result<Incoming, PullError> {
        self.request(Method::HEAD, path, None, None).await
    }

    pub(crate) async fn get(
        &self,
        path: &str,
        accept: Option<&'static str>,
        range_from: Option<u64>,
    ) -> Result<Incoming, PullError> {
        self.request(Method::GET, path, accept, range_from).await
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        accept: Option<&'static str>,
        range_from: Option<u64>,
    ) -> Result<Incoming, PullError> {
        let outgoing =
            |url: Url| Outgoing { method: method.clone(), accept, range_from, ..Outgoing::get(url) };
        if let Some(base) = self.base.get() {
            return self.call(|| outgoing(join(base, path))).await;
        }
        let (secure, plain) = self.bases()?;
        let (base, response) = match (self.call(|| outgoing(join(&secure, path))).await, plain) {
            (Err(error), Some(plain)) if suggests_plain_http(&error) => {
                let response = self.call(|| outgoing(join(&plain, path))).await?;
                (plain, response)
            }
            (result, _) => (secure, result?),
        };
        let _ = self.base.set(base);
        Ok(response)
    }

    /// Sends a request, logging in once when the registry asks for it.
    pub(crate) async fn call(&self, outgoing: impl Fn() -> Outgoing) -> Result<Incoming, PullError> {
        let mut tried = self.authorization();
        let mut response = self.transport.send(self.at_home(outgoing(), tried.clone())).await?;
        // A challenge from a host that we were redirected to is not ours to answer.
        while response.status() == StatusCode::UNAUTHORIZED && response.at_home {
            let offered = challenges(response.headers());
            match self.log_in(&offered, tried.as_ref()).await {
                Ok(Some(header)) if Some(&header) != tried.as_ref() => {
                    *self.lock() = Some(header.clone());
                    tried = Some(header.clone());
                    response = self.transport.send(self.at_home(outgoing(), Some(header))).await?;
                    if response.status() != StatusCode::UNAUTHORIZED {
                        break;
                    }
                }
                Ok(_) => {}
                Err(PullError::Unauthorized { .. }) if self.has_another_login() => {}
                Err(error) => return Err(error),
            }
            if !self.try_another_login() {
                break;
            }
        }
        Ok(response)
    }

    fn credential(&self) -> Option<&Credential> {
        self.credentials.get(self.refused.load(Ordering::Relaxed))
    }

    fn has_another_login(&self) -> bool {
        self.refused.load(Ordering::Relaxed) + 1 < self.credentials.len()
    }

    fn try_another_login(&self) -> bool {
        let another = self.has_another_login();
        if another {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        another
    }

    /// With what belongs to this place: login, connection settings, the name that it stands for.
    fn at_home(&self, mut outgoing: Outgoing, authorization: Option<HeaderValue>) -> Outgoing {
        if let Some(namespace) = &self.endpoint.namespace {
            outgoing.url.query_pairs_mut().append_pair("ns", namespace);
        }
        Outgoing { authorization, link: self.endpoint.link.clone(), ..outgoing }
    }

    async fn log_in(
        &self,
        offered: &[Challenge],
        stale: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, PullError> {
        if let Some(Credential::RegistryToken(token)) = self.credential() {
            return Ok(bearer_header(token));
        }
        let bearer = offered.iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service, scope } => Some((realm, service, scope)),
            Challenge::Basic => None,
        });
        if let Some((realm, service, scope)) = bearer {
            let own_scope = self.scope();
            let scope = match (self.access, scope) {
                // What is asked for can be less than what a push needs later.
                (Access::Push, _) | (Access::Pull, None) => own_scope.as_str(),
                (Access::Pull, Some(scope)) => scope,
            };
            let request = TokenRequest {
                realm,
                service: service.as_deref(),
                scope,
                credential: self.credential(),
                registry: &self.endpoint.registry,
                repository: &self.endpoint.repository,
                link: self.endpoint.link.as_ref(),
            };
            return self.tokens.token(self.transport, &request, stale).await.map(Some);
        }
        match self.credential() {
            Some(Credential::Basic { username, password }) if offered.contains(&Challenge::Basic) => {
                Ok(basic_header(username, password))
            }
            _ => Ok(None),
        }
    }

    fn scope(&self) -> String {
        let actions = match self.access {
            Access::Pull => "pull",
            Access::Push => "pull,push",
        };
        let own = format!("repository:{}:{actions}", self.endpoint.repository);
        match &self.mount_from {
            Some(other) => format!("{own} repository:{other}:pull"),
            None => own,
        }
    }

    fn authorization(&self) -> Option<HeaderValue> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HeaderValue>> {
        self.authorization.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The address to try, and the one to fall back to where plain http is allowed. A login is never part of a first
    /// request, so finding out that a host speaks plain http gives nothing away.
    fn bases(&self) -> Result<(Url, Option<Url>), PullError> {
        let base = |root: &Url| {
            let base = root.join(&format!("{}/", self.endpoint.repository));
            base.map_err(|e| PullError::Reference {
                text: self.reference.canonical().to_owned(),
                detail: e.to_string(),
            })
        };
        let first = base(&self.endpoint.roots[0])?;
        let plain = match self.endpoint.roots.get(1) {
            Some(root) => Some(base(root)?),
            None if first.scheme() == "https" && self.transport.may_be_plain(&first, None) => {
                let mut plain = first.clone();
                // A host that is listed as insecure, named without a scheme.
                plain.set_scheme("http").is_ok().then_some(plain)
            }
            None => None,
        };
        Ok((first, plain))
    }

    /// What the health of the place is remembered by.
    pub(crate) fn place(&self) -> &str {
        self.endpoint.roots[0].as_str()
    }

    /// The address of the repository, once the first request has found it.
    pub(crate) fn base(&self) -> Option<&Url> {
        self.base.get()
    }

    /// The address of something in the repository.
    pub(crate) fn address(&self, path: &str) -> Result<Url, PullError> {
        match self.base.get() {
            Some(base) => Ok(join(base, path)),
            None => Ok(join(&self.bases()?.0, path)),
        }
    }

    async fn accept_document(&self, response: Incoming) -> Result<Incoming, PullError> {
        match response.status().as_u16() {
            200..=299 => Ok(response),
            404 => Err(PullError::NotFound {
                reference: self.reference.canonical().to_owned(),
                detail: response.error_detail().await,
            }),
            _ => Err(self.refusal(response, &format!("the manifest of {}", self.reference)).await),
        }
    }

    async fn accept_blob(&self, response: Incoming, what: &str) -> Result<Incoming, PullError> {
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            404 => {
                let detail = response.error_detail().await;
                Err(self.missing(what, detail))
            }
            _ => Err(self.refusal(response, what).await),
        }
    }

    fn missing(&self, what: &str, detail: String) -> PullError {
        PullError::BlobNotFound { what: what.to_owned(), registry: self.endpoint.registry.clone(), detail }
    }

    pub(crate) async fn refusal(&self, response: Incoming, what: &str) -> PullError {
        let registry = self.endpoint.registry.clone();
        let repository = self.endpoint.repository.clone();
        match response.status() {
            StatusCode::UNAUTHORIZED if response.at_home => PullError::Unauthorized {
                registry,
                repository,
                had_credentials: !self.credentials.is_empty(),
                detail: response.error_detail().await,
            },
            StatusCode::FORBIDDEN if response.at_home => {
                PullError::Denied { registry, repository, detail: response.error_detail().await }
            }
            _ => response.into_error(what).await,
        }
    }
}

/// One foreign layer with thousands of addresses would be a way to make this host knock on doors.
const MAX_FOREIGN_URLS: usize = 4;

fn join(base: &Url, path: &str) -> Url {
    // The path is made of literals, a checked tag and a checked digest.
    base.join(path).unwrap_or_else(|_| base.clone())
}

/// Errors that a plain-http server causes when it is spoken to in TLS.
fn suggests_plain_http(error: &PullError) -> bool {
    matches!(error, PullError::NotTls { .. } | PullError::Refused { .. } | PullError::Connection { .. })
}

fn check_length(what: &str, host: &str, expected: Option<u64>, actual: u64) -> Result<(), PullError> {
    match expected {
        Some(expected) if expected != actual => Err(PullError::WrongLength {
            what: what.to_owned(),
            registry: host.to_owned(),
            expected,
            actual: format!("{actual} bytes"),
        }),
        _ => Ok(()),
    }
}

fn check_digest(what: &str, host: &str, expected: Option<&Digest>, body: &[u8]) -> Result<Digest, PullError> {
    let actual = Digest::of(body);
    match expected {
        Some(expected) if *expected != actual => Err(PullError::WrongDigest {
            what: what.to_owned(),
            registry: host.to_owned(),
            expected: *expected,
            actual: actual.to_string(),
        }),
        _ => Ok(actual),
    }
}
