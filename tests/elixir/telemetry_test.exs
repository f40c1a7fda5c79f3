defmodule DemandPort.TelemetryTest do
  # The events, as a stand-in for the `telemetry` application hears them, which is not installed here. There is one such
  # module for everyone, so these tests run alone.
  use ExUnit.Case, async: false

  import DemandPort.Test.Services

  alias DemandPort.{Error, Graph, Host, Session, Telemetry}

  @moduletag :service
  @wait 10_000

  # What the catalogue promises: measurements, metadata.
  @about [:session, :node, :ref]
  @documented %{
    [:demand, :start] => {[:system_time, :monotonic_time], @about},
    [:demand, :first_chunk] => {[:duration], @about},
    [:demand, :stop] => {[:duration, :chunks, :queue_time], [:meta | @about]},
    [:demand, :exception] => {[:duration, :chunks, :queue_time], [:error | @about]},
    [:host, :start] => {[:monotonic_time], [:session, :node, :node_type]},
    [:host, :stop] => {[:duration], [:session, :node, :node_type]},
    [:host, :exception] => {[:duration], [:session, :node, :node_type, :reason]},
    [:connection, :ready] => {[:duration], [:server, :os_pid, :version]},
    [:connection, :down] => {[:count, :delay_ms], [:server, :error]},
    [:health] => {[:memory_bytes, :demands, :sessions, :unsent_bytes], [:server, :health]}
  }

  defmodule Gate do
    use Host

    @impl true
    def node_types, do: ["gate", "boom", "words"]

    @impl true
    def handle_node("boom", _inputs, _context), do: raise("boom")

    def handle_node("words", _inputs, context) do
      for word <- ["one ", "two"], do: Host.stream(context, word)
      {:ok, %{}}
    end

    def handle_node("gate", _inputs, %{arg: test, node: node}) do
      send(test, {:gate, node, self()})
      receive do: (:go -> {:ok, %{output: node}})
    end
  end

  setup_all do
    code =
      quote do
        def execute(event, measurements, metadata) do
          pid = :persistent_term.get(DemandPort.TelemetryTest, nil)
          if pid, do: send(pid, {:event, event, measurements, metadata})
          :ok
        end
      end

    {:module, :telemetry, _, _} = Module.create(:telemetry, code, Macro.Env.location(__ENV__))
    Telemetry.look_again()

    on_exit(fn ->
      :code.delete(:telemetry)
      :code.purge(:telemetry)
      Telemetry.look_again()
    end)
  end

  setup context do
    :persistent_term.put(__MODULE__, self())
    on_exit(fn -> :persistent_term.erase(__MODULE__) end)
    port = start_supervised!({DemandPort, context[:port_options] || []}, restart: :temporary)
    {:ok, port: port}
  end

  defp opened(port, options \\ []) do
    graph =
      for {name, type} <- [gate: "gate", other: "gate", boom: "boom", words: "words"],
          reduce: Graph.new(),
          do: (graph -> Graph.node(graph, "#{name}", type))

    DemandPort.open!(port, graph, [host: {Gate, self()}] ++ options)
  end

  # The next event of the name, which has what is documented, and nothing else.
  defp event(suffix) do
    assert_receive {:event, [:demand_port | ^suffix], measurements, metadata}, @wait
    {measured, about} = @documented[suffix]
    assert Enum.sort(Map.keys(measurements)) == Enum.sort(measured)
    assert Enum.sort(Map.keys(metadata)) == Enum.sort(about)
    for {_name, value} <- measurements, do: assert(is_integer(value))
    {measurements, metadata}
  end

  defp no_event(suffix), do: refute_received({:event, [:demand_port | ^suffix], _, _})

  test "the catalogue is what is tested here, and what its table says" do
    assert Telemetry.enabled?()

    assert Enum.sort(Telemetry.events()) ==
             @documented |> Map.keys() |> Enum.map(&[:demand_port | &1]) |> Enum.sort()

    {:docs_v1, _, _, _, %{"en" => doc}, _, _} = Code.fetch_docs(Telemetry)

    for {suffix, {measured, about}} <- @documented do
      row = doc |> String.split("\n") |> Enum.find(&String.contains?(&1, "`#{inspect(suffix)}`"))
      assert row, "no row for #{inspect(suffix)}"
      [measurements, metadata] = row |> String.split("|") |> Enum.slice(2, 2)
      for name <- measured, do: assert(measurements =~ "`#{name}`")
      unless metadata =~ "the same", do: for(name <- about, do: assert(metadata =~ "`#{name}`"))
    end
  end

  test "a demand that streams starts, has a first chunk, and stops", %{port: port} do
    session = opened(port)
    demand = DemandPort.demand_async!(session, "words", coalesce_ms: 0)
    {_, %{session: name, node: "words", ref: ref}} = event([:demand, :start])
    assert name == session.name and ref == demand.ref
    assert {_, %{ref: ^ref}} = event([:demand, :first_chunk])
    {%{chunks: chunks, duration: duration, queue_time: 0}, %{ref: ^ref, meta: meta}} = event([:demand, :stop])
    assert chunks in 1..2 and duration > 0 and meta["ran"] == 1 and not is_map_key(meta, "queued_us")
    for suffix <- [:first_chunk, :stop, :exception], do: no_event([:demand, suffix])
  end

  test "a demand that fails, is cancelled, abandoned, or left by who waited for it ends in an exception", %{
    port: port
  } do
    session = opened(port)
    assert {:error, _} = DemandPort.demand(session, "boom")
    assert {_, %{error: %Error{code: :node_failed}, node: "boom"}} = event([:demand, :exception])
    assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.demand(session, "gate", timeout: 0)
    assert {_, %{error: %Error{code: :cancelled}, node: "gate"}} = event([:demand, :exception])
    owner = spawn(fn -> receive do: (:never -> :ok) end)
    DemandPort.demand_async!(session, "gate", to: owner)
    Process.exit(owner, :kill)
    assert {_, %{error: %Error{code: :cancelled}}} = event([:demand, :exception])
    assert {:error, _} = DemandPort.demand_many(session, ["gate", "other"], deadline_ms: 1)

    assert {_, %{error: %Error{code: :deadline_exceeded}, node: ["gate", "other"]}} =
             event([:demand, :exception])

    for _ <- 1..4, do: event([:demand, :start])
    for suffix <- [:start, :stop, :exception], do: no_event([:demand, suffix])
  end

  test "a demand that waited for a place says how long", %{port: port} do
    session = opened(port, max_running: 1)
    DemandPort.demand_async!(session, "gate")
    assert_receive {:gate, "gate", first}, @wait
    DemandPort.demand_async!(session, "other")
    DemandPort.demand_async!(session, "words", deadline_ms: 50)
    # This one never had a place.
    assert {%{queue_time: all, duration: _}, %{node: "words"}} = event([:demand, :exception])
    assert System.convert_time_unit(all, :native, :millisecond) >= 50
    send(first, :go)
    assert {%{queue_time: 0}, %{node: "gate"}} = event([:demand, :stop])
    assert_receive {:gate, "other", second}, @wait
    send(second, :go)
    assert {%{queue_time: waited, duration: duration}, %{node: "other", meta: meta}} = event([:demand, :stop])
    assert waited == System.convert_time_unit(meta["queued_us"], :microsecond, :native)
    assert waited > 0 and waited < duration
  end

  test "a call of a host node starts and ends once, however it ends", %{port: port} do
    session = opened(port)
    DemandPort.demand!(session, "words")
    {_, %{session: name, node: "words", node_type: "words"}} = event([:host, :start])
    assert name == session.name
    assert {%{duration: duration}, %{node: "words"}} = event([:host, :stop])
    assert duration > 0
    DemandPort.demand(session, "boom")
    assert {_, %{reason: {%RuntimeError{message: "boom"}, _stack}}} = event([:host, :exception])
    demand = DemandPort.demand_async!(session, "gate")
    assert_receive {:gate, "gate", _}, @wait
    DemandPort.cancel(demand)
    assert {_, %{reason: :cancelled, node: "gate"}} = event([:host, :exception])
    for _ <- 1..2, do: event([:host, :start])
    assert DemandPort.ping(port) == :pong
    for suffix <- [:start, :stop, :exception], do: no_event([:host, suffix])
  end

  test "a service that is ready, and one that is lost", %{port: port} do
    %{os_pid: first} = once_ready(port)
    assert {_, %{server: ^port, os_pid: ^first, version: version}} = event([:connection, :ready])
    assert is_binary(version)
    {_, 0} = System.cmd("kill", ["-9", "#{first}"])
    assert {%{count: 1, delay_ms: 0}, %{server: ^port, error: error}} = event([:connection, :down])
    assert %Error{code: :backend_unavailable} = error
    assert {_, %{os_pid: second}} = event([:connection, :ready])
    assert second != first
  end

  @tag port_options: [health_interval_ms: 100]
  test "health, of this service and of the next; one that does not answer is asked once", %{port: port} do
    for _ <- 1..2, do: assert({_, %{server: ^port, health: %{"status" => "ok"}}} = event([:health]))
    %{os_pid: os_pid} = DemandPort.info!(port)
    {_, 0} = System.cmd("kill", ["-STOP", "#{os_pid}"])
    assert eventually(fn -> DemandPort.info!(port).open_requests == 1 end)
    refute eventually(fn -> DemandPort.info!(port).open_requests > 1 end, 350)
    {_, 0} = System.cmd("kill", ["-KILL", "#{os_pid}"])
    assert {_, _} = event([:connection, :down])

    assert eventually(fn ->
             match?({_, %{health: %{"os_pid" => other}}} when other != os_pid, event([:health]))
           end)
  end

  test "nothing is reported where there is nobody to hear", %{port: port} do
    :persistent_term.put(Telemetry, false)
    assert %Session{} = session = opened(port)
    DemandPort.demand!(session, "words")
    refute_received {:event, _, _, _}
  after
    Telemetry.look_again()
  end

  defp once_ready(port) do
    assert DemandPort.ping(port) == :pong
    DemandPort.info!(port)
  end
end
