//! Requests in, calls of [`Control`] out.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue, ORIGIN};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::control::Control;
use crate::socket::{self, Listener};
use crate::types::{ControlError, ControlEvent, ErrorCode, Event, VersionInfo};

/// Open connections at once. One more waits in the listener's backlog: a busy loop of clients cannot exhaust the
/// daemon's descriptors.
const MAX_CONNECTIONS: usize = 128;
/// Largest request body. A directory of 5,000 manifests is some 5 MB of JSON.
const MAX_BODY_BYTES: usize = 64 << 20;
/// Reports that a slow client may be behind before the operation's reporting waits for it.
const EVENT_QUEUE: usize = 256;
/// Pause after a failed accept (descriptor limit reached): no busy loop until connections close.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long open answers may run on after the shutdown has begun.
const DRAIN: Duration = Duration::from_secs(2);

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Answer = Result<Response<Body>, ControlError>;

/// Serves until `shutdown` resolves, then lets running answers end for a moment. Accept errors are retried.
pub async fn serve<C: Control>(
    listeners: Vec<Listener>,
    control: Arc<C>,
    about: VersionInfo,
    shutdown: impl Future<Output = ()>,
) {
    let state = Arc::new(Server { control, about, connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)) });
    let mut acceptors = JoinSet::new();
    for listener in listeners {
        acceptors.spawn(Arc::clone(&state).accept_loop(listener));
    }
    shutdown.await;
    acceptors.abort_all();
    while acceptors.join_next().await.is_some() {}
    // Every permit back means that every connection is closed.
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(DRAIN, state.connections.acquire_many(all)).await;
}

struct Server<C> {
    control: Arc<C>,
    about: VersionInfo,
    connections: Arc<Semaphore>,
}

/// Who asks, and how far that is trusted.
#[derive(Clone, Copy)]
enum Peer {
    Unix { uid: Option<u32> },
    Tcp { uid: Option<u32> },
}

impl<C: Control> Server<C> {
    async fn accept_loop(self: Arc<Self>, listener: Listener) {
        loop {
            let Ok(permit) = Arc::clone(&self.connections).acquire_owned().await else {
                return;
            };
            let accepted = match &listener {
                Listener::Unix(unix) => unix.accept().await.map(|(stream, _)| {
                    let uid = stream.peer_cred().ok().map(|cred| cred.uid());
                    self.clone().spawn(stream, Peer::Unix { uid }, permit);
                }),
                Listener::Tcp(tcp) => tcp.accept().await.map(|(stream, peer)| {
                    let uid = tcp_uid(&stream, peer);
                    self.clone().spawn(stream, Peer::Tcp { uid }, permit);
                }),
            };
            if let Err(error) = accepted {
                tracing::warn!(%error, "control socket: accept");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }

    /// The connection's task is owned by its permit: [`serve`] waits until all permits are back.
    fn spawn<S>(self: Arc<Self>, stream: S, peer: Peer, permit: tokio::sync::OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let server = Arc::clone(&self);
                async move { Ok::<_, Infallible>(server.answer(request, peer).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .half_close(false)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = pin!(connection).await {
                tracing::debug!(%error, "control connection ended early");
            }
            drop(permit);
        });
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>, peer: Peer) -> Response<Body> {
        match self.route(request, peer).await {
            Ok(response) => response,
            Err(error) => refuse(&error),
        }
    }

    /// The one table of what can be asked. Other APIs on this socket get a prefix of their own here.
    async fn route(self: Arc<Self>, request: Request<Incoming>, peer: Peer) -> Answer {
        admit(peer, request.headers())?;
        let path = request.uri().path().to_owned();
        let Some(native) = path.strip_prefix("/keel/v1/") else {
            return Err(unknown(&path));
        };
        match (request.method(), native) {
            (&Method::POST, "apply") => self.apply(request).await,
            (&Method::POST, "delete") => self.delete(request).await,
            (&Method::POST, "restart") => self.restart(request).await,
            (&Method::POST, "images") => self.images(request).await,
            (&Method::POST, "reconcile") => self.reconcile(&request).await,
            (&Method::GET, "status") => self.status(&request).await,
            (&Method::GET, "events") => self.events(&request).await,
            (&Method::GET, "version") => json(&self.about),
            (&Method::GET, "livez") => text(StatusCode::OK, "ok\n"),
            (&Method::GET, "readyz") => match self.control.ready() {
                Ok(()) => text(StatusCode::OK, "ok\n"),
                Err(missing) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n")),
            },
            _ => Err(unknown(&path)),
        }
    }

    async fn apply(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let body = read_json(request).await?;
        let control = Arc::clone(&self.control);
        operation(|events| async move { control.apply(body, events).await }).await
    }

    async fn delete(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let body = read_json(request).await?;
        let control = Arc::clone(&self.control);
        operation(|events| async move { control.delete(body, events).await }).await
    }

    async fn restart(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let body = read_json(request).await?;
        let control = Arc::clone(&self.control);
        operation(|events| async move { control.restart(body, events).await }).await
    }

    async fn images(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let body = read_json(request).await?;
        let control = Arc::clone(&self.control);
        operation(|events| async move { control.images(body, events).await }).await
    }

    async fn reconcile(self: Arc<Self>, request: &Request<Incoming>) -> Answer {
        self.control.reconcile(flag(request, "accept-removals")).await?;
        json(&serde_json::json!({}))
    }

    async fn status(self: Arc<Self>, request: &Request<Incoming>) -> Answer {
        if !flag(request, "watch") {
            return json(&self.control.status(None).await?);
        }
        let control = Arc::clone(&self.control);
        Ok(lines(stream::unfold(None, move |shown| {
            let control = Arc::clone(&control);
            async move {
                let snapshot = control.status(shown).await.ok()?;
                Some((line(&snapshot), Some(snapshot.revision)))
            }
        })))
    }

    async fn events(self: Arc<Self>, request: &Request<Incoming>) -> Answer {
        let after = match query(request, "after") {
            None => 0,
            Some(text) => {
                text.parse().map_err(|_| invalid(format!("after={text}: not a sequence number")))?
            }
        };
        let watch = flag(request, "watch");
        let first = self.control.events_since(after, false).await?;
        let cursor = Cursor { after, batch: first };
        let control = Arc::clone(&self.control);
        Ok(lines(stream::unfold(Some(cursor), move |cursor| {
            let control = Arc::clone(&control);
            async move { cursor?.advance(&*control, watch).await }
        })))
    }
}

/// Where an event stream is: `batch` is not sent yet.
struct Cursor {
    after: u64,
    batch: Vec<Event>,
}

impl Cursor {
    /// Sends what is at hand, or waits for more.
    async fn advance(mut self, control: &impl Control, watch: bool) -> Option<(Bytes, Option<Cursor>)> {
        if self.batch.is_empty() {
            if !watch {
                return None;
            }
            self.batch = control.events_since(self.after, true).await.ok()?;
        }
        let mut text = Vec::new();
        for event in self.batch.drain(..) {
            self.after = self.after.max(event.seq);
            text.extend_from_slice(&line(&event));
        }
        Some((Bytes::from(text), Some(self)))
    }
}

/// Runs an operation on a task of its own, so that a client that goes away does not cut it short. Answers with an error
/// when the operation is refused before its first report, otherwise with the stream of its reports.
async fn operation<F, Run>(run: F) -> Answer
where
    F: FnOnce(mpsc::Sender<ControlEvent>) -> Run,
    Run: Future<Output = Result<(), ControlError>> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel(EVENT_QUEUE);
    let task = tokio::spawn(run(sender));
    let Some(first) = receiver.recv().await else {
        return Err(match task.await {
            Ok(Err(refused)) => refused,
            Ok(Ok(())) => internal("the operation ended without a result"),
            Err(_) => internal("the operation was aborted"),
        });
    };
    let rest = stream::unfold((Some(first), receiver, Some(task)), next_report);
    Ok(lines(rest))
}

type Reports = (
    Option<ControlEvent>,
    mpsc::Receiver<ControlEvent>,
    Option<tokio::task::JoinHandle<Result<(), ControlError>>>,
);

/// The next line of an operation's stream. A failure after the first report becomes the closing result.
async fn next_report((ready, mut receiver, task): Reports) -> Option<(Bytes, Reports)> {
    let event = match ready {
        Some(event) => Some(event),
        None => receiver.recv().await,
    };
    if let Some(event) = event {
        return Some((line(&event), (None, receiver, task)));
    }
    let error = match task?.await {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error,
        Err(_) => internal("the operation was aborted"),
    };
    let closing =
        ControlEvent::Result { exit_code: error.exit_code(), message: error.message, hints: error.hints };
    Some((line(&closing), (None, receiver, None)))
}

/// Root and our own user, by the kernel's word. On TCP also no web page: a browser sends `Origin` with what a page
/// posts, and a name of somebody else's when DNS was rebound to loopback.
fn admit(peer: Peer, headers: &HeaderMap) -> Result<(), ControlError> {
    let uid = match peer {
        Peer::Unix { uid } => uid,
        Peer::Tcp { uid } => {
            let host = headers.get(HOST).and_then(|host| host.to_str().ok());
            if headers.contains_key(ORIGIN) || !host.is_some_and(is_loopback_host) {
                return Err(denied("requests from web pages are refused"));
            }
            uid
        }
    };
    match uid {
        Some(uid) if socket::may_control(uid) => Ok(()),
        Some(uid) => Err(denied(format!("user {uid} may not control containers"))
            .hint("run the command as root or as the daemon's user")),
        None => Err(denied("cannot tell which user asks")),
    }
}

fn is_loopback_host(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name.eq_ignore_ascii_case("localhost")
        || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn tcp_uid(stream: &tokio::net::TcpStream, peer: SocketAddr) -> Option<u32> {
    socket::tcp_peer_uid(peer, stream.local_addr().ok()?)
}

async fn read_json<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, ControlError> {
    let body = Limited::new(request.into_body(), MAX_BODY_BYTES)
        .collect()
        .await
        .map_err(|error| invalid(format!("request body (at most {MAX_BODY_BYTES} bytes): {error}")))?
        .to_bytes();
    serde_json::from_slice(&body).map_err(|error| invalid(format!("request body: {error}")))
}

fn query<'a>(request: &'a Request<Incoming>, name: &str) -> Option<&'a str> {
    request
        .uri()
        .query()?
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find_map(|(key, value)| (key == name).then_some(value))
}

fn flag(request: &Request<Incoming>, name: &str) -> bool {
    query(request, name).is_some_and(|value| matches!(value, "" | "1" | "true"))
}

fn json(value: &impl Serialize) -> Answer {
    let mut bytes = serde_json::to_vec(value).map_err(|e| internal(format!("encode answer: {e}")))?;
    bytes.push(b'\n');
    Ok(whole(StatusCode::OK, "application/json", bytes))
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    Ok(whole(status, "text/plain; charset=utf-8", body))
}

fn whole(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    with_type(status, kind, Full::new(body.into()).boxed_unsync())
}

/// A streamed answer: one JSON object a line.
fn lines(chunks: impl futures_util::Stream<Item = Bytes> + Send + 'static) -> Response<Body> {
    use futures_util::StreamExt;
    let frames = chunks.map(|chunk| Ok::<_, Infallible>(Frame::data(chunk)));
    with_type(StatusCode::OK, "application/x-ndjson", BodyExt::boxed_unsync(StreamBody::new(frames)))
}

fn with_type(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// One line of a stream. Our own types always encode; a failure would be a bug of theirs, shown to the reader.
fn line(value: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec(value)
        .unwrap_or_else(|e| format!("{{\"type\":\"note\",\"message\":\"{e}\"}}").into_bytes());
    text.push(b'\n');
    Bytes::from(text)
}

fn refuse(error: &ControlError) -> Response<Body> {
    let status = match error.code {
        ErrorCode::Invalid => StatusCode::BAD_REQUEST,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::Conflict => StatusCode::CONFLICT,
        ErrorCode::Denied => StatusCode::FORBIDDEN,
        ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    };
    whole(status, "application/json", line(error))
}

fn unknown(path: &str) -> ControlError {
    ControlError::new(ErrorCode::NotFound, format!("no such endpoint: {path}"))
        .hint("the daemon may be older than the command: compare `keel version`")
}

fn denied(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorCode::Denied, message)
}

fn invalid(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorCode::Invalid, message)
}

fn internal(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorCode::Internal, message)
}
