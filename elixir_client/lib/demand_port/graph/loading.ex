defmodule DemandPort.Graph.Loading do
  @moduledoc false
  # Every shape of a graph that the service reads (protocol/SPEC.md, section 4), made one: nodes and edges as maps with
  # string keys, in order. Keys may be atoms here. What is wrong is said in the service's words.

  alias DemandPort.Error

  @max_nodes 100_000
  @max_edges 1_000_000

  @type parts :: %{nodes: [map], edges: [map], metadata: map}

  @doc "The parts of a graph."
  @spec load(term) :: {:ok, parts} | {:error, Error.t()}
  def load(graph) do
    outer = keyed(graph, "a graph")
    body = if is_map(outer["graph"]), do: keyed(outer["graph"], "graph"), else: outer
    metadata = keyed(outer["metadata"] || %{}, "metadata")
    nodes = body["nodes"] |> list("nodes", @max_nodes) |> numbered("nodes", &node/2)
    edges = body |> Map.get("edges", []) |> list("edges", @max_edges) |> numbered("edges", &edge/2)
    unique(nodes, "nodes", & &1["id"])
    unique(edges, "edges", &edge_id/1)
    {:ok, %{nodes: nodes, edges: edges, metadata: metadata}}
  catch
    {:invalid_graph, message, fields} -> {:error, Error.new(:invalid_graph, message, fields)}
  end

  @doc "The id of an edge with string keys: where it was given none, made of its ends as the service makes it."
  @spec edge_id(map) :: String.t()
  def edge_id(%{"id" => id}) when is_binary(id) and id != "", do: id

  def edge_id(edge) do
    from = edge["source_handle"] || edge["sourceHandle"]
    to = edge["target_handle"] || edge["targetHandle"]
    "#{edge["source"]}.#{from}->#{edge["target"]}.#{to}"
  end

  # A map with its keys as strings.
  defp keyed(map, place) when is_map(map) and not is_struct(map) do
    keyed = Map.new(map, fn {key, value} -> {key(key, place), value} end)

    if map_size(keyed) == map_size(map),
      do: keyed,
      else: invalid("#{place} has a key twice, as atom and as string")
  end

  defp keyed(_other, place), do: invalid("#{place} must be a map")

  defp key(key, _place) when is_binary(key), do: key
  defp key(key, _place) when is_atom(key) and key not in [nil, true, false], do: Atom.to_string(key)
  defp key(key, place), do: invalid("#{place} has the key #{inspect(key)}, which is no string")

  defp list(list, _name, limit) when is_list(list) and length(list) <= limit, do: list
  defp list(list, name, limit) when is_list(list), do: invalid("a graph has at most #{limit} #{name}")
  defp list(_other, _name, _limit), do: invalid("a graph has a list of nodes and a list of edges")

  defp numbered(list, name, read) do
    for {raw, index} <- Enum.with_index(list),
        place = "#{name}[#{index}]",
        do: raw |> keyed(place) |> read.(place)
  end

  defp unique(parts, name, id_of) do
    parts
    |> Enum.with_index()
    |> Enum.reduce(MapSet.new(), fn {part, index}, ids ->
      id = id_of.(part)
      if MapSet.member?(ids, id), do: doubled(name, index, id), else: MapSet.put(ids, id)
    end)
  end

  @spec doubled(String.t(), non_neg_integer, String.t()) :: no_return
  defp doubled("nodes", index, id) do
    invalid("nodes[#{index}]: there are two nodes with the id #{inspect(id)}", node: id)
  end

  defp doubled("edges", index, id) do
    invalid("edges[#{index}]: there are two edges with the id #{inspect(id)}")
  end

  defp node(raw, place) do
    id = text(raw, place, "id")
    data = keyed(raw["data"] || %{}, "#{place}.data")
    node = %{"id" => id, "node_type" => node_type(raw, data, id, place), "data" => data}
    present(node, "position", position(raw["position"], place))
  end

  defp node_type(raw, data, id, place) do
    named = for source <- [raw, data], key <- ["node_type", "nodeType"], source[key] != nil, do: source[key]

    case List.first(named, stem(id)) do
      name when is_binary(name) and name != "" -> name
      _ -> invalid("#{place}.node_type must be a string", node: id)
    end
  end

  # What stands before the last "-".
  defp stem(id) do
    case id |> String.split("-") |> Enum.drop(-1) |> Enum.join("-") do
      "" -> id
      stem -> stem
    end
  end

  defp edge(raw, place) do
    %{"source" => text(raw, place, "source"), "target" => text(raw, place, "target")}
    |> present("source_handle", handle(raw, place, "source_handle", "sourceHandle"))
    |> present("target_handle", handle(raw, place, "target_handle", "targetHandle"))
    |> present("id", edge_name(raw["id"], place))
  end

  defp edge_name(none, _place) when none in [nil, ""], do: nil
  defp edge_name(id, _place) when is_binary(id), do: id
  defp edge_name(_other, place), do: invalid("#{place}.id must be a string")

  defp handle(raw, place, snake, camel) do
    case [raw[snake], raw[camel]] |> Enum.find(&(&1 != nil)) do
      none when none in [nil, ""] -> nil
      handle when is_binary(handle) -> handle
      _ -> invalid("#{place}.#{snake} must be a string")
    end
  end

  defp text(raw, place, key) do
    case raw[key] do
      text when is_binary(text) and text != "" -> text
      _ -> invalid("#{place}.#{key} must be a non-empty string")
    end
  end

  defp position(nil, _place), do: nil
  defp position([x, y], _place) when is_number(x) and is_number(y), do: [x, y]
  defp position({x, y}, place), do: position([x, y], place)

  defp position(%{} = pair, place) do
    case keyed(pair, "#{place}.position") do
      %{"x" => x, "y" => y} -> position([x, y], place)
      _ -> no_position(place)
    end
  end

  defp position(_other, place), do: no_position(place)

  @spec no_position(String.t()) :: no_return
  defp no_position(place), do: invalid("#{place}.position must be [x, y] or {x, y}")

  defp present(map, _key, nil), do: map
  defp present(map, key, value), do: Map.put(map, key, value)

  @spec invalid(String.t()) :: no_return
  @spec invalid(String.t(), keyword) :: no_return
  defp invalid(message, fields \\ []), do: throw({:invalid_graph, message, fields})
end
