//! `mempo-sft init`: a configuration and text -> a fresh model directory.
//!
//! The tokenizer is trained on the text, the configuration takes its vocabulary size and end ids from it, the weights
//! are random. The same inputs and seed give the same bytes.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use fs_err as fs;
use mempo_data::{has_extension, json_rows, text_lines};
use mempo_model::{Config, DeviceOptions, Model};
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use mempo_text::{NewTokenizer, Tokenizer, train_tokenizer};
use serde::Serialize;
use serde_json::{Value, json};
use tracing::info;

use crate::record::{COLUMNS, Form, InputFormat, parse_record};
use crate::source::data_files;

/// Make a fresh model directory: random weights and a tokenizer trained on text.
///
/// The configuration is a Hugging Face config.json; its vocabulary size and its end and padding ids are set to those of
/// the new tokenizer. The text may be plain (.txt), JSON (a row a line, or one array) or Parquet with `text`, `prompt` and `completion`, or
/// `messages`.
#[derive(Debug, clap::Args, Serialize)]
pub(crate) struct InitArguments {
    /// config.json of the model to make
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: PathBuf,
    /// Text for the tokenizer
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    #[serde(skip)]
    corpus: Vec<PathBuf>,
    /// Most tokens in the vocabulary [default: `vocab_size` of the configuration]
    #[arg(long, value_name = "N")]
    vocabulary_size: Option<usize>,
    /// JSON list of texts that become one token each, as the tags of the step format
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    added_tokens: Option<PathBuf>,
    /// Make each space a token of its own, so that a word has the same ids wherever it stands
    #[arg(long)]
    separate_spaces: bool,
    /// Begin with heads in the first layer that attend to the previous token, this strongly (6 is strong): a small
    /// model learns to copy from its prompt many times sooner (families with query and key biases)
    #[arg(long, value_name = "STRENGTH", value_parser = strength)]
    previous_token_heads: Option<f64>,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// Runs the stage.
pub(crate) fn run(arguments: &InitArguments) -> anyhow::Result<()> {
    arguments.stage.check_free()?;
    let files = corpus_files(&arguments.corpus)?;
    let settings: Vec<PathBuf> = std::iter::once(&arguments.config).chain(&arguments.added_tokens).cloned().collect();
    let config_input = Input::files("config", &settings)?;
    let corpus_input = Input::files("corpus", &files)?;
    let mut config = read_json(&arguments.config)?;
    let vocabulary_size = wanted_size(&config, arguments)?;
    check(&config, vocabulary_size, arguments)?;
    let stage = Stage::open("mempo-sft", "init", &arguments.stage, arguments, &[&config_input, &corpus_input])?;
    let Some(stage) = stage else { return Ok(()) };

    let (mut broken, mut has_text) = (None, false);
    let texts = files.iter().flat_map(|file| texts_of(file));
    let texts = texts.map_while(|text| text.map_err(|error| broken = Some(error)).ok());
    let texts = texts.inspect(|text| has_text |= !text.trim().is_empty());
    let added_tokens = arguments.added_tokens.as_deref().map(read_tokens).transpose()?.unwrap_or_default();
    let wanted = NewTokenizer { vocabulary_size, added_tokens, separate_spaces: arguments.separate_spaces };
    stage.write_files(|dir| Ok(train_tokenizer(texts, &wanted, dir)?)).bad_input()?;
    if let Some(error) = broken {
        return Err(error);
    }
    if !has_text {
        return Err(anyhow!("--corpus holds no text to make a vocabulary of")).bad_input();
    }
    stage.check_interrupt()?;

    let tokenizer = Tokenizer::load(stage.dir())?;
    set_tokens(&mut config, &tokenizer, &read_json(&stage.dir().join("tokenizer_config.json"))?);
    write_json(&stage, "config.json", &config)?;
    let generation = json!({ "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"] });
    write_json(&stage, "generation_config.json", &generation)?;
    let parameters = write_weights(&stage, arguments.previous_token_heads)?;
    info!("a model of {parameters} parameters, {} tokens in the vocabulary", tokenizer.vocabulary_size());
    let summary = json!({ "parameters": parameters, "vocabulary_size": tokenizer.vocabulary_size() });
    stage.finish(&[], summary)
}

fn strength(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "expected a number above 0".to_owned())
}

/// Refuses, before anything is written, a model that cannot be made.
fn check(config: &Value, vocabulary_size: usize, arguments: &InitArguments) -> anyhow::Result<()> {
    let mut config = config.clone();
    config["vocab_size"] = json!(vocabulary_size);
    let config = Config::from_value(config, &arguments.config).bad_input()?;
    if arguments.previous_token_heads.is_some() && !config.has_attention_biases() {
        let (path, family) = (arguments.config.display(), &config.model_type);
        return Err(anyhow!(
            "{path}: --previous-token-heads needs query and key biases, which model_type `{family}` has not; \
             leave it out or use `qwen2`"
        ))
        .bad_input();
    }
    Ok(())
}

/// Random weights in float32 on the CPU, so that the machine makes no difference; their number.
fn write_weights(stage: &Stage, previous_token_heads: Option<f64>) -> anyhow::Result<u64> {
    let options =
        DeviceOptions { device: "cpu".to_owned(), dtype: "f32".to_owned(), threads: Some(1), deterministic: false };
    let runtime = options.resolve()?;
    let mut model = Model::initialise(Config::load(stage.dir()).bad_input()?, stage.seed(&["initialise"]), &runtime)?;
    if let Some(strength) = previous_token_heads {
        model.attend_to_previous_token(strength).bad_input()?;
    }
    stage.write_files(|dir| Ok(model.save_weights(dir, runtime.kind)?))?;
    Ok(model.parameters().iter().map(|(_, tensor)| tensor.numel() as u64).sum())
}

fn read_tokens(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(path).bad_input()?;
    serde_json::from_str(&text)
        .with_context(|| format!("{}: expected a JSON list of texts, as [\"<mem>\", \"</mem>\"]", path.display()))
        .bad_input()
}

fn read_json(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read_to_string(path).bad_input()?;
    let config: Value =
        serde_json::from_str(&text).with_context(|| format!("{}: not JSON", path.display())).bad_input()?;
    if !config.is_object() {
        return Err(anyhow!("{}: expected a JSON object", path.display())).bad_input();
    }
    Ok(config)
}

fn wanted_size(config: &Value, arguments: &InitArguments) -> anyhow::Result<usize> {
    let configured = config["vocab_size"].as_u64().map(|size| size as usize);
    arguments
        .vocabulary_size
        .or(configured)
        .ok_or_else(|| anyhow!("{}: no `vocab_size`; add it or give --vocabulary-size N", arguments.config.display()))
        .usage()
}

/// Sets what the configuration must know of the tokenizer, whose `tokens` are named in tokenizer_config.json.
fn set_tokens(config: &mut Value, tokenizer: &Tokenizer, tokens: &Value) {
    config["vocab_size"] = json!(tokenizer.vocabulary_size());
    for name in ["bos", "eos", "pad"] {
        let token = tokens[format!("{name}_token")].as_str();
        config[format!("{name}_token_id")] = json!(token.and_then(|token| tokenizer.encode_trusted(token).pop()));
    }
}

fn write_json(stage: &Stage, name: &str, value: &Value) -> anyhow::Result<()> {
    stage.write_file(name, |sink| {
        serde_json::to_writer_pretty(&mut *sink, value)?;
        std::io::Write::write_all(sink, b"\n")?;
        Ok(())
    })
}

fn corpus_files(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if has_extension(path, ".txt") {
            files.push(path.clone());
        } else {
            files.extend(data_files(path)?);
        }
    }
    Ok(files)
}

/// The texts of one file, one after another.
fn texts_of(path: &Path) -> Box<dyn Iterator<Item = anyhow::Result<String>> + Send> {
    let plain = has_extension(path, ".txt");
    let rows = if plain { text_lines(path) } else { json_rows(path, &COLUMNS) };
    let rows = match rows.bad_input() {
        Ok(rows) => rows,
        Err(error) => return Box::new(std::iter::once(Err(error))),
    };
    let path = path.to_path_buf();
    Box::new(rows.map(move |row| {
        let (number, bytes) = row.bad_input()?;
        let text =
            if plain { String::from_utf8(bytes).map_err(|error| error.to_string()) } else { text_of_row(&bytes) };
        text.map_err(|problem| anyhow!("{}:{number}: {problem}", path.display())).bad_input()
    }))
}

/// All the text of a row that a model would read or write.
fn text_of_row(json: &[u8]) -> Result<String, String> {
    Ok(match parse_record(json, InputFormat::Auto)?.form {
        Form::Text(text) => text,
        Form::Pair { prompt, completion } => format!("{prompt}\n{completion}"),
        Form::Chat(chat) => {
            let turns = chat.turns.into_iter().flat_map(|turn| [Some(turn.completion), turn.observation]).flatten();
            std::iter::once(chat.question).chain(turns).collect::<Vec<_>>().join("\n")
        }
    })
}
