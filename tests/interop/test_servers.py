"""The backends of servers against real ones: llama_cpp.server, llama-server where LLAMA_SERVER names its binary."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import aclosing

import pytest

from demandport import errors
from demandport.inference.backend import Finished, TextChunk
from demandport.inference.config import ModelSpec
from demandport.inference.llama_server import LlamaServerBackend
from demandport.inference.openai import OpenAIBackend
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from demandport.workers.process import kill_all, live_workers
from support import ROOT

pytest.importorskip("llama_cpp.server.app")
TINY = ROOT / "python" / "demandport" / "data" / "tiny.gguf"
pytestmark = pytest.mark.skipif(not TINY.exists(), reason="the tiny model has not been made")
LIMIT_S = 120.0
KEY = "sk-for-this-test"
ENDLESS = "Tell me a very long story."
LONG = "root ::= [a-z ]{450}"


def run(coroutine):
    async def limited():
        async with asyncio.timeout(LIMIT_S):
            await coroutine

    asyncio.run(limited())


async def collect(backend, **options):
    request = GenerateRequest.from_options({"prompt": "Tell me about cats.", **options})
    texts, end = [], None
    async with aclosing(backend.generate(request)) as events:
        async for event in events:
            assert end is None, "nothing comes after the end"
            if isinstance(event, TextChunk):
                texts.append(event.text)
            elif isinstance(event, Finished):
                end = event
    assert end is not None
    return texts, end


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process):
    """Return once the server answers; it fails when its process has ended."""
    until = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < until:
        try:
            request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"})
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.02)
    raise AssertionError(f"the server has not started: {process.poll()}")


# ------------------------------------------------------------------------------------------- llama_cpp.server


@pytest.fixture(scope="module")
def openai_url(tmp_path_factory):
    """Where `python -m llama_cpp.server` runs the tiny model, with a key."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(TINY), "--port", str(port)]
    options = ["--n_ctx", "512", "--n_threads", "1", "--api_key", KEY, "--logits_all", "True", "--embedding", "True"]
    more = ["--interrupt_requests", "False", "--model_alias", "tiny"]
    with log.open("w") as out:
        process = subprocess.Popen([*command, *options, *more], stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        wait_for(url, process)
        yield url
    finally:
        process.kill()
        process.wait()


def with_openai(body, monkeypatch, openai_url, key=KEY):
    monkeypatch.setenv("DEMANDPORT_TEST_KEY", key)

    async def main():
        backend = OpenAIBackend(ModelSpec("tiny", "openai", url=openai_url, api_key_env="DEMANDPORT_TEST_KEY"))
        try:
            await body(backend)
        finally:
            await backend.close()

    run(main())


def test_chat_streams_real_words(monkeypatch, openai_url):
    async def body(backend):
        assert await backend.load() == {"models": ["tiny"]}
        texts, end = await collect(backend, temperature=0, max_tokens=40)
        assert len(texts) > 5
        assert "cat" in "".join(texts).lower()
        assert end.finish_reason in ("stop", "length")
        assert end.model == "tiny"
        again, _ = await collect(backend, temperature=0, max_tokens=40)
        assert again == texts
        short, end = await collect(backend, temperature=0, max_tokens=3)
        assert (short, end.finish_reason) == (texts[:3], "length")

    with_openai(body, monkeypatch, openai_url)


def test_a_stop_string_and_a_seed_are_honoured(monkeypatch, openai_url):
    async def body(backend):
        texts, _ = await collect(backend, temperature=0, max_tokens=40)
        text = "".join(texts)
        stopped, end = await collect(backend, temperature=0, max_tokens=40, stop=["."])
        assert ("".join(stopped), end.finish_reason) == (text[: text.index(".")], "stop")
        seeded = [await collect(backend, temperature=1, seed=seed, max_tokens=20) for seed in (1, 1, 2, 3, 4)]
        assert seeded[0] == seeded[1]
        assert len({"".join(texts) for texts, _ in seeded}) > 1
        assert seeded[0][1].seed == 1

    with_openai(body, monkeypatch, openai_url)


def test_a_raw_prompt_is_completed_with_logprobs(monkeypatch, openai_url):
    async def body(backend):
        texts, end = await collect(backend, prompt="Cats are", raw=True, max_tokens=4, temperature=0, logprobs=2)
        assert texts
        assert end.logprobs and all(entry["logprob"] <= 0 and len(entry["top"]) <= 2 for entry in end.logprobs)
        assert "".join(entry["token"] for entry in end.logprobs) == "".join(texts)

    with_openai(body, monkeypatch, openai_url)


def test_a_wrong_key_and_a_long_prompt_are_typed(monkeypatch, openai_url):
    async def wrong(backend):
        with pytest.raises(errors.Forbidden) as failed:
            await backend.load()
        assert "sk-wrong" not in failed.value.message

    async def long(backend):
        # This server tells why only to who does not stream; a stream it breaks off.
        with pytest.raises(errors.BackendUnavailable, match="broke off"):
            await collect(backend, prompt="cats " * 2000, raw=True)

    with_openai(wrong, monkeypatch, openai_url, key="sk-wrong")
    with_openai(long, monkeypatch, openai_url)


def test_what_this_server_does_not_offer_is_an_error(monkeypatch, openai_url):
    async def body(backend):
        with pytest.raises(errors.DemandportError, match=r"response_format|json_schema"):
            await collect(backend, json_schema={"type": "object"})
        # The tiny model has no pooling, so the server gives a vector per token.
        with pytest.raises(errors.BackendUnavailable, match="pool"):
            await backend.embed(EmbedRequest(("cats", "dogs")))

    with_openai(body, monkeypatch, openai_url)


def test_leaving_early_frees_the_server_for_the_next(monkeypatch, openai_url):
    async def body(backend):
        for _ in range(3):
            events = backend.generate(GenerateRequest(prompt=ENDLESS, temperature=1.0))
            assert isinstance(await anext(events), TextChunk)
            await events.aclose()
        _, end = await collect(backend, max_tokens=3)
        assert end.finish_reason == "length"
        with pytest.raises(errors.DeadlineExceeded):
            await collect(backend, deadline_ms=1)

    with_openai(body, monkeypatch, openai_url)


# ----------------------------------------------------------------------------------------------- llama-server

SCHEMA = {
    "type": "object",
    "properties": {"legs": {"type": "integer"}},
    "required": ["legs"],
    "additionalProperties": False,
}
needs_binary = pytest.mark.skipif("LLAMA_SERVER" not in os.environ, reason="LLAMA_SERVER names no binary")


def with_llama_server(body, path=TINY, purpose=None, **options):
    spec = ModelSpec(
        "tiny", "llama-server", binary=os.environ["LLAMA_SERVER"], context_length=512, threads=1, **options
    )

    async def main():
        backend = LlamaServerBackend(spec, path, purpose=purpose)
        try:
            await body(backend)
        finally:
            await backend.close()

    try:
        run(main())
        assert live_workers() == []
    finally:
        kill_all()


@needs_binary
def test_llama_server_streams_and_honours_its_own_parameters():
    async def body(backend):
        assert (await backend.load())["context_length"] == 512
        texts, end = await collect(backend, temperature=0, max_tokens=20)
        assert "cat" in "".join(texts).lower()
        assert (end.usage.completion_tokens, end.model) == (20, "tiny")
        again, end = await collect(backend, temperature=0, max_tokens=20, logprobs=0)
        assert again == texts
        assert end.usage.cached_tokens > 0
        assert "".join(entry["token"] for entry in end.logprobs) == "".join(texts)
        assert all(entry["top"] == [] for entry in end.logprobs)
        _, end = await collect(backend, prompt="Cats are", raw=True, max_tokens=3, logprobs=2)
        assert all(len(entry["top"]) == 2 for entry in end.logprobs)
        only_one, _ = await collect(backend, top_k=1, temperature=5, max_tokens=20, min_p=0, repeat_penalty=1)
        assert only_one == texts
        await collect(backend, repeat_penalty=1.5, repeat_last_n=-1, max_tokens=5)

    with_llama_server(body)


@needs_binary
def test_llama_server_follows_grammar_and_schema_and_repeats_a_drawn_seed():
    async def body(backend):
        texts, end = await collect(backend, grammar='root ::= "dogs" | "bees"')
        assert ("".join(texts) in ("dogs", "bees"), end.finish_reason) == (True, "stop")
        texts, end = await collect(backend, json_schema=SCHEMA, temperature=0, max_tokens=60)
        assert end.finish_reason == "length" or isinstance(json.loads("".join(texts))["legs"], int)
        assert "".join(texts).replace(" ", "").replace("\n", "").startswith('{"legs":')
        first, end = await collect(backend, temperature=1, max_tokens=20)
        assert (await collect(backend, temperature=1, max_tokens=20, seed=end.seed))[0] == first
        with pytest.raises(errors.TypeMismatch, match="grammar"):
            await collect(backend, grammar="root ::= (")
        with pytest.raises(errors.ContextOverflow, match="512"):
            await collect(backend, prompt="cats " * 2000)
        with pytest.raises(errors.BackendUnavailable, match="images"):
            image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
            await collect(backend, prompt=None, messages=[{"role": "user", "content": [image]}])

    with_llama_server(body)


@needs_binary
def test_llama_server_runs_several_at_once_and_frees_what_is_left_early():
    async def body(backend):
        alone, _ = await collect(backend, temperature=0, max_tokens=40)
        for _ in range(5):
            events = backend.generate(GenerateRequest(prompt=ENDLESS, grammar=LONG))
            assert await anext(events)
            await events.aclose()
        together = await asyncio.gather(*(collect(backend, temperature=0, max_tokens=40) for _ in range(8)))
        assert all(end.finish_reason == "length" for _, end in together)
        assert all(texts[0] == alone[0] for texts, _ in together)

    with_llama_server(body)


@needs_binary
def test_llama_server_killed_in_mid_stream_is_started_again():
    async def body(backend):
        # More than it computes at once, so that some cannot have ended when it is killed.
        running = [asyncio.create_task(collect(backend, prompt=ENDLESS, grammar=LONG)) for _ in range(12)]
        while backend.health().state != "ready":
            await asyncio.sleep(0.005)
        os.kill(backend.health().os_pid, signal.SIGKILL)
        results = await asyncio.gather(*running, return_exceptions=True)
        assert any(isinstance(result, errors.WorkerCrash) for result in results)
        assert all(isinstance(result, errors.WorkerCrash | tuple) for result in results)
        assert (await collect(backend, max_tokens=3))[1].finish_reason == "length"
        assert backend.health().restarts == 1

    with_llama_server(body)


@needs_binary
def test_llama_server_embeds_and_reranks_in_servers_of_their_own():
    async def embeds(backend):
        found = await backend.embed(EmbedRequest(("cats", "cats", "dogs are large")))
        assert (len(found.vectors), found.dimensions) == (3, 96)
        vectors = [memoryview(vector).cast("f").tolist() for vector in found.vectors]
        assert vectors[0] == pytest.approx(vectors[1], abs=1e-4)
        assert vectors[0] != pytest.approx(vectors[2], abs=1e-2)
        assert sum(number * number for number in vectors[2]) == pytest.approx(1, abs=1e-4)
        with pytest.raises(errors.ContextOverflow):
            await backend.embed(EmbedRequest(("cats " * 2000,)))

    async def unpooled(backend):
        with pytest.raises(errors.TypeMismatch, match="Pooling"):
            await backend.embed(EmbedRequest(("cats",)))

    async def reranks(backend):
        scores = await backend.rerank(RerankRequest("cats", ("cats", "dogs", "bees")))
        assert len(scores) == 3 == len(set(scores))
        back = await backend.rerank(RerankRequest("cats", ("bees", "dogs", "cats")))
        assert scores[::-1] == pytest.approx(back, abs=1e-2)

    with_llama_server(embeds, purpose="embed", arguments=("--pooling", "mean"))
    with_llama_server(unpooled, purpose="embed")
    with_llama_server(reranks, purpose="rerank")


@needs_binary
def test_llama_server_says_why_it_cannot_load(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(TINY.read_bytes()[:100_000])

    async def body(backend):
        with pytest.raises(errors.ModelLoadFailed, match="error loading model"):
            await backend.load()

    with_llama_server(body, path=broken)
