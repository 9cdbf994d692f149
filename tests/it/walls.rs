//! Who may depend on whom. The rules are the table "Never" of the README.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Direct dependencies of each workspace crate, without those of its tests.
fn graph() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--no-deps"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let direct = package["dependencies"].as_array().expect("dependencies").iter();
            let normal = direct.filter(|d| d["kind"].is_null()).filter_map(|d| d["name"].as_str());
            (package["name"].as_str().expect("a name").to_string(), normal.map(str::to_string).collect())
        })
        .collect()
}

/// Everything that a crate reaches through workspace crates, and what those name directly.
fn reach(graph: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from.to_string()];
    while let Some(name) = open.pop() {
        for dependency in graph.get(&name).into_iter().flatten() {
            if seen.insert(dependency.clone()) {
                open.push(dependency.clone());
            }
        }
    }
    seen
}

#[track_caller]
fn never(graph: &BTreeMap<String, BTreeSet<String>>, from: &str, forbidden: &[&str]) {
    assert!(graph.contains_key(from), "{from} is not a crate of the workspace");
    let reached = reach(graph, from);
    for name in forbidden {
        assert!(!reached.contains(*name), "{from} must never depend on {name}");
    }
}

const RUNTIME_SIDE: &[&str] = &[
    "keel-sys",
    "keel-cgroup",
    "keel-systemd",
    "keel-oci",
    "keel-store",
    "keel-registry",
    "keel-net",
    "keel-proto",
];
const RECONCILER_SIDE: &[&str] = &[
    "keel-manifest",
    "keel-plan",
    "keel-source",
    "keel-engine",
    "keel-host",
    "keel-api",
    "keel-sim",
    "keel",
];
const NETWORKED: &[&str] = &["tokio", "reqwest", "hyper", "rustls", "oci-client"];

#[test]
fn pure_crates_stay_pure() {
    let graph = graph();
    for name in ["keel-manifest", "keel-plan"] {
        never(&graph, name, &["tokio", "nix", "libc", "rand", "chrono", "time", "notify", "inotify"]);
        never(&graph, name, RUNTIME_SIDE);
    }
}

#[test]
fn the_engine_knows_ports_only() {
    let graph = graph();
    never(&graph, "keel-engine", &["nix", "libc", "keel-host", "keel-api", "keel-source"]);
    never(&graph, "keel-engine", RUNTIME_SIDE);
    never(&graph, "keel-api", RUNTIME_SIDE);
    never(&graph, "keel-api", &["keel-host", "keel-engine"]);
}

#[test]
fn the_runtime_side_has_no_async_and_no_reconciler() {
    let graph = graph();
    for name in [
        "keel-sys",
        "keel-cgroup",
        "keel-systemd",
        "keel-oci",
        "keel-store",
        "keel-net",
        "keel-proto",
        "keel-runtime",
        "keel-shim",
    ] {
        never(&graph, name, NETWORKED);
        never(&graph, name, RECONCILER_SIDE);
    }
    never(&graph, "keel-registry", RECONCILER_SIDE);
    never(&graph, "keel-shim", &["clap", "serde", "serde_json", "tracing"]);
}

#[test]
fn containers_are_reached_through_processes_only() {
    let graph = graph();
    never(&graph, "keel", &["keel-oci"]);
    never(&graph, "keel-host", &["keel-oci"]);
}

#[test]
fn no_unordered_maps_in_the_pure_crates() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../reconciler");
    for name in ["manifest/src", "plan/src"] {
        visit(&root.join(name), &mut |path, text| {
            if path.ends_with("tests.rs") {
                return;
            }
            for word in ["HashMap", "HashSet", "SystemTime", "Instant::now"] {
                assert!(!text.contains(word), "{} uses {word}", path.display());
            }
        });
    }
}

#[test]
fn unsafe_code_stays_where_the_system_calls_are() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for side in [
        "reconciler",
        "shim",
        "runtime/net",
        "runtime/store",
        "runtime/registry",
        "runtime/cgroup",
        "runtime/systemd",
        "runtime/keel-runtime",
        "runtime/oci",
    ] {
        visit(&root.join(side), &mut |path, text| {
            if path.ends_with("runtime/oci/src/child.rs") {
                return;
            }
            let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let found = lines.filter(|line| line.contains("unsafe {") || line.contains("unsafe fn")).count();
            assert_eq!(found, 0, "{} has unsafe code; it belongs in runtime/sys", path.display());
        });
    }
}

fn visit(dir: &std::path::Path, check: &mut dyn FnMut(&std::path::Path, &str)) {
    for entry in std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())).flatten() {
        let path = entry.path();
        if path.is_dir() {
            visit(&path, check);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            check(&path, &std::fs::read_to_string(&path).expect("source is UTF-8"));
        }
    }
}
