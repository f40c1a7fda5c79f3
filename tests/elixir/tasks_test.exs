defmodule DemandPort.TasksTest do
  # The Mix tasks, on real interpreters and environments; nothing is fetched. Not async: they talk to the one Mix shell.
  use ExUnit.Case, async: false

  alias DemandPort.{Doctor, Launch, Venv}
  alias Mix.Tasks.DemandPort, as: Tasks

  @moduletag timeout: 180_000
  @root Path.expand("../..", __DIR__)
  @version Mix.Project.config()[:version]

  setup do
    shell = Mix.shell()
    Mix.shell(Mix.Shell.Process)
    folder = Path.join(System.tmp_dir!(), "demand_port_tasks_#{System.unique_integer([:positive])}")
    File.mkdir_p!(folder)

    on_exit(fn ->
      Mix.shell(shell)
      File.rm_rf!(folder)
    end)

    %{folder: folder}
  end

  # Everything that was said since the last time.
  defp said(lines \\ []) do
    receive do
      {:mix_shell, _, [line]} -> said([line | lines])
    after
      0 -> lines |> Enum.reverse() |> Enum.join("\n")
    end
  end

  defp python, do: System.find_executable(Launch.python([]))

  defp script(folder, name, text) do
    path = Path.join(folder, name)
    File.mkdir_p!(Path.dirname(path))
    File.write!(path, "#!/bin/sh\n" <> text)
    File.chmod!(path, 0o755)
    path
  end

  # An environment without packages, not even pip: quick to make.
  defp bare_venv(folder) do
    path = Path.join(folder, "bare")
    {_, 0} = System.cmd(python(), ["-m", "venv", "--without-pip", path])
    path
  end

  # One that borrows the packages of the interpreter that the tests run with.
  defp borrowing_venv(folder) do
    venv = bare_venv(folder)
    where = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"]
    {theirs, 0} = System.cmd(python(), where)
    {ours, 0} = System.cmd(Venv.python(venv), where)
    File.write!(Path.join(ours, "borrowed.pth"), theirs)
    venv
  end

  defp package(folder, init) do
    File.mkdir_p!(Path.join(folder, "demandport"))
    File.write!(Path.join(folder, "demandport/__init__.py"), init)
    folder
  end

  defp with_env(name, value) do
    before = System.get_env(name)
    System.put_env(name, value)
    on_exit(fn -> if before, do: System.put_env(name, before), else: System.delete_env(name) end)
  end

  describe "doctor" do
    @describetag :service

    test "finds nothing wrong where the service runs" do
      Tasks.Doctor.run([])
      said = said()
      assert said =~ "ok     the service starts and answers"
      assert said =~ ~r/ok     \d+ node types/
      refute said =~ "wrong"
    end

    test "says what is wrong with the command that mends it, and ends with status 1", %{folder: folder} do
      python = folder |> bare_venv() |> Venv.python()
      assert catch_exit(Tasks.Doctor.run(["--python", python, "--extras", "test"])) == {:shutdown, 1}
      said = said()
      assert said =~ ~r/wrong  packages are missing: .*msgpack.*pytest/
      assert said =~ "\n       mix demand_port.install --path #{folder}/bare --extras test\n"
      refute said =~ "the service"
    end

    test "wants a Python that is there, is executable and is new enough", %{folder: folder} do
      old = script(folder, "old", "echo 3.9.2; exit 1\n")
      locked = script(folder, "locked", "")
      File.chmod!(locked, 0o644)
      link = Path.join(folder, "link")
      File.ln_s!(Path.join(folder, "gone"), link)

      assert [{:wrong, "there is no Python " <> _, "name another in the option :python" <> _}] =
               Doctor.findings(python: Path.join(folder, "none"))

      assert [{:wrong, what, "chmod +x " <> ^locked}] = Doctor.findings(python: locked)
      assert what =~ "is not executable"
      assert [{:wrong, what, "mix demand_port.install"}] = Doctor.findings(python: link)
      assert what =~ "leads nowhere"
      assert [{:ok, _, _}, {:wrong, what, _}] = Doctor.findings(python: old)
      assert what == "Python 3.11 or later is needed, and this is 3.9.2"
    end

    test "looks at the version of the package that is found", %{folder: folder} do
      package(folder, "__version__ = '0.0.0'\n")
      assert {:wrong, what, _} = folder |> wrong() |> List.last()
      assert what =~ "demandport 0.0.0 in #{folder}/demandport is not of this version"
      package(folder, "raise ImportError('torn')\n")
      assert {:wrong, what, _} = folder |> wrong() |> List.last()
      assert what =~ "cannot be imported: ImportError: torn"
    end

    test "tries the service itself", %{folder: folder} do
      package(folder, "__version__ = '#{@version}'\n")
      File.write!(Path.join(folder, "demandport/__main__.py"), "raise SystemExit(3)\n")
      assert [{:wrong, "the service does not answer: backend_unavailable" <> _, _}] = wrong(folder)
    end

    test "tells a model library that is broken from one that is not there", %{folder: folder} do
      File.write!(Path.join(folder, "llama_cpp.py"), "raise OSError('no libllama.so')\n")
      findings = Doctor.findings(env: [{"PYTHONPATH", folder}])
      assert [{:wrong, what, remedy}] = Enum.filter(findings, &match?({:wrong, _, _}, &1))
      assert what =~ "cannot be imported: OSError: no libllama.so"
      assert remedy =~ "-m pip install --force-reinstall"
    end

    test "names the nodes that cannot be loaded, and says where it looked", %{folder: folder} do
      Tasks.Gen.Node.run(["word-count", "--root", folder])
      said()
      nodes = Path.join(folder, "priv/python")

      File.cd!(folder, fn -> assert Tasks.Doctor.run([]) in [nil, :ok] end)
      said = said()
      assert said =~ "ok     nodes are looked for in #{nodes}"
      assert said =~ "ok     nodes of demand-port-nodes: demand_port_nodes in #{nodes}"

      File.write!(Path.join(nodes, "demand_port_nodes/torn.py"), "from demandport import nod\n")
      File.cd!(folder, fn -> assert catch_exit(Tasks.Doctor.run([])) == {:shutdown, 1} end)
      said = said()

      assert said =~
               "wrong  the nodes of demand-port-nodes cannot be loaded: demand_port_nodes in #{nodes}: ImportError"

      refute said =~ "the service starts"

      File.write!(Path.join(nodes, "demand_port_nodes/torn.py"), """
      from demandport import node
      @node("template")
      def torn(text: str) -> str: return text
      """)

      findings = Doctor.findings(env: [{"PYTHONPATH", nodes}])
      assert [{:wrong, what, remedy}] = Enum.filter(findings, &match?({:wrong, _, _}, &1))
      assert what =~ "template" and remedy =~ "import demand_port_nodes"
    end

    test "looks at the folders that the environment names", %{folder: folder} do
      with_env("DEMANDPORT_CACHE_DIRECTORY", Path.join(folder, "none"))
      with_env("DEMANDPORT_MODEL_DIRECTORIES", "#{folder}:#{__ENV__.file}")
      findings = Doctor.findings([])
      wrong = for {:wrong, what, _} <- findings, do: what
      assert [cache, models] = wrong
      assert cache =~ "DEMANDPORT_CACHE_DIRECTORY" and cache =~ "no such file"
      assert models =~ "DEMANDPORT_MODEL_DIRECTORIES" and models =~ "is no folder"
      assert {:ok, "DEMANDPORT_MODEL_DIRECTORIES: #{folder}", nil} in findings
    end

    defp wrong(folder) do
      for {:wrong, _, _} = finding <- Doctor.findings(python_path: folder, start_timeout_ms: 10_000),
          do: finding
    end
  end

  describe "install" do
    @describetag :service

    test "says what it would run", %{folder: folder} do
      venv = Path.join(folder, "venv")

      Tasks.Install.run(["--dry-run", "--no-uv", "--path", venv, "--extras", "llama,test", "--wheels", folder])

      [make, install, _] =
        said() |> String.split("\n") |> Enum.filter(&(&1 =~ ~r/^\S*python/)) |> Enum.take(3)

      assert make == "python3 -m venv #{venv}"
      assert install =~ "#{venv}/bin/python -m pip install"
      assert install =~ "--no-index --find-links #{folder}"
      for extra <- [nil, "llama", "test"], do: assert(install =~ "-r #{Venv.requirements(extra)}")
      refute File.exists?(venv)
    end

    test "installs from a folder of wheels, and does nothing the second time", %{folder: folder} do
      wheels = Path.join(folder, "wheels")
      for {name, version} <- Venv.pins(Venv.requirements(nil)), do: wheel(wheels, name, version)
      venv = Path.join(folder, "venv")
      arguments = ["--no-uv", "--python", python(), "--path", venv, "--wheels", wheels]
      output = ExUnit.CaptureIO.capture_io(fn -> Tasks.Install.run(arguments) end)
      assert output =~ "Successfully installed"
      assert said() =~ "#{venv} is ready, by DEMAND_PORT_PYTHON=#{venv}/bin/python"
      # The package itself is found without PYTHONPATH.
      code =
        "import demandport; from importlib.metadata import version as v; print(demandport.__version__, v('msgpack'))"

      {there, 0} = System.cmd(Venv.python(venv), ["-c", code], env: [{"PYTHONPATH", nil}])

      assert there ==
               "#{@version} #{nil |> Venv.requirements() |> Venv.pins() |> Map.new() |> Map.get("msgpack")}\n"

      assert ExUnit.CaptureIO.capture_io(fn -> Tasks.Install.run(arguments) end) == ""
      assert said() == "#{venv} is up to date"

      ExUnit.CaptureIO.capture_io(fn ->
        error = assert_raise Mix.Error, fn -> Tasks.Install.run(arguments ++ ["--extras", "test"]) end
        assert error.message =~ "ended with status 1: #{wheels} must hold wheels"
      end)

      said()
      ExUnit.CaptureIO.capture_io(fn -> Tasks.Install.run(arguments) end)
      assert said() == "#{venv} is up to date"
    end

    test "goes by uv where there is one", %{folder: folder} do
      venv = Path.join(folder, "venv")
      log = Path.join(folder, "log")

      uv =
        script(folder, "bin/uv", """
        echo "$@" >> #{log}
        [ "$1" != venv ] || exec #{python()} -m venv --without-pip #{venv}
        """)

      with_env("PATH", "#{Path.dirname(uv)}:#{System.get_env("PATH")}")
      Tasks.Install.run(["--path", venv, "--python", python()])
      assert [made, installed] = log |> File.read!() |> String.split("\n", trim: true)
      assert made =~ ~r/^venv .*--python #{python()} #{venv}$/
      assert installed == "pip install --python #{venv}/bin/python -r #{Venv.requirements(nil)}"
      for extras <- ["llama", "test"], do: Tasks.Install.run(["--path", venv, "--extras", extras])
      said()
      Tasks.Install.run(["--path", venv, "--extras", "llama,test"])
      assert said() == "#{venv} is up to date"
    end

    test "refuses before it does anything", %{folder: folder} do
      venv = Path.join(folder, "venv")
      File.write!(Path.join(folder, "precious"), "")
      old = script(folder, "old", "echo 3.9; exit 1\n")

      refused = [
        {["--python", Path.join(folder, "none")], "there is no executable"},
        {["--python", old], "Python 3.11 or later is needed"},
        {["--wheels", Path.join(folder, "none")], "--wheels: there is no folder"},
        {["--path", folder], "is there and is no virtual environment"},
        {["surplus"], "takes options only"}
      ]

      for {arguments, message} <- refused do
        error = assert_raise Mix.Error, fn -> Tasks.Install.run(["--no-uv", "--path", venv | arguments]) end
        assert error.message =~ message
      end

      assert_raise OptionParser.ParseError, ~r/there is no gpu, but llama, test/, fn ->
        Tasks.Install.run(["--extras", "gpu"])
      end

      assert File.ls!(folder) |> Enum.sort() == ["old", "precious"]
    end

    # The least that pip takes for a package.
    defp wheel(folder, name, version) do
      File.mkdir_p!(folder)
      file = String.replace(name, "-", "_")
      about = "#{file}-#{version}.dist-info"

      entries = [
        {"#{about}/METADATA", "Metadata-Version: 2.1\nName: #{name}\nVersion: #{version}\n"},
        {"#{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
        {"#{about}/RECORD", "#{about}/METADATA,,\n#{about}/WHEEL,,\n#{about}/RECORD,,\n"}
      ]

      path = Path.join(folder, "#{file}-#{version}-py3-none-any.whl")
      {:ok, _} = :zip.create(to_charlist(path), for({name, text} <- entries, do: {to_charlist(name), text}))
    end
  end

  describe "gen.node" do
    @describetag :service

    test "writes a node whose test passes", %{folder: folder} do
      Tasks.Gen.Node.run(["word-count", "--root", folder])
      Tasks.Gen.Node.run(["second", "--root", folder])
      assert said() =~ ~s{Application.app_dir(:demand_port, "priv/python")}
      env = for {name, value} <- Launch.env([]), do: {to_string(name), value && to_string(value)}
      arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test/python"]
      {output, status} = System.cmd(python(), arguments, cd: folder, env: env, stderr_to_stdout: true)
      assert status == 0, output
      assert output =~ "6 passed"
    end

    test "writes nodes that a service runs", %{folder: folder} do
      Tasks.Gen.Node.run(["word-count", "--root", folder])
      port = DemandPort.Test.Services.real(env: [{"PYTHONPATH", Path.join(folder, "priv/python")}])
      graph = DemandPort.Graph.node(DemandPort.Graph.new(), "it", "word-count", text: "ab", times: 2)
      {:ok, session} = DemandPort.open(port, DemandPort.Graph.to_map(graph))
      assert DemandPort.demand(session, "it") == {:ok, %{"output" => "abab"}}
    end

    test "refuses the names that the service has already", %{folder: folder} do
      {:ok, types} = DemandPort.node_types(DemandPort.Test.Services.real())
      names = Enum.map(types, & &1["node_type"])
      assert Enum.sort(names) == Enum.sort(Tasks.Gen.Node.built_in())

      assert_raise Mix.Error, ~r/template is a node type that the service has already/, fn ->
        Tasks.Gen.Node.run(["template", "--root", folder])
      end

      assert File.ls!(folder) == []
    end

    test "keeps what is there, and refuses names that are none", %{folder: folder} do
      Tasks.Gen.Node.run(["one", "--root", folder])
      node = Path.join(folder, "priv/python/demand_port_nodes/one.py")
      init = Path.join(folder, "priv/python/demand_port_nodes/__init__.py")
      File.write!(node, "mine")
      File.write!(init, "mine too")
      send(self(), {:mix_shell_input, :yes?, false})
      send(self(), {:mix_shell_input, :yes?, false})
      Tasks.Gen.Node.run(["one", "--root", folder])
      assert File.read!(node) == "mine" and File.read!(init) == "mine too"
      Tasks.Gen.Node.run(["one", "--root", folder, "--force"])
      assert File.read!(node) =~ ~s{@node("one")} and File.read!(init) == "mine too"

      for name <- ["", "Upper", "1st", "a--b", "a/b", "class", "ä"] do
        assert_raise Mix.Error, fn -> Tasks.Gen.Node.run([name, "--root", folder]) end
      end

      assert_raise Mix.Error, fn -> Tasks.Gen.Node.run([]) end
    end
  end

  describe "where Python is looked for" do
    test "the option, the configuration, the environment: each before the next" do
      with_env("DEMAND_PORT_PYTHON", "env-python")
      assert Launch.python_and_origin([]) == {"env-python", "the variable DEMAND_PORT_PYTHON"}
      Application.put_env(:demand_port, :python, "config-python")
      on_exit(fn -> Application.delete_env(:demand_port, :python) end)
      assert Launch.python([]) == "config-python"
      assert Launch.python(python: "option-python") == "option-python"
    end
  end

  describe "a package and a release of it" do
    @describetag :service

    test "hold all that runs the service, wherever they are put", %{folder: folder} do
      copied = package_files(Path.join(folder, "demand_port"))
      venv = borrowing_venv(folder)
      project = Path.join(folder, "probe")
      File.mkdir_p!(project)
      File.write!(Path.join(project, "mix.exs"), probe(copied, venv))
      {output, status} = mix(["release", "--quiet"], project)
      assert status == 0, output

      built = Path.join(project, "_build/prod/rel/probe")
      moved = Path.join(folder, "moved")
      File.rename!(built, moved)
      for gone <- [copied, venv, project], do: File.rm_rf!(gone)

      asked = """
      {:ok, port} = DemandPort.start_link([])
      IO.inspect({DemandPort.ping(port), DemandPort.Launch.python_and_origin([]), DemandPort.Launch.python_folder()})
      """

      env = [{"DEMAND_PORT_PYTHON", nil}, {"PYTHONPATH", nil}]
      {output, status} = System.cmd(Path.join(moved, "bin/probe"), ["eval", asked], cd: "/", env: env)
      assert status == 0, output
      priv = Path.join(moved, "lib/demand_port-#{@version}/priv")
      {{:pong, {python, "the release"}, source}, _} = Code.eval_string(output)
      assert {python, source} == {Path.join(priv, "venv/bin/python"), Path.join(priv, "python")}
    end

    test "the step says what is missing", %{folder: folder} do
      release = %{options: [demand_port_venv: folder], path: folder, applications: %{demand_port: [vsn: '1']}}
      error = assert_raise RuntimeError, fn -> DemandPort.Release.pack_venv(release) end
      assert error.message == "there is no virtual environment #{folder}: run mix demand_port.install"
      empty = %{release | options: [demand_port_venv: bare_venv(folder)]}
      error = assert_raise RuntimeError, fn -> DemandPort.Release.pack_venv(empty) end
      assert error.message =~ "mix demand_port.doctor" and error.message =~ "ModuleNotFoundError"
    end

    defp package_files(target) do
      for file <- Mix.Project.config()[:package][:files] do
        to = Path.join(target, file)
        File.mkdir_p!(Path.dirname(to))
        File.cp_r!(Path.join(@root, file), to)
      end

      target
    end

    defp probe(demand_port, venv) do
      """
      defmodule Probe.MixProject do
        use Mix.Project

        def project do
          step = &DemandPort.Release.pack_venv/1

          [
            app: :probe,
            version: "0.1.0",
            deps: [{:demand_port, path: #{inspect(demand_port)}}],
            releases: [probe: [include_erts: false, demand_port_venv: #{inspect(venv)}, steps: [:assemble, step]]]
          ]
        end
      end
      """
    end

    defp mix(arguments, project) do
      env = [{"MIX_ENV", "prod"}, {"MIX_BUILD_PATH", nil}]
      System.cmd("mix", arguments, cd: project, env: env, stderr_to_stdout: true)
    end
  end
end
