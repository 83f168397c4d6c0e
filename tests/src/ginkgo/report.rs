//! What a run of a suite said: ginkgo's report in JSON, as far as it matters here. Pure.
//!
//! <https://pkg.go.dev/github.com/onsi/ginkgo/v2/types#Report>

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// How one spec ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It failed, for this reason.
    Failed(String),
    /// It did not run, for this reason.
    Skipped(String),
}

/// How each spec of a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// By the spec's whole name.
    pub specs: BTreeMap<String, Outcome>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    /// Why the suite failed as a whole: it took too long, say, and specs were left out.
    special_suite_failure_reasons: Option<Vec<String>>,
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    #[serde(default)]
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

impl Report {
    /// Reads a report. A set-up of the whole suite that failed counts as a spec, and so does the suite if it failed as
    /// a whole.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let suites: Vec<Suite> = serde_json::from_slice(json).context("parse the suite's report")?;
        let mut specs = BTreeMap::new();
        for suite in &suites {
            let reasons = suite.special_suite_failure_reasons.as_deref().unwrap_or_default();
            if !reasons.is_empty() {
                specs.insert("the suite".to_owned(), Outcome::Failed(one_line(&reasons.join("; "))));
            }
        }
        for spec in suites.into_iter().flat_map(|suite| suite.spec_reports.unwrap_or_default()) {
            let mut name = spec.container_hierarchy_texts.unwrap_or_default();
            name.push(if spec.leaf_node_text.is_empty() { spec.leaf_node_type.clone() } else { spec.leaf_node_text });
            let message = spec.failure.map(|failure| one_line(&failure.message)).unwrap_or_default();
            let outcome = match spec.state.as_str() {
                "passed" => Outcome::Passed,
                "skipped" | "pending" => Outcome::Skipped(message),
                state => Outcome::Failed(if message.is_empty() { state.to_owned() } else { message }),
            };
            if spec.leaf_node_type == "It" || matches!(outcome, Outcome::Failed(_)) {
                specs.insert(name.join(" "), outcome);
            }
        }
        ensure!(!specs.is_empty(), "the suite's report has no specs");
        Ok(Self { specs })
    }

    /// Settles the specs that were skipped without a reason: those that `reason` has one for, by their names, stay with
    /// it; the others were not asked for (not in the focus, or benchmarks) and go.
    #[must_use]
    pub fn settle(mut self, reason: impl Fn(&str) -> Option<&'static str>) -> Self {
        let unsettled = Outcome::Skipped(String::new());
        self.specs.retain(|name, outcome| {
            if *outcome == unsettled {
                let Some(reason) = reason(name) else { return false };
                *outcome = Outcome::Skipped(reason.to_owned());
            }
            true
        });
        self
    }

    /// Numbers of specs that passed, failed and were skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.specs.values().fold((0, 0, 0), |(passed, failed, skipped), outcome| match outcome {
            Outcome::Passed => (passed + 1, failed, skipped),
            Outcome::Failed(_) => (passed, failed + 1, skipped),
            Outcome::Skipped(_) => (passed, failed, skipped + 1),
        })
    }

    /// `P passed, F failed, S skipped`.
    pub fn summary(&self) -> String {
        let (passed, failed, skipped) = self.counts();
        format!("{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// A message of many lines as one of a length that can be read.
fn one_line(message: &str) -> String {
    let words: Vec<_> = message.split_whitespace().collect();
    let line = words.join(" ");
    if line.chars().count() <= 400 {
        return line;
    }
    line.chars().take(400).chain(" ...".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"[{"SuiteDescription": "CRI validation", "SpecReports": [
        {"ContainerHierarchyTexts": null, "LeafNodeType": "BeforeSuite", "LeafNodeText": "", "State": "passed"},
        {"ContainerHierarchyTexts": ["[k8s.io] Pod", "sysctls"], "LeafNodeType": "It", "LeafNodeText": "are set", "State": "passed"},
        {"ContainerHierarchyTexts": ["[k8s.io] Pod"], "LeafNodeType": "It", "LeafNodeText": "runs", "State": "failed",
         "Failure": {"Message": "Expected\n    <string>: a\nto equal b"}},
        {"ContainerHierarchyTexts": ["[k8s.io] Pod"], "LeafNodeType": "It", "LeafNodeText": "ends", "State": "timedout"},
        {"ContainerHierarchyTexts": ["[k8s.io] Image Manager"], "LeafNodeType": "It", "LeafNodeText": "pulls", "State": "skipped"},
        {"ContainerHierarchyTexts": ["[k8s.io] Pod benchmark"], "LeafNodeType": "It", "LeafNodeText": "is fast", "State": "skipped"},
        {"ContainerHierarchyTexts": ["[k8s.io] Pod"], "LeafNodeType": "It", "LeafNodeText": "dances", "State": "skipped",
         "Failure": {"Message": "no music"}}
    ]}]"#;

    #[test]
    fn each_spec_has_its_outcome_and_reason() {
        let report = Report::parse(JSON.as_bytes()).expect("parses");
        let report = report.settle(|name| name.contains("Image").then_some("offline"));
        let all: Vec<_> = report.specs.iter().map(|(name, outcome)| (name.as_str(), outcome.clone())).collect();
        assert_eq!(
            all,
            [
                ("[k8s.io] Image Manager pulls", Outcome::Skipped("offline".into())),
                ("[k8s.io] Pod dances", Outcome::Skipped("no music".into())),
                ("[k8s.io] Pod ends", Outcome::Failed("timedout".into())),
                ("[k8s.io] Pod runs", Outcome::Failed("Expected <string>: a to equal b".into())),
                ("[k8s.io] Pod sysctls are set", Outcome::Passed),
            ]
        );
        assert_eq!(report.summary(), "1 passed, 2 failed, 2 skipped");
    }

    #[test]
    fn a_failed_set_up_is_not_passed_over() {
        let json = r#"[{"SpecReports": [{"LeafNodeType": "BeforeSuite", "State": "panicked", "Failure": {"Message": "no socket"}}]}]"#;
        let report = Report::parse(json.as_bytes()).expect("parses");
        assert_eq!(report.specs["BeforeSuite"], Outcome::Failed("no socket".into()));
    }

    #[test]
    fn a_suite_that_ran_out_of_time_is_not_passed_over() {
        let json = r#"[{"SpecialSuiteFailureReasons": ["Suite Timeout Elapsed"], "SpecReports": null}]"#;
        let report = Report::parse(json.as_bytes()).expect("parses");
        assert_eq!(report.specs["the suite"], Outcome::Failed("Suite Timeout Elapsed".into()));
    }

    #[test]
    fn a_report_without_specs_is_an_error() {
        assert!(Report::parse(br#"[{"SpecReports": null}]"#).is_err());
    }
}
