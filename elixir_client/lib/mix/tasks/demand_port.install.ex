defmodule Mix.Tasks.DemandPort.Install do
  @shortdoc "Installs the Python packages that the service needs"

  @moduledoc """
  Makes a virtual environment with the packages that the service needs, each in the version that was tested.

      mix demand_port.install                       # everything but models
      mix demand_port.install --extras llama        # models too
      mix demand_port.install --wheels wheels       # without network

  It is made by `uv` where there is one, else by `python3 -m venv` and pip. `DemandPort.start_link/1` finds it by
  itself. Where it is there already and nothing has changed, nothing is done.

  ## Options

  * `--path DIR`: where it is made; default `_build/demand_port/venv`. Another place is to be named to the service, by
    `python:` or `DEMAND_PORT_PYTHON`.
  * `--extras LIST`: `llama` for models (llama-cpp-python), `test` for tests of one's own nodes (pytest); with commas.
  * `--wheels DIR`: takes packages from this folder alone.
  * `--python EXE`: the Python to make it of, 3.11 or later; default `python3`.
  * `--no-uv`: leaves `uv` aside.
  * `--dry-run`: says what would be run.
  """

  use Mix.Task

  alias DemandPort.Venv

  @switches [
    path: :string,
    extras: :string,
    wheels: :string,
    python: :string,
    uv: :boolean,
    dry_run: :boolean
  ]

  @impl true
  def run(arguments) do
    {options, rest} = OptionParser.parse!(arguments, strict: @switches)
    if rest != [], do: Mix.raise("demand_port.install takes options only, not #{Enum.join(rest, " ")}")
    settings = settings(options)

    cond do
      options[:dry_run] -> settings |> Venv.steps() |> Enum.each(&print/1)
      Venv.installed?(settings) -> Mix.shell().info("#{settings.path} is up to date")
      true -> install(settings)
    end
  end

  defp settings(options) do
    %{
      path: Path.expand(options[:path] || Venv.default()),
      python: options[:python] || "python3",
      wheels: options[:wheels] && Path.expand(options[:wheels]),
      extras: Venv.extras!(options[:extras] || ""),
      uv: if(Keyword.get(options, :uv, true), do: System.find_executable("uv"))
    }
  end

  # The service looks in the default place by itself.
  defp naming(path) do
    if path == Venv.default(), do: "", else: ", by DEMAND_PORT_PYTHON=#{Venv.python(path)}"
  end

  defp print(step), do: Mix.shell().info(Enum.join([step.program | Enum.map(step.arguments, &quoted/1)], " "))

  defp quoted(text),
    do: if(text =~ ~r/\A[\w@%+=:,.\/-]+\z/, do: text, else: "'#{String.replace(text, "'", "'\\''")}'")

  defp install(settings) do
    with :ok <- Venv.check(settings),
         :ok <- Venv.install(Venv.steps(settings), settings, &Mix.shell().info("==> " <> &1)) do
      Mix.shell().info("#{settings.path} is ready#{naming(settings.path)}; mix demand_port.doctor tries it")
    else
      {:error, text} -> Mix.raise(text)
    end
  end
end
