//! Which of several images suits this host.

use serde::Deserialize;
use std::fmt;

/// Operating system, architecture and variant, in the words of image indexes (`linux/arm/v7`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    /// `v7`, `v8`, `v3`, ...; `None` for the baseline of the architecture.
    #[serde(default)]
    pub variant: Option<String>,
}

impl Platform {
    /// The platform that this process runs on, with the newest variant that the processor offers.
    pub fn host() -> Self {
        let (architecture, variant) = host_architecture();
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant }
    }

    /// Reads `linux/arm64` or `linux/arm/v7`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/');
        let os = parts.next().filter(|p| !p.is_empty())?.to_owned();
        let architecture = parts.next().filter(|p| !p.is_empty())?.to_owned();
        let variant = parts.next().map(str::to_owned);
        parts.next().is_none().then_some(Self { os, architecture, variant })
    }

    /// How well an image for `offer` runs here: lower is better, `None` is not at all.
    pub fn distance(&self, offer: &Platform) -> Option<usize> {
        if offer.os != self.os {
            return None;
        }
        let offer_variant = normal_variant(&offer.architecture, offer.variant.as_deref());
        runnable(&self.architecture, self.variant.as_deref())
            .iter()
            .position(|(arch, variant)| *arch == offer.architecture && *variant == offer_variant)
    }
}

/// The position of what runs best on this host, of equals the first; `None` when nothing does.
pub(crate) fn choose(candidates: &[Option<Platform>]) -> Option<usize> {
    let host = Platform::host();
    let runnable = candidates.iter().enumerate().filter_map(|(i, c)| Some((host.distance(c.as_ref()?)?, i)));
    runnable.min().map(|(_, i)| i)
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) if !variant.is_empty() => write!(f, "/{variant}"),
            _ => Ok(()),
        }
    }
}

/// Everything that runs on `architecture`/`variant`, best first.
fn runnable(architecture: &str, variant: Option<&str>) -> Vec<(String, String)> {
    let own = normal_variant(architecture, variant);
    let mut all: Vec<(String, String)> = Vec::new();
    let mut add = |arch: &str, variants: &[&str]| {
        all.extend(variants.iter().map(|v| (arch.to_owned(), (*v).to_owned())));
    };
    match architecture {
        "amd64" => {
            add("amd64", from(&["v4", "v3", "v2", "v1"], &own));
            // 64-bit kernels run 32-bit programs as a rule.
            add("386", &[""]);
        }
        "arm64" => {
            add("arm64", from(&["v9.5", "v9.4", "v9.3", "v9.2", "v9.1", "v9", "v8"], &own));
            add("arm", &["v8", "v7", "v6", "v5"]);
        }
        "arm" => add("arm", from(&["v8", "v7", "v6", "v5"], &own)),
        other => add(other, &[own.as_str()]),
    }
    all
}

/// The part of `order` that starts at `own`; all of the baseline when `own` is unknown.
fn from<'a>(order: &'a [&'a str], own: &str) -> &'a [&'a str] {
    match order.iter().position(|v| *v == own) {
        Some(start) => &order[start..],
        None => &order[order.len() - 1..],
    }
}

/// Absent variants mean the baseline that images of the time were built for.
fn normal_variant(architecture: &str, variant: Option<&str>) -> String {
    let variant = variant.unwrap_or("");
    match (architecture, variant) {
        ("amd64", "") => "v1".to_owned(),
        ("arm64", "" | "8") => "v8".to_owned(),
        ("arm", "") => "v7".to_owned(),
        ("arm", v @ ("5" | "6" | "7" | "8")) => format!("v{v}"),
        _ => variant.to_owned(),
    }
}

#[cfg(target_arch = "x86_64")]
fn host_architecture() -> (&'static str, Option<String>) {
    let v2 = std::is_x86_feature_detected!("sse4.2")
        && std::is_x86_feature_detected!("popcnt")
        && std::is_x86_feature_detected!("ssse3");
    let v3 = v2
        && std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("bmi1")
        && std::is_x86_feature_detected!("bmi2")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("f16c")
        && std::is_x86_feature_detected!("lzcnt")
        && std::is_x86_feature_detected!("movbe");
    let v4 = v3
        && std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512cd")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl");
    let level = match (v2, v3, v4) {
        (_, _, true) => Some("v4"),
        (_, true, _) => Some("v3"),
        (true, ..) => Some("v2"),
        _ => None,
    };
    ("amd64", level.map(str::to_owned))
}

#[cfg(not(target_arch = "x86_64"))]
fn host_architecture() -> (&'static str, Option<String>) {
    match std::env::consts::ARCH {
        "aarch64" => ("arm64", Some("v8".to_owned())),
        "arm" if cfg!(target_feature = "v7") => ("arm", Some("v7".to_owned())),
        "arm" => ("arm", Some("v6".to_owned())),
        "x86" => ("386", None),
        "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
        "loongarch64" => ("loong64", None),
        other => (other, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `offers` best first; what does not run is left out of `expected`.
    fn check(host: &str, offers: &str, expected: &str) {
        let host = Platform::parse(host).unwrap();
        let mut found: Vec<(usize, String)> = offers
            .split(' ')
            .filter_map(|o| Some((host.distance(&Platform::parse(o).unwrap())?, o.to_owned())))
            .collect();
        found.sort();
        let found: Vec<String> = found.into_iter().map(|(_, o)| o).collect();
        assert_eq!(found.join(" "), expected, "{host}");
    }

    #[test]
    fn the_newest_variant_that_runs_wins() {
        check(
            "linux/amd64/v3",
            "linux/386 linux/amd64 linux/amd64/v2 linux/amd64/v3 linux/amd64/v4 windows/amd64 linux/arm64",
            "linux/amd64/v3 linux/amd64/v2 linux/amd64 linux/386",
        );
        check(
            "linux/arm/v7",
            "linux/arm/v5 linux/arm/v6 linux/arm/v7 linux/arm/v8 linux/arm64",
            "linux/arm/v7 linux/arm/v6 linux/arm/v5",
        );
        check(
            "linux/arm64/v8",
            "linux/arm/v7 linux/arm64 linux/arm64/v9 unknown/unknown",
            "linux/arm64 linux/arm/v7",
        );
        check("linux/riscv64", "linux/riscv64 linux/amd64", "linux/riscv64");
    }

    #[test]
    fn the_host_runs_its_own_platform() {
        let host = Platform::host();
        assert_eq!(host.distance(&host), Some(0));
        let baseline = Platform { variant: None, ..host.clone() };
        assert!(host.distance(&baseline).is_some());
    }
}
