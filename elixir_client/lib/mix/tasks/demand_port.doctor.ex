defmodule Mix.Tasks.DemandPort.Doctor do
  @shortdoc "Says whether the service can run here, and what to do where it cannot"

  @moduledoc """
  Looks at everything that the service needs, and says what is wrong with the command that mends it.

      mix demand_port.doctor
      mix demand_port.doctor --extras llama      # models are wanted too

  It looks at the Python that `DemandPort.start_link/1` would take, its version, its packages, the folder of the
  package `demandport`, the packages with nodes of one's own, llama-cpp-python, the folders that the environment names; then it starts a service, asks it for
  its node types, and runs a node. The exit status is 1 when something is wrong.

  Nodes are looked for in `priv/python` of this project, where `mix demand_port.gen.node` writes them, in the folders that
  `PYTHONPATH` names, and among the packages that are installed. What an application gives its service by `env:`, the
  doctor does not know.

  ## Options

  * `--python EXE`: looks at this Python.
  * `--extras LIST`: `llama`, `test`, with commas; without them what they need may be missing.
  """

  use Mix.Task

  alias DemandPort.{Doctor, Venv}

  @impl true
  def run(arguments) do
    {options, rest} = OptionParser.parse!(arguments, strict: [python: :string, extras: :string])
    if rest != [], do: Mix.raise("demand_port.doctor takes options only, not #{Enum.join(rest, " ")}")
    # config :demand_port, :python may stand in runtime.exs
    Mix.Task.run("app.config")

    findings =
      options |> Keyword.update(:extras, [], &Venv.extras!/1) |> with_own_nodes() |> Doctor.findings()

    Enum.each(findings, &print/1)
    if Doctor.wrong?(findings), do: exit({:shutdown, 1})
  end

  defp with_own_nodes(options) do
    own = Path.expand("priv/python")

    if File.dir?(own),
      do: Keyword.put(options, :env, [{"PYTHONPATH", Enum.join([own | inherited()], ":")}]),
      else: options
  end

  defp inherited, do: "PYTHONPATH" |> System.get_env("") |> String.split(":", trim: true)

  defp print({status, what, remedy}) do
    Mix.shell().info([mark(status), " ", what])
    if remedy, do: Mix.shell().info("       #{remedy}")
  end

  defp mark(:ok), do: [:green, "ok    ", :reset]
  defp mark(:note), do: [:yellow, "note  ", :reset]
  defp mark(:wrong), do: [:red, "wrong ", :reset]
end
