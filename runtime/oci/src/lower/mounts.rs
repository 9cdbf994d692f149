//! Everything about the container's file system.

use super::{
    HostFacts, Idmap, Lowered, Namespaces, Request, SpecError, c_string, invalid, lower_hook, rel,
    unsupported,
};
use crate::op::{FsOption, NsKind, Op, Rel, Target};
use crate::spec::{Device, Linux, Mount, Root, Spec};
use keel_cgroup::Mode;
use keel_sys::mount::{self, Attr};
use std::ffi::CString;

pub(super) fn lower_rootfs(
    spec: &Spec,
    linux: &Linux,
    request: &Request,
    facts: &HostFacts,
    namespaces: &Namespaces,
    out: &mut Lowered,
) -> Result<(), SpecError> {
    let root = spec.root.as_ref().ok_or_else(|| invalid("root", "is missing"))?;
    let path = c_string("root.path", &request.rootfs)?;
    let root_path = path.clone();
    if !namespaces.has(NsKind::Mount) {
        refuse_without_mounts(spec, linux, root)?;
        out.ops.push(Op::OpenRoot { path });
        terminal(spec, false, out);
        hooks(spec, out)?;
        out.ops.push(Op::ChangeRoot);
        return Ok(());
    }
    let wanted = root_propagation(linux)?;
    let shared = wanted.is_some_and(|f| f & libc::MS_SHARED != 0);
    // Slave by default: unmounts on the host still arrive, nothing goes back.
    let inherited = wanted.filter(|f| f & libc::MS_UNBINDABLE == 0).unwrap_or(libc::MS_SLAVE | libc::MS_REC);
    out.ops.push(Op::Propagation { flag: (inherited | libc::MS_REC) & !libc::MS_BIND });
    out.ops.push(Op::BindRoot { path, private_parent: shared });
    let mount_label = given(&linux.mount_label).filter(|_| facts.selinux);
    for (i, mount) in spec.mounts.iter().enumerate() {
        let before = out.ops.len();
        lower_mount(i, mount, facts, namespaces, request, out)?;
        if let Some(label) = mount_label {
            out.ops[before..].iter_mut().try_for_each(|op| label_mount(op, label))?;
        }
    }
    let own_dev = spec.mounts.iter().any(|m| clean(&m.destination) == "dev" && is_bind(m));
    if !own_dev {
        lower_devices(linux, namespaces.has(NsKind::User), facts.euid == 0, out)?;
    } else if !linux.devices.is_empty() {
        out.warnings.push("linux.devices are not made: /dev is a directory of the host".to_owned());
    }
    terminal(spec, true, out);
    if let Some(mount) = spec.mounts.iter().find(|m| clean(&m.destination) == "dev" && !is_bind(m))
        && parse_options("mounts", mount)?.read_only
    {
        let target = Target { path: rel("mounts", "/dev")?, real: true, link: false };
        let attr = Attr { set: mount::ATTR_RDONLY, ..Attr::default() };
        out.ops.push(Op::Remount { target, attr, recursive: false });
    }
    if let Some(process) = &spec.process {
        out.ops.push(Op::Directory { path: rel("process.cwd", &process.cwd)?, mode: 0o755 });
    }
    hooks(spec, out)?;
    for path in &linux.readonly_paths {
        out.ops.push(Op::ReadOnly { path: absolute("linux.readonlyPaths", path)? });
    }
    let mut masked = Vec::new();
    for path in &linux.masked_paths {
        if masked.contains(&clean(path)) {
            continue;
        }
        masked.push(clean(path));
        let label = mount_label.map(|l| c_string("linux.mountLabel", l)).transpose()?;
        out.ops.push(Op::Mask { path: absolute("linux.maskedPaths", path)?, label });
    }
    if root.readonly {
        out.ops.push(Op::ReadOnlyRoot);
    }
    out.ops.push(if request.no_pivot { Op::MoveRoot { path: root_path } } else { Op::PivotRoot });
    if let Some(flag) = wanted {
        out.ops.push(Op::RootPropagation { flag });
    }
    Ok(())
}

/// The specification asks for it: what a relative path was meant to protect, nobody knows.
fn absolute(field: &str, path: &str) -> Result<Rel, SpecError> {
    match path.starts_with('/') {
        true => rel(field, path),
        false => Err(invalid(field, format!("{path:?} is not absolute"))),
    }
}

/// What only mounts can do must not be lost in silence.
fn refuse_without_mounts(spec: &Spec, linux: &Linux, root: &Root) -> Result<(), SpecError> {
    for (field, there) in [
        ("mounts", !spec.mounts.is_empty()),
        ("root.readonly", root.readonly),
        ("linux.maskedPaths", !linux.masked_paths.is_empty()),
        ("linux.readonlyPaths", !linux.readonly_paths.is_empty()),
        ("linux.rootfsPropagation", given(&linux.rootfs_propagation).is_some()),
        ("linux.devices", !linux.devices.is_empty()),
    ] {
        if there {
            return Err(invalid(field, "needs a mount namespace"));
        }
    }
    Ok(())
}

fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|t| !t.is_empty())
}

fn terminal(spec: &Spec, bind: bool, out: &mut Lowered) {
    if let Some(process) = &spec.process
        && process.terminal
    {
        let size = process.console_size.unwrap_or_default();
        out.ops.push(Op::Console { bind, rows: size.height, columns: size.width, uid: process.user.uid });
    }
}

fn hooks(spec: &Spec, out: &mut Lowered) -> Result<(), SpecError> {
    let Some(hooks) = &spec.hooks else { return Ok(()) };
    if !hooks.prestart.is_empty() || !hooks.create_runtime.is_empty() {
        out.ops.push(Op::RuntimeHooks);
    }
    let env = spec.process.as_ref().map_or(&[][..], |p| p.env.as_slice());
    if !hooks.create_container.is_empty() {
        out.ops.push(Op::AtRoot);
    }
    for (i, hook) in hooks.create_container.iter().enumerate() {
        let program = lower_hook(&format!("hooks.createContainer[{i}]"), hook, env)?;
        out.ops.push(Op::Hook { program, kind: "createContainer", number: i });
    }
    Ok(())
}

/// Callers may give a destination as the host sees it.
fn below_root<'a>(path: &'a str, rootfs: &str) -> &'a str {
    let below = path.strip_prefix(rootfs).filter(|rest| rest.is_empty() || rest.starts_with('/'));
    below.filter(|_| rootfs.len() > 1).unwrap_or(path)
}

fn clean(path: &str) -> String {
    Rel::new(path).map(|r| r.as_str().to_owned()).unwrap_or_default()
}

fn propagation_word(word: &str) -> Option<u64> {
    let (word, rec) = match word.strip_prefix('r') {
        Some(rest) if matches!(rest, "private" | "shared" | "slave" | "unbindable") => (rest, libc::MS_REC),
        _ => (word, 0),
    };
    let flag = match word {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | rec)
}

fn root_propagation(linux: &Linux) -> Result<Option<u64>, SpecError> {
    match linux.rootfs_propagation.as_deref() {
        None | Some("") => Ok(None),
        Some(word) => propagation_word(word)
            .map(Some)
            .ok_or_else(|| invalid("linux.rootfsPropagation", format!("unknown word {word:?}"))),
    }
}

pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.kind.as_deref() == Some("bind")
        || mount.options.iter().any(|o| matches!(o.as_str(), "bind" | "rbind"))
}

/// Options of one mount, sorted by what they act on.
#[derive(Default)]
struct Options {
    attr: Attr,
    /// What a bind mount has from its source and loses when any attribute is named.
    loses: u64,
    tree_attr: Attr,
    propagation: u64,
    recursive: bool,
    remount: bool,
    copy_up: bool,
    follow_source: bool,
    link_target: bool,
    idmap: Option<bool>,
    /// Options of the superblock and of the file system.
    data: Vec<String>,
    read_only: bool,
}

/// Attribute words: bits to set, bits to clear. An access-time mode clears its whole field.
fn attribute(word: &str) -> Option<(u64, u64)> {
    use mount::*;
    Some(match word {
        "ro" => (ATTR_RDONLY, 0),
        "rw" => (0, ATTR_RDONLY),
        "nosuid" => (ATTR_NOSUID, 0),
        "suid" => (0, ATTR_NOSUID),
        "nodev" => (ATTR_NODEV, 0),
        "dev" => (0, ATTR_NODEV),
        "noexec" => (ATTR_NOEXEC, 0),
        "exec" => (0, ATTR_NOEXEC),
        "noatime" => (ATTR_NOATIME, ATTR_ATIME),
        "relatime" => (ATTR_RELATIME, ATTR_ATIME),
        "strictatime" => (ATTR_STRICTATIME, ATTR_ATIME),
        "atime" | "norelatime" | "nostrictatime" => (ATTR_RELATIME, ATTR_ATIME),
        "nodiratime" => (ATTR_NODIRATIME, 0),
        "diratime" => (0, ATTR_NODIRATIME),
        "nosymfollow" => (ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, ATTR_NOSYMFOLLOW),
        _ => return None,
    })
}

fn apply(attr: &mut Attr, (set, clear): (u64, u64)) {
    attr.set = (attr.set & !clear) | set;
    attr.clear = (attr.clear & !set) | clear;
    // The kernel wants the field of access-time modes named whole when it is touched.
    if (set | clear) & mount::ATTR_ATIME != 0 {
        attr.clear |= mount::ATTR_ATIME;
    }
}

/// As mount(2) remounts a bind: one word names the whole set, and what it does not name is off. The mode of access times
/// is kept until another one is named; words that only deny a mode name none.
fn apply_to_bind(o: &mut Options, word: &str, change: (u64, u64)) {
    use mount::*;
    match word {
        "atime" | "norelatime" | "nostrictatime" | "diratime" => {}
        "noatime" | "relatime" | "strictatime" => {
            apply(&mut o.attr, change);
            o.attr.clear |= ATTR_NODIRATIME & !o.attr.set;
        }
        "nodiratime" => {
            apply(&mut o.attr, change);
            o.attr.clear |= ATTR_ATIME;
        }
        _ => apply(&mut o.attr, change),
    }
    let flags = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NOSYMFOLLOW;
    o.loses = flags & !(o.attr.set | o.attr.clear);
}

fn parse_options(field: &str, mount: &Mount) -> Result<Options, SpecError> {
    let mut o = Options { follow_source: true, ..Options::default() };
    let bind = is_bind(mount);
    for word in &mount.options {
        if let Some(change) = attribute(word) {
            match bind {
                true => apply_to_bind(&mut o, word, change),
                false => apply(&mut o.attr, change),
            }
            o.read_only = o.attr.set & mount::ATTR_RDONLY != 0;
            continue;
        }
        if let Some(flag) = propagation_word(word) {
            o.propagation |= flag;
            continue;
        }
        match word.as_str() {
            "bind" | "defaults" | "async" | "loud" | "silent" | "nomand" | "noiversion" | "nolazytime"
            | "noacl" | "acl" => {}
            "rbind" => o.recursive = true,
            "remount" => o.remount = true,
            "tmpcopyup" => o.copy_up = true,
            "src-nofollow" => o.follow_source = false,
            "dest-nofollow" => o.link_target = true,
            "idmap" => o.idmap = Some(false),
            "ridmap" => o.idmap = Some(true),
            recursive if recursive.starts_with('r') && attribute(&recursive[1..]).is_some() => {
                if let Some(change) = attribute(&recursive[1..]) {
                    apply(&mut o.tree_attr, change);
                }
            }
            "sync" | "dirsync" | "mand" | "iversion" | "lazytime" if bind => {}
            data => {
                c_string(field, data)?;
                o.data.push(data.to_owned());
            }
        }
    }
    if o.copy_up && mount.kind.as_deref() != Some("tmpfs") {
        return Err(invalid(field, "tmpcopyup is for tmpfs only"));
    }
    Ok(o)
}

fn fs_options(field: &str, data: &[String]) -> Result<Vec<FsOption>, SpecError> {
    let mut out = Vec::new();
    for option in data.iter().flat_map(|d| d.split(',')).filter(|o| !o.is_empty()) {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(c_string(field, value)?)),
            None => (option, None),
        };
        out.push(FsOption { key: c_string(field, key)?, value });
    }
    Ok(out)
}

fn lower_mount(
    index: usize,
    mount: &Mount,
    facts: &HostFacts,
    namespaces: &Namespaces,
    request: &Request,
    out: &mut Lowered,
) -> Result<(), SpecError> {
    let field = format!("mounts[{index}] ({})", mount.destination);
    let options = parse_options(&field, mount)?;
    let path = rel(&field, below_root(&mount.destination, &request.rootfs))?;
    let kind = mount.kind.as_deref().unwrap_or("none");
    check_proc(&field, mount, kind, &path)?;
    let real = matches!(kind, "proc" | "sysfs") || is_bind(mount) && path.as_str() == "proc";
    let target = Target { path, real, link: options.link_target };
    if options.remount {
        if let Some(word) = options.data.first() {
            return Err(unsupported(
                format!("{field}: option {word:?}"),
                "remount changes attributes of the mount only",
            ));
        }
        let attr = Attr { propagation: options.propagation & !libc::MS_REC, ..options.attr };
        out.ops.push(Op::Remount { target, attr, recursive: false });
        return Ok(());
    }
    if is_bind(mount) {
        return lower_bind(&field, mount, &options, target, namespaces, request, out);
    }
    if options.idmap.is_some() || !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(unsupported(field, "id mappings are for bind mounts"));
    }
    match kind {
        "cgroup" | "cgroup2" => lower_cgroup(&field, &options, target, facts, namespaces, request, out),
        "none" => Err(invalid(field, "a mount that is not a bind mount needs a type")),
        kind => {
            let op = file_system(&field, kind, mount, &options, target)?;
            out.ops.push(op);
            Ok(())
        }
    }
}

/// What an image may declare must not hide or forge `/proc`.
fn check_proc(field: &str, mount: &Mount, kind: &str, path: &Rel) -> Result<(), SpecError> {
    const ALLOWED: [&str; 11] = [
        "cpuinfo",
        "diskstats",
        "meminfo",
        "stat",
        "swaps",
        "uptime",
        "loadavg",
        "slabinfo",
        "net/dev",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    ];
    match path.as_str() {
        "" => Err(invalid(field, "a mount over the root is not allowed")),
        "proc" if kind != "proc" && !is_bind(mount) => {
            Err(invalid(field, format!("{kind:?} must not be mounted over /proc")))
        }
        path => match path.strip_prefix("proc/") {
            Some(below) if !ALLOWED.contains(&below) && kind != "proc" && !is_binfmt(kind) => {
                Err(invalid(field, "must not be mounted below /proc"))
            }
            _ => Ok(()),
        },
    }
}

/// A file system that has its place below /proc/sys.
fn is_binfmt(kind: &str) -> bool {
    kind == "binfmt_misc"
}

const TMPFS_PARAMETERS: [&str; 7] = ["mode", "size", "uid", "gid", "nr_inodes", "nr_blocks", "huge"];

fn lower_bind(
    field: &str,
    mount: &Mount,
    options: &Options,
    target: Target,
    namespaces: &Namespaces,
    request: &Request,
    out: &mut Lowered,
) -> Result<(), SpecError> {
    let source = mount.source.as_deref().filter(|s| !s.is_empty());
    let source = source.ok_or_else(|| invalid(field, "a bind mount needs a source"))?;
    let source = std::path::Path::new(&request.bundle).join(source);
    for word in &options.data {
        // Callers keep those of a tmpfs in their templates. Any other word may be a slip, such as for "ro".
        let known = word.split_once('=').is_some_and(|(key, _)| TMPFS_PARAMETERS.contains(&key));
        let option = format!("{field}: option {word:?}");
        if !known {
            return Err(invalid(option, "has no meaning for a bind mount"));
        }
        out.warnings.push(format!("{option} has no effect on a bind mount"));
    }
    if mount.uid_mappings.is_empty() != mount.gid_mappings.is_empty() {
        return Err(invalid(field, "uidMappings and gidMappings go together"));
    }
    let idmap = match (options.idmap, mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty()) {
        (None, true) => None,
        (recursive, false) => {
            out.idmaps.push(Idmap::Own(mount.uid_mappings.clone(), mount.gid_mappings.clone()));
            Some((out.idmaps.len() - 1, recursive.unwrap_or(false)))
        }
        (Some(recursive), true) => {
            // Without mappings of its own the mount takes those of the container's user namespace.
            let own = out.id_maps.clone().map(|(uids, gids)| Idmap::Own(uids, gids));
            let maps = own.or_else(|| out.user_join.clone().map(Idmap::Joined));
            out.idmaps.push(maps.ok_or_else(|| invalid(field, "idmap needs mappings"))?);
            Some((out.idmaps.len() - 1, recursive))
        }
    };
    let only_procfs = target.path.as_str() == "proc";
    out.ops.push(Op::Bind {
        source: c_string(field, &source.to_string_lossy())?,
        target,
        recursive: options.recursive,
        follow: options.follow_source,
        attr: options.attr,
        loses: options.loses,
        tree_attr: options.tree_attr,
        propagation: options.propagation & !libc::MS_REC,
        propagate_tree: options.propagation & libc::MS_REC != 0,
        only_procfs,
        idmap,
        outside: idmap.is_some() && namespaces.has(NsKind::User),
    });
    Ok(())
}

/// The SELinux context of a new file system. Those of the kernel have labels of their own, bind mounts keep theirs.
fn label_mount(op: &mut Op, label: &str) -> Result<(), SpecError> {
    let Op::FileSystem { kind, options, .. } = op else { return Ok(()) };
    let kernels = ["proc", "sysfs", "mqueue", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "bpf"];
    let given = options.iter().any(|o| o.key.to_bytes().ends_with(b"context"));
    if !given && !kernels.iter().any(|k| k.as_bytes() == kind.to_bytes()) {
        options.push(FsOption {
            key: CString::from(c"context"),
            value: Some(c_string("linux.mountLabel", label)?),
        });
    }
    Ok(())
}

/// File systems without a device: `ro` is a matter of the mount, not of the file system that others may share.
fn is_virtual(kind: &str) -> bool {
    matches!(
        kind,
        "tmpfs"
            | "proc"
            | "sysfs"
            | "mqueue"
            | "devpts"
            | "cgroup"
            | "cgroup2"
            | "securityfs"
            | "debugfs"
            | "tracefs"
            | "bpf"
    )
}

fn file_system(
    field: &str,
    kind: &str,
    mount: &Mount,
    options: &Options,
    target: Target,
) -> Result<Op, SpecError> {
    let mut list = Vec::new();
    let source = mount.source.as_deref().filter(|s| !s.is_empty()).unwrap_or(kind);
    list.push(FsOption { key: CString::from(c"source"), value: Some(c_string(field, source)?) });
    if options.read_only && !is_virtual(kind) {
        list.push(FsOption { key: CString::from(c"ro"), value: None });
    }
    list.extend(fs_options(field, &options.data)?);
    let late = options.copy_up && options.read_only;
    // Devices and mounts are still to be made in it.
    let much_later = target.path.as_str() == "dev";
    Ok(Op::FileSystem {
        kind: c_string(field, kind)?,
        target,
        options: list,
        attr: if late || much_later { options.attr.set & !mount::ATTR_RDONLY } else { options.attr.set }
            | options.tree_attr.set,
        propagation: options.propagation & !libc::MS_REC,
        copy_up: options.copy_up,
        read_only_after: late && !much_later,
    })
}

/// The specification's `cgroup` mount: the unified hierarchy on v2, a directory of controllers on v1.
fn lower_cgroup(
    field: &str,
    options: &Options,
    target: Target,
    facts: &HostFacts,
    namespaces: &Namespaces,
    request: &Request,
    out: &mut Lowered,
) -> Result<(), SpecError> {
    let private = namespaces.has(NsKind::Cgroup);
    let mut options_attr = options.attr;
    let base = target.path.as_str().to_owned();
    if request.borrowed_cgroup {
        // What is the caller's is not for the container to write.
        apply(&mut options_attr, (mount::ATTR_RDONLY, 0));
    }
    let attr = options_attr.set;
    let propagation = options.propagation & !libc::MS_REC;
    let below = |name: &str| {
        rel(field, &format!("/{base}/{name}")).map(|path| Target { path, real: false, link: false })
    };
    let path = if request.borrowed_cgroup { "own" } else { &request.cgroup };
    let mut own = facts.layout.cgroup(path).map_err(|e| invalid("linux.cgroupsPath", e.to_string()))?;
    if request.borrowed_cgroup {
        for entry in &mut own.entries {
            entry.dir.pop();
        }
    }
    let place =
        |kind: &str, target: Target, data: Option<&str>, dir: &std::path::Path| -> Result<Op, SpecError> {
            if private {
                let mut list =
                    vec![FsOption { key: CString::from(c"source"), value: Some(CString::from(c"cgroup")) }];
                if let Some(data) = data {
                    list.extend(fs_options(field, &[data.to_owned()])?);
                }
                Ok(Op::FileSystem {
                    kind: c_string(field, kind)?,
                    target,
                    options: list,
                    attr,
                    propagation,
                    copy_up: false,
                    read_only_after: false,
                })
            } else {
                Ok(Op::Bind {
                    source: c_string(field, &dir.to_string_lossy())?,
                    target,
                    recursive: true,
                    follow: true,
                    attr: options_attr,
                    loses: 0,
                    tree_attr: Attr::default(),
                    propagation,
                    propagate_tree: false,
                    only_procfs: false,
                    idmap: None,
                    outside: false,
                })
            }
        };
    if facts.layout.mode == Mode::V2 {
        if let Some(entry) = own.v2() {
            let op = place("cgroup2", target, None, &entry.dir)?;
            out.ops.push(op);
        }
        return Ok(());
    }
    out.ops.push(Op::FileSystem {
        kind: CString::from(c"tmpfs"),
        target: target.clone(),
        options: vec![
            FsOption { key: CString::from(c"source"), value: Some(CString::from(c"tmpfs")) },
            FsOption { key: CString::from(c"mode"), value: Some(CString::from(c"755")) },
        ],
        attr: attr & !mount::ATTR_RDONLY,
        propagation,
        copy_up: false,
        read_only_after: false,
    });
    for entry in &own.entries {
        let list = entry.controllers.join(",");
        if list.is_empty() {
            continue;
        }
        let name = list.strip_prefix("name=").unwrap_or(&list).to_owned();
        let op = place("cgroup", below(&name)?, Some(&list), &entry.dir)?;
        out.ops.push(op);
        if entry.controllers.len() > 1 {
            for one in &entry.controllers {
                out.ops.push(Op::Symlink { to: c_string(field, &name)?, link: below(one)?.path });
            }
        }
    }
    if options.read_only || request.borrowed_cgroup {
        let attr = Attr { set: mount::ATTR_RDONLY, ..Attr::default() };
        out.ops.push(Op::Remount { target, attr, recursive: false });
    }
    Ok(())
}

fn lower_devices(
    linux: &Linux,
    user_namespace: bool,
    root: bool,
    out: &mut Lowered,
) -> Result<(), SpecError> {
    const DEFAULTS: [(&str, u32, u32); 6] =
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    const LINKS: [(&str, &str); 5] = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ];
    for (name, major, minor) in DEFAULTS {
        let path = format!("/dev/{name}");
        if linux.devices.iter().any(|d| clean(&d.path) == clean(&path)) {
            continue;
        }
        let path = rel("linux.devices", &path)?;
        out.ops.push(if user_namespace {
            Op::DeviceBind { source: c_string("linux.devices", &format!("/dev/{name}"))?, path }
        } else {
            Op::DeviceNode { path, mode: libc::S_IFCHR | 0o666, major, minor, uid: 0, gid: 0, outside: false }
        });
    }
    for (i, device) in linux.devices.iter().enumerate() {
        let op = lower_device(&format!("linux.devices[{i}]"), device, user_namespace, root)?;
        out.ops.push(op);
    }
    for (to, link) in LINKS {
        out.ops.push(Op::Symlink { to: c_string("linux.devices", to)?, link: rel("linux.devices", link)? });
    }
    Ok(())
}

fn lower_device(field: &str, device: &Device, user_namespace: bool, root: bool) -> Result<Op, SpecError> {
    let kind = match device.kind.as_str() {
        "c" | "u" => libc::S_IFCHR,
        "b" => libc::S_IFBLK,
        "p" => libc::S_IFIFO,
        other => return Err(invalid(format!("{field}.type"), format!("{other:?} is none of c, b, u, p"))),
    };
    if !device.path.starts_with('/') {
        return Err(invalid(format!("{field}.path"), format!("{:?} is not absolute", device.path)));
    }
    let path = rel(field, &device.path)?;
    // An ordinary user can make none, and only pass on what the host has at that place.
    if user_namespace && kind != libc::S_IFIFO && !root {
        return Ok(Op::DeviceBind { source: c_string(field, &device.path)?, path });
    }
    let number = |n: i64, what: &str| {
        u32::try_from(n).or_else(|_| {
            if kind == libc::S_IFIFO {
                Ok(0)
            } else {
                Err(invalid(format!("{field}.{what}"), "is out of range"))
            }
        })
    };
    Ok(Op::DeviceNode {
        path,
        mode: kind | (device.file_mode.unwrap_or(0o666) & 0o7777),
        major: number(device.major, "major")?,
        minor: number(device.minor, "minor")?,
        uid: device.uid.unwrap_or(0),
        gid: device.gid.unwrap_or(0),
        outside: user_namespace && kind != libc::S_IFIFO,
    })
}
