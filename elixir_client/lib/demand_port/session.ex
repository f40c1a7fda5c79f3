defmodule DemandPort.Session do
  @moduledoc """
  One open graph: the server that holds the port, and the session's name in the service.

  `problems` lists what the service found in the graph when it was opened and let pass.

  A session lives until it is closed, its `owner:` dies, or its service ends. One that was opened with `restore: true` is
  opened again, under its name, by every later service of the connection: with its edits and inputs, and nothing cached.
  Any other is `:unknown_session` after that, and the graph is to be opened again.

  `server` is what `DemandPort.open/3` was given, a pid or a name; `GenServer.whereis/1` makes a pid of it.
  """

  @enforce_keys [:server, :name]
  defstruct [:server, :name, problems: []]

  @type t :: %__MODULE__{server: GenServer.server(), name: String.t(), problems: [map]}

  @doc false
  # Programs on several nodes may open sessions in one service: the name is unique among them all.
  @spec new_name() :: String.t()
  def new_name, do: "session-" <> Base.encode32(:rand.bytes(15), case: :lower)
end
