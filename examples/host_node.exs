# Nodes that this program runs itself, in the middle of a graph: one that streams, a tool, and a search.
#
#     mix run examples/host_node.exs

defmodule Example.Nodes do
  use DemandPort.Host

  @impl true
  def node_types, do: ["spell", "tool-executor", "rag-search"]

  # What streams reaches whoever demanded; chunks of text, joined, are the output.
  @impl true
  def handle_node("spell", %{"word" => word}, context) do
    for letter <- String.graphemes(word), do: :ok = DemandPort.Host.stream(context, letter <> ".")
    {:ok, %{}}
  end

  @impl true
  def handle_tool("add", %{"a" => a, "b" => b}, _context), do: {:ok, a + b}
  def handle_tool(name, _arguments, _context), do: {:error, "there is no tool #{name}"}

  # `arg` is what stands beside the module in `host:`.
  @impl true
  def handle_search(query, limit, context) do
    {:ok, context.arg |> Enum.filter(&(&1 =~ query)) |> Enum.take(limit)}
  end
end

alias DemandPort.Graph

graph =
  Graph.new()
  |> Graph.node("word", "text-input", text: "owl")
  |> Graph.node("spell", "spell")
  |> Graph.node("out", "text-output")
  |> Graph.connect("word", "spell.word")
  |> Graph.connect("spell", "out")
  |> Graph.node("sum", "tool-executor", tool: "add", arguments: %{a: 1, b: 2})
  |> Graph.node("none", "tool-executor", tool: "fly")
  |> Graph.node("find", "rag-search", query: "night", limit: 1)

documents = ["Cats sleep by day.", "Owls hunt at night.", "Bats fly at night."]
{:ok, port} = DemandPort.start_link()
session = DemandPort.open!(port, graph, host: {Example.Nodes, documents})

for chunk <- DemandPort.stream(session, "out"), do: IO.puts("chunk #{chunk}")
IO.inspect(DemandPort.demand(session, "out"))
IO.inspect(DemandPort.demand!(session, "sum"))
IO.inspect(DemandPort.demand!(session, "find"))
{:error, error} = DemandPort.demand(session, "none")
IO.puts(Exception.message(error))
