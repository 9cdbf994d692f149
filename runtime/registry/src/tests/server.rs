//! A small registry that does as it is told, good or bad. HTTP/1.1, one request per connection.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use keel_store::Digest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::fixture::Content;

#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path and query.
    pub(super) target: String,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: String,
    pub(super) body_len: usize,
    /// How many requests with this method and target came before.
    pub(super) before: usize,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(super) fn is_blob(&self, digest: &Digest) -> bool {
        self.target.ends_with(&format!("/blobs/{digest}"))
    }

    pub(super) fn has_basic(&self, login: &str) -> bool {
        let expected = base64::engine::general_purpose::STANDARD.encode(login);
        self.header("authorization") == Some(&format!("Basic {expected}"))
    }
}

#[derive(Clone, Debug)]
pub(super) enum Body {
    /// Sent whole, with its length.
    Whole(Vec<u8>),
    /// The announced length is a lie; the connection closes after the bytes.
    Announced(u64, Vec<u8>),
    /// Chunked: no length is announced.
    Chunked(Vec<u8>),
    /// The bytes with the announced length, then silence until the client goes away.
    Stall(u64, Vec<u8>),
    /// One byte each 20 ms, for ever.
    Drip(u64),
    /// Chunked, without end.
    Endless,
    /// The bytes with the announced length, then a reset.
    Reset(u64, Vec<u8>),
    /// A reset instead of an answer.
    HangUp,
}

#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Body,
}

impl Reply {
    pub(super) fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Body::Whole(Vec::new()) }
    }

    pub(super) fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub(super) fn body(mut self, body: Body) -> Self {
        self.body = body;
        self
    }

    pub(super) fn text(self, text: impl Into<String>) -> Self {
        self.body(Body::Whole(text.into().into_bytes()))
    }
}

/// What the server does differently; `None` is the honest answer.
pub(super) type Script = dyn Fn(&Request) -> Option<Reply> + Send + Sync;

pub(super) struct Server {
    pub(super) address: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    sent: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(super) async fn start(
        content: Content,
        script: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sent = Arc::new(AtomicU64::new(0));
        let shared = Arc::new((content, Box::new(script) as Box<Script>));
        let task = tokio::spawn({
            let (seen, sent) = (seen.clone(), sent.clone());
            async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, shared.clone(), seen.clone(), sent.clone()));
                }
            }
        });
        Self { address, seen, sent, task }
    }

    /// The honest registry.
    pub(super) async fn honest(content: Content) -> Self {
        Self::start(content, |_| None).await
    }

    pub(super) fn reference(&self, tag: &str) -> String {
        format!("{}/keel/x:{tag}", self.address)
    }

    pub(super) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    pub(super) fn seen_of(&self, part: &str) -> Vec<Request> {
        self.seen().into_iter().filter(|r| r.target.contains(part)).collect()
    }

    /// Body bytes that the kernel took, over all connections.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }
}

async fn serve(
    mut stream: TcpStream,
    shared: Arc<(Content, Box<Script>)>,
    seen: Arc<Mutex<Vec<Request>>>,
    sent: Arc<AtomicU64>,
) {
    let Some(mut request) = read_request(&mut stream).await else { return };
    {
        let mut seen = seen.lock().unwrap();
        request.before =
            seen.iter().filter(|r| r.method == request.method && r.target == request.target).count();
        seen.push(request.clone());
    }
    let (content, script) = &*shared;
    let reply = script(&request).unwrap_or_else(|| honest(content, &request));
    // The client may have gone; that is for its own test to notice.
    let _ = write_reply(&mut stream, &request, reply, &sent).await;
}

async fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // A TLS hello is answered like any server that expects HTTP does.
        if head.first() == Some(&0x16) {
            let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n").await;
            let _ = stream.shutdown().await;
            return None;
        }
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let mut request =
        Request { method: first.next()?.to_owned(), target: first.next()?.to_owned(), ..Request::default() };
    for line in lines {
        if let Some((name, value)) = line.split_once(':') {
            request.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let length = request.header("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    request.body_len = length;
    request.body = String::from_utf8_lossy(&body).into_owned();
    Some(request)
}

pub(super) fn honest(content: &Content, request: &Request) -> Reply {
    let path = request.target.split('?').next().unwrap_or("");
    if let Some((_, selector)) = path.split_once("/manifests/") {
        let digest = selector.parse().ok().or_else(|| content.tags.get(selector).copied());
        if let Some((digest, (media_type, body))) = digest.and_then(|d| Some((d, content.manifests.get(&d)?)))
        {
            return Reply::new(200)
                .with("Content-Type", media_type)
                .with("Docker-Content-Digest", digest)
                .body(Body::Whole(body.clone()));
        }
    }
    if let Some((_, digest)) = path.split_once("/blobs/")
        && let Some(body) = digest.parse().ok().and_then(|d: Digest| content.blobs.get(&d))
    {
        let from: Option<usize> =
            request.header("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        return match from {
            Some(from) => Reply::new(206)
                .with("Content-Range", format!("bytes {from}-{}/{}", body.len() - 1, body.len()))
                .body(Body::Whole(body[from..].to_vec())),
            None => Reply::new(200).body(Body::Whole(body.clone())),
        };
    }
    Reply::new(404).text(r#"{"errors":[{"code":"UNKNOWN","message":"there is no such thing"}]}"#)
}

async fn write_reply(
    stream: &mut TcpStream,
    request: &Request,
    reply: Reply,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let length = match &reply.body {
        Body::Whole(bytes) => Some(bytes.len() as u64),
        Body::Announced(length, _) | Body::Stall(length, _) | Body::Drip(length) | Body::Reset(length, _) => {
            Some(*length)
        }
        Body::Chunked(_) | Body::Endless => None,
        Body::HangUp => return stream.set_zero_linger(),
    };
    match length {
        Some(length) => head.push_str(&format!("Content-Length: {length}\r\n\r\n")),
        None => head.push_str("Transfer-Encoding: chunked\r\n\r\n"),
    }
    stream.write_all(head.as_bytes()).await?;
    if request.method == "HEAD" {
        return Ok(());
    }
    match reply.body {
        Body::Whole(bytes) | Body::Announced(_, bytes) => write(stream, &bytes, sent).await?,
        Body::Chunked(bytes) => {
            for piece in bytes.chunks(16 << 10) {
                write_chunk(stream, piece, sent).await?;
            }
            stream.write_all(b"0\r\n\r\n").await?;
        }
        Body::Stall(_, bytes) => {
            write(stream, &bytes, sent).await?;
            // Returns when the client closes.
            let _ = stream.read_u8().await;
        }
        Body::Reset(_, bytes) => {
            write(stream, &bytes, sent).await?;
            // The bytes are read first: a reset takes what waits with it.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            return stream.set_zero_linger();
        }
        Body::HangUp => {}
        Body::Drip(length) => {
            for _ in 0..length {
                write(stream, b"x", sent).await?;
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
        Body::Endless => {
            let piece = vec![b' '; 64 << 10];
            loop {
                write_chunk(stream, &piece, sent).await?;
            }
        }
    }
    stream.shutdown().await
}

async fn write_chunk(stream: &mut TcpStream, piece: &[u8], sent: &AtomicU64) -> std::io::Result<()> {
    stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
    write(stream, piece, sent).await?;
    stream.write_all(b"\r\n").await
}

async fn write(stream: &mut TcpStream, bytes: &[u8], sent: &AtomicU64) -> std::io::Result<()> {
    for piece in bytes.chunks(64 << 10) {
        stream.write_all(piece).await?;
        sent.fetch_add(piece.len() as u64, Ordering::SeqCst);
    }
    Ok(())
}
