"""Train the tiny model that the package ships, and write it as a GGUF file.

    python tools/tiny_model/train.py --out python/demandport/data/tiny.gguf

The text comes from `corpus.py`; llama.cpp itself tokenises it, so that training and inference cannot
disagree; torch trains on the CPU; at the end the logits of the written file in llama.cpp are compared with
those of torch.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import BOS, EOS, Corpus

SPECIALS = ("<|pad|>", BOS, EOS, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHUNKS = 2350  # whole words of the corpus that become one token each; the rest is spelled in bytes
DIM, LAYERS, HEADS, FEED, CONTEXT = 96, 4, 3, 256, 512
EPS, THETA = 1e-5, 10000.0
IGNORED = -100  # the target that cross_entropy leaves out

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# The pre-tokenizer "llama-bpe" in the syntax of `re`. It only picks the vocabulary, so being close is enough.
CHUNK = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\w]?[^\W\d_]+|\d{1,3}| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.IGNORECASE,
)


# --- tokenizer ----------------------------------------------------------------------------------------------


def byte_letters() -> list[str]:
    """Return the printable letter that GPT-2 vocabularies use for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]


def build_vocabulary(seed: int, documents: int = 20_000) -> list[str]:
    """Return the tokens: specials, bytes, then the most frequent chunks of the corpus."""
    corpus, counts = Corpus(seed), Counter()
    for _ in range(documents):
        for text, trained in corpus.document():
            if trained:  # the noise of unknown prompts must not take places in the vocabulary
                for part in re.split(r"<\|\w+\|>", text):
                    counts.update(CHUNK.findall(part))
    letters = byte_letters()
    words = ["".join(letters[byte] for byte in chunk.encode()) for chunk in counts]
    ranked = sorted(zip(words, counts.values(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    chunks = [word for word, _ in ranked if len(word) > 1][:CHUNKS]
    covered = sum(count for word, count in ranked if word in set(chunks) or len(word) == 1)
    print(f"{len(ranked)} different chunks; the vocabulary covers {covered / counts.total():.2%} of the text")
    return [*SPECIALS, *letters, *chunks]


def write_gguf(path: Path, tokens: list[str], weights: dict[str, np.ndarray] | None) -> None:
    """Write the model, or only its vocabulary; replace `path` in one step: nobody reads half a file."""
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name("demandport-tiny")
    writer.add_description("A very small model for tests and demos, trained on generated text")
    writer.add_license("Apache-2.0")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    # "llama-bpe" looks a whole chunk up in the vocabulary before it merges, so no merges have to be learned.
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    # An empty list does not load. This merge can never match: merging starts from single letters.
    writer.add_token_merges([f"{SPECIALS[0]} {SPECIALS[0]}"])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_eot_token_id(tokens.index("<|end|>"))
    writer.add_pad_token_id(tokens.index("<|pad|>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in (weights or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


class Tokenizer:
    """llama.cpp's own tokenizer, loaded from a file that holds nothing but the vocabulary."""

    def __init__(self, tokens: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write_gguf(path, tokens, None)
            params = llama_cpp.llama_model_default_params()
            params.vocab_only = True
            params.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp does not load the vocabulary")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.cache: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text; markers such as <|user|> become control tokens."""
        if text not in self.cache:
            data = text.encode()
            room = len(data) + 8
            ids = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, False, True)
            if len(self.cache) > 50_000:
                self.cache.clear()
            self.cache[text] = ids[:count]
        return self.cache[text]


# --- data ---------------------------------------------------------------------------------------------------


def rows(corpus: Corpus, tokenizer: Tokenizer, width: int, long_share: float) -> Iterator[tuple[list, list]]:
    """Yield (inputs, targets) for ever. A row begins with a document and is cut where it is full."""
    while True:
        ids: list[int] = []
        kept: list[bool] = []
        while len(ids) <= width:
            for text, trained in corpus.document(long_share):
                part = tokenizer(text)
                ids += part
                kept += [trained] * len(part)
        targets = [token if keep else IGNORED for token, keep in zip(ids, kept, strict=True)]
        yield ids[:width], targets[1 : width + 1]


# --- model --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer of the llama architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = nn.RMSNorm(DIM, EPS), nn.RMSNorm(DIM, EPS)
        self.attn_q, self.attn_k, self.attn_v, self.attn_output = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.ffn_gate, self.ffn_up = nn.Linear(DIM, FEED, bias=False), nn.Linear(DIM, FEED, bias=False)
        self.ffn_down = nn.Linear(FEED, DIM, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention, then the gated feed-forward layer."""
        batch, length, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            layer(h).view(batch, length, HEADS, -1).transpose(1, 2) for layer in (self.attn_q, self.attn_k, self.attn_v)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, length, DIM))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on neighbouring pairs, as llama.cpp has them here: nothing is permuted."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Model(nn.Module):
    """A llama with tied embeddings; the attribute names follow the tensor names of GGUF."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(vocabulary, DIM)
        self.blk = nn.ModuleList(Block() for _ in range(LAYERS))
        self.output_norm = nn.RMSNorm(DIM, EPS)
        half = DIM // HEADS // 2
        angles = torch.arange(CONTEXT)[:, None] * THETA ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blk:  # the usual scaling keeps the residual stream small at the start
            for layer in (block.attn_output, block.ffn_down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of every position."""
        x, length = self.token_embd(ids), ids.shape[1]
        for block in self.blk:
            x = block(x, self.cos[:length], self.sin[:length])
        return F.linear(self.output_norm(x), self.token_embd.weight)


def train(model: Model, tokenizer: Tokenizer, steps: int, seed: int) -> float:
    """Train in place and return the mean loss of the last steps."""
    corpus = Corpus(seed)
    # Most steps use short rows, which are cheap; without long rows at the end, text past 200 tokens decays.
    short, long = rows(corpus, tokenizer, 192, 0.03), rows(corpus, tokenizer, CONTEXT, 0.30)
    switch = int(steps * 0.8)
    decay = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95))
    losses, started = [], time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - 50) / max(1, steps - 50))
        rate = 5e-3 * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        source, count = (short, 8) if step < switch else (long, 3)
        inputs, targets = map(torch.tensor, zip(*(next(source) for _ in range(count)), strict=True))
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step + 1}/{steps}  loss {mean:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


# --- check --------------------------------------------------------------------------------------------------


def check(path: Path, model: Model, tokenizer: Tokenizer) -> float:
    """Return the largest difference between the logits of llama.cpp and those of torch on one text."""
    text = f"{BOS}<|user|>\nTell me about cats.<|end|>\n<|assistant|>\nCats are small mammals. ☕ é"
    ids = tokenizer(text)
    loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not loaded:
        raise RuntimeError("llama.cpp does not load the model")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = CONTEXT
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32  # f16 cells would hide a small mistake
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it also rounds to f16
    context = llama_cpp.llama_init_from_model(loaded, params)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
            token,
            i,
            1,
            0,
            1,
        )
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama.cpp does not decode")
    size = model.token_embd.num_embeddings
    theirs = np.stack(
        [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (size,)) for i in range(len(ids))]
    )
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    difference = float(np.abs(theirs - ours).max())
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded)
    return difference


def main() -> None:
    """Parse the command line and run all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    started = time.monotonic()
    silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokens = build_vocabulary(args.seed)
    tokenizer = Tokenizer(tokens)
    model = Model(len(tokens))
    print(f"{len(tokens)} tokens, {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    loss = train(model, tokenizer, args.steps, args.seed + 1)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    write_gguf(args.out, tokens, weights)
    difference = check(args.out, model, tokenizer)
    print(f"loss {loss:.3f}, logits differ by at most {difference:.1e} from llama.cpp's")
    print(f"{args.out}: {args.out.stat().st_size} bytes, {time.monotonic() - started:.0f} s in all")
    if not difference < 1e-3:
        raise SystemExit("the logits of llama.cpp and torch differ")


if __name__ == "__main__":
    main()
