//! What `-f` names: a directory (recursive), a file, or standard input.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use keel_api::{Diagnostic, InputFile};
use keel_manifest::{MAX_FILE_BYTES, Parsed};
use keel_source::FileState;

use crate::failure::{Failure, Outcome};

/// What helps with a file that cannot be read.
const UNREADABLE: &str = "make it readable, or move it elsewhere if it is not a manifest";

/// Files as read; problems of those that could not be.
#[derive(Debug, Default)]
pub(crate) struct Input {
    pub(crate) files: Vec<(String, Vec<u8>)>,
    pub(crate) problems: Vec<Diagnostic>,
    /// Named twice, e.g. through a directory and by itself, a file is read once.
    seen: BTreeSet<PathBuf>,
}

impl Input {
    pub(crate) fn read(names: &[PathBuf]) -> Outcome<Input> {
        let mut input = Input::default();
        for name in names {
            if name == Path::new("-") {
                input.add("<stdin>", read_bounded(io::stdin().lock()));
                continue;
            }
            match fs::metadata(name) {
                Ok(found) if found.is_dir() => input.directory(name)?,
                Ok(_) => input.file(name),
                Err(error) => {
                    return Err(Failure::io("read", name.display(), &error).code(keel_api::exit::INVALID));
                }
            }
        }
        Ok(input)
    }

    /// All files parsed, with the problems of reading first.
    pub(crate) fn parse(&self, namespace: Option<&str>) -> (Vec<keel_manifest::Object>, Vec<Diagnostic>) {
        let mut objects = Vec::new();
        let mut problems = self.problems.clone();
        for (name, text) in &self.files {
            let parsed = keel_manifest::parse(name, text);
            objects.extend(parsed.objects);
            problems.extend(parsed.diagnostics);
        }
        if let Some(namespace) = namespace {
            problems.extend(keel_manifest::place_in(&mut objects, namespace));
        }
        problems.extend(keel_manifest::check(&objects));
        problems.sort();
        // Objects of one file are compared when it is parsed, and again with those of others.
        problems.dedup();
        (objects, problems)
    }

    /// For the wire, which carries text. `None`: a file is no UTF-8, which [`Input::parse`] says with its place.
    pub(crate) fn request_files(&self) -> Option<Vec<InputFile>> {
        let file = |(name, text): &(String, Vec<u8>)| {
            let text = String::from_utf8(text.clone()).ok()?;
            Some(InputFile { name: name.clone(), text })
        };
        self.files.iter().map(file).collect()
    }

    /// As the daemon reads it: what it would skip or refuse is not called good here.
    fn directory(&mut self, dir: &Path) -> Outcome {
        let listed = keel_source::list(dir, &keel_source::Options::default())
            .map_err(|error| Failure::of(&error).code(keel_api::exit::INVALID))?;
        // One file under two names in one directory is two manifests, as for the daemon.
        let earlier = self.seen.clone();
        for (name, state) in listed.files {
            let path = dir.join(name);
            if let Ok(real) = fs::canonicalize(&path) {
                if earlier.contains(&real) {
                    continue;
                }
                self.seen.insert(real);
            }
            let name = path.display().to_string();
            let refused = match state {
                FileState::Text(text) => {
                    self.files.push((name, text.to_vec()));
                    continue;
                }
                FileState::TooLarge => Parsed::too_large(&name, None),
                FileState::Unreadable(reason) => Parsed::unreadable(&name, reason, Some(UNREADABLE.into())),
            };
            self.problems.extend(refused.diagnostics);
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) {
        if !self.is_new(path) {
            return;
        }
        let name = path.display().to_string();
        // Pipes and devices are read like files: `-f <(generate)` is a habit.
        self.add(&name, fs::File::open(path).and_then(read_bounded));
    }

    /// What cannot be resolved is told about where it is read.
    fn is_new(&mut self, path: &Path) -> bool {
        fs::canonicalize(path).map_or(true, |path| !path.is_file() || self.seen.insert(path))
    }

    fn add(&mut self, name: &str, text: io::Result<Vec<u8>>) {
        let refused = match text {
            Ok(text) if text.len() > MAX_FILE_BYTES => Parsed::too_large(name, None),
            Ok(text) => return self.files.push((name.to_owned(), text)),
            Err(error) => {
                let reason = error.raw_os_error().map_or_else(|| error.to_string(), keel_sys::errno_text);
                Parsed::unreadable(name, reason, Some(UNREADABLE.into()))
            }
        };
        self.problems.extend(refused.diagnostics);
    }
}

fn read_bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    from.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_read_in_order_without_editors_leftovers() {
        let temp = tempfile::tempdir().unwrap();
        let sub = temp.path().join("sub");
        fs::create_dir(&sub).unwrap();
        for name in ["b.yaml", "a.yml", ".hidden.yaml", "c.yaml~", "notes.txt", "sub/d.json"] {
            fs::write(temp.path().join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", temp.path().join("z.yaml")).unwrap();
        let input = Input::read(&[temp.path().to_owned()]).unwrap();
        let read: Vec<&[u8]> = input.files.iter().map(|(_, text)| text.as_slice()).collect();
        assert_eq!(read, [&b"a.yml"[..], b"b.yaml", b"sub/d.json"]);
        assert_eq!(input.problems.len(), 1, "a broken link is said, not skipped");
    }

    #[test]
    fn a_directory_is_read_by_the_daemons_rules() {
        let temp = tempfile::tempdir().unwrap();
        let (dir, outside) = (temp.path().join("dir"), temp.path().join("outside.yaml"));
        fs::create_dir_all(dir.join("old.bak")).unwrap();
        for path in [&outside, &dir.join("old.bak/b.yaml"), &dir.join("a.yaml")] {
            fs::write(path, "").unwrap();
        }
        std::os::unix::fs::symlink(".", dir.join("loop")).unwrap();
        std::os::unix::fs::symlink(&outside, dir.join("out.yaml")).unwrap();
        let input = Input::read(std::slice::from_ref(&dir)).unwrap();
        let read: Vec<_> = input.files.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(read, [dir.join("a.yaml").display().to_string()], "no backup, no circle");
        assert_eq!(input.problems.len(), 1, "a link that the daemon does not follow is said");
    }

    #[test]
    fn a_file_named_twice_is_read_once() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("a.yaml");
        fs::write(&file, "").unwrap();
        let input =
            Input::read(&[temp.path().to_owned(), file, temp.path().join("../").join(temp.path())]).unwrap();
        assert_eq!(input.files.len(), 1);
    }

    #[test]
    fn a_missing_file_is_invalid_input() {
        let failure = Input::read(&["/nonexistent/x.yaml".into()]).unwrap_err();
        assert_eq!(failure.code, keel_api::exit::INVALID);
        assert_eq!(failure.message, "read /nonexistent/x.yaml: no such file or directory");
    }
}
