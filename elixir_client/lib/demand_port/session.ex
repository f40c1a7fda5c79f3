defmodule DemandPort.Session do
  @moduledoc """
  One open graph: the server that holds the port, and the session's name in the service.

  `problems` lists what the service found in the graph when it was opened and let pass. A session lives as long as
  the service process; after a restart its name is `:unknown_session` and the graph is to be opened again.
  """

  @enforce_keys [:server, :name]
  defstruct [:server, :name, problems: []]

  @type t :: %__MODULE__{server: GenServer.server(), name: String.t(), problems: [map]}

  @doc false
  # Programs on several nodes may open sessions in one service: the name is unique among them all.
  @spec new_name() :: String.t()
  def new_name, do: "session-" <> Base.encode32(:rand.bytes(15), case: :lower)
end
