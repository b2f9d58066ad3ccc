//! What was found, line by line.

use mempo_run::print_data;

/// Prints findings as they come, and remembers what failed.
#[derive(Debug, Default)]
pub(crate) struct Report {
    lines: Vec<String>,
    failures: Vec<&'static str>,
}

impl Report {
    /// Works.
    pub(crate) fn good(&mut self, what: &'static str, finding: &str) {
        self.line('✓', what, finding);
    }

    /// Works, but should be known.
    pub(crate) fn note(&mut self, what: &'static str, finding: &str) {
        self.line('!', what, finding);
    }

    /// Does not work; the finding says what to do.
    pub(crate) fn bad(&mut self, what: &'static str, finding: &str) {
        self.line('✗', what, finding);
        if !self.failures.contains(&what) {
            self.failures.push(what);
        }
    }

    /// The value, or a line about the error.
    pub(crate) fn value<T, E: std::fmt::Display>(&mut self, what: &'static str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.bad(what, &error.to_string())).ok()
    }

    /// What failed, each once, in the order it was found.
    pub(crate) fn failures(&self) -> &[&'static str] {
        &self.failures
    }

    /// Everything printed.
    #[cfg(test)]
    pub(crate) fn text(&self) -> String {
        self.lines.concat()
    }

    fn line(&mut self, mark: char, what: &str, finding: &str) {
        let line = format!("{mark} {what:<10} {finding}\n");
        print_data(&line);
        self.lines.push(line);
    }
}
