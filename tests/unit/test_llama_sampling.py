"""Every parameter is honoured, or refused by name."""

from __future__ import annotations

import pytest

from demandport.errors import TooLarge, TypeMismatch
from demandport.inference.config import ModelSpec
from demandport.inference.requests import MAX_SEED, GenerateRequest, draw_seed
from demandport.llama.grammar import grammar_text

WRONG = [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", True),
    ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2),
    ("repeat_penalty", 0), ("repeat_last_n", -2), ("frequency_penalty", 3),
    ("presence_penalty", float("inf")),
    ("seed", -1), ("seed", MAX_SEED + 1), ("max_tokens", 0), ("max_tokens", "many"), ("deadline_ms", 0),
    ("stop", [""]), ("stop", [1]), ("stop", {}), ("raw", 1), ("grammar", 5), ("json_schema", "{}"),
    ("system_prompt", 5), ("temprature", 0.5), ("messages", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_parameter_is_refused_by_name(name, value):
    with pytest.raises(TypeMismatch, match=name):
        GenerateRequest.from_options({"prompt": "x", name: value})


@pytest.mark.parametrize("options", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "y"}]}])
def test_exactly_one_of_prompt_and_messages(options):
    with pytest.raises(TypeMismatch, match="prompt"):
        GenerateRequest.from_options(options)


@pytest.mark.parametrize(
    "message", [{}, {"role": "boss", "content": "x"}, {"role": "user"}, {"role": "user", "content": 1}, "x"]
)
def test_a_wrong_message_is_refused_by_place(message):
    with pytest.raises(TypeMismatch, match=r"messages\[0\]"):
        GenerateRequest.from_options({"messages": [message]})


def test_options_survive_the_way_to_the_worker():
    request = GenerateRequest.from_options(
        {
            "messages": [{"role": "user", "content": "x"}],
            "stop": "END",
            "temperature": 0,
            "top_k": None,
            "seed": 0,
        }
    )
    assert GenerateRequest.from_options(request.to_options()) == request
    assert request.stop == ("END",)


def test_raw_takes_no_system_prompt():
    with pytest.raises(TypeMismatch, match="raw"):
        GenerateRequest(prompt="x", raw=True, system_prompt="y")


@pytest.mark.parametrize("options", [{}, {"model": ""}, {"model": "x", "threads": 0}, {"model": "x", "ctx": 5}])
def test_a_wrong_spec_is_refused(options):
    with pytest.raises(TypeMismatch):
        ModelSpec.from_options(options)


def test_seeds_are_fresh_and_in_range():
    seeds = {draw_seed() for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_grammar_and_schema_exclude_each_other():
    with pytest.raises(TypeMismatch, match="json_schema"):
        GenerateRequest(prompt="x", grammar="root ::= [a]", json_schema={})


@pytest.mark.parametrize(
    "grammar",
    ["root ::= " + "(" * 100 + '"a"' + ")" * 100, 'root ::= "a"{5000}', 'root ::= "a"{1,99999999999}'],
)
def test_a_hostile_grammar_is_refused_before_the_parser_sees_it(grammar):
    with pytest.raises(TooLarge, match="grammar"):
        grammar_text(GenerateRequest(prompt="x", grammar=grammar))


def test_a_huge_grammar_is_refused():
    with pytest.raises(TooLarge, match="grammar"):
        GenerateRequest(prompt="x", grammar="#" * 70_000)


def test_brackets_in_literals_do_not_count_as_nesting():
    grammar = 'root ::= "' + "(" * 100 + '" [({]{3}'
    assert grammar_text(GenerateRequest(prompt="x", grammar=grammar)) == grammar


def test_a_schema_nested_too_deep_is_refused():
    schema: dict = {"type": "integer"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(TooLarge, match="json_schema"):
        grammar_text(GenerateRequest(prompt="x", json_schema=schema))


def test_a_schema_becomes_a_grammar_or_is_refused_by_name():
    pytest.importorskip("llama_cpp")
    assert "root ::=" in (grammar_text(GenerateRequest(prompt="x", json_schema={"type": "integer"})) or "")
    for schema in ({"type": "no such"}, {"$ref": "#/nowhere"}, {"type": 5}):
        with pytest.raises(TypeMismatch, match="json_schema"):
            grammar_text(GenerateRequest(prompt="x", json_schema=schema))
