"""Holds the first completions of a teacher's greedy rollout to the engine's here: the same first ids, as many as are asked for.

  .tools/python/bin/python tools/peers/beginnings.py HERE TEACHER COUNT

A teacher speaks in texts, without the token that ends a turn; but for that, shorter completions have to be the same to their ends.
"""

import sys
from pathlib import Path

from pyarrow import parquet


def first_steps(rollout: str) -> dict:
    files = sorted(Path(rollout, "steps").glob("*.parquet"))
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    return {row["task_id"]: row for row in rows if row["trajectory_index"] == 0 and row["step_index"] == 0}


def main() -> None:
    here, teacher, count = first_steps(sys.argv[1]), first_steps(sys.argv[2]), int(sys.argv[3])
    if not here or here.keys() != teacher.keys():
        sys.exit(f"{sys.argv[2]}: tasks {sorted(teacher)}, expected {sorted(here)}")
    other = []
    for task, row in here.items():
        ids = row["completion_ids"][:-1] if row["stop_reason"] == "eos" else row["completion_ids"]
        if ids[:count] != teacher[task]["completion_ids"][:count]:
            other.append(f"{task}\n  here:    {row['completion']!r}\n  teacher: {teacher[task]['completion']!r}")
    if other:
        sys.exit("\n".join([*other, f"{len(other)} of {len(here)} completions begin otherwise"]))
    print(f"{len(here)} completions begin with the same {count} tokens, or are the same: {sys.argv[2]}")


if __name__ == "__main__":
    main()
