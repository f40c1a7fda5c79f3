defmodule DemandPort do
  @moduledoc """
  Workflow graphs and local models in a Python service, opened as a port and supervised like any child.

      children = [{DemandPort, name: MyApp.DemandPort}]

      {:ok, session} = DemandPort.open(MyApp.DemandPort, graph)
      {:ok, demand} = DemandPort.demand_async(session, "answer")

  `demand_async/3` returns at once. The caller then receives

      {:node_stream, node, chunk}          as tokens arrive
      {:demand_complete, node, outputs}    exactly once at the end, or
      {:demand_error, node, %DemandPort.Error{}}

  and nothing of the demand after its end. `demand/3` waits instead and returns the outputs.

  A `port` is the pid or name of what `start_link/1` started. Values are nil, booleans, numbers, strings, binaries,
  lists and maps with string keys (atom keys are sent as strings); any other term, a pid or a tuple, passes through a
  graph unchanged. NaN and the infinities are `:nan`, `:infinity` and `:neg_infinity`.

  Every function that asks the service returns `{:error, %DemandPort.Error{}}` when it refuses; with the code
  `:deadline_exceeded` when there was no reply in time, and `:backend_unavailable` when the service is not there.
  An option that is not known or does not fit raises `ArgumentError`. When the service ends, everything open ends
  with `:backend_unavailable`, and the supervisor starts a new one; its sessions are to be opened again.
  """

  alias DemandPort.{Connection, Demand, Error, Options, Session}

  @typedoc "What `start_link/1` started: a pid or a registered name."
  @type port_server :: GenServer.server()
  @type value :: term
  @type outputs :: %{String.t() => value}
  @typedoc """
  An edit: `{:add_node, node}`, `{:remove_node, id}`, `{:add_edge, edge}`, `{:remove_edge, edge_or_id}`,
  `{:update_node_data, id, data}`, `{:set_input, id, port, value}`, `{:clear_input, id, port}`, `{:invalidate, id}`,
  or the operation's map as `protocol/SPEC.md` has it.
  """
  @type operation :: tuple | map

  ## The service

  @doc """
  A child specification for a supervisor; the options are those of `start_link/1`.

      iex> DemandPort.child_spec(name: :demand_port_doc).id
      :demand_port_doc
  """
  @spec child_spec(keyword) :: Supervisor.child_spec()
  def child_spec(options) do
    %{id: Keyword.get(options, :name, __MODULE__), start: {__MODULE__, :start_link, [options]}}
  end

  @doc """
  Starts a service and the process that owns its port. Returns at once: requests wait until the service is ready.

  #{Options.docs(:start_link)}
  """
  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(options \\ []), do: options |> Options.validate!(:start_link) |> Connection.start_link()

  @doc """
  Answers `:pong` once the service has read the request and replied.

  #{Options.docs(:ping)}
  """
  @spec ping(port_server, keyword) :: :pong | {:error, Error.t()}
  def ping(port, options \\ []) do
    case ask(port, "ping", [], options, :ping) do
      {:ok, "pong"} -> :pong
      {:error, error} -> {:error, error}
    end
  end

  @doc """
  The service's state: uptime, process id, sessions, demands, pools, workers, memory.

  #{Options.docs(:health)}
  """
  @spec health(port_server, keyword) :: {:ok, map} | {:error, Error.t()}
  def health(port, options \\ []), do: ask(port, "health", [], options, :health)

  @doc """
  Checks a graph without opening it: `%{"valid" => boolean, "problems" => list}`.

  #{Options.docs(:validate)}
  """
  @spec validate(port_server, map, keyword) :: {:ok, map} | {:error, Error.t()}
  def validate(port, graph, options \\ []) when is_map(graph) do
    ask(port, "validate", [graph], options, :validate)
  end

  @doc """
  Descriptors of the node types that the service runs.

  #{Options.docs(:node_types)}
  """
  @spec node_types(port_server, keyword) :: {:ok, [map]} | {:error, Error.t()}
  def node_types(port, options \\ []) do
    {filter, options} = options |> Options.validate!(:node_types) |> Keyword.pop(:filter)
    Connection.request(port, "node_types", [filter], options[:timeout])
  end

  @doc """
  The models that the service knows, with their state.

  #{Options.docs(:models)}
  """
  @spec models(port_server, keyword) :: {:ok, [map]} | {:error, Error.t()}
  def models(port, options \\ []), do: ask(port, "models", [], options, :models)

  @doc """
  Loads a model; the reply comes once it is ready.

  #{Options.docs(:load_model)}
  """
  @spec load_model(port_server, String.t(), keyword) :: {:ok, map} | {:error, Error.t()}
  def load_model(port, model, options \\ []) when is_binary(model) do
    {timeout, settings} = options |> Options.validate!(:load_model) |> Keyword.pop(:timeout)
    spec = Map.new(settings, fn {name, value} -> {name, plain(value)} end)
    Connection.request(port, "load_model", [Map.put(spec, :model, model)], timeout)
  end

  @doc """
  Unloads a model; true when it was loaded.

  By name that is the model however it was loaded; by a `model_ref`, as inference nodes give it, the very one and no other.

  #{Options.docs(:unload_model)}
  """
  @spec unload_model(port_server, String.t() | %{String.t() => term}, keyword) ::
          {:ok, boolean} | {:error, Error.t()}
  def unload_model(port, model, options \\ [])

  def unload_model(port, %{"id" => id}, options), do: do_unload(port, %{id: id}, options)
  def unload_model(port, model, options) when is_binary(model), do: do_unload(port, %{model: model}, options)

  defp do_unload(port, which, options) do
    {timeout, [when_busy: when_busy]} = options |> Options.validate!(:unload_model) |> Keyword.pop(:timeout)
    Connection.request(port, "unload_model", [Map.put(which, :when_busy, plain(when_busy))], timeout)
  end

  defp plain(value) when is_atom(value), do: Atom.to_string(value)
  defp plain(value), do: value

  @doc """
  Takes no new demands and waits for the running ones: `%{"completed" => n, "cancelled" => n}`.

  #{Options.docs(:drain)}
  """
  @spec drain(port_server, keyword) :: {:ok, map} | {:error, Error.t()}
  def drain(port, options \\ []) do
    timeout_ms = Options.validate!(options, :drain)[:timeout_ms]
    # The service cancels what is left at its own timeout, and is given some time to say so.
    Connection.request(port, "drain", [timeout_ms], timeout_ms + 5_000)
  end

  ## Sessions

  @doc """
  Opens a graph: `%{nodes: […], edges: […]}`, as `protocol/SPEC.md`, section 4, describes it.

  #{Options.docs(:open)}
  """
  @spec open(port_server, map, keyword) :: {:ok, Session.t()} | {:error, Error.t()}
  def open(port, graph, options \\ []) when is_map(graph) do
    options = Options.validate!(options, :open)
    name = options[:session] || "session-#{System.unique_integer([:positive])}"
    limits = options |> Keyword.take([:max_running, :max_queued]) |> Map.new()

    with {:ok, opened} <- Connection.request(port, "open", [name, graph, limits], options[:timeout]) do
      {:ok, %Session{server: port, name: name, problems: opened["problems"] || []}}
    end
  end

  @doc """
  Closes a session; its demands end with `:cancelled`.

  #{Options.docs(:close)}
  """
  @spec close(Session.t(), keyword) :: :ok | {:error, Error.t()}
  def close(%Session{} = session, options \\ []) do
    with {:ok, _} <- ask(session.server, "close", [session.name], options, :close), do: :ok
  end

  @doc """
  The session's graph, the inputs that were set, and each node's state.

  #{Options.docs(:snapshot)}
  """
  @spec snapshot(Session.t(), keyword) :: {:ok, map} | {:error, Error.t()}
  def snapshot(%Session{} = session, options \\ []) do
    ask(session.server, "snapshot", [session.name], options, :snapshot)
  end

  @doc """
  Changes the graph, all operations or none; returns the nodes that became stale.

  #{Options.docs(:edit)}
  """
  @spec edit(Session.t(), operation | [operation], keyword) :: {:ok, [String.t()]} | {:error, Error.t()}
  def edit(%Session{} = session, operations, options \\ []) do
    edit(session, List.wrap(operations), options, :edit)
  end

  @doc """
  Sets the value of an input port; it goes before an edge and before the node's own data.

  #{Options.docs(:set_input)}
  """
  @spec set_input(Session.t(), String.t(), String.t(), value, keyword) ::
          {:ok, [String.t()]} | {:error, Error.t()}
  def set_input(%Session{} = session, node, port, value, options \\ [])
      when is_binary(node) and is_binary(port) do
    edit(session, [{:set_input, node, port, value}], options, :set_input)
  end

  @doc """
  Takes back what `set_input/5` set.

  #{Options.docs(:clear_input)}
  """
  @spec clear_input(Session.t(), String.t(), String.t(), keyword) :: {:ok, [String.t()]} | {:error, Error.t()}
  def clear_input(%Session{} = session, node, port, options \\ []) when is_binary(node) and is_binary(port) do
    edit(session, [{:clear_input, node, port}], options, :clear_input)
  end

  @doc """
  The cached value of an output port, without running anything: `:absent` when there is none that is fresh,
  `:skipped` when the node hangs on a branch that was not taken.

  #{Options.docs(:get_output)}
  """
  @spec get_output(Session.t(), String.t(), String.t(), keyword) ::
          {:ok, value} | :absent | :skipped | {:error, Error.t()}
  def get_output(%Session{} = session, node, port, options \\ []) when is_binary(node) and is_binary(port) do
    case ask(session.server, "get_output", [session.name, node, port], options, :get_output) do
      {:ok, %{"status" => "fresh", "value" => value}} -> {:ok, value}
      {:ok, %{"status" => "skipped"}} -> :skipped
      {:ok, %{"status" => "absent"}} -> :absent
      {:error, error} -> {:error, error}
    end
  end

  ## Demands

  @doc """
  Demands a node and returns at once; the messages go to the caller. The demand is cancelled when its receiver dies.

  #{Options.docs(:demand_async)}
  """
  @spec demand_async(Session.t(), String.t(), keyword) :: {:ok, Demand.t()} | {:error, Error.t()}
  def demand_async(%Session{} = session, node, options \\ []) when is_binary(node) do
    options = Options.validate!(options, :demand_async)
    receiver = receiver(Keyword.get(options, :to, self()))

    demand = %{
      plan(session, node, options)
      | ref: make_ref(),
        to: receiver,
        watch: receiver,
        tag: if(Keyword.has_key?(options, :tag), do: {:tag, options[:tag]}, else: :untagged)
    }

    with :ok <- Connection.demand(session.server, demand, :infinity) do
      {:ok, %Demand{server: session.server, session: session.name, node: node, ref: demand.ref}}
    end
  end

  @doc """
  Demands a node and waits for its outputs. Leaves no message behind, whatever happens.

  #{Options.docs(:demand)}
  """
  @spec demand(Session.t(), String.t(), keyword) :: {:ok, outputs} | {:error, Error.t()}
  def demand(%Session{} = session, node, options \\ []) when is_binary(node) do
    options = Options.validate!(options, :demand)

    case GenServer.whereis(session.server) do
      nil -> {:error, Connection.unavailable("the connection is not running")}
      server -> demand_and_wait(server, plan(session, node, options), options)
    end
  end

  @doc """
  Cancels a demand. Its terminal message follows, with the code `:cancelled`, unless it had ended already.
  """
  @spec cancel(Demand.t()) :: :ok
  def cancel(%Demand{} = demand), do: Connection.cancel(demand.server, demand.ref)

  ## Inside

  defp ask(port, type, fields, options, function) do
    Connection.request(port, type, fields, Options.validate!(options, function)[:timeout])
  end

  defp edit(session, operations, options, function) do
    fields = [session.name, Enum.map(operations, &operation/1)]

    with {:ok, %{"stale" => stale}} <- ask(session.server, "edit", fields, options, function),
         do: {:ok, stale}
  end

  defp operation(%{} = operation), do: operation
  defp operation({op, node}) when op in [:add_node, :remove_node, :invalidate], do: %{op: "#{op}", node: node}
  defp operation({op, edge}) when op in [:add_edge, :remove_edge], do: %{op: "#{op}", edge: edge}
  defp operation({:update_node_data, node, data}), do: %{op: "update_node_data", node: node, data: data}
  defp operation({:clear_input, node, port}), do: %{op: "clear_input", node: node, port: port}

  defp operation({:set_input, node, port, value}) do
    %{op: "set_input", node: node, port: port, value: value}
  end

  defp operation(other), do: raise(ArgumentError, "not an edit operation: #{inspect(other)}")

  # The name is looked up here: it is the caller's node that it is registered on.
  defp receiver(name) when is_atom(name) do
    Process.whereis(name) || raise(ArgumentError, "option :to names no process: #{inspect(name)}")
  end

  defp receiver(pid_or_remote), do: pid_or_remote

  @sent ~w(deadline_ms priority coalesce_ms coalesce_bytes)a

  defp plan(session, node, options) do
    sent = for {name, value} <- Keyword.take(options, @sent), into: %{}, do: {Atom.to_string(name), value}
    sent = if options[:events], do: Map.put(sent, "events", true), else: sent

    %{
      ref: nil,
      session: session.name,
      node: node,
      options: sent,
      credit: options[:credit],
      to: nil,
      watch: self(),
      tag: :untagged,
      stream: true
    }
  end

  defp demand_and_wait(server, plan, options) do
    on_stream = options[:on_stream]
    # Messages go to the alias: once it is dropped, whatever is still on its way to this process vanishes.
    ref = :erlang.monitor(:process, server, alias: :explicit_unalias)
    credit = if on_stream, do: options[:credit], else: 0
    demand = %{plan | ref: ref, to: ref, tag: {:tag, ref}, credit: credit, stream: on_stream != nil}
    Connection.cast_demand(server, demand)

    try do
      await(server, ref, on_stream, deadline(options[:timeout]))
    after
      leave(server, ref)
    end
  end

  defp await(server, ref, on_stream, deadline) do
    receive do
      {^ref, {:node_stream, node, chunk}} ->
        on_stream.(node, chunk)
        await(server, ref, on_stream, deadline)

      {^ref, {:demand_complete, _node, outputs}} ->
        {:ok, outputs}

      {^ref, {:demand_error, _node, error}} ->
        {:error, error}

      {:DOWN, ^ref, :process, _pid, _reason} ->
        {:error, Connection.unavailable("the connection ended while the demand ran")}
    after
      remaining(deadline) -> {:error, Error.new(:deadline_exceeded, "the demand did not end in time")}
    end
  end

  # Also runs when `on_stream` raises. To abandon a demand that has ended does nothing.
  defp leave(server, ref) do
    :erlang.unalias(ref)
    Process.demonitor(ref, [:flush])
    Connection.abandon(server, ref)
    flush(ref)
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
