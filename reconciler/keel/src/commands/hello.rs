//! The web server inside the demo image. Blocking, one thread per connection, nothing but the standard library: it is
//! here because the demo image is made of this program.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::cli::Hello;
use crate::failure::{Failure, Outcome};

const DEFAULT_PORT: u16 = 8080;
/// Connections at once; more are closed unanswered. A demo must not be what eats the host's memory.
const MAX_CONNECTIONS: usize = 64;
/// A request line and its headers.
const MAX_REQUEST_BYTES: u64 = 8 << 10;
/// Silence after which a connection is closed.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn hello(args: &Hello) -> Outcome {
    if let Some(text) = &args.once {
        return Ok(writeln!(io::stdout(), "{text}")?);
    }
    end_on_signals()?;
    let port = match std::env::var("PORT") {
        Ok(text) => text.parse().map_err(|_| Failure::invalid(format!("PORT={text}: not a port number")))?,
        Err(_) => DEFAULT_PORT,
    };
    let listener = match handed_over() {
        Some(listener) => listener,
        None => listen(port)?,
    };
    let port = listener.local_addr().map_or(port, |address| address.port());
    let _ = writeln!(io::stderr(), "hello: listening on port {port}");
    // Whoever wants to know has named a socket; a demo works without.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    serve(&listener, args.file.as_deref())
}

/// Blocked signals reach also the first process of a pid namespace, whose default actions the kernel leaves out.
/// Before any thread starts, so that all inherit the mask.
fn end_on_signals() -> Outcome {
    let signals = keel_sys::process::block_signals().map_err(|e| Failure::io("watch", "signals", &e))?;
    thread::spawn(move || {
        const INTERRUPT: i32 = 2;
        const TERMINATE: i32 = 15;
        while let Ok(signal) = keel_sys::process::read_signal(&signals) {
            if signal == TERMINATE || signal == INTERRUPT {
                std::process::exit(0);
            }
        }
    });
    Ok(())
}

/// The first socket of a socket activation.
fn handed_over() -> Option<TcpListener> {
    listenfd::ListenFd::from_env().take_tcp_listener(0).ok().flatten()
}

/// Both address families where the kernel has the newer one.
fn listen(port: u16) -> Outcome<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        .map_err(|error| Failure::io("listen on port", port, &error))
}

fn serve(listener: &TcpListener, file: Option<&Path>) -> Outcome {
    static OPEN: AtomicUsize = AtomicUsize::new(0);
    for connection in listener.incoming() {
        let Ok(stream) = connection else { continue };
        if OPEN.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            OPEN.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let file = file.map(Path::to_owned);
        thread::spawn(move || {
            // A client that goes away is its own business.
            let _ = answer(&stream, file.as_deref());
            OPEN.fetch_sub(1, Ordering::Relaxed);
        });
    }
    Ok(())
}

fn answer(stream: &TcpStream, file: Option<&Path>) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let path = read_request(stream)?;
    let (status, body) = respond(&path, file);
    // The log may be gone; the answer is what counts.
    let _ = writeln!(io::stdout(), "{path} {status}");
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let mut out = stream;
    out.write_all(head.as_bytes())?;
    out.write_all(&body)
}

/// The path. Headers are read to their end, so that closing does not reset the connection.
fn read_request(stream: &TcpStream) -> io::Result<String> {
    let mut lines = BufReader::new(stream.take(MAX_REQUEST_BYTES)).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    Ok(first.split(' ').nth(1).unwrap_or("/").to_owned())
}

fn respond(path: &str, file: Option<&Path>) -> (&'static str, Vec<u8>) {
    match (path, file) {
        ("/healthz", _) => ("200 OK", b"ok\n".to_vec()),
        ("/", Some(file)) => match fs::read(file) {
            Ok(text) => ("200 OK", text),
            Err(error) => {
                ("500 Internal Server Error", format!("read {}: {error}\n", file.display()).into_bytes())
            }
        },
        ("/", None) => ("200 OK", greeting(std::env::var("GREETING").ok(), &hostname()).into_bytes()),
        _ => ("404 Not Found", b"not found\n".to_vec()),
    }
}

fn greeting(greeting: Option<String>, host: &str) -> String {
    match greeting.filter(|text| !text.is_empty()) {
        Some(text) => format!("{text} from {host}\n"),
        None => format!("hello from {host}\n"),
    }
}

fn hostname() -> String {
    std::env::var("HOSTNAME")
        .ok()
        .or_else(|| fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map_or_else(|| "somewhere".to_owned(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_over_a_real_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        thread::spawn(move || serve(&listener, None));
        let ask = |path: &str| {
            let mut stream = TcpStream::connect(addr).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        assert!(ask("/healthz").starts_with("HTTP/1.1 200 OK\r\n"));
        assert!(ask("/").contains(" from "));
        assert!(ask("/nothing").starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn a_file_is_read_anew_for_each_request() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "one").unwrap();
        assert_eq!(respond("/", Some(file.path())).1, b"one");
        fs::write(file.path(), "two").unwrap();
        assert_eq!(respond("/", Some(file.path())).1, b"two");
        assert_eq!(respond("/", Some(Path::new("/nonexistent"))).0, "500 Internal Server Error");
    }

    #[test]
    fn the_greeting_can_be_set() {
        assert_eq!(greeting(None, "web"), "hello from web\n");
        assert_eq!(greeting(Some("good day".into()), "web"), "good day from web\n");
    }
}
