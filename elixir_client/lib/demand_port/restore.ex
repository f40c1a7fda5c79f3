defmodule DemandPort.Restore do
  @moduledoc false
  # What it takes to open a session again in a new service: its graph, the edits of its structure, and the inputs that
  # stand. Pure data, and no history: an input that is set again replaces the one before, and so does a node's data; what
  # was added and is removed again leaves nothing behind. So it is never more than an edit for each node and each edge that
  # the graph was opened with and has lost, two for each node that it has now, and one for each edge.

  alias DemandPort.Graph.Loading

  # edits: each with what it made, the last one first
  defstruct [:graph, :options, edits: [], inputs: %{}]

  @type t :: %__MODULE__{
          graph: map,
          options: map,
          edits: [{made, map}],
          inputs: %{{String.t(), String.t()} => term}
        }
  @typep made ::
           {:node, id :: String.t()}
           | {:data, node :: String.t()}
           | {:edge, id :: String.t(), source :: String.t(), target :: String.t()}
           | :gap

  @spec new(map, map) :: t
  def new(graph, options), do: %__MODULE__{graph: graph, options: options}

  @doc "The session after an edit that the service took."
  @spec edited(t, [map]) :: t
  def edited(session, operations), do: Enum.reduce(operations, session, &apply_one(with_texts(&1), &2))

  @doc "The fields of the `open` that opens it again as it stands, or not at all."
  @spec fields(t, String.t()) :: [term]
  def fields(session, name) do
    set =
      for {{node, port}, value} <- session.inputs,
          do: %{"op" => "set_input", "node" => node, "port" => port, "value" => value}

    edits = for {_made, operation} <- session.edits, do: operation

    case Enum.reverse(edits, set) do
      [] -> [name, session.graph, session.options]
      operations -> [name, session.graph, Map.put(session.options, "edits", operations)]
    end
  end

  defp apply_one(%{"op" => "set_input", "node" => node, "port" => port} = operation, session) do
    %{session | inputs: Map.put(session.inputs, {node, port}, operation["value"])}
  end

  defp apply_one(%{"op" => "clear_input", "node" => node, "port" => port}, session) do
    %{session | inputs: Map.delete(session.inputs, {node, port})}
  end

  # A new service has nothing cached that would have to be forgotten.
  defp apply_one(%{"op" => "invalidate"}, session), do: session

  defp apply_one(%{"op" => "add_node", "node" => node} = operation, session) do
    keep(session, {:node, with_texts(node)["id"]}, operation)
  end

  defp apply_one(%{"op" => "add_edge", "edge" => edge} = operation, session) do
    edge = with_texts(edge)
    keep(session, {:edge, Loading.edge_id(edge), edge["source"], edge["target"]}, operation)
  end

  # A later update of a node's data goes into the one before it.
  defp apply_one(%{"op" => "update_node_data", "node" => node, "data" => data} = operation, session) do
    made = {:data, node}

    case List.keyfind(session.edits, made, 0) do
      nil ->
        keep(session, made, operation)

      {^made, %{"data" => earlier}} ->
        merged = %{operation | "data" => Map.merge(with_texts(earlier), with_texts(data))}
        %{session | edits: List.keyreplace(session.edits, made, 0, {made, merged})}
    end
  end

  # What was added goes without a trace. What was there before leaves a gap, which stays when something is added in its
  # place and removed again.
  defp apply_one(%{"op" => "remove_node", "node" => node} = operation, session) do
    inputs = for {{of, _port} = key, value} <- session.inputs, of != node, into: %{}, do: {key, value}
    {gone, edits} = Enum.split_with(session.edits, fn {made, _operation} -> of?(made, node) end)
    session = %{session | inputs: inputs, edits: edits}
    if List.keymember?(gone, {:node, node}, 0), do: session, else: keep(session, :gap, operation)
  end

  defp apply_one(%{"op" => "remove_edge", "edge" => edge} = operation, session) do
    id = if is_binary(edge), do: edge, else: edge |> with_texts() |> Loading.edge_id()

    case Enum.split_with(session.edits, &match?({{:edge, ^id, _source, _target}, _operation}, &1)) do
      {[], _edits} -> keep(session, :gap, operation)
      {_added, edits} -> %{session | edits: edits}
    end
  end

  defp keep(session, made, operation), do: %{session | edits: [{made, operation} | session.edits]}

  # A node goes with its data and its edges.
  defp of?({:node, id}, node), do: id == node
  defp of?({:data, id}, node), do: id == node
  defp of?({:edge, _id, source, target}, node), do: node in [source, target]
  defp of?(:gap, _node), do: false

  defp with_texts(map), do: Map.new(map, fn {key, value} -> {to_string(key), value} end)
end
