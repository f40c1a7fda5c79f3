defmodule Chat.MixProject do
  use Mix.Project

  def project do
    [app: :chat, version: "0.1.0", elixir: "~> 1.14", start_permanent: Mix.env() == :prod, deps: deps()]
  end

  def application, do: [mod: {Chat.Application, []}, extra_applications: [:logger]]

  defp deps do
    [
      {:demand_port, path: "../.."},
      {:phoenix, "~> 1.7.14"},
      {:phoenix_pubsub, "~> 2.1"},
      {:jason, "~> 1.4"}
      | by_elixir(Version.match?(System.version(), "~> 1.14.0"))
    ]
  end

  # Hex takes the newest versions, whatever Elixir they need: these are the last that compile with 1.14.
  defp by_elixir(true) do
    [
      {:phoenix_live_view, "~> 0.20.17"},
      {:bandit, "~> 1.11.0"},
      {:hpax, "~> 1.0.0 and < 1.0.4"},
      {:floki, "~> 0.37.0", only: :test}
    ]
  end

  defp by_elixir(false) do
    [
      {:phoenix_live_view, "~> 1.0.0"},
      {:bandit, "~> 1.5"},
      {:floki, "~> 0.36", only: :test}
    ]
  end
end
