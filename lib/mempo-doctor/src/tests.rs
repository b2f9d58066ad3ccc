use std::path::Path;

use super::*;

const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../pipelines/demo/base");

fn doctor(model: &Path) -> DoctorArguments {
    let device =
        DeviceOptions { device: "cpu".to_owned(), dtype: "f32".to_owned(), threads: Some(1), deterministic: false };
    DoctorArguments { model: Some(model.to_owned()), profile: "mempo".to_owned(), answer: "Paris".to_owned(), device }
}

/// A copy of the demo's base with one file changed.
fn changed(name: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs_err::read_dir(BASE).unwrap() {
        let entry = entry.unwrap();
        let bytes = fs_err::read(entry.path()).unwrap();
        let bytes = if entry.file_name() == name { change(bytes) } else { bytes };
        fs_err::write(dir.path().join(entry.file_name()), bytes).unwrap();
    }
    dir
}

fn replaced(name: &str, from: &str, to: &str) -> tempfile::TempDir {
    changed(name, |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(from), "{name} holds no {from}");
        text.replacen(from, to, 1).into_bytes()
    })
}

#[test]
fn a_sound_model_passes() {
    let report = doctor(Path::new(BASE)).examine();
    assert!(report.failures().is_empty(), "{}", report.text());
    let text = report.text();
    for part in [
        "✓ libtorch   2.",
        "✓ device     cpu f32",
        "✓ config     qwen2: 4 layers",
        "✓ weights",
        "✓ forward",
        "<|im_end|>",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let boundary = text.lines().find(|line| line.starts_with("✓ answer")).unwrap();
    let (opening, answer) = boundary.split_once(" | ").unwrap();
    let letters = |text: &str| text.split('"').skip(1).step_by(2).collect::<String>();
    assert_eq!((letters(opening).as_str(), letters(answer).as_str()), ("<answer>", "Paris"));
}

#[test]
fn what_is_broken_is_named_and_the_rest_is_still_tried() {
    for (dir, failures, word) in [
        (
            changed("model.safetensors", |bytes| bytes[..bytes.len() / 2].to_vec()),
            vec!["weights"],
            "fetch or copy it again",
        ),
        (
            changed("model.safetensors", |bytes| [&bytes[..bytes.len() - 4096], &[0xff; 4096]].concat()),
            vec!["forward"],
            "NaN",
        ),
        (replaced("config.json", "\"qwen2\"", "\"mamba\""), vec!["config"], "mamba"),
        (replaced("config.json", "2048", "1024"), vec!["tokenizer", "weights"], "do not belong together"),
        (changed("tokenizer.json", |_| b"{".to_vec()), vec!["tokenizer"], "tokenizer.json"),
        (
            replaced("tokenizer_config.json", "message['content']", "message['content'] | upper"),
            vec!["template"],
            "system message",
        ),
    ] {
        let report = doctor(dir.path()).examine();
        let text = report.text();
        assert_eq!(report.failures(), failures, "{text}");
        assert!(text.contains(word), "{word} is not in\n{text}");
        assert!(text.contains("✓ device"), "{text}");
    }
}

#[test]
fn a_failure_ends_with_code_3_and_an_empty_answer_with_2() {
    let code = |arguments: &DoctorArguments| mempo_run::exit_code(&arguments.run().unwrap_err());
    assert_eq!(code(&doctor(Path::new("nowhere"))), 3);
    let mut arguments = doctor(Path::new(BASE));
    arguments.device.device = "cuda:99".to_owned();
    assert_eq!(arguments.examine().failures(), ["device"]);
    arguments.answer = " ".to_owned();
    assert_eq!(code(&arguments), 2);
}
