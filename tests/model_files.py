"""Small models with random weights for tests, written by ggml's own package: LoRA adapters of the tiny model, and
models of BERT's kind that only read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter, PoolingType, TokenType

#: Texts for the models of BERT's kind are made of these; a letter alone is known too.
WORDS = ("cat", "dog", "owl", "rain", "bread", "light", "house", "sea", "tall", "small", "eats", "sleeps")
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_adapter(
    path: Path,
    base: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    size: float = 0.3,
    tensors: Iterable[str] = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.3.attn_output.weight"),
    rows: int = 0,
    **said: str,
) -> Path:
    """Write a LoRA adapter with random weights.

    Args:
        base: the model whose tensors it changes. size: standard deviation of its weights.
        rows: so many more than the model's tensors have, which makes it one of another model.
        said: in place of ``architecture``, ``kind`` (general.type) and ``method`` (adapter.type).
    """
    numbers = np.random.default_rng(seed)
    shapes = {tensor.name: tensor.shape for tensor in GGUFReader(base).tensors}
    writer = GGUFWriter(path, said.get("architecture", "llama"))
    writer.add_type(said.get("kind", "adapter"))
    writer.add_string("adapter.type", said.get("method", "lora"))
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name in tensors:
        columns, out = (int(one) for one in shapes.get(name, (96, 96)))
        writer.add_tensor(f"{name}.lora_a", _random(numbers, (rank, columns), size))
        writer.add_tensor(f"{name}.lora_b", _random(numbers, (out + rows, rank), size))
    return _written(writer, path)


def write_bert(path: Path, *, scores: bool = False, causal: bool | None = False, **options: Any) -> Path:
    """Write a model of BERT's kind with a vocabulary of `WORDS` and letters.

    Args:
        scores: it is a reranker, with the tensors that make a score of what it read.
        causal: what it says of its attention; None: nothing.
        options: ``seed``, ``context`` (64), ``pooling`` (CLS, or RANK with `scores`), ``template`` (for reranking).
    """
    width, layers, wide = 32, 2, 64
    numbers = np.random.default_rng(options.get("seed", 0))
    writer = GGUFWriter(path, "bert")
    writer.add_context_length(options.get("context", 64))
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    if causal is not None:
        writer.add_causal_attention(causal)
    writer.add_pooling_type(PoolingType(options.get("pooling", PoolingType.RANK if scores else PoolingType.CLS)))
    tokens = _add_words(writer)
    if "template" in options:
        writer.add_chat_template([{"name": "rerank", "template": options["template"]}])
    shapes = _bert_shapes(tokens, width, layers, wide, options.get("context", 64))
    if scores:
        shapes |= {"cls.weight": (width, width), "cls.bias": (width,)}
        shapes |= {"cls.output.weight": (1, width), "cls.output.bias": (1,)}
    for name, shape in shapes.items():
        norm = name.endswith("norm.weight")
        writer.add_tensor(name, np.ones(shape, np.float32) if norm else _random(numbers, shape, 0.3))
    return _written(writer, path)


def _add_words(writer: GGUFWriter) -> int:
    words = [*_SPECIALS, *(f"▁{word}" for word in (*WORDS, *_LETTERS)), *_LETTERS]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL] * len(_SPECIALS) + [TokenType.NORMAL] * (len(words) - len(_SPECIALS)))
    writer.add_token_type_count(2)
    for name, add in {
        "[CLS]": writer.add_bos_token_id,
        "[SEP]": writer.add_sep_token_id,
        "[UNK]": writer.add_unk_token_id,
        "[PAD]": writer.add_pad_token_id,
        "[MASK]": writer.add_mask_token_id,
    }.items():
        add(_SPECIALS.index(name))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_eos_token_id(_SPECIALS.index("[SEP]"))
    return len(words)


def _bert_shapes(tokens: int, width: int, layers: int, wide: int, context: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (tokens, width),
        "token_types.weight": (2, width),
        "position_embd.weight": (context, width),
    }
    norms = ["token_embd_norm"]
    for layer in range(layers):
        begin = f"blk.{layer}."
        norms += [f"{begin}attn_output_norm", f"{begin}layer_output_norm"]
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes |= {f"{begin}{part}.weight": (width, width), f"{begin}{part}.bias": (width,)}
        shapes |= {f"{begin}ffn_up.weight": (wide, width), f"{begin}ffn_up.bias": (wide,)}
        shapes |= {f"{begin}ffn_down.weight": (width, wide), f"{begin}ffn_down.bias": (width,)}
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def _random(numbers: np.random.Generator, shape: tuple[int, ...], size: float) -> Any:
    return numbers.normal(0.0, size, shape).astype(np.float32)


def _written(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
