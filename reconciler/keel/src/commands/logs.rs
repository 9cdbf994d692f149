//! `logs`: what containers wrote, from the files that their monitors keep. Needs no daemon.

use std::collections::BTreeSet;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use inotify::{Inotify, WatchMask};
use keel_api::Status;
use keel_manifest::logging::{self, LogSettings};
use keel_plan::{ContainerId, PodId, PodKey};

use crate::cli::Logs;
use crate::context::Context;
use crate::crilog::{Joiner, Line, NO_TIME, Reader, attempts};
use crate::failure::{Failure, Outcome};
use crate::text::time_nanos;
use crate::{object, world};

/// When nothing is reported, how long until we look anyway: the end of a container whose monitor was killed leaves no
/// trace that can be watched.
const RECHECK_MS: i32 = 1000;

pub(crate) fn logs(context: &Context, args: &Logs) -> Outcome {
    let mut sources = sources(context, args)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let since = since(args);
    let printer = Printer {
        since,
        timestamps: args.timestamps,
        prefix: args.prefix || sources.len() > 1 && args.follow,
    };
    if args.follow {
        return follow(context, &mut sources, &printer, &mut out);
    }
    for source in &mut sources {
        source.drain(&printer, &mut out)?;
        source.finish(&printer, &mut out)?;
    }
    Ok(out.flush()?)
}

/// As log lines print it: text order is time order.
fn since(args: &Logs) -> Option<String> {
    let ago = |duration: Duration| {
        let then = SystemTime::now().checked_sub(duration).unwrap_or(UNIX_EPOCH);
        time_nanos(then.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos()))
    };
    args.since_time.clone().or_else(|| args.since.map(ago))
}

/// The log of one run of one container.
struct Source {
    id: ContainerId,
    prefix: String,
    reader: Reader,
    joiner: Joiner,
    buffer: Vec<u8>,
    directory: std::path::PathBuf,
}

struct Printer {
    since: Option<String>,
    timestamps: bool,
    prefix: bool,
}

impl Printer {
    fn print(&self, prefix: &str, line: Line<'_>, out: &mut impl Write) -> io::Result<()> {
        // Without a time, a line may be younger.
        if self.since.as_deref().is_some_and(|since| line.time < since && line.time != NO_TIME) {
            return Ok(());
        }
        if self.prefix {
            out.write_all(prefix.as_bytes())?;
        }
        if self.timestamps {
            out.write_all(line.time.as_bytes())?;
            out.write_all(b" ")?;
        }
        out.write_all(line.text)?;
        out.write_all(b"\n")
    }
}

impl Source {
    /// Prints what is there now.
    fn drain(&mut self, printer: &Printer, out: &mut impl Write) -> Outcome {
        let Source { prefix, reader, joiner, buffer, directory, .. } = self;
        loop {
            let count = reader
                .read(buffer)
                .map_err(|error| Failure::io("read log in", directory.display(), &error))?;
            if count == 0 {
                return Ok(());
            }
            joiner.feed(buffer, |line| printer.print(prefix, line, out))?;
        }
    }

    fn finish(&mut self, printer: &Printer, out: &mut impl Write) -> Outcome {
        let Source { prefix, joiner, .. } = self;
        Ok(joiner.finish(|line| printer.print(prefix, line, out))?)
    }
}

/// Until every container has ended and everything of it is printed.
fn follow(context: &Context, sources: &mut Vec<Source>, printer: &Printer, out: &mut impl Write) -> Outcome {
    let mut changes = watch(context, sources);
    loop {
        let mut failed = Ok(());
        sources.retain_mut(|source| {
            // Asked first: what is written before the exit is recorded is there afterwards.
            let ended = world::has_ended(&context.paths, &source.id);
            let drained = source.drain(printer, out);
            let last = if ended { drained.and_then(|()| source.finish(printer, out)) } else { drained };
            match last {
                Ok(()) => !ended,
                Err(failure) => {
                    failed = Err(failure);
                    false
                }
            }
        });
        failed?;
        out.flush()?;
        if sources.is_empty() {
            return Ok(());
        }
        wait(&mut changes);
    }
}

/// Directories, not files: a rotation renames files.
fn watch(context: &Context, sources: &[Source]) -> Option<Inotify> {
    let changes = Inotify::init().ok()?;
    let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO;
    let exits = context.paths.exits();
    let directories: BTreeSet<&Path> = sources.iter().map(|source| source.directory.as_path()).collect();
    for directory in directories.into_iter().chain([exits.as_path()]) {
        changes.watches().add(directory, mask).ok()?;
    }
    Some(changes)
}

/// Without inotify (the user's limit is reached) the look comes later.
fn wait(changes: &mut Option<Inotify>) {
    let Some(changes) = changes else {
        std::thread::sleep(Duration::from_millis(200));
        return;
    };
    if keel_sys::file::wait_readable(&*changes, Some(RECHECK_MS)).unwrap_or(false) {
        let mut buffer = [0; 4096];
        // Which file it was does not matter: every source is looked at.
        while changes.read_events(&mut buffer).is_ok_and(|events| events.count() > 0) {}
    }
}

fn sources(context: &Context, args: &Logs) -> Outcome<Vec<Source>> {
    let namespace = &context.settings.namespace;
    // Logs outlive pods, and are readable when the state is not.
    let status = world::status(context).ok();
    let pods = pod_keys(context, status.as_ref(), namespace, &args.object)?;
    let several = pods.len() > 1;
    let mut sources = Vec::new();
    for pod in &pods {
        let known = containers(context, status.as_ref(), pod);
        for container in choose(context, args, pod, &known)? {
            match open(context, args, pod, container) {
                Ok(source) => sources.push(source),
                // One of many that has not run yet does not hide the others.
                Err(failure) if several || args.all_containers => {
                    context.term.note(&failure.render(context.term.color_err))
                }
                Err(failure) => return Err(failure),
            }
        }
    }
    Ok(sources)
}

fn pod_keys(context: &Context, status: Option<&Status>, namespace: &str, word: &str) -> Outcome<Vec<PodKey>> {
    let wanted = object::parse_one(word)?;
    let key = PodKey { namespace: namespace.to_owned(), name: wanted.name.unwrap_or_default() };
    let unknown = match status {
        Some(status) => match object::pods(status, namespace, word) {
            Ok(found) => return Ok(found.iter().map(|pod| pod.key.clone()).collect()),
            Err(failure) => failure,
        },
        None => Failure::not_found(format!("no pod {} in namespace {namespace}", key.name)),
    };
    let logged = wanted.kind == object::Kind::Pod && context.paths.pod_logs(&PodId::of(&key)).is_dir();
    if logged { Ok(vec![key]) } else { Err(unknown) }
}

/// Names in the order of the manifest, else as the directories are called.
fn containers(context: &Context, status: Option<&Status>, pod: &PodKey) -> Vec<String> {
    let known = status.and_then(|status| status.pods.iter().find(|known| known.key == *pod));
    let mut names: Vec<String> = match known {
        // The first main container is what a bare `logs` means.
        Some(pod) => pod
            .container_statuses
            .iter()
            .chain(&pod.init_container_statuses)
            .map(|c| c.name.clone())
            .collect(),
        None => Vec::new(),
    };
    if names.is_empty() {
        let entries =
            std::fs::read_dir(context.paths.pod_logs(&PodId::of(pod))).into_iter().flatten().flatten();
        names = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
    }
    names
}

fn choose<'a>(context: &Context, args: &'a Logs, pod: &PodKey, known: &'a [String]) -> Outcome<Vec<&'a str>> {
    if args.all_containers {
        return Ok(known.iter().map(String::as_str).collect());
    }
    if let Some(name) = args.container.as_deref().or(args.container_position.as_deref()) {
        return if known.iter().any(|container| container == name) {
            Ok(vec![name])
        } else {
            Err(Failure::not_found(format!("pod {} has no container {name}", pod.name))
                .hint(format!("containers: {}", known.join(", "))))
        };
    }
    let Some(first) = known.first() else {
        return Err(Failure::failed(format!("pod {} has not written anything yet", pod.name)));
    };
    if known.len() > 1 {
        context.term.note(&format!("container {first} of: {} (choose with -c)\n", known.join(", ")));
    }
    Ok(vec![first])
}

fn open(context: &Context, args: &Logs, pod: &PodKey, container: &str) -> Outcome<Source> {
    let directory = context.paths.pod_logs(&PodId::of(pod)).join(container);
    let runs = match attempts(&directory) {
        Ok(runs) => runs,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Failure::io("read directory", directory.display(), &error)),
    };
    let back = usize::from(args.previous);
    let Some(&(attempt, raw)) = runs.iter().rev().nth(back) else {
        let name = &pod.name;
        if let Some(failure) = kept_elsewhere(context, pod, container) {
            return Err(failure);
        }
        return Err(match (runs.is_empty(), args.previous) {
            (false, true) => {
                Failure::not_found(format!("container {container} of pod {name} has run only once"))
            }
            _ => Failure::failed(format!("container {container} of pod {name} has not run yet"))
                .hint(format!("see why: keel describe pod/{name}")),
        });
    };
    let mut path = context.paths.log(&PodId::of(pod), container, attempt);
    if raw {
        path.set_extension("raw");
    }
    let reader = Reader::open(&path, raw, args.tail)
        .map_err(|error| Failure::io("open log", path.display(), &error))?;
    Ok(Source {
        id: world::container_id(pod, container, attempt),
        prefix: format!("[pod/{}/{container}] ", pod.name),
        joiner: Joiner::new(reader.is_raw()),
        reader,
        buffer: Vec::new(),
        directory,
    })
}

/// A pod whose log drivers write no file.
fn kept_elsewhere(context: &Context, pod: &PodKey, container: &str) -> Option<Failure> {
    let declared = keel_host::declared_pod(&context.paths, &PodId::of(pod))?;
    let settings = LogSettings::of(&declared.annotations).or(&context.settings.logs);
    let drivers = settings.drivers.unwrap_or_default();
    if drivers.file.is_some() {
        return None;
    }
    let (kept, hint) = if drivers.journal {
        ("in the journal", format!("journalctl CONTAINER_NAME={}-{container}", pod.name))
    } else {
        ("nowhere: its log driver is none", format!("choose another by the annotation {}", logging::DRIVER))
    };
    Some(
        Failure::failed(format!("output of container {container} of pod {} is kept {kept}", pod.name))
            .hint(hint),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(printer: &Printer, time: &str) -> String {
        let mut out = Vec::new();
        printer.print("[pod/web/app] ", Line { time, text: b"hi" }, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_carry_what_was_asked_for_and_old_ones_are_left_out() {
        let mut printer = Printer { since: None, timestamps: true, prefix: true };
        let time = "2026-01-02T15:04:05.000000000Z";
        assert_eq!(printed(&printer, time), format!("[pod/web/app] {time} hi\n"));
        printer.since = Some("2026-01-02T15:04:05.000000001Z".into());
        assert_eq!(printed(&printer, time), "");
        printer = Printer { since: Some(time.into()), timestamps: false, prefix: false };
        assert_eq!(printed(&printer, time), "hi\n");
    }
}
