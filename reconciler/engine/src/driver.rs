//! Runs the core against a host.
//!
//! One thread owns the core and does nothing that takes long: what the core asks for is done on threads that may block,
//! and comes back as an input. Everybody else talks to that thread through a [`Handle`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keel_plan::{Action, Desired, Plan, PodKey, Reason, Status};
use tokio::sync::{broadcast, oneshot, watch};

use crate::core::{Convergence, Core, Input, Now, Output, Ticket};
use crate::events::Event;
use crate::ports::{ActionError, Done, Host, PortError, Progress};
use crate::settings::Settings;
use crate::writer::MemoryWriter;

/// Reports that a slow listener may be behind; then it misses some, and is told so.
const REPORT_QUEUE: usize = 4096;
/// Nothing in the core waits longer than its relist, so this only bounds a mistake.
const MAX_SLEEP: Duration = Duration::from_secs(60);
/// On the way out, work that is under way may end by itself for so long. Whatever is cut off is repaired by the next start.
const DRAIN: Duration = Duration::from_secs(10);

/// What happens while the core works, for whoever wants to print it.
#[derive(Clone, Debug)]
pub enum Report {
    Started { action: Action, reason: Reason },
    Finished { action: Action, took: Duration, result: Result<Done, ActionError> },
    Progress(Progress),
}

/// How far the engine is.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    pub convergence: Convergence,
    /// Nothing is under way or queued: all that is left are waits.
    pub idle: bool,
}

/// A sink for events, called on the core's thread: it must be quick.
pub type EventSink = Box<dyn FnMut(Event) + Send>;

/// Talks to a running engine. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    /// Every sender is bounded by itself: actions by the core's limits, hints by a flag, questions by their askers.
    sender: Sender<Message>,
    hinted: Arc<AtomicBool>,
    status: watch::Receiver<Arc<Status>>,
    steps: watch::Receiver<u64>,
    reports: broadcast::Sender<Report>,
}

/// The engine's thread. Dropping it without [`Engine::stop`] leaves the thread running until the process ends.
pub struct Engine {
    handle: Handle,
    thread: JoinHandle<()>,
}

enum Message {
    Input(Input),
    Finished { ticket: Ticket, took: Duration, result: Result<Done, ActionError> },
    Progress { ticket: Ticket, progress: Progress },
    Hint,
    Preview { desired: Desired, reply: oneshot::Sender<Plan> },
    Standing { pods: Option<BTreeSet<PodKey>>, reply: oneshot::Sender<Standing> },
    Status { reply: oneshot::Sender<Arc<Status>> },
    Stop,
}

#[derive(Debug, thiserror::Error)]
#[error("the engine has ended")]
pub struct Ended;

impl Engine {
    /// Starts the engine's thread. `blocking` lends the threads that host calls run on.
    pub fn start<H: Host + 'static>(
        host: Arc<H>,
        settings: Settings,
        blocking: tokio::runtime::Handle,
        events: EventSink,
    ) -> std::io::Result<Engine> {
        let (sender, receiver) = channel();
        let (status_sender, status) = watch::channel(Arc::default());
        let (step_sender, steps) = watch::channel(0);
        let (reports, _) = broadcast::channel(REPORT_QUEUE);
        let handle = Handle { sender, hinted: Arc::default(), status, steps, reports: reports.clone() };
        let worker = handle.clone();
        // Not joined: a disk that hangs must not keep the process. What is left is waited for at the stop.
        let (writer, _) = MemoryWriter::start(host.clone())?;
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            let core = Core::new(settings, host.load_memory());
            Loop {
                core,
                host,
                blocking,
                events,
                handle: worker,
                receiver,
                status: status_sender,
                steps: step_sender,
                started: Instant::now(),
                wake_at: 0,
                flights: Vec::new(),
                previews: Vec::new(),
                writer,
            }
            .run();
        })?;
        Ok(Engine { handle, thread })
    }

    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Nothing new is begun; what is under way may end. Containers go on.
    pub fn stop(self) {
        let _ = self.handle.sender.send(Message::Stop);
        if self.thread.join().is_err() {
            tracing::error!("the engine's thread panicked");
        }
    }
}

impl Handle {
    pub fn input(&self, input: Input) -> Result<(), Ended> {
        self.sender.send(Message::Input(input)).map_err(|_| Ended)
    }

    /// Something on the host may have changed. Many of these are one look.
    pub fn hint(&self) {
        if !self.hinted.swap(true, Ordering::AcqRel) {
            let _ = self.sender.send(Message::Hint);
        }
    }

    /// What would be done for `desired`, as the host is now. Waits for the first observation.
    pub async fn preview(&self, desired: Desired) -> Result<Plan, Ended> {
        let (reply, answer) = oneshot::channel();
        self.sender.send(Message::Preview { desired, reply }).map_err(|_| Ended)?;
        answer.await.map_err(|_| Ended)
    }

    /// How far these pods are; `None`: all of them.
    pub async fn standing(&self, pods: Option<BTreeSet<PodKey>>) -> Result<Standing, Ended> {
        let (reply, answer) = oneshot::channel();
        self.sender.send(Message::Standing { pods, reply }).map_err(|_| Ended)?;
        answer.await.map_err(|_| Ended)
    }

    /// The status as of now; [`Handle::status`] may lag behind a little when many things happen at once.
    pub async fn fresh_status(&self) -> Result<Arc<Status>, Ended> {
        let (reply, answer) = oneshot::channel();
        self.sender.send(Message::Status { reply }).map_err(|_| Ended)?;
        answer.await.map_err(|_| Ended)
    }

    /// Changes with each step of the core: the moment to ask again.
    pub fn steps(&self) -> watch::Receiver<u64> {
        self.steps.clone()
    }

    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }

    pub fn reports(&self) -> broadcast::Receiver<Report> {
        self.reports.subscribe()
    }
}

struct Loop<H> {
    core: Core,
    host: Arc<H>,
    blocking: tokio::runtime::Handle,
    events: EventSink,
    handle: Handle,
    receiver: Receiver<Message>,
    status: watch::Sender<Arc<Status>>,
    steps: watch::Sender<u64>,
    started: Instant,
    /// Monotonic milliseconds, as the core counts them.
    wake_at: u64,
    flights: Vec<(Ticket, Action)>,
    previews: Vec<(Desired, oneshot::Sender<Plan>)>,
    writer: MemoryWriter,
}

impl<H: Host + 'static> Loop<H> {
    fn run(mut self) {
        self.step(Input::Wake);
        loop {
            let sleep = Duration::from_millis(self.wake_at.saturating_sub(self.mono())).min(MAX_SLEEP);
            match self.receiver.recv_timeout(sleep) {
                Ok(Message::Stop) => {
                    self.drain();
                    return self.writer.close(DRAIN);
                }
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => self.step(Input::Wake),
                // The loop holds a sender itself.
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Input(input) => self.step(input),
            Message::Hint => {
                self.handle.hinted.store(false, Ordering::Release);
                self.step(Input::Hint);
            }
            Message::Finished { ticket, took, result } => {
                self.finished(ticket, took, &result);
                self.step(Input::ActionFinished { ticket, result });
            }
            Message::Progress { ticket, progress } => {
                let image = progress.image.clone();
                self.step(Input::Progress { ticket, progress });
                // With the speeds that the core has added.
                if let Some(pull) = self.core.pull(&image) {
                    let _ = self.handle.reports.send(Report::Progress(pull.clone()));
                }
            }
            Message::Preview { desired, reply } => {
                self.previews.push((desired, reply));
                self.answer_previews();
            }
            Message::Standing { pods, reply } => {
                let standing =
                    Standing { convergence: self.core.converged(pods.as_ref()), idle: self.core.is_idle() };
                let _ = reply.send(standing);
            }
            Message::Status { reply } => {
                let now = self.now();
                let status = self.core.fresh_status(now);
                self.status.send_replace(status.clone());
                let _ = reply.send(status);
            }
            Message::Stop => {}
        }
    }

    fn step(&mut self, input: Input) {
        let now = self.now();
        for output in self.core.step(input, now) {
            self.carry_out(output);
        }
        self.answer_previews();
        self.steps.send_modify(|step| *step = step.wrapping_add(1));
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Perform { ticket, action, reason } => self.perform(ticket, action, reason),
            Output::Cancel { ticket } => {
                if let Some((_, action)) = self.flights.iter().find(|(known, _)| *known == ticket) {
                    self.host.cancel(action);
                }
            }
            Output::Observe => {
                let (host, sender) = (self.host.clone(), self.handle.sender.clone());
                self.blocking.spawn_blocking(move || {
                    let _ = sender.send(Message::Input(Input::Observed(host.observe())));
                });
            }
            Output::Probe { ticket, request } => {
                let (host, sender) = (self.host.clone(), self.handle.sender.clone());
                self.blocking.spawn_blocking(move || {
                    let outcome = host.probe(&request);
                    let _ = sender.send(Message::Input(Input::ProbeFinished { ticket, outcome }));
                });
            }
            Output::SaveMemory { pod, memory } => {
                if let Err(PortError(error)) = self.host.save_memory(&pod, memory.as_ref()) {
                    tracing::warn!(%pod, error, "restart counts could not be kept");
                }
                self.writer.write(pod, memory);
            }
            Output::Event(event) => (self.events)(event),
            Output::Status(status) => {
                self.status.send_replace(status);
            }
            Output::WakeAt(at) => self.wake_at = at,
        }
    }

    fn perform(&mut self, ticket: Ticket, action: Action, reason: Reason) {
        let _ = self.handle.reports.send(Report::Started { action: action.clone(), reason });
        self.flights.push((ticket, action.clone()));
        let (host, sender, writer) = (self.host.clone(), self.handle.sender.clone(), self.writer.clone());
        self.blocking.spawn_blocking(move || {
            if let Action::CreatePod { pod } = &action {
                writer.await_forgotten(&pod.id);
            }
            let started = Instant::now();
            let progress_sender = std::sync::Mutex::new(sender.clone());
            let report = |progress: Progress| {
                let sender = progress_sender.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let _ = sender.send(Message::Progress { ticket, progress });
            };
            let result = host.perform(&action, &report);
            let _ = sender.send(Message::Finished { ticket, took: started.elapsed(), result });
        });
    }

    fn finished(&mut self, ticket: Ticket, took: Duration, result: &Result<Done, ActionError>) {
        if let Some(index) = self.flights.iter().position(|(known, _)| *known == ticket) {
            let (_, action) = self.flights.swap_remove(index);
            let _ = self.handle.reports.send(Report::Finished { action, took, result: result.clone() });
        }
    }

    fn answer_previews(&mut self) {
        if self.previews.is_empty() || self.core.observed().is_none() {
            return;
        }
        let now = self.now();
        for (desired, reply) in std::mem::take(&mut self.previews) {
            if let Some(observed) = self.core.observed() {
                let _ = reply.send(self.core.plan_preview(&desired, observed, now));
            }
        }
    }

    /// Stops are not waited for: the shims carry them through.
    fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN;
        let unfinished = |flights: &[(Ticket, Action)]| {
            flights.iter().any(|(_, a)| !matches!(a, Action::StopContainer { .. }))
        };
        while unfinished(&self.flights) {
            match self.receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Message::Finished { ticket, took, result }) => self.finished(ticket, took, &result),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn mono(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        Now { wall: u64::try_from(wall).unwrap_or(u64::MAX), mono: self.mono() }
    }
}
