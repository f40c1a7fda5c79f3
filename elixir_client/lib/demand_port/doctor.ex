defmodule DemandPort.Doctor do
  @moduledoc false
  # What a service needs, looked at one thing after another; each finding says what mends it.

  alias DemandPort.{Launch, Venv}

  @typedoc "`:wrong` keeps the service, or what was asked for, from running; a `:note` does not."
  @type status :: :ok | :note | :wrong
  @type finding :: {status, what :: String.t(), remedy :: String.t() | nil}

  @version "import sys; print('%d.%d.%d' % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))"

  @packages """
  import sys
  from importlib.metadata import PackageNotFoundError, version
  for name in sys.argv[1:]:
      try:
          print(name, version(name))
      except PackageNotFoundError:
          print(name, "-")
  """

  @module """
  import importlib, sys
  module = importlib.import_module(sys.argv[1])
  print(module.__version__, module.__file__)
  """

  # What a probe ends with where the module itself, and not one that it imports, is missing.
  @absent 44
  @present """
  import importlib.util, sys
  sys.exit(0 if importlib.util.find_spec(sys.argv[1]) else #{@absent})
  """

  # As the service loads them: the built-in ones first, with which no other may share a name.
  @nodes """
  from importlib import import_module
  from importlib.metadata import distributions
  from demandport.nodes import BUILT_IN
  for module in BUILT_IN:
      import_module(module)
  for package in distributions():
      for entry in package.entry_points.select(group="demandport.nodes"):
          try:
              entry.load()
              said = "loaded"
          except BaseException as wrong:
              said = " ".join(f"{type(wrong).__name__}: {wrong}".split())
          print("\\nnodes", package.name, entry.value, package.locate_file(""), said, sep="\\t")
  """

  @doc """
  Every finding, in order. What follows from one that is wrong is not looked at.

  The options are those of `DemandPort.start_link/1`, and `extras`, what else is wanted.
  """
  @spec findings(keyword) :: [finding]
  def findings(options) do
    found = Enum.reduce_while([&interpreter/1, &version/1], [], &until_wrong(&1, &2, options))
    found = if wrong?(found), do: found, else: found ++ installed(options)
    if wrong?(found), do: found, else: found ++ service(options)
  end

  @doc "Whether any of the findings is wrong."
  @spec wrong?([finding]) :: boolean
  def wrong?(findings), do: Enum.any?(findings, &(elem(&1, 0) == :wrong))

  defp until_wrong(check, found, options) do
    found = found ++ check.(options)
    if wrong?(found), do: {:halt, found}, else: {:cont, found}
  end

  defp installed(options) do
    packages(options) ++ source(options) ++ nodes(options) ++ models(options) ++ folders()
  end

  ## The interpreter

  defp interpreter(options) do
    {python, origin} = Launch.python_and_origin(options)
    path = System.find_executable(python)

    cond do
      path -> [ok("Python: #{path} (from #{origin})")]
      File.exists?(python) -> [wrong("#{python} (from #{origin}) is not executable", "chmod +x #{python}")]
      dangling?(python) -> [wrong("#{python} (from #{origin}) leads nowhere", "mix demand_port.install")]
      true -> [wrong("there is no Python #{inspect(python)} (from #{origin})", without_python(origin))]
    end
  end

  defp dangling?(path), do: match?({:ok, _}, File.lstat(path))

  defp without_python("the search path"),
    do: "apt-get install python3 python3-venv (or your system's like of it)"

  defp without_python(origin),
    do: "name another in #{origin}, or leave it out and run mix demand_port.install"

  defp version(options) do
    case probe(options, @version, []) do
      {version, 0} ->
        [ok("version #{version}")]

      {said, _} ->
        [wrong("Python 3.11 or later is needed, and this is #{said}", "mix demand_port.install --python EXE")]
    end
  end

  ## What is installed

  defp packages(options) do
    wanted = Enum.flat_map([nil | options[:extras] || []], &Venv.pins(Venv.requirements(&1)))
    {output, 0} = probe(options, @packages, Enum.map(wanted, &elem(&1, 0)))

    there =
      for line <- String.split(output, "\n"),
          [name, version] <- [String.split(line)],
          into: %{},
          do: {name, version}

    missing = for {name, _} <- wanted, there[name] == "-", do: name

    other =
      for {name, pin} <- wanted, there[name] not in ["-", pin], do: "#{name} #{there[name]} (tested: #{pin})"

    cond do
      missing != [] ->
        [wrong("packages are missing: #{Enum.join(missing, ", ")}", install(options))]

      other != [] ->
        [note("packages in other versions than were tested: #{Enum.join(other, ", ")}", install(options))]

      true ->
        [ok("#{length(wanted)} packages in the versions that were tested")]
    end
  end

  # Into the environment that is ours to make, or the one that somebody named.
  defp install(options, more \\ []) do
    {python, origin} = Launch.python_and_origin(options)
    extras = Enum.uniq((options[:extras] || []) ++ more)
    venv = python |> Path.dirname() |> Path.dirname()

    cond do
      origin == "mix demand_port.install" or python == "python3" -> task([], extras)
      File.exists?(Path.join(venv, "pyvenv.cfg")) -> task(["--path", venv], extras)
      true -> Enum.join(["#{python} -m pip install" | pip_files(extras)], " ")
    end
  end

  defp task(place, []), do: Enum.join(["mix demand_port.install" | place], " ")
  defp task(place, extras), do: task(place ++ ["--extras", Enum.join(extras, ",")], [])

  defp pip_files(extras), do: Enum.map([nil | extras], &"-r #{Venv.requirements(&1)}")

  defp source(options) do
    own = to_string(Application.spec(:demand_port, :vsn))

    case probe(options, @module, ["demandport"]) do
      {said, 0} ->
        [version, file] = String.split(said, " ", parts: 2)

        if version == own,
          do: [ok("demandport #{version} in #{Path.dirname(file)}")],
          else: [other_version(version, own, file)]

      {said, _} ->
        [
          wrong(
            "the package demandport cannot be imported: #{last_line(said)}",
            "set python_path: to its folder"
          )
        ]
    end
  end

  defp other_version(version, own, file) do
    remedy = "take PYTHONPATH and python_path: away, or set them to the python/ of this version"
    wrong("demandport #{version} in #{Path.dirname(file)} is not of this version, #{own}", remedy)
  end

  ## Nodes of one's own

  defp nodes(options) do
    case probe(options, @nodes, []) do
      {said, 0} ->
        [looked(options) | for("nodes\t" <> line <- String.split(said, "\n"), do: loaded(line, options))]

      # Of which something else is to be said: the package itself is not there.
      _ ->
        []
    end
  end

  defp looked(options) do
    {'PYTHONPATH', path} = options |> Launch.env() |> List.keyfind('PYTHONPATH', 0, {'PYTHONPATH', ''})
    own = Launch.package_folder(options)

    case String.split("#{path}", ":", trim: true) -- [own && Path.expand(own)] do
      [] -> ok("nodes are looked for among the installed packages; PYTHONPATH and priv/python name no others")
      folders -> ok("nodes are looked for in #{Enum.join(folders, ", ")}, and among the installed packages")
    end
  end

  defp loaded(line, options) do
    case String.split(line, "\t") do
      [package, module, folder, "loaded"] ->
        ok("nodes of #{package}: #{module} in #{folder}")

      [package, module, folder, said] ->
        remedy =
          "mend it; the whole traceback: PYTHONPATH=#{folder} #{Launch.python(options)} -c 'import #{module}'"

        wrong("the nodes of #{package} cannot be loaded: #{module} in #{folder}: #{said}", remedy)
    end
  end

  defp models(options) do
    wanted? = "llama" in (options[:extras] || [])

    case {probe(options, @present, ["llama_cpp"]), wanted?} do
      {{_, @absent}, true} ->
        []

      {{_, @absent}, false} ->
        [note("no llama-cpp-python: models cannot run here", install(options, ["llama"]))]

      _ ->
        [imported(probe(options, @module, ["llama_cpp"]), options)]
    end
  end

  defp imported({said, 0}, _options), do: ok("llama-cpp-python #{said |> String.split() |> hd()}")

  defp imported({said, _}, options) do
    remedy =
      "#{elem(Launch.python_and_origin(options), 0)} -m pip install --force-reinstall --no-cache-dir llama-cpp-python"

    wrong("llama-cpp-python is there and cannot be imported: #{last_line(said)}", remedy)
  end

  ## Folders

  defp folders do
    temporary = System.tmp_dir() || "/tmp"
    cache = System.get_env("DEMANDPORT_CACHE_DIRECTORY", "")
    models = System.get_env("DEMANDPORT_MODEL_DIRECTORIES", "") |> String.split(":", trim: true)

    folder(
      temporary,
      "the folder for temporary files",
      [:read_write],
      "set TMPDIR to a folder that can be written"
    ) ++
      if(cache == "",
        do: [],
        else: folder(cache, "DEMANDPORT_CACHE_DIRECTORY", [:read_write], "mkdir -p #{cache}")
      ) ++
      Enum.flat_map(
        models,
        &folder(&1, "DEMANDPORT_MODEL_DIRECTORIES", [:read, :read_write], "mkdir -p #{&1}")
      )
  end

  defp folder(path, name, wanted, remedy) do
    case File.stat(path) do
      {:ok, %{type: :directory, access: access}} ->
        if access in wanted,
          do: [ok("#{name}: #{path}")],
          else: [wrong("#{name}: #{path} is not ours to use", "chmod u+rwx #{path}")]

      {:ok, _} ->
        [wrong("#{name}: #{path} is no folder", remedy)]

      {:error, reason} ->
        [wrong("#{name}: #{path}: #{:file.format_error(reason)}", remedy)]
    end
  end

  ## The service

  defp service(options) do
    trapping? = Process.flag(:trap_exit, true)

    try do
      {:ok, port} = DemandPort.start_link([log_level: :error] ++ Keyword.delete(options, :extras))
      tried = try_service(port)
      stop(port)
      tried
    after
      Process.flag(:trap_exit, trapping?)
    end
  end

  # It may have ended by itself.
  defp stop(port) do
    GenServer.stop(port)
  catch
    :exit, _ -> :ok
  end

  defp try_service(port) do
    with {:ok, %{"os_pid" => os_pid}} <- DemandPort.health(port),
         {:ok, types} <- DemandPort.node_types(port),
         {:ok, session} <- DemandPort.open(port, %{nodes: [%{id: "text-input-1", data: %{text: "hello"}}]}),
         {:ok, %{"text" => "hello"}} <- DemandPort.demand(session, "text-input-1") do
      [ok("the service starts and answers (process #{os_pid})"), descriptors(types)]
    else
      {:error, error} -> [wrong("the service does not answer: #{Exception.message(error)}", trying())]
      other -> [wrong("the service answers wrongly: #{inspect(other, limit: 5)}", trying())]
    end
  end

  defp trying, do: "see what it wrote to stderr; then mix demand_port.install"

  defp descriptors(types) do
    case Enum.reject(types, &descriptor?/1) do
      [] ->
        ok("#{length(types)} node types")

      odd ->
        wrong("these node types describe no ports: #{inspect(odd, limit: 5)}", "mend their @node declaration")
    end
  end

  defp descriptor?(%{"node_type" => name, "inputs" => inputs, "outputs" => outputs}) do
    is_binary(name) and Enum.all?(inputs ++ outputs, &match?(%{"name" => _, "type" => _}, &1))
  end

  defp descriptor?(_other), do: false

  ## Inside

  defp ok(what), do: {:ok, what, nil}
  defp note(what, remedy), do: {:note, what, remedy}
  defp wrong(what, remedy), do: {:wrong, what, remedy}

  # As the service would be started: the same interpreter, the same search path.
  defp probe(options, script, arguments) do
    python = options |> Launch.python() |> System.find_executable()
    env = for {name, value} <- Launch.env(options), do: {to_string(name), value && to_string(value)}
    {output, status} = System.cmd(python, ["-c", script | arguments], env: env, stderr_to_stdout: true)
    {String.trim(output), status}
  end

  defp last_line(text), do: text |> String.split("\n") |> List.last()
end
