"""Writes a GGUF file again with every tensor in fp32, rounded as `pipelines/smollm2/convert.py` rounds: the same weights.

  .tools/gguf/bin/python tools/peers/unquantise.py MODEL.gguf OUT.gguf

llama.cpp quantises activations too where weights are quantised, so that nothing can be compared with the original file.
"""

import sys
from pathlib import Path

import numpy
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

# What the writer says of its own accord.
OWN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def nearest_bfloat16(values):
    bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32).astype(numpy.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(numpy.uint32).view(numpy.float32)


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    if out.exists():
        return
    reader = GGUFReader(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".partial")
    writer = GGUFWriter(temporary, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(OWN):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, nearest_bfloat16(dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(out)


if __name__ == "__main__":
    main()
