"""Holds BM25 on the demo's documents to bm25s, an implementation from PyPI, fed the words that ours cuts.

    python ranking.py PROGRAMS INDEX QUESTIONS

PROGRAMS is the folder of `mempo-rollout`, INDEX what its `index` made of the demo's documents, QUESTIONS a file of the demo's
questions. `serve-search` is asked for the ten best of each question and of the query of each of its hops; the score that bm25s
gives to what it finds has to be the score of its own ten best, place by place: ranks may differ among equals only. Our index
keeps a length in a byte (exact to 39 words, then in steps of two and more), so that queries that find longer documents may differ
a little.
"""

import json
import re
import sys
from pathlib import Path

import bm25s
import numpy
import pyarrow.parquet

from encoder import Server, read_lines

TOP_K = 10
K1, B = 1.2, 0.75
# Relative difference below which scores are equal; ours add in single precision.
SAME = 1e-4


def words(text):
    return [word for word in re.split(r"[\W_]+", text.lower()) if word]


def distinct(query, known):
    return sorted(set(words(query)) & known)


def main(programs, index, questions):
    index = Path(index)
    tables = [pyarrow.parquet.read_table(part) for part in sorted(index.glob("corpus/*.parquet"))]
    documents = [row for table in tables for row in table.to_pylist()]
    places = {row["doc_id"]: place for place, row in enumerate(documents)}
    cut = [words(f"{row['title']} {row['text']}") for row in documents]
    peer = bm25s.BM25(method="lucene", k1=K1, b=B)
    peer.index(cut, show_progress=False)
    known = {word for document in cut for word in document}
    rows = read_lines(questions)
    queries = sorted({text for row in rows for text in [row["question"]] + [hop["query"] for hop in row["metadata"]["hops"]]})
    server = Server(Path(programs) / "mempo-rollout", index)
    try:
        found = server.ids(queries, TOP_K)
    finally:
        server.close()
    same = ranked = 0
    worst = 0.0
    for query, ids in zip(queries, found, strict=True):
        scores = peer.get_scores(distinct(query, known))
        best = numpy.sort(scores)[::-1][:TOP_K]
        best = best[best > 0]
        ours = scores[[places[i] for i in ids]]
        if len(ours) != len(best):
            sys.exit(f"{query}: {len(ours)} documents, bm25s has {len(best)}")
        differs = float(numpy.max(numpy.abs(ours - best) / best, initial=0.0))
        worst, same = max(worst, differs), same + (differs < SAME)
        ranked += len(best)
    longest = max(len(document) for document in cut)
    print(f"BM25: {len(queries)} queries, {len(documents)} documents of at most {longest} words, {ranked} places: the ten best are those "
          f"of bm25s for {same} queries, worst difference of a score {worst:.1e}")
    if same < 0.99 * len(queries):
        sys.exit("BM25: not the ranking of bm25s")


if __name__ == "__main__":
    main(*sys.argv[1:])
