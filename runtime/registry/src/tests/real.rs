//! Against the reference registry (`docker-registry`), with images that skopeo pushed.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::fixture::{Content, Packing, noise};
use super::{Bench, options, silent};
use crate::{Client, ClientOptions, Platform, PullError};

/// Programs of the lab; a machine without them skips these tests and says so.
pub(super) fn lab_is_here(programs: &[&str]) -> bool {
    let missing: Vec<&&str> = programs
        .iter()
        .filter(|program| {
            !std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
                .any(|dir| dir.join(program).is_file())
        })
        .collect();
    if !missing.is_empty() {
        eprintln!("SKIPPED: {missing:?} not installed");
    }
    missing.is_empty()
}

/// A registry process with its data in a directory of its own.
pub(super) struct Registry {
    process: Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    pub(super) fn plain() -> Self {
        Self::start(|_| json!({}), json!({}))
    }

    /// `http` and `auth` sections of its configuration; `http` may write files first.
    pub(super) fn start(http: impl FnOnce(&Path) -> serde_json::Value, auth: serde_json::Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut http = http(dir.path());
        // Free a moment ago; the loop below notices when somebody else was faster.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        http["addr"] = json!(format!("127.0.0.1:{port}"));
        let mut config = json!({
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": true}},
            "storage": {"filesystem": {"rootdirectory": dir.path().join("data")}},
            "http": http,
        });
        if auth != json!({}) {
            config["auth"] = auth;
        }
        let path = dir.path().join("registry.yml");
        // JSON is YAML.
        fs::write(&path, config.to_string()).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut registry = Self { process, dir, port };
        registry.wait();
        registry
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if self.process.try_wait().unwrap().is_some() || Instant::now() > deadline {
                let mut log = String::new();
                fs::File::open(self.path().join("log")).unwrap().read_to_string(&mut log).unwrap();
                panic!("the registry does not start: {log}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn reference(&self, tag: &str) -> String {
        format!("{}/keel/x:{tag}", self.host())
    }

    /// Pushes `tag` of the content with skopeo.
    pub(super) fn push(&self, content: &Content, tag: &str, more: &[&str]) {
        let layout = tempfile::tempdir().unwrap();
        content.write_layout(layout.path());
        let output = Command::new("skopeo")
            .args(["copy", "--insecure-policy", "--quiet", "--dest-tls-verify=false"])
            .args(more)
            .arg(format!("oci:{}:{tag}", layout.path().display()))
            .arg(format!("docker://{}", self.reference(tag)))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

const KEEP: &[&str] = &["--all", "--preserve-digests"];

#[tokio::test(flavor = "multi_thread")]
async fn every_packing_and_both_manifest_formats_are_pulled() {
    if !lab_is_here(&["docker-registry", "skopeo"]) {
        return;
    }
    let registry = Registry::plain();
    let big = noise(5 << 20, 3);
    let mut content = Content::default();
    let digest = content.image(
        "oci",
        "amd64",
        &[
            (Packing::Gzip, &[("a", b"gzip"), ("shadowed", b"low")]),
            (Packing::Zstd, &[("b", b"zstd")]),
            (Packing::Plain, &[("c", b"plain"), ("shadowed", b"high"), ("big", &big)]),
            // the same layer twice, as builders make of empty steps
            (Packing::Gzip, &[("a", b"gzip"), ("shadowed", b"low")]),
        ],
    );
    content.image("gz", "amd64", &[(Packing::Gzip, &[("a", b"two")])]);
    registry.push(&content, "oci", KEEP);
    registry.push(&content, "gz", &["--format", "v2s2"]);

    let bench = Bench::new();
    let image = bench.pull(options(), &registry.reference("oci")).await.unwrap();
    assert_eq!(image.manifest_digest, digest);
    assert_eq!(image.layers.len(), 4);
    for (name, expected) in [("a", b"gzip".as_slice()), ("b", b"zstd"), ("c", b"plain"), ("big", &big)] {
        assert_eq!(bench.file(&image, name), expected, "{name}");
    }
    assert_eq!(bench.store.image(&registry.reference("oci")).unwrap().unwrap().manifest_digest, digest);

    let docker = bench.pull(options(), &registry.reference("gz")).await.unwrap();
    assert_eq!(docker.manifest_media_type, crate::manifest::DOCKER_MANIFEST);
    assert_eq!(bench.file(&docker, "a"), b"two");

    for reference in [
        format!("{}/keel/x@{digest}", registry.host()),
        format!("{}/keel/x:oci@{digest}", registry.host()),
        format!("localhost:{}/keel/x:oci", registry.port),
    ] {
        let image = bench.pull(options(), &reference).await.unwrap();
        assert_eq!((image.reference, image.manifest_digest), (reference, digest));
    }
    let error = bench.pull(options(), &registry.reference("absent")).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_pulled_for_each_platform() {
    if !lab_is_here(&["docker-registry", "skopeo"]) {
        return;
    }
    let registry = Registry::plain();
    let mut content = Content::default();
    let amd64 = content.image("amd64", "amd64", &[(Packing::Gzip, &[("name", b"amd64")])]);
    let arm64 = content.image("arm64", "arm64", &[(Packing::Gzip, &[("name", b"arm64")])]);
    let armv7 = content.image("armv7", "arm", &[(Packing::Gzip, &[("name", b"armv7")])]);
    let index = content
        .index("multi", &[("amd64", None, amd64), ("arm64", Some("v8"), arm64), ("arm", Some("v7"), armv7)]);
    registry.push(&content, "multi", KEEP);
    let bench = Bench::new();
    for (platform, name, digest) in
        [("linux/amd64", "amd64", amd64), ("linux/arm64", "arm64", arm64), ("linux/arm/v7", "armv7", armv7)]
    {
        for reference in [registry.reference("multi"), format!("{}/keel/x@{index}", registry.host())] {
            let platform = Platform::parse(platform).unwrap();
            let image = bench.pull_for(options(), &reference, platform).await.unwrap();
            assert_eq!(image.manifest_digest, digest, "{reference}");
            assert_eq!(bench.file(&image, "name"), name.as_bytes());
        }
    }
    let riscv = Platform::parse("linux/riscv64").unwrap();
    let error = bench.pull_for(options(), &registry.reference("multi"), riscv).await.unwrap_err();
    assert!(error.to_string().contains("linux/amd64, linux/arm64/v8, linux/arm/v7"), "{error}");
}

/// An authority, and a certificate of `name` signed by it, as files in `dir`.
fn certificates(dir: &Path, name: &str) {
    let run = |args: &[&str]| {
        let output = Command::new("openssl").args(args).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    if !dir.join("ca.crt").exists() {
        run(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            "ca.pem",
            "-out",
            "ca.crt",
            "-subj",
            "/CN=keel test authority",
            "-days",
            "2",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        ]);
    }
    let (key, request, certificate) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.cert"));
    run(&[
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-keyout",
        &key,
        "-out",
        &request,
        "-subj",
        &format!("/CN={name}"),
    ]);
    fs::write(
        dir.join("ext"),
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n",
    )
    .unwrap();
    run(&[
        "x509",
        "-req",
        "-in",
        &request,
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.pem",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "ext",
        "-out",
        &certificate,
    ]);
}

fn tls(dir: &Path) -> serde_json::Value {
    certificates(dir, "server");
    json!({"tls": {"certificate": dir.join("server.cert"), "key": dir.join("server.key")}})
}

/// `certs.d/<host>/` with these files of the registry's directory.
fn certs_d(registry: &Registry, names: &[&str]) -> PathBuf {
    let root = registry.path().join("certs.d");
    let dir = root.join(registry.host());
    fs::create_dir_all(&dir).unwrap();
    for name in names {
        fs::copy(registry.path().join(name), dir.join(name)).unwrap();
    }
    root
}

pub(super) fn small() -> Content {
    let mut content = Content::default();
    content.image("1", "amd64", &[(Packing::Gzip, &[("a", b"x")])]);
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_the_authority_and_takes_it_from_every_place() {
    if !lab_is_here(&["docker-registry", "skopeo", "openssl"]) {
        return;
    }
    let registry = Registry::start(tls, json!({}));
    registry.push(&small(), "1", KEEP);
    let bench = Bench::new();
    let reference = registry.reference("1");
    let error = bench.pull(options(), &reference).await.unwrap_err();
    assert!(matches!(error, PullError::UnknownCa { .. }), "{error}");
    assert!(error.hint().unwrap().contains(&format!("certs.d/{}/ca.crt", registry.host())));
    assert!(!error.is_retryable());

    // One client lives through it all: certificates that are added are found without a restart.
    let dirs = vec![certs_d(&registry, &[])];
    let client = Client::new(ClientOptions { certs_dirs: dirs.clone(), ..options() });
    let pull = async || {
        let amd64 = Platform::parse("linux/amd64").unwrap();
        client.pull(&Bench::new().store, &reference, amd64, silent()).await
    };
    assert!(matches!(pull().await, Err(PullError::UnknownCa { .. })));
    certs_d(&registry, &["ca.crt"]);
    pull().await.unwrap();

    let ca = registry.path().join("ca.crt");
    for options in [
        ClientOptions { extra_ca_files: vec![ca], ..options() },
        ClientOptions { certs_dirs: vec![certs_d(&registry, &["ca.crt"])], ..options() },
        ClientOptions { insecure_registries: vec![registry.host()], ..options() },
        ClientOptions { insecure_registries: vec!["127.0.0.1".to_owned()], ..options() },
    ] {
        bench.pull(options, &reference).await.unwrap();
    }
    let broken = registry.path().join("broken.crt");
    fs::write(&broken, "-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n").unwrap();
    let error = bench
        .pull(ClientOptions { extra_ca_files: vec![broken], ..options() }, &reference)
        .await
        .unwrap_err();
    assert!(matches!(error, PullError::CertificateFile { .. }), "{error}");
}

/// As guides have it: one certificate that signs itself, says that it is an authority, and is the server's.
fn self_signed(dir: &Path) -> serde_json::Value {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "self.key", "-out", "self.crt"])
        .args(["-subj", "/CN=localhost", "-days", "2", "-addext", "subjectAltName=IP:127.0.0.1"])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    json!({"tls": {"certificate": dir.join("self.crt"), "key": dir.join("self.key")}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_self_signed_certificate_is_trusted_by_name_and_for_its_names_only() {
    if !lab_is_here(&["docker-registry", "skopeo", "openssl"]) {
        return;
    }
    let registry = Registry::start(self_signed, json!({}));
    registry.push(&small(), "1", KEEP);
    let bench = Bench::new();
    let reference = registry.reference("1");
    let error = bench.pull(options(), &reference).await.unwrap_err();
    assert!(error.hint().unwrap().contains(&format!("certs.d/{}/ca.crt", registry.host())), "{error:?}");
    let trusting = |host: &str| {
        let dir = registry.path().join("named").join(host);
        fs::create_dir_all(&dir).unwrap();
        fs::copy(registry.path().join("self.crt"), dir.join("ca.crt")).unwrap();
        ClientOptions { certs_dirs: vec![registry.path().join("named")], ..options() }
    };
    bench.pull(trusting(&registry.host()), &reference).await.unwrap();
    let forward = Forward::to(registry.port, "127.0.0.2:0");
    let host = forward.address.to_string();
    let error = bench.pull(trusting(&host), &format!("{host}/keel/x:1")).await.unwrap_err();
    assert!(matches!(error, PullError::Certificate { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_name_is_refused() {
    if !lab_is_here(&["docker-registry", "openssl"]) {
        return;
    }
    let registry = Registry::start(tls, json!({}));
    let ca = registry.path().join("ca.crt");
    let options = ClientOptions { extra_ca_files: vec![ca], ..options() };
    let reference = format!("127.0.0.2:{}/keel/x:1", registry.port);
    let error = Bench::new().pull(options.clone(), &reference).await.unwrap_err();
    // The registry listens on one address only; what is wrong is that nobody is there.
    assert!(matches!(error, PullError::Refused { .. }), "{error}");
    let forward = Forward::to(registry.port, "127.0.0.2:0");
    let error = Bench::new().pull(options, &format!("{}/keel/x:1", forward.address)).await.unwrap_err();
    assert!(matches!(error, PullError::Certificate { .. }), "{error}");
}

/// Passes connections on to a port of 127.0.0.1.
struct Forward {
    address: std::net::SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Forward {
    fn to(port: u16, listen: &str) -> Self {
        let listener = TcpListener::bind(listen).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let task = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Self { address, task }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates_come_from_certs_d() {
    if !lab_is_here(&["docker-registry", "openssl"]) {
        return;
    }
    let registry = Registry::start(
        |dir| {
            let mut http = tls(dir);
            certificates(dir, "client");
            http["tls"]["clientcas"] = json!([dir.join("ca.crt")]);
            http
        },
        json!({}),
    );
    let bench = Bench::new();
    let without = ClientOptions { extra_ca_files: vec![registry.path().join("ca.crt")], ..options() };
    let error = bench.pull(without, &registry.reference("1")).await.unwrap_err();
    assert!(!matches!(error, PullError::NotFound { .. }), "{error}");
    let dirs = vec![certs_d(&registry, &["ca.crt", "client.cert", "client.key"])];
    let with = ClientOptions { certs_dirs: dirs.clone(), ..options() };
    let dir = dirs[0].join(registry.host());
    registry.push(&small(), "1", &["--dest-tls-verify=true", "--dest-cert-dir", dir.to_str().unwrap()]);
    let image = bench.pull(with.clone(), &registry.reference("1")).await.unwrap();
    assert_eq!(bench.file(&image, "a"), b"x");
    fs::remove_file(dirs[0].join(registry.host()).join("client.key")).unwrap();
    let error = bench.pull(with, &registry.reference("2")).await.unwrap_err();
    assert!(error.to_string().contains("client.key is missing"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn htpasswd_logins_come_from_files_and_helpers() {
    if !lab_is_here(&["docker-registry", "skopeo", "htpasswd"]) {
        return;
    }
    let passwords = tempfile::NamedTempFile::new().unwrap();
    let status = Command::new("htpasswd")
        .arg("-Bbc")
        .arg(passwords.path())
        .args(["keel", "secret"])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let registry =
        Registry::start(|_| json!({}), json!({"htpasswd": {"realm": "r", "path": passwords.path()}}));
    registry.push(&small(), "1", &["--dest-creds", "keel:secret", "--preserve-digests"]);
    let bench = Bench::new();
    let reference = registry.reference("1");

    let error = bench.pull(options(), &reference).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { had_credentials: false, .. }), "{error}");
    let file = |name: &str, body: serde_json::Value| {
        let path = registry.path().join(name);
        fs::write(&path, body.to_string()).unwrap();
        ClientOptions { auth_files: vec![registry.path().join("absent"), path], ..options() }
    };
    // base64 of keel:secret and keel:wrong
    let host = registry.host();
    let good = file("good.json", json!({"auths": {&host: {"auth": "a2VlbDpzZWNyZXQ="}}}));
    bench.pull(good, &reference).await.unwrap();
    let bad = file("bad.json", json!({"auths": {&host: {"auth": "a2VlbDp3cm9uZw=="}}}));
    let error = bench.pull(bad, &reference).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { had_credentials: true, .. }), "{error}");
    assert!(!error.is_retryable());
    let broken = file("broken.json", json!({"auths": [1]}));
    let error = bench.pull(broken, &reference).await.unwrap_err();
    assert!(matches!(error, PullError::AuthFile { .. }), "{error}");
    let helper = file("helper.json", json!({"credHelpers": {&host: "keel-test-does-not-exist"}}));
    let error = bench.pull(helper, &reference).await.unwrap_err();
    assert!(matches!(error, PullError::CredentialHelper { .. }), "{error}");
}
