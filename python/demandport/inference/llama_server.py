"""llama.cpp's own server as a sidecar: a process of ours that is started when needed, watched, and started again.

Source of its flags and of what it has besides OpenAI's API: ``tools/server`` of llama.cpp (``README.md``,
``server-schema.cpp``, ``server-context.cpp``).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from demandport.errors import BackendUnavailable, DemandportError, Forbidden, ModelLoadFailed, WorkerCrash
from demandport.inference.backend import (
    BackendHealth,
    BackendState,
    Capabilities,
    Embeddings,
    Event,
    LogSink,
    Operation,
    Progress,
)
from demandport.inference.config import ModelSpec
from demandport.inference.http import Again, HttpServer, ServerBackend
from demandport.inference.openai import PARAMETERS as API_PARAMETERS
from demandport.inference.openai import OpenAIClient
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest, draw_seed
from demandport.settings import wrong
from demandport.workers.policy import Restarts
from demandport.workers.spawner import LocalSpawner, Program, Spawner

#: What of a `GenerateRequest` llama-server has: the API's parameters and its own.
_OWN = ("top_k", "min_p", "repeat_penalty", "repeat_last_n", "grammar")
PARAMETERS = API_PARAMETERS | {*_OWN}
#: Generations that it computes at once; more wait in it. Each has the whole `context_length`.
SLOTS = 4
DEFAULT_CONTEXT = 4096
#: How long after its connection broke a server's end may still come.
DEATH_S = 1.0
POLL_S = 0.05
PROGRESS_S = 0.25
STOP_GRACE_S = 1.0
_PURPOSES: dict[Operation, tuple[str, ...]] = {"generate": (), "embed": ("--embeddings",), "rerank": ("--reranking",)}
# Flags that are set here, so that a second one would break what depends on them.
_OURS = {"--host", "--port", "--api-key", "--api-key-file", "--api-prefix", "-m", "--model", "--ssl-key-file"}
# Time since its start and a letter for the level, before each line of newer ones.
_LOG_PREFIX = re.compile(r"^[\d.]+ [A-Z] ")
_TELLING = re.compile(r"error|fail|assert|abort|exception|invalid|terminate|not found|cannot", re.IGNORECASE)
# Ends that were brought about from outside, and say nothing about the model.
_FROM_OUTSIDE = ("killed by SIGKILL", "killed by SIGTERM")


class LlamaServerBackend(ServerBackend):
    """One model in a llama-server of its own, started when first needed and again after its end.

    It listens on 127.0.0.1 alone, on a port that the kernel draws, and wants a key that is drawn for each start and
    handed over in its environment, which other users cannot read. Methods, errors and cancelling: `ServerBackend`;
    besides, `worker_crash` for what ran in it when it died, and `model_load_failed` with what it said when it dies
    before it is ready; after several such ends in a row it is not started again for a while. Where no seed is given one
    is drawn and told.

    Args:
        spec: `binary` and `arguments` say what to run; of the arguments, ``--parallel`` is looked at.
        path: the model's file, the first one of several.
        mmproj: the projector of a vision model; with it, messages may have images.
        purpose: the one operation it is started for; None: what `arguments` say (``--embeddings``, ``--reranking``),
            else ``generate``. A llama-server for embeddings computes in another way, so it is one of its own.
        size_bytes: of all the model's files, to report progress by; 0: none is reported.
        on_log: gets (level, logger, text) of what it writes.
        restarts: when it may be started again.
        spawner: what starts it.

    Raises:
        TypeMismatch: `arguments` hold a flag that is set here.
    """

    kind = "llama-server"

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        mmproj: Path | None = None,
        *,
        purpose: Operation | None = None,
        size_bytes: int = 0,
        on_log: LogSink | None = None,
        restarts: Restarts | None = None,
        spawner: Spawner | None = None,
    ) -> None:
        super().__init__(spec, f"llama-server of {spec.model}", retries=0)
        for flag in (argument.partition("=")[0] for argument in spec.arguments):
            if flag in _OURS:
                raise wrong("arguments", f"must not hold {flag}, which is set for you")
        self.path, self.mmproj = path, mmproj
        self.purpose: Operation = purpose or _purpose(spec.arguments)
        self.restarts = 0
        self._size_bytes = size_bytes
        self._on_log = on_log
        self._policy = restarts or Restarts()
        self._spawner = spawner or LocalSpawner()
        self._starting: asyncio.Task[_Sidecar] | None = None
        self._sidecar: _Sidecar | None = None
        self._past: list[_Sidecar] = []
        self._crashed = False

    def capabilities(self) -> Capabilities:
        """What it can do."""
        parameters = PARAMETERS if self.purpose == "generate" else frozenset()
        return Capabilities(frozenset({self.purpose}), parameters, vision=self.mmproj is not None)

    def health(self) -> BackendHealth:
        """How it stands now."""
        pid = self._sidecar.program.pid if self._sidecar else None
        return BackendHealth(self._state(), self._entered, pid, self.restarts, self._crashed)

    async def load(self) -> dict[str, Any]:
        """Have it started and its model loaded, once however many ask; its `context_length`, `parameters` and
        `size_bytes` as far as it tells.

        Raises:
            BackendUnavailable: there is no such program, or it says nothing for a minute.
            ModelLoadFailed: it ended before it was ready; the message has what it said.
            WorkerCrash: it was killed before it was ready.
        """
        await self._called(self._ready)
        return self.info

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        seed = draw_seed() if request.seed is None else request.seed
        async for progress in self._progress():
            yield progress
        sidecar = await self._ready()
        try:
            async with aclosing(sidecar.client.generate(replace(request, seed=seed))) as events:
                async for event in events:
                    yield event
        except (Again, BackendUnavailable) as failed:
            raise await self._explained(sidecar, failed) from None
        self._policy.succeeded()

    async def _embed(self, request: EmbedRequest) -> Embeddings:
        sidecar = await self._ready()
        try:
            return await sidecar.client.embed(request, {"embd_normalize": 2 if request.normalize else -1})
        except (Again, BackendUnavailable) as failed:
            raise await self._explained(sidecar, failed) from None

    async def _rerank(self, request: RerankRequest) -> list[float]:
        sidecar = await self._ready()
        try:
            return await sidecar.client.rerank(request)
        except (Again, BackendUnavailable) as failed:
            raise await self._explained(sidecar, failed) from None

    async def _close(self) -> None:
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.cancel()
            await asyncio.wait({starting})
        if self._sidecar is not None:
            await self._sidecar.program.stop(STOP_GRACE_S)
        await self._disconnect()

    async def _disconnect(self) -> None:
        """Close the connections to servers that have ended."""
        while self._past:
            await self._past.pop().disconnect()

    def _state(self) -> BackendState:
        if self._closing.is_set():
            return "closed"
        if self._starting is not None:
            return "ready" if self._starting.done() else "loading"
        return "quarantined" if self._policy.quarantined and self._pause_s() else "stopped"

    def _pause_s(self) -> float:
        return self._policy.wait_s(asyncio.get_running_loop().time())

    # -------------------------------------------------------------------------------------------- the process

    async def _ready(self) -> _Sidecar:
        """The running server; starts one where none runs. Who is cancelled here does not stop it for the others."""
        starting = self._start()
        await asyncio.wait({starting})
        if starting.cancelled():
            raise self._unloaded()
        failed = starting.exception()
        if isinstance(failed, DemandportError):
            # Each that waits gets an error of its own, since raising one writes its traceback into it.
            raise type(failed)(failed.message, details=failed.details)
        return starting.result()

    def _start(self) -> asyncio.Task[_Sidecar]:
        if self._closing.is_set():
            raise self._unloaded()
        if self._starting is None:
            self._starting = asyncio.create_task(self._started(), name=f"start {self.name}")
            self._starting.add_done_callback(self._look_at)
        return self._starting

    async def _started(self) -> _Sidecar:
        pause_s = self._pause_s()
        if pause_s and self._policy.quarantined:
            raise ModelLoadFailed(
                f"{self.name} has ended {self._policy.failures} times in a row; it is tried again in {pause_s:.0f} s",
                details={"retry_after_ms": int(pause_s * 1000)},
            )
        await asyncio.sleep(pause_s)
        await self._disconnect()
        sidecar = _Sidecar(self, self._on_log)
        command = [self.spec.binary, *_flags(self.spec, self.path, self.mmproj, self.purpose)]
        try:
            sidecar.start(self._spawner, command)
        except OSError as failed:
            raise BackendUnavailable(f"llama-server cannot be started: {failed}; name it by `binary`") from None
        self._sidecar = sidecar
        try:
            self.info = await sidecar.ready()
        except BaseException:
            sidecar.program.kill()
            raise
        self._crashed = False
        return sidecar

    def ended(self, sidecar: _Sidecar, reason: str) -> None:
        """A server has ended; the next request starts another."""
        if sidecar is not self._sidecar:
            return
        self._sidecar = None
        self._past.append(sidecar)
        if self._closing.is_set():
            return
        self._crashed = True
        if sidecar.is_ready:
            self.restarts += 1
            self._starting = None
        if not sidecar.is_ready or reason not in _FROM_OUTSIDE:
            self._policy.died(asyncio.get_running_loop().time())

    def _look_at(self, starting: asyncio.Task[_Sidecar]) -> None:
        """A start that failed is not kept; all who waited for it may have been cancelled."""
        if (starting.cancelled() or starting.exception() is not None) and self._starting is starting:
            self._starting = None

    async def _explained(self, sidecar: _Sidecar, failed: Again | BackendUnavailable) -> Exception:
        """The error for a request that failed: a connection that breaks is most often a server that has died."""
        error = failed.error if isinstance(failed, Again) else failed
        if isinstance(error, BackendUnavailable) and not error.details:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEATH_S):
                    await sidecar.program.wait()
        if sidecar.exit_reason is None:
            return error
        facts = {"reason": sidecar.exit_reason}
        return WorkerCrash(f"{self.name} has died: {sidecar.said(sidecar.exit_reason)}", details=facts)

    async def _progress(self) -> AsyncGenerator[Progress, None]:
        """How much of the model is in memory, while it is being loaded: what the process holds says it best."""
        starting = self._start()
        while self._size_bytes and not starting.done():
            await asyncio.wait({starting}, timeout=PROGRESS_S)
            if self._sidecar is not None and not starting.done():
                held = await asyncio.to_thread(_resident_bytes, self._sidecar.program.pid)
                yield Progress(min(held, self._size_bytes), self._size_bytes, "load_bytes")


class _Sidecar:
    """One run of llama-server: its process, its key, the connection to it.

    Attributes:
        is_ready: it has been. exit_reason: None while it runs.
    """

    program: Program
    client: OpenAIClient

    def __init__(self, owner: LlamaServerBackend, on_log: LogSink | None) -> None:
        self._owner, self._on_log = owner, on_log
        self._key = secrets.token_urlsafe(32)
        self._server: HttpServer | None = None
        self._telling: deque[str] = deque(maxlen=5)
        self.is_ready = False
        self.exit_reason: str | None = None

    def start(self, spawner: Spawner, command: Sequence[str]) -> None:
        """Start the process. Raises OSError."""
        self.program = spawner.spawn(
            command,
            name=self._owner.name,
            on_line=self._wrote,
            on_exit=self._exited,
            environment={"LLAMA_API_KEY": self._key},
        )

    async def ready(self) -> dict[str, Any]:
        """Wait until it has loaded its model; facts about that."""
        silent_s = self._owner.spec.timeout_ms / 1000
        port = await self._heard(self._port, silent_s)
        url, name, timeout_ms = f"http://127.0.0.1:{port}", self._owner.name, self._owner.spec.timeout_ms
        self._server = HttpServer(url, name=name, timeout_ms=timeout_ms, key=self._key)
        api = HttpServer(f"{url}/v1", name=name, timeout_ms=timeout_ms, key=self._key)
        self.client = OpenAIClient(api, self._owner.spec.model, self._extras)
        await self._heard(self._healthy, silent_s)
        info = await self._facts()
        self.is_ready = True
        return info

    def said(self, reason: str) -> str:
        """Why it ended, as far as it said so: the first of its last complaints, which the others follow from."""
        return f"{self._telling[0]} ({reason})" if self._telling else reason

    async def disconnect(self) -> None:
        """Close the connections to it."""
        if self._server is not None:
            await self._server.close()
            await self.client.close()

    async def _heard(self, look: Callable[[], Any], silent_s: float) -> Any:
        """What `look` finds, asked again and again; the time limit begins anew whenever it hears "not yet" (False)."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while True:
            found = await look()
            if self.exit_reason is not None:
                raise self._died()
            if found:
                return found
            if found is False:
                heard = loop.time()
            elif loop.time() - heard > silent_s:
                raise BackendUnavailable(f"{self._owner.name} has said nothing for {silent_s:g} s while starting")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self.program.wait()

    async def _port(self) -> int | None:
        return await asyncio.to_thread(_listening_port, self.program.pid)

    async def _healthy(self) -> bool | None:
        assert self._server is not None
        try:
            await self._server.ask("GET", "health")
            return True
        except Again as failed:
            # 503 is its way of saying that it is still loading.
            return False if (failed.error.details or {}).get("status") == 503 else None

    async def _facts(self) -> dict[str, Any]:
        """What it tells of the model; also shows that it takes our key."""
        assert self._server is not None
        info: dict[str, Any] = {}
        for path, read in (("props", _of_props), ("v1/models", _of_models)):
            try:
                info |= read(await self._server.ask("GET", path))
            except Forbidden:
                raise
            except (Again, DemandportError, KeyError, TypeError, IndexError):
                continue
        return info

    def _died(self) -> DemandportError:
        reason = self.exit_reason or ""
        if reason in _FROM_OUTSIDE:
            return WorkerCrash(f"{self._owner.name} was ended while loading: {reason}", details={"reason": reason})
        said = f"{self._owner.path} cannot be loaded by llama-server: {self.said(reason)}"
        return ModelLoadFailed(said, details={"reason": reason, "said": list(self._telling)})

    def _wrote(self, line: str) -> None:
        line = _LOG_PREFIX.sub("", line.replace(self._key, "***"))
        telling = _TELLING.search(line) is not None
        if telling:
            self._telling.append(line)
        if self._on_log is not None and line.strip():
            self._on_log("warning" if telling else "debug", self._owner.name, line)

    def _exited(self, reason: str) -> None:
        self.exit_reason = reason
        self._owner.ended(self, reason)

    def _extras(self, request: GenerateRequest) -> dict[str, Any]:
        """What llama-server knows besides the API."""
        extras = {name: getattr(request, name) for name in _OWN if getattr(request, name) is not None}
        if request.repeat_last_n == -1:
            extras["repeat_last_n"] = self._owner.info.get("context_length", DEFAULT_CONTEXT)
        if request.logprobs is not None:
            # It reports none at all where 0 others are asked for.
            extras["logprobs" if request.raw else "top_logprobs"] = max(1, request.logprobs)
        return extras | {"cache_prompt": True, "return_progress": True}


# ------------------------------------------------------------------------------------------------- the command


def _purpose(arguments: Sequence[str]) -> Operation:
    given = set(arguments)
    if given & {"--rerank", "--reranking"}:
        return "rerank"
    return "embed" if given & {"--embedding", "--embeddings"} else "generate"


def _flags(spec: ModelSpec, path: Path, mmproj: Path | None, purpose: Operation) -> list[str]:
    """Arguments of llama-server; those of the configuration come last, and so prevail."""
    context = spec.context_length or DEFAULT_CONTEXT
    slots = _slots(spec.arguments)
    # It shares its context out among the slots.
    flags = ["--model", str(path), "--host", "127.0.0.1", "--port", "0", "--alias", spec.model, "--no-webui"]
    flags += ["--parallel", str(slots), "--ctx-size", str(context * slots)]
    # A number beyond any model's means all; older servers know no word for it.
    flags += ["--n-gpu-layers", "999" if spec.gpu_layers < 0 else str(spec.gpu_layers)]
    if spec.threads is not None:
        flags += ["--threads", str(spec.threads)]
    if mmproj is not None:
        flags += ["--mmproj", str(mmproj)]
    if purpose != "generate":
        # A text must fit one batch, or it is refused.
        flags += ["--batch-size", str(context), "--ubatch-size", str(context)]
    flags += [flag for flag in _PURPOSES[purpose] if flag not in spec.arguments]
    return [*flags, *spec.arguments]


def _slots(arguments: Sequence[str]) -> int:
    for flag, value in itertools.pairwise(arguments):
        if flag in ("--parallel", "-np") and value.isdigit() and int(value) > 0:
            return int(value)
    return SLOTS


# ------------------------------------------------------------------------------------------------- what is found


def _listening_port(pid: int) -> int | None:
    """The port on 127.0.0.1 that the process, or one it has started, listens on: so nobody else's is taken for it."""
    import psutil

    try:
        leader = psutil.Process(pid)
        for process in (leader, *leader.children(recursive=True)):
            for connection in process.net_connections("tcp4"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr[0] == "127.0.0.1":
                    return int(connection.laddr[1])
    except psutil.Error:
        pass
    return None


def _resident_bytes(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _of_props(found: Any) -> dict[str, Any]:
    return {"context_length": int(found["default_generation_settings"]["n_ctx"])}


def _of_models(found: Any) -> dict[str, Any]:
    facts = found["data"][0]["meta"]
    return {"parameters": int(facts["n_params"]), "size_bytes": int(facts["size"])}
