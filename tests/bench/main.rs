//! Measures evenkeel beside the engines that it replaces, all in one run on one host, and prints ratios.

mod bundle;
mod engines;
mod failure;
mod host;
mod keel;
mod measure;
mod report;
mod rows;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::failure::{Failure, Outcome};
use crate::host::Work;
use crate::report::Measure;

const HELP: &str = "\
bench [ROW]... [-n COUNT] [-o table|json] [--image DIR]

Build first what is measured, then run as root:
    cargo build --release -p keel -p keel-shim -p keel-runtime
    cargo run --release -p keel-tests --bin bench

Rows (default: all), medians of COUNT samples (default 10):
    pod       one pod from file to running, against podman, ctr and docker
    fifty     50 pods on an idle host, against a loop of podman
    memory    the idle daemon with 50 pods, and the monitors of 10 containers
    plan      parsing and planning 5,000 manifests
    runtime   run, create, start, delete and exec, against crun and runc
    log       container output per processor second, against conmon, containerd's shim and dockerd
    pull      pull and unpack of a large image, against podman, ctr and docker

    --image DIR   keep the large image there, and take it from there the next time
";

/// Fewer samples have no median worth the name; more take long on the slow peers.
const COUNT: usize = 10;
const ROWS: [&str; 7] = ["pod", "fifty", "memory", "plan", "runtime", "log", "pull"];

struct Options {
    rows: Vec<&'static str>,
    count: usize,
    json: bool,
    image: Option<PathBuf>,
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = measure::measured_child(&words).or_else(|| rows::log::generator(&words)) {
        return ExitCode::from(u8::try_from(code).unwrap_or(1));
    }
    match options(&words).and_then(|options| options.map_or(Ok(true), |options| bench(&options))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}

/// False when a row could not be measured; the others are printed all the same.
fn bench(options: &Options) -> Outcome<bool> {
    if cfg!(debug_assertions) {
        eprintln!("bench: this is no release build; its numbers mean nothing");
    }
    let facts = host::facts();
    let work = Work::new()?;
    let (mut measures, mut whole) = (Vec::new(), true);
    for &row in &options.rows {
        eprintln!("bench: {row} (load {})", host::load());
        match measure_row(row, &work, options) {
            Ok(measured) => measures.extend(measured),
            Err(error) => {
                eprintln!("bench: row {row} failed: {error}");
                whole = false;
            }
        }
    }
    let text = if options.json {
        format!("{:#}\n", report::json(&measures, facts))
    } else {
        let table = report::markdown(&measures);
        format!("{table}\nHost: {facts}\nLoad at the end: {}\n", host::load())
    };
    // A reader that has seen enough is no failure, and must not keep `work` from being removed.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(whole)
}

fn measure_row(row: &str, work: &Work, options: &Options) -> Outcome<Vec<Measure>> {
    match row {
        "pod" => rows::pods::one(work, options.count),
        "fifty" => rows::pods::many(work, options.count),
        "memory" => rows::memory::memory(work, options.count),
        "plan" => rows::plan::plans(options.count),
        "runtime" => rows::runtime::runtimes(work, options.count),
        "log" => rows::log::logs(work, options.count),
        _ => rows::pull::pulls(work, options.count, options.image.as_deref()),
    }
}

/// `None`: help was asked for, and given.
fn options(words: &[OsString]) -> Outcome<Option<Options>> {
    let mut options = Options { rows: Vec::new(), count: COUNT, json: false, image: None };
    let mut words = words.iter().map(|word| word.to_string_lossy());
    while let Some(word) = words.next() {
        let mut value =
            || words.next().ok_or_else(|| Failure::new(format!("{word} needs a value\n\n{HELP}")));
        match word.as_ref() {
            "-h" | "--help" => {
                print!("{HELP}");
                return Ok(None);
            }
            "-n" => {
                let count = value()?;
                let count = count.parse().ok().filter(|&count| count > 0);
                options.count = count.ok_or_else(|| Failure::new("-n needs a number of samples"))?;
            }
            "-o" => options.json = value()? == "json",
            "--image" => options.image = Some(PathBuf::from(value()?.into_owned())),
            name => match ROWS.into_iter().find(|row| *row == name) {
                Some(row) => options.rows.push(row),
                None => return Err(Failure::new(format!("no such row or option: {name}\n\n{HELP}"))),
            },
        }
    }
    if options.rows.is_empty() {
        options.rows = ROWS.to_vec();
    }
    Ok(Some(options))
}
