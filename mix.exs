defmodule DemandPort.MixProject do
  use Mix.Project

  @version "0.1.0"

  def project do
    [
      app: :demand_port,
      version: @version,
      elixir: "~> 1.14",
      description: "Runs workflow graphs and local models in a Python service opened as a port",
      elixirc_paths: elixirc_paths(Mix.env()),
      test_paths: ["tests/elixir"],
      start_permanent: Mix.env() == :prod,
      deps: [],
      aliases: aliases(),
      preferred_cli_env: [check: :test],
      name: "DemandPort",
      docs: [main: "DemandPort", source_ref: "v#{@version}", extras: ["protocol/SPEC.md"]]
    ]
  end

  def application, do: [extra_applications: [:logger]]

  defp elixirc_paths(:test), do: ["elixir_client/lib", "tests/elixir/support"]
  defp elixirc_paths(_), do: ["elixir_client/lib"]

  # `mix check` is what must pass before a change is proposed.
  defp aliases do
    [
      check: [
        "compile --warnings-as-errors",
        "format --check-formatted",
        "xref graph --format cycles --fail-above 0",
        "test"
      ]
    ]
  end
end
