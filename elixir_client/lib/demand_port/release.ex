defmodule DemandPort.Release do
  @moduledoc """
  What makes a release self-contained.

      # mix.exs
      releases: [my_app: [steps: [:assemble, &DemandPort.Release.pack_venv/1]]]

  The environment that `mix demand_port.install` made and the Python package are copied into the release, as
  `lib/demand_port-VERSION/priv/venv` and `…/priv/python`; the released application finds them by itself. The
  environment's interpreter is a link, as virtual environments are: the machine that runs the release must have the
  same Python at the same path, as two containers of one base image have.

  Another environment is named by `demand_port_venv: "path"` beside `steps:`.
  """

  alias DemandPort.{Launch, Venv}

  @doc """
  Copies the virtual environment and the Python package into an assembled release; a step of `mix release`.

  Raises where there is no environment, or where the copy does not run.
  """
  @spec pack_venv(Mix.Release.t()) :: Mix.Release.t()
  def pack_venv(release) do
    venv = Path.expand(release.options[:demand_port_venv] || Venv.default())

    if not File.exists?(Venv.python(venv)),
      do: raise("there is no virtual environment #{venv}: run mix demand_port.install")

    folder = Path.join([release.path, "lib", "demand_port-#{version(release)}", "priv"])
    copy(venv, Path.join(folder, "venv"))
    copy(Launch.python_folder(), Path.join(folder, "python"))
    try_import(folder)
    release
  end

  defp version(release), do: release.applications |> Map.fetch!(:demand_port) |> Keyword.fetch!(:vsn)

  # Symbolic links are kept as links. The .pth file names a folder of the machine that builds.
  defp copy(source, target) do
    File.rm_rf!(target)
    File.mkdir_p!(Path.dirname(target))
    File.cp_r!(source, target)

    target
    |> Path.join("lib/python*/site-packages/demandport.pth")
    |> Path.wildcard()
    |> Enum.each(&File.rm!/1)
  end

  defp try_import(folder) do
    python = folder |> Path.join("venv") |> Venv.python()
    env = [{"PYTHONPATH", Path.join(folder, "python")}, {"PYTHONHOME", nil}]
    arguments = ["-c", "import demandport.service.main"]

    case System.cmd(python, arguments, env: env, stderr_to_stdout: true) do
      {_, 0} ->
        :ok

      {output, _} ->
        raise "the packed environment does not run the service: mix demand_port.doctor\n#{output}"
    end
  end
end
