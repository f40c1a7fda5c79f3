defmodule DemandPort.Broadcaster do
  @moduledoc """
  Sends what comes of a demand to all who subscribed to a topic.

  `demand_async(session, node, broadcast: {adapter, server, topic})` has every message of the demand broadcast as

      {:workflow_stream, node, chunk}
      {:workflow_output, node, outputs}       exactly once at the end, or
      {:workflow_error, node, %DemandPort.Error{}}

  in this order, by a process of its own; with `events: true` also `{:workflow_event, session, event}`, as
  `:node_event` is without a broadcast. Nothing is tagged: take a topic of its own for what is to be told apart. The adapter is `Phoenix.PubSub`, or anything with its `broadcast/3`; or
  `Registry`, whose `server` is a registry with `keys: :duplicate`, where a subscriber registers under the topic:

      {:ok, _} = Registry.start_link(keys: :duplicate, name: MyApp.Topics)
      {:ok, _} = Registry.register(MyApp.Topics, "room:1", nil)

  The demand is its caller's as ever: it is cancelled when the caller dies, unless `owner: :none` was said, and the
  subscribers are told. An adapter that raises ends the demand, too; of that the log alone can tell.
  """

  alias DemandPort.Error

  @type server :: term
  @type topic :: term
  @typedoc "An adapter, the server it broadcasts on, and the topic."
  @type t :: {adapter :: module, server, topic}

  @doc "Sends the message to every subscriber of the topic."
  @callback broadcast(server, topic, message :: term) :: :ok | {:error, term}

  @doc """
  Broadcasts one message.

      iex> {:ok, _} = Registry.start_link(keys: :duplicate, name: DemandPort.BroadcasterDoc)
      iex> {:ok, _} = Registry.register(DemandPort.BroadcasterDoc, "room:1", nil)
      iex> DemandPort.Broadcaster.broadcast({Registry, DemandPort.BroadcasterDoc, "room:1"}, :hello)
      iex> receive do message -> message end
      :hello
  """
  @spec broadcast(t, term) :: :ok | {:error, term}
  def broadcast({Registry, registry, topic}, message) do
    Registry.dispatch(registry, topic, fn subscribers ->
      for {pid, _value} <- subscribers, do: send(pid, message)
    end)
  end

  def broadcast({adapter, server, topic}, message), do: adapter.broadcast(server, topic, message)

  @doc "Whether the term names a broadcaster that can be used here."
  @spec valid?(term) :: boolean
  def valid?({Registry, _registry, _topic}), do: true

  def valid?({adapter, _server, _topic}) when is_atom(adapter) do
    Code.ensure_loaded?(adapter) and function_exported?(adapter, :broadcast, 3)
  end

  def valid?(_other), do: false

  @doc false
  # The process of one demand: it receives the demand's messages until the last, and broadcasts each. It traps exits, so
  # that the last is broadcast also where everything is shut down around it.
  @spec forward(t, String.t(), supervisor :: pid) :: :ok
  def forward(to, node, supervisor) do
    Process.flag(:trap_exit, true)
    forward_next(to, node, supervisor)
  end

  defp forward_next(to, node, supervisor) do
    receive do
      {:demand_complete, _node, outputs} ->
        end_with(to, {:workflow_output, node, outputs})

      {:demand_error, _node, %Error{} = error} ->
        end_with(to, {:workflow_error, node, error})

      # The connection was killed, and says nothing any more.
      {:EXIT, ^supervisor, _reason} ->
        error = Error.new(:backend_unavailable, "the connection ended", retryable: true)
        end_with(to, {:workflow_error, node, error})

      message ->
        forward_one(to, message)
        forward_next(to, node, supervisor)
    end
  end

  defp forward_one(to, {:node_stream, node, chunk}), do: broadcast(to, {:workflow_stream, node, chunk})
  defp forward_one(to, {:node_event, session, event}), do: broadcast(to, {:workflow_event, session, event})
  # Of what the adapter started.
  defp forward_one(_to, _other), do: :ok

  defp end_with(to, message) do
    broadcast(to, message)
    :ok
  end
end
