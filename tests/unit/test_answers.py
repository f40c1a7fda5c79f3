"""What servers stream, read without a server: whatever they say is an event or an error of ours."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from demandport.errors import DemandportError
from demandport.inference.backend import Finished
from demandport.inference.http import Again, HttpServer
from demandport.inference.ollama import _Reply
from demandport.inference.openai import _Answer
from demandport.inference.requests import GenerateRequest

SERVER = HttpServer("http://127.0.0.1:9", name="test", timeout_ms=1)
KEYS = [
    *("choices", "delta", "content", "text", "tool_calls", "function", "name", "arguments", "index", "id", "logprobs"),
    *("tokens", "token_logprobs", "top_logprobs", "token", "finish_reason", "usage", "prompt_tokens", "model", "error"),
    *("prompt_tokens_details", "cached_tokens", "prompt_progress", "processed", "total", "code", "message", "response"),
    *("done", "done_reason", "prompt_eval_count", "eval_count"),
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
)
choices = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
chunks = st.one_of(
    choices,
    st.fixed_dictionaries({"choices": st.lists(choices, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"message": choices, "done": st.booleans()}),
)


def read_all(reader, lines):
    try:
        for line in lines:
            list(reader.read(line))
        assert isinstance(reader.finished(), Finished)
    except (DemandportError, Again) as failed:
        assert str(failed)


@given(st.lists(chunks, max_size=4), st.booleans())
@example([{"choices": [{"finish_reason": {}}]}], False)
@example([{"choices": [{"delta": {"tool_calls": [{"index": float("inf")}]}, "finish_reason": "stop"}]}], False)
@example([{"choices": [{"delta": {"tool_calls": [{"function": {"arguments": {"a": 1}}}]}}]}], False)
def test_any_chunk_of_a_chat_is_read_or_refused(found, raw):
    request = GenerateRequest(prompt="Hi", raw=raw, logprobs=2)
    read_all(_Answer(request, SERVER, "chat/completions"), map(json.dumps, found))


@given(st.lists(chunks, max_size=4), st.booleans())
@example([{"done": True, "prompt_eval_count": float("inf")}], False)
@example([{"done": True, "eval_count": []}, {"done": True, "eval_count": {"done": 1}}], False)
def test_any_line_of_ollama_is_read_or_refused(found, raw):
    request = GenerateRequest(prompt="Hi", raw=raw)
    read_all(_Reply(request, SERVER, "m", 1), (json.dumps(line).encode() for line in found))


def test_a_tool_call_without_an_index_is_a_call_of_its_own():
    answer = _Answer(GenerateRequest(prompt="Hi"), SERVER, "chat/completions")
    for id in ("a", "b"):
        call = {"id": id, "function": {"name": "add", "arguments": {"x": 1}}}
        answer.read(json.dumps({"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": "stop"}]}))
    end = answer.finished()
    assert (end.finish_reason, [(call.id, call.arguments) for call in end.tool_calls]) == (
        "tool_calls",
        [("a", '{"x": 1}'), ("b", '{"x": 1}')],
    )
