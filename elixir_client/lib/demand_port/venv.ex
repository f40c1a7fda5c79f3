defmodule DemandPort.Venv do
  @moduledoc false
  # A virtual environment with the pinned packages that the service needs: which commands make one, and running them.

  alias DemandPort.Launch

  @default "_build/demand_port/venv"
  @stamp "demand_port.installed"
  @extras ~w(llama test)

  # The service's own code is not copied into the environment: a .pth file names the folder where it is.
  @add_folder """
  import pathlib, sys, sysconfig
  pathlib.Path(sysconfig.get_path("purelib"), "demandport.pth").write_text(sys.argv[1] + "\\n")
  """

  @version "import sys; print('%d.%d' % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))"

  defmodule Step do
    @moduledoc false
    # `hint` is what to do when the command fails.
    defstruct [:label, :program, :arguments, :hint]
  end

  @type settings :: %{
          path: Path.t(),
          python: String.t(),
          wheels: Path.t() | nil,
          extras: [String.t()],
          uv: String.t() | nil
        }

  @doc "Where the environment is unless another place is named."
  @spec default() :: Path.t()
  def default, do: Path.expand(@default)

  @doc "The interpreter of an environment."
  @spec python(Path.t()) :: Path.t()
  def python(venv), do: Path.join(venv, "bin/python")

  @doc "The extras in a text with commas; raises for one that there is not."
  @spec extras!(String.t()) :: [String.t()]
  def extras!(text) do
    extras = String.split(text, ",", trim: true)
    unknown = Enum.join(extras -- @extras, ", ")

    if unknown == "",
      do: extras,
      else:
        raise(OptionParser.ParseError, "--extras: there is no #{unknown}, but #{Enum.join(@extras, ", ")}")
  end

  @doc "The file that pins what an extra needs; nil stands for the service itself."
  @spec requirements(String.t() | nil) :: Path.t()
  def requirements(nil), do: Path.join(Launch.python_folder() || "python", "requirements.txt")
  def requirements(extra), do: Path.join(Launch.python_folder() || "python", "requirements-#{extra}.txt")

  @doc "The pins of a file: `{name, version}`."
  @spec pins(Path.t()) :: [{String.t(), String.t()}]
  def pins(file) do
    for line <- file |> File.read!() |> String.split("\n"),
        [name, version] <- [String.split(line, "==")],
        do: {name, version}
  end

  @doc "Whether the environment holds what is asked for, and its interpreter is still there."
  @spec installed?(settings) :: boolean
  def installed?(settings) do
    File.exists?(python(settings.path)) and wanted(settings) -- stamped(settings.path) == []
  end

  @doc "What is wrong with the settings, before anything is done."
  @spec check(settings) :: :ok | {:error, String.t()}
  def check(settings) do
    with :ok <- check_wheels(settings.wheels),
         :ok <- check_folder(settings.path),
         do: check_python(settings.python)
  end

  defp check_wheels(nil), do: :ok

  defp check_wheels(folder),
    do: if(File.dir?(folder), do: :ok, else: {:error, "--wheels: there is no folder #{folder}"})

  # What is no environment is not ours to fill.
  defp check_folder(path) do
    if not File.exists?(path) or File.exists?(Path.join(path, "pyvenv.cfg")) or File.ls(path) == {:ok, []} do
      :ok
    else
      {:error, "#{path} is there and is no virtual environment; name another place by --path"}
    end
  end

  defp check_python(python) do
    case System.find_executable(python) do
      nil ->
        {:error,
         "there is no executable #{inspect(python)}; install Python 3.11 or later, or name one by --python"}

      path ->
        check_version(path, System.cmd(path, ["-c", @version], stderr_to_stdout: true))
    end
  end

  defp check_version(_path, {_output, 0}), do: :ok

  defp check_version(path, {output, _status}) do
    {:error,
     "Python 3.11 or later is needed, and #{path} is #{String.trim(output)}; name another by --python"}
  end

  @doc "The commands that make the environment, in order."
  @spec steps(settings) :: [%Step{}]
  def steps(settings) do
    make = if settings.uv, do: make_by_uv(settings), else: make_by_venv(settings)
    install = if settings.uv, do: install_by_uv(settings), else: install_by_pip(settings)
    new? = not File.exists?(python(settings.path))
    if(new?, do: [make], else: []) ++ [install, add_folder(settings)]
  end

  defp make_by_uv(settings) do
    arguments = ["venv", "--quiet", "--allow-existing", "--python", settings.python, settings.path]

    %Step{
      label: "making #{settings.path}",
      program: settings.uv,
      arguments: arguments,
      hint: "see what uv says above"
    }
  end

  defp make_by_venv(settings) do
    %Step{
      label: "making #{settings.path}",
      program: settings.python,
      arguments: ["-m", "venv", settings.path],
      hint: "the module venv may be missing (Debian: apt-get install python3-venv); with uv it is not needed"
    }
  end

  defp install_by_uv(settings) do
    arguments = ["pip", "install", "--python", python(settings.path)] ++ sources(settings) ++ files(settings)
    %{install(settings) | program: settings.uv, arguments: arguments}
  end

  defp install_by_pip(settings) do
    quietly = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    arguments = ["-m", "pip", "install"] ++ quietly ++ sources(settings) ++ files(settings)
    %{install(settings) | program: python(settings.path), arguments: arguments}
  end

  defp install(settings) do
    slow =
      if "llama" in settings.extras, do: " (llama.cpp is compiled where there is no wheel of it: minutes)"

    %Step{label: "installing packages#{slow}", hint: install_hint(settings.wheels)}
  end

  defp install_hint(nil) do
    "without network, give a folder of wheels by --wheels; where something is compiled, a C++ compiler is needed"
  end

  defp install_hint(folder) do
    "#{folder} must hold wheels for this Python and machine; they are made by: pip wheel -r " <>
      "#{requirements(nil)} -w #{folder}"
  end

  defp sources(%{wheels: nil}), do: []
  defp sources(%{wheels: folder}), do: ["--no-index", "--find-links", folder]

  defp files(settings), do: Enum.flat_map([nil | settings.extras], &["-r", requirements(&1)])

  defp add_folder(settings) do
    %Step{
      label: "adding #{Launch.python_folder()}",
      program: python(settings.path),
      arguments: ["-c", @add_folder, Launch.python_folder()],
      hint: "#{settings.path} must be writable"
    }
  end

  @doc "Runs the commands; `report` is called with each one's label first. What they print goes to the terminal."
  @spec install([%Step{}], settings, (String.t() -> any)) :: :ok | {:error, String.t()}
  def install(steps, settings, report) do
    with :ok <- Enum.reduce_while(steps, :ok, &run(&1, &2, report)), do: stamp(settings)
  end

  # Another environment's packages must not be taken for this one's.
  @environment [{"PYTHONPATH", nil}, {"PYTHONHOME", nil}, {"VIRTUAL_ENV", nil}]

  defp run(step, :ok, report) do
    report.(step.label)
    terminal = IO.stream(:stdio, :line)

    case System.cmd(step.program, step.arguments, into: terminal, stderr_to_stdout: true, env: @environment) do
      {_, 0} -> {:cont, :ok}
      {_, status} -> {:halt, {:error, "#{step.program} ended with status #{status}: #{step.hint}"}}
    end
  end

  defp stamp(settings) do
    kept = for line <- stamped(settings.path), line in possible(), do: line
    lines = Enum.uniq(wanted(settings) ++ kept)
    settings.path |> Path.join(@stamp) |> File.write!(Enum.join(lines, "\n"))
  end

  defp stamped(path) do
    case File.read(Path.join(path, @stamp)) do
      {:ok, text} -> String.split(text, "\n")
      {:error, _} -> []
    end
  end

  defp possible, do: Enum.map([nil | @extras], &fingerprint/1)
  defp wanted(settings), do: Enum.map([nil | settings.extras], &fingerprint/1) ++ [Launch.python_folder()]

  defp fingerprint(extra) do
    digest = requirements(extra) |> File.read!() |> :erlang.md5()
    "#{Path.basename(requirements(extra))} #{Base.encode16(digest, case: :lower)}"
  end
end
