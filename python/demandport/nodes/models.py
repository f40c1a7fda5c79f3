"""What models do besides generating text, and what is done with them: vectors, ranking, KV caches, unloading."""

from __future__ import annotations

from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import TypeMismatch
from demandport.graph.spec import Port
from demandport.inference.caches import KvCache
from demandport.inference.gateway import WHEN_BUSY, Gateway
from demandport.inference.requests import EmbedRequest, RerankRequest

Cache = Annotated[dict[str, Any], Port(type="kv_cache")]


@node("embedding", category="inference", outputs={"embedding": "embedding", "metadata": "json"})
async def embedding(
    ctx: Context, text: Annotated[Any, Port(type="any")], model: str | None = None, normalize: bool = True
) -> dict[str, Any]:
    """Turns a text, or each of a list of texts, into a vector: little-endian 32-bit floats in one binary.

    A text that is longer than the model reads at once is an error. Cancel stops the work between two batches.
    """
    texts = text if isinstance(text, list) else [text]
    request = EmbedRequest(tuple(texts), normalize=normalize)
    found = await _gateway(ctx).embed(request, model)
    metadata = {
        "model": found.model,
        "dimensions": found.dimensions,
        "count": len(found.vectors),
        "format": "float32-le",
        "prompt_tokens": found.usage.prompt_tokens,
    }
    return {"embedding": found.vectors if isinstance(text, list) else found.vectors[0], "metadata": metadata}


_RERANKER_OUTPUTS = {"results": "json", "scores": "json", "top_document": "any", "top_score": "number"}


@node("reranker", category="inference", outputs=_RERANKER_OUTPUTS)
async def reranker(
    ctx: Context,
    model_path: str,
    query: str,
    documents: list[Any],
    top_k: int | None = None,
    return_documents: bool = True,
) -> dict[str, Any]:
    """Scores documents by how well they answer the query, best first.

    A document is a text, or a map with its text under `text` or `content`. `scores` are in the order of the documents,
    `results` the best `top_k`, each `{index, score, document}`. Cancel stops the work between two batches.
    """
    if top_k is not None and top_k < 1:
        raise TypeMismatch(f"top_k must be at least 1, not {top_k}")
    request = RerankRequest(query, tuple(_text_of(document, at) for at, document in enumerate(documents)))
    scores = await _gateway(ctx).rerank(request, model_path)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results = [
        {"index": index, "score": scores[index]} | ({"document": documents[index]} if return_documents else {})
        for index in order[:top_k]
    ]
    best = order[0]
    return {"results": results, "scores": scores, "top_document": documents[best], "top_score": scores[best]}


def _text_of(document: Any, position: int) -> str:
    if isinstance(document, dict):
        document = document.get("text", document.get("content"))
    if not isinstance(document, str):
        raise TypeMismatch(f"documents[{position}] must be a text, or a map with a text under text or content")
    return document


@node("unload-model", category="inference", outputs={"status": "string", "trigger_passthrough": "any"})
async def unload_model(
    ctx: Context,
    model_ref: Annotated[Any, Port(type="model_handle")],
    trigger: Any = None,
    when_busy: str = "refuse",
) -> dict[str, Any]:
    """Unloads the model that `model_ref` names, and no other.

    `when_busy`: refuse (an error while it is in use), wait, or stop what it runs. `status` is unloaded or not_loaded.
    """
    if when_busy not in WHEN_BUSY:
        raise TypeMismatch(f"when_busy must be one of {', '.join(WHEN_BUSY)}, not {when_busy!r}")
    if not isinstance(model_ref, str) and not (isinstance(model_ref, dict) and isinstance(model_ref.get("id"), str)):
        raise TypeMismatch("model_ref must be what an inference node gave as its model_ref, or the name of a model")
    unloaded = await _gateway(ctx).unload_model(model_ref, when_busy)
    return {"status": "unloaded" if unloaded else "not_loaded", "trigger_passthrough": trigger}


# ------------------------------------------------------------------------------------------------------ KV caches


@node("kv-cache-save", category="inference", outputs={"kv_cache": "kv_cache", "name": "string", "bytes": "integer"})
async def kv_cache_save(ctx: Context, kv_cache: Cache, name: str) -> dict[str, Any]:
    """Saves what a model had computed under a name, so that it need not be computed again, also after a restart.

    The directory for it is configured. What is not in the model's cells any more is computed once more.
    """
    saved, size = await _gateway(ctx).save_cache(kv_cache, name)
    return {"kv_cache": saved, "name": name, "bytes": size}


@node("kv-cache-load", category="inference", outputs={"kv_cache": "kv_cache", "tokens": "integer"})
async def kv_cache_load(ctx: Context, name: str) -> dict[str, Any]:
    """Finds what was saved under a name; only the model file that it was computed by can use it."""
    cache = await _gateway(ctx).load_cache(name)
    return {"kv_cache": cache, "tokens": len(KvCache.from_plain(cache).tokens)}


@node("kv-cache-truncate", runs="inline", category="inference", outputs={"kv_cache": "kv_cache"})
def kv_cache_truncate(kv_cache: Cache, tokens: int) -> dict[str, Any]:
    """Keeps the first `tokens` tokens; a negative number leaves out that many at the end."""
    return KvCache.from_plain(kv_cache).truncated(tokens).to_plain()


def _gateway(ctx: Context) -> Gateway:
    gateway: Gateway = ctx.resources["gateway"]
    return gateway
