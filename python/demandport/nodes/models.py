"""Models and inference."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import TypeMismatch
from demandport.graph.spec import Port
from demandport.inference.backend import Finished, Progress
from demandport.inference.config import ModelSpec
from demandport.inference.gateway import Gateway
from demandport.inference.requests import GenerateRequest

Prompt = Annotated[str, Port(type="prompt")]
#: Ports that are sampling parameters of the request, by the names they have there.
_PARAMETERS = (
    "system_prompt", "messages", "raw", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty",
    "frequency_penalty", "presence_penalty", "seed", "stop", "grammar", "json_schema",
)  # fmt: skip
_OUTPUTS = {
    "response": "string",
    "model_path": "string",
    "model_ref": "model_handle",
    "usage": "json",
    "finish_reason": "string",
    "seed": "integer",
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
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    stop: Any = None,
    grammar: str | None = None,
    json_schema: dict[str, Any] | None = None,
    context_length: int | None = None,
    gpu_layers: int = 0,
    threads: int | None = None,
    inference_settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generates text with a GGUF model in its own worker process, and streams it.

    `model_path` is a file, or "tiny" for the model that comes with the package. `inference_settings` gives parameters
    by name, over those of the ports. With no `max_tokens` it is 512, or what the context holds. Cancel stops the model
    before its next token.
    """
    parameters = {name: value for name, value in locals().items() if name in _PARAMETERS and value is not None}
    parameters |= _settings(inference_settings)
    if messages is None:
        parameters["prompt"] = prompt
    spec = ModelSpec(model_path, context_length=context_length, gpu_layers=gpu_layers, threads=threads)
    gateway: Gateway = ctx.resources["gateway"]
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        ctx.write(text)

    request = GenerateRequest.from_options(parameters)
    finished: Finished | None = None
    async with aclosing(await gateway.generate(request, spec, on_text=take)) as events:
        async for event in events:
            if isinstance(event, Progress):
                ctx.progress(event.done, event.total, event.unit)
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None, "a generation that does not fail ends with Finished"
    return {
        "response": "".join(pieces),
        "model_path": model_path,
        "model_ref": {"model": model_path, "backend": "llama.cpp"},
        "usage": None if finished.usage is None else asdict(finished.usage),
        "finish_reason": finished.finish_reason,
        "seed": finished.seed,
    }


def _settings(settings: dict[str, Any] | None) -> dict[str, Any]:
    unknown = (settings or {}).keys() - set(_PARAMETERS)
    if unknown:
        raise TypeMismatch(
            f"inference_settings has no {', '.join(sorted(unknown))}; there are {', '.join(_PARAMETERS)}"
        )
    return settings or {}
