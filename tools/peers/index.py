"""What `mempo-rollout index` takes: time, disk and memory for made-up passages, by words and by an encoder's vectors.

    python index.py MEMPO_ROLLOUT PASSAGES ENCODED

Passages are 100 words, drawn by Zipf's law from 50,000. PASSAGES of them are indexed by BM25, ENCODED by an encoder of MiniLM's
shape (6 layers, 384 numbers, random weights), too. Time and disk are extrapolated in proportion to the 21 million of wiki-18.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

WIKI = 21_000_000
WORDS = 50_000
OUT = Path("runs/bench-index")


def words(random):
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    syllable = lambda: random.choice(consonants) + random.choice(vowels)
    made = {"".join(syllable() for _ in range(random.randint(1, 5))) for _ in range(4 * WORDS)}
    return random.sample(sorted(made), WORDS)


def write_corpus(path, vocabulary, count, random):
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    with open(path, "w") as file:
        for start in range(0, count, 1000):
            drawn = random.choices(vocabulary, weights, k=100 * min(1000, count - start))
            for row in range(len(drawn) // 100):
                text = " ".join(drawn[100 * row:100 * row + 100])
                json.dump({"id": f"{start + row:08}", "title": text[:20], "text": text}, file)
                file.write("\n")


def write_encoder(path, vocabulary):
    control, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "abcdefghijklmnopqrstuvwxyz"
    pieces = control + list('",.') + list(letters) + ["##" + c for c in letters]
    known = set(pieces)
    pieces += [word for word in vocabulary if word not in known][:30_522 - len(pieces)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertModel(BertConfig(vocab_size=30_522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                         intermediate_size=1536)).save_pretrained(path)
    made.save(str(path / "tokenizer.json"))


def run(*command):
    """Seconds and peak memory in bytes."""
    start = time.monotonic()
    process = subprocess.Popen([str(word) for word in command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[1]} ended with {process.returncode}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def report(what, count, seconds, peak, disk):
    """Memory is not extrapolated: part of it (the index's writer, a batch's activations) does not grow with the passages."""
    scale = WIKI / count
    print(f"{what}: {count} passages in {seconds:.0f} s ({count / seconds:.0f} a second), peak {peak / 1e9:.2f} GB, "
          f"disk {disk / 1e6:.0f} MB; at 21 million {seconds * scale / 3600:.1f} h, disk {disk * scale / 1e9:.1f} GB")


def main(program, passages, encoded):
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    draws = random.Random(1)
    vocabulary = words(draws)
    write_corpus(OUT / "many.jsonl", vocabulary, passages, draws)
    write_corpus(OUT / "few.jsonl", vocabulary, encoded, draws)
    write_encoder(OUT / "encoder", vocabulary)
    seconds, peak = run(program, "index", "--corpus", OUT / "many.jsonl", "--out", OUT / "many", "--quiet")
    report("BM25", passages, seconds, peak, size(OUT / "many" / "index"))
    print(f"  and the corpus table: {size(OUT / 'many' / 'corpus') / 1e6:.0f} MB")
    seconds, peak = run(program, "index", "--corpus", OUT / "few.jsonl", "--out", OUT / "few", "--quiet", "--encoder",
                        OUT / "encoder", "--dtype", "f32")
    report("BM25 and vectors", encoded, seconds, peak, size(OUT / "few" / "vectors"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
