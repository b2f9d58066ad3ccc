//! Indexes with vectors: made, interrupted, searched and refused. The encoder is the golden one of `mempo-model`.

use std::path::{Path, PathBuf};

use clap::Parser;
use mempo_data::{Document, read_rows};
use mempo_run::exit_code;
use serde_json::{Value, json};

use super::*;

fn encoder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../lib/mempo-model/tests/golden/bert")
}

/// A folder with a corpus of `count` documents of a few letters.
fn corpus(count: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let letter = |i: usize| char::from(b'a' + (i % 26) as u8);
    let row = |i: usize| {
        let text = format!("{} {}{} river {}", letter(i), letter(i / 3), letter(i / 7), letter(i / 26));
        json!({"id": format!("{i:05}"), "title": format!("city {}", letter(i / 5)), "text": text}).to_string()
    };
    let rows: Vec<String> = (0..count).map(row).collect();
    fs_err::write(folder.path().join("corpus.jsonl"), rows.join("\n")).unwrap();
    folder
}

/// Runs a command; `@` stands for the folder, `@encoder` for the encoder.
fn run(folder: &Path, line: &str) -> anyhow::Result<()> {
    let word = |word: &str| match word.strip_prefix('@') {
        Some("encoder") => encoder().display().to_string(),
        Some(name) => folder.join(name).display().to_string(),
        None => word.to_owned(),
    };
    let words = std::iter::once("mempo-rollout".to_owned()).chain(line.split_whitespace().map(word));
    crate::run(crate::Arguments::try_parse_from(words)?)
}

const INDEX: &str =
    "index --corpus @corpus.jsonl --out @index --encoder @encoder --max-tokens 16 --dtype f32 --device cpu";

fn options(kind: Kind, encoder: Option<PathBuf>) -> RetrieverOptions {
    let (query_prefix, search_device) = ("query: ".to_owned(), "cpu".to_owned());
    RetrieverOptions { retriever: kind, bm25: Bm25Options::default(), encoder, query_prefix, search_device }
}

fn open(folder: &Path, kind: Kind) -> Retriever {
    let options = options(kind, Some(encoder()));
    let (index, encoder) = (Input::stage("search", &folder.join("index")).unwrap(), options.input().unwrap());
    options.open(&index, encoder.as_ref()).unwrap()
}

fn ids(hits: &[Hit]) -> Vec<&str> {
    hits.iter().map(|hit| hit.document.doc_id.as_str()).collect()
}

/// Inner products of a query with all documents, each encoded alone in single precision.
fn products(folder: &Path, query: &str) -> Vec<f32> {
    let index = Input::stage("search", &folder.join("index")).unwrap();
    let embedder = Embedder::open(&encoder(), Recipe::of(&index).unwrap()).unwrap();
    let vector = |text: String| {
        let ids = embedder.ids(vec![text]).unwrap();
        embedder.encoder.embed(&ids, &embedder.options()).unwrap().row(0)
    };
    let query = vector(format!("query: {query}"));
    let documents = read_rows::<Document>(&index.table("corpus").unwrap()).unwrap();
    let product = |document: Document| -> f32 {
        let vector = vector(format!("passage: \"{}\"\n{}", document.title, document.text));
        vector.iter().zip(&query).map(|(a, b)| a * b).sum()
    };
    documents.map(|document| product(document.unwrap())).collect()
}

#[test]
fn dense_search_finds_the_largest_products_and_hybrid_fuses_both_rankings() {
    let folder = corpus(300);
    run(folder.path(), INDEX).unwrap();
    run(folder.path(), "verify @index").unwrap();
    let (dense, hybrid) = (open(folder.path(), Kind::Dense), open(folder.path(), Kind::Hybrid));
    let words = SearchIndex::open(&folder.path().join("index").join(INDEX_FOLDER), Bm25Options::default()).unwrap();
    let queries = ["city b", "what river is in c", "zz", "a a a"].map(str::to_owned);
    let found = dense.search(&queries, 10).unwrap();
    for (query, found) in queries.iter().zip(&found) {
        let products = products(folder.path(), query);
        let of = |hit: &Hit| products[hit.document.doc_id.parse::<usize>().unwrap()];
        assert_eq!(found.len(), 10);
        assert!(found.is_sorted_by(|a, b| a.score >= b.score));
        // Half precision moves a product of unit vectors by less than this.
        assert!(found.iter().all(|hit| (hit.score - of(hit)).abs() < 1e-3), "{found:?}");
        let better = products.iter().filter(|product| **product > found[9].score + 1e-3).count();
        assert!(better < 10, "{better} documents are nearer than the tenth");

        let rankings =
            vec![words.search(query, 100).unwrap(), dense.search(std::slice::from_ref(query), 100).unwrap().remove(0)];
        assert_eq!(hybrid.search(std::slice::from_ref(query), 7).unwrap(), [reciprocal_rank_fusion(rankings, 7)]);
    }
    assert_ne!(ids(&found[0]), ids(&words.search("city b", 10).unwrap()));
    assert_eq!(dense.search(&queries, 0).unwrap(), vec![vec![]; 4]);
}

#[test]
fn who_asks_beside_others_is_told_what_it_is_told_alone() {
    let folder = corpus(300);
    run(folder.path(), INDEX).unwrap();
    let dense = open(folder.path(), Kind::Dense);
    let ask = |i: usize| dense.search(&[format!("city {}", "a river ".repeat(i % 4))], 1 + i % 5).unwrap();
    let alone: Vec<_> = (0..24).map(ask).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..24).map(|i| scope.spawn(move || ask(i))).collect();
        asking.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(together, alone);
}

#[test]
fn an_index_that_was_interrupted_goes_on_after_the_vectors_that_are_there() {
    let folder = corpus(10_050);
    run(folder.path(), INDEX).unwrap();
    let index = folder.path().join("index");
    let part = |unit: usize| index.join(format!("vectors/part-0000{unit}.safetensors"));
    let expected: Vec<Vec<u8>> = (0..2).map(|unit| fs_err::read(part(unit)).unwrap()).collect();
    let manifest = fs_err::read_to_string(index.join("manifest.json")).unwrap();
    assert!(manifest.contains("vectors/part-00001.safetensors"), "{manifest}");
    fs_err::remove_file(index.join("manifest.json")).unwrap();
    fs_err::remove_file(part(1)).unwrap();
    let written = fs_err::metadata(part(0)).unwrap().modified().unwrap();
    run(folder.path(), INDEX).unwrap();
    assert_eq!(fs_err::metadata(part(0)).unwrap().modified().unwrap(), written);
    for (unit, expected) in expected.iter().enumerate() {
        assert!(fs_err::read(part(unit)).unwrap() == *expected, "part {unit}");
    }
    let error = run(folder.path(), &INDEX.replace("16", "15")).unwrap_err();
    assert!(exit_code(&error) == 2 && error.to_string().contains("max_tokens"), "{error:#}");
}

#[test]
fn what_does_not_fit_together_is_refused_by_name() {
    let folder = corpus(20);
    run(folder.path(), INDEX).unwrap();
    run(folder.path(), "index --corpus @corpus.jsonl --out @words").unwrap();
    let other = folder.path().join("other");
    fs_err::create_dir(&other).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs_err::copy(encoder().join(name), other.join(name)).unwrap();
    }
    let config = fs_err::read_to_string(other.join("config.json")).unwrap();
    fs_err::write(other.join("config.json"), config.replace("1e-12", "1e-6")).unwrap();
    for (line, code, told) in [
        ("serve-search --index @index --retriever dense --encoder @other", 4, "not made from"),
        ("serve-search --index @words --retriever hybrid --encoder @encoder", 4, "holds no vectors"),
        ("serve-search --index @index --retriever dense", 2, "needs --encoder"),
        ("serve-search --index @index --encoder @encoder", 2, "no use for it"),
        ("serve-search --index @index --retriever dense --encoder @encoder --search-device moon", 2, "--device moon"),
        ("index --corpus @corpus.jsonl --out @new --encoder @encoder --max-tokens 33", 2, "window is 32"),
        ("index --corpus @corpus.jsonl --out @new --encoder @encoder --max-tokens 2", 4, "no room"),
        ("index --corpus @corpus.jsonl --out @new --encoder @encoder --deterministic", 2, "--deterministic"),
        ("index --corpus @corpus.jsonl --out @new --encoder @words", 4, "no config.json"),
    ] {
        let error = run(folder.path(), line).unwrap_err();
        let message = format!("{error:#}");
        assert!(exit_code(&error) == code && message.contains(told), "{line}: {message}");
    }
    assert!(!folder.path().join("new").exists());
    let manifest: Value =
        serde_json::from_slice(&fs_err::read(folder.path().join("words/manifest.json")).unwrap()).unwrap();
    assert!(manifest["arguments"].get("vectors").is_none(), "{manifest}");
}

#[test]
fn pooling_is_what_the_encoder_s_directory_says_unless_told() {
    let folder = corpus(5);
    let other = folder.path().join("other");
    fs_err::create_dir_all(other.join("1_Pooling")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs_err::copy(encoder().join(name), other.join(name)).unwrap();
    }
    let says = |modes: Value| fs_err::write(other.join("1_Pooling/config.json"), modes.to_string()).unwrap();
    let used = |out: &str, flags: &str| {
        let line = INDEX.replace("@encoder", "@other").replace("@index", &format!("@{out}"));
        run(folder.path(), &format!("{line} {flags}"))?;
        let manifest = fs_err::read(folder.path().join(out).join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        anyhow::Ok(manifest["arguments"]["vectors"]["pooling"].clone())
    };
    says(json!({"word_embedding_dimension": 24, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}));
    assert_eq!(used("first", "").unwrap(), "cls");
    assert_eq!(used("second", "--pooling mean").unwrap(), "mean");
    says(json!({"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true, "include_prompt": true}));
    assert_eq!(used("third", "").unwrap(), "mean");
    says(json!({"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}));
    let error = used("fourth", "").unwrap_err();
    assert!(exit_code(&error) == 4 && error.to_string().contains("`max_tokens, mean_tokens`"), "{error:#}");
}
