//! Names: what `linux.cgroupsPath` says, and where the unit's cgroup is.

/// A scope below a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    pub name: String,
    pub slice: String,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    #[error(
        "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {0:?} instead"
    )]
    Form(String),
    #[error("invalid slice name: {0}")]
    Slice(String),
    #[error("invalid unit name: {0}")]
    Name(String),
}

/// systemd's own limit of a unit's name.
const NAME_MAX: usize = 255;

impl Unit {
    /// `slice:prefix:name`; what is left empty has a default, as has the whole.
    pub fn parse(cgroups_path: Option<&str>, id: &str, user: bool) -> Result<Unit, UnitError> {
        let default_slice = if user { "user.slice" } else { "system.slice" };
        let text = cgroups_path.filter(|p| !p.is_empty());
        let (slice, prefix, name) = match text {
            None => ("", "keel", id),
            Some(text) => {
                let mut parts = text.split(':');
                match (parts.next(), parts.next(), parts.next(), parts.next()) {
                    (Some(slice), Some(prefix), Some(name), None) => (slice, prefix, name),
                    _ => return Err(UnitError::Form(text.to_owned())),
                }
            }
        };
        let slice = if slice.is_empty() { default_slice } else { slice };
        expand(slice)?;
        let name = match (prefix, name) {
            // What a caller names as a slice would be one without processes of its own.
            (_, name) if name.ends_with(".slice") || name.is_empty() => {
                return Err(UnitError::Name(name.to_owned()));
            }
            ("", name) => format!("{name}.scope"),
            (prefix, name) => format!("{prefix}-{name}.scope"),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
        if name.len() > NAME_MAX || !name.chars().all(plain) {
            return Err(UnitError::Name(name));
        }
        Ok(Unit { name, slice: slice.to_owned() })
    }

    /// The cgroup below that of the manager, beginning with `/`.
    pub fn cgroup(&self) -> Result<String, UnitError> {
        let slice = expand(&self.slice)?;
        Ok(format!("{}/{}", slice.trim_end_matches('/'), self.name))
    }
}

/// `a-b.slice` is `/a.slice/a-b.slice`; `-.slice` is the root.
fn expand(slice: &str) -> Result<String, UnitError> {
    let wrong = || UnitError::Slice(slice.to_owned());
    let stem = slice.strip_suffix(".slice").filter(|s| !s.is_empty()).ok_or_else(wrong)?;
    if stem == "-" {
        return Ok("/".to_owned());
    }
    let mut path = String::new();
    let mut whole = String::new();
    for part in stem.split('-') {
        if part.is_empty() || !part.chars().all(|c| c.is_ascii_alphanumeric() || ":_.\\@".contains(c)) {
            return Err(wrong());
        }
        if !whole.is_empty() {
            whole.push('-');
        }
        whole.push_str(part);
        path.push_str(&format!("/{whole}.slice"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_names_slice_and_scope() {
        for (path, user, want) in [
            ("system.slice:docker:abc", false, "/system.slice/docker-abc.scope"),
            (
                "kubepods-besteffort-podx.slice:cri-containerd:1",
                false,
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podx.slice/cri-containerd-1.scope",
            ),
            ("-.slice:a:b", false, "/a-b.scope"),
            (":libpod:c", true, "/user.slice/libpod-c.scope"),
            ("x.slice::c", false, "/x.slice/c.scope"),
            ("", false, "/system.slice/keel-id.scope"),
        ] {
            let unit = Unit::parse(Some(path), "id", user).unwrap();
            assert_eq!(unit.cgroup().unwrap(), want, "{path}");
        }
    }

    #[test]
    fn what_is_no_unit_is_refused() {
        for path in [
            "/a/b",
            "a.slice:b",
            "a.slice:b:c:d",
            ".slice:a:b",
            "a--b.slice:a:b",
            "-a.slice:a:b",
            "a/b.slice:a:b",
            "a.slice:..:/b",
            "a.slice:a:b/../c",
            "a.slice:a:",
            "a.slice:a:b.slice",
            "a.service:a:b",
            "...slice/..slice:a:b",
        ] {
            assert!(Unit::parse(Some(path), "id", false).is_err(), "{path}");
        }
    }
}
