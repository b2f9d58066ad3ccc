//! In what two runs differ, said key by key.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::Run;

/// Digits of a digest that people compare.
const DIGEST_DIGITS: usize = 12;

/// One line for each setting that differs, `name: old -> new`; empty if the runs are the same work.
///
/// Where inputs lie is no difference, only what they hold.
pub(crate) fn between(old: &Run, new: &Run) -> Vec<String> {
    let (old, new) = (settings(old), settings(new));
    let mut names: Vec<&String> = old.keys().chain(new.keys()).collect();
    names.sort();
    names.dedup();
    let differing = names.into_iter().filter(|name| old.get(*name) != new.get(*name));
    let show =
        |settings: &BTreeMap<String, String>, name| settings.get(name).map_or("(none)", String::as_str).to_owned();
    differing.map(|name| format!("{name}: {} -> {}", show(&old, name), show(&new, name))).collect()
}

/// Every setting of a run by its dotted name.
fn settings(run: &Run) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::from([
        ("schema_version".to_owned(), run.schema_version.to_string()),
        ("program_version".to_owned(), run.program_version.clone()),
        ("seed".to_owned(), run.seed.to_string()),
    ]);
    flatten("", &run.arguments, &mut settings);
    for (index, input) in run.inputs.iter().enumerate() {
        let earlier = run.inputs[..index].iter().filter(|other| other.name == input.name).count();
        let ordinal = if earlier == 0 { String::new() } else { format!(" {}", earlier + 1) };
        let digest = input.digest.chars().take(DIGEST_DIGITS).collect();
        settings.insert(format!("content of --{}{ordinal}", input.name), digest);
    }
    settings
}

fn flatten(name: &str, value: &Value, settings: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(&name, value, settings);
            }
        }
        other => {
            settings.insert(name.to_owned(), other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::manifest::tests::run;

    #[test]
    fn every_changed_key_is_named_once() {
        let mut new = run();
        new.seed = 1;
        new.arguments = json!({ "limits": { "max_steps": 8, "top_k": 3 }, "temperature": 0.1 });
        new.inputs[0].digest = "cd".repeat(32);
        new.inputs[0].path = "elsewhere".to_owned();
        let expected = [
            "content of --tasks: abababababab -> cdcdcdcdcdcd",
            "limits.max_steps: 16 -> 8",
            "limits.top_k: (none) -> 3",
            "seed: 18446744073709551615 -> 1",
        ];
        assert_eq!(between(&run(), &new), expected);
        assert_eq!(between(&run(), &run()), [""; 0]);
    }

    #[test]
    fn inputs_of_one_name_are_compared_in_order() {
        let mut old = run();
        old.inputs.push(old.inputs[0].clone());
        let mut new = old.clone();
        new.inputs[1].digest = "cd".repeat(32);
        assert_eq!(between(&old, &new), ["content of --tasks 2: abababababab -> cdcdcdcdcdcd"]);
    }
}
