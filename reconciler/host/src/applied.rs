//! Objects that were applied by hand, one small file each: they outlive the command, the daemon and the boot.

use std::collections::{BTreeMap, BTreeSet};

use keel_manifest::{Object, ObjectKey, Origin, parse};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::HostError;
use crate::paths::{Paths, bounded_name};
use crate::state::{At, names, read_json, remove_file, write_together};

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    origin: Origin,
    manifest: Value,
}

/// The directory of applied objects.
#[derive(Clone, Debug)]
pub struct Applied {
    dir: std::path::PathBuf,
}

impl Applied {
    pub fn open(paths: &Paths) -> Applied {
        Applied { dir: paths.applied() }
    }

    /// What does not read any more (written by a later version, or damaged) is reported and left out.
    pub fn load(&self) -> Result<BTreeMap<ObjectKey, Object>, HostError> {
        let mut objects = BTreeMap::new();
        for name in names(&self.dir)? {
            let path = self.dir.join(&name);
            if !name.ends_with(RECORD) {
                continue;
            }
            let Some(record) = read_json::<Record>(&path)? else { continue };
            let parsed = parse(&record.origin.file, record.manifest.to_string().as_bytes());
            match parsed.objects.into_iter().next() {
                Some(mut object) if !parsed.diagnostics.iter().any(|d| d.is_error()) => {
                    object.origin = record.origin;
                    objects.insert(object.key(), object);
                }
                _ => {
                    let message = parsed.diagnostics.first().map(|d| d.message.clone()).unwrap_or_default();
                    tracing::warn!(path = %path.display(), message, "applied object does not read any more; left out");
                }
            }
        }
        Ok(objects)
    }

    /// What has a record and is not among the objects that could be read: nobody knows what it says, so nothing that runs
    /// because of it may be touched.
    pub fn damaged(&self, read: &BTreeMap<ObjectKey, Object>) -> Result<BTreeSet<ObjectKey>, HostError> {
        let keys = names(&self.dir)?.into_iter().filter_map(|name| key_of(&name));
        Ok(keys.filter(|key| !read.contains_key(key)).collect())
    }

    /// Forgets every damaged record but those of `damaged`.
    pub fn keep_damaged(
        &self,
        read: &BTreeMap<ObjectKey, Object>,
        damaged: &BTreeSet<ObjectKey>,
    ) -> Result<(), HostError> {
        for name in names(&self.dir)? {
            let Some(key) = key_of(&name) else { continue };
            let current = read.contains_key(&key) && name.ends_with(RECORD);
            if !current && !damaged.contains(&key) {
                remove_file(&self.dir.join(name))?;
            }
        }
        Ok(())
    }

    /// Writes the difference. New and changed objects first: a crash in between forgets nothing.
    pub fn store(
        &self,
        before: &BTreeMap<ObjectKey, Object>,
        after: &BTreeMap<ObjectKey, Object>,
    ) -> Result<(), HostError> {
        let mut changed = Vec::new();
        for (key, object) in after.iter().filter(|(key, object)| before.get(*key) != Some(*object)) {
            let record =
                Record { version: VERSION, origin: object.origin.clone(), manifest: object.to_json() };
            let path = self.dir.join(file_name(key));
            let text = serde_json::to_vec(&record).map_err(std::io::Error::other).at("encode", &path)?;
            changed.push((path, text));
        }
        write_together(&self.dir, &changed)?;
        for key in before.keys().filter(|key| !after.contains_key(*key)) {
            remove_file(&self.dir.join(file_name(key)))?;
        }
        Ok(())
    }
}

const RECORD: &str = ".json";
/// What `read_json` leaves of a record that does not parse.
const SET_ASIDE: &str = ".broken";

/// The way back from [`file_name`], also for a record that was set aside.
fn key_of(name: &str) -> Option<ObjectKey> {
    let mut parts = name.strip_suffix(RECORD).or_else(|| name.strip_suffix(SET_ASIDE))?.splitn(3, '_');
    let kind = match parts.next()? {
        "pod" => "Pod",
        "deployment" => "Deployment",
        "configmap" => "ConfigMap",
        "secret" => "Secret",
        _ => return None,
    };
    let (namespace, name) = (parts.next()?.to_owned(), parts.next()?.to_owned());
    Some(ObjectKey { kind: kind.into(), namespace, name })
}

/// Names are DNS labels and subdomains: no separator of ours and no path can be in them.
fn file_name(key: &ObjectKey) -> String {
    let whole = format!("{}_{}_{}", key.kind.to_ascii_lowercase(), key.namespace, key.name);
    format!("{}.json", bounded_name(&whole))
}
