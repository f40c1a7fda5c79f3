"""Writes a GGUF model of a realistic size with random weights: speed does not depend on what the weights are.

    python bench/random_model.py OUT [--layers N]

Shape and type of SmolLM-135M, Q8_0; vocabulary and chat template are those of the packaged tiny model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

TINY = Path(__file__).resolve().parent.parent / "python/demandport/data/tiny.gguf"
DIM, FEED, HEADS, KV_HEADS, HEAD = 576, 1536, 9, 3, 64


def write(path: Path, layers: int = 30) -> None:
    """Write the model to `path`; about 110 MB with 30 layers."""
    tiny = gguf.GGUFReader(TINY)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random-{layers}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(2048)
    writer.add_embedding_length(DIM)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD)
    for name, field in tiny.fields.items():
        if name.startswith("tokenizer."):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[0] if inner else None)
    random = np.random.default_rng(7)

    def quantised(name: str, rows: int, columns: int) -> None:
        weights = random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    quantised("token_embd.weight", len(tiny.fields["tokenizer.ggml.tokens"].contents()), DIM)
    writer.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(DIM, np.float32))
        quantised(f"blk.{layer}.attn_q.weight", HEADS * HEAD, DIM)
        quantised(f"blk.{layer}.attn_k.weight", KV_HEADS * HEAD, DIM)
        quantised(f"blk.{layer}.attn_v.weight", KV_HEADS * HEAD, DIM)
        quantised(f"blk.{layer}.attn_output.weight", DIM, HEADS * HEAD)
        quantised(f"blk.{layer}.ffn_gate.weight", FEED, DIM)
        quantised(f"blk.{layer}.ffn_up.weight", FEED, DIM)
        quantised(f"blk.{layer}.ffn_down.weight", DIM, FEED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    write(arguments.out, arguments.layers)
