"""LoRA adapters by request: random ones for the packaged model."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
from batching import Bench, decodes
from demandport.inference.library import tiny_path
from demandport.llama.model import Model
from model_files import write_adapter, write_bert

LONG = "Tell me about owls and where they live. " * 12


@pytest.fixture(scope="module")
def model():
    found = Model(tiny_path(), sequences=6, threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [str(write_adapter(folder / f"{seed}.gguf", tiny_path(), seed=seed)) for seed in (1, 2)]


def text(model, *adapters, prompt=LONG, **parameters):
    bench = Bench(model)
    bench.raw(1, prompt, 20, adapters=list(adapters), **parameters)
    bench.run()
    bench.result(1)
    assert bench.is_empty()
    return bench.text(1)


def test_an_adapter_changes_the_text_and_its_scale_how_much(model, files):
    base = text(model)
    texts = [base, *(text(model, {"path": path}) for path in files), text(model, {"path": files[0], "scale": -1.0})]
    assert len(set(texts)) == 4
    assert text(model, {"path": files[0]}) == text(model, {"path": files[0], "scale": 1.0}) == texts[1]
    assert text(model) == base, "it is gone afterwards"


@pytest.mark.parametrize("scale", [0, 0.0, -0.0])
def test_scale_zero_is_the_base_text(model, files, scale):
    assert text(model, {"path": files[0], "scale": scale}) == text(model)


def test_both_together_are_neither_alone(model, files):
    one, other = ({"path": path} for path in files)
    assert text(model, one, other) not in (text(model), text(model, one), text(model, other))


def test_each_of_many_at_once_gets_its_own(model, files):
    sets = [[], [{"path": files[0]}], [{"path": files[1]}], [{"path": files[0], "scale": 0.5}], []]
    alone = [text(model, *adapters) for adapters in sets]
    bench = Bench(model, chunk=24)
    for id, adapters in enumerate(sets):
        bench.raw(id, LONG, 20, adapters=adapters)
    while bench.scheduler.step():
        bench.check()
    assert [bench.text(id) for id in range(len(sets))] == alone and len(set(alone)) == 4
    assert bench.is_empty()


def test_no_decode_holds_sequences_with_different_adapters(model, files):
    bench = Bench(model, chunk=24)
    for id, adapters in enumerate([[], [{"path": files[0]}], [{"path": files[1]}], []]):
        bench.raw(id, LONG, 5, adapters=adapters)
    together = []

    def look():
        batch = model.batch.handle
        numbers = {batch.seq_id[index][0] for index in range(batch.n_tokens)}
        slots = [slot for slot in bench.scheduler._cells.taken if slot.number in numbers]
        together.append({slot.adapters for slot in slots} | {model._applied})

    with decodes(model, look):
        bench.run()
    assert all(len(sets) == 1 for sets in together) and len({next(iter(sets)) for sets in together}) == 3


def test_cells_are_shared_by_those_with_the_same_adapters_alone(model, files):
    bench, one = Bench(model), [{"path": files[0]}]
    for id, adapters in enumerate([[], one, [{"path": files[0], "scale": 0.5}], one, []]):
        bench.raw(id, LONG, 5, adapters=adapters)
        bench.run()
    prompt = bench.result(0)["usage"]["prompt_tokens"]
    spared = [bench.result(id)["usage"]["cached_tokens"] for id in range(5)]
    assert spared == [0, 0, 0, prompt - 1, prompt - 1]


def unusable(folder):
    good = write_adapter(folder / "good.gguf", tiny_path()).read_bytes()
    paths = {
        "another size": write_adapter(folder / "size.gguf", tiny_path(), rows=1),
        "no such tensor": write_adapter(folder / "tensor.gguf", tiny_path(), tensors=["blk.9.attn_q.weight"]),
        "another architecture": write_adapter(folder / "architecture.gguf", tiny_path(), architecture="bert"),
        "no adapter": write_adapter(folder / "kind.gguf", tiny_path(), kind="model"),
        "not LoRA": write_adapter(folder / "method.gguf", tiny_path(), method="other"),
        "a model": tiny_path(),
        "another model": write_bert(folder / "bert.gguf"),
        "text": folder / "text.gguf",
        "cut": folder / "cut.gguf",
        "folder": folder,
    }
    paths["text"].write_text("no adapter at all, but long enough for a header")
    paths["cut"].write_bytes(good[: len(good) // 2])
    return paths


def test_a_file_that_is_no_adapter_fails_its_own_request_alone(model, files, tmp_path):
    expected = text(model)
    for name, path in (unusable(tmp_path) | {"missing": tmp_path / "nowhere.gguf", "NUL": "a\0b"}).items():
        bench = Bench(model)
        for id, adapters in ((1, []), (2, [{"path": files[0]}, {"path": str(path)}]), (3, [])):
            bench.raw(id, LONG, 20, adapters=adapters)
        bench.run()
        code = "model_not_found" if name == "missing" else "model_load_failed"
        assert (bench.end(2), bench.text(2)) == (code, ""), name
        assert bench.text(1) == bench.text(3) == expected
        assert bench.is_empty()


def test_cancelled_ones_leave_nothing_applied(model, files):
    expected = text(model)
    for steps in range(4):
        bench = Bench(model, chunk=24)
        bench.raw(1, LONG, 20, adapters=[{"path": files[1]}])
        bench.raw(2, LONG, 20)
        bench.run(steps)
        bench.scheduler.settle_cancel(1)
        bench.run()
        assert bench.text(2) == expected and bench.is_empty()


def fail_next(model, monkeypatch):
    """Have the next decode fail in llama.cpp."""
    decode = model.decode

    def fail():
        monkeypatch.setattr(model, "decode", decode)
        model.batch.handle.token[0] = -5  # no such token
        decode()

    monkeypatch.setattr(model, "decode", fail)


def test_a_decode_that_fails_ends_those_in_it_and_no_one_that_waits(model, files, monkeypatch):
    bench = Bench(model)
    for id in range(model.sequences + 2):
        bench.raw(id, LONG, 8)
    bench.run(3)
    fail_next(model, monkeypatch)
    bench.run()
    ends = [bench.end(id) for id in range(model.sequences + 2)]
    assert ends == ["internal"] * model.sequences + ["done"] * 2 and bench.is_empty()
    assert text(model).startswith(bench.text(model.sequences))


def test_a_decode_that_fails_ends_none_whose_turn_it_was_not(model, files, monkeypatch):
    bench = Bench(model)
    bench.raw(1, LONG, 8, adapters=[{"path": files[0]}])
    bench.raw(2, LONG, 8)
    bench.run(4)
    fail_next(model, monkeypatch)
    bench.run()
    assert sorted([bench.end(1), bench.end(2)]) == ["done", "internal"] and bench.is_empty()
