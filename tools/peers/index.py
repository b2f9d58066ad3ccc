"""What `mempo-rollout index` takes: time, memory and disk, by words for made-up passages and by vectors for real ones.

    python index.py MEMPO_ROLLOUT ENCODER CORPUS PASSAGES…

Made-up passages are 100 words, drawn by Zipf's law from 50,000, in the order of the digits of their ids, which is not that of the table;
each number of PASSAGES is indexed by BM25. As many of eight words are indexed by vectors of ENCODER's first layer alone: what so many vectors take
beside their encoding. What encoding takes is measured on CORPUS, by the whole ENCODER (the demo's by MiniLM). Time and disk are extrapolated in
proportion to the 21 million of wiki-18. Memory is not: whether it grows is what several PASSAGES show. Of memory both are told, the
process's own and all that is resident: that includes pages of mapped files, which the system takes back when it needs them.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

WIKI = 21_000_000
WORDS = 50_000
OUT = Path("runs/bench-index")


def words(random):
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    syllable = lambda: random.choice(consonants) + random.choice(vowels)
    made = {"".join(syllable() for _ in range(random.randint(1, 5))) for _ in range(4 * WORDS)}
    return random.sample(sorted(made), WORDS)


def write_corpus(path, vocabulary, count, length, random):
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    with open(path, "w") as file:
        for start in range(0, count, 1000):
            drawn = random.choices(vocabulary, weights, k=length * min(1000, count - start))
            for row in range(len(drawn) // length):
                text = " ".join(drawn[length * row:length * row + length])
                json.dump({"id": str(start + row), "title": text[:20], "text": text}, file)
                file.write("\n")


def own_memory(process):
    """Bytes that no file backs; 0 once the process has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return 0
    lines = [line.split() for line in status.splitlines()]
    return sum(int(line[1]) * 1024 for line in lines if line[0] == "RssAnon:")


def size(path):
    """Bytes of all files; those that go while they are looked at count nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                pass
    return total


def index(program, corpus, out, *flags):
    """Makes an index; wall and CPU seconds, peaks of own memory, of all that is resident, and of the folder, in bytes."""
    start = time.monotonic()
    command = [program, "index", "--corpus", corpus, "--out", out, "--quiet", *flags]
    process = subprocess.Popen([str(word) for word in command])
    own = folder = 0
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        own, folder = max(own, own_memory(process)), max(folder, size(out))
        time.sleep(0.2)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"index ended with {process.returncode}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, own, usage.ru_maxrss * 1024, folder


def first_layer(encoder, out):
    """ENCODER without its layers but the first."""
    shutil.copytree(encoder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = (out / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    header, data, place = json.loads(weights[8:start]), b"", 0
    for name, tensor in list(header.items()):
        begin, end = tensor.get("data_offsets", (0, 0))
        if name == "__metadata__" or ("encoder.layer." in name and "encoder.layer.0." not in name):
            del header[name]
            continue
        data += weights[start + begin:start + end]
        tensor["data_offsets"] = [place, place := place + end - begin]
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    (out / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return out


def report(what, count, measured, disk):
    wall, cpu, own, resident, folder = measured
    scale = WIKI / count
    print(f"{what}: {count} passages, {wall:.0f} s ({count / wall:.0f} a second), {cpu:.0f} s of CPU; peak {own / 1e9:.2f} GB of own "
          f"memory, {resident / 1e9:.2f} GB resident; disk {disk / 1e6:.0f} MB, {folder / 1e6:.0f} MB at most; at 21 million "
          f"{wall * scale / 3600:.1f} h, {cpu * scale / 3600:.1f} h of CPU, disk {disk * scale / 1e9:.1f} GB", flush=True)


def main(program, encoder, corpus, *passages):
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    draws = random.Random(1)
    vocabulary = words(draws)
    layer = first_layer(encoder, OUT / "first-layer")
    for count in map(int, passages):
        path, out = OUT / f"{count}.jsonl", OUT / str(count)
        write_corpus(path, vocabulary, count, 100, draws)
        report("BM25", count, index(program, path, out), size(out / "index"))
        print(f"  passages {path.stat().st_size / 1e6:.0f} MB, corpus table {size(out / 'corpus') / 1e6:.0f} MB", flush=True)
        shutil.rmtree(out)
        write_corpus(path, vocabulary, count, 8, draws)
        flags = ["--encoder", layer, "--passage-prefix", "", "--dtype", "f32", "--max-tokens", "16"]
        report("BM25 and vectors of one layer, eight words each", count, index(program, path, out, *flags), size(out / "vectors"))
        shutil.rmtree(out)
        path.unlink()
    with open(corpus, "rb") as file:
        count = sum(1 for _ in file)
    measured = index(program, corpus, OUT / "encoded", "--encoder", encoder, "--passage-prefix", "", "--dtype", "f32")
    report("BM25 and vectors", count, measured, size(OUT / "encoded" / "vectors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
