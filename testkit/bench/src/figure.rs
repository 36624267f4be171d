//! What is measured, and how it is shown.

use std::fmt::Write;

use serde::{Serialize, Serializer};

/// What a figure has to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// The ratio (or the value, where there is no floor) is at most this.
    AtMost(f64),
    /// The ratio (or the value) is at least this.
    AtLeast(f64),
    /// It is only reported.
    None,
}

impl Goal {
    /// Whether `number` reaches it.
    #[must_use]
    pub fn met_by(self, number: f64) -> bool {
        match self {
            Goal::AtMost(limit) => number <= limit,
            Goal::AtLeast(limit) => number >= limit,
            Goal::None => true,
        }
    }
}

impl Serialize for Goal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Goal::AtMost(limit) | Goal::AtLeast(limit) => serializer.serialize_f64(limit),
            Goal::None => serializer.serialize_none(),
        }
    }
}

/// One measured number.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Such as `fault.same_core.p50`.
    pub name: String,
    /// The product's.
    pub value: f64,
    /// What `value` and `floor` count.
    pub unit: &'static str,
    /// That of the bare system calls, if it is compared to them.
    pub floor: Option<f64>,
    /// The median of the ratios of the single pairs.
    pub ratio: Option<f64>,
    /// What it has to reach.
    pub goal: Goal,
    /// Whether it does.
    pub ok: bool,
    /// On which cores, and how: for the reader of the table.
    #[serde(skip)]
    pub arrangement: String,
}

impl Figure {
    /// A number with a floor; `pairs` are (product, floor).
    ///
    /// # Panics
    /// If there are no pairs.
    #[must_use]
    pub fn ratio(name: impl Into<String>, unit: &'static str, pairs: &[(f64, f64)], goal: Goal) -> Figure {
        let median_of = |pick: fn(&(f64, f64)) -> f64| median(pairs.iter().map(pick).collect());
        let ratio = median_of(|(product, floor)| product / floor);
        Figure {
            name: name.into(),
            value: median_of(|pair| pair.0),
            unit,
            floor: Some(median_of(|pair| pair.1)),
            ratio: Some(ratio),
            goal,
            ok: goal.met_by(ratio),
            arrangement: String::new(),
        }
    }

    /// A number of its own.
    ///
    /// # Panics
    /// If there are no values.
    #[must_use]
    pub fn absolute(name: impl Into<String>, unit: &'static str, values: &[f64], goal: Goal) -> Figure {
        let value = median(values.to_vec());
        let ok = goal.met_by(value);
        Figure { name: name.into(), value, unit, floor: None, ratio: None, goal, ok, arrangement: String::new() }
    }

    /// Says how it was measured.
    #[must_use]
    pub fn measured(mut self, arrangement: impl Into<String>) -> Figure {
        self.arrangement = arrangement.into();
        self
    }
}

/// The middle value, or the mean of the two middle ones.
///
/// # Panics
/// If there are no values.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}

/// The figures as a table.
#[must_use]
pub fn table(figures: &[Figure]) -> String {
    let width = figures.iter().map(|figure| figure.name.len()).max().unwrap_or(0).max(6);
    let mut text = format!(
        "{:width$}  {:>10} {:>10}  {:5} {:>7} {:>8}      how\n",
        "figure", "value", "floor", "unit", "ratio", "goal"
    );
    for figure in figures {
        let optional = |number: Option<f64>| number.map(short).unwrap_or_default();
        let goal = match figure.goal {
            Goal::AtMost(limit) => format!("<= {limit}"),
            Goal::AtLeast(limit) => format!(">= {limit}"),
            Goal::None => String::new(),
        };
        let verdict = match (figure.goal, figure.ok) {
            (Goal::None, _) => "",
            (_, true) => "ok",
            (_, false) => "MISS",
        };
        let line = format!(
            "{:width$}  {:>10} {:>10}  {:5} {:>7} {:>8} {:4} {}",
            figure.name,
            short(figure.value),
            optional(figure.floor),
            figure.unit,
            optional(figure.ratio),
            goal,
            verdict,
            figure.arrangement
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Three or four significant digits.
fn short(number: f64) -> String {
    let decimals = match number.abs() {
        size if size >= 1000.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 10.0 => 2,
        _ => 3,
    };
    format!("{number:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_found() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn the_ratio_is_that_of_the_pairs() {
        let figure = Figure::ratio("x.y", "us", &[(2.0, 1.0), (30.0, 10.0), (100.0, 10.0)], Goal::AtMost(3.0));
        assert_eq!((figure.value, figure.floor, figure.ratio, figure.ok), (30.0, Some(10.0), Some(3.0), true));
        let slow = Figure::ratio("x.z", "GiB/s", &[(8.0, 10.0)], Goal::AtLeast(0.9));
        assert!(!slow.ok);
        let shown = table(&[figure.measured("core 0"), slow]);
        assert!(shown.contains("<= 3 ok   core 0") && shown.contains("MISS"), "{shown}");
    }

    #[test]
    fn the_json_has_exactly_the_documented_keys() {
        let figure = Figure::absolute("x", "ms", &[1.5], Goal::AtMost(2.0)).measured("somehow");
        let json = serde_json::to_value(&figure).unwrap();
        let expected = serde_json::json!(
            {"name": "x", "value": 1.5, "unit": "ms", "floor": null, "ratio": null, "goal": 2.0, "ok": true}
        );
        assert_eq!(json, expected);
    }
}
