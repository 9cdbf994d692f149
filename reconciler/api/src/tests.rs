//! Server and client against each other over a real socket, with a control that is told what to do.

use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, watch};

use crate::*;

/// Keeps what it was asked, answers what it is told.
struct Told {
    refuse: bool,
    finished: Notify,
    events: Mutex<Vec<Event>>,
    more: watch::Sender<u64>,
}

impl Told {
    fn new(refuse: bool) -> Arc<Told> {
        Arc::new(Told {
            refuse,
            finished: Notify::new(),
            events: Mutex::default(),
            more: watch::Sender::new(0),
        })
    }

    fn happen(&self, seq: u64) {
        self.events.lock().unwrap().push(Event {
            seq,
            time_ms: seq,
            warning: false,
            object: "Pod/default/web".into(),
            reason: "Started".into(),
            message: "started".into(),
            count: 1,
        });
        self.more.send_replace(seq);
    }
}

impl Control for Told {
    async fn apply(&self, request: ApplyRequest, events: EventSender) -> Result<(), ControlError> {
        if self.refuse {
            return Err(ControlError::new(ErrorCode::Conflict, "busy").hint("later"));
        }
        for file in &request.files {
            let message = file.name.clone();
            let _ = events.send(ControlEvent::Note { message }).await;
        }
        let _ = events
            .send(ControlEvent::Result { exit_code: exit::DONE, message: "done".into(), hints: vec![] })
            .await;
        self.finished.notify_one();
        Ok(())
    }

    async fn delete(&self, _: DeleteRequest, events: EventSender) -> Result<(), ControlError> {
        let _ = events.send(ControlEvent::Note { message: "half".into() }).await;
        Err(ControlError::new(ErrorCode::Internal, "broke"))
    }

    async fn status(&self, after: Option<u64>) -> Result<Snapshot, ControlError> {
        let mut revision = self.more.subscribe();
        let seen = *revision.wait_for(|revision| Some(*revision) != after).await.unwrap();
        Ok(Snapshot { revision: seen, status: Arc::default() })
    }

    async fn events_since(&self, after: u64, wait: bool) -> Result<Vec<Event>, ControlError> {
        if wait {
            let _ = self.more.subscribe().wait_for(|seq| *seq > after).await;
        }
        let events = self.events.lock().unwrap();
        Ok(events.iter().filter(|e| e.seq > after).cloned().collect())
    }

    async fn reconcile(&self, _: bool) -> Result<(), ControlError> {
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

fn about() -> VersionInfo {
    VersionInfo { version: "1".into(), api: "v1".into(), pid: 1, root: "/r".into(), run: "/v".into() }
}

/// Runs `talk` against a server on a socket in a temporary directory.
fn with_server<T>(control: &Arc<Told>, talk: impl AsyncFnOnce(Client) -> T) -> T {
    let temp = tempfile::tempdir().unwrap();
    let socket = temp.path().join("keel.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = Listener::unix(&socket).unwrap();
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let server = tokio::spawn(serve(vec![listener], Arc::clone(control), about(), async move {
            stopped.notified().await
        }));
        let answer = talk(Client::new(&socket)).await;
        stop.notify_one();
        server.await.unwrap();
        answer
    })
}

fn two_files() -> ApplyRequest {
    let file = |name: &str| InputFile { name: name.into(), text: "x".repeat(1000) };
    ApplyRequest { files: vec![file("a.yaml"), file("b.yaml")], ..ApplyRequest::default() }
}

#[test]
fn apply_streams_its_reports_in_order_and_ends_with_the_result() {
    let seen = with_server(&Told::new(false), async |client| {
        let mut stream = client.apply(&two_files()).await.unwrap();
        let mut seen = Vec::new();
        while let Some(event) = stream.next().await.unwrap() {
            seen.push(event);
        }
        seen
    });
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[1], ControlEvent::Note { message: "b.yaml".into() });
    assert!(matches!(&seen[2], ControlEvent::Result { exit_code: 0, .. }));
}

#[test]
fn a_refused_operation_is_an_error_and_not_a_stream() {
    let refused = with_server(&Told::new(true), async |client| client.apply(&two_files()).await.unwrap_err());
    let ClientError::Refused(error) = refused else { panic!("{refused:?}") };
    assert_eq!(error.exit_code(), exit::FAILED);
    assert_eq!(error.hints, ["later"]);
}

#[test]
fn a_failure_after_the_first_report_closes_the_stream_with_a_result() {
    let last = with_server(&Told::new(false), async |client| {
        let mut stream = client.delete(&DeleteRequest::default()).await.unwrap();
        stream.next().await.unwrap().unwrap();
        let last = stream.next().await.unwrap().unwrap();
        assert_eq!(stream.next().await.unwrap(), None);
        last
    });
    assert!(matches!(last, ControlEvent::Result { exit_code: 1, message, .. } if message == "broke"));
}

#[test]
fn an_operation_goes_on_when_its_client_goes_away() {
    let control = Told::new(false);
    with_server(&control, async |client| {
        drop(client.apply(&two_files()).await.unwrap());
        control.finished.notified().await;
    });
}

#[test]
fn watched_events_arrive_as_they_happen() {
    let control = Told::new(false);
    control.happen(1);
    control.happen(2);
    with_server(&control, async |client| {
        let mut past = client.events(1, false).await.unwrap();
        assert_eq!(past.next().await.unwrap().unwrap().seq, 2);
        assert_eq!(past.next().await.unwrap(), None);
        let mut watched = client.events(2, true).await.unwrap();
        control.happen(3);
        assert_eq!(watched.next().await.unwrap().unwrap().seq, 3);
    });
}

#[test]
fn a_watched_status_is_sent_at_once_and_after_each_change() {
    let control = Told::new(false);
    with_server(&control, async |client| {
        let mut watched = client.watch_status().await.unwrap();
        assert_eq!(watched.next().await.unwrap().unwrap().revision, 0);
        control.happen(7);
        assert_eq!(watched.next().await.unwrap().unwrap().revision, 7);
        assert_eq!(client.status().await.unwrap().revision, 7);
    });
}

#[test]
fn no_daemon_differs_from_a_daemon_in_trouble() {
    let temp = tempfile::tempdir().unwrap();
    let absent = Client::new(temp.path().join("keel.sock"));
    assert!(matches!(absent.probe(), Err(ClientError::NoDaemon { .. })));
    drop(std::os::unix::net::UnixListener::bind(absent.socket()).unwrap());
    assert!(matches!(absent.probe(), Err(ClientError::NoDaemon { .. })));
    with_server(&Told::new(false), async |client| {
        client.probe().unwrap();
        assert_eq!(client.version().await.unwrap(), about());
        client.reconcile(false).await.unwrap();
    });
}

#[test]
fn unknown_paths_and_malformed_bodies_are_refused() {
    use std::io::{Read, Write};
    let control = Told::new(false);
    let ask = |request: &'static str| {
        with_server(&control, async |client| {
            let mut stream = std::os::unix::net::UnixStream::connect(client.socket()).unwrap();
            tokio::task::spawn_blocking(move || {
                stream.write_all(request.as_bytes()).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                answer
            })
            .await
            .unwrap()
        })
    };
    let answer = ask("GET /keel/v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let answer =
        ask("POST /keel/v1/apply HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{]");
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[test]
fn web_pages_cannot_use_the_loopback_port() {
    use std::io::{Read, Write};
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let Err(refused) = runtime.block_on(Listener::tcp("0.0.0.0:0".parse().unwrap())) else {
        panic!("a public address was accepted")
    };
    assert!(matches!(refused, ListenError::NotLoopback { .. }));
    let listener = runtime.block_on(Listener::tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let Listener::Tcp(tcp) = &listener else { unreachable!() };
    let addr = tcp.local_addr().unwrap();
    runtime.spawn(serve(vec![listener], Told::new(false), about(), std::future::pending()));
    let ask = |headers: &str| {
        let mut stream = std::net::TcpStream::connect(addr).unwrap();
        let request = format!("GET /keel/v1/version HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(ask("Host: localhost:1234\r\n"), "200");
    assert_eq!(ask("Host: 127.0.0.1\r\nOrigin: http://evil.example\r\n"), "403");
    assert_eq!(ask("Host: evil.example\r\n"), "403");
}
