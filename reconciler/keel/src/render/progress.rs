//! Progress of image pulls: bars on a terminal, plain lines elsewhere.

use std::collections::BTreeMap;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use keel_plan::PullStatus;

use crate::term::Term;
use crate::text::size;

/// Redraws a second: smooth enough, and no load on a slow serial console.
const REDRAWS: u8 = 10;
/// Without a terminal a pull says a line whenever this much of it is done.
const STEP_PERCENT: u64 = 25;

/// Shows any number of pulls at once.
pub(crate) struct Progress {
    term: Term,
    bars: MultiProgress,
    pulls: BTreeMap<String, Pull>,
    /// `pulling`.
    pub(crate) word: &'static str,
}

struct Pull {
    bar: ProgressBar,
    said_percent: u64,
}

impl Progress {
    pub(crate) fn new(term: Term) -> Progress {
        let target = if term.live {
            ProgressDrawTarget::stderr_with_hz(REDRAWS)
        } else {
            ProgressDrawTarget::hidden()
        };
        Progress {
            term,
            bars: MultiProgress::with_draw_target(target),
            pulls: BTreeMap::new(),
            word: "pulling",
        }
    }

    pub(crate) fn update(&mut self, amount: &PullStatus) {
        let image = amount.image.as_str();
        let pull = self
            .pulls
            .entry(image.to_owned())
            .or_insert_with(|| Pull { bar: self.bars.add(bar(image)), said_percent: 0 });
        if self.term.live {
            pull.bar.set_length(amount.total_bytes);
            pull.bar.set_position(amount.done_bytes);
            pull.bar.set_message(layers(amount));
            return;
        }
        let percent = (amount.done_bytes * 100).checked_div(amount.total_bytes).unwrap_or(0);
        let step = percent - percent % STEP_PERCENT;
        if step > pull.said_percent {
            pull.said_percent = step;
            self.term.note(&render_line(self.word, amount));
        }
    }

    /// Takes the bar away; what became of the pull is said in a line of its own.
    pub(crate) fn finish(&mut self, image: &str) {
        if let Some(pull) = self.pulls.remove(image) {
            pull.bar.finish_and_clear();
        }
    }

    /// Runs `print` with the bars out of the way.
    pub(crate) fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bars.suspend(print)
    }

    pub(crate) fn clear(&mut self) {
        for pull in std::mem::take(&mut self.pulls).into_values() {
            pull.bar.finish_and_clear();
        }
    }
}

fn bar(image: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix} [{bar:24}] {bytes}/{total_bytes} {binary_bytes_per_sec} {msg}",
    )
    .expect("the template is a constant")
    .progress_chars("=> ");
    ProgressBar::new(0).with_style(style).with_prefix(image.to_owned())
}

fn layers(amount: &PullStatus) -> String {
    match amount.layers_total {
        0 => String::new(),
        total => format!("{}/{total} layers", amount.layers_done),
    }
}

pub(crate) fn render_line(word: &str, amount: &PullStatus) -> String {
    let image = &amount.image;
    let percent = (amount.done_bytes * 100).checked_div(amount.total_bytes).unwrap_or(0);
    let (done, total) = (size(amount.done_bytes), size(amount.total_bytes));
    format!("{word} {image}: {percent}% ({done} of {total}, {})\n", layers(amount))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_progress_is_one_line() {
        let amount = PullStatus {
            image: "x:1".into(),
            done_bytes: 512,
            total_bytes: 2048,
            layers_done: 1,
            layers_total: 3,
            ..PullStatus::default()
        };
        assert_eq!(render_line("pulling", &amount), "pulling x:1: 25% (512 B of 2.0 KiB, 1/3 layers)\n");
    }
}
