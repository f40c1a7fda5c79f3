defmodule DemandPort.Demand do
  @moduledoc """
  A demand that was sent. `node` is the demanded node; `ref` names the demand for `DemandPort.cancel/1`.

  The reference stays valid over a restart of the connection: it then names nothing, and a cancel does nothing.
  """

  @enforce_keys [:server, :session, :node, :ref]
  defstruct [:server, :session, :node, :ref]

  @type t :: %__MODULE__{
          server: GenServer.server(),
          session: String.t(),
          node: String.t(),
          ref: reference
        }
end
