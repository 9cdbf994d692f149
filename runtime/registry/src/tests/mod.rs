//! Pulls against a hostile server in this process and against a real registry.

mod fixture;
mod garbage;
mod hostile;
mod index;
mod mirrors;
mod push;
mod real;
mod referrers;
mod server;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use keel_store::{Image, Store};

use crate::{Client, ClientOptions, OnProgress, Platform, PullError, PullProgress, RetryPolicy, Timeouts};

/// A client that loses patience quickly and knows nothing of this host's logins and certificates.
fn options() -> ClientOptions {
    ClientOptions {
        auth_files: Vec::new(),
        certs_dirs: Vec::new(),
        hosts_dirs: Vec::new(),
        registries_conf: Vec::new(),
        timeouts: Timeouts { connect: Duration::from_secs(5), no_progress: Duration::from_millis(700) },
        retry: RetryPolicy {
            base: Duration::from_millis(5),
            cap: Duration::from_millis(50),
            ..RetryPolicy::default()
        },
        ..ClientOptions::default()
    }
}

/// A store in a directory that goes away with it.
struct Bench {
    store: Arc<Store>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        Self { store, dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    async fn pull(&self, options: ClientOptions, reference: &str) -> Result<Image, PullError> {
        let amd64 = Platform::parse("linux/amd64").unwrap();
        self.pull_for(options, reference, amd64).await
    }

    async fn pull_for(
        &self,
        options: ClientOptions,
        reference: &str,
        platform: Platform,
    ) -> Result<Image, PullError> {
        Client::new(options).pull(&self.store, reference, platform, silent()).await
    }

    /// Contents of a file as the topmost layer that has it shows it.
    fn file(&self, image: &Image, path: &str) -> Vec<u8> {
        for layer in image.layers.iter().rev() {
            let fs = self.path().join("layers").join(layer.diff_id.hex()).join("fs");
            if let Ok(bytes) = std::fs::read(fs.join(path)) {
                return bytes;
            }
        }
        panic!("{path} is in no layer");
    }

    /// What unfinished work left behind.
    fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for dir in ["partial", "layers"] {
            for entry in std::fs::read_dir(self.path().join(dir)).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if dir == "partial" || name.len() != 64 {
                    found.push(format!("{dir}/{name}"));
                }
            }
        }
        found
    }
}

fn silent() -> OnProgress {
    Arc::new(|_| {})
}

/// Keeps every report.
fn recorder() -> (OnProgress, Arc<Mutex<Vec<PullProgress>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    (Arc::new(move |progress| sink.lock().unwrap().push(progress)), seen)
}

/// Polls until `condition` holds.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
