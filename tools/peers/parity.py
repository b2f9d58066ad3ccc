"""Holds the engine to transformers: `parity.py ENGINE [MODEL|qwen2|qwen3|llama]...`, f32 and bf16. A family stands for a small model of it
with random weights, and random ids.

f32: logits at some places of 50 prompts (prose) of 1 to 4,096 tokens within 1e-4 of the largest logit, the loss within 1e-6, the
gradient of every parameter within 1e-5 of its norm (to a reference in f64), of a prompt of 200 tokens and of one of 1,000. bf16: mean k3 estimate of KL(f32 | bf16) per place at most 1e-3, or
transformers' own where that is more.
"""

import json
import math
import random
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from side import Side
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = 50
LONGEST = 4096
TEXTS = 10
SMALL = dict(vocab_size=2000, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=LONGEST, initializer_range=0.08, eos_token_id=None, bos_token_id=None, pad_token_id=None)
FAMILIES = {
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(tie_word_embeddings=False, head_dim=32),
    # Scaled as Llama 3.1 and later are, with a window of 1,024 before.
    "llama": dict(tie_word_embeddings=False,
                  rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}),
}


def random_model(family, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **FAMILIES[family]))
    for name, parameter in model.named_parameters():
        # Norms of one and biases of zero would show nothing.
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)


def text_ids(directory, config):
    """Random ones for a model without a tokenizer, or else prose of Wikipedia. Without the padding id, whose embedding transformers gives no gradient."""
    if not (Path(directory) / "tokenizer.json").exists():
        draw = random.Random(5)
        return [draw.randrange(config.vocab_size) for _ in range(5 * LONGEST)]
    rows = (ROOT / ".tools/prose/wikipedia.jsonl").read_text().splitlines()[:TEXTS]
    text = "\n".join(json.loads(row)["text"] for row in rows)
    ids = AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)
    return [number for number in ids if number != config.pad_token_id]


def prompts(ids, window):
    """Parts of the text, of lengths even on a logarithmic scale."""
    draw = random.Random(3)
    longest = min(LONGEST, window)
    lengths = [round(math.exp(math.log(longest) * index / (PROMPTS - 1))) for index in range(PROMPTS)]
    starts = [draw.randrange(len(ids) - length) for length in lengths]
    return [ids[start:start + length] for start, length in zip(starts, lengths)]


def places(prompt):
    """Eight, spread evenly from the first to the last."""
    return sorted({round(part * (len(prompt) - 1) / 7) for part in range(8)})


def check(name, found, limit):
    """Prints what was found; gives 1 where it is too much."""
    kept = found <= limit  # a NaN is not
    print(f"  {name}: {found:.2e} (at most {limit:.0e}{'' if kept else ': TOO MUCH'})")
    return int(not kept)


def divergence(exact, rounded):
    """k3 in expectation over the vocabulary: sum of p (e^r - 1 - r), a number a place."""
    true = exact.double().log_softmax(-1)
    ratio = rounded.double().log_softmax(-1) - true
    return (true.exp() * (ratio.exp() - 1 - ratio)).sum(-1).tolist()


def gradients(model, prompt):
    """Mean loss of a prompt's ids after the first, and its gradient by every parameter."""
    ids = torch.tensor([prompt])
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def errors(found, true):
    """Of each gradient, relative to its norm."""
    assert found.keys() == true.keys(), found.keys() ^ true.keys()
    return {name: ((found[name] - gradient).norm() / gradient.norm()).item() for name, gradient in true.items()}


def compare_gradients(exact, model, prompt):
    their_loss, their_gradients = gradients(model, prompt)
    _, true_gradients = gradients(model.double(), prompt)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradients.safetensors"
        loss = exact.do("gradients", ids=prompt, file=str(file))["loss"]
        our_gradients = load_file(file)
    failures = check(f"loss of {len(prompt)} tokens", abs(loss - their_loss), 1e-6 * max(1.0, their_loss))
    off, their_off = (errors(found, true_gradients) for found in (our_gradients, their_gradients))
    # A gradient that is a small difference of large numbers (a key's bias) is beyond f32: there, no worse than PyTorch.
    assert all(map(math.isfinite, off.values())), off
    name = max(off, key=lambda name: off[name] / max(1e-5, 1.5 * their_off[name]))
    failures += check(f"gradients to f64's, worst {name}", off[name], max(1e-5, 1.5 * their_off[name]))
    print(f"    (transformers' own: {their_off[name]:.2e})")
    return failures


def compare(engine, directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    config = model.config
    exact, rounded = Side(engine, directory, "f32"), Side(engine, directory, "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    worst, divergences, their_divergences = 0.0, [], []
    ids = text_ids(directory, config)
    for prompt in prompts(ids, config.max_position_embeddings):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0, places(prompt)]
            their_divergences += divergence(expected, theirs(torch.tensor([prompt])).logits[0, places(prompt)])
        ours = torch.tensor(exact.do("logits", ids=prompt, places=places(prompt))["logits"])
        worst = max(worst, ((ours - expected).abs().max() / expected.abs().max()).item())
        ours = torch.tensor(rounded.do("logits", ids=prompt, places=places(prompt))["logits"])
        divergences += divergence(expected, ours)
    failures = check("logits, relative", worst, 1e-4)
    mean, their_mean = (sum(values) / len(values) for values in (divergences, their_divergences))
    # What bf16 costs is the model's matter: where PyTorch can not keep the bound either, ours is to be no worse.
    failures += check("bf16, mean k3", mean, max(1e-3, 1.1 * their_mean))
    print(f"    (transformers' own bf16: {their_mean:.2e})")

    for length in (200, 1000):
        failures += compare_gradients(exact, model.float(), prompts(ids, min(length, config.max_position_embeddings))[-1])
    exact.close()
    rounded.close()
    return failures


def main():
    engine, *models = sys.argv[1:]
    failures = 0
    for model in models:
        print(model)
        with tempfile.TemporaryDirectory() as folder:
            if model in FAMILIES:
                random_model(model, folder)
            failures += compare(engine, folder if model in FAMILIES else model)
    sys.exit(f"{failures} differences are too large" if failures else 0)


main()
