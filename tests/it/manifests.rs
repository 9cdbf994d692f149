//! Every example runs.

use std::fs;
use std::path::Path;
use std::process::Command;

use keel_tests::{Instance, eventually, free_port, http_get};

fn examples() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/manifests")
}

#[test]
fn the_examples_run_together_and_answer() {
    let instance = Instance::new();
    let copy = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-r").arg(examples()).arg(copy.path()).status().unwrap();
    assert!(copied.success());
    let examples = copy.path().join("manifests");
    // Where the demo runs, it has the port that they ask for.
    let hello = examples.join("hello.yaml");
    let port = free_port();
    let text = fs::read_to_string(&hello).unwrap();
    let other = text.replace("hostPort: 8080", &format!("hostPort: {port}"));
    assert_ne!(text, other);
    fs::write(&hello, other).unwrap();
    let examples = examples.to_str().unwrap();
    instance.keel(&["check", "-f", examples]).expect_code(0);
    instance.keel(&["apply", "-f", examples, "--wait", "--timeout", "5m"]).expect_code(0);
    let answer = eventually("the first example answers", || http_get(&format!("127.0.0.1:{port}"), "/"));
    assert_eq!(answer.0, 200);
    assert!(answer.1.contains("hello"), "{}", answer.1);
    let again = instance.keel(&["plan", "-f", examples, "--exit-code"]);
    assert_eq!(again.code(), 0, "applied twice, nothing is left to do: {}", again.all());
}
