"""Log-probabilities are what the model's own scores say, worked out here by numpy from a decode of their own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
import llama_cpp

from batching import Bench
from demandport.inference.caches import KvCache
from demandport.inference.library import tiny_path
from demandport.llama.model import Model

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model():
    found = Model(tiny_path(), sequences=4, threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def scores_of():
    """The log-probabilities of all tokens after each of some, all computed in one decode of a context of its own."""
    alone = Model(tiny_path(), threads=1)

    def scores(tokens):
        alone.forget(0)
        alone.batch.clear()
        alone.batch.extend(tokens, 0, 0, every=True)
        alone.decode()
        found = [llama_cpp.llama_get_logits_ith(alone.context, index) for index in range(len(tokens))]
        logits = np.array([np.ctypeslib.as_array(one, shape=(alone.tokens,)) for one in found], np.float64)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    yield scores
    alone.close()


def generated(model, id=1, **parameters):
    bench = Bench(model)
    for other in range(10, 12):  # others in the same decodes have other scores
        bench.raw(other, "Cats are small", 12)
    bench.raw(id, PROMPT, **parameters)
    bench.run()
    tokens = KvCache.from_plain(bench.result(id)["kv_cache"]).tokens
    return bench.text(id), bench.result(id), list(tokens)


@pytest.mark.parametrize("others", [0, 1, 5, 20])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.3, "seed": 3, "repeat_penalty": 1.5}, {"grammar": "root ::= [x-z]{30}"}]
)
def test_they_are_the_models_own_before_temperature_penalties_and_grammar(model, scores_of, others, how):
    text, result, tokens = generated(model, logprobs=others, **how)
    entries, start = result["logprobs"], result["usage"]["prompt_tokens"]
    chosen = tokens[start:]
    assert len(entries) == len(chosen) == 10
    scores = scores_of(tokens)[start - 1 : -1]
    assert np.allclose([entry["logprob"] for entry in entries], scores[np.arange(10), chosen], atol=1e-4)
    assert np.isclose(np.exp(scores).sum(axis=1), 1.0).all()
    for entry, token, row in zip(entries, chosen, scores, strict=True):
        assert entry["token"] == model.piece(token).decode("utf-8", "replace")
        top = [one["logprob"] for one in entry["top"]]
        assert len(top) == others and all(before >= after for before, after in pairwise(top))
        assert np.allclose(top, np.sort(row)[::-1][:others], atol=1e-4)
        best = [model.piece(int(one)).decode("utf-8", "replace") for one in np.argsort(-row)[:others]]
        assert sorted(one["token"] for one in entry["top"]) == sorted(best)
        assert sum(map(np.exp, top)) <= 1.0 + 1e-9
    assert "".join(entry["token"] for entry in entries) == text


def test_greedy_takes_the_first_of_the_top(model):
    _, result, _ = generated(model, logprobs=3)
    for entry in result["logprobs"]:
        assert entry["top"][0] == {"token": entry["token"], "logprob": entry["logprob"]}


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "seed": 3}, {"grammar": "root ::= [x-z]{30}"}])
def test_to_ask_for_them_changes_no_text(model, how):
    plain, result, _ = generated(model, **how)
    assert "logprobs" not in result
    assert {generated(model, logprobs=others, **how)[0] for others in (0, 20)} == {plain}


def test_tokens_that_are_parts_of_characters_are_told_too(model):
    text, result, _ = generated(model, logprobs=0, tokens=8, grammar='root ::= "🙂🙂" [a-z]{9}')
    assert text.startswith("🙂") and len(result["logprobs"]) == 8
    assert any("\ufffd" in entry["token"] for entry in result["logprobs"])


def test_the_token_that_ends_the_text_is_none_of_it(model):
    _, result, _ = generated(model, logprobs=0, tokens=9, grammar='root ::= "a"')
    assert (result["finish_reason"], [one["token"] for one in result["logprobs"]]) == ("stop", ["a"])
