//! What refers to an image: signatures, lists of contents, whatever names it as its subject.
//!
//! Registries of the newer kind keep the list (`/referrers/<digest>`). For the others clients keep it, as an index under
//! a tag made of the digest (`sha256-<hex>`), as the distribution specification has it.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use keel_store::Digest;
use reqwest::{StatusCode, Url};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::backoff::{Backoff, jitter, random};
use crate::client::Client;
use crate::credentials::InlineAuth;
use crate::error::PullError;
use crate::manifest::OCI_INDEX;
use crate::progress::Tracker;
use crate::push::Parcel;
use crate::reference::Reference;
use crate::session::{Access, MANIFEST_LIMIT, Session};
use crate::transport::{Incoming, Outgoing};

/// An image with more signatures than this fills pages nobody reads.
const MAX_REFERRERS: usize = 4096;
const MAX_PAGES: usize = 64;
/// How long after it was written an entry has to be in the list: longer than another client takes between reading the
/// list without it and writing that back.
const SETTLE: Duration = Duration::from_secs(1);
/// Of as many clients at once each gets its turn; more than that is no accident.
const MAX_WRITES: u32 = 32;

/// Everything that refers to one manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Referrers {
    pub subject: Digest,
    pub referrers: Vec<Referrer>,
    /// The list is one that clients keep, not the registry.
    pub by_tag: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Referrer {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What became of an entry.
enum Listed {
    There,
    Written,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    manifests: Vec<Referrer>,
}

impl Client {
    /// Lists what refers to the manifest or index that `reference` means, of one type if that is given.
    pub async fn referrers(
        &self,
        reference: &str,
        artifact_type: Option<&str>,
        auth: &[InlineAuth],
    ) -> Result<Referrers, PullError> {
        let reference = Reference::parse(reference)?;
        let tracker = Tracker::new(std::sync::Arc::new(|_| {}));
        let session = self.origin(&reference, &tracker, auth, Access::Pull).await?;
        let mut backoff = Backoff::new(session.retry, session.tracker);
        loop {
            match session.referrers_once(artifact_type).await {
                Ok(mut found) => {
                    // Registries may leave the choice to the client.
                    found.referrers.retain(|r| {
                        artifact_type.is_none_or(|wanted| r.artifact_type.as_deref() == Some(wanted))
                    });
                    return Ok(found);
                }
                Err(error) => backoff.pause(error).await?,
            }
        }
    }
}

impl Session<'_> {
    async fn referrers_once(&self, artifact_type: Option<&str>) -> Result<Referrers, PullError> {
        let subject = match self.reference.digest() {
            Some(digest) => *digest,
            None => self.raw_once(&self.reference.selector(), None, None).await?.digest,
        };
        if let Some(referrers) = self.kept_by_registry(&subject, artifact_type).await? {
            return Ok(Referrers { subject, referrers, by_tag: false });
        }
        let kept = self.kept_by_clients(&subject).await?;
        let referrers = kept.map(|body| self.parse(&body)).transpose()?.unwrap_or_default();
        Ok(Referrers { subject, referrers, by_tag: true })
    }

    /// `None`: the registry keeps no such lists.
    async fn kept_by_registry(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Option<Vec<Referrer>>, PullError> {
        let mut path = format!("referrers/{subject}");
        if let Some(artifact_type) = artifact_type {
            path.push_str(&format!("?artifactType={}", escape(artifact_type)));
        }
        let mut found = Vec::new();
        let mut next: Option<Url> = None;
        for _ in 0..MAX_PAGES {
            let response = match next.take() {
                None => self.get(&path, None, None).await?,
                Some(url) => self.call_at(&url, || Outgoing::get(url.clone())).await?,
            };
            match response.status() {
                StatusCode::OK => {}
                // The specification names 404 only; registries that do not know the path answer as they please.
                StatusCode::NOT_FOUND
                | StatusCode::BAD_REQUEST
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::NOT_IMPLEMENTED
                    if found.is_empty() =>
                {
                    return Ok(None);
                }
                _ => return Err(self.refusal(response, &self.what()).await),
            }
            next = next_page(&response);
            found.extend(self.parse(&response.body(&self.what(), MANIFEST_LIMIT).await?)?);
            if found.len() > MAX_REFERRERS {
                return Err(self.odd(format!("more than {MAX_REFERRERS} entries")));
            }
            if next.is_none() {
                return Ok(Some(found));
            }
        }
        Err(self.odd(format!("more than {MAX_PAGES} pages")))
    }

    /// The index under the tag of the subject.
    async fn kept_by_clients(&self, subject: &Digest) -> Result<Option<Bytes>, PullError> {
        match self.raw_once(&fallback_tag(subject), None, None).await {
            Ok(raw) => Ok(Some(raw.body)),
            Err(PullError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds what was pushed to the list of what refers to its subject, which the registry does not keep itself.
    pub(crate) async fn list_as_referrer(&self, body: &[u8], parcel: &Parcel) -> Result<(), PullError> {
        let Some((subject, entry)) = lower_referrer(body, parcel) else { return Ok(()) };
        let mut backoff = Backoff::new(self.retry, self.tracker);
        let mut written = 0;
        while written < MAX_WRITES {
            match self.add_to_list(&subject, &entry).await {
                Ok(Listed::There) => return Ok(()),
                Ok(Listed::Written) => {
                    written += 1;
                    tokio::time::sleep(jitter(2 * SETTLE, random())).await;
                }
                Err(error) => backoff.pause(error).await?,
            }
        }
        Err(self.odd(format!("other clients took a new entry out {MAX_WRITES} times")))
    }

    /// Read, add, write: there is no way to do it at once (docker's registry takes no notice of `If-Match`). Of two clients
    /// at the same time one wins, so whoever has written looks again once the other must have written too.
    async fn add_to_list(&self, subject: &Digest, entry: &Referrer) -> Result<Listed, PullError> {
        let there = self.kept_by_clients(subject).await?;
        let Some(list) = with_entry(there.as_deref(), entry).map_err(|detail| self.odd(detail))? else {
            return Ok(Listed::There);
        };
        let list = Bytes::from(list);
        let parcel = Parcel { digest: Digest::of(&list), media_type: OCI_INDEX.to_owned() };
        self.put_manifest(list, &parcel, &fallback_tag(subject)).await?;
        Ok(Listed::Written)
    }

    fn parse(&self, body: &[u8]) -> Result<Vec<Referrer>, PullError> {
        serde_json::from_slice::<List>(body).map(|list| list.manifests).map_err(|e| self.odd(e.to_string()))
    }

    fn what(&self) -> String {
        format!("the list of what refers to {}", self.reference)
    }

    fn odd(&self, detail: String) -> PullError {
        PullError::Malformed { what: self.what(), registry: self.endpoint.registry.clone(), detail }
    }
}

fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// The subject of a manifest, and the manifest as its list has it; `None` when it is about nothing.
fn lower_referrer(body: &[u8], parcel: &Parcel) -> Option<(Digest, Referrer)> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Manifest {
        subject: Option<Described>,
        artifact_type: Option<String>,
        config: Option<Described>,
        #[serde(default)]
        annotations: BTreeMap<String, String>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Described {
        digest: Digest,
        media_type: Option<String>,
    }
    let manifest: Manifest = serde_json::from_slice(body).ok()?;
    let artifact_type = manifest
        .artifact_type
        .filter(|kind| !kind.is_empty())
        .or_else(|| manifest.config.and_then(|config| config.media_type));
    let entry = Referrer {
        media_type: parcel.media_type.clone(),
        digest: parcel.digest,
        size: body.len() as u64,
        artifact_type,
        annotations: manifest.annotations,
    };
    Some((manifest.subject?.digest, entry))
}

/// The list with one more entry, whatever else is in it; `None` when it is there already.
fn with_entry(list: Option<&[u8]>, entry: &Referrer) -> Result<Option<Vec<u8>>, String> {
    let mut list: Value = match list {
        Some(list) => serde_json::from_slice(list).map_err(|e| e.to_string())?,
        None => json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}),
    };
    let entries = list["manifests"].as_array_mut().ok_or("it is not an index")?;
    if entries.iter().any(|other| other["digest"] == json!(entry.digest)) {
        return Ok(None);
    }
    entries.push(json!(entry));
    Ok(Some(list.to_string().into_bytes()))
}

/// `Link: <address>; rel="next"`.
fn next_page(response: &Incoming) -> Option<Url> {
    let (address, rest) = response.header("link")?.trim().strip_prefix('<')?.split_once('>')?;
    rest.contains("rel=\"next\"").then(|| response.join(address)).flatten()
}

/// For a query. Media types are made of few characters beside letters and digits.
fn escape(text: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-._~/".contains(b);
    text.bytes().map(|b| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_once_and_others_stay_as_they_are() {
        let parcel = Parcel { digest: Digest::of(b"m"), media_type: "application/x".into() };
        let body = json!({"subject": {"digest": Digest::of(b"s"), "size": 1, "mediaType": "x"},
                          "config": {"mediaType": "kind/of", "digest": Digest::of(b""), "size": 0},
                          "annotations": {"a": "b"}});
        let (subject, entry) = lower_referrer(body.to_string().as_bytes(), &parcel).unwrap();
        assert_eq!((subject, entry.artifact_type.as_deref()), (Digest::of(b"s"), Some("kind/of")));
        assert_eq!(lower_referrer(b"{}", &parcel), None);

        let other = json!({"schemaVersion": 2, "odd": 1, "manifests": [{"digest": "else", "odd": 2}]});
        let list = with_entry(Some(other.to_string().as_bytes()), &entry).unwrap().unwrap();
        let value: Value = serde_json::from_slice(&list).unwrap();
        assert_eq!((&value["odd"], &value["manifests"][0]["odd"]), (&json!(1), &json!(2)));
        assert_eq!(value["manifests"][1]["digest"], json!(parcel.digest));
        assert_eq!(with_entry(Some(&list), &entry).unwrap(), None);
        assert!(with_entry(Some(b"{}"), &entry).is_err());
    }
}
