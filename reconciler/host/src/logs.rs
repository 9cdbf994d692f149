//! Where a container's output goes, as options of its shim.

use std::ffi::OsString;
use std::path::Path;

use keel_manifest::logging::{LogFile, LogSettings};
use keel_plan::PodKey;

/// Bytes that wait for a slow log where nothing else is said; docker's figure.
const BUFFER_BYTES: u64 = 1 << 20;
/// Extension of logs that hold the output as it is.
pub(crate) const RAW: &str = "raw";

/// `log` is the name of one in CRI format.
pub(crate) fn options(settings: &LogSettings, pod: &PodKey, container: &str, log: &Path) -> Vec<OsString> {
    let drivers = settings.drivers.unwrap_or_default();
    let mut words: Vec<OsString> = Vec::new();
    match drivers.file {
        Some(LogFile::Cri) => words.extend(["--log".into(), log.into()]),
        Some(LogFile::Raw) => words.extend(["--log-raw".into(), log.with_extension(RAW).into()]),
        None => {}
    }
    let mut number = |name: &str, value: Option<u64>| {
        words.extend(value.into_iter().flat_map(|value| [name.into(), value.to_string().into()]));
    };
    if drivers.file.is_some() {
        // Where pod and daemon contradict each other, the bound of all files wins.
        let total = settings.max_total_bytes;
        number("--log-max-bytes", settings.max_bytes.map(|one| total.map_or(one, |total| one.min(total))));
        number("--log-max-files", settings.max_files.map(u64::from));
        number("--log-max-age", settings.max_age_s);
        number("--log-max-total", total);
    }
    if settings.non_blocking.unwrap_or_default() {
        number("--log-buffer", Some(settings.buffer_bytes.unwrap_or(BUFFER_BYTES)));
    }
    if drivers.file.is_some() && settings.compress.unwrap_or_default() {
        words.push("--log-compress".into());
    }
    if drivers.journal {
        words.push("--log-journal".into());
        words.extend(["--log-name".into(), format!("{}-{container}", pod.name).into()]);
        words.extend(settings.tag.iter().flat_map(|tag| ["--log-tag".into(), tag.into()]));
        let labels = [("POD_NAMESPACE", pod.namespace.as_str()), ("POD_NAME", pod.name.as_str())];
        words.extend(labels.iter().flat_map(|(n, v)| ["--log-label".into(), format!("{n}={v}").into()]));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(settings: LogSettings, expected: &str) {
        let pod = PodKey { namespace: "default".into(), name: "web".into() };
        let words = options(&settings, &pod, "app", Path::new("/logs/0.log"));
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(words.join(" "), expected);
    }

    #[test]
    fn settings_become_options_of_the_shim() {
        let said = |driver: &str, words: &str| {
            let mut settings = LogSettings::default();
            settings.set_drivers(driver).unwrap();
            for (name, value) in keel_manifest::logging::options(words) {
                settings.set_option(name, value).unwrap();
            }
            settings
        };
        check(LogSettings::default(), "--log /logs/0.log");
        check(said("none", ""), "");
        check(
            said("raw", "max-size=1m,max-file=2,max-age=1h,max-total-size=512k,compress=true"),
            "--log-raw /logs/0.raw --log-max-bytes 524288 --log-max-files 2 --log-max-age 3600 \
             --log-max-total 524288 --log-compress",
        );
        check(
            said("journald,k8s-file", "mode=non-blocking,tag=t"),
            "--log /logs/0.log --log-buffer 1048576 --log-journal --log-name web-app --log-tag t \
             --log-label POD_NAMESPACE=default --log-label POD_NAME=web",
        );
        check(
            said("journald", "mode=blocking"),
            "--log-journal --log-name web-app \
             --log-label POD_NAMESPACE=default --log-label POD_NAME=web",
        );
    }
}
