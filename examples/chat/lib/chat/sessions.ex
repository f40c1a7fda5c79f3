defmodule Chat.Sessions do
  @moduledoc """
  Opens a session for the calling process, and closes it when that process has died.

  A demand ends with its caller by itself; a session stays open until somebody closes it. A page that is left in the
  middle of an answer cannot, so it is done here.
  """
  use GenServer

  def start_link(_options), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @doc "Opens the graph; the session is the caller's."
  def open(graph) do
    with {:ok, session} <- DemandPort.open(Chat.Port, graph) do
      GenServer.cast(__MODULE__, {:opened, session, self()})
      {:ok, session}
    end
  end

  @doc "Closes the session, if it is open still."
  def close(session), do: GenServer.cast(__MODULE__, {:close, session})

  # session => the monitor of its owner, and back.
  @impl true
  def init(nil), do: {:ok, %{}}

  @impl true
  def handle_cast({:opened, session, owner}, owned) do
    monitor = Process.monitor(owner)
    {:noreply, Map.merge(owned, %{session => monitor, monitor => session})}
  end

  def handle_cast({:close, session}, owned) do
    {monitor, owned} = Map.pop(owned, session)
    if monitor, do: Process.demonitor(monitor, [:flush])
    {:noreply, drop(owned, monitor, session)}
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, _owner, _reason}, owned) do
    {:noreply, drop(owned, monitor, owned[monitor])}
  end

  defp drop(owned, monitor, session) do
    # After a crash of the service the session is gone already; that is as good.
    _ = DemandPort.close(session)
    Map.drop(owned, [monitor, session])
  end
end
