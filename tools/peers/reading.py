"""What reading a document chunk by chunk takes, by its length: processor time a chunk and the peak of memory.

    python reading.py PROGRAMS MODEL PROFILE CORPUS QUESTIONS CHUNK TRAJECTORIES LENGTH…

One task of one question a length, among passages of CORPUS and then prose (.tools/prose, .tools/novels), read by
TRAJECTORIES trajectories side by side in chunks of CHUNK tokens, greedily, on one thread. Times are of processor seconds, which
what else the machine does changes little, less those of a document of four chunks: what starting takes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

OUT = Path("runs/bench-reading")


def run(*words):
    """Processor seconds of a program."""
    process = subprocess.Popen([str(word) for word in words])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{words[0]} {words[1]} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def read(programs, model, profile, corpus, questions, chunk, trajectories, length):
    """Processor seconds, chunks, tokens a memory and peak memory of reading such a document."""
    tasks, out = OUT / f"tasks-{length}", OUT / f"read-{length}"
    filler = [*sorted(Path(".tools/prose").glob("*.jsonl")), *sorted(Path(".tools/novels").glob("*.txt"))]
    run(f"{programs}/mempo-rollout", "compose", "--document", "--questions", questions, "--documents", corpus, "--filler", *filler,
        "--repeat-distractors", "--tokenizer", model, "--objectives", 1, "--document-tokens", length, "--max-tasks", 1, "--quiet",
        "--out", tasks)
    seconds = run(f"{programs}/mempo-rollout", "sample", "--tasks", tasks, "--model", model, "--profile", profile,
                  "--context", "memagent", "--chunk-tokens", chunk, "--max-completion-tokens", 32, "--temperature", 0,
                  "--group-size", trajectories, "--device", "cpu", "--threads", 1, "--quiet", "--out", out)
    manifest = json.loads((out / "manifest.json").read_text())
    steps = manifest["rows"]["steps"]
    chunks = steps // int(trajectories) - 1
    return seconds, chunks, manifest["summary"]["generated_tokens"] / steps, manifest["peak_memory_bytes"]


def main(programs, model, profile, corpus, questions, chunk, trajectories, *lengths):
    shutil.rmtree(OUT, ignore_errors=True)
    measure = lambda length: read(programs, model, profile, corpus, questions, chunk, trajectories, length)
    start, few, _, _ = measure(4 * int(chunk))
    first = None
    for length in map(int, lengths):
        seconds, chunks, written, memory = measure(length)
        each = 1000 * (seconds - start) / (chunks - few)
        first = first or each
        print(f"{length:,} tokens: {chunks} chunks, {seconds:.1f} s, {each:.2f} ms a chunk of {trajectories} trajectories "
              f"({100 * (each / first - 1):+.1f} % of the first), {written:.1f} tokens a memory; peak {memory / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
