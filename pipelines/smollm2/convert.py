"""Writes a Llama-architecture GGUF file as a Hugging Face model directory in bf16.

  .tools/gguf/bin/python pipelines/smollm2/convert.py MODEL.gguf OUT

Tensor names and the query/key row order follow llama.cpp's own conversion, undone: rotary halves are interleaved in
GGUF and split in Hugging Face checkpoints. Quantised tensors are dequantised, then rounded to nearest-even bf16.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy
from gguf import GGUFReader
from gguf.quants import dequantize

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def field(reader, key):
    return reader.fields[key].contents()


def huggingface_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{BLOCK[part]}.{kind}"


def split_halves(weight, heads: int):
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def bfloat16(values) -> bytes:
    bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32).astype(numpy.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def read_weights(reader, heads: int, key_value_heads: int):
    for tensor in reader.tensors:
        name = huggingface_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name:
            values = split_halves(values, heads)
        elif "k_proj" in name:
            values = split_halves(values, key_value_heads)
        yield name, values.shape, bfloat16(values)


def write_safetensors(path: Path, weights) -> None:
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, shape, data in sorted(weights):
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        blobs.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in blobs:
            file.write(data)


def config(reader) -> dict:
    heads = field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": field(reader, "llama.embedding_length") // heads,
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "rms_norm_eps": float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def tokenizer(reader) -> dict:
    """Byte-level BPE with single digits; token type 3 marks control tokens."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    types = field(reader, "tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i, kind in enumerate(types) if kind == 3],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field(reader, "tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(reader) -> dict:
    tokens = field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        "chat_template": field(reader, "tokenizer.chat_template"),
        "model_max_length": field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    if out.exists():
        return
    reader = GGUFReader(source)
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    documents = {"config.json": config(reader), "tokenizer.json": tokenizer(reader), "tokenizer_config.json": tokenizer_config(reader)}
    documents["generation_config.json"] = {key: documents["config.json"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, document in documents.items():
        (temporary / name).write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    heads, key_value_heads = documents["config.json"]["num_attention_heads"], documents["config.json"]["num_key_value_heads"]
    write_safetensors(temporary / "model.safetensors", read_weights(reader, heads, key_value_heads))
    temporary.rename(out)


if __name__ == "__main__":
    main()
