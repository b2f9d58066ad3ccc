"""Golden files: tiny random models in Hugging Face's format, and what transformers computes with them (logits,
log-probabilities, greedy ids, gradients).

    python make.py [NAME...]    writes the models and their numbers beside it; all of them if none is named
    python make.py --check      compares the numbers that are there with transformers again

Made with transformers 5.23, torch 2.11; a second run gives the same values.
"""

import json
import os
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

HERE = os.path.dirname(os.path.abspath(__file__))
VOCABULARY = 199
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
             max_position_embeddings=256)
GRADIENTS = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.q_proj.weight",
             "model.layers.1.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight",
             "model.layers.0.self_attn.k_norm.weight"]
# Scaled so that of the six frequencies some stay, some are divided and some lie between, within 40 positions.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# name -> (seed, model, options of save_pretrained)
MODELS = {
    "qwen2": (1, lambda: Qwen2ForCausalLM(Qwen2Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0})), {}),
    "llama": (2, lambda: LlamaForCausalLM(LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=12, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})), {"max_shard_size": "60KB"}),
    "llama3": (3, lambda: LlamaForCausalLM(LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True,
        rope_parameters=LLAMA3)), {}),
    "qwen3": (4, lambda: Qwen3ForCausalLM(Qwen3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0})), {}),
}


def randomise(model, seed):
    """Weights large enough that attention, norms and biases matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if name.endswith("norm.weight") or name.endswith("bias") else 0.25
        parameter.data = noise * scale + (1.0 if name.endswith("norm.weight") else 0.0)


def compute(model, seed):
    """What the tests compare with."""
    model.eval()
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=generator)
    out = {"ids": ids}
    with torch.no_grad():
        out["logits"] = model(ids).logits
        logprobs = torch.log_softmax(out["logits"][:, :-1].double() / 0.7, -1)
        out["logprobs"] = logprobs.gather(2, ids[:, 1:, None])[..., 0].float()
        prompts = [ids[0, :9], ids[1, :21]]
        greedy = [model.generate(p[None], attention_mask=torch.ones_like(p[None]), max_new_tokens=64, do_sample=False,
                                 eos_token_id=None, pad_token_id=0)[0, len(p):] for p in prompts]
        out["greedy"] = torch.stack(greedy)
    logits = model(ids).logits[:, :-1].reshape(-1, VOCABULARY)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1)).backward()
    parameters = dict(model.named_parameters())
    out |= {f"gradient.{key}": parameters[key].grad for key in GRADIENTS if key in parameters}
    return {key: value.contiguous() for key, value in out.items()}


def write(name):
    seed, build, options = MODELS[name]
    model = build()
    randomise(model, seed)
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    model.eval().save_pretrained(folder, **options)
    os.remove(os.path.join(folder, "generation_config.json"))
    out = compute(model, seed)
    save_file(out, os.path.join(folder, "expected.safetensors"))
    print(name, {key: tuple(value.shape) for key, value in out.items()}, json.dumps(model.config.to_diff_dict())[:80])


def check(name):
    seed, _, _ = MODELS[name]
    folder = os.path.join(HERE, name)
    stored = load_file(os.path.join(folder, "expected.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    found = compute(model, seed)
    assert stored.keys() == found.keys(), f"{name}: {sorted(stored.keys() ^ found.keys())}"
    for key, value in found.items():
        difference = (value.double() - stored[key].double()).abs().max().item()
        print(f"{name} {key}: {difference:.1e}")
        assert difference < 1e-5, f"{name}: {key} differs from transformers by {difference}"


torch.set_num_threads(1)
if sys.argv[1:] == ["--check"]:
    for name in MODELS:
        check(name)
else:
    for name in sys.argv[1:] or MODELS:
        write(name)
