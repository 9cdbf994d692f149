//! The declared objects of an instance, and the operations that change them. One implementation for the daemon and for
//! a command that acts alone.
//!
//! ```text
//! manifest directory ──> last good version of each file ─┐
//!                                                        ├─> objects ─> Desired ─> engine
//! apply, delete ───────> applied objects, kept on disk ──┘
//! ```
//! The directory has precedence: an object that a file declares is changed there and nowhere else.

mod follow;
mod shown;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex as Lock};
use std::time::Duration;

use keel_api::{
    ApplyRequest, Control, ControlError, ControlEvent, DeleteRequest, ErrorCode, EventSender, ImageRequest,
    RestartRequest, Snapshot, exit,
};
use keel_engine::{Handle, Input};
use keel_host::{Applied, EventLog, RealHost, StatusFiles, StorageHooks};
use keel_manifest::{Diagnostic, FileCondition, Object, ObjectKey, parse};
use keel_plan::{Desired, Plan, PodKey, Status, lower_desired};
use tokio::sync::watch;

use self::follow::{Wait, follow};
use self::shown::Shown;

/// Told to read the directory again, and whether what has gone from it is meant to go.
type OnRelist = Box<dyn Fn(bool) + Send>;

/// What the manifest directory says now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    pub(crate) objects: Vec<Object>,
    pub(crate) frozen: Vec<ObjectKey>,
    pub(crate) conditions: BTreeMap<String, FileCondition>,
    /// Why the directory is not taken at its word: missing, unreadable, suddenly empty.
    pub(crate) held: Option<String>,
}

pub(crate) struct Controller {
    host: Arc<RealHost>,
    engine: Handle,
    events: Arc<EventLog>,
    declared: tokio::sync::Mutex<Declared>,
    /// What the sources have to complain about; part of the status.
    problems: watch::Sender<Vec<String>>,
    snapshots: watch::Receiver<Snapshot>,
    files: Arc<Lock<StatusFiles>>,
    recorded: Arc<watch::Sender<u64>>,
    relist: Lock<Option<OnRelist>>,
    /// True from the first status on that knows both the host and what is declared. An earlier one would say that
    /// nothing is there.
    known: Arc<watch::Sender<bool>>,
    /// Images that objects name, running or not; `None` until it is known what is declared.
    images: Arc<Lock<Option<BTreeSet<String>>>>,
}

struct Declared {
    applied: BTreeMap<ObjectKey, Object>,
    /// Applied objects whose record does not read any more.
    damaged: BTreeSet<ObjectKey>,
    /// `None` until it has been read once; stays `None` where there is no directory to watch.
    directory: Option<Directory>,
    /// False only between the start of a daemon and its first reading of the directory.
    complete: bool,
    /// Whether somebody reads the directory. Otherwise it is what the last daemon knew of it: that stays in force, but
    /// what is applied meanwhile wins.
    watched: bool,
    /// What the directory has to complain about.
    problems: Vec<String>,
}

impl Declared {
    /// The version of an object that is in force.
    fn object(&self, key: &ObjectKey) -> Option<&Object> {
        let in_directory = || self.directory.iter().flat_map(|d| &d.objects).find(|o| o.key() == *key);
        match self.watched {
            true => in_directory().or_else(|| self.applied.get(key)),
            false => self.applied.get(key).or_else(in_directory),
        }
    }

    fn with(&self, applied: BTreeMap<ObjectKey, Object>) -> Declared {
        let damaged = self.damaged.iter().filter(|key| !applied.contains_key(*key)).cloned().collect();
        Declared {
            applied,
            damaged,
            directory: self.directory.clone(),
            complete: self.complete,
            watched: self.watched,
            problems: self.problems.clone(),
        }
    }
}

impl Controller {
    /// `watches` says whether a directory is going to be read: until then nothing is deleted.
    pub(crate) fn new(
        host: Arc<RealHost>,
        engine: Handle,
        events: Arc<EventLog>,
        recorded: Arc<watch::Sender<u64>>,
        watches: bool,
    ) -> Result<Arc<Controller>, keel_host::HostError> {
        let records = Applied::open(host.paths());
        let applied = records.load()?;
        let damaged = records.damaged(&applied)?;
        let (problems, problem_receiver) = watch::channel(Vec::new());
        let (snapshot_sender, snapshots) = watch::channel(Snapshot { revision: 0, status: Arc::default() });
        let files = StatusFiles::open(host.paths())?;
        let files = Arc::new(Lock::new(files));
        let known = Arc::new(watch::channel(false).0);
        let images = Arc::new(Lock::new(None));
        host.on_storage(storage_hooks(images.clone(), engine.status(), events.clone(), recorded.clone()));
        let first = known.subscribe();
        tokio::spawn(publish(first, engine.status(), problem_receiver, snapshot_sender, files.clone()));
        Ok(Arc::new(Controller {
            host,
            engine,
            events,
            declared: tokio::sync::Mutex::new(Declared {
                applied,
                damaged,
                directory: None,
                complete: !watches,
                watched: watches,
                problems: Vec::new(),
            }),
            problems,
            snapshots,
            files,
            recorded,
            relist: Lock::new(None),
            known,
            images,
        }))
    }

    /// What `reconcile` calls besides looking at the host.
    pub(crate) fn on_relist(&self, relist: OnRelist) {
        *self.relist.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(relist);
    }

    /// Tells the engine what is declared now: at the start, with what was applied earlier.
    pub(crate) async fn begin(&self) -> Result<(), ControlError> {
        let declared = self.declared.lock().await;
        self.tell_problems(&declared);
        self.declare(&declared)?;
        if declared.complete {
            self.await_first_status(self.desired(&declared));
        }
        Ok(())
    }

    /// A preview waits for the first observation; when it is answered, the status has been made from it.
    fn await_first_status(&self, desired: Desired) {
        if *self.known.borrow() {
            return;
        }
        let (engine, known) = (self.engine.clone(), self.known.clone());
        tokio::spawn(async move {
            let _ = tokio::time::timeout(FIRST_LOOK, engine.preview(desired)).await;
            let _ = engine.standing(None).await;
            known.send_replace(true);
        });
    }

    /// Once a boot: whether a power cut has damaged what is in the store. In the background, since it looks at every
    /// file; a layer that is used meanwhile is looked at first.
    pub(crate) fn verify_images(&self) {
        if !self.host.store().needs_verify() {
            return;
        }
        let (host, events, recorded, engine) =
            (self.host.clone(), self.events.clone(), self.recorded.clone(), self.engine.clone());
        tokio::spawn(async move {
            let found =
                keel_host::verify_images(host.store(), host.registry(), keel_store::Depth::Quick, true).await;
            let verified = match found {
                Ok(verified) => verified,
                Err(error) => return tracing::warn!(error = error.chain(), "images could not be verified"),
            };
            let tell = |object: String, reason: &str, message: &str| {
                record(&events, &recorded, true, &object, reason, message);
            };
            for damage in verified.report.damage.iter().filter(|damage| damage.repaired) {
                tell(format!("Layer/{}", damage.digest), "Repaired", &damage.problem);
            }
            for image in &verified.pulled {
                tell(format!("Image/{image}"), "Repaired", "damaged on disk; pulled again");
            }
            for lost in &verified.lost {
                let message = format!("{}; it is set aside and pulled when needed", lost.message());
                tell(format!("Image/{}", lost.image.reference), "Damaged", &message);
            }
            engine.hint();
        });
    }

    /// Looks after the disk of images, for as long as the process lives.
    pub(crate) fn watch_disk(&self) {
        /// A pull that fills the disk in between makes room by itself.
        const PERIOD: Duration = Duration::from_secs(30);
        /// Left-overs of given-up pulls are looked for this many looks apart.
        const COLLECT_EVERY: u32 = 120;
        let (host, mut known) = (self.host.clone(), self.known.subscribe());
        tokio::spawn(async move {
            if known.wait_for(|known| *known).await.is_err() {
                return;
            }
            for look in 0u32.. {
                let host = host.clone();
                let looked = tokio::task::spawn_blocking(move || {
                    host.relieve_disk();
                    if look % COLLECT_EVERY == 0 {
                        host.collect_unreachable();
                    }
                });
                if looked.await.is_err() {
                    return;
                }
                tokio::time::sleep(PERIOD).await;
            }
        });
    }

    /// Without anybody who reads the directory: what the last daemon kept of it stays in force.
    pub(crate) async fn restore(&self, objects: Vec<Object>) {
        self.declared.lock().await.directory = Some(Directory { objects, ..Directory::default() });
    }

    /// The last word of this process: what probes have said is in no other place.
    pub(crate) async fn flush(&self) {
        if self.engine.fresh_status().await.is_ok() {
            write_files(&self.files, || self.whole_status());
        }
    }

    pub(crate) async fn take_directory(&self, directory: Directory) -> Result<(), ControlError> {
        let mut problems: Vec<String> = directory.held.iter().cloned().collect();
        for (file, condition) in &directory.conditions {
            problems.extend(describe_file(file, condition));
        }
        let mut declared = self.declared.lock().await;
        self.tell_files(declared.directory.as_ref(), &directory);
        let objects_hold = directory.held.is_some() && declared.directory.is_some();
        if objects_hold {
            // Not taken at its word: what was in force stays.
            if let Some(before) = &mut declared.directory {
                before.held = directory.held;
            }
        } else {
            declared.complete = directory.held.is_none();
            declared.directory = Some(directory);
            self.declare(&declared)?;
            self.await_first_status(self.desired(&declared));
        }
        declared.problems = problems;
        self.tell_problems(&declared);
        Ok(())
    }

    fn tell_problems(&self, declared: &Declared) {
        let damaged = declared.damaged.iter().map(|key| {
            format!("the record of {key} is damaged; what runs stays as it is (hint: apply it again, or delete it)")
        });
        self.problems.send_replace(damaged.chain(declared.problems.iter().cloned()).collect());
    }

    /// A plan needs one look at the host. Where the host does not let itself be read, the reason is told instead.
    async fn preview(&self, desired: Desired, timeout_ms: Option<u64>) -> Result<Plan, ControlError> {
        let limit = timeout_ms.map_or(LOOK_LIMIT, Duration::from_millis).min(LOOK_LIMIT);
        match tokio::time::timeout(limit, self.engine.preview(desired)).await {
            Ok(plan) => plan.map_err(ended),
            Err(_) => {
                let why = self.engine.status().borrow().problems.join("; ");
                let message = format!("the host could not be read within {} s: {why}", limit.as_secs());
                Err(ControlError::new(ErrorCode::Internal, message.trim_end_matches([':', ' ']))
                    .hint("see the events: keel events"))
            }
        }
    }

    /// On disk before the engine hears of it, so that whatever it begins is known to the next process. The engine begins
    /// while the disk still flushes, which takes longer than a start. What cannot be kept is not in force.
    async fn put_in_force(&self, declared: &mut Declared, candidate: Declared) -> Result<(), ControlError> {
        let records = Applied::open(self.host.paths());
        let (before, after) = (declared.applied.clone(), candidate.applied.clone());
        let write = {
            let (records, after) = (records.clone(), after.clone());
            move || records.write(&before, &after)
        };
        let written = on_disk(write).await?;
        if let Err(refusal) = self.declare(&candidate) {
            written.undo();
            return Err(refusal);
        }
        let damaged = candidate.damaged.clone();
        let flush = move || match written.sync().and_then(|()| records.keep_damaged(&after, &damaged)) {
            Ok(()) => {
                written.finish();
                Ok(())
            }
            Err(error) => {
                written.undo();
                Err(error)
            }
        };
        if let Err(refusal) = on_disk(flush).await {
            self.declare(declared)?;
            return Err(refusal);
        }
        *declared = candidate;
        self.tell_problems(declared);
        Ok(())
    }

    /// One event for each change of a file's condition, and of the directory's.
    fn tell_files(&self, before: Option<&Directory>, now: &Directory) {
        let was = |file: &String| before.and_then(|before| before.conditions.get(file));
        for (file, condition) in now.conditions.iter().filter(|(file, now)| was(file) != Some(*now)) {
            match describe_file(file, condition) {
                Some(message) => self.record(true, &format!("File/{file}"), "ManifestInvalid", &message),
                None if was(file).is_some_and(|before| !before.is_valid()) => {
                    self.record(
                        false,
                        &format!("File/{file}"),
                        "ManifestValid",
                        &format!("{file}: in force"),
                    );
                }
                None => {}
            }
        }
        match (before.and_then(|before| before.held.as_ref()), &now.held) {
            (before, Some(reason)) if before != Some(reason) => {
                self.record(true, "Host/manifests", "ManifestsHeld", reason);
            }
            _ => {}
        }
    }

    fn record(&self, warning: bool, object: &str, reason: &str, message: &str) {
        record(&self.events, &self.recorded, warning, object, reason, message);
    }

    fn declare(&self, declared: &Declared) -> Result<(), ControlError> {
        if declared.complete || declared.directory.is_some() {
            let directory = declared.directory.iter().flat_map(|directory| &directory.objects);
            let images = crate::images::declared(directory.chain(declared.applied.values()));
            *self.images.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(images);
        }
        self.engine.input(Input::DesiredChanged(self.desired(declared))).map_err(ended)
    }

    fn desired(&self, declared: &Declared) -> Desired {
        let directory = declared.directory.clone().unwrap_or_default();
        let applied: Vec<Object> = declared.applied.values().cloned().collect();
        let (mut objects, others) = match declared.watched {
            true => (directory.objects, applied),
            false => (applied, directory.objects),
        };
        let known: BTreeSet<ObjectKey> = objects.iter().map(Object::key).collect();
        objects.extend(others.into_iter().filter(|other| !known.contains(&other.key())));
        let mut desired = lower_desired(&objects, &BTreeMap::new());
        desired.complete = declared.complete;
        let damaged = declared.damaged.iter().filter(|key| !known.contains(key)).cloned();
        let frozen: Vec<ObjectKey> = directory.frozen.into_iter().chain(damaged).collect();
        desired.frozen = self.frozen_pods(&frozen);
        desired
    }

    /// Pods of objects that a broken file or record names: a Deployment's are known by what is there.
    fn frozen_pods(&self, frozen: &[ObjectKey]) -> BTreeSet<PodKey> {
        if frozen.is_empty() {
            return BTreeSet::new();
        }
        // Not the status: before the first round it is empty.
        let recorded = keel_host::recorded_pods(self.host.paths()).unwrap_or_else(|error| {
            tracing::warn!(error = %error.chain(), "pods of broken manifests are not known");
            Vec::new()
        });
        let owned = |key: &ObjectKey| {
            let of = |(pod, owner): &&(PodKey, keel_plan::Owner)| {
                pod.namespace == key.namespace && owner.kind == key.kind && owner.name == key.name
            };
            recorded.iter().filter(of).map(|(pod, _)| pod.clone()).collect::<Vec<_>>()
        };
        frozen.iter().flat_map(owned).collect()
    }

    async fn run_apply(&self, request: ApplyRequest, events: &EventSender) -> Result<(), ControlError> {
        let (objects, mut diagnostics) = read(&request);
        let mut declared = self.declared.lock().await;
        diagnostics.extend(self.across(&declared, &objects, &request));
        // Objects of one file are compared when it is parsed, and again with those of others.
        diagnostics.sort();
        diagnostics.dedup();
        let invalid = diagnostics.iter().any(Diagnostic::is_error);
        if !diagnostics.is_empty() {
            say(events, ControlEvent::Diagnostics { diagnostics }).await;
        }
        if invalid {
            return end(events, exit::INVALID, "nothing was changed: the manifests are invalid", &[]).await;
        }
        if objects.is_empty() {
            say(events, ControlEvent::Note { message: "no objects in the input".into() }).await;
        }
        let next = match self.next_applied(&declared, objects, &request) {
            Ok(next) => next,
            Err(refusal) => return Err(refusal),
        };
        let before = self.desired(&declared);
        let mut candidate = declared.with(next);
        if request.prune {
            candidate.damaged.clear();
        }
        let desired = self.desired(&candidate);
        let targets = changed_pods(&before, &desired, &request_keys(&request));
        let plan = self.preview(desired.clone(), request.timeout_ms).await?;
        let shown = Shown::of(&plan, targets, &desired);
        say(events, shown.plan(&plan)).await;
        if request.dry_run {
            return end(events, exit::DONE, "dry run: nothing was changed", &[]).await;
        }
        // Before the engine hears of it: no report of this apply is missed.
        let reports = self.engine.reports();
        self.put_in_force(&mut declared, candidate).await?;
        drop(declared);
        let timeout = request.timeout_ms.map(Duration::from_millis);
        let wait = Wait { ready: request.wait, timeout };
        follow(&self.engine, shown, wait, reports, events).await
    }

    /// What holds between these objects and everything else that is declared.
    fn across(&self, declared: &Declared, objects: &[Object], request: &ApplyRequest) -> Vec<Diagnostic> {
        let given: BTreeSet<ObjectKey> = objects.iter().map(Object::key).collect();
        let names: BTreeSet<&str> = request.files.iter().map(|file| file.name.as_str()).collect();
        let directory = declared.directory.iter().flat_map(|d| d.objects.iter());
        let applied = declared.applied.values().filter(|_| !request.prune);
        let others = directory.chain(applied).filter(|o| !given.contains(&o.key()));
        let all: Vec<Object> = others.chain(objects).cloned().collect();
        let changes = objects.iter().filter_map(|object| {
            let in_force = declared.object(&object.key())?;
            keel_manifest::check_change(in_force, object)
        });
        let found = keel_manifest::check(&all).into_iter().filter(|d| names.contains(d.file.as_str()));
        found.chain(changes).collect()
    }

    fn next_applied(
        &self,
        declared: &Declared,
        objects: Vec<Object>,
        request: &ApplyRequest,
    ) -> Result<BTreeMap<ObjectKey, Object>, ControlError> {
        let mut next = if request.prune { BTreeMap::new() } else { declared.applied.clone() };
        if objects.is_empty() && request.prune && !declared.applied.is_empty() && !request.allow_empty {
            return Err(ControlError::new(
                ErrorCode::Invalid,
                "the manifests are empty: --prune would delete everything",
            )
            .hint("add --allow-empty if that is meant"));
        }
        let directory: BTreeMap<ObjectKey, &Object> =
            declared.directory.iter().flat_map(|d| d.objects.iter()).map(|o| (o.key(), o)).collect();
        for object in objects {
            match directory.get(&object.key()) {
                None => drop(next.insert(object.key(), object)),
                Some(there) if there.kind == object.kind => {}
                Some(_) if !declared.watched => drop(next.insert(object.key(), object)),
                Some(there) => {
                    return Err(ControlError::new(
                        ErrorCode::Invalid,
                        format!(
                            "{} is declared in {}:{}",
                            object.key(),
                            there.origin.file,
                            there.origin.line
                        ),
                    )
                    .hint("the daemon keeps that file true: change it there"));
                }
            }
        }
        Ok(next)
    }

    async fn run_delete(&self, request: DeleteRequest, events: &EventSender) -> Result<(), ControlError> {
        let key = ObjectKey {
            kind: request.kind.clone(),
            namespace: request.namespace.clone(),
            name: request.name.clone(),
        };
        let mut declared = self.declared.lock().await;
        let in_directory = declared.directory.iter().flat_map(|d| &d.objects).find(|o| o.key() == key);
        if let Some(object) = in_directory {
            return Err(ControlError::new(
                ErrorCode::Conflict,
                format!(
                    "{key} is declared in {}:{} and would come back",
                    object.origin.file, object.origin.line
                ),
            )
            .hint("remove it from that file"));
        }
        if !declared.applied.contains_key(&key) && !declared.damaged.contains(&key) {
            if let Some(owner) = self.owner_of(&declared, &key) {
                return Err(ControlError::new(
                    ErrorCode::Conflict,
                    format!("{key} belongs to {owner} and would come back"),
                )
                .hint(format!("delete that: keel delete {owner}, or apply it with fewer replicas")));
            }
            return Err(ControlError::new(ErrorCode::NotFound, format!("{key} does not exist"))
                .hint("list what there is with: keel get -A"));
        }
        let before = self.desired(&declared);
        let mut next = declared.applied.clone();
        next.remove(&key);
        let mut candidate = declared.with(next);
        candidate.damaged.remove(&key);
        let desired = self.desired(&candidate);
        let targets = changed_pods(&before, &desired, &[key].into());
        let plan = self.preview(desired.clone(), None).await?;
        let shown = Shown::of(&plan, targets, &desired);
        say(events, shown.plan(&plan)).await;
        let reports = self.engine.reports();
        if let Some(grace_ms) = request.grace_ms {
            for pod in &shown.targets {
                self.engine.input(Input::Grace { pod: pod.clone(), grace_ms }).map_err(ended)?;
            }
        }
        self.put_in_force(&mut declared, candidate).await?;
        drop(declared);
        let wait = Wait { ready: request.wait, timeout: None };
        follow(&self.engine, shown, wait, reports, events).await
    }

    async fn run_restart(&self, request: RestartRequest, events: &EventSender) -> Result<(), ControlError> {
        let RestartRequest { kind, namespace, name, container, wait, timeout_ms } = request;
        let desired = self.desired(&*self.declared.lock().await);
        let is_named = |key: &PodKey, pod: &keel_plan::DesiredPod| {
            key.namespace == namespace
                && ((kind == "Pod" && key.name == name) || (pod.owner.kind == kind && pod.owner.name == name))
        };
        let named: Vec<_> = desired.pods.iter().filter(|(key, pod)| is_named(key, pod)).collect();
        let has = |container: &String| {
            named.iter().any(|(_, pod)| pod.containers.iter().any(|c| c.name.0 == *container))
        };
        let missing = match &container {
            _ if named.is_empty() => Some(format!("{kind} {namespace}/{name} does not exist")),
            Some(container) if !has(container) => {
                Some(format!("{kind} {namespace}/{name} has no container {container}"))
            }
            _ => None,
        };
        if let Some(missing) = missing {
            return Err(
                ControlError::new(ErrorCode::NotFound, missing).hint("list what there is with: keel get -A")
            );
        }
        let targets: BTreeSet<PodKey> = named.into_iter().map(|(key, _)| key.clone()).collect();
        // It also waits for the first observation: before it nobody knows what runs.
        let plan = self.preview(desired.clone(), timeout_ms).await?;
        let reports = self.engine.reports();
        for pod in &targets {
            let container = container.clone().map(keel_plan::ContainerName);
            let by = "keel restart".to_owned();
            self.engine.input(Input::Restart { pod: pod.clone(), container, by }).map_err(ended)?;
        }
        let wait = Wait { ready: wait, timeout: timeout_ms.map(Duration::from_millis) };
        follow(&self.engine, Shown::of(&plan, targets, &desired), wait, reports, events).await
    }

    fn whole_status(&self) -> Status {
        let mut whole = Status::clone(&self.engine.status().borrow());
        whole.problems.extend(self.problems.borrow().iter().cloned());
        whole
    }

    /// What a pod is made from, when that is not its own manifest.
    fn owner_of(&self, declared: &Declared, key: &ObjectKey) -> Option<String> {
        let pod = PodKey { namespace: key.namespace.clone(), name: key.name.clone() };
        let desired = self.desired(declared);
        let owner = &desired.pods.get(&pod).filter(|_| key.kind == "Pod")?.owner;
        (owner.kind != key.kind).then(|| format!("{}/{}", owner.kind.to_lowercase(), owner.name))
    }
}

impl Control for Controller {
    async fn apply(&self, request: ApplyRequest, events: EventSender) -> Result<(), ControlError> {
        self.run_apply(request, &events).await
    }

    async fn delete(&self, request: DeleteRequest, events: EventSender) -> Result<(), ControlError> {
        self.run_delete(request, &events).await
    }

    async fn restart(&self, request: RestartRequest, events: EventSender) -> Result<(), ControlError> {
        self.run_restart(request, &events).await
    }

    async fn images(&self, request: ImageRequest, events: EventSender) -> Result<(), ControlError> {
        let status = self.snapshots.borrow().status.clone();
        let declared = self.images.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let (store, registry) = (self.host.store(), self.host.registry());
        crate::images::run(store, registry, &status, declared, request, &events).await
    }

    async fn status(&self, after: Option<u64>) -> Result<Snapshot, ControlError> {
        let mut snapshots = self.snapshots.clone();
        let wanted = |snapshot: &Snapshot| snapshot.revision > 0 && after != Some(snapshot.revision);
        let newer = snapshots.wait_for(wanted).await.map_err(|_| ended(keel_engine::Ended))?.clone();
        if after.is_some() {
            return Ok(newer);
        }
        // What is published lags a little: whoever has just deleted a pod must not be shown it.
        let status = Arc::new(self.whole_status());
        Ok(Snapshot { status, ..newer })
    }

    async fn events_since(&self, after: u64, wait: bool) -> Result<Vec<keel_api::Event>, ControlError> {
        let mut recorded = self.recorded.subscribe();
        loop {
            recorded.borrow_and_update();
            let found: Vec<keel_api::Event> = self.events.since(after).into_iter().map(api_event).collect();
            if !found.is_empty() || !wait {
                return Ok(found);
            }
            recorded.changed().await.map_err(|_| ended(keel_engine::Ended))?;
        }
    }

    async fn reconcile(&self, accept_removals: bool) -> Result<(), ControlError> {
        if let Some(relist) = &*self.relist.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            relist(accept_removals);
        }
        let mut status = self.engine.status();
        let first = status.wait_for(|status| status.sources_complete);
        // A directory that cannot be read is no reason to wait for ever.
        if let Ok(Err(_)) = tokio::time::timeout(FIRST_ROUND, first).await {
            return Err(ended(keel_engine::Ended));
        }
        self.engine.hint();
        let mut steps = self.engine.steps();
        let before = *steps.borrow_and_update();
        steps.wait_for(|step| step.wrapping_sub(before) >= 2).await.map_err(|_| ended(keel_engine::Ended))?;
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        match self.engine.status().borrow().sources_complete {
            true => Ok(()),
            false => Err("the manifests have not been read yet".into()),
        }
    }
}

/// How long `reconcile` waits for the first reading of the directory.
const FIRST_ROUND: Duration = Duration::from_secs(10);

/// A host that cannot be observed for so long has a status all the same: the one that says so.
const FIRST_LOOK: Duration = Duration::from_secs(5);

/// The longest that an operation waits for one look at the host: enough for a thousand pods on a slow disk.
const LOOK_LIMIT: Duration = Duration::from_secs(60);

/// Disk work is not for the threads that serve sockets.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, keel_host::HostError> + Send + 'static,
) -> Result<T, ControlError> {
    let error = match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => error.chain(),
        Err(error) => error.to_string(),
    };
    Err(ControlError::new(ErrorCode::Internal, format!("keep what was applied: {error}")))
}

fn read(request: &ApplyRequest) -> (Vec<Object>, Vec<Diagnostic>) {
    let (mut objects, mut diagnostics) = (Vec::new(), Vec::new());
    for file in &request.files {
        let parsed = parse(&file.name, file.text.as_bytes());
        objects.extend(parsed.objects);
        diagnostics.extend(parsed.diagnostics);
    }
    if let Some(namespace) = &request.namespace {
        diagnostics.extend(keel_manifest::place_in(&mut objects, namespace));
    }
    (objects, diagnostics)
}

fn request_keys(request: &ApplyRequest) -> BTreeSet<ObjectKey> {
    read(request).0.iter().map(Object::key).collect()
}

/// Pods of the named objects, and pods that the change takes away or alters (through a ConfigMap, say).
fn changed_pods(before: &Desired, after: &Desired, named: &BTreeSet<ObjectKey>) -> BTreeSet<PodKey> {
    let is_named = |key: &PodKey, owner: &keel_plan::Owner| {
        let object = ObjectKey {
            kind: owner.kind.clone(),
            namespace: key.namespace.clone(),
            name: owner.name.clone(),
        };
        named.contains(&object)
    };
    let mut pods: BTreeSet<PodKey> = BTreeSet::new();
    for (key, pod) in &after.pods {
        if is_named(key, &pod.owner) || before.pods.get(key) != Some(pod) {
            pods.insert(key.clone());
        }
    }
    pods.extend(before.pods.keys().filter(|key| !after.pods.contains_key(*key)).cloned());
    let unresolved = after.unresolved.keys().filter(|key| {
        let own = ObjectKey { kind: "Pod".into(), namespace: key.namespace.clone(), name: key.name.clone() };
        named.contains(&own) || !before.unresolved.contains_key(*key)
    });
    pods.extend(unresolved.cloned());
    pods
}

fn describe_file(file: &str, condition: &FileCondition) -> Option<String> {
    match condition {
        FileCondition::Valid => None,
        FileCondition::Stale { message } => {
            Some(format!("{file}: invalid, its last good version stays in force: {message}"))
        }
        FileCondition::Broken { message } => {
            Some(format!("{file}: invalid, what it declares is left as it is: {message}"))
        }
        FileCondition::Conflict { message } => Some(format!("{file}: {message}")),
    }
}

fn api_event(event: keel_host::events::Event) -> keel_api::Event {
    keel_api::Event {
        seq: event.seq,
        time_ms: event.time_ms,
        warning: event.warning,
        object: event.object,
        reason: event.reason,
        message: event.message,
        count: event.count,
    }
}

async fn say(events: &EventSender, event: ControlEvent) {
    // Nobody listens any more: the operation goes on all the same.
    let _ = events.send(event).await;
}

async fn end(events: &EventSender, exit_code: u8, message: &str, hints: &[&str]) -> Result<(), ControlError> {
    let hints = hints.iter().map(|hint| hint.to_string()).collect();
    say(events, ControlEvent::Result { exit_code, message: message.into(), hints }).await;
    Ok(())
}

fn ended(_: keel_engine::Ended) -> ControlError {
    ControlError::new(ErrorCode::Unavailable, "the engine is stopping")
}

/// One event: to the log on disk, to whoever watches it, and to the process' own log, which hears of repetitions only
/// when it is asked for everything.
pub(crate) fn record(
    log: &EventLog,
    recorded: &watch::Sender<u64>,
    warning: bool,
    object: &str,
    reason: &str,
    message: &str,
) {
    let again = match log.record(keel_host::now(), warning, object, reason, message) {
        Ok(event) => {
            recorded.send_replace(event.seq);
            event.count > 1
        }
        Err(error) => {
            tracing::warn!(%error, "event log");
            false
        }
    };
    match (again, warning) {
        (true, _) => tracing::debug!(object, reason, "{message}"),
        (false, true) => tracing::warn!(object, reason, "{message}"),
        (false, false) => tracing::info!(object, reason, "{message}"),
    }
}

fn storage_hooks(
    declared: Arc<Lock<Option<BTreeSet<String>>>>,
    status: watch::Receiver<Arc<Status>>,
    events: Arc<EventLog>,
    recorded: Arc<watch::Sender<u64>>,
) -> StorageHooks {
    let roots = move || {
        let declared = declared.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()?;
        Some(keel_host::image_roots(declared, &status.borrow()))
    };
    let tell = move |reason: &str, message: &str| {
        record(&events, &recorded, true, "Host/images", reason, message);
    };
    StorageHooks { roots: Box::new(roots), tell: Box::new(tell) }
}

/// Read under the lock, so that an older status never replaces a newer one.
fn write_files(files: &Lock<StatusFiles>, read: impl FnOnce() -> Status) -> Status {
    let mut files = files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let status = read();
    if let Err(error) = files.write(&status) {
        tracing::warn!(%error, "status files");
    }
    status
}

/// The engine's status with the sources' problems, numbered, and as files. Several changes in between are one.
async fn publish(
    mut known: watch::Receiver<bool>,
    mut status: watch::Receiver<Arc<Status>>,
    mut problems: watch::Receiver<Vec<String>>,
    snapshots: watch::Sender<Snapshot>,
    files: Arc<Lock<StatusFiles>>,
) {
    /// Files are for people and slow tools.
    const PAUSE: Duration = Duration::from_millis(100);
    if known.wait_for(|known| *known).await.is_err() {
        return;
    }
    let mut revision = 0;
    loop {
        revision += 1;
        let whole = write_files(&files, || {
            let mut whole = Status::clone(&status.borrow_and_update());
            whole.problems.extend(problems.borrow_and_update().iter().cloned());
            whole
        });
        snapshots.send_replace(Snapshot { revision, status: Arc::new(whole) });
        tokio::time::sleep(PAUSE).await;
        let changed = tokio::select! {
            // Both cancel-safe: a change that is missed by one poll is seen by the next.
            changed = status.changed() => changed,
            changed = problems.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}
