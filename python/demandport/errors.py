"""One tree of errors. Each class carries the stable code that it has on the wire (protocol/SPEC.md, section 7).

Raise one of these for anything a user can mend; any other exception that leaves this package is a bug of it and reaches
the wire as ``internal`` (or, from a node's own code, as ``node_failed``).
"""

from __future__ import annotations

import traceback as _traceback
from typing import Any, ClassVar


class DemandportError(Exception):
    """A failure with a stable code.

    Args:
        message: one sentence that says what is wrong and what to change.
        node: id of the node concerned, where there is one.
        details: further facts as plain data (maps, lists, numbers, strings).
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, node: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.node = node
        self.details = details
        self.traceback: str | None = None

    def at(self, node: str) -> DemandportError:
        """Name the node concerned, unless one is named already; returns the error itself."""
        if self.node is None:
            self.node = node
        return self

    def to_wire(self) -> dict[str, Any]:
        """The error object of the protocol."""
        return {
            "code": self.code,
            "message": _encodable(self.message),
            "node": self.node,
            "retryable": self.retryable,
            "details": self.details,
            "traceback": self.traceback and _encodable(self.traceback),
        }


def _encodable(text: str) -> str:
    """Text that has a UTF-8 form: lone surrogates, which a node may raise with, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


class BadFrame(DemandportError):
    """A frame of length zero or over the limit."""

    code = "bad_frame"


class BadMessage(DemandportError):
    """Not a message of the protocol, or one of its fields is wrong."""

    code = "bad_message"


class UnsupportedProtocol(DemandportError):
    """The two sides share no protocol version."""

    code = "unsupported_protocol"


class UnknownSession(DemandportError):
    """No session has that name."""

    code = "unknown_session"


class UnknownNode(DemandportError):
    """The graph has no node of that id."""

    code = "unknown_node"


class UnknownNodeType(DemandportError):
    """Nobody runs nodes of that type."""

    code = "unknown_node_type"


class UnknownPort(DemandportError):
    """The node has no port of that name."""

    code = "unknown_port"


class InvalidGraph(DemandportError):
    """The graph breaks a rule; ``details["problems"]`` lists each one."""

    code = "invalid_graph"


class CycleFound(InvalidGraph):
    """The edges form a cycle; ``details["path"]`` names it."""

    code = "cycle"


class MissingInput(DemandportError):
    """A required port has no value."""

    code = "missing_input"


class TypeMismatch(DemandportError):
    """A value does not fit the type of its port."""

    code = "type_mismatch"


class NodeFailed(DemandportError):
    """The node's own code failed."""

    code = "node_failed"


class WorkerCrash(DemandportError):
    """The worker process that ran the work has died."""

    code = "worker_crash"
    retryable = True


class DeadlineExceeded(DemandportError):
    """The demand's deadline has passed."""

    code = "deadline_exceeded"


class Cancelled(DemandportError):
    """The demand was cancelled."""

    code = "cancelled"


class QueueFull(DemandportError):
    """A limit of running or queued work is reached."""

    code = "queue_full"
    retryable = True


class TooLarge(DemandportError):
    """A value or a message is over its size limit."""

    code = "too_large"


class ModelNotFound(DemandportError):
    """No model of that name or path."""

    code = "model_not_found"


class ModelLoadFailed(DemandportError):
    """The model's file is there, but cannot be loaded."""

    code = "model_load_failed"


class OutOfMemory(DemandportError):
    """There is not enough memory for it now."""

    code = "out_of_memory"
    retryable = True


class ContextOverflow(DemandportError):
    """Prompt and requested tokens do not fit the model's context."""

    code = "context_overflow"


class BackendUnavailable(DemandportError):
    """The backend that should answer is gone or not installed."""

    code = "backend_unavailable"
    retryable = True


class HostUnavailable(DemandportError):
    """The host that should answer is gone."""

    code = "host_unavailable"
    retryable = True


class Forbidden(DemandportError):
    """Configuration does not allow it."""

    code = "forbidden"


class Draining(DemandportError):
    """The service takes no new demands."""

    code = "draining"
    retryable = True


class Internal(DemandportError):
    """A bug of demandport itself."""

    code = "internal"


def _tree(cls: type[DemandportError]) -> list[type[DemandportError]]:
    return [cls, *(below for sub in cls.__subclasses__() for below in _tree(sub))]


#: Every code with its class: what reads errors off a worker's pipe uses it.
BY_CODE: dict[str, type[DemandportError]] = {cls.code: cls for cls in reversed(_tree(DemandportError))}


def from_wire(error: dict[str, Any]) -> DemandportError:
    """The error that ``to_wire`` wrote. An unknown code becomes ``internal``."""
    cls = BY_CODE.get(error.get("code", ""), Internal)
    found = cls(str(error.get("message", "")), node=error.get("node"), details=error.get("details"))
    found.traceback = error.get("traceback")
    return found


def from_exception(raised: BaseException, *, node: str) -> DemandportError:
    """What a node's code raised, as an error of this tree with the node named and the traceback kept."""
    if isinstance(raised, DemandportError):
        return raised.at(node)
    try:
        said = f"{type(raised).__name__}: {raised}"
    except Exception:  # an author's __str__ may raise anything
        said = type(raised).__name__
    failed = NodeFailed(said, node=node)
    failed.traceback = "".join(_traceback.format_exception(raised))
    return failed
