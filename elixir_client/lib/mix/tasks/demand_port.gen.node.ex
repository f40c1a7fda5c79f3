defmodule Mix.Tasks.DemandPort.Gen.Node do
  @shortdoc "Writes a Python node with its test"

  @moduledoc """
  Writes a node type in Python, and a test of it, into the project.

      mix demand_port.gen.node word-count

  makes, for an application `my_app`,

      priv/python/my_app_nodes/word_count.py     the node: change it
      priv/python/my_app_nodes/__init__.py       imports every node of the folder
      priv/python/my_app_nodes-0.1.0.dist-info   names the package to the service
      test/python/test_word_count.py             its test
      test/python/conftest.py                    lets the tests find the nodes

  Where the node or its test is there already, it asks before it writes over them; the others are kept. The service finds the nodes when `priv/python` is on its search path:

      {DemandPort, env: [{"PYTHONPATH", Application.app_dir(:my_app, "priv/python")}]}

  and so does a release, since `priv` is part of it. The tests are run by pytest
  (`mix demand_port.install --extras test`):

      _build/demand_port/venv/bin/python -m pytest test/python

  ## Options

  * `--root DIR`: the project's folder; default: this one.
  * `--force`: writes over a node of that name, and its test, without asking.
  """

  use Mix.Task

  import Mix.Generator

  @keywords ~w(and as assert async await break class continue def del elif else except finally for from global if import
               in is lambda nonlocal not or pass raise return try while with yield)

  # A package that declares one of these is left out by the service as a whole.
  @built_in ~w(audio-input audio-output boolean-input component-preview conditional embedding expand-settings
               http-request human-input image-input image-output json-filter kv-cache-load kv-cache-save
               kv-cache-truncate linked-input llamacpp-inference llm-inference map masked-text-input merge model-provider
               number-input ollama-inference process puma-lib rag-search read-file reranker selection-input template
               text-input text-output tool-executor tool-loop unload-model validator vector-input vector-output
               vision-analysis write-file)

  @doc "The node types that the service has by itself; no other node can have their names."
  @spec built_in() :: [String.t()]
  def built_in, do: @built_in

  @impl true
  def run(arguments) do
    case OptionParser.parse!(arguments, strict: [root: :string, force: :boolean]) do
      {options, [name]} -> generate(checked(name), options)
      _ -> Mix.raise("mix demand_port.gen.node takes one name, such as word-count")
    end
  end

  defp checked(name) do
    cond do
      name in @keywords ->
        Mix.raise("#{name} is a word of Python's own: choose another name")

      name in @built_in ->
        Mix.raise("#{name} is a node type that the service has already: choose another name")

      name =~ ~r/\A[a-z][a-z0-9]*([-_][a-z0-9]+)*\z/ ->
        name

      true ->
        Mix.raise("#{inspect(name)} is no name for a node: take small letters, digits and -, a letter first")
    end
  end

  defp generate(name, options) do
    root = options[:root] || "."
    package = "#{Mix.Project.config()[:app] || "my_app"}_nodes"
    names = %{node_type: name, module: String.replace(name, "-", "_"), package: package}

    for {path, text} <- once(names),
        path = Path.join(root, path),
        not File.exists?(path),
        do: create_file(path, text)

    for {path, text} <- each_time(names),
        do: root |> Path.join(path) |> create_file(text, Keyword.take(options, [:force]))

    Mix.shell().info("""

    The service finds the node with priv/python on its search path:

        {DemandPort, env: [{"PYTHONPATH", Application.app_dir(:#{Mix.Project.config()[:app]}, "priv/python")}]}

    and pytest runs its test: _build/demand_port/venv/bin/python -m pytest test/python
    """)
  end

  defp once(%{package: package}) do
    about = "priv/python/#{package}-0.1.0.dist-info"

    [
      {"priv/python/#{package}/__init__.py", init_text()},
      {"#{about}/METADATA",
       "Metadata-Version: 2.1\nName: #{String.replace(package, "_", "-")}\nVersion: 0.1.0\n"},
      {"#{about}/entry_points.txt", "[demandport.nodes]\n#{package} = #{package}\n"},
      {"test/python/conftest.py", conftest_text()}
    ]
  end

  defp each_time(%{package: package, module: module} = names) do
    [
      {"priv/python/#{package}/#{module}.py", node_text(names)},
      {"test/python/test_#{module}.py", test_text(names)}
    ]
  end

  defp init_text do
    ~S'''
    """Node types of this application; importing the package declares each of them."""

    from importlib import import_module
    from pkgutil import iter_modules

    for _module in iter_modules(__path__):
        import_module(f"{__name__}.{_module.name}")
    '''
  end

  defp node_text(names) do
    ~s'''
    """The node type `#{names.node_type}`."""

    from demandport import node


    @node("#{names.node_type}")
    def #{names.module}(text: str, times: int = 1) -> str:
        """Repeats a text."""
        return text * times
    '''
  end

  defp conftest_text do
    ~S'''
    """Lets the tests import the nodes as the service does."""

    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "priv" / "python"))
    '''
  end

  defp test_text(names) do
    ~s'''
    """The node type `#{names.node_type}`: as a function, by its ports, and as a demand runs it."""

    from demandport.testing import run_node
    from #{names.package}.#{names.module} import #{names.module}


    def test_the_function():
        assert #{names.module}("ab", times=2) == "abab"


    def test_its_ports():
        spec = #{names.module}.node_spec
        assert {name: port.type for name, port in spec.inputs.items()} == {"text": "string", "times": "integer"}
        assert spec.inputs["text"].required and spec.inputs["times"].default == 1
        assert {name: port.type for name, port in spec.outputs.items()} == {"output": "string"}


    def test_a_demand():
        assert run_node("#{names.node_type}", {"text": "ab"}, data={"times": 3}).outputs == {"output": "ababab"}
    '''
  end
end
