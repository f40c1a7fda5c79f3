# What a hop of Erlang distribution costs, and what a choice in a cluster does: two nodes and two services on this machine,
# one of each for either side, measured by turns in one run.
#
#     MIX_ENV=test mix run bench/cluster.exs
#
# Prints the table of docs/scaling.md. It takes half a minute, and an epmd.

Code.require_file("hop.exs", __DIR__)

defmodule Bench.Cluster do
  import Bench.Hop

  alias DemandPort.Lease
  alias DemandPort.Test.Peers

  @rounds 5
  @scope :bench_cluster
  @port :bench_cluster_port

  def scope, do: @scope
  def port, do: @port

  @doc "Rates of here and there, each the median of rounds taken by turns."
  def rates(here, there, rate) do
    {here, there} = Enum.unzip(for _ <- 1..@rounds, do: {rate.(here), rate.(there)})
    {median(here), median(there)}
  end

  def once({server, leases}) do
    {:ok, session, lease} = Lease.open(leases, server, graph(), [], self())
    {:ok, _} = DemandPort.demand(session, "out")
    Lease.release(lease)
  end

  @doc "A process that answers as an idle connection would."
  def stand_in do
    receive do
      {:"$gen_call", from, :info} ->
        :gen.reply(from, {:ok, %{open_demands: 0, open_sessions: 0, open_requests: 0, os_pid: 1}})
        stand_in()
    end
  end

  @doc "Milliseconds from the kill of a node to the error of a demand there, at its caller."
  def kill(start) do
    peer = start.()
    {:ok, session} = DemandPort.open({@port, peer.node}, %{nodes: [], edges: []})
    {:ok, _} = DemandPort.demand_async(session, "never")
    receive do: ({:node_stream, _, _} -> :ok)

    ns =
      time(fn ->
        Peers.kill(peer)
        receive do: ({:demand_error, _, %{code: :backend_unavailable}} -> :ok)
      end)

    ns / 1.0e6
  end

  @doc "Sessions on the fullest of so many ports, with ten for each, when the emptiest of those asked gets the next."
  def fullest(ports, ask) do
    ports
    |> fill(ask, 10 * ports, :counters.new(ports, []))
    |> then(fn counters -> Enum.max(for port <- 1..ports, do: :counters.get(counters, port)) end)
  end

  defp fill(_ports, _ask, 0, counters), do: counters

  defp fill(ports, ask, left, counters) do
    asked = for _ <- 1..ask, do: :rand.uniform(ports)
    :counters.add(counters, Enum.min_by(asked, &:counters.get(counters, &1)), 1)
    fill(ports, ask, left - 1, counters)
  end

  def compare(name, {here, there}),
    do: row([name, whole(here) <> "/s", whole(there) <> "/s", Float.round(there / here, 2)])

  def us(count, work), do: "#{Float.round(median(each_us(count, work)) * 1.0, 1)} µs"
end

defmodule Bench.Cluster.Main do
  import Bench.{Cluster, Hop}

  alias DemandPort.Cluster
  alias DemandPort.Test.{Peers, Services}

  def main do
    Logger.configure(level: :none)
    :ok = Peers.start_distribution()
    folder = node_types()
    options = [name: port(), env: [{"PYTHONPATH", folder}], log_level: :none]
    member = [scope: scope(), ports: [port()], refresh_ms: :infinity]

    {:ok, _} = Supervisor.start_link([{DemandPort, options}, {Cluster, member}], strategy: :one_for_one)
    peer = Peers.start(:bench)
    Peers.keep(peer, [{DemandPort, options}, {Cluster, member}])
    true = Services.eventually(fn -> length(Cluster.members(scope())) == 2 end, 10_000)
    server = Enum.find(Cluster.members(scope()), &(node(&1) == peer.node))
    {:ok, here} = DemandPort.open(port(), graph())
    {:ok, there} = DemandPort.open(server, graph())

    head(["what", "on this node", "one hop away", "ratio"])
    compare("demands one after another", rates(here, there, &one_by_one(&1, 5_000)))
    compare("demands, 256 in flight", rates(here, there, &pipelined(&1, 20_000, 256)))
    compare("chunks of one stream, credit 64", rates(here, there, &flood(&1, 50_000, 64)))
    compare("chunks of one stream, credit 1,024", rates(here, there, &flood(&1, 50_000, 1_024)))

    leases = Module.concat(scope(), "Leases")
    near = {Process.whereis(port()), leases}
    far = {server, {leases, peer.node}}
    compare("open, demand, close", rates(near, far, &rate(500, fn -> for(_ <- 1..500, do: once(&1)) end)))

    IO.puts("")
    head(["what", "median"])
    cell = fn name, value -> row([name, value]) end

    cell.(
      "choice of two ports, one of them a hop away",
      us(500, fn -> {:ok, _} = Cluster.choose(scope()) end)
    )

    # Only the table grows; the load is asked of four, whatever its size, and these are on this node.
    table = :bench_cluster_table
    {:ok, _} = Cluster.start_link(scope: table)

    for size <- [10, 1_000, 10_000] do
      new = for _ <- 1..(size - length(Cluster.members(table))), do: spawn(&stand_in/0)
      :ok = :pg.join(Module.concat(table, "Groups"), :ports, new)

      cell.(
        "choice among #{whole(size)} ports, no hop",
        us(200, fn -> {:ok, _} = Cluster.choose(table) end)
      )
    end

    cell.("look at a port's models, nothing changed", us(200, fn -> Cluster.refresh(scope()) end))

    groups = Module.concat(scope(), "Groups")

    change = fn ->
      :ok = :pg.join(groups, {:model, "some-model.gguf"}, Process.whereis(port()))
      :ok = :pg.leave(groups, {:model, "some-model.gguf"}, Process.whereis(port()))
    end

    cell.("a change told to the scope (two of them: a model is loaded, unloaded)", us(200, change))
    message = {:join, self(), {:model, "some-model.gguf"}, self()}
    cell.("size of that message, to each other node", "#{:erlang.external_size(message)} bytes")

    chunk = {make_ref(), {:node_stream, "llm", " token"}}
    cell.("size of a chunk of one token, to the caller's node", "#{:erlang.external_size(chunk)} bytes")

    for ask <- [1, 2, 4] do
      cell.(
        "fullest of 1,000 ports with 10,000 sessions, #{ask} asked (calculated)",
        "#{fullest(1_000, ask)}"
      )
    end

    start = fn ->
      peer = Peers.start(:victim)
      Peers.keep(peer, [{DemandPort, [name: port()] ++ Services.fake_options("")}])
      peer
    end

    cell.(
      "from the kill of a node to the error at a caller",
      "#{Float.round(median(for _ <- 1..9, do: kill(start)), 1)} ms"
    )
  end
end

Bench.Cluster.Main.main()
