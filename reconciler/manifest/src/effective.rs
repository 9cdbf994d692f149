//! Which objects hold when some files are broken: the last good version of each file.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::check::check_change;
use crate::object::{Object, ObjectKey};
use crate::parse::Parsed;

/// What was good before: the objects of each file, and which file owns which object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LastGood {
    files: BTreeMap<String, Vec<Object>>,
    owners: BTreeMap<ObjectKey, String>,
    /// Objects of files that went away in the same round in which a broken file came, by that broken file: it may be
    /// the same file under a new name.
    held: BTreeMap<String, Vec<Object>>,
    /// Broken files without any good version, of the last round.
    never_good: BTreeSet<String>,
}

/// The state of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "camelCase")]
pub enum FileCondition {
    /// Read and in force.
    Valid,
    /// Broken; its last good version stays in force.
    Stale { message: String },
    /// Broken, and no good version is known: what it declares is left as it is.
    Broken { message: String },
    /// In force, except objects that another file declared first.
    Conflict { message: String },
}

/// What is in force now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effective {
    /// One object per key, ordered by key.
    pub objects: Vec<Object>,
    pub conditions: BTreeMap<String, FileCondition>,
    /// Objects that a broken file names and that no good version is known of: neither create nor delete them.
    pub frozen: Vec<ObjectKey>,
    pub last_good: LastGood,
}

impl LastGood {
    /// From texts kept on disk: files that no longer read are left out.
    pub fn restore(files: impl IntoIterator<Item = (String, Parsed)>) -> LastGood {
        let files: BTreeMap<_, _> =
            files.into_iter().filter(|(_, p)| !p.has_errors()).map(|(file, p)| (file, p.objects)).collect();
        LastGood { files, ..LastGood::default() }
    }

    /// The version of an object that is in force.
    fn object(&self, key: &ObjectKey) -> Option<&Object> {
        let of = |file: &String| self.files.get(file)?.iter().find(|object| object.key() == *key);
        match self.owners.get(key) {
            Some(owner) => of(owner),
            None => self.files.keys().find_map(of),
        }
    }

    /// Files that have a good version.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }
}

impl FileCondition {
    pub fn is_valid(&self) -> bool {
        *self == FileCondition::Valid
    }
}

/// Decides what is in force from what was good before and from one whole, successful reading of the directory. When
/// the directory itself could not be read, do not call this: what was in force stays.
pub fn effective(previous: &LastGood, parsed: BTreeMap<String, Parsed>) -> Effective {
    let mut result = Effective::default();
    let names: BTreeSet<String> = parsed.keys().cloned().collect();
    let mut claims: BTreeMap<String, Vec<ObjectKey>> = BTreeMap::new();
    for (file, mut parsed) in parsed {
        let refused = parsed.objects.iter().filter_map(|o| check_change(previous.object(&o.key())?, o));
        let refused: Vec<_> = refused.collect();
        parsed.diagnostics.extend(refused);
        if !parsed.has_errors() {
            result.conditions.insert(file.clone(), FileCondition::Valid);
            result.last_good.files.insert(file, parsed.objects);
            continue;
        }
        let message = summary(&parsed);
        let condition = match previous.files.get(&file) {
            Some(objects) => {
                result.last_good.files.insert(file.clone(), objects.clone());
                FileCondition::Stale { message }
            }
            None => {
                result.last_good.never_good.insert(file.clone());
                claims.insert(file.clone(), parsed.claims);
                FileCondition::Broken { message }
            }
        };
        result.conditions.insert(file, condition);
    }
    result.last_good.held = held_back(previous, &names, &claims);
    own(previous, &mut result);
    let known: BTreeSet<ObjectKey> = result.objects.iter().map(Object::key).collect();
    let claimed: BTreeSet<ObjectKey> = claims.into_values().flatten().collect();
    result.frozen = claimed.into_iter().filter(|k| !known.contains(k)).collect();
    result
}

/// Objects of files that are gone stay while a broken file without a good version may be their new home: it names
/// them, or it came in the same round in which they went.
fn held_back(
    previous: &LastGood,
    names: &BTreeSet<String>,
    claims: &BTreeMap<String, Vec<ObjectKey>>,
) -> BTreeMap<String, Vec<Object>> {
    let gone =
        || previous.files.iter().filter(|(file, _)| !names.contains(*file)).flat_map(|(_, objects)| objects);
    let mut held: BTreeMap<String, Vec<Object>> = BTreeMap::new();
    for (file, claimed) in claims {
        let is_new = !previous.never_good.contains(file);
        let moved = gone().filter(|o| is_new || claimed.contains(&o.key())).cloned();
        let objects: Vec<Object> =
            previous.held.get(file).into_iter().flatten().cloned().chain(moved).collect();
        if !objects.is_empty() {
            held.insert(file.clone(), objects);
        }
    }
    held
}

/// One object per key: the file that owned it before keeps it, else the first by name.
fn own(previous: &LastGood, result: &mut Effective) {
    let mut chosen: BTreeMap<ObjectKey, Object> = BTreeMap::new();
    for (file, objects) in &result.last_good.files {
        for object in objects {
            let key = object.key();
            let is_owner = previous.owners.get(&key).is_some_and(|owner| owner == file);
            if is_owner || !chosen.contains_key(&key) {
                chosen.insert(key, object.clone());
            }
        }
    }
    for object in result.last_good.held.values().flatten() {
        chosen.entry(object.key()).or_insert_with(|| object.clone());
    }
    for (file, objects) in &result.last_good.files {
        let lost = objects.iter().find_map(|o| {
            let winner = chosen.get(&o.key())?;
            (winner.origin.file != *file).then_some((o, winner))
        });
        if let Some((object, winner)) = lost
            && let Some(condition) = result.conditions.get_mut(file).filter(|c| c.is_valid())
        {
            *condition = FileCondition::Conflict {
                message: format!(
                    "{} at {}:{}:{} is already declared at {}:{}:{}, which stays in force",
                    object.key(),
                    object.origin.file,
                    object.origin.line,
                    object.origin.column,
                    winner.origin.file,
                    winner.origin.line,
                    winner.origin.column
                ),
            };
        }
    }
    result.last_good.owners = chosen.iter().map(|(key, o)| (key.clone(), o.origin.file.clone())).collect();
    result.objects = chosen.into_values().collect();
}

/// The first error, and how many more there are.
fn summary(parsed: &Parsed) -> String {
    let mut errors = parsed.diagnostics.iter().filter(|d| d.is_error());
    let first = errors.next().map(|d| d.one_line()).unwrap_or_default();
    match errors.count() {
        0 => first,
        more => format!("{first} (and {more} more)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    fn map(name: &str, value: &str) -> String {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{v: \"{value}\"}}\n---\n"
        )
    }

    /// Reads (file, text) pairs; answers `name=value@file` of what is in force.
    fn round(state: &mut LastGood, files: &[(&str, String)]) -> (Vec<String>, Effective) {
        let parsed = files.iter().map(|(f, t)| ((*f).to_owned(), parse(f, t.as_bytes()))).collect();
        let result = effective(state, parsed);
        *state = result.last_good.clone();
        let shown = |o: &Object| match &o.kind {
            crate::Kind::ConfigMap(map) => format!("{}={}@{}", o.name(), map.data["v"], o.origin.file),
            other => other.name().to_owned(),
        };
        (result.objects.iter().map(shown).collect(), result)
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_version() {
        let mut state = LastGood::default();
        round(&mut state, &[("a", map("x", "1")), ("b", map("w", "1"))]);
        for broken in [String::new() + "kind: ConfigMap\nmetadata: {na", map("x", "2") + "x: [\n"] {
            let (force, result) = round(&mut state, &[("a", broken), ("b", map("w", "2"))]);
            assert_eq!(force, ["w=2@b", "x=1@a"]);
            assert!(matches!(result.conditions["a"], FileCondition::Stale { .. }));
            assert!(result.conditions["b"].is_valid());
        }
        let (force, _) = round(&mut state, &[("a", map("x", "3")), ("b", map("w", "2"))]);
        assert_eq!(force, ["w=2@b", "x=3@a"]);
        let (force, _) = round(&mut state, &[("b", map("w", "2"))]);
        assert_eq!(force, ["w=2@b"], "a deleted file takes its objects along");
    }

    #[test]
    fn an_immutable_map_keeps_its_contents() {
        let mut state = LastGood::default();
        let fixed = |value: &str| map("x", value).replace("---", "immutable: true\n---");
        round(&mut state, &[("a", fixed("1"))]);
        for changed in [fixed("2"), map("x", "1"), fixed("2").replace("kind", "# a comment\nkind")] {
            for file in ["a", "b"] {
                let (force, result) = round(&mut state, &[(file, changed.clone())]);
                assert_eq!(force, ["x=1@a"], "{file}: {changed}");
                assert!(!result.conditions[file].is_valid());
            }
            round(&mut state, &[("a", fixed("1"))]);
        }
        let (force, _) = round(&mut state, &[("a", fixed("1").replace("kind", "# a comment\nkind"))]);
        assert_eq!(force, ["x=1@a"]);
        round(&mut state, &[]);
        let (force, _) = round(&mut state, &[("a", fixed("2"))]);
        assert_eq!(force, ["x=2@a"], "deleted first");
    }

    #[test]
    fn a_file_that_was_never_good_freezes_what_it_names() {
        let mut state = LastGood::default();
        let broken = map("x", "1") + "kind: Pod\nmetadata: {name: p}\n";
        let (force, result) = round(&mut state, &[("a", broken)]);
        assert_eq!(force, [""; 0]);
        let names: Vec<String> = result.frozen.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["ConfigMap default/x", "Pod default/p"]);
        assert!(matches!(result.conditions["a"], FileCondition::Broken { .. }));
    }

    #[test]
    fn the_first_owner_keeps_an_object_that_two_files_declare() {
        let mut state = LastGood::default();
        round(&mut state, &[("b", map("x", "1"))]);
        let both = [("a", map("x", "2") + &map("w", "2")), ("b", map("x", "1"))];
        let (force, result) = round(&mut state, &both);
        assert_eq!(force, ["w=2@a", "x=1@b"]);
        let FileCondition::Conflict { message } = &result.conditions["a"] else { panic!() };
        assert_eq!(
            message,
            "ConfigMap default/x at a:1:1 is already declared at b:1:1, which stays in force"
        );
        let (force, result) = round(&mut state, &both[..1]);
        assert_eq!(force, ["w=2@a", "x=2@a"], "the other takes over");
        assert!(result.conditions["a"].is_valid());
    }

    #[test]
    fn a_file_that_is_renamed_and_broken_at_once_loses_nothing() {
        let mut state = LastGood::default();
        round(&mut state, &[("a", map("x", "1")), ("c", map("z", "1"))]);
        for _ in 0..3 {
            let (force, _) = round(&mut state, &[("b", "kind: [\n".into()), ("c", map("z", "1"))]);
            assert_eq!(force, ["x=1@a", "z=1@c"]);
        }
        let (force, _) = round(&mut state, &[("b", "kind: [\n".into())]);
        assert_eq!(force, ["x=1@a"], "what goes later, while b is known to be broken, goes");
        let (force, _) = round(&mut state, &[("b", map("x", "2"))]);
        assert_eq!(force, ["x=2@b"]);
        let (force, _) = round(&mut state, &[]);
        assert_eq!(force, [""; 0]);
    }

    #[test]
    fn what_is_restored_counts_as_good() {
        let texts = [("a", map("x", "1")), ("b", "kind: [".to_owned())];
        let mut state =
            LastGood::restore(texts.iter().map(|(f, t)| ((*f).to_owned(), parse(f, t.as_bytes()))));
        assert_eq!(state.files().collect::<Vec<_>>(), ["a"]);
        let (force, _) = round(&mut state, &[("a", "kind: [".to_owned())]);
        assert_eq!(force, ["x=1@a"]);
    }
}
