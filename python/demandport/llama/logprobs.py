"""How likely a chosen token was, and which others were, by the model's own scores."""

from __future__ import annotations

from typing import Any

from demandport.llama.model import Model


def logprobs(model: Model, index: int, token: int, others: int) -> dict[str, Any]:
    """The natural logarithm of a token's probability, before temperature, penalties and grammar.

    Args:
        index: of the output in the last decode.
        others: how many of the most likely tokens to list as well.

    Returns:
        ``{token, logprob, top: [{token, logprob}]}``; texts of tokens, with U+FFFD for parts of characters.
    """
    import numpy

    scores = model.logits(index).astype(numpy.float64)
    scores -= scores.max()
    scores -= numpy.log(numpy.exp(scores).sum())
    top = numpy.argpartition(-scores, others)[:others] if others else ()
    best = sorted((int(one) for one in top), key=lambda one: -scores[one])
    return _entry(model, token, scores) | {"top": [_entry(model, one, scores) for one in best]}


def _entry(model: Model, token: int, scores: Any) -> dict[str, Any]:
    return {"token": model.piece(token).decode("utf-8", "replace"), "logprob": float(scores[token])}
