"""Writes a GGUF model of a realistic size with random weights: speed does not depend on what the weights are.

    python bench/random_model.py OUT [--layers N]

Shape and type of SmolLM-135M, Q8_0; tokenizer and chat template are those of the packaged tiny model. Its vocabulary is
filled up to the usual size with tokens that no text is made of.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

TINY = Path(__file__).resolve().parent.parent / "python/demandport/data/tiny.gguf"
DIM, FEED, HEADS, KV_HEADS, HEAD = 576, 1536, 9, 3, 64
VOCABULARY, CONTEXT = 49_152, 4096


def words() -> list[str]:
    """Words with a space before them, each of which is one token, of this model and of the packaged one."""
    tokens = gguf.GGUFReader(TINY).fields["tokenizer.ggml.tokens"].contents()
    return [" " + token[1:] for token in tokens if token[0] == "Ġ" and token[1:].isalpha() and token[1:].islower()]


def write(path: Path, layers: int = 30) -> None:
    """Write the model to `path`; 135 M parameters in 143 MB with 30 layers."""
    tiny = gguf.GGUFReader(TINY)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random-{layers}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(DIM)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD)
    tokens = tiny.fields["tokenizer.ggml.tokens"].contents()
    kinds = tiny.fields["tokenizer.ggml.token_type"].contents()
    padding = {
        "tokenizer.ggml.tokens": [f"<unused{number}>" for number in range(VOCABULARY - len(tokens))],
        "tokenizer.ggml.token_type": [gguf.TokenType.UNUSED] * (VOCABULARY - len(tokens)),
    }
    for name, field in tiny.fields.items():
        if name.startswith("tokenizer."):
            kind, *inner = field.types
            value = field.contents() + padding[name] if name in padding else field.contents()
            writer.add_key_value(name, value, kind, inner[0] if inner else None)
    random = np.random.default_rng(7)

    def normal(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    def quantised(name: str, weights: np.ndarray) -> None:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    quantised("token_embd.weight", normal(VOCABULARY, DIM) * _chosen(tokens, kinds)[:, np.newaxis])
    writer.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(DIM, np.float32))
        for part, rows, columns in (
            ("attn_q", HEADS * HEAD, DIM),
            ("attn_k", KV_HEADS * HEAD, DIM),
            ("attn_v", KV_HEADS * HEAD, DIM),
            ("attn_output", DIM, HEADS * HEAD),
            ("ffn_gate", FEED, DIM),
            ("ffn_up", FEED, DIM),
            ("ffn_down", DIM, FEED),
        ):
            quantised(f"blk.{layer}.{part}.weight", normal(rows, columns))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _chosen(tokens: list[str], kinds: list[int]) -> np.ndarray:
    """Of each token 1, or 0 where its weights are to be zero.

    The embedding is the output too: such a token never gets among the likely ones. So no generation ends early, and all
    that is generated is text, with no bytes among it that programs treat differently when they make no character.
    """
    chosen = np.zeros(VOCABULARY, np.float32)
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        chosen[number] = kind == gguf.TokenType.NORMAL and token.removeprefix("Ġ").isascii()
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    write(arguments.out, arguments.layers)
