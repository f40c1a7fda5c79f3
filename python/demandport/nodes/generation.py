"""Text from models: one node type per way to ask."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import (
    Cancelled,
    DeadlineExceeded,
    DemandportError,
    HostUnavailable,
    NodeFailed,
    TypeMismatch,
)
from demandport.graph.spec import Port, read_json
from demandport.inference.backend import Finished, Progress, ToolCall
from demandport.inference.config import ModelSpec
from demandport.inference.gateway import Gateway
from demandport.inference.requests import GenerateRequest
from demandport.nodes.library import setting_values
from demandport.nodes.media import data_url
from demandport.nodes.schemas import checker

Prompt = Annotated[str, Port(type="prompt")]
Image = Annotated[Any, Port(type="image")]
KvCache = Annotated[dict[str, Any], Port(type="kv_cache")]
Tools = Annotated[list[Any], Port(type="tools")]
#: Ports of llamacpp-inference that are parameters of the request, by the names they have there.
_PARAMETERS = (
    "system_prompt", "messages", "raw", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty",
    "repeat_last_n", "frequency_penalty", "presence_penalty", "seed", "stop", "grammar", "json_schema", "logprobs",
    "adapters",
)  # fmt: skip
#: Ports of it that say how the model is loaded.
_LOADING = ("context_length", "gpu_layers", "threads")
_OUTPUTS = {
    "response": "string",
    "model_path": "string",
    "model_ref": "model_handle",
    "usage": "json",
    "finish_reason": "string",
    "seed": "integer",
    "logprobs": "json",
    "kv_cache_out": "kv_cache",
}


@node("llamacpp-inference", category="inference", outputs=_OUTPUTS, stream="response")
async def llamacpp_inference(
    ctx: Context,
    model_path: str,
    prompt: Prompt | None = None,
    system_prompt: str | None = None,
    messages: list[Any] | None = None,
    raw: bool = False,
    max_tokens: int | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    top_k: int = 40,
    min_p: float = 0.05,
    repeat_penalty: float = 1.0,
    repeat_last_n: int = 64,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    stop: Any = None,
    grammar: str | None = None,
    json_schema: dict[str, Any] | None = None,
    logprobs: int | None = None,
    adapters: list[Any] | None = None,
    context_length: int | None = None,
    gpu_layers: int | None = None,
    threads: int | None = None,
    inference_settings: Annotated[Any, Port(type="json")] = None,
    kv_cache_in: KvCache | None = None,
) -> dict[str, Any]:
    """Generates text with a GGUF model in its own worker process, and streams it.

    `model_path` is a file, a name of the model library, or "tiny" for the model that comes with the package.
    `inference_settings` gives values by the names of ports, over those of the ports: a map, or a list of settings as
    puma-lib gives it. With no `max_tokens` it is 512, or what the context holds. With `kv_cache_in` the text goes on
    where that was left. Cancel stops the model before its next token.
    """
    given = {name: value for name, value in locals().items() if name in (*_PARAMETERS, *_LOADING)}
    given |= _settings(inference_settings)
    parameters = {name: value for name, value in given.items() if name in _PARAMETERS and value is not None}
    if messages is None:
        parameters["prompt"] = prompt
    if kv_cache_in is not None:
        parameters["kv_cache"] = kv_cache_in
    spec = ModelSpec.from_options({"model": model_path} | {name: given[name] for name in _LOADING})
    response, finished = await _generate(ctx, parameters, spec)
    return {
        "response": response,
        "model_path": model_path,
        "model_ref": finished.model_ref,
        "usage": _usage(finished),
        "finish_reason": finished.finish_reason,
        "seed": finished.seed,
        "logprobs": finished.logprobs,
        "kv_cache_out": finished.kv_cache,
    }


_LLM_OUTPUTS = {"response": "string", "tool_calls": "json", "model_ref": "model_handle", "usage": "json"}


@node("llm-inference", category="inference", outputs=_LLM_OUTPUTS, stream="response")
async def llm_inference(
    ctx: Context,
    prompt: Prompt,
    model: str | None = None,
    system_prompt: str | None = None,
    context: str | None = None,
    messages: list[Any] | None = None,
    tools: Tools | None = None,
    tool_choice: str | None = None,
    image: Image | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Any = None,
    json_schema: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generates text with any configured model, whichever backend runs it, and streams it.

    `model` is a name of the configuration or the library; without one the default. `messages` is what was said before
    the prompt, `context` what the model is to know. Parameters that are not given are the backend's own. Cancel stops
    the model, or closes the connection.
    """
    said = {
        "tools": tools,
        "tool_choice": tool_choice,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "json_schema": json_schema,
        "system_prompt": "\n\n".join(part for part in (system_prompt, context) if part) or None,
    }
    response, finished = await _generate(ctx, said | _conversation(prompt, messages, image), model)
    return {
        "response": response,
        "tool_calls": [asdict(call) for call in finished.tool_calls],
        "model_ref": finished.model_ref,
        "usage": _usage(finished),
    }


_OLLAMA_OUTPUTS = {"response": "string", "model_used": "string", "model_ref": "model_handle", "usage": "json"}


@node("ollama-inference", category="inference", outputs=_OLLAMA_OUTPUTS, stream="response")
async def ollama_inference(
    ctx: Context,
    prompt: Prompt,
    model: str,
    system_prompt: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Generates text with a model of Ollama, and streams it.

    Where Ollama is, the configuration says (`ollama_url`, or an entry of that model). Cancel closes the connection.
    """
    parameters = {
        "prompt": prompt,
        "system_prompt": system_prompt,
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    response, finished = await _generate(ctx, parameters, _gateway(ctx).ollama(model))
    return {
        "response": response,
        "model_used": finished.model or model,
        "model_ref": finished.model_ref,
        "usage": _usage(finished),
    }


_VISION_OUTPUTS = {"analysis": "string", "model_ref": "model_handle", "usage": "json"}


@node("vision-analysis", category="inference", outputs=_VISION_OUTPUTS, stream="analysis")
async def vision_analysis(
    ctx: Context, image: Image, prompt: Prompt, model: str | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Has a model with vision say something of an image, and streams it.

    The image's media type is read from its data. A model without vision is an error. Cancel as for llm-inference.
    """
    parameters = _conversation(prompt, None, image) | {"max_tokens": max_tokens}
    analysis, finished = await _generate(ctx, parameters, model)
    return {"analysis": analysis, "model_ref": finished.model_ref, "usage": _usage(finished)}


_LOOP_OUTPUTS = {"response": "string", "messages": "json", "turns": "integer", "usage": "json"}


@node("tool-loop", category="inference", outputs=_LOOP_OUTPUTS, stream="response")
async def tool_loop(
    ctx: Context,
    prompt: Prompt,
    tools: Tools,
    model: str | None = None,
    system_prompt: str | None = None,
    messages: list[Any] | None = None,
    max_turns: int = 8,
    max_tokens: int | None = None,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Lets a model call tools until it calls none; the host runs them. Streams what the model says.

    `messages` is what was said before the prompt, and comes out as the whole conversation. What a tool answers goes
    back to the model as text, an error too. A conversation that still calls tools after `max_turns` turns is an error.
    Cancel stops whatever runs.
    """
    if max_turns < 1:
        raise TypeMismatch(f"max_turns must be at least 1, not {max_turns}")
    said = [*(messages or []), {"role": "user", "content": prompt}]
    answers, usage = [], {"prompt_tokens": 0, "completion_tokens": 0}
    for turn in range(1, max_turns + 1):
        parameters = {
            "messages": said,
            "system_prompt": system_prompt,
            "tools": tools,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        answer, finished = await _generate(ctx, parameters, model)
        answers.append(answer)
        for name in usage:
            usage[name] += (_usage(finished) or {}).get(name) or 0
        said.append(_as_message(answer, finished.tool_calls))
        if not finished.tool_calls:
            return {"response": "".join(answers), "messages": said, "turns": turn, "usage": usage}
        for call in finished.tool_calls:
            said.append({"role": "tool", "tool_call_id": call.id, "content": await _called(ctx, call)})
    raise NodeFailed(f"the model still calls tools after {max_turns} turns", details={"messages": said})


async def _called(ctx: Context, call: ToolCall) -> str:
    """What a tool answers, as text."""
    call_tool = ctx.resources.get("call_tool")
    if call_tool is None:
        raise HostUnavailable("the host runs no tools")
    ctx.event("tool_call", tool=call.name, call=call.id)
    try:
        answer = await call_tool(ctx, call.name, read_json(call.arguments or "{}"))
    except ValueError as wrong:
        return f"error: the arguments are no JSON: {wrong}"
    except (Cancelled, DeadlineExceeded, HostUnavailable):
        raise
    except DemandportError as failed:
        return f"error: {failed.message}"
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _as_message(answer: str, calls: tuple[ToolCall, ...]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer}
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


# ---------------------------------------------------------------------------------------------------------- shared


async def _generate(ctx: Context, parameters: Mapping[str, Any], model: ModelSpec | str | None) -> tuple[str, Finished]:
    """Ask the model, and stream what it says; returns the whole text and how it ended."""
    request = GenerateRequest.from_options({"priority": ctx.priority, **parameters})
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        ctx.write(text)

    finished: Finished | None = None
    events: AsyncGenerator[Any, None] = _gateway(ctx).generate(request, model, on_text=take)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Progress):
                ctx.progress(event.done, event.total, event.unit)
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None, "a generation that does not fail ends with Finished"
    text = "".join(pieces)
    if request.json_schema is not None:
        _check_answer(text, request.json_schema, finished)
    return text, finished


def _check_answer(text: str, schema: Mapping[str, Any], finished: Finished) -> None:
    """Grammars do not know every keyword, and a text may be cut off: what comes out is looked at once more."""
    from jsonschema_rs import ValidationError

    facts = {"finish_reason": finished.finish_reason, "text": text[:1000]}
    if finished.finish_reason == "length":
        raise TypeMismatch("the answer is cut off by max_tokens, so it does not follow json_schema", details=facts)
    try:
        checker(dict(schema)).validate(read_json(text))
    except ValidationError as wrong:
        raise TypeMismatch(f"the answer does not follow json_schema: {wrong.message}", details=facts) from None
    except ValueError as wrong:
        raise TypeMismatch(f"the answer is no JSON, or json_schema no schema: {wrong}", details=facts) from None


def _gateway(ctx: Context) -> Gateway:
    gateway: Gateway = ctx.resources["gateway"]
    return gateway


def _usage(finished: Finished) -> dict[str, Any] | None:
    return None if finished.usage is None else asdict(finished.usage)


def _conversation(prompt: str, messages: list[Any] | None, image: Any) -> dict[str, Any]:
    """The parameters that say what the model is told last."""
    if messages is None and image is None:
        return {"prompt": prompt}
    content: Any = prompt
    if image is not None:
        content = [
            {"type": "text", "text": prompt},
            {"type": "image_url", "image_url": {"url": data_url(image, "image")}},
        ]
    return {"messages": [*(messages or []), {"role": "user", "content": content}]}


def _settings(settings: Any) -> dict[str, Any]:
    """The values of `inference_settings`, all of which must be known."""
    values = setting_values(settings)
    unknown = values.keys() - {*_PARAMETERS, *_LOADING}
    if unknown:
        known = ", ".join((*_PARAMETERS, *_LOADING))
        raise TypeMismatch(f"inference_settings has no {', '.join(sorted(unknown))}; there are {known}")
    return values
