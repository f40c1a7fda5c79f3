"""The backends of servers against real ones: llama_cpp.server, llama-server where LLAMA_SERVER names its binary."""

from __future__ import annotations

import asyncio
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
from demandport.inference.openai import OpenAIBackend
from demandport.inference.requests import EmbedRequest, GenerateRequest
from support import ROOT

pytest.importorskip("llama_cpp.server.app")
TINY = ROOT / "python" / "demandport" / "data" / "tiny.gguf"
pytestmark = pytest.mark.skipif(not TINY.exists(), reason="the tiny model has not been made")
LIMIT_S = 120.0
KEY = "sk-for-this-test"
ENDLESS = "Tell me a very long story."


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
