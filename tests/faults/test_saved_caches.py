"""KV caches that the backend saves and finds again by name; which file that is, only the service says."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from demandport.errors import Forbidden, ModelNotFound, TypeMismatch
from demandport.inference import caches
from demandport.inference.backend import Finished, TextChunk
from demandport.inference.caches import KvCache
from demandport.inference.config import ModelSpec
from demandport.inference.library import tiny_path
from demandport.inference.llama_cpp import LlamaCppBackend
from demandport.inference.requests import GenerateRequest
from demandport.workers.process import kill_all, live_workers

pytest.importorskip("llama_cpp")
LIMIT_S = 120.0
PROMPT = "Cats sleep all day. " * 10


def run(body, folder):
    """Run a test with a backend of its own."""

    async def main():
        backend = LlamaCppBackend(ModelSpec("tiny"), tiny_path(), cache_directory=folder)
        try:
            async with asyncio.timeout(LIMIT_S):
                await body(backend)
        finally:
            await backend.close()

    try:
        asyncio.run(main())
        assert live_workers() == []
    finally:
        kill_all()


async def generate(backend, prompt, **options):
    text, request = "", {"prompt": prompt, "raw": True, "temperature": 0, "max_tokens": 8} | options
    async with aclosing(backend.generate(GenerateRequest.from_options(request))) as events:
        async for event in events:
            if isinstance(event, TextChunk):
                text += event.text
            elif isinstance(event, Finished):
                return text, event
    raise AssertionError("it has no end")


def test_one_saved_by_a_backend_goes_on_in_another(tmp_path):
    found = {}

    async def saves(backend):
        _, end = await generate(backend, PROMPT)
        cache = KvCache.from_plain(end.kv_cache)
        saved, size = await backend.save_cache(cache, "mine")
        assert (saved.name, saved.tokens) == ("mine", cache.tokens)
        assert size == (tmp_path / "mine.kv").stat().st_size and len(list(tmp_path.iterdir())) == 1
        found["text"], _ = await generate(backend, " and then", kv_cache=end.kv_cache)

    async def goes_on(backend):
        cache = caches.read(caches.file_of(tmp_path, "mine"))
        text, end = await generate(backend, " and then", kv_cache=cache.to_plain())
        assert text == found["text"] != "" and end.usage.cached_tokens == len(cache.tokens)
        assert cache.model["model"] == "tiny"

    run(saves, tmp_path)
    run(goes_on, tmp_path)


def test_no_name_and_no_request_leads_out_of_the_folder(tmp_path):
    folder, outside = tmp_path / "caches", tmp_path / "outside.kv"

    async def body(backend):
        expected, _ = await generate(backend, " and then", kv_cache=(await generate(backend, PROMPT))[1].kv_cache)
        cache = (await generate(backend, PROMPT))[1].kv_cache
        for name in ("../outside", str(outside), "..", "", "a/b", "a\0b"):
            with pytest.raises(Forbidden):
                await backend.save_cache(KvCache.from_plain(cache), name)
            with pytest.raises(Forbidden):
                await generate(backend, "x", kv_cache=cache | {"name": name})
        outside.write_text("no cache")
        text, _ = await generate(backend, " and then", kv_cache=cache | {"file": str(outside)})
        assert text == expected, "a file that a request names is not looked at"
        with pytest.raises(ModelNotFound):
            await generate(backend, "x", kv_cache=cache | {"name": "nowhere"})
        with pytest.raises(TypeMismatch):
            await backend.save_cache(KvCache("another model", (1, 2)), "other")
        assert outside.read_text() == "no cache" and not folder.exists()

    run(body, folder)


def test_without_a_folder_nothing_is_saved():
    async def body(backend):
        cache = (await generate(backend, PROMPT))[1].kv_cache
        with pytest.raises(Forbidden, match="cache_directory"):
            await backend.save_cache(KvCache.from_plain(cache), "mine")

    run(body, None)
