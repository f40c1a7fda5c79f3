defmodule DemandPort.BroadcasterTest do
  # One contract for every adapter. Phoenix.PubSub takes part where PHOENIX_PUBSUB_EBIN names its compiled modules, since
  # the library itself depends on no package.
  use ExUnit.Case, async: true

  alias DemandPort.{Broadcaster, Error, Graph}

  @moduletag :service
  @wait 10_000

  defmodule Nodes do
    use DemandPort.Host

    @impl true
    def node_types, do: ["count", "boom", "wait"]

    @impl true
    def handle_node("count", %{"to" => to}, context) do
      for n <- 1..to, do: :ok = DemandPort.Host.stream(context, "#{n} ")
      {:ok, %{}}
    end

    def handle_node("boom", _inputs, _context), do: {:error, "boom"}

    def handle_node("wait", _inputs, %{arg: test}) do
      Process.flag(:trap_exit, true)
      send(test, {:waiting, self()})
      receive do: ({:EXIT, _, :shutdown} -> send(test, :stopped))
    end
  end

  # Each adapter with how its server is started, and how one subscribes.
  pubsub =
    with path when is_binary(path) <- System.get_env("PHOENIX_PUBSUB_EBIN"),
         true <- Code.append_path(path),
         {:ok, _} <- Application.ensure_all_started(:phoenix_pubsub) do
      [Phoenix.PubSub]
    else
      nil -> []
    end

  @adapters [Registry | pubsub]

  setup_all do
    name = :demand_port_broadcaster
    start_supervised!({DemandPort, name: name})
    {:ok, port: name}
  end

  defp start(adapter) do
    server = :"broadcaster_#{System.unique_integer([:positive])}"
    options = if adapter == Registry, do: [keys: :duplicate, name: server], else: [name: server]
    start_supervised!({adapter, options}, id: server)
    server
  end

  defp subscribe(Registry, server, topic), do: {:ok, _} = Registry.register(server, topic, nil)
  defp subscribe(adapter, server, topic), do: :ok = apply(adapter, :subscribe, [server, topic])

  defp hosted(port, node_type, data \\ []) do
    DemandPort.open!(port, Graph.new() |> Graph.node("n", node_type, data), host: {Nodes, self()})
  end

  # A process that subscribes, and hands on what it hears.
  defp subscriber(adapter, server, topic) do
    test = self()

    pid =
      spawn_link(fn ->
        subscribe(adapter, server, topic)
        send(test, {:subscribed, self()})
        hand_on(test)
      end)

    assert_receive {:subscribed, ^pid}, @wait
    pid
  end

  defp hand_on(test) do
    receive do
      message -> send(test, {self(), message})
    end

    hand_on(test)
  end

  defp heard(pid, text \\ "") do
    receive do
      {^pid, {:workflow_stream, "n", chunk}} -> heard(pid, text <> chunk)
      {^pid, {:workflow_output, "n", outputs}} -> {:output, text, outputs}
      {^pid, {:workflow_error, "n", error}} -> {:error, text, error}
    after
      @wait -> flunk("nothing is broadcast")
    end
  end

  for adapter <- @adapters do
    describe inspect(adapter) do
      @describetag adapter: adapter

      test "carries every chunk in order, then the outputs, to every subscriber", context do
        %{port: port, adapter: adapter} = context
        server = start(adapter)
        pids = for _ <- 1..3, do: subscriber(adapter, server, "room")
        other = subscriber(adapter, server, "another room")
        to = {adapter, server, "room"}
        {:ok, _} = DemandPort.demand_async(hosted(port, "count", to: 200), "n", broadcast: to)
        whole = Enum.map_join(1..200, &"#{&1} ")
        for pid <- pids, do: assert(heard(pid) == {:output, whole, %{"output" => whole}})
        refute_received {^other, _}
        # Nothing follows the end, and the caller is no subscriber.
        refute_received _
      end

      test "carries the error, once", %{port: port, adapter: adapter} do
        server = start(adapter)
        pid = subscriber(adapter, server, "room")
        session = hosted(port, "boom")
        {:ok, _} = DemandPort.demand_async(session, "n", broadcast: {adapter, server, "room"})
        assert {:error, "", %Error{code: :node_failed, message: "boom", node: "n"}} = heard(pid)
        refute_received _
      end

      test "says that its demand was cancelled", %{port: port, adapter: adapter} do
        server = start(adapter)
        pid = subscriber(adapter, server, "room")
        session = hosted(port, "wait")
        {:ok, demand} = DemandPort.demand_async(session, "n", broadcast: {adapter, server, "room"})
        assert_receive {:waiting, _}, @wait
        DemandPort.cancel(demand)
        assert {:error, "", %Error{code: :cancelled}} = heard(pid)
        assert_receive :stopped, @wait
      end

      test "ends with its caller, or by itself where it has no owner", %{port: port, adapter: adapter} do
        to = {adapter, start(adapter), "room"}
        session = hosted(port, "wait")
        asker = spawn(fn -> ask(session, to, []) end)
        assert_receive {:waiting, _}, @wait
        Process.exit(asker, :kill)
        assert_receive :stopped, @wait

        asker = spawn(fn -> ask(session, to, owner: :none) end)
        assert_receive {:waiting, node}, @wait
        Process.exit(asker, :kill)
        assert :pong = DemandPort.ping(port)
        assert Process.alive?(node)
        DemandPort.close!(session)
        assert_receive :stopped, @wait
      end

      test "with nobody there is not an error", %{adapter: adapter} do
        assert :ok = Broadcaster.broadcast({adapter, start(adapter), "room"}, :hello)
        assert Broadcaster.valid?({adapter, :any, "room"})
      end
    end
  end

  defp ask(session, to, options) do
    {:ok, _} = DemandPort.demand_async(session, "n", [broadcast: to] ++ options)
    receive do: (:never -> :ok)
  end
end
