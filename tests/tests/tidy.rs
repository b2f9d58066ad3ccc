//! The rules about the shape of the workspace: which crate may use which, and how large files grow.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use mempo_tests::root;
use serde_json::Value;

/// Files that may be longer than [`FILE_LINES`], each with the reason.
const LONG_FILES: &[(&str, &str)] = &[];
const FILE_LINES: usize = 500;

/// What each workspace crate may depend on inside the workspace: everything else bends the graph the wrong way.
fn allowed(name: &str) -> &'static [&'static str] {
    match name {
        "mempo-data" | "mempo-text" => &["mempo-guard"],
        "mempo-run" => &["mempo-data", "mempo-guard"],
        "mempo-agent" => &["mempo-data", "mempo-text"],
        "mempo-model" => &["mempo-native"],
        "mempo-train" => &["mempo-model", "mempo-native"],
        "mempo-doctor" => &["mempo-model", "mempo-run", "mempo-text"],
        "mempo-sft" | "mempo-rollout" | "mempo-score" | "mempo-rl" | "mempo-demo" => {
            &["mempo-agent", "mempo-data", "mempo-doctor", "mempo-model", "mempo-run", "mempo-text", "mempo-train"]
        }
        "mempo-tests" => &["mempo-run"],
        _ => &[],
    }
}

fn packages() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let normal = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
            (text(&package["name"]), normal.map(|d| text(&d["name"])).collect())
        })
        .collect()
}

#[test]
fn crate_graph_points_one_way() {
    for (name, dependencies) in packages() {
        for dependency in dependencies.iter().filter(|d| d.starts_with("mempo-")) {
            assert!(allowed(&name).contains(&dependency.as_str()), "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn heavy_libraries_stay_where_they_belong() {
    let homes: &[(&str, &[&str])] = &[
        ("tch", &["mempo-model", "mempo-native", "mempo-train"]),
        ("datafusion", &["mempo-score", "mempo-sft"]),
        ("tokenizers", &["mempo-text"]),
        ("indicatif", &["mempo-run"]),
    ];
    let packages = packages();
    for (library, homes) in homes {
        for (name, dependencies) in &packages {
            let uses = dependencies.iter().any(|d| d == library);
            assert!(!uses || homes.contains(&name.as_str()), "{name} must not depend on {library}");
        }
    }
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs_err::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Lines of a file before its inline test module.
fn code_lines(text: &str) -> usize {
    text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count()
}

#[test]
fn files_stay_readable() {
    let mut files = Vec::new();
    for folder in ["bins", "lib", "pipelines"] {
        rust_files(&root().join(folder), &mut files);
    }
    assert!(files.len() > 30, "found only {} source files", files.len());
    for path in files.iter().filter(|path| path.components().any(|part| part.as_os_str() == "src")) {
        let relative = path.strip_prefix(root()).unwrap().display().to_string();
        let lines = code_lines(&fs_err::read_to_string(path).unwrap());
        let excepted = LONG_FILES.iter().any(|(name, _)| *name == relative);
        assert!(lines <= FILE_LINES || excepted, "{relative} has {lines} lines, more than {FILE_LINES}: split it");
    }
}

#[test]
fn programs_start_in_fifteen_lines() {
    for name in ["mempo-sft", "mempo-rollout", "mempo-score", "mempo-rl"] {
        let path = root().join("bins").join(name).join("src/main.rs");
        let lines = fs_err::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 15, "{} has {lines} lines", path.display());
    }
}

#[test]
fn nothing_is_left_unfinished() {
    let mut files = Vec::new();
    for folder in ["bins", "lib", "pipelines"] {
        rust_files(&root().join(folder), &mut files);
    }
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("unimplemented", "!"), concat!("todo", "!")];
    for path in files {
        let text = fs_err::read_to_string(&path).unwrap();
        for word in words {
            assert!(!text.contains(word), "{} contains {word}", path.display());
        }
    }
}
