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

    Supervisor.start_link(children, strategy: :rest_for_one, name: Chat.Supervisor)
  end
end
