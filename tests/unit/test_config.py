"""The configuration: where each value comes from, and what is said of a wrong one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from demandport.cli import USAGE_ERROR, main
from demandport.errors import DemandportError, TypeMismatch
from demandport.inference.config import OLLAMA_URL, Config, ModelSpec, load_config
from demandport.nodes import http, process
from demandport.nodes.http import HttpConfig
from demandport.nodes.process import ProcessConfig
from demandport.settings import Tables


def loaded(tmp_path: Path, text: str, **environment: str) -> Config:
    file = tmp_path / "models.toml"
    file.write_text(text)
    return read(file, environment)


def read(file: Path | None, environment: dict[str, str]) -> Config:
    tables = Tables.read(file)
    config = load_config(tables, environment)
    tables.require_known()
    return config


def refusal(tmp_path: Path, text: str, **environment: str) -> str:
    with pytest.raises(TypeMismatch) as caught:
        loaded(tmp_path, text, **environment)
    return caught.value.message


# ----------------------------------------------------------------------------------------------- where values come from


def test_nothing_said_is_the_defaults() -> None:
    config = read(None, {})
    assert config == Config()
    assert (config.default_model, config.model_directories, config.memory_limit_bytes) == ("tiny", (), None)
    assert (config.cache_directory, config.ollama_url, dict(config.models)) == (None, OLLAMA_URL, {})


FILE = """
[inference]
default_model = "assistant"
model_directories = ["models", "/srv/models"]
memory_limit_bytes = 2000000
cache_directory = "cache"
ollama_url = "https://ollama.test"
"""


def test_the_file_stands_over_the_defaults_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    assert loaded(tmp_path, FILE) == Config(
        default_model="assistant",
        model_directories=(tmp_path / "models", Path("/srv/models")),
        memory_limit_bytes=2_000_000,
        cache_directory=tmp_path / "cache",
        ollama_url="https://ollama.test",
    )


ENVIRONMENT = {
    "DEMANDPORT_DEFAULT_MODEL": "other",
    "DEMANDPORT_MODEL_DIRECTORIES": os.pathsep.join(["here", "", "/there"]),
    "DEMANDPORT_MEMORY_LIMIT_BYTES": "3000000",
    "DEMANDPORT_CACHE_DIRECTORY": "saved",
    "DEMANDPORT_OLLAMA_URL": "http://env.test",
}


@pytest.mark.parametrize("text", ["", FILE])
def test_the_environment_stands_over_the_file(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, text, **ENVIRONMENT, UNRELATED="x", DEMANDPORT_OTHER="y") == Config(
        default_model="other",
        model_directories=(Path("here"), Path("/there")),
        memory_limit_bytes=3_000_000,
        cache_directory=Path("saved"),
        ollama_url="http://env.test",
    )


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_a_variable_changes_its_own_value_alone(tmp_path: Path, variable: str) -> None:
    name = variable.removeprefix("DEMANDPORT_").lower()
    changed, before = loaded(tmp_path, FILE, **{variable: ENVIRONMENT[variable]}), loaded(tmp_path, FILE)
    fields = ("default_model", "model_directories", "memory_limit_bytes", "cache_directory", "ollama_url")
    assert {field for field in fields if getattr(changed, field) != getattr(before, field)} == {name}


def test_the_process_has_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMANDPORT_DEFAULT_MODEL", "from the process")
    assert load_config().default_model == "from the process"


def test_a_home_directory_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = loaded(tmp_path, '[inference]\nmodel_directories = ["~/models"]\ncache_directory = "~/c"')
    assert config.model_directories == (Path("/home/ada/models"),) and config.cache_directory == Path("/home/ada/c")


# --------------------------------------------------------------------------------------------------- entries of models


def test_entries_by_name(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    text = """
    [models.local]
    model = "m.gguf"
    context_length = 2048
    replicas = 2
    balance = "round_robin"
    [models.library]
    model = "llm/some-model"
    [models."a b.c"]
    model = "gpt"
    backend = "openai"
    url = "http://127.0.0.1:8000/v1"
    api_key_env = "KEY"
    [models.server]
    model = "m.gguf"
    backend = "llama-server"
    arguments = ["--flash-attn", "on"]
    [models.remote]
    model = "m.gguf"
    backend = "ollama"
    keep_alive = "5m"
    """
    assert dict(loaded(tmp_path, text).models) == {
        "local": ModelSpec(str(tmp_path / "m.gguf"), context_length=2048, replicas=2, balance="round_robin"),
        "library": ModelSpec("llm/some-model"),
        "a b.c": ModelSpec("gpt", "openai", url="http://127.0.0.1:8000/v1", api_key_env="KEY"),
        "server": ModelSpec(str(tmp_path / "m.gguf"), "llama-server", arguments=("--flash-attn", "on")),
        "remote": ModelSpec("m.gguf", "ollama", keep_alive="5m"),
    }


# ----------------------------------------------------------------------------------------------- what is said of errors

WRONG: list[Any] = [
    ("not toml", "models.toml: "),
    ("[infrence]", "models.toml: there is no table infrence; there are inference and models"),
    ("inference = 5", "models.toml: inference must be a table"),
    ("models = 5", "models.toml: models must be tables, such as [models.assistant]"),
    ("[inference]\ndefault = 'x'", "models.toml: inference: parameter default is not known; known are "),
    ("[inference]\ndefault_model = 5", "models.toml: inference: parameter default_model must be a string, not int"),
    ("[inference]\nmodel_directories = 'x'", "inference: parameter model_directories must be a list of paths, not str"),
    ("[inference]\nmodel_directories = [5]", "inference: parameter model_directories must be a list of paths, not int"),
    ("[inference]\nmemory_limit_bytes = 5", "parameter memory_limit_bytes must be 1048576 to "),
    ("[inference]\nmemory_limit_bytes = true", "parameter memory_limit_bytes must be an integer, not bool"),
    ("[inference]\ncache_directory = ['x']", "parameter cache_directory must be a path, not list"),
    ("[inference]\nollama_url = 'localhost'", "parameter ollama_url must begin with http:// or https://"),
    ("[inference]\nmodels = {}", "parameter models is a table of its own: [models.NAME]"),
    ("[models]\na = 5", "models.toml: models.a must be a table"),
    ("[models.a]", "models.toml: models.a: parameter model must be given"),
    ("[models.a]\nmodel = ''", "models.a: parameter model must not be empty"),
    ("[models.a]\nmodel = 5", "models.a: parameter model must be a string, not int"),
    ("[models.a]\nmodel = 'm'\nsize = 5", "models.a: parameter size is not known; known are "),
    ("[models.a]\nmodel = 'm'\nbackend = 'vllm'", "models.a: parameter backend must be one of llama.cpp, "),
    ("[models.a]\nmodel = 'm'\nbackend = 'openai'", "models.a: parameter url must say where the server is"),
    ("[models.a]\nmodel = 'm'\nurl = 'http://x'", "models.a: parameter url says nothing to the backend llama.cpp"),
    (
        "[models.a]\nmodel = 'm'\nbackend = 'ollama'\nthreads = 2",
        "parameter threads says nothing to the backend ollama",
    ),
    ("[models.a]\nmodel = 'm'\nbackend = 'ollama'\nurl = 'x'", "models.a: parameter url must begin with http:// or"),
    ("[models.a]\nmodel = 'm'\ncontext_length = 7", "models.a: parameter context_length must be 8 to "),
    ("[models.a]\nmodel = 'm'\ngpu_layers = -2", "models.a: parameter gpu_layers must be -1 to "),
    ("[models.a]\nmodel = 'm'\nreplicas = 0", "models.a: parameter replicas must be 1 to 64, not 0"),
    ("[models.a]\nmodel = 'm'\nbalance = 'random'", "models.a: parameter balance must be least_loaded or round_robin"),
    ("[models.a]\nmodel = 'm'\ntimeout_ms = '5'", "models.a: parameter timeout_ms must be an integer, not str"),
    ("[models.a]\nmodel='m'\nbackend='llama-server'\narguments='-x'", "parameter arguments must be a list of strings"),
    ("[models.a]\nmodel='m'\nbackend='llama-server'\narguments=[5]", "parameter arguments must be a list of strings"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[text.replace("\n", " ") for text, _ in WRONG])
def test_an_error_names_the_file_and_the_key(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(str(tmp_path / "models.toml")) and says in message


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DEMANDPORT_MEMORY_LIMIT_BYTES", "2G", "DEMANDPORT_MEMORY_LIMIT_BYTES must be a number of bytes, not '2G'"),
        ("DEMANDPORT_MEMORY_LIMIT_BYTES", "5", "DEMANDPORT_MEMORY_LIMIT_BYTES: parameter memory_limit_bytes must be"),
        ("DEMANDPORT_OLLAMA_URL", "localhost", "DEMANDPORT_OLLAMA_URL: parameter ollama_url must begin with http://"),
    ],
)
def test_an_error_names_the_variable(tmp_path: Path, variable: str, value: str, says: str) -> None:
    assert refusal(tmp_path, FILE, **{variable: value}).startswith(says)


@pytest.mark.parametrize("content", [None, b"\xff", b"[inference]\ndefault_model = 'a'\ndefault_model = 'b'"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "m.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TypeMismatch, match=r"m\.toml: "):
        read(file, {})


def test_what_is_made_without_a_file_is_checked_too() -> None:
    for make in (lambda: Config(ollama_url="x"), lambda: ModelSpec("a\0b"), lambda: ModelSpec.from_options({})):
        with pytest.raises(DemandportError, match=r"parameter (ollama_url|model) "):
            make()


# ------------------------------------------------------------------------------------- programs and hosts for nodes


def configured(tmp_path: Path, text: str, **environment: str) -> tuple[ProcessConfig, HttpConfig]:
    file = tmp_path / "config.toml"
    file.write_text(text)
    tables = Tables.read(file)
    return process.load_config(tables, environment), http.load_config(tables, environment)


def test_nothing_is_allowed_unless_it_is_said(tmp_path: Path) -> None:
    programs, hosts = configured(tmp_path, "")
    assert (programs, hosts) == (ProcessConfig(), HttpConfig())
    assert dict(programs.programs) == {} and hosts.rules == ()


def test_programs_and_hosts_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    text = """
    [process]
    allow = ["/bin/sh", "cat"]
    environment = {LANG = "C"}
    pass_environment = ["SSH_AUTH_SOCK"]
    directory = "there"
    max_output_bytes = 1000
    max_running = 2
    [http]
    allow_hosts = ["api.example.com", "*.example.org"]
    max_body_bytes = 2000
    timeout_ms = 500
    """
    programs, hosts = configured(tmp_path, text)
    assert programs == ProcessConfig(
        ("/bin/sh", "cat"), {"LANG": "C"}, ("SSH_AUTH_SOCK",), tmp_path / "there", max_output_bytes=1000, max_running=2
    )
    assert programs.programs["sh"] == programs.programs["/bin/sh"] == "/bin/sh"
    assert hosts == HttpConfig(("api.example.com", "*.example.org"), max_body_bytes=2000, timeout_ms=500)


def test_the_environment_stands_over_the_file_for_programs_and_hosts_too(tmp_path: Path) -> None:
    text = "[process]\nallow = ['cat']\nmax_running = 2\n[http]\nallow_hosts = ['a.test']\ntimeout_ms = 5"
    variables = {"DEMANDPORT_PROCESS_ALLOW": "/bin/sh::ls", "DEMANDPORT_HTTP_ALLOW_HOSTS": "b.test, [::1]:80,"}
    programs, hosts = configured(tmp_path, text, **variables)
    assert programs == ProcessConfig(("/bin/sh", "ls"), max_running=2)
    assert hosts == HttpConfig(("b.test", "[::1]:80"), timeout_ms=5)
    programs, hosts = configured(tmp_path, text, DEMANDPORT_PROCESS_ALLOW="", DEMANDPORT_HTTP_ALLOW_HOSTS="")
    assert dict(programs.programs) == {} and hosts.rules == ()


WRONG_FOR_NODES: list[Any] = [
    ("process = 5", "config.toml: process: must be a table"),
    ("[process]\nallowed = []", "process: parameter allowed is not known; known are allow, directory, "),
    ("[process]\nprograms = {}", "process: parameter programs is not known"),
    ("[process]\nallow = 'ls'", "process: parameter allow must be a list of strings, not str"),
    ("[process]\nallow = [5]", "process: parameter allow must be a list of strings, not int"),
    ("[process]\nallow = ['']", "process: parameter allow must hold absolute paths, or names on the PATH, not ''"),
    ("[process]\nallow = ['./x']", "parameter allow must hold absolute paths, or names on the PATH, not './x'"),
    ("[process]\nallow = ['no-such-tool']", "parameter allow names 'no-such-tool', which is not on the PATH"),
    ("[process]\nallow = ['/etc/passwd']", "parameter allow names '/etc/passwd', that is no program"),
    ("[process]\nallow = ['/bin']", "parameter allow names '/bin', that is no program"),
    ("[process]\nenvironment = 'x'", "parameter environment must be a table of strings, not str"),
    ("[process]\nenvironment = {A = 5}", "parameter environment.A must be a string, not int"),
    ("[process]\nenvironment = {'A=B' = 'x'}", "parameter environment cannot have a variable 'A=B'"),
    ("[process]\npass_environment = ['']", "parameter environment cannot have a variable ''"),
    ("[process]\ndirectory = 'nowhere'", "parameter directory "),
    ("[process]\ndirectory = 5", "parameter directory must be a path, not int"),
    ("[process]\nmax_running = 0", "process: parameter max_running must be 1 to 1024, not 0"),
    ("[process]\nmax_output_bytes = true", "process: parameter max_output_bytes must be an integer, not bool"),
    ("http = []", "config.toml: http: must be a table"),
    ("[http]\nhosts = []", "http: parameter hosts is not known; known are allow_hosts, max_body_bytes, timeout_ms"),
    ("[http]\nallow_hosts = 'x'", "http: parameter allow_hosts must be a list of strings, not str"),
    ("[http]\nallow_hosts = ['http://x']", "parameter allow_hosts must hold hosts such as api.example.com, "),
    ("[http]\nmax_body_bytes = 0", "http: parameter max_body_bytes must be 1 to "),
    ("[http]\ntimeout_ms = 1.5", "http: parameter timeout_ms must be an integer, not float"),
]


@pytest.mark.parametrize(
    ("text", "says"), WRONG_FOR_NODES, ids=[text.replace("\n", " ") for text, _ in WRONG_FOR_NODES]
)
def test_an_error_for_nodes_names_the_file_and_the_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TypeMismatch) as caught:
        configured(tmp_path, text)
    assert caught.value.message.startswith(str(tmp_path / "config.toml")) and says in caught.value.message


@pytest.mark.parametrize(
    ("variable", "value"), [("DEMANDPORT_PROCESS_ALLOW", "no-such-tool"), ("DEMANDPORT_HTTP_ALLOW_HOSTS", "http://x")]
)
def test_an_error_for_nodes_names_the_variable(tmp_path: Path, variable: str, value: str) -> None:
    with pytest.raises(TypeMismatch, match=f"^{variable}: parameter allow"):
        configured(tmp_path, "", **{variable: value})


# ------------------------------------------------------------------------------------------------ the command line

GRAPH = {"nodes": [{"id": "p", "node_type": "process", "data": {"command": "sh", "args": ["-c", "echo it runs"]}}]}


def test_run_honours_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    (tmp_path / "config.toml").write_text("[process]\nallow = ['sh']")
    assert main(["run", str(tmp_path / "graph.json"), "p"]) == 1
    assert "forbidden (node p)" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "graph.json"), "p", "--config", str(tmp_path / "config.toml")]) == 0
    assert capsys.readouterr().out.startswith("it runs\n")


def test_a_table_that_nobody_reads_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[proces]\nallow = ['sh']")
    with pytest.raises(SystemExit) as ended:
        main(["models", "--config", str(file)])
    assert ended.value.code == USAGE_ERROR
    said = f"demandport: {file}: there is no table proces; there are inference, models, process and http\n"
    assert capsys.readouterr().err == said
