# The BEAM's side of the benchmark: drives a service and the bare loop over the same kind of port. bench/run.py runs it:
#
#     elixir -pa EBIN bench/port.exs MODE ARGUMENT…
#
# Results are lines "RESULT name value"; python programs are named by the environment (PYTHON, BARE).

defmodule Bench do
  def result(name, value), do: IO.puts("RESULT #{name} #{value}")
  def now, do: System.monotonic_time(:nanosecond)

  def median(values) do
    sorted = Enum.sort(values)
    Enum.at(sorted, div(length(sorted), 2))
  end

  # Share of their time that the dirty CPU schedulers worked, in percent.
  def load do
    :erlang.statistics(:scheduler_wall_time_all) |> Enum.sort()
  end

  def dirty_since(before) do
    normal = :erlang.system_info(:schedulers)
    dirty = (normal + 1)..(normal + :erlang.system_info(:dirty_cpu_schedulers))

    {active, total} =
      Enum.zip(before, load())
      |> Enum.filter(fn {{id, _, _}, _} -> id in dirty end)
      |> Enum.reduce({0, 0}, fn {{_, a0, t0}, {_, a1, t1}}, {a, t} -> {a + a1 - a0, t + t1 - t0} end)

    Float.round(100 * active / max(total, 1), 4)
  end

  def graph do
    %{
      nodes: [
        %{id: "in", node_type: "text-input", data: %{text: "some text"}},
        %{id: "out", node_type: "text-output", data: %{}}
      ],
      edges: [%{id: "1", source: "in", source_handle: "text", target: "out", target_handle: "text"}]
    }
  end

  def command(:service), do: ["-m", "demandport", "serve"]
  def command(:bare), do: [System.fetch_env!("BARE")]
end

defmodule Bench.Raw do
  @moduledoc "A port without the client: payloads are counted, and their first bytes looked at."

  def open(which) do
    port =
      Port.open({:spawn_executable, System.find_executable(System.fetch_env!("PYTHON"))}, [
        :binary,
        :exit_status,
        packet: 4,
        args: Bench.command(which)
      ])

    receive do
      {^port, {:data, <<_, 0xA5, "ready", _::binary>>}} -> :ok
    after
      20_000 -> raise "no ready"
    end

    {:ok, graph} = DemandPort.Msgpack.encode(graph())
    Port.command(port, [<<0x95, 0xA4, "open", 0xCE, 1::32, 0xA1, "s">>, graph, <<0x80>>])
    receive do: ({^port, {:data, <<_, 0xA2, "ok", _::binary>>}} -> :ok)
    port
  end

  defp graph do
    graph = Bench.graph()
    count = System.get_env("FLOOD", "0")

    flood = %{id: "flood:#{count}", node_type: "bench-flood", data: %{count: String.to_integer(count)}}
    if count == "0", do: graph, else: %{graph | nodes: [flood | graph.nodes]}
  end

  def demand(port, id),
    do: Port.command(port, <<0x95, 0xA6, "demand", 0xCE, id::32, 0xA1, "s", 0xA3, "out", 0x80>>)

  def reply(port) do
    receive do
      {^port, {:data, <<0x95, 0xAF, "demand_complete", _::binary>>}} -> :ok
    after
      10_000 -> raise "no answer"
    end
  end

  def sequential(_port, _id, 0), do: :ok

  def sequential(port, id, left) do
    demand(port, id)
    reply(port)
    sequential(port, id + 1, left - 1)
  end

  # `window` are in flight at any time.
  def pipelined(port, id, count, window) do
    for n <- 0..(window - 1), do: demand(port, id + n)
    slide(port, id + window, count - window)
    for _ <- 1..window, do: reply(port)
  end

  defp slide(_port, _id, 0), do: :ok

  defp slide(port, id, left) do
    reply(port)
    demand(port, id)
    slide(port, id + 1, left - 1)
  end

  # An edit that makes both nodes stale, and a demand that runs them again.
  def uncached(port, id, count) do
    {:ok, operations} = DemandPort.Msgpack.encode([%{op: "invalidate", node: "in"}])
    operations = IO.iodata_to_binary(operations)

    for n <- 0..(count - 1) do
      Port.command(port, [<<0x94, 0xA4, "edit", 0xCE, id + 2 * n::32, 0xA1, "s">>, operations])
      demand(port, id + 2 * n + 1)
      receive do: ({^port, {:data, <<0x93, 0xA2, "ok", _::binary>>}} -> :ok)
      reply(port)
    end
  end

  def flood(port, id) do
    node = "flood:" <> System.fetch_env!("FLOOD")

    Port.command(port, [
      <<0x95, 0xA6, "demand", 0xCE, id::32, 0xA1, "s", 0xA0 + byte_size(node)>>,
      node,
      <<0x80>>
    ])

    chunks(port, 0)
  end

  defp chunks(port, count) do
    receive do
      {^port, {:data, <<0x96, 0xAB, "node_stream", _::binary>>}} -> chunks(port, count + 1)
      {^port, {:data, <<0x95, 0xAF, "demand_complete", _::binary>>}} -> count
      # The service's terminal holds all that was streamed, and so travels in parts.
      {^port, {:data, <<0x94, 0xA4, "part", _::binary>>}} -> count
    after
      20_000 -> raise "the stream stopped at #{count}"
    end
  end

  def rate(count, function) do
    start = Bench.now()
    function.()
    count * 1.0e9 / (Bench.now() - start)
  end
end

defmodule Bench.Counter do
  @moduledoc "The consumer: a GenServer that demands a node and counts what it receives."
  use GenServer

  def start, do: GenServer.start_link(__MODULE__, nil)
  def run(pid, session, node, options), do: GenServer.call(pid, {:run, session, node, options}, 120_000)

  @impl true
  def init(nil), do: {:ok, nil}

  @impl true
  def handle_call({:run, session, node, options}, from, nil) do
    start = Bench.now()
    {:ok, _} = DemandPort.demand_async(session, node, options)
    {:noreply, {from, start, 0}}
  end

  @impl true
  def handle_info({:node_stream, _node, _chunk}, {from, start, count}),
    do: {:noreply, {from, start, count + 1}}

  def handle_info({:demand_complete, _node, outputs}, {from, start, count}) do
    GenServer.reply(from, {count, (Bench.now() - start) / 1.0e9, outputs})
    {:noreply, nil}
  end

  def handle_info({:demand_error, _node, error}, _state), do: raise(inspect(error))
end

defmodule Bench.Listener do
  @moduledoc "The consumer of one stream: a GenServer that notes when text comes, and that all of it does."
  use GenServer

  def start, do: GenServer.start_link(__MODULE__, self())

  @doc "Its owner gets `:go` after so many pieces of text, and `{:ended, pid, stream}`."
  def run(pid, session, node, go_after \\ nil), do: GenServer.cast(pid, {:run, session, node, go_after})

  @impl true
  def init(owner), do: {:ok, owner}

  @impl true
  def handle_cast({:run, session, node, go_after}, owner) do
    start = Bench.now()
    {:ok, _} = DemandPort.demand_async(session, node)
    {:noreply, %{owner: owner, go_after: go_after, start: start, times: [], count: 0, bytes: 0}}
  end

  @impl true
  def handle_info({:node_stream, _node, text}, state) do
    count = state.count + 1
    if count == state.go_after, do: send(state.owner, :go)
    times = [Bench.now() | state.times]
    {:noreply, %{state | times: times, count: count, bytes: state.bytes + byte_size(text)}}
  end

  def handle_info({:demand_complete, _node, outputs}, %{owner: owner} = state) do
    stop = Bench.now()
    true = state.bytes == byte_size(outputs["response"])
    if state.go_after && state.count < state.go_after, do: send(owner, :go)

    stream = %{
      start: state.start / 1.0e9,
      end: stop / 1.0e9,
      times: state.times |> Enum.reverse() |> Enum.map(&(&1 / 1.0e9)),
      tokens: outputs["usage"]["completion_tokens"],
      prompt_tokens: outputs["usage"]["prompt_tokens"]
    }

    send(owner, {:ended, self(), stream})
    {:stop, :normal, owner}
  end

  def handle_info({:demand_error, _node, error}, _state), do: raise(inspect(error))
end

defmodule Bench.Main do
  alias Bench.Listener
  alias Bench.Raw

  def main(["demands", rounds, sequential, pipelined]) do
    {rounds, sequential, pipelined} = {int(rounds), int(sequential), int(pipelined)}
    ports = [service: Raw.open(:service), bare: Raw.open(:bare)]

    # Ids do not repeat: every round takes the next million.
    measured =
      for round <- 0..rounds, {name, port} <- ports do
        id = 1_000_000 * (round + 1)
        before = Bench.load()
        one = Raw.rate(sequential, fn -> Raw.sequential(port, id, sequential) end)
        many = Raw.rate(pipelined, fn -> Raw.pipelined(port, id + 200_000, pipelined, 256) end)
        dirty = Bench.dirty_since(before)

        uncached =
          Raw.rate(div(sequential, 2), fn -> Raw.uncached(port, id + 600_000, div(sequential, 2)) end)

        {round, name, one, many, uncached, dirty}
      end

    warm = Enum.filter(measured, &(elem(&1, 0) > 0))

    for {name, _} <- ports do
      mine = Enum.filter(warm, &(elem(&1, 1) == name))
      Bench.result("sequential_#{name}", Bench.median(Enum.map(mine, &elem(&1, 2))))
      Bench.result("pipelined_#{name}", Bench.median(Enum.map(mine, &elem(&1, 3))))
      Bench.result("uncached_#{name}", Bench.median(Enum.map(mine, &elem(&1, 4))))
    end

    dirty = for {_, :service, _, _, _, dirty} <- warm, do: dirty
    Bench.result("dirty_demands", Enum.max([0.0 | dirty]))
    for {_, port} <- ports, do: Port.close(port)
  end

  # Through the client to a GenServer, and for information without the client.
  def main(["stream", rounds, count]) do
    {rounds, count} = {int(rounds), int(count)}
    System.put_env("FLOOD", "#{count}")
    {:ok, counter} = Bench.Counter.start()
    clients = for which <- [:service, :bare], do: {which, client(which)}

    sessions =
      for {which, client} <- clients do
        {:ok, session} = DemandPort.open(client, flood_graph(count))
        {which, session}
      end

    through =
      for round <- 0..rounds, {which, session} <- sessions do
        if which == :service and round > 0,
          do: {:ok, _} = DemandPort.edit(session, {:invalidate, "flood:#{count}"})

        before = Bench.load()
        {^count, seconds, _} = Bench.Counter.run(counter, session, "flood:#{count}", credit: 100_000)
        {round, which, count / seconds, Bench.dirty_since(before)}
      end

    for which <- [:service, :bare] do
      Bench.result("stream_#{which}", Bench.median(for {r, ^which, rate, _} <- through, r > 0, do: rate))
    end

    Bench.result("dirty_stream", Enum.max(for {r, :service, _, dirty} <- through, r > 0, do: dirty))
    for {_, client} <- clients, do: GenServer.stop(client)

    raw =
      for round <- 1..rounds, which <- [:service, :bare] do
        port = Raw.open(which)
        rate = Raw.rate(count, fn -> ^count = Raw.flood(port, 10 + round) end)
        Port.close(port)
        {which, rate}
      end

    for which <- [:service, :bare] do
      Bench.result("stream_raw_#{which}", Bench.median(for {^which, rate} <- raw, do: rate))
    end
  end

  # One generation for every line on stdin.
  def main(["tokens", prompt, tokens, temperature]) do
    {:ok, counter} = Bench.Counter.start()

    data = %{
      model_path: System.get_env("MODEL", "tiny"),
      prompt: prompt,
      max_tokens: int(tokens),
      temperature: String.to_float(temperature),
      seed: 11
    }

    graph = %{nodes: [%{id: "llm", node_type: "llamacpp-inference", data: data}], edges: []}
    {:ok, session} = DemandPort.open(client(:service), graph)
    each_line(fn _line -> generate(session, counter) end)
    GenServer.stop(:bench_service)
  end

  # A job of several streams for every line on stdin, as bench/jobs.py describes it; the answer is a line too.
  def main(["streams"]) do
    client = client(:service)

    each_line(fn line ->
      {:ok, job} = line |> String.trim() |> Base.decode64!() |> DemandPort.Msgpack.decode()
      {:ok, answer} = client |> streams(job) |> DemandPort.Msgpack.encode()
      answer |> IO.iodata_to_binary() |> Base.encode64() |> IO.puts()
    end)

    GenServer.stop(client)
  end

  defp streams(client, %{"streams" => requests, "late" => late, "after" => go_after}) do
    nodes =
      for {request, index} <- Enum.with_index(requests ++ List.wrap(late)) do
        data = Map.put(request, "model_path", System.fetch_env!("MODEL"))
        %{id: "#{index}", node_type: "llamacpp-inference", data: data}
      end

    {:ok, session} = DemandPort.open(client, %{nodes: nodes, edges: []})
    listeners = for node <- nodes, do: {node.id, elem(Listener.start(), 1)}
    {[{id, first} | others], last} = Enum.split(listeners, length(requests))
    Listener.run(first, session, id, late && go_after)
    for {id, listener} <- others, do: Listener.run(listener, session, id)
    if late, do: receive(do: (:go -> :ok))
    for {id, listener} <- last, do: Listener.run(listener, session, id)
    ended = for {_, listener} <- listeners, do: receive(do: ({:ended, ^listener, stream} -> stream))
    :ok = DemandPort.close(session)
    ended
  end

  defp generate(session, counter) do
    {:ok, _} = DemandPort.edit(session, {:invalidate, "llm"})
    before = Bench.load()
    {chunks, seconds, outputs} = Bench.Counter.run(counter, session, "llm", [])
    IO.puts("#{outputs["usage"]["completion_tokens"]} #{seconds} #{chunks} #{Bench.dirty_since(before)}")
  end

  defp each_line(function) do
    case IO.read(:line) do
      :eof ->
        :ok

      line ->
        function.(line)
        each_line(function)
    end
  end

  defp client(which) do
    {:ok, _} =
      DemandPort.start_link(
        name: :"bench_#{which}",
        python: System.fetch_env!("PYTHON"),
        python_path: System.fetch_env!("SOURCE"),
        args: Bench.command(which)
      )

    :"bench_#{which}"
  end

  defp flood_graph(count) do
    %{nodes: [%{id: "flood:#{count}", node_type: "bench-flood", data: %{count: count}}], edges: []}
  end

  defp int(text), do: String.to_integer(text)
end

:erlang.system_flag(:scheduler_wall_time, true)
Logger.configure(level: :warning)
Bench.Main.main(System.argv())
