defmodule DemandPort.Cluster.Inbox do
  @moduledoc false
  # A demand whose messages the calling process itself takes, one after the other. Its relay is on the same node: once
  # that has ended, all its messages are in the mailbox, and what is not wanted can be removed.

  alias DemandPort.{Connection, Demand, Error}

  @enforce_keys [:tag, :demand, :monitor]
  defstruct [:tag, :demand, :monitor, empty: true, ended: false]

  @type t :: %__MODULE__{}

  @doc "Begins a demand whose messages come to the caller with the given tag."
  @spec open((tag :: reference -> Demand.t())) :: t
  def open(begin) do
    tag = make_ref()
    demand = begin.(tag)
    %__MODULE__{tag: tag, demand: demand, monitor: Process.monitor(demand.server)}
  end

  @doc "Waits for the outputs; `on_stream` has each chunk. Closes it, also when `on_stream` raises."
  @spec outputs(t, (String.t(), term -> term), timeout) :: {:ok, map} | {:error, Error.t()}
  def outputs(inbox, on_stream, timeout) do
    collect(inbox, on_stream, until(timeout))
  after
    close(inbox)
  end

  defp collect(inbox, on_stream, until) do
    case next(inbox, left(until)) do
      {:node_stream, node, chunk} ->
        on_stream.(node, chunk)
        collect(inbox, on_stream, until)

      {:demand_complete, _node, outputs} ->
        {:ok, outputs}

      {:demand_error, _node, error} ->
        {:error, error}
    end
  end

  @doc "The next elements of a stream, as `Stream.resource/3` wants them; raises the demand's error."
  @spec chunks(t, timeout) :: {[term], t} | {:halt, t}
  def chunks(%{ended: true} = inbox, _timeout), do: {:halt, inbox}

  def chunks(inbox, timeout) do
    case next(inbox, timeout) do
      {:node_stream, _node, chunk} -> {[chunk], %{inbox | empty: false}}
      {:demand_complete, _node, outputs} -> {last(inbox, outputs), %{inbox | ended: true}}
      {:demand_error, _node, error} -> raise error
    end
  end

  # A node that streams nothing, and has one output: that is the one element.
  defp last(%{empty: true}, outputs) when map_size(outputs) == 1, do: Map.values(outputs)
  defp last(_inbox, _outputs), do: []

  defp next(%{tag: tag, monitor: monitor} = inbox, timeout) do
    receive do
      # Not asked for, and not a chunk.
      {^tag, {:node_event, _, _}} ->
        next(inbox, timeout)

      {^tag, message} ->
        message

      {:DOWN, ^monitor, :process, _, reason} ->
        {:demand_error, nil, Error.new(:internal, "the demand's relay ended: #{inspect(reason, limit: 20)}")}
    after
      timeout -> {:demand_error, nil, Error.new(:deadline_exceeded, "the demand did not end in time")}
    end
  end

  @doc "Cancels the demand if it has not ended, and leaves none of its messages behind."
  @spec close(t) :: :ok
  def close(%{demand: demand, tag: tag, monitor: monitor}) do
    Process.demonitor(monitor, [:flush])
    ended = Process.monitor(demand.server)
    Connection.abandon(demand.server, demand.ref)
    # It is on this node, and ends at once.
    receive do
      {:DOWN, ^ended, :process, _, _} -> flush(tag)
    end
  end

  defp flush(tag) do
    receive do
      {^tag, _} -> flush(tag)
    after
      0 -> :ok
    end
  end

  defp until(:infinity), do: :infinity
  defp until(timeout), do: System.monotonic_time(:millisecond) + timeout

  defp left(:infinity), do: :infinity
  defp left(until), do: max(until - System.monotonic_time(:millisecond), 0)
end
