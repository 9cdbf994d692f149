//! Images made on the spot: a static busybox, and whatever a test puts beside it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

/// What the busybox image is called once imported.
pub const BUSYBOX: &str = "docker.io/library/busybox:it";

const APPLETS: &[&str] = &[
    "sh", "cat", "ls", "echo", "sleep", "true", "false", "env", "id", "wget", "nc", "httpd", "touch",
    "mkdir", "rm", "mount", "ps", "kill", "hostname", "stat", "dd", "ip", "ping", "grep", "sed", "head",
    "tail", "wc", "date", "seq", "printf", "readlink", "chmod", "chown", "mv", "cp", "df", "nslookup", "yes",
    "test", "pwd", "tr", "cut", "sort", "usleep", "timeout", "trap", "tee", "whoami", "ln", "mknod",
];

/// A docker-archive with the busybox image, made once for each run of the tests. The process removes it at its end by
/// living in the directory of an instance: see [`busybox_archive_in`].
pub fn busybox_archive_in(dir: &Path) -> PathBuf {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    let path = dir.join("busybox.tar");
    let bytes = BYTES.get_or_init(|| {
        let work = tempfile::Builder::new().prefix("evenkeel-img-").tempdir().expect("a temporary directory");
        let rootfs = work.path().join("rootfs");
        busybox_rootfs(&rootfs);
        let archive = work.path().join("image.tar");
        docker_archive(
            &archive,
            &rootfs,
            BUSYBOX,
            &json!({"Cmd": ["sh"], "Env": ["PATH=/bin", "FROM_IMAGE=yes"]}),
        );
        fs::read(archive).expect("the archive was just written")
    });
    fs::write(&path, bytes).expect("write the archive");
    path
}

/// A root file system of one static binary and its names.
pub fn busybox_rootfs(dir: &Path) {
    for sub in ["bin", "etc", "tmp", "root", "home/app"] {
        fs::create_dir_all(dir.join(sub)).expect("a directory of the image");
    }
    fs::set_permissions(dir.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("mode of /tmp");
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|p| Path::new(p).exists());
    fs::copy(busybox.expect("busybox-static is installed"), dir.join("bin/busybox")).expect("copy busybox");
    for name in APPLETS {
        symlink("busybox", dir.join("bin").join(name)).expect("a link in the image");
    }
    fs::write(
        dir.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n",
    )
    .expect("write passwd");
    fs::write(dir.join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n").expect("write group");
}

/// Packs `rootfs` as a one-layer image in `docker save`'s form.
pub fn docker_archive(archive: &Path, rootfs: &Path, reference: &str, config: &Value) {
    let work = archive.with_extension("d");
    fs::create_dir_all(&work).expect("a work directory");
    let layer = work.join("layer.tar");
    run(Command::new("tar")
        .args(["--numeric-owner", "--owner=0", "--group=0", "-C"])
        .arg(rootfs)
        .arg("-cf")
        .arg(&layer)
        .arg("."));
    let diff_id = format!("sha256:{}", sha256(&layer));
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created_by": "test"}],
    });
    fs::write(work.join("config.json"), config.to_string()).expect("write the config");
    let manifest = json!([{"Config": "config.json", "RepoTags": [reference], "Layers": ["layer.tar"]}]);
    fs::write(work.join("manifest.json"), manifest.to_string()).expect("write the manifest");
    run(Command::new("tar").arg("-C").arg(&work).arg("-cf").arg(archive).args([
        "manifest.json",
        "config.json",
        "layer.tar",
    ]));
    fs::remove_dir_all(&work).expect("remove the work directory");
}

pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    }
}

pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum runs");
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().expect("a digest").to_string()
}

#[track_caller]
pub fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
