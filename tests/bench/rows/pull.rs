//! A large image from a registry on the loopback to a mountable root file system.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use keel_tests::image::{architecture, sha256};
use keel_tests::registry::Registry;
use serde_json::{Value, json};

use crate::engines::{NAMES, engine, present};
use crate::failure::{Doing, Failure, Outcome};
use crate::host::{Disk, Work};
use crate::keel::Keel;
use crate::measure::{Usage, output, usage, wall};
use crate::report::{Aim, Measure};

const LAYERS: usize = 8;
/// Unpacked; compresses to about a third.
const LAYER_BYTES: u64 = 120 << 20;
/// Larger files would make layers of few entries.
const FILE_BYTES: u64 = 2 << 20;
/// Where the files come from: programs, libraries and documents of the host.
const SOURCE: &str = "/usr";

pub(crate) fn pulls(work: &Work, count: usize, layout: Option<&Path>) -> Outcome<Vec<Measure>> {
    output(Command::new("docker-registry").arg("--version"))
        .or_else(|_| output(Command::new("docker-registry").arg("help")))?;
    let registry = Registry::start();
    let reference = format!("{}/bench/big:{LAYERS}", registry.address);
    let own = work.state("big")?;
    let layout = layout.unwrap_or(&own);
    if !layout.join("index.json").is_file() {
        make(layout)?;
    }
    wall(
        Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:big", layout.display()))
            .arg(format!("docker://{reference}")),
    )?;
    let measure =
        |what: &str, unit| Measure::new("pull", format!("pull and unpack, {LAYERS} layers: {what}"), unit);
    let (mut cpu, mut time) = (measure("processor", "s"), measure("wall clock", "s"));
    let mut memory = measure("peak RSS", "MB").aim(Aim::AtMost(30.0));
    let mut left_out = BTreeSet::new();
    for _ in 0..count {
        let mut note = |name: &str, used: Usage| {
            cpu.sample(name, used.cpu_s);
            time.sample(name, used.wall_s);
            memory.sample(name, used.peak_rss_kb / 1024.0);
        };
        note("keel image pull (synced)", ours(work, &reference)?);
        for name in NAMES {
            if left_out.contains(name) {
                continue;
            }
            match theirs(work, name, &reference) {
                Ok(used) => note(&format!("{name} pull"), used),
                Err(error) => {
                    left_out.insert(name);
                    present::<()>(name, Err(error));
                }
            }
        }
    }
    let aim = |measure: Measure, bound| match best(&measure) {
        Some(peer) => measure.aim(Aim::Ratio(peer, bound)),
        None => measure,
    };
    Ok(vec![aim(cpu, 0.33), aim(time, 0.4), memory])
}

/// The peer with the lowest median.
fn best(measure: &Measure) -> Option<&'static str> {
    let peers = measure.contenders.iter().skip(1);
    let best = peers.min_by(|a, b| a.median().total_cmp(&b.median()))?;
    ["podman pull", "ctr pull", "docker pull"].into_iter().find(|name| *name == best.name)
}

fn ours(work: &Work, reference: &str) -> Outcome<Usage> {
    let disk = Disk::new(work)?;
    let keel = Keel::at(work, "pull", disk.path.join("root"))?;
    usage(&keel.command(&["--quiet", "image", "pull", reference])?)
}

fn theirs(work: &Work, name: &str, reference: &str) -> Outcome<Usage> {
    let disk = Disk::new(work)?;
    engine(name, work, &disk.path)?.pull(reference)
}

/// An OCI layout of files of this host, eight layers, gzip.
fn make(layout: &Path) -> Outcome {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).doing_at("create", &blobs)?;
    let contents = contents()?;
    // Two at a time: gzip has one thread.
    let (even, odd): (Vec<_>, Vec<_>) = contents.iter().enumerate().partition(|(n, _)| n % 2 == 0);
    let pack = |layers: Vec<(usize, &BTreeSet<PathBuf>)>| -> Outcome<BTreeMap<usize, Layer>> {
        layers.into_iter().map(|(n, files)| Ok((n, layer(layout, &blobs, n, files)?))).collect()
    };
    let layers = std::thread::scope(|scope| {
        let other = scope.spawn(|| pack(odd));
        let mut layers = pack(even)?;
        layers.extend(other.join().map_err(|_| Failure::new("a packing thread panicked"))??);
        Ok::<_, Failure>(layers)
    })?;
    let diff_ids: Vec<&str> = layers.values().map(|layer| layer.diff_id.as_str()).collect();
    let config = json!({
        "architecture": architecture(), "os": "linux", "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = blob(&blobs, &config, "application/vnd.oci.image.config.v1+json")?;
    let layers: Vec<&Value> = layers.values().map(|layer| &layer.descriptor).collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers,
    });
    let mut manifest = blob(&blobs, &manifest, "application/vnd.oci.image.manifest.v1+json")?;
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "big"});
    let write = |name: &str, value: Value| {
        let path = layout.join(name);
        fs::write(&path, value.to_string()).doing_at("write", &path)
    };
    write("oci-layout", json!({"imageLayoutVersion": "1.0.0"}))?;
    write("index.json", json!({"schemaVersion": 2, "manifests": [manifest]}))
}

struct Layer {
    diff_id: String,
    descriptor: Value,
}

/// The entries of each layer, parents included: neighbours in the tree of files, cut by size.
fn contents() -> Outcome<Vec<BTreeSet<PathBuf>>> {
    let mut layers = vec![BTreeSet::new()];
    let mut room = LAYER_BYTES;
    let mut open = vec![PathBuf::from(SOURCE)];
    while let Some(path) = open.pop() {
        let Ok(found) = fs::symlink_metadata(&path) else { continue };
        if found.is_dir() {
            let entries = fs::read_dir(&path).doing_at("read", &path)?;
            let mut below: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            below.sort_by(|a, b| b.cmp(a));
            open.extend(below);
        } else if !(found.is_file() || found.is_symlink()) || found.len() > FILE_BYTES {
            continue;
        } else if found.len() > room {
            if layers.len() == LAYERS {
                return Ok(layers);
            }
            layers.push(BTreeSet::new());
            room = LAYER_BYTES;
        }
        if found.is_file() {
            room = room.saturating_sub(found.len());
        }
        if let Some(layer) = layers.last_mut() {
            layer.extend(path.ancestors().filter(|parent| *parent != Path::new("/")).map(Path::to_path_buf));
        }
    }
    Ok(layers)
}

fn layer(layout: &Path, blobs: &Path, n: usize, files: &BTreeSet<PathBuf>) -> Outcome<Layer> {
    let list = layout.join(format!("{n}.list"));
    let mut names = Vec::new();
    for file in files {
        names.extend_from_slice(file.strip_prefix("/").unwrap_or(file).as_os_str().as_bytes());
        names.push(0);
    }
    fs::write(&list, names).doing_at("write", &list)?;
    let tar = layout.join(format!("{n}.tar"));
    let mut command = Command::new("tar");
    command.args(["-C", "/", "--no-recursion", "--null", "--numeric-owner", "-T"]);
    wall(command.arg(&list).arg("-cf").arg(&tar))?;
    let diff_id = format!("sha256:{}", sha256(&tar));
    wall(Command::new("gzip").args(["-n", "-6", "-f"]).arg(&tar))?;
    let packed = layout.join(format!("{n}.tar.gz"));
    let digest = sha256(&packed);
    let size = fs::metadata(&packed).doing_at("read the size of", &packed)?.len();
    fs::rename(&packed, blobs.join(&digest)).doing_at("rename", &packed)?;
    fs::remove_file(&list).doing_at("remove", &list)?;
    let descriptor = json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": format!("sha256:{digest}"), "size": size,
    });
    Ok(Layer { diff_id, descriptor })
}

fn blob(blobs: &Path, value: &Value, media_type: &str) -> Outcome<Value> {
    let aside = blobs.join("aside");
    let text = value.to_string();
    fs::write(&aside, &text).doing_at("write", &aside)?;
    let digest = sha256(&aside);
    fs::rename(&aside, blobs.join(&digest)).doing_at("rename", &aside)?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": text.len()}))
}
