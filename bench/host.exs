# What runs on the hosts of bench/network.exs: measurements at a caller, and streams that are watched.

defmodule Bench.Host do
  import Bench.Hop

  alias DemandPort.{Cluster, Error}
  alias DemandPort.Test.Services

  @scope :bench_network
  @port :bench_network_port
  @echo 9_000
  # A fuse; what is waited for takes seconds.
  @wait_ms 25_000

  def scope, do: @scope

  @doc "What a host has whose services find their node types in this folder."
  def children(host, folder) do
    [
      {DemandPort, name: @port, env: [{"PYTHONPATH", folder}], log_level: :none},
      {Cluster, scope: @scope, ports: [@port], offers: [{:host, host}], refresh_ms: :infinity},
      Bench.Watch
    ]
  end

  @doc "What a host without a port has."
  def callers_children, do: [{Cluster, scope: @scope}, Bench.Watch]

  @doc "The time of all hosts, in microseconds."
  def now, do: System.os_time(:microsecond)

  @doc "Waits until it holds; returns when."
  def await(condition) do
    true = Services.eventually(condition, @wait_ms)
    now()
  end

  @doc "How many ports this host knows."
  def known, do: length(Cluster.members(@scope))

  def await_members(count), do: await(fn -> known() == count end)
  def await_connections(count), do: await(fn -> length(Node.list()) == count end)

  ## The cable alone

  @doc "Answers what it is sent over TCP."
  def echo(address) do
    {:ok, listening} = :gen_tcp.listen(@echo, tcp() ++ [ip: address])
    owner = spawn(fn -> receive do: (:yours -> accept(listening)) end)
    :ok = :gen_tcp.controlling_process(listening, owner)
    send(owner, :yours)
    :ok
  end

  defp tcp, do: [:binary, active: false, nodelay: true]

  defp accept(listening) do
    {:ok, socket} = :gen_tcp.accept(listening)
    answer(socket, :gen_tcp.recv(socket, 0))
    accept(listening)
  end

  defp answer(_socket, {:error, _}), do: :closed

  defp answer(socket, {:ok, bytes}) do
    :ok = :gen_tcp.send(socket, bytes)
    answer(socket, :gen_tcp.recv(socket, 0))
  end

  # As large as a small demand.
  defp ping(socket) do
    :ok = :gen_tcp.send(socket, <<0::800>>)
    {:ok, _} = :gen_tcp.recv(socket, 100)
  end

  ## One demand after another, many at a time, a stream

  @doc "One round of all figures of a host: microseconds and rates by name."
  def round(%{host: host, address: address}) do
    {:ok, server} = Cluster.choose(@scope, offer: {:host, host})
    {:ok, session} = DemandPort.open(server, graph())
    {:ok, socket} = :gen_tcp.connect(address, @echo, tcp())
    rtt_us = median(each_us(10, fn -> ping(socket) end))
    # Half a second or so of each.
    times = fn trips -> trunc(500_000 / (rtt_us * trips)) |> max(5) |> min(400) end
    chunks = fn credit -> min(30_000, trunc(credit * 700_000 / rtt_us)) end

    {first, whole} = tokens(server)

    figures = %{
      cable: median(each_us(times.(1), fn -> ping(socket) end)),
      demand: median(each_us(times.(1), fn -> {:ok, _} = DemandPort.demand(session, "out") end)),
      cancel: median(for _ <- 1..times.(4), do: cancelled_us(session)),
      opened: median(each_us(times.(3), fn -> opened(server) end)),
      run: median(each_us(times.(3), fn -> wanted_once(host) end)),
      in_flight: pipelined(session, 5_000, 256),
      credit_64: flood(session, chunks.(64), 64),
      credit_1024: flood(session, chunks.(1_024), 1_024),
      first_token: first,
      all_tokens: whole
    }

    :ok = DemandPort.close(session)
    figures
  end

  defp opened(server) do
    {:ok, session} = DemandPort.open(server, graph())
    {:ok, _} = DemandPort.demand(session, "out")
    :ok = DemandPort.close(session)
  end

  defp wanted_once(host), do: {:ok, _} = Cluster.run(@scope, graph(), "out", offer: {:host, host})

  # Of a stream in full flow.
  defp cancelled_us(session) do
    {:ok, _} = DemandPort.edit(session, {:update_node_data, "flood", %{count: 1_000_000_000}})
    {:ok, demand} = DemandPort.demand_async(session, "flood")
    for _ <- 1..10, do: receive(do: ({:node_stream, _, _} -> :ok))

    time(fn ->
      :ok = DemandPort.cancel(demand)
      %Error{code: :cancelled} = until_error()
    end) / 1_000
  end

  defp until_error do
    receive do
      {:node_stream, _, _} -> until_error()
      {:demand_error, _, error} -> error
    end
  end

  # The packaged model tells the same each time.
  defp tokens(server) do
    data = %{model_path: "tiny", prompt: "Once", max_tokens: 100, seed: 7}

    {:ok, session} =
      DemandPort.open(server, %{nodes: [%{id: "llm", node_type: "llamacpp-inference", data: data}], edges: []})

    started = System.monotonic_time(:microsecond)
    {:ok, _} = DemandPort.demand_async(session, "llm")
    first = receive(do: ({:node_stream, _, _} -> System.monotonic_time(:microsecond)))
    receive(do: ({:demand_complete, _, _} -> :ok))
    ended = System.monotonic_time(:microsecond)
    :ok = DemandPort.close(session)
    receive_rest()
    {first - started, ended - started}
  end

  defp receive_rest do
    receive do
      {:node_stream, _, _} -> receive_rest()
    after
      0 -> :ok
    end
  end

  @doc "Some of everything, at a port that is known by its pid."
  def use_all(server) do
    {:ok, session} = DemandPort.open(server, graph())
    {:ok, _} = DemandPort.demand(session, "out")
    flood(session, 5_000, 64)
    cancelled_us(session)
    DemandPort.close(session)
  end

  @doc "Of so many demands one after another: microseconds. And rates of so many at a time, and of a stream."
  def bulk(host, counts) do
    {:ok, server} = Cluster.choose(@scope, offer: {:host, host})
    {:ok, session} = DemandPort.open(server, graph())
    us = each_us(counts.alone, fn -> {:ok, _} = DemandPort.demand(session, "out") end)
    in_flight = pipelined(session, counts.in_flight, 256)
    stream = flood(session, counts.chunks, 1_024)
    :ok = DemandPort.close(session)
    0 = :erlang.process_info(self(), :message_queue_len) |> elem(1)
    %{us: us, in_flight: in_flight, stream: stream}
  end

  ## Many ports

  @doc "Opens so many sessions one after another, by least load; how many each host had of them."
  def sessions(count) do
    sessions = for _ <- 1..count, do: DemandPort.Cluster.open(@scope, graph()) |> elem(1)
    for session <- sessions, do: :ok = DemandPort.close(session)
    sessions |> Enum.frequencies_by(&node(&1.server)) |> Map.values()
  end

  @doc "Begins so many demands at once, that stay open until `let_go/0`."
  def hold(count) do
    caller = self()

    holder =
      spawn(fn ->
        for n <- 1..count, do: {:ok, _} = Cluster.demand_async(@scope, graph(), "hold", tag: n)
        send(caller, :begun)
        receive(do: (:never -> :ok))
      end)

    Process.register(holder, __MODULE__)
    receive(do: (:begun -> :ok))
  end

  @doc "Ends the process that all these demands are for."
  def let_go, do: __MODULE__ |> Process.whereis() |> Process.exit(:kill)

  @doc "What is open on this host: at its port, for others (leases), and from here at others (relays)."
  def open do
    {:ok, info} = DemandPort.info(@port)

    %{
      demands: info.open_demands,
      sessions: info.open_sessions,
      leases: @scope |> Module.concat("Leases") |> Task.Supervisor.children() |> length(),
      relays: Enum.count(Process.list(), &relay?/1)
    }
  end

  def await_open(what), do: await(fn -> open() == what end)

  defp relay?(pid) do
    with {:dictionary, words} <- Process.info(pid, :dictionary),
         do: words[:"$initial_call"] == {DemandPort.Relay, :init, 1}
  end

  @doc "For so long, one demand after another wherever there is least to do: microseconds of each, and the errors' codes."
  def demands_for(ms) do
    until = now() + ms * 1_000

    Stream.repeatedly(fn -> timed(fn -> Cluster.run(@scope, graph(), "out", timeout: 20_000) end) end)
    |> Stream.take_while(fn _ -> now() < until end)
    |> Enum.map(fn
      {ns, {:ok, _}} -> ns / 1_000
      {_ns, {:error, error}} -> error.code
    end)
  end

  ## What is watched

  def watched_graph, do: %{nodes: [%{id: "tick", node_type: "bench-tick", data: %{seconds: 0.05}}], edges: []}

  @doc "A stream from this host that takes its session with it."
  def leased(host), do: Cluster.demand_async(@scope, watched_graph(), "tick", offer: {:host, host}, tag: host)

  @doc "A stream of a session at this port that stays open."
  def kept(server) do
    {:ok, session} = DemandPort.open(server, watched_graph())
    DemandPort.demand_async(session, "tick", tag: server)
  end
end

defmodule Bench.Watch do
  @moduledoc "Holds streams that count, and says what became of them."

  use GenServer

  alias Bench.Host

  def start_link(_), do: GenServer.start_link(__MODULE__, %{}, name: __MODULE__)

  @doc "Begins a stream for each key, `start.(key)`, and waits for its first chunk."
  def begin(keys, start) do
    :ok = GenServer.call(__MODULE__, {:begin, keys, start})
    await(keys, &(&1.next > 0))
    :ok
  end

  @doc "Waits until these have ended: when each did, and with which code."
  def ended(keys), do: for(stream <- await(keys, & &1.ended), do: stream.ended)

  defp await(keys, condition) do
    Host.await(fn -> Enum.all?(of(keys), condition) end)
    of(keys)
  end

  defp of(keys) do
    streams = streams()
    Enum.map(keys, &Map.fetch!(streams, &1))
  end

  @doc "Waits for a further chunk of each."
  def go_on(keys) do
    before = streams()

    Host.await(fn ->
      Enum.all?(streams(), fn {key, now} -> key not in keys or now.next > before[key].next end)
    end)
  end

  @doc "All of them; `silence` is the longest time without a chunk, in microseconds, since `mark/0`."
  def streams, do: GenServer.call(__MODULE__, :streams)

  def mark, do: GenServer.call(__MODULE__, :mark)

  @impl true
  def init(streams), do: {:ok, streams}

  @impl true
  def handle_call({:begin, keys, start}, _from, streams) do
    new = for key <- keys, into: %{}, do: {key, stream(start.(key))}
    {:reply, :ok, Map.merge(streams, new)}
  end

  def handle_call(:streams, _from, streams) do
    now = Host.now()
    {:reply, Map.new(streams, fn {key, stream} -> {key, silent(stream, now)} end), streams}
  end

  def handle_call(:mark, _from, streams) do
    {:reply, :ok, Map.new(streams, fn {key, stream} -> {key, %{stream | silence: 0}} end)}
  end

  defp stream({:ok, _demand}), do: %{next: 0, last: Host.now(), silence: 0, ended: nil}

  defp silent(%{ended: nil} = stream, now), do: %{stream | silence: max(stream.silence, now - stream.last)}
  defp silent(stream, _now), do: stream

  @impl true
  def handle_info({key, {:node_stream, _, number}}, streams) do
    %{^key => %{next: ^number, ended: nil} = stream} = streams
    now = Host.now()
    {:noreply, Map.put(streams, key, %{silent(stream, now) | next: number + 1, last: now})}
  end

  def handle_info({key, {:demand_error, _, error}}, streams) do
    %{^key => %{ended: nil} = stream} = streams
    {:noreply, Map.put(streams, key, %{stream | ended: {Host.now(), error.code}})}
  end
end
