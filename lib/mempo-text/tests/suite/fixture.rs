//! The tokenizers the tests run on.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use mempo_text::{ChatTemplate, NewTokenizer, Profile, PromptBuilder, Tokenizer, ToolSpec, train_tokenizer};
use proptest::prelude::*;
use tokenizers::AddedToken;

/// A tokenizer to test, with what the library itself says of it.
pub(crate) struct Fixture {
    pub(crate) name: &'static str,
    pub(crate) dir: PathBuf,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) library: tokenizers::Tokenizer,
    pub(crate) added_ids: HashSet<i32>,
}

impl Fixture {
    fn load(name: &'static str, dir: &Path) -> Self {
        let library = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let added_ids = library.get_added_tokens_decoder().keys().map(|id| *id as i32).collect();
        Self { name, dir: dir.to_owned(), tokenizer: Arc::new(Tokenizer::load(dir).unwrap()), library, added_ids }
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

static QWEN: LazyLock<Option<Fixture>> = LazyLock::new(|| {
    let Ok(dir) = std::env::var("MEMPO_TEST_QWEN_TOKENIZER") else {
        report_skip();
        return None;
    };
    Some(Fixture::load("qwen", Path::new(&dir)))
});

#[allow(clippy::print_stderr, reason = "a skipped check must be seen")]
fn report_skip() {
    eprintln!("SKIPPED with Qwen's tokenizer: MEMPO_TEST_QWEN_TOKENIZER does not name its folder");
}

/// Every tokenizer at hand.
pub(crate) fn fixtures() -> Vec<&'static Fixture> {
    std::iter::once(&*TINY).chain(QWEN.as_ref()).collect()
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
