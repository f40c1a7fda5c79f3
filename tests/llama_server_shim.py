"""A program that takes llama-server's flags and serves `llama_cpp.server` with what else llama-server has: 503 while it
loads, then 200 on /health. For the life of a sidecar without the binary.

LLAMA_SHIM_GATE names a file without which it does not begin to load; LLAMA_SHIM_HOLD one that, while it is there, keeps
every streamed answer from going on after its first text.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

Scope = dict[str, Any]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--host"):
        parser.add_argument(flag, required=True)
    for flag in ("--port", "--ctx-size", "--parallel", "--threads"):
        parser.add_argument(flag, type=int, default=1)
    return parser.parse_known_args()[0]


class Shim:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._inner: Any = None
        self._hold = Path(os.environ.get("LLAMA_SHIM_HOLD", os.devnull + "/none"))
        threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        gate = os.environ.get("LLAMA_SHIM_GATE")
        while gate and not os.path.exists(gate):
            time.sleep(0.005)
        if not Path(self._options.model).read_bytes().startswith(b"GGUF"):
            print("0.00.001.000 E llama_model_load: error loading model: invalid magic", flush=True)
            print("0.00.002.000 E srv  llama_server: exiting due to model loading error", flush=True)
            os._exit(1)
        from llama_cpp.server.app import create_app
        from llama_cpp.server.settings import ModelSettings, ServerSettings

        model = ModelSettings(
            model=self._options.model,
            n_ctx=self._options.ctx_size // self._options.parallel,
            n_threads=1,
            verbose=False,
        )
        server = ServerSettings(api_key=os.environ["LLAMA_API_KEY"], interrupt_requests=False)
        self._inner = create_app(server_settings=server, model_settings=[model])

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if self._inner is None:
            await self._say(send, 503, b'{"error": {"message": "Loading model", "code": 503}}')
        elif scope["path"] == "/health":
            await self._say(send, 200, b'{"status": "ok"}')
        else:
            await self._inner(scope, receive, self._held(send))

    def _held(self, send: Any) -> Any:
        async def slowly(message: dict[str, Any]) -> None:
            await send(message)
            while b'"content": "' in message.get("body", b"") and self._hold.exists():
                await asyncio.sleep(0.005)

        return slowly

    async def _say(self, send: Any, status: int, body: bytes) -> None:
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    options = parsed()
    print("shim: starting", file=sys.stderr, flush=True)
    uvicorn.run(Shim(options), host=options.host, port=options.port, log_level="warning", lifespan="off")
