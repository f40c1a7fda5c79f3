defmodule DemandPort.ServiceTest do
  # The client with the real service.
  use ExUnit.Case, async: true

  import DemandPort.Test.Services

  alias DemandPort.Error
  alias DemandPort.Test.Random

  @moduletag :service
  @wait 20_000

  defp node_of(id, type, data \\ %{}), do: %{id: id, node_type: type, data: data}

  defp edge({source, out, target, into}) do
    %{id: "#{source}-#{target}", source: source, source_handle: out, target: target, target_handle: into}
  end

  defp graph(nodes, edges \\ []), do: %{nodes: nodes, edges: Enum.map(edges, &edge/1)}

  # in → out, with any value.
  defp echo, do: graph([node_of("in", "linked-input")])
  defp waiting, do: graph([node_of("ask", "human-input", %{prompt: "?"})])

  defp text do
    graph(
      [
        node_of("in", "text-input", %{text: "ok"}),
        node_of("tpl", "template", %{template: "<{{x}}>"}),
        node_of("out", "text-output")
      ],
      [{"in", "text", "tpl", "x"}, {"tpl", "text", "out", "text"}]
    )
  end

  defp llm(max_tokens) do
    graph(
      [
        node_of("in", "text-input", %{text: "Once upon a time"}),
        node_of("llm", "llamacpp-inference", %{
          model_path: "tiny",
          max_tokens: max_tokens,
          temperature: 0.7,
          seed: 7
        }),
        node_of("out", "text-output")
      ],
      [{"in", "text", "llm", "prompt"}, {"llm", "response", "out", "text"}]
    )
  end

  defp through(session, value) do
    {:ok, _} = DemandPort.set_input(session, "in", "value", value)
    {:ok, %{"value" => back}} = DemandPort.demand(session, "in")
    back
  end

  setup do
    server = real()
    {:ok, server: server}
  end

  test "ping, health, node types, validate", %{server: server} do
    assert :pong = DemandPort.ping(server)
    assert {:ok, %{"os_pid" => os_pid}} = DemandPort.health(server)
    assert alive?(os_pid)
    assert {:ok, types} = DemandPort.node_types(server)
    assert Enum.any?(types, &(&1["node_type"] == "template"))
    assert {:ok, [%{"node_type" => "merge"}]} = DemandPort.node_types(server, filter: "merge")
    assert {:ok, %{"valid" => true}} = DemandPort.validate(server, text())
    assert {:ok, %{"valid" => false}} = DemandPort.validate(server, graph([node_of("x", "no-such-type")]))
  end

  test "open, demand, edit, get_output, snapshot, close", %{server: server} do
    {:ok, session} = DemandPort.open(server, text())
    assert :absent = DemandPort.get_output(session, "out", "text")
    assert {:ok, %{"text" => "<ok>"}} = DemandPort.demand(session, "out")
    assert {:ok, "<ok>"} = DemandPort.get_output(session, "out", "text")
    assert {:ok, stale} = DemandPort.set_input(session, "in", "text", "new")
    assert "out" in stale
    assert {:ok, %{"text" => "<new>"}} = DemandPort.demand(session, "out")
    assert {:ok, _} = DemandPort.clear_input(session, "in", "text")
    assert {:ok, %{"text" => "<ok>"}} = DemandPort.demand(session, "out")
    assert {:ok, %{"graph" => _, "states" => _}} = DemandPort.snapshot(session)
    assert :ok = DemandPort.close(session)
    assert {:error, %Error{code: :unknown_session}} = DemandPort.demand(session, "out")
  end

  test "asynchronous tuples, plain and tagged", %{server: server} do
    {:ok, session} = DemandPort.open(server, text())
    {:ok, _} = DemandPort.demand_async(session, "out")
    assert_receive {:demand_complete, "out", %{"text" => "<ok>"}}, @wait
    {:ok, _} = DemandPort.demand_async(session, "ghost", tag: 1)
    assert_receive {1, {:demand_error, "ghost", %Error{code: :unknown_node}}}, @wait
    refute_received _
  end

  describe "values pass a graph unchanged:" do
    setup %{server: server} do
      {:ok, session} = DemandPort.open(server, echo())
      {:ok, session: session}
    end

    test "pids, tuples, references, structs, big integers", %{session: session} do
      value = [self(), {:ok, make_ref()}, 2 ** 200, -(2 ** 64), ~D[2024-02-29], %{"k" => {1, "x"}}]
      assert through(session, value) === value
    end

    test "NaN and the infinities", %{session: session} do
      value = [:nan, :infinity, :neg_infinity, 1.5, 2 ** 64 - 1, -(2 ** 63)]
      assert through(session, value) === value
    end

    test "text of every script, and bytes", %{session: session} do
      for value <- ["äöü", "日本語", "👩‍👩‍👧‍👦", <<0>>, "\uFFFF", <<0xFF, 0x00>>, ""],
          do: assert(through(session, value) === value)
    end

    test "random values", %{session: session} do
      for seed <- 1..200 do
        value = Random.value(seed)
        assert through(session, value) === value, "seed #{seed}"
      end
    end

    test "five mebibytes, beside small ones", %{session: session} do
      {:ok, small} = DemandPort.open(session.server, text())
      big = :rand.bytes(5 * 1024 * 1024)
      {:ok, _} = DemandPort.set_input(session, "in", "value", big)
      {:ok, _} = DemandPort.demand_async(session, "in", tag: :big)
      for _ <- 1..100, do: assert({:ok, %{"text" => "<ok>"}} = DemandPort.demand(small, "out"))
      assert_receive {:big, {:demand_complete, "in", %{"value" => ^big}}}, @wait
    end
  end

  test "a thousand demands at once end once each", %{server: server} do
    {:ok, session} = DemandPort.open(server, text())
    for n <- 1..1_000, do: {:ok, _} = DemandPort.demand_async(session, "out", tag: n)
    for n <- 1..1_000, do: assert_receive({^n, {:demand_complete, "out", %{"text" => "<ok>"}}}, @wait)
    refute_received _
  end

  test "a cancel ends a waiting demand", %{server: server} do
    {:ok, session} = DemandPort.open(server, waiting())
    {:ok, demand} = DemandPort.demand_async(session, "ask")
    :ok = DemandPort.cancel(demand)
    assert_receive {:demand_error, "ask", %Error{code: :cancelled}}, @wait
    assert :pong = DemandPort.ping(server)
    refute_received _
  end

  test "a deadline and a timeout end a waiting demand", %{server: server} do
    {:ok, session} = DemandPort.open(server, waiting())
    assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.demand(session, "ask", deadline_ms: 50)
    assert {:error, %Error{code: :deadline_exceeded}} = DemandPort.demand(session, "ask", timeout: 50)
    assert eventually(fn -> demands(server) == 0 end)
    refute_received _
  end

  test "the death of the receiver cancels its demand", %{server: server} do
    {:ok, session} = DemandPort.open(server, waiting())
    receiver = spawn(fn -> Process.sleep(:infinity) end)
    {:ok, _} = DemandPort.demand_async(session, "ask", to: receiver)
    assert eventually(fn -> demands(server) == 1 end)
    Process.exit(receiver, :kill)
    assert eventually(fn -> demands(server) == 0 end)
  end

  defp demands(server) do
    {:ok, %{"demands" => %{"open" => open}}} = DemandPort.health(server)
    open
  end

  test "a kill of the service fails what is open, and the restart works" do
    name = :demand_port_killed
    start_supervised!(%{DemandPort.child_spec(name: name) | id: :killed})
    {:ok, session} = DemandPort.open(name, waiting())
    {:ok, %{"os_pid" => os_pid}} = DemandPort.health(name)
    before = Process.whereis(name)
    for n <- 1..10, do: {:ok, _} = DemandPort.demand_async(session, "ask", tag: n)
    waiting = Task.async(fn -> DemandPort.demand(session, "ask") end)
    assert eventually(fn -> demands(name) == 11 end)

    {_, 0} = System.cmd("kill", ["-9", "#{os_pid}"])

    for n <- 1..10 do
      assert_receive {^n, {:demand_error, "ask", %Error{code: :backend_unavailable, retryable: true}}}, 1_000
    end

    assert {:error, %Error{code: :backend_unavailable}} = Task.await(waiting)
    assert Process.whereis(name) == before
    assert {:error, %Error{code: :unknown_session}} = DemandPort.demand(session, "ask")
    {:ok, session} = DemandPort.open(name, text())
    assert {:ok, %{"text" => "<ok>"}} = DemandPort.demand(session, "out")
  end

  describe "a model" do
    @describetag :model
    @describetag timeout: 120_000

    test "streams text that joins to the whole", %{server: server} do
      {:ok, session} = DemandPort.open(server, llm(40))
      {:ok, _} = DemandPort.demand_async(session, "llm", credit: 4)
      {chunks, outputs} = stream("llm")
      assert length(chunks) > 1
      assert Enum.join(chunks) == outputs["response"]
    end

    test "is cancelled in mid-stream, and nothing follows", %{server: server} do
      # This story has some 270 tokens, so that there is time for the cancel.
      {:ok, session} = DemandPort.open(server, llm(450))
      {:ok, _} = DemandPort.set_input(session, "llm", "prompt", "Tell a story about a lighthouse.")
      {:ok, demand} = DemandPort.demand_async(session, "out")
      assert_receive {:node_stream, "llm", _}, 60_000
      DemandPort.cancel(demand)
      assert {_, %Error{code: :cancelled}} = stream("llm")
      assert :pong = DemandPort.ping(server)
      refute_received _
    end
  end

  defp stream(node, chunks \\ []) do
    receive do
      {:node_stream, ^node, chunk} -> stream(node, [chunk | chunks])
      {:demand_complete, _, outputs} -> {Enum.reverse(chunks), outputs}
      {:demand_error, _, error} -> {Enum.reverse(chunks), error}
    after
      60_000 -> flunk("the stream stands still")
    end
  end

  test "a kill of the BEAM leaves no service behind" do
    arguments = ["-pa", Application.app_dir(:demand_port, "ebin"), Path.expand("support/orphan.exs", __DIR__)]
    elixir = System.find_executable("elixir")
    child = Port.open({:spawn_executable, elixir}, [:binary, :exit_status, line: 1_000, args: arguments])
    assert_receive {^child, {:data, {:eol, "pids " <> pids}}}, 30_000
    [service, beam] = String.split(pids)
    assert alive?(service)
    {_, 0} = System.cmd("kill", ["-9", beam])
    assert eventually(fn -> not alive?(service) end, 2_000)
  end
end
