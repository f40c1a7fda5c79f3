defmodule DemandPort.Inbox do
  @moduledoc false
  # A demand whose messages the calling process itself takes, one after the other: until its end, or as a lazy stream.
  #
  # They go to an alias: once that is dropped, whatever is still on its way to this process vanishes. Credit follows what
  # the caller took, and not its mailbox, where messages of others lie as well.

  alias DemandPort.{Connection, Delivery, Error}

  # server: what delivers the demand, a connection or a relay; both take `consumed` and `abandon`
  # taken:  chunks since the last credit
  @enforce_keys [:server, :monitor, :ref]
  defstruct [:server, :monitor, :ref, taken: 0, empty: true, ended: false]

  @typedoc """
  Begins the demand. The monitor is of the server, and set up before anything is sent to one on another node: what is
  lost on the way is lost with it.
  """
  @type start :: (Delivery.t() -> {:ok, GenServer.server(), monitor :: reference} | {:error, Error.t()})

  @doc "Waits for the outputs; `on_stream`, if any, has each chunk. Leaves nothing behind, also when it raises."
  @spec outputs(Delivery.t(), start, (String.t(), term -> term) | nil, timeout) ::
          {:ok, term} | {:error, Error.t()}
  def outputs(delivery, start, on_stream, timeout) do
    with {:ok, inbox} <- open(heard(delivery, on_stream), start) do
      try do
        collect(inbox, on_stream, deadline(timeout))
      after
        close(inbox)
      end
    end
  end

  defp heard(delivery, nil), do: %{delivery | window: 0, stream: :never}
  defp heard(delivery, _on_stream), do: %{delivery | stream: :consumed}

  defp collect(inbox, on_stream, deadline) do
    case next(inbox, remaining(deadline)) do
      {:node_stream, node, chunk} ->
        on_stream.(node, chunk)
        Connection.consumed(inbox.server, inbox.ref, 1)
        collect(inbox, on_stream, deadline)

      {:demand_complete, _node, outputs} ->
        {:ok, outputs}

      {:demand_error, _node, error} ->
        {:error, error}
    end
  end

  @doc "The chunks as they are asked for; the options are those of `DemandPort.stream/3`. Raises the demand's error."
  @spec stream(Delivery.t(), start, keyword) :: Enumerable.t()
  def stream(delivery, start, options) do
    Stream.resource(
      fn ->
        case open(%{delivery | stream: :consumed}, start) do
          {:ok, inbox} -> inbox
          {:error, error} -> raise error
        end
      end,
      &elements(&1, options),
      &close/1
    )
  end

  defp elements(%{ended: true} = inbox, _options), do: {:halt, inbox}

  # What came before was taken when the next is asked for.
  defp elements(inbox, options) do
    inbox = give_credit(inbox, options[:credit])
    messages = options[:chunks] == :messages

    case next(inbox, options[:timeout]) do
      {:node_stream, _node, chunk} = message ->
        {[if(messages, do: message, else: chunk)], %{inbox | taken: inbox.taken + 1, empty: false}}

      {:demand_complete, _node, outputs} = message ->
        {if(messages, do: [message], else: last(inbox, outputs)), %{inbox | ended: true}}

      {:demand_error, _node, error} ->
        raise error
    end
  end

  defp give_credit(%{taken: taken} = inbox, credit) when 2 * taken >= credit do
    Connection.consumed(inbox.server, inbox.ref, taken)
    %{inbox | taken: 0}
  end

  defp give_credit(inbox, _credit), do: inbox

  # A node that streams nothing, and has one output: that is the one element.
  defp last(%{empty: true}, outputs) when map_size(outputs) == 1, do: Map.values(outputs)
  defp last(_inbox, _outputs), do: []

  ## Opening, receiving, closing

  defp open(delivery, start) do
    ref = :erlang.alias()

    case start.(%{delivery | ref: ref, to: [ref], watch: [self()], tag: {:tag, ref}}) do
      {:ok, server, monitor} ->
        {:ok, %__MODULE__{server: server, monitor: monitor, ref: ref}}

      {:error, error} ->
        :erlang.unalias(ref)
        {:error, error}
    end
  end

  defp next(%{ref: ref, monitor: monitor} = inbox, timeout) do
    receive do
      # Not asked for, and not a chunk.
      {^ref, {:node_event, _session, _event}} ->
        next(inbox, timeout)

      {^ref, message} ->
        message

      {:DOWN, ^monitor, :process, _server, _reason} ->
        {:demand_error, nil, Connection.unavailable("the connection ended")}
    after
      timeout -> {:demand_error, nil, Error.new(:deadline_exceeded, "the demand did not end in time")}
    end
  end

  # To abandon a demand that has ended does nothing.
  defp close(inbox) do
    :erlang.unalias(inbox.ref)
    Process.demonitor(inbox.monitor, [:flush])
    Connection.abandon(inbox.server, inbox.ref)
    flush(inbox.ref)
  end

  defp flush(ref) do
    receive do
      {^ref, _} -> flush(ref)
    after
      0 -> :ok
    end
  end

  defp deadline(:infinity), do: :infinity
  defp deadline(timeout), do: System.monotonic_time(:millisecond) + timeout

  defp remaining(:infinity), do: :infinity
  defp remaining(deadline), do: max(deadline - System.monotonic_time(:millisecond), 0)
end
