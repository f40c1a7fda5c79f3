defmodule DemandPort.UnitsTest do
  use ExUnit.Case, async: true

  alias DemandPort.{Credit, Error, Launch, Options}

  doctest Error
  doctest Credit
  doctest Options
  doctest DemandPort

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

  describe "options" do
    test "each type refuses what does not fit, and names the option" do
      refused = [
        start_link: [python: "", args: "x", args: [1], env: [{"", "x"}], env: 5, env: [{"A", 1}], cd: 1],
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

  describe "launch" do
    test "the option goes before everything" do
      assert Launch.python(python: "this") == "this"
    end

    test "the search path is put before what was there" do
      env = Launch.env(env: [{"PYTHONPATH", "/there"}, {"GONE", nil}], python_path: "/here") |> Map.new()
      assert env['PYTHONPATH'] == '/here:/there'
      assert env['GONE'] == false
    end
  end
end
