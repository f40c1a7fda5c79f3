defmodule DemandPort.Cluster do
  @moduledoc """
  Ports on many nodes, through Erlang distribution and `:pg`: the cluster is the BEAM's own.

      # on each node; one without ports may use those of the others
      children = [
        {DemandPort, name: MyApp.Port},
        {DemandPort.Cluster, scope: MyApp.Cluster, ports: [MyApp.Port], offers: [:gpu]}
      ]

      {:ok, demand} = DemandPort.Cluster.demand_async(MyApp.Cluster, graph, "answer", model: "x", retry: 2)

      {:ok, session} = DemandPort.Cluster.open(MyApp.Cluster, graph, offer: :gpu)
      {:ok, outputs} = DemandPort.demand(session, "answer")

  ## Sessions, and graphs that are wanted once

  `open/3` gives a session on one node, which every function of `DemandPort` takes, on whatever node it is called. It is
  that node's: when the node goes down, what is open ends with `:backend_unavailable`, and the session is gone.

  `demand_async/4`, `run/4` and `stream/4` take the graph itself: they open it where there is least to do, demand, and
  close it. Because all it takes is at hand, they may begin again on another node (`retry`) until the first chunk is
  delivered; after that, a second attempt would say something else from the beginning, so the error is the caller's.

  ## How it ends

  Exactly one terminal message, whatever dies: `DemandPort.Relay` watches the connection from the caller's node. A node
  that goes down, or is disconnected, ends its demands at once with `:backend_unavailable` (retryable), and when it is the
  caller's node that is gone, the demand is cancelled and a session of `demand_async/4` closed. A machine that
  vanishes without closing its connections is noticed by the distribution after `net_ticktime` (kernel's, a minute by
  default). Nodes that lost each other are members again once they are connected again, which is not this module's to do.

  ## Who is chosen

  Nothing is published periodically between nodes. Which ports there are, what they offer and which models they have loaded
  are groups of `:pg`, that travel when they change. The load is asked for when it is needed: of at most `ask` ports, taken
  at random, all at once; the one with the fewest open demands, sessions and requests is chosen, one on this node among
  equals. So a choice costs the same however many nodes there are, and is never older than its answer. docs/scaling.md
  has figures and limits. All nodes run one version of this library.
  """

  alias DemandPort.{
    Connection,
    Delivery,
    Demand,
    Error,
    Graph,
    Inbox,
    Lease,
    Load,
    Options,
    Pool,
    Relay,
    Session
  }

  alias DemandPort.Cluster.Member

  @typedoc "The name of the scope that the nodes share."
  @type scope :: atom

  # Longest that the member waits for its own ports to say which models they have.
  @models_ms 1_000

  @doc """
  A child specification for a supervisor; the options are those of `start_link/1`.

      iex> DemandPort.Cluster.child_spec(scope: MyApp.Cluster).id
      MyApp.Cluster
  """
  @spec child_spec(keyword) :: Supervisor.child_spec()
  def child_spec(options) do
    %{
      id: Keyword.get(options, :scope, __MODULE__),
      start: {__MODULE__, :start_link, [options]},
      type: :supervisor
    }
  end

  @doc """
  Joins this node to the scope, with the ports that it offers, if any. Start it after them.

  #{Options.docs(:"Cluster.start_link")}
  """
  @spec start_link(keyword) :: Supervisor.on_start()
  def start_link(options) do
    options = Options.validate!(options, :"Cluster.start_link")

    with {:ok, ports} <- ports(options), do: start_link(options, ports)
  end

  defp ports(options) do
    case options[:pool] && Pool.members(options[:pool]) do
      nil -> {:ok, options[:ports]}
      {:error, error} -> {:error, error}
      members -> {:ok, options[:ports] ++ members}
    end
  end

  defp start_link(options, ports) do
    scope = options[:scope]
    member = Keyword.take(options, [:scope, :offers, :refresh_ms])

    # Without the scope's process, the groups are empty: the member joins again after it. What is open stays.
    children = [
      {Task.Supervisor, name: leases(scope)},
      %{id: :pg, start: {:pg, :start_link, [groups(scope)]}},
      {Member, member ++ [groups: groups(scope), ports: ports, timeout: @models_ms]}
    ]

    Supervisor.start_link(children, strategy: :rest_for_one, name: Module.concat(scope, "Supervisor"))
  end

  @doc """
  Looks now which ports this node has and which models they have loaded, and tells the others; also happens every
  `refresh_ms`. Worth a call after `DemandPort.load_model/3`.
  """
  @spec refresh(scope) :: :ok
  def refresh(scope), do: Member.refresh(scope)

  @doc """
  The ports of the cluster that this node knows of, as pids; `model` and `offer` leave only those that have it.
  Asks nobody.
  """
  @spec members(scope, keyword) :: [pid]
  def members(scope, options \\ []) do
    options = Options.validate!(options, :"Cluster.choose")
    if options[:model], do: loaded(scope, options), else: offering(scope, options)
  end

  @doc """
  The port with the least to do: a pid that `DemandPort.open/3` and its like take. Waits for an answer, at most
  `answer_ms`, or as often as no asked one answers; `:backend_unavailable` when there is none.

  #{Options.docs(:"Cluster.choose")}
  """
  @spec choose(scope, keyword) :: {:ok, pid} | {:error, Error.t()}
  def choose(scope, options \\ []), do: choose(scope, Options.validate!(options, :"Cluster.choose"), [])

  @doc """
  Opens a graph on the port with the least to do. The options are those of `DemandPort.open/3` and of `choose/2`.

  A file is read here; a `host` module runs on the node of the port. The session stays until it is closed, also when
  this node is gone.
  """
  @spec open(scope, map | Graph.t() | Path.t(), keyword) :: {:ok, Session.t()} | {:error, Error.t()}
  def open(scope, graph, options \\ []) do
    {choice, opening} = Options.split!(options, :"Cluster.choose", :open)

    with {:ok, graph} <- Graph.to_wire(graph),
         {:ok, server} <- choose(scope, choice, []),
         do: DemandPort.open(server, graph, opening)
  end

  @doc """
  Opens a graph on the port with the least to do, demands a node of it, and closes it at the end. Returns at once; the
  messages are those of `DemandPort.demand_async/3`, and every failure is a `:demand_error`.

  `DemandPort.cancel/1` cancels it. It is cancelled when its last receiver dies. Each attempt has the whole `deadline_ms`.

  #{Options.docs(:"Cluster.demand_async")}
  """
  @spec demand_async(scope, map | Graph.t() | Path.t(), String.t(), keyword) ::
          {:ok, Demand.t()} | {:error, Error.t()}
  def demand_async(scope, graph, node, options \\ []) when is_binary(node) do
    options = validated(options, :"Cluster.demand_async")
    to = options |> Keyword.get(:to, self()) |> List.wrap()
    delivery = %{delivery(node, options) | to: to, watch: to}

    with {:ok, relay} <- start(scope, graph, delivery, options),
         do: {:ok, %Demand{server: relay, session: delivery.session, node: node, ref: delivery.ref}}
  end

  @doc """
  As `demand_async/4`, but waits for the outputs. Leaves no message behind.

  #{Options.docs(:"Cluster.run")}
  """
  @spec run(scope, map | Graph.t() | Path.t(), String.t(), keyword) ::
          {:ok, DemandPort.outputs()} | {:error, Error.t()}
  def run(scope, graph, node, options \\ []) when is_binary(node) do
    options = validated(options, :"Cluster.run")
    begin = &begin(scope, graph, &1, options)
    Inbox.outputs(delivery(node, options), begin, options[:on_stream], options[:timeout])
  end

  @doc """
  A demand as a lazy stream of its chunks: as `DemandPort.stream/3`, of a graph that is opened where there is least to do
  each time the stream is enumerated. An error is raised as `DemandPort.Error`; to halt early cancels.

  #{Options.docs(:"Cluster.stream")}
  """
  @spec stream(scope, map | Graph.t() | Path.t(), String.t(), keyword) :: Enumerable.t()
  def stream(scope, graph, node, options \\ []) when is_binary(node) do
    options = validated(options, :"Cluster.stream")
    Inbox.stream(delivery(node, options), &begin(scope, graph, &1, options), options)
  end

  ## A graph that is wanted once

  defp validated(options, function) do
    options |> Options.validate!(function) |> Keyword.update!(:open, &Options.validate!(&1, :open))
  end

  # The session's name is found where it is opened.
  defp delivery(node, options), do: Delivery.new("", node, options)

  # Its relay is on this node.
  defp begin(scope, graph, delivery, options) do
    with {:ok, relay} <- start(scope, graph, delivery, options), do: {:ok, relay, Process.monitor(relay)}
  end

  defp start(scope, graph, delivery, options) do
    choice = Keyword.take(options, [:model, :offer, :ask, :answer_ms])

    with {:ok, graph} <- Graph.to_wire(graph) do
      {:ok, Relay.start(delivery, &open_for(scope, graph, choice, options[:open], &1, &2), options[:retry])}
    end
  end

  # Runs in a process of the relay.
  defp open_for(scope, graph, choice, opening, owner, tried) do
    with {:ok, server} <- choose(scope, choice, tried) do
      case Lease.open({leases(scope), node(server)}, server, graph, opening, owner) do
        {:ok, session, lease} -> {:ok, session, fn -> Lease.release(lease) end}
        {:error, error} -> {:error, error, [server]}
      end
    else
      {:error, error} -> {:error, error, []}
    end
  end

  ## The choice

  # First among those that have the model, then among the others.
  defp choose(scope, options, tried) do
    loaded = loaded(scope, options) -- tried

    least(loaded, options) || least((offering(scope, options) -- tried) -- loaded, options) ||
      nobody(scope, options)
  end

  defp loaded(scope, options) do
    case options[:model] do
      nil -> []
      model -> scope |> groups() |> :pg.get_members({:model, model}) |> among(scope, options)
    end
  end

  # Whoever has a model is a port of the cluster.
  defp among(pids, scope, options) do
    if Keyword.has_key?(options, :offer) and pids != [] do
      offering = MapSet.new(offering(scope, options))
      Enum.filter(pids, &(&1 in offering))
    else
      pids
    end
  end

  defp offering(scope, options) do
    case Keyword.fetch(options, :offer) do
      {:ok, offer} -> :pg.get_members(groups(scope), {:offer, offer})
      :error -> :pg.get_members(groups(scope), :ports)
    end
  end

  # As many as are asked, until one has answered.
  defp least([], _options), do: nil

  defp least(pids, options) do
    asked = Enum.take_random(pids, options[:ask])

    case Load.of(asked, options[:answer_ms]) do
      [] -> least(pids -- asked, options)
      loads -> {:ok, loads |> Enum.min_by(&preference/1) |> elem(0)}
    end
  end

  # They come in random order, which decides among those that are equal in all.
  defp preference({pid, load}), do: {Load.weight(load), node(pid) != node()}

  defp nobody(scope, options) do
    offer = if Keyword.has_key?(options, :offer), do: " that offers #{inspect(options[:offer])}", else: ""
    {:error, Connection.unavailable("no port#{offer} in the cluster #{inspect(scope)} answers")}
  end

  defp leases(scope), do: Module.concat(scope, "Leases")
  # The scope of :pg. The cluster's own name is its member's.
  defp groups(scope), do: Module.concat(scope, "Groups")
end
