//! Root file systems that are more than layers on top of each other.

use super::{Bench, Tar};
use crate::tar::{Entry, Kind};
use crate::{Image, RootfsOptions};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A user namespace whose ids begin at 100000, and the process that keeps it.
pub(super) struct UserNamespace(Child, pub(super) File);

impl UserNamespace {
    pub(super) fn new() -> UserNamespace {
        let child = Command::new("unshare")
            .args(["--user", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let proc = PathBuf::from(format!("/proc/{}", child.id()));
        let own = std::fs::read_link("/proc/self/ns/user").unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::fs::read_link(proc.join("ns/user")).unwrap() == own {
            assert!(std::time::Instant::now() < deadline, "unshare makes a namespace");
            std::thread::yield_now();
        }
        for map in ["uid_map", "gid_map"] {
            std::fs::write(proc.join(map), "0 100000 65536").unwrap();
        }
        let file = File::open(proc.join("ns/user")).unwrap();
        UserNamespace(child, file)
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn image(bench: &Bench) -> Image {
    let mut owned = Entry::plain("owned".into(), Kind::File, 0o640);
    (owned.uid, owned.gid) = (33, 34);
    let base = Tar::default().dir("./", 0o755).with(owned, b"owned").file("root", "root").end();
    bench.image("a", &[base, Tar::default().dir("./", 0o751).file("top", "top").end()])
}

fn dirs(bench: &Bench) -> [PathBuf; 3] {
    ["upper", "work", "mnt"].map(|name| {
        let path = bench.path(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    })
}

fn owner(path: &Path) -> (u32, u32) {
    let found = std::fs::symlink_metadata(path).unwrap();
    (found.uid(), found.gid())
}

#[test]
fn in_a_user_namespace_files_of_the_image_belong_to_its_users_without_a_copy() {
    let bench = Bench::new();
    let image = image(&bench);
    let [upper, work, mnt] = dirs(&bench);
    let namespace = UserNamespace::new();
    let options = RootfsOptions { user_namespace: Some(namespace.1.as_fd()), ..RootfsOptions::default() };
    bench.store.mount_rootfs_with(&image, Some((&upper, &work)), &mnt, options).unwrap();
    assert_eq!(owner(&mnt.join("owned")), (100_033, 100_034));
    assert_eq!(owner(&mnt.join("root")), (100_000, 100_000));
    assert_eq!(owner(&mnt), (100_000, 100_000));
    // What is copied up keeps its owner, and the layer stays what it is for everybody else.
    std::fs::write(mnt.join("owned"), "changed").unwrap();
    assert_eq!(owner(&upper.join("owned")), (100_033, 100_034));
    let layer = bench.store.inner.layer_dir(&image.layers[0].diff_id).join("fs");
    assert_eq!(owner(&layer.join("owned")), (33, 34));
    bench.store.unmount_rootfs(&mnt).unwrap();
    // Read-only too.
    bench.store.mount_rootfs_with(&image, None, &mnt, options).unwrap();
    assert_eq!(owner(&mnt.join("owned")), (100_033, 100_034));
    bench.store.unmount_rootfs(&mnt).unwrap();
    assert_eq!(bench.store.verify(crate::Depth::Full, false).unwrap().damage, []);
}

#[test]
fn volatile_is_off_unless_asked_for_and_its_writable_directory_is_not_trusted_afterwards() {
    let bench = Bench::new();
    let image = image(&bench);
    let [upper, work, mnt] = dirs(&bench);
    let mount = |volatile: bool| {
        let options = RootfsOptions { volatile, ..RootfsOptions::default() };
        bench.store.mount_rootfs_with(&image, Some((&upper, &work)), &mnt, options).unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = mounts.lines().find(|line| line.contains(mnt.to_str().unwrap())).unwrap().to_owned();
        own.split([' ', ',']).any(|option| option == "volatile" || option == "fsync=volatile")
    };
    assert!(!mount(false));
    std::fs::write(mnt.join("kept"), "kept").unwrap();
    assert!(!mount(false));
    assert!(mnt.join("kept").exists());
    assert!(mount(true));
    std::fs::write(mnt.join("written"), "x").unwrap();
    // The kernel would refuse to mount it again.
    assert!(mount(true));
    assert!(!mnt.join("written").exists() && mnt.join("top").exists());
    assert!(!mount(false));
    bench.store.unmount_rootfs(&mnt).unwrap();
}
