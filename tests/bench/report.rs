//! Samples, their medians, and the table that they end in.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One measure, of all contenders. The first contender is ours; the others are compared with it.
#[derive(Debug)]
pub(crate) struct Measure {
    pub(crate) row: &'static str,
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    /// What we want to reach: a bound on our median, or on the ratio to one contender.
    pub(crate) aim: Option<Aim>,
    pub(crate) contenders: Vec<Contender>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Aim {
    AtMost(f64),
    AtLeast(f64),
    /// Our median divided by that of the named contender.
    Ratio(&'static str, f64),
}

#[derive(Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) samples: Vec<f64>,
}

impl Contender {
    pub(crate) fn new(name: impl Into<String>) -> Contender {
        Contender { name: name.into(), samples: Vec::new() }
    }

    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[n / 2],
            n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        }
    }

    fn extremes(&self) -> (f64, f64) {
        let min = self.samples.iter().copied().fold(f64::INFINITY, f64::min);
        (min, self.samples.iter().copied().fold(f64::NEG_INFINITY, f64::max))
    }
}

impl Measure {
    pub(crate) fn new(row: &'static str, name: impl Into<String>, unit: &'static str) -> Measure {
        Measure { row, name: name.into(), unit, aim: None, contenders: Vec::new() }
    }

    pub(crate) fn aim(mut self, aim: Aim) -> Measure {
        self.aim = Some(aim);
        self
    }

    pub(crate) fn sample(&mut self, contender: &str, value: f64) {
        let at = self.contenders.iter().position(|c| c.name == contender).unwrap_or_else(|| {
            self.contenders.push(Contender::new(contender));
            self.contenders.len() - 1
        });
        self.contenders[at].samples.push(value);
    }

    /// Our median divided by the contender's.
    fn ratio(&self, contender: &Contender) -> Option<f64> {
        let ours = self.contenders.first().filter(|ours| ours.name != contender.name)?.median();
        Some(ours / contender.median()).filter(|ratio| ratio.is_finite())
    }

    fn verdict(&self) -> Option<(String, bool)> {
        let ours = self.contenders.first()?.median();
        match self.aim? {
            Aim::AtMost(bound) => Some((format!("<= {}", number(bound)), ours <= bound)),
            Aim::AtLeast(bound) => Some((format!(">= {}", number(bound)), ours >= bound)),
            Aim::Ratio(name, bound) => {
                let ratio = self.ratio(self.contenders.iter().find(|c| c.name == name)?)?;
                Some((format!("<= {bound} x {name}"), ratio <= bound))
            }
        }
    }
}

/// A Markdown table, one line for each contender of each measure.
pub(crate) fn markdown(measures: &[Measure]) -> String {
    let mut text = String::from(
        "| row | measure | contender | median | min | max | n | ours / theirs | aim |\n|---|---|---|---:|---:|---:|---:|---:|---|\n",
    );
    for measure in measures {
        for (index, contender) in measure.contenders.iter().enumerate() {
            let (min, max) = contender.extremes();
            let ratio = measure.ratio(contender).map_or_else(String::new, |ratio| format!("{ratio:.2}"));
            let aim = match measure.verdict() {
                Some((aim, met)) if index == 0 => {
                    format!("{aim}: {}", if met { "met" } else { "**missed**" })
                }
                _ => String::new(),
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} {unit} | {} | {} | {} | {ratio} | {aim} |",
                measure.row,
                measure.name,
                contender.name,
                number(contender.median()),
                number(min),
                number(max),
                contender.samples.len(),
                unit = measure.unit,
            );
        }
    }
    text
}

pub(crate) fn json(measures: &[Measure], facts: Value) -> Value {
    let measures: Vec<Value> = measures
        .iter()
        .map(|measure| {
            let contenders: Vec<Value> = measure
                .contenders
                .iter()
                .map(|contender| {
                    json!({
                        "name": contender.name,
                        "median": contender.median(),
                        "samples": contender.samples,
                        "oursByTheirs": measure.ratio(contender),
                    })
                })
                .collect();
            let verdict = measure.verdict();
            json!({
                "row": measure.row,
                "measure": measure.name,
                "unit": measure.unit,
                "aim": verdict.as_ref().map(|(aim, _)| aim),
                "met": verdict.as_ref().map(|(_, met)| met),
                "contenders": contenders,
            })
        })
        .collect();
    json!({"host": facts, "measures": measures})
}

/// Three significant digits, no exponent.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
