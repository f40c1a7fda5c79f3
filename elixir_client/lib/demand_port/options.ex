defmodule DemandPort.Options do
  @moduledoc """
  The options of every function that takes some: one table that checks them and writes their documentation.

      iex> DemandPort.Options.validate!([credit: 8], :demand_async)[:credit]
      8

      iex> DemandPort.Options.validate!([credit: -1], :demand_async)
      ** (ArgumentError) option :credit of DemandPort.demand_async must be an integer from 0, or :infinity; got: -1

      iex> DemandPort.Options.validate!([kredit: 1], :ping)
      ** (ArgumentError) option :kredit is not known to DemandPort.ping; known: :timeout
  """

  @type function_name :: atom

  # {name, type, default, meaning}; a default of :none leaves the option out, :required must be given.
  # The longest time that the protocol carries, 2⁴⁰ ms.
  @longest_ms 1_099_511_627_776
  @timeout {:timeout, :timeout, 30_000, "how long to wait for the reply, in milliseconds"}
  @deadline {:deadline_ms, {:integer, 1}, :none,
             "time that the service gives the demand, from reading it; past it the error is `:deadline_exceeded`"}
  @priority {:priority, {:within, -100, 100}, :none, "order among queued demands: higher runs first"}
  @shaping [
    @priority,
    {:coalesce_ms, {:integer, 0}, :none,
     "holds streamed text back up to this time, so that chunks are fewer"},
    {:coalesce_bytes, {:integer, 1}, :none, "holds streamed text back up to this size"}
  ]

  @opening {:open, :keywords, [], "options of `DemandPort.open/3`"}
  @choice [
    {:model, :string, :none,
     "name of a model: those that have it loaded come before all others, which would load it"},
    {:offer, :any, :none, "only those that offer this, see `start_link/1`"},
    {:ask, {:integer, 1}, 4, "how many are asked for their load; of more, that many at random"},
    {:answer_ms, {:integer, 1}, 500, "time that these have to answer; who does not is not chosen"}
  ]
  @retry {:retry, {:integer, 0}, 0,
          "how often the demand is begun again elsewhere after an error that is retryable, as long as no chunk was " <>
            "delivered"}

  @table %{
    start_link: [
      {:name, :name, :none, "name to register the connection under"},
      {:python, :string, :none,
       "the Python executable. Without it: `config :demand_port, :python`, then the environment's " <>
         "`DEMAND_PORT_PYTHON`, then the release's, then what `mix demand_port.install` made, then " <>
         "`.venv/bin/python`, then `python3`"},
      {:python_path, :string, :none,
       "a folder put before `PYTHONPATH`; default: `python/` of the release, else beside `mix.exs`"},
      {:args, {:list, :string}, ["-m", "demandport", "serve"], "arguments of the executable"},
      {:env, :env, [], "environment variables of the service, `{name, value}`; nil removes one"},
      {:cd, :string, :none, "working directory of the service"},
      {:max_frame_bytes, {:integer, 4096}, 67_108_864, "largest message accepted and sent"},
      {:start_timeout_ms, {:integer, 1}, 30_000, "time until the service must be ready"},
      {:max_pending, {:integer, 1}, 10_000, "requests held while the service starts; more are `:queue_full`"},
      {:credit, :credit, 64, "default of the demands' `credit`"},
      {:max_restarts, {:integer, 0}, 5,
       "times within a minute that the service is started anew after it was lost; one more ends the process"},
      {:hang_timeout_ms, {:or, {:integer, 100}, [:infinity]}, 30_000,
       "how long the service may leave a ping unanswered, half of that after the last; then it is killed and started anew"},
      {:health_interval_ms, {:or, {:integer, 100}, [:infinity]}, :infinity,
       "how often the service's health is asked for and reported by telemetry"},
      {:log_level, {:in, [:debug, :info, :warning, :error, :none]}, :info,
       "least level of the service's log messages that go to `Logger`"}
    ],
    open: [
      {:session, :string, :none, "name of the session; default: a new unique one"},
      {:max_running, {:integer, 1}, :none, "demands of the session that run at once; 1 is a strict queue"},
      {:max_queued, {:integer, 0}, :none, "demands of the session that may wait; more are `:queue_full`"},
      {:restore, :boolean, false,
       "after the service was lost or restarted, opens the session again with its graph and inputs"},
      {:owner, :pid, :none, "a process whose death closes the session; default: none"},
      {:host, :host, :none, "a module of `DemandPort.Host` that runs nodes here, or `{module, arg}`"},
      {:host_types, :claims, :none,
       "node types that the `host` runs, names or descriptors, or `:all`; default: what its module says"},
      {:host_else, :claims, :none, "node types that the `host` runs where the service has none, or `:all`"},
      {:host_timeout_ms, {:integer, 1}, :none, "time for an answer of the `host`; default five minutes"},
      {:event_history, {:integer, 0}, :none, "events that are kept from the beginning on, for `subscribe/2`"},
      @timeout
    ],
    subscribe: [
      {:since, {:integer, 0}, :none, "number of the first event wanted; default: those that are yet to come"},
      {:kinds, {:list, :string}, :none,
       "the events wanted, by their names; failures and demands come always"},
      {:tag, :any, :none, "each event arrives as `{tag, message}`"},
      @timeout
    ],
    restart: [
      {:drain_ms, {:within, 0, @longest_ms}, 30_000, "time for what runs to end; then it is cancelled"},
      {:timeout, :timeout, 60_000, "how long to wait until the new service is ready, in milliseconds"}
    ],
    demand_many: [
      {:mode, {:in, [:all, :try, :race]}, :all,
       "`:try` cancels the rest at the first failure, `:race` at the first success"},
      {:limit, {:integer, 1}, :none, "nodes that are evaluated at once; default: all"},
      {:timeout, :timeout, 60_000, "time after which the demand is cancelled with `:deadline_exceeded`"},
      @deadline,
      @priority
    ],
    stream: [
      {:timeout, :timeout, :infinity, "longest time between two elements, in milliseconds"},
      {:credit, {:integer, 1}, 64, "chunks that may be on their way while none is taken"},
      {:chunks, {:in, [:values, :messages]}, :values,
       "elements: the chunks alone, or the messages, `{:node_stream, node, chunk}` and at last " <>
         "`{:demand_complete, node, outputs}`"},
      @deadline | @shaping
    ],
    demand_async: [
      {:to, :receivers, :none,
       "pid, name or `{name, node}` that receives the messages, or a list of them; default: the caller. The demand " <>
         "is cancelled when the last of them has died"},
      {:broadcast, :broadcast, :none,
       "`{adapter, server, topic}`: the messages are broadcast instead, see `DemandPort.Broadcaster`; not beside `to` " <>
         "or `tag`"},
      {:owner, :owner, :none,
       "the process whose death cancels the demand, or `:none`; default: the receivers, of a broadcast the caller"},
      {:tag, :any, :none, "each message arrives as `{tag, message}`"},
      {:credit, :credit, :none, "stream messages that may be under way; `:infinity` for no limit"},
      @deadline,
      {:events, :boolean, false, "also delivers `{:node_event, session, event}`"}
      | @shaping
    ],
    demand: [
      {:timeout, :timeout, 60_000, "time after which the demand is cancelled with `:deadline_exceeded`"},
      {:on_stream, {:function, 2}, :none, "called with node and chunk in the caller, as chunks arrive"},
      {:credit, :credit, :none, "stream messages that may be under way; 0 when there is no `on_stream`"},
      @deadline | @shaping
    ],
    load_model: [
      {:context_length, {:integer, 1}, :none, "tokens of context; default: the model's own"},
      {:gpu_layers, :any_integer, :none, "layers put on the GPU"},
      {:threads, {:integer, 1}, :none, "threads of one model worker"},
      {:replicas, {:integer, 1}, :none, "workers that run the model at once"},
      {:balance, {:in, [:least_loaded, :round_robin]}, :none, "how one of several workers is chosen"},
      {:purpose, {:in, [:generate, :embed, :rerank]}, :none, "what it is loaded for; default `:generate`"},
      {:timeout, :timeout, 600_000, "how long to wait until the model is ready, in milliseconds"}
    ],
    unload_model: [
      {:when_busy, {:in, [:stop, :wait, :refuse]}, :stop,
       "what becomes of what the model runs: it ends with `:backend_unavailable`, or the model waits for it, " <>
         "or is not unloaded"},
      @timeout
    ],
    node_types: [{:filter, :filter, nil, "a node type, or `%{\"category\" => name}`"}, @timeout],
    drain: [
      {:timeout_ms, {:within, 0, @longest_ms}, 30_000, "time after which running demands are cancelled"}
    ],
    "Pool.start_link": [
      {:name, :atom, :required, "name of the pool, and the beginning of its members' names"},
      {:size, {:integer, 1}, 2, "how many services"}
    ],
    "Pool.run": [@opening],
    "Cluster.start_link": [
      {:scope, :atom, :required, "name of the cluster, the same on every node"},
      {:ports, {:list, :any}, [], "names of ports on this node that the cluster may use"},
      {:pool, :atom, :none,
       "a `DemandPort.Pool` on this node, started before, all of whose members it may use"},
      {:offers, {:list, :any}, [], "terms that the ports of this node are to be found by, such as `:gpu`"},
      {:refresh_ms, {:or, {:integer, 10}, [:infinity]}, 1_000,
       "how often this node looks which models its ports have loaded; `:infinity`: when asked by `refresh/1`"}
    ],
    "Cluster.choose": @choice,
    "Cluster.demand_async": [
      @retry,
      @opening,
      {:to, :pids, :none, "pid that receives the messages, or a list of them; default: the caller"},
      {:tag, :any, :none, "each message arrives as `{tag, message}`"},
      {:credit, :credit, 64, "stream messages that may be under way; `:infinity` for no limit"},
      @deadline | @shaping ++ @choice
    ],
    "Cluster.run": [
      @retry,
      @opening,
      {:timeout, :timeout, 60_000, "time after which the demand is cancelled with `:deadline_exceeded`"},
      {:on_stream, {:function, 2}, :none, "called with node and chunk in the caller, as chunks arrive"},
      @deadline | @shaping ++ @choice
    ],
    "Cluster.stream": [
      @retry,
      @opening,
      {:timeout, :timeout, :infinity, "longest time between two chunks, in milliseconds"},
      {:credit, {:integer, 1}, 64, "chunks that may be on their way or wait while none is taken"},
      @deadline | @shaping ++ @choice
    ],
    "Graph.node": [{:position, :position, :none, "where an editor draws the node, `{x, y}`"}],
    "Graph.connect": [{:id, :string, :none, "name of the edge, for edits; default: one made of its ends"}]
  }

  # What an option is nothing without, and what it cannot stand beside.
  @needed %{open: [host_types: :host, host_else: :host, host_timeout_ms: :host]}
  @excluded %{demand_async: [to: :broadcast, tag: :broadcast]}

  @plain ~w(answer close edit set_input clear_input get_output snapshot health ping validate models info unsubscribe)a ++
           [:"Pool.info"]
  @functions Map.merge(@table, Map.new(@plain, &{&1, [@timeout]}))

  @doc "The options with defaults put in, or an `ArgumentError` that names the option, what it takes, and what it got."
  @spec validate!(keyword, function_name) :: keyword
  def validate!(options, function), do: checked!(options, Map.fetch!(@functions, function), function)

  defp checked!(options, schema, function) do
    unless Keyword.keyword?(options),
      do: refuse("options of #{name(function)} must be a keyword list", options)

    Enum.each(options, &check!(&1, schema, function))
    Enum.each(schema, &given!(&1, options, function))
    Enum.each(@needed[function] || [], &together!(&1, options, function))
    Enum.each(@excluded[function] || [], &apart!(&1, options, function))
    Keyword.merge(defaults(schema), options)
  end

  @doc """
  The options of one function and those it hands on to another, validated as what they are for the caller: its own.

      iex> DemandPort.Options.split!([size: 1, cd: 5], :"Pool.start_link", :start_link)
      ** (ArgumentError) option :cd of DemandPort.Pool.start_link must be a non-empty string; got: 5
  """
  @spec split!(keyword, function_name, function_name) :: {own :: keyword, others :: keyword}
  def split!(options, function, other) do
    schema = Map.fetch!(@functions, function)

    options
    |> checked!(schema ++ Map.fetch!(@functions, other), function)
    |> Keyword.split(Enum.map(schema, &elem(&1, 0)))
  end

  @doc "The options of a function as a Markdown list."
  @spec docs(function_name) :: String.t()
  def docs(function) do
    Enum.map_join(Map.fetch!(@functions, function), "\n", fn {name, type, default, meaning} ->
      "* `:#{name}`: #{meaning}; #{describe(type)}#{default_text(default)}."
    end)
  end

  defp defaults(schema),
    do: for({name, _, default, _} <- schema, default not in [:none, :required], do: {name, default})

  defp default_text(:none), do: ""
  defp default_text(:required), do: " (required)"
  defp default_text(default), do: " (default: `#{inspect(default)}`)"

  defp check!({option, value}, schema, function) do
    case List.keyfind(schema, option, 0) do
      nil ->
        known = Enum.map_join(schema, ", ", &inspect(elem(&1, 0)))
        raise ArgumentError, "option #{inspect(option)} is not known to #{name(function)}; known: #{known}"

      {_, type, _, _} ->
        unless fits?(type, value) do
          refuse("option #{inspect(option)} of #{name(function)} must be #{describe(type)}", value)
        end
    end
  end

  defp given!({option, type, :required, _}, options, function) do
    unless Keyword.has_key?(options, option),
      do:
        raise(ArgumentError, "option #{inspect(option)} of #{name(function)} is required: #{describe(type)}")
  end

  defp given!(_optional, _options, _function), do: :ok

  defp together!({option, other}, options, function) do
    if Keyword.has_key?(options, option) and not Keyword.has_key?(options, other),
      do: raise(ArgumentError, "option #{inspect(option)} of #{name(function)} needs #{inspect(other)}")
  end

  defp apart!({option, other}, options, function) do
    if Keyword.has_key?(options, option) and Keyword.has_key?(options, other),
      do:
        raise(
          ArgumentError,
          "options #{inspect(option)} and #{inspect(other)} of #{name(function)} do not go together"
        )
  end

  defp refuse(text, value), do: raise(ArgumentError, "#{text}; got: #{inspect(value)}")

  defp name(function), do: "DemandPort.#{function}"

  defp fits?(:any, _value), do: true
  defp fits?(:name, {:global, _name}), do: true
  defp fits?(:name, {:via, module, _name}), do: is_atom(module)
  defp fits?(:name, value), do: is_atom(value) and value not in [true, false, :undefined]
  defp fits?(:string, value), do: is_binary(value) and value != "" and String.valid?(value)
  defp fits?(:atom, value), do: is_atom(value) and value not in [nil, true, false]
  defp fits?(:keywords, value), do: Keyword.keyword?(value)
  defp fits?(:pids, [_ | _] = values), do: Enum.all?(values, &is_pid/1)
  defp fits?(:pids, value), do: is_pid(value)
  defp fits?(:boolean, value), do: is_boolean(value)
  defp fits?(:any_integer, value), do: is_integer(value)
  defp fits?({:integer, least}, value), do: is_integer(value) and value >= least
  defp fits?(:timeout, value), do: value == :infinity or (is_integer(value) and value >= 0)
  defp fits?(:credit, value), do: value == :infinity or (is_integer(value) and value >= 0)
  defp fits?({:in, choices}, value), do: value in choices
  defp fits?({:function, arity}, value), do: is_function(value, arity)
  defp fits?({:list, type}, value), do: is_list(value) and Enum.all?(value, &fits?(type, &1))
  defp fits?(:pid, value), do: is_pid(value)
  defp fits?(:filter, value), do: is_nil(value) or is_binary(value) or is_map(value)
  defp fits?(:position, {x, y}), do: is_number(x) and is_number(y)
  defp fits?(:position, _value), do: false
  defp fits?({:within, least, most}, value), do: is_integer(value) and value in least..most
  defp fits?({:or, type, choices}, value), do: value in choices or fits?(type, value)
  defp fits?(:receivers, [_ | _] = values), do: Enum.all?(values, &fits?(:receiver, &1))
  defp fits?(:receivers, value), do: fits?(:receiver, value)
  defp fits?(:owner, value), do: is_pid(value) or value == :none
  defp fits?(:broadcast, value), do: DemandPort.Broadcaster.valid?(value)
  defp fits?(:host, {module, _arg}), do: fits?(:host, module)

  defp fits?(:host, module),
    do: is_atom(module) and module not in [nil, true, false] and DemandPort.Host.valid?(module)

  defp fits?(:claims, value),
    do: value == :all or (is_list(value) and Enum.all?(value, &(is_binary(&1) or is_map(&1))))

  defp fits?(:receiver, {name, node}), do: is_atom(name) and is_atom(node)
  defp fits?(:receiver, value), do: is_pid(value) or (is_atom(value) and value not in [nil, true, false])
  defp fits?(:env, value) when is_list(value) or is_map(value), do: Enum.all?(value, &variable?/1)
  defp fits?(:env, _value), do: false

  defp variable?({name, value}) when is_binary(name) and name != "", do: is_binary(value) or is_nil(value)
  defp variable?(_), do: false

  defp describe(:any), do: "any term"
  defp describe(:name), do: "an atom, {:global, term} or {:via, module, term}"
  defp describe(:string), do: "a non-empty string"
  defp describe(:atom), do: "a name (an atom)"
  defp describe(:keywords), do: "a keyword list"
  defp describe(:pids), do: "a pid, or a list of them"
  defp describe(:boolean), do: "true or false"
  defp describe(:any_integer), do: "an integer"
  defp describe({:integer, least}), do: "an integer from #{least}"
  defp describe(:timeout), do: "milliseconds from 0, or :infinity"
  defp describe(:credit), do: "an integer from 0, or :infinity"
  defp describe({:in, choices}), do: "one of " <> Enum.map_join(choices, ", ", &inspect/1)
  defp describe({:function, arity}), do: "a function of #{arity} arguments"
  defp describe({:list, type}), do: "a list, each item #{describe(type)}"
  defp describe(:pid), do: "a pid"
  defp describe(:filter), do: "nil, a string or a map"
  defp describe(:position), do: "two numbers, {x, y}"
  defp describe({:within, least, most}), do: "an integer from #{least} to #{most}"

  defp describe({:or, type, choices}),
    do: describe(type) <> ", or " <> Enum.map_join(choices, ", ", &inspect/1)

  defp describe(:receivers), do: "a pid, a registered name, {name, node}, or a list of them"
  defp describe(:owner), do: "a pid, or :none"
  defp describe(:broadcast), do: "{adapter, server, topic} with an adapter that has broadcast/3, or Registry"
  defp describe(:host), do: "a module with handle_node/3, handle_tool/3 or handle_search/3, or {module, arg}"
  defp describe(:claims), do: "a list of names and descriptors, or :all"
  defp describe(:receiver), do: "a pid, a registered name, or {name, node}"
  defp describe(:env), do: "a list or map of names (strings) to values (strings, or nil)"
end
