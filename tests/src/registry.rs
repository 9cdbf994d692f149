//! A real registry on the loopback, as long as a test lives.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::{eventually, free_port};

/// `docker-registry` on `127.0.0.1:<port>`, storage in a temporary directory.
pub struct Registry {
    pub address: String,
    child: Child,
    _dir: TempDir,
}

impl Registry {
    pub fn start() -> Registry {
        let dir = tempfile::Builder::new().prefix("evenkeel-reg-").tempdir().expect("a temporary directory");
        let port = free_port();
        let config = dir.path().join("config.yml");
        let storage = dir.path().join("storage");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n",
                storage.display()
            ),
        )
        .expect("write the configuration");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let address = format!("127.0.0.1:{port}");
        eventually("the registry answers", || std::net::TcpStream::connect(&address).ok());
        Registry { address, child, _dir: dir }
    }

    /// Copies an archive to `<address>/<name>` and returns that reference.
    pub fn push(&self, archive: &Path, name: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        crate::image::run(
            Command::new("skopeo")
                .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"])
                .arg(format!("docker-archive:{}", archive.display()))
                .arg(format!("docker://{reference}")),
        );
        reference
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
