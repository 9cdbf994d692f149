//! Users by name, in the passwd and group files of a running container.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use keel_sys::file;

use crate::failure::{Failure, Outcome};

/// Of a container's files, which the container can make as large as it likes.
const MAX_BYTES: u64 = 1 << 20;
const O_RDONLY_CLOEXEC: i32 = 0o2_000_000;
const O_PATH_DIRECTORY_CLOEXEC: i32 = 0o10_000_000 | 0o200_000 | 0o2_000_000;
/// A pipe in place of the file must not hold us up.
const O_NONBLOCK: i32 = 0o4_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// `name|uid[:group|gid]` as the container with process `pid` knows it.
pub(crate) fn find(pid: u32, wanted: &str) -> Outcome<User> {
    let read = |name: &std::ffi::CStr| read_inside(pid, name).unwrap_or_default();
    lower(wanted, &read(c"etc/passwd"), &read(c"etc/group")).map_err(Failure::not_found)
}

/// Symbolic links are followed inside the container's root only.
fn read_inside(pid: u32, path: &std::ffi::CStr) -> io::Result<String> {
    let root = file::c_path(Path::new(&format!("/proc/{pid}/root")))?;
    let root = file::openat(file::cwd(), &root, O_PATH_DIRECTORY_CLOEXEC, 0)?;
    let resolve = file::RESOLVE_IN_ROOT | file::RESOLVE_NO_MAGICLINKS;
    let found = File::from(file::openat2(&root, path, O_RDONLY_CLOEXEC | O_NONBLOCK, 0, resolve)?);
    let mut text = Vec::new();
    if found.metadata()?.is_file() {
        found.take(MAX_BYTES).read_to_end(&mut text)?;
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn lower(wanted: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted, None),
    };
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().map(fields).find(|entry| match number {
        Some(uid) => entry.get(2).and_then(|id| id.parse().ok()) == Some(uid),
        None => entry.first() == Some(&user),
    });
    let field = |index: usize| entry.as_ref()?.get(index)?.parse::<u32>().ok();
    let uid = number.or_else(|| field(2)).ok_or_else(|| format!("no user {user} in the container"))?;
    let own_gid = field(3).unwrap_or(0);
    let Some(wanted_group) = wanted_group else {
        let name = entry.as_ref().and_then(|entry| entry.first().copied());
        return Ok(User { uid, gid: own_gid, groups: memberships(group, name, own_gid) });
    };
    let named =
        || group.lines().map(fields).find(|entry| entry.first() == Some(&wanted_group))?.get(2)?.parse().ok();
    let gid = wanted_group
        .parse::<u32>()
        .ok()
        .or_else(named)
        .ok_or_else(|| format!("no group {wanted_group} in the container"))?;
    Ok(User { uid, gid, groups: Vec::new() })
}

fn memberships(group: &str, name: Option<&str>, own_gid: u32) -> Vec<u32> {
    let Some(name) = name else { return Vec::new() };
    let member =
        |entry: &Vec<&str>| entry.get(3).is_some_and(|members| members.split(',').any(|m| m == name));
    let mut groups: Vec<u32> =
        group.lines().map(fields).filter(member).filter_map(|entry| entry.get(2)?.parse().ok()).collect();
    groups.retain(|&gid| gid != own_gid);
    groups.dedup();
    groups
}

fn fields(line: &str) -> Vec<&str> {
    line.split(':').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:web\nlogs:x:4:web,other\n";

    #[test]
    fn users_are_found_by_name_or_number_with_their_groups() {
        let check = |wanted, uid, gid, groups: &[u32]| {
            assert_eq!(
                lower(wanted, PASSWD, GROUP),
                Ok(User { uid, gid, groups: groups.to_vec() }),
                "{wanted}"
            );
        };
        check("web", 33, 34, &[4]);
        check("33", 33, 34, &[4]);
        check("1234", 1234, 0, &[]);
        check("web:logs", 33, 4, &[]);
        check("0:99", 0, 99, &[]);
        assert!(lower("nobody", PASSWD, GROUP).is_err());
        assert!(lower("web:nogroup", PASSWD, GROUP).is_err());
    }

    #[test]
    fn our_own_root_has_a_root_user() {
        let user = find(std::process::id(), "root").unwrap();
        assert_eq!((user.uid, user.gid), (0, 0));
    }
}
