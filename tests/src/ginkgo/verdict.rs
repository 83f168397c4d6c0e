//! One runtime's report held against that of the measure. Pure.

use std::fmt::Write as _;

use crate::ginkgo::report::{Outcome, Report};

/// The end of the names of specs that no microVM passes, and why.
pub type Inherent = (&'static str, &'static str);

/// A spec that did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding<'a> {
    /// The spec's whole name.
    pub name: &'a str,
    /// How it ended, for people.
    pub line: String,
    /// Whether it is ours to mend.
    pub ours: bool,
}

/// What `report` has that did not pass: failures first, then what was skipped, then what is not there at all. `measure`
/// is what the other runtime said, if it was asked; `inherent` is nobody's to mend.
pub fn findings<'a>(report: &'a Report, measure: Option<&'a Report>, inherent: &[Inherent]) -> Vec<Finding<'a>> {
    let measured = |name: &str| measure.and_then(|measure| measure.specs.get(name));
    let judge = |name: &str| {
        let why = inherent.iter().find(|(end, _)| name.ends_with(end)).map(|(_, why)| *why);
        match (why, measured(name)) {
            (Some(why), _) => (format!("inherent, {why}"), false),
            (None, Some(Outcome::Failed(_))) => ("the measure fails as well".to_owned(), false),
            (None, Some(Outcome::Skipped(_))) => ("the measure skips it".to_owned(), true),
            (None, Some(Outcome::Passed)) => ("the measure passes".to_owned(), true),
            (None, None) => ("not measured".to_owned(), true),
        }
    };
    let mut findings = Vec::new();
    for (name, outcome) in &report.specs {
        if let Outcome::Failed(reason) = outcome {
            let (whose, ours) = judge(name);
            findings.push(Finding { name, line: format!("failed   {name} ({whose}): {reason}"), ours });
        }
    }
    for (name, outcome) in &report.specs {
        let Outcome::Skipped(reason) = outcome else { continue };
        // What the measure does not run either is not missed.
        let (whose, ours) = if measured(name) == Some(&Outcome::Passed) {
            let (whose, ours) = judge(name);
            (format!(" ({whose})"), ours)
        } else {
            (String::new(), false)
        };
        findings.push(Finding { name, line: format!("skipped  {name}{whose}: {reason}"), ours });
    }
    for (name, outcome) in measure.into_iter().flat_map(|measure| &measure.specs) {
        if *outcome == Outcome::Passed && !report.specs.contains_key(name) {
            let (whose, ours) = judge(name);
            findings.push(Finding { name, line: format!("absent   {name} ({whose})"), ours });
        }
    }
    findings
}

/// One line for each spec that ended differently under the two, none if there is no such spec.
pub fn differences(names: (&str, &str), reports: (&Report, &Report)) -> String {
    let word = |outcome: Option<&Outcome>| match outcome {
        None => "absent",
        Some(Outcome::Passed) => "passed",
        Some(Outcome::Failed(_)) => "failed",
        Some(Outcome::Skipped(_)) => "skipped",
    };
    let mut text = String::new();
    for (name, one) in &reports.0.specs {
        let (one, other) = (word(Some(one)), word(reports.1.specs.get(name)));
        if one != other {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name}: {one} with {}, {other} with {}", names.0, names.1);
        }
    }
    text
}

/// The numbers of several runtimes' reports side by side, one line for each below a heading with the name of the suite.
pub fn counts(suite: &str, reports: &[(&str, &Report)]) -> String {
    let mut text = format!("{suite:<16} {:>7} {:>7} {:>7}\n", "passed", "failed", "skipped");
    for (name, report) in reports {
        let (passed, failed, skipped) = report.counts();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<16} {passed:>7} {failed:>7} {skipped:>7}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(specs: &[(&str, Outcome)]) -> Report {
        Report { specs: specs.iter().map(|(name, outcome)| ((*name).to_owned(), outcome.clone())).collect() }
    }

    fn failed() -> Outcome {
        Outcome::Failed("it broke".into())
    }

    #[test]
    fn only_what_the_measure_does_better_is_ours() {
        let host_ipc = "[k8s.io] Security Context NamespaceOption runtime should support HostIpc is true";
        let inherent = [("should support HostIpc is true", "it is the host's")];
        let ours = report(&[
            ("a", failed()),
            ("b", failed()),
            ("c", Outcome::Passed),
            ("d", Outcome::Skipped("no such thing".into())),
            (host_ipc, failed()),
        ]);
        let measure = report(&[("a", Outcome::Passed), ("b", failed()), (host_ipc, Outcome::Passed)]);
        let findings = findings(&ours, Some(&measure), &inherent);
        let told: Vec<_> = findings.iter().map(|finding| (finding.name, finding.ours)).collect();
        assert_eq!(told, [(host_ipc, false), ("a", true), ("b", false), ("d", false)]);
        assert_eq!(findings[1].line, "failed   a (the measure passes): it broke");
        assert_eq!(findings[3].line, "skipped  d: no such thing");
    }

    #[test]
    fn without_a_measure_every_failure_is_ours() {
        let ours = report(&[("a", failed())]);
        assert!(findings(&ours, None, &[])[0].ours);
    }

    #[test]
    fn what_only_the_measure_runs_is_ours() {
        let ours = report(&[("a", Outcome::Passed), ("b", Outcome::Skipped("no such thing".into()))]);
        let measure =
            report(&[("a", Outcome::Passed), ("b", Outcome::Passed), ("c", Outcome::Passed), ("d", failed())]);
        let findings = findings(&ours, Some(&measure), &[]);
        let lines: Vec<_> = findings.iter().map(|finding| finding.line.as_str()).collect();
        assert_eq!(lines, ["skipped  b (the measure passes): no such thing", "absent   c (the measure passes)"]);
        assert!(findings.iter().all(|finding| finding.ours));
    }

    #[test]
    fn counts_stand_side_by_side() {
        let one = report(&[("a", Outcome::Passed), ("b", Outcome::Passed)]);
        let other = report(&[("a", failed()), ("b", Outcome::Skipped(String::new()))]);
        assert_eq!(
            counts("critest", &[("runc", &one), ("bulkhead-sandbox", &other)]),
            "critest           passed  failed skipped\n\
             runc                   2       0       0\n\
             bulkhead-sandbox       0       1       1\n"
        );
    }

    #[test]
    fn differences_are_told_one_a_line() {
        let one = report(&[("a", Outcome::Passed), ("b", Outcome::Passed)]);
        let other = report(&[("a", failed()), ("b", Outcome::Passed)]);
        assert_eq!(differences(("runc", "bulkhead"), (&one, &other)), "a: passed with runc, failed with bulkhead\n");
    }
}
