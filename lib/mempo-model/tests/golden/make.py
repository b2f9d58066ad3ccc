"""Writes the golden files beside it: two tiny random models in Hugging Face's format, and what transformers computes
with them (logits, log-probabilities, greedy ids, gradients).

    python make.py        made with transformers 5.23, torch 2.11; a second run gives the same values
"""

import json
import os
import shutil

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
SIZES = dict(vocab_size=199, hidden_size=32, intermediate_size=56, num_hidden_layers=2, max_position_embeddings=256)
GRADIENTS = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.q_proj.weight",
             "model.layers.1.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight"]


def randomise(model, seed):
    """Weights large enough that attention and biases matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if name.endswith("norm.weight") or name.endswith("bias") else 0.25
        parameter.data = noise * scale + (1.0 if name.endswith("norm.weight") else 0.0)


def make(name, model, seed, **save):
    torch.set_num_threads(1)
    randomise(model, seed)
    model.eval()
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **save)
    os.remove(os.path.join(folder, "generation_config.json"))
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, 199, (2, 40), generator=generator)
    out = {"ids": ids}
    with torch.no_grad():
        out["logits"] = model(ids).logits
        logprobs = torch.log_softmax(out["logits"][:, :-1].double() / 0.7, -1)
        out["logprobs"] = logprobs.gather(2, ids[:, 1:, None])[..., 0].float()
        prompts = [ids[0, :9], ids[1, :21]]
        greedy = [model.generate(p[None], attention_mask=torch.ones_like(p[None]), max_new_tokens=64, do_sample=False,
                                 eos_token_id=None, pad_token_id=0)[0, len(p):] for p in prompts]
        out["greedy"] = torch.stack(greedy)
    loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 199), ids[:, 1:].reshape(-1))
    loss.backward()
    out |= {f"gradient.{key}": model.get_parameter(key).grad for key in GRADIENTS}
    save_file({key: value.contiguous() for key, value in out.items()}, os.path.join(folder, "expected.safetensors"))
    print(name, {key: tuple(value.shape) for key, value in out.items()}, json.dumps(model.config.to_diff_dict())[:80])


make("qwen2", Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2,
     tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0})), 1)
make("llama", LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=12,
     tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})), 2,
     max_shard_size="60KB")
