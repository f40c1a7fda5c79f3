"""JSON Schemas, as nodes check values against them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema_rs import Draft202012Validator


def checker(schema: Any) -> Draft202012Validator:
    """What checks values against a schema. Its patterns cannot backtrack without end, and it fetches no reference,
    from a file or from a host.

    Raises:
        ValueError: it is no schema; of its subclass ``ValidationError`` where a part of it is at fault.
    """
    from jsonschema_rs import Draft202012Validator

    return Draft202012Validator(schema, offline=True)
