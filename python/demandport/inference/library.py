"""The models in the configured directories: GGUF files, split models, projectors, folders of a Pumas library."""

from __future__ import annotations

import functools
import importlib.resources
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from demandport.errors import DemandportError, ModelLoadFailed, ModelNotFound
from demandport.inference.config import TINY
from demandport.inference.gguf import GgufMetadata, read_metadata

#: How far below a model directory files are looked for, and how many entries of directories are looked at in all.
MAX_DEPTH = 8
MAX_LOOKED_AT = 100_000
#: What Pumas keeps beside a model.
PUMAS_FILE = "metadata.json"
MAX_PUMAS_BYTES = 4 * 1024 * 1024
_MOST_NAMED = 10
#: Comparing names with a misspelt one is slow.
_MOST_COMPARED = 5000
_NOTHING: Mapping[str, Any] = MappingProxyType({})
#: As llama.cpp's gguf-split names them.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
_PRECISION = re.compile(r"[-_.](bf16|fp?16|fp?32|i?q\d\w*)$")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LibraryEntry:
    """One model of the library.

    Attributes:
        id: its path from its model directory, with forward slashes, without ``.gguf`` and without the number of a
            shard; ``tiny`` for the model that comes with the package.
        path: the file to load; of a split model the first.
        name: as the file, else the Pumas metadata, else the file's name says.
        size_bytes: of all its files that are there.
        parameters: of all its files; None where that is not known.
        metadata: of the first file; None when that cannot be read.
        shards: the files of a split model that are there; of any other model the one.
        mmproj: the projector that makes it see images, where one lies beside it.
        pumas: what the Pumas library knows of it (its ``metadata.json``); empty where there is none.
        unusable: why it cannot be loaded; None for a sound one.
        notes: what else a person should know.
    """

    id: str
    path: Path
    name: str
    size_bytes: int = 0
    parameters: int | None = None
    metadata: GgufMetadata | None = None
    shards: tuple[Path, ...] = ()
    mmproj: Path | None = None
    pumas: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    unusable: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def inference_settings(self) -> Any:
        """What Pumas says of the model's parameters: a list of descriptors, or a map; an empty list for nothing."""
        settings = self.pumas.get("inference_settings")
        return settings if isinstance(settings, list | dict) else []

    @property
    def names(self) -> list[str]:
        """All that it may be called."""
        stated = [self.name, *([self.metadata.name] if self.metadata and self.metadata.name else [])]
        stated += [said for key in ("model_id", "official_name", "cleaned_name") if (said := _text(self.pumas, key))]
        return [self.id, f"{self.id}.gguf", self.id.rpartition("/")[2], *(path.name for path in self.shards), *stated]

    def lies_at(self, path: Path) -> bool:
        """One of its files is `path`, or lies below it."""
        return any(file.is_relative_to(path) for file in (self.path, *self.shards))

    def describe(self) -> dict[str, Any]:
        """The entry as plain data."""
        known = self.metadata
        return {
            "id": self.id,
            "name": self.name,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "parameters": self.parameters,
            "architecture": known and known.architecture,
            "quantization": known and known.quantization,
            "context_length": known and known.context_length,
            "has_chat_template": bool(known and known.chat_template),
            "embedding_only": bool(known and known.embedding_only),
            "pooling": known and known.pooling,
            "shards": [str(path) for path in self.shards],
            "mmproj": None if self.mmproj is None else str(self.mmproj),
            "pumas": dict(self.pumas),
            "unusable": self.unusable,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class _Folder:
    """A directory with GGUF files, or with what Pumas says of a model."""

    path: Path
    root: Path
    files: list[Path]
    pumas: Mapping[str, Any]
    #: The Pumas file is its own, not that of a folder above.
    is_pumas: bool
    notes: tuple[str, ...]

    def id_of(self, stem: str) -> str:
        relative = (self.path / stem).relative_to(self.root).as_posix()
        return relative.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class _Group:
    """The files of one model, by their numbers from 1, and how many there should be."""

    folder: _Folder
    stem: str
    count: int
    files: dict[int, Path]

    @property
    def first(self) -> Path:
        return self.files.get(1) or self._file(1)

    def missing(self) -> str | None:
        lost = (self._file(number).name for number in range(1, self.count + 1) if number not in self.files)
        named = list(islice(lost, 3))
        if not named:
            return None
        absent = self.count - len(self.files)
        return f"is incomplete: {absent} of {self.count} files are missing: {', '.join(named)}{', …' * (absent > 3)}"

    def _file(self, number: int) -> Path:
        return self.folder.path / f"{self.stem}-{number:05}-of-{self.count:05}.gguf"


class Library:
    """The models in some directories, and `tiny`, which is always there.

    Everything here reads files, so it blocks; call it off the event loop. Any number of threads may. Metadata that was
    read is kept for as long as a file's size and time of change stay the same.

    Hidden files and directories are skipped, as are links to directories; a link to a file counts if the file lies in
    the same model directory. What cannot be looked at is logged, once.

    Args:
        directories: where models are looked for, at any depth up to `MAX_DEPTH`. One that is not there is logged.
    """

    def __init__(self, directories: Sequence[Path] = ()) -> None:
        self.directories = tuple(directories)
        #: By file: its size and time of change, and what was read then.
        self._read_before: dict[Path, tuple[tuple[int, int], GgufMetadata | str]] = {}
        self._said: set[str] = set()

    def entries(self) -> list[LibraryEntry]:
        """All models, sorted within each directory, `tiny` first; those that cannot be used among them. Blocks."""
        seen: set[tuple[int, int]] = set()
        packaged = replace(self._one_file(tiny_path()), id=TINY)
        return [packaged, *(entry for root in self.directories for entry in self._scan(root, seen))]

    def resolve(self, model: str) -> LibraryEntry:
        """The model that a name means. Blocks.

        An id comes first, as it is written. Then a path that begins with ``/``, ``~/`` or ``.``, wherever it lies: a
        file (any file of a split model), or a directory with one model in it. Then, whatever the case, ids, names of
        files, names that the files or Pumas give, and folders of the library with one model in them.

        Raises:
            ModelNotFound: there is none, and the message names near ones; or the name fits several, and
                ``details["candidates"]`` lists for each how to name it alone.
            ModelLoadFailed: it is there and cannot be used; the message says why.
        """
        entries = self.entries()
        found = self._meant(model, entries)
        if not found:
            raise _not_found(model, entries, self.directories)
        return _only(model, found, entries)

    def find(self, query: str) -> LibraryEntry:
        """The model that a name means, else the only one that a `search` finds. Blocks. Raises as `resolve`."""
        entries = self.entries()
        found = self._meant(query, entries) or _having(query, entries)
        if not found:
            raise _not_found(query, entries, self.directories)
        return _only(query, found, entries)

    def search(self, query: str) -> list[LibraryEntry]:
        """The models in whose names every word of the query occurs, whatever the case. Blocks."""
        return _having(query, self.entries())

    # ------------------------------------------------------------------------------------------------- by name

    def _meant(self, model: str, entries: list[LibraryEntry]) -> list[LibraryEntry]:
        if model == TINY:
            return entries[:1]
        if exact := [entry for entry in entries if entry.id == model]:
            return exact
        if model.startswith(("/", "~/", ".")):
            return self._at(Path(model), entries)
        name = model.casefold().strip("/")
        named = [entry for entry in entries if any(name == known.casefold() for known in entry.names)]
        return named or [entry for entry in entries if entry.id.casefold().startswith(f"{name}/")]

    def _at(self, path: Path, entries: list[LibraryEntry]) -> list[LibraryEntry]:
        """The models at a path: of a directory all in it."""
        try:
            path = Path(os.path.abspath(path.expanduser()))
            places = {path, path.resolve()}
            if known := [entry for entry in entries if any(entry.lies_at(place) for place in places)]:
                return known
            if path.is_dir():
                return [replace(entry, id=str(entry.path)) for entry in self._scan(path, set())]
            if path.exists():
                return [self._one_file(path)]
        except (OSError, RuntimeError, ValueError) as failed:
            self._say(f"{path} cannot be looked at: {failed}")
        return []

    def _one_file(self, path: Path) -> LibraryEntry:
        """The model that a file is, or is a part of."""
        whole = _shard(path)[1] is None
        files = [path] if whole else sorted(file for file in path.parent.iterdir() if file.suffix == path.suffix)
        folder = _Folder(path.parent, path.parent, files, _NOTHING, False, ())
        group = next(group for group in _groups(folder) if path in group.files.values())
        entry = self._entry(group, [])
        return replace(entry, id=str(entry.path))

    # ------------------------------------------------------------------------------------------------ scanning

    def _scan(self, root: Path, seen: set[tuple[int, int]]) -> list[LibraryEntry]:
        try:
            root = root.resolve()
            folders = list(self._walk(root, seen))
        except (OSError, RuntimeError) as failed:
            self._say(f"the model directory {root} cannot be read: {getattr(failed, 'strerror', None) or failed}")
            return []
        entries = [entry for folder in folders for entry in self._in_folder(folder)]
        for folder in folders:
            if folder.is_pumas and not any(entry.path.is_relative_to(folder.path) for entry in entries):
                entries.append(_without_file(folder))
        return sorted(entries, key=lambda entry: entry.id)

    def _walk(self, root: Path, seen: set[tuple[int, int]]) -> Iterator[_Folder]:
        """The directories from `root` on with models in them; each one once, also where model directories overlap."""
        left = MAX_LOOKED_AT
        waiting: list[tuple[Path, int, Mapping[str, Any]]] = [(root, 0, _NOTHING)]
        while waiting:
            path, depth, pumas = waiting.pop()
            try:
                about = path.stat()
                if (about.st_dev, about.st_ino) in seen:
                    continue
                seen.add((about.st_dev, about.st_ino))
                with os.scandir(path) as listing:
                    found = list(islice(listing, left + 1))
                if len(found) > left:
                    self._say(f"{root} has more than {MAX_LOOKED_AT} files; the rest is not in the library")
                    del found[left:]
                left -= len(found)
                found.sort(key=lambda one: one.name)
                directories = [Path(one.path) for one in found if _is_directory(one)]
                files = [Path(one.path) for one in found if self._is_model_file(one, root)]
            except OSError as failed:
                if path == root:
                    raise
                self._say(f"{path} cannot be read: {failed.strerror}")
                continue
            own, notes = _read_pumas(path) if any(one.name == PUMAS_FILE for one in found) else (None, ())
            pumas = pumas if own is None else own
            if files or own is not None:
                yield _Folder(path, root, files, pumas, own is not None, notes)
            if depth < MAX_DEPTH:
                waiting += [(directory, depth + 1, pumas) for directory in reversed(directories)]
            elif directories:
                self._say(f"{path} has directories more than {MAX_DEPTH} below {root}; they are not in the library")

    def _is_model_file(self, one: os.DirEntry[str], root: Path) -> bool:
        if one.name.startswith(".") or not one.name.casefold().endswith(".gguf") or _is_directory(one):
            return False
        if one.is_symlink():
            try:
                inside = Path(one.path).resolve().is_relative_to(root)
            except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
                inside = False
            if not inside:
                self._say(f"{one.path} is a link out of its model directory, so it is not in the library")
            return inside
        return True

    def _in_folder(self, folder: _Folder) -> list[LibraryEntry]:
        groups = list(_groups(folder))
        known = [self._read(group.first) for group in groups]
        projectors = [
            group.first for group, one in zip(groups, known, strict=True) if _type(one) == "mmproj" and group.count == 1
        ]
        return [
            self._entry(group, projectors, alone=len(groups) == 2)
            for group, one in zip(groups, known, strict=True)
            if _type(one) != "mmproj"
        ]

    def _entry(self, group: _Group, projectors: list[Path], *, alone: bool = False) -> LibraryEntry:
        folder = group.folder
        known = {number: self._read(path) for number, path in sorted(group.files.items())}
        sound = [one for one in known.values() if isinstance(one, GgufMetadata)]
        first = known.get(1)
        metadata = first if isinstance(first, GgufMetadata) else None
        mmproj, note = _projector(group.stem, projectors, alone=alone)
        id = folder.id_of(group.stem)
        return LibraryEntry(
            id=id,
            path=group.first,
            name=(metadata and metadata.name) or _text(folder.pumas, "official_name") or id.rpartition("/")[2],
            size_bytes=sum(_size(path) for path in group.files.values()),
            parameters=(metadata and metadata.stated_parameters) or sum(one.elements for one in sound) or None,
            metadata=metadata,
            shards=tuple(path for _, path in sorted(group.files.items())),
            mmproj=mmproj,
            pumas=folder.pumas,
            unusable=_unusable(group, known),
            notes=(*folder.notes, *([note] if note else [])),
        )

    def _read(self, path: Path) -> GgufMetadata | str:
        """What a file says of itself, or why it cannot be read."""
        try:
            about = path.stat()
        except (OSError, ValueError) as failed:
            return f"cannot be read: {getattr(failed, 'strerror', None) or failed}"
        version = about.st_size, about.st_mtime_ns
        before = self._read_before.get(path)
        if before is not None and before[0] == version:
            return before[1]
        found: GgufMetadata | str
        try:
            found = read_metadata(path)
        except DemandportError as refused:
            found = refused.message.removeprefix(f"{path} ")
        self._read_before[path] = version, found
        return found

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _log.warning("%s", message)


@functools.cache
def tiny_path() -> Path:
    """Where the model lies that comes with the package."""
    return Path(str(importlib.resources.files("demandport") / "data" / "tiny.gguf"))


# ------------------------------------------------------------------------------------------------------- which is meant


def _having(query: str, entries: list[LibraryEntry]) -> list[LibraryEntry]:
    words = query.casefold().split()
    return [entry for entry in entries if all(word in "\n".join(entry.names).casefold() for word in words)]


def _only(model: str, found: list[LibraryEntry], entries: list[LibraryEntry]) -> LibraryEntry:
    # A file may be found by several names: by a link, or where model directories overlap.
    different = list({_real(entry.path): entry for entry in reversed(found)}.values())[::-1]
    if len(different) > 1:
        candidates = [_exactly(entry, entries) for entry in different]
        raise ModelNotFound(
            f"{model!r:.200} may be any of {len(candidates)} models; name one of {_listed(candidates)}",
            details={"candidates": candidates},
        )
    (entry,) = different
    if entry.unusable is not None:
        raise ModelLoadFailed(f"{_exactly(entry, entries)} {entry.unusable}")
    return entry


def _exactly(entry: LibraryEntry, entries: list[LibraryEntry]) -> str:
    """A name that means this entry and no other."""
    if entry.path == tiny_path():
        return TINY
    return entry.id if sum(one.id == entry.id for one in entries) <= 1 else str(entry.path)


def _not_found(model: str, entries: list[LibraryEntry], directories: Sequence[Path]) -> ModelNotFound:
    near = _near(model, entries)
    if near:
        hint = f"near it are {_listed(near)}"
    elif not directories:
        hint = "no model directories are configured: give the path of a GGUF file, or set model_directories"
    else:
        hint = f"there are {_listed([_exactly(entry, entries) for entry in entries])}"
    return ModelNotFound(f"there is no model {model!r:.200} in the library; {hint}", details={"near": near})


def _near(model: str, entries: list[LibraryEntry]) -> list[str]:
    from difflib import get_close_matches

    by_name: dict[str, list[LibraryEntry]] = {}
    for entry in entries:
        for known in entry.names:
            by_name.setdefault(known.casefold(), []).append(entry)
    name = model.casefold()[:200]
    close = get_close_matches(name, list(by_name)[:_MOST_COMPARED], n=_MOST_NAMED)
    within = [known for known in by_name if len(name) > 2 and name in known]
    near = (_exactly(entry, entries) for known in (*close, *within) for entry in by_name[known])
    return list(dict.fromkeys(near))[:_MOST_NAMED]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(f"{name:.200}" for name in names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


# --------------------------------------------------------------------------------------------------- files and folders


def _is_directory(one: os.DirEntry[str]) -> bool:
    """A directory to look into: what a link to one would show inside the model directory is found there anyway."""
    return not one.name.startswith(".") and one.is_dir(follow_symlinks=False)


def _shard(path: Path) -> tuple[str, tuple[int, int] | None]:
    """The name of a model that a file is or is a part of; its number from 1, and how many there are."""
    found = _SHARD.fullmatch(path.stem)
    if found and 1 <= int(found["number"]) <= int(found["count"]):
        return found["stem"], (int(found["number"]), int(found["count"]))
    return path.stem, None


def _groups(folder: _Folder) -> Iterator[_Group]:
    groups: dict[tuple[str, int | None], _Group] = {}
    for path in folder.files:
        stem, shard = _shard(path)
        number, count = shard or (1, 1)
        group = groups.setdefault((stem, shard and count), _Group(folder, stem, count, {}))
        group.files[number] = path
    yield from groups.values()


def _type(known: GgufMetadata | str) -> str:
    return known.type if isinstance(known, GgufMetadata) else "model"


def _unusable(group: _Group, known: Mapping[int, GgufMetadata | str]) -> str | None:
    try:
        str(group.first).encode()
    except UnicodeEncodeError:
        return "has a name that is no UTF-8; rename it"
    if lost := group.missing():
        return lost
    for number, one in known.items():
        place = f"is incomplete: {group.files[number].name} " if group.count > 1 else ""
        if isinstance(one, str):
            return place + one
        if one.type != "model":
            return f"{place}is of type {one.type}, no model"
        if one.split_count != group.count or (group.count > 1 and one.split_no != number - 1):
            said = f"{group.stem}-{(one.split_no or 0) + 1:05}-of-{one.split_count:05}.gguf"
            return f"{place}says that it is one of {one.split_count} files, and should be named {said}"
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path


def _projector(stem: str, projectors: Sequence[Path], *, alone: bool) -> tuple[Path | None, str | None]:
    """The projector that belongs to a model beside it, and what to say when that cannot be told.

    A projector is named after its model (``mmproj-llava-7b-f16`` goes with ``llava-7b-Q4_K``), or after none
    (``mmproj-f16``), and then goes with all in its directory. One projector and one model belong together.
    """
    if alone and len(projectors) == 1:
        return projectors[0], None
    words = _words(stem)
    fitting = [path for path in projectors if words[: len(_words(path.stem))] == _words(path.stem)]
    most = max((len(_words(path.stem)) for path in fitting), default=0)
    best = [path for path in fitting if len(_words(path.stem)) == most]
    if len(best) > 1:
        return None, f"several mmproj files fit it: {', '.join(path.name for path in best)}"
    return (best[0] if best else None), None


def _words(stem: str) -> list[str]:
    plain = _PRECISION.sub("", stem.casefold())
    return [word for word in re.split(r"[-_. ]+", plain) if word not in ("", "mmproj", "model")]


# --------------------------------------------------------------------------------------------------------------- Pumas


def _read_pumas(folder: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What Pumas says of the model in a folder, None where the file is not one of Pumas; and what to say of it.

    The fields are those of `ModelMetadata` of Pumas-Library's rust/crates/pumas-core/src/models/model.rs.
    """
    try:
        with (folder / PUMAS_FILE).open("rb") as file:
            data = file.read(MAX_PUMAS_BYTES + 1)
        if len(data) > MAX_PUMAS_BYTES:
            return None, (f"{PUMAS_FILE} is over {MAX_PUMAS_BYTES} bytes and was not read",)
        about = json.loads(data, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as failed:
        return None, (f"{PUMAS_FILE} cannot be read: {getattr(failed, 'strerror', None) or failed}",)
    if not isinstance(about, dict) or not (_text(about, "model_id") or _text(about, "model_type")):
        return None, ()
    return about, ()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _without_file(folder: _Folder) -> LibraryEntry:
    elsewhere = _text(folder.pumas, "entry_path")
    why = f"; it lies at {elsewhere}" if elsewhere else ""
    id = folder.id_of("")
    name = _text(folder.pumas, "official_name") or folder.path.name
    return LibraryEntry(id, folder.path, name, pumas=folder.pumas, unusable=f"has no GGUF file in its folder{why}")


def _text(about: Mapping[str, Any], key: str) -> str | None:
    value = about.get(key)
    return value if isinstance(value, str) and value else None
