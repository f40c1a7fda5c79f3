defmodule DemandPort.Connection.Heir do
  @moduledoc false
  # Ends demands for a connection that cannot: nothing of a process runs any more that is killed.
  #
  # Receivers that do not watch the connection themselves are noted in a table of its own. When it has ended, however it
  # did, the table goes to a process that waits for nothing else, and what stands there still is told.

  alias DemandPort.{Delivery, Error}

  @doc "A table of the calling process, and the heir of it."
  @spec start() :: :ets.table()
  def start do
    connection = self()
    heir = spawn(fn -> await(connection) end)
    :ets.new(__MODULE__, [:private, {:heir, heir, nil}])
  end

  @doc "The demand is open. Who does not just have it delivered watches the connection."
  @spec note(:ets.table(), Delivery.t()) :: true
  def note(table, %{stream: :delivered} = delivery) do
    :ets.insert(table, {delivery.ref, Map.take(delivery, [:to, :tag, :node])})
  end

  def note(_table, _delivery), do: true

  @doc "The demand has ended, or nobody receives it any more. To be called before its end is told: never twice."
  @spec forget(:ets.table(), Delivery.t()) :: true
  def forget(table, %{stream: :delivered} = delivery), do: :ets.delete(table, delivery.ref)
  def forget(_table, _delivery), do: true

  defp await(connection) do
    monitor = Process.monitor(connection)

    receive do
      {:"ETS-TRANSFER", table, ^connection, nil} -> Enum.each(:ets.tab2list(table), &tell/1)
      {:DOWN, ^monitor, :process, ^connection, _reason} -> :ok
    end
  end

  defp tell({_ref, noted}) do
    error = Error.new(:backend_unavailable, "the connection was killed", retryable: true)
    Delivery.deliver(noted, {:demand_error, noted.node, error})
  end
end
