# The BEAM's side of bench/faults.py: opens services with the client, and tells of their ends line by line.
#
#     elixir -pa EBIN bench/faults.exs WAITING STREAMING
#
# For each line of input: a connection of its own, and so many demands that wait and that stream. Then it writes
#
#     open OS_PID      all demands are running; now the service is to be killed
#     told             every demand has its terminal message
#     back             the next service has answered a ping
#     heard MESSAGES   what came for the demands, as [tag, kind, node, chunk or error] in msgpack and Base64

defmodule Faults do
  def main([waiting, streaming]) do
    nodes =
      List.duplicate("person", String.to_integer(waiting)) ++
        for n <- 1..String.to_integer(streaming), do: "flood#{n}"

    Enum.each(IO.stream(:line), fn _line -> turn(Enum.with_index(nodes, 1)) end)
  end

  defp turn(demands) do
    {:ok, client} =
      DemandPort.start_link(
        python: System.fetch_env!("PYTHON"),
        python_path: System.fetch_env!("SOURCE"),
        args: ["-m", "demandport", "serve"]
      )

    {:ok, session} = DemandPort.open(client, graph(demands), max_running: length(demands))
    for {node, tag} <- demands, do: {:ok, _} = DemandPort.demand_async(session, node, tag: tag)
    floods = for {"flood" <> _, tag} <- demands, into: MapSet.new(), do: tag
    heard = until_streaming(floods, [])
    {:ok, %{os_pid: os_pid}} = DemandPort.info(client)
    IO.puts("open #{os_pid}")
    heard = until_told(length(demands), heard)
    IO.puts("told")
    :pong = DemandPort.ping(client)
    IO.puts("back")
    GenServer.stop(client)
    {:ok, bytes} = heard |> rest() |> Enum.reverse() |> DemandPort.Msgpack.encode()
    IO.puts("heard #{bytes |> IO.iodata_to_binary() |> Base.encode64()}")
  end

  defp graph(demands) do
    floods =
      for {"flood" <> _ = node, _} <- demands,
          do: %{id: node, node_type: "bench-flood", data: %{count: 1_000_000_000}}

    %{nodes: [%{id: "person", node_type: "human-input", data: %{}} | floods], edges: []}
  end

  defp until_streaming(floods, heard) do
    if MapSet.size(floods) == 0 do
      heard
    else
      [[tag | _] | _] = heard = [hear() | heard]
      until_streaming(MapSet.delete(floods, tag), heard)
    end
  end

  defp until_told(0, heard), do: heard

  defp until_told(left, heard) do
    [_tag, kind | _] = message = hear()
    until_told(if(kind == "node_stream", do: left, else: left - 1), [message | heard])
  end

  defp hear do
    receive do
      {tag, {kind, node, said}} -> [tag, Atom.to_string(kind), node, plain(said)]
    after
      60_000 -> raise "a demand was not told of its end"
    end
  end

  # What came after the last end: nothing should have.
  defp rest(heard) do
    receive do
      {tag, {kind, node, said}} -> rest([[tag, Atom.to_string(kind), node, plain(said)] | heard])
    after
      0 -> heard
    end
  end

  defp plain(%DemandPort.Error{} = error),
    do: error |> Map.from_struct() |> Map.delete(:__exception__) |> plain()

  defp plain(%{code: code} = error), do: %{error | code: Atom.to_string(code)}
  defp plain(said), do: said
end

Logger.configure(level: :error)
Faults.main(System.argv())
