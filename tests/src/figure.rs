//! Measured figures and how they are shown.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// Samples of one quantity, in one unit.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Samples {
    /// Every sample in the order taken.
    pub values: Vec<f64>,
}

impl Samples {
    /// Adds a time in milliseconds.
    pub fn add_time(&mut self, time: Duration) {
        self.values.push(time.as_secs_f64() * 1000.0);
    }

    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.values.push(value);
    }

    /// The middle sample, or the mean of the two in the middle; `None` without samples.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            n if n % 2 == 1 => Some(sorted[middle]),
            _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        }
    }
}

/// Everything measured of one runtime, by name.
pub type Figures = BTreeMap<String, Samples>;

/// A promise about a figure.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// What is promised.
    pub promise: String,
    /// What was found.
    pub found: f64,
    /// The bound.
    pub bound: f64,
    /// Whether it holds.
    pub holds: bool,
}

impl Verdict {
    /// `found` must not exceed `bound`.
    pub fn at_most(promise: &str, found: f64, bound: f64) -> Self {
        Self { promise: promise.to_owned(), found, bound, holds: found <= bound }
    }

    /// `found` must not fall below `bound`.
    pub fn at_least(promise: &str, found: f64, bound: f64) -> Self {
        Self { promise: promise.to_owned(), found, bound, holds: found >= bound }
    }
}

/// Pairs of a log line's text such as `spec=1.2ms,net=3ms` or `spec=12 net=3`, in milliseconds.
pub fn parse_stages(text: &str) -> Vec<(String, f64)> {
    let pairs = text.split([' ', ',', ';']).filter_map(|pair| pair.split_once('='));
    pairs
        .filter_map(|(name, value)| {
            let digits = value.trim_end_matches(|c: char| c.is_alphabetic() || c == 'µ');
            let number: f64 = digits.parse().ok()?;
            let factor = match &value[digits.len()..] {
                "" | "ms" => 1.0,
                "us" | "µs" => 0.001,
                "s" => 1000.0,
                _ => return None,
            };
            Some((name.to_owned(), number * factor))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(Samples { values: vec![9.0, 1.0, 2.0] }.median(), Some(2.0));
        assert_eq!(Samples { values: vec![4.0, 1.0] }.median(), Some(2.5));
        assert_eq!(Samples::default().median(), None);
    }

    #[test]
    fn stages_are_read_in_any_unit() {
        let stages = parse_stages("spec=1.5ms network=300us,boot=1s agent=7 odd=x");
        let expected = [("spec", 1.5), ("network", 0.3), ("boot", 1000.0), ("agent", 7.0)];
        assert_eq!(stages, expected.map(|(name, value)| (name.to_owned(), value)));
    }
}
