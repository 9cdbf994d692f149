//! Every example runs.

use std::path::Path;

use keel_tests::{Instance, eventually, http_get};

fn examples() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/manifests")
}

#[test]
fn the_examples_run_together_and_answer() {
    let instance = Instance::new();
    let examples = examples();
    let examples = examples.to_str().unwrap();
    instance.keel(&["check", "-f", examples]).expect_code(0);
    instance.keel(&["apply", "-f", examples, "--wait", "--timeout", "5m"]).expect_code(0);
    let answer = eventually("the first example answers", || http_get("127.0.0.1:8080", "/"));
    assert_eq!(answer.0, 200);
    assert!(answer.1.contains("hello"), "{}", answer.1);
    let again = instance.keel(&["plan", "-f", examples, "--exit-code"]);
    assert_eq!(again.code(), 0, "applied twice, nothing is left to do: {}", again.all());
}
