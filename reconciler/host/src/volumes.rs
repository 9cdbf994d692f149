//! Volumes of a pod on this host: made with the pod, bound into containers, swapped when a ConfigMap or Secret changes.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{
    DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink,
};
use std::path::{Component, Path, PathBuf};

use keel_manifest::model::{
    Container, EmptyDirVolume, HostPathType, HostPathVolume, StorageMedium, Volume, VolumeMount,
};
use keel_plan::{ContainerId, DesiredPod, VolumeFiles};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::paths::Paths;
use crate::spec::{BindMount, Wanted};
use crate::state::{At, PathError, names, remove_file, remove_tree};

/// Kubernetes' and Docker's size of `/dev/shm`.
const SHM_BYTES: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volume {volume}: hostPath {path} is not {wanted}")]
    HostPathType { volume: String, path: String, wanted: &'static str },
    #[error("volume {volume}: hostPath {path} does not exist")]
    HostPathMissing { volume: String, path: String },
    #[error("volume {volume}: {message}")]
    BadVolume { volume: String, message: String },
    #[error("volume {volume}: subPath {sub_path} leads out of the volume")]
    SubPathEscapes { volume: String, sub_path: String },
    #[error("volume {volume}")]
    Io {
        volume: String,
        #[source]
        source: PathError,
    },
}

trait InVolume<T> {
    fn in_volume(self, volume: &str) -> Result<T, VolumeError>;
}

impl<T> InVolume<T> for Result<T, PathError> {
    fn in_volume(self, volume: &str) -> Result<T, VolumeError> {
        self.map_err(|source| VolumeError::Io { volume: volume.to_string(), source })
    }
}

/// Makes every volume of the pod. Done twice, the second time finds them.
pub(crate) fn create(paths: &Paths, pod: &DesiredPod) -> Result<(), VolumeError> {
    let group = fs_group(pod);
    for volume in &pod.spec.volumes {
        if let Some(host) = &volume.host_path {
            check_host_path(&volume.name, host)?;
        } else if let Some(empty) = &volume.empty_dir {
            create_empty_dir(paths, pod, &volume.name, empty, group).in_volume(&volume.name)?;
        } else if let Some(files) = pod.resolved.files.get(&volume.name) {
            let dir = paths.pod_run_volume(&pod.id, &volume.name);
            write_files(&dir, files, group).in_volume(&volume.name)?;
        }
    }
    create_shm(paths, pod).in_volume("/dev/shm")
}

/// New contents for the ConfigMap and Secret volumes: each one changes as a whole or not at all.
pub(crate) fn sync(paths: &Paths, pod: &DesiredPod) -> Result<(), VolumeError> {
    let group = fs_group(pod);
    for (name, files) in &pod.resolved.files {
        write_files(&paths.pod_run_volume(&pod.id, name), files, group).in_volume(name)?;
    }
    Ok(())
}

/// Unmounts and deletes all volumes of a pod; the directories on disk too.
pub(crate) fn remove(paths: &Paths, id: &keel_plan::PodId) -> Result<(), PathError> {
    let dir = paths.pod(id).join("volumes");
    for name in names(&dir)? {
        unmount(&dir.join(name))?;
    }
    unmount(&paths.pod_shm(id))?;
    remove_tree(&dir)?;
    remove_tree(&paths.pod_state(id).join("volumes"))
}

/// The bind mounts of one container. A `subPath` is resolved here, inside its volume and by file descriptor, and pinned
/// by a mount of its own, since the path could be exchanged for a link between this check and the runtime's use of it.
pub(crate) fn bind_mounts(
    paths: &Paths,
    pod: &DesiredPod,
    container: &Container,
    id: &ContainerId,
) -> Result<Vec<BindMount>, VolumeError> {
    let mut mounts = Vec::new();
    for (index, wanted) in container.volume_mounts.iter().enumerate() {
        let volume = pod.spec.volumes.iter().find(|v| v.name == wanted.name).ok_or_else(|| {
            VolumeError::BadVolume { volume: wanted.name.clone(), message: "is not declared".into() }
        })?;
        let (source, fixed) = source_of(paths, pod, volume);
        let source = match wanted.sub_path.as_deref().filter(|sub| !sub.is_empty()) {
            None => source,
            Some(sub) => {
                let pin = paths.container(id).join("subpaths").join(index.to_string());
                pin_sub_path(wanted, &source, sub, fixed, &pin)?;
                pin
            }
        };
        mounts.push(BindMount {
            source,
            target: wanted.mount_path.clone(),
            read_only: wanted.read_only || fixed,
        });
    }
    Ok(mounts)
}

/// Unmounts what [`bind_mounts`] pinned.
pub(crate) fn unpin(paths: &Paths, id: &ContainerId) -> Result<(), PathError> {
    let dir = paths.container(id).join("subpaths");
    for name in names(&dir)? {
        unmount(&dir.join(name))?;
    }
    Ok(())
}

/// Host path of a volume, and whether containers may only read it.
fn source_of(paths: &Paths, pod: &DesiredPod, volume: &Volume) -> (PathBuf, bool) {
    if let Some(host) = &volume.host_path {
        return (PathBuf::from(&host.path), false);
    }
    if let Some(empty) = &volume.empty_dir {
        return (empty_dir_path(paths, pod, &volume.name, empty), false);
    }
    (paths.pod_run_volume(&pod.id, &volume.name), true)
}

fn empty_dir_path(paths: &Paths, pod: &DesiredPod, name: &str, empty: &EmptyDirVolume) -> PathBuf {
    match empty.medium.unwrap_or_default() {
        StorageMedium::Memory => paths.pod_run_volume(&pod.id, name),
        StorageMedium::Disk => paths.pod_disk_volume(&pod.id, name),
    }
}

fn create_empty_dir(
    paths: &Paths,
    pod: &DesiredPod,
    name: &str,
    empty: &EmptyDirVolume,
    group: Option<u32>,
) -> Result<(), PathError> {
    let dir = empty_dir_path(paths, pod, name, empty);
    make_dir(&dir)?;
    if empty.medium == Some(StorageMedium::Memory) && !is_mount_point(&dir)? {
        let bound = [size_limit(empty), memory_limit(pod)].into_iter().flatten().min();
        mount_tmpfs(&dir, bound, 0o777)?;
    }
    share(&dir, 0o777, group)
}

/// Zero means "no limit", as in Kubernetes.
pub(crate) fn size_limit(empty: &EmptyDirVolume) -> Option<u64> {
    empty.size_limit.as_ref().and_then(|limit| limit.bytes().ok()).filter(|bytes| *bytes > 0)
}

/// What all containers together may have, where each has a limit: what they write to a tmpfs counts as theirs.
fn memory_limit(pod: &DesiredPod) -> Option<u64> {
    pod.spec.containers.iter().map(|container| Wanted::of(container).memory_limit).sum()
}

fn create_shm(paths: &Paths, pod: &DesiredPod) -> Result<(), PathError> {
    if pod.spec.host_ipc {
        return Ok(());
    }
    let dir = paths.pod_shm(&pod.id);
    make_dir(&dir)?;
    if is_mount_point(&dir)? { Ok(()) } else { mount_tmpfs(&dir, Some(SHM_BYTES), 0o1777) }
}

/// Without a size the kernel's own bound holds: half of the host's memory.
fn mount_tmpfs(dir: &Path, bytes: Option<u64>, mode: u32) -> Result<(), PathError> {
    let size = bytes.map(|bytes| format!(",size={bytes}")).unwrap_or_default();
    let options = format!("mode={mode:o}{size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some(options.as_str())).at("mount tmpfs on", dir)
}

fn check_host_path(volume: &str, host: &HostPathVolume) -> Result<(), VolumeError> {
    let path = Path::new(&host.path);
    let kind = host.kind.unwrap_or_default();
    let found = match fs::metadata(path) {
        Ok(found) => Some(found),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e).at("stat", path).in_volume(volume),
    };
    let Some(found) = found else {
        return match kind {
            // Kubernetes checks nothing here, and its runtimes make what is missing.
            HostPathType::DirectoryOrCreate | HostPathType::Unset => {
                DirBuilder::new().recursive(true).mode(0o755).create(path).at("create directory", path)
            }
            HostPathType::FileOrCreate => OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(path)
                .map(drop)
                .at("create", path),
            _ => {
                return Err(VolumeError::HostPathMissing {
                    volume: volume.to_string(),
                    path: host.path.clone(),
                });
            }
        }
        .in_volume(volume);
    };
    let file = found.file_type();
    let (fits, wanted) = match kind {
        HostPathType::Unset => (true, ""),
        HostPathType::DirectoryOrCreate | HostPathType::Directory => (file.is_dir(), "a directory"),
        HostPathType::FileOrCreate | HostPathType::File => (file.is_file(), "a file"),
        HostPathType::Socket => (file.is_socket(), "a socket"),
        HostPathType::CharDevice => (file.is_char_device(), "a character device"),
        HostPathType::BlockDevice => (file.is_block_device(), "a block device"),
    };
    if fits {
        Ok(())
    } else {
        Err(VolumeError::HostPathType { volume: volume.to_string(), path: host.path.clone(), wanted })
    }
}

/// Writes the files into a new `..<n>` directory and points `..data` at it by one rename, as the kubelet does, so that
/// programs which watch for that rename work unchanged. Equal contents change nothing.
fn write_files(dir: &Path, files: &VolumeFiles, group: Option<u32>) -> Result<(), PathError> {
    make_dir(dir)?;
    if files.secret {
        give_memory(dir, secret_bytes(files))?;
    }
    share(dir, 0o755, group)?;
    let link = dir.join("..data");
    let current = fs::read_link(&link).ok();
    if let Some(current) = &current
        && holds(&dir.join(current), files, group)
    {
        return link_names(dir, files);
    }
    let next = unused_name(dir)?;
    let fresh = dir.join(&next);
    make_dir(&fresh)?;
    for (name, (contents, mode)) in &files.files {
        write_one(&fresh, name, contents, *mode, group)?;
    }
    share(&fresh, 0o755, group)?;
    let pointer = dir.join("..data_tmp");
    remove_file(&pointer)?;
    symlink(&next, &pointer).at("link", &pointer)?;
    fs::rename(&pointer, &link).at("rename to", &link)?;
    link_names(dir, files)?;
    for stale in names(dir)? {
        if stale.starts_with("..") && stale != "..data" && stale != next {
            remove_tree(&dir.join(stale))?;
        }
    }
    Ok(())
}

fn write_one(
    dir: &Path,
    name: &str,
    contents: &[u8],
    mode: u32,
    group: Option<u32>,
) -> Result<(), PathError> {
    let path = dir.join(name);
    if let Some(parent) = path.parent().filter(|parent| *parent != dir) {
        DirBuilder::new().recursive(true).mode(0o755).create(parent).at("create directory", parent)?;
        share(parent, 0o755, group)?;
    }
    let mut file = File::create(&path).at("create", &path)?;
    file.write_all(contents).at("write", &path)?;
    chown(&path, None, group).at("change owner of", &path)?;
    fs::set_permissions(&path, Permissions::from_mode(file_mode(mode, group))).at("change mode of", &path)
}

/// Top-level names are links through `..data`; names that are gone from the source go too.
fn link_names(dir: &Path, files: &VolumeFiles) -> Result<(), PathError> {
    let wanted: BTreeSet<String> =
        files.files.keys().filter_map(|name| name.split('/').next().map(str::to_string)).collect();
    for name in &wanted {
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(name), &link).at("link", &link)?;
        }
    }
    for name in names(dir)? {
        if !name.starts_with("..") && !wanted.contains(&name) {
            remove_file(&dir.join(name))?;
        }
    }
    Ok(())
}

fn holds(dir: &Path, files: &VolumeFiles, group: Option<u32>) -> bool {
    let mut count = 0;
    for (name, (contents, mode)) in &files.files {
        let path = dir.join(name);
        let same_mode =
            fs::metadata(&path).is_ok_and(|found| found.mode() & 0o7777 == file_mode(*mode, group));
        match fs::read(&path) {
            Ok(found) if same_mode && found[..] == contents[..] => count += 1,
            _ => return false,
        }
    }
    count == count_files(dir)
}

/// The group of the pod reads its volumes, whatever the manifest's bits for others say.
fn file_mode(mode: u32, group: Option<u32>) -> u32 {
    if group.is_some() { mode | 0o440 } else { mode }
}

fn count_files(dir: &Path) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries.flatten().map(|entry| if entry.path().is_dir() { count_files(&entry.path()) } else { 1 }).sum()
}

fn unused_name(dir: &Path) -> Result<String, PathError> {
    let highest = names(dir)?.iter().filter_map(|name| name.strip_prefix("..")?.parse::<u64>().ok()).max();
    Ok(format!("..{}", highest.unwrap_or(0) + 1))
}

fn secret_bytes(files: &VolumeFiles) -> u64 {
    // Twice the contents, since a swap holds both, and some pages for directories.
    let contents: usize = files.files.values().map(|(bytes, _)| bytes.len() + 8192).sum();
    (contents as u64 * 2).max(1 << 20)
}

fn pin_sub_path(
    wanted: &VolumeMount,
    volume_dir: &Path,
    sub_path: &str,
    read_only: bool,
    pin: &Path,
) -> Result<(), VolumeError> {
    let escapes =
        || VolumeError::SubPathEscapes { volume: wanted.name.clone(), sub_path: sub_path.to_string() };
    let relative = Path::new(sub_path);
    if relative.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(escapes());
    }
    let root = File::open(volume_dir).at("open", volume_dir).in_volume(&wanted.name)?;
    let found = match open_beneath(&root, relative) {
        Ok(found) => found,
        Err(nix::Error::EXDEV | nix::Error::ELOOP) => return Err(escapes()),
        Err(nix::Error::ENOENT) if !read_only => {
            create_beneath(&root, relative).at("create", volume_dir.join(relative)).in_volume(&wanted.name)?
        }
        Err(e) => return Err(e).at("open", volume_dir.join(relative)).in_volume(&wanted.name),
    };
    bind_fd(&found, pin).in_volume(&wanted.name)
}

fn open_beneath(root: &File, path: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Missing directories of a `subPath` are made, one component at a time and never through a link that is not ours.
fn create_beneath(root: &File, path: &Path) -> nix::Result<OwnedFd> {
    let mut walked = PathBuf::new();
    for part in path.components() {
        let parent = if walked.as_os_str().is_empty() {
            open_beneath(root, Path::new("."))?
        } else {
            open_beneath(root, &walked)?
        };
        match nix::sys::stat::mkdirat(&parent, Path::new(part.as_os_str()), Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(e) => return Err(e),
        }
        walked.push(part);
    }
    open_beneath(root, path)
}

fn bind_fd(found: &OwnedFd, pin: &Path) -> Result<(), PathError> {
    let is_dir = nix::sys::stat::fstat(found)
        .map(|s| SFlag::from_bits_truncate(s.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR);
    let parent = pin.parent().unwrap_or(pin);
    make_dir(parent)?;
    unmount(pin)?;
    if is_dir.at("stat", pin)? {
        make_dir(pin)?;
    } else {
        File::create(pin).at("create", pin)?;
    }
    let source = format!("/proc/self/fd/{}", found.as_raw_fd());
    mount(Some(source.as_str()), pin, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .at("bind to", pin)
}

fn fs_group(pod: &DesiredPod) -> Option<u32> {
    pod.spec.security_context.as_ref().and_then(|security| security.fs_group)
}

/// Mode and, with `fsGroup`, group and the bit that new files inherit it by.
fn share(dir: &Path, mode: u32, group: Option<u32>) -> Result<(), PathError> {
    let mode = if group.is_some() { mode | 0o2070 } else { mode };
    if group.is_some() {
        chown(dir, None, group).at("change owner of", dir)?;
    }
    fs::set_permissions(dir, Permissions::from_mode(mode)).at("change mode of", dir)
}

fn make_dir(dir: &Path) -> Result<(), PathError> {
    DirBuilder::new().recursive(true).mode(0o755).create(dir).at("create directory", dir)
}

/// A tmpfs of its own that holds so many bytes, unless the directory is in memory already. One that is there grows.
fn give_memory(dir: &Path, bytes: u64) -> Result<(), PathError> {
    if !on_tmpfs(dir)? {
        return mount_tmpfs(dir, Some(bytes), 0o755);
    }
    if !is_mount_point(dir)? {
        return Ok(());
    }
    let found = statfs(dir).at("stat file system of", dir)?;
    let size = u64::try_from(found.block_size()).unwrap_or(0).saturating_mul(found.blocks());
    if size >= bytes {
        return Ok(());
    }
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = format!("size={bytes}");
    mount(None::<&str>, dir, None::<&str>, flags, Some(options.as_str())).at("resize tmpfs on", dir)
}

fn on_tmpfs(dir: &Path) -> Result<bool, PathError> {
    Ok(statfs(dir).at("stat file system of", dir)?.filesystem_type() == TMPFS_MAGIC)
}

/// A mount point has another device than its parent. Binds within one file system are not told apart; none is asked about.
fn is_mount_point(dir: &Path) -> Result<bool, PathError> {
    let parent = dir.parent().unwrap_or(dir);
    Ok(fs::metadata(dir).at("stat", dir)?.dev() != fs::metadata(parent).at("stat", parent)?.dev())
}

/// Takes away every mount at `path`. Not mounted, or not there, is success. Lazy: a process that still sits in it must
/// not keep the pod from going.
pub(crate) fn unmount(path: &Path) -> Result<(), PathError> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(e) => return Err(e).at("unmount", path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn files(list: &[(&str, &str)]) -> VolumeFiles {
        VolumeFiles {
            files: list
                .iter()
                .map(|(name, text)| (name.to_string(), (Arc::from(text.as_bytes()), 0o644)))
                .collect(),
            secret: false,
        }
    }

    #[test]
    fn a_swap_changes_all_files_and_drops_old_names() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        write_files(&volume, &files(&[("a", "1"), ("sub/b", "2")]), None).unwrap();
        assert_eq!(fs::read_to_string(volume.join("sub/b")).unwrap(), "2");
        let before = fs::read_link(volume.join("..data")).unwrap();
        write_files(&volume, &files(&[("a", "1"), ("sub/b", "2")]), None).unwrap();
        assert_eq!(before, fs::read_link(volume.join("..data")).unwrap(), "equal contents swap nothing");
        write_files(&volume, &files(&[("c", "3")]), None).unwrap();
        assert_eq!(fs::read_to_string(volume.join("c")).unwrap(), "3");
        assert!(fs::symlink_metadata(volume.join("a")).is_err());
        assert_eq!(names(&volume).unwrap(), ["..2", "..data", "c"]);
    }

    #[test]
    fn sub_path_never_leaves_its_volume() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        fs::create_dir(&volume).unwrap();
        symlink("/etc", volume.join("out")).unwrap();
        let wanted = VolumeMount { name: "v".into(), ..VolumeMount::default() };
        for sub in ["out", "out/passwd", "../x", "/etc"] {
            let result = pin_sub_path(&wanted, &volume, sub, false, &dir.path().join("pin"));
            assert!(matches!(result, Err(VolumeError::SubPathEscapes { .. })), "{sub}: {result:?}");
        }
    }
}
