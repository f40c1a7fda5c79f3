"""Every built-in node type: its descriptor tells the truth, it takes what it should and says what to change.

Nodes run in the real engine with no wire and no process around it; only `llamacpp-inference` starts a worker.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs, runnable
from demandport.engine.session import Session
from demandport.errors import BY_CODE, DemandportError, TypeMismatch
from demandport.graph.spec import PORT_TYPES, converter
from demandport.inference.caches import KvCache
from demandport.inference.config import Config, ModelSpec
from demandport.inference.gateway import Gateway
from demandport.inference.library import Library, tiny_path
from demandport.nodes import BUILT_IN, files, library, media
from demandport.nodes.http import HttpConfig
from demandport.nodes.process import ProcessConfig, Processes
from demandport.testing import ScriptedBackend
from gguf_files import write_gguf
from sink import Sink

SPECS = {name: spec for name, spec in load_specs(BUILT_IN).items() if spec.call.__module__ in BUILT_IN}
TIMEOUT_S = 20
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
IMAGE = {"base64": "aW1n", "media_type": "image/png", "bytes": 3}
AUDIO = {"base64": "YXVk", "media_type": "audio/wav", "bytes": 3}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ------------------------------------------------------------------------------------------------ the bench


def node(id: str, node_type: str, **data: Any) -> dict[str, Any]:
    return {"id": id, "node_type": node_type, "data": data}


def edges_of(*arrows: str) -> list[dict[str, Any]]:
    """Edges written as ``a.port > b.port``; a port left out is the first."""
    ends = [[end.strip().partition(".") for end in arrow.split(">")] for arrow in arrows]
    return [
        {"id": str(n), "source": s, "source_handle": out, "target": t, "target_handle": into}
        for n, ((s, _, out), (t, _, into)) in enumerate(ends)
    ]


def evaluate(
    *nodes: dict[str, Any],
    edges: list[dict[str, Any]] | None = None,
    given: dict[str, dict[str, Any]] | None = None,
    node_id: str | None = None,
    **resources: Any,
) -> Sink:
    """Demand the last node (or `node_id`) and return what its sink heard. Raises what the host would be told."""
    sinks: list[Sink] = []

    async def check() -> DemandportError | None:
        async with anyio.create_task_group() as tasks:
            try:
                graph = {"nodes": list(nodes), "edges": edges or []}
                session = Session(graph, SPECS, Executor(tasks, resources))
                values = [(n, port, value) for n, ports in (given or {}).items() for port, value in ports.items()]
                session.edit([{"op": "set_input", "node": n, "port": p, "value": v} for n, p, v in values])
                sinks.append(Sink())
                session.demand(node_id or nodes[-1]["id"], sinks[0], lambda _: None)
                await sinks[0].result()
            except DemandportError as told:
                return told
        return None

    error = anyio.run(check)
    if error:
        raise error
    return sinks[0]


def outputs_of(node_type: str, data: dict[str, Any], **resources: Any) -> dict[str, Any]:
    return evaluate(node("it", node_type, **data), **resources).outputs


def refusal_of(node_type: str, data: dict[str, Any], **resources: Any) -> DemandportError:
    with pytest.raises(DemandportError) as caught:
        outputs_of(node_type, data, **resources)
    return caught.value


# ----------------------------------------------------------------------- every descriptor, and what really comes

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


class From(NamedTuple):
    """A sample's input that comes from an output of another type's sample."""

    node_type: str
    port: str


#: Inputs with which each type runs; together the samples of a type give every output port a value.
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "text-input": [{"text": "hello"}],
    "number-input": [{"value": 7}, {"value": "2.5"}],
    "boolean-input": [{"value": "true"}],
    "selection-input": [{"options": ["a", "b"], "value": "b"}],
    "vector-input": [{"vector": [1, 2.5]}],
    "masked-text-input": [{"segments": [{"text": "Ada", "masked": True}]}],
    "image-input": [{"image_base64": b64(PNG), "bounds": {"width": 1}}],
    "audio-input": [{"audio_data": b64(b"OggS----")}],
    "linked-input": [{"linked_value": 3}],
    "human-input": [{"user_response": "yes"}, {"auto_accept": True, "default": "no"}],
    "text-output": [{"text": {"a": [1, None]}}],
    "vector-output": [{"vector": [1.0]}],
    "image-output": [{"image": IMAGE}],
    "audio-output": [{"audio": AUDIO}],
    "component-preview": [{"component": "Card", "props": {"title": "x"}}],
    "conditional": [{"condition": True, "value": 1}, {"condition": False, "value": 1}],
    "merge": [{"inputs": ["a", "b"]}],
    "json-filter": [{"json": {"a": 1}, "path": "a"}],
    "validator": [{"value": 1, "schema": {"type": "string"}}],
    "template": [{"template": "Hi {{who}}", "who": "Ada"}],
    "map": [{"items": [1, 2], "each": "text-output"}],
    "tool-executor": [{"tool": "look"}],
    "rag-search": [{"query": "cats"}],
    "read-file": [{"path": "there.txt"}],
    "write-file": [{"path": "new/file.txt", "content": "text"}],
    "process": [{"command": "sh", "args": ["-c", "cat; echo oops >&2; exit 3"], "stdin": "text"}],
    "http-request": [{"url": "http://127.0.0.1:{port}/"}],
    "llamacpp-inference": [{"model_path": "tiny", "prompt": "cats", "max_tokens": 3, "seed": 1, "logprobs": 1}],
    "llm-inference": [{"prompt": "Hi", "model": "scripted"}],
    "ollama-inference": [{"prompt": "Hi", "model": "llama"}],
    "vision-analysis": [{"image": {"base64": b64(PNG)}, "prompt": "What is it?", "model": "scripted"}],
    "tool-loop": [{"prompt": "Hi", "tools": [TOOL], "model": "scripted"}],
    "embedding": [{"text": "cats", "model": "tiny"}, {"text": ["cats", "dogs"]}],
    "reranker": [{"model_path": "scripted", "query": "cat", "documents": ["a dog", "a cat"]}],
    "unload-model": [{"model_ref": From("llamacpp-inference", "model_ref")}],
    "kv-cache-save": [{"kv_cache": From("llamacpp-inference", "kv_cache_out"), "name": "saved"}],
    "kv-cache-load": [{"name": From("kv-cache-save", "name")}],
    "kv-cache-truncate": [{"kv_cache": From("llamacpp-inference", "kv_cache_out"), "tokens": 2}],
    "model-provider": [{"model_name": "tiny"}, {"search_query": "demandport"}],
    "puma-lib": [{"model_id": "TINY.gguf"}, {"query": "demand tiny"}],
    "expand-settings": [{"inference_settings": {name: 2 for name in library.SETTINGS}}],
}


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) in (int, float) and math.isfinite(item) for item in value)


CONFORMS: dict[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "string": lambda value: type(value) is str,
    "number": lambda value: type(value) in (int, float) and math.isfinite(value),
    "integer": lambda value: type(value) is int,
    "boolean": lambda value: type(value) is bool,
    "json": lambda value: json.loads(json.dumps(value, allow_nan=False)) == value,
    "vector": _is_vector,
    "image": lambda value: set(value) == {"base64", "media_type", "bytes"} and value["media_type"].startswith("image/"),
    "audio": lambda value: set(value) == {"base64", "media_type", "bytes"} and value["media_type"].startswith("audio/"),
    "component": lambda value: set(value) == {"component", "props"},
    "model_handle": lambda value: set(value) == {"id", "model", "backend"},
    "embedding": lambda value: all(len(one) % 4 == 0 for one in (value if isinstance(value, list) else [value])),
    "kv_cache": lambda value: json.loads(json.dumps(KvCache.from_plain(value).to_plain())) == value,
}


@pytest.mark.parametrize("node_type", runnable(SPECS))
def test_a_node_gives_what_its_descriptor_says(node_type: str, tmp_path: Path, answering: int) -> None:
    assert node_type in SAMPLES, f"the new node type {node_type} needs a sample in SAMPLES"
    (tmp_path / "there.txt").write_text("content")
    spec, seen = SPECS[node_type], set()
    for data in SAMPLES[node_type]:
        heard = _run_sample(node_type, data, tmp_path, answering)
        left_out = spec.outputs.keys() - heard.outputs.keys()
        assert heard.outputs.keys() <= spec.outputs.keys() and (spec.branches or not left_out)
        for port, value in heard.outputs.items():
            assert CONFORMS[spec.outputs[port].type](value), f"{port} is {value!r}, no {spec.outputs[port].type}"
        if heard.chunks:
            assert {port for port, _ in heard.chunks} == {spec.stream}
            assert "".join(chunk for _, chunk in heard.chunks) == heard.outputs[spec.stream]
        seen |= heard.outputs.keys()
    assert seen == spec.outputs.keys()


def _run_sample(node_type: str, data: dict[str, Any], root: Path, port: int) -> Sink:
    if node_type == "http-request":
        data = data | {"url": data["url"].format(port=port)}
    graph, arrows = _linked("it", node_type, data)
    allowed = {"process": Processes(ProcessConfig(("sh",))), "http": HttpConfig((f"127.0.0.1:{port}",))}
    return _with_model(*graph, edges=edges_of(*arrows), root=root, **allowed)[-1]


@pytest.fixture(scope="module")
def answering() -> Iterator[int]:
    """The port of an HTTP server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self.wfile.write(b"fine")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def _linked(id: str, node_type: str, data: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The nodes and edges of a sample, with those whose outputs it takes, the node itself last."""
    nodes, arrows, plain = [], [], {}
    for port, value in data.items():
        if isinstance(value, From):
            source = f"{id}-{port}"
            above, between = _linked(source, value.node_type, SAMPLES[value.node_type][0])
            nodes += above
            arrows += [*between, f"{source}.{value.port} > {id}.{port}"]
        else:
            plain[port] = value
    return [*nodes, node(id, node_type, **plain)], arrows


def _with_model(
    *graphs: dict[str, Any],
    edges: list[dict[str, Any]] | None = None,
    root: Path | None = None,
    backend: ScriptedBackend | None = None,
    **resources: Any,
) -> list[Sink]:
    """Demand every node of a graph, one after the other, with a gateway for models; `scripted` is one of them, and what
    Ollama is asked for goes there too."""

    async def check() -> list[Sink]:
        models = {"scripted": ModelSpec("m", backend="openai", url="http://localhost")}
        gateway, sinks = Gateway(Config(models=models, cache_directory=root)), []
        try:
            async with anyio.create_task_group() as tasks:
                shared = {"gateway": gateway, "library": gateway.library, "files_root": root and str(root)}
                executor = Executor(tasks, shared | resources)
                session = Session({"nodes": list(graphs), "edges": edges or []}, SPECS, executor)
                for one in graphs:
                    sinks.append(Sink())
                    session.demand(one["id"], sinks[-1], lambda _: None)
                    with anyio.fail_after(TIMEOUT_S):
                        await sinks[-1].done.wait()
        finally:
            await gateway.close()
        return sinks

    scripted = backend or ScriptedBackend("Hello", vision=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_openai", "_ollama"):
            patch.setattr(f"demandport.inference.gateway.{name}", lambda spec: scripted)
        return anyio.run(check)


@pytest.mark.parametrize("node_type", SPECS)
def test_a_descriptor_is_plain_data_that_holds_together(node_type: str) -> None:
    spec = SPECS[node_type]
    about = spec.describe()
    assert json.loads(json.dumps(about)) == about
    assert about["description"].endswith((".", "`")) and about["category"] != "custom"
    assert spec.stream in spec.outputs and spec.runs in ("inline", "async", "thread", "host")
    for port in about["inputs"] + about["outputs"]:
        assert port["type"] in PORT_TYPES and port["name"]
    for port in spec.inputs.values():
        fit = converter(port.type)
        assert port.required or fit is None or fit(port.default) == port.default


@pytest.mark.parametrize(
    ("node_type", "port"),
    [(name, port.name) for name, spec in SPECS.items() for port in spec.inputs.values() if port.required],
)
def test_a_required_input_is_missed_at_validation_and_at_run_alike(node_type: str, port: str) -> None:
    async def problems() -> list[Any]:
        async with anyio.create_task_group() as tasks:
            return Session({"nodes": [node("it", node_type, **data)]}, SPECS, Executor(tasks, {})).problems

    sample = SAMPLES[node_type][0].items()
    data = {name: {} if isinstance(value, From) else value for name, value in sample if name != port}
    (problem,) = anyio.run(problems)
    assert (problem.code, problem.node, problem.port) == ("missing_input", "it", port)
    error = refusal_of(node_type, data)
    assert (error.code, error.node) == ("missing_input", "it")
    assert re.search(f"'{port}'.*connect it, set it by set_input, or give data.{port}", error.message)


#: The table of types that the project was given (`!` required); a descriptor may have more ports, not fewer.
PROMISED = [
    "text-input: text -> text",
    "number-input: value -> value",
    "boolean-input: value -> value",
    "selection-input: value options -> value",
    "vector-input: vector -> vector",
    "masked-text-input: text segments -> masked_prompt",
    "image-input: image_base64! bounds -> image bounds",
    "audio-input: audio_data! -> audio",
    "linked-input: value linked_value -> value",
    "human-input: prompt default auto_accept user_response -> value",
    "text-output: text stream -> text",
    "component-preview: component! props -> rendered",
    "conditional: condition! value! -> true_out false_out",
    "merge: inputs separator mode -> merged count",
    "json-filter: json! path -> value found",
    "validator: value! schema kind -> valid errors value",
    "template: template! -> text",
    "read-file: path! -> content path exists",
    "write-file: path! content! -> success path",
    "process: command! args stdin timeout_ms -> stdout stderr exit_status",
    "http-request: url! method headers body timeout_ms -> status headers body",
    "llamacpp-inference: model_path! prompt system_prompt temperature max_tokens top_p top_k min_p seed stop grammar "
    "json_schema messages context_length gpu_layers inference_settings -> response model_path model_ref usage "
    "finish_reason",
    "llm-inference: prompt! model system_prompt context messages tools image -> response tool_calls model_ref usage",
    "ollama-inference: prompt! model! system_prompt temperature max_tokens -> response model_used model_ref",
    "vision-analysis: image! prompt! model -> analysis",
    "embedding: text! model -> embedding metadata",
    "reranker: model_path! query! documents! top_k return_documents -> results scores top_document top_score",
    "unload-model: model_ref! trigger when_busy -> status trigger_passthrough",
    "tool-loop: prompt! tools! model max_turns -> response",
    "model-provider: model_name search_query -> model_name model_info model_path",
    "puma-lib: model_id query -> model_path model_ref inference_settings metadata",
    "expand-settings: inference_settings! temperature top_k -> inference_settings temperature top_k",
]


@pytest.mark.parametrize("promise", PROMISED)
def test_the_promised_ports_are_there(promise: str) -> None:
    node_type, _, ports = promise.partition(":")
    takes, gives = ([port.rstrip("!") for port in side.split()] for side in ports.split("->"))
    spec = SPECS[node_type]
    assert set(takes) <= spec.inputs.keys() and set(gives) <= spec.outputs.keys()
    assert {port for port in takes if spec.inputs[port].required} == {p.rstrip("!") for p in ports.split() if "!" in p}
    assert spec.inputs["inputs"].multiple if node_type == "merge" else True


# --------------------------------------------------------------------------------------- what goes in, what comes out

GOOD: list[Any] = [
    ("text-input", {}, {"text": ""}),
    ("text-input", {"text": 40.0}, {"text": "40.0"}),
    ("text-input", {"text": True}, {"text": "true"}),
    ("text-input", {"text": {"ä": [None]}}, {"text": '{"ä": [null]}'}),
    ("text-input", {"text": None}, {"text": ""}),
    ("number-input", {}, {"value": 0}),
    ("number-input", {"value": 1 << 60}, {"value": 1 << 60}),
    ("number-input", {"value": 40.0}, {"value": 40.0}),
    ("number-input", {"value": "40"}, {"value": 40}),
    ("number-input", {"value": "-1.5e1"}, {"value": -15.0}),
    ("boolean-input", {}, {"value": False}),
    ("boolean-input", {"value": True}, {"value": True}),
    ("boolean-input", {"value": "true"}, {"value": True}),
    ("boolean-input", {"value": "false"}, {"value": False}),
    ("selection-input", {"options": ["a", "b"]}, {"value": "a"}),
    ("selection-input", {"options": ["a", "b"], "value": "b"}, {"value": "b"}),
    ("selection-input", {"options": [{"value": 1, "label": "one"}, {"value": 2}], "value": 2}, {"value": 2}),
    ("selection-input", {"options": '["a"]', "value": "a"}, {"value": "a"}),
    ("vector-input", {"vector": []}, {"vector": []}),
    ("vector-input", {"vector": [1, -2.5]}, {"vector": [1, -2.5]}),
    ("vector-input", {"vector": "[1, -2.5]"}, {"vector": [1, -2.5]}),
    ("masked-text-input", {}, {"masked_prompt": {"segments": [], "text": ""}}),
    (
        "masked-text-input",
        {"text": "all of it"},
        {"masked_prompt": {"segments": [{"text": "all of it", "masked": False}], "text": "all of it"}},
    ),
    (
        "masked-text-input",
        {"segments": [{"text": "I am "}, {"text": "Ada", "masked": True}]},
        {
            "masked_prompt": {
                "segments": [{"text": "I am ", "masked": False}, {"text": "Ada", "masked": True}],
                "text": "I am Ada",
            }
        },
    ),
    ("linked-input", {}, {"value": None}),
    ("linked-input", {"linked_value": [1]}, {"value": [1]}),
    ("linked-input", {"linked_value": 1, "value": 0}, {"value": 0}),
    ("human-input", {"user_response": False, "auto_accept": True, "default": 1}, {"value": False}),
    ("human-input", {"auto_accept": True, "default": 0}, {"value": 0}),
    ("text-output", {}, {"text": ""}),
    ("text-output", {"text": 0}, {"text": "0"}),
    ("text-output", {"text": False}, {"text": "false"}),
    ("text-output", {"text": ["é", {"a": None}]}, {"text": '["é", {"a": null}]'}),
    ("text-output", {"stream": "s"}, {"text": "s"}),
    ("text-output", {"text": "t", "stream": "s"}, {"text": "t"}),
    ("vector-output", {"vector": [0.5]}, {"vector": [0.5]}),
    ("image-output", {"image": IMAGE}, {"image": IMAGE}),
    ("audio-output", {"audio": AUDIO}, {"audio": AUDIO}),
    ("component-preview", {"component": "Card"}, {"rendered": {"component": "Card", "props": {}}}),
    (
        "component-preview",
        {"component": {"tag": "b"}, "props": '{"a": 1}'},
        {"rendered": {"component": {"tag": "b"}, "props": {"a": 1}}},
    ),
    ("conditional", {"condition": True, "value": None}, {"true_out": None}),
    ("conditional", {"condition": False, "value": "x"}, {"false_out": "x"}),
    ("merge", {"inputs": []}, {"merged": "", "count": 0}),
    ("merge", {"inputs": "alone"}, {"merged": "alone", "count": 1}),
    ("merge", {"inputs": ["a", 1, True, {"b": 2}]}, {"merged": 'a\n1\ntrue\n{"b": 2}', "count": 4}),
    ("merge", {"inputs": ["a", "b"], "separator": ", "}, {"merged": "a, b", "count": 2}),
    ("merge", {"inputs": [[1], [], [2, [3]]]}, {"merged": [1, 2, [3]], "count": 3}),
    ("merge", {"inputs": [[1], "b"]}, {"merged": "[1]\nb", "count": 2}),
    ("merge", {"inputs": [[1], "b"], "mode": "list"}, {"merged": [1, "b"], "count": 2}),
    ("merge", {"inputs": [["a"], ["b"]], "mode": "text"}, {"merged": '["a"]\n["b"]', "count": 2}),
    (
        "merge",
        {"inputs": [{"a": 1, "b": 1}, {"b": 2}], "mode": "object"},
        {"merged": {"a": 1, "b": 2}, "count": 2},
    ),
    ("json-filter", {"json": {"a": 1}}, {"value": {"a": 1}, "found": True}),
    ("json-filter", {"json": {"a": {"b": [5, 6]}}, "path": "a.b[0]"}, {"value": 5, "found": True}),
    ("json-filter", {"json": {"a": {"b": [5, 6]}}, "path": "$.a.b[-1]"}, {"value": 6, "found": True}),
    ("json-filter", {"json": '{"a": false}', "path": "a"}, {"value": False, "found": True}),
    ("json-filter", {"json": [{"n": 1}, {"n": 9}], "path": "[?n > `5`].n"}, {"value": [9], "found": True}),
    ("json-filter", {"json": {"a b": 1}, "path": '"a b"'}, {"value": 1, "found": True}),
    ("json-filter", {"json": {"a": {}}, "path": "a.b[7].c"}, {"value": None, "found": False}),
    ("json-filter", {"json": 5, "path": "a"}, {"value": None, "found": False}),
    ("template", {"template": "no names: {x} ${x} %s {% x %}"}, {"text": "no names: {x} ${x} %s {% x %}"}),
    ("template", {"template": "{{a}}{{ b }}{{my name}}", "a": 1, "b": [True], "my name": "!"}, {"text": "1[true]!"}),
    ("template", {"template": "{{a}}", "a": "{{b}}", "b": "never read"}, {"text": "{{b}}"}),
    ("template", {"template": "{{a}}", "a": r"\1 \g<0> {0}"}, {"text": r"\1 \g<0> {0}"}),
]


@pytest.mark.parametrize(("node_type", "data", "expected"), GOOD)
def test_good_inputs(node_type: str, data: dict[str, Any], expected: dict[str, Any]) -> None:
    assert repr(outputs_of(node_type, data)) == repr(expected)  # repr: 40 is not 40.0, and 1 is not True


BAD: list[Any] = [
    ("text-input", {"text": b"x"}, "type_mismatch", "data.text .*wants text, not bytes; give a value of type string"),
    ("number-input", {"value": True}, "type_mismatch", "takes a number, not true or false"),
    ("number-input", {"value": "forty"}, "type_mismatch", "takes a number, not 'forty'"),
    ("number-input", {"value": [1]}, "type_mismatch", r"takes a number, not \[1\]"),
    ("number-input", {"value": None}, "type_mismatch", "takes a number, not None"),
    ("number-input", {"value": b"5"}, "type_mismatch", "takes a number"),
    *[("number-input", {"value": v}, "type_mismatch", "finite") for v in (math.inf, math.nan, "nan", "1e999")],
    ("number-input", {"value": "9" * 5000}, "type_mismatch", "finite"),
    *[
        ("boolean-input", {"value": v}, "type_mismatch", "takes true or false, not")
        for v in ("yes", "True", 1, 0, None, [])
    ],
    ("selection-input", {"options": ["a"], "value": "c"}, "type_mismatch", r"takes one of \['a'\], not 'c'"),
    ("selection-input", {}, "type_mismatch", "takes one of"),
    ("selection-input", {"options": 5}, "type_mismatch", "options"),
    *[
        ("vector-input", {"vector": v}, "type_mismatch", "takes a list of (finite )?numbers")
        for v in ([math.nan], [math.inf], "[1, Infinity]", "[NaN]", ["1"], [True], [[1]], {"a": 1}, 5, '"x"')
    ],
    ("vector-input", {"vector": "[1,"}, "type_mismatch", "takes a list of numbers.*does not parse"),
    *[
        pytest.param("vector-input", {"vector": v}, "type_mismatch", "takes a list", id=id)
        for id, v in (("huge", f"[1{'0' * 400}]"), ("deep", "[" * 100_000))
    ],
    *[
        ("masked-text-input", {"segments": v}, "type_mismatch", "takes segments of {text, masked}")
        for v in ([{}], ["x"], [{"text": 1}])
    ],
    ("masked-text-input", {"segments": 5}, "type_mismatch", "list of segments"),
    ("human-input", {"auto_accept": True}, "missing_input", "auto_accept needs a default"),
    ("conditional", {"condition": "true", "value": 1}, "type_mismatch", "wants true or false.*give a value of type"),
    ("conditional", {"condition": 1, "value": 1}, "type_mismatch", "wants true or false, not 1"),
    ("merge", {"inputs": [{}, "x"], "mode": "object"}, "type_mismatch", "mode object takes maps only"),
    ("merge", {"inputs": ["x"], "mode": "zip"}, "type_mismatch", "modes text, list and object, not 'zip'"),
    ("json-filter", {"json": "{", "path": "a"}, "type_mismatch", "data.json .*wants JSON.*does not parse"),
    pytest.param(
        "json-filter",
        {"json": "[" * 100_000},
        "type_mismatch",
        "wants JSON",
        id="deep-json",
    ),
    ("json-filter", {"json": {}, "path": "a["}, "type_mismatch", r"path 'a\[' is no JMESPath"),
    ("json-filter", {"json": 1, "path": "length(@)"}, "type_mismatch", "length.*invalid type"),
    ("json-filter", {"json": 1, "path": "nope(@)"}, "type_mismatch", "path 'nope.*is no JMESPath"),
    ("validator", {"value": 1}, "type_mismatch", "data.schema, or data.kind as one of json, python, svelte-5"),
    ("validator", {"value": 1, "kind": "xml"}, "type_mismatch", "one of json, python, svelte-5"),
    ("validator", {"value": 1, "schema": {"type": "nope"}}, "type_mismatch", 'data.schema is no JSON Schema: "nope"'),
    ("validator", {"value": 1, "schema": {"pattern": "("}}, "type_mismatch", "is no JSON Schema"),
    ("validator", {"value": 1, "schema": 5}, "type_mismatch", "is no JSON Schema"),
    ("validator", {"value": 1, "schema": {"$ref": "#/$defs/x"}}, "type_mismatch", "data.schema"),
    ("template", {"template": "{{a}} {{b}}", "a": 1}, "missing_input", "names 'b', which has no value; there are a"),
    ("template", {"template": "{{a}}"}, "missing_input", "there are none"),
    ("template", {"template": "{{}}", "a": 1}, "missing_input", "names ''"),
    ("template", {"template": None}, "missing_input", "data.template"),
    ("read-file", {"path": "x"}, "forbidden", "start the service with --files DIR"),
    ("write-file", {"path": "x", "content": "y"}, "forbidden", "start the service with --files DIR"),
    ("process", {"command": "sh"}, "forbidden", "name it in `allow` of the configuration's table"),
    (
        "http-request",
        {"url": "http://127.0.0.1/"},
        "forbidden",
        "name it in `allow_hosts` of the configuration's table",
    ),
]


@pytest.mark.parametrize(("node_type", "data", "code", "says"), BAD)
def test_bad_inputs_and_what_is_said_of_them(node_type: str, data: dict[str, Any], code: str, says: str) -> None:
    error = refusal_of(node_type, data)
    assert (error.code, error.node) == (code, "it"), error.message
    assert re.search(says, error.message), error.message
    assert BY_CODE[error.code] is type(error) and len(error.message) < 1000


# ----------------------------------------------------------------------------------------------- ways into a port


def test_set_input_beats_an_edge_beats_data_beats_the_default() -> None:
    source, edges = node("s", "text-input", text="edge"), edges_of("s > t")
    bare, filled = node("t", "text-input"), node("t", "text-input", text="data")
    assert evaluate(bare).outputs == {"text": ""}
    assert evaluate(filled).outputs == {"text": "data"}
    assert evaluate(source, filled, edges=edges).outputs == {"text": "edge"}
    assert evaluate(source, filled, edges=edges, given={"t": {"text": "set"}}).outputs == {"text": "set"}


def test_set_input_also_wins_in_a_port_of_many_edges_and_in_a_template() -> None:
    texts = [node(name, "text-input", text=name) for name in "ab"]
    edges = edges_of("b > m.inputs", "a > m.inputs")
    merge, filled = node("m", "merge", separator="+"), node("f", "template", template="{{a}}{{b}}{{c}}", b="-", c="-")
    assert evaluate(*texts, merge, edges=edges).outputs == {"merged": "b+a", "count": 2}
    assert evaluate(*texts, merge, edges=edges, given={"m": {"inputs": ["x"]}}).outputs == {"merged": "x", "count": 1}
    edges = edges_of("a > f.a", "b > f.b")
    assert evaluate(*texts, filled, edges=edges, given={"f": {"b": "set"}}).outputs == {"text": "aset-"}


NUMBER, TRUE, JSON = node("s", "number-input", value=40.0), node("s", "boolean-input", value=True), node("s", "merge")
CARD = node("s", "masked-text-input", text="x")
ALONG_AN_EDGE: list[Any] = [
    (NUMBER, "s > t.text", node("t", "text-input"), "40.0"),
    (node("s", "number-input", value="40"), "s > t", node("t", "text-input"), "40"),
    (TRUE, "s > t", node("t", "text-input"), "true"),
    (CARD, "s > t", node("t", "text-input"), '{"segments": [{"text": "x", "masked": false}], "text": "x"}'),
    (node("s", "merge", inputs=[1]), "s.count > t", node("t", "text-input"), "1"),
    (node("s", "linked-input", value=[1]), "s > t", node("t", "text-input"), "[1]"),
    (node("s", "text-input", text='{"a": [1]}'), "s > t", node("t", "json-filter", path="a[0]"), 1),
    (node("s", "text-input", text='"a"'), "s > t", node("t", "json-filter"), "a"),
    (CARD, "s > t", node("t", "json-filter", path="segments[0].text"), "x"),
    (node("s", "text-input", text="[1]"), "s > t", node("t", "text-output"), "[1]"),
    (node("s", "linked-input", value=True), "s > t", node("t", "conditional", value=5), 5),
]


@pytest.mark.parametrize(("source", "arrow", "target", "expected"), ALONG_AN_EDGE)
def test_a_value_is_made_to_fit_along_an_edge(source: Any, arrow: str, target: Any, expected: Any) -> None:
    assert repr(next(iter(evaluate(source, target, edges=edges_of(arrow)).outputs.values()))) == repr(expected)


UNFIT: list[Any] = [
    (node("s", "linked-input", value="true"), "s > t", node("t", "conditional", value=5), "true or false, not 'true'"),
    (node("s", "text-input", text="{"), "s > t", node("t", "json-filter"), "wants JSON.*does not parse.*from s"),
    (node("s", "number-input", value=40.5), "s > t.max_tokens",
     node("t", "llamacpp-inference", model_path="tiny", prompt="x"), "t.max_tokens wants an integer, not 40.5"),
    (node("s", "linked-input", value=b"x"), "s > t", node("t", "text-input"), "t.text wants text, not bytes"),
    (node("s", "text-input", text="{"), "s > t", node("t", "json-filter"), r"(?=.*s\.text)(?=.*t\.json)"),
    (node("s", "text-input", text="[" * 100_000), "s > t", node("t", "json-filter"), "wants JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "arrow", "target", "says"), UNFIT)
def test_a_value_that_cannot_be_made_to_fit_is_a_mismatch(source: Any, arrow: str, target: Any, says: str) -> None:
    with pytest.raises(TypeMismatch, match=says) as caught:
        evaluate(source, target, edges=edges_of(arrow))
    assert caught.value.node == "t"


@pytest.mark.parametrize("arrow", ["s > t.condition", "s > n.max_tokens", "s > v"])
def test_ports_that_never_fit_are_refused_before_anything_runs(arrow: str) -> None:
    targets = [node("t", "conditional"), node("n", "llamacpp-inference"), node("v", "vector-output")]
    with pytest.raises(
        TypeMismatch, match=r"ports that do not fit: s.text \(string\) and .*; connect ports of one type"
    ):
        evaluate(node("s", "text-input"), *targets, edges=edges_of(arrow), node_id="s")


@pytest.mark.parametrize("tokens", [40.5, "40", True])
def test_an_integer_is_wanted(tokens: Any) -> None:
    error = refusal_of("llamacpp-inference", {"model_path": "tiny", "prompt": "x", "max_tokens": tokens})
    assert error.code == "type_mismatch" and "data.max_tokens" in error.message and "integer" in error.message


# ------------------------------------------------------------------------------------------------ branches


@pytest.mark.parametrize(("side", "other"), [(True, "no"), (False, "yes")])
def test_what_hangs_on_the_other_side_is_skipped_and_never_run(side: bool, other: str) -> None:
    nodes = [
        node("c", "conditional", condition=side, value="v"), node("yes", "text-output"), node("no", "text-output"),
        node("f", "template", template="{{never filled}}"), node("after", "merge"), node("both", "merge"),
    ]  # fmt: skip
    edges = edges_of(
        "c.true_out > yes", "c.false_out > no", f"{other} > after.inputs", "yes > both.inputs", "no > both.inputs"
    )
    taken = evaluate(*nodes, edges=edges, node_id="yes" if side else "no")
    assert taken.outputs == {"text": "v"} and "skipped" not in taken.meta
    for skipped in (other, "after"):
        heard = evaluate(*nodes, edges=edges, node_id=skipped)
        assert heard.outputs == {} and heard.meta["skipped"] is True
    assert evaluate(*nodes, edges=edges, node_id="both").outputs == {"merged": "v", "count": 1}


# ------------------------------------------------------------------------------------------------ media

IMAGES = [
    (PNG, "image/png"), (b"\xff\xd8\xff\xe0----", "image/jpeg"), (b"GIF89a--", "image/gif"), (b"BM------", "image/bmp"),
    (b"RIFF----WEBPVP8 ", "image/webp"),
]  # fmt: skip
SOUNDS = [
    (b"ID3-----", "audio/mpeg"), (b"\xff\xfb------", "audio/mpeg"), (b"OggS----", "audio/ogg"),
    (b"fLaC----", "audio/flac"), (b"RIFF----WAVEfmt ", "audio/wav"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "media_type"), IMAGES + SOUNDS)
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:text/plain;charset=utf-8;base64,", "data:,"])
def test_media_are_known_by_their_first_bytes_whatever_they_claim(data: bytes, media_type: str, prefix: str) -> None:
    kind = media_type.partition("/")[0]
    port = {"image": "image_base64", "audio": "audio_data"}[kind]
    found = outputs_of(f"{kind}-input", {port: prefix + b64(data)})[kind]
    assert found == {"base64": b64(data), "media_type": media_type, "bytes": len(data)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no image of a known type"),
        (b64(b"hello"), "no image of a known type"),
        (b64(b"RIFF----WAVE"), "no image of a known type"),
        ("data:image/png;base64," + b64(b"hello"), "though it claims image/png"),
        ("data:image/svg+xml,<svg/>", "must be base64 or a data URL"),
        ("data:image/png;base64", "must be base64 or a data URL"),
        (b64(PNG)[:-2], "must be base64 or a data URL"),
        ("https://example.org/cat.png", "must be base64 or a data URL"),
    ],
)
def test_what_is_no_image_is_refused(text: str, says: str) -> None:
    error = refusal_of("image-input", {"image_base64": text})
    assert error.code == "type_mismatch" and says in error.message


def test_media_have_a_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_MEDIA_BYTES", 30)
    fitting, over = PNG + bytes(30 - len(PNG)), PNG + bytes(40 - len(PNG))
    for prefix in ("", "data:image/png;base64,"):
        assert outputs_of("image-input", {"image_base64": prefix + b64(fitting)})["image"]["bytes"] == 30
        error = refusal_of("image-input", {"image_base64": prefix + b64(over)})
        assert error.code == "too_large" and "image data is over 30 bytes" in error.message


# ------------------------------------------------------------------------------------------------ people


async def _human(tasks: anyio.abc.TaskGroup, **data: Any) -> tuple[Session, Sink, Any]:
    """A graph whose human has been asked."""
    nodes = [node("h", "human-input", prompt="Sure?", **data), node("t", "text-output"), node("x", "text-input")]
    session, sink = Session({"nodes": nodes, "edges": edges_of("h > t")}, SPECS, Executor(tasks, {})), Sink()
    demand = session.demand("t", sink, lambda _: None, events=True, deadline_ms=60_000)
    with anyio.fail_after(TIMEOUT_S):
        await sink.asked_for_input.wait()
    return session, sink, demand


def _answer(session: Session, value: Any) -> None:
    session.edit([{"op": "set_input", "node": "h", "port": "user_response", "value": value}])


def test_a_human_is_asked_once_and_answers_every_demand_that_waits() -> None:
    async def check() -> None:
        async with anyio.create_task_group() as tasks:
            session, first, demand = await _human(tasks, default="no")
            (asked,) = [event for event in first.events if event["event"] == "waiting_for_input"]
            assert (asked["node"], asked["prompt"], asked["default"]) == ("h", "Sure?", "no")
            second, other = Sink(), Sink()
            session.demand("h", second, lambda _: None, events=True)
            session.demand("x", other, lambda _: None)  # another demand does not end the wait
            await other.result()
            session.cancel(demand)  # nor does one of the waiting demands that leaves
            assert first.failure and first.failure.code == "cancelled" and not second.done.is_set()
            _answer(session, {"yes": 1})
            assert await second.result() == {"value": {"yes": 1}}
            assert not [event for event in second.events if event["event"] == "waiting_for_input"]
            again = Sink()
            session.demand("t", again, lambda _: None)
            assert await again.result() == {"text": '{"yes": 1}'}

    anyio.run(check)


def test_a_wait_ends_with_the_deadline() -> None:
    async def check() -> None:
        async with anyio.create_task_group() as tasks:
            session, waiting, _ = await _human(tasks)
            late = Sink()
            session.demand("h", late, lambda _: None, deadline_ms=1)
            with pytest.raises(DemandportError, match="not done within its 1 ms") as caught:
                await late.result()
            assert caught.value.code == "deadline_exceeded" and not waiting.done.is_set()
            _answer(session, "fine")
            assert await waiting.result() == {"text": "fine"}

    anyio.run(check)


# ------------------------------------------------------------------------------------------------ validator

SVELTE = "<script>\n  let { a } = $props();\n</script>\n<button onclick={f}>{a}</button>\n<style>b {}</style>"
VERDICTS: list[Any] = [
    ({"value": {"a": 1}, "schema": {"required": ["a"]}}, []),
    ({"value": {"a": 1}, "schema": '{"required": ["a"]}'}, []),
    ({"value": None, "schema": {"type": "null"}}, []),
    ({"value": 1, "schema": True}, []),
    ({"value": 1, "schema": {"type": "string"}}, ['value: 1 is not of type "string"']),
    ({"value": {"a": [1]}, "schema": {"properties": {"a": {"items": {"type": "null"}}}}}, ["a.0: 1 is not"]),
    ({"value": [1, "x", 2, "y"], "schema": {"items": {"type": "integer"}}}, ['1: "x" is not', '3: "y" is not']),
    ({"value": 1, "schema": False}, ["value: False schema does not allow 1"]),
    ({"value": "x" * 5, "schema": {"$defs": {"s": {"maxLength": 4}}, "$ref": "#/$defs/s"}}, ["longer than 4"]),
    ({"value": '{"a": [1]}', "kind": "json"}, []),
    ({"value": {"a": 1}, "kind": "json"}, []),
    ({"value": '{"a": }', "kind": "json"}, ["Expecting value"]),
    ({"value": "[" * 100_000, "kind": "json"}, ["nested too deep"]),
    ({"value": "[NaN]", "kind": "json"}, ["NaN"]),
    ({"value": "async def f():\n    return 1", "kind": "python"}, []),
    ({"value": "def f(:", "kind": "python"}, ["invalid syntax"]),
    ({"value": "import os; os.abort()", "kind": "python"}, []),
    ({"value": "x = '\0'", "kind": "python"}, ["null bytes"]),
    ({"value": "(" * 10_000, "kind": "python"}, ["nested parentheses"]),
    ({"value": SVELTE, "kind": "svelte-5"}, []),
    ({"value": "<p>no script at all</p>", "kind": "svelte-5"}, []),
    ({"value": "<script>let a = 1", "kind": "svelte-5"}, ["<script> is not closed"]),
    ({"value": "let a = 1</script>", "kind": "svelte-5"}, ["</script> closes nothing"]),
    ({"value": "<script><style></style></script>", "kind": "svelte-5"}, ["<style> inside <script>", "closes nothing"]),
    ({"value": "<SCRIPT lang='ts'></script>", "kind": "svelte-5"}, []),
    ({"value": "<script>\n  export let a;\n</script>", "kind": "svelte-5"}, [r"use \$props"]),
    ({"value": "<script>\n  $: b = a;\n</script>", "kind": "svelte-5"}, [r"use \$derived"]),
    ({"value": "<b on:click={f} />", "kind": "svelte-5"}, ["onclick"]),
    ({"value": "<slot />", "kind": "svelte-5"}, ["@render"]),
    ({"value": "createEventDispatcher()", "kind": "svelte-5"}, ["callback props"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "errors"), VERDICTS, ids=lambda part: str(part)[:40])
def test_validator_verdicts(data: dict[str, Any], errors: list[str]) -> None:
    found = outputs_of("validator", data)
    assert found["valid"] is (not errors) and found["value"] == data["value"]
    assert len(found["errors"]) == len(errors)
    assert all(re.search(says, said) for says, said in zip(errors, found["errors"], strict=True)), found["errors"]


def test_a_validator_lists_at_most_100_errors_and_reads_no_endless_text(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outputs_of("validator", {"value": ["x"] * 500, "schema": {"items": {"type": "null"}}})
    assert len(found["errors"]) == 100
    monkeypatch.setattr("demandport.nodes.logic.MAX_CHECKED_BYTES", 4)
    assert outputs_of("validator", {"value": "12345", "kind": "json"})["errors"] == ["longer than 4 characters"]


@pytest.mark.parametrize("pattern", ["^(a+)+$", r"^(?=a)(a|a)+\1$"])
def test_a_pattern_cannot_backtrack_without_end(pattern: str) -> None:
    assert not outputs_of("validator", {"value": "a" * 5000 + "!", "schema": {"pattern": pattern}})["valid"]


def test_a_schema_reads_no_files_and_calls_no_hosts(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"const": "the secret"}')
    error = refusal_of("validator", {"value": 1, "schema": {"$ref": secret.as_uri()}})
    assert error.code == "type_mismatch" and "the secret" not in error.message


# ------------------------------------------------------------------------------------------------ template

HOSTILE = [
    "().__class__", "a.__class__.__mro__", "__import__('os').system('true')", "7*7", "a|upper", "a()", "a[0]", "self",
    "template", "config", "a:>999999999", "0", "!r",
]  # fmt: skip


@pytest.mark.parametrize("code", HOSTILE)
def test_nothing_in_a_template_is_run(code: str) -> None:
    error = refusal_of("template", {"template": f"{{{{{code}}}}}", "a": "value"})
    assert error.code == "missing_input" and f"names {code!r}" in error.message and "there are a" in error.message


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory that file nodes may use, beside a secret that they may not."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "root-evil").mkdir()
    (tmp_path / "root-evil" / "f").write_text("secret")
    base = tmp_path / "root"
    (base / "sub").mkdir(parents=True)
    (base / "a.txt").write_text("äöü\n")
    (base / "inside").symlink_to("a.txt")
    (base / "out").symlink_to("../secret.txt")
    (base / "up").symlink_to("..")
    return base


def read(root: Path, path: str, **data: Any) -> dict[str, Any]:
    return outputs_of("read-file", {"path": path, **data}, files_root=str(root))


def write(root: Path, path: str, content: Any) -> dict[str, Any]:
    return outputs_of("write-file", {"path": path, "content": content}, files_root=str(root))


@pytest.mark.parametrize("path", ["a.txt", "./a.txt", "sub/../a.txt", "inside"])
def test_a_file_is_read(root: Path, path: str) -> None:
    assert read(root, path) == {"content": "äöü\n", "path": path, "exists": True}
    assert read(root, path, mode="bytes")["content"] == "äöü\n".encode()
    assert read(root, str(root / path))["exists"]


@pytest.mark.parametrize("path", ["nope.txt", "nope/nope.txt", "sub", "a.txt/x"])
def test_a_file_that_is_not_there_is_no_error(root: Path, path: str) -> None:
    assert read(root, path) == {"content": None, "path": path, "exists": False}


ESCAPES = ["../secret.txt", "sub/../../secret.txt", "out", "up/secret.txt", "/etc/hostname", "../root-evil/f", ".", "",
           "..", "sub/..", "a.txt\0", "~/x/../../../etc/hostname"]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
@pytest.mark.parametrize("node_type", ["read-file", "write-file"])
def test_no_path_leads_out_of_the_files_directory(root: Path, node_type: str, path: str) -> None:
    def tree() -> list[str]:
        return sorted(str(p) for p in root.parent.rglob("*"))

    before = tree()
    error = refusal_of(node_type, {"path": path, "content": "overwritten"}, files_root=str(root))
    assert error.code == "forbidden"
    assert re.search("lies outside the files directory|is empty or has a NUL", error.message)
    assert (root.parent / "secret.txt").read_text() == "secret" and tree() == before


def test_a_home_directory_is_just_a_name(root: Path) -> None:
    assert write(root, "~/x", "here")["success"] and (root / "~" / "x").read_text() == "here"


def test_files_have_a_size_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 7)
    assert read(root, "a.txt")["exists"] and write(root, "a.txt", "äöü\n")["success"]
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 6)
    for node_type in ("read-file", "write-file"):
        error = refusal_of(node_type, {"path": "a.txt", "content": "äöü\n"}, files_root=str(root))
        assert error.code == "too_large" and "over 6 bytes" in error.message


def test_bytes_are_not_taken_for_text(root: Path) -> None:
    assert write(root, "b", b"\xff\0")["success"]
    error = refusal_of("read-file", {"path": "b"}, files_root=str(root))
    assert error.code == "type_mismatch" and "read it with data.mode bytes" in error.message
    assert read(root, "b", mode="bytes")["content"] == b"\xff\0"


def test_an_unknown_mode_is_refused(root: Path) -> None:
    assert refusal_of("read-file", {"path": "a.txt", "mode": "lines"}, files_root=str(root)).code == "type_mismatch"


@pytest.mark.parametrize("content", ["new", b"new", ""])
@pytest.mark.parametrize("path", ["a.txt", "new.txt", "x/y/z.txt", "inside"])
def test_a_file_is_written_with_its_parents(root: Path, path: str, content: Any) -> None:
    assert write(root, path, content) == {"success": True, "path": path}
    assert (root / path).read_text() == ("new" if content else "")
    assert (root / "inside").is_symlink() and not [p for p in root.rglob(".*")]


def test_a_write_is_flushed_before_it_takes_the_place_of_the_old(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def replaced(source: str, target: Path) -> None:
        steps.append(f"replace {target.name}: {target.read_text().strip()} by {Path(source).read_text()}")
        assert Path(source).parent == target.parent  # a rename within one directory is atomic
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", replaced)
    write(root, "a.txt", "new")
    assert steps == ["fsync", "replace a.txt: äöü by new"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    error = refusal_of("write-file", {"path": "a.txt", "content": "new"}, files_root=str(root))
    assert error.code == "node_failed" and error.message == "a.txt cannot be written: No space left on device"
    assert (root / "a.txt").read_text() == "äöü\n" and not [p for p in root.rglob(".*")]


@pytest.mark.parametrize(
    ("path", "content", "code", "says"),
    [
        ("a.txt", {"a": 1}, "type_mismatch", "takes text or bytes, not dict"),
        ("a.txt", 5, "type_mismatch", "takes text or bytes, not int"),
        ("a.txt", None, "type_mismatch", "takes text or bytes, not NoneType"),
        ("sub", "x", "node_failed", "sub cannot be written: Is a directory"),
        ("a.txt/b", "x", "node_failed", "a.txt/b cannot be written: "),
    ],
)
def test_what_cannot_be_written_is_said(root: Path, path: str, content: Any, code: str, says: str) -> None:
    error = refusal_of("write-file", {"path": path, "content": content}, files_root=str(root))
    assert error.code == code and says in error.message
    assert (root / "a.txt").read_text() == "äöü\n" and not [p for p in root.rglob(".*")]


def test_a_file_keeps_its_permissions(root: Path) -> None:
    (root / "a.txt").chmod(0o664)
    write(root, "a.txt", "new")
    assert (root / "a.txt").stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize("path", ["loop", "x" * 300])
def test_a_path_that_the_system_refuses(root: Path, path: str) -> None:
    (root / "loop").symlink_to("loop")
    error = refusal_of("read-file", {"path": path}, files_root=str(root))
    assert not re.match(r"\w+Error: ", error.message)


# ------------------------------------------------------------------------------------------------ models


def test_integers_and_settings_reach_the_model() -> None:
    data = {"model_path": "tiny", "prompt": "Tell me about cats.", "seed": 7}
    sinks = _with_model(
        node("n", "number-input", value="5.0"),
        node("edge", "llamacpp-inference", **data),
        node("data", "llamacpp-inference", **data, max_tokens=5),
        node("settings", "llamacpp-inference", **data, max_tokens=1, inference_settings={"max_tokens": 5}),
        edges=edges_of("n > edge.max_tokens"),
    )
    answers = [sink.outputs for sink in sinks[1:]]
    assert [answer["usage"].pop("cached_tokens") for answer in answers] == [0, 11, 11]  # all but the last of the prompt
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["usage"]["completion_tokens"] == 5 and answers[0]["finish_reason"] == "length"
    assert answers[0]["model_ref"]["model"] == "tiny" and answers[0]["seed"] == 7


UNANSWERABLE = [
    ({"model_path": "/nowhere/m.gguf", "prompt": "x"}, "model_not_found", "/nowhere/m.gguf"),
    ({"model_path": "tiny"}, "type_mismatch", "prompt"),
    ({"model_path": "tiny", "prompt": "x", "messages": []}, "type_mismatch", "messages"),
    ({"model_path": "tiny", "prompt": "x", "temperature": -1}, "type_mismatch", "temperature"),
    ({"model_path": "tiny", "prompt": "x", "inference_settings": {"heat": 1}}, "type_mismatch", "has no heat; there"),
]


@pytest.mark.parametrize(("data", "code", "says"), UNANSWERABLE)
def test_a_request_that_no_model_can_answer(data: dict[str, Any], code: str, says: str) -> None:
    (sink,) = _with_model(node("it", "llamacpp-inference", **data))
    assert sink.failure and sink.failure.code == code and says in sink.failure.message and sink.failure.node == "it"


# ------------------------------------------------------------------------------------------------ the model library

PUMAS_SETTINGS = [
    {"key": "gpu_layers", "label": "GPU Layers", "param_type": "Integer", "default": -1, "constraints": {"min": -1.0}},
    {"key": "temperature", "label": "Temperature", "param_type": "Number", "default": 0.7,
     "constraints": {"min": 0.0, "max": 5.0, "allowed_values": None}},
    {"key": "voice", "label": "Voice", "param_type": "String", "default": {"label": "Leo", "value": "voice-5"},
     "constraints": {"allowed_values": [{"label": "Leo", "value": "voice-5"}, {"label": "Mia", "value": "voice-2"}]}},
]  # fmt: skip


@pytest.fixture
def shelf(tmp_path: Path) -> Library:
    """A library with a Pumas folder, two files of one name, and a damaged one."""
    folder = tmp_path / "llm" / "llama" / "some-model"
    write_gguf(folder / "weights.Q4_K_M.gguf", name="Some Model")
    about = {"model_id": "llm/llama/some-model", "model_type": "llm", "inference_settings": PUMAS_SETTINGS}
    (folder / "metadata.json").write_text(json.dumps(about))
    for name in ("a/same.gguf", "b/same.gguf"):
        write_gguf(tmp_path / name)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    return Library([tmp_path])


@pytest.mark.parametrize(
    "data",
    [{"model_id": "llm/llama/some-model"}, {"query": "SOME weights"}, {"model_id": "some model", "query": "same"}],
)
def test_puma_lib_gives_the_file_of_a_pumas_folder(shelf: Library, data: dict[str, Any]) -> None:
    path = str(shelf.directories[0] / "llm/llama/some-model/weights.Q4_K_M.gguf")
    found = outputs_of("puma-lib", data, library=shelf)
    metadata = found.pop("metadata")
    assert found == {
        "model_path": path, "model_ref": {"id": path, "model": path, "backend": "llama.cpp"},
        "inference_settings": PUMAS_SETTINGS, "model_id": "llm/llama/some-model/weights.Q4_K_M",
    }  # fmt: skip
    assert metadata["name"] == "Some Model" and metadata["pumas"]["model_type"] == "llm"
    assert metadata["quantization"] == "F32" and metadata["unusable"] is None


def test_model_provider_gives_what_the_library_knows(shelf: Library) -> None:
    found = outputs_of("model-provider", {"model_name": "Some Model"}, library=shelf)
    assert found["model_name"] == "llm/llama/some-model/weights.Q4_K_M" == found["model_info"]["id"]
    assert found["model_path"] == found["model_info"]["path"] and Path(found["model_path"]).is_file()
    tiny = outputs_of("model-provider", {"search_query": "tiny"}, library=shelf)
    assert tiny["model_name"] == "tiny" and tiny["model_path"] == str(tiny_path())
    assert outputs_of("puma-lib", {"model_id": "a/same"}, library=shelf)["inference_settings"] == []


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("some-modle", "model_not_found", "near it are llm/llama/some-model/weights.Q4_K_M"),
        ("same", "model_not_found", "'same' may be any of 2 models; name one of a/same, b/same"),
        ("cut", "model_load_failed", "cut is no sound GGUF file"),
        ("", "missing_input", "give (model_id or query|model_name or search_query)"),
    ],
)
@pytest.mark.parametrize(
    ("node_type", "port"),
    [("puma-lib", "model_id"), ("puma-lib", "query"), ("model-provider", "model_name"),
     ("model-provider", "search_query")],
)  # fmt: skip
def test_a_model_that_cannot_be_told(
    shelf: Library, node_type: str, port: str, name: str, code: str, says: str
) -> None:
    error = refusal_of(node_type, {port: name}, library=shelf)
    assert (error.code, error.node) == (code, "it") and re.search(says, error.message), error.message


@pytest.mark.parametrize(("node_type", "port"), [("puma-lib", "model_id"), ("model-provider", "model_name")])
def test_a_part_of_a_name_names_no_model(shelf: Library, node_type: str, port: str) -> None:
    error = refusal_of(node_type, {port: "weights.Q4"}, library=shelf)
    assert error.code == "model_not_found" and "near it are llm/llama/some-model/weights.Q4_K_M" in error.message


def expanded(settings: Any, **given: Any) -> dict[str, Any]:
    """What expand-settings gives, without the ports that are nil."""
    found = outputs_of("expand-settings", {"inference_settings": settings, **given})
    assert found.keys() == {"inference_settings", *library.SETTINGS}
    return {port: value for port, value in found.items() if value is not None}


def test_each_setting_has_a_port_with_its_default() -> None:
    found = expanded(PUMAS_SETTINGS)
    settings = found.pop("inference_settings")
    assert found == {"gpu_layers": -1, "temperature": 0.7}
    assert [one["value"] for one in settings] == [-1, 0.7, "voice-5"]
    assert [{**one, "value": 0} for one in PUMAS_SETTINGS] == [{**one, "value": 0} for one in settings]


OPTIONS = [{"label": "Low", "value": 0.1}, {"name": "High", "value": 0.9}, 0.5]
TOP_P = {"key": "top_p", "default": "High", "constraints": {"allowed_values": OPTIONS}}
EXPANDED: list[Any] = [
    ([{"key": "top_k", "default": 40.0}], {}, {"top_k": 40}),
    ([{"key": "top_k", "default": 40, "value": 20}], {}, {"top_k": 20}),
    ([{"key": "top_k", "default": 40, "value": 20, "override": 10}], {}, {"top_k": 10}),
    ([{"key": "top_k", "default": 40, "value": 20, "override": 10}], {"top_k": 5}, {"top_k": 5}),
    ([{"key": "top_k", "default": 40}], {"top_k": 0}, {"top_k": 0}),
    ([{"key": "top_k"}], {}, {}),
    ([], {"seed": 7}, {"seed": 7}),
    ([{"key": "min_p", "default": {"label": "None", "value": 0.0}}], {}, {"min_p": 0.0}),
    ([TOP_P], {}, {"top_p": 0.9}),
    ([TOP_P], {"top_p": "Low"}, {"top_p": 0.1}),
    ([TOP_P], {"top_p": 0.5}, {"top_p": 0.5}),
    ([{"key": "top_p", "default": "Low", "allowed_values": {"Low": 0.1, "High": 0.9}}], {}, {"top_p": 0.1}),
    ([{"key": "top_p", "default": 0.9, "options": {"Low": 0.1, "High": 0.9}}], {}, {"top_p": 0.9}),
    ([{"key": "stop", "default": ["a", "b"]}], {}, {"stop": ["a", "b"]}),
    ('[{"key": "seed", "default": 3}]', {}, {"seed": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "given", "expected"), EXPANDED)
def test_an_override_stands_over_the_default_and_labels_become_values(
    settings: Any, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = expanded(settings, **given)
    chosen = {one["key"]: one["value"] for one in found.pop("inference_settings") if "value" in one}
    assert repr(found) == repr(expected) == repr(chosen)


def test_settings_may_be_a_map() -> None:
    settings = {"temperature": 0.5, "top_k": {"default": 40}, "voice": "x", "seed": None}
    found = expanded(settings, temperature=0.2, max_tokens=9)
    assert found.pop("inference_settings") == {
        "temperature": 0.2, "top_k": 40, "voice": "x", "max_tokens": 9,
    }  # fmt: skip
    assert found == {"temperature": 0.2, "top_k": 40, "max_tokens": 9}


def test_settings_flow_from_the_library_through_the_ports(shelf: Library) -> None:
    nodes = [
        node("lib", "puma-lib", model_id="some model"), node("heat", "number-input", value=0.3),
        node("x", "expand-settings"), node("t", "text-output"),
    ]  # fmt: skip
    arrows = ["lib.inference_settings > x.inference_settings", "heat > x.temperature"]
    shown = evaluate(*nodes, edges=edges_of(*arrows, "x.temperature > t.text"), library=shelf)
    assert shown.outputs == {"text": "0.3"}
    again = [*nodes[:3], node("y", "expand-settings")]  # what comes out goes in, and keeps what was overridden
    edges = edges_of(*arrows, "x.inference_settings > y.inference_settings")
    outputs = evaluate(*again, edges=edges, library=shelf).outputs
    assert outputs["temperature"] == 0.3 and outputs["gpu_layers"] == -1 and outputs["top_k"] is None


BAD_SETTINGS: list[Any] = [
    (5, {}, "inference_settings must be a list or a map, not int"),
    ([5], {}, r"inference_settings\[0\] must be a map with a key"),
    ([{"key": "a"}, {"label": "b"}], {}, r"inference_settings\[1\] must be a map with a key"),
    ([{"key": "a"}, {"key": "a"}], {}, r"inference_settings\[1\] must be a map with a key of its own"),
    ([{"key": "top_k", "default": 1.5}], {}, "setting top_k wants an integer, not 1.5"),
    ([{"key": "top_p", "default": "much"}], {}, "setting top_p wants a number, not 'much'"),
    ([], {"top_p": "much"}, "setting top_p wants a number, not 'much'"),
    (PUMAS_SETTINGS, {"temperature": 6}, "setting temperature must be at most 5.0, not 6"),
    (PUMAS_SETTINGS, {"gpu_layers": -2}, "setting gpu_layers must be at least -1.0, not -2"),
    ([{**PUMAS_SETTINGS[2], "value": "Zoe"}], {}, "setting voice must be one of Leo, Mia, not 'Zoe'"),
    ([{"key": "top_k", "default": True, "options": [1, 2]}], {}, "setting top_k must be one of 1, 2, not True"),
    ("[{", {}, "does not parse"),
]


@pytest.mark.parametrize(("settings", "given", "says"), BAD_SETTINGS)
def test_settings_that_cannot_hold(settings: Any, given: dict[str, Any], says: str) -> None:
    error = refusal_of("expand-settings", {"inference_settings": settings, **given})
    assert error.code == "type_mismatch" and re.search(says, error.message), error.message
