//! The typed client of the control API.

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::socket;
use crate::types::{
    ApplyRequest, ControlError, ControlEvent, DeleteRequest, ErrorCode, Event, ImageRequest, RestartRequest,
    Snapshot, VersionInfo,
};

/// Largest answer that is read whole, and longest line of a stream: a status of 10,000 pods is some 20 MB.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Talks to the daemon behind one socket. Each request has its own connection.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: no socket, or one that a dead daemon left.
    #[error("no daemon listens on {}", socket.display())]
    NoDaemon { socket: PathBuf },
    #[error("connect to {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("talk to the daemon")]
    Http { source: hyper::Error },
    #[error("the daemon has gone away in the middle of its answer")]
    Gone { source: hyper::Error },
    #[error("encode the request")]
    Encode { source: serde_json::Error },
    #[error("the daemon's answer is longer than {MAX_ANSWER_BYTES} bytes")]
    TooLong,
    #[error("the daemon's answer does not parse")]
    Decode { source: serde_json::Error },
    /// The daemon said no.
    #[error(transparent)]
    Refused(#[from] ControlError),
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into() }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether a daemon listens. Cheap and without a runtime: one connect.
    pub fn probe(&self) -> Result<(), ClientError> {
        self.connect_blocking().map(drop)
    }

    pub async fn apply(&self, request: &ApplyRequest) -> Result<Lines<ControlEvent>, ClientError> {
        self.stream(Method::POST, "apply", Some(request)).await
    }

    pub async fn delete(&self, request: &DeleteRequest) -> Result<Lines<ControlEvent>, ClientError> {
        self.stream(Method::POST, "delete", Some(request)).await
    }

    pub async fn restart(&self, request: &RestartRequest) -> Result<Lines<ControlEvent>, ClientError> {
        self.stream(Method::POST, "restart", Some(request)).await
    }

    pub async fn images(&self, request: &ImageRequest) -> Result<Lines<ControlEvent>, ClientError> {
        self.stream(Method::POST, "images", Some(request)).await
    }

    pub async fn status(&self) -> Result<Snapshot, ClientError> {
        self.whole(Method::GET, "status").await
    }

    /// The status now and after each change.
    pub async fn watch_status(&self) -> Result<Lines<Snapshot>, ClientError> {
        self.stream(Method::GET, "status?watch=1", None::<&()>).await
    }

    /// Events with a sequence number above `after`; with `watch` the stream goes on.
    pub async fn events(&self, after: u64, watch: bool) -> Result<Lines<Event>, ClientError> {
        let path = format!("events?after={after}&watch={}", u8::from(watch));
        self.stream(Method::GET, &path, None::<&()>).await
    }

    pub async fn reconcile(&self, accept_removals: bool) -> Result<(), ClientError> {
        let path = format!("reconcile?accept-removals={}", u8::from(accept_removals));
        let _: serde_json::Value = self.whole(Method::POST, &path).await?;
        Ok(())
    }

    pub async fn version(&self) -> Result<VersionInfo, ClientError> {
        self.whole(Method::GET, "version").await
    }

    async fn whole<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ClientError> {
        let response = self.send(method, path, None::<&()>).await?;
        decode(&read_all(response.into_body()).await?)
    }

    async fn stream<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Lines<T>, ClientError> {
        let response = self.send(method, path, body).await?;
        Ok(Lines { body: response.into_body(), buffer: BytesMut::new(), item: PhantomData })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = request(method, path, body)?;
        let stream = self.connect_blocking()?;
        let (mut sender, connection) = async {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        }
        .await
        .map(|stream| http1::handshake(TokioIo::new(stream)))
        .map_err(|source| ClientError::Connect { socket: self.socket.clone(), source })?
        .await
        .map_err(http)?;
        // Ends when the request's body and the sender are gone; the answer is read through it.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(http)?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        Err(refusal(response).await)
    }

    fn connect_blocking(&self) -> Result<std::os::unix::net::UnixStream, ClientError> {
        socket::connect(&self.socket).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoDaemon { socket: self.socket.clone() }
            }
            _ => ClientError::Connect { socket: self.socket.clone(), source },
        })
    }
}

/// A streamed answer, one value a line.
#[derive(Debug)]
pub struct Lines<T> {
    body: Incoming,
    buffer: BytesMut,
    item: PhantomData<T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// `None` at the end of the stream. Cancel-safe: what was read stays in the buffer.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return decode(&line[..end]).map(Some);
            }
            if self.buffer.len() > MAX_ANSWER_BYTES {
                return Err(ClientError::TooLong);
            }
            match self.body.frame().await {
                None if self.buffer.has_remaining() => {
                    let rest = self.buffer.split();
                    return decode(&rest).map(Some);
                }
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.map_err(|source| ClientError::Gone { source })?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

fn request(
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<Request<Full<Bytes>>, ClientError> {
    let bytes = match body {
        Some(body) => serde_json::to_vec(body).map_err(|source| ClientError::Encode { source })?,
        None => Vec::new(),
    };
    Ok(Request::builder()
        .method(method)
        .uri(format!("/keel/v1/{path}"))
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(bytes)))
        .expect("method, path and headers are our own constants and numbers"))
}

async fn refusal(response: Response<Incoming>) -> ClientError {
    let status = response.status();
    let said = match read_all(response.into_body()).await {
        Ok(body) => body,
        Err(error) => return error,
    };
    serde_json::from_slice(&said).map_or_else(
        |_| {
            ClientError::Refused(ControlError::new(
                ErrorCode::Internal,
                format!("the daemon answered {status}"),
            ))
        },
        ClientError::Refused,
    )
}

async fn read_all(body: Incoming) -> Result<Bytes, ClientError> {
    match Limited::new(body, MAX_ANSWER_BYTES).collect().await {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) => Err(match error.downcast::<hyper::Error>() {
            Ok(source) => ClientError::Http { source: *source },
            Err(_) => ClientError::TooLong,
        }),
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(bytes).map_err(|source| ClientError::Decode { source })
}

fn http(source: hyper::Error) -> ClientError {
    ClientError::Http { source }
}
