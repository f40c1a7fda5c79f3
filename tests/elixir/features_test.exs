defmodule DemandPort.FeaturesTest do
  # What the client makes of the protocol, on a real service: streams, several nodes, host nodes, events, broadcasts,
  # restarts.
  use ExUnit.Case, async: true

  alias DemandPort.{Demand, Error, Graph, Session}

  @moduletag :service
  @wait 10_000

  defmodule Nodes do
    use DemandPort.Host

    @impl true
    def node_types, do: ["echo", "count", "boom", "forbid", "wait", "odd", "tool-executor", "rag-search"]

    @impl true
    def handle_node("echo", inputs, context) do
      {:ok, %{output: inputs["text"], arg: inspect(context.arg), left: context.deadline_ms}}
    end

    def handle_node("count", %{"to" => to}, context) do
      for n <- 1..to, do: :ok = DemandPort.Host.stream(context, "#{n} ")
      {:ok, %{}}
    end

    def handle_node("boom", _inputs, _context), do: raise("boom")
    def handle_node("forbid", _inputs, _context), do: raise(Error, code: :forbidden, message: "not here")
    def handle_node("odd", _inputs, _context), do: :what_is_this

    def handle_node("wait", _inputs, %{arg: test}) do
      Process.flag(:trap_exit, true)
      send(test, {:waiting, self()})

      receive do
        {:go, answer} -> answer
        {:EXIT, _, reason} -> send(test, {:stopped, reason})
      end
    end

    @impl true
    def handle_tool("add", %{"a" => a, "b" => b}, _context), do: {:ok, a + b}
    def handle_tool(name, _arguments, _context), do: {:error, "no tool #{name}"}

    @impl true
    def handle_search(query, limit, _context), do: {:ok, for(n <- 1..limit, do: "#{query} #{n}")}
  end

  setup_all do
    name = :demand_port_features
    start_supervised!({DemandPort, name: name})
    {:ok, port: name}
  end

  defp text(text \\ "hello") do
    Graph.new()
    |> Graph.node("in", "text-input", text: text)
    |> Graph.node("out", "text-output")
    |> Graph.connect("in", "out")
  end

  defp hosted(port, node_type, data \\ [], options \\ []) do
    graph = Graph.new() |> Graph.node("n", node_type, data)
    DemandPort.open!(port, graph, [host: {Nodes, self()}] ++ options)
  end

  describe "open" do
    test "takes a map, a graph and a file", %{port: port} do
      path = Path.join(System.tmp_dir!(), "demand_port_#{System.unique_integer([:positive])}.json")
      File.write!(path, ~s({"nodes": [{"id": "out", "node_type": "text-input", "data": {"text": "hello"}}]}))
      on_exit(fn -> File.rm(path) end)

      for graph <- [text(), Graph.to_map(text()), path] do
        assert {:ok, %{"valid" => true}} = DemandPort.validate(port, graph)
        session = DemandPort.open!(port, graph)
        assert %{"text" => "hello"} = DemandPort.demand!(session, "out")
      end

      assert {:error, %Error{}} = DemandPort.open(port, "/no/such/file.json")
      assert {:error, %Error{code: :invalid_graph}} = DemandPort.validate(port, "/no/such/file.json")
    end

    test "with an exclamation mark raises the error", %{port: port} do
      assert_raise Error, ~r/unknown_node_type/, fn ->
        DemandPort.open!(port, Graph.new() |> Graph.node("n", "nobody"))
      end

      session = DemandPort.open!(port, text())
      assert DemandPort.get_output!(session, "out", "text") == :absent
      assert :ok = DemandPort.close!(session)
      assert_raise Error, fn -> DemandPort.demand!(session, "out") end
    end
  end

  test "a session is closed when its owner dies", %{port: port} do
    owner = spawn(fn -> Process.sleep(:infinity) end)
    session = DemandPort.open!(port, text(), owner: owner, restore: true)
    demand = DemandPort.demand_async!(hosted(port, "wait", [], owner: owner), "n")
    assert_receive {:waiting, _}, @wait
    Process.exit(owner, :kill)
    assert_receive {:demand_error, "n", %Error{code: :cancelled}}, @wait
    assert_receive {:stopped, :shutdown}, @wait

    assert eventually(fn -> match?({:error, %Error{code: :unknown_session}}, DemandPort.snapshot(session)) end)

    refute session.name in DemandPort.info!(port).restorable_sessions
    assert %Demand{} = demand
  end

  describe "demand_many" do
    test "gives the outcomes in the order asked", %{port: port} do
      graph =
        text()
        |> Graph.node("boom", "boom")
        |> Graph.node("flag", "conditional", condition: true, value: 1)
        |> Graph.node("not", "text-output")
        |> Graph.connect("flag.false_out", "not")

      session = DemandPort.open!(port, graph, host: Nodes)

      assert {:ok,
              [
                {"boom", {:error, %Error{code: :node_failed}}},
                {"not", :skipped},
                {"out", {:ok, %{"text" => "hello"}}}
              ]} = DemandPort.demand_many(session, ["boom", "not", "out"])

      assert {:ok, []} = DemandPort.demand_many(session, [])

      assert_raise ArgumentError, ~r/a node of DemandPort.demand_many must be a string; got: :out/, fn ->
        DemandPort.demand_many(session, ["boom", :out])
      end

      assert {:ok, outcomes} = DemandPort.demand_many(session, ["boom", "out"], mode: :race)
      assert {"out", {:ok, _}} = List.keyfind(outcomes, "out", 0)
      assert {:error, %Error{code: :unknown_node}} = DemandPort.demand_many(session, ["out", "nobody"])
      assert {:error, %Error{code: :node_failed}} = DemandPort.demand_many(session, ["boom"], mode: :race)
    end

    test "of which the first failure ends it in mode try", %{port: port} do
      session = hosted(port, "boom")

      assert {:ok, [{"n", {:error, %Error{}}}, {"n", :not_started}]} =
               DemandPort.demand_many(session, ["n", "n"], mode: :try, limit: 1)
    end

    test "is cancelled when its caller gives up", %{port: port} do
      session = hosted(port, "wait")
      assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.demand_many(session, ["n"], timeout: 200)
      assert_receive {:waiting, _}, @wait
      assert_receive {:stopped, :shutdown}, @wait
      refute_received _
    end
  end

  describe "stream" do
    test "is lazy, in order, and whole", %{port: port} do
      session = hosted(port, "count", to: 300)
      stream = DemandPort.stream(session, "n", credit: 4)
      refute_received _
      assert Enum.join(stream) == Enum.map_join(1..300, &"#{&1} ")
      # From the cache, as one element.
      assert Enum.to_list(DemandPort.stream(session, "n")) == [Enum.map_join(1..300, &"#{&1} ")]
      refute_received _
    end

    test "of messages ends with the outputs", %{port: port} do
      session = hosted(port, "count", to: 2)
      messages = session |> DemandPort.stream("n", chunks: :messages) |> Enum.to_list()
      assert {:demand_complete, "n", %{"output" => "1 2 "}} = List.last(messages)
      assert Enum.all?(Enum.drop(messages, -1), &match?({:node_stream, "n", _}, &1))
    end

    test "halted early cancels the demand and leaves no message", %{port: port} do
      session = hosted(port, "count", to: 100_000)
      assert [_, _] = session |> DemandPort.stream("n", credit: 1) |> Enum.take(2)
      assert eventually(fn -> DemandPort.health!(port)["host_calls"]["open"] == 0 end)
      refute_received _
    end

    test "raises the demand's error after what came before it", %{port: port} do
      session = hosted(port, "boom")
      assert_raise Error, ~r/boom/, fn -> session |> DemandPort.stream("n") |> Enum.to_list() end
      gone = %Session{server: :nobody_is_there, name: "s"}
      assert_raise Error, ~r/not running/, fn -> gone |> DemandPort.stream("n") |> Enum.to_list() end
    end

    test "of two can be zipped", %{port: port} do
      one = hosted(port, "count", to: 50)
      two = hosted(port, "count", to: 50)
      zipped = Stream.zip(DemandPort.stream(one, "n", credit: 1), DemandPort.stream(two, "n", credit: 1))
      assert Enum.count(zipped) > 0
      refute_received _
    end
  end

  describe "a host node" do
    test "gets its inputs and context and gives outputs", %{port: port} do
      session = hosted(port, "echo", text: "x")

      assert %{"output" => "x", "left" => left, "arg" => arg} =
               DemandPort.demand!(session, "n", deadline_ms: 9_000)

      assert left in 1..9_000 and arg == inspect(self())
    end

    test "that crashes or answers nonsense is the node's error", %{port: port} do
      assert {:error, %Error{code: :node_failed, message: "RuntimeError: boom", node: "n"} = error} =
               DemandPort.demand(hosted(port, "boom"), "n")

      assert error.traceback =~ ~r/features_test.exs:\d+: .*Nodes.handle_node\/3/

      # One that no clause takes: without what it was given.
      assert {:error, %Error{code: :node_failed, message: "FunctionClauseError: no function" <> _} = error} =
               DemandPort.demand(hosted(port, "count", secret: "of a customer"), "n")

      assert error.traceback =~ "Nodes.handle_node/3"
      refute error.traceback =~ "of a customer"

      # One of ours keeps its code, as of a node in Python.
      assert {:error, %Error{code: :forbidden, message: "not here", traceback: traceback}} =
               DemandPort.demand(hosted(port, "forbid"), "n")

      assert traceback =~ "Nodes.handle_node/3"

      assert {:error, %Error{code: :node_failed, message: message}} =
               DemandPort.demand(hosted(port, "odd"), "n")

      assert message =~ "what_is_this"
      assert :pong = DemandPort.ping(port)
    end

    test "that crashes has its inputs in no log", %{port: port} do
      session = hosted(port, "boom", secret: "of a customer")
      log = ExUnit.CaptureLog.capture_log(fn -> assert {:error, _} = DemandPort.demand(session, "n") end)
      assert log =~ "boom"
      refute log =~ "of a customer"
    end

    test "is shut down when nobody wants it, and may clean up", %{port: port} do
      session = hosted(port, "wait")
      demand = DemandPort.demand_async!(session, "n")
      assert_receive {:waiting, _pid}, @wait
      DemandPort.cancel(demand)
      assert_receive {:demand_error, "n", %Error{code: :cancelled}}, @wait
      assert_receive {:stopped, :shutdown}, @wait
      assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.demand(session, "n", deadline_ms: 100)
      assert_receive {:stopped, :shutdown}, @wait
    end

    test "killed from outside is the node's error", %{port: port} do
      session = hosted(port, "wait")
      DemandPort.demand_async!(session, "n")
      assert_receive {:waiting, pid}, @wait
      Process.exit(pid, :kill)
      assert_receive {:demand_error, "n", %Error{code: :node_failed, message: message}}, @wait
      assert message =~ "killed"
    end

    test "takes terms through a graph unchanged", %{port: port} do
      session = hosted(port, "wait")
      DemandPort.demand_async!(session, "n")
      assert_receive {:waiting, pid}, @wait
      send(pid, {:go, {:ok, %{output: {self(), :atom}}}})
      assert_receive {:demand_complete, "n", %{"output" => {me, :atom}}}, @wait
      assert me == self()
    end

    test "may be a tool or a search", %{port: port} do
      graph =
        Graph.new()
        |> Graph.node("tool", "tool-executor", tool: "add", arguments: %{a: 1, b: 2})
        |> Graph.node("no", "tool-executor", tool: "fly")
        |> Graph.node("rag", "rag-search", query: "cats", limit: 2)

      session = DemandPort.open!(port, graph, host: Nodes)
      assert %{"result" => 3} = DemandPort.demand!(session, "tool")
      assert {:error, %Error{message: "no tool fly"}} = DemandPort.demand(session, "no")

      assert %{"documents" => ["cats 1", "cats 2"], "context" => "cats 1\n\ncats 2"} =
               DemandPort.demand!(session, "rag")
    end

    test "is of no use without a host, nor with a module that runs nothing", %{port: port} do
      graph = Graph.new() |> Graph.node("n", "mine")

      for option <- [host_types: :all, host_else: ["mine"], host_timeout_ms: 5] do
        text = "option #{inspect(elem(option, 0))} of DemandPort.open needs :host"
        assert_raise ArgumentError, text, fn -> DemandPort.open(port, graph, [option]) end
      end

      for odd <- [String, {String, 1}, :no_such_module] do
        assert_raise ArgumentError, ~r/:host of DemandPort.open must be a module with handle_node/, fn ->
          DemandPort.open(port, graph, host: odd)
        end
      end
    end
  end

  test "a person answers, also after other demands and edits", %{port: port} do
    session = DemandPort.open!(port, text() |> Graph.node("ask", "human-input", prompt: "Name?"))
    demand = DemandPort.demand_async!(session, "ask", events: true, tag: :ask)
    assert_receive {:ask, {:node_event, _, %{"event" => "waiting_for_input", "prompt" => "Name?"}}}, @wait
    DemandPort.set_input!(session, "in", "text", "bye")
    assert %{"text" => "bye"} = DemandPort.demand!(session, "out")
    assert {:ok, _} = DemandPort.answer(session, "ask", "Ada")
    assert_receive {:ask, {:demand_complete, "ask", %{"value" => "Ada"}}}, @wait
    assert %Demand{} = demand
  end

  describe "events" do
    test "are heard, and replayed to who comes back", %{port: port} do
      session = DemandPort.open!(port, text())
      assert {:ok, %{first: 0, next: 0}} = DemandPort.subscribe(session)
      DemandPort.demand!(session, "out")
      heard = events(session.name, "demand_completed")
      assert hd(heard)["event"] == "demand_started"
      assert Enum.map(heard, & &1["seq"]) == Enum.to_list(0..(length(heard) - 1))
      assert :ok = DemandPort.unsubscribe(session)
      DemandPort.demand!(session, "out")
      refute_receive {:node_event, _, _}, 50
      last = List.last(heard)["seq"]
      assert {:ok, %{next: next}} = DemandPort.subscribe(session, since: last + 1)

      assert Enum.map(events(session.name, "demand_completed"), & &1["seq"]) ==
               Enum.to_list((last + 1)..(next - 1))
    end

    test "go to every subscriber once, each from its own place on", %{port: port} do
      session = DemandPort.open!(port, text(), event_history: 100)
      DemandPort.demand!(session, "out")
      {:ok, %{next: next}} = DemandPort.subscribe(session, tag: :new)
      test = self()

      other =
        spawn_link(fn ->
          {:ok, _} = DemandPort.subscribe(session, since: 0)
          send(test, :subscribed)
          Enum.each(events(session.name, "edited"), &send(test, {:other, &1["seq"]}))
          Process.sleep(:infinity)
        end)

      assert_receive :subscribed, @wait
      DemandPort.set_input!(session, "in", "text", "x")
      assert_receive {:new, {:node_event, _, %{"event" => "edited", "seq" => ^next}}}, @wait
      for seq <- 0..next, do: assert_receive({:other, ^seq}, @wait)
      refute_received {:new, {:node_event, _, _}}
      Process.unlink(other)
      Process.exit(other, :kill)
    end

    defp events(session, last, heard \\ []) do
      receive do
        {:node_event, ^session, %{"event" => ^last} = event} -> Enum.reverse([event | heard])
        {:node_event, ^session, event} -> events(session, last, [event | heard])
      after
        @wait -> flunk("no event #{last}; heard #{inspect(heard)}")
      end
    end
  end

  describe "receivers" do
    test "are several, and the demand ends with the last", %{port: port} do
      session = hosted(port, "wait")
      [one, two] = for _ <- 1..2, do: spawn(fn -> Process.sleep(:infinity) end)
      DemandPort.demand_async!(session, "n", to: [one, two])
      assert_receive {:waiting, _}, @wait
      Process.exit(one, :kill)
      assert :pong = DemandPort.ping(port)
      refute_received {:stopped, _}
      Process.exit(two, :kill)
      assert_receive {:stopped, :shutdown}, @wait
    end

    test "need not be the owner", %{port: port} do
      session = hosted(port, "wait")
      receiver = spawn(fn -> Process.sleep(:infinity) end)
      DemandPort.demand_async!(session, "n", to: receiver, owner: :none)
      assert_receive {:waiting, pid}, @wait
      Process.exit(receiver, :kill)
      assert :pong = DemandPort.ping(port)
      send(pid, {:go, {:ok, %{}}})
      assert eventually(fn -> DemandPort.info!(port).open_demands == 0 end)
      refute_received {:stopped, _}
    end

    test "that sleep are never sent more than the credit, and lose nothing", %{port: port} do
      session = hosted(port, "count", to: 100_000)
      test = self()

      consumer =
        spawn_link(fn ->
          DemandPort.demand_async!(session, "n", credit: 16)
          send(test, :demanded)
          receive do: (:wake -> :ok)
          send(test, {:text, collect([])})
        end)

      assert_receive :demanded, @wait
      # Until the service has had all that the host streamed, whose call is over then.
      assert eventually(fn ->
               DemandPort.health!(port)["host_calls"]["open"] == 0 and length_of(consumer) == 16
             end)

      send(consumer, :wake)
      assert_receive {:text, text}, 30_000
      assert text == Enum.map_join(1..100_000, &"#{&1} ")
    end

    defp length_of(pid), do: pid |> Process.info(:message_queue_len) |> elem(1)

    defp collect(chunks) do
      receive do
        {:node_stream, "n", chunk} ->
          assert length_of(self()) <= 16
          collect([chunk | chunks])

        {:demand_complete, "n", _} ->
          chunks |> Enum.reverse() |> Enum.join()
      end
    end
  end

  describe "a broadcast" do
    defmodule PubSub do
      # As Phoenix.PubSub.broadcast/3 is called.
      def broadcast(server, topic, message), do: send(server, {topic, message}) && :ok
    end

    test "carries chunks, the outputs, or the error", %{port: port} do
      {:ok, _} = Registry.start_link(keys: :duplicate, name: __MODULE__.Topics)
      {:ok, _} = Registry.register(__MODULE__.Topics, "room", nil)
      session = hosted(port, "count", to: 20)

      for to <- [{Registry, __MODULE__.Topics, "room"}, {PubSub, self(), "room"}] do
        DemandPort.edit!(session, {:invalidate, "n"})
        DemandPort.demand_async!(session, "n", broadcast: to)
        {text, output} = room(to, "")
        assert text == output and output == Enum.map_join(1..20, &"#{&1} ")
      end

      DemandPort.demand_async!(hosted(port, "boom"), "n", broadcast: {PubSub, self(), "room"})
      assert_receive {"room", {:workflow_error, "n", %Error{code: :node_failed}}}, @wait
      refute_received _
    end

    defp room({adapter, _, topic} = to, text) do
      message =
        receive do
          {^topic, message} when adapter == PubSub -> message
          message when adapter == Registry -> message
        after
          @wait -> flunk("nothing is broadcast")
        end

      case message do
        {:workflow_stream, "n", chunk} -> room(to, text <> chunk)
        {:workflow_output, "n", %{"output" => output}} -> {text, output}
      end
    end

    test "is refused where the adapter cannot", %{port: port} do
      session = DemandPort.open!(port, text())

      assert_raise ArgumentError, ~r/:broadcast/, fn ->
        DemandPort.demand_async(session, "out", broadcast: {Enum, 1, 2})
      end
    end
  end

  describe "a restart" do
    setup do
      name = :"demand_port_restart_#{System.unique_integer([:positive])}"
      start_supervised!(%{DemandPort.child_spec(name: name) | id: name})
      {:ok, port: name}
    end

    test "lets what runs end, holds what comes, and restores sessions", %{port: port} do
      session = hosted(port, "wait", [], restore: true)
      kept = DemandPort.open!(port, text(), restore: true)
      lost = DemandPort.open!(port, text())
      DemandPort.set_input!(kept, "in", "text", "kept")
      DemandPort.edit!(kept, {:add_node, %{id: "more", node_type: "text-input", data: %{text: "more"}}})
      before = DemandPort.info!(port).os_pid
      DemandPort.demand_async!(session, "n", tag: :running)
      assert_receive {:waiting, pid}, @wait
      restart = Task.async(fn -> DemandPort.restart(port) end)
      assert eventually(fn -> DemandPort.info!(port).held == 0 and draining?(port) end)
      held = Task.async(fn -> DemandPort.demand(kept, "out") end)
      assert eventually(fn -> DemandPort.info!(port).held == 1 end)
      send(pid, {:go, {:ok, %{output: "done"}}})
      assert_receive {:running, {:demand_complete, "n", %{"output" => "done"}}}, @wait
      assert :ok = Task.await(restart, @wait)
      assert {:ok, %{"text" => "kept"}} = Task.await(held, @wait)
      assert %{"text" => "more"} = DemandPort.demand!(kept, "more")
      assert {:error, %Error{code: :unknown_session}} = DemandPort.demand(lost, "out")
      assert DemandPort.info!(port).os_pid != before
      # The host is the session's still.
      DemandPort.demand_async!(session, "n", tag: :again)
      assert_receive {:waiting, pid}, @wait
      send(pid, {:go, {:ok, %{}}})
      assert_receive {:again, {:demand_complete, "n", _}}, @wait
    end

    defp draining?(port), do: match?({:draining, _}, :sys.get_state(port))

    test "after a kill restores sessions, inputs and subscriptions", %{port: port} do
      session = DemandPort.open!(port, text(), restore: true)
      DemandPort.set_input!(session, "in", "text", "first")
      DemandPort.set_input!(session, "in", "text", "second")
      {:ok, _} = DemandPort.subscribe(session, kinds: [])
      {_, 0} = System.cmd("kill", ["-9", "#{DemandPort.info!(port).os_pid}"])
      assert eventually(fn -> DemandPort.info!(port).restarts == 1 end)
      assert %{"text" => "second"} = DemandPort.demand!(session, "out")
      # Said by the client, before anything of the new service.
      assert [%{"event" => "session_restored", "seq" => nil}, %{"seq" => 0} | _] =
               events(session.name, "demand_completed")

      DemandPort.close!(session)
      assert DemandPort.info!(port).restorable_sessions == []
      assert_receive {:node_event, _, %{"event" => "session_closed", "error" => nil}}, @wait
    end

    test "ends the events of a session that is not restored, and so does the end of the connection", %{
      port: port
    } do
      {:ok, _} = DemandPort.subscribe(DemandPort.open!(port, text()), tag: :lost)
      kept = DemandPort.open!(port, text(), restore: true)
      {:ok, _} = DemandPort.subscribe(kept, kinds: [], tag: :kept)
      :ok = DemandPort.restart(port)
      assert_receive {:lost, {:node_event, _, %{"event" => "session_closed", "error" => error}}}, @wait
      assert %{"code" => "backend_unavailable", "retryable" => true} = error
      assert_receive {:kept, {:node_event, _, %{"event" => "session_restored"}}}, @wait
      GenServer.stop(port)
      assert_receive {:kept, {:node_event, _, %{"event" => "session_closed", "error" => error}}}, @wait
      assert %{"code" => "backend_unavailable"} = error
      refute_received {:lost, _}
    end

    test "comes for a service that is stopped", _context do
      name = :"demand_port_stopped_#{System.unique_integer([:positive])}"
      start_supervised!(%{DemandPort.child_spec(name: name, hang_timeout_ms: 1_000) | id: name})
      session = DemandPort.open!(name, text(), restore: true)
      {:ok, _} = DemandPort.demand_async(hosted(name, "wait"), "n")
      assert_receive {:waiting, _}, @wait
      os_pid = DemandPort.info!(name).os_pid
      {_, 0} = System.cmd("kill", ["-STOP", "#{os_pid}"])
      assert_receive {:demand_error, "n", %Error{code: :backend_unavailable, message: message}}, @wait
      assert message =~ "did not answer"
      assert %{"text" => "hello"} = DemandPort.demand!(session, "out")
      assert DemandPort.info!(name).os_pid != os_pid
    end

    test "is asked for once by many", %{port: port} do
      tasks = for _ <- 1..5, do: Task.async(fn -> DemandPort.restart(port) end)
      assert Enum.all?(Task.await_many(tasks, 20_000), &(&1 == :ok))
      assert :pong = DemandPort.ping(port)
    end
  end

  test "a demand that is held can be cancelled before the service has it" do
    start_supervised!(%{DemandPort.child_spec(name: :demand_port_held) | id: :held})
    session = %Session{server: :demand_port_held, name: "s"}
    demand = DemandPort.demand_async!(session, "n")
    DemandPort.cancel(demand)
    assert_receive {:demand_error, "n", %Error{code: :cancelled}}, @wait
    refute_receive {:demand_error, _, _}, 300
  end

  defp eventually(condition, tries \\ 1000) do
    cond do
      condition.() -> true
      tries == 0 -> false
      true -> Process.sleep(10) && eventually(condition, tries - 1)
    end
  end
end
