"""The peers' side of the benchmark: transformers, a plain PyTorch loop, TRL. Same protocol as lib/mempo-train/examples/engine.rs:
`peer.py MODEL f32|bf16` reads one job a line and answers each with a line of JSON.
"""

import json
import os
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

LEARNING_RATE = 1e-4
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def load(directory, dtype):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()


@torch.inference_mode()
def generate(model, job):
    """Left-padded prompts, key-value cache, exactly `new` ids each."""
    width = max(map(len, job["prompts"]))
    ids = torch.zeros(len(job["prompts"]), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(job["prompts"]):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = 1
    sampling = dict(do_sample=False) if job["greedy"] else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=job["new"], min_new_tokens=job["new"],
                         eos_token_id=None, pad_token_id=0, **sampling)
    return {"seconds": time.perf_counter() - start, "ids": out[:, width:].tolist()}


@torch.inference_mode()
def score(model, job):
    """A forward pass a prefix, head at the answer alone."""
    answer, found = torch.tensor(job["answer"]), []
    start = time.perf_counter()
    for prefix in job["prefixes"]:
        ids = torch.tensor([job["ids"][:prefix] + job["answer"]])
        logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist())
    return {"seconds": time.perf_counter() - start, "logprobs": found}


@torch.inference_mode()
def contexts(model, job):
    """A forward pass a context."""
    found = []
    start = time.perf_counter()
    for ids in job["sequences"]:
        answer = torch.tensor(ids[-job["answer"]:])
        logits = model(torch.tensor([ids]), logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist())
    return {"seconds": time.perf_counter() - start, "logprobs": found}


@torch.inference_mode()
def cached(model, job):
    """The same in order of their ids, each going on from what it shares with the one before it."""
    found = [None] * len(job["sequences"])
    start = time.perf_counter()
    cache, held = DynamicCache(), []
    for place in sorted(range(len(found)), key=lambda place: job["sequences"][place]):
        ids = job["sequences"][place]
        shared = 0
        while shared < min(len(held), len(ids) - job["answer"] - 1) and held[shared] == ids[shared]:
            shared += 1
        if shared == 0:
            cache = DynamicCache()
        elif shared < len(held):
            cache.crop(shared - len(held))
        answer = torch.tensor(ids[-job["answer"]:])
        logits = model(torch.tensor([ids[shared:]]), past_key_values=cache, logits_to_keep=len(answer) + 1).logits[0, :-1]
        found[place] = logits.float().log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist()
        held = ids
    return {"seconds": time.perf_counter() - start, "logprobs": found}


def padded(sequences):
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, sequence in enumerate(sequences):
        ids[row, :len(sequence)] = labels[row, :len(sequence)] = torch.tensor(sequence)
    return ids, labels


def train(directory, dtype, job):
    """A plain loop: padded batch, AdamW on fp32 weights, bf16 by autocast."""
    model = load(directory, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids, labels = padded(job["sequences"])
    mask = (labels != -100).long()
    seconds, losses = [], []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "losses": losses}


def trl(directory, dtype, job):
    """TRL's SFTTrainer on the same sequences, one batch a step, without packing (which mixes documents on a CPU)."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.start = [], None

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.start)

    vocabulary = {f"<{number}>": number for number in range(4)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")),
                                        eos_token="<1>", pad_token="<2>")
    rows = [{"input_ids": sequence} for _ in range(job["steps"]) for sequence in job["sequences"]]
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(output_dir=out, per_device_train_batch_size=len(job["sequences"]), max_steps=job["steps"],
                           learning_rate=LEARNING_RATE, weight_decay=0.0, lr_scheduler_type="constant", report_to=[],
                           bf16=dtype == torch.bfloat16, use_cpu=True, packing=False, max_length=None,
                           save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
                           shuffle_dataset=False)
        trainer = SFTTrainer(model=load(directory, torch.float32), args=config, processing_class=tokenizer,
                             train_dataset=Dataset.from_list(rows), callbacks=[clock])
        sys.stdout, stdout = sys.stderr, sys.stdout
        try:
            trainer.train()
        finally:
            sys.stdout = stdout
    return {"seconds": min(clock.seconds)}


def main():
    directory, dtype = sys.argv[1], DTYPES[sys.argv[2]]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = load(directory, dtype)
    for line in sys.stdin:
        job = json.loads(line)
        match job["job"]:
            case "ready":
                answer = {}
            case "generate":
                answer = generate(model, job)
            case "score":
                answer = score(model, job)
            case "contexts":
                answer = contexts(model, job)
            case "cached":
                answer = cached(model, job)
            case "train":
                answer = train(directory, dtype, job)
            case "trl":
                answer = trl(directory, dtype, job)
        print(json.dumps(answer), flush=True)


main()
