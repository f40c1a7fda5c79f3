defmodule DemandPort.Pool do
  @moduledoc """
  Several services on one machine, as one supervisor.

      children = [{DemandPort.Pool, name: MyApp.Ports, size: 4}]

      {:ok, session} = DemandPort.Pool.open(MyApp.Ports, graph)
      {:ok, outputs} = DemandPort.demand(session, "answer")

  A session is opened on one member and stays there: the `DemandPort.Session` names it, so every function of `DemandPort`
  takes it. The member is the one with the fewest open demands and sessions, by index where several have as few. One
  that does not answer, or has no service just now, is not chosen while there is another.

  For a graph that is wanted once, `run/4` opens, demands and closes.

      name.Supervisor
      ├─ name.Leases   a process for each session that `run/4` has open
      ├─ name          chooses
      └─ name.1 …      the members, connections as `DemandPort.start_link/1` starts them

  A service that ends is started again by its connection, and a connection that gives up by the supervisor. What ran there
  ends with `:backend_unavailable`; the other members notice nothing.

  Each member is a service of its own: models are loaded by each that uses them, and what a session has cached is known
  to its member alone. One service runs as many sessions as memory allows, on all cores where nodes compute in workers; a
  pool is for more than one event loop, and for crashes that shall hit a part.
  """

  alias DemandPort.{Error, Graph, Lease, Load, Options, Session}
  alias DemandPort.Pool.Roster

  @typedoc "The name that the pool was started with."
  @type t :: atom

  @doc """
  A child specification for a supervisor; the options are those of `start_link/1`.

      iex> DemandPort.Pool.child_spec(name: MyApp.Ports).id
      MyApp.Ports
  """
  @spec child_spec(keyword) :: Supervisor.child_spec()
  def child_spec(options) do
    %{
      id: Keyword.get(options, :name, __MODULE__),
      start: {__MODULE__, :start_link, [options]},
      type: :supervisor
    }
  end

  @doc """
  Starts the pool. Returns at once: sessions are opened when their services are ready.

  All other options are those of `DemandPort.start_link/1`, for every member. `Supervisor.stop/1` of the pid that this
  returns ends the pool; the pool's name is only the process that chooses.

  #{Options.docs(:"Pool.start_link")}
  """
  @spec start_link(keyword) :: Supervisor.on_start()
  def start_link(options) do
    {own, shared} = Options.split!(options, :"Pool.start_link", :start_link)
    members = for index <- 1..own[:size], do: Module.concat(own[:name], "#{index}")

    children = [
      {Task.Supervisor, name: leases(own[:name])},
      {Roster, name: own[:name], members: members}
      | Enum.map(members, &{DemandPort, Keyword.put(shared, :name, &1)})
    ]

    # Each member may be restarted as often as if it were alone.
    name = Module.concat(own[:name], "Supervisor")
    Supervisor.start_link(children, strategy: :one_for_one, max_restarts: 3 * own[:size], name: name)
  end

  @doc "The members' names, by index; each is a port for the functions of `DemandPort`."
  @spec members(t) :: [atom] | {:error, Error.t()}
  def members(pool), do: with({:ok, members} <- Roster.members(pool), do: members)

  @doc """
  What the members know of themselves, by index: `DemandPort.info/1` of each, or its error.

  #{Options.docs(:"Pool.info")}
  """
  @spec info(t, keyword) :: [{member :: atom, {:ok, map} | {:error, Error.t()}}] | {:error, Error.t()}
  def info(pool, options \\ []) do
    options = Options.validate!(options, :"Pool.info")

    with {:ok, members} <- Roster.members(pool) do
      for member <- members, do: {member, DemandPort.info(member, options)}
    end
  end

  @doc """
  Opens a graph on the member that has least to do. Arguments, result and options are those of `DemandPort.open/3`.
  """
  @spec open(t, map | Graph.t() | Path.t(), keyword) :: {:ok, Session.t()} | {:error, Error.t()}
  def open(pool, graph, options \\ []) do
    on_member(pool, &DemandPort.open(&1, graph, options))
  end

  @doc """
  Opens a graph, demands a node of it, waits for the outputs, and closes it. Leaves no message behind.

  When the caller dies, the demand is cancelled and the session closed. A restart of the pool does not disturb it.
  The options are those of `DemandPort.demand/3`, and

  #{Options.docs(:"Pool.run")}
  """
  @spec run(t, map | Graph.t() | Path.t(), String.t(), keyword) ::
          {:ok, DemandPort.outputs()} | {:error, Error.t()}
  def run(pool, graph, node, options \\ []) do
    {own, demand} = Options.split!(options, :"Pool.run", :demand)
    opening = Options.validate!(own[:open], :open)

    with {:ok, graph} <- Graph.to_wire(graph),
         {:ok, session, lease} <- on_member(pool, &Lease.open(leases(pool), &1, graph, opening, self())) do
      try do
        DemandPort.demand(session, node, demand)
      after
        Lease.release(lease)
      end
    end
  end

  @doc """
  Starts new services in the place of the members', one after the other, losing nothing: each finishes what it runs, and
  gets no new sessions meanwhile. Returns once the last is ready, or at the first error.

  Sessions stay if they were opened with `restore: true`, as by `DemandPort.restart/2`. A second restart meanwhile is
  refused with `:draining`. When the caller dies, the member in hand is finished and the others stay as they are.

  #{Options.docs(:restart)}
  """
  @spec restart(t, keyword) :: :ok | {:error, Error.t()}
  def restart(pool, options \\ []) do
    options = Options.validate!(options, :restart)

    with {:ok, members} <- Roster.members(pool) do
      Enum.reduce_while(members, :ok, fn member, :ok ->
        case restart_member(pool, member, options) do
          :ok -> {:cont, :ok}
          {:error, error} -> {:halt, {:error, error}}
        end
      end)
    end
  end

  defp restart_member(pool, member, options) do
    with {:ok, hold} <- Roster.hold(pool, member) do
      try do
        DemandPort.restart(member, options)
      after
        Roster.release(pool, hold)
      end
    end
  end

  defp on_member(pool, open) do
    with {:ok, member, promise} <- Roster.take(pool) do
      try do
        open.(member)
      after
        Roster.opened(pool, promise)
      end
    end
  end

  @doc "The load of each member that answers, as the choice sees it: open demands, sessions and requests."
  @spec loads(t) :: [{member :: atom, Load.t()}] | {:error, Error.t()}
  def loads(pool), do: with({:ok, members} <- Roster.members(pool), do: Load.of(members, 1_000))

  defp leases(pool), do: Module.concat(pool, "Leases")
end
