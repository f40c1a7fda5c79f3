defmodule DemandPort.UnitsTest do
  use ExUnit.Case, async: true

  alias DemandPort.{Credit, Delivery, Error, Launch, Options, Relay, Restore, Session, Subscriptions}

  doctest Error
  doctest Credit
  doctest Options
  doctest DemandPort
  doctest DemandPort.Broadcaster
  doctest DemandPort.Telemetry
  doctest DemandPort.Vector

  describe "errors" do
    test "every code of the protocol's document is known, and no other" do
      spec = File.read!(Path.expand("../../protocol/SPEC.md", __DIR__))
      [_, section] = String.split(spec, "## 7. Errors")
      [table | _] = String.split(section, "## 8.")

      documented =
        for "| " <> row <- String.split(table, "\n"),
            [codes | _] = String.split(row, " | "),
            codes != "code",
            code <- String.split(codes, ", "),
            do: code

      assert Enum.sort(documented) == Error.codes() |> Enum.map(&Atom.to_string/1) |> Enum.sort()
    end

    test "an unknown code makes no atom" do
      code = "code_#{System.unique_integer([:positive])}"
      assert %Error{code: :unknown, details: %{"code" => ^code}} = Error.from_wire(%{"code" => code})
      assert_raise ArgumentError, fn -> String.to_existing_atom(code) end
    end

    test "details stay beside an unknown code" do
      assert Error.from_wire(%{"code" => "x", "details" => %{"a" => 1}}).details == %{"a" => 1, "code" => "x"}
      assert Error.from_wire(%{"code" => "x", "details" => [1]}).details == %{"code" => "x", "details" => [1]}
    end

    test "what is no error object is an error all the same" do
      for odd <- [nil, 1, "text", %{}, %{"code" => 5}],
          do: assert(%Error{code: :unknown} = Error.from_wire(odd))
    end

    test "is an exception" do
      assert_raise Error, "cycle at node a: cut it", fn ->
        raise Error, code: :cycle, message: "cut it", node: "a"
      end
    end
  end

  describe "credit" do
    test "what is under way and what waits are never more than the window, and a consumer that goes on gets all" do
      for window <- 1..40, pause <- [0, 1, 3, 100] do
        # {credit, how many the service may send, how many wait}
        Enum.reduce(1..600, {Credit.new(window), window, 0}, fn step, {credit, allowed, waiting} ->
          {credit, allowed, waiting} =
            if allowed > 0,
              do: {Credit.delivered(credit), allowed - 1, waiting + 1},
              else: {credit, 0, waiting}

          taken = if pause == 0 or rem(step, pause + 1) == 0, do: min(waiting, 1 + pause), else: 0
          waiting = waiting - taken
          {grant, credit} = if Credit.due?(credit), do: Credit.grant(credit, waiting), else: {0, credit}
          assert allowed + grant + waiting <= window
          assert allowed + grant > 0 or waiting > 0 or window == 1
          {credit, allowed + grant, waiting}
        end)
      end
    end

    test "what a consumer says that it took is granted by halves of the window, all of it in the end" do
      for window <- [1, 2, 7, 64], at_once <- 1..3 do
        {granted, credit} =
          Enum.reduce(1..300, {0, Credit.new(window)}, fn _, {granted, credit} ->
            credit = Enum.reduce(1..at_once, credit, fn _, credit -> Credit.delivered(credit) end)
            {grant, credit} = Credit.consumed(credit, at_once)
            assert grant == 0 or 2 * grant >= window
            {granted + grant, credit}
          end)

        assert 300 * at_once - granted == credit.used and 2 * credit.used < window
      end
    end

    test "a consumer that takes none gets none; 0 and infinity are never asked about" do
      used = Enum.reduce(1..4, Credit.new(4), fn _, credit -> Credit.delivered(credit) end)
      assert Credit.exhausted?(used)
      assert {0, ^used} = Credit.grant(used, 4)
      assert {2, half} = Credit.grant(used, 2)
      refute Credit.exhausted?(half)

      for window <- [0, :infinity] do
        credit = window |> Credit.new() |> Credit.delivered()
        refute Credit.due?(credit) or Credit.exhausted?(credit)
        assert {0, _} = Credit.consumed(credit, 1)
      end
    end
  end

  describe "a relay" do
    # This process is its connection.
    test "gives credit once the consumer has made room, though no further chunk comes" do
      consumer = spawn_link(&consume/0)
      true = :erlang.suspend_process(consumer)

      delivery = %Delivery{
        ref: make_ref(),
        session: "",
        node: "n",
        window: 4,
        to: [consumer],
        watch: [consumer]
      }

      session = %Session{server: self(), name: "s"}
      relay = Relay.start(delivery, fn _owner, _tried -> {:ok, session, fn -> :ok end} end, 0)
      assert_receive {:"$gen_cast", {:demand, %{ref: ref, to: [^relay]}}}, 5_000

      # Half of what the service may send: the other half would be a whole way off.
      for n <- 1..2, do: send(relay, {ref, {:node_stream, "n", n}})
      refute_receive {:"$gen_cast", {:consumed, _, _}}, 50
      true = :erlang.resume_process(consumer)
      assert_receive {:"$gen_cast", {:consumed, ^ref, 2}}, 5_000
    end
  end

  defp consume do
    receive do: (_ -> consume())
  end

  describe "what it takes to restore a session" do
    test "does not grow with what is set again and again, and keeps the order of what it is" do
      set = fn n -> %{op: "set_input", node: "a", port: "p", value: n} end
      data = fn node, data -> %{op: "update_node_data", node: node, data: data} end

      restore =
        Enum.reduce(1..100, Restore.new(%{}, %{}), fn n, restore ->
          Restore.edited(restore, [
            set.(n),
            data.("a", %{"k" => n, x: n}),
            data.("b", %{k: nil}),
            %{op: "invalidate", node: "a"}
          ])
        end)

      assert [_name, %{}, %{"edits" => edits}] = Restore.fields(restore, "s")

      assert [%{"node" => "a", "data" => %{"k" => 100, "x" => 100}}, %{"node" => "b"}, %{"value" => 100}] =
               edits

      again = Restore.edited(restore, [%{op: "remove_node", node: "a"}, %{op: "add_node", node: %{id: "a"}}])
      again = Restore.edited(again, [data.("a", %{"new" => 1})])
      assert [_name, _graph, %{"edits" => edits}] = Restore.fields(again, "s")

      assert ~w(update_node_data remove_node add_node update_node_data) == Enum.map(edits, & &1["op"])

      assert List.last(edits)["data"] == %{"new" => 1}
      assert Restore.fields(Restore.new(%{}, %{"max_running" => 1}), "s") == ["s", %{}, %{"max_running" => 1}]
    end

    test "is nothing where what was added is gone again, and what was there before stays gone" do
      kept = fn operations ->
        restore = Enum.reduce(operations, Restore.new(%{}, %{}), &Restore.edited(&2, [&1]))
        Enum.map(restore.edits, fn {_made, operation} -> operation end) |> Enum.reverse()
      end

      add = fn id -> %{op: "add_node", node: %{"id" => id}} end
      remove = fn id -> %{op: "remove_node", node: id} end
      join = fn edge -> %{op: "add_edge", edge: edge} end
      part = fn edge -> %{op: "remove_edge", edge: edge} end
      data = %{op: "update_node_data", node: "new", data: %{k: 1}}

      # The node of before has edges of before, and one of after.
      [joined, old] = [join.(%{source: "old", target: "new"}), remove.("old")]
      assert [%{"op" => "add_node"}, %{"op" => "remove_node"}] = kept.([add.("new"), joined, old])
      assert [] = kept.([add.("new"), data, joined, remove.("new")])
      assert [%{"op" => "remove_node"}] = kept.([old, add.("old"), joined, remove.("old")])
      assert [_, _, %{"op" => "update_node_data"}] = kept.([old, add.("old"), data])

      # However an edge is written, it is the one.
      long = %{"source" => "a", "source_handle" => "x", "target" => "b", "target_handle" => nil, "id" => ""}
      short = %{source: "a", sourceHandle: "x", target: "b"}
      assert [] = kept.([join.(long), part.(short)])
      assert [] = kept.([join.(short), part.("a.x->b.")])
      assert [] = kept.([join.(Map.put(short, :id, "e")), part.("e")])
      again = [part.(short), join.(long), part.(long), join.(short)]
      assert [%{"op" => "remove_edge"}, %{"op" => "add_edge", "edge" => ^short}] = kept.(again)
      assert [%{"op" => "add_edge"}, %{"op" => "remove_edge"}] = kept.([join.(short), part.("a.->b.")])
    end
  end

  describe "subscriptions" do
    defp event(seq, more \\ %{}), do: Map.merge(%{"event" => "edited", "seq" => seq}, more)

    # Takes the numbers of the events that came.
    defp came(seen \\ []) do
      receive do
        {:node_event, "s", event} -> came([{event["seq"], event["count"]} | seen])
      after
        0 -> Enum.reverse(seen)
      end
    end

    test "one that came later has nothing of a feed that lags behind it" do
      {nil, state} = Subscriptions.add(%Subscriptions{}, "s", spawn(fn -> Process.sleep(:infinity) end), [])
      [other] = Map.keys(state.sessions["s"])
      state = Subscriptions.begin_at(state, "s", other, 3)
      assert {3, state} = Subscriptions.add(state, "s", self(), [])
      # The service has not read that yet.
      state = Subscriptions.event(state, "s", event(3))
      state = Subscriptions.begin_at(state, "s", self(), 6)
      Enum.reduce(3..7, state, &Subscriptions.event(&2, "s", event(&1)))
      assert came() == [{6, nil}, {7, nil}]
    end

    test "one that asks for numbers of a service that is gone hears the next ones" do
      {500, state} = Subscriptions.add(%Subscriptions{}, "s", self(), since: 500)
      state = Subscriptions.begin_at(state, "s", self(), 2)
      Subscriptions.event(state, "s", event(2))
      assert came() == [{2, nil}]
    end

    test "each is told how much of what is gone it has missed" do
      {0, state} = Subscriptions.add(%Subscriptions{}, "s", self(), since: 0)
      state = Enum.reduce(0..4, state, &Subscriptions.event(&2, "s", event(&1)))
      Subscriptions.event(state, "s", event(9, %{"event" => "missed", "count" => 10}))
      assert came() == for(n <- 0..4, do: {n, nil}) ++ [{9, 5}]
    end

    test "of a new service: those that are restored from the start, and those that wait to be sent" do
      other = spawn(fn -> Process.sleep(:infinity) end)

      state =
        for {session, pid} <- [{"s", self()}, {"t", self()}, {"t", other}], reduce: %Subscriptions{} do
          state -> elem(Subscriptions.add(state, session, pid, since: 7), 1)
        end

      error = Error.new(:backend_unavailable, "gone", retryable: true)
      state = Subscriptions.restarted(state, ["s"], [{"t", other}], error)
      assert_received {:node_event, "t", %{"event" => "session_closed", "seq" => nil, "error" => error}}
      assert %{"code" => "backend_unavailable", "message" => "gone", "retryable" => true} = error
      assert %{"s" => %{} = s, "t" => %{} = t} = state.sessions
      assert [{me, %{at: 0}}] = Map.to_list(s)
      assert [{^other, %{at: 7}}] = Map.to_list(t)
      assert me == self()
      refute_received _

      # Those who wait are told of the service that they come to by the reply.
      state =
        state |> Subscriptions.restored("s") |> Subscriptions.restored("t") |> Subscriptions.restored("s")

      assert_received {:node_event, "s", %{"event" => "session_restored", "error" => nil}}
      refute_received _
      assert Subscriptions.close(state, "s", nil).sessions == Map.delete(state.sessions, "s")
      assert_received {:node_event, "s", %{"event" => "session_closed", "error" => nil}}
    end
  end

  test "a vector with a NaN is refused" do
    assert_raise ArgumentError, ~r/no number/, fn ->
      DemandPort.Vector.unpack(<<0, 0, 128, 63, 0, 0, 192, 127>>)
    end

    assert DemandPort.Vector.unpack(DemandPort.Vector.pack([])) == []
  end

  describe "options" do
    test "each type refuses what does not fit, and names the option" do
      refused = [
        start_link: [python: "", args: "x", args: [1], env: [{"", "x"}], env: 5, env: [{"A", 1}], cd: 1],
        start_link: [name: "a text", name: {:via, "a", 1}, name: true],
        start_link: [max_frame_bytes: 10, start_timeout_ms: 0, log_level: :loud, credit: "1", max_pending: 0],
        open: [session: "", session: 5, max_running: 0, max_queued: -1, timeout: -1, timeout: "1"],
        demand_async: [
          to: nil,
          to: "pid",
          to: {1, 2},
          deadline_ms: 0,
          priority: 1.5,
          events: 1,
          coalesce_bytes: 0
        ],
        demand: [on_stream: fn _ -> :ok end, timeout: :never, coalesce_ms: -1],
        load_model: [context_length: 0, threads: 0, gpu_layers: "all"],
        node_types: [filter: 5],
        drain: [timeout_ms: -1]
      ]

      for {function, options} <- refused, {name, _} = option <- options do
        message = assert_raise(ArgumentError, fn -> Options.validate!([option], function) end).message
        assert message =~ "option #{inspect(name)} of DemandPort.#{function} must be"
      end
    end

    test "those that do not go together are refused by name" do
      to = {Registry, :topics, "room"}

      for other <- [tag: :x, to: self()] do
        message =
          assert_raise(ArgumentError, fn -> Options.validate!([other, broadcast: to], :demand_async) end).message

        assert message =~
                 "options #{inspect(elem(other, 0))} and :broadcast of DemandPort.demand_async do not go together"
      end
    end

    test "defaults are put in, and what is given wins" do
      assert Options.validate!([], :ping) == [timeout: 30_000]
      assert Options.validate!([timeout: :infinity], :ping)[:timeout] == :infinity
      assert Options.validate!([env: %{"A" => nil}, log_level: :none], :start_link)[:credit] == 64
    end

    test "what is no keyword list is refused" do
      for odd <- [%{}, [1], nil], do: assert_raise(ArgumentError, fn -> Options.validate!(odd, :open) end)
    end

    test "every option has a sentence" do
      for function <- [:start_link, :open, :demand_async, :demand, :load_model, :node_types, :drain, :ping] do
        assert Options.docs(function) =~ "* `:"
      end
    end
  end

  test "functions with an exclamation mark have the arguments and types of those without" do
    {:docs_v1, _, _, _, _, _, docs} = Code.fetch_docs(DemandPort)

    arguments =
      for {{:function, name, arity}, _, [signature], _, _} <- docs, do: {{"#{name}", arity}, signature}

    arguments = Map.new(arguments)

    marked =
      for {{name, arity}, signature} <- arguments, String.ends_with?(name, "!"), do: {name, arity, signature}

    assert length(marked) > 20

    for {name, arity, signature} <- marked do
      plain = String.trim_trailing(name, "!")
      assert signature == String.replace_prefix(arguments[{plain, arity}], plain, name)
    end

    {:ok, specs} = Code.Typespec.fetch_specs(DemandPort)
    [spec] = Map.new(specs)[{:open!, 3}]
    text = :open! |> Code.Typespec.spec_to_quoted(spec) |> Macro.to_string()
    assert text =~ "keyword()) :: DemandPort.Session.t()"
  end

  describe "launch" do
    test "the option goes before everything" do
      assert Launch.python(python: "this") == "this"
    end

    test "the search path is put before what was there" do
      env = Launch.env(env: [{"PYTHONPATH", "/there"}, {"GONE", nil}], python_path: "/here") |> Map.new()
      assert env[~c"PYTHONPATH"] == ~c"/here:/there"
      assert env[~c"GONE"] == false
    end
  end
end
