"""The model library: what it finds in directories, and what a name means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from demandport.errors import ModelLoadFailed, ModelNotFound
from demandport.inference import library as module
from demandport.inference.library import Library, LibraryEntry, tiny_path
from gguf_files import ROWS, write_gguf, write_split

ELEMENTS = ROWS * 256


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return (tmp_path / "models").resolve()


def entries(root: Path) -> dict[str, LibraryEntry]:
    """The entries by id, without `tiny`."""
    found = Library([root]).entries()
    assert found[0].id == "tiny"
    assert len({entry.id for entry in found}) == len(found)
    return {entry.id: entry for entry in found[1:]}


def resolved(root: Path, model: str) -> str:
    return Library([root]).resolve(model).id


def not_found(root: Path, model: str) -> ModelNotFound:
    with pytest.raises(ModelNotFound) as caught:
        Library([root]).resolve(model)
    return caught.value


def candidates(root: Path, model: str) -> list[str]:
    """How to say which model is meant, where a name fits several; every candidate is one that works."""
    details = not_found(root, model).details or {}
    found: list[str] = details["candidates"]
    assert found and all(Library([root]).resolve(exact) for exact in found)
    return found


def pumas(folder: Path, **about: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps(about))


# --------------------------------------------------------------------------------------------------- what is found


def test_tiny_is_always_there() -> None:
    (tiny,) = Library().entries()
    assert (tiny.id, tiny.name, tiny.path, tiny.unusable) == ("tiny", "demandport-tiny", tiny_path(), None)
    assert tiny.parameters == 694_080 and tiny.size_bytes == tiny_path().stat().st_size and tiny.shards == (tiny.path,)
    assert Library().resolve("tiny") == Library().resolve("demandport-tiny") == tiny


def test_files_at_any_depth_sorted_with_forward_slashes(root: Path) -> None:
    for name in ("z.gguf", "b/deep/er/m.Q4_K_M.gguf", "B.GGUF", "b/a.gguf"):
        write_gguf(root / name, name="Stated" if name == "z.gguf" else None, __context_length=99)
    (root / "readme.txt").write_text("no model")
    found = entries(root)
    assert list(found) == ["B", "b/a", "b/deep/er/m.Q4_K_M", "z"]
    assert [entry.name for entry in found.values()] == ["B", "a", "m.Q4_K_M", "Stated"]
    one = found["b/deep/er/m.Q4_K_M"]
    assert one.path == root / "b/deep/er/m.Q4_K_M.gguf" and one.shards == (one.path,) and one.notes == ()
    assert one.parameters == ELEMENTS and one.metadata and one.metadata.context_length == 99
    assert one.describe() | {"size_bytes": 0} == {
        "id": "b/deep/er/m.Q4_K_M", "name": "m.Q4_K_M", "path": str(one.path), "size_bytes": 0, "parameters": ELEMENTS,
        "architecture": "llama", "quantization": "F32", "context_length": 99, "has_chat_template": False,
        "embedding_only": False, "pooling": None, "shards": [str(one.path)], "mmproj": None, "pumas": {},
        "unusable": None, "notes": [],
    }  # fmt: skip


def test_what_is_hidden_is_skipped(root: Path) -> None:
    for name in (".hidden.gguf", ".cache/m.gguf", "a/.git/m.gguf", "seen.gguf"):
        write_gguf(root / name)
    assert list(entries(root)) == ["seen"]


def test_links_are_followed_within_the_directory_only(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(root.parent / "secret" / "out.gguf")
    write_gguf(root / "blobs" / "0a1b").rename(root / "blobs" / "0a1b2c")
    for name, target in {
        "in.gguf": "blobs/0a1b2c", "out.gguf": "../secret/out.gguf", "dead.gguf": "blobs/gone",
        "loop.gguf": "loop.gguf", "elsewhere": "../secret", "self": ".", "up": "..",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    library = Library([root])
    assert [entry.id for entry in library.entries()] == ["tiny", "dead", "in"]
    assert library.resolve("in").path == root / "in.gguf"
    with pytest.raises(ModelLoadFailed, match=r"^dead cannot be read: No such file"):
        library.resolve("dead")
    library.entries()
    said = [record.message for record in caplog.records]
    assert sum("out.gguf is a link out of its model directory" in line for line in said) == 1  # once, however often


def test_a_model_directory_may_itself_be_a_link(root: Path) -> None:
    write_gguf(root / "m.gguf")
    link = root.parent / "link"
    link.symlink_to(root)
    assert Library([link]).resolve("m").path == root / "m.gguf"
    assert Library([link]).resolve(str(link / "m.gguf")).id == "m"


def test_directories_that_overlap_show_a_model_once(root: Path) -> None:
    write_gguf(root / "sub" / "m.gguf")
    assert [entry.id for entry in Library([root, root / "sub", root]).entries()] == ["tiny", "sub/m"]
    assert [entry.id for entry in Library([root / "sub", root]).entries()] == ["tiny", "m"]


def test_a_directory_that_is_not_there_hides_no_other(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(root / "m.gguf")
    library = Library([root / "nope", root / "m.gguf", root])
    assert [entry.id for entry in library.entries()] == ["tiny", "m"]
    assert "nope cannot be read: No such file" in caplog.text and "m.gguf cannot be read: Not a dir" in caplog.text


def test_depth_and_number_have_a_limit(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.gguf", "d/b.gguf", "d/d/c.gguf", "d/d/d/d.gguf"):
        write_gguf(root / name)
    monkeypatch.setattr(module, "MAX_DEPTH", 2)
    assert list(entries(root)) == ["a", "d/b", "d/d/c"] and "directories more than 2 below" in caplog.text
    for limit, count in ((6, 3), (4, 2)):  # directories count too
        monkeypatch.setattr(module, "MAX_LOOKED_AT", limit)
        assert len(entries(root)) == count
        assert (f"has more than {limit} files" in caplog.text) == (count < 3)


def test_what_is_damaged_is_listed_and_hides_no_other(root: Path) -> None:
    whole = write_gguf(root / "whole.gguf")
    (root / "cut.gguf").write_bytes(whole.read_bytes()[:-4000])
    (root / "page.gguf").write_text("<html>404</html>")
    (root / "empty.gguf").touch()
    (root / "adapter.gguf").write_bytes(write_gguf(root / "x", general__type="adapter").read_bytes())
    os.mkfifo(root / "fifo.gguf")
    (root / "directory.gguf").mkdir()
    os.rename(write_gguf(root / "y"), os.fsencode(root) + b"/caf\xe9.gguf")
    found = {id: entry.unusable for id, entry in entries(root).items()}
    assert found.pop("whole") is None
    assert list(found) == ["adapter", "caf�", "cut", "empty", "fifo", "page"]
    for id, reason in {
        "adapter": "is of type adapter, no model", "caf�": "has a name that is no UTF-8; rename it",
        "cut": "is no sound GGUF file: at byte .*the data of its tensors takes 8199 bytes",
        "empty": "is no sound GGUF file: at byte 0",
        "fifo": "is a directory or a device", "page": "is no sound GGUF file: at byte 4, it begins with b'<htm'",
    }.items():  # fmt: skip
        with pytest.raises(ModelLoadFailed, match=f"^{id} {reason}"):
            Library([root]).resolve(id)


def test_a_file_is_read_again_only_when_it_has_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    real = module.read_metadata
    monkeypatch.setattr(module, "read_metadata", lambda path: (reads.append(path), real(path))[1])
    file = write_gguf(root / "m.gguf", name="old")
    (root / "bad.gguf").write_text("bad")
    library = Library([root])
    assert [entry.name for entry in library.entries() + library.entries()][1::3] == ["bad", "bad"]
    assert sorted(path.name for path in reads) == ["bad.gguf", "m.gguf", "tiny.gguf"]
    write_gguf(file, name="new")
    os.utime(file, ns=(0, 1))
    assert library.resolve("m").name == "new" and len(reads) == 4


# ------------------------------------------------------------------------------------------------- split models


def test_a_split_model_is_one(root: Path) -> None:
    shards = write_split(root / "big", "Big-Q8", 3, name="Big One", tensors=2)
    write_gguf(root / "big" / "Big-Q4.gguf")
    found = entries(root)
    assert list(found) == ["big/Big-Q4", "big/Big-Q8"]
    big = found["big/Big-Q8"]
    assert big.path == shards[0] and big.shards == tuple(shards) and big.name == "Big One" and big.unusable is None
    assert big.parameters == 6 * ELEMENTS and big.size_bytes == sum(shard.stat().st_size for shard in shards)
    for name in ("big/Big-Q8", "Big-Q8", "big one", shards[0].name, shards[1].name, str(shards[2])):
        assert resolved(root, name) == "big/Big-Q8"


def test_what_a_split_model_states_counts_for_all_its_files(root: Path) -> None:
    write_split(root, "m", 2, general__parameter_count=7_000_000)
    assert entries(root)["m"].parameters == 7_000_000


@pytest.mark.parametrize(
    ("left_out", "says"),
    [(1, "1 of 3 files are missing: m-00001-of-00003.gguf$"), (3, "1 of 3 files are missing: m-00003-of-00003.gguf$")],
)
def test_a_split_model_that_is_incomplete(root: Path, left_out: int, says: str) -> None:
    write_split(root, "m", 3, leave_out=left_out)
    (entry,) = entries(root).values()
    assert entry.path == root / "m-00001-of-00003.gguf" and len(entry.shards) == 2
    with pytest.raises(ModelLoadFailed, match=f"^m is incomplete: {says}"):
        Library([root]).resolve("m")


def test_a_shard_that_is_damaged_or_of_another_model(root: Path) -> None:
    shards = write_split(root, "m", 2)
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    assert "m-00002-of-00002.gguf is no sound GGUF file" in str(entries(root)["m"].unusable)
    write_split(root, "m", 2)[0].replace(shards[1])
    shards[0].write_bytes(shards[1].read_bytes())
    assert "m-00002-of-00002.gguf says that it is one of 2 files, and should be named m-00001-of-00002.gguf" in str(
        entries(root)["m"].unusable
    )


def test_a_shard_under_another_name(root: Path) -> None:
    write_split(root, "m", 2)[1].rename(root / "renamed.gguf")
    (root / "m-00001-of-00002.gguf").unlink()
    assert entries(root)["renamed"].unusable == (
        "says that it is one of 2 files, and should be named renamed-00002-of-00002.gguf"
    )


@pytest.mark.parametrize("name", ["m-00000-of-00002", "m-00003-of-00002", "m-1-of-2", "-00001-of-00002"])
def test_names_that_only_look_like_shards(root: Path, name: str) -> None:
    write_gguf(root / f"{name}.gguf")
    assert list(entries(root)) == [name]


def test_a_claim_of_very_many_shards(root: Path) -> None:
    write_gguf(root / "m-00001-of-99999.gguf")
    assert entries(root)["m"].unusable == (
        "is incomplete: 99998 of 99999 files are missing: m-00002-of-99999.gguf, m-00003-of-99999.gguf, "
        "m-00004-of-99999.gguf, …"
    )


# ---------------------------------------------------------------------------------------------------- projectors

PAIRS: list[Any] = [
    (["llava-7b-Q4_K"], ["mmproj-f16"], {"llava-7b-Q4_K": "mmproj-f16"}),
    (["ggml-model-q4_k"], ["llava-mmproj"], {"ggml-model-q4_k": "llava-mmproj"}),  # one of each
    (["m-Q4_K", "m-Q8_0"], ["mmproj-model-f16"], {"m-Q4_K": "mmproj-model-f16", "m-Q8_0": "mmproj-model-f16"}),
    (["m-Q4_K", "other"], ["mmproj-m-f16"], {"m-Q4_K": "mmproj-m-f16", "other": None}),
    (["Qwen2.5-VL-7B-Q4"], ["mmproj-Qwen2.5-VL-3B-f16", "mmproj-Qwen2.5-VL-7B-f16"],
     {"Qwen2.5-VL-7B-Q4": "mmproj-Qwen2.5-VL-7B-f16"}),
    (["Qwen2.5-VL-7B-Q4", "x"], ["mmproj-Qwen2.5-VL-3B-f16"], {"Qwen2.5-VL-7B-Q4": None, "x": None}),
    (["m-Q4_K"], ["mmproj-f16", "mmproj-m-f16"], {"m-Q4_K": "mmproj-m-f16"}),
]  # fmt: skip


@pytest.mark.parametrize(("models", "projectors", "expected"), PAIRS)
def test_a_projector_goes_with_the_model_it_is_named_after(
    root: Path, models: list[str], projectors: list[str], expected: dict[str, str | None]
) -> None:
    for name in models:
        write_gguf(root / "d" / f"{name}.gguf")
    for name in projectors:
        write_gguf(root / "d" / f"{name}.gguf", architecture="clip")
    write_gguf(root / "elsewhere.gguf")
    found = entries(root)
    assert found.pop("elsewhere").mmproj is None
    assert {entry.path.stem: entry.mmproj and entry.mmproj.stem for entry in found.values()} == expected
    assert not any(entry.notes for entry in found.values())


def test_projectors_that_fit_alike_are_named_and_none_is_taken(root: Path) -> None:
    write_gguf(root / "m-Q4_K.gguf")
    for name in ("mmproj-f16", "mmproj-f32"):
        write_gguf(root / f"{name}.gguf", architecture="clip")
    (entry,) = entries(root).values()
    assert entry.mmproj is None
    assert entry.notes == ("several mmproj files fit it: mmproj-f16.gguf, mmproj-f32.gguf",)


def test_a_projector_is_never_offered_as_a_model(root: Path) -> None:
    write_gguf(root / "d" / "m.gguf")
    projector = write_gguf(root / "d" / "mmproj.gguf", architecture="clip", name="Projector")
    assert resolved(root, "d") == "d/m"
    for name in ("mmproj", "d/mmproj", "Projector", "mmproj.gguf"):
        assert "there is no model" in not_found(root, name).message
    with pytest.raises(ModelLoadFailed, match=r"mmproj\.gguf is of type mmproj, no model"):
        Library([root]).resolve(str(projector))


def test_a_damaged_projector_is_listed_with_its_reason(root: Path) -> None:
    write_gguf(root / "m.gguf")
    (root / "mmproj.gguf").touch()
    found = entries(root)
    assert found["m"].mmproj is None and found["m"].unusable is None and "at byte 0" in str(found["mmproj"].unusable)


# ------------------------------------------------------------------------------------------------ what a name means


def test_names_whatever_the_case(root: Path) -> None:
    write_gguf(root / "llm" / "Llama-3.Q4.gguf", name="Llama 3 Instruct")
    for name in ("llm/Llama-3.Q4", "LLM/llama-3.q4.GGUF", "llama-3.Q4", "Llama-3.Q4.gguf", "llama 3 instruct", "llm",
                 "llm/", str(root / "llm" / "Llama-3.Q4.gguf"), str(root / "llm"), str(root)):  # fmt: skip
        assert resolved(root, name) == "llm/Llama-3.Q4"
    for name in ("llama", "llama-3", "Llama-3.Q5", "lm", "", "llm/nope", str(root / "nope"), "a\0b", "/a\0b",
                 "~nobody/x", "~/nope.gguf", "x" * 5000, f"/{'x' * 5000}"):  # fmt: skip
        message = not_found(root, name).message
        assert "there is no model" in message and len(message) < 1000


def test_a_path_wherever_it_lies(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(root / "m.gguf")
    outside = write_gguf(tmp_path / "outside" / "o.gguf")
    split = write_split(tmp_path / "outside" / "split", "s", 2)
    for name, expected in {
        str(outside): outside, str(outside.parent / "split"): split[0], str(split[1]): split[0],
        str(tmp_path / "outside" / "." / "split" / ".." / "o.gguf"): outside,
    }.items():  # fmt: skip
        found = Library([root]).resolve(name)
        assert found.path == expected and found.id == str(expected) and found.unusable is None
    monkeypatch.chdir(outside.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Library([root]).resolve("./o.gguf").path == Library([root]).resolve("~/outside/o.gguf").path == outside
    assert "there is no model" in not_found(root, "o.gguf").message  # a plain name is one of the library
    assert candidates(root, str(outside.parent)) == [str(outside), str(split[0])]


def test_a_name_that_fits_several_lists_how_to_say_each(root: Path) -> None:
    for name in ("a/m.gguf", "b/m.gguf", "b/n.gguf"):
        write_gguf(root / name, name="The Model")
    assert candidates(root, "m") == ["a/m", "b/m"]
    assert candidates(root, "the model") == ["a/m", "b/m", "b/n"]
    assert candidates(root, "b") == candidates(root, str(root / "b")) == ["b/m", "b/n"]
    message = not_found(root, "m.gguf").message
    assert message == "'m.gguf' may be any of 2 models; name one of a/m, b/m"


def test_an_exact_id_comes_before_names(root: Path) -> None:
    write_gguf(root / "m.gguf", name="other")
    write_gguf(root / "M.gguf")
    write_gguf(root / "x" / "m.gguf", name="m")
    assert (resolved(root, "m"), resolved(root, "M")) == ("m", "M")
    assert candidates(root, "m.gguf") == ["M", "m", "x/m"]
    write_gguf(root / "y" / "X.gguf")
    assert resolved(root, "x") == "y/X"  # and a name before a folder


def test_one_id_in_two_directories(root: Path) -> None:
    first, second = write_gguf(root / "1" / "m.gguf"), write_gguf(root / "2" / "m.gguf")
    library = Library([root / "1", root / "2"])
    with pytest.raises(ModelNotFound) as caught:
        library.resolve("m")
    assert caught.value.details == {"candidates": [str(first), str(second)]}
    assert [library.resolve(path).path for path in (str(first), str(second))] == [first, second]


def test_a_file_of_the_name_tiny(root: Path) -> None:
    own = write_gguf(root / "tiny.gguf")
    library = Library([root])
    assert library.resolve("tiny").path == tiny_path() and library.resolve(str(own)).path == own
    assert candidates_of(library, "tiny.gguf") == ["tiny", str(own)]


def candidates_of(library: Library, model: str) -> Any:
    with pytest.raises(ModelNotFound) as caught:
        library.resolve(model)
    return (caught.value.details or {})["candidates"]


def test_two_names_of_one_file_are_one_model(root: Path) -> None:
    write_gguf(root / "v2.gguf", name="Model")
    (root / "latest.gguf").symlink_to("v2.gguf")
    assert resolved(root, "model") == "latest" and resolved(root, "v2") == "v2"


def test_near_names_are_told(root: Path) -> None:
    for name in ("llm/llama-3-8b.gguf", "mistral-7b.gguf", "2/mistral-7b.gguf"):
        write_gguf(root / name)
    assert (
        not_found(root, "lama-3-8b").message
        == "there is no model 'lama-3-8b' in the library; near it are llm/llama-3-8b"
    )
    assert (not_found(root, "stral").details or {})["near"] == ["2/mistral-7b", "mistral-7b"]
    assert "there are tiny, 2/mistral-7b, llm/llama-3-8b, mistral-7b" in not_found(root, "zzz").message
    with pytest.raises(ModelNotFound, match="no model directories are configured"):
        Library().resolve("zzz")


def test_a_search_finds_words_and_a_find_wants_one_model(root: Path) -> None:
    for name in ("llama-3-8b.Q4.gguf", "llama-3-8b.Q8.gguf", "mistral.gguf"):
        write_gguf(root / name, name="Meta" if "llama" in name else None)
    library = Library([root])
    assert [entry.id for entry in library.search("LLAMA meta")] == ["llama-3-8b.Q4", "llama-3-8b.Q8"]
    assert library.search("llama mistral") == []
    assert library.find("llama q8").id == "llama-3-8b.Q8" and library.find("mistral").id == "mistral"
    for query, says in (("llama", "may be any of 2 models"), ("llama q9", "there is no model 'llama q9'")):
        with pytest.raises(ModelNotFound, match=says):
            library.find(query)


# ----------------------------------------------------------------------------------------------------------- Pumas

SETTINGS = [{"key": "temperature", "label": "Temperature", "param_type": "Number", "default": 0.7}]


def test_a_pumas_folder_is_a_model(root: Path) -> None:
    folder = root / "llm" / "llama" / "some-model"
    write_gguf(folder / "weights.gguf")
    pumas(
        folder, schema_version=2, model_id="llm/llama/some-model", model_type="llm", official_name="Some Model 8B",
        cleaned_name="some_model_8b", inference_settings=SETTINGS,
    )  # fmt: skip
    (entry,) = entries(root).values()
    assert (entry.id, entry.name) == ("llm/llama/some-model/weights", "Some Model 8B")
    assert entry.inference_settings == SETTINGS and entry.pumas["model_type"] == "llm"
    assert entry.describe()["pumas"]["official_name"] == "Some Model 8B"
    for name in ("llm/llama/some-model", "SOME model 8b", "some_model_8b", "weights", str(folder)):
        assert resolved(root, name) == "llm/llama/some-model/weights"


def test_pumas_knows_of_files_in_folders_below(root: Path) -> None:
    write_gguf(root / "p" / "Q4" / "a.gguf")
    write_gguf(root / "p" / "b.gguf")
    write_gguf(root / "q.gguf")
    pumas(root / "p", model_id="llm/x/p", inference_settings={"top_k": 3})
    found = entries(root)
    assert found["p/Q4/a"].inference_settings == found["p/b"].inference_settings == {"top_k": 3}
    assert found["q"].inference_settings == [] and found["q"].pumas == {}
    assert candidates(root, "llm/x/p") == ["p/Q4/a", "p/b"]


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({}, "^diffusion/q has no GGUF file in its folder$"),
        ({"entry_path": "/elsewhere/q"}, "no GGUF file in its folder; it lies at /elsewhere/q$"),
    ],
)
def test_a_pumas_folder_without_a_gguf_file(root: Path, about: dict[str, Any], says: str) -> None:
    pumas(root / "diffusion" / "q", model_id="diffusion/q/q", official_name="Qwen Image", **about)
    with pytest.raises(ModelLoadFailed, match=says):
        Library([root]).resolve("Qwen Image")


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"model_id": NaN}', "\udcff"])
def test_a_pumas_file_that_cannot_be_read_hides_no_model(root: Path, content: str) -> None:
    write_gguf(root / "d" / "m.gguf")
    (root / "d" / "metadata.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    (entry,) = entries(root).values()
    assert entry.unusable is None and entry.pumas == {} and "metadata.json cannot be read" in entry.notes[0]


def test_a_pumas_file_has_a_size_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(root / "m.gguf")
    pumas(root, model_id="a", notes="x" * 100)
    monkeypatch.setattr(module, "MAX_PUMAS_BYTES", 50)
    assert entries(root)["m"].notes == ("metadata.json is over 50 bytes and was not read",)


@pytest.mark.parametrize("content", ["[]", "5", '{"name": "of another tool"}', '{"model_id": 5}'])
def test_a_file_of_that_name_that_is_not_of_pumas(root: Path, content: str) -> None:
    write_gguf(root / "d" / "m.gguf")
    (root / "d" / "metadata.json").write_text(content)
    (root / "empty").mkdir()
    (root / "empty" / "metadata.json").write_text(content)
    (entry,) = entries(root).values()
    assert entry.pumas == {} and entry.notes == ()


@pytest.mark.parametrize("settings", [None, "x", 5])
def test_settings_that_are_none(root: Path, settings: Any) -> None:
    write_gguf(root / "m.gguf")
    pumas(root, model_id="m", official_name=7, inference_settings=settings)
    (entry,) = entries(root).values()
    assert entry.inference_settings == [] and entry.name == "m"
