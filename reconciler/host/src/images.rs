//! Images: the store, pulls, and the one image that needs no registry.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use keel_engine::ports::{Done, Progress};
use keel_manifest::model::PullPolicy;
use keel_plan::{LayerState, LayerStatus, PullSecret, PullStatus};
use keel_registry::{InlineAuth, PullError, PullOptions};
use keel_store::{ConfigSpec, Content, FileSpec, Image, LayerSpec, Store};

use tokio::sync::Notify;

use crate::RealHost;
use crate::error::HostError;
use crate::paths::Paths;
use crate::state::names;

/// Made from the running program itself, so that a first try needs neither a registry nor a download.
pub const DEMO_IMAGE: &str = "evenkeel.dev/hello:latest";

/// Pulls under way, by image, to break them off.
#[derive(Debug, Default)]
pub(crate) struct Pulls(Mutex<BTreeMap<String, Arc<Notify>>>);

impl Pulls {
    fn begin(&self, image: &str) -> Arc<Notify> {
        self.lock().entry(image.to_string()).or_default().clone()
    }

    fn end(&self, image: &str) {
        self.lock().remove(image);
    }

    /// One that has not begun yet, or has just ended, is not waited for.
    pub(crate) fn cancel(&self, image: &str) {
        if let Some(pull) = self.lock().get(image) {
            pull.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Notify>>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// How registries are reached.
#[derive(Clone, Debug, Default)]
pub struct Registries {
    /// `host[:port]` that are spoken to without TLS. Loopback always is.
    pub insecure: Vec<String>,
    /// Directory of `<host[:port]>/*.crt`, as Docker's `certs.d`.
    pub certs_dir: Option<PathBuf>,
    /// `config.json` of Docker or `auth.json` of podman.
    pub auth_file: Option<PathBuf>,
}

/// Opens the store of an instance. What a crash left unfinished is swept away.
pub fn open_store(paths: &Paths) -> Result<Arc<Store>, HostError> {
    Store::open(paths.root()).map(Arc::new).map_err(|source| HostError::Store(Box::new(source)))
}

/// Names the image records that do not read: the store has set them aside, and their images are pulled again when they
/// are needed.
pub(crate) fn tell_damaged(store: &Store, paths: &Paths) -> Result<(), HostError> {
    // Looking at them is what sets them aside.
    store.images().map_err(|e| HostError::Store(Box::new(e)))?;
    for name in names(&paths.images())?.iter().filter(|name| name.ends_with(".damaged")) {
        let path = paths.images().join(name);
        tracing::warn!(path = %path.display(), "an image record is damaged and set aside (hint: look at it, then remove it)");
    }
    Ok(())
}

impl RealHost {
    pub(crate) fn image(&self, reference: &str) -> Result<Image, HostError> {
        let found = self.store.image(&canonical(reference)?).map_err(|e| HostError::Store(Box::new(e)))?;
        found.ok_or_else(|| HostError::ImageMissing(reference.to_string()))
    }

    /// By canonical reference.
    pub(crate) fn image_digests(&self) -> Result<BTreeMap<String, String>, HostError> {
        let images = self.store.images().map_err(|e| HostError::Store(Box::new(e)))?;
        Ok(images
            .into_iter()
            .map(|image| (image.reference.clone(), image.manifest_digest.to_string()))
            .collect())
    }

    pub(crate) fn pull(
        &self,
        image: &str,
        policy: PullPolicy,
        secrets: &[PullSecret],
        report: &(dyn Fn(Progress) + Sync),
    ) -> Result<Done, HostError> {
        let reference = canonical(image)?;
        let present = self.store.image(&reference).map_err(|e| HostError::Store(Box::new(e)))?.is_some();
        match policy {
            PullPolicy::IfNotPresent | PullPolicy::Never if present => return Ok(Done::Done),
            PullPolicy::Never => return Err(HostError::NeverPulled(image.to_string())),
            _ => {}
        }
        if reference == DEMO_IMAGE {
            if !present {
                make_demo_image(&self.store)?;
            }
            return Ok(Done::Done);
        }
        let pulled = match self.fetch(&reference, secrets, report) {
            // Once: if what went is not enough, the next try is the engine's.
            Err(error) if keel_store::is_no_space(&error) && self.make_room() => {
                self.fetch(&reference, secrets, report)
            }
            other => other,
        };
        self.good.pulled(&reference, pulled.is_err());
        pulled
    }

    fn fetch(
        &self,
        reference: &str,
        secrets: &[PullSecret],
        report: &(dyn Fn(Progress) + Sync),
    ) -> Result<Done, HostError> {
        // The client reports from tasks that may outlive a borrow: it leaves its numbers here, and this thread passes
        // them on while it waits.
        let latest: Arc<Mutex<Option<Progress>>> = Arc::default();
        let sink = latest.clone();
        let name = reference.to_string();
        let on_progress = move |progress: keel_registry::PullProgress| {
            let seen = pull_status(&name, progress);
            *sink.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(seen);
        };
        let options = PullOptions { auth: logins(secrets), ..PullOptions::default() };
        let pull = self.registry.pull_with(&self.store, reference, options, Arc::new(on_progress));
        let pass_on = || {
            let seen = latest.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            if let Some(seen) = seen {
                report(seen);
            }
        };
        let cancelled = self.pulls.begin(reference);
        let result = self.runtime.block_on(async {
            tokio::pin!(pull);
            let stop = cancelled.notified();
            tokio::pin!(stop);
            loop {
                // Polling the same pinned futures again loses nothing.
                tokio::select! {
                    result = &mut pull => return Some(result),
                    () = &mut stop => return None,
                    () = tokio::time::sleep(PROGRESS_INTERVAL) => pass_on(),
                }
            }
        });
        self.pulls.end(reference);
        pass_on();
        let Some(result) = result else { return Err(HostError::Cancelled(reference.to_string())) };
        match result {
            Ok(_) => Ok(Done::Done),
            Err(error) => Err(HostError::Pull {
                image: reference.to_string(),
                retry: error.is_retryable(),
                without: without(secrets, &error),
                source: Box::new(error),
            }),
        }
    }
}

/// The client's report in the words of the views, without speeds.
pub fn pull_status(image: &str, progress: keel_registry::PullProgress) -> PullStatus {
    let layer = |layer: keel_registry::LayerProgress| LayerStatus {
        digest: layer.digest.to_string(),
        state: match layer.state {
            keel_registry::LayerState::Queued => LayerState::Queued,
            keel_registry::LayerState::Fetching => LayerState::Fetching,
            keel_registry::LayerState::Done => LayerState::Done,
            keel_registry::LayerState::Present => LayerState::Present,
        },
        done_bytes: layer.done_bytes,
        total_bytes: layer.total_bytes,
        bytes_per_second: None,
        seconds_left: None,
    };
    PullStatus {
        image: image.to_owned(),
        done_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
        layers_done: progress.layers_done,
        layers_total: progress.layers_total,
        layers: progress.layers.into_iter().map(layer).collect(),
        waiting: progress.waiting.map(|waiting| waiting.reason),
        ..PullStatus::default()
    }
}

fn logins(secrets: &[PullSecret]) -> Vec<InlineAuth> {
    let usable = secrets.iter().filter_map(|secret| Some((secret, secret.config.as_ref().ok()?)));
    usable
        .map(|(secret, config)| InlineAuth { name: secret.name.clone(), config_json: config.to_vec() })
        .collect()
}

/// The Secrets that could not be used, where a login may be what is missing.
fn without(secrets: &[PullSecret], error: &PullError) -> Option<String> {
    let about_logins = matches!(
        error,
        PullError::Unauthorized { .. } | PullError::Denied { .. } | PullError::NotFound { .. }
    );
    let problems: Vec<&str> =
        secrets.iter().filter_map(|secret| secret.config.as_ref().err().map(String::as_str)).collect();
    (about_logins && !problems.is_empty()).then(|| problems.join("; "))
}

/// Often enough for a progress bar, rarely enough for an event stream.
const PROGRESS_INTERVAL: std::time::Duration = std::time::Duration::from_millis(200);

/// The client for these settings.
pub fn client(registries: &Registries) -> keel_registry::Client {
    let mut options = keel_registry::ClientOptions::default();
    options.insecure_registries.extend(registries.insecure.iter().cloned());
    // What the operator names comes before the places that every tool looks at.
    options.certs_dirs.splice(0..0, registries.certs_dir.iter().cloned());
    options.auth_files.splice(0..0, registries.auth_file.iter().cloned());
    keel_registry::Client::new(options)
}

fn canonical(reference: &str) -> Result<String, HostError> {
    keel_store::canonical_reference(reference).map_err(|source| HostError::Pull {
        image: reference.to_string(),
        retry: false,
        without: None,
        source: Box::new(source),
    })
}

/// One static binary and an account that is not root.
pub(crate) fn make_demo_image(store: &Store) -> Result<(), HostError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| HostError::Pull {
        image: DEMO_IMAGE.to_string(),
        retry: false,
        without: None,
        source,
    };
    let program = std::env::current_exe().map_err(|e| failed(Box::new(e)))?;
    let layer = LayerSpec {
        files: vec![
            FileSpec::new("keel", 0o755, Content::File(program)),
            FileSpec::new(
                "etc/passwd",
                0o644,
                Content::Bytes(b"hello:x:65532:65532:hello:/:/keel\n".to_vec()),
            ),
            FileSpec::new("etc/group", 0o644, Content::Bytes(b"hello:x:65532:\n".to_vec())),
            FileSpec::new("tmp", 0o1777, Content::Dir),
        ],
    };
    let config = ConfigSpec {
        entrypoint: vec!["/keel".into(), "hello".into()],
        env: vec!["PATH=/".into()],
        user: Some("hello".into()),
        exposed_ports: vec!["8080/tcp".into()],
        pinned: true,
        ..ConfigSpec::default()
    };
    store.build_image(DEMO_IMAGE, &[layer], &config).map_err(|e| failed(Box::new(e)))?;
    Ok(())
}
