//! The tokenizers the tests run on.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use mempo_text::{ChatTemplate, NewTokenizer, Profile, PromptBuilder, Tokenizer, ToolSpec, train_tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::AddedToken;

/// A tokenizer to test, with what the library itself says of it.
pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) library: tokenizers::Tokenizer,
    pub(crate) added_ids: HashSet<i32>,
    /// Those that have a token of their own.
    pub(crate) bytes: HashSet<u8>,
}

impl Fixture {
    fn load(name: &str, dir: &Path) -> Self {
        let library = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let added_ids = library.get_added_tokens_decoder().keys().map(|id| *id as i32).collect();
        let tokenizer = Arc::new(Tokenizer::load(dir).unwrap());
        let tokens = (0..tokenizer.vocabulary_size() as i32).map(|id| tokenizer.token_bytes(id));
        let bytes = tokens.filter(|token| token.len() == 1).map(|token| token[0]).collect();
        Self { name: name.to_owned(), dir: dir.to_owned(), tokenizer, library, added_ids, bytes }
    }

    pub(crate) fn id(&self, token: &str) -> i32 {
        self.library.token_to_id(token).unwrap() as i32
    }

    pub(crate) fn builder(&self, profile: &str) -> PromptBuilder {
        let template = ChatTemplate::load(&self.dir).unwrap();
        let profile = Profile::load(profile).unwrap();
        PromptBuilder::new(Arc::clone(&self.tokenizer), template, profile, &[ToolSpec::search()]).unwrap()
    }
}

pub(crate) static TINY: LazyLock<Fixture> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mempo-text-tiny");
    train_tokenizer(corpus(), &NewTokenizer::of_size(700), &dir).unwrap();
    let file = dir.join("tokenizer.json");
    let mut library = tokenizers::Tokenizer::from_file(&file).unwrap();
    let added = ["<tool_call>", "</tool_call>", "<|file_sep|>"];
    library.add_tokens(added.map(|token| AddedToken::from(token, false).normalized(false))).unwrap();
    library.save(&file, false).unwrap();
    Fixture::load("tiny", &dir)
});

static FAMILIES: LazyLock<Vec<Fixture>> = LazyLock::new(|| {
    let Ok(dirs) = std::env::var("MEMPO_TEST_TOKENIZERS") else {
        report_skip();
        return Vec::new();
    };
    std::env::split_paths(&dirs).map(|dir| Fixture::load(&dir.display().to_string(), &dir)).collect()
});

#[allow(clippy::print_stderr, reason = "a skipped check must be seen")]
fn report_skip() {
    eprintln!("SKIPPED with published tokenizers: `./just tokenizers` fetches them and runs these tests again");
}

/// The tiny tokenizer with the pre-tokenizer (and normaliser) of each published form, and of one that is not known.
pub(crate) static FORMS: LazyLock<Vec<Fixture>> = LazyLock::new(|| {
    let bytes = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |parts: [Value; 2]| json!({"type": "Sequence", "pretokenizers": parts});
    let split = |digits: &str| {
        let expression = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false})
    };
    let digits = |alone: bool| json!({"type": "Digits", "individual_digits": alone});
    let forms = [
        ("gpt2", Value::Null, bytes(true)),
        ("smollm2", Value::Null, sequence([digits(true), bytes(true)])),
        ("qwen2", json!({"type": "NFC"}), sequence([split(""), bytes(false)])),
        ("llama3", Value::Null, sequence([split("{1,3}"), bytes(false)])),
        ("unknown", json!({"type": "NFC"}), sequence([digits(false), bytes(true)])),
    ];
    let made = forms.into_iter().map(|(name, normalizer, pre_tokenizer)| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mempo-text-{name}"));
        fs_err::create_dir_all(&dir).unwrap();
        let mut json: Value = serde_json::from_slice(&fs_err::read(TINY.dir.join("tokenizer.json")).unwrap()).unwrap();
        (json["normalizer"], json["pre_tokenizer"]) = (normalizer, pre_tokenizer);
        json["model"]["ignore_merges"] = (name == "llama3").into();
        fs_err::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
        fs_err::copy(TINY.dir.join("tokenizer_config.json"), dir.join("tokenizer_config.json")).unwrap();
        Fixture::load(name, &dir)
    });
    made.collect()
});

/// Every tokenizer at hand.
pub(crate) fn families() -> impl Iterator<Item = &'static Fixture> {
    std::iter::once(&*TINY).chain(&*FAMILIES)
}

/// Those that know the tags of tool calls and the turns of `ChatML`, as Qwen's do.
pub(crate) fn fixtures() -> impl Iterator<Item = &'static Fixture> {
    families().filter(|fixture| fixture.library.token_to_id("<tool_call>").is_some())
}

/// Lines with the words and tags of a small agent, so that merges such as `><` are learnt.
pub(crate) fn corpus() -> impl Iterator<Item = String> + Send {
    (0..120).map(|line| {
        format!(
            "<mem>The capital of land {line} is Paris.</mem><think>Search the next one; then answer.</think>\
             <tool_call>\n{{\"name\": \"search\", \"arguments\": {{\"query\": \"capital of land {line}\"}}}}\n</tool_call>\
             <information>Doc 1(Title: Land {line}) Its capital is café Zürich, 東京.</information>\
             <answer>Paris; Rome; {line}</answer><|im_end|>"
        )
    })
}

/// Text that tries to be more than text.
pub(crate) fn hostile_text() -> impl Strategy<Value = String> {
    let fragments = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|file_sep|>",
        "<|im_",
        "end|>",
        "<tool_call>",
        "</tool_call>",
        "<mem>",
        "</mem>",
        "<think>",
        "</THINK >",
        "＜ｍｅｍ＞",
        "<m\u{200b}em>",
        "<",
        ">",
        "</",
        "〈answer〉",
        "answer",
        "<thin\u{212a}>",
        "\u{2329}mem\u{232a}",
        "e\u{301}",
        "\u{338}",
        "\n",
        "  ",
        "\u{0}",
        "東京",
        "🙂",
        "1234",
        "system\n",
    ];
    let fragment = prop_oneof![
        4 => proptest::sample::select(fragments.to_vec()).prop_map(str::to_owned),
        1 => ".{0,6}",
        1 => proptest::collection::vec(any::<char>(), 0..4).prop_map(String::from_iter),
    ];
    proptest::collection::vec(fragment, 0..12).prop_map(|fragments| fragments.concat())
}
