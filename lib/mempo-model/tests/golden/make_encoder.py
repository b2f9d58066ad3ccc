"""Golden files of the encoder: a tiny random BERT with a WordPiece tokenizer, and what transformers makes of some texts.

    python make_encoder.py            writes bert/ beside it
    python make_encoder.py --check    compares what is there with transformers again

Made with transformers 5.23, torch 2.11.
"""

import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bert")
MAX_TOKENS = 24
CONTROL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the of is a capital river city query passage : . , \" land water".split()
TEXTS = [
    "query: What is the capital of Ghana?",
    "passage: \"Accra\"\nAccra is the capital of Ghana.",
    "",
    "Café NAÏVE 東京 \U0001f41f",
    "the river " * 20,
    "city",
    "[SEP",
]


def tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = CONTROL + WORDS + [c for c in letters if c not in WORDS] + ["##" + c for c in letters] + ["東"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.add_special_tokens(CONTROL)
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # As in some published files; neither is to be heeded.
    made.enable_padding(length=16)
    made.enable_truncation(8)
    return made


def model(vocabulary):
    made = BertModel(BertConfig(vocab_size=vocabulary, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                                intermediate_size=40, max_position_embeddings=32))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        is_scale = name.endswith("LayerNorm.weight")
        noise = torch.randn(parameter.shape, generator=generator) * (0.1 if is_scale or "bias" in name else 0.3)
        parameter.data = (noise + is_scale).half().float()
    return made.eval()


def compute(made):
    words = PreTrainedTokenizerFast(tokenizer_file=os.path.join(HERE, "tokenizer.json"), pad_token="[PAD]",
                                    cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")
    batch = words(TEXTS, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt",
                  return_token_type_ids=False)
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = made(batch["input_ids"], attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    rows = [row[:length].tolist() for row, length in zip(batch["input_ids"], mask.sum(1))]
    rounded = lambda tensor: [[round(x, 7) for x in row] for row in tensor.tolist()]
    return {"max_tokens": MAX_TOKENS, "texts": TEXTS, "ids": rows, "mean": rounded(mean), "cls": rounded(hidden[:, 0]),
            "mean_normalised": rounded(torch.nn.functional.normalize(mean, dim=1))}


def write():
    os.makedirs(HERE, exist_ok=True)
    words = tokenizer()
    words.save(os.path.join(HERE, "tokenizer.json"), pretty=False)
    made = model(words.get_vocab_size())
    made.half().save_pretrained(HERE)
    with open(os.path.join(HERE, "expected.json"), "w") as file:
        json.dump(compute(made.float()), file, ensure_ascii=False)


def check():
    found = compute(BertModel.from_pretrained(HERE, dtype=torch.float32).eval())
    with open(os.path.join(HERE, "expected.json")) as file:
        expected = json.load(file)
    worst = max((torch.tensor(found[key]) - torch.tensor(expected[key])).abs().max().item()
                for key in ["mean", "cls", "mean_normalised"])
    print(f"bert: worst difference {worst:.1e}")
    if worst > 1e-5 or any(found[key] != expected[key] for key in ["max_tokens", "texts", "ids"]):
        sys.exit("bert: expected.json differs from what transformers computes")


if __name__ == "__main__":
    check() if sys.argv[1:] == ["--check"] else write()
