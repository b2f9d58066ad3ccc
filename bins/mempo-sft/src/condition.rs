//! `--where`: a condition in SQL on the trajectories of a unit.
//!
//! DataFusion reads and evaluates the expression; there is no table and no query, so that what is kept does not depend on
//! the rows beside it.

use std::sync::Arc;

use anyhow::Context;
use datafusion::arrow::array::{Array, BooleanArray};
use datafusion::arrow::datatypes::{DataType, Field, FieldRef, Schema};
use datafusion::common::DFSchema;
use datafusion::common::tree_node::TreeNode;
use datafusion::logical_expr::{Expr, Volatility};
use datafusion::physical_plan::PhysicalExpr;
use datafusion::prelude::SessionContext;
use serde::Serialize;

/// What a condition may ask of a trajectory (or of another row); the columns of `--where`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Facts {
    /// The row's id.
    pub(crate) trajectory_id: String,
    /// Its task.
    pub(crate) task_id: Option<String>,
    /// Where the task is from.
    pub(crate) source: Option<String>,
    /// `train`, `dev` or `test`.
    pub(crate) split: Option<String>,
    /// `chat`, `pair`, `text` or `rollout`.
    pub(crate) form: String,
    /// What is asked.
    pub(crate) question: Option<String>,
    /// The answer given.
    pub(crate) answer: Option<String>,
    /// Model calls.
    pub(crate) steps: i64,
    /// Steps that call a tool.
    pub(crate) tool_calls: i64,
    /// Tokens of all its examples.
    pub(crate) tokens: i64,
    /// Those that are learnt.
    pub(crate) target_tokens: i64,
    /// Tokens of its longest example.
    pub(crate) peak_tokens: i64,
    /// Tags right in every step, a memory where one is needed; null for pairs and text.
    pub(crate) format_valid: Option<bool>,
    /// Right in the right form; null without gold answers.
    pub(crate) correct: Option<bool>,
    /// Share of objectives answered exactly, in [0, 1].
    pub(crate) exact_match: Option<f64>,
    /// Mean word-level F1 over objectives, in [0, 1].
    pub(crate) f1: Option<f64>,
    /// Whether a memory holds a gold answer before any document showed it.
    pub(crate) leaks: Option<bool>,
}

/// The columns with their types, as [`Facts`] has them.
const COLUMNS: [(&str, DataType); 17] = [
    ("trajectory_id", DataType::Utf8),
    ("task_id", DataType::Utf8),
    ("source", DataType::Utf8),
    ("split", DataType::Utf8),
    ("form", DataType::Utf8),
    ("question", DataType::Utf8),
    ("answer", DataType::Utf8),
    ("steps", DataType::Int64),
    ("tool_calls", DataType::Int64),
    ("tokens", DataType::Int64),
    ("target_tokens", DataType::Int64),
    ("peak_tokens", DataType::Int64),
    ("format_valid", DataType::Boolean),
    ("correct", DataType::Boolean),
    ("exact_match", DataType::Float64),
    ("f1", DataType::Float64),
    ("leaks", DataType::Boolean),
];

/// A condition that was understood.
pub(crate) struct Condition {
    expression: Arc<dyn PhysicalExpr>,
    fields: Vec<FieldRef>,
    asked: Vec<String>,
}

impl Condition {
    /// Reads an SQL expression; what is wrong with it otherwise, and which columns there are.
    pub(crate) fn parse(sql: &str) -> Result<Self, String> {
        let fields: Vec<FieldRef> =
            COLUMNS.iter().map(|(name, kind)| Arc::new(Field::new(*name, kind.clone(), true))).collect();
        expression(sql, &fields).map(|(expression, asked)| Self { expression, fields: fields.clone(), asked }).map_err(
            |problem| {
                let columns: Vec<String> =
                    COLUMNS.iter().map(|(name, kind)| format!("{name} ({})", told_type(kind))).collect();
                format!(
                    "--where: {problem}; expected a condition on {}, as in \"steps <= 8 AND source = 'nq'\"",
                    columns.join(", ")
                )
            },
        )
    }

    /// Whether it asks for that column.
    pub(crate) fn asks(&self, column: &str) -> bool {
        self.asked.iter().any(|asked| asked == column)
    }

    /// For each trajectory whether the condition holds; null does not. Where it fails for all together, as `b > 0 AND a / b > 1`
    /// may, each is looked at by itself: what it fails for then is named.
    pub(crate) fn holds(&self, facts: &[Facts]) -> anyhow::Result<Vec<bool>> {
        let one = |facts: &Facts| {
            let found = self.together(std::slice::from_ref(facts));
            Ok(found.with_context(|| format!("--where: trajectory `{}`", facts.trajectory_id))?[0])
        };
        self.together(facts).or_else(|_| facts.iter().map(one).collect())
    }

    fn together(&self, facts: &[Facts]) -> anyhow::Result<Vec<bool>> {
        let batch = serde_arrow::to_record_batch(&self.fields, &facts)?;
        let found = self.expression.evaluate(&batch)?.into_array(facts.len())?;
        let found = found.as_any().downcast_ref::<BooleanArray>();
        let found = found.ok_or_else(|| anyhow::anyhow!("--where: no truth value came of the condition"))?;
        Ok((0..facts.len()).map(|row| found.is_valid(row) && found.value(row)).collect())
    }
}

/// The expression, and the columns it asks for.
fn expression(sql: &str, fields: &[FieldRef]) -> Result<(Arc<dyn PhysicalExpr>, Vec<String>), String> {
    let told = |error: datafusion::error::DataFusionError| {
        let text = error.strip_backtrace();
        let line = text.lines().next().unwrap_or_default();
        line.split(" Valid fields are").next().unwrap_or_default().trim_end_matches('.').to_owned()
    };
    let arrow = Schema::new(fields.to_vec());
    let schema = DFSchema::try_from(arrow.clone()).map_err(told)?;
    let session = SessionContext::new();
    let logical = session.parse_sql_expr(sql, &schema).map_err(told)?;
    let varies = |part: &Expr| {
        Ok(matches!(part, Expr::ScalarFunction(called) if called.func.signature().volatility != Volatility::Immutable))
    };
    if logical.exists(varies).map_err(told)? {
        return Err("it calls a function that gives another value on another day".to_owned());
    }
    let asked = logical.column_refs().into_iter().map(|column| column.name.clone()).collect();
    let expression = session.create_physical_expr(logical, &schema).map_err(told)?;
    match expression.data_type(&arrow).map_err(told)? {
        DataType::Boolean => Ok((expression, asked)),
        other => Err(format!("it is {}, no condition", told_type(&other))),
    }
}

fn told_type(kind: &DataType) -> String {
    match kind {
        DataType::Utf8 => "text".to_owned(),
        DataType::Int64 => "whole number".to_owned(),
        DataType::Float64 => "number".to_owned(),
        DataType::Boolean => "true or false".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Vec<Facts> {
        let base = Facts { trajectory_id: "a".into(), form: "chat".into(), steps: 3, tokens: 90, ..Facts::default() };
        vec![
            Facts { source: Some("nq".into()), f1: Some(0.5), correct: Some(false), ..base.clone() },
            Facts { source: Some("it's".into()), steps: 9, answer: Some("Ann; Bob".into()), ..base.clone() },
            Facts { leaks: Some(false), tool_calls: 2, ..base },
        ]
    }

    #[test]
    fn conditions_are_sql() {
        let check = |sql: &str, expected: [bool; 3]| {
            assert_eq!(Condition::parse(sql).unwrap().holds(&facts()).unwrap(), expected, "{sql}");
        };
        check("steps < 9", [true, false, true]);
        check("source = 'nq' or source = 'it''s'", [true, true, false]);
        check("source in ('nq') and not correct and f1 >= 0.5", [true, false, false]);
        check("answer like '%; Bob'", [false, true, false]);
        check("not leaks", [false, false, true]);
        check("tokens / (tool_calls + 1) between 30 and 89", [false, false, true]);
        check("task_id is null", [true, true, true]);
        check("true", [true, true, true]);
        assert_eq!(Condition::parse("steps = 3").unwrap().holds(&[]).unwrap(), [false; 0]);
    }

    #[test]
    fn what_is_no_condition_is_refused_with_the_columns() {
        for (sql, told) in [
            ("stepps < 9", "No field named stepps"),
            ("steps + 1", "it is whole number, no condition"),
            ("steps <", "ParserError"),
            ("", "ParserError"),
            ("steps < 9; drop table x", "ParserError"),
            ("count(*) > 1", ""),
            ("steps in (select 1)", ""),
            ("random() < 0.5", ""),
            ("now() > now()", ""),
        ] {
            let error = Condition::parse(sql).err().unwrap_or_else(|| panic!("{sql} was taken"));
            assert!(error.contains(told), "{sql}: {error}");
            assert!(
                error.starts_with("--where: ") && error.contains("expected a condition on trajectory_id (text),"),
                "{error}"
            );
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
