"""Generations that go on from KV caches, in the cells and from files, on the packaged model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
from batching import Bench, decodes
from demandport.inference import caches
from demandport.inference.caches import KvCache
from demandport.inference.library import tiny_path
from demandport.inference.requests import GenerateRequest
from demandport.llama.model import Model
from model_files import write_adapter

PROMPT = "Tell me about owls and where they live. " * 8 + "Once upon a time"
THEN = " and then the owl"


@pytest.fixture(scope="module")
def model():
    found = Model(tiny_path(), sequences=4, threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def other():
    """The same file loaded once more: what a worker has that knows nothing of the first."""
    found = Model(tiny_path(), sequences=4, threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def greedy():
    """The most likely tokens after some, each computed from all before it at once, without scheduler or sampler."""
    alone = Model(tiny_path(), threads=1)

    def tokens_after(tokens, count):
        found = list(tokens)
        for _ in range(count):
            alone.forget(0)
            for start in range(0, len(found), 200):
                part = found[start : start + 200]
                alone.batch.clear()
                alone.batch.extend(part, start, 0, last=True)
                alone.decode()
            found.append(int(np.argmax(alone.logits(alone.batch.size - 1))))
        return found[len(tokens) :]

    yield tokens_after
    alone.close()


def first(model, **options):
    """A generation and the cache that it leaves."""
    bench = Bench(model)
    bench.raw(1, PROMPT, **options)
    bench.run()
    return bench.text(1), bench.result(1)["kv_cache"]


def go_on(model, cache, prompt=THEN, tokens=12, **options):
    bench = Bench(model)
    bench.raw(1, prompt, tokens, kv_cache=cache, **options)
    with decodes(model) as sizes:
        bench.run()
    assert bench.is_empty()
    return bench, sum(sizes)


def save(model, cache, path, **options):
    bench = Bench(model)
    request = {"prompt": "", "raw": True, "max_tokens": 1, "kv_cache": cache} | options
    bench.scheduler.submit(1, GenerateRequest.from_options(request), save=path)
    bench.run()
    assert bench.is_empty()
    return bench


def tokens_of(cache):
    return list(KvCache.from_plain(cache).tokens)


@pytest.mark.parametrize("tokens", [1, 2, 10])
def test_what_goes_on_is_what_is_computed_at_once(model, other, greedy, tokens):
    text, cache = first(model, tokens=tokens)
    start = tokens_of(cache)
    assert b"".join(map(model.piece, start)).decode() == PROMPT + text
    assert start[-tokens:] == greedy(start[:-tokens], tokens)
    whole = [*start, *model.tokenize(THEN, special=True)]
    expected = greedy(whole, 12)
    for one in (model, other, model):  # from what lies in the cells, and from nothing
        bench, _ = go_on(one, cache)
        assert tokens_of(bench.result(1)["kv_cache"]) == [*whole, *expected]
        assert bench.text(1) == b"".join(map(model.piece, expected)).decode()


def test_a_chat_goes_on_like_one_with_all_its_messages(model, other):
    asked = ["Tell me about cats.", "What is bread?", "Tell me about owls."]
    cache, messages = None, []
    for question in asked:
        messages.append({"role": "user", "content": question})
        part, whole = {"prompt": question, "kv_cache": cache}, {"messages": list(messages)}
        benches = [Bench(model), Bench(other)]
        for bench, options in zip(benches, (part, whole), strict=True):
            bench.scheduler.submit(1, GenerateRequest.from_options(options | {"temperature": 0, "max_tokens": 60}))
            bench.run()
        assert benches[0].result(1)["finish_reason"] == "stop"
        assert benches[0].text(1) == benches[1].text(1) != ""
        cache = benches[0].result(1)["kv_cache"]
        assert tokens_of(cache) == tokens_of(benches[1].result(1)["kv_cache"])
        messages.append({"role": "assistant", "content": benches[0].text(1)})


@pytest.mark.parametrize("cut", [1, 40, -1, -9])
def test_a_part_of_it_goes_on_from_there(model, greedy, cut):
    _, cache = first(model)
    part = KvCache.from_plain(cache).truncated(cut)
    bench, _ = go_on(model, part.to_plain())
    whole = [*part.tokens, *model.tokenize(THEN, special=True)]
    assert tokens_of(bench.result(1)["kv_cache"]) == [*whole, *greedy(whole, 12)]


def test_it_goes_on_with_no_more_than_what_it_holds(model, greedy):
    _, cache = first(model)
    bench, _ = go_on(model, cache, prompt="")
    assert tokens_of(bench.result(1)["kv_cache"]) == [*tokens_of(cache), *greedy(tokens_of(cache), 12)]


# --------------------------------------------------------------------------------------------------- from files


def test_a_saved_one_is_computed_no_more(model, tmp_path):
    _, cache = first(model)
    expected, _ = go_on(model, cache)
    done = save(model, cache, tmp_path / "mine.kv").result(1)
    assert done["bytes"] == (tmp_path / "mine.kv").stat().st_size and done["kv_cache"]["name"] == "mine"
    loaded = caches.read(tmp_path / "mine.kv").to_plain()
    assert tokens_of(loaded) == tokens_of(cache)
    with_nothing(model, loaded | {"file": str(tmp_path / "mine.kv")}, expected.text(1))


@pytest.mark.parametrize("cut", [-3, -40, 60])
def test_a_part_of_a_saved_one_is_computed_no_more(model, tmp_path, cut):
    _, cache = first(model)
    save(model, cache, tmp_path / "mine.kv")
    part = caches.read(tmp_path / "mine.kv").truncated(cut).to_plain()
    with_nothing(model, part | {"file": str(tmp_path / "mine.kv")}, go_on(model, part)[0].text(1))


def with_nothing(model, cache, expected):
    """A model that has computed nothing yet goes on from the file: it computes what is new alone."""
    fresh = Model(tiny_path(), sequences=2, threads=1)
    try:
        bench, computed = go_on(fresh, cache)
    finally:
        fresh.close()
    usage = bench.result(1)["usage"]
    assert bench.text(1) == expected and usage["cached_tokens"] == len(tokens_of(cache))
    assert computed == len(model.tokenize(THEN, special=True)) + usage["completion_tokens"] - 1


def test_what_is_not_in_the_cells_any_more_is_computed_to_be_saved(other, model, tmp_path):
    _, cache = first(model)
    save(model, cache, tmp_path / "one.kv")
    save(other, cache, tmp_path / "two.kv")
    assert caches.read(tmp_path / "one.kv").tokens == caches.read(tmp_path / "two.kv").tokens
    texts = [go_on(other, cache | {"file": str(tmp_path / name)})[0].text(1) for name in ("one.kv", "two.kv")]
    assert texts == [go_on(model, cache)[0].text(1)] * 2


def test_a_file_of_another_text_is_not_taken_for_this_one(model, other, tmp_path):
    _, cache = first(model)
    save(model, KvCache.from_plain(cache).truncated(5).to_plain(), tmp_path / "mine.kv")
    foreign = go_on(model, cache, prompt=" xyz")[0].result(1)["kv_cache"]
    save(model, foreign, tmp_path / "foreign.kv")
    for name in ("mine.kv", "foreign.kv"):
        assert go_on(other, cache | {"file": str(tmp_path / name)})[0].text(1) == go_on(model, cache)[0].text(1)


def test_a_state_that_llama_cpp_does_not_take_is_computed_anew(model, tmp_path):
    _, cache = first(model)
    save(model, cache, tmp_path / "mine.kv")
    state = caches.read_whole(tmp_path / "mine.kv")[1]
    expected = go_on(model, cache)[0].text(1)
    for number, wrong in enumerate([b"", state[: len(state) // 2], b"\xff" * len(state), state[4:]]):
        path = tmp_path / f"{number}.kv"
        caches.write(path, KvCache.from_plain(cache), wrong)
        fresh = Model(tiny_path(), sequences=2, threads=1)
        try:
            bench, _ = go_on(fresh, cache | {"file": str(path)})
            assert bench.text(1) == expected
        finally:
            fresh.close()


# ---------------------------------------------------------------------------------------------- what is refused


def refused(model, cache, **options):
    """The code with which it fails, while another goes on as if nothing had been."""
    bench = Bench(model)
    bench.raw(1, "Once upon a time", 8)
    bench.raw(2, THEN, 8, kv_cache=cache, **options)
    bench.raw(3, "Once upon a time", 8)
    bench.run()
    assert bench.text(1) == bench.text(3) != "" and bench.text(2) == "" and bench.is_empty()
    return bench.end(2)


def test_a_cache_of_another_model_is_refused(model, tmp_path):
    path = shutil.copy(tiny_path(), tmp_path / "other.gguf")
    with path.open("ab") as file:
        file.write(b"\0" * 32)
    changed = Model(path, threads=1)
    try:
        _, cache = first(changed)
    finally:
        changed.close()
    assert refused(model, cache) == "type_mismatch"


def test_a_cache_goes_with_its_adapters(model, other, tmp_path):
    files = [str(write_adapter(tmp_path / f"{seed}.gguf", tiny_path(), seed=seed)) for seed in (1, 2)]
    own = [{"path": files[0], "scale": 0.5}]
    _, cache = first(model, adapters=own)
    for wrong in ([], [{"path": files[0]}], [{"path": files[1], "scale": 0.5}], own * 2):
        assert refused(model, cache, adapters=wrong) == "type_mismatch"
    assert refused(model, first(model)[1], adapters=own) == "type_mismatch"
    expected = go_on(model, cache, adapters=own)[0].text(1)
    assert expected != go_on(model, cache | {"adapters": []})[0].text(1)
    save(model, cache, tmp_path / "mine.kv", adapters=own)
    assert go_on(other, cache | {"file": str(tmp_path / "mine.kv")}, adapters=own)[0].text(1) == expected


@pytest.mark.parametrize("token", [-1, 10**6, -(2**31)])
def test_tokens_that_the_model_has_not_are_refused(model, token):
    _, cache = first(model)
    wrong = KvCache.from_plain(cache | {}).to_plain()
    wrong["tokens"] = KvCache("", (*tokens_of(cache), token)).to_plain()["tokens"]
    assert refused(model, wrong) == "type_mismatch"


def test_more_than_the_context_holds_is_refused(model):
    _, cache = first(model)
    wrong = cache | {"tokens": KvCache("", tuple(tokens_of(cache) * 9)).to_plain()["tokens"]}
    assert refused(model, wrong) == "context_overflow"


@pytest.mark.parametrize("wrong", [{}, {"tokens": "?"}, {"file": "nowhere"}])
def test_what_is_no_cache_is_refused(model, wrong):
    _, cache = first(model)
    code = refused(model, cache | wrong if wrong else {})
    assert code == ("model_not_found" if "file" in wrong else "type_mismatch")


def test_a_damaged_file_fails_its_own_request_alone(model, tmp_path):
    _, cache = first(model)
    path = tmp_path / "mine.kv"
    save(model, cache, path)
    good = path.read_bytes()
    fresh = Model(tiny_path(), sequences=3, threads=1)
    try:
        for content in (b"", good[:100], good[:-1], good[:60] + b"\xff" + good[61:], good[:-5] + b"\xff" * 5):
            path.write_bytes(content)
            assert refused(fresh, cache | {"file": str(path)}) == "type_mismatch"
    finally:
        fresh.close()


def test_a_file_that_is_written_anew_while_the_request_waits_is_not_mixed_up(model, tmp_path):
    _, cache = first(model)
    path, expected = tmp_path / "mine.kv", go_on(model, cache)[0].text(1)
    save(model, cache, path)
    foreign = go_on(model, cache, prompt="", grammar="root ::= [x-z]{30}")[0].result(1)["kv_cache"]
    unlike = KvCache.from_plain(foreign)
    unlike = KvCache(unlike.fingerprint, (unlike.tokens[0], *unlike.tokens[:0:-1])).to_plain()
    fresh = Model(tiny_path(), sequences=1, threads=1)
    try:
        bench = Bench(fresh)
        bench.raw(1, "Hello", 5)
        bench.run(1)
        bench.raw(2, THEN, 12, kv_cache=cache | {"file": str(path)})
        bench.run(2)
        save(model, unlike, path)
        bench.run()
    finally:
        fresh.close()
    assert bench.end(1) == "done" and bench.text(2) == expected


def test_one_that_is_refused_for_its_file_counts_as_waiting_no_more(model, tmp_path):
    bench = Bench(model)
    bench.raw(1, THEN, 8, kv_cache=first(model)[1] | {"file": str(tmp_path / "nowhere.kv")})
    bench.run()
    assert bench.end(1) == "model_not_found" and bench.scheduler._unread == 0


def test_a_folder_that_cannot_be_written_fails_the_save_alone(model, tmp_path):
    _, cache = first(model)
    (tmp_path / "file").write_text("x")
    assert save(model, cache, tmp_path / "file" / "mine.kv").end(1) == "forbidden"
    assert go_on(model, cache)[0].end(1) == "done"
