//! The encoder against transformers' vectors.

use std::collections::HashMap;
use std::path::Path;

use mempo_model::{EmbedOptions, Embeddings, Encoder, Pooling, Runtime};
use safetensors::tensor::{SafeTensors, TensorView};
use serde_json::Value;
use tch::Kind;

use crate::{CPU, golden};

fn expected() -> Value {
    serde_json::from_str(&fs_err::read_to_string(golden("bert").join("expected.json")).unwrap()).unwrap()
}

fn ids(expected: &Value) -> Vec<Vec<i32>> {
    serde_json::from_value(expected["ids"].clone()).unwrap()
}

const MEAN: EmbedOptions = EmbedOptions { pooling: Pooling::Mean, normalise: true, tokens_per_batch: 1 << 14 };

fn largest_difference(found: &Embeddings, expected: &Value) -> f32 {
    let expected: Vec<Vec<f32>> = serde_json::from_value(expected.clone()).unwrap();
    let rows = expected.iter().enumerate();
    let differences = rows.flat_map(|(row, expected)| {
        let found = found.row(row);
        assert_eq!(found.len(), expected.len());
        found.into_iter().zip(expected).map(|(a, b)| (a - b).abs())
    });
    differences.fold(0.0, f32::max)
}

#[test]
fn vectors_are_those_of_transformers_whatever_is_encoded_together() {
    let (encoder, expected) = (Encoder::load(&golden("bert"), &CPU).unwrap(), expected());
    assert_eq!(encoder.config().hidden_size, 24);
    for tokens_per_batch in [1, 30, 1 << 14] {
        for (name, pooling, normalise) in
            [("mean", Pooling::Mean, false), ("mean_normalised", Pooling::Mean, true), ("cls", Pooling::Cls, false)]
        {
            let options = EmbedOptions { pooling, normalise, tokens_per_batch };
            let found = encoder.embed(&ids(&expected), &options).unwrap();
            let difference = largest_difference(&found, &expected[name]);
            assert!(difference < 1e-4, "{name}, {tokens_per_batch}: {difference}");
        }
    }
    let rough = Encoder::load(&golden("bert"), &Runtime::cpu(Kind::BFloat16)).unwrap();
    let difference = largest_difference(&rough.embed(&ids(&expected), &MEAN).unwrap(), &expected["mean_normalised"]);
    assert!((1e-4..0.05).contains(&difference), "{difference}");
}

/// A copy of the golden model with other tensors.
fn changed(change: impl Fn(&str, Vec<u8>) -> Vec<(String, Vec<u8>)>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs_err::copy(golden("bert").join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = fs_err::read(golden("bert").join("model.safetensors")).unwrap();
    let mut tensors = HashMap::new();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        for (name, data) in change(&name, view.data().to_vec()) {
            tensors.insert(name, (view.dtype(), view.shape().to_vec(), data));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

fn refused(folder: &Path) -> String {
    Encoder::load(folder, &CPU).map(drop).unwrap_err().to_string()
}

#[test]
fn names_with_a_prefix_and_heads_are_understood() {
    let folder = changed(|name, data| {
        let copy = (format!("cls.{name}"), data.clone());
        if name.starts_with("pooler.") { vec![copy] } else { vec![(format!("bert.{name}"), data), copy] }
    });
    let expected = expected();
    let found = Encoder::load(folder.path(), &CPU).unwrap().embed(&ids(&expected), &MEAN).unwrap();
    assert!(largest_difference(&found, &expected["mean_normalised"]) < 1e-4);
}

#[test]
fn weights_that_are_no_encoder_s_are_refused_by_name() {
    const QUERY: &str = "encoder.layer.1.attention.self.query.weight";
    let not_finite = changed(|name, mut data| {
        if name == QUERY {
            data[..2].copy_from_slice(&0x7e00u16.to_le_bytes());
        }
        vec![(name.to_owned(), data)]
    });
    let message = refused(not_finite.path());
    assert!(message.contains(QUERY) && message.contains("not finite"), "{message}");
    let missing = changed(|name, data| if name == QUERY { vec![] } else { vec![(name.to_owned(), data)] });
    assert!(refused(missing.path()).contains("is missing"));
    let more = changed(|name, data| vec![(name.to_owned(), data.clone()), (format!("{name}.more"), data)]);
    assert!(refused(more.path()).contains("is not part of this model"));
    assert!(refused(&golden("llama")).contains("model_type `llama`"));
}

#[test]
fn sequences_that_it_cannot_take_are_refused_by_place() {
    let encoder = Encoder::load(&golden("bert"), &CPU).unwrap();
    for (ids, told) in [(vec![], "empty"), (vec![5; 33], "33 tokens"), (vec![92], "id 92"), (vec![-1], "id -1")] {
        let error = encoder.embed(&[vec![2, 3], ids], &MEAN).map(drop).unwrap_err().to_string();
        assert!(error.contains("sequence 1") && error.contains(told), "{error}");
    }
}
