//! Whom to trust: system authorities, extra ones, and docker's `certs.d` directories.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::endpoint::Link;
use crate::error::PullError;
use crate::reference::{DOCKER_HUB, DOCKER_HUB_HOST};

/// Builds the TLS side of connections. Certificates are read when a client is made, not per request.
#[derive(Debug)]
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    certs_dirs: Vec<PathBuf>,
    extra_ca_files: Vec<PathBuf>,
    /// System and extra authorities; parsing some 150 certificates once is enough, until one is missing.
    base: Mutex<Option<RootCertStore>>,
}

/// What `certs.d/<host>/` holds.
#[derive(Debug, Default, PartialEq, Eq)]
struct HostFiles {
    authorities: Vec<PathBuf>,
    client: Option<(PathBuf, PathBuf)>,
}

impl Tls {
    pub(crate) fn new(certs_dirs: Vec<PathBuf>, extra_ca_files: Vec<PathBuf>) -> Self {
        Self {
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            certs_dirs,
            extra_ca_files,
            base: Mutex::new(None),
        }
    }

    /// Whether some `certs.d` directory has a word about this host (`name` or `name:port`).
    pub(crate) fn has_own_files(&self, host: &str) -> bool {
        self.certs_dirs.iter().any(|dir| names(host).any(|name| dir.join(name).is_dir()))
    }

    pub(crate) fn config(
        &self,
        host: Option<&str>,
        link: Option<&Link>,
        verify: bool,
    ) -> Result<ClientConfig, PullError> {
        let mut files = match host {
            Some(host) => self.host_files(host)?,
            None => HostFiles::default(),
        };
        if let Some(link) = link {
            files.authorities.extend(link.authorities.iter().cloned());
            files.client = link.client.clone().or(files.client);
        }
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| PullError::Setup { detail: e.to_string() })?;
        let trust = match verify {
            true => self.trust(&files)?,
            false => Trust::Anybody,
        };
        let verifier = Verifier { provider: self.provider.clone(), trust };
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        match &files.client {
            None => Ok(builder.with_no_client_auth()),
            Some((certificate, key)) => {
                let chain = read_certificates(certificate)?;
                let key_der = PrivateKeyDer::from_pem_file(key).map_err(|e| unusable(key, &e))?;
                builder.with_client_auth_cert(chain, key_der).map_err(|e| unusable(key, &e))
            }
        }
    }

    fn trust(&self, files: &HostFiles) -> Result<Trust, PullError> {
        let mut roots = self.base_roots()?;
        for path in &files.authorities {
            add_authorities(&mut roots, path)?;
        }
        let mut named = Vec::new();
        for path in self.extra_ca_files.iter().chain(&files.authorities) {
            named.extend(read_certificates(path)?);
        }
        let chain = WebPkiServerVerifier::builder_with_provider(roots.into(), self.provider.clone());
        let chain = chain.build().map_err(|e| PullError::Setup { detail: e.to_string() })?;
        Ok(Trust::ChainOrNamed { chain, named })
    }

    /// Reads all certificates anew for the next client: somebody may have added the one that was missing.
    pub(crate) fn forget(&self) {
        *self.lock() = None;
    }

    fn base_roots(&self) -> Result<RootCertStore, PullError> {
        let mut base = self.lock();
        if let Some(roots) = &*base {
            return Ok(roots.clone());
        }
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::debug!(%error, "a system certificate was skipped");
        }
        roots.add_parsable_certificates(system.certs);
        for path in &self.extra_ca_files {
            add_authorities(&mut roots, path)?;
        }
        Ok(base.insert(roots).clone())
    }

    fn lock(&self) -> MutexGuard<'_, Option<RootCertStore>> {
        // Whole or absent at every moment.
        self.base.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host_files(&self, host: &str) -> Result<HostFiles, PullError> {
        let mut found = HostFiles::default();
        let dirs = self.certs_dirs.iter().flat_map(|dir| names(host).map(|name| dir.join(name)));
        for dir in dirs {
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(unusable(&dir, &e)),
            };
            let mut paths = entries
                .map(|entry| entry.map(|e| e.path()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| unusable(&dir, &e))?;
            paths.sort();
            for path in paths {
                found.add(path)?;
            }
        }
        Ok(found)
    }
}

/// The directories of a host: its own, and for the host behind `docker.io` the one of that name.
fn names(host: &str) -> impl Iterator<Item = &str> {
    [host].into_iter().chain((host == DOCKER_HUB_HOST).then_some(DOCKER_HUB))
}

impl HostFiles {
    /// docker's rule: `*.crt` is an authority, `X.cert` with `X.key` is the client's certificate.
    fn add(&mut self, path: PathBuf) -> Result<(), PullError> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => self.authorities.push(path),
            Some("cert") if self.client.is_none() => {
                let key = path.with_extension("key");
                if !key.exists() {
                    return Err(PullError::CertificateFile {
                        detail: format!("its key {} is missing", key.display()),
                        path,
                    });
                }
                self.client = Some((path, key));
            }
            _ => {}
        }
        Ok(())
    }
}

fn add_authorities(roots: &mut RootCertStore, path: &Path) -> Result<(), PullError> {
    for certificate in read_certificates(path)? {
        roots.add(certificate).map_err(|e| unusable(path, &e))?;
    }
    Ok(())
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PullError> {
    let certificates = CertificateDer::pem_file_iter(path)
        .map_err(|e| unusable(path, &e))?
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| unusable(path, &e))?;
    if certificates.is_empty() {
        return Err(PullError::CertificateFile {
            path: path.to_owned(),
            detail: "it holds no PEM certificate".to_owned(),
        });
    }
    Ok(certificates)
}

fn unusable(path: &Path, error: &dyn std::error::Error) -> PullError {
    PullError::CertificateFile { path: path.to_owned(), detail: error.to_string() }
}

/// Whom a connection must prove to be with.
#[derive(Debug)]
enum Trust {
    /// Registries that are listed as insecure: encryption without knowing with whom.
    Anybody,
    /// A chain to an authority, or a certificate that is itself in a file which names whom to trust: the self-signed one
    /// that guides make with one `openssl req -x509` says that it is an authority, and as a server's own is refused for
    /// that.
    ChainOrNamed { chain: Arc<WebPkiServerVerifier>, named: Vec<CertificateDer<'static>> },
}

#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    trust: Trust,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Trust::ChainOrNamed { chain, named } = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // "An authority as a server's own"; its time has been looked at before, and has an error of its own.
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(_)))
                if named.iter().any(|named| named == end_entity) =>
            {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
