"""Holds `index --encoder` to transformers on a published encoder, and asks words, vectors and both for the demo's documents.

    python encoder.py PROGRAMS ENCODER DATA

PROGRAMS is the folder of `mempo-rollout`, ENCODER a Hugging Face directory of MiniLM (mean pooling, vectors divided by their length,
no prefixes), DATA what `mempo-demo data` wrote. 96 texts of the World Factbook, from one word to many times what an encoder takes:
each number of a vector within 1e-4. Then recall at 3, over every fifth question of the split `test`: of the documents that a question needs
those that are among the first three.
"""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

OUT = Path("runs/encoder")
MAX_TOKENS = 256
BOUND = 1e-4
TOP_K = 3
# Questions asked: 500 of 2,497, evenly.
EVERY = 5
# The server answers a request within 30 s, or says that it is busy.
BATCH, ATTEMPTS = 4, 100


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mixed(documents):
    """48 passages as they are, 24 cut after 1, 2, 3 … words, 24 of 2, 4, 6 … passages end to end."""
    spread = documents[:: len(documents) // 48][:48]
    short = [{**row, "text": " ".join(row["text"].split()[: 1 + i])} for i, row in enumerate(spread[:24])]
    starts = range(0, 24 * 100, 100)
    long = [{**documents[start], "text": " ".join(row["text"] for row in documents[start:start + 2 + 2 * i])}
            for i, start in enumerate(starts)]
    rows = spread + short + long
    return [{"id": f"{i:03}", "title": row["title"], "text": row["text"]} for i, row in enumerate(rows)]


def make_index(program, encoder, corpus, out):
    command = [program, "index", "--corpus", corpus, "--out", out, "--encoder", encoder, "--passage-prefix", "", "--dtype", "f32",
               "--device", "cpu", "--max-tokens", str(MAX_TOKENS), "--quiet"]
    subprocess.run([str(word) for word in command], check=True)


def check_vectors(program, encoder, documents):
    corpus, out = OUT / "mixed.jsonl", OUT / "mixed"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    make_index(program, encoder, corpus, out)
    found = load_file(out / "vectors" / "part-00000.safetensors")["vectors"].float()
    words, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    lengths, worst = [], 0.0
    for row, vector in zip(documents, found, strict=True):
        text = f'"{row["title"]}"\n{row["text"]}'
        whole = len(words(text)["input_ids"])
        batch = words(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            mean = model(**batch).last_hidden_state.mean(1)
        expected = torch.nn.functional.normalize(mean, dim=1)[0]
        worst = max(worst, (vector - expected).abs().max().item())
        lengths.append(whole)
    over = sum(length > MAX_TOKENS for length in lengths)
    print(f"vectors: {len(found)} texts of {min(lengths)} to {max(lengths)} tokens ({over} cut to {MAX_TOKENS}), "
          f"worst difference {worst:.1e} (at most {BOUND:.0e}), half precision included")
    if worst > BOUND or over < 10:
        sys.exit("vectors: not those of transformers")


class Server:
    """`serve-search` on a free port."""

    def __init__(self, program, index, *flags):
        command = [program, "serve-search", "--index", index, "--port", "0", *flags]
        self.process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "http://" in line:
                self.address = "http://" + line.split("http://")[1].split("/")[0] + "/retrieve"
                return
        sys.exit("".join(said))

    def ids(self, queries, top_k=TOP_K):
        """For each query the ids of what is found."""
        found = []
        for start in range(0, len(queries), BATCH):
            found += self.ask({"queries": queries[start:start + BATCH], "topk": top_k})
        return found

    def ask(self, body):
        for _ in range(ATTEMPTS):
            request = urllib.request.Request(self.address, json.dumps(body).encode(), {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request) as answer:
                    return [[document["id"] for document in hits] for hits in json.load(answer)["result"]]
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
        sys.exit(f"serve-search was too busy {ATTEMPTS} times")

    def close(self):
        self.process.terminate()
        self.process.wait()


def recall(found, needed):
    """The mean share of what is needed that is found."""
    return sum(len(set(ids) & wanted) / len(wanted) for ids, wanted in zip(found, needed, strict=True)) / len(needed)


def compare_retrievers(program, encoder, data):
    make_index(program, encoder, data / "corpus.jsonl", OUT / "index")
    questions = read_lines(data / "questions-test.jsonl")[::EVERY]
    hops = {count: [row for row in questions if len(row["metadata"]["hops"]) == count] for count in (1, 2)}
    needed = lambda rows: [{hop["doc_id"] for hop in row["metadata"]["hops"]} for row in rows]
    each = [hop for row in questions for hop in row["metadata"]["hops"]]
    print(f"recall at {TOP_K}: {len(hops[1])} questions of one hop, {len(hops[2])} of two, {len(each)} queries of single hops")
    for name in ("bm25", "dense", "hybrid"):
        vectors = [] if name == "bm25" else ["--encoder", encoder, "--query-prefix", ""]
        server = Server(program, OUT / "index", "--retriever", name, *vectors)
        try:
            of = [recall(server.ids([row["question"] for row in rows]), needed(rows)) for rows in hops.values()]
            of.append(recall(server.ids([hop["query"] for hop in each]), [{hop["doc_id"]} for hop in each]))
        finally:
            server.close()
        print(f"  {name:6} one hop {of[0]:.3f}, two hops {of[1]:.3f}, single hops' queries {of[2]:.3f}", flush=True)


def main(programs, encoder, data):
    program = Path(programs) / "mempo-rollout"
    OUT.mkdir(parents=True, exist_ok=True)
    check_vectors(program, Path(encoder), mixed(read_lines(Path(data) / "corpus.jsonl")))
    compare_retrievers(program, Path(encoder), Path(data))


if __name__ == "__main__":
    main(*sys.argv[1:])
