# Work for a port on this node or on another, and how long it takes: what bench/cluster.exs and bench/network.exs measure.
# It raises when a chunk or an end is missing, comes twice, or is out of place.

defmodule Bench.Hop do
  import Bitwise

  @doc "A folder with the benchmark's node types, as an installed package has them."
  def node_types do
    folder = Path.join(Mix.Project.build_path(), "bench_nodes")
    info = Path.join(folder, "bench_nodes-0.dist-info")
    File.mkdir_p!(info)
    File.cp!(Path.join(__DIR__, "bench_nodes.py"), Path.join(folder, "bench_nodes.py"))
    File.write!(Path.join(info, "METADATA"), "Metadata-Version: 2.1\nName: bench-nodes\nVersion: 0\n")
    File.write!(Path.join(info, "entry_points.txt"), "[demandport.nodes]\nbench = bench_nodes\n")
    folder
  end

  def graph do
    %{
      nodes: [
        %{id: "out", node_type: "text-input", data: %{text: "some text"}},
        %{id: "flood", node_type: "bench-flood", data: %{}},
        %{id: "hold", node_type: "human-input", data: %{}}
      ],
      edges: []
    }
  end

  ## Demands

  @doc "Demands a second, one after another."
  def one_by_one(session, count) do
    rate(count, fn -> for _ <- 1..count, do: {:ok, _} = DemandPort.demand(session, "out") end)
  end

  @doc "Demands a second, so many of them at a time."
  def pipelined(session, count, window) do
    work = fn ->
      for n <- 1..window, do: ask(session, n)
      first = for n <- (window + 1)..count//1, do: tap(ended(), fn _ -> ask(session, n) end)
      first ++ for _ <- 1..window, do: ended()
    end

    {ns, tags} = timed(work)
    if Enum.sort(tags) != Enum.to_list(1..count), do: raise("not every demand ended once")
    count * 1.0e9 / ns
  end

  defp ask(session, n), do: {:ok, _} = DemandPort.demand_async(session, "out", tag: n)

  defp ended do
    receive do
      {tag, {:demand_complete, _, _}} -> tag
      {_tag, {:demand_error, _, error}} -> raise error
    end
  end

  @doc "Chunks a second of one stream."
  def flood(session, count, credit) do
    {:ok, _} = DemandPort.edit(session, {:update_node_data, "flood", %{count: count}})

    rate(count, fn ->
      {:ok, _} = DemandPort.demand_async(session, "flood", credit: credit)
      :ok = chunks(0, count)
    end)
  end

  # The node numbers them in seven bits.
  defp chunks(number, count) do
    receive do
      {:node_stream, _, chunk} when chunk == (number &&& 127) -> chunks(number + 1, count)
      {:demand_complete, _, _} when number == count -> :ok
      other -> raise "chunk #{number} of #{count} is missing: #{inspect(other)}"
    end
  end

  ## The clock

  def rate(count, work), do: count * 1.0e9 / time(work)
  def time(work), do: work |> timed() |> elem(0)

  @doc "Nanoseconds, and the result."
  def timed(work) do
    start = System.monotonic_time()
    result = work.()
    {max(System.convert_time_unit(System.monotonic_time() - start, :native, :nanosecond), 1), result}
  end

  @doc "Microseconds of each call."
  def each_us(count, work), do: for(_ <- 1..count, do: time(work) / 1_000)

  def median(values), do: percentile(values, 50)

  def percentile(values, part) do
    sorted = Enum.sort(values)
    Enum.at(sorted, min(div(length(sorted) * part, 100), length(sorted) - 1))
  end

  ## The table

  def head(cells) do
    row(cells)
    row(Enum.map(cells, fn _ -> "---" end))
  end

  def row(cells), do: IO.puts("| #{Enum.join(cells, " | ")} |")

  @doc "A number with commas between the thousands."
  def whole(value), do: value |> round() |> Integer.to_string() |> String.replace(~r/\B(?=(\d{3})+$)/, ",")
end
