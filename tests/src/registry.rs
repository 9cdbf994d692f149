//! A real registry, as long as a test lives: plain or with TLS, open or behind a login.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

use crate::image::run;
use crate::layout::Layout;
use crate::{eventually, free_port};

/// How a registry is reached.
#[derive(Clone, Debug)]
pub struct Access {
    /// Address it listens on.
    pub ip: String,
    /// A certificate by an authority of its own.
    pub tls: bool,
    /// Name and password.
    pub login: Option<(&'static str, &'static str)>,
}

impl Default for Access {
    fn default() -> Access {
        Access { ip: "127.0.0.1".into(), tls: false, login: None }
    }
}

/// `docker-registry` on `<ip>:<port>`, storage in a temporary directory.
pub struct Registry {
    pub address: String,
    access: Access,
    config: PathBuf,
    child: Option<Child>,
    dir: TempDir,
}

impl Registry {
    pub fn start() -> Registry {
        Registry::start_with(Access::default())
    }

    pub fn start_with(access: Access) -> Registry {
        let dir = tempfile::Builder::new().prefix("evenkeel-reg-").tempdir().expect("a temporary directory");
        let address = format!("{}:{}", access.ip, free_port());
        let at = |name: &str| dir.path().join(name);
        let mut http = json!({"addr": address, "relativeurls": true});
        if access.tls {
            make_certificates(dir.path(), &access.ip);
            http["tls"] = json!({"certificate": at("server.crt"), "key": at("server.key")});
        }
        let mut config = json!({
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": false}},
            "storage": {"filesystem": {"rootdirectory": at("storage")}, "delete": {"enabled": true}},
            "http": http,
        });
        if let Some((name, password)) = access.login {
            let made =
                Command::new("htpasswd").args(["-Bbn", name, password]).output().expect("htpasswd runs");
            fs::write(at("htpasswd"), made.stdout).expect("write htpasswd");
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": at("htpasswd")}});
        }
        let path = at("config.yml");
        // JSON is YAML.
        fs::write(&path, config.to_string()).expect("write the configuration");
        let mut registry = Registry { address, access, config: path, child: None, dir };
        registry.resume();
        registry
    }

    /// Starts the process again, same address and contents.
    pub fn resume(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path()).expect("a log file");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&self.config)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed");
        self.child = Some(child);
        eventually("the registry answers", || std::net::TcpStream::connect(&self.address).ok());
    }

    /// Ends the process; the contents stay.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill the registry");
            child.wait().expect("reap the registry");
        }
    }

    /// `certs.d`: one directory for this registry with its authority.
    pub fn certs_dir(&self) -> PathBuf {
        let certs = self.dir.path().join("certs.d");
        let own = certs.join(&self.address);
        fs::create_dir_all(&own).expect("a directory for the authority");
        fs::copy(self.dir.path().join("ca.crt"), own.join("ca.crt")).expect("copy the authority");
        certs
    }

    /// `config.json` as `docker login` writes it.
    pub fn auth_file(&self, name: &str, password: &str) -> PathBuf {
        use std::io::Write;
        let mut encoder = Command::new("base64")
            .arg("-w0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("base64 runs");
        let login = format!("{name}:{password}");
        encoder.stdin.take().expect("piped").write_all(login.as_bytes()).expect("base64 reads");
        let encoded = encoder.wait_with_output().expect("base64 ends").stdout;
        let path = self.dir.path().join(format!("{name}-{password}.json"));
        let auth = String::from_utf8(encoded).expect("base64 is ASCII");
        fs::write(&path, json!({"auths": {&self.address: {"auth": auth}}}).to_string()).expect("write it");
        path
    }

    /// Copies an archive to `<address>/<name>` and returns that reference.
    pub fn push(&self, archive: &Path, name: &str) -> String {
        self.copy(&format!("docker-archive:{}", archive.display()), name, &[])
    }

    /// Copies `tag` of a layout as it is, all platforms.
    pub fn push_layout(&self, layout: &Layout, tag: &str, name: &str) -> String {
        let source = format!("oci:{}:{tag}", layout.path().display());
        self.copy(&source, name, &["--all", "--preserve-digests"])
    }

    /// `skopeo copy SOURCE docker://<address>/<name>`.
    pub fn copy(&self, source: &str, name: &str, options: &[&str]) -> String {
        let reference = format!("{}/{name}", self.address);
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]).args(options);
        if let Some((name, password)) = self.access.login {
            command.arg(format!("--dest-creds={name}:{password}"));
        }
        run(command.arg(source).arg(format!("docker://{reference}")));
        reference
    }

    /// Lines of the access log that contain all of `parts`.
    pub fn requests(&self, parts: &[&str]) -> usize {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        log.lines()
            .filter(|line| line.contains("HTTP/") && parts.iter().all(|part| line.contains(part)))
            .count()
    }

    /// Where the registry keeps the bytes of a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        let blobs = self.dir.path().join("storage/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn make_certificates(dir: &Path, ip: &str) {
    let openssl = |arguments: &[&str]| run(Command::new("openssl").current_dir(dir).args(arguments));
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    openssl(
        &[
            &["req", "-x509"],
            &key[..],
            &["-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test authority"],
        ]
        .concat(),
    );
    openssl(
        &[&["req"], &key[..], &["-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=registry"]]
            .concat(),
    );
    fs::write(dir.join("san"), format!("subjectAltName=IP:{ip}\n")).expect("write the extension");
    openssl(&[
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-out",
        "server.crt",
        "-days",
        "2",
        "-extfile",
        "san",
    ]);
}
