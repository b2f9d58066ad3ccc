"""Speed of the engine on a GPU, beside what the GPU allows: `gpu.py ENGINE [tiny|0.5b|1.5b|7b]...`

Models of the true shapes with random weights are made on the spot. For each: parity of bf16 with f32 on the CPU, which
kernels attention runs on, generation at batches of 16, 64 and 256, supervised training, answer-probability passes, the
optimizer's update, and the memory in use at the end. Floors are those of the work's floating-point operations and of the
bytes it has to move, at the rates measured in the same run. Runs on a CPU, too, to try the script.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from side import Side

SHAPES = {
    "tiny": dict(vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True),
    "0.5b": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "1.5b": dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
    "7b": dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False),
}


class Model:
    def __init__(self, name):
        self.name, self.shape = name, SHAPES[name]
        size, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        self.keys = size * self.shape["num_key_value_heads"] // self.shape["num_attention_heads"]
        self.layers = self.shape["num_hidden_layers"]
        self.body = self.layers * (2 * size * size + 2 * size * self.keys + 3 * size * inner)
        self.head = self.shape["vocab_size"] * size
        self.total = self.body + self.head * (1 if self.shape["tie_word_embeddings"] else 2)
        # Floating-point operations per query and key, and bytes of the cache per token.
        self.pair = 4 * self.layers * size
        self.cached = 4 * self.layers * self.keys

    def write(self, directory):
        """Random weights under Hugging Face's names, a layer a shard."""
        size, inner, keys = self.shape["hidden_size"], self.shape["intermediate_size"], self.keys
        config = dict(self.shape, architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu",
                      max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6, torch_dtype="bfloat16")
        (directory / "config.json").write_text(json.dumps(config))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random_of = lambda *shape: (0.02 * torch.randn(*shape, device=device)).bfloat16().cpu()
        ones, zeros = (lambda n: torch.ones(n, dtype=torch.bfloat16)), (lambda n: torch.zeros(n, dtype=torch.bfloat16))
        shards = [{"model.embed_tokens.weight": random_of(self.shape["vocab_size"], size), "model.norm.weight": ones(size)}]
        if not self.shape["tie_word_embeddings"]:
            shards.append({"lm_head.weight": random_of(self.shape["vocab_size"], size)})
        for layer in range(self.layers):
            part = {"input_layernorm.weight": ones(size), "post_attention_layernorm.weight": ones(size),
                    "self_attn.o_proj.weight": random_of(size, size), "mlp.gate_proj.weight": random_of(inner, size),
                    "mlp.up_proj.weight": random_of(inner, size), "mlp.down_proj.weight": random_of(size, inner)}
            for name, width in (("q", size), ("k", keys), ("v", keys)):
                part[f"self_attn.{name}_proj.weight"] = random_of(width, size)
                part[f"self_attn.{name}_proj.bias"] = zeros(width)
            shards.append({f"model.layers.{layer}.{name}": tensor for name, tensor in part.items()})
        places = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(shard, directory / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, file))
        index = dict(metadata=dict(total_size=2 * self.total), weight_map=places)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def memory_in_use():
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"], capture_output=True, text=True)
        return out.stdout.strip().splitlines()[0]
    except (OSError, IndexError):
        return "unknown (no nvidia-smi)"


def line(name, units, seconds, floor):
    print(f"  {name}: {units / seconds:,.0f} tokens/s, {floor / seconds:.2f} of the limit", flush=True)


def generation(side, model, ids, limits, new):
    for batch in (16, 64, 256):
        prompt = 512 if model.name != "tiny" else 64
        prompts = [ids(prompt) for _ in range(batch)]
        arguments = dict(prompts=prompts, new=new, greedy=False)
        side.do("generate", **dict(arguments, new=8))
        seconds = side.do("generate", **arguments)["seconds"]
        context = prompt + new / 2
        step = max((2 * (model.body + model.head) + model.cached * batch * context) / limits["bytes"],
                   batch * (2 * (model.body + model.head) + model.pair * context) / limits["product_16384"])
        prefill = batch * (2 * model.body * prompt + model.pair * prompt**2 / 2) / limits["product_16384"]
        line(f"generate {batch} x ({prompt} + {new})", batch * new, seconds, prefill + new * step)


def training(side, model, ids, limits):
    count, length = (16, 2048) if model.name != "tiny" else (4, 256)
    lengths = [length * (1 + place % 4) // 4 for place in range(count)]
    tokens = sum(lengths)
    # 12 bytes a parameter and recomputed layers where the rest would not fit one GPU.
    small = model.name == "7b"
    found = side.do("train", sequences=[ids(one) for one in lengths], steps=4, tokens_per_micro_batch=8192, small=small)
    flops = 6 * (model.body + model.head) * tokens + sum(3 * model.pair * one**2 / 2 for one in lengths)
    line(f"SFT, {count} sequences of {min(lengths)} to {length}", tokens, found["seconds"], flops / limits["product_16384"])
    print(f"    MFU {flops / found['seconds'] / limits['product_16384']:.2f} of the measured product rate; "
          f"memory in use afterwards {memory_in_use()}")
    # Its norm, master weights and moments in and out, the gradient in and cleared, the bf16 copy made: in bytes a parameter.
    width = 2 if small else 4
    floor = (width + 8 + 4 * width + 2 * width + 4 + 2) * model.total / limits["bytes"]
    update = found["update_seconds"]
    print(f"    the update of {model.total / 1e9:.2f} G parameters: {1e3 * update:.1f} ms, {floor / update:.2f} of the limit")


def scoring(side, model, ids, limits):
    count, length, answer = (64, 1024, 8) if model.name != "tiny" else (16, 128, 8)
    sequences = [ids(length) for _ in range(count)]
    side.do("answers", sequences=sequences[:2], answer=answer, tokens_per_batch=16384)
    seconds = side.do("answers", sequences=sequences, answer=answer, tokens_per_batch=16384)["seconds"]
    floor = count * (2 * model.body * length + 2 * model.head * answer + model.pair * length**2 / 2) / limits["product_16384"]
    line(f"answers after {count} contexts of {length}", count * length, seconds, floor)


def parity(engine, directory, side, prompt):
    """Largest difference between bf16 here and f32 on the CPU, relative to the largest logit."""
    exact = Side("env", "CUDA_VISIBLE_DEVICES=", engine, directory, "f32")
    logits = [torch.tensor(one.do("logits", ids=prompt, places=[0, 99, 199])["logits"]) for one in (exact, side)]
    exact.close()
    off = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    print(f"  logits, bf16 here and f32 on the CPU: {off:.1e} of the largest")


def bench(engine, name):
    model = Model(name)
    draw = random.Random(5)
    ids = lambda count: [draw.randrange(model.shape["vocab_size"]) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model.write(directory)
        side = Side(engine, directory, "bf16")
        limits = side.do("limits")
        print(f"{name}: {model.total / 1e9:.2f} G parameters; products {limits['product_16384'] / 1e12:.1f} TFLOP/s, "
              f"copying {limits['bytes'] / 1e9:.0f} GB/s")
        print(f"  attention: {side.do('kernels')}")
        if model.total < 1e9:
            parity(engine, directory, side, ids(200))
        generation(side, model, ids, limits, 256 if name != "tiny" else 16)
        scoring(side, model, ids, limits)
        side.close()
        side = Side(engine, directory, "bf16")
        training(side, model, ids, limits)
        side.close()


def main():
    engine, *names = sys.argv[1:]
    for name in names or ["0.5b", "1.5b", "7b"]:
        bench(engine, name)


main()
