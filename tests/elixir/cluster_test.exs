defmodule DemandPort.ClusterTest do
  # Ports on several BEAMs of this machine. The one that runs the tests has none of its own: it is a caller.
  use ExUnit.Case, async: false

  import DemandPort.Test.Services, only: [eventually: 1, eventually: 2, fake_options: 1]

  alias DemandPort.{Cluster, Error, Graph}
  alias DemandPort.Test.Peers

  doctest DemandPort.Cluster

  @scope :demand_port_test
  @port :demand_port_test_port
  @graph %{nodes: [], edges: []}
  # A fuse; what is waited for comes at once.
  @wait 10_000

  case Peers.start_distribution() do
    :ok ->
      :ok

    {:error, text} ->
      IO.puts("the tests of the cluster are left out: #{text}")
      @moduletag skip: text
  end

  setup do
    start_supervised!({Cluster, scope: @scope})
    :ok
  end

  # Starts a BEAM with a port, and waits until it is known here.
  defp peer(name, options \\ []) do
    {models, options} = Keyword.pop(options, :models, "")
    {port, options} = Keyword.pop(options, :port, fake_options("models=" <> models))
    peer = Peers.start(name)
    cluster = [scope: @scope, ports: [@port], refresh_ms: :infinity] ++ options
    Peers.keep(peer, [{DemandPort, [name: @port] ++ port}, {Cluster, cluster}])
    :ok = Peers.call(peer, Cluster, :refresh, [@scope])
    assert eventually(fn -> server(peer) != nil end, 5_000)
    Map.put(peer, :server, server(peer))
  end

  defp server(peer), do: Enum.find(Cluster.members(@scope), &(node(&1) == peer.node))

  # Through the peer's own standard input and output, so also when it is cut off.
  defp health(peer) do
    {:ok, health} = Peers.call(peer, DemandPort, :health, [@port])
    health
  end

  defp info(peer), do: DemandPort.info!({@port, peer.node})
  defp session(peer, graph \\ @graph), do: DemandPort.open!(peer.server, graph)

  # A second terminal would come at once, if at all.
  defp refute_more(tag), do: refute_receive({^tag, _}, 50)

  describe "a session on another node" do
    test "is demanded, streamed, edited and cancelled as one on this" do
      there = peer(:a)
      assert {:ok, session} = Cluster.open(@scope, @graph)
      assert session.server == there.server
      assert {:ok, %{"text" => "chunk 0 chunk 1 "}} = DemandPort.demand(session, "stream-2")
      assert ["chunk 0 ", "chunk 1 "] = session |> DemandPort.stream("stream-2") |> Enum.to_list()
      assert Enum.count(DemandPort.stream(session, "stream-5000", credit: 4)) == 5_000
      assert ["chunk 0 "] = session |> DemandPort.stream("stream-5000", credit: 4) |> Enum.take(1)
      assert {:ok, ["set_input"]} = DemandPort.set_input(session, "n", "p", 1)

      {:ok, demand} = DemandPort.demand_async(session, "never", tag: :it)
      assert_receive {:it, {:node_stream, "never", "started"}}, @wait
      :ok = DemandPort.cancel(demand)
      assert_receive {:it, {:demand_error, "never", %Error{code: :cancelled}}}, @wait
      :ok = DemandPort.cancel(demand)
      assert {:error, %Error{code: :node_failed}} = DemandPort.demand(session, "fail")
      {:ok, _} = DemandPort.demand_async(session, "stream-2", tag: :it)
      assert_receive {:it, {:demand_complete, "stream-2", _}}, @wait
      assert_received {:it, {:node_stream, _, "chunk 0 "}}
      assert :ok = DemandPort.close(session)
      assert %{open_sessions: 0, open_demands: 0} = info(there)
    end

    test "never has more in the consumer's mailbox than the credit" do
      session = session(peer(:a))
      test = self()

      consumer =
        spawn_link(fn ->
          {:ok, _} = DemandPort.demand_async(session, "stream-2000", credit: 8)
          receive(do: (:go -> :ok))
          {:message_queue_len, before} = Process.info(self(), :message_queue_len)
          send(test, {:had, before, consume([])})
        end)

      assert eventually(fn -> Process.info(consumer, :message_queue_len) == {:message_queue_len, 8} end)
      # It stays so: what would be more, would have come with the reply to this.
      {:ok, _} = DemandPort.demand(session, "echo")
      send(consumer, :go)
      assert_receive {:had, before, chunks}, @wait
      # The gate's own message is not a chunk.
      assert before <= 8
      assert chunks == for(n <- 0..1999, do: "chunk #{n} ")
    end

    test "broadcasts on the caller's node" do
      start_supervised!({Registry, keys: :duplicate, name: @scope.Topics})
      {:ok, _} = Registry.register(@scope.Topics, "t", nil)
      there = peer(:a)
      {:ok, _} = DemandPort.demand_async(session(there), "never", broadcast: {Registry, @scope.Topics, "t"})
      assert_receive {:workflow_stream, "never", "started"}, @wait
      Peers.kill(there)
      assert_receive {:workflow_error, "never", %Error{code: :backend_unavailable}}, @wait
    end
  end

  defp consume(chunks) do
    receive do
      {:node_stream, _, chunk} -> consume([chunk | chunks])
      {:demand_complete, _, _} -> Enum.reverse(chunks)
    end
  end

  describe "exactly one terminal" do
    test "of two nodes one is killed in mid-stream: the other's demands go on" do
      [a, b] = [peer(:a), peer(:b)]
      {:ok, _} = DemandPort.demand_async(session(a), "never", tag: :a)
      assert_receive {:a, {:node_stream, "never", "started"}}, @wait
      waiting = Task.async(fn -> DemandPort.demand(session(a), "hold") end)
      assert eventually(fn -> info(a).open_demands == 2 end)

      # The stream on the other node is held in its middle while the first goes down.
      chunks =
        session(b)
        |> DemandPort.stream("stream-1000", credit: 4)
        |> Enum.map(fn chunk ->
          if chunk == "chunk 500 " do
            Peers.kill(a)

            assert_receive {:a,
                            {:demand_error, "never", %Error{code: :backend_unavailable, retryable: true}}},
                           @wait
          end

          chunk
        end)

      assert chunks == for(n <- 0..999, do: "chunk #{n} ")
      assert {:error, %Error{code: :backend_unavailable}} = Task.await(waiting)
      refute_more(:a)
      assert eventually(fn -> Cluster.members(@scope) == [b.server] end)
    end

    test "when the connection alone is killed" do
      there = peer(:a)
      {:ok, demand} = DemandPort.demand_async(session(there), "never", tag: :it)
      assert_receive {:it, {:node_stream, _, _}}, @wait
      Process.exit(there.server, :kill)
      assert_receive {:it, {:demand_error, "never", %Error{code: :backend_unavailable}}}, @wait
      :ok = DemandPort.cancel(demand)
      refute_more(:it)
    end

    test "when the service alone is killed, it is the connection's" do
      there = peer(:a)
      {:ok, _} = DemandPort.demand_async(session(there), "never", tag: :it)
      assert_receive {:it, {:node_stream, _, _}}, @wait
      {_, 0} = System.cmd("kill", ["-KILL", "#{health(there)["os_pid"]}"])
      assert_receive {:it, {:demand_error, "never", %Error{code: :backend_unavailable, message: text}}}, @wait
      assert text =~ "exit status"
      refute_more(:it)
    end

    test "when the net splits: an error here, a cancel there" do
      there = peer(:a)
      {:ok, _} = DemandPort.demand_async(session(there), "never", tag: :it)
      {:ok, _} = Cluster.demand_async(@scope, @graph, "hold", tag: :leased)
      assert_receive {:it, {:node_stream, _, _}}, @wait
      assert eventually(fn -> info(there).open_demands == 2 end)

      true = Node.disconnect(there.node)
      assert_receive {:it, {:demand_error, "never", %Error{code: :backend_unavailable}}}, @wait
      assert_receive {:leased, {:demand_error, "hold", %Error{code: :backend_unavailable}}}, @wait
      assert eventually(fn -> match?(%{"open" => 0, "cancelled" => [_, _ | _]}, health(there)) end)

      # What was opened for one demand is closed; the session that was opened to stay is still there.
      true = Node.connect(there.node)
      assert eventually(fn -> info(there).open_sessions == 1 end)
      assert eventually(fn -> match?({:ok, _}, Cluster.run(@scope, @graph, "echo")) end)
      refute_more(:it)
      refute_more(:leased)
    end

    test "when the caller's process dies, or its node: a cancel there" do
      [a, b] = [peer(:a), peer(:b)]
      session = session(b)

      for death <- [&Process.exit(&1, :kill), fn _ -> Peers.kill(a) end] do
        caller = Peers.call(a, Peers, :demand_here, [session, "never", self()])
        assert_receive {^caller, {:node_stream, _, _}}, @wait
        assert health(b)["open"] == 1
        death.(caller)
        assert eventually(fn -> health(b)["open"] == 0 end)
      end

      assert [_, _] = health(b)["cancelled"]
      assert %{open_demands: 0, open_sessions: 1} = info(b)
    end
  end

  test "of many demands each ends once, whatever dies" do
    [a, b] = [peer(:a), peer(:b)]

    tags =
      for n <- 1..150 do
        node = Enum.at(["stream-200", "hold", "never"], rem(n, 3))
        {:ok, demand} = Cluster.demand_async(@scope, @graph, node, tag: n, retry: rem(n, 2), credit: 2)
        {n, demand}
      end

    assert_receive {_, {:node_stream, "never", _}}, @wait
    # A service, a node, and the wish for most of the rest.
    {_, 0} = System.cmd("kill", ["-KILL", "#{health(b)["os_pid"]}"])
    Peers.kill(a)
    for {n, demand} <- tags, rem(n, 3) != 0, do: DemandPort.cancel(demand)

    ends = terminals(length(tags), [])
    assert Enum.sort(ends) == Enum.to_list(1..150)
    assert eventually(fn -> match?(%{open_sessions: 0, open_demands: 0}, info(b)) end)
    refute_receive {_, {_, _, _}}, 50
  end

  # The tags of the next so many ends; chunks are taken on the way.
  defp terminals(0, tags), do: tags

  defp terminals(left, tags) do
    receive do
      {_, {:node_stream, _, _}} -> terminals(left, tags)
      {tag, {kind, _, _}} when kind in [:demand_complete, :demand_error] -> terminals(left - 1, [tag | tags])
    after
      @wait -> flunk("#{left} demands have not ended; those that have: #{inspect(tags, limit: :infinity)}")
    end
  end

  describe "the choice" do
    test "is the port with the model loaded, else the one with least to do" do
      [a, b] = [peer(:a, offers: [:gpu]), peer(:b, models: "x,y")]
      {a_server, b_server} = {a.server, b.server}
      assert eventually(fn -> Cluster.members(@scope, model: "x") == [b_server] end)
      for _ <- 1..3, do: session(b)

      assert {:ok, ^b_server} = Cluster.choose(@scope, model: "x")
      assert {:ok, %{server: ^b_server}} = Cluster.open(@scope, @graph, model: "y")
      assert {:ok, ^a_server} = Cluster.choose(@scope)
      # Nobody has it: whoever has least to do may load it.
      assert {:ok, ^a_server} = Cluster.choose(@scope, model: "z")
      assert {:ok, ^a_server} = Cluster.choose(@scope, offer: :gpu)
      assert Cluster.members(@scope, offer: :gpu) == [a_server]
      # Of those that offer it, none has the model.
      assert {:ok, ^a_server} = Cluster.choose(@scope, offer: :gpu, model: "x")

      assert {:error, %Error{code: :backend_unavailable, retryable: true, message: text}} =
               Cluster.choose(@scope, offer: :tpu)

      assert text =~ "offers :tpu"
      for _ <- 1..6, do: session(a)
      assert {:ok, ^b_server} = Cluster.choose(@scope)
      # A port that does not answer is passed over, also the only one with the model.
      :ok = Peers.call(b, :sys, :suspend, [@port])
      assert {:ok, ^a_server} = Cluster.choose(@scope, model: "x", answer_ms: 100)
    end

    test "follows a port that is started anew" do
      there = peer(:a, models: "x")
      Process.exit(there.server, :kill)
      assert eventually(fn -> there.server not in Cluster.members(@scope) end)
      :ok = Peers.call(there, Cluster, :refresh, [@scope])
      assert eventually(fn -> match?([_], Cluster.members(@scope, model: "x")) end)
    end

    test "has the members of a pool" do
      there = Peers.start(:a)
      pool = [name: @port, size: 3] ++ fake_options("models=")
      Peers.keep(there, [{DemandPort.Pool, pool}, {Cluster, scope: @scope, pool: @port}])
      assert eventually(fn -> length(Cluster.members(@scope)) == 3 end)
      assert {:ok, %{"options" => _}} = Cluster.run(@scope, @graph, "echo")
    end
  end

  describe "a graph that is wanted once" do
    test "is opened, demanded, and closed" do
      there = peer(:a)
      test = self()
      {:ok, _} = Cluster.demand_async(@scope, @graph, "stream-3", tag: :it)

      for n <- 0..2,
          chunk = "chunk #{n} ",
          do: assert_receive({:it, {:node_stream, "stream-3", ^chunk}}, @wait)

      assert_receive {:it, {:demand_complete, "stream-3", %{"text" => _}}}, @wait

      assert {:ok, %{"text" => "chunk 0 "}} = Cluster.run(@scope, @graph, "stream-1")
      assert {:ok, _} = Cluster.run(@scope, @graph, "stream-1", on_stream: &send(test, {&1, &2}))
      assert_received {"stream-1", "chunk 0 "}
      assert {:error, %Error{code: :node_failed}} = Cluster.run(@scope, @graph, "fail", retry: 3)
      assert {:error, %Error{code: :deadline_exceeded}} = Cluster.run(@scope, @graph, "never", timeout: 100)
      assert Enum.count(Cluster.stream(@scope, @graph, "stream-500", credit: 4)) == 500
      assert ["chunk 0 "] = @scope |> Cluster.stream(@graph, "stream-500", credit: 4) |> Enum.take(1)

      assert_raise Error, ~r/node_failed/, fn ->
        @scope |> Cluster.stream(@graph, "fail") |> Enum.to_list()
      end

      {:ok, demand} = Cluster.demand_async(@scope, @graph, "never", tag: :it)
      assert_receive {:it, {:node_stream, _, _}}, @wait
      :ok = DemandPort.cancel(demand)
      assert_receive {:it, {:demand_error, "never", %Error{code: :cancelled}}}, @wait

      assert eventually(fn -> match?(%{open_sessions: 0, open_demands: 0}, info(there)) end)
      refute_received _
    end

    test "streams as its caller takes the chunks, whatever else lies in the caller's mailbox" do
      peer(:a)
      others = 100
      for n <- 1..others, do: send(self(), {:other, n})

      stream = Cluster.stream(@scope, @graph, "stream-500", credit: 4, timeout: @wait)

      chunks =
        Enum.map(stream, fn chunk ->
          if chunk == "chunk 0 ", do: assert(eventually(fn -> waiting() == others + 3 end))
          assert waiting() <= others + 4
          chunk
        end)

      assert chunks == for(n <- 0..499, do: "chunk #{n} ")
      heard = fn _node, _chunk -> :ok end
      assert {:ok, _} = Cluster.run(@scope, @graph, "stream-500", on_stream: heard, timeout: @wait)
      for n <- 1..others, do: assert_received({:other, ^n})
      refute_received _
    end

    defp waiting, do: self() |> Process.info(:message_queue_len) |> elem(1)

    test "begins again elsewhere, until the first chunk" do
      a = peer(:a)
      {:ok, demand} = Cluster.demand_async(@scope, @graph, "hold", tag: :again, retry: 1)
      {:ok, _} = Cluster.demand_async(@scope, @graph, "hold", tag: :once)
      {:ok, _} = Cluster.demand_async(@scope, @graph, "never", tag: :streamed, retry: 1)
      assert_receive {:streamed, {:node_stream, _, _}}, @wait
      assert eventually(fn -> info(a).open_demands == 3 end)

      b = peer(:b)
      Peers.kill(a)
      assert_receive {:once, {:demand_error, _, %Error{code: :backend_unavailable}}}, @wait
      assert_receive {:streamed, {:demand_error, _, %Error{code: :backend_unavailable}}}, @wait
      assert eventually(fn -> health(b)["open"] == 1 end)
      refute_received {:again, _}
      :ok = DemandPort.cancel(demand)
      assert_receive {:again, {:demand_error, "hold", %Error{code: :cancelled}}}, @wait
      assert eventually(fn -> match?(%{open_sessions: 0, open_demands: 0}, info(b)) end)
      for tag <- [:again, :once, :streamed], do: refute_more(tag)
    end

    test "is cancelled also while it is being opened" do
      there = peer(:a, port: fake_options("mute"))
      waiting = info(there).open_requests
      {:ok, demand} = Cluster.demand_async(@scope, @graph, "echo", tag: :it)
      # Its service is not ready, so the session is asked for and not open.
      assert eventually(fn -> info(there).open_requests == waiting + 1 end)
      :ok = DemandPort.cancel(demand)
      assert_receive {:it, {:demand_error, "echo", %Error{code: :cancelled}}}, @wait
      refute_more(:it)
    end

    test "does not begin again after the first chunk, or when nobody is left" do
      there = peer(:a)
      {:ok, _} = Cluster.demand_async(@scope, @graph, "never", tag: :streamed, retry: 5)
      {:ok, _} = Cluster.demand_async(@scope, @graph, "hold", tag: :held, retry: 5)
      assert_receive {:streamed, {:node_stream, _, _}}, @wait
      assert eventually(fn -> info(there).open_demands == 2 end)
      Peers.kill(there)

      assert_receive {:streamed, {:demand_error, _, %Error{code: :backend_unavailable, retryable: true}}},
                     @wait

      assert_receive {:held, {:demand_error, _, %Error{code: :backend_unavailable, retryable: true}}}, @wait
      refute_more(:streamed)
      refute_more(:held)
    end

    test "without any node is the typed error, as a message" do
      {:ok, _} = Cluster.demand_async(@scope, @graph, "x", tag: :it)
      assert_receive {:it, {:demand_error, "x", %Error{code: :backend_unavailable, retryable: true}}}, @wait
      assert {:error, %Error{code: :backend_unavailable}} = Cluster.run(@scope, @graph, "x", retry: 3)
      assert {:error, %Error{code: :backend_unavailable}} = Cluster.open(@scope, @graph)

      assert_raise ArgumentError, ~r/:model of DemandPort.Cluster.choose/, fn ->
        Cluster.choose(@scope, model: 1)
      end
    end
  end

  test "whose name is taken for a port's says what it is, and nothing dies" do
    there = peer(:a)
    before = Process.whereis(@scope)
    {:ok, session} = Cluster.open(@scope, @graph)

    answers = [
      DemandPort.open(@scope, @graph),
      DemandPort.ping(@scope),
      DemandPort.demand(%{session | server: @scope}, "echo")
    ]

    for answer <- answers do
      assert {:error, %Error{code: :bad_message, retryable: false, message: message}} = answer
      assert message =~ "#{inspect(@scope)} is a cluster: use DemandPort.Cluster"
    end

    assert Process.whereis(@scope) == before
    assert Cluster.members(@scope) == [there.server]
  end

  @tag :service
  test "with real services and a model" do
    [a, b] = [peer(:a, port: []), peer(:b, port: [])]
    session(a, Graph.new() |> Graph.node("n", "text-input", text: ""))
    {:ok, %{"model" => model}} = DemandPort.load_model({@port, b.node}, "tiny")
    :ok = Peers.call(b, Cluster, :refresh, [@scope])
    assert eventually(fn -> Cluster.members(@scope, model: model) == [b.server] end)

    graph =
      Graph.new()
      |> Graph.node("llm", "llamacpp-inference", model_path: "tiny", prompt: "Once", max_tokens: 40, seed: 7)

    chunks = @scope |> Cluster.stream(graph, "llm", model: model) |> Enum.to_list()
    assert {:ok, %{"response" => text}} = Cluster.run(@scope, graph, "llm", model: model)
    assert Enum.join(chunks) == text
    assert {:ok, []} = DemandPort.models({@port, a.node})
  end
end
