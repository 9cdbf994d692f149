//! `update`: new limits for a running container.

use crate::args::Options;
use crate::commands::usage;
use keel_cgroup::{BlockIo, Cpu, Memory, Pids, Resources};
use keel_oci::{Runtime, RuntimeError};
use std::io::Read;

/// A larger document is refused.
const RESOURCES_MAX_BYTES: u64 = 1 << 20;

pub(crate) fn update(runtime: &Runtime, options: &Options, id: &str) -> Result<u8, RuntimeError> {
    let resources = match options.get("resources") {
        Some(path) => read_resources(path)?,
        None => from_options(options)?,
    };
    let schemata = [options.get("l3-cache-schema"), options.get("mem-bw-schema")];
    let schemata: Vec<&str> = schemata.into_iter().flatten().collect();
    if !schemata.is_empty() {
        runtime.update_schemata(id, &schemata)?;
    }
    runtime.update(id, &resources)?;
    Ok(0)
}

fn read_resources(path: &str) -> Result<Resources, RuntimeError> {
    let error = |source| RuntimeError::Io { what: "read", path: path.into(), source };
    let mut text = String::new();
    if path == "-" {
        std::io::stdin().take(RESOURCES_MAX_BYTES).read_to_string(&mut text).map_err(error)?;
    } else {
        let file = std::fs::File::open(path).map_err(error)?;
        file.take(RESOURCES_MAX_BYTES).read_to_string(&mut text).map_err(error)?;
    }
    serde_json::from_str(&text).map_err(|source| RuntimeError::Json { path: path.into(), source })
}

fn from_options(options: &Options) -> Result<Resources, RuntimeError> {
    let int = |name: &str| -> Result<Option<i64>, RuntimeError> {
        let parse =
            |text: &str| text.parse().map_err(|_| usage(format!("invalid value {text:?} for --{name}")));
        options.get(name).map(parse).transpose()
    };
    let uint = |name: &str| -> Result<Option<u64>, RuntimeError> {
        let parse =
            |text: &str| text.parse().map_err(|_| usage(format!("invalid value {text:?} for --{name}")));
        options.get(name).map(parse).transpose()
    };
    let bytes = |name: &str| -> Result<Option<i64>, RuntimeError> {
        let parse = |text: &str| {
            parse_bytes(text).ok_or_else(|| usage(format!("invalid value {text:?} for --{name}")))
        };
        options.get(name).map(parse).transpose()
    };
    let text = |name: &str| options.get(name).map(str::to_owned);
    let weight = uint("blkio-weight")?
        .map(|w| u16::try_from(w).map_err(|_| usage(format!("invalid value {w} for --blkio-weight"))))
        .transpose()?;
    Ok(Resources {
        memory: Some(Memory {
            limit: bytes("memory")?,
            reservation: bytes("memory-reservation")?,
            swap: bytes("memory-swap")?,
            kernel: bytes("kernel-memory")?,
            kernel_tcp: bytes("kernel-memory-tcp")?,
            ..Memory::default()
        }),
        cpu: Some(Cpu {
            shares: uint("cpu-share")?.or(uint("cpu-shares")?),
            quota: int("cpu-quota")?,
            burst: uint("cpu-burst")?,
            period: uint("cpu-period")?,
            realtime_runtime: int("cpu-rt-runtime")?,
            realtime_period: uint("cpu-rt-period")?,
            cpus: text("cpuset-cpus"),
            mems: text("cpuset-mems"),
            idle: int("cpu-idle")?,
        }),
        pids: int("pids-limit")?.map(|limit| Pids { limit: Some(limit) }),
        block_io: weight.map(|weight| BlockIo { weight: Some(weight), ..BlockIo::default() }),
        ..Resources::default()
    })
}

/// `1024`, `64k`, `64M`, `1GiB`, `-1`.
fn parse_bytes(text: &str) -> Option<i64> {
    if text == "-1" {
        return Some(-1);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let count: i64 = text[..digits].parse().ok()?;
    let unit = text[digits..].to_ascii_lowercase();
    let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    count.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("64k", Some(65_536)),
            ("64M", Some(64 << 20)),
            ("1GiB", Some(1 << 30)),
            ("2gb", Some(2 << 30)),
            ("x", None),
            ("", None),
            ("-2", None),
            ("99999999999g", None),
        ] {
            assert_eq!(parse_bytes(text), want, "{text:?}");
        }
    }
}
