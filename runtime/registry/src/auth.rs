//! The answer to `401`: reading challenges, getting tokens, remembering them.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use base64::Engine as _;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use crate::credentials::Credential;
use crate::endpoint::Link;
use crate::error::PullError;
use crate::transport::{Outgoing, Payload, Transport};
use keel_store::Digest;

/// Tokens are a few kilobytes. A service that sends more is broken or hostile.
const TOKEN_LIMIT: u64 = 1 << 20;
/// The default of the token specification when a service does not say.
const DEFAULT_TOKEN_LIFE: Duration = Duration::from_secs(60);
/// A token is not used in its last seconds: it has to survive the request that carries it.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);
/// One per repository in use; beyond that the cache starts afresh.
const MAX_TOKENS: usize = 256;
const CLIENT_ID: &str = "evenkeel";

/// One way to log in that a registry offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// Bearer tokens by service, scope and login.
#[derive(Debug, Default)]
pub(crate) struct TokenCache {
    tokens: Mutex<BTreeMap<Digest, (HeaderValue, Instant)>>,
}

/// What a token is asked for.
pub(crate) struct TokenRequest<'a> {
    pub(crate) realm: &'a str,
    pub(crate) service: Option<&'a str>,
    pub(crate) scope: &'a str,
    pub(crate) credential: Option<&'a Credential>,
    /// For messages.
    pub(crate) registry: &'a str,
    pub(crate) repository: &'a str,
    /// Settings of the connection, where the token service is the registry itself.
    pub(crate) link: Option<&'a Link>,
}

/// All challenges of a response, in order; unknown schemes are left out.
pub(crate) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(parse_challenges)
        .collect()
}

/// `Basic dXNlcjpwYXNz`, marked as sensitive so that no log shows it.
pub(crate) fn basic_header(username: &str, password: &str) -> Option<HeaderValue> {
    let text = format!("{username}:{password}");
    sensitive(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text)))
}

pub(crate) fn bearer_header(token: &str) -> Option<HeaderValue> {
    sensitive(format!("Bearer {token}"))
}

fn sensitive(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

impl TokenCache {
    /// A token that is still good, or a new one. `stale` is the header that was just refused.
    pub(crate) async fn token(
        &self,
        transport: &Transport,
        request: &TokenRequest<'_>,
        stale: Option<&HeaderValue>,
    ) -> Result<HeaderValue, PullError> {
        let key = request.key();
        if let Some(header) = self.cached(&key).filter(|h| Some(h) != stale) {
            return Ok(header);
        }
        let (header, life) = fetch(transport, request).await?;
        let mut tokens = self.lock();
        if tokens.len() >= MAX_TOKENS {
            tokens.clear();
        }
        let good_until = Instant::now() + life.saturating_sub(TOKEN_MARGIN);
        tokens.insert(key, (header.clone(), good_until));
        Ok(header)
    }

    fn cached(&self, key: &Digest) -> Option<HeaderValue> {
        let tokens = self.lock();
        let (header, good_until) = tokens.get(key)?;
        (*good_until > Instant::now()).then(|| header.clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Digest, (HeaderValue, Instant)>> {
        // A map of tokens is whole at every moment; a panic elsewhere does not spoil it.
        self.tokens.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl TokenRequest<'_> {
    /// Two logins never share a token, and no secret is kept as a key.
    fn key(&self) -> Digest {
        let login = match self.credential {
            None => String::new(),
            Some(Credential::Basic { username, password }) => format!("b{username}\0{password}"),
            Some(Credential::IdentityToken(token)) => format!("i{token}"),
            Some(Credential::RegistryToken(token)) => format!("r{token}"),
        };
        let parts = [self.realm, self.service.unwrap_or(""), self.scope, &login];
        Digest::of(parts.join("\0").as_bytes())
    }

    fn malformed(&self, detail: impl Into<String>) -> PullError {
        PullError::Malformed {
            what: format!("the token service {}", self.realm),
            registry: self.registry.to_owned(),
            detail: detail.into(),
        }
    }
}

async fn fetch(
    transport: &Transport,
    request: &TokenRequest<'_>,
) -> Result<(HeaderValue, Duration), PullError> {
    let realm = Url::parse(request.realm).map_err(|e| request.malformed(e.to_string()))?;
    let plain = realm.scheme() == "http" && transport.may_be_plain(&realm, request.link);
    if realm.scheme() != "https" && !plain {
        return Err(request.malformed("logins are sent over https only"));
    }
    let send = |outgoing| transport.send(Outgoing { link: request.link.cloned(), ..outgoing });
    let response = match request.credential {
        Some(Credential::IdentityToken(token)) => {
            let grant = [("grant_type", "refresh_token"), ("refresh_token", token)];
            send(oauth_request(realm, request, &grant)).await?
        }
        Some(login @ Credential::Basic { username, password }) => {
            let response = send(simple_request(realm.clone(), request, Some(login))).await?;
            if speaks_oauth_perhaps(response.status()) {
                let grant = [("grant_type", "password"), ("username", username), ("password", password)];
                match send(oauth_request(realm, request, &grant)).await {
                    Ok(posted) if posted.status().is_success() => posted,
                    // Of two refusals the one about the login counts, not the one about the method.
                    Ok(posted) if response.status().as_u16() > 401 => posted,
                    _ => response,
                }
            } else {
                response
            }
        }
        other => send(simple_request(realm, request, other)).await?,
    };
    match response.status().as_u16() {
        200..=299 => {}
        400 | 401 | 403 => {
            let detail = response.error_detail().await;
            return Err(PullError::Unauthorized {
                registry: request.registry.to_owned(),
                repository: request.repository.to_owned(),
                had_credentials: request.credential.is_some(),
                detail,
            });
        }
        _ => return Err(response.into_error("a token").await),
    }
    let body = response.body("a token", TOKEN_LIMIT).await?;
    lower_token(&body).map_err(|detail| request.malformed(detail))
}

/// GET with the login as Basic (distribution's token specification).
fn simple_request(mut url: Url, request: &TokenRequest<'_>, credential: Option<&Credential>) -> Outgoing {
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = request.service {
            query.append_pair("service", service);
        }
        // Several scopes in one challenge are parameters of their own.
        for scope in request.scope.split(' ').filter(|s| !s.is_empty()) {
            query.append_pair("scope", scope);
        }
        if let Some(Credential::Basic { username, .. }) = credential {
            query.append_pair("account", username);
        }
    }
    let authorization = match credential {
        Some(Credential::Basic { username, password }) => basic_header(username, password),
        _ => None,
    };
    Outgoing { authorization, ..Outgoing::get(url) }
}

/// Most services take passwords by GET, as docker and podman send them; for those that take them by POST alone, as
/// containerd tries first, it is tried second.
fn speaks_oauth_perhaps(refusal: StatusCode) -> bool {
    matches!(refusal.as_u16(), 400 | 401 | 404 | 405 | 501)
}

/// POST with a refresh token or a password (distribution's OAuth2 specification).
fn oauth_request(url: Url, request: &TokenRequest<'_>, grant: &[(&str, &str)]) -> Outgoing {
    let mut form = url.clone();
    form.set_query(None);
    form.query_pairs_mut()
        .append_pair("service", request.service.unwrap_or(""))
        .append_pair("client_id", CLIENT_ID)
        .append_pair("scope", request.scope)
        .extend_pairs(grant);
    Outgoing {
        method: Method::POST,
        content_type: Some("application/x-www-form-urlencoded".to_owned()),
        body: Payload::Bytes(form.query().unwrap_or_default().to_owned().into()),
        ..Outgoing::get(url)
    }
}

pub(crate) fn lower_token(body: &[u8]) -> Result<(HeaderValue, Duration), String> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    let answer: Answer = serde_json::from_slice(body).map_err(|_| "its answer is not a token".to_owned())?;
    let token = answer
        .token
        .filter(|t| !t.is_empty())
        .or(answer.access_token)
        .filter(|t| !t.is_empty())
        .ok_or("its answer holds no token")?;
    let header = bearer_header(&token).ok_or("its token is not fit for a header")?;
    let life = answer.expires_in.map_or(DEFAULT_TOKEN_LIFE, Duration::from_secs);
    Ok((header, life.clamp(DEFAULT_TOKEN_LIFE, Duration::from_secs(24 * 3600))))
}

/// RFC 9110, 11.6.1: a list of schemes, each followed by a list of parameters.
pub(crate) fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, BTreeMap<String, String>)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)))
            .unwrap_or(rest.len());
        if end == 0 {
            break;
        }
        let (token, after) = rest.split_at(end);
        match after.trim_start().strip_prefix('=') {
            Some(value) => {
                let (value, after) = parse_value(value.trim_start());
                if let Some((_, parameters)) = found.last_mut() {
                    parameters.insert(token.to_ascii_lowercase(), value);
                }
                rest = after;
            }
            None => {
                found.push((token.to_ascii_lowercase(), BTreeMap::new()));
                rest = after;
            }
        }
    }
    found.into_iter().filter_map(|(scheme, parameters)| lower_challenge(&scheme, parameters)).collect()
}

fn lower_challenge(scheme: &str, mut parameters: BTreeMap<String, String>) -> Option<Challenge> {
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: parameters.remove("realm")?,
            service: parameters.remove("service"),
            scope: parameters.remove("scope").filter(|s| !s.is_empty()),
        }),
        _ => None,
    }
}

/// A token or a quoted string, and what follows it.
fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, c)| c)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: &str, scope: &str) -> Challenge {
        let some = |s: &str| Some(s.to_owned()).filter(|s| !s.is_empty());
        Challenge::Bearer { realm: realm.into(), service: some(service), scope: some(scope) }
    }

    #[test]
    fn challenges_are_read_in_all_their_forms() {
        let check = |text: &str, expected: &[Challenge]| {
            assert_eq!(parse_challenges(text), expected, "{text}");
        };
        check("Basic realm=\"x, y\"", &[Challenge::Basic]);
        check(
            r#"Bearer realm="https://a/token",service="s",scope="repository:x:pull,push""#,
            &[bearer("https://a/token", "s", "repository:x:pull,push")],
        );
        check(
            r#"bearer service=s , realm="https://a/\"t" , Basic realm="b""#,
            &[bearer("https://a/\"t", "s", ""), Challenge::Basic],
        );
        check("Negotiate, Basic", &[Challenge::Basic]);
        check("Bearer service=\"no realm\"", &[]);
        check("", &[]);
        check("\"", &[]);
        check("Bearer realm=\"unterminated", &[bearer("unterminated", "", "")]);
    }

    #[test]
    fn tokens_have_a_sane_life() {
        let life = |body: &str| lower_token(body.as_bytes()).map(|(_, life)| life.as_secs());
        assert_eq!(life(r#"{"token":"a"}"#), Ok(60));
        assert_eq!(life(r#"{"token":"a","expires_in":1}"#), Ok(60));
        assert_eq!(life(r#"{"access_token":"a","expires_in":300}"#), Ok(300));
        assert_eq!(life(r#"{"access_token":"a","expires_in":18446744073709551615}"#), Ok(86400));
        assert!(life(r#"{"token":"","access_token":""}"#).is_err());
        assert!(life(r#"{"token":"a\nb"}"#).is_err());
    }

    #[test]
    fn logins_do_not_share_tokens() {
        let key = |credential: Option<&Credential>| {
            TokenRequest {
                realm: "r",
                service: None,
                scope: "s",
                credential,
                registry: "",
                repository: "",
                link: None,
            }
            .key()
        };
        let a = Credential::Basic { username: "u".into(), password: "a".into() };
        let b = Credential::Basic { username: "u".into(), password: "b".into() };
        assert_ne!(key(Some(&a)), key(Some(&b)));
        assert_ne!(key(Some(&a)), key(None));
    }
}
