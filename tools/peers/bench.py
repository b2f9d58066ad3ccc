"""Speed of the engine beside its peers', from one run: ours, theirs, and what the machine allows.

    bench.py ENGINE [tiny|0.5b][:f32|:bf16]...    the shapes; tiny if none is named, both formats if none is

One process a side and number format, jobs alternately, one warm-up, the best of three and the ratio of the best and of the medians. Equal
work is checked: greedy ids, scores and losses in f32. The floor is the time the jobs' floating-point operations (or the bytes of the weights)
take at the rates measured in the same run. The peer `deterministic` is our own side with that option.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

from side import Side

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".tools/python/bin/python"
ROUNDS = 3
SHAPES = {
    "tiny": dict(vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2),
    "0.5b": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2),
}
MAKE = """
import json, sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
torch.manual_seed(0)
shape = json.loads(sys.argv[1])
config = Qwen2Config(**shape, max_position_embeddings=4096, tie_word_embeddings=True,
                     rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=None, bos_token_id=None)
Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[2])
"""


def model_directory(shape):
    directory = ROOT / ".tools/bench" / shape
    if not (directory / "config.json").exists():
        subprocess.run([PYTHON, "-c", MAKE, json.dumps(SHAPES[shape]), directory], check=True)
    return directory


def parameters(shape):
    """Of the layers' matrices, and of the head."""
    size, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = size * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * size * size + 2 * size * keys + 3 * size * inner
    return shape["num_hidden_layers"] * layer, shape["vocab_size"] * size


def jobs(shape, dtype, limits):
    """(name, unit, arguments, units of work, floor in seconds, [(peer, its job)])"""
    body, head = parameters(SHAPES[shape])
    draw = random.Random(7)
    ids = lambda count: [draw.randrange(SHAPES[shape]["vocab_size"]) for _ in range(count)]
    wide, narrow = limits["product_512"], limits["product_16"]
    width = 2 if dtype == "bf16" else 4

    batch, prompt, new = 16, 64, 32
    step = max(2 * (body + head) * batch / narrow, width * (body + head) / limits["bytes"])
    floor = (2 * body * batch * prompt + 2 * head * batch) / wide + (new - 1) * step
    prompts = [ids(prompt) for _ in range(batch)]
    yield ("generate 16 x (64 + 32)", dict(prompts=prompts, new=new, greedy=False), batch * new, floor,
           [("transformers", "generate"), ("deterministic", "generate")])

    for count in (8, 16):
        question, segment, answer = 8, 128, 8
        total = question + count * segment
        prefixes = [question + segment * part for part in range(count + 1)]
        floor = (2 * body * (total + (count + 1) * answer) + 2 * head * (count + 1) * answer) / wide
        yield (f"score {count + 1} prefixes of {total}", dict(ids=ids(total), prefixes=prefixes, answer=ids(answer)),
               (count + 1) * answer, floor, [("a pass a prefix", "score")])

    # A task's group of trajectories, as `mempo-score segments` asks about it: after every memory, and after the steps before it.
    group, steps, question, memory, segment, answer = 16, 8, 120, 40, 100, 8
    start, end = ids(question), ids(answer)
    memories, prefixes = [], []
    for _ in range(group):
        trajectory = ids(segment * steps)
        memories += [start + ids(memory) + end for _ in range(steps)]
        prefixes += [start + trajectory[:segment * step] + end for step in range(steps)]
    distinct = question + group * (steps * (memory + answer) + (steps - 1) * (segment + answer)) + answer
    floor = (2 * body * distinct + 2 * head * 2 * group * steps * answer) / wide
    arguments = dict(sequences=memories + prefixes, answer=answer)
    yield (f"score {2 * group * steps} contexts of a task", arguments, 2 * group * steps * answer, floor,
           [("each for itself", "contexts"), ("prefix cache", "cached")])

    for name, lengths in (("train 8 x 256", [256] * 8), ("train 8 of 32 to 256", [32, 64, 128, 256] * 2)):
        tokens = sum(lengths)
        floor = 6 * (body + head) * tokens / wide
        sequences = [ids(length) for length in lengths]
        yield (name, dict(sequences=sequences, steps=5), tokens, floor, [("plain loop", "train"), ("TRL", "trl"), ("deterministic", "train")])


def check(name, ours, theirs):
    """Whether both did the same work (f32)."""
    if "ids" in ours:
        assert ours["ids"] == theirs["ids"], f"{name}: greedy ids differ"
    for key, tolerance in (("logprobs", 1e-4), ("losses", 1e-4)):
        if key in ours and key in theirs:
            flat = lambda rows: [x for row in rows for x in (row if isinstance(row, list) else [row])]
            worst = max(abs(a - b) for a, b in zip(flat(ours[key]), flat(theirs[key]), strict=True))
            assert worst < tolerance, f"{name}: {key} differ by {worst}"
            print(f"  {name}: {key} differ by at most {worst:.1e}")


def bench(engine, shape, dtype):
    directory = model_directory(shape)
    ours, peer = Side(engine, directory, dtype), Side(PYTHON, Path(__file__).with_name("peer.py"), directory, dtype)
    sides = {"deterministic": Side(engine, directory, dtype, "deterministic")}
    peer.do("ready")
    limits = ours.do("limits")
    print(f"\n{shape} {dtype}: products of 512 rows {limits['product_512'] / 1e9:.0f} GFLOP/s, of 16 rows "
          f"{limits['product_16'] / 1e9:.0f}; copying {limits['bytes'] / 1e9:.0f} GB/s; load {os.getloadavg()[0]:.1f}")
    rows = []
    for name, arguments, units, floor, peers in jobs(shape, dtype, limits):
        job = peers[0][1]
        if dtype == "f32":
            greedy = {**arguments, "greedy": True, "new": 64} if job == "generate" else arguments
            check(name, ours.do(job, **greedy), peer.do(job, **greedy))
        if job in ("train", "contexts") and shape != "tiny":
            print(f"  {name}: left out at this size (three training processes are more than 24 GB; a pass a context takes minutes)")
            continue
        seconds = {who: [] for who in ["ours"] + [who for who, _ in peers]}
        for _ in range(ROUNDS + 1):
            seconds["ours"].append(ours.do(job, **arguments)["seconds"])
            for who, theirs in peers:
                seconds[who].append(sides.get(who, peer).do(theirs, **arguments)["seconds"])
        best = {who: min(times[1:]) for who, times in seconds.items()}
        median = {who: statistics.median(times[1:]) for who, times in seconds.items()}
        for who, _ in peers:
            print(f"  {name}: ours {best['ours']:.3f} s, {who} {best[who]:.3f} s", file=sys.stderr, flush=True)
            rows.append([name, f"{units / best['ours']:.0f}", who, f"{units / best[who]:.0f}",
                         f"{best[who] / best['ours']:.2f}", f"{median[who] / median['ours']:.2f}", f"{units / floor:.0f}", f"{floor / best['ours']:.2f}",
                         f"{floor / best[who]:.2f}"])
    for side in [ours, peer, *sides.values()]:
        side.close()
    header = ["job", "ours, tokens/s", "peer", "peer, tokens/s", "ours / peer", "by medians", "floor", "ours / floor", "peer / floor"]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main():
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    engine, *shapes = sys.argv[1:]
    for choice in shapes or ["tiny"]:
        shape, _, dtype = choice.partition(":")
        for dtype in [dtype] if dtype else ["f32", "bf16"]:
            bench(engine, shape, dtype)


main()
