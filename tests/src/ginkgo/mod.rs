//! What the suites have in common that others write with ginkgo, <https://onsi.github.io/ginkgo>: `critest`
//! ([`crate::critest`]) and `e2e.test` ([`crate::conformance`]).
//!
//! Each run leaves a report in JSON, which [`report`] reads, and [`verdict`] holds one runtime's report against
//! another's. Some images that the suites name are alike ([`image`]).

pub mod image;
pub mod report;
pub mod verdict;

use crate::row::Runtime;
use report::Report;
use verdict::Inherent;

/// Prints what came out for each runtime, with runc as the measure if it was asked; whether it is good.
pub fn tell(suite: &str, reports: &[(Runtime, Report)], inherent: &[Inherent]) -> bool {
    let measure = reports.iter().find(|(runtime, _)| *runtime == Runtime::Runc).map(|(_, report)| report);
    let mut good = true;
    for (runtime, report) in reports {
        let measure = measure.filter(|_| *runtime != Runtime::Runc);
        println!("\nwith {}:", runtime.name());
        let findings = verdict::findings(report, measure, inherent);
        for finding in &findings {
            println!("  {}", finding.line);
        }
        if let Some(measure) = measure {
            let differences = verdict::differences((Runtime::Runc.name(), runtime.name()), (measure, report));
            println!("differences: {}", if differences.is_empty() { "none\n" } else { "" });
            print!("{differences}");
        }
        // What runc does not pass is nobody's to mend here.
        good &= !runtime.is_bulkhead() || !findings.iter().any(|finding| finding.ours);
    }
    let counted: Vec<_> = reports.iter().map(|(runtime, report)| (runtime.name(), report)).collect();
    print!("\n{}", verdict::counts(suite, &counted));
    good
}

/// A regular expression of ginkgo's for any of `names`, each as it is.
pub fn literally<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut expression = String::new();
    for name in names {
        if !expression.is_empty() {
            expression.push('|');
        }
        for character in name.chars() {
            if r"\.+*?()|[]{}^$".contains(character) {
                expression.push('\\');
            }
            expression.push(character);
        }
    }
    expression
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_literally() {
        assert_eq!(literally(["[sig-node] a *not* (b)", "c.d"]), r"\[sig-node\] a \*not\* \(b\)|c\.d");
        assert_eq!(literally([]), "");
    }
}
