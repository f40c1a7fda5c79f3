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

  alias DemandPort.{Connection, Delivery, Demand, Error, Graph, Lease, Load, Options, Pool, Relay, Session}
  alias DemandPort.Cluster.{Inbox, Member}

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
    scope = options[:scope]
    pooled = if options[:pool], do: Pool.members(options[:pool]), else: []
    member = Keyword.take(options, [:scope, :offers, :refresh_ms])

    # Without the scope's process, the groups are empty: the member joins again after it. What is open stays.
    children = [
      {Task.Supervisor, name: leases(scope)},
      %{id: :pg, start: {:pg, :start_link, [scope]}},
      {Member, member ++ [name: member(scope), ports: options[:ports] ++ pooled, timeout: @models_ms]}
    ]

    Supervisor.start_link(children, strategy: :rest_for_one, name: Module.concat(scope, "Supervisor"))
  end

  @doc """
  Looks now which ports this node has and which models they have loaded, and tells the others; also happens every
  `refresh_ms`. Worth a call after `DemandPort.load_model/3`.
  """
  @spec refresh(scope) :: :ok
  def refresh(scope), do: Member.refresh(member(scope))

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
    options = Options.validate!(options, :"Cluster.demand_async")
    with {:ok, graph} <- Graph.to_wire(graph), do: {:ok, start(scope, graph, node, options)}
  end

  @doc """
  As `demand_async/4`, but waits for the outputs. Leaves no message behind.

  #{Options.docs(:"Cluster.run")}
  """
  @spec run(scope, map | Graph.t() | Path.t(), String.t(), keyword) ::
          {:ok, DemandPort.outputs()} | {:error, Error.t()}
  def run(scope, graph, node, options \\ []) when is_binary(node) do
    options = Options.validate!(options, :"Cluster.run")
    credit = if options[:on_stream], do: 64, else: 0

    with {:ok, graph} <- Graph.to_wire(graph) do
      inbox = Inbox.open(&start(scope, graph, node, options ++ [credit: credit, tag: &1]))
      Inbox.outputs(inbox, options[:on_stream] || fn _node, _chunk -> :ok end, options[:timeout])
    end
  end

  @doc """
  A demand as a lazy stream of its chunks: as `DemandPort.stream/3`, of a graph that is opened where there is least to do
  each time the stream is enumerated. An error is raised as `DemandPort.Error`; to halt early cancels.

  #{Options.docs(:"Cluster.stream")}
  """
  @spec stream(scope, map | Graph.t() | Path.t(), String.t(), keyword) :: Enumerable.t()
  def stream(scope, graph, node, options \\ []) when is_binary(node) do
    options = Options.validate!(options, :"Cluster.stream")

    Stream.resource(
      fn ->
        case Graph.to_wire(graph) do
          {:ok, graph} -> Inbox.open(&start(scope, graph, node, options ++ [tag: &1]))
          {:error, error} -> raise error
        end
      end,
      &Inbox.chunks(&1, options[:timeout]),
      &Inbox.close/1
    )
  end

  ## A graph that is wanted once

  defp start(scope, graph, node, options) do
    delivery = delivery(node, options)
    choice = Keyword.take(options, [:model, :offer, :ask, :answer_ms])
    opening = Options.validate!(options[:open], :open)
    relay = Relay.start(delivery, &open_for(scope, graph, choice, opening, &1, &2), options[:retry])
    %Demand{server: relay, session: delivery.session, node: node, ref: delivery.ref}
  end

  @sent ~w(deadline_ms priority coalesce_ms coalesce_bytes)a

  defp delivery(node, options) do
    to = options |> Keyword.get(:to, self()) |> List.wrap()

    %Delivery{
      ref: make_ref(),
      # Its name is found where it is opened.
      session: "",
      node: node,
      options:
        for({name, value} <- Keyword.take(options, @sent), into: %{}, do: {Atom.to_string(name), value}),
      window: options[:credit],
      to: to,
      watch: to,
      tag: if(Keyword.has_key?(options, :tag), do: {:tag, options[:tag]}, else: :untagged)
    }
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
      model -> scope |> :pg.get_members({:model, model}) |> among(scope, options)
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
      {:ok, offer} -> :pg.get_members(scope, {:offer, offer})
      :error -> :pg.get_members(scope, :ports)
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
  defp member(scope), do: Module.concat(scope, "Member")
end
