//! The watcher on the real kernel.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::{Condition, FileState, Keep, ListError, Mode, Options, Snapshot, Watcher, list};

/// Longest wait for a snapshot; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory of its own that is removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("keel-source-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Dir(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

struct Watched {
    runtime: tokio::runtime::Runtime,
    watcher: Watcher,
}

impl Watched {
    fn new(dir: &Path, options: Options) -> Watched {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        Watched { runtime, watcher: Watcher::new(dir, options).unwrap() }
    }

    fn next(&mut self) -> Arc<Snapshot> {
        self.next_within(PATIENCE).expect("a snapshot in time")
    }

    fn next_within(&mut self, time: Duration) -> Option<Arc<Snapshot>> {
        let next = async { tokio::time::timeout(time, self.watcher.next()).await };
        self.runtime.block_on(next).ok().map(|s| s.expect("the thread lives"))
    }

    /// Nothing new for as long as a change would take several times over.
    fn stays_quiet(&mut self) {
        let found = self.next_within(Duration::from_millis(1200));
        assert!(found.is_none(), "unexpected {found:?}");
    }
}

/// Relisting is rare, so that the tests see whether events work.
fn by_events() -> Options {
    Options { relist: Duration::from_secs(3600), ..Options::default() }
}

/// `name=text` of each file; other states by their first word.
fn shown(snapshot: &Snapshot) -> Vec<String> {
    let show = |(name, state): (&String, &FileState)| match state {
        FileState::Text(text) => format!("{name}={}", String::from_utf8_lossy(text)),
        FileState::Unreadable(reason) => format!("{name}!{reason}"),
        FileState::TooLarge => format!("{name}!large"),
    };
    snapshot.files.iter().map(show).collect()
}

#[test]
fn a_listing_takes_manifests_of_all_folders_and_nothing_else() {
    let dir = Dir::new();
    for name in ["b.yaml", "a.yml", "sub/c.json", "sub/deeper/d.yaml"] {
        dir.write(name, "x");
    }
    for name in ["web.yaml~", ".hidden.yaml", "#a.yaml#", "4913", "notes.txt", ".git/x.yaml", "old~/x.yaml"] {
        dir.write(name, "y");
    }
    let snapshot = list(&dir.0, &Options::default()).unwrap();
    assert_eq!(shown(&snapshot), ["a.yml=x", "b.yaml=x", "sub/c.json=x", "sub/deeper/d.yaml=x"]);
    assert_eq!(snapshot.condition, Condition::Ok);
    let one = list(&dir.path("b.yaml"), &Options::default()).unwrap();
    assert_eq!(shown(&one), ["b.yaml=x"]);
}

#[test]
fn what_cannot_be_read_is_named_and_the_rest_goes_on() {
    let dir = Dir::new();
    dir.write("ok.yaml", "x");
    dir.write("large.yaml", &"x".repeat((1 << 20) + 1));
    dir.write("most.yaml", &"x".repeat(1 << 20));
    symlink("nowhere", dir.path("dangling.yaml")).unwrap();
    symlink("/etc/hostname", dir.path("outside.yaml")).unwrap();
    symlink("/etc", dir.path("etc")).unwrap();
    symlink(".", dir.path("loop")).unwrap();
    symlink("ok.yaml", dir.path("inside.yaml")).unwrap();
    fs::create_dir(dir.path("folder.yaml")).unwrap();
    let fifo = std::process::Command::new("mkfifo").arg(dir.path("fifo.yaml")).status().unwrap();
    assert!(fifo.success());
    let snapshot = list(&dir.0, &Options::default()).unwrap();
    let real = fs::canonicalize(&dir.0).unwrap();
    let outside = |target: &str| format!("the symlink leads to {target}, outside of {}", real.display());
    let FileState::Unreadable(dangling) = &snapshot.files["dangling.yaml"] else { panic!() };
    assert!(dangling.starts_with("the symlink leads nowhere"), "{dangling}");
    assert_eq!(snapshot.files["outside.yaml"], FileState::Unreadable(outside("/etc/hostname")));
    assert_eq!(snapshot.files["etc"], FileState::Unreadable(outside("/etc")));
    assert_eq!(snapshot.files["fifo.yaml"], FileState::Unreadable("is not a regular file".into()));
    assert_eq!(snapshot.files["large.yaml"], FileState::TooLarge);
    assert_eq!(snapshot.files["inside.yaml"], snapshot.files["ok.yaml"]);
    assert!(matches!(&snapshot.files["most.yaml"], FileState::Text(t) if t.len() == 1 << 20));
    assert_eq!(snapshot.files.len(), 8, "{snapshot:?}");

    let options = Options { follow_outside: true, ..Options::default() };
    fs::remove_file(dir.path("etc")).unwrap();
    assert!(matches!(list(&dir.0, &options).unwrap().files["outside.yaml"], FileState::Text(_)));
}

#[test]
fn a_missing_directory_is_an_error_and_not_empty() {
    let dir = Dir::new();
    assert!(matches!(list(&dir.path("gone"), &Options::default()), Err(ListError::Missing { .. })));
    dir.write("file.yaml", "x");
    assert!(matches!(list(&dir.path("file.yaml/below"), &Options::default()), Err(ListError::Io { .. })));
    assert_eq!(shown(&list(&dir.0, &Options::default()).unwrap()), ["file.yaml=x"]);
}

#[test]
fn truncate_and_write_is_one_update() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let mut watched = Watched::new(&dir.0, by_events());
    assert_eq!(shown(&watched.next()), ["web.yaml=one"]);
    assert_eq!(watched.watcher.mode(), Mode::Events);
    dir.write("web.yaml", "two");
    assert_eq!(shown(&watched.next()), ["web.yaml=two"]);
    watched.stays_quiet();
    dir.write("web.yaml", "two");
    watched.stays_quiet();
}

#[test]
fn rename_over_is_one_update() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let mut watched = Watched::new(&dir.0, by_events());
    watched.next();
    dir.write(".web.yaml.Xy12", "two");
    fs::rename(dir.path(".web.yaml.Xy12"), dir.path("web.yaml")).unwrap();
    assert_eq!(shown(&watched.next()), ["web.yaml=two"]);
    watched.stays_quiet();
}

#[test]
fn the_way_vim_saves_is_one_update() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let mut watched = Watched::new(&dir.0, by_events());
    watched.next();
    dir.write("4913", "");
    fs::remove_file(dir.path("4913")).unwrap();
    fs::rename(dir.path("web.yaml"), dir.path("web.yaml~")).unwrap();
    let mut file = File::create(dir.path("web.yaml")).unwrap();
    file.write_all(b"tw").unwrap();
    file.write_all(b"o").unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::set_permissions(dir.path("web.yaml"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::remove_file(dir.path("web.yaml~")).unwrap();
    assert_eq!(shown(&watched.next()), ["web.yaml=two"]);
    watched.stays_quiet();
}

#[test]
fn a_swap_of_the_data_symlink_is_one_change_of_all_files() {
    let dir = Dir::new();
    for i in 0..200 {
        dir.write(&format!("..one/{i}.yaml"), "one");
        dir.write(&format!("..two/{i}.yaml"), "two");
        symlink(format!("..data/{i}.yaml"), dir.path(&format!("{i}.yaml"))).unwrap();
    }
    symlink("..one", dir.path("..data")).unwrap();
    let mut watched = Watched::new(&dir.0, by_events());
    let all = |text: &str| -> BTreeMap<String, FileState> {
        (0..200).map(|i| (format!("{i}.yaml"), FileState::Text(text.as_bytes().into()))).collect()
    };
    assert_eq!(watched.next().files, all("one"));
    let start = Instant::now();
    symlink("..two", dir.path("..data_tmp")).unwrap();
    fs::rename(dir.path("..data_tmp"), dir.path("..data")).unwrap();
    assert_eq!(watched.next().files, all("two"), "nothing in between");
    println!("a swap of 200 files was seen after {:?}", start.elapsed());
    watched.stays_quiet();
}

#[test]
fn a_root_that_is_a_symlink_may_be_retargeted() {
    let dir = Dir::new();
    dir.write("v1/web.yaml", "one");
    dir.write("v2/web.yaml", "two");
    symlink("v1", dir.path("current")).unwrap();
    let mut watched = Watched::new(&dir.path("current"), by_events());
    assert_eq!(shown(&watched.next()), ["web.yaml=one"]);
    symlink("v2", dir.path("next")).unwrap();
    fs::rename(dir.path("next"), dir.path("current")).unwrap();
    assert_eq!(shown(&watched.next()), ["web.yaml=two"]);
    dir.write("v2/web.yaml", "three");
    assert_eq!(shown(&watched.next()), ["web.yaml=three"], "the new directory is watched");
}

#[test]
fn a_removed_directory_holds_everything_until_it_is_back() {
    let dir = Dir::new();
    let manifests = dir.path("manifests");
    dir.write("manifests/web.yaml", "one");
    let mut watched = Watched::new(&manifests, by_events());
    watched.next();
    fs::rename(&manifests, dir.path("away")).unwrap();
    let gone = watched.next();
    assert_eq!((shown(&gone), &gone.condition), (vec!["web.yaml=one".into()], &Condition::Missing));
    fs::rename(dir.path("away"), &manifests).unwrap();
    let back = watched.next();
    assert_eq!((shown(&back), &back.condition), (vec!["web.yaml=one".into()], &Condition::Ok));
    fs::remove_dir_all(&manifests).unwrap();
    assert_eq!(watched.next().condition, Condition::Missing);
    fs::create_dir(&manifests).unwrap();
    let empty = watched.next();
    assert_eq!((shown(&empty), &empty.condition), (vec!["web.yaml=one".into()], &Condition::SuddenlyEmpty));
    dir.write("manifests/web.yaml", "two");
    let back = watched.next();
    assert_eq!((shown(&back), &back.condition), (vec!["web.yaml=two".into()], &Condition::Ok));
    dir.write("manifests/sub/b.yaml", "b");
    assert_eq!(shown(&watched.next()), ["sub/b.yaml=b", "web.yaml=two"], "the new directory is watched");
}

#[test]
fn a_directory_may_come_later() {
    let dir = Dir::new();
    let manifests = dir.path("a/b");
    let options = Options { poll: Duration::from_millis(50), ..by_events() };
    let mut watched = Watched::new(&manifests, options);
    let missing = watched.next();
    assert_eq!((missing.files.len(), &missing.condition), (0, &Condition::Missing));
    assert!(matches!(watched.watcher.mode(), Mode::Polling(_)), "there is no parent to watch");
    fs::create_dir_all(&manifests).unwrap();
    assert_eq!(watched.next().condition, Condition::Ok, "empty from the beginning is no surprise");
    dir.write("a/b/web.yaml", "one");
    assert_eq!(shown(&watched.next()), ["web.yaml=one"]);
}

#[test]
fn an_emptied_directory_is_empty_only_when_that_is_said() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let mut watched = Watched::new(&dir.0, by_events());
    watched.next();
    fs::remove_file(dir.path("web.yaml")).unwrap();
    let empty = watched.next();
    assert_eq!((empty.files.len(), &empty.condition), (1, &Condition::SuddenlyEmpty));
    watched.watcher.relist();
    watched.stays_quiet();
    watched.watcher.accept_empty();
    assert_eq!(*watched.next(), Snapshot::default());

    let options = Options { had_files: true, ..by_events() };
    let mut watched = Watched::new(&dir.0, options.clone());
    assert_eq!(watched.next().condition, Condition::SuddenlyEmpty, "remembered over a restart");
    let mut watched = Watched::new(&dir.0, Options { allow_empty: true, ..options });
    assert_eq!(watched.next().condition, Condition::Ok);
}

#[test]
fn a_file_that_is_kept_open_is_read_when_it_is_closed() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    dir.write("other.yaml", "1");
    let options = Options { hold: Duration::from_millis(600), ..by_events() };
    let mut watched = Watched::new(&dir.0, options);
    watched.next();
    let mut file = File::create(dir.path("web.yaml")).unwrap();
    file.write_all(b"half of ").unwrap();
    watched.stays_quiet();
    dir.write("other.yaml", "2");
    assert_eq!(shown(&watched.next()), ["other.yaml=2", "web.yaml=one"], "it does not hold up the others");
    file.write_all(b"two").unwrap();
    drop(file);
    assert_eq!(shown(&watched.next()), ["other.yaml=2", "web.yaml=half of two"]);
}

#[test]
fn a_file_that_is_never_closed_is_read_after_a_bound() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let options =
        Options { hold: Duration::from_millis(300), hold_open: Duration::from_millis(1500), ..by_events() };
    let mut watched = Watched::new(&dir.0, options);
    watched.next();
    let mut file = File::create(dir.path("web.yaml")).unwrap();
    file.write_all(b"two").unwrap();
    assert_eq!(shown(&watched.next()), ["web.yaml=two"]);
    drop(file);
}

#[test]
fn a_file_that_was_cut_to_nothing_is_unreadable_and_not_empty() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let options = Options { hold: Duration::from_millis(300), ..by_events() };
    let mut watched = Watched::new(&dir.0, options);
    watched.next();
    dir.write("web.yaml", "");
    let found = shown(&watched.next());
    assert!(found[0].starts_with("web.yaml!the file is empty"), "{found:?}");
    dir.write("web.yaml", "two");
    assert_eq!(shown(&watched.next()), ["web.yaml=two"]);
}

#[test]
fn new_folders_and_deleted_files_are_seen() {
    let dir = Dir::new();
    dir.write("a.yaml", "a");
    let mut watched = Watched::new(&dir.0, by_events());
    watched.next();
    dir.write("x/y/z/b.yaml", "b");
    assert_eq!(shown(&watched.next()), ["a.yaml=a", "x/y/z/b.yaml=b"]);
    fs::remove_file(dir.path("a.yaml")).unwrap();
    assert_eq!(shown(&watched.next()), ["x/y/z/b.yaml=b"]);
    fs::rename(dir.path("x/y/z/b.yaml"), dir.path("x/y/c.yaml")).unwrap();
    assert_eq!(shown(&watched.next()), ["x/y/c.yaml=b"]);
    dir.write("x/y/notes.txt", "n");
    dir.write("x/y/c.yaml~", "n");
    watched.stays_quiet();
}

#[test]
fn polling_sees_the_same_without_events() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let options = Options { force_polling: true, poll: Duration::from_millis(50), ..by_events() };
    let mut watched = Watched::new(&dir.0, options);
    assert_eq!(shown(&watched.next()), ["web.yaml=one"]);
    assert!(matches!(watched.watcher.mode(), Mode::Polling(_)));
    dir.write("web.yaml", "two");
    dir.write("sub/b.yaml", "b");
    assert_eq!(shown(&watched.next()), ["sub/b.yaml=b", "web.yaml=two"]);
}

#[test]
fn a_relist_repairs_what_no_event_told() {
    let dir = Dir::new();
    let outside = Dir::new();
    outside.write("web.yaml", "one");
    symlink(outside.path("web.yaml"), dir.path("web.yaml")).unwrap();
    let options = Options { follow_outside: true, relist: Duration::from_millis(200), ..Options::default() };
    let mut watched = Watched::new(&dir.0, options);
    assert_eq!(shown(&watched.next()), ["web.yaml=one"]);
    outside.write("web.yaml", "two");
    assert_eq!(shown(&watched.next()), ["web.yaml=two"], "a directory that nobody watches");
}

/// Sets a system-wide limit for the time of one closure. `None`: not allowed here.
fn with_queue_limit<T>(events: u32, f: impl FnOnce() -> T) -> Option<T> {
    const LIMIT: &str = "/proc/sys/fs/inotify/max_queued_events";
    let before = fs::read_to_string(LIMIT).ok()?;
    fs::write(LIMIT, events.to_string()).ok()?;
    let result = f();
    fs::write(LIMIT, before.trim()).unwrap();
    Some(result)
}

#[test]
fn an_overflow_of_the_event_queue_loses_nothing() {
    let dir = Dir::new();
    dir.write("first.yaml", "1");
    let start = || {
        let mut watched = Watched::new(&dir.0, by_events());
        watched.next();
        watched
    };
    let Some(mut watched) = with_queue_limit(16, start) else {
        println!("skipped: this machine does not let the limit of queued events be changed");
        return;
    };
    for i in 0..10_000 {
        dir.write(&format!("{}/{i}.yaml", i % 7), "x");
    }
    let start = Instant::now();
    while watched.next().files.len() < 10_001 {
        assert!(start.elapsed() < PATIENCE);
    }
    println!("10,000 new files were complete {:?} after the last", start.elapsed());
    dir.write("first.yaml", "2");
    let last = watched.next();
    assert_eq!(last.files["first.yaml"], FileState::Text(b"2"[..].into()));
}

#[test]
fn a_flood_of_changes_cannot_keep_a_change_away() {
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let options = Options { hold: Duration::from_millis(800), ..by_events() };
    let mut watched = Watched::new(&dir.0, options);
    watched.next();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut i = 0;
            while !stop.load(Ordering::Relaxed) {
                i += 1;
                dir.write("noise.yaml", &format!("{i}"));
                std::thread::yield_now();
            }
        });
        dir.write("web.yaml", "two");
        let start = Instant::now();
        while watched.next().files["web.yaml"] != FileState::Text(b"two"[..].into()) {
            assert!(start.elapsed() < PATIENCE);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn kept_texts_come_back_and_broken_ones_are_set_aside() {
    let dir = Dir::new();
    let keep = Keep::open(&dir.path("sources")).unwrap();
    let files: BTreeMap<String, Vec<u8>> = [
        ("web.yaml", "one\ntwo\n"),
        ("sub/web.yaml", ""),
        ("sub_web.yaml", "other"),
        (&*"long/".repeat(60), "long"),
        ("ü \n.yaml", "odd"),
    ]
    .into_iter()
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .collect();
    keep.store(&files).unwrap();
    assert_eq!(keep.load().unwrap().files, files);
    let mode = fs::metadata(dir.path("sources")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o700);

    let mut fewer = files.clone();
    fewer.remove("sub/web.yaml");
    fewer.insert("web.yaml".into(), b"three".to_vec());
    keep.store(&fewer).unwrap();
    assert_eq!(keep.load().unwrap().files, fewer);

    dir.write("sources/.new-left", "half");
    dir.write("sources/bad-0000", "no header");
    dir.write("sources/newer-0000", "{\"version\":99,\"file\":\"x\"}\n");
    let read = keep.load().unwrap();
    assert_eq!((read.files, read.problems.len()), (fewer.clone(), 2));
    assert!(dir.path("sources/.new-left").exists(), "who only reads leaves a writer's file alone");
    let kept = keep.repair().unwrap();
    assert_eq!((kept.files, kept.problems.len()), (fewer.clone(), 2));
    let again = keep.load().unwrap();
    assert_eq!((again.files, again.problems.len()), (fewer, 0), "set aside once");
    assert!(dir.path("sources/bad-0000.broken").exists() && !dir.path("sources/.new-left").exists());
}

/// Runs itself again in a user namespace of its own, where the kernel grants no watcher at all.
#[test]
fn without_watchers_the_directory_is_polled() {
    const INSIDE: &str = "KEEL_SOURCE_WITHOUT_WATCHERS";
    if std::env::var_os(INSIDE).is_none() {
        let limit = "echo 0 > /proc/sys/user/max_inotify_instances || exit 77; exec \"$0\" --exact \"$1\"";
        let result = std::process::Command::new("unshare")
            .args(["--user", "--map-root-user", "sh", "-c", limit])
            .arg(std::env::current_exe().unwrap())
            .arg("tests::without_watchers_the_directory_is_polled")
            .env(INSIDE, "1")
            .output();
        match result {
            Ok(output) if output.status.success() => {}
            Ok(output)
                if output.status.code() == Some(77)
                    || !output.stderr.is_empty() && output.stdout.is_empty() =>
            {
                println!("skipped: no user namespace here: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => println!("skipped: no unshare here: {error}"),
        }
        return;
    }
    let dir = Dir::new();
    dir.write("web.yaml", "one");
    let mut watched = Watched::new(&dir.0, Options { poll: Duration::from_millis(50), ..by_events() });
    assert_eq!(shown(&watched.next()), ["web.yaml=one"]);
    let Mode::Polling(reason) = watched.watcher.mode() else { panic!("events without a watcher") };
    assert!(reason.contains("max_user_instances"), "{reason}");
    dir.write("sub/b.yaml", "b");
    assert_eq!(shown(&watched.next()), ["sub/b.yaml=b", "web.yaml=one"]);
}

#[test]
fn a_file_that_is_renamed_into_place_is_not_waited_for() {
    let dir = Dir::new();
    dir.write("a.yaml", "one");
    let options = Options { settle: PATIENCE, hold: PATIENCE * 2, ..by_events() };
    let mut watched = Watched::new(&dir.0, options);
    assert_eq!(shown(&watched.next()), ["a.yaml=one"]);
    let aside = std::env::temp_dir().join(format!("{}.aside", dir.0.file_name().unwrap().to_string_lossy()));
    fs::write(&aside, "two").unwrap();
    fs::rename(&aside, dir.path("a.yaml")).unwrap();
    let found = watched.next_within(PATIENCE / 2).expect("sooner than a write would be");
    assert_eq!(shown(&found), ["a.yaml=two"]);
    dir.write("a.yaml", "three");
    watched.stays_quiet();
}
