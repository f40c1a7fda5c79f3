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
  `:deadline_exceeded` when there was no reply in time (the request may take effect all the same), and `:backend_unavailable` when the service is not there.
  An option that is not known or does not fit raises `ArgumentError`. When the service ends, everything open ends
  with `:backend_unavailable`, and a new one is started; sessions that were opened with `restore: true` are there again,
  the others are to be opened anew. Functions with a `!` return the result alone, and raise the error.
  """

  alias DemandPort.{Connection, Delivery, Demand, Error, Graph, Host, Inbox, Options, Relay, Restore, Session}

  @typedoc "What `start_link/1` started: a pid or a registered name."
  @type port_server :: GenServer.server()
  @typedoc """
  A value of a port. What was sent comes back as nil, a boolean, a number, a string or binary, a list, or a map with string
  keys, where an atom was a key too. Any other term, a tuple, pid, reference or atom, comes back as it was sent. NaN and the infinities are `:nan`, `:infinity` and `:neg_infinity`.
  """
  @type value :: term
  @typedoc "What a node gave, by the names of its output ports. A node that was skipped has given `%{}`."
  @type outputs :: %{String.t() => value}
  @typedoc "How one of several nodes ended, for `demand_many/3`."
  @type outcome :: {:ok, outputs} | {:error, Error.t()} | :skipped | :cancelled | :not_started
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
  Checks a graph, given as to `open/3`, without opening it: `%{"valid" => boolean, "problems" => list}`.

  #{Options.docs(:validate)}
  """
  @spec validate(port_server, map | Graph.t() | Path.t(), keyword) :: {:ok, map} | {:error, Error.t()}
  def validate(port, graph, options \\ []) do
    options = Options.validate!(options, :validate)

    with {:ok, graph} <- Graph.to_wire(graph),
         do: Connection.request(port, "validate", [graph], options[:timeout])
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

  There is no way back: from now on this service refuses demands as `:draining`, until `restart/2` has put a new one in its
  place. It goes on answering everything else.

  #{Options.docs(:drain)}
  """
  @spec drain(port_server, keyword) :: {:ok, map} | {:error, Error.t()}
  def drain(port, options \\ []) do
    timeout_ms = Options.validate!(options, :drain)[:timeout_ms]
    # The service cancels what is left at its own timeout, and is given some time to say so.
    Connection.request(port, "drain", [timeout_ms], timeout_ms + 5_000)
  end

  @doc """
  Starts a new service in the place of this one, losing nothing: what runs is finished, what is asked meanwhile waits
  for the new one, and sessions that were opened with `restore: true` are opened again. Returns once it is ready.

  #{Options.docs(:restart)}
  """
  @spec restart(port_server, keyword) :: :ok | {:error, Error.t()}
  def restart(port, options \\ []) do
    options = Options.validate!(options, :restart)
    Connection.call(port, {:restart, options[:drain_ms]}, options[:timeout])
  end

  @doc """
  What the connection knows without asking the service: its process id and limits, open requests, demands and sessions,
  what is held, restarts within the last minute, sessions that would be restored, calls of host nodes.

  #{Options.docs(:info)}
  """
  @spec info(port_server, keyword) :: {:ok, map} | {:error, Error.t()}
  def info(port, options \\ []), do: Connection.call(port, :info, Options.validate!(options, :info)[:timeout])

  ## Sessions

  @doc """
  Opens a graph: a map `%{nodes: […], edges: […]}` as `protocol/SPEC.md`, section 4, describes it, a `DemandPort.Graph`,
  or the path of a JSON file.

  #{Options.docs(:open)}
  """
  @spec open(port_server, map | Graph.t() | Path.t(), keyword) :: {:ok, Session.t()} | {:error, Error.t()}
  def open(port, graph, options \\ []) do
    options = Options.validate!(options, :open)
    name = options[:session] || Session.new_name()
    sent = opening(options)

    with {:ok, graph} <- Graph.to_wire(graph),
         restore = if(options[:restore], do: Restore.new(graph, sent)),
         note = {:opened, name, restore, options[:host], options[:owner]},
         {:ok, opened} <- Connection.request(port, "open", [name, graph, sent], options[:timeout], note) do
      {:ok, %Session{server: port, name: name, problems: opened["problems"] || []}}
    else
      {:error, error} ->
        # It may be opened yet, under a name that nobody has been told. One that was given may be another's, too.
        if error.code == :deadline_exceeded and options[:session] == nil,
          do: Connection.close_session(port, name)

        {:error, error}
    end
  end

  @opening ~w(max_running max_queued host_types host_else host_timeout_ms event_history)a

  defp opening(options) do
    claimed = if options[:host], do: [host_types: Host.claims(options[:host])], else: []

    for {name, value} <- Keyword.merge(claimed, Keyword.take(options, @opening)),
        into: %{},
        do: {Atom.to_string(name), plain(value)}
  end

  @doc """
  Closes a session; its demands end with `:cancelled`.

  #{Options.docs(:close)}
  """
  @spec close(Session.t(), keyword) :: :ok | {:error, Error.t()}
  def close(%Session{} = session, options \\ []) do
    timeout = Options.validate!(options, :close)[:timeout]
    note = {:closed, session.name}
    with {:ok, _} <- Connection.request(session.server, "close", [session.name], timeout, note), do: :ok
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
  Answers a `human-input` node, which waits for its `user_response`; also before it asks, and after other edits.

  #{Options.docs(:answer)}
  """
  @spec answer(Session.t(), String.t(), value, keyword) :: {:ok, [String.t()]} | {:error, Error.t()}
  def answer(%Session{} = session, node, value, options \\ []) when is_binary(node) do
    edit(session, [{:set_input, node, "user_response", value}], options, :answer)
  end

  @doc """
  Has the session's events sent to the caller, as `{:node_event, session, event}`, until it unsubscribes or dies, or the
  session is closed, or lost with its service. `session` is the session's name. `event` is a map with `"event"`, `"node"`,
  `"seq"` and `"time_us"`: `protocol/SPEC.md`, section 10.

  Who comes back says `since:` with the number after the last one it had, and misses nothing that is still kept.

  Two events are not the service's but made by this client. They come whatever `kinds:` says, and have nil for `"seq"`:

  * `"session_closed"`, the last one: the session was closed, and `"error"` is nil; or it was lost, with its service or with the
    connection, and `"error"` is why, a map with `"code"` and `"message"` as in other events.
  * `"session_restored"`: a session that was opened with `restore: true` goes on in a new service, whose numbers begin at 0.

  A connection that is killed says nothing: who must know monitors it, by the pid of `GenServer.whereis(session.server)`.

  #{Options.docs(:subscribe)}
  """
  @spec subscribe(Session.t(), keyword) ::
          {:ok, %{first: non_neg_integer, next: non_neg_integer}} | {:error, Error.t()}
  def subscribe(%Session{} = session, options \\ []) do
    {timeout, options} = options |> Options.validate!(:subscribe) |> Keyword.pop(:timeout)

    with {:ok, kept} <- Connection.call(session.server, {:subscribe, session.name, self(), options}, timeout) do
      {:ok, %{first: kept["first"], next: kept["next"]}}
    end
  end

  @doc """
  Takes `subscribe/2` back.

  #{Options.docs(:unsubscribe)}
  """
  @spec unsubscribe(Session.t(), keyword) :: :ok | {:error, Error.t()}
  def unsubscribe(%Session{} = session, options \\ []) do
    timeout = Options.validate!(options, :unsubscribe)[:timeout]
    Connection.call(session.server, {:unsubscribe, session.name, self()}, timeout)
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

  `{:ok, demand}` says that it is on its way. What the service refuses, an unknown node or a session that is closed, arrives as
  `:demand_error`, like every other end. `{:error, error}` is what the client sees by itself: there is no connection, too much
  is open, or the message is too large.

  With `events: true` the demand's own events come as well, `{:node_event, session, event}` with the name of the session
  (`protocol/SPEC.md`, section 5). Their `"demand_id"`, which the events of `subscribe/2` call `"demand"`, is the number that
  the connection gave the demand: it tells one demand's events from another's. To know which is whose, give each a `tag`.

  No more of its chunks are under way, or wait in the receiver's mailbox, than `credit` says: the service is held back
  while the mailbox holds more. (That of a process on another node cannot be looked into.)

  #{Options.docs(:demand_async)}
  """
  @spec demand_async(Session.t(), String.t(), keyword) :: {:ok, Demand.t()} | {:error, Error.t()}
  def demand_async(%Session{} = session, node, options \\ []) when is_binary(node) do
    options = Options.validate!(options, :demand_async)
    {to, watch} = ends(options)
    delivery = %{Delivery.new(session.name, node, options) | to: to, watch: watch}

    with {:ok, server} <- Relay.demand(session.server, delivery) do
      {:ok, %Demand{server: server, session: session.name, node: node, ref: delivery.ref}}
    end
  end

  defp ends(options) do
    to = options |> Keyword.get(:to, self()) |> List.wrap() |> Enum.map(&receiver/1)

    {to, watch} = if options[:broadcast], do: {[{:broadcast, options[:broadcast]}], [self()]}, else: {to, to}

    case options[:owner] do
      nil -> {to, watch}
      :none -> {to, []}
      owner -> {to, [owner]}
    end
  end

  @doc """
  Demands several nodes and waits; the outcomes come in the order asked, each with its node: `{:ok, outputs}`,
  `:skipped`, `{:error, error}`, `:cancelled`, or `:not_started`. They stream nothing. Leaves no message behind.

  In the mode `:race` it is an error when none succeeds: the first failure.

  #{Options.docs(:demand_many)}
  """
  @spec demand_many(Session.t(), [String.t()], keyword) ::
          {:ok, [{String.t(), outcome}]} | {:error, Error.t()}
  def demand_many(%Session{} = session, nodes, options \\ []) when is_list(nodes) do
    options = Options.validate!(options, :demand_many)

    case Enum.reject(nodes, &is_binary/1) do
      [] ->
        outcomes(session, nodes, options)

      [odd | _] ->
        raise ArgumentError, "a node of DemandPort.demand_many must be a string; got: #{inspect(odd)}"
    end
  end

  defp outcomes(_session, [], _options), do: {:ok, []}

  defp outcomes(session, nodes, options) do
    more =
      for {name, value} <- Keyword.take(options, [:mode, :limit]), into: %{}, do: {"#{name}", plain(value)}

    delivery = Delivery.new(session.name, nodes, options)
    delivery = %{delivery | options: Map.merge(delivery.options, more)}

    with {:ok, outcomes} <- Inbox.outputs(delivery, &begin(session.server, &1), nil, options[:timeout]),
         do: {:ok, Enum.map(outcomes, &outcome/1)}
  end

  defp outcome(%{"node" => node, "status" => "ok", "outputs" => outputs}), do: {node, {:ok, outputs}}

  defp outcome(%{"node" => node, "status" => "error", "error" => error}),
    do: {node, {:error, Error.from_wire(error)}}

  defp outcome(%{"node" => node, "status" => "skipped"}), do: {node, :skipped}
  defp outcome(%{"node" => node, "status" => "cancelled"}), do: {node, :cancelled}
  defp outcome(%{"node" => node, "status" => "not_started"}), do: {node, :not_started}

  @doc """
  A demand as a lazy stream of its chunks: it begins when the stream is enumerated, and each time anew.

      session |> DemandPort.stream("answer") |> Enum.each(&IO.write/1)

  The service makes no more than `credit` chunks ahead of who takes them; text that comes meanwhile is joined. To halt
  early, as `Enum.take/2` does, cancels the demand. An error of the demand is raised as `DemandPort.Error`, after the
  chunks that came before it. A node that is answered from the cache streams nothing: if it has one output, that
  is the one element.

  #{Options.docs(:stream)}
  """
  @spec stream(Session.t(), String.t(), keyword) :: Enumerable.t()
  def stream(%Session{} = session, node, options \\ []) when is_binary(node) do
    options = Options.validate!(options, :stream)
    delivery = Delivery.new(session.name, node, options)
    Inbox.stream(delivery, &begin(session.server, &1), options)
  end

  @doc """
  Demands a node and waits for its outputs. Leaves no message behind, whatever happens.

  #{Options.docs(:demand)}
  """
  @spec demand(Session.t(), String.t(), keyword) :: {:ok, outputs} | {:error, Error.t()}
  def demand(%Session{} = session, node, options \\ []) when is_binary(node) do
    options = Options.validate!(options, :demand)
    delivery = Delivery.new(session.name, node, options)
    Inbox.outputs(delivery, &begin(session.server, &1), options[:on_stream], options[:timeout])
  end

  @doc """
  Cancels a demand. Its terminal message follows, with the code `:cancelled`, unless it had ended already.
  """
  @spec cancel(Demand.t()) :: :ok
  def cancel(%Demand{} = demand), do: Connection.cancel(demand.server, demand.ref)

  ## With an exclamation mark

  # Each takes options last.
  with_mark =
    quote do
      [
        ping(port :: port_server) :: :pong,
        health(port :: port_server) :: map,
        info(port :: port_server) :: map,
        validate(port :: port_server, graph :: map | Graph.t() | Path.t()) :: map,
        node_types(port :: port_server) :: [map],
        models(port :: port_server) :: [map],
        load_model(port :: port_server, model :: String.t()) :: map,
        unload_model(port :: port_server, model :: String.t() | %{String.t() => term}) :: boolean,
        drain(port :: port_server) :: map,
        restart(port :: port_server) :: :ok,
        open(port :: port_server, graph :: map | Graph.t() | Path.t()) :: Session.t(),
        close(session :: Session.t()) :: :ok,
        snapshot(session :: Session.t()) :: map,
        edit(session :: Session.t(), operations :: operation | [operation]) :: [String.t()],
        set_input(session :: Session.t(), node :: String.t(), port :: String.t(), value :: value) :: [
          String.t()
        ],
        clear_input(session :: Session.t(), node :: String.t(), port :: String.t()) :: [String.t()],
        answer(session :: Session.t(), node :: String.t(), value :: value) :: [String.t()],
        get_output(session :: Session.t(), node :: String.t(), port :: String.t()) ::
          value | :absent | :skipped,
        subscribe(session :: Session.t()) :: %{first: non_neg_integer, next: non_neg_integer},
        unsubscribe(session :: Session.t()) :: :ok,
        demand(session :: Session.t(), node :: String.t()) :: outputs,
        demand_async(session :: Session.t(), node :: String.t()) :: Demand.t(),
        demand_many(session :: Session.t(), nodes :: [String.t()]) :: [{String.t(), outcome}]
      ]
    end

  for {:"::", _, [{name, _, parameters}, result]} <- with_mark do
    {arguments, types} =
      Enum.unzip(for {:"::", _, [{name, _, _}, type]} <- parameters, do: {Macro.var(name, nil), type})

    @doc "As `#{name}/#{length(arguments) + 1}`, but returns the result alone, and raises the error."
    @spec unquote(:"#{name}!")(unquote_splicing(types), keyword) :: unquote(result)
    def unquote(:"#{name}!")(unquote_splicing(arguments), options \\ []) do
      unquote(name)(unquote_splicing(arguments), options) |> unwrap()
    end
  end

  defp unwrap({:ok, result}), do: result
  defp unwrap({:error, error}), do: raise(error)
  defp unwrap(plain), do: plain

  ## Inside

  defp ask(port, type, fields, options, function) do
    Connection.request(port, type, fields, Options.validate!(options, function)[:timeout])
  end

  defp edit(session, operations, options, function) do
    operations = Enum.map(operations, &operation/1)
    timeout = Options.validate!(options, function)[:timeout]
    note = {:edited, session.name, operations}

    with {:ok, %{"stale" => stale}} <-
           Connection.request(session.server, "edit", [session.name, operations], timeout, note),
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

  # The connection is watched before the demand is sent: what is lost on the way is lost with it.
  defp begin(server, delivery) do
    case GenServer.whereis(server) do
      nil ->
        {:error, Connection.unavailable("the connection is not running")}

      server ->
        monitor = Process.monitor(server)
        Connection.cast_demand(server, delivery)
        {:ok, server, monitor}
    end
  end
end
