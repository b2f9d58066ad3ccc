"""Loads a model directory that mempo wrote in transformers and compares it with what mempo computed.

    cargo run -p mempo-model --example resave -- SOURCE OUT DTYPE    writes OUT and OUT/mempo.safetensors
    python lib/mempo-model/tests/recheck.py OUT ...

Prints, per directory, the largest difference between the hidden states' logits and between log-probabilities.
"""

import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = load_file(f"{folder}/mempo.safetensors")
    with torch.no_grad():
        logits = model(expected["ids"]).logits.float()
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(2, expected["ids"][:, 1:, None])[..., 0]
    difference = (logits - expected["logits"]).abs().max().item()
    logprob_difference = (logprobs - expected["logprobs"]).abs().max().item()
    print(f"{folder}: {type(model).__name__} {model.dtype}, {sum(p.numel() for p in model.parameters())} parameters, "
          f"largest difference of logits {difference:.2e} (of {logits.abs().max().item():.1f}), of log-probabilities {logprob_difference:.2e}")
