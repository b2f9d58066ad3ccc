"""Reference values for the advantages, the losses and one whole update.

An independent implementation of the formulas in plain Python and PyTorch, in double
precision. It writes five golden files beside itself:

    advantages.json   advantages of one task's group of trajectories
    rows.json         what every step of a task gets of them, from the command line to the row
    segments.json     how probable memories make an answer on a tiny real model, and what they earn
    losses.json       losses over token log-probabilities, with their gradients
    update.json       one optimiser step on a tiny real model

    python make.py            writes the files
    python make.py --check    recomputes them, prints the worst difference of each file
                              and exits 1 if one is off
"""

import json
import math
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
MODEL = "../../lib/mempo-model/tests/golden/qwen2"
TOLERANCES = {
    "advantages.json": 1e-9,
    "rows.json": 1e-9,
    "segments.json": 1e-5,
    "losses.json": 1e-9,
    "update.json": 1e-5,
}

# Differences are relative to the larger of the two numbers, but to no less than this, so
# that rounding left over where numbers cancel is not taken for a difference.
SMALLEST_SCALE = 1e-6


# ---------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------


def degenerate(values, least):
    """Fewer than max(least, 2) values, or all of them exactly equal."""
    return len(values) < max(least, 2) or all(v == values[0] for v in values)


def centred(values):
    """v - mean."""
    mean = math.fsum(values) / len(values)
    return [v - mean for v in values]


def normalise(values, least, options, floor):
    """(v - mean) / max(sample std, floor); v - mean with no_std; 0 where degenerate."""
    if degenerate(values, least):
        return [0.0] * len(values)
    deviations = centred(values)
    if options["no_std"]:
        return deviations
    std = math.sqrt(math.fsum(d * d for d in deviations) / (len(values) - 1))
    return [d / max(std, floor) for d in deviations]


def floor_of_sums(options):
    """The floor where rewards of trajectories and memories are added before they are divided."""
    return max(options["std_floor"], options["memory_std_floor"])


def estimate(values, least, options, floor):
    """mempo, grpo, memagent-slime: normalise(v). dr-grpo, memagent: v - mean.
    rloo: n/(n-1) (v - mean). 0 where degenerate."""
    if options["estimator"] in ("mempo", "grpo", "memagent-slime"):
        return normalise(values, least, options, floor)
    if degenerate(values, least):
        return [0.0] * len(values)
    n = len(values)
    scale = {"dr-grpo": 1.0, "memagent": 1.0, "rloo": n / (n - 1)}[options["estimator"]]
    return [scale * d for d in centred(values)]


def alpha_now(options):
    """The weight of memories at this point of the training: from alpha to alpha_end, linearly."""
    start, end = options["alpha"], options["alpha_end"]
    return start if end is None else (1.0 - options["progress"]) * start + options["progress"] * end


def with_information_gain(options, group):
    """InfoMem (arXiv 2606.03329): R_i + alpha * r~_i for i in S, else R_i. S: trajectories that
    apply and have a memory that counts; r_i: mean reward of those; r~ = normalise(r) inside S."""
    rewards = [trajectory["reward"] for trajectory in group]
    inside = {}
    for i, trajectory in enumerate(group):
        counted = [value for step, value in trajectory["memories"] if counts(options, trajectory, step)]
        if counted:
            inside[i] = math.fsum(counted) / len(counted)
    gains = normalise(
        list(inside.values()), options["min_memory_group"], options, options["memory_std_floor"]
    )
    for i, gain in zip(inside, gains):
        rewards[i] += alpha_now(options) * gain
    return rewards


def trajectory_advantages(options, group):
    """The estimator's formula on R, with combine "infomem" on R + alpha r~."""
    if options["combine"] == "infomem":
        return estimate(with_information_gain(options, group), 2, options, floor_of_sums(options))
    rewards = [trajectory["reward"] for trajectory in group]
    return estimate(rewards, 2, options, options["std_floor"])


def counts(options, trajectory, step_index):
    """Whether the memory of a step takes part (memory_apply, memory_steps)."""
    last = options["memory_steps"] == "all" or step_index == trajectory["last_memory"]
    return last and memory_applies(options, trajectory)


def memory_applies(options, trajectory):
    """Whether the memories of a trajectory take part (memory_apply)."""
    return {
        "all": True,
        "well-formed": trajectory["format_valid"],
        "success": trajectory["reward"] >= 1,
    }[options["memory_apply"]]


def memory_groups(options, group):
    """Lists of (trajectory, memory) positions compared with one another (memory_scope)."""
    groups = {}
    for i, trajectory in enumerate(group):
        for j, (step_index, _) in enumerate(trajectory["memories"]):
            if not counts(options, trajectory, step_index):
                continue
            key = {"per-step": step_index, "pooled": 0, "per-trajectory": i}
            groups.setdefault(key[options["memory_scope"]], []).append((i, j))
    return list(groups.values())


def memory_advantages(options, group, trajectory):
    """combine "advantages": alpha * normalise(M), whatever the estimator.
    combine "rewards": inside a memory the estimator's formula on R + alpha * M stands in the
    trajectory advantage's place (0 where all sums are equal), so what is added is that less the
    trajectory advantage. Nothing is added in a group that is too small.
    combine "infomem": 0, memories count in the trajectory's reward."""
    result = [[0.0] * len(t["memories"]) for t in group]
    if options["combine"] == "infomem":
        return result
    least, alpha = options["min_memory_group"], alpha_now(options)
    for members in memory_groups(options, group):
        if len(members) < max(least, 2):
            continue
        values = [group[i]["memories"][j][1] for i, j in members]
        if options["combine"] == "advantages":
            found = normalise(values, least, options, options["memory_std_floor"])
            for (i, j), z in zip(members, found):
                result[i][j] = alpha * z
        else:
            sums = [group[i]["reward"] + alpha * m for (i, _), m in zip(members, values)]
            for (i, j), z in zip(members, estimate(sums, least, options, floor_of_sums(options))):
                result[i][j] = z - trajectory[i]
    return result


def spread(options, advantage, steps):
    """[what each step gets, loss weight of each step]. Copied: A each. Divided: A / trained steps
    each. The last step is not trained with train_final "mask". memagent-slime divides and masks
    unless told otherwise, all others copy and keep."""
    slime = options["estimator"] == "memagent-slime"
    divide = (options["trajectory_credit"] or ("divide" if slime else "copy")) == "divide"
    mask = (options["train_final"] or ("mask" if slime else "keep")) == "mask"
    weights = [1.0] * steps
    if mask:
        weights[-1] = 0.0
    trained = sum(weights)
    share = advantage / trained if divide and trained > 0 else advantage
    return [[share] * steps, weights]


def advantages(options, group):
    """Both kinds of advantages of a group, and what each step gets of the trajectory's."""
    trajectory = trajectory_advantages(options, group)
    shares = [spread(options, a, t["steps"]) for a, t in zip(trajectory, group)]
    return {
        "trajectory": trajectory,
        "memory": memory_advantages(options, group, trajectory),
        "shares": [share for share, _ in shares],
        "weights": [weights for _, weights in shares],
    }


def attempt(reward, *memories, valid=True, steps=None, last=None):
    """One trajectory of a group: its memories with a reward, the number of its steps (default: up
    to the last memory), the step of its last memory (default: the last one with a reward)."""
    if last is None and memories:
        last = memories[-1][0]
    return {
        "reward": reward,
        "format_valid": valid,
        "memories": [list(m) for m in memories],
        "last_memory": last,
        "steps": steps or (1 if last is None else last + 1),
    }


def default_options():
    """What the command line means without options, but for min_memory_group, which is 4 there."""
    return {
        "estimator": "mempo",
        "combine": "advantages",
        "memory_scope": "per-step",
        "memory_apply": "all",
        "memory_steps": "all",
        "min_memory_group": 2,
        "alpha": 1.0,
        "alpha_end": None,
        "progress": 0.0,
        "std_floor": 1e-6,
        "memory_std_floor": 0.05,
        "no_std": False,
        "trajectory_credit": None,
        "train_final": None,
    }


def advantage_cases():
    """The hand-made cases of advantages.json."""
    defaults = default_options()
    # Unequal step counts, a trajectory without memories, a malformed one, graded rewards.
    mixed = [
        attempt(1.0, (0, 0.25), (1, 0.75), (2, 0.5)),
        attempt(0.0, (0, 0.1), (1, 0.4), valid=False),
        attempt(1.2, (0, 0.9), (1, 0.35), (2, 0.8), (3, 0.6)),
        attempt(0.3),
        attempt(0.1, (0, 0.55)),
        attempt(1.0, (0, 0.0), (2, 1.0), valid=False),
    ]
    only_memories = [
        attempt(1.0, (0, 0.2), (1, 0.9)),
        attempt(1.0, (0, 0.7), (1, 0.4)),
        attempt(1.0, (0, 0.3), (1, 0.1)),
    ]
    close = [
        attempt(0.5, (0, 0.3), (1, 0.2)),
        attempt(0.5001, (0, 0.3002), (1, 0.9)),
        attempt(0.4998, (0, 0.3007), (1, 0.4)),
    ]
    # The answer is next to impossible after every memory.
    hopeless = [
        attempt(1.0, (0, 1e-5), (1, 3e-5)),
        attempt(0.0, (0, 4e-5), (1, 1e-4)),
        attempt(0.0, (0, 2e-5), (1, 2e-5)),
        attempt(0.0, (0, 1.3e-4), (1, 5e-5)),
    ]
    hopeless_successes = [{**t, "reward": 1.0} for t in hopeless]
    zeros = [attempt(0.0, (0, 0.0), (1, 0.0)), attempt(0.0, (0, 0.0)), attempt(0.0)]
    # R + 0.5 M is exactly 1.0 at step 0 although both R and M differ there: norm is 0 for all of them.
    cancelling = [
        attempt(1.0, (0, 0.0), (1, 0.5)),
        attempt(0.75, (0, 0.5), (1, 0.25)),
        attempt(0.5, (0, 1.0), (1, 0.0)),
    ]
    same_memories = [
        attempt(1.0, (0, 0.6), (1, 0.1)),
        attempt(0.0, (0, 0.6), (1, 0.1)),
        attempt(0.25, (0, 0.6), (1, 0.7)),
    ]
    repeated = [
        attempt(1.0, (1, 0.3), (1, 0.8), (4, 0.2)),
        attempt(0.0, (4, 0.9), (1, 0.1)),
    ]
    no_memories = [
        attempt(1.0, steps=3),
        attempt(0.0, steps=2),
        attempt(1.2, steps=4),
        attempt(0.3),
        attempt(0.1, steps=2),
    ]
    # Chunk by chunk: a memory a step, then an answer without one.
    reading = [
        attempt(1.0, (0, -0.5), (1, 0.2), (2, 0.9), steps=4),
        attempt(1.0, (0, -0.6), (1, 0.4), (2, 0.5), steps=4),
        attempt(0.0, (0, -0.1), (1, 0.3), (2, 2.5), steps=4),
        attempt(1.0, (0, -0.9), (1, -0.2), (2, 0.1), steps=4),
        attempt(0.0, (0, 0.0), (1, 0.0), (2, -0.4), steps=4, valid=False),
        attempt(1.0, (0, 0.7), (1, 1.1), steps=4, last=2),
        attempt(0.0, steps=1),
    ]
    alike = [
        attempt(1.0, (0, 0.3), (1, 0.2), steps=3),
        attempt(1.0, (0, 0.4), (1, 0.2), steps=3),
        attempt(0.0, (0, 0.9), (1, 0.8), steps=3),
    ]
    one_success = [attempt(1.0, (0, 0.3), steps=2), attempt(0.0, (0, 0.9), steps=2)]
    rewards = {"combine": "rewards"}
    final = {"memory_steps": "final"}
    infomem = {"estimator": "grpo", "combine": "infomem", "memory_apply": "success", **final}
    memagent, slime = {"estimator": "memagent"}, {"estimator": "memagent-slime"}
    divide, mask = {"trajectory_credit": "divide"}, {"train_final": "mask"}
    copy, keep = {"trajectory_credit": "copy"}, {"train_final": "keep"}
    listed = [
        ("mempo-per-step", {}, mixed),
        ("mempo-pooled-half", {"memory_scope": "pooled", "alpha": 0.5}, mixed),
        ("mempo-per-trajectory", {"memory_scope": "per-trajectory"}, mixed),
        ("mempo-well-formed", {"memory_apply": "well-formed", "alpha": 0.5}, mixed),
        ("mempo-success-pooled", {"memory_apply": "success", "memory_scope": "pooled"}, mixed),
        ("mempo-success-per-step", {"memory_apply": "success"}, mixed),
        ("mempo-least-four", {"min_memory_group": 4}, mixed),
        ("mempo-no-std", {"no_std": True, "alpha": 0.5}, mixed),
        ("rewards-per-step-half", {**rewards, "alpha": 0.5}, mixed),
        ("rewards-pooled", {**rewards, "memory_scope": "pooled"}, mixed),
        (
            "rewards-per-trajectory-well-formed",
            {**rewards, "memory_scope": "per-trajectory", "memory_apply": "well-formed"},
            mixed,
        ),
        (
            "rewards-success-least-three",
            {**rewards, "memory_apply": "success", "min_memory_group": 3, "alpha": 0.5},
            mixed,
        ),
        ("rewards-no-std", {**rewards, "no_std": True, "alpha": 0.5}, mixed),
        ("rewards-cancelling", {**rewards, "alpha": 0.5}, cancelling),
        ("rewards-cancelling-rloo", {**rewards, "alpha": 0.5, "estimator": "rloo"}, cancelling),
        ("rewards-cancelling-too-few", {**rewards, "alpha": 0.5, "min_memory_group": 4}, cancelling),
        ("rewards-equal-task-rewards", {**rewards, "alpha": 0.5}, only_memories),
        ("rewards-equal-memories", {**rewards, "alpha": 0.5}, same_memories),
        ("rewards-alpha-zero", {**rewards, "alpha": 0.0}, mixed),
        ("rewards-floor", {**rewards, "std_floor": 0.05}, close),
        ("only-memory-rewards-differ", {}, only_memories),
        ("equal-memories", {}, same_memories),
        ("floor", {"std_floor": 0.01}, close),
        ("memory-floor", {}, hopeless),
        ("memory-floor-tiny", {"memory_std_floor": 1e-6}, hopeless),
        ("memory-floor-wide-pooled", {"memory_std_floor": 0.5, "memory_scope": "pooled"}, mixed),
        ("memory-floor-and-floor", {"memory_std_floor": 0.01, "std_floor": 1.0}, hopeless),
        ("memory-floor-no-std", {"no_std": True}, hopeless),
        ("memory-floor-rewards", {**rewards, "alpha": 0.5}, hopeless_successes),
        ("memory-floor-rewards-wide", {**rewards, "std_floor": 0.2}, hopeless_successes),
        ("memory-floor-rewards-tiny", {**rewards, "memory_std_floor": 1e-6}, hopeless_successes),
        ("memory-floor-infomem", infomem, hopeless_successes),
        ("memory-floor-infomem-wide", {**infomem, "std_floor": 2.0, "alpha": 0.3}, hopeless_successes),
        ("memory-floor-infomem-tiny", {**infomem, "memory_std_floor": 1e-6}, hopeless_successes),
        ("alpha-schedule-start", {"alpha": 0.8, "alpha_end": 0.2}, mixed),
        ("alpha-schedule", {"alpha": 0.8, "alpha_end": 0.2, "progress": 0.25}, mixed),
        ("alpha-schedule-rewards", {**rewards, "alpha_end": 0.0, "progress": 0.6}, mixed),
        ("alpha-schedule-infomem", {**infomem, "alpha_end": 0.3, "progress": 1.0}, reading),
        ("floor-pooled", {"std_floor": 0.5, "memory_scope": "pooled", "alpha": 0.5}, close),
        ("all-zero", {}, zeros),
        ("all-zero-rewards-pooled", {**rewards, "memory_scope": "pooled"}, zeros),
        ("singleton", {}, [attempt(1.0, (0, 0.2), (1, 0.9))]),
        (
            "singleton-per-trajectory",
            {"memory_scope": "per-trajectory", "alpha": 0.5},
            [attempt(1.0, (0, 0.2), (1, 0.9), (2, 0.4))],
        ),
        (
            "singleton-rewards-pooled",
            {**rewards, "memory_scope": "pooled"},
            [attempt(0.5, (0, 0.2), (1, 0.9))],
        ),
        ("pair", {}, [attempt(1.0, (0, 0.5)), attempt(0.0, (0, 0.25), (1, 0.5))]),
        ("repeated-step", {}, repeated),
        ("no-memories", {"memory_scope": "pooled"}, [attempt(1.0), attempt(0.0), attempt(0.1)]),
        ("equal-rewards-thirds", {}, [attempt(0.1), attempt(0.1), attempt(0.1)]),
        ("grpo", {"estimator": "grpo"}, no_memories),
        ("grpo-no-std", {"estimator": "grpo", "no_std": True}, no_memories),
        ("grpo-floor", {"estimator": "grpo", "std_floor": 0.01}, close),
        ("grpo-with-memories", {"estimator": "grpo", "alpha": 0.5}, mixed),
        ("dr-grpo", {"estimator": "dr-grpo"}, no_memories),
        ("dr-grpo-with-memories", {"estimator": "dr-grpo"}, mixed),
        ("dr-grpo-equal", {"estimator": "dr-grpo"}, only_memories),
        ("rloo", {"estimator": "rloo"}, no_memories),
        ("rloo-rewards-pooled", {"estimator": "rloo", **rewards, "memory_scope": "pooled"}, mixed),
        ("rloo-singleton", {"estimator": "rloo"}, [attempt(1.0, (0, 0.5))]),
        ("memagent", memagent, no_memories),
        ("memagent-with-memories", memagent, reading),
        ("memagent-with-memories-no-std", {**memagent, "no_std": True, "alpha": 0.5}, reading),
        ("memagent-rewards", {**memagent, **rewards}, mixed),
        ("memagent-divide", {**memagent, **divide}, no_memories),
        ("memagent-mask", {**memagent, **mask}, reading),
        ("memagent-divide-mask", {**memagent, **divide, **mask}, reading),
        ("grpo-divide", {"estimator": "grpo", **divide}, reading),
        ("mempo-divide-mask", {**divide, **mask, "alpha": 0.5}, mixed),
        ("slime", slime, reading),
        ("slime-no-memories", slime, no_memories),
        ("slime-no-std", {**slime, "no_std": True}, reading),
        ("slime-copy", {**slime, **copy}, reading),
        ("slime-keep", {**slime, **keep}, reading),
        ("slime-copy-keep", {**slime, **copy, **keep}, no_memories),
        ("final-per-step", final, reading),
        ("final-per-step-unequal", final, mixed),
        ("final-pooled", {**final, "memory_scope": "pooled"}, mixed),
        ("final-per-trajectory", {**final, "memory_scope": "per-trajectory"}, mixed),
        ("final-rewards-success", {**final, **rewards, "memory_apply": "success"}, reading),
        ("final-repeated-step", {**final, "memory_scope": "pooled"}, repeated),
        ("infomem", infomem, reading),
        ("infomem-lambda", {**infomem, "alpha": 0.3}, reading),
        ("infomem-memagent-mask", {**infomem, **memagent, **mask, "alpha": 0.3}, reading),
        ("infomem-slime", {**infomem, **slime, "alpha": 0.3}, reading),
        ("infomem-rloo", {**infomem, "estimator": "rloo"}, reading),
        ("infomem-no-std", {**infomem, "no_std": True}, reading),
        ("infomem-too-few", {**infomem, "min_memory_group": 4}, reading),
        ("infomem-equal-gains", infomem, alike),
        ("infomem-one-success", infomem, one_success),
        ("infomem-no-success", infomem, zeros),
        ("infomem-all-succeed", infomem, only_memories),
        ("infomem-all-trajectories", {**infomem, "memory_apply": "all"}, reading),
        ("infomem-all-memories", {**infomem, "memory_steps": "all"}, reading),
        ("infomem-mempo", {**infomem, "estimator": "mempo"}, mixed),
    ]
    return [(name, {**defaults, **changes}, group) for name, changes, group in listed]


def make_advantages():
    """The contents of advantages.json."""
    return [
        {"name": name, "options": options, "group": group, "expected": advantages(options, group)}
        for name, options, group in advantage_cases()
    ]


# ---------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------

# Texts of the tokens that completions of rows.json are made of; some reach over the end of a tag.
TOKENS = ["a", " ", "b", "<mem>", "</mem>", "<", "mem", ">", ">a", "a</", "<mem>a", "b</mem>", "."]


def step_row(text, reward=None, then="tool_call"):
    """A step of a trajectory: its completion's tokens, what its memory earned (if it has one), what
    follows the memory."""
    tokens = text.split("|")
    joined = "".join(tokens)
    memory = None
    if "<mem>" in joined:
        # The tokens that reach into the memory and its tags.
        end = joined.index("</mem>") + len("</mem>")
        starts = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        memory = [0, sum(start < end for start in starts)]
    return {
        "completion_ids": [TOKENS.index(token) for token in tokens],
        "memory": memory,
        "memory_reward": reward,
        "then": then,
    }


def inside_tags(step):
    """The tokens wholly between <mem> and </mem>; an empty range at the memory's start if none is."""
    start, end = step["memory"]
    texts = [TOKENS[i] for i in step["completion_ids"]]
    joined = "".join(texts)
    first, last = joined.index("<mem>") + len("<mem>"), joined.index("</mem>")
    inside, at = [], 0
    for place, text in enumerate(texts):
        if at >= first and at + len(text) <= last and start <= place < end:
            inside.append(place)
        at += len(text)
    return [inside[0], inside[-1] + 1] if inside else [start, start]


def group_of(trajectories):
    """Trajectories as the formulas want them."""
    group = []
    for trajectory in trajectories:
        steps = list(enumerate(trajectory["steps"]))
        with_memory = [index for index, step in steps if step["memory"]]
        rewarded = [(i, s["memory_reward"]) for i, s in steps if s["memory_reward"] is not None]
        last = with_memory[-1] if with_memory else None
        one = attempt(trajectory["reward"], *rewarded, valid=trajectory["format_valid"], steps=len(steps))
        group.append({**one, "last_memory": last})
    return group


def loss_weight(options, group, found):
    """0 for a task whose trajectories all earned the same, if such tasks are to be dropped (with
    drop-without-memory only if no memory has an advantage either)."""
    rewards = [trajectory["reward"] for trajectory in group]
    if options["combine"] == "infomem":
        rewards = with_information_gain(options, group)
    silent = all(a == 0.0 for memories in found["memory"] for a in memories)
    dropped = degenerate(rewards, 2) and {
        "keep": False,
        "drop": True,
        "drop-without-memory": silent,
    }[options["degenerate"]]
    return 0.0 if dropped else 1.0


def rows(options, trajectories):
    """[trajectory, step, trajectory advantage, memory advantage, memory start, memory end, loss
    weight] of every step. Trajectories without a reward have no rows, or count as 0; malformed ones pay the penalty."""
    indexed = list(enumerate(trajectories))
    if options["null_rewards"] == "zero":
        indexed = [(i, {**t, "reward": 0.0 if t["reward"] is None else t["reward"]}) for i, t in indexed]
    indexed = [(i, t) for i, t in indexed if t["reward"] is not None]
    penalty = options["malformed_penalty"]
    indexed = [(i, {**t, "reward": t["reward"] - (0.0 if t["format_valid"] else penalty)}) for i, t in indexed]
    group = group_of([t for _, t in indexed])
    found = advantages(options, group)
    weight = loss_weight(options, group, found)
    result = []
    for place, (index, trajectory) in enumerate(indexed):
        memories = iter(found["memory"][place])
        for number, step in enumerate(trajectory["steps"]):
            memory, span = None, [None, None]
            if step["memory"]:
                memory = 0.0 if step["memory_reward"] is None else next(memories)
                span = inside_tags(step) if options["credit"] == "inside" else step["memory"]
            own = weight * found["weights"][place][number]
            result.append([index, number, found["shares"][place][number], memory, *span, own])
    return result


def trajectory_row(reward, *steps, valid=True):
    """One trajectory of rows.json; its last step answers."""
    steps = [*steps[:-1], {**steps[-1], "then": "answer"}]
    return {"reward": reward, "format_valid": valid, "steps": steps}


def row_cases():
    """The hand-made cases of rows.json: options that differ from the defaults, and a task."""
    plain, split, tight = "<mem>|a|b|</mem>|.", "<|mem|>a|b|a</|mem|>|.", "<mem>a|b</mem>|."
    empty, without = "<mem>|</mem>|.", "a|b|."
    # Unequal step counts, a step without a memory, one past the window, a trajectory that failed.
    mixed = [
        trajectory_row(1.0, step_row(plain, 0.2), step_row(split, 0.9), step_row(tight, 0.4)),
        trajectory_row(0.0, step_row(empty, 0.1), step_row(without)),
        trajectory_row(None, step_row(plain, 0.7), step_row(plain, 0.3)),
        trajectory_row(1.0, step_row(split, 0.6), step_row(plain), step_row(without), valid=False),
        trajectory_row(0.0, step_row(without)),
    ]
    equal = [
        trajectory_row(1.0, step_row(plain, 0.2), step_row(split, 0.9)),
        trajectory_row(1.0, step_row(tight, 0.7), step_row(plain, 0.9)),
        trajectory_row(None, step_row(plain, 0.4)),
    ]
    malformed = [
        trajectory_row(1.0, step_row(plain, 0.2), step_row(split, 0.9)),
        trajectory_row(1.0, step_row(tight, 0.7), step_row(plain, 0.9), valid=False),
    ]
    silent = [
        trajectory_row(1.0, step_row(plain, 0.5)),
        trajectory_row(1.0, step_row(split, 0.5), step_row(without)),
    ]
    alone = [trajectory_row(1.0, step_row(plain, 0.5), step_row(split, 0.1))]
    failed = [trajectory_row(None, step_row(plain, 0.5)), trajectory_row(None, step_row(plain, 0.1))]
    # R + 0.5 M is 1 at the first step whoever it is.
    cancelling = [
        trajectory_row(1.0, step_row(plain, 0.0), step_row(plain, 0.5)),
        trajectory_row(0.75, step_row(split, 0.5), step_row(without)),
        trajectory_row(0.5, step_row(tight, 1.0), step_row(plain, 0.0)),
    ]
    small = {"min_memory_group": 2}
    zero, inside = {"null_rewards": "zero"}, {"credit": "inside"}
    drop, both = {"degenerate": "drop"}, {"degenerate": "drop-without-memory"}
    return [
        ("defaults", {}, mixed),
        ("pairs", small, mixed),
        ("alpha-schedule", {**small, "alpha": 0.8, "alpha_end": 0.2, "progress": 0.25}, mixed),
        ("alpha-schedule-from-one", {**small, "alpha_end": 0.0, "progress": 0.5}, mixed),
        ("memory-floor", {**small, "memory_std_floor": 1.0}, mixed),
        ("floor", {**small, "std_floor": 2.0}, mixed),
        ("inside", {**small, **inside}, mixed),
        ("null-zero", {**small, **zero}, mixed),
        ("null-zero-equal", {**small, **zero}, equal),
        ("keep", {**small, "degenerate": "keep"}, equal),
        ("drop", {**small, **drop}, equal),
        ("drop-without-memory", {**small, **both}, equal),
        ("drop-without-memory-small", both, equal),
        ("drop-without-memory-silent", {**small, **both}, silent),
        ("drop-mixed", {**small, **drop}, mixed),
        ("drop-zero", {**small, **drop, **zero}, equal),
        ("drop-alone", {**small, **drop}, alone),
        ("keep-alone", {**small, "memory_scope": "pooled"}, alone),
        ("drop-without-memory-alone", {**small, **both, "memory_scope": "pooled"}, alone),
        ("all-failed", small, failed),
        ("all-failed-zero", {**small, **drop, **zero}, failed),
        ("rewards-cancelling", {**small, "combine": "rewards", "alpha": 0.5}, cancelling),
        ("rewards-cancelling-small", {"combine": "rewards", "alpha": 0.5}, cancelling),
        ("rewards-well-formed-inside", {**small, **inside, "combine": "rewards", "memory_apply": "well-formed"}, mixed),
        ("slime", {**small, "estimator": "memagent-slime"}, mixed),
        ("malformed", {**small, "malformed_penalty": 0.5}, mixed),
        ("malformed-among-equal", {**small, **drop, "malformed_penalty": 0.5}, malformed),
        ("malformed-all", {**small, **drop, "malformed_penalty": 0.5}, [malformed[1], malformed[1]]),
        ("malformed-success", {**small, "malformed_penalty": 0.25, "memory_apply": "success"}, mixed),
        ("divide-drop", {**small, **drop, "trajectory_credit": "divide", "train_final": "mask"}, equal),
    ]


def command_line(changes):
    """Options as words."""
    words = []
    for name, value in changes.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def make_rows():
    """The contents of rows.json."""
    more = {"min_memory_group": 4, "degenerate": "keep", "null_rewards": "leave-out", "malformed_penalty": 0.0, "credit": "tags"}
    return {
        "tokens": TOKENS,
        "cases": [
            {
                "name": name,
                "command_line": command_line(changes),
                "trajectories": trajectories,
                "expected": rows({**default_options(), **more, **changes}, trajectories),
            }
            for name, changes, trajectories in row_cases()
        ],
    }


# ---------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------

LISTS = ("logprobs", "old_logprobs", "reference_logprobs", "sampling_logprobs", "advantages")


def double(values):
    """A double-precision tensor."""
    return torch.as_tensor(values, dtype=torch.float64)


def clamped(values):
    """A log-ratio, clamped to [-20, 20]."""
    return torch.clamp(values, -20.0, 20.0)


def clipped(ratio, options):
    """clip(ratio, 1 - clip_low, 1 + clip_high)."""
    return torch.clamp(ratio, 1.0 - options["clip_low"], 1.0 + options["clip_high"])


def kept(step):
    """Whether a step counts: it has tokens and a weight."""
    return step["loss_weight"] > 0 and len(step["logprobs"]) > 0


def ratio_of(step):
    """r = exp(clamp(lp - old))."""
    return torch.exp(clamped(step["logprobs"] - step["old_logprobs"]))


def clipped_surrogate(ratio, a, options):
    """max(-A ratio, -A clip(ratio))."""
    return torch.maximum(-a * ratio, -a * clipped(ratio, options))


def ppo_clip(step, options):
    """max(-A r, -A clip(r)), at most -A dual_clip where A < 0 (arXiv 1912.09729)."""
    a = step["advantages"]
    loss = clipped_surrogate(ratio_of(step), a, options)
    return torch.where(a < 0, torch.minimum(loss, -a * options["dual_clip"]), loss)


def sequence_ratio(steps):
    """s = exp(clamp(weighted mean of lp - old)) over all tokens of the given steps."""
    total = sum(s["loss_weight"] * (s["logprobs"] - s["old_logprobs"]).sum() for s in steps)
    weight = sum(s["loss_weight"] * len(s["logprobs"]) for s in steps)
    return torch.exp(clamped(total / weight))


def gspo(step, sequence, options):
    """The clipped surrogate of s_t = sg(s) exp(lp - sg(lp)), s the ratio of the sequence of
    steps that the step belongs to (arXiv 2507.18071, token form)."""
    lp = step["logprobs"]
    ratio = sequence_ratio(sequence).detach() * torch.exp(lp - lp.detach())
    return clipped_surrogate(ratio, step["advantages"], options)


def cispo(step, options):
    """-sg(clip(r)) A lp."""
    return -clipped(ratio_of(step), options).detach() * step["advantages"] * step["logprobs"]


def reinforce(step):
    """-A lp."""
    return -step["advantages"] * step["logprobs"]


def policy_terms(step, trajectory, options):
    """pg of each token of a step; `trajectory` lists the kept steps of its trajectory."""
    loss = options["loss"]
    if loss == "ppo-clip":
        terms = ppo_clip(step, options)
    elif loss == "gspo-step":
        terms = gspo(step, [step], options)
    elif loss == "gspo-trajectory":
        terms = gspo(step, trajectory, options)
    elif loss == "cispo":
        terms = cispo(step, options)
    else:
        assert loss == "reinforce", loss
        terms = reinforce(step)
    if options["importance_cap"] is None:
        return terms
    return terms * importance_weight(step, options["importance_cap"])


def importance_weight(step, cap):
    """sg(min(exp(clamp(old - sampling)), cap))."""
    weight = torch.exp(clamped(step["old_logprobs"] - step["sampling_logprobs"]))
    return torch.clamp(weight, max=cap).detach()


def kl_terms(step, options):
    """k3: min(exp(x) - x - 1, 10), x = clamp(ref - lp); k2: clamp(lp - ref)^2 / 2.
    Multiplied by r, through which the gradient flows too, with kl_ratio."""
    lp, reference = step["logprobs"], step["reference_logprobs"]
    if options["kl"] == "k3":
        x = clamped(reference - lp)
        terms = torch.clamp(torch.exp(x) - x - 1.0, max=10.0)
    else:
        assert options["kl"] == "k2", options["kl"]
        terms = 0.5 * clamped(lp - reference) ** 2
    return terms * ratio_of(step) if options["kl_ratio"] else terms


def token_weight(step, trajectory, trajectories, options):
    """w of the tokens of a step; `trajectories` lists the kept steps of each trajectory."""

    def length(steps):
        return sum(s["loss_weight"] * len(s["logprobs"]) for s in steps)

    u, n = step["loss_weight"], len(trajectories)
    aggregation = options["aggregation"]
    if aggregation == "trajectory-mean":
        return u / (n * length(trajectory))
    if aggregation == "token-mean":
        return u / sum(length(steps) for steps in trajectories)
    if aggregation == "sequence-mean":
        total = sum(s["loss_weight"] for steps in trajectories for s in steps)
        return u / (total * len(step["logprobs"]))
    assert aggregation == "constant", aggregation
    return u / (n * options["loss_length"])


def sums(trajectories, options):
    """Sums over all tokens of w pg, w kl and, where the steps have entropies, w H."""
    filtered = [[s for s in t["steps"] if kept(s)] for t in trajectories]
    filtered = [steps for steps in filtered if steps]
    policy, kl, entropy = double(0.0), double(0.0), double(0.0)
    for steps in filtered:
        for step in steps:
            w = token_weight(step, steps, filtered, options)
            policy = policy + w * policy_terms(step, steps, options).sum()
            kl = kl + w * kl_terms(step, options).sum()
            if "entropies" in step:
                entropy = entropy + w * step["entropies"].sum()
    return policy, kl, entropy


def as_tensors(step):
    """A step with its lists as tensors, the log-probabilities ready for gradients."""
    tensors = {name: double(step[name]) for name in LISTS}
    tensors["logprobs"].requires_grad_(True)
    return {**tensors, "loss_weight": step["loss_weight"]}


def gradient_of(step):
    """dL/dlp of each token of a step; zeros where the step was left out."""
    lp = step["logprobs"]
    return torch.zeros_like(lp).tolist() if lp.grad is None else lp.grad.tolist()


def loss_values(options, trajectories):
    """The expected values of one case of losses.json."""
    tensors = [{"steps": [as_tensors(s) for s in t["steps"]]} for t in trajectories]
    assert_off_kinks(tensors, options)
    policy, kl, _ = sums(tensors, options)
    loss = policy + options["kl_coefficient"] * kl
    if loss.requires_grad:
        loss.backward()
    return {
        "loss": loss.item(),
        "policy_loss": policy.item(),
        "kl": kl.item(),
        "gradients": [[gradient_of(s) for s in t["steps"]] for t in tensors],
    }


def assert_off_kinks(trajectories, options, margin=1e-4):
    """No kept token lies within `margin` of a point where a formula has no derivative."""

    def far(values, *kinks):
        for kink in kinks:
            assert bool(((values - kink).abs() > margin).all()), (values, kink)

    low, high = 1.0 - options["clip_low"], 1.0 + options["clip_high"]
    with torch.no_grad():
        for trajectory in trajectories:
            steps = [s for s in trajectory["steps"] if kept(s)]
            for step in steps:
                lp, reference = step["logprobs"], step["reference_logprobs"]
                far(lp - step["old_logprobs"], -20.0, 20.0)
                far(ratio_of(step), low, high, options["dual_clip"])
                far(sequence_ratio([step]), low, high)
                far(sequence_ratio(steps), low, high)
                far(lp - reference, -20.0, 20.0)
                x = clamped(reference - lp)
                far(torch.exp(x) - x - 1.0, 10.0)
                if options["importance_cap"] is not None:
                    log_weight = step["old_logprobs"] - step["sampling_logprobs"]
                    far(log_weight, -20.0, 20.0)
                    far(torch.exp(clamped(log_weight)), options["importance_cap"])


def step_of(weight, *tokens):
    """A step from one (lp, old, reference, sampling, advantage) a token."""
    columns = [list(c) for c in zip(*tokens)] if tokens else [[] for _ in LISTS]
    return {**dict(zip(LISTS, columns)), "loss_weight": weight}


def constant_step(weight, advantage, *tokens):
    """A step from one (lp, old, reference, sampling) a token, with one advantage."""
    return step_of(weight, *[(*token, advantage) for token in tokens])


def trajectory_of(*steps):
    """A trajectory."""
    return {"steps": list(steps)}


def ordinary_batch():
    """Unequal steps of weights 1, 0.5, 2 and 0, an empty step; ratios inside and outside."""
    return [
        trajectory_of(
            constant_step(
                1.0,
                0.8,
                (-0.52, -0.61, -0.58, -0.6),
                (-1.34, -1.31, -1.52, -1.35),
                (-0.07, -0.45, -0.11, -0.4),
                (-2.71, -2.2, -2.43, -2.31),
            ),
            step_of(
                0.5,
                (-0.93, -0.88, -1.21, -0.9, 0.8),
                (-1.81, -1.4, -1.77, -1.2, 1.35),
                (-0.33, -0.64, -0.41, -0.7, 1.35),
            ),
        ),
        trajectory_of(
            constant_step(
                2.0,
                -1.1,
                (-0.21, -0.27, -0.35, -0.25),
                (-3.05, -2.4, -2.66, -2.5),
                (-0.48, -0.95, -0.44, -1.0),
                (-1.12, -1.15, -0.97, -1.61),
                (-0.66, -0.7, -0.73, -0.69),
            ),
            constant_step(1.0, -1.1),
            constant_step(0.0, -1.1, (-0.4, -0.5, -0.6, -0.7), (-1.4, -1.5, -1.1, -0.7)),
            step_of(1.0, (-0.77, -0.71, -0.81, -0.74, -1.1), (-0.15, -0.29, -0.1, -0.3, -0.3)),
        ),
        trajectory_of(
            constant_step(1.0, 0.3, (-0.59, -0.62, -0.55, -0.61), (-1.92, -2.3, -2.08, -2.2)),
        ),
    ]


def far_batch():
    """Ratios far from 1 on both sides, for both signs of the advantage."""
    tokens = [
        (-0.2, -2.3, -0.4, -2.1),
        (-4.1, -0.6, -3.3, -0.8),
        (-0.9, -1.9, -1.0, -1.7),
        (-1.6, -1.1, -1.3, -1.2),
        (-0.5, -0.48, -0.6, -0.5),
        (-0.3, -5.8, -0.7, -5.1),
    ]
    return [
        trajectory_of(constant_step(1.0, 1.4, *tokens)),
        trajectory_of(constant_step(1.0, -0.9, *tokens), constant_step(0.5, -2.2, *tokens[:2])),
        trajectory_of(constant_step(1.0, 0.0, *tokens[1:4])),
    ]


def extreme_batch():
    """Log-ratios beyond the clamps at 20, on both sides, for both signs."""
    tokens = [
        (-0.4, -27.5, -0.6, -28.0),
        (-26.0, -0.3, -24.5, -0.5),
        (-31.0, -30.9, -0.2, -30.7),
        (-0.1, -0.2, -33.0, -0.15),
        (-760.0, -760.2, -1.5, -760.1),
        (-0.8, -0.9, -0.7, -0.85),
    ]
    return [
        trajectory_of(constant_step(1.0, 0.7, *tokens)),
        trajectory_of(constant_step(2.0, -0.6, *tokens[1:]), constant_step(1.0, -0.6, tokens[0])),
    ]


def reference_batch():
    """Distances to the reference on both sides of the cap of k3 and of the clamp of k2."""
    return [
        trajectory_of(
            constant_step(
                1.0,
                0.9,
                (-3.4, -3.3, -1.1, -3.2),
                (-4.9, -4.85, -1.2, -4.8),
                (-0.3, -0.35, -9.1, -0.4),
                (-0.2, -0.4, -14.0, -0.3),
            )
        ),
        trajectory_of(
            constant_step(1.0, -0.5, (-22.6, -22.5, -0.9, -22.0), (-0.6, -1.6, -23.8, -1.7)),
            constant_step(0.5, -0.5, (-1.2, -0.1, -1.25, -0.2), (-0.7, -0.65, -0.7, -0.6)),
        ),
    ]


def drifted_batch():
    """Old log-probabilities away from those at sampling, by little and by more than 20."""
    return [
        trajectory_of(
            constant_step(
                1.0,
                0.6,
                (-0.5, -0.55, -0.6, -2.1),
                (-0.9, -0.8, -1.0, -0.7),
                (-1.4, -1.35, -1.3, -4.6),
                (-0.3, -0.31, -0.3, -24.4),
            )
        ),
        trajectory_of(
            constant_step(1.0, -0.8, (-2.4, -2.0, -2.2, -2.9), (-25.1, -25.0, -24.0, -0.6)),
            constant_step(2.0, -0.8, (-0.6, -0.9, -0.5, -0.2), (-0.1, -0.12, -0.2, -1.9)),
        ),
    ]


def sequence_batch():
    """Sequences whose ratios lie inside, above and below the clip, for both signs."""

    def steps(a):
        return [
            constant_step(
                1.0,
                a,
                (-0.5, -0.7, -0.6, -0.72),
                (-1.3, -1.25, -1.5, -1.2),
                (-0.8, -0.85, -0.7, -0.9),
            ),
            constant_step(2.0, a, (-0.2, -1.1, -0.3, -1.0), (-0.9, -1.2, -0.8, -1.3)),
            constant_step(0.5, a, (-2.6, -1.2, -2.1, -1.4), (-1.9, -1.3, -1.7, -1.3)),
            constant_step(0.0, a, (-9.0, -1.0, -2.0, -1.0)),
        ]

    up, down = steps(0.9), steps(-1.3)
    return [
        trajectory_of(*up),
        trajectory_of(*down),
        trajectory_of(up[0]),
        trajectory_of(up[0], down[2]),
        trajectory_of(step_of(1.0, (-2.0, -1.5, -1.9, -1.6, 0.4), (-1.7, -1.2, -1.6, -1.1, -0.7))),
    ]


def sequence_extreme_batch():
    """Sequences whose mean log-ratio is beyond the clamp at 20."""
    down = ((-26.0, -0.4, -25.0, -0.5), (-24.0, -0.7, -23.0, -0.6))
    up = ((-0.3, -25.0, -0.4, -24.0), (-0.6, -23.5, -0.5, -23.0))
    return [
        trajectory_of(constant_step(1.0, 0.5, *up)),
        trajectory_of(constant_step(1.0, -0.8, *down)),
        trajectory_of(constant_step(1.0, 1.1, *down)),
    ]


def on_policy_batch():
    """Current, old and sampling log-probabilities equal: every ratio is 1."""
    batch = ordinary_batch()
    for trajectory in batch:
        for step in trajectory["steps"]:
            step["old_logprobs"] = list(step["logprobs"])
            step["sampling_logprobs"] = list(step["logprobs"])
    return batch


def sparse_batch():
    """Trajectories without a step that counts, between those that have one."""
    first, second, third = ordinary_batch()
    return [
        trajectory_of(second["steps"][1], second["steps"][2]),
        first,
        trajectory_of(),
        third,
        trajectory_of(second["steps"][2]),
    ]


def nothing_batch():
    """No step that counts at all."""
    steps = ordinary_batch()[1]["steps"]
    return [trajectory_of(steps[1], steps[2]), trajectory_of()]


def loss_cases():
    """The hand-made cases of losses.json."""
    defaults = {
        "loss": "ppo-clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "aggregation": "trajectory-mean",
        "loss_length": 100,
        "kl": "k3",
        "kl_coefficient": 0.0,
        "kl_ratio": False,
        "importance_cap": None,
    }
    k3 = {"kl": "k3", "kl_coefficient": 0.05}
    k2 = {"kl": "k2", "kl_coefficient": 0.1}
    ratio = {"kl_ratio": True}
    step, whole = {"loss": "gspo-step"}, {"loss": "gspo-trajectory"}
    by_token = {"aggregation": "token-mean"}
    by_sequence = {"aggregation": "sequence-mean"}
    constant = {"aggregation": "constant"}
    narrow = {"clip_low": 0.03, "clip_high": 0.04}
    listed = [
        ("ppo-on-policy", k3, on_policy_batch()),
        ("ppo-trajectory-mean", k3, ordinary_batch()),
        ("ppo-token-mean", {**by_token, **k3}, ordinary_batch()),
        ("ppo-sequence-mean", {**by_sequence, **k3}, ordinary_batch()),
        ("ppo-constant", {**constant, **k3, "loss_length": 12.5}, ordinary_batch()),
        ("ppo-no-kl", {}, ordinary_batch()),
        ("ppo-far", {"clip_high": 0.28}, far_batch()),
        ("ppo-far-dual-wide", {"dual_clip": 1000.0, **by_token}, far_batch()),
        ("ppo-far-dual-narrow", {"dual_clip": 1.5, "clip_low": 0.1, **k3}, far_batch()),
        ("ppo-extreme", k3, extreme_batch()),
        ("ppo-extreme-k2", {**k2, **by_sequence}, extreme_batch()),
        ("ppo-k3-capped", {**k3, "kl_coefficient": 1.0}, reference_batch()),
        ("ppo-k2-clamped", {**k2, **by_token}, reference_batch()),
        ("ppo-k3-ratio", {**k3, **ratio}, ordinary_batch()),
        ("ppo-k2-ratio", {**k2, **ratio, **by_sequence}, ordinary_batch()),
        ("ppo-k3-ratio-far", {**k3, **ratio}, far_batch()),
        ("ppo-k3-ratio-capped", {**k3, **ratio, **by_token}, reference_batch()),
        ("ppo-k2-ratio-clamped", {**k2, **ratio}, reference_batch()),
        ("ppo-cap", {"importance_cap": 2.0, **k3}, drifted_batch()),
        ("ppo-cap-never", {"importance_cap": 5.0, **by_token}, ordinary_batch()),
        ("ppo-cap-beyond-clamp", {"importance_cap": 1e9}, drifted_batch()),
        ("ppo-sparse", k3, sparse_batch()),
        ("ppo-sparse-constant", {**constant, **k2}, sparse_batch()),
        ("ppo-sparse-sequence-mean", by_sequence, sparse_batch()),
        ("ppo-nothing", {**k3, **by_token}, nothing_batch()),
        ("ppo-one-token", {}, [trajectory_of(step_of(0.5, (-0.5, -0.52, -0.6, -0.5, 1.0)))]),
        ("gspo-step", step, sequence_batch()),
        ("gspo-step-narrow", {**step, **narrow, **k3, **by_sequence}, sequence_batch()),
        ("gspo-step-far", {**step, "dual_clip": 1.5}, far_batch()),
        ("gspo-step-extreme", step, sequence_extreme_batch()),
        ("gspo-trajectory", whole, sequence_batch()),
        ("gspo-trajectory-narrow", {**whole, **narrow, **k2, **by_token}, sequence_batch()),
        ("gspo-trajectory-kl-ratio", {**whole, **k3, **ratio, **constant}, sequence_batch()),
        ("gspo-trajectory-cap", {**whole, "importance_cap": 1.5}, drifted_batch()),
        ("gspo-trajectory-sparse", {**whole, **narrow}, sparse_batch()),
        ("cispo", {"loss": "cispo"}, ordinary_batch()),
        ("cispo-far", {"loss": "cispo", "clip_high": 4.0, "clip_low": 1.0}, far_batch()),
        ("cispo-extreme", {"loss": "cispo", **k3, **by_token}, extreme_batch()),
        ("cispo-cap", {"loss": "cispo", "importance_cap": 2.0, **k2}, drifted_batch()),
        ("reinforce", {"loss": "reinforce"}, ordinary_batch()),
        (
            "reinforce-cap-kl-ratio",
            {"loss": "reinforce", "importance_cap": 2.0, **k3, **ratio, **constant},
            drifted_batch(),
        ),
        ("reinforce-sequence-mean", {"loss": "reinforce", **by_sequence, **k2}, far_batch()),
    ]
    return [(name, {**defaults, **changes}, batch) for name, changes, batch in listed]


def make_losses():
    """The contents of losses.json."""
    return [
        {
            "name": name,
            "options": options,
            "trajectories": batch,
            "expected": loss_values(options, batch),
        }
        for name, options, batch in loss_cases()
    ]


# ---------------------------------------------------------------------------------------
# Update
# ---------------------------------------------------------------------------------------


def double_norm(module, x):
    """RMS norm, x / sqrt(mean(x^2) + eps) * weight, without the library's float32 inside."""
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return module.weight * x * torch.rsqrt(mean_square + module.variance_epsilon)


def double_rotary(theta, size, positions):
    """Cosines and sines of the rotary embedding, without the library's float32 inside."""
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = positions[..., None].double() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def load_model():
    """The tiny model, in double precision throughout. Held to the library's own forward
    pass, which computes its norms and its rotary embedding in float32 whatever it is given."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        (HERE / MODEL).resolve(), dtype=torch.float64, attn_implementation="sdpa"
    ).eval()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    probe = torch.arange(1, 23)[None]
    with torch.no_grad():
        before = model(probe).logits
    config = model.config
    theta = config.rope_parameters["rope_theta"]
    size = config.hidden_size // config.num_attention_heads
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, module=module: double_norm(module, x)
    model.model.rotary_emb.forward = lambda x, position_ids: double_rotary(
        theta, size, position_ids
    )
    with torch.no_grad():
        after = model(probe).logits
    worst = (after - before).abs().max().item()
    assert worst <= 1e-5 * before.abs().max().item(), worst
    return model


def completion_terms(model, prompt_ids, completion_ids, temperature):
    """Log-probability of each completion token, and entropy in nats of the distribution it
    was taken from, at the temperature."""
    ids = torch.tensor([prompt_ids + completion_ids])
    logits = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1] / temperature
    logs = torch.log_softmax(logits, dim=-1)
    taken = logs.gather(1, torch.tensor(completion_ids)[:, None])[:, 0]
    return taken, -(logs.exp() * logs).sum(-1)


def update_inputs(model, options):
    """Made-up steps; old and reference log-probabilities lie near the current ones."""
    source = random.Random(20)

    def ids(count):
        return [int(source.random() * model.config.vocab_size) for _ in range(count)]

    def near(values, spread):
        return [v + spread * (2.0 * source.random() - 1.0) for v in values]

    def made(prompt, completion, loss_weight, advantages):
        step = {"prompt_ids": ids(prompt), "completion_ids": ids(completion)}
        with torch.no_grad():
            lp, _ = completion_terms(model, **step, temperature=options["temperature"])
        lp = lp.tolist()
        return {
            **step,
            "old_logprobs": near(lp, 0.3),
            "reference_logprobs": near(lp, 0.5),
            "advantages": advantages,
            "loss_weight": loss_weight,
        }

    return [
        trajectory_of(
            made(5, 7, 1.0, [1.2] * 4 + [1.9] * 3),
            made(12, 10, 0.5, [1.2] * 10),
        ),
        trajectory_of(made(3, 4, 2.0, [-0.9, -0.9, -0.4, -0.9])),
    ]


def with_model_terms(model, step, options):
    """A step with the log-probabilities and the entropies that the model gives it."""
    lp, entropies = completion_terms(
        model, step["prompt_ids"], step["completion_ids"], options["temperature"]
    )
    return {
        "logprobs": lp,
        "entropies": entropies,
        "old_logprobs": double(step["old_logprobs"]),
        "reference_logprobs": double(step["reference_logprobs"]),
        "advantages": double(step["advantages"]),
        "loss_weight": step["loss_weight"],
    }


def adamw(model, options):
    """AdamW, with weight decay on tensors of two or more dimensions only."""
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": options["weight_decay"],
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=options["learning_rate"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["epsilon"],
    )


def summary(norm_of, values_of):
    """[norm of one tensor, first four values of another]."""
    return [norm_of.norm().item(), values_of.flatten()[:4].tolist()]


def make_update():
    """The contents of update.json."""
    options = {
        "loss": "ppo-clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "aggregation": "trajectory-mean",
        "loss_length": 100,
        "kl": "k3",
        "kl_coefficient": 0.05,
        "kl_ratio": False,
        "importance_cap": None,
        "entropy_coefficient": 0.01,
        "temperature": 0.9,
        "max_gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
    }
    model = load_model()
    trajectories = update_inputs(model, options)
    tensors = [
        {"steps": [with_model_terms(model, s, options) for s in t["steps"]]} for t in trajectories
    ]
    assert_off_kinks(tensors, options, margin=1e-3)
    policy, kl, entropy = sums(tensors, options)
    loss = policy + options["kl_coefficient"] * kl - options["entropy_coefficient"] * entropy
    loss.backward()

    named = dict(model.named_parameters())
    gradient = {name: summary(p.grad, p.grad) for name, p in named.items()}
    norm = math.sqrt(math.fsum(p.grad.pow(2).sum().item() for p in named.values()))
    for p in named.values():
        p.grad *= min(1.0, options["max_gradient_norm"] / (norm + 1e-6))
    before = {name: p.detach().clone() for name, p in named.items()}
    adamw(model, options).step()
    weights = {name: summary(p.detach() - before[name], p.detach()) for name, p in named.items()}
    return {
        "model": MODEL,
        "options": options,
        "trajectories": trajectories,
        "expected": {
            "logprobs": [[s["logprobs"].tolist() for s in t["steps"]] for t in tensors],
            "loss": loss.item(),
            "policy_loss": policy.item(),
            "kl": kl.item(),
            "entropy": entropy.item(),
            "gradient_norm": norm,
            "gradient": gradient,
            "weights": weights,
        },
    }


# ---------------------------------------------------------------------------------------
# Segments
# ---------------------------------------------------------------------------------------


def mean_logprobs(model, context, answer, spans):
    """Mean log-probability of the answer's tokens after a context, and of each objective's own."""
    with torch.no_grad():
        found, _ = completion_terms(model, context, answer, 1.0)
    found = found.tolist()

    def mean(values):
        return math.fsum(values) / len(values)

    return mean(found), [mean(found[start:end]) for start, end in spans]


def worth(logprobs, answer, difference):
    """What a context is worth. Joint: the geometric mean of the probabilities of all tokens of the
    answer; per-objective: the mean of each objective's own. Or the same of log-probabilities."""
    joint, objectives = logprobs
    parts = [joint] if answer == "joint" else objectives
    values = [math.exp(part) if difference == "probability" else part for part in parts]
    return math.fsum(values) / len(values)


def segment_inputs(model):
    """A task of three objectives and three trajectories of unequal length: contexts that begin alike."""
    source = random.Random(21)

    def ids(count):
        return [int(source.random() * model.config.vocab_size) for _ in range(count)]

    question, opening, answer = ids(40), ids(2), ids(9)
    memories = []
    for trajectory, count in enumerate((3, 1, 2)):
        earlier = list(question)
        for step in range(count):
            memory = ids(3 + 7 * step + 2 * trajectory)
            memories.append(
                {
                    "trajectory_index": trajectory,
                    "step_index": step,
                    "context_ids": question + memory + opening,
                    "prefix_ids": earlier + opening,
                }
            )
            earlier += memory + ids(20)
    return {
        "answer_ids": answer,
        "spans": [[0, 3], [4, 5], [6, 9]],
        "closed_book_ids": question + opening,
        "memories": memories,
    }


def reference_rewards(memories, values):
    """Each value less the mean over trajectories of their means."""
    by_trajectory = {}
    for memory, value in zip(memories, values):
        by_trajectory.setdefault(memory["trajectory_index"], []).append(value)
    means = [math.fsum(own) / len(own) for own in by_trajectory.values()]
    return [value - math.fsum(means) / len(means) for value in values]


def make_segments():
    """The contents of segments.json."""
    model = load_model()
    inputs = segment_inputs(model)
    answer, spans, memories = inputs["answer_ids"], inputs["spans"], inputs["memories"]

    def scored(context):
        return mean_logprobs(model, context, answer, spans)

    known = scored(inputs["closed_book_ids"])
    own = [scored(memory["context_ids"]) for memory in memories]
    prefix = [scored(memory["prefix_ids"]) for memory in memories]
    # Steps of a trajectory stand in a row; the first one's bias is the closed book.
    previous = [known if m["step_index"] == 0 else own[i - 1] for i, m in enumerate(memories)]
    rewards = []
    for mean in ("joint", "per-objective"):
        for difference in ("probability", "logprob"):
            values = [worth(one, mean, difference) for one in own]

            def less(biases):
                return [v - worth(b, mean, difference) for v, b in zip(values, biases)]

            by_bias = {
                "prefix": less(prefix),
                "previous-memory": less(previous),
                "null": less([known] * len(own)),
                "reference": reference_rewards(memories, values),
                "none": values,
            }
            for bias, found in by_bias.items():
                rewards.append({"answer": mean, "difference": difference, "bias": bias, "rewards": found})
    return {
        "model": MODEL,
        **inputs,
        "expected": {
            "closed_book_probability": math.exp(known[0]),
            "answer_logprobs": [joint for joint, _ in own],
            "answer_probabilities": [math.exp(joint) for joint, _ in own],
            "objective_logprobs": [objectives for _, objectives in own],
            "prefix_probabilities": [math.exp(joint) for joint, _ in prefix],
            "rewards": rewards,
        },
    }


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------

MAKERS = {
    "advantages.json": make_advantages,
    "rows.json": make_rows,
    "segments.json": make_segments,
    "losses.json": make_losses,
    "update.json": make_update,
}


# Levels of a file that are spread over lines, where it is not only the outermost one.
DEPTHS = {"rows.json": 2, "segments.json": 3, "update.json": 3}


def plain(value):
    """The value without negative zeros; a number that is not finite is an error."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, float):
        assert math.isfinite(value)
        return value + 0.0
    return value


def dumps(value, depth):
    """JSON with the outermost `depth` levels spread over lines."""
    if depth == 0 or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {dumps(v, depth - 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + "\n}"
    return "[\n" + ",\n".join(dumps(v, depth - 1) for v in value) + "\n]"


def difference(a, b):
    """The worst relative difference between the numbers of two values; infinite where
    anything else about them differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return math.inf
        return max((difference(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return math.inf
        return max((difference(x, y) for x, y in zip(a, b)), default=0.0)
    numbers = (int, float)
    if any(isinstance(v, bool) or not isinstance(v, numbers) for v in (a, b)):
        return 0.0 if type(a) is type(b) and a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b), SMALLEST_SCALE)


def check():
    """Compares the files with what the formulas give; whether all are right."""
    right = True
    for name, make in MAKERS.items():
        path = HERE / name
        stored = json.loads(path.read_text()) if path.exists() else None
        worst = difference(stored, plain(make()))
        good = worst <= TOLERANCES[name]
        right = right and good
        print(f"{name}: worst difference {worst:.3g}, {'ok' if good else 'OFF'}")
    return right


def write():
    """Writes the files."""
    for name, make in MAKERS.items():
        text = dumps(plain(make()), DEPTHS.get(name, 1)) + "\n"
        (HERE / name).write_text(text)
        print(f"{name}: {len(text)} bytes")


def main(arguments):
    torch.set_num_threads(1)
    if arguments == ["--check"]:
        return 0 if check() else 1
    if arguments:
        print("usage: make.py [--check]", file=sys.stderr)
        return 2
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
