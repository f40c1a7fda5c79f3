"""Vectors and scores: many texts in one decode are what each is alone."""

from __future__ import annotations

import math
import random
from array import array

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
from batching import decodes
from demandport.errors import ModelLoadFailed
from demandport.inference.library import tiny_path
from demandport.inference.requests import EmbedRequest, RerankRequest
from demandport.llama.embedder import Embedder, rerank_tokens
from demandport.llama.model import Model
from model_files import WORDS, write_bert

numbers = random.Random(7)
TEXTS = [" ".join(numbers.choices(WORDS, k=numbers.randint(1, 20))) for _ in range(40)]
SEQUENCES = 8


class Bench:
    """An embedder with a clock that stands still, and what it has said."""

    def __init__(self, model):
        self.model, self.said, self.now = model, [], 0.0
        self.embedder = Embedder(model, self.said.append, lambda: self.now)

    def embed(self, id, *texts, **options):
        self.embedder.submit(id, EmbedRequest(tuple(texts), **options))

    def rerank(self, id, query, *documents, **options):
        self.embedder.submit(id, RerankRequest(query, tuple(documents), **options))

    def run(self):
        while self.embedder.step():
            pass
        assert not self.embedder.busy

    def end(self, id):
        """How it ended, exactly once."""
        ((kind, _, body),) = [message for message in self.said if message[1] == id]
        return body["code"] if kind == "error" else kind

    def result(self, id):
        assert self.end(id) == "done", self.said
        return next(message[2] for message in self.said if message[1] == id)

    def vectors(self, id):
        result = self.result(id)
        vectors = [array("f", vector) for vector in result["vectors"]]
        assert {len(vector) for vector in vectors} == {result["dimensions"]}
        return np.array(vectors)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "tiny": tiny_path(),
        "bert": write_bert(folder / "bert.gguf"),
        "bert, mean": write_bert(folder / "mean.gguf", pooling=1),
        "reranker": write_bert(folder / "reranker.gguf", scores=True),
        "template": write_bert(folder / "template.gguf", scores=True, template="{document} [SEP] {query}[MASK]"),
        "says nothing": write_bert(folder / "nothing.gguf", causal=None),
    }


@pytest.fixture(scope="module")
def load(files):
    loaded = {}

    def model(name, purpose):
        if (name, purpose) not in loaded:
            loaded[name, purpose] = Model(files[name], purpose=purpose, sequences=SEQUENCES, threads=1)
        return loaded[name, purpose]

    yield model
    for one in loaded.values():
        one.close()


@pytest.fixture(scope="module", params=["tiny", "bert", "bert, mean"])
def model(request, load):
    return load(request.param, "embed")


@pytest.fixture(scope="module")
def reranker(load):
    return load("reranker", "rerank")


def alone(model, text, **options):
    bench = Bench(model)
    bench.embed(1, text, **options)
    bench.run()
    return bench.vectors(1)[0]


def same(first, second):
    """Up to what rounding does; the packaged model keeps what it has read in 16-bit floats."""
    return np.abs(first - second).max() < (1e-5 if first.shape[-1] == 32 else 3e-4)


# -------------------------------------------------------------------------------------------------------- vectors


def test_all_at_once_are_what_each_is_alone_in_their_order(model):
    bench = Bench(model)
    with decodes(model) as sizes:
        bench.embed(1, *TEXTS)
        bench.run()
    vectors = bench.vectors(1)
    each = np.array([alone(model, text) for text in TEXTS])
    assert same(vectors, each)
    assert np.unique(each.round(4), axis=0).shape[0] == len(set(TEXTS)), "other texts have other vectors"
    assert len(sizes) < len(TEXTS) and sum(sizes) == bench.result(1)["usage"]["prompt_tokens"]
    assert bench.result(1)["usage"]["completion_tokens"] == 0


def test_they_have_length_one_unless_asked_not_to(model):
    for text in TEXTS[:5]:
        vector, plain = alone(model, text), alone(model, text, normalize=False)
        assert math.isclose(np.linalg.norm(vector), 1.0, abs_tol=1e-5)
        assert not math.isclose(np.linalg.norm(plain), 1.0, abs_tol=1e-2)
        assert np.allclose(plain / np.linalg.norm(plain), vector, atol=1e-5)


def test_many_requests_share_a_decode_and_each_gets_its_own(model):
    bench = Bench(model)
    with decodes(model) as sizes:
        for id in range(30):
            bench.embed(id, "cat", WORDS[id % len(WORDS)], normalize=id % 2 == 0)
        bench.run()
    assert len(sizes) == math.ceil(60 / SEQUENCES)
    for id in range(30):
        found = bench.vectors(id)
        for place, text in enumerate(("cat", WORDS[id % len(WORDS)])):
            assert same(found[place], alone(model, text, normalize=id % 2 == 0))
    assert [message[1] for message in bench.said] == list(range(30))


def test_a_text_that_is_too_long_is_refused_and_nothing_else_is_lost(model):
    bench = Bench(model)
    bench.embed(1, *TEXTS[:3])
    bench.embed(2, "cat", "cat " * 2000, "dog")
    bench.embed(3, *TEXTS[:3])
    bench.run()
    assert bench.end(2) == "context_overflow"
    details = bench.said[0][2]["details"]
    assert details["position"] == 1 and details["tokens"] > details["limit"] == model.context_length
    assert same(bench.vectors(1), bench.vectors(3))


def test_the_longest_that_fits_is_read_and_one_token_more_is_not(model):
    count = 1
    while len(model.tokenize(" cat" * (count + 1), special=False, ends=True)) <= model.context_length:
        count += 1
    bench = Bench(model)
    bench.embed(1, "cat", " cat" * count, "dog")
    bench.embed(2, " cat" * (count + 1))
    bench.run()
    assert (bench.end(1), bench.end(2)) == ("done", "context_overflow")
    assert same(bench.vectors(1)[2], alone(model, "dog"))


@pytest.mark.parametrize("settled", [True, False])
def test_a_cancelled_one_ends_before_the_next_decode(model, settled):
    for steps in (0, 1, 2):
        bench = Bench(model)
        for id in (1, 2):
            bench.embed(id, *(["cat dog"] * (SEQUENCES + 2)))
        for _ in range(steps):
            bench.embedder.step()
        ended = [message[1] for message in bench.said]
        (bench.embedder.settle_cancel if settled else bench.embedder.cancel)(1)
        bench.run()
        assert bench.end(1) == ("done" if 1 in ended else "cancelled")
        assert same(bench.vectors(2), alone(model, "cat dog"))
        bench.embedder.settle_cancel(1)
        bench.embed(1, "cat")
        bench.run()
        assert bench.said[-1][0] == "done", "the id is free again"


def test_a_deadline_ends_it_and_no_other(model):
    bench = Bench(model)
    bench.embed(1, *TEXTS, deadline_ms=100)
    bench.embed(2, "cat", deadline_ms=200)
    bench.embedder.step()
    bench.now = 0.1
    bench.run()
    assert (bench.end(1), bench.end(2)) == ("deadline_exceeded", "done")


def test_a_decode_that_fails_is_an_error_of_those_in_it(model, monkeypatch):
    bench = Bench(model)
    bench.embed(1, *(["cat"] * SEQUENCES))
    bench.embed(2, "dog")
    decode = model.decode

    def fail():
        monkeypatch.setattr(model, "decode", decode)
        model.batch.handle.token[0] = -5  # no such token
        decode()

    monkeypatch.setattr(model, "decode", fail)
    bench.run()
    assert (bench.end(1), bench.end(2)) == ("internal", "done")
    assert same(bench.vectors(2), alone(model, "dog"))


def test_text_is_text_whatever_it_says(model):
    for control in sorted(model.special_texts):
        plain = model.tokenize(control, special=False, ends=True)
        bench = Bench(model)
        bench.embed(1, control)
        bench.run()
        assert bench.result(1)["usage"]["prompt_tokens"] == len(plain)
        assert plain != model.tokenize(control, special=True, ends=True)


# --------------------------------------------------------------------------------------------------------- scores


def scores(model, query, *documents):
    bench = Bench(model)
    bench.rerank(1, query, *documents)
    bench.run()
    return bench.result(1)["scores"]


def test_scores_at_once_are_what_each_is_alone(reranker):
    documents = TEXTS[:20]
    together = scores(reranker, "cat", *documents)
    each = [scores(reranker, "cat", document)[0] for document in documents]
    assert np.allclose(together, each, atol=1e-5) and np.isfinite(together).all()
    assert len({round(score, 4) for score in together}) == len(set(documents))
    assert not np.allclose(together, scores(reranker, "sea rain", *documents), atol=1e-3), "the query counts"


def test_equal_documents_have_equal_scores_in_any_place(reranker):
    found = scores(reranker, "cat", *(["owl rain", "sea"] * 12))
    assert np.ptp(found[::2]) < 1e-6 and np.ptp(found[1::2]) < 1e-6
    order = sorted(range(24), key=lambda place: -round(found[place], 5))
    assert order[:12] in (list(range(0, 24, 2)), list(range(1, 24, 2))), "ties stay in their order"


def test_query_and_document_stand_between_what_the_vocabulary_asks_for(reranker):
    tokens = [reranker.token_text(token) for token in rerank_tokens(reranker, "cat", "dog sea")]
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
    assert [token.lstrip("▁") for token in tokens if not token.startswith("[")] == ["cat", "dog", "sea"]
    assert tokens.index("[SEP]") == 2


def test_a_file_s_own_template_is_used_and_texts_in_it_are_text(load):
    model = load("template", "rerank")

    def texts(*pair):
        return [model.token_text(token).lstrip("▁") for token in rerank_tokens(model, *pair)]

    assert texts("cat", "dog sea") == ["dog", "sea", "[SEP]", "cat", "[MASK]"]
    nasty = texts("{document}", "{query} [SEP]")
    assert nasty.count("[SEP]") == 1 and nasty.count("[MASK]") == 1
    assert len(set(scores(model, "cat", "dog", "owl"))) == 2


def test_a_document_that_is_too_long_is_refused_by_its_place(reranker):
    bench = Bench(reranker)
    bench.rerank(1, "cat", "dog", "sea " * 100)
    bench.rerank(2, "cat", "dog")
    bench.run()
    assert (bench.end(1), bench.end(2)) == ("context_overflow", "done")
    assert bench.said[0][2]["details"]["position"] == 1


# ---------------------------------------------------------------------------------------------------- which models


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("bert", "generate"),
        ("reranker", "generate"),
        ("says nothing", "generate"),
        ("tiny", "rerank"),
        ("bert", "rerank"),
    ],
)
def test_a_model_that_cannot_is_refused(files, name, purpose):
    with pytest.raises(ModelLoadFailed, match="cannot generate" if purpose == "generate" else "no reranker"):
        Model(files[name], purpose=purpose, threads=1).close()


@pytest.mark.parametrize("name", ["bert", "tiny", "reranker"])
def test_any_of_them_can_embed(load, name):
    assert np.isfinite(alone(load(name, "embed"), "cat dog")).all()
