defmodule DemandPort.ConnectionTest do
  # The client against a service that misbehaves on request (support/fake_service.py).
  use ExUnit.Case, async: true

  import DemandPort.Test.Services
  import ExUnit.CaptureLog

  alias DemandPort.{Demand, Error, Session}

  @wait 5_000

  # What arrives up to the terminal of `node`, as a list.
  defp collect(node, seen \\ []) do
    receive do
      {:node_stream, ^node, _} = message -> collect(node, [message | seen])
      {:demand_complete, ^node, _} = message -> Enum.reverse([message | seen])
      {:demand_error, ^node, _} = message -> Enum.reverse([message | seen])
    after
      @wait -> flunk("no terminal of #{node}; so far #{inspect(Enum.reverse(seen))}")
    end
  end

  defp health(server) do
    {:ok, health} = DemandPort.health(server)
    health
  end

  describe "a demand" do
    test "delivers exactly the documented tuples" do
      session = fake() |> session()
      assert {:ok, %Demand{node: "stream-3"}} = DemandPort.demand_async(session, "stream-3")

      assert collect("stream-3") == [
               {:node_stream, "stream-3", "chunk 0 "},
               {:node_stream, "stream-3", "chunk 1 "},
               {:node_stream, "stream-3", "chunk 2 "},
               {:demand_complete, "stream-3", %{"text" => "chunk 0 chunk 1 chunk 2 "}}
             ]
    end

    test "wraps them with a tag, nil included" do
      session = fake() |> session()
      {:ok, _} = DemandPort.demand_async(session, "stream-1", tag: {:my, 1})
      assert_receive {{:my, 1}, {:node_stream, "stream-1", _}}, @wait
      assert_receive {{:my, 1}, {:demand_complete, "stream-1", _}}, @wait
      {:ok, _} = DemandPort.demand_async(session, "fail", tag: nil)
      assert_receive {nil, {:demand_error, "fail", %Error{code: :node_failed, node: "fail"}}}, @wait
    end

    test "goes to a pid, a name or a name on a node" do
      session = fake() |> session()
      Process.register(self(), :demand_port_receiver)

      for to <- [self(), :demand_port_receiver, {:demand_port_receiver, node()}] do
        {:ok, _} = DemandPort.demand_async(session, "echo", to: to)
        assert_receive {:demand_complete, "echo", _}, @wait
      end

      assert_raise ArgumentError, ~r/names no process/, fn ->
        DemandPort.demand_async(session, "echo", to: :nobody_of_this_name)
      end
    end

    test "sends only the options that were set" do
      session = fake() |> session()
      assert {:ok, %{"options" => %{"credit" => 0} = sent}} = DemandPort.demand(session, "echo")
      assert map_size(sent) == 1

      {:ok, _} =
        DemandPort.demand_async(session, "echo", deadline_ms: 9, priority: -1, credit: :infinity, events: true)

      assert_receive {:node_event, "s", %{"event" => "task_started", "node" => "echo"}}, @wait
      assert_receive {:demand_complete, "echo", %{"options" => sent}}, @wait
      assert sent == %{"deadline_ms" => 9, "priority" => -1, "events" => true}
    end

    test "takes its credit from the connection's default" do
      session = fake("", credit: 7) |> session()
      {:ok, _} = DemandPort.demand_async(session, "echo")
      assert_receive {:demand_complete, "echo", %{"options" => %{"credit" => 7}}}, @wait
    end

    test "gives credit back as it delivers" do
      server = fake()
      {:ok, _} = DemandPort.demand_async(session(server), "stream-1000", credit: 8)
      assert length(collect("stream-1000")) == 1_001
      grants = for [_, n] <- health(server)["credits"], do: n
      assert Enum.all?(grants, &(&1 in 4..8))
      assert Enum.sum(grants) in 992..1_000
    end

    test "ends with a typed error when it is refused by a plain error" do
      session = fake() |> session()
      assert {:error, %Error{code: :bad_message}} = DemandPort.demand(session, "refuse")
    end

    test "keeps the text of a code that is not known" do
      session = fake() |> session()

      assert {:error, %Error{code: :unknown, details: %{"code" => "brand_new"}}} =
               DemandPort.demand(session, "new-code")
    end

    test "delivers nothing after its terminal" do
      server = fake()
      session = session(server)
      {:ok, _} = DemandPort.demand_async(session, "twice")
      {:ok, _} = DemandPort.demand_async(session, "late")
      assert_receive {:demand_complete, "twice", %{"n" => 1}}, @wait
      assert_receive {:demand_complete, "late", _}, @wait
      assert :pong = DemandPort.ping(server)
      refute_received _
    end

    test "is cancelled, once, and a second cancel does nothing" do
      session = fake() |> session()
      {:ok, demand} = DemandPort.demand_async(session, "never")
      assert_receive {:node_stream, "never", "started"}, @wait
      assert :ok = DemandPort.cancel(demand)
      assert :ok = DemandPort.cancel(demand)
      assert [{:demand_error, "never", %Error{code: :cancelled}}] = collect("never")
      assert :ok = DemandPort.cancel(demand)
      assert :pong = DemandPort.ping(session.server)
      refute_received _
    end

    test "is cancelled when its receiver dies" do
      server = fake()
      receiver = spawn(fn -> Process.sleep(:infinity) end)
      {:ok, _} = DemandPort.demand_async(session(server), "never", to: receiver)
      assert health(server)["open"] == 1
      Process.exit(receiver, :kill)
      assert eventually(fn -> health(server)["open"] == 0 end)
      assert length(health(server)["cancelled"]) == 1
    end

    test "is cancelled when its receiver was dead already" do
      server = fake()
      receiver = spawn(fn -> :ok end)
      assert :pong = DemandPort.ping(server)
      {:ok, _} = DemandPort.demand_async(session(server), "never", to: receiver)
      assert eventually(fn -> length(health(server)["cancelled"]) == 1 end)
    end

    test "of a large output arrives whole, others between its parts" do
      session = fake() |> session()
      {:ok, _} = DemandPort.demand_async(session, "part-1000000")
      {:ok, _} = DemandPort.demand_async(session, "echo")
      assert_receive {:demand_complete, "part-1000000", %{"bytes" => bytes}}, @wait
      assert bytes == :binary.copy(<<0xFF>>, 1_000_000)
      assert_receive {:demand_complete, "echo", _}, @wait
    end
  end

  describe "a waiting demand" do
    test "returns the outputs and leaves no message" do
      session = fake() |> session()
      assert {:ok, %{"text" => "chunk 0 " <> _}} = DemandPort.demand(session, "stream-50")
      refute_received _
    end

    test "calls on_stream for each chunk, in the caller" do
      session = fake() |> session()
      on_stream = fn node, chunk -> send(self(), {:seen, node, chunk}) end
      assert {:ok, _} = DemandPort.demand(session, "stream-3", on_stream: on_stream, credit: 1)
      for chunk <- ["chunk 0 ", "chunk 1 ", "chunk 2 "], do: assert_received({:seen, "stream-3", ^chunk})
      refute_received _
    end

    test "is cancelled on timeout and leaves no late message" do
      server = fake()

      assert {:error, %Error{code: :deadline_exceeded}} =
               DemandPort.demand(session(server), "never", timeout: 50)

      assert eventually(fn -> health(server)["open"] == 0 end)
      refute_received _
    end

    test "is cancelled when on_stream raises" do
      server = fake()

      assert_raise RuntimeError, fn ->
        DemandPort.demand(session(server), "never", on_stream: fn _, _ -> raise "no" end)
      end

      assert eventually(fn -> health(server)["open"] == 0 end)
      refute_received _
    end

    test "is cancelled when the caller dies" do
      server = fake()
      caller = spawn(fn -> DemandPort.demand(session(server), "never", timeout: :infinity) end)
      assert eventually(fn -> health(server)["open"] == 1 end)
      Process.exit(caller, :kill)
      assert eventually(fn -> health(server)["open"] == 0 end)
    end

    test "of a connection that is not there is an error" do
      session = %Session{server: :no_connection_of_this_name, name: "s"}

      assert {:error, %Error{code: :backend_unavailable, retryable: true}} =
               DemandPort.demand(session, "echo")

      assert {:error, %Error{code: :backend_unavailable}} = DemandPort.demand_async(session, "echo")
      assert {:error, %Error{code: :backend_unavailable}} = DemandPort.ping(:no_connection_of_this_name)
    end
  end

  describe "the start" do
    test "does not wait; requests do, in order" do
      server = fake("slow")
      assert DemandPort.info!(server).os_pid == nil
      {:ok, _} = DemandPort.demand_async(session(server), "echo")
      {:ok, demand} = DemandPort.demand_async(session(server), "never")
      DemandPort.cancel(demand)
      assert :pong = DemandPort.ping(server)
      assert_receive {:demand_complete, "echo", _}, @wait
      assert [{:demand_error, "never", %Error{code: :cancelled}}] = collect("never")
      assert %{"protocol" => [1, 1], "client" => "demand_port/" <> _} = health(server)["hello"]
    end

    test "holds only so many requests" do
      server = fake("mute", max_pending: 2)
      session = session(server)
      assert {:ok, _} = DemandPort.demand_async(session, "echo")
      assert {:ok, _} = DemandPort.demand_async(session, "echo")
      assert {:error, %Error{code: :queue_full, retryable: true}} = DemandPort.demand_async(session, "echo")
      assert {:error, %Error{code: :queue_full}} = DemandPort.demand(session, "echo")
    end

    for {mode, code, text} <- [
          {"mute", :backend_unavailable, "not ready within"},
          {"old", :unsupported_protocol, "protocol"},
          {"die", :backend_unavailable, "exit status 3"}
        ] do
      test "of a service that is #{mode} fails typed, and after some of them for good" do
        server = fake(unquote(mode), start_timeout_ms: 500, max_restarts: 1)
        monitor = Process.monitor(server)
        assert {:error, %Error{code: unquote(code)}} = DemandPort.demand(session(server), "echo")
        assert_receive {:DOWN, ^monitor, :process, _, {:shutdown, %Error{code: unquote(code)} = error}}, @wait
        assert error.message =~ unquote(text)
      end
    end

    test "without a Python fails at once" do
      Process.flag(:trap_exit, true)
      assert {:error, %Error{code: :backend_unavailable}} = DemandPort.start_link(python: "no-such-python")

      assert {:error, %Error{code: :backend_unavailable} = error} =
               DemandPort.start_link(cd: "/no/such/folder")

      assert error.message =~ ~s(no folder "/no/such/folder"; set the option :cd)
    end

    test "under a name answers to it" do
      fake("", name: :demand_port_named)
      assert :pong = DemandPort.ping(:demand_port_named)
    end

    test "refuses options that it does not know" do
      assert_raise ArgumentError, ~r/:pyton is not known/, fn -> DemandPort.start_link(pyton: "x") end
    end
  end

  describe "the end of the service" do
    for {node, code} <- [
          {"torn", :backend_unavailable},
          {"exit-0", :backend_unavailable},
          {"exit-7", :backend_unavailable},
          {"garbage", :bad_message},
          {"parts-endless", :too_large},
          {"bye", :bad_frame}
        ] do
      test "by #{node} ends everything that is open, once" do
        server = fake("", max_frame_bytes: 1_000_000)
        session = session(server)
        {:ok, _} = DemandPort.demand_async(session, "never", tag: :a)
        {:ok, _} = DemandPort.demand_async(session, "never", tag: :b)
        waiting = Task.async(fn -> DemandPort.demand(session, "never") end)
        asking = Task.async(fn -> DemandPort.models(server) end)
        assert :pong = DemandPort.ping(server)
        assert eventually(fn -> health(server)["open"] == 3 end)

        {:ok, _} = DemandPort.demand_async(session, unquote(node), tag: :c)

        for tag <- [:a, :b, :c] do
          assert_receive {^tag, {:demand_error, _, %Error{code: unquote(code)}}}, @wait
        end

        assert {:error, %Error{code: unquote(code)}} = Task.await(waiting)
        assert {:error, %Error{code: unquote(code)}} = Task.await(asking)
        # The next service answers, in the same process.
        assert {:ok, _} = DemandPort.demand(session, "echo")
        assert Process.alive?(server)
        refute_received {_, {:demand_error, _, _}}
      end
    end

    test "more often than it may ends the process, and the supervisor starts another" do
      name = :demand_port_restarted
      options = fake_options("", name: name, max_restarts: 0)
      start_supervised!({DemandPort, options})
      session = session(name)
      before = Process.whereis(name)

      assert {:error, %Error{code: :backend_unavailable, retryable: true}} =
               DemandPort.demand(session, "exit-1")

      assert eventually(fn -> Process.whereis(name) not in [nil, before] end)
      assert {:ok, _} = DemandPort.demand(session, "echo")
    end

    test "a demand of before the restart names nothing after it" do
      name = :demand_port_stale_demand
      start_supervised!({DemandPort, fake_options("", name: name)})
      session = session(name)
      {:ok, old} = DemandPort.demand_async(session, "never", tag: :old)
      assert {:error, _} = DemandPort.demand(session, "exit-1")
      assert_receive {:old, {:demand_error, _, _}}, @wait
      assert DemandPort.ping(name) == :pong
      {:ok, _} = DemandPort.demand_async(session, "never", tag: :new)
      DemandPort.cancel(old)
      assert health(name)["cancelled"] == []
    end

    test "by a stop of the connection ends the service process" do
      server = fake()
      {:ok, _} = DemandPort.demand_async(session(server), "never")
      os_pid = health(server)["os_pid"]
      assert alive?(os_pid)
      stop_supervised!(DemandPort)
      assert_receive {:demand_error, "never", %Error{code: :backend_unavailable}}, @wait
      assert eventually(fn -> not alive?(os_pid) end)
    end

    test "by a kill of the connection ends the service process" do
      server = fake()
      os_pid = health(server)["os_pid"]
      Process.exit(server, :kill)
      assert eventually(fn -> not alive?(os_pid) end)
    end
  end

  describe "requests" do
    test "a reply that does not come in time is an error, and leaves no message" do
      server = fake()
      assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.models(server, timeout: 20)
      assert :pong = DemandPort.ping(server)
      refute_received _
    end

    test "over the service's limit are refused here, and the connection lives" do
      server = fake()
      big = String.duplicate("x", 2_000_000)
      assert {:error, %Error{code: :too_large}} = DemandPort.set_input(session(server), "n", "p", big)
      assert :pong = DemandPort.ping(server)
    end

    test "over the number of open requests are refused" do
      server = fake()
      assert :pong = DemandPort.ping(server)
      results = for _ <- 1..2_100, do: DemandPort.demand_async(session(server), "never", tag: :many)
      assert {:ok, _} = hd(results)
      assert {:error, %Error{code: :queue_full, retryable: true}} = List.last(results)
    end

    test "that cannot be encoded are refused in the caller" do
      assert {:error, %Error{code: :bad_message}} = DemandPort.validate(fake(), %{:nodes => 1, "nodes" => 2})
    end

    test "edits are built from tuples and maps" do
      session = fake() |> session()

      operations = [
        {:add_node, %{id: "a"}},
        {:remove_node, "a"},
        {:add_edge, %{}},
        {:remove_edge, "e"},
        {:update_node_data, "a", %{}},
        {:set_input, "a", "p", 1},
        {:clear_input, "a", "p"},
        {:invalidate, "a"},
        %{op: "invalidate", node: "a"}
      ]

      assert {:ok, sent} = DemandPort.edit(session, operations)

      assert sent ==
               ~w(add_node remove_node add_edge remove_edge update_node_data set_input clear_input invalidate invalidate)

      assert {:ok, ["clear_input"]} = DemandPort.clear_input(session, "a", "p")
      assert {:ok, ["invalidate"]} = DemandPort.edit(session, {:invalidate, "a"})
      assert_raise ArgumentError, ~r/not an edit operation/, fn -> DemandPort.edit(session, {:paint, "a"}) end
    end

    test "get_output tells its three states apart" do
      session = fake() |> session()
      assert {:ok, "v"} = DemandPort.get_output(session, "fresh", "v")
      assert :absent = DemandPort.get_output(session, "absent", "v")
      assert :skipped = DemandPort.get_output(session, "skipped", "v")
    end

    test "every other one is sent with its fields" do
      server = fake()
      session = session(server)
      assert {:ok, %{"kind" => "snapshot", "fields" => ["'s'"]}} = DemandPort.snapshot(session)

      assert {:ok, %{"kind" => "node_types", "fields" => ["'merge'"]}} =
               DemandPort.node_types(server, filter: "merge")

      assert {:ok, %{"kind" => "node_types", "fields" => ["None"]}} = DemandPort.node_types(server)

      assert {:ok, %{"kind" => "unload_model", "fields" => [fields]}} =
               DemandPort.unload_model(server, "m", when_busy: :wait)

      assert fields == "{'model': 'm', 'when_busy': 'wait'}"
      reference = %{"id" => "1f", "model" => "m", "backend" => "llama.cpp"}
      assert {:ok, %{"fields" => [fields]}} = DemandPort.unload_model(server, reference)
      assert fields == "{'id': '1f', 'when_busy': 'stop'}"

      assert {:ok, %{"kind" => "load_model", "fields" => [fields]}} =
               DemandPort.load_model(server, "m", threads: 2, balance: :round_robin)

      assert fields =~ "'threads': 2" and fields =~ "'balance': 'round_robin'" and fields =~ "'model': 'm'" and
               not (fields =~ "timeout")

      assert {:ok, %{"kind" => "validate"}} = DemandPort.validate(server, %{nodes: [], edges: []})
      assert {:ok, %{"completed" => 0}} = DemandPort.drain(server)

      assert {:ok, %Session{name: "mine"} = opened} =
               DemandPort.open(server, %{nodes: []}, session: "mine", max_running: 1)

      assert :ok = DemandPort.close(opened)
      assert {:ok, %Session{name: "session-" <> _}} = DemandPort.open(server, %{nodes: []})
    end
  end

  describe "messages that nothing expects" do
    test "are logged, and the connection lives" do
      server = fake()
      log = capture_log(fn -> assert {:ok, _} = DemandPort.demand(session(server), "odd") end)
      assert log =~ "from_the_future"
      assert log =~ "987654"
      assert :pong = DemandPort.ping(server)
    end

    test "from other processes are logged" do
      server = fake()

      log =
        capture_log(fn ->
          send(server, :what_is_this)
          DemandPort.ping(server)
        end)

      assert log =~ "what_is_this"
    end
  end

  test "the service's log goes to Logger from the chosen level on" do
    log = capture_log(fn -> assert :pong = DemandPort.ping(fake("log", log_level: :warning)) end)
    assert log =~ "a line of warning"
    assert log =~ "a line of error"
    refute log =~ "[info] a line of info"
    refute log =~ "a line of debug"
  end

  test "a thousand demands at once end once each" do
    session = fake() |> session()
    # They are as many as this service takes at once, so its greeting must have been answered.
    assert :pong = DemandPort.ping(session.server)
    for n <- 1..1_000, do: {:ok, _} = DemandPort.demand_async(session, "stream-5", tag: n)

    for n <- 1..1_000 do
      for _ <- 1..5, do: assert_receive({^n, {:node_stream, _, _}}, @wait)
      assert_receive {^n, {:demand_complete, _, _}}, @wait
    end

    refute_received _
  end
end
