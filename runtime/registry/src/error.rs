//! Everything that can stop a pull or a push, each with what to do about it.

use std::path::PathBuf;
use std::time::Duration;

use keel_store::{BlobError, CommitError, Digest, LayerError, UnpackError};

/// Why an image could not be fetched (or pushed).
///
/// `Display` says what went wrong and where; [`hint`](Self::hint) says what a person can do about it;
/// [`is_retryable`](Self::is_retryable) says whether waiting may help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    #[error("image reference {text:?} is not valid: {detail}")]
    Reference { text: String, detail: String },

    #[error("{reference} is not in the registry{detail}")]
    NotFound { reference: String, detail: String },

    #[error("{what} is missing in the registry {registry}, although the manifest names it{detail}")]
    BlobNotFound { what: String, registry: String, detail: String },

    #[error(
        "registry {registry} asks for a login to read {repository}{}{detail}",
        if *.had_credentials { " and does not accept the one it was given" } else { "" }
    )]
    Unauthorized { registry: String, repository: String, had_credentials: bool, detail: String },

    #[error("registry {registry} forbids access to {repository}{detail}")]
    Denied { registry: String, repository: String, detail: String },

    #[error("the certificate of {registry} is signed by an authority that is not known here")]
    UnknownCa { registry: String },

    #[error("the certificate of {registry} is not acceptable: {detail}")]
    Certificate { registry: String, detail: String },

    #[error("{registry} does not speak TLS on this port: {detail}")]
    NotTls { registry: String, detail: String },

    #[error("TLS with {registry} failed: {detail}")]
    Tls { registry: String, detail: String },

    #[error("{registry} refuses the connection")]
    Refused { registry: String },

    #[error("the name {name} cannot be resolved")]
    Resolve {
        name: String,
        #[source]
        source: std::io::Error,
    },

    #[error("the connection to {registry} failed: {detail}")]
    Connection { registry: String, detail: String },

    #[error("{registry} made no progress for {}", seconds(*.waited))]
    Stalled { registry: String, waited: Duration },

    #[error(
        "{registry} limits the rate of requests{}",
        .retry_after.map(|d| format!(" and asks to wait {}", seconds(d))).unwrap_or_default()
    )]
    RateLimited { registry: String, retry_after: Option<Duration> },

    #[error("{registry} answers {status} to {request}{detail}")]
    Server { registry: String, request: String, status: u16, retry_after: Option<Duration>, detail: String },

    #[error("{registry} redirects {request} in a way that is not followed: {detail}")]
    Redirect { registry: String, request: String, detail: String },

    #[error("{what} from {registry} is {actual}, not {expected} as announced")]
    WrongDigest { what: String, registry: String, expected: Digest, actual: String },

    #[error("{what} from {registry} has {actual}, not {expected} as announced")]
    WrongLength { what: String, registry: String, expected: u64, actual: String },

    #[error("{what} from {registry} is larger than the limit of {limit} bytes")]
    TooLarge { what: String, registry: String, limit: u64 },

    #[error("{what} from {registry} cannot be used: {detail}")]
    Malformed { what: String, registry: String, detail: String },

    /// The layer does not unpack. Stops the transfer, so whether its digest is right stays unknown.
    #[error("{what} from {registry} cannot be unpacked")]
    BadLayer {
        what: String,
        registry: String,
        #[source]
        source: Box<LayerError>,
    },

    #[error("{reference} is a Docker schema 1 image, a format without content digests")]
    Schema1 { reference: String },

    #[error("{reference} is not a container image: {detail}")]
    NotAnImage { reference: String, detail: String },

    #[error("{reference} has no image for {wanted}; it has {}", list(.available))]
    NoMatchingPlatform { reference: String, wanted: String, available: Vec<String> },

    #[error("{path} cannot be used for registry logins: {detail}")]
    AuthFile { path: PathBuf, detail: String },

    #[error("credential helper docker-credential-{helper} failed for {registry}: {detail}")]
    CredentialHelper { helper: String, registry: String, detail: String },

    #[error("{path} cannot be used as a certificate or key: {detail}")]
    CertificateFile { path: PathBuf, detail: String },

    #[error("{path} cannot be used for mirrors: {detail}")]
    MirrorFile { path: PathBuf, detail: String },

    #[error("{reference} is blocked by {path}")]
    Blocked { reference: String, path: PathBuf },

    #[error("{error} (mirrors: {mirrors})")]
    AllPlaces {
        /// What the registry itself said, or the last place that was asked. Part of the message, so not its source.
        error: Box<PullError>,
        mirrors: String,
    },

    #[error("no space is left for {what}")]
    DiskFull {
        what: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    #[error("{what} cannot be stored")]
    Store {
        what: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    #[error("the HTTP client cannot be made: {detail}")]
    Setup { detail: String },
}

/// Docker's registry writes its files in place: who meets one of another client half written is told this.
const TORN: &str = "provided digest did not match uploaded content";

impl PullError {
    /// Whether the same pull may succeed later without anybody changing a manifest, a login or a certificate.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused { .. }
            | Self::Resolve { .. }
            | Self::Connection { .. }
            | Self::Stalled { .. }
            | Self::RateLimited { .. }
            | Self::WrongDigest { .. }
            | Self::WrongLength { .. }
            | Self::BlobNotFound { .. }
            | Self::DiskFull { .. } => true,
            Self::Server { status, detail, .. } => {
                *status >= 500 || matches!(status, 408 | 425) || *status == 400 && detail.contains(TORN)
            }
            Self::CredentialHelper { .. } | Self::Store { .. } => true,
            // A mirror may get well, or get the image.
            Self::AllPlaces { .. } => true,
            Self::Reference { .. }
            | Self::NotFound { .. }
            | Self::Unauthorized { .. }
            | Self::Denied { .. }
            | Self::UnknownCa { .. }
            | Self::Certificate { .. }
            | Self::NotTls { .. }
            | Self::Tls { .. }
            | Self::Redirect { .. }
            | Self::TooLarge { .. }
            | Self::Malformed { .. }
            | Self::BadLayer { .. }
            | Self::Schema1 { .. }
            | Self::NotAnImage { .. }
            | Self::NoMatchingPlatform { .. }
            | Self::AuthFile { .. }
            | Self::CertificateFile { .. }
            | Self::MirrorFile { .. }
            | Self::Blocked { .. }
            | Self::Setup { .. } => false,
        }
    }

    /// What a person can do, one sentence, or `None` where waiting is all there is to do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Reference { .. } => {
                "write it as [registry/]repository[:tag][@sha256:digest], in lower case".into()
            }
            Self::NotFound { reference, .. } => {
                format!("check the spelling of {reference}, and that the tag was pushed")
            }
            Self::BlobNotFound { .. } => {
                "the image was pushed incompletely or is being deleted: push it again".into()
            }
            Self::Unauthorized { registry, had_credentials: false, .. } => format!(
                "if the repository exists, log in: `docker login {registry}` or `podman login {registry}` writes a file that is read here"
            ),
            Self::Unauthorized { registry, .. } => {
                format!("renew the login for {registry}: the stored one is wrong or expired")
            }
            Self::Denied { registry, repository, .. } => {
                format!("give the account used for {registry} the right to pull {repository}")
            }
            Self::UnknownCa { registry } => format!(
                "put the authority's certificate into /etc/containers/certs.d/{registry}/ca.crt"
            ),
            Self::Certificate { registry, .. } => format!(
                "check the name and the dates of the certificate of {registry}, and the clock of this host"
            ),
            Self::NotTls { registry, .. } => {
                format!("if plain http is acceptable, list {registry} as an insecure registry")
            }
            Self::Refused { registry } => {
                format!("check that the registry runs and that {registry} is its address and port")
            }
            Self::Resolve { name, .. } => {
                format!("check the name {name} and the name servers in /etc/resolv.conf")
            }
            Self::Stalled { registry, .. } | Self::Connection { registry, .. } => {
                format!("check the network between this host and {registry}")
            }
            Self::RateLimited { registry, .. } => {
                format!("log in to {registry} or pull less often; accounts have higher limits")
            }
            Self::BadLayer { .. } => "build and push the image again".into(),
            Self::WrongDigest { .. } | Self::WrongLength { .. } => {
                "something between the registry and this host changes or cuts the data: a proxy, a broken mirror, a full disk of the registry".into()
            }
            Self::Schema1 { .. } => {
                "push it again in a current format, e.g. `skopeo copy --format oci docker://OLD docker://NEW`, or rebuild it".into()
            }
            Self::NotAnImage { .. } => "name an image that was built to be run".into(),
            Self::NoMatchingPlatform { wanted, .. } => {
                format!("build the image for {wanted} or pick another tag")
            }
            Self::AuthFile { path, .. } => format!("correct or remove {}", path.display()),
            Self::CredentialHelper { helper, .. } => {
                format!("run `docker-credential-{helper} get` by hand to see why, or install it")
            }
            Self::CertificateFile { path, .. } => {
                format!("correct or remove {}", path.display())
            }
            Self::MirrorFile { path, .. } => format!("correct or remove {}", path.display()),
            Self::Blocked { path, .. } => {
                format!("take `blocked` out of {} if it is meant to be used", path.display())
            }
            Self::AllPlaces { error, .. } => return error.hint(),
            Self::DiskFull { .. } => "remove images that are not needed: `keel image ls`, `keel image rm`".into(),
            Self::Tls { .. }
            | Self::Server { .. }
            | Self::Redirect { .. }
            | Self::TooLarge { .. }
            | Self::Malformed { .. }
            | Self::Store { .. }
            | Self::Setup { .. } => return None,
        })
    }

    /// Whether the registry itself says that it has no such image.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::NotFound { .. } => true,
            Self::AllPlaces { error, .. } => error.is_not_found(),
            _ => false,
        }
    }

    /// How often one pull tries again by itself before it reports the error.
    pub(crate) fn patience(&self) -> Patience {
        match self {
            // A second answer can differ at once: another backend, another connection.
            Self::Connection { .. } | Self::Stalled { .. } | Self::RateLimited { .. } => Patience::Full,
            Self::Server { .. } if self.is_retryable() => Patience::Full,
            // Usually final; a person waits for the message.
            Self::Refused { .. }
            | Self::Resolve { .. }
            | Self::WrongDigest { .. }
            | Self::WrongLength { .. }
            | Self::BadLayer { .. } => Patience::Short,
            Self::AllPlaces { error, .. } => error.patience(),
            _ => Patience::None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Patience {
    None,
    Short,
    Full,
}

fn seconds(duration: Duration) -> String {
    let s = duration.as_secs_f64();
    if s >= 1.0 { format!("{s:.0} s") } else { format!("{} ms", duration.as_millis()) }
}

/// Long lists are cut: a hostile index can name thousands of platforms.
const LISTED: usize = 12;

fn list(items: &[String]) -> String {
    match items.len() {
        0 => "none".to_owned(),
        n if n > LISTED => format!("{} and {} more", items[..LISTED].join(", "), n - LISTED),
        _ => items.join(", "),
    }
}

impl Patience {
    pub(crate) fn is_some(self) -> bool {
        self != Self::None
    }
}

/// The error of the registry itself, with what its mirrors said.
pub(crate) fn with_places<'a>(
    last: PullError,
    others: impl Iterator<Item = (&'a str, &'a PullError)>,
) -> PullError {
    let mirrors: Vec<String> = others.map(|(place, error)| format!("{place}: {error}")).collect();
    if mirrors.is_empty() {
        return last;
    }
    PullError::AllPlaces { error: Box::new(last), mirrors: mirrors.join("; ") }
}

impl PullError {
    /// Whether it is a reason to ask elsewhere first for a while: what is missing or forbidden in one place says
    /// nothing about its health.
    pub(crate) fn is_the_places_fault(&self) -> bool {
        !matches!(
            self,
            Self::NotFound { .. }
                | Self::BlobNotFound { .. }
                | Self::Unauthorized { .. }
                | Self::Denied { .. }
                | Self::NotAnImage { .. }
                | Self::Schema1 { .. }
        )
    }

    /// What was sent is not what the manifest says.
    pub(crate) fn is_the_data(&self) -> bool {
        matches!(self, Self::WrongDigest { .. } | Self::WrongLength { .. } | Self::BadLayer { .. })
    }

    /// Sorts an error of the store: wrong contents and a full disk have messages of their own.
    pub(crate) fn from_layer(what: &str, registry: &str, error: LayerError) -> Self {
        let (what, registry) = (what.to_owned(), registry.to_owned());
        match error {
            LayerError::Blob(BlobError::WrongDigest { digest, actual }) => {
                Self::WrongDigest { what, registry, expected: digest, actual: actual.to_string() }
            }
            LayerError::Blob(BlobError::TooShort { size, got, .. }) => {
                Self::WrongLength { what, registry, expected: size, actual: format!("{got} bytes") }
            }
            LayerError::Blob(BlobError::TooLong { size, .. }) => {
                Self::WrongLength { what, registry, expected: size, actual: "more bytes".to_owned() }
            }
            // The blob is what the manifest says, so the image itself contradicts itself: nothing to retry.
            LayerError::WrongDiffId { diff_id, actual } => Self::Malformed {
                what,
                registry,
                detail: format!("unpacked it is {actual}, and the config says {diff_id}"),
            },
            LayerError::Unpack { .. } if !keel_store::is_no_space(&error) && !is_local(&error) => {
                Self::BadLayer { what, registry, source: Box::new(error) }
            }
            other => Self::store(what, other),
        }
    }

    pub(crate) fn from_commit(what: &str, registry: &str, error: CommitError) -> Self {
        match error {
            CommitError::Fs(_) | CommitError::LayerMissing(_) => Self::store(what.to_owned(), error),
            refused => Self::Malformed {
                what: what.to_owned(),
                registry: registry.to_owned(),
                detail: with_causes(&refused),
            },
        }
    }

    pub(crate) fn store(what: String, error: impl std::error::Error + Send + Sync + 'static) -> Self {
        let full = keel_store::is_no_space(&error);
        let source = Box::new(error);
        if full { Self::DiskFull { what, source } } else { Self::Store { what, source } }
    }
}

/// The disk's fault, not the layer's.
fn is_local(error: &LayerError) -> bool {
    matches!(error, LayerError::Unpack { source: UnpackError::Fs(_) | UnpackError::Io { .. }, .. })
}

pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
