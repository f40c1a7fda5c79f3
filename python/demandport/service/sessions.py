"""The open sessions of one host: their graphs, what the host runs of them, and who hears their events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from demandport.engine.executor import Executor
from demandport.engine.registry import runnable
from demandport.engine.session import Session
from demandport.engine.slots import Slots
from demandport.errors import BadMessage, UnknownSession
from demandport.graph.spec import NodeSpec
from demandport.ids import SessionId
from demandport.service.host_calls import TOOLS, Host, HostCalls, SessionSpecs
from demandport.service.streams import Way
from demandport.service.subscription import Subscription
from demandport.wire.messages import OpenOptions, SubscribeOptions

MAX_SESSIONS = 10_000
#: Way that a session keeps once somebody subscribed to them, unless `open` says another number.
EVENT_HISTORY = 1000


class Sessions:
    """Opens sessions by name, finds and closes them.

    Args:
        specs: all node types that are known, those that a host alone can run among them.
        host_calls: the way to the host, for nodes that it claims.
    """

    def __init__(self, specs: Mapping[str, NodeSpec], executor: Executor, host_calls: HostCalls) -> None:
        self._specs, self._executor, self._host_calls = specs, executor, host_calls
        #: Node types that run where the host claims none.
        self.core = runnable(specs)
        self._open: dict[str, Session] = {}
        #: The open session of a name, or None.
        self.find = self._open.get
        self._subscriptions: dict[str, Subscription] = {}
        self.slots = Slots("sessions", MAX_SESSIONS)

    def get(self, name: str) -> Session:
        """The open session of that name.

        Raises:
            UnknownSession: there is none.
        """
        session = self._open.get(name)
        if session is None:
            raise UnknownSession(f"there is no session {name!r}; open it first")
        return session

    def open(self, name: SessionId, graph: dict[str, Any], options: OpenOptions) -> Session:
        """Open a session.

        Raises:
            BadMessage: the name is taken, or a claim is wrong.
            QueueFull: too many are open.
            DemandportError: the graph breaks a rule.
        """
        if name in self._open:
            raise BadMessage(f"the session {name!r} is open already; close it first")
        self.slots.take()
        try:
            specs, resources = self._as_host_wants(name, options)
            session = Session(
                graph,
                specs,
                self._executor,
                max_running=options.max_running,
                max_queued=options.max_queued,
                resources=resources,
            )
            if options.edits:
                session.edit(options.edits)
        except BaseException:
            self.slots.release()
            raise
        if options.event_history:
            session.keep_events(options.event_history)
        self._open[name] = session
        return session

    def close(self, name: str) -> None:
        """Cancel its demands and forget it. Raises as `get`."""
        self.get(name).close()
        self.unsubscribe(name)
        del self._open[name]
        self.slots.release()

    def kept_events(self, name: str) -> dict[str, int]:
        """The number of the oldest event that is kept from now on, and of the next. Raises as `get`."""
        kept = self.get(name).keep_events(EVENT_HISTORY)
        return {"first": kept.first, "next": kept.next}

    def subscribe(self, name: str, out: Way, options: SubscribeOptions) -> None:
        """Send the session's events to `out`, in the place of a subscription before. Raises as `get`."""
        kept = self.get(name).keep_events(EVENT_HISTORY)
        self.unsubscribe(name)
        since = kept.next if options.since is None else min(options.since, kept.next)
        subscription = self._subscriptions[name] = Subscription(out, name, kept, since, options.kinds)
        subscription.send()

    def unsubscribe(self, name: str) -> bool:
        """Send no more of them; False when none were sent."""
        subscription = self._subscriptions.pop(name, None)
        if subscription is not None:
            subscription.close()
        return subscription is not None

    def load(self) -> dict[str, int]:
        """Demands that run, and that wait for a place, in all sessions."""
        loads = [session.load for session in self._open.values()]
        return {"running": sum(running for running, _ in loads), "queued": sum(queued for _, queued in loads)}

    def _as_host_wants(
        self, name: SessionId, options: OpenOptions
    ) -> tuple[Mapping[str, NodeSpec], Mapping[str, Any] | None]:
        """The node types of a session, and what its nodes may use, with what the host runs of them."""
        if not options.host_types and not options.host_else:
            return self.core, None
        host = Host(self._host_calls, name, options.host_timeout_ms)
        specs = SessionSpecs(self._specs, host, options.host_types, options.host_else)
        resources = dict(self._executor.resources)
        if TOOLS in specs:
            resources["call_tool"] = host.call_tool
        return specs, resources
