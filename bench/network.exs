# Demands between hosts, through a network with delay and loss; hosts that die, and cables that are cut. The hosts are
# network namespaces of this machine with a BEAM and a service each; bench/network.py carries their packets.
#
#     MIX_ENV=test mix run bench/network.exs [PART…]
#
# Prints the tables of docs/scaling.md, in about three minutes; the parts are delay, loss, cluster and topology. Needs
# Linux, root and iproute2. To end it early, press Ctrl-C twice: nothing is left running.

Code.require_file("hosts.exs", __DIR__)
code = Enum.flat_map(["hop.exs", "host.exs"], &Code.compile_file(&1, __DIR__))

defmodule Bench.Network do
  @moduledoc "What all parts use."

  alias Bench.{Host, Hosts}
  alias DemandPort.Test.Peers

  # The recommendation of docs/scaling.md.
  @ticks [~c"-kernel", ~c"net_ticktime", ~c"8"]

  @doc "A BEAM on a host, with the benchmark's code and these children."
  def start(net, host, children, flags \\ []) do
    peer = Hosts.start(net.hosts, host, @ticks ++ flags)

    for {module, binary} <- net.code,
        do: {:module, _} = Peers.call(peer, :code, :load_binary, [module, ~c"bench", binary])

    Peers.keep(peer, children)
    peer
  end

  def with_port(net, host, flags \\ []), do: start(net, host, Host.children(host, net.folder), flags)

  def on(peer, function, arguments \\ []), do: Peers.call(peer, Host, function, arguments)

  @doc "The same on all, at the same time."
  def everywhere(peers, module \\ Host, function, arguments) do
    peers
    |> Task.async_stream(&Peers.call(&1, module, function, arguments), max_concurrency: 32, timeout: :infinity)
    |> Enum.map(fn {:ok, result} -> result end)
  end

  @doc "A row of what was seen."
  def say(what, seen), do: Bench.Hop.row([what, seen])

  def connect(peer, others),
    do: for(other <- others, do: true = Peers.call(peer, Node, :connect, [other.node]))
end

defmodule Bench.Network.Delay do
  @moduledoc "A port one hop away, through cables of several lengths."

  import Bench.Hop
  import Bench.Network

  alias Bench.Hosts

  @delays_ms [0, 0.25, 2, 20]
  @rounds 3

  def main(net, [here, there]) do
    for peer <- [here, there], do: :ok = on(peer, :echo, [peer.address])
    columns = [measured(net, 0, here, here) | for(ms <- @delays_ms, do: measured(net, ms, here, there))]

    head(["one way", "same host" | for(ms <- @delays_ms, do: "#{ms} ms")])
    figure("round trip of the cable (TCP)", columns, &us(&1.cable))
    figure("a demand and its answer", columns, &trips(&1, &1.demand))
    figure("open, demand, close", columns, &trips(&1, &1.opened))
    figure("`Cluster.run/4`", columns, &trips(&1, &1.run))
    figure("from `cancel/1` to the end of a stream", columns, &trips(&1, &1.cancel))
    figure("demands, 256 in flight", columns, &share(&1, &1.in_flight, 256))
    figure("chunks of one stream, credit 64", columns, &share(&1, &1.credit_64, 64))
    figure("chunks of one stream, credit 1,024", columns, &share(&1, &1.credit_1024, 1_024))
    figure("packaged model, first chunk", columns, &us(&1.first_token))
    figure("packaged model, all 100 tokens", columns, &us(&1.all_tokens))
  end

  defp measured(net, ms, here, there) do
    Hosts.link(net.hosts, ms)
    rounds = for _ <- 1..@rounds, do: on(here, :round, [Map.take(there, [:host, :address])])
    Map.new(hd(rounds), fn {name, _} -> {name, median(Enum.map(rounds, & &1[name]))} end)
  end

  defp figure(name, columns, cell), do: row([name | Enum.map(columns, cell)])

  defp us(us) when us < 1_000, do: "#{round(us)} µs"
  defp us(us), do: "#{Float.round(us / 1_000, 1)} ms"

  # In brackets, where the way is long enough to decide: how many round trips; how much of a window each round trip.
  defp trips(figures, us), do: us(us) <> part(figures, us / figures.cable, 1)

  defp share(figures, rate, window),
    do: "#{whole(rate)}/s" <> part(figures, rate * figures.cable / (window * 1.0e6), 2)

  defp part(%{cable: us}, value, digits), do: if(us < 300, do: "", else: " (#{Float.round(value, digits)})")
end

defmodule Bench.Network.Loss do
  @moduledoc "Packets that are lost: nothing is lost for those who demand, but the time until it is sent again."

  import Bench.Hop
  import Bench.Network

  alias Bench.Hosts

  @counts %{alone: 500, in_flight: 5_000, chunks: 20_000}
  @cases [
    {"2 ms", 2, []},
    {"2 ms, 0.1 % lost", 2, [loss: 0.001]},
    {"2 ms, 1 % lost", 2, [loss: 0.01]},
    {"20 ms and up to 5 more, 1 % lost", 20, [loss: 0.01, jitter_ms: 5]}
  ]

  def main(net, [here, there]) do
    head(["one way", "demand, median", "99th of 100", "longest", "256 in flight", "chunks, credit 1,024"])

    for {name, ms, options} <- @cases do
      Hosts.link(net.hosts, ms, options)
      counts = if ms > 10, do: Map.new(@counts, fn {name, count} -> {name, div(count, 5)} end), else: @counts
      found = on(here, :bulk, [there.host, counts])
      times = for part <- [50, 99, 100], do: "#{Float.round(percentile(found.us, part) / 1_000, 1)} ms"
      row([name] ++ times ++ ["#{whole(found.in_flight)}/s", "#{whole(found.stream)}/s"])
    end
  end
end

defmodule Bench.Network.Cluster do
  @moduledoc "Hosts that each have a stream from each of the others, while one dies, and cables are cut."

  import Bench.Hop
  import Bench.Network

  alias Bench.{Host, Hosts, Watch}
  alias DemandPort.Test.Peers

  @hosts 8
  @delay_ms 0.25
  # No port of its own, and no part of the mesh.
  @outside 9

  def main(net, [first | _] = two) do
    Hosts.link(net.hosts, @delay_ms)
    peers = two ++ for host <- 3..@hosts, do: with_port(net, host)
    outside = start(net, @outside, [Watch], ['-hidden'])
    head(["what", "seen"])

    begun = Host.now()
    connect(first, tl(peers))
    say("#{@hosts - 2} hosts join two: until all know all ports", last(begun, all_known(peers)))
    spread(peers)

    for peer <- peers, do: watch(peer, peers -- [peer])
    all_open(peers, full(@hosts - 1))
    peers = killed(net, peers, outside)
    short_cut(net, peers)
    long_cut(net, peers)
    split(net, peers)
    for peer <- [outside | peers], do: :peer.stop(peer.control)
  end

  ## By least load

  defp spread([first | _] = peers) do
    say("400 sessions, opened one after another: on each port", extent(on(first, :sessions, [400])))
    on(first, :hold, [400])
    say("400 demands, begun at once by one host: on each port", extent(held(peers, 400)))
    let_go(peers, [first])
    everywhere(peers, :hold, [50])
    say("50 demands each, begun at once by all hosts: on each port", extent(held(peers, 400)))
    say("… all callers are killed: until nothing is open", let_go(peers, peers))
  end

  defp held(peers, count) do
    Host.await(fn -> peers |> demands() |> Enum.sum() == count end)
    demands(peers)
  end

  defp demands(peers), do: for(open <- everywhere(peers, :open, []), do: open.demands)
  defp extent(counts), do: "#{Enum.min(counts)} to #{Enum.max(counts)}"

  defp let_go(peers, holders) do
    begun = Host.now()
    everywhere(holders, :let_go, [])
    last(begun, all_open(peers, full(0)))
  end

  ## A host dies

  defp killed(net, peers, outside) do
    {[victim], [first | _] = rest} = Enum.split_with(peers, &(&1.host == 3))
    port = watch_from_outside(outside, victim, rest)
    mark(rest)
    begun = Host.now()
    Peers.kill(victim)
    told(begun, ended(rest, [victim]), "a BEAM is killed: until callers on the other hosts have")
    cleaned = all_open(rest, full(@hosts - 2))
    say("… until the demands it had made are cancelled, their sessions closed", last(begun, cleaned))
    told(begun, Peers.call(outside, Watch, :ended, [[port]]), "… until a caller on the hidden node has")
    others(rest, [victim])

    again = with_port(net, victim.host)
    begun = Host.now()
    connect(again, [first])
    peers = Enum.sort_by([again | rest], & &1.host)
    say("it is started again, and joins: until all know all ports", last(begun, all_known(peers)))
    watched_again(peers, again)
    peers
  end

  defp watched_again(peers, again) do
    watch(again, peers -- [again])
    for peer <- peers -- [again], do: watch(peer, [again])
    all_open(peers, full(@hosts - 1))
  end

  # It asks one node of the mesh for ports, and has a stream from the one that is to be killed.
  defp watch_from_outside(outside, victim, [_, second | _]) do
    choose = fn options ->
      arguments = [second.node, DemandPort.Cluster, :choose, [Host.scope(), options]]
      {:ok, port} = Peers.call(outside, :erpc, :call, arguments)
      port
    end

    chosen = Enum.uniq(for _ <- 1..40, do: choose.([]))
    say("a hidden node asks one of the hosts for a port, 40 times: different ones", length(chosen))
    port = choose.(offer: {:host, victim.host})
    :ok = on(outside, :use_all, [port])
    Peers.call(outside, Watch, :begin, [[port], &Host.kept/1])
    port
  end

  ## Cables

  defp short_cut(net, peers) do
    {[apart], rest} = Enum.split_with(peers, &(&1.host == 5))
    mark(peers)
    Hosts.cut(net.hosts, apart.host)
    Process.sleep(2_000)
    Hosts.mend(net.hosts)
    everywhere(rest, Watch, :go_on, [[apart.host]])
    Peers.call(apart, Watch, :go_on, [hosts(rest)])
    streams = for {ends, stream} <- streams(peers), apart.host in ends, do: stream

    say(
      "a cable is cut for 2 s: longest silence of its #{length(streams)} streams, which go on",
      silence(streams)
    )

    others(rest, [apart])
  end

  defp long_cut(net, peers) do
    {[apart], [first | _] = rest} = Enum.split_with(peers, &(&1.host == 5))
    options = [offer: {:host, apart.host}]
    {:ok, session} = Peers.call(first, DemandPort.Cluster, :open, [Host.scope(), graph(), options])
    mark(peers)
    begun = Host.now()
    Hosts.cut(net.hosts, apart.host)
    meanwhile = on(first, :demands_for, [4_000])
    told(begun, ended(rest, [apart]), "a cable is cut for long: until callers on the other hosts have")
    told(begun, ended([apart], rest), "… until callers on the host behind it have")
    left = all_open([apart], %{full(0) | sessions: 1}) ++ all_open(rest, full(@hosts - 2))
    say("… until nothing is open between them but a session that is to stay", last(begun, left))
    others(rest, [apart])
    meanwhile(meanwhile)

    # Longer than an attempt to connect takes.
    Process.sleep(9_000)
    Hosts.mend(net.hosts)
    Process.sleep(2_000)
    say("it is mended: ports that each host knows 2 s later", known(peers))
    begun = Host.now()
    {:ok, _} = Peers.call(first, DemandPort, :demand, [session, "out"])
    say("… somebody demands of the session that stayed: answered after", ms(Host.now() - begun))
    say("… until all know all ports", last(begun, all_known(peers)))
    :ok = Peers.call(first, DemandPort, :close, [session])
    watched_again(peers, apart)
  end

  # With what `global` does about it by default.
  defp split(net, peers) do
    [_, one, _, other | _] = peers
    begun = Host.now()
    Hosts.cut(net.hosts, [one.host, other.host])
    ended = ended([one], [other]) ++ ended([other], [one])
    told(begun, ended, "the way between two hosts is cut: until callers on both have")
    Process.sleep(1_000)
    streams = streams(peers)

    say(
      "… of all #{length(streams)} streams have ended",
      Enum.count(streams, fn {_ends, stream} -> stream.ended end)
    )

    Hosts.mend(net.hosts)
  end

  defp meanwhile(found) do
    {errors, us} = Enum.split_with(found, &is_atom/1)
    times = Enum.map_join([50, 90, 100], ", ", &ms(percentile(us, &1)))
    say("… until then, demands to the cluster: median, 90th of 100, longest", times)
    say("… of #{length(found)} of these failed", length(errors))
  end

  ## What is known, open, and streaming

  defp all_known(peers), do: everywhere(peers, :await_members, [length(peers)])
  defp known(peers), do: peers |> everywhere(:known, []) |> Enum.join(", ")

  # Of each host, a demand at each of so many others, and one of theirs here.
  defp full(others), do: %{demands: others, sessions: others, leases: others, relays: others}
  defp all_open(peers, what), do: everywhere(peers, :await_open, [what])

  defp watch(peer, others), do: Peers.call(peer, Watch, :begin, [hosts(others), &Host.leased/1])
  defp hosts(peers), do: Enum.map(peers, & &1.host)
  defp mark(peers), do: everywhere(peers, Watch, :mark, [])
  defp ended(callers, others), do: callers |> everywhere(Watch, :ended, [hosts(others)]) |> List.flatten()

  # Each with the hosts at its ends.
  defp streams(peers) do
    for peer <- peers,
        {host, stream} <- Peers.call(peer, Watch, :streams, []),
        do: {[host, peer.host], stream}
  end

  # Those that the fault does not concern.
  defp others(peers, gone) do
    streams = for {[host | _], stream} <- streams(peers), host not in hosts(gone), do: stream
    ended = Enum.count(streams, & &1.ended)
    say("… of the #{length(streams)} other streams ended; longest silence", "#{ended}; #{silence(streams)}")
  end

  defp silence(streams), do: streams |> Enum.map(& &1.silence) |> Enum.max() |> ms()

  ## Times

  defp told(begun, ended, what) do
    {times, codes} = Enum.unzip(ended)
    {first, last} = Enum.min_max(times)
    codes = codes |> Enum.uniq() |> Enum.map_join(", ", &"`#{inspect(&1)}`")
    say("#{what} #{codes}", "#{ms(first - begun)} to #{ms(last - begun)}")
  end

  defp last(begun, times), do: ms(Enum.max(times) - begun)

  defp ms(us) when us > 1_000_000, do: "#{Float.round(us / 1_000_000, 1)} s"
  defp ms(us), do: "#{Float.round(us / 1_000, 1)} ms"
end

defmodule Bench.Network.Topology do
  @moduledoc "Clusters that are no mesh: callers know those who compute, and these not each other."

  import Bench.Hop
  import Bench.Network

  alias Bench.{Host, Hosts, Watch}
  alias DemandPort.Test.Peers

  def main(net) do
    Hosts.link(net.hosts, 0.25)
    no_mesh = [~c"-connect_all", ~c"false"]
    overlapping = [~c"-kernel", ~c"prevent_overlapping_partitions", ~c"false"]
    callers = for host <- [1, 2], do: start(net, host, Host.callers_children(), no_mesh)
    workers = for host <- [3, 4, 5], do: with_port(net, host, no_mesh)
    mesh = for host <- [6, 7, 8], do: start(net, host, [], overlapping)
    for caller <- callers, do: connect(caller, workers)
    mesh |> hd() |> connect(tl(mesh))

    everywhere(callers, :await_members, [length(workers)])
    everywhere(mesh, :await_connections, [2])
    for caller <- callers, do: Peers.call(caller, Watch, :begin, [[3, 4, 5], &Host.leased/1])

    all = callers ++ workers
    head(["what", "seen"])
    say("`-connect_all false`, 2 callers and 3 workers: connections of each", counts(all, &connections/1))
    say("… ports that each knows", counts(all, &on(&1, :known)))

    Hosts.cut(net.hosts, [1, 3])
    Hosts.cut(net.hosts, [6, 7])
    Peers.call(hd(callers), Watch, :ended, [[3]])
    on(hd(mesh), :await_connections, [1])
    Process.sleep(1_000)
    streams = callers |> everywhere(Watch, :streams, []) |> Enum.flat_map(&Map.values/1)
    ended = Enum.count(streams, & &1.ended)
    say("… the way from one caller to one worker is cut: of #{length(streams)} streams have ended", ended)
    say("… connections of each", counts(all, &connections/1))

    text =
      "`prevent_overlapping_partitions false`, a mesh of 3, the way between two is cut: connections of each"

    say(text, counts(mesh, &connections/1))
  end

  defp counts(peers, count), do: Enum.map_join(peers, ", ", count)
  defp connections(peer), do: peer |> Peers.call(Node, :list, []) |> length()
end

defmodule Bench.Network.Main do
  import Bench.Network

  alias Bench.{Hop, Hosts}
  alias Bench.Network.{Cluster, Delay, Loss, Topology}

  @parts ~w(delay loss cluster topology)

  def main(code, parts) do
    parts = if parts == [], do: @parts, else: parts
    Logger.configure(level: :none)
    net = %{code: code, folder: Hop.node_types(), hosts: Hosts.open(9)}
    started = System.monotonic_time(:second)

    if Enum.any?(~w(delay loss cluster), &(&1 in parts)), do: main_mesh(net, parts)
    if "topology" in parts, do: titled(fn -> Topology.main(net) end)

    Hosts.close(net.hosts)
    seconds = System.monotonic_time(:second) - started
    IO.puts("\nIn #{seconds} s; load of this machine now: #{File.read!("/proc/loadavg")}")
  end

  defp main_mesh(net, parts) do
    [here, there] = two = for host <- [1, 2], do: with_port(net, host)
    connect(here, [there])
    everywhere(two, :await_members, [2])
    if "delay" in parts, do: titled(fn -> Delay.main(net, two) end)
    if "loss" in parts, do: titled(fn -> Loss.main(net, two) end)

    if "cluster" in parts,
      do: titled(fn -> Cluster.main(net, two) end),
      else: for(peer <- two, do: :peer.stop(peer.control))
  end

  defp titled(part) do
    IO.puts("")
    part.()
  end
end

Bench.Network.Main.main(code, System.argv())
