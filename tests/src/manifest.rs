//! Manifests that many tests write.

use crate::image::BUSYBOX;

/// A pod of one container `main` from the busybox image; `rest` is indented as fields of that container.
pub fn pod(name: &str, rest: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  \
         containers:\n  - name: main\n    image: {BUSYBOX}\n{rest}"
    )
}

/// Sleeps until it is told to stop, and stops at once.
pub const SLEEP: &str = "    command: [sh, -c, 'trap \"exit 0\" TERM; sleep 100000 & wait']\n";

pub fn sleeper(name: &str) -> String {
    pod(name, SLEEP)
}

/// Writes `text` to a file that is served on port 80.
pub fn server(name: &str, text: &str, rest: &str) -> String {
    pod(
        name,
        &format!(
            "    command: [sh, -c, 'mkdir -p /tmp/www; echo {text} > /tmp/www/index.html; exec httpd -f -p 80 -h /tmp/www']\n{rest}"
        ),
    )
}
