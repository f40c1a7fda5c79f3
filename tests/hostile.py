"""What nobody should send and somebody will: damaged model files, grammars, schemas and chat templates."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGUFReader

_EXTREMES = (0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)

# ------------------------------------------------------------------------------------------------ GGUF files


class Mutator:
    """Damages a GGUF file in one of many ways; the same way for the same seed."""

    def __init__(self, path: Path) -> None:
        self.whole = path.read_bytes()
        reader = GGUFReader(path)
        self.end_of_infos = int(reader.data_offset)
        self.infos = [tensor.field for tensor in reader.tensors]
        self.begin_of_infos = int(self.infos[0].offset)
        self.pairs = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
        self.ways: tuple[Callable[[random.Random, bytearray], str], ...] = (
            self._flip, self._flip, self._cut, self._pair_length, self._pair_type, self._value, self._value,
            self._info_length, self._dimension, self._tensor_type, self._tensor_offset, self._splice, self._count,
            self._swap_values, self._poison_data, self._text,
        )  # fmt: skip

    def mutant(self, seed: int) -> tuple[str, bytes]:
        """What was done, and the damaged file."""
        draw, data = random.Random(seed), bytearray(self.whole)
        said = self.ways[seed % len(self.ways)](draw, data)
        return said, bytes(data)

    def _region(self, draw: random.Random) -> tuple[int, int]:
        borders = (0, 24, self.begin_of_infos, self.end_of_infos, len(self.whole))
        part = draw.randrange(4)
        return borders[part], borders[part + 1]

    def _flip(self, draw: random.Random, data: bytearray) -> str:
        low, high = self._region(draw)
        places = [draw.randrange(low, high) for _ in range(draw.choice((1, 1, 2, 8, 64)))]
        for place in places:
            data[place] ^= 1 << draw.randrange(8)
        return f"flipped bits at {places[:8]}"

    def _cut(self, draw: random.Random, data: bytearray) -> str:
        low, high = self._region(draw)
        at = draw.choice((low, high - 1, draw.randrange(low, high)))
        del data[at:]
        return f"cut at {at}"

    def _write(self, draw: random.Random, data: bytearray, form: str, at: int) -> str:
        bits = 8 * struct.calcsize(form)
        value = draw.choice((*_EXTREMES, draw.randrange(2**bits))) % 2**bits
        struct.pack_into(f"<{form}", data, at, value)
        return f"wrote {value} at {at}"

    def _pair(self, draw: random.Random) -> tuple[Any, int]:
        """A pair of the metadata, and where its type stands."""
        field = draw.choice(self.pairs)
        return field, int(field.offset) + 8 + len(field.name.encode())

    def _pair_length(self, draw: random.Random, data: bytearray) -> str:
        field, at = self._pair(draw)
        # Of its key, or of its value where that is a text (or, four bytes on, where it is an array).
        return "length: " + self._write(draw, data, "Q", draw.choice((int(field.offset), at + 4, at + 8)))

    def _pair_type(self, draw: random.Random, data: bytearray) -> str:
        field, at = self._pair(draw)
        data[at : at + 4] = struct.pack("<I", draw.choice((*range(14), 0x77)))
        return f"type of {field.name}"

    def _value(self, draw: random.Random, data: bytearray) -> str:
        field, at = self._pair(draw)
        return f"value of {field.name}: " + self._write(draw, data, "I", at + 4)

    def _info(self, draw: random.Random) -> tuple[int, int, int]:
        """Where a tensor's description, the number of its dimensions and its type stand."""
        field = draw.choice(self.infos)
        at = int(field.offset)
        dimensions = at + 8 + len(field.name.encode())
        (count,) = struct.unpack_from("<I", self.whole, dimensions)
        return at, dimensions, dimensions + 4 + 8 * count

    def _info_length(self, draw: random.Random, data: bytearray) -> str:
        at, dimensions, _ = self._info(draw)
        if draw.random() < 0.5:
            return "length of a tensor's name: " + self._write(draw, data, "Q", at)
        return "number of dimensions: " + self._write(draw, data, "I", dimensions)

    def _dimension(self, draw: random.Random, data: bytearray) -> str:
        _, dimensions, _ = self._info(draw)
        return "dimension: " + self._write(draw, data, "Q", dimensions + 4)

    def _tensor_type(self, draw: random.Random, data: bytearray) -> str:
        _, _, kind = self._info(draw)
        struct.pack_into("<I", data, kind, draw.randrange(45))
        return f"type of the tensor at {kind}"

    def _tensor_offset(self, draw: random.Random, data: bytearray) -> str:
        _, _, kind = self._info(draw)
        return "offset: " + self._write(draw, data, "Q", kind + 4)

    def _splice(self, draw: random.Random, data: bytearray) -> str:
        low, high = self._region(draw)
        at, size = draw.randrange(low, high), draw.choice((1, 3, 8, 32, 4096))
        if draw.random() < 0.5:
            del data[at : at + size]
            return f"{size} bytes at {at} left out"
        data[at:at] = draw.randbytes(size)
        return f"{size} bytes put in at {at}"

    def _count(self, draw: random.Random, data: bytearray) -> str:
        return "count: " + self._write(draw, data, "Q", draw.choice((8, 16)))

    def _swap_values(self, draw: random.Random, data: bytearray) -> str:
        first, at = self._pair(draw)
        second, to = self._pair(draw)
        data[at + 4 : at + 8], data[to + 4 : to + 8] = data[to + 4 : to + 8], data[at + 4 : at + 8]
        return f"values of {first.name} and {second.name} exchanged"

    def _poison_data(self, draw: random.Random, data: bytearray) -> str:
        at = draw.randrange(self.end_of_infos, len(data) - 4096)
        what = draw.choice((b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0"))
        data[at : at + 4096] = what * 1024
        return f"weights at {at} are {what!r}"

    def _text(self, draw: random.Random, data: bytearray) -> str:
        at = draw.randrange(24, self.end_of_infos - 64)
        data[at : at + 64] = draw.choice((b"\0" * 64, b"\xff" * 64, b"\xed\xa0\x80 " * 16, draw.randbytes(64)))
        return f"64 bytes at {at}"


# -------------------------------------------------------------------------------------------------- grammars


def _chain(count: int, rule: str, last: str) -> str:
    """Rules r0 to r`count`, each made of the next one (``%``)."""
    rules = [f"r{n} ::= {rule.replace('%', f'r{n + 1}')}" for n in range(count)]
    return "\n".join(["root ::= r0", *rules, f"r{count} ::= {last}"])


#: Each is refused or followed, and does no other request any harm.
GRAMMARS: dict[str, str] = {
    "empty": "",
    "white space": " \n\t",
    "no root": 'a ::= "a"',
    "undefined": "root ::= nowhere",
    "nothing": "root ::=",
    "left recursion": 'root ::= root "a" | "a"',
    "mutual recursion": 'root ::= a\na ::= b "x"\nb ::= a | "y"',
    "recursion behind nothing": 'root ::= e root "a" | "b"\ne ::= ""',
    "only itself": "root ::= root",
    "nothing again and again": 'root ::= ("")*',
    "loops in loops": 'root ::= (("a"*)*)*',
    "options in loops": 'root ::= ("a"? "b"?)* "c"',
    "endless": "root ::= [a-z]+",
    "deep": "root ::= " + "(" * 60 + '"a"' + ")*" * 60,
    "too deep": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
    "open brackets": "root ::= " + "(" * 60_000,
    "closed brackets": "root ::= " + ")" * 60_000,
    "huge repetition": 'root ::= "a"{1000000000}',
    "no number": 'root ::= "a"{99999999999999999999999999}',
    "no end of a repetition": 'root ::= "a"{3',
    "negative": 'root ::= "a"{-1}',
    "no times": 'root ::= "a"{0}',
    "repetitions of repetitions": 'root ::= ((("a"{1,900}){1,900}){1,900}){1,900}',
    "a million": "root ::= ([a-z]{1000}){1000}",
    "just allowed": "root ::= [a-z]{1000}",
    "ambiguous": 'root ::= ("a" | "a" | "a" "a")*',
    "ambiguous rules": "root ::= a a a a a a\na ::= [a-z]* | [a-z]* [a-z]*",
    "two ways at each step": 'root ::= s\ns ::= t | u\nt ::= "a" s | ""\nu ::= "a" s | ""',
    "NUL": 'root ::= "a\0b"',
    "NUL first": "\0",
    "bad escape": 'root ::= "\\xZZ"',
    "cut escape": 'root ::= "\\u12',
    "too large a character": 'root ::= "\\U00110000"',
    "surrogates": "root ::= [\\uD800-\\uDFFF]+",
    "every character": "root ::= [\\x00-\\U0010FFFF]+",
    "no character": "root ::= [^\\x00-\\U0010FFFF]",
    "empty set": "root ::= []",
    "empty exception": "root ::= [^]",
    "open text": 'root ::= "abc',
    "open set": "root ::= [abc",
    "open group": 'root ::= ("a"',
    "only a star": "root ::= *",
    "stars": 'root ::= "a"?*+?*+',
    "bars": "root ::= ||||",
    "comment": "#" * 60_000,
    "comments": "# a\n" * 15_000,
    "long text": 'root ::= "' + "a" * 60_000 + '"',
    "too long": 'root ::= "' + "a" * 70_000 + '"',
    "long name": "r" * 30_000 + ' ::= "a"\nroot ::= ' + "r" * 30_000,
    "a long way": _chain(3000, "%", '"x"'),
    "a circle": _chain(1000, '"a" %', "r0"),
    "many alternatives": "root ::= " + " | ".join(f'"a{n}"' for n in range(6000)),
    "many rules": "root ::= r1\n" + "".join(f'r{n} ::= "a"\n' for n in range(4000)),
    "twice": 'root ::= "a"\nroot ::= "b"',
    "unknown token": "root ::= <nowhere>",
    "not a token": "root ::= !<[1]>",
    "bytes": "root ::= \x80\xff",
    "emoji": 'root ::= "😊"+',
    "text": "Tell me about cats.",
    "JSON": '{"type": "object"}',
    "Windows": 'root ::= "a"\r\n',
    "no line": "root ::= a a ::= b",
    "dots": "root ::= .*",
    "dashes": "root-a_b ::= [a-]",
}

#: These bring the worker down, or keep it busy for ever.
FATAL_GRAMMARS: dict[str, str] = {
    "reversed range": "root ::= [z-a]",
    "no such token": "root ::= <[99999]>",
}
ENDLESS_GRAMMARS: dict[str, str] = {
    "reversed repetition": 'root ::= "a"{5,2}',
    "doubled at each rule": _chain(25, "% %", "[a-z]?"),
    "two ways at each rule": _chain(25, '% | % "x"', "[a-z]"),
}

# --------------------------------------------------------------------------------------------------- schemas


def _nested(depth: int, inner: Any, **more: Any) -> dict[str, Any]:
    for _ in range(depth):
        inner = {"type": "array", "items": inner, **more}
    return dict(inner)


def _objects(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


SCHEMAS: dict[str, dict[str, Any]] = {
    "empty": {},
    "no type": {"type": "nothing"},
    "types": {"type": ["string", "nothing"]},
    "no types": {"type": []},
    "number as type": {"type": 5},
    "null as type": {"type": None},
    "itself": {"$ref": "#"},
    "circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "tree": {"$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"},
    "missing": {"$ref": "#/$defs/a"},
    "file": {"$ref": "file:///etc/hostname"},
    "host": {"$ref": "https://localhost:9/x"},
    "reference to a number": {"$ref": 5},
    "odd reference": {"$ref": "#/$defs/%ff/~2"},
    "empty enum": {"enum": []},
    "huge enum": {"enum": [f"value {n}" for n in range(4000)]},
    "long enum": {"enum": ["x" * 60_000]},
    "odd enum": {"enum": [None, [], {}, 1.5, "\0", '"\\\n', "]["]},
    "enum as text": {"enum": "abc"},
    "contradiction": {"type": "string", "enum": [1]},
    "never": {"not": {}},
    "nothing of": {"anyOf": []},
    "one of nothing": {"oneOf": []},
    "all of nothing": {"allOf": []},
    "deep": _nested(60, {"type": "null"}),
    "too deep": _nested(100, {"type": "null"}),
    "objects": _objects(25),
    "product": _nested(5, {"type": "integer"}, maxItems=50),
    "exact product": _nested(5, {"type": "null"}, minItems=20),
    "impossible": {"type": "array", "items": {"type": "null"}, "minItems": 5, "maxItems": 2},
    "negative": {"type": "string", "minLength": -5},
    "text as number": {"type": "string", "maxLength": "5"},
    "half": {"type": "string", "maxLength": 2.5},
    "odd range": {"type": "integer", "minimum": 9, "maximum": 1},
    "large range": {"type": "integer", "minimum": -(10**30), "maximum": 10**40},
    "real range": {"type": "integer", "minimum": 0.5},
    "many": {"properties": {f"p{n}": {"type": "string"} for n in range(1500)}},
    "many options": {"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(300)}},
    "all": {"allOf": [{"properties": {f"p{n}": {"type": "null"}}} for n in range(200)]},
    "pattern": {"type": "string", "pattern": "^(a{1,900}){1,900}$"},
    "no pattern": {"type": "string", "pattern": "("},
    "backtracking": {"type": "string", "pattern": "^(a+)+$"},
    "looks around": {"type": "string", "pattern": "^(?=a)a$"},
    "deep pattern": {"type": "string", "pattern": "^" + "(" * 3000 + "a" + ")" * 3000 + "$"},
    "open pattern": {"type": "string", "pattern": "a"},
    "pattern as number": {"type": "string", "pattern": 5},
    "properties as list": {"type": "object", "properties": []},
    "required as text": {"type": "object", "required": "a"},
    "required stranger": {"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False},
    "items as list": {"type": "array", "items": [{"type": "null"}]},
    "prefix": {"type": "array", "prefixItems": [{"type": "null"}]},
    "odd names": {
        "type": "object",
        "properties": {'"::=\n': {"type": "null"}, "\0": {"type": "null"}},
        "required": ['"::=\n'],
    },
    "long name": {"type": "object", "properties": {"x" * 50_000: {"type": "null"}}, "required": ["x" * 50_000]},
    "format": {"type": "string", "format": "date"},
    "no format": {"type": "string", "format": "../../x"},
    "const": {"const": {"a": [1, None, "é"]}},
    "if": {"if": {"type": "null"}, "then": {}, "else": {}},
}

ENDLESS_SCHEMAS: dict[str, dict[str, Any]] = {
    "long text": {"type": "string", "maxLength": 10**9},
    "many items": {"type": "array", "items": {"type": "null"}, "minItems": 10**9},
    "product of patterns": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,99}){1,99}$"},
    "much of a pattern": {"type": "string", "pattern": "^a{1000000000}$"},
}

# ------------------------------------------------------------------------------------------------- templates

_EACH = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

TEMPLATES: dict[str, str] = {
    "empty": "",
    "no template": "{% for %}",
    "open": "{{",
    "open block": "{% if 1 %}",
    "plain": "just text",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "x" + "{% endif %}" * 300,
    "classes": "{{ ().__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attribute by filter": "{{ ''|attr('__class__') }}",
    "attribute by map": "{{ [()]|map(attribute='__class__')|list }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "self": "{{ self.__init__ }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'x' %}",
    "changes": "{{ messages.append(1) }}",
    "pops": "{{ messages[0].pop('content') }}",
    "sets": "{% set messages = [] %}" + _EACH,
    "raises": "{{ raise_exception('no') }}",
    "undefined": "{{ nothing.at.all }}",
    "divides": "{{ 1 // 0 }}",
    "types": "{{ 'a' + 1 }}",
    "wrong call": "{{ cycler() }}",
    "wrong filter": "{{ 1|dictsort }}",
    "no filter": "{{ 1|nofilter }}",
    "wrong argument": "{{ strftime_now(5) }}",
    "wrong index": "{{ messages[99].content }}",
    "wrong items": "{{ 5|items }}",
    "wrong sort": "{{ [1, 'a', none]|sort }}",
    "wrong encoding": "{{ 'a'.encode('nowhere') }}",
    "wrong number": "{{ 'x'|int(base=99) }}",
    "surrogate": "{{ '\\ud800' }}" + _EACH,
    "NUL": "{{ '\\0' * 3 }}" + _EACH,
    "not text": "{{ messages }}{{ none }}{{ 1.5 }}",
    "controls": "{% for m in messages %}{{ bos_token }}{{ eos_token }}<|user|><|assistant|><|end|>{% endfor %}",
    "half controls": "<|us" + _EACH + "er|><|",
    "long": "{{ 'a ' * 2000 }}",
    "words": "{{ lipsum(n=50) }}",
    "range": "{% for n in range(10 ** 9) %}{% endfor %}",
    "break": "{% for m in messages %}{% break %}{% endfor %}",
    "private": "\U0010f000\U0010f001" + _EACH,
    "generators": "{{ (messages|batch(1)).send }}",
    "filter": "{% filter upper %}{% endfilter %}",
}

#: These take long to render, or to read what was rendered; a number of them in C, where no alarm is heard.
ENDLESS_TEMPLATES: dict[str, str] = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "large": "{{ 'x ' * (messages|length * 40000000) }}",
    "large constant": "{{ 'x' * 400000000 }}",
    "wide": "{{ '%0999999999d' % 1 }}",
    "power": "{% set n = messages|length + 9 %}{{ n ** (n ** n) }}",
    "words": "{{ lipsum(n=100000) }}",
}
