defmodule DemandPort.DyingTest do
  # Every party dies at every moment, on a real service: who lives gets one outcome, and nothing is left behind. The
  # moments are made by host nodes that wait until they are told to go on.
  use ExUnit.Case, async: true

  import DemandPort.Test.Services

  alias DemandPort.{Demand, Error, Graph, Host, Session}

  @moduletag :service
  @wait 15_000

  defmodule Gate do
    use Host

    @impl true
    def node_types, do: ["gate", "stubborn", "echo"]

    # Tells the test that it is there, and goes on when told; shut down, it says so.
    @impl true
    def handle_node("gate", inputs, %{arg: test, node: node} = context) do
      Process.flag(:trap_exit, true)
      if inputs["chunk"], do: :ok = Host.stream(context, inputs["chunk"])
      send(test, {:gate, node, self()})

      receive do
        {:go, answer} ->
          answer

        {:EXIT, _from, reason} ->
          send(test, {:stopped, node})
          exit(reason)
      end
    end

    # Does not let itself be shut down before it has said what it has to say.
    def handle_node("stubborn", _inputs, %{arg: test, node: node} = context) do
      Process.flag(:trap_exit, true)
      send(test, {:gate, node, self()})

      receive do
        {:go, chunk, answer} ->
          Host.stream(context, chunk)
          answer
      end
    end

    def handle_node("echo", inputs, _context), do: {:ok, %{output: inputs["text"]}}
  end

  setup_all do
    {:ok, shared: start_supervised!({DemandPort, []})}
  end

  ## Moments

  defp graph do
    Graph.new()
    |> Graph.node("gate", "gate")
    |> Graph.node("blocker", "gate")
    |> Graph.node("chunks", "gate", chunk: "one")
    |> Graph.node("stubborn", "stubborn")
    |> Graph.node("in", "text-input", text: "hello")
    |> Graph.node("out", "text-output")
    |> Graph.connect("in", "out")
  end

  defp opened(port, options \\ []) do
    DemandPort.open!(port, graph(), [host: {Gate, self()}, restore: true] ++ options)
  end

  # Has `demand` be made of the node that it is given, at that moment of the service's life; returns what ends it all.
  defp at(:running, port, demand), do: made(opened(port), "gate", demand)

  defp at(:streaming, port, demand), do: made(opened(port), "chunks", demand)

  defp at(:queued, port, demand) do
    session = opened(port, max_running: 1)
    blocker = blocker(session)
    demand.(session, "gate")
    assert eventually(fn -> DemandPort.health!(port)["demands"]["queued"] >= 1 end)
    fn -> go(blocker) end
  end

  defp at(:draining, port, demand) do
    made(opened(port), "gate", demand)
    restart(port)
  end

  defp at(:held, port, demand) do
    session = opened(port)
    blocker = blocker(session)
    finish = restart(port)
    demand.(session, "gate")
    assert eventually(fn -> DemandPort.info!(port).held >= 1 end)
    fn -> go(blocker) && finish.() end
  end

  defp made(session, node, demand) do
    demand.(session, node)
    assert_receive {:gate, ^node, _pid}, @wait
    fn -> :ok end
  end

  defp blocker(session) do
    DemandPort.demand_async!(session, "blocker", tag: :blocker)
    assert_receive {:gate, "blocker", pid}, @wait
    pid
  end

  defp restart(port) do
    restart = Task.async(fn -> DemandPort.restart(port) end)
    assert eventually(fn -> match?({:draining, _}, :sys.get_state(port)) end)
    fn -> assert Task.await(restart, @wait) == :ok end
  end

  defp go(pid), do: send(pid, {:go, {:ok, %{output: "done"}}})

  # Nothing is open any more, on either side, and nothing is remembered of it.
  defp settled(port) do
    assert eventually(
             fn -> match?(%{open_demands: 0, open_requests: 0, held: 0, host_calls: 0}, info(port)) end,
             @wait
           )

    {:ready, data} = :sys.get_state(port)
    assert %{owners: owners, refs: refs, monitors: monitors} = data
    assert {owners, refs, monitors} == {%{}, %{}, %{}}
    assert {data.protocol.open, data.protocol.demands, data.hosts.monitors} == {%{}, 0, %{}}
    assert %{"demands" => %{"open" => 0}, "host_calls" => %{"open" => 0}} = DemandPort.health!(port)
    assert eventually(fn -> Task.Supervisor.children(data.tasks) == [] end)
  end

  defp info(port), do: DemandPort.info!(port)

  # All that came under the tag: it must be chunks and then one terminal.
  defp outcome(tag) do
    receive do
      {^tag, {:node_stream, _node, _chunk}} ->
        outcome(tag)

      {^tag, {_kind, _node, outcome}} ->
        refute_received {^tag, _}
        outcome
    after
      @wait -> flunk("no outcome of #{inspect(tag)}")
    end
  end

  # A process that runs the function and then keeps what it receives.
  defp party(function) do
    spawn(fn ->
      function.()
      Process.sleep(:infinity)
    end)
  end

  defp kill(pid) do
    monitor = Process.monitor(pid)
    Process.exit(pid, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, _}, @wait
  end

  describe "who demands dies:" do
    for moment <- [:queued, :running, :streaming, :draining, :held] do
      test "the receiver, #{moment}", %{shared: port} do
        receiver = party(fn -> :ok end)
        finish = at(unquote(moment), port, &DemandPort.demand_async!(&1, &2, to: receiver))
        kill(receiver)
        ended(unquote(moment), finish, port)
      end

      test "the caller that waits, #{moment}", %{shared: port} do
        test = self()

        finish =
          at(unquote(moment), port, fn session, node ->
            send(test, {:caller, party(fn -> DemandPort.demand(session, node) end)})
          end)

        assert_receive {:caller, caller}
        kill(caller)
        ended(unquote(moment), finish, port)
      end

      test "the owner, #{moment}; the receiver is told", %{shared: port} do
        owner = party(fn -> :ok end)
        demand = &DemandPort.demand_async!(&1, &2, owner: owner, tag: :mine)
        finish = at(unquote(moment), port, demand)
        kill(owner)
        assert %Error{code: :cancelled} = outcome(:mine)
        ended(unquote(moment), finish, port)
        refute_received {:mine, _}
      end

      test "one of two receivers, #{moment}; the other gets all", %{shared: port} do
        one = party(fn -> :ok end)
        test = self()
        demand = &DemandPort.demand_async!(&1, &2, to: [one, test], tag: :mine)
        node = if unquote(moment) == :streaming, do: "chunks", else: "gate"
        finish = at(unquote(moment), port, demand)
        gate = {:gate, node, eventually_gate(port, unquote(moment))}
        kill(one)

        gate =
          if unquote(moment) in [:queued, :held], do: finish.() && receive_gate(node), else: elem(gate, 2)

        go(gate)
        assert %{"output" => "done"} = outcome(:mine)
        if unquote(moment) not in [:queued, :held], do: finish.()
        settled(port)
      end
    end

    # The pid of the one call that runs.
    defp eventually_gate(_port, moment) when moment in [:queued, :held], do: nil

    defp eventually_gate(port, _moment) do
      {_state, data} = :sys.get_state(port)
      [call] = Map.values(data.hosts.calls)
      call.pid
    end

    defp receive_gate(node) do
      assert_receive {:gate, ^node, pid}, @wait
      pid
    end

    # What ran for it alone is stopped; what had not begun never begins.
    defp ended(moment, finish, port) when moment in [:queued, :held] do
      assert eventually(fn -> info(port).open_demands == 1 end)
      finish.()
      settled(port)
      refute_received {:gate, "gate", _}
    end

    defp ended(_moment, finish, port) do
      assert_receive {:stopped, _node}, @wait
      finish.()
      settled(port)
    end

    test "a consumer of a stream, between two chunks", %{shared: port} do
      test = self()
      session = opened(port)
      chunk = &send(test, {:chunk, &1})
      consumer = party(fn -> session |> DemandPort.stream("chunks") |> Enum.each(chunk) end)
      assert_receive {:chunk, "one"}, @wait
      kill(consumer)
      assert_receive {:stopped, "chunks"}, @wait
      settled(port)
    end

    test "a consumer of a stream raises", %{shared: port} do
      session = opened(port)

      assert_raise RuntimeError, "enough", fn ->
        session |> DemandPort.stream("chunks") |> Enum.each(fn _ -> raise "enough" end)
      end

      assert_receive {:stopped, "chunks"}, @wait
      settled(port)
      assert {:messages, []} = Process.info(self(), :messages) |> without_gates()
    end

    defp without_gates({:messages, messages}),
      do: {:messages, Enum.reject(messages, &match?({:gate, _, _}, &1))}

    test "a subscriber, and then there is no subscription", %{shared: port} do
      session = opened(port)
      test = self()

      subscriber =
        party(fn ->
          {:ok, _} = DemandPort.subscribe(session)
          send(test, :subscribed)
        end)

      assert_receive :subscribed, @wait
      kill(subscriber)
      assert eventually(fn -> elem(:sys.get_state(port), 1).subscriptions.sessions == %{} end)
      settled(port)
    end

    test "who called a host's node", %{shared: port} do
      session = opened(port)
      DemandPort.demand_async!(session, "gate", tag: :mine)
      assert_receive {:gate, "gate", pid}, @wait
      kill(pid)
      assert %Error{code: :node_failed, message: message} = outcome(:mine)
      assert message =~ "killed"
      settled(port)
    end
  end

  describe "a broadcast" do
    defmodule Raising do
      def broadcast(test, topic, {:workflow_stream, _, _}), do: raise("#{topic} #{inspect(test)}")
      def broadcast(test, _topic, message), do: send(test, {:broadcast, message}) && :ok
    end

    test "whose adapter raises is cancelled", %{shared: port} do
      DemandPort.demand_async!(opened(port), "chunks", broadcast: {Raising, self(), "t"})
      assert_receive {:stopped, "chunks"}, @wait
      settled(port)
      refute_received {:broadcast, _}
    end

    test "whose owner dies tells its subscribers", %{shared: port} do
      session = opened(port)
      test = self()
      owner = party(fn -> DemandPort.demand_async!(session, "gate", broadcast: {Raising, test, "t"}) end)
      assert_receive {:gate, "gate", _}, @wait
      kill(owner)
      assert_receive {:broadcast, {:workflow_error, "gate", %Error{code: :cancelled}}}, @wait
      settled(port)
      refute_received {:broadcast, _}
    end

    for how <- [:stop, :kill] do
      test "tells its subscribers of a #{how} of the connection" do
        port = own()
        session = opened(port)
        DemandPort.demand_async!(session, "gate", broadcast: {Raising, self(), "t"})
        assert_receive {:gate, "gate", _}, @wait
        end_connection(port, unquote(how))
        assert_receive {:broadcast, {:workflow_error, "gate", %Error{code: :backend_unavailable}}}, @wait
        refute_received {:broadcast, _}
      end
    end
  end

  ## The service

  defp own(options \\ []) do
    start_supervised!(Supervisor.child_spec({DemandPort, options}, id: :own, restart: :temporary))
  end

  defp os_pid(port), do: info(port).os_pid || Port.info(elem(:sys.get_state(port), 1).port)[:os_pid]

  defp signal(port, :stop_kill) do
    os_pid = os_pid(port)
    for signal <- ["-STOP", "-KILL"], do: {_, 0} = System.cmd("kill", [signal, "#{os_pid}"])
    os_pid
  end

  defp signal(port, signal) do
    os_pid = os_pid(port)
    {_, 0} = System.cmd("kill", ["-#{signal}", "#{os_pid}"])
    os_pid
  end

  defp end_connection(port, :kill), do: kill(port)
  defp end_connection(_port, :stop), do: stop_supervised!(:own)

  # A demand of each kind on the same node.
  defp every_kind(session, node) do
    test = self()
    DemandPort.demand_async!(session, node, tag: :async)

    for {kind, function} <- [
          sync: fn -> DemandPort.demand(session, node) end,
          many: fn -> DemandPort.demand_many(session, [node]) end,
          stream: fn -> streamed(session, node) end
        ] do
      spawn_link(fn -> send(test, {:outcome, kind, function.()}) end)
    end
  end

  defp streamed(session, node) do
    {:ok, session |> DemandPort.stream(node) |> Enum.to_list()}
  rescue
    error in Error -> {:error, error}
  end

  defp outcomes do
    for kind <- [:sync, :many, :stream], into: %{async: outcome(:async)} do
      assert_receive {:outcome, ^kind, outcome}, @wait
      refute_received {:outcome, ^kind, _}
      {kind, outcome}
    end
  end

  describe "the service dies" do
    for {moment, signal} <- [
          running: :KILL,
          running: :stop_kill,
          running: :TERM,
          streaming: :KILL,
          draining: :KILL,
          draining: :TERM,
          queued: :KILL
        ] do
      test "#{moment}, by #{signal}: each demand ends once, and the next service answers" do
        port = own()
        test = self()

        at(unquote(moment), port, fn session, node ->
          send(test, {:session, session})
          every_kind(session, node)
          assert eventually(fn -> info(port).open_demands >= 4 end)

          if unquote(moment) == :queued,
            do: eventually(fn -> DemandPort.health!(port)["demands"]["queued"] >= 4 end)
        end)

        signal(port, unquote(signal))
        outcomes = outcomes()
        assert %Error{code: code} = outcomes.async
        assert code in [:backend_unavailable, :cancelled]
        for kind <- [:sync, :stream], do: assert({:error, %Error{}} = outcomes[kind])
        assert_receive {:session, session}
        assert eventually(fn -> info(port).restarts == 1 end)
        assert DemandPort.demand!(session, "out") == %{"text" => "hello"}
        settled(port)
        refute_received {:async, _}
      end
    end

    test "while demands are held: they are answered by the next one" do
      port = own()
      session = opened(port)
      blocker(session)
      restart = Task.async(fn -> DemandPort.restart(port) end)
      assert eventually(fn -> match?({:draining, _}, :sys.get_state(port)) end)
      every_kind(session, "out")
      assert eventually(fn -> info(port).held == 4 end)
      DemandPort.edit(session, [{:set_input, "in", "text", "held"}], timeout: 0)
      assert eventually(fn -> info(port).held == 5 end)
      signal(port, :KILL)
      outcomes = outcomes()
      assert outcomes.async == %{"text" => "hello"} and outcomes.sync == {:ok, %{"text" => "hello"}}
      assert {:ok, [{"out", {:ok, _}}]} = outcomes.many
      assert outcomes.stream == {:ok, ["hello"]}
      assert Task.await(restart, @wait) == :ok
      assert %Error{code: :backend_unavailable} = outcome(:blocker)
      # The edit was held as well, and counts although nobody waited for it.
      assert DemandPort.demand!(session, "out") == %{"text" => "held"}
      signal(port, :KILL)
      assert eventually(fn -> info(port).restarts == 2 end)
      assert DemandPort.demand!(session, "out") == %{"text" => "held"}
      settled(port)
    end

    test "again and again while it starts, and demands wait" do
      port = own(max_restarts: 2)
      session = opened(port)
      signal(port, :KILL)
      assert eventually(fn -> info(port).restarts == 1 end)
      every_kind(session, "out")
      # It starts, and was never ready: who waits for it is told, and waits no longer.
      signal(port, :KILL)
      outcomes = outcomes()
      assert %Error{code: :backend_unavailable} = outcomes.async
      assert {:error, %Error{code: :backend_unavailable}} = outcomes.sync
      assert DemandPort.demand!(session, "out") == %{"text" => "hello"}
      monitor = Process.monitor(port)
      DemandPort.demand_async!(session, "gate", tag: :last)
      signal(port, :KILL)
      assert %Error{code: :backend_unavailable} = outcome(:last)
      assert_receive {:DOWN, ^monitor, :process, _, {:shutdown, %Error{code: :backend_unavailable}}}, @wait
    end

    test "while a session is restored: the next one restores it" do
      path = control()
      port = own(fake_options("open=#{path}"))
      session = DemandPort.open!(port, graph(), restore: true)
      File.write!(path, "mute")
      signal(port, :KILL)
      assert eventually(fn -> match?(%{restarts: 1, os_pid: pid} when is_integer(pid), info(port)) end)
      assert eventually(fn -> info(port).open_requests == 1 end)
      DemandPort.demand_async!(session, "never", tag: :while)
      assert_receive {:while, {:node_stream, _, "started"}}, @wait
      File.rm!(path)
      signal(port, :KILL)
      assert %Error{code: :backend_unavailable} = outcome(:while)
      assert {:ok, _} = DemandPort.demand(session, "echo")
      assert info(port).restorable_sessions == [session.name]
    end

    test "and a session that cannot be restored is gone, its host and its subscribers with it" do
      path = control()
      port = own(fake_options("open=#{path}"))
      session = DemandPort.open!(port, graph(), restore: true, host: Gate)
      {:ok, lost} = DemandPort.open(port, graph(), host: Gate)
      for opened <- [session, lost], do: GenServer.call(port, {:subscribe, opened.name, self(), []})
      File.write!(path, "refuse")
      signal(port, :KILL)
      assert eventually(fn -> match?(%{restarts: 1, restorable_sessions: []}, info(port)) end)
      {_, data} = :sys.get_state(port)
      assert {data.hosts.hosts, data.subscriptions.sessions} == {%{}, %{}}
      assert Process.info(port, :monitors) == {:monitors, []}
    end

    defp control do
      path = Path.join(System.tmp_dir!(), "demand_port_open_#{System.unique_integer([:positive])}")
      on_exit(fn -> File.rm(path) end)
      path
    end

    test "and what was edited is there again, all of it or nothing" do
      port = own()
      session = opened(port)

      for n <- 1..5,
          do: DemandPort.edit!(session, {:update_node_data, "in", %{"text" => "#{n}", "k#{n}" => n}})

      DemandPort.edit!(session, {:add_node, %{id: "more", node_type: "text-input", data: %{text: "more"}}})
      DemandPort.edit!(session, {:update_node_data, "more", %{"text" => "most"}})
      [restore] = Map.values(elem(:sys.get_state(port), 1).sessions)
      assert length(restore.edits) == 3
      signal(port, :KILL)
      assert eventually(fn -> info(port).restarts == 1 end)
      assert %{"text" => "5"} = DemandPort.demand!(session, "out")
      assert %{"text" => "most"} = DemandPort.demand!(session, "more")
      %{"graph" => %{"nodes" => nodes}} = DemandPort.snapshot!(session)
      assert %{"data" => %{"k1" => 1, "k5" => 5}} = Enum.find(nodes, &(&1["id"] == "in"))
    end

    test "and after very many edits the graph is there as it was, of which no more is kept than there is of it" do
      port = own()
      session = opened(port)
      :rand.seed(:exsss, {5, 7, 11})
      # Data that would be refused without the input that goes before them.
      wrong = {:update_node_data, "typed", %{"max_tokens" => "many"}}
      DemandPort.edit!(session, {:add_node, %{id: "typed", node_type: "llm-inference"}})
      assert {:error, %Error{code: :type_mismatch}} = DemandPort.edit(session, wrong)
      DemandPort.edit!(session, [{:set_input, "typed", "max_tokens", 5}, wrong])

      for {edits, restarts} <- [{1_000, 1}, {100, 2}] do
        # Some are refused; these count for nothing.
        fn -> DemandPort.edit(session, for(_ <- 1..Enum.random(1..2), do: any_edit())) end
        |> Stream.repeatedly()
        |> Stream.filter(&match?({:ok, _}, &1))
        |> Enum.take(edits)

        before = DemandPort.snapshot!(session)
        %{"nodes" => nodes, "edges" => edges} = before["graph"]
        [restore] = Map.values(elem(:sys.get_state(port), 1).sessions)
        assert length(restore.edits) <= opened_with() + 2 * length(nodes) + length(edges)
        signal(port, :KILL)
        assert eventually(fn -> info(port).restarts == restarts end)
        restored = DemandPort.snapshot!(session)
        assert {restored["graph"]["nodes"], restored["graph"]["edges"]} == {nodes, edges}
        assert inputs(restored) == inputs(before)
      end

      settled(port)
    end

    defp opened_with, do: map_size(graph().nodes) + map_size(graph().edges)

    # A node whose inputs were all cleared has none, however that is said.
    defp inputs(snapshot), do: Map.reject(snapshot["inputs"], fn {_node, set} -> set == %{} end)

    defp any_edit do
      id = Enum.random(~w(in out a b c))
      port = Enum.random(~w(text inputs))
      [edge, key, value] = [any_edge(), Enum.random(~w(text k l)), Enum.random([nil, "x", "y"])]

      Enum.random([
        {:add_node, %{id: id, node_type: Enum.random(~w(text-input merge)), data: %{"text" => id}}},
        {:remove_node, id},
        {:add_edge, edge},
        {:add_edge, edge},
        {:remove_edge, Enum.random([edge, "first", "second"])},
        {:update_node_data, id, %{key => value}},
        {:set_input, id, port, Enum.random(1..9)},
        {:clear_input, id, port},
        {:invalidate, id}
      ])
    end

    # Some are named, some are not, which are then called by their ends; and both spellings of these.
    defp any_edge do
      ends = %{source: Enum.random(~w(in a b c)), target: Enum.random(~w(a b c))}

      Enum.random([
        ends,
        Map.put(ends, :id, Enum.random(~w(first second))),
        Map.put(ends, :target_handle, "inputs"),
        Map.put(ends, "targetHandle", "inputs")
      ])
    end

    test "and an answer to it does not reach the next one, whose calls have the same numbers" do
      port = own()
      session = opened(port)
      DemandPort.demand_async!(session, "stubborn", tag: :old)
      assert_receive {:gate, "stubborn", old}, @wait
      signal(port, :KILL)
      assert %Error{code: :backend_unavailable} = outcome(:old)
      DemandPort.demand_async!(session, "stubborn", tag: :new)
      assert_receive {:gate, "stubborn", new}, @wait
      send(old, {:go, "old ", {:ok, %{output: "old"}}})
      ended = Process.monitor(old)
      assert_receive {:DOWN, ^ended, :process, _, _}, @wait
      send(new, {:go, "new ", {:ok, %{output: "new"}}})
      assert_receive {:new, {:node_stream, "stubborn", "new "}}, @wait
      assert %{"output" => "new"} = outcome(:new)
      settled(port)
    end
  end

  describe "a restart" do
    test "loses no large result", %{shared: port} do
      session = opened(port)
      DemandPort.demand_async!(session, "gate", tag: :large)
      assert_receive {:gate, "gate", pid}, @wait
      finish = restart(port)
      large = String.duplicate("x", 10_000_000)
      send(pid, {:go, {:ok, %{output: large}}})
      assert %{"output" => ^large} = outcome(:large)
      finish.()
    end

    test "of a service that does not drain ends it" do
      port = own(fake_options(""))
      session = %Session{server: port, name: "s"}
      DemandPort.demand_async!(session, "never", tag: :mine)
      assert_receive {:mine, {:node_stream, _, _}}, @wait
      os_pid = os_pid(port)
      {_, 0} = System.cmd("kill", ["-STOP", "#{os_pid}"])
      restart = Task.async(fn -> DemandPort.restart(port, drain_ms: 0) end)
      assert eventually(fn -> match?({:draining, _}, :sys.get_state(port)) end)
      held = Task.async(fn -> DemandPort.demand(session, "echo") end)
      assert Task.await(restart, @wait) == :ok
      assert {:ok, _} = Task.await(held, @wait)
      assert %Error{code: :backend_unavailable} = outcome(:mine)
      assert eventually(fn -> not alive?(os_pid) end)
    end
  end

  describe "a start" do
    test "that takes too long ends the service, also one that is stopped" do
      port = own(fake_options("mute", start_timeout_ms: 300, max_restarts: 0))
      monitor = Process.monitor(port)
      os_pid = os_pid(port)
      {_, 0} = System.cmd("kill", ["-STOP", "#{os_pid}"])
      assert_receive {:DOWN, ^monitor, :process, _, _}, @wait
      assert eventually(fn -> not alive?(os_pid) end)
    end

    test "under any name that OTP takes" do
      start_supervised!({Registry, keys: :unique, name: __MODULE__.Names})

      for name <- [{:global, __MODULE__}, {:via, Registry, {__MODULE__.Names, "port"}}, __MODULE__.Named] do
        port = start_supervised!(%{DemandPort.child_spec(fake_options("", name: name)) | id: name})
        assert {:ok, session} = DemandPort.open(name, graph())
        assert {:ok, _} = DemandPort.demand(session, "echo")
        assert ["chunk 0 "] = session |> DemandPort.stream("stream-1") |> Enum.to_list()
        assert {:ok, %Demand{} = demand} = DemandPort.demand_async(session, "never", tag: :mine)
        assert :ok = DemandPort.cancel(demand)
        assert %Error{code: :cancelled} = outcome(:mine)
        kill(port)
        stop_supervised!(name)
        assert {:error, %Error{code: :backend_unavailable}} = DemandPort.demand(session, "echo")
        assert {:error, %Error{code: :backend_unavailable}} = DemandPort.demand_async(session, "echo")
        assert :ok = DemandPort.cancel(demand)
      end

      assert_raise ArgumentError, ~r/:name/, fn -> DemandPort.start_link(name: "a text") end
    end
  end

  describe "the connection" do
    for how <- [:stop, :kill], moment <- [:queued, :running, :streaming, :draining, :held] do
      test "ends by a #{how}, #{moment}: each demand ends once" do
        port = own()
        Process.flag(:trap_exit, true)
        os_pid = os_pid(port) || 0

        at(unquote(moment), port, fn session, node ->
          every_kind(session, node)
          assert eventually(fn -> info(port).open_demands + info(port).held >= 4 end)
        end)

        end_connection(port, unquote(how))
        outcomes = outcomes()
        assert %Error{code: :backend_unavailable} = outcomes.async

        for kind <- [:sync, :many, :stream],
            do: assert({:error, %Error{code: :backend_unavailable}} = outcomes[kind])

        assert eventually(fn -> not alive?(os_pid) end)
      end
    end

    test "is killed: who waits is told, the service ends, and the next one knows no session" do
      supervisor = start_supervised!({Supervisor, strategy: :one_for_one, children: []} |> supervisor())
      name = __MODULE__.Killed
      {:ok, port} = Supervisor.start_child(supervisor, DemandPort.child_spec(name: name))
      session = opened(name)
      test = self()
      for _ <- 1..3, do: spawn_link(fn -> send(test, {:outcome, DemandPort.demand(session, "gate")}) end)
      assert_receive {:gate, "gate", _}, @wait
      assert eventually(fn -> info(name).open_demands == 3 end)
      os_pid = os_pid(port)
      kill(port)
      for _ <- 1..3, do: assert_receive({:outcome, {:error, %Error{code: :backend_unavailable}}}, @wait)
      assert_receive {:stopped, "gate"}, @wait
      assert eventually(fn -> Process.whereis(name) not in [nil, port] end)
      assert {:error, %Error{code: :unknown_session}} = DemandPort.demand(session, "out")
      assert eventually(fn -> not alive?(os_pid) end)
    end

    defp supervisor({module, options}) do
      {children, options} = Keyword.pop(options, :children)
      %{id: module, start: {module, :start_link, [children, options]}}
    end
  end

  describe "at the limits" do
    test "a demand that waits for the start leaves its place, however it is given up" do
      port = own(fake_options("mute", max_pending: 6))
      session = %Session{server: port, name: "s"}
      test = self()
      [receiver, owner, of_broadcast] = for _ <- 1..3, do: party(fn -> :ok end)
      caller = party(fn -> DemandPort.demand(session, "n") end)
      DemandPort.demand_async!(session, "n", to: receiver)
      DemandPort.demand_async!(session, "n", owner: owner, tag: :owned)
      DemandPort.demand_async!(session, "n", owner: of_broadcast, broadcast: {__MODULE__.Raising, test, "t"})
      demand = DemandPort.demand_async!(session, "n", tag: :cancelled)
      assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.demand(session, "n", timeout: 0)
      assert eventually(fn -> info(port).held == 5 end)
      assert %Demand{} = DemandPort.demand_async!(session, "n", tag: :last)
      assert {:error, %Error{code: :queue_full}} = DemandPort.demand_async(session, "n")
      Enum.each([receiver, owner, of_broadcast, caller], &kill/1)
      for _ <- 1..2, do: DemandPort.cancel(demand)
      for tag <- [:owned, :cancelled], do: assert(%Error{code: :cancelled} = outcome(tag))
      assert_receive {:broadcast, {:workflow_error, "n", %Error{code: :cancelled}}}, @wait
      assert eventually(fn -> match?(%{held: 1, open_demands: 1, open_requests: 0}, info(port)) end)
      {:starting, data} = :sys.get_state(port)
      assert {map_size(data.refs), map_size(data.monitors), data.protocol.demands} == {1, 1, 1}
      end_connection(port, :stop)
      assert %Error{code: :backend_unavailable} = outcome(:last)
      refute_received {:broadcast, _}
    end

    test "a session whose opener gave up is closed again" do
      port = own(fake_options("mute"))
      assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.open(port, graph(), timeout: 0)

      assert {:error, %Error{code: :deadline_exceeded}} =
               DemandPort.open(port, graph(), timeout: 0, session: "mine")

      {:starting, data} = :sys.get_state(port)

      assert [["open", 1, name | _], ["close", 2, name], ["open", 3, "mine" | _]] =
               for(
                 {_id, payload} <- Enum.reverse(data.held),
                 do: DemandPort.Msgpack.decode_message(payload) |> elem(1)
               )
    end

    test "every demand can be cancelled, however much is open" do
      port = own(fake_options(""))
      session = %Session{server: port, name: "s"}
      assert :pong = DemandPort.ping(port)

      {demands, full} =
        1..2_000
        |> Enum.map(&DemandPort.demand_async(session, "never", tag: &1))
        |> Enum.split_with(&match?({:ok, _}, &1))

      assert [{:error, %Error{code: :queue_full, retryable: true}} | _] = full
      assert length(demands) == 1_000
      # Twice, and in one go, so that no reply to one cancel makes room for the next.
      :sys.suspend(port)
      for _ <- 1..2, {:ok, demand} <- demands, do: DemandPort.cancel(demand)
      :sys.resume(port)
      for tag <- 1..1_000, do: assert(%Error{code: :cancelled} = outcome(tag))
      assert length(DemandPort.health!(port)["cancelled"]) == 1_000
      assert eventually(fn -> info(port).open_requests == 0 end)
    end

    test "an answer or a chunk that the service would not read is the node's error, and nothing else", %{
      shared: _
    } do
      port = own(max_frame_bytes: 100_000)
      session = opened(port)
      large = String.duplicate("x", 200_000)
      DemandPort.demand_async!(session, "gate", tag: :mine)
      assert_receive {:gate, "gate", pid}, @wait
      send(pid, {:go, {:ok, %{output: large}}})
      assert %Error{code: :too_large} = outcome(:mine)
      DemandPort.demand_async!(session, "stubborn", tag: :mine)
      assert_receive {:gate, "stubborn", pid}, @wait
      send(pid, {:go, large, {:ok, %{output: ""}}})
      assert %Error{code: :too_large} = outcome(:mine)
      settled(port)
    end

    test "a caller that is slow to take chunks, with much else in its mailbox, is sent no more than it takes" do
      port = own(fake_options(""))
      for n <- 1..100, do: send(self(), {:unrelated, n})

      on_stream = fn _node, _chunk ->
        # The service has had time for all that it may.
        :pong = DemandPort.ping(port)
        {:message_queue_len, length} = Process.info(self(), :message_queue_len)
        assert length <= 100 + 8
      end

      session = %Session{server: port, name: "s"}
      assert {:ok, _} = DemandPort.demand(session, "stream-500", credit: 8, on_stream: on_stream)
      {:message_queue_len, 100} = Process.info(self(), :message_queue_len)
    end
  end

  describe "thousands at once" do
    @callers 2_000

    test "each get one outcome, mixed, all of them held and then let go" do
      port = own()
      session = opened(port)
      blocker = blocker(session)
      finish = restart(port)
      callers(session)
      assert eventually(fn -> info(port).held == @callers end)
      go(blocker)
      finish.()
      outcomes = caller_outcomes()
      assert Enum.uniq(outcomes) == [{:ok, "hello"}]
      settled(port)
    end

    test "each get one outcome, whenever the service is killed" do
      port = own(max_restarts: 50)
      session = opened(port)
      callers(session)
      # Some have had theirs, and most have not.
      assert_receive {:caller, 1, _} = first, @wait
      send(self(), first)
      signal(port, :KILL)
      for outcome <- caller_outcomes(), do: assert(match?({:ok, "hello"}, outcome) or lost?(outcome))
      # All may have been answered before the end was seen.
      assert eventually(fn -> info(port).restarts == 1 end)
      assert DemandPort.demand!(session, "out") == %{"text" => "hello"}
      settled(port)
    end

    test "each get one outcome, whenever the connection is killed" do
      port = own()
      session = opened(port)
      callers(session)
      assert_receive {:caller, 1, _} = first, @wait
      send(self(), first)
      kill(port)

      for outcome <- caller_outcomes(),
          do: assert(match?({:ok, "hello"}, outcome) or lost?(outcome), inspect(outcome))
    end

    defp lost?({:error, %Error{code: :backend_unavailable, retryable: true}}), do: true
    defp lost?(_outcome), do: false

    defp callers(session) do
      test = self()
      for n <- 1..@callers, do: spawn_link(fn -> send(test, {:caller, n, ask(rem(n, 4), session)}) end)
    end

    defp ask(0, session),
      do: with({:ok, %{"text" => text}} <- DemandPort.demand(session, "out"), do: {:ok, text})

    defp ask(1, session) do
      with {:ok, [text]} <- streamed(session, "out"), do: {:ok, text}
    end

    defp ask(2, session) do
      with {:ok, [{"out", {:ok, %{"text" => text}}}]} <- DemandPort.demand_many(session, ["out"]),
           do: {:ok, text}
    end

    defp ask(3, session) do
      with {:ok, _demand} <- DemandPort.demand_async(session, "out") do
        receive do
          {:demand_complete, "out", %{"text" => text}} -> alone({:ok, text})
          {:demand_error, "out", error} -> alone({:error, error})
        end
      end
    end

    # The connection has done all that it was asked before.
    defp alone(outcome) do
      receive do
        more -> {:and, outcome, more}
      after
        0 -> outcome
      end
    end

    defp caller_outcomes do
      for n <- 1..@callers do
        assert_receive {:caller, ^n, outcome}, 30_000
        outcome
      end
    end
  end

  describe "the service's log" do
    defmodule Handler do
      def log(event, %{config: test}), do: send(test, {:logged, event})
    end

    test "arrives in Logger with who said it, and its metadata" do
      code = """
      import logging, sys
      from demandport import node
      @node("t-log")
      def speak(text: str = "") -> str:
          logging.getLogger("my.nodes").warning("said %s", text, extra={"metadata": {"job": 7}})
          logging.getLogger("my.nodes").log(35, "of a level between")
          try:
              raise ValueError("no")
          except ValueError:
              logging.getLogger("my.nodes").exception("went wrong")
          return text
      from demandport.cli import main
      sys.exit(main(["serve"]))
      """

      :ok = :logger.add_handler(__MODULE__, Handler, %{config: self()})
      on_exit(fn -> :logger.remove_handler(__MODULE__) end)
      port = own(args: ["-c", code])
      session = DemandPort.open!(port, Graph.new() |> Graph.node("n", "t-log", text: "it"))
      assert %{"output" => "it"} = DemandPort.demand!(session, "n") |> one_output()
      said = logged("said it")
      assert said.level in [:warning, :warn] and said.meta.domain == [:elixir, :demand_port]
      assert said.meta.service_logger == "my.nodes" and said.meta.service == %{"job" => "7"}
      assert said.meta.pid == port
      assert logged("of a level between").level in [:warning, :warn]
      assert %{level: :error, meta: %{service: %{"traceback" => traceback}}} = logged("went wrong")
      assert traceback =~ "ValueError: no"
    end

    defp one_output(outputs), do: %{"output" => outputs |> Map.values() |> hd()}

    defp logged(text) do
      receive do
        {:logged, %{msg: {:string, said}, meta: %{service_logger: _}} = event} ->
          if IO.iodata_to_binary(said) == text, do: event, else: logged(text)
      after
        @wait -> flunk("not logged: #{text}")
      end
    end
  end
end
