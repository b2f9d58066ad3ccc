//! Vectors of documents beside a BM25 index: what an encoder made of them, and how.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::Args;
use mempo_data::Document;
use mempo_model::{DeviceOptions, EmbedOptions, Encoder, EncoderConfig, Pooling, write_vectors};
use mempo_run::{Input, ResultExt, Stage};
use mempo_text::EncoderTokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::retrieval::contents;

/// The vectors' folder beside the table.
const FOLDER: &str = "vectors";
/// Documents in one file of vectors: what is encoded again after an interruption, at most.
const PART_DOCUMENTS: u64 = 10_000;
/// Documents encoded between two looks for a signal, longest beside longest.
const SLICE: usize = 512;

/// Whether and how `index` makes vectors.
#[derive(Debug, Args)]
pub(crate) struct VectorOptions {
    /// Also keep a vector of each document, for `--retriever dense` and `hybrid`: a Hugging Face directory of a BERT encoder
    /// (E5, MiniLM, BGE)
    #[arg(long, value_name = "DIR")]
    encoder: Option<PathBuf>,
    /// Put before every document that is encoded: "passage: " for E5, "" for MiniLM and BGE
    #[arg(long, value_name = "TEXT", default_value = "passage: ")]
    passage_prefix: String,
    /// What a vector is made of: the mean over all tokens (E5, MiniLM), or what stands at the first (BGE) [default: as
    /// DIR/1_Pooling/config.json says, else mean]
    #[arg(long, value_enum)]
    pooling: Option<Pooling>,
    /// Leave vectors as long as they are, instead of dividing them by their length
    #[arg(long)]
    unnormalised: bool,
    /// Documents are cut to this many tokens, [CLS] and [SEP] included, and so are queries
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Tokens that are encoded at a time, padding included
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    tokens_per_batch: usize,
    #[command(flatten)]
    device: DeviceOptions,
}

impl VectorOptions {
    /// The encoder, if there is one.
    pub(crate) fn input(&self) -> anyhow::Result<Option<Input>> {
        self.encoder.as_ref().map(|dir| Input::model("encoder", dir)).transpose()
    }

    /// What makes the vectors, if they are wanted.
    pub(crate) fn open(&self) -> anyhow::Result<Option<Embedder>> {
        let Some(dir) = &self.encoder else { return Ok(None) };
        let pooling = match self.pooling {
            Some(pooling) => pooling,
            None => own_pooling(dir).bad_input()?,
        };
        let recipe = Recipe {
            passage_prefix: self.passage_prefix.clone(),
            pooling,
            normalised: !self.unnormalised,
            max_tokens: self.max_tokens,
            tokens_per_batch: self.tokens_per_batch,
            device: self.device.device.clone(),
            dtype: self.device.dtype.clone(),
            threads: self.device.threads,
        };
        if self.device.deterministic {
            return Err(anyhow!("--deterministic: an encoder has no kernels of fixed shape; leave it out")).usage();
        }
        Embedder::open(dir, recipe).map(Some)
    }
}

/// What a directory of sentence-transformers says of its vectors; the mean where it says nothing.
fn own_pooling(dir: &Path) -> anyhow::Result<Pooling> {
    let path = dir.join("1_Pooling/config.json");
    if !path.is_file() {
        return Ok(Pooling::Mean);
    }
    let told: BTreeMap<String, Value> =
        serde_json::from_slice(&fs_err::read(&path)?).with_context(|| path.display().to_string())?;
    let modes = told.iter().filter(|(name, on)| name.starts_with("pooling_mode_") && **on == Value::Bool(true));
    let modes: Vec<&str> = modes.map(|(name, _)| name.trim_start_matches("pooling_mode_")).collect();
    match modes[..] {
        ["mean_tokens"] => Ok(Pooling::Mean),
        ["cls_token"] => Ok(Pooling::Cls),
        _ => {
            let (path, modes) = (path.display(), modes.join(", "));
            Err(anyhow!(
                "{path}: pools by `{modes}`, expected `mean_tokens` or `cls_token`; --pooling chooses one of them"
            ))
        }
    }
}

/// How the vectors of an index were made: what its manifest holds, and queries are encoded by.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Recipe {
    passage_prefix: String,
    pooling: Pooling,
    normalised: bool,
    max_tokens: usize,
    tokens_per_batch: usize,
    device: String,
    dtype: String,
    threads: Option<usize>,
}

impl Recipe {
    /// That of an index, which is refused if it has no vectors.
    pub(crate) fn of(index: &Input) -> anyhow::Result<Self> {
        let recorded = index.manifest().and_then(|manifest| manifest.run.arguments.get("vectors"));
        let Some(recorded) = recorded else {
            let dir = index.dir().display();
            return Err(anyhow!("{dir}: holds no vectors; make it again with `mempo-rollout index --encoder DIR`"))
                .bad_input();
        };
        let recipe = serde_json::from_value(recorded.clone());
        recipe.with_context(|| format!("{}: `vectors` in its manifest", index.dir().display())).bad_input()
    }

    /// The same on another device, with all its cores.
    pub(crate) fn on(self, device: &str) -> Self {
        Self { device: device.to_owned(), threads: None, ..self }
    }
}

/// The files of an index's vectors, in the order of its documents.
pub(crate) fn files(index: &Input) -> Vec<PathBuf> {
    let files = index.manifest().into_iter().flat_map(|manifest| &manifest.files);
    let mut names: Vec<&str> = files.map(|file| file.path.as_str()).collect();
    names.retain(|name| name.starts_with(&format!("{FOLDER}/")));
    names.sort_by_key(|name| (name.len(), *name));
    names.into_iter().map(|name| index.dir().join(name)).collect()
}

/// An encoder with its tokenizer.
pub(crate) struct Embedder {
    pub(crate) encoder: Encoder,
    pub(crate) recipe: Recipe,
    tokenizer: EncoderTokenizer,
}

impl Embedder {
    /// Reads the encoder in `dir`.
    pub(crate) fn open(dir: &Path, recipe: Recipe) -> anyhow::Result<Self> {
        let config = EncoderConfig::load(dir).bad_input()?;
        let window = config.max_position_embeddings;
        if recipe.max_tokens > window {
            return Err(anyhow!("--max-tokens {}: the encoder's window is {window} tokens", recipe.max_tokens)).usage();
        }
        let tokenizer = EncoderTokenizer::load(dir, recipe.max_tokens).bad_input()?;
        let (device, dtype, threads) = (recipe.device.clone(), recipe.dtype.clone(), recipe.threads);
        let runtime = DeviceOptions { device, dtype, threads, deterministic: false }.resolve().usage()?;
        let encoder = Encoder::load(dir, &runtime).bad_input()?;
        Ok(Self { encoder, recipe, tokenizer })
    }

    /// Ids of texts.
    pub(crate) fn ids(&self, texts: Vec<String>) -> anyhow::Result<Vec<Vec<i32>>> {
        self.tokenizer.encode(texts).bad_input()
    }

    /// How vectors are made of them.
    pub(crate) fn options(&self) -> EmbedOptions {
        let Recipe { pooling, normalised, tokens_per_batch, .. } = self.recipe;
        EmbedOptions { pooling, normalise: normalised, tokens_per_batch }
    }

    /// Writes the vectors of all `documents`, but for those that are there; `count` is how many they are.
    pub(crate) fn write(
        &self,
        stage: &Stage,
        mut documents: impl Iterator<Item = anyhow::Result<Document>>,
        count: u64,
    ) -> anyhow::Result<()> {
        let progress = stage.progress("encode", count, "documents");
        for unit in 0..count.div_ceil(PART_DOCUMENTS) {
            let part = documents.by_ref().take(PART_DOCUMENTS as usize);
            let part = part.collect::<anyhow::Result<Vec<Document>>>()?;
            let path = format!("{FOLDER}/part-{unit:05}.safetensors");
            if stage.dir().join(&path).is_file() {
                progress.skip(part.len() as u64);
                continue;
            }
            let mut vectors = Vec::new();
            for slice in part.chunks(SLICE) {
                stage.check_interrupt()?;
                let texts = slice.iter().map(|document| self.recipe.passage_prefix.clone() + &contents(document));
                let embedded = self.encoder.embed(&self.ids(texts.collect())?, &self.options());
                let place = || format!("documents from `{}` on", slice[0].doc_id);
                vectors.push(embedded.with_context(place).bad_input()?);
                progress.inc(slice.len() as u64);
            }
            stage.write_file(&path, |file| Ok(write_vectors(&vectors, file)?))?;
        }
        Ok(())
    }
}
