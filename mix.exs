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
      package: package(),
      docs: [main: "DemandPort", source_ref: "v#{@version}", extras: extras()]
    ]
  end

  # Everything that a project needs which has this one as a dependency: both halves, and what they agree on.
  defp package do
    [
      files:
        ~w(elixir_client/lib python protocol/SPEC.md docs livebook mix.exs .formatter.exs) ++
          ~w(README.md ARCHITECTURE.md CHANGELOG.md LICENSE),
      exclude_patterns: [~r/__pycache__/],
      licenses: ["Apache-2.0"],
      links: %{
        "Changelog" => "https://hexdocs.pm/demand_port/changelog.html",
        "Protocol" => "https://hexdocs.pm/demand_port/spec.html"
      }
    ]
  end

  defp extras do
    ["README.md", "CHANGELOG.md", "protocol/SPEC.md" | Path.wildcard("{docs,livebook}/*.{md,livemd}")]
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
