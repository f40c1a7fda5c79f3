"""Nodes that ask models, in the real engine and through the real gateway, with a backend that answers what is written
down: what of their inputs reaches the model, and what of its answer comes out."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from demandport.errors import BackendUnavailable, DemandportError, NodeFailed
from demandport.inference.backend import ToolCall
from demandport.inference.gateway import Gateway
from demandport.inference.requests import GenerateRequest
from demandport.testing import ScriptedBackend
from gateways import SCRIPTED, demand, node, scripted, with_gateway

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
JPEG = b"\xff\xd8\xff\xe0" + bytes(8)
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def picture(data: bytes) -> dict[str, Any]:
    return {"base64": base64.b64encode(data).decode()}


def outputs(backend: ScriptedBackend, node_type: str, /, **data: Any) -> dict[str, Any]:
    return scripted(backend, node_type, data).outputs


def refusal(backend: ScriptedBackend, node_type: str, /, *, resources: Mapping[str, Any] = {}, **data: Any) -> Any:
    with pytest.raises(DemandportError) as caught:
        scripted(backend, node_type, data, **resources)
    return caught.value


def asked(backend: ScriptedBackend) -> GenerateRequest:
    (request,) = backend.asked
    return request


# ----------------------------------------------------------------------------------------------- llm-inference


def test_what_is_not_given_is_left_to_the_backend_and_the_answer_is_streamed() -> None:
    backend = ScriptedBackend("An answer")
    heard = scripted(backend, "llm-inference", {"prompt": "Hi"})
    assert asked(backend) == GenerateRequest(prompt="Hi")
    assert heard.chunks == [("response", "An"), ("response", " answer")]
    assert heard.outputs["response"] == "An answer" and heard.outputs["tool_calls"] == []
    assert heard.outputs["model_ref"].keys() == {"id", "model", "backend"}
    assert heard.outputs["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": None}


@pytest.mark.parametrize(
    ("given", "system"),
    [
        ({"system_prompt": "Be kind."}, "Be kind."),
        ({"context": "It rains."}, "It rains."),
        ({"system_prompt": "Be kind.", "context": "It rains."}, "Be kind.\n\nIt rains."),
        ({"system_prompt": "", "context": ""}, None),
    ],
)
def test_the_context_is_told_with_the_system_prompt(given: dict[str, str], system: str | None) -> None:
    backend = ScriptedBackend("ok")
    outputs(backend, "llm-inference", prompt="Hi", **given)
    assert asked(backend).system_prompt == system


def test_the_prompt_comes_after_what_was_said_before() -> None:
    backend = ScriptedBackend("ok")
    said = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "One."}]
    outputs(backend, "llm-inference", prompt="Two?", messages=said)
    assert asked(backend).messages == (*said, {"role": "user", "content": "Two?"})
    assert asked(backend).prompt is None


@pytest.mark.parametrize(("data", "media_type"), [(PNG, "image/png"), (JPEG, "image/jpeg")])
@pytest.mark.parametrize("node_type", ["llm-inference", "vision-analysis"])
def test_an_image_goes_beside_the_prompt_with_the_type_that_its_data_has(
    node_type: str, data: bytes, media_type: str
) -> None:
    backend = ScriptedBackend("a cat", vision=True)
    outputs(backend, node_type, prompt="What?", image=picture(data) | {"media_type": "image/webp"})
    (message,) = asked(backend).messages or ()
    url = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    assert message["content"] == [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]


def test_tools_reach_the_model_and_its_calls_come_out() -> None:
    backend = ScriptedBackend((ToolCall("1", "look", '{"at": 1}'), ToolCall("2", "look", "{}")))
    found = outputs(backend, "llm-inference", prompt="Hi", tools=[LOOK], tool_choice="required")
    assert asked(backend).tools == (LOOK,) and asked(backend).tool_choice == "required"
    assert found["tool_calls"] == [
        {"id": "1", "name": "look", "arguments": '{"at": 1}'},
        {"id": "2", "name": "look", "arguments": "{}"},
    ]
    assert found["response"] == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.5), ("top_p", 0.5), ("max_tokens", 3), ("seed", 4), ("stop", ["x"]), ("json_schema", {}),
     ("tools", [LOOK])],
)  # fmt: skip
def test_a_parameter_that_the_backend_does_not_honour_is_refused_by_its_name(name: str, value: Any) -> None:
    backend = ScriptedBackend("{}")
    backend.honours -= {name}
    error = refusal(backend, "llm-inference", prompt="Hi", **{name: value})
    assert error.code == "type_mismatch" and error.details == {"parameter": name}
    assert name in error.message and "scripted" in error.message and error.node == "it"
    assert backend.asked == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"prompt": "x", "tools": [{"type": "function"}]}, "tools[0]"),
        ({"prompt": "x", "tool_choice": "auto"}, "tool_choice"),
        ({"prompt": "x", "messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
        ({"prompt": "x", "messages": ["hello"]}, "messages[0]"),
        ({"prompt": "x", "temperature": 11}, "temperature"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "seed": -1}, "seed"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_by_name(data: dict[str, Any], says: str) -> None:
    error = refusal(ScriptedBackend("no"), "llm-inference", **data)
    assert error.code == "type_mismatch" and says in error.message and error.node == "it"


@pytest.mark.parametrize("node_type", ["llm-inference", "vision-analysis"])
def test_a_model_without_vision_is_a_clear_error(node_type: str) -> None:
    backend = ScriptedBackend("a cat")
    error = refusal(backend, node_type, prompt="What?", image=picture(PNG))
    assert error.code == "backend_unavailable" and "images" in error.message and "vision" in error.message
    assert backend.asked == []


def test_the_embedded_model_takes_no_images_and_says_so() -> None:
    error = refusal(ScriptedBackend(""), "vision-analysis", prompt="What?", image=picture(PNG), model="tiny")
    assert error.code == "backend_unavailable" and "llama.cpp" in error.message and "vision" in error.message


def test_what_is_no_image_is_refused_before_the_model_is_asked() -> None:
    backend = ScriptedBackend("a cat", vision=True)
    assert refusal(backend, "vision-analysis", prompt="What?", image="bm90IGFuIGltYWdl").code == "type_mismatch"
    assert backend.asked == []


# ------------------------------------------------------------------------------------------------ json_schema

AGE = {"type": "object", "properties": {"age": {"type": "integer", "multipleOf": 7}}, "required": ["age"]}


@pytest.mark.parametrize("text", ['{"age": 14}', ' {"age": 7, "more": null}\n'])
def test_an_answer_that_follows_its_schema_comes_out_as_it_is(text: str) -> None:
    backend = ScriptedBackend(text)
    assert outputs(backend, "llm-inference", prompt="Hi", json_schema=AGE)["response"] == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"age": 8}', "does not follow json_schema"),
        ('{"age": "7"}', "does not follow json_schema"),
        ("{}", "does not follow json_schema"),
        ('{"age": 7', "no JSON"),
        ("I do not know.", "no JSON"),
        ("", "no JSON"),
    ],
)
def test_an_answer_that_does_not_follow_its_schema_is_a_mismatch(text: str, says: str) -> None:
    error = refusal(ScriptedBackend(text), "llm-inference", prompt="Hi", json_schema=AGE)
    assert error.code == "type_mismatch" and says in error.message
    assert error.details == {"finish_reason": "stop", "text": text}


def test_an_answer_that_is_cut_off_says_so_even_where_it_would_do() -> None:
    error = refusal(ScriptedBackend('{"age": 7}', reason="length"), "llm-inference", prompt="Hi", json_schema=AGE)
    assert error.code == "type_mismatch" and "cut off by max_tokens" in error.message


def test_an_answer_nested_without_end_is_a_mismatch_too() -> None:
    error = refusal(ScriptedBackend("[" * 200_000), "llm-inference", prompt="Hi", json_schema={"type": "array"})
    assert error.code == "type_mismatch"


@pytest.mark.parametrize("schema", [{"type": 5}, {"$ref": "#/nowhere"}, {"pattern": "("}])
def test_what_is_no_schema_is_a_mismatch(schema: dict[str, Any]) -> None:
    assert refusal(ScriptedBackend("{}"), "llm-inference", prompt="Hi", json_schema=schema).code == "type_mismatch"


def test_a_schema_of_an_answer_reads_no_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"const": "the secret"}')
    error = refusal(ScriptedBackend("1"), "llm-inference", prompt="Hi", json_schema={"$ref": secret.as_uri()})
    assert error.code == "type_mismatch" and "the secret" not in error.message


# -------------------------------------------------------------------------------------------------- tool-loop


class Host:
    """Runs tools as a host would; an answer that is an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, Any]] = []

    async def __call__(self, ctx: Any, name: str, arguments: Any) -> Any:
        self.calls.append((name, arguments))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def loop(backend: ScriptedBackend, host: Host, **data: Any) -> Any:
    return scripted(backend, "tool-loop", {"prompt": "Where?", "tools": [LOOK]} | data, call_tool=host)


def told(request: GenerateRequest) -> list[Any]:
    """What the tools answered, as the model was told it last."""
    return [one["content"] for one in request.messages or () if one["role"] == "tool"]


def test_a_loop_without_calls_is_one_turn() -> None:
    backend, host = ScriptedBackend("Here."), Host()
    found = loop(backend, host, system_prompt="Be brief.", max_tokens=9, temperature=0.1).outputs
    assert (found["response"], found["turns"], host.calls) == ("Here.", 1, [])
    assert found["messages"] == [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    request = asked(backend)
    assert (request.system_prompt, request.max_tokens, request.temperature) == ("Be brief.", 9, 0.1)
    assert request.tools == (LOOK,)


def test_calls_are_answered_until_there_are_none() -> None:
    backend = ScriptedBackend(
        ToolCall("a", "look", '{"at": "the sea"}'),
        (ToolCall("b", "look", "{}"), ToolCall("c", "find", "")),
        "It is there.",
    )
    host = Host("waves", {"ä": [1]}, 5)
    heard = loop(backend, host, messages=[{"role": "user", "content": "Before."}])
    assert host.calls == [("look", {"at": "the sea"}), ("look", {}), ("find", {})]
    assert [told(request) for request in backend.asked] == [[], ["waves"], ["waves", '{"ä": [1]}', "5"]]
    said = heard.outputs["messages"]
    assert [one["role"] for one in said] == ["user", "user", "assistant", "tool", "assistant", "tool", "tool",
                                             "assistant"]  # fmt: skip
    assert said[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "the sea"}'}
    assert [one["tool_call_id"] for one in said if one["role"] == "tool"] == ["a", "b", "c"]
    assert heard.outputs["turns"] == 3 and heard.outputs["response"] == "It is there."
    assert heard.outputs["usage"] == {"prompt_tokens": 9, "completion_tokens": 6}
    assert [event["tool"] for event in heard.events if event["event"] == "tool_call"] == ["look", "look", "find"]


@pytest.mark.parametrize("arguments", ["{", "no JSON", "[" * 100_000], ids=lambda text: text[:8])
def test_arguments_that_are_no_json_are_said_to_the_model_and_no_tool_runs(arguments: str) -> None:
    backend, host = ScriptedBackend(ToolCall("a", "look", arguments), "Sorry."), Host()
    found = loop(backend, host).outputs
    assert host.calls == [] and found["response"] == "Sorry."
    (answer,) = told(backend.asked[-1])
    assert answer.startswith("error: ")


def test_a_tool_that_fails_is_said_to_the_model() -> None:
    backend, host = ScriptedBackend(ToolCall("a", "look", "{}"), "I cannot see."), Host(NodeFailed("the lamp is off"))
    assert loop(backend, host).outputs["response"] == "I cannot see."
    (answer,) = told(backend.asked[-1])
    assert "error" in answer and "the lamp is off" in answer


def test_a_conversation_without_end_is_an_error_with_what_was_said() -> None:
    backend, host = ScriptedBackend(ToolCall("a", "look", "{}")), Host(*"123456")
    resources = {"call_tool": host}
    error = refusal(backend, "tool-loop", resources=resources, prompt="Where?", tools=[LOOK], max_turns=2)
    assert error.code == "node_failed" and "after 2 turns" in error.message
    assert len(backend.asked) == 2 and len(error.details["messages"]) == 5


@pytest.mark.parametrize("turns", [0, -1])
def test_a_loop_of_no_turns_is_refused(turns: int) -> None:
    backend = ScriptedBackend("Here.")
    error = refusal(
        backend, "tool-loop", resources={"call_tool": Host()}, prompt="Where?", tools=[LOOK], max_turns=turns
    )
    assert error.code == "type_mismatch" and "max_turns" in error.message


def test_a_host_that_runs_no_tools_is_an_error_once_one_is_called() -> None:
    assert outputs(ScriptedBackend("Here."), "tool-loop", prompt="Where?", tools=[LOOK])["turns"] == 1
    error = refusal(ScriptedBackend(ToolCall("a", "look", "{}")), "tool-loop", prompt="Where?", tools=[LOOK])
    assert error.code == "host_unavailable"


def test_a_model_that_fails_in_a_later_turn_is_the_loops_error() -> None:
    def fail(_: GenerateRequest) -> str:
        raise BackendUnavailable("the server is gone")

    backend, host = ScriptedBackend(ToolCall("a", "look", "{}"), fail), Host("waves")
    error = refusal(backend, "tool-loop", resources={"call_tool": host}, prompt="Where?", tools=[LOOK])
    assert (error.code, error.node) == ("backend_unavailable", "it") and error.retryable


# ------------------------------------------------------------------------------------------------ embedding


def test_one_text_is_one_vector_and_a_list_is_a_list() -> None:
    found = outputs(ScriptedBackend(), "embedding", text="four")
    assert found["embedding"] == struct.pack("<2f", 4, 1)
    assert found["metadata"]["dimensions"] == 2 and found["metadata"]["count"] == 1
    found = outputs(ScriptedBackend(), "embedding", text=["a", "", "ccc"])
    assert found["embedding"] == [struct.pack("<2f", size, 1) for size in (1, 0, 3)]
    assert found["metadata"]["count"] == 3
    assert outputs(ScriptedBackend(), "embedding", text=["alone"])["embedding"] == [struct.pack("<2f", 5, 1)]


@pytest.mark.parametrize(("text", "says"), [([], "must not be empty"), (5, "texts[0]"), (["a", None], "texts[1]")])
def test_what_cannot_be_embedded_is_refused(text: Any, says: str) -> None:
    error = refusal(ScriptedBackend(), "embedding", text=text)
    assert error.code == "type_mismatch" and says in error.message


def test_the_tiny_model_embeds_a_list_as_it_does_each_alone() -> None:
    async def body(gateway: Gateway) -> None:
        texts = ["cats purr", "dogs", "cats purr"]
        whole = (await demand(gateway, node("it", "embedding", text=texts, model="tiny"))).outputs
        alone = [(await demand(gateway, node("it", "embedding", text=one, model="tiny"))).outputs for one in texts]
        size = whole["metadata"]["dimensions"]
        vectors = [struct.unpack(f"<{size}f", vector) for vector in whole["embedding"]]
        assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-4)
        assert vectors[0] == pytest.approx(vectors[2], abs=1e-5) and vectors[0] != vectors[1]
        for vector, one in zip(vectors, alone, strict=True):
            assert struct.unpack(f"<{size}f", one["embedding"]) == pytest.approx(vector, abs=1e-4)
        with pytest.raises(DemandportError) as caught:
            await demand(gateway, node("it", "embedding", text=["short", "cats " * 600], model="tiny"))
        assert caught.value.code == "context_overflow"

    with_gateway(body)


# ------------------------------------------------------------------------------------------------- reranker


def rank(**data: Any) -> dict[str, Any]:
    return scripted(ScriptedBackend(), "reranker", {"query": "cat"} | data, model="model_path").outputs


def test_the_best_come_first_and_ties_stay_in_their_order() -> None:
    documents = ["dog", "cat", "cat cat", "cat!", "owl"]
    found = rank(documents=documents)
    assert found["scores"] == [0, 1, 2, 1, 0]
    assert [one["index"] for one in found["results"]] == [2, 1, 3, 0, 4]
    assert [one["document"] for one in found["results"]] == [documents[one["index"]] for one in found["results"]]
    assert (found["top_document"], found["top_score"]) == ("cat cat", 2)


def test_documents_may_be_maps_and_come_back_whole() -> None:
    documents = [{"text": "a dog", "id": 1}, {"content": "a cat", "id": 2}, "a cat and a cat"]
    found = rank(documents=documents, top_k=2)
    assert [one["document"] for one in found["results"]] == [documents[2], documents[1]]
    assert found["scores"] == [0, 1, 2]


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (2, 2), (99, 2), (None, 2)])
def test_top_k_bounds_the_results_and_not_the_scores(top_k: int | None, count: int) -> None:
    found = rank(documents=["cat", "dog"], top_k=top_k, return_documents=False)
    assert found["results"] == [{"index": 0, "score": 1}, {"index": 1, "score": 0}][:count]
    assert len(found["scores"]) == 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"documents": []}, "documents"),
        ({"documents": ["cat", 5]}, "documents[1]"),
        ({"documents": [{"title": "cat"}]}, "documents[0]"),
        ({"documents": ["cat"], "top_k": 0}, "top_k"),
        ({"documents": ["cat"], "top_k": -1}, "top_k"),
    ],
)
def test_what_cannot_be_ranked_is_refused(data: dict[str, Any], says: str) -> None:
    with pytest.raises(DemandportError, match=says.replace("[", r"\[")) as caught:
        rank(**data)
    assert caught.value.code == "type_mismatch"


def test_a_model_that_is_no_reranker_says_so() -> None:
    with pytest.raises(DemandportError, match="reranker") as caught:
        scripted(ScriptedBackend(), "reranker", {"query": "x", "documents": ["x"], "model_path": "tiny"})
    assert caught.value.code == "model_load_failed"


# ---------------------------------------------------------------------------------------------- unload-model


def test_unload_passes_its_trigger_on_and_says_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demandport.inference.gateway._openai", lambda spec: ScriptedBackend("Hello"))

    async def body(gateway: Gateway) -> None:
        ask = node("ask", "llm-inference", prompt="Hi", model="scripted")
        end = node("end", "unload-model")
        edges = [("ask", "model_ref", "end", "model_ref"), ("ask", "response", "end", "trigger")]
        found = (await demand(gateway, ask, end, edges=edges)).outputs
        assert found == {"status": "unloaded", "trigger_passthrough": "Hello"} and gateway.models() == []
        again = (await demand(gateway, node("end", "unload-model", model_ref="scripted", trigger=[1]))).outputs
        assert again == {"status": "not_loaded", "trigger_passthrough": [1]}

    with_gateway(body, models=SCRIPTED)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"model_ref": "m", "when_busy": "panic"}, "when_busy"),
        ({"model_ref": {}}, "model_ref"),
        ({"model_ref": {"id": 5}}, "model_ref"),
        ({"model_ref": 5}, "model_ref"),
    ],
)
def test_what_cannot_be_unloaded_is_refused(data: dict[str, Any], says: str) -> None:
    async def body(gateway: Gateway) -> None:
        with pytest.raises(DemandportError, match=says) as caught:
            await demand(gateway, node("it", "unload-model", **data))
        assert caught.value.code == "type_mismatch"

    with_gateway(body)


def test_answers_of_the_scripted_backend_are_plain_data() -> None:
    """What these tests rest on: every output above is one that the wire could carry."""
    found = outputs(ScriptedBackend("Hello"), "llm-inference", prompt="Hi")
    assert json.loads(json.dumps(found)) == found
