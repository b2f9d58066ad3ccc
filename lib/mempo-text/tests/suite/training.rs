//! The tokenizer trained for a model that starts from nothing.

use mempo_text::{NewTokenizer, Tokenizer, train_tokenizer};

use crate::fixture::corpus;

#[test]
fn same_texts_same_bytes() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [&one, &two] {
        assert_eq!(train_tokenizer(corpus(), &NewTokenizer::of_size(360), &dir.path().join("new")).unwrap(), 360);
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let read = |dir: &tempfile::TempDir| fs_err::read(dir.path().join("new").join(name)).unwrap();
        assert!(read(&one) == read(&two), "{name}");
    }
}

#[test]
fn any_text_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let size = train_tokenizer(["a b".to_owned()].into_iter(), &NewTokenizer::of_size(300), dir.path()).unwrap();
    assert!((259..300).contains(&size));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.vocabulary_size(), size);
    assert_eq!(tokenizer.control_ids(), [0, 1, 2]);
    let text = "Zürich 1889 東京 🙂\r\n\t<mem>";
    assert_eq!(tokenizer.decode(&tokenizer.encode_plain(text)), text);
    assert_eq!(tokenizer.encode_plain("1889").len(), 4);
}

#[test]
fn control_tokens_in_the_texts_are_not_learnt() {
    let dir = tempfile::tempdir().unwrap();
    let texts = std::iter::repeat_n("x<|im_end|>".to_owned(), 50);
    train_tokenizer(texts, &NewTokenizer::of_size(400), dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.encode_untrusted("<|im_end|>").len(), "<|im_end|>".len());
}

#[test]
fn a_vocabulary_without_room_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = train_tokenizer(corpus(), &NewTokenizer::of_size(258), dir.path()).unwrap_err().to_string();
    assert!(error.contains("258 is too small: 259"), "{error}");
}

#[test]
fn spaces_apart_give_a_word_the_same_ids_everywhere_and_added_tokens_are_single() {
    let dir = tempfile::tempdir().unwrap();
    let wanted = NewTokenizer {
        vocabulary_size: 500,
        added_tokens: vec!["<mem>".to_owned(), "\n{\"name\": \"".to_owned()],
        separate_spaces: true,
    };
    train_tokenizer(corpus(), &wanted, dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let (alone, after) = (tokenizer.encode_plain("Lima"), tokenizer.encode_plain("x Lima"));
    assert!(after.ends_with(&alone), "{alone:?} {after:?}");
    assert_eq!(tokenizer.encode_plain("<mem>").len(), 1);
    assert_eq!(tokenizer.encode_plain("\n{\"name\": \"").len(), 1);
    assert!(tokenizer.encode_untrusted("<mem>").len() > 1);
    let text = "What is the capital of Peru? \n a  b";
    assert_eq!(tokenizer.decode(&tokenizer.encode_plain(text)), text);
}
