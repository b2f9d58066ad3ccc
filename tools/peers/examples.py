"""Time of `mempo-sft build` beside `datasets.map` with the fast tokenizer, from one run.

    examples.py MEMPO_SFT TOKENIZER [TRAJECTORIES]

Both make the same examples of the same file: for each assistant turn the ids of all that precedes it, by the chat template,
then its own, with a mask over these; written as Parquet. Ids and masks are compared first. Same cores, alternately, one
warm-up, the best of three, in wall seconds and in seconds of all cores together (loading and imports of both included). The
floor is what the tokenizer's library takes to encode every text once.
"""

import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROUNDS = 3
TURNS = 4
PROFILE = {"name": "plain", "user": "{question}", "stop": ["</answer>"], "memory": "absent", "observation": "{results}",
           "document": "{text}"}
SYSTEM = "Search step by step, then answer."


def trajectories(path, count):
    """Questions, thoughts and results in the words of our own documents, without tags: these the peer would encode otherwise."""
    words = [word.strip("`*|.,:;()[]<>") for file in sorted(ROOT.glob("**/*.md")) if ".tools" not in str(file)
             and "target" not in str(file) for word in file.read_text().split()]
    words = [word for word in words if word.isalnum()]
    draw = random.Random(7)
    text = lambda least, most: "A " + " ".join(draw.choices(words, k=draw.randint(least, most))) + "."
    with open(path, "w") as file:
        for _ in range(count):
            messages = [{"role": "user", "content": text(8, 30)}]
            for turn in range(TURNS):
                messages.append({"role": "assistant", "content": text(30, 90)})
                if turn + 1 < TURNS:
                    messages.append({"role": "user", "content": text(150, 400)})
            file.write(json.dumps({"messages": messages}) + "\n")


PEER = """
import json, sys
import datasets
from transformers import PreTrainedTokenizerFast
datasets.disable_progress_bars()
datasets.logging.set_verbosity_error()
rows, folder, out, system, cores = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

def build(batch):
    prompts, wholes = [], []
    for messages in batch["messages"]:
        messages = [{"role": "system", "content": system}] + messages
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                prompts.append(tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True))
                wholes.append(tokenizer.apply_chat_template(messages[:at + 1], tokenize=False).rstrip("\\n"))
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    ids = tokenizer(wholes, add_special_tokens=False)["input_ids"]
    masks = [[at >= length for at in range(len(row))] for length, row in zip(lengths, ids)]
    return {"input_ids": ids, "loss_mask": masks}

data = datasets.Dataset.from_json(rows, cache_dir=out + "/cache", keep_in_memory=False)
data = data.map(build, batched=True, remove_columns=data.column_names, num_proc=int(cores), load_from_cache_file=False)
data.to_parquet(out + "/examples.parquet")
"""
FLOOR = """
import json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
texts = [message["content"] for line in open(sys.argv[1]) for message in json.loads(line)["messages"]]
for at in range(0, len(texts), 1024):
    tokenizer.encode_batch_fast(texts[at:at + 1024], add_special_tokens=False)
"""


def main():
    program, tokenizer, *count = sys.argv[1:]
    python = os.environ.get("PEER_PYTHON", str(ROOT / ".tools/python/bin/python"))
    work = ROOT / "target/tmp/bench-examples"
    shutil.rmtree(work, ignore_errors=True)
    (work / "profile").mkdir(parents=True)
    (work / "profile/profile.json").write_text(json.dumps(PROFILE))
    (work / "profile/system.txt").write_text(SYSTEM)
    rows, ours, theirs = work / "rows.jsonl", work / "ours", work / "theirs"
    trajectories(rows, int(count[0]) if count else 4000)
    cores = len(os.sched_getaffinity(0))
    build = [program, "--quiet", "build", "--trajectories", rows, "--tokenizer", tokenizer, "--context", "react",
             "--profile", work / "profile", "--max-tokens", "1000000", "--out", ours]

    def timed(command):
        """Wall and processor seconds."""
        spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        wall, processor = time.perf_counter(), spent()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - wall, spent() - processor

    def run_ours():
        shutil.rmtree(ours, ignore_errors=True)
        return timed(build)

    def run_python(code, *more):
        shutil.rmtree(theirs, ignore_errors=True)
        theirs.mkdir()
        return timed([python, "-c", code, rows, tokenizer, *more])

    run_peer = lambda: run_python(PEER, theirs, SYSTEM, str(cores))
    run_ours(), run_peer()
    same = "import sys, pyarrow.dataset as d; a, b = (d.dataset(p, format='parquet').to_table(['input_ids', 'loss_mask'])" \
           ".to_pylist() for p in sys.argv[1:]); assert a == b, 'ids or masks differ'; print(len(a), sum(len(r['input_ids']) for r in a))"
    paths = [ours / "sft_examples", theirs / "examples.parquet"]
    done = subprocess.run([python, "-c", same, *paths], check=True, capture_output=True, text=True)
    examples, tokens = map(int, done.stdout.split())
    seconds = {"ours": [], "datasets.map": [], "floor": []}
    for _ in range(ROUNDS):
        seconds["ours"].append(run_ours())
        seconds["datasets.map"].append(run_peer())
        seconds["floor"].append(run_python(FLOOR))
    print(f"{examples} examples, {tokens} tokens, {rows.stat().st_size / 1e6:.1f} MB, {cores} cores, load "
          f"{os.getloadavg()[0]:.1f}; the same ids and masks")
    best = {who: [min(column) for column in zip(*times)] for who, times in seconds.items()}
    for who, (wall, processor) in best.items():
        print(f"{who:14} {wall:7.2f} s, of all cores {processor:7.2f} s  {tokens / wall / 1e6:7.2f} M tokens/s")
    for column, name in enumerate(("wall", "processor")):
        ratio = best["datasets.map"][column] / best["ours"][column]
        print(f"{name}: peer / ours {ratio:.1f}, floor / ours {best['floor'][column] / best['ours'][column]:.2f}")
    shutil.rmtree(work)


main()
