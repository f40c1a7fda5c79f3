"""Files, confined to one directory that the operator names (``demandport serve --files DIR``); none by default."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import Forbidden, NodeFailed, TooLarge, TypeMismatch
from demandport.graph.spec import Port

MAX_FILE_BYTES = 32 * 1024 * 1024


@node("read-file", category="data", outputs={"content": "any", "path": "string", "exists": "boolean"})
def read_file(ctx: Context, path: str, mode: str = "text") -> dict[str, Any]:
    """Reads a file under the files directory as text, or as bytes with `data.mode` bytes; a missing one is no error."""
    if mode not in ("text", "bytes"):
        raise TypeMismatch(f"read-file has the modes text and bytes, not {mode!r:.40}")
    target = _confined(ctx, path)
    try:
        if not target.is_file():
            return {"content": None, "path": path, "exists": False}
        if target.stat().st_size > MAX_FILE_BYTES:
            raise TooLarge(f"{path} is over {MAX_FILE_BYTES} bytes")
        data = target.read_bytes()
    except OSError as failed:
        raise NodeFailed(f"{path:.80} cannot be read: {failed.strerror}") from None
    if mode == "bytes":
        return {"content": data, "path": path, "exists": True}
    try:
        return {"content": data.decode(), "path": path, "exists": True}
    except UnicodeDecodeError:
        raise TypeMismatch(f"{path} is not UTF-8 text; read it with data.mode bytes") from None


@node("write-file", category="data", outputs={"success": "boolean", "path": "string"})
def write_file(ctx: Context, path: str, content: Annotated[Any, Port(type="any")]) -> dict[str, Any]:
    """Writes text or bytes under the files directory: whole or not at all, parents made where missing."""
    target = _confined(ctx, path)
    if not isinstance(content, str | bytes):
        raise TypeMismatch(f"write-file takes text or bytes, not {type(content).__name__}")
    data = content.encode() if isinstance(content, str) else content
    if len(data) > MAX_FILE_BYTES:
        raise TooLarge(f"the content is over {MAX_FILE_BYTES} bytes")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, data)
    except OSError as failed:
        raise NodeFailed(f"{path:.80} cannot be written: {failed.strerror}") from None
    return {"success": True, "path": path}


def _replace(target: Path, data: bytes) -> None:
    temporary = target.parent / f".writing-{secrets.token_hex(8)}"
    # Not by tempfile, whose files are closed to all others: the umask decides for a new file; an old keeps its mode.
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(fd, stat.S_IMODE(target.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _confined(ctx: Context, path: str) -> Path:
    """The file that `path` means; links are followed before it is checked that it lies inside."""
    root = ctx.resources.get("files_root")
    if root is None:
        raise Forbidden("no directory is open to file nodes; start the service with --files DIR")
    if not path or "\0" in path:
        raise Forbidden("path is empty or has a NUL in it")
    base = Path(root).resolve()
    try:
        target = (base / path).resolve()
    except (OSError, RuntimeError) as failed:  # RuntimeError: links in a circle, before Python 3.13
        raise NodeFailed(f"{path:.80} cannot be followed: {getattr(failed, 'strerror', None) or failed}") from None
    if target == base or not target.is_relative_to(base):
        raise Forbidden(f"{path!r:.80} lies outside the files directory")
    return target
