defmodule DemandPort.PoolTest do
  # Several services under one supervisor.
  use ExUnit.Case, async: true

  import DemandPort.Test.Services

  alias DemandPort.{Error, Graph, Pool}
  alias DemandPort.Pool.Roster

  doctest DemandPort.Pool
  doctest DemandPort.Load

  @wait 10_000
  # The fake service takes any graph.
  @graph %{nodes: [], edges: []}

  defp pool(size, options \\ []) do
    name = Module.concat(__MODULE__, "P#{System.unique_integer([:positive])}")
    start_supervised!({Pool, [name: name, size: size] ++ options})
    pool = Pool.members(name)
    Enum.each(pool, fn member -> {:ok, _} = DemandPort.health(member) end)
    name
  end

  defp fake_pool(size), do: pool(size, fake_options("models="))

  defp sessions(pool), do: for({_, {:ok, info}} <- Pool.info(pool), do: info.open_sessions)
  defp demands(pool), do: for({_, {:ok, info}} <- Pool.info(pool), do: info.open_demands)
  defp os_pid(member), do: DemandPort.health!(member)["os_pid"]
  defp hello, do: Graph.new() |> Graph.node("out", "text-input", text: "hello")

  describe "a session" do
    test "is opened where there is least to do, by index among equals, and stays there" do
      pool = fake_pool(3)
      members = Pool.members(pool)
      opened = for _ <- 1..4, do: Pool.open(pool, @graph) |> elem(1)
      assert Enum.map(opened, & &1.server) == members ++ [hd(members)]
      assert sessions(pool) == [2, 1, 1]

      # A demand weighs as much as a session.
      [_, second, third, _] = opened
      {:ok, demand} = DemandPort.demand_async(second, "never")
      assert_receive {:node_stream, "never", _}, @wait
      assert {:ok, %{server: server}} = Pool.open(pool, @graph)
      assert server == third.server
      assert demands(pool) == [0, 1, 0]

      :ok = DemandPort.cancel(demand)
      assert_receive {:demand_error, "never", %Error{code: :cancelled}}, @wait
      for session <- opened, do: :ok = DemandPort.close(session)
      assert sessions(pool) == [0, 0, 1]
    end

    test "of many callers at once is spread" do
      pool = fake_pool(4)

      1..40
      |> Task.async_stream(fn _ -> {:ok, _} = Pool.open(pool, @graph) end, max_concurrency: 40)
      |> Stream.run()

      counts = sessions(pool)
      assert Enum.sum(counts) == 40
      # What was promised and is open may be counted twice for a moment.
      assert Enum.min(counts) >= 5
    end

    test "is not opened on a member that does not answer, or has no service" do
      pool = fake_pool(2)
      [first, second] = Pool.members(pool)
      :ok = :sys.suspend(first)
      assert {:ok, %{server: ^second}} = Pool.open(pool, @graph)
      assert {:ok, %{server: ^second}} = Pool.open(pool, @graph)
      :ok = :sys.resume(first)
      assert eventually(fn -> match?({:ok, %{server: ^first}}, Pool.open(pool, @graph)) end)
    end
  end

  test "a member killed ends what it ran, and nothing else" do
    pool = fake_pool(2)
    [{:ok, one}, {:ok, two}] = for _ <- 1..2, do: Pool.open(pool, @graph)

    for {session, tag} <- [{one, :one}, {two, :two}],
        do: {:ok, _} = DemandPort.demand_async(session, "never", tag: tag)

    assert_receive {:one, {:node_stream, _, _}}, @wait
    assert_receive {:two, {:node_stream, _, _}}, @wait

    {_, 0} = System.cmd("kill", ["-KILL", "#{os_pid(one.server)}"])

    assert_receive {:one, {:demand_error, "never", %Error{code: :backend_unavailable, retryable: true}}},
                   @wait

    assert {:ok, _} = DemandPort.demand(two, "echo")
    refute_received {:two, _}
    # It has a new service, and is there for others.
    assert {:ok, %{"open" => 0}} = DemandPort.health(one.server)
    assert [0, 1] = sessions(pool)
    assert {:ok, %{server: again}} = Pool.open(pool, @graph)
    assert again == one.server
  end

  test "a connection that is killed is started again under its name" do
    pool = fake_pool(2)
    [first, _] = Pool.members(pool)
    before = Process.whereis(first)
    Process.exit(before, :kill)
    assert eventually(fn -> Process.whereis(first) not in [nil, before] end)
    assert eventually(fn -> match?({:ok, %{server: ^first}}, Pool.open(pool, @graph)) end)
  end

  describe "run" do
    test "opens, demands, and closes" do
      pool = fake_pool(2)
      test = self()
      assert {:ok, %{"text" => "chunk 0 chunk 1 "}} = Pool.run(pool, @graph, "stream-2")
      assert {:ok, _} = Pool.run(pool, @graph, "stream-2", on_stream: &send(test, {&1, &2}))
      assert_received {"stream-2", "chunk 0 "}
      assert_received {"stream-2", "chunk 1 "}
      assert {:error, %Error{code: :node_failed}} = Pool.run(pool, @graph, "fail")
      assert {:error, %Error{code: :deadline_exceeded}} = Pool.run(pool, @graph, "never", timeout: 50)
      assert eventually(fn -> sessions(pool) == [0, 0] end)
      refute_received _
    end

    test "cancels and closes when its caller dies" do
      pool = fake_pool(1)
      test = self()

      caller =
        spawn(fn -> Pool.run(pool, @graph, "never", on_stream: fn _, chunk -> send(test, chunk) end) end)

      assert_receive "started", @wait
      assert sessions(pool) == [1]
      Process.exit(caller, :kill)
      assert eventually(fn -> sessions(pool) == [0] and demands(pool) == [0] end)
      assert {:ok, %{"cancelled" => [_], "open" => 0}} = DemandPort.health(hd(Pool.members(pool)))
    end

    test "checks its options" do
      assert_raise ArgumentError, ~r/:kredit is not known to DemandPort.open/, fn ->
        Pool.run(:nobody, @graph, "x", open: [kredit: 1])
      end

      assert_raise ArgumentError, ~r/:timeout of DemandPort.Pool.run must be/, fn ->
        Pool.run(:nobody, @graph, "x", timeout: -1)
      end

      assert_raise ArgumentError,
                   ~r/:kredit is not known to DemandPort.Pool.run; known: :open, .*:timeout/,
                   fn ->
                     Pool.run(:nobody, @graph, "x", kredit: 1)
                   end

      assert_raise ArgumentError, ~r/:size of DemandPort.Pool.start_link must be an integer from 1/, fn ->
        Pool.start_link(name: Some.Pool, size: 0)
      end

      assert_raise ArgumentError, ~r/:name of DemandPort.Pool.start_link is required/, fn ->
        Pool.start_link([])
      end
    end
  end

  test "that is not there is the typed error" do
    asked = [
      Pool.open(:nobody, @graph),
      Pool.run(:nobody, @graph, "x"),
      Pool.members(:nobody),
      Pool.info(:nobody),
      Pool.loads(:nobody),
      Pool.restart(:nobody),
      DemandPort.Cluster.start_link(scope: :of_nobody, pool: :nobody)
    ]

    for answer <- asked, do: assert({:error, %Error{code: :backend_unavailable}} = answer)
  end

  @tag :service
  test "a rolling restart under load loses nothing" do
    pool = pool(2)
    before = Enum.map(Pool.members(pool), &os_pid/1)
    {:ok, kept} = Pool.open(pool, hello(), restore: true)
    test = self()

    # They run until the restart is over, and a little more: what each had is told at the end.
    stop = :atomics.new(1, [])

    callers =
      for n <- 1..8 do
        Task.async(fn ->
          Stream.repeatedly(fn ->
            result = Pool.run(pool, hello(), "out")
            send(test, {:ran, n})
            result
          end)
          |> Enum.take_while(fn
            {:ok, %{"text" => "hello"}} -> :atomics.get(stop, 1) == 0
            lost -> throw({:lost, lost})
          end)
          |> length()
        end)
      end

    for n <- 1..8, do: assert_receive({:ran, ^n}, @wait)
    assert :ok = Pool.restart(pool)
    flush_ran()
    for n <- 1..8, do: assert_receive({:ran, ^n}, @wait)
    :atomics.put(stop, 1, 1)
    assert Enum.all?(Task.await_many(callers, @wait), &(&1 > 0))
    assert {:ok, %{"text" => "hello"}} = DemandPort.demand(kept, "out")

    assert Enum.all?(Enum.zip(before, Enum.map(Pool.members(pool), &os_pid/1)), fn {old, new} ->
             old != new
           end)
  end

  test "a member in hand gets no sessions, and a second restart is refused, until the first is over or its caller dead" do
    pool = fake_pool(2)
    [first, second] = Pool.members(pool)
    test = self()

    holder =
      spawn(fn ->
        {:ok, _} = Roster.hold(pool, first)
        send(test, :held)
        Process.sleep(:infinity)
      end)

    assert_receive :held, @wait
    for _ <- 1..3, do: assert({:ok, %{server: ^second}} = Pool.open(pool, @graph))
    assert {:error, %Error{code: :draining, retryable: true}} = Pool.restart(pool)
    Process.exit(holder, :kill)
    assert eventually(fn -> match?({:ok, %{server: ^first}}, Pool.open(pool, @graph)) end)
    assert :ok = Pool.restart(pool)
  end

  test "whose name is taken for a port's says what it is, and nothing dies" do
    pool = fake_pool(2)
    {:ok, session} = Pool.open(pool, @graph)
    {:ok, _} = DemandPort.demand_async(session, "never")
    assert_receive {:node_stream, "never", _}, @wait
    before = Enum.map(Pool.members(pool), &Process.whereis/1)

    answers = [
      DemandPort.open(pool, @graph),
      DemandPort.ping(pool),
      DemandPort.info(pool),
      DemandPort.restart(pool),
      DemandPort.demand(%{session | server: pool}, "echo"),
      DemandPort.demand_async(%{session | server: pool}, "echo"),
      DemandPort.subscribe(%{session | server: pool})
    ]

    for answer <- answers do
      assert {:error, %Error{code: :bad_message, retryable: false, message: message}} = answer
      assert message =~ "#{inspect(pool)} is a pool: use DemandPort.Pool"
    end

    assert {:error, %Error{code: :bad_message, message: message}} = Pool.open(session.server, @graph)
    assert message =~ "one port"
    send(pool, :what_nobody_asked_for)
    assert Enum.map(Pool.members(pool), &Process.whereis/1) == before
    assert sessions(pool) == [1, 0]
    refute_received _
  end

  defp flush_ran do
    receive do
      {:ran, _} -> flush_ran()
    after
      0 -> :ok
    end
  end
end
