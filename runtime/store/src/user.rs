//! Who `user[:group]` is, by the files of an image.

use keel_sys::file;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Longer files are not read: every container start would pay for them.
const MAX_FILE: u64 = 4 << 20;
/// The largest id that docker takes as a number.
const MAX_ID: u32 = i32::MAX as u32;

/// A user of a container, in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// The primary group first: without it a file that is closed to that group would open (CVE-2022-36109).
    pub additional_gids: Vec<u32>,
    pub home: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("user {0:?} is not in the image's /etc/passwd")]
    UnknownUser(String),
    #[error("group {0:?} is not in the image's /etc/group")]
    UnknownGroup(String),
    #[error("id {0} is out of range (0 to {MAX_ID})")]
    OutOfRange(String),
    #[error("cannot read {} of the image", file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Resolves `user` by docker's rules: empty is root; names and numbers are looked up; a number need not exist; an
/// explicit group takes the place of the user's groups. Links in the image stay inside `rootfs`.
pub fn resolve_user(rootfs: &Path, user: &str) -> Result<User, UserError> {
    let passwd = read_inside(rootfs, "etc/passwd")?;
    let group = read_inside(rootfs, "etc/group")?;
    lower(user, &passwd, &group)
}

/// Pure: the same, from the content of the two files.
fn lower(spec: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, group),
        None => (spec, ""),
    };
    let user = if user.is_empty() { "0" } else { user };
    let found = passwd.lines().filter_map(parse_passwd).find(|u| u.name == user || u.uid.to_string() == user);
    let (uid, mut gid) = match (&found, number(user)?) {
        (Some(found), _) => (found.uid, found.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(UserError::UnknownUser(user.to_owned())),
    };
    let groups: Vec<Group<'_>> = group.lines().filter_map(parse_group).collect();
    let mut supplementary = Vec::new();
    if !wanted_group.is_empty() {
        let found = groups.iter().find(|g| g.name == wanted_group || g.gid.to_string() == wanted_group);
        gid = match (found, number(wanted_group)?) {
            (Some(found), _) => found.gid,
            (None, Some(gid)) => gid,
            (None, None) => return Err(UserError::UnknownGroup(wanted_group.to_owned())),
        };
    } else if let Some(found) = &found {
        supplementary.extend(groups.iter().filter(|g| g.members.contains(&found.name)).map(|g| g.gid));
    }
    let mut additional_gids = vec![gid];
    for gid in supplementary {
        if !additional_gids.contains(&gid) {
            additional_gids.push(gid);
        }
    }
    let home = found.map(|u| u.home.to_owned()).filter(|home| !home.is_empty());
    Ok(User { uid, gid, additional_gids, home })
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: Vec<&'a str>,
}

/// `None` for comments and lines that say nothing usable; such lines are common and harmless.
fn parse_passwd(line: &str) -> Option<Passwd<'_>> {
    let mut fields = entry(line)?;
    let name = fields.next()?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some(Passwd { name, uid, gid, home: fields.nth(1).unwrap_or("") })
}

fn parse_group(line: &str) -> Option<Group<'_>> {
    let mut fields = entry(line)?;
    let name = fields.next()?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some(Group { name, gid, members: fields.next().unwrap_or("").split(',').collect() })
}

fn entry(line: &str) -> Option<std::str::Split<'_, char>> {
    let line = line.trim();
    (!line.is_empty() && !line.starts_with('#')).then(|| line.split(':'))
}

fn number(text: &str) -> Result<Option<u32>, UserError> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse() {
        Ok(id) if id <= MAX_ID => Ok(Some(id)),
        _ => Err(UserError::OutOfRange(text.to_owned())),
    }
}

/// A text file of the image; empty when there is none. Opened without blocking, because the image may have put a
/// fifo there.
fn read_inside(rootfs: &Path, name: &str) -> Result<String, UserError> {
    let fail = |source| UserError::Read { file: Path::new("/").join(name), source };
    let root = File::open(rootfs).map_err(fail)?;
    let path = file::c_path(name).map_err(fail)?;
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
    let resolve = file::RESOLVE_IN_ROOT | file::RESOLVE_NO_MAGICLINKS;
    let opened = match file::openat2(&root, &path, flags, 0, resolve) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(String::new()),
        other => File::from(other.map_err(fail)?),
    };
    let metadata = opened.metadata().map_err(fail)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(fail(io::Error::other(format!("not a regular file of at most {MAX_FILE} bytes"))));
    }
    let mut bytes = Vec::new();
    opened.take(MAX_FILE).read_to_end(&mut bytes).map_err(fail)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# no:x:1:1\nbroken\nredis:x:999:998::/data:\n\
                          1000:x:50:51:odd name:/odd:\nnohome:x:60:61::\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,redis\nredis:x:998:\ndocker:x:20:redis\n";

    fn check(spec: &str, expected: &str) {
        let actual = match lower(spec, PASSWD, GROUP) {
            Ok(u) => {
                format!("{}:{} {:?} {}", u.uid, u.gid, u.additional_gids, u.home.as_deref().unwrap_or("-"))
            }
            Err(e) => e.to_string(),
        };
        assert_eq!(actual, expected, "{spec:?}");
    }

    #[test]
    fn dockers_rules() {
        check("", "0:0 [0, 10] /root");
        check("root", "0:0 [0, 10] /root");
        check("redis", "999:998 [998, 10, 20] /data");
        check("999", "999:998 [998, 10, 20] /data");
        check("redis:wheel", "999:10 [10] /data");
        check("redis:7", "999:7 [7] /data");
        check("1:2", "1:2 [2] -");
        check("4242", "4242:0 [0] -");
        check("1000", "50:51 [51] /odd");
        check(":wheel", "0:10 [10] /root");
        check("nohome", "60:61 [61] -");
        check("nobody", "user \"nobody\" is not in the image's /etc/passwd");
        check("redis:nogroup", "group \"nogroup\" is not in the image's /etc/group");
        check("2147483648", "id 2147483648 is out of range (0 to 2147483647)");
        check("-1", "user \"-1\" is not in the image's /etc/passwd");
    }

    #[test]
    fn links_and_fifos_in_the_image_reach_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        // The host's file knows `daemon`; the image, where the link leads to itself, does not.
        std::os::unix::fs::symlink("/etc/real", etc.join("passwd")).unwrap();
        std::fs::write(etc.join("real"), "inside:x:7:7::/:\n").unwrap();
        assert_eq!(resolve_user(dir.path(), "inside").unwrap().uid, 7);
        assert!(matches!(resolve_user(dir.path(), "daemon"), Err(UserError::UnknownUser(_))));
        std::fs::remove_file(etc.join("passwd")).unwrap();
        nix::sys::stat::mknod(
            &etc.join("passwd"),
            nix::sys::stat::SFlag::S_IFIFO,
            nix::sys::stat::Mode::S_IRWXU,
            0,
        )
        .unwrap();
        assert!(matches!(resolve_user(dir.path(), "0"), Err(UserError::Read { .. })));
        std::fs::remove_dir_all(&etc).unwrap();
        assert_eq!(resolve_user(dir.path(), "5").unwrap().uid, 5);
    }
}
