"""One node, or a graph, for each item of a list."""

from __future__ import annotations

import copy
from typing import Annotated, Any

from demandport.engine.fanout import fan_out
from demandport.engine.node import Context, node
from demandport.engine.session import Session
from demandport.errors import DemandportError, MissingInput, TypeMismatch
from demandport.graph.spec import Port

_ITEM = "item"
_OUTPUTS = {"results": "json", "failure": "json", "winner": "json"}
Json = Annotated[Any, Port(type="json", default=None)]


@node("map", category="logic", outputs=_OUTPUTS)
async def map_items(
    ctx: Context,
    items: Annotated[Any, Port(type="json")],
    each: str = "",
    data: Json = None,
    graph: Json = None,
    node: str = "",
    input_node: str = "",
    input_port: str = "",
    output: str = "",
    mode: str = "all",
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluates a node of the type `each` (with `data`), or `node` of `graph`, for each item, `limit` at once.

    The item goes to `input_port` (the first, if none is named) of that node, or of `input_node`; the result is what
    comes out of `output` (the first). `node` may be left out where one node alone is read by no other. What does not
    depend on the item is evaluated once.

    `all` gives every result, in the order of the items, with error objects in the place of failures. `try` launches
    none after the first failure, cancels what runs, and gives the results before it, and `failure` with the item's
    `index`. `race` gives the first success as the one result, its index as `winner`, and cancels the others; where none
    succeeds the node fails with the first failure. Cancel cancels all of them.
    """
    if not isinstance(items, list):
        raise TypeMismatch(f"items must be a list, not {type(items).__name__}")
    session: Session = ctx.open_graph(_graph(each, data, graph))
    try:
        wanted, into = _ends(session, graph, node, input_node)
        port = session.input_port(into, input_port)
        if output:
            session.check_output(wanted, output)
        done = 0

        async def evaluate(index: int) -> Any:
            nonlocal done
            session.edit([{"op": "set_input", "node": into, "port": port, "value": items[index]}])
            cell, remaining = session.at(wanted), ctx.remaining_s
            deadline_ms = None if remaining is None else int(remaining * 1000)
            try:
                outputs, _ = await session.outcome(cell, priority=ctx.priority, deadline_ms=deadline_ms)
            except DemandportError as failed:
                # Items may have failed with one and the same error, that of what they all need.
                of_item = copy.copy(failed)
                of_item.details = {**(failed.details or {}), "index": index}
                raise of_item from None
            done += 1
            ctx.progress(done, len(items), "items")
            return outputs.get(output) if output else next(iter(outputs.values()), None)

        came = await fan_out(len(items), evaluate, mode=mode, limit=limit)  # type: ignore[arg-type]
    finally:
        session.close()
    if came.lost is not None:
        raise came.lost
    if came.mode == "race":
        winner = came.decided
        return {"results": [] if winner is None else [came.done[winner]], "failure": None, "winner": winner}
    if came.decided is not None:
        failure = {"index": came.decided, **came.failed[came.decided].to_wire()}
        return {"results": came.prefix(), "failure": failure, "winner": None}
    outcomes = came.done | {index: failed.to_wire() for index, failed in came.failed.items()}
    return {"results": [outcomes[index] for index in range(came.count)], "failure": None, "winner": None}


def _graph(each: str, data: Any, graph: Any) -> dict[str, Any]:
    if bool(each) == (graph is not None):
        raise MissingInput("map needs each (a node type) or graph, and not both")
    if graph is None:
        return {"nodes": [{"id": _ITEM, "node_type": each, "data": data or {}}]}
    if not isinstance(graph, dict):
        raise TypeMismatch(f"graph must be a map, not {type(graph).__name__}")
    return graph


def _ends(session: Session, graph: Any, node: str, input_node: str) -> tuple[str, str]:
    """The node that is demanded, and the one that the item goes to."""
    if graph is None:
        return _ITEM, _ITEM
    ends = session.ends
    if not node and len(ends) != 1:
        raise MissingInput(f"name the node of the graph that is wanted; {', '.join(ends) or 'none'} end it")
    if not input_node:
        raise MissingInput("name the node of the graph that the item goes to: input_node")
    return node or ends[0], input_node
