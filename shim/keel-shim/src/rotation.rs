//! The files of a log: `log` is the current one, `log.1` the one before, and so on; `log.2.gz` is one that was compressed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The next file while it waits for the current one to make room. It is there before anything moves, so a full disk
/// leaves everything as it was; and as long as it is there, a rotation is not finished.
const NEXT: &str = "new";
/// What a compressed file is called beyond its number.
const PACKED: &str = "gz";
/// A file while it is being compressed.
const PACKING: &str = "packing";

/// `log.new`, which becomes `log` by [`shift`].
pub(crate) fn next(path: &Path) -> PathBuf {
    suffixed(path, NEXT)
}

/// `log.packing`, which becomes a compressed file by [`packed`].
pub(crate) fn packing(path: &Path) -> PathBuf {
    suffixed(path, PACKING)
}

/// `log.1` and so on.
pub(crate) fn numbered(path: &Path, number: u32) -> PathBuf {
    suffixed(path, &number.to_string())
}

fn compressed(path: &Path, number: u32) -> PathBuf {
    suffixed(&numbered(path, number), PACKED)
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// `log` becomes `log.1`, `log.1` becomes `log.2`, and so on; the oldest is replaced; `log.new` becomes `log`.
pub(crate) fn shift(path: &Path, files: u32) -> io::Result<()> {
    let backups = files - 1;
    if backups > 0 && path.exists() {
        // Killed half-way, the numbers have a hole, up to which files have moved already.
        let hole = (1..backups).find(|n| !is_there(path, *n)).unwrap_or(backups);
        for n in (1..hole).rev() {
            // Where a number has both forms, the plain one counts: so the other goes first, or last.
            if numbered(path, n).exists() {
                fs::rename(numbered(path, n), numbered(path, n + 1))?;
                remove_if_there(&compressed(path, n + 1))?;
            } else {
                remove_if_there(&numbered(path, n + 1))?;
                rename_if_there(&compressed(path, n), &compressed(path, n + 1))?;
            }
        }
        fs::rename(path, numbered(path, 1))?;
        remove_if_there(&compressed(path, 1))?;
    }
    fs::rename(next(path), path)
}

/// Removes the oldest files until the rest is no larger than `most`.
pub(crate) fn keep_within(path: &Path, most: u64) -> io::Result<()> {
    let mut sum = 0_u64;
    for n in (1..).take_while(|n| is_there(path, *n)) {
        let both = [numbered(path, n), compressed(path, n)];
        let sizes = both.iter().filter_map(|path| fs::metadata(path).ok());
        sum = sum.saturating_add(sizes.map(|found| found.len()).sum());
        if sum > most {
            remove_if_there(&numbered(path, n))?;
            remove_if_there(&compressed(path, n))?;
        }
    }
    Ok(())
}

/// Finishes what was killed half-way: no hole in the numbers, no file twice, none half compressed.
pub(crate) fn finish(path: &Path, files: u32) {
    if next(path).exists() {
        // If it does not work now, the next rotation finds the same.
        let _ = shift(path, files);
    }
    let _ = fs::remove_file(packing(path));
    for n in (1..).take_while(|n| is_there(path, *n)) {
        if numbered(path, n).exists() {
            let _ = fs::remove_file(compressed(path, n));
        }
    }
}

/// The youngest file that is to be compressed and is not.
pub(crate) fn first_plain(path: &Path) -> Option<PathBuf> {
    (1..).take_while(|n| is_there(path, *n)).map(|n| numbered(path, n)).find(|file| file.exists())
}

/// `log.packing` takes the place of the file that it was made of, which may have another number by now or be gone.
pub(crate) fn packed(path: &Path, is_source: impl Fn(&fs::Metadata) -> bool) -> io::Result<()> {
    let source = |n: &u32| fs::metadata(numbered(path, *n)).is_ok_and(|found| is_source(&found));
    match (1..).take_while(|n| is_there(path, *n)).find(source) {
        Some(n) => {
            fs::rename(packing(path), compressed(path, n))?;
            fs::remove_file(numbered(path, n))
        }
        None => fs::remove_file(packing(path)),
    }
}

fn is_there(path: &Path, number: u32) -> bool {
    numbered(path, number).exists() || compressed(path, number).exists()
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    present(fs::rename(from, to))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    present(fs::remove_file(path))
}

fn present(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        /// Each word is `suffix=text`, nothing before `=` for the log itself.
        fn new(name: &str, files: &str) -> Dir {
            let dir = std::env::temp_dir().join(format!("keel-rotation-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            for (suffix, text) in files.split(' ').filter_map(|word| word.split_once('=')) {
                fs::write(dir.join(format!("log{suffix}")), text).unwrap();
            }
            Dir(dir)
        }

        fn log(&self) -> PathBuf {
            self.0.join("log")
        }

        fn files(&self) -> String {
            let mut names: Vec<_> = fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            let word = |path: &PathBuf| {
                let name = path.file_name().unwrap().to_str().unwrap();
                format!("{}={}", name.strip_prefix("log").unwrap(), fs::read_to_string(path).unwrap())
            };
            names.iter().map(word).collect::<Vec<_>>().join(" ")
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn compressed_files_move_like_others_and_no_number_has_two() {
        let check = |files: &str, expected: &str| {
            let dir = Dir::new("shift", files);
            shift(&dir.log(), 4).unwrap();
            assert_eq!(dir.files(), expected, "{files}");
        };
        check("=d .1=c .2.gz=b .3.gz=a .new=e", "=e .1=d .2=c .3.gz=b");
        check("=d .1=c .2=b .3.gz=a .new=e", "=e .1=d .2=c .3=b");
        check("=d .1=c .2.gz=b .3=a .new=e", "=e .1=d .2=c .3.gz=b");
        check("=d .1.gz=c .new=e", "=e .1=d .2.gz=c");
    }

    #[test]
    fn a_budget_removes_the_oldest() {
        let check = |most: u64, expected: &str| {
            let dir = Dir::new("budget", "=now .1=aaaa .2.gz=bb .3.gz=cc");
            keep_within(&dir.log(), most).unwrap();
            assert_eq!(dir.files(), expected, "{most}");
        };
        check(8, "=now .1=aaaa .2.gz=bb .3.gz=cc");
        check(7, "=now .1=aaaa .2.gz=bb");
        check(5, "=now .1=aaaa");
        check(0, "=now");
    }

    #[test]
    fn what_was_killed_half_way_is_finished() {
        let check = |files: &str, expected: &str| {
            let dir = Dir::new("finish", files);
            finish(&dir.log(), 4);
            assert_eq!(dir.files(), expected, "{files}");
        };
        check("=c .1=b .2=a .2.gz=a .packing=x", "=c .1=b .2=a");
        check("=d .2=c .3.gz=b .new=", "= .1=d .2=c .3.gz=b");
    }

    #[test]
    fn a_compressed_file_follows_the_one_it_was_made_of() {
        let check = |files: &str, text: &str, expected: &str| {
            let dir = Dir::new("packed", files);
            packed(&dir.log(), |found| found.len() == text.len() as u64).unwrap();
            assert_eq!(dir.files(), expected, "{files}");
        };
        check("=e .1=dd .2=ccc .packing=x", "ccc", "=e .1=dd .2.gz=x");
        check("=e .1=dd .packing=x", "ccc", "=e .1=dd");
    }
}
