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
      {:phoenix_live_view, "~> 0.20.17 or ~> 1.0.0"},
      {:phoenix_pubsub, "~> 2.1"},
      {:bandit, "~> 1.5"},
      {:jason, "~> 1.4"},
      {:floki, ">= 0.36.0", only: :test}
    ]
  end
end
