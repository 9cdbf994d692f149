//! Objects that were applied by hand, one small file each: they outlive the command, the daemon and the boot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use keel_manifest::{Object, ObjectKey, Origin, parse};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::HostError;
use crate::paths::{Paths, bounded_name};
use crate::state::{At, Keep, names, read_json, remove_file, write_file};

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
    dir: PathBuf,
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
            let record = match read_json::<Record>(&path)? {
                Some(record) => record,
                None => match Self::take_back(&path)? {
                    Some(record) => record,
                    None => continue,
                },
            };
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

    /// Writes the difference, all of it or nothing. What was there before stays beside it until [`Written::finish`].
    pub fn write(
        &self,
        before: &BTreeMap<ObjectKey, Object>,
        after: &BTreeMap<ObjectKey, Object>,
    ) -> Result<Written, HostError> {
        let mut written = Written { dir: self.dir.clone(), replaced: Vec::new() };
        match self.write_into(&mut written, before, after) {
            Ok(()) => Ok(written),
            Err(error) => {
                written.undo();
                Err(error)
            }
        }
    }

    fn write_into(
        &self,
        written: &mut Written,
        before: &BTreeMap<ObjectKey, Object>,
        after: &BTreeMap<ObjectKey, Object>,
    ) -> Result<(), HostError> {
        for (key, object) in after.iter().filter(|(key, object)| before.get(*key) != Some(*object)) {
            let record =
                Record { version: VERSION, origin: object.origin.clone(), manifest: object.to_json() };
            let path = self.dir.join(file_name(key));
            let text = serde_json::to_vec(&record).map_err(std::io::Error::other).at("encode", &path)?;
            written.put_aside(&path)?;
            write_file(&path, &text, Keep::Boot)?;
        }
        for key in before.keys().filter(|key| !after.contains_key(*key)) {
            let path = self.dir.join(file_name(key));
            written.put_aside(&path)?;
            remove_file(&path)?;
        }
        Ok(())
    }

    /// The record as it was before a change that a power cut has damaged.
    fn take_back(path: &Path) -> Result<Option<Record>, HostError> {
        let old = path.with_extension(OLD);
        if !old.exists() {
            return Ok(None);
        }
        fs::rename(&old, path).at("rename to", path)?;
        remove_file(&path.with_extension("broken"))?;
        Ok(read_json(path)?)
    }
}

/// A change of the applied objects that is on its way to the disk.
#[derive(Debug)]
#[must_use = "it is neither durable nor taken back"]
pub struct Written {
    dir: PathBuf,
    replaced: Vec<Replaced>,
}

#[derive(Debug)]
struct Replaced {
    path: PathBuf,
    existed: bool,
}

impl Written {
    /// A few files are flushed one by one, more of them with everything else of their file system.
    pub fn sync(&self) -> Result<(), HostError> {
        const ONE_BY_ONE: usize = 4;
        if self.replaced.is_empty() {
            return Ok(());
        }
        let dir = File::open(&self.dir).at("open", &self.dir)?;
        if self.replaced.len() > ONE_BY_ONE {
            nix::unistd::syncfs(&dir).at("sync the file system of", &self.dir)?;
            return Ok(());
        }
        for Replaced { path, .. } in &self.replaced {
            match File::open(path) {
                Ok(file) => file.sync_all().at("fsync", path)?,
                // Removed: the directory says so.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).at("open", path)?,
            }
        }
        Ok(dir.sync_all().at("fsync directory", &self.dir)?)
    }

    /// Forgets what was before.
    pub fn finish(self) {
        for Replaced { path, existed } in &self.replaced {
            if *existed && let Err(error) = remove_file(&path.with_extension(OLD)) {
                tracing::warn!(%error, "an old record stays");
            }
        }
    }

    pub fn undo(self) {
        for Replaced { path, existed } in self.replaced.iter().rev() {
            let undone = match existed {
                true => fs::rename(path.with_extension(OLD), path).at("rename to", path),
                false => remove_file(path),
            };
            if let Err(error) = undone {
                tracing::error!(%error, "an applied object could not be put back");
            }
        }
    }

    fn put_aside(&mut self, path: &Path) -> Result<(), HostError> {
        let old = path.with_extension(OLD);
        remove_file(&old)?;
        let existed = match fs::hard_link(path, &old) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error).at("link", &old)?,
        };
        self.replaced.push(Replaced { path: path.to_owned(), existed });
        Ok(())
    }
}

/// Of a record before the change that is being made.
const OLD: &str = "old";
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

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(texts: &[&str]) -> BTreeMap<ObjectKey, Object> {
        let parsed = texts.iter().flat_map(|text| parse("x.yaml", text.as_bytes()).objects);
        parsed.map(|object| (object.key(), object)).collect()
    }

    const A: &str = "{apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {k: one}}";
    const A2: &str = "{apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {k: two}}";
    const B: &str = "{apiVersion: v1, kind: ConfigMap, metadata: {name: b}}";

    fn said(applied: &Applied) -> Vec<Value> {
        applied.load().unwrap().values().map(Object::to_json).collect()
    }

    fn of(texts: &[&str]) -> Vec<Value> {
        objects(texts).values().map(Object::to_json).collect()
    }

    #[test]
    fn a_change_is_all_there_or_taken_back() {
        let temp = tempfile::tempdir().unwrap();
        let applied = Applied { dir: temp.path().to_owned() };
        let first = applied.write(&BTreeMap::new(), &objects(&[A])).unwrap();
        first.sync().unwrap();
        first.finish();
        applied.write(&objects(&[A]), &objects(&[A2, B])).unwrap().undo();
        assert_eq!(said(&applied), of(&[A]));
        applied.write(&objects(&[A]), &objects(&[B])).unwrap().undo();
        assert_eq!(said(&applied), of(&[A]), "what was removed is there again");
        // The second object cannot be written: the first one is as before.
        fs::create_dir(temp.path().join("configmap_default_b.json")).unwrap();
        applied.write(&objects(&[A]), &objects(&[A2, B])).unwrap_err();
        fs::remove_dir(temp.path().join("configmap_default_b.json")).unwrap();
        assert_eq!(said(&applied), of(&[A]));
        assert_eq!(names(temp.path()).unwrap().len(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_record_that_a_power_cut_damaged_is_as_it_was_before() {
        let temp = tempfile::tempdir().unwrap();
        let applied = Applied { dir: temp.path().to_owned() };
        applied.write(&BTreeMap::new(), &objects(&[A])).unwrap().finish();
        drop(applied.write(&objects(&[A]), &objects(&[A2])).unwrap());
        fs::write(temp.path().join("configmap_default_a.json"), "").unwrap();
        assert_eq!(said(&applied), of(&[A]));
        assert_eq!(said(&applied), of(&[A]));
        assert_eq!(applied.damaged(&applied.load().unwrap()).unwrap(), BTreeSet::new());
    }
}
