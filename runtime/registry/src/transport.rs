//! HTTP that does not trust the other side: bounded, watched for progress, careful with redirects.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE,
    RETRY_AFTER,
};
use reqwest::{Method, StatusCode, Url};
use rustls::CertificateError;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::time::{Instant, timeout};

use crate::backoff::parse_retry_after;
use crate::endpoint::Link;
use crate::error::PullError;
use crate::tls::Tls;

/// Registries send a client to their storage in one hop, rarely two.
const MAX_REDIRECTS: usize = 5;
/// Less than this within one no-progress window is a stall, however regularly single bytes drip.
const MIN_WINDOW_BYTES: u64 = 1024;
/// Whole documents (manifest, config, token) are small; no link that works needs longer for one.
const DOCUMENT_DEADLINE: Duration = Duration::from_secs(300);
/// Clients with settings of their own. Their number follows configuration; the cap guards against mistakes.
const MAX_OWN_CLIENTS: usize = 64;
/// As much of an error page as is read to find a message in it.
const ERROR_BODY_LIMIT: u64 = 64 << 10;
const ERROR_TEXT_CHARS: usize = 300;
const SEND_PIECE: usize = 64 << 10;

/// How long to wait for what.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// TCP and TLS handshake, per address.
    pub connect: Duration,
    /// No answer, or no more than 1 KiB of a body, for this long is a stall. Not shorter than what a
    /// caching proxy needs to fetch a large layer itself before it answers.
    pub no_progress: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(15), no_progress: Duration::from_secs(60) }
    }
}

#[derive(Debug)]
pub(crate) struct Transport {
    tls: Tls,
    timeouts: Timeouts,
    /// Hosts (`name` or `name:port`) whose certificate is not checked and that may speak plain http.
    insecure: Vec<String>,
    clients: Mutex<BTreeMap<ClientKey, reqwest::Client>>,
}

/// Requests that share connections and settings.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ClientKey {
    /// System and extra authorities, proxies from the environment.
    Common,
    /// The same without proxies.
    Loopback,
    /// `certs.d` files, insecure or the settings of a mirror, by host.
    Own(String, Option<Link>),
}

/// A request as data.
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) accept: Option<&'static str>,
    pub(crate) range_from: Option<u64>,
    pub(crate) authorization: Option<HeaderValue>,
    /// Holds for its host only.
    pub(crate) link: Option<Link>,
    pub(crate) content_type: Option<String>,
    pub(crate) content_range: Option<String>,
    pub(crate) body: Payload,
}

/// What a request carries.
#[derive(Clone, Debug, Default)]
pub(crate) enum Payload {
    #[default]
    Nothing,
    Bytes(Bytes),
    File(FilePart),
}

/// A part of a file, read while it is sent.
#[derive(Clone, Debug)]
pub(crate) struct FilePart {
    pub(crate) path: PathBuf,
    pub(crate) from: u64,
    pub(crate) len: u64,
    /// Bytes that the connection took so far: what progress is measured by.
    pub(crate) taken: Arc<AtomicU64>,
}

/// A response whose body is still to come.
pub(crate) struct Incoming {
    response: reqwest::Response,
    /// Who answered, as `name` or `name:port`.
    host: String,
    /// The answer came from the host that was asked, not from one it redirected to.
    pub(crate) at_home: bool,
    no_progress: Duration,
    waited: Duration,
    window_bytes: u64,
}

impl Outgoing {
    pub(crate) fn get(url: Url) -> Self {
        Self {
            method: Method::GET,
            url,
            accept: None,
            range_from: None,
            authorization: None,
            link: None,
            content_type: None,
            content_range: None,
            body: Payload::Nothing,
        }
    }

    fn headers(&self, authorization: Option<&HeaderValue>, link: Option<&Link>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in link.iter().flat_map(|link| &link.headers) {
            let pair = (HeaderName::try_from(name.as_str()), HeaderValue::try_from(value.as_str()));
            if let (Ok(name), Ok(mut value)) = pair {
                value.set_sensitive(true);
                headers.append(name, value);
            }
        }
        let mut put = |name, value: Option<String>| {
            if let Some(value) = value.and_then(|v| HeaderValue::try_from(v).ok()) {
                headers.insert(name, value);
            }
        };
        put(ACCEPT, self.accept.map(str::to_owned));
        put(RANGE, self.range_from.map(|from| format!("bytes={from}-")));
        put(CONTENT_TYPE, self.content_type.clone());
        put(reqwest::header::CONTENT_RANGE, self.content_range.clone());
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        headers
    }

    fn follows_redirects(&self) -> bool {
        self.method == Method::GET || self.method == Method::HEAD
    }
}

impl FilePart {
    fn stream(&self) -> reqwest::Body {
        let part = self.clone();
        let pieces = futures_util::stream::try_unfold(None, move |state| {
            let part = part.clone();
            async move {
                let (mut file, left) = match state {
                    Some(state) => state,
                    None => {
                        let mut file = tokio::fs::File::open(&part.path).await?;
                        file.seek(io::SeekFrom::Start(part.from)).await?;
                        (file, part.len)
                    }
                };
                if left == 0 {
                    return Ok::<_, io::Error>(None);
                }
                let mut piece = vec![0; SEND_PIECE.min(usize::try_from(left).unwrap_or(SEND_PIECE))];
                let n = file.read(&mut piece).await?;
                if n == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                piece.truncate(n);
                part.taken.fetch_add(n as u64, Ordering::Relaxed);
                Ok(Some((Bytes::from(piece), Some((file, left - n as u64)))))
            }
        });
        reqwest::Body::wrap_stream(pieces)
    }
}

impl Transport {
    pub(crate) fn new(tls: Tls, timeouts: Timeouts, insecure: Vec<String>) -> Self {
        Self { tls, timeouts, insecure, clients: Mutex::default() }
    }

    /// Plain http is acceptable on this machine and where the configuration says so.
    pub(crate) fn may_be_plain(&self, url: &Url, link: Option<&Link>) -> bool {
        let host = host_of(url);
        is_loopback(url) || self.is_insecure(&host) || link.is_some_and(|l| l.skip_verify && l.host == host)
    }

    fn is_insecure(&self, host: &str) -> bool {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        self.insecure.iter().any(|listed| listed == host || listed == name)
    }

    /// Sends and follows redirects. The authorization goes to the first host only, and never back to it
    /// after a detour; an encrypted request is never continued in the clear.
    pub(crate) async fn send(&self, outgoing: Outgoing) -> Result<Incoming, PullError> {
        let mut url = outgoing.url.clone();
        let mut authorization = outgoing.authorization.as_ref();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send_once(&outgoing, url.clone(), authorization).await?;
            if !(outgoing.follows_redirects() && is_redirect(response.status())) {
                return Ok(Incoming {
                    at_home: same_origin(&url, &outgoing.url),
                    host: host_of(&url),
                    response,
                    no_progress: self.timeouts.no_progress,
                    waited: Duration::ZERO,
                    window_bytes: 0,
                });
            }
            let next = redirect_target(&url, response.headers()).map_err(|detail| PullError::Redirect {
                registry: host_of(&url),
                request: outgoing.url.path().to_owned(),
                detail,
            })?;
            if !same_origin(&next, &outgoing.url) {
                authorization = None;
            }
            url = next;
        }
        Err(PullError::Redirect {
            registry: host_of(&outgoing.url),
            request: outgoing.url.path().to_owned(),
            detail: format!("more than {MAX_REDIRECTS} redirects"),
        })
    }

    async fn send_once(
        &self,
        outgoing: &Outgoing,
        url: Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<reqwest::Response, PullError> {
        let host = host_of(&url);
        let link = outgoing.link.as_ref().filter(|link| link.host == host);
        let client = self.client(&url, link)?;
        let mut request =
            client.request(outgoing.method.clone(), url).headers(outgoing.headers(authorization, link));
        let taken = match &outgoing.body {
            Payload::Nothing => None,
            Payload::Bytes(bytes) => {
                request = request.body(bytes.clone());
                None
            }
            Payload::File(part) => {
                request = request.header(CONTENT_LENGTH, part.len).body(part.stream());
                Some(part.taken.clone())
            }
        };
        match self.watch(request.send(), taken.as_deref()).await {
            Some(Ok(response)) => Ok(response),
            Some(Err(error)) => {
                let error = classify(&host, &error);
                if is_about_certificates(&error) {
                    self.forget_certificates();
                }
                Err(error)
            }
            None => Err(PullError::Stalled { registry: host, waited: self.timeouts.no_progress }),
        }
    }

    /// Waits for an answer as long as bytes are taken; `None` is a stall.
    async fn watch<T>(&self, answer: impl Future<Output = T>, taken: Option<&AtomicU64>) -> Option<T> {
        let progress = || taken.map_or(0, |taken| taken.load(Ordering::Relaxed));
        let mut answer = std::pin::pin!(answer);
        let mut before = progress();
        loop {
            // Polling the same pinned future again after a timeout loses nothing.
            if let Ok(answer) = timeout(self.timeouts.no_progress, answer.as_mut()).await {
                return Some(answer);
            }
            let now = progress();
            if now == before {
                return None;
            }
            before = now;
        }
    }

    /// A person who follows the hint and adds a certificate need not restart anything.
    fn forget_certificates(&self) {
        self.tls.forget();
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClientKey, reqwest::Client>> {
        // A map of clients is whole at every moment.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self, url: &Url, link: Option<&Link>) -> Result<reqwest::Client, PullError> {
        let host = host_of(url);
        let key = if link.is_some() || self.is_insecure(&host) || self.tls.has_own_files(&host) {
            ClientKey::Own(host, link.map(Link::without_headers))
        } else if is_loopback(url) {
            ClientKey::Loopback
        } else {
            ClientKey::Common
        };
        let mut clients = self.lock();
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = self.build(&key, is_loopback(url))?;
        if clients.len() >= MAX_OWN_CLIENTS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    fn build(&self, key: &ClientKey, loopback: bool) -> Result<reqwest::Client, PullError> {
        let (host, link) = match key {
            ClientKey::Own(host, link) => (Some(host.as_str()), link.as_ref()),
            ClientKey::Common | ClientKey::Loopback => (None, None),
        };
        let verify = !host.is_some_and(|host| self.is_insecure(host)) && !link.is_some_and(|l| l.skip_verify);
        let connect = link.and_then(|link| link.connect).unwrap_or(self.timeouts.connect);
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("evenkeel/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .connect_timeout(connect)
            .pool_idle_timeout(Duration::from_secs(20))
            .dns_resolver(Arc::new(SystemResolver { deadline: connect }))
            .tls_backend_preconfigured(self.tls.config(host, link, verify)?);
        if loopback {
            builder = builder.no_proxy();
        }
        builder.build().map_err(|e| PullError::Setup { detail: chain(&e) })
    }
}

impl Incoming {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    pub(crate) fn content_length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// The address that `Location` names, by the rules for redirects.
    pub(crate) fn location(&self) -> Result<Url, String> {
        redirect_target(self.response.url(), self.response.headers())
    }

    /// An address that the answer gives, by the rules for redirects.
    pub(crate) fn join(&self, address: &str) -> Option<Url> {
        let mut headers = HeaderMap::new();
        headers.insert(LOCATION, HeaderValue::from_str(address).ok()?);
        redirect_target(self.response.url(), &headers).ok()
    }

    /// The next piece of the body, `None` at its end. Only time spent waiting for the network counts
    /// against the no-progress limit, so a slow disk is not mistaken for a slow registry.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, PullError> {
        loop {
            let begin = Instant::now();
            let left = self.no_progress.saturating_sub(self.waited);
            let next = timeout(left, self.response.chunk()).await;
            self.waited += begin.elapsed();
            match next {
                Ok(Ok(piece)) => {
                    self.window_bytes += piece.as_ref().map_or(0, |p| p.len() as u64);
                    if self.waited >= self.no_progress {
                        self.next_window()?;
                    }
                    return Ok(piece);
                }
                Ok(Err(error)) => return Err(classify(&self.host, &error)),
                Err(_) => self.next_window()?,
            }
        }
    }

    fn next_window(&mut self) -> Result<(), PullError> {
        if self.window_bytes < MIN_WINDOW_BYTES {
            return Err(PullError::Stalled { registry: self.host.clone(), waited: self.no_progress });
        }
        self.waited = Duration::ZERO;
        self.window_bytes = 0;
        Ok(())
    }

    /// The whole body, refused as soon as it is known to be larger than `limit`.
    pub(crate) async fn body(mut self, what: &str, limit: u64) -> Result<Bytes, PullError> {
        let too_large =
            |host: &str| PullError::TooLarge { what: what.to_owned(), registry: host.to_owned(), limit };
        if self.content_length().is_some_and(|n| n > limit) {
            return Err(too_large(&self.host));
        }
        let deadline = Instant::now() + DOCUMENT_DEADLINE;
        let mut body = BytesMut::new();
        while let Some(piece) = self.chunk().await? {
            if (body.len() + piece.len()) as u64 > limit {
                return Err(too_large(&self.host));
            }
            if Instant::now() > deadline {
                return Err(PullError::Stalled { registry: self.host, waited: DOCUMENT_DEADLINE });
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// `: message` from an error body, or nothing. Errors while reading it do not matter any more.
    pub(crate) async fn error_detail(self) -> String {
        match self.body("an error message", ERROR_BODY_LIMIT).await {
            Ok(body) => error_text(&body),
            Err(_) => String::new(),
        }
    }

    /// The error that an unwelcome status stands for, where the status has no special meaning.
    pub(crate) async fn into_error(self, what: &str) -> PullError {
        let status = self.status();
        let registry = self.host.clone();
        let retry_after = self.retry_after();
        if status == StatusCode::TOO_MANY_REQUESTS {
            return PullError::RateLimited { registry, retry_after };
        }
        PullError::Server {
            registry,
            request: format!("the request for {what}"),
            status: status.as_u16(),
            retry_after,
            detail: self.error_detail().await,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        let text = self.response.headers().get(RETRY_AFTER)?.to_str().ok()?;
        parse_retry_after(text, SystemTime::now())
    }
}

/// `name` or `name:port`, as in references and `certs.d`.
pub(crate) fn host_of(url: &Url) -> String {
    let name = url.host_str().unwrap_or("");
    match url.port() {
        Some(port) => format!("{name}:{port}"),
        None => name.to_owned(),
    }
}

pub(crate) fn is_loopback(url: &Url) -> bool {
    let name = url.host_str().unwrap_or("").trim_start_matches('[').trim_end_matches(']');
    match name.parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => name == "localhost" || name.ends_with(".localhost"),
    }
}

pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn redirect_target(from: &Url, headers: &HeaderMap) -> Result<Url, String> {
    let location =
        headers.get(LOCATION).and_then(|value| value.to_str().ok()).ok_or("it names no place to go")?;
    let mut next = from.join(location).map_err(|e| format!("the new address is not a URL: {e}"))?;
    // User and password in a Location would become an Authorization header of the registry's choice.
    if next.set_username("").is_err() || next.set_password(None).is_err() {
        return Err("the new address is not http or https".to_owned());
    }
    match (from.scheme(), next.scheme()) {
        ("https", "http") => Err("from https to http".to_owned()),
        (_, "http" | "https") => Ok(next),
        (_, other) => Err(format!("to the scheme {other:?}")),
    }
}

/// `getaddrinfo` on a thread, with a deadline and an error that can be recognised.
///
/// A static glibc resolves `files` and `dns` of nsswitch.conf by itself; other modules (`mdns`, `resolve`,
/// `myhostname`) need the shared glibc of exactly the build's version and are skipped without it.
struct SystemResolver {
    deadline: Duration,
}

#[derive(Debug, thiserror::Error)]
#[error("the name {name} cannot be resolved")]
struct ResolveError {
    name: String,
    kind: io::ErrorKind,
    detail: String,
}

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let name = name.as_str().to_owned();
        let deadline = self.deadline;
        Box::pin(async move {
            let failed = |kind, detail: String| ResolveError { name: name.clone(), kind, detail };
            let found = timeout(deadline, tokio::net::lookup_host((name.as_str(), 0)))
                .await
                .map_err(|_| failed(io::ErrorKind::TimedOut, "no answer in time".to_owned()))?
                .map_err(|e| failed(e.kind(), e.to_string()))?;
            let addresses: Vec<SocketAddr> = found.collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// Finds the cause that a person can act on in a chain of wrappers.
fn classify(registry: &str, error: &reqwest::Error) -> PullError {
    let registry = registry.to_owned();
    if let Some(resolve) = find::<ResolveError>(error) {
        return PullError::Resolve {
            name: resolve.name.clone(),
            source: io::Error::new(resolve.kind, resolve.detail.clone()),
        };
    }
    if let Some(tls) = find::<rustls::Error>(error) {
        return classify_tls(registry, tls);
    }
    match find::<io::Error>(error).map(io::Error::kind) {
        Some(io::ErrorKind::ConnectionRefused) => PullError::Refused { registry },
        Some(kind @ (io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset))
            if error.is_connect() =>
        {
            let detail = match kind {
                io::ErrorKind::UnexpectedEof => "it closes the connection during the handshake",
                _ => "it resets the connection during the handshake",
            };
            PullError::NotTls { registry, detail: detail.to_owned() }
        }
        _ => PullError::Connection { registry, detail: chain(error) },
    }
}

fn is_about_certificates(error: &PullError) -> bool {
    matches!(error, PullError::UnknownCa { .. } | PullError::Certificate { .. } | PullError::Tls { .. })
}

fn classify_tls(registry: String, error: &rustls::Error) -> PullError {
    match error {
        // Other: it signs itself as an authority, and no file names it.
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)) => {
            PullError::UnknownCa { registry }
        }
        rustls::Error::InvalidCertificate(problem) => {
            PullError::Certificate { registry, detail: problem.to_string() }
        }
        rustls::Error::InvalidMessage(_) => {
            PullError::NotTls { registry, detail: "its answer is not a TLS message".to_owned() }
        }
        other => PullError::Tls { registry, detail: other.to_string() },
    }
}

/// The first error of type `T` in the chain, also inside `io::Error`, which hides what it wraps.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(inner) =
            error.downcast_ref::<io::Error>().and_then(io::Error::get_ref).and_then(|e| find::<T>(e))
        {
            return Some(inner);
        }
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        current = error.source();
    }
    None
}

/// The innermost causes, without reqwest's own words and URLs (they can carry signed queries).
fn chain(error: &reqwest::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut current = error.source();
    while let Some(error) = current {
        let text = error.to_string();
        if parts.last() != Some(&text) {
            parts.push(text);
        }
        current = error.source();
    }
    if parts.is_empty() { "unknown cause".to_owned() } else { parts.join(": ") }
}

/// The registry's own words (`{"errors":[{"code","message"}]}`), made safe for a terminal and short.
fn error_text(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        #[serde(default)]
        errors: Vec<Entry>,
        details: Option<String>,
        message: Option<String>,
    }
    #[derive(Deserialize)]
    struct Entry {
        code: Option<String>,
        message: Option<String>,
    }
    let Ok(parsed) = serde_json::from_slice::<Errors>(body) else {
        return String::new();
    };
    let first = parsed.errors.into_iter().next();
    let text = first
        .and_then(|e| e.message.filter(|m| !m.is_empty()).or(e.code))
        .or(parsed.details)
        .or(parsed.message);
    match text {
        Some(text) if !text.is_empty() => {
            let clean: String =
                text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(ERROR_TEXT_CHARS).collect();
            format!(": {clean}")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn loopback_is_recognised_by_address_and_name() {
        for yes in ["http://127.0.0.1:5000", "http://127.9.9.9", "http://[::1]:5000", "http://localhost"] {
            assert!(is_loopback(&url(yes)), "{yes}");
        }
        for no in ["http://10.0.0.1", "http://localhost.example", "http://127.0.0.1.example"] {
            assert!(!is_loopback(&url(no)), "{no}");
        }
    }

    #[test]
    fn redirects_never_leave_encryption_nor_bring_logins() {
        let target = |from: &str, location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, HeaderValue::from_str(location).unwrap());
            redirect_target(&url(from), &headers).map(String::from)
        };
        assert_eq!(target("https://a/v2/x", "/y").unwrap(), "https://a/y");
        assert_eq!(target("https://a/v2/x", "https://u:p@b/y").unwrap(), "https://b/y");
        assert_eq!(target("http://a/v2/x", "https://b/y").unwrap(), "https://b/y");
        assert!(target("https://a/v2/x", "http://a/y").is_err());
        assert!(target("http://a/v2/x", "file:///etc/passwd").is_err());
    }

    #[test]
    fn origins_differ_by_scheme_host_and_port() {
        assert!(same_origin(&url("https://a/x"), &url("https://a:443/y")));
        for other in ["http://a", "https://b", "https://a:444", "https://a.b"] {
            assert!(!same_origin(&url("https://a"), &url(other)), "{other}");
        }
    }

    #[test]
    fn error_bodies_are_quoted_safely() {
        let text = |body: &str| error_text(body.as_bytes());
        assert_eq!(text(r#"{"errors":[{"code":"DENIED","message":"no"}]}"#), ": no");
        assert_eq!(text(r#"{"errors":[{"code":"DENIED"}]}"#), ": DENIED");
        assert_eq!(text("{\"errors\":[{\"message\":\"a\\u001b[31mb\\nc\"}]}"), ": a [31mb c");
        assert_eq!(text("<html>"), "");
        assert!(text(&format!(r#"{{"message":"{}"}}"#, "x".repeat(9999))).len() < 310);
    }
}
