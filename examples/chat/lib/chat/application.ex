defmodule Chat.Application do
  @moduledoc false
  use Application

  @impl true
  def start(_type, _args) do
    children = [
      {Phoenix.PubSub, name: Chat.PubSub},
      {DemandPort, name: Chat.Port},
      ChatWeb.Endpoint
    ]

    # Not :rest_for_one: each question opens a session of its own, so pages outlive the port.
    Supervisor.start_link(children, strategy: :one_for_one, name: Chat.Supervisor)
  end
end
