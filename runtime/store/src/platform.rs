//! Which manifest of an index is for this machine.

use serde::Deserialize;

/// What an index says about one of its manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) variant: Option<String>,
}

/// The position of the best match; `None` when nothing runs here. Smaller variants of ARM run on larger cores.
pub(crate) fn choose(candidates: &[Option<Platform>], architecture: &str) -> Option<usize> {
    let rank = |platform: &Platform| -> Option<u32> {
        if platform.os != "linux" {
            return None;
        }
        let variant = platform.variant.as_deref().unwrap_or("");
        match (architecture, platform.architecture.as_str(), variant) {
            ("amd64", "amd64", "" | "v1") => Some(0),
            // v2 and later need instructions that not every amd64 machine has.
            ("amd64", "amd64", "v2") if has_v2() => Some(1),
            ("amd64", "amd64", _) => None,
            ("arm64", "arm64", "" | "v8") => Some(0),
            ("arm64", "arm", "v7") => Some(10),
            ("arm64", "arm", "v6") => Some(11),
            (mine, theirs, _) if mine == theirs => Some(if variant.is_empty() { 0 } else { 5 }),
            _ => None,
        }
    };
    let ranked = candidates.iter().enumerate().filter_map(|(i, c)| Some((rank(c.as_ref()?)?, i)));
    ranked.min().map(|(_, i)| i)
}

#[cfg(target_arch = "x86_64")]
fn has_v2() -> bool {
    std::is_x86_feature_detected!("sse4.2") && std::is_x86_feature_detected!("popcnt")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_v2() -> bool {
    false
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(architecture: &str, candidates: &str, expected: Option<usize>) {
        let parse = |text: &str| {
            let mut parts = text.split('/').map(str::to_owned);
            Some(Platform { os: parts.next()?, architecture: parts.next()?, variant: parts.next() })
        };
        let candidates: Vec<_> = candidates.split(' ').map(parse).collect();
        assert_eq!(choose(&candidates, architecture), expected, "{candidates:?}");
    }

    #[test]
    fn the_best_match_wins() {
        check("amd64", "linux/arm64 linux/amd64", Some(1));
        check("amd64", "windows/amd64 unknown/unknown linux/amd64", Some(2));
        check("amd64", "linux/amd64/v4 linux/amd64", Some(1));
        check("amd64", "linux/386 linux/s390x", None);
        check("arm64", "linux/arm/v6 linux/arm/v7", Some(1));
        check("arm64", "linux/arm/v7 linux/arm64/v8", Some(1));
        check("s390x", "linux/s390x", Some(0));
    }
}
