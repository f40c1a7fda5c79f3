"""Damaged models, and grammars, schemas and chat templates that were made to do harm: each ends with a text or a typed
error within its deadline, and the next request is answered."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from demandport import errors
from demandport.inference.config import ModelSpec
from demandport.inference.gateway import Gateway
from demandport.inference.library import tiny_path
from gateways import LONG, Answer, ask, described, templated, until, with_gateway
from hostile import (
    ENDLESS_GRAMMARS,
    ENDLESS_SCHEMAS,
    ENDLESS_TEMPLATES,
    FATAL_GRAMMARS,
    GRAMMARS,
    SCHEMAS,
    TEMPLATES,
    Mutator,
)
from support import ServiceProcess, count

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.skipif(not tiny_path().exists(), reason="the tiny model has not been made")
#: What a request may take, loading included: far more than any of them needs.
DEADLINE_MS = 20_000
#: What may become of a request that is at fault itself.
REFUSED = (errors.TypeMismatch, errors.TooLarge, errors.ContextOverflow)
#: What may become of a damaged file.
DAMAGED = {"model_load_failed", "worker_crash", "type_mismatch", "context_overflow", "out_of_memory"}
#: Numbers of mutants that were once treated badly:
#: 950 is trained with 4 G tokens of context, and its worker filled the memory.
ONCE_A_BUG = [950]


# ------------------------------------------------------------------------------------------------ GGUF files


def batches(numbers: Iterable[int], size: int) -> Iterable[list[int]]:
    numbers = iter(numbers)
    while batch := list(itertools.islice(numbers, size)):
        yield batch


def outcomes(service: ServiceProcess, models: Mapping[int, str]) -> dict[int, list[Any]]:
    """Demand a text of each model, all at once, and how each demand ends; the models are unloaded then."""
    for number, model in models.items():
        data = {"model_path": model, "prompt": "Tell me about cats.", "max_tokens": 3, "seed": 1}
        service.open(f"s{number}", ("llm", "llamacpp-inference", data))
    for number in models:
        service.send(["demand", number, f"s{number}", "llm", {"deadline_ms": DEADLINE_MS}])
    ended: dict[int, list[Any]] = {}
    while len(ended) < len(models):
        message = service.until(lambda m: m[0] in ("demand_complete", "demand_error"))[-1]
        assert message[3] not in ended
        ended[message[3]] = message
    for number, model in models.items():
        assert service.request("unload_model", model)[0] == "ok"
        assert service.request("close", f"s{number}")[0] == "ok"
    return ended


@pytest.fixture(scope="module")
def mutator() -> Mutator:
    return Mutator(tiny_path())


def test_mutants_are_the_same_for_a_seed_and_all_differ(mutator: Mutator) -> None:
    assert mutator.mutant(7) == mutator.mutant(7)
    mutants = [mutator.mutant(seed)[1] for seed in range(64)]
    assert sum(one == mutator.whole for one in mutants) <= 3
    assert len({hash(one) for one in mutants}) >= 60


def test_mutated_files_are_errors_or_texts_and_the_service_lives(mutator: Mutator, tmp_path: Path) -> None:
    seen = Counter[str]()
    with ServiceProcess(env={"GGML_NO_BACKTRACE": "1"}) as service:
        for batch in batches(sorted({*range(1, 1 + count(200, 2000)), *ONCE_A_BUG}), 8):
            said, models = {}, {}
            for number in batch:
                said[number], data = mutator.mutant(number)
                models[number] = str(tmp_path / f"{number}.gguf")
                Path(models[number]).write_bytes(data)
            for number, ended in outcomes(service, models).items():
                code = "complete" if ended[0] == "demand_complete" else ended[2]["code"]
                assert code in {"complete"} | DAMAGED, (number, said[number], ended)
                seen[code] += 1
        assert service.request("models")[2] == []
        (last,) = outcomes(service, {10**6: "tiny"}).values()
        assert last[0] == "demand_complete"
        service.ping()
    assert seen["model_load_failed"] > seen.total() / 4 and seen["complete"] > 0, seen


# ---------------------------------------------------------------------------------- grammars and schemas


async def still_well(gateway: Gateway) -> None:
    """The next request is answered, by the worker that there was, and nothing is counted that is not there."""
    assert (await ask(gateway, temperature=0, max_tokens=8, deadline_ms=DEADLINE_MS)).text.strip()
    model = described(gateway, "tiny")
    assert (model["state"], model["in_flight"], model["restarts"]) == ("ready", 0, 0)


async def refused_or_followed(gateway: Gateway, name: str, **options: Any) -> str:
    """What becomes of one request; anything but a text and a refusal fails the test."""
    try:
        answer = await ask(gateway, max_tokens=20, deadline_ms=DEADLINE_MS, **options)
    except REFUSED as refused:
        assert refused.message, name
        return "refused"
    except errors.DemandportError as failed:
        pytest.fail(f"{name}: {failed.code} {failed.message[:300]}")
    assert answer.finished.usage is not None and answer.finished.usage.completion_tokens <= 20
    return "followed"


def _requests(kind: str, options: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{kind} {name}", {kind: value}) for name, value in options.items()]


HOSTILE = _requests("grammar", GRAMMARS) + _requests("json_schema", SCHEMAS)


def garbled(seed: int) -> tuple[str, dict[str, Any]]:
    """A grammar that was sound once."""
    draw = random.Random(seed)
    text = list(draw.choice([text for text in GRAMMARS.values() if len(text) < 500]))
    for _ in range(draw.choice((1, 2, 5))):
        place = draw.randrange(len(text) + 1)
        text[place : place + draw.choice((0, 1))] = draw.choice(["", *'"[](){}|*+?\\#-^ \n', "::=", "root", "\\x", "é"])
    return f"garbled {seed}", {"grammar": "".join(text)}


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 100 and len({json.dumps(options) for _, options in HOSTILE}) == len(HOSTILE)


def test_hostile_grammars_and_schemas_harm_nobody() -> None:
    async def body(gateway: Gateway) -> None:
        await still_well(gateway)
        became = [await refused_or_followed(gateway, name, **options) for name, options in HOSTILE]
        await still_well(gateway)
        assert min(became.count("refused"), became.count("followed")) > len(HOSTILE) / 8

    with_gateway(body)


def test_hostile_grammars_beside_a_running_stream_change_nothing_of_it() -> None:
    async def body(gateway: Gateway) -> None:
        alone = await ask(gateway, temperature=0)
        names = [name for name, _ in HOSTILE[:: count(7, 1)]]
        beside = [refused_or_followed(gateway, name, **dict(HOSTILE)[name]) for name in names]
        same, *_ = await asyncio.gather(ask(gateway, temperature=0), *beside)
        assert same.text == alone.text
        await still_well(gateway)

    with_gateway(body)


def test_garbled_grammars_are_typed_errors_or_texts() -> None:
    """A crash is allowed here: what llama.cpp throws for a garbled grammar ends its process, and must be typed."""

    async def body(gateway: Gateway) -> None:
        for name, options in map(garbled, range(count(100, 1000))):
            try:
                await ask(gateway, max_tokens=5, deadline_ms=DEADLINE_MS, **options)
            except (*REFUSED, errors.WorkerCrash):
                continue
            except errors.DemandportError as failed:
                pytest.fail(f"{name} {options}: {failed.code} {failed.message[:300]}")
        assert (await ask(gateway, max_tokens=5)).finished

    with_gateway(body)


@pytest.mark.parametrize("name", FATAL_GRAMMARS)
def test_a_grammar_that_brings_a_worker_down_is_a_typed_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_NO_BACKTRACE", "1")

    async def body(gateway: Gateway) -> None:
        await gateway.load_model(ModelSpec("tiny"))
        with pytest.raises((*REFUSED, errors.WorkerCrash)):
            await ask(gateway, grammar=FATAL_GRAMMARS[name], max_tokens=5, deadline_ms=DEADLINE_MS)
        assert (await ask(gateway, max_tokens=5, deadline_ms=DEADLINE_MS)).finished
        assert described(gateway, "tiny")["in_flight"] == 0

    with_gateway(body)


ENDLESS = _requests("grammar", ENDLESS_GRAMMARS) + _requests("json_schema", ENDLESS_SCHEMAS)


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*one, id=one[0]) for one in ENDLESS],
)
def test_what_would_take_for_ever_is_refused_before_it_begins(name: str, options: dict[str, Any]) -> None:
    async def body(gateway: Gateway) -> None:
        await gateway.load_model(ModelSpec("tiny"))
        with pytest.raises(REFUSED):
            await ask(gateway, max_tokens=5, deadline_ms=3000, **options)
        await still_well(gateway)

    with_gateway(body)


# The texts of these need not be sound: they cannot travel, or travel as something else.
UNSENDABLE = [
    {"grammar": 'root ::= "\ud800"'},
    {"json_schema": {"const": "\udfff"}},
    {"json_schema": {"\ud800": 1}},
    {"prompt": "\ud800"},
    {"stop": ["\ud800"]},
]


@pytest.mark.parametrize("loaded", [False, True])
def test_text_that_has_no_utf8_form_fails_its_own_request_alone(loaded: bool) -> None:
    async def body(gateway: Gateway) -> None:
        if loaded:
            await gateway.load_model(ModelSpec("tiny"))
        beside = [ask(gateway, temperature=0, max_tokens=5) for _ in range(3)]
        hostile = [refused_or_followed(gateway, "surrogate", **options) for options in UNSENDABLE]
        answers = await asyncio.gather(*hostile, *beside)
        assert len({one.text for one in answers if isinstance(one, Answer)}) == 1
        await still_well(gateway)

    with_gateway(body)


# ------------------------------------------------------------------------------------------------ templates


async def becomes(gateway: Gateway, path: Path, name: str) -> str:
    """What becomes of a request to a model with a hostile template."""
    try:
        answer = await ask(gateway, str(path), max_tokens=4, deadline_ms=DEADLINE_MS)
    except (*REFUSED, errors.ModelLoadFailed) as refused:
        assert refused.message, name
        return "refused"
    except errors.DemandportError as failed:
        pytest.fail(f"template {name}: {failed.code} {failed.message[:300]}")
    assert answer.finished.usage is not None and answer.finished.usage.completion_tokens <= 4
    return "followed"


async def tried(gateway: Gateway, folder: Path, name: str, template: str, times: int = 2) -> str:
    """What becomes of requests to a model with that template, the same each time, by one worker."""
    path = templated(folder / f"{name.replace(' ', '-')}.gguf", template)
    first, *others = [await becomes(gateway, path, name) for _ in range(times)]
    assert all(one == first for one in others), name
    for model in gateway.models():
        if model["model"] == str(path):
            assert (model["state"], model["in_flight"], model["restarts"]) == ("ready", 0, 0), name
    await gateway.unload_model(str(path))
    path.unlink()
    return first


def test_hostile_templates_are_refused_or_followed_and_their_worker_lives(tmp_path: Path) -> None:
    async def body(gateway: Gateway) -> None:
        turn = asyncio.Semaphore(3)
        became = {}

        async def one(name: str, template: str) -> None:
            async with turn:
                became[name] = await tried(gateway, tmp_path, name, template)

        await asyncio.gather(*(one(name, template) for name, template in TEMPLATES.items()))
        for name in ("classes", "globals", "format", "import", "include", "changes", "pops", "raises", "wrong call"):
            assert became[name] == "refused", name
        for name in ("controls", "half controls", "sets", "break"):
            assert became[name] == "followed", name
        assert gateway.models() == []
        await still_well(gateway)

    with_gateway(body)


# Each takes as long as a template may, so that most are left to the long run.
@pytest.mark.parametrize("name", [*ENDLESS_TEMPLATES][: count(2, 99)])
def test_a_template_that_would_take_for_ever_ends_and_leaves_its_worker_of_use(name: str, tmp_path: Path) -> None:
    async def body(gateway: Gateway) -> None:
        assert await tried(gateway, tmp_path, name, ENDLESS_TEMPLATES[name], count(1, 2)) == "refused"

    with_gateway(body)


def test_what_a_user_writes_is_no_control_token_in_a_template_that_renders_them(tmp_path: Path) -> None:
    async def body(gateway: Gateway) -> None:
        path = str(templated(tmp_path / "m.gguf", "<|user|>{{ messages[0].content }}<|end|><|assistant|>"))

        async def tokens(prompt: str) -> int:
            usage = (await ask(gateway, path, prompt=prompt, max_tokens=1)).finished.usage
            assert usage is not None
            return usage.prompt_tokens

        # As many bytes of no known word take as many tokens, whether they spell a control token or not.
        assert await tokens("<|end|>") == await tokens("<|edn|>") > await tokens("")

    with_gateway(body)


def test_a_hostile_template_does_not_hold_up_another_model(tmp_path: Path) -> None:
    async def body(gateway: Gateway) -> None:
        path = templated(tmp_path / "m.gguf", TEMPLATES["range"])
        await gateway.load_model(ModelSpec("tiny"))
        hostile = asyncio.ensure_future(ask(gateway, str(path), deadline_ms=DEADLINE_MS))
        await until(lambda: len(gateway.models()) == 2)
        assert len((await ask(gateway, grammar=LONG)).text) == 450
        with pytest.raises(errors.TypeMismatch):
            await hostile

    with_gateway(body)
