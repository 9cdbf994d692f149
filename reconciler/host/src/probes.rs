//! Probes, run from the host's side: HTTP and TCP inside the pod's network namespace, so that no tool is needed in
//! the image; commands through the runtime's `exec`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::{HeaderName, HeaderValue};
use hyper_util::rt::TokioIo;
use keel_engine::ports::{ProbeKind, ProbeOutcome, ProbeRequest};
use keel_manifest::model::{Container, HttpGetAction, IntOrString, Probe, UriScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};

use crate::execprobe;

/// More of a body is of no use to anybody who reads the message.
pub(crate) const MAX_BODY_BYTES: usize = 10 << 10;
/// Of a failing body or command, this much goes into the message.
const MAX_MESSAGE_BYTES: usize = 256;
/// The kubelet's limit too.
const MAX_REDIRECTS: usize = 10;
const USER_AGENT: &str = concat!("kube-probe/evenkeel-", env!("CARGO_PKG_VERSION"));

/// What a probe needs of the host.
pub(crate) struct Target {
    /// Pinned network namespace; `None` for pods on the host's network.
    pub(crate) netns: Option<PathBuf>,
    pub(crate) runtime: PathBuf,
    pub(crate) runtime_root: PathBuf,
    /// Of the container, for files that a call of the runtime needs.
    pub(crate) dir: PathBuf,
}

/// One try. Connection errors and time-outs are failures; errors are what says nothing about the container.
pub(crate) async fn run(target: &Target, request: &ProbeRequest) -> ProbeOutcome {
    if request.kind == ProbeKind::Startup && notifies(request) {
        return match target.dir.join(keel_proto::file::READY).exists() {
            true => ProbeOutcome::Success,
            false => ProbeOutcome::Failure("it has not said READY=1 yet".into()),
        };
    }
    let Some((container, probe)) = find(request) else {
        return ProbeOutcome::Error("the probe is no longer declared".into());
    };
    if let Some(exec) = &probe.exec {
        return execprobe::run(target, request, &exec.command).await;
    }
    let attempt = async {
        if let Some(http) = &probe.http_get {
            run_http(target, request, container, http).await
        } else if let Some(tcp) = &probe.tcp_socket {
            let address = match address(request, container, tcp.host.as_deref(), &tcp.port).await {
                Ok(address) => address,
                Err(message) => return ProbeOutcome::Failure(message),
            };
            match connect(target, address).await {
                Ok(_) => ProbeOutcome::Success,
                Err(e) => ProbeOutcome::Failure(not_connected(address, &e)),
            }
        } else {
            ProbeOutcome::Error("the probe has no handler".into())
        }
    };
    match tokio::time::timeout(request.timeout, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => ProbeOutcome::Failure(format!("no answer within {:?}", request.timeout)),
    }
}

fn notifies(request: &ProbeRequest) -> bool {
    let container = request.pod.spec.containers.get(request.container_index);
    container.is_some_and(|c| keel_manifest::extension::notifies(&request.pod.annotations, c))
}

fn find(request: &ProbeRequest) -> Option<(&Container, &Probe)> {
    let container = request.pod.spec.containers.get(request.container_index)?;
    let probe = match request.kind {
        ProbeKind::Startup => container.startup_probe.as_ref(),
        ProbeKind::Liveness => container.liveness_probe.as_ref(),
        ProbeKind::Readiness => container.readiness_probe.as_ref(),
    }?;
    Some((container, probe))
}

async fn run_http(
    target: &Target,
    request: &ProbeRequest,
    container: &Container,
    action: &HttpGetAction,
) -> ProbeOutcome {
    let address = match address(request, container, action.host.as_deref(), &action.port).await {
        Ok(address) => address,
        Err(message) => return ProbeOutcome::Failure(message),
    };
    let scheme = action.scheme.unwrap_or_default();
    let mut path = match action.path.as_deref() {
        None | Some("") => "/".to_string(),
        Some(path) if path.starts_with('/') => path.to_string(),
        Some(path) => format!("/{path}"),
    };
    for _ in 0..=MAX_REDIRECTS {
        let answer = match get(target, address, scheme, &path, action).await {
            Ok(answer) => answer,
            Err(message) => return ProbeOutcome::Failure(message),
        };
        let url = format!("{}://{address}{path}", if scheme == UriScheme::Https { "https" } else { "http" });
        match (answer.status, answer.location) {
            (300..=399, Some(location)) => match same_host(&location, address) {
                // Another host is not ours to judge by: the kubelet counts it as success too.
                None => return ProbeOutcome::Success,
                Some(next) => path = next,
            },
            (200..=399, _) => return ProbeOutcome::Success,
            (status, _) => {
                return ProbeOutcome::Failure(format!(
                    "GET {url}: status {status}: {}",
                    shorten(&answer.body)
                ));
            }
        }
    }
    ProbeOutcome::Failure(format!("more than {MAX_REDIRECTS} redirects"))
}

struct Answer {
    status: u16,
    location: Option<String>,
    body: Vec<u8>,
}

fn not_connected(address: SocketAddr, error: &io::Error) -> String {
    let reason = error.raw_os_error().map_or_else(|| error.to_string(), keel_sys::errno_text);
    format!("connect to {address}: {reason}")
}

async fn get(
    target: &Target,
    address: SocketAddr,
    scheme: UriScheme,
    path: &str,
    action: &HttpGetAction,
) -> Result<Answer, String> {
    let stream = connect(target, address).await.map_err(|e| not_connected(address, &e))?;
    match scheme {
        UriScheme::Http => exchange(stream, address, path, action).await,
        UriScheme::Https => {
            let name = rustls::pki_types::ServerName::IpAddress(address.ip().into());
            let stream = tls_without_verification()
                .connect(name, stream)
                .await
                .map_err(|e| format!("TLS with {address}: {e}"))?;
            exchange(stream, address, path, action).await
        }
    }
}

async fn exchange<S>(
    stream: S,
    address: SocketAddr,
    path: &str,
    action: &HttpGetAction,
) -> Result<Answer, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| format!("HTTP with {address}: {e}"))?;
    let driver = tokio::spawn(connection);
    let mut request = hyper::Request::get(path)
        .header(hyper::header::HOST, address.to_string())
        .header(hyper::header::USER_AGENT, USER_AGENT)
        .header(hyper::header::ACCEPT, "*/*")
        .header(hyper::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| format!("request for {path}: {e}"))?;
    for header in &action.http_headers {
        let name = HeaderName::from_bytes(header.name.as_bytes())
            .map_err(|e| format!("header {}: {e}", header.name))?;
        let value =
            HeaderValue::from_str(&header.value).map_err(|e| format!("header {}: {e}", header.name))?;
        request.headers_mut().insert(name, value);
    }
    let response =
        sender.send_request(request).await.map_err(|e| format!("GET {path} from {address}: {e}"))?;
    let status = response.status().as_u16();
    let location =
        response.headers().get(hyper::header::LOCATION).and_then(|v| v.to_str().ok()).map(str::to_string);
    // An endless body must not keep the probe: what is over the limit is not read, and the status has been seen.
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await;
    driver.abort();
    Ok(Answer { status, location, body: body.map(|b| b.to_bytes().to_vec()).unwrap_or_default() })
}

/// Path and query of a redirect to the same host; `None` for another one.
fn same_host(location: &str, address: SocketAddr) -> Option<String> {
    let uri: hyper::Uri = location.parse().ok()?;
    let here = address.ip().to_string();
    match uri.host() {
        Some(host) if host.trim_matches(['[', ']']) != here => None,
        _ => Some(uri.path_and_query().map_or_else(|| "/".to_string(), |p| p.to_string())),
    }
}

/// The connection belongs to the namespace that its socket was made in, so only that one step has to be there.
async fn connect(target: &Target, address: SocketAddr) -> io::Result<TcpStream> {
    let make = move || if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = match &target.netns {
        None => make()?,
        Some(netns) => {
            let netns = netns.clone();
            let make_std = move || -> io::Result<std::net::TcpStream> {
                keel_net::in_netns(&netns, move || new_socket(address))?
            };
            let stream = tokio::task::spawn_blocking(make_std).await.map_err(io::Error::other)??;
            TcpSocket::from_std_stream(stream)
        }
    };
    socket.connect(address).await
}

fn new_socket(address: SocketAddr) -> io::Result<std::net::TcpStream> {
    let domain = if address.is_ipv4() { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

async fn address(
    request: &ProbeRequest,
    container: &Container,
    host: Option<&str>,
    port: &IntOrString,
) -> Result<SocketAddr, String> {
    let port = port_number(container, port)?;
    let ip = match host {
        Some(host) => match host.parse::<IpAddr>() {
            Ok(ip) => ip,
            Err(_) => tokio::net::lookup_host((host, port))
                .await
                .map_err(|e| format!("look up {host}: {e}"))?
                .next()
                .map(|found| found.ip())
                .ok_or_else(|| format!("{host} has no address"))?,
        },
        None => IpAddr::V4(request.ip.unwrap_or(Ipv4Addr::LOCALHOST)),
    };
    Ok(SocketAddr::new(ip, port))
}

fn port_number(container: &Container, port: &IntOrString) -> Result<u16, String> {
    match port {
        IntOrString::Int(number) => {
            u16::try_from(*number).map_err(|_| format!("port {number} is out of range"))
        }
        IntOrString::String(name) => container
            .ports
            .iter()
            .find(|p| p.name.as_deref() == Some(name))
            .map(|p| p.container_port)
            .or_else(|| name.parse().ok())
            .ok_or_else(|| format!("container {} has no port named {name}", container.name)),
    }
}

pub(crate) fn shorten(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_MESSAGE_BYTES)]);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Probes ask "does it answer", not "is it who it says": Kubernetes does not verify either.
fn tls_without_verification() -> tokio_rustls::TlsConnector {
    static CONFIG: std::sync::OnceLock<Arc<rustls::ClientConfig>> = std::sync::OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("the ring provider supports the default versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAny(provider)))
            .with_no_client_auth();
        Arc::new(config)
    });
    config.clone().into()
}

#[derive(Debug)]
struct AcceptAny(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The whole of a probe may take no longer than this, whatever the manifest says.
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_followed_on_the_same_host_only() {
        let address: SocketAddr = "10.1.2.3:80".parse().unwrap();
        assert_eq!(same_host("/ready?x=1", address).as_deref(), Some("/ready?x=1"));
        assert_eq!(same_host("http://10.1.2.3/a", address).as_deref(), Some("/a"));
        assert_eq!(same_host("https://example.org/a", address), None);
    }

    #[test]
    fn a_port_may_be_named() {
        let container = Container {
            name: "c".into(),
            ports: vec![keel_manifest::model::ContainerPort {
                name: Some("web".into()),
                container_port: 8080,
                ..Default::default()
            }],
            ..Container::default()
        };
        assert_eq!(port_number(&container, &IntOrString::String("web".into())), Ok(8080));
        assert!(port_number(&container, &IntOrString::String("nope".into())).is_err());
        assert!(port_number(&container, &IntOrString::Int(70000)).is_err());
    }
}
