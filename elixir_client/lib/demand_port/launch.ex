defmodule DemandPort.Launch do
  @moduledoc false
  # Which Python runs the service, with which environment, and how its port is opened.

  alias DemandPort.Error

  # `python/` beside mix.exs, where this library was compiled; a release may not have it.
  @repository_python Path.expand("../../../python", __DIR__)

  # A write over the high mark suspends the connection until the service has read; two of the largest messages fit.
  @busy_messages 2

  @doc "Opens the port of a service, owned by the calling process."
  @spec open(keyword) :: {:ok, port} | {:error, Error.t()}
  def open(options) do
    with {:ok, python} <- executable(options), :ok <- folder(options[:cd]) do
      {:ok, Port.open({:spawn_executable, python}, port_options(options))}
    end
  rescue
    # Port.open raises what the operating system said: :enoent, :eacces, :emfile …
    failed in ErlangError -> unavailable("the service could not be started: #{inspect(failed.original)}")
  end

  @doc """
  Kills the service of a port that is open still, where it does not do as it is told; what it started ends with it. Its
  number cannot be another's yet: the port has not collected its end.
  """
  @spec kill(port) :: :ok
  def kill(port) do
    # By the shell, which has `kill` in itself; there may be no program of that name.
    with {:os_pid, os_pid} <- Port.info(port, :os_pid), do: :os.cmd('kill -KILL #{os_pid}')
    :ok
  end

  @doc "The Python to use."
  @spec python(keyword) :: String.t()
  def python(options), do: options |> python_and_origin() |> elem(0)

  @doc "The Python to use, and what named it: the first of these that there is (docs/deployment.md)."
  @spec python_and_origin(keyword) :: {String.t(), String.t()}
  def python_and_origin(options) do
    Enum.find(
      [
        {options[:python], "the option :python"},
        {Application.get_env(:demand_port, :python), "config :demand_port, :python"},
        {System.get_env("DEMAND_PORT_PYTHON"), "the variable DEMAND_PORT_PYTHON"},
        {packed("venv/bin/python"), "the release"},
        {existing("_build/demand_port/venv/bin/python"), "mix demand_port.install"},
        {existing(".venv/bin/python"), ".venv in the working directory"},
        {"python3", "the search path"}
      ],
      fn {python, _origin} -> python not in [nil, ""] end
    )
  end

  @doc "The folder of the Python package: the release's, or the one where this library was compiled; nil without either."
  @spec python_folder() :: Path.t() | nil
  def python_folder, do: packed("python") || existing(@repository_python)

  @doc "The folder of the Python package that a service with these options has."
  @spec package_folder(keyword) :: Path.t() | nil
  def package_folder(options), do: options[:python_path] || python_folder()

  # Where DemandPort.Release put it.
  defp packed(path) do
    case :code.priv_dir(:demand_port) do
      {:error, :bad_name} -> nil
      folder -> folder |> Path.join(path) |> existing()
    end
  end

  defp existing(path) do
    path = Path.expand(path)
    if File.exists?(path), do: path
  end

  defp executable(options) do
    python = python(options)

    # Only names are looked for on the search path; a path is where it says, from here.
    case System.find_executable(if String.contains?(python, "/"), do: Path.expand(python), else: python) do
      nil -> unavailable("no executable #{inspect(python)}; set the option :python or DEMAND_PORT_PYTHON")
      path -> {:ok, path}
    end
  end

  # The port would open, and end.
  defp folder(nil), do: :ok

  defp folder(path) do
    if File.dir?(path), do: :ok, else: unavailable("no folder #{inspect(path)}; set the option :cd")
  end

  defp unavailable(text), do: {:error, Error.new(:backend_unavailable, text)}

  defp port_options(options) do
    high = @busy_messages * options[:max_frame_bytes]

    [
      :binary,
      :exit_status,
      :hide,
      packet: 4,
      args: options[:args],
      env: env(options),
      busy_limits_port: {div(high, 2), high},
      busy_limits_msgq: :disabled
    ] ++ cd(options[:cd])
  end

  defp cd(nil), do: []
  defp cd(folder), do: [cd: folder]

  @doc false
  @spec env(keyword) :: [{charlist, charlist | false}]
  def env(options) do
    given = Map.new(options[:env] || [])

    given
    |> put_python_path(package_folder(options))
    |> Enum.map(fn {name, value} -> {to_charlist(name), variable(value)} end)
  end

  defp put_python_path(env, nil), do: env

  defp put_python_path(env, folder) do
    inherited = Map.get_lazy(env, "PYTHONPATH", fn -> System.get_env("PYTHONPATH") end)
    path = [Path.expand(folder), inherited] |> Enum.reject(&(&1 in [nil, ""])) |> Enum.join(":")
    Map.put(env, "PYTHONPATH", path)
  end

  defp variable(nil), do: false
  defp variable(value), do: to_charlist(value)
end
