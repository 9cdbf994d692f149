//! How far the pull of an image is, as every view shows it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes are of packed layers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PullStatus {
    pub image: String,
    pub done_bytes: u64,
    /// 0 while unknown.
    pub total_bytes: u64,
    pub layers_done: u32,
    pub layers_total: u32,
    /// Over the last seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// None while unknown, and while nothing arrives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
    /// Lowest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerStatus>,
    /// Why nothing arrives just now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerStatus {
    pub digest: String,
    pub state: LayerState,
    pub done_bytes: u64,
    pub total_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LayerState {
    Queued,
    Fetching,
    Done,
    /// Was there before.
    Present,
}

impl fmt::Display for PullStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PullStatus { done_bytes, total_bytes, layers_done, layers_total, .. } = self;
        write!(f, "{done_bytes} of {total_bytes} bytes, {layers_done} of {layers_total} layers")?;
        match (self.bytes_per_second, self.seconds_left) {
            (None, _) => {}
            (Some(rate), Some(left)) => write!(f, ", {rate} bytes/s, {left} s left")?,
            (Some(rate), None) => write!(f, ", {rate} bytes/s, stalled")?,
        }
        match &self.waiting {
            Some(reason) => write!(f, " ({reason})"),
            None => Ok(()),
        }
    }
}
