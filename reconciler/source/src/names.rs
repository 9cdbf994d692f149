//! Which names in a manifest directory count.

/// Whether a file of this name is read: `*.yaml`, `*.yml` and `*.json`, unless hidden or an editor's.
pub fn is_manifest_name(name: &str) -> bool {
    let is_kind = [".yaml", ".yml", ".json"].iter().any(|ext| name.len() > ext.len() && name.ends_with(ext));
    is_kind && !is_ignored(name)
}

/// Hidden names (also `..data` and emacs' `.#lock`), backups and temporary files of editors and package managers.
/// Most of these cannot end in `.yaml` either; the list also keeps directories of such names out.
pub(crate) fn is_ignored(name: &str) -> bool {
    const ENDINGS: &[&str] =
        &["~", ".swp", ".swx", ".tmp", ".bak", ".orig", ".rej", ".rpmnew", ".rpmsave", ".rpmorig"];
    name.starts_with('.')
        || (name.starts_with('#') && name.ends_with('#'))
        || ENDINGS.iter().any(|e| name.ends_with(e))
        || name.contains(".dpkg-")
        || name.contains(".ucf-")
        || name == "4913"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_finished_manifests_count() {
        for name in ["web.yaml", "web.yml", "web.json", "a b.yaml", "web.v1.yaml", "ü.yaml"] {
            assert!(is_manifest_name(name), "{name}");
        }
        for name in [
            "web.yaml~",
            ".web.yaml.swp",
            ".web.yaml",
            ".#web.yaml",
            "#web.yaml#",
            "4913",
            "web.yaml.bak",
            "web.YAML",
            "web.yaml.tmp",
            "web.yaml.rpmnew",
            "web.yaml.dpkg-dist.yaml",
            "web.txt",
            "yaml",
            ".yaml",
            "web",
            "..data",
            ".web.yaml.Xy12Zw",
            "sedAbCdEf",
            "web.yaml.orig",
        ] {
            assert!(!is_manifest_name(name), "{name}");
        }
    }
}
