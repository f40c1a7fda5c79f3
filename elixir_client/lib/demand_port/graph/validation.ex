defmodule DemandPort.Graph.Validation do
  @moduledoc false
  # The rules of a runnable graph as the service has them, in its order and with its codes, so that a graph can be
  # checked where no service runs.

  alias DemandPort.Error
  alias DemandPort.Graph.{Loading, Ports}

  @max_reported 100

  @doc "The problems that only some demands would meet, or the error of the first that keeps the graph from opening."
  @spec check([map], [map], [map | String.t()]) :: {:ok, [map]} | {:error, Error.t()}
  def check(nodes, edges, descriptors) do
    problems = problems(nodes, edges, Ports.by_type(descriptors))

    case Enum.find(problems, &(&1.code != :missing_input)) do
      nil -> {:ok, Enum.map(problems, &to_wire/1)}
      first -> {:error, error(first, problems)}
    end
  end

  defp error(first, problems) do
    details = %{"problems" => Enum.map(problems, &to_wire/1)}
    Error.new(first.code, "#{first.message}; #{first.hint}", node: first.node, details: details)
  end

  defp to_wire(problem) do
    Map.new(problem, fn {name, value} ->
      {Atom.to_string(name), if(name == :code, do: "#{value}", else: value)}
    end)
  end

  defp problem(code, message, hint, place) do
    Enum.into(place, %{code: code, message: message, hint: hint, node: nil, port: nil, edge: nil})
  end

  defp problems(nodes, edges, types) do
    graph = %{
      types: types,
      specs: Map.new(nodes, &{&1["id"], types[&1["node_type"]]}),
      incoming: Enum.group_by(edges, & &1["target"])
    }

    of_nodes = Enum.flat_map(nodes, &of_node(graph, &1))
    of_edges = Enum.flat_map(edges, &of_edge(graph, &1))
    Enum.take(of_nodes ++ of_edges ++ of_cycle(cycle(nodes, edges)), @max_reported)
  end

  ## Nodes

  defp of_node(graph, node) do
    case graph.specs[node["id"]] do
      nil ->
        message = "nobody runs nodes of the type #{inspect(node["node_type"])}"
        [problem(:unknown_node_type, message, "see node_types for those there are", node: node["id"])]

      spec ->
        edges = Map.get(graph.incoming, node["id"], [])
        reached = for edge <- edges, port = Ports.target(spec, edge["target_handle"]), do: port.name
        counts = Enum.frequencies(reached)
        Enum.flat_map(spec.inputs, &of_input(node, &1, Map.get(counts, &1.name, 0)))
    end
  end

  defp of_input(node, port, edges) when edges > 1 and not port.multiple do
    message =
      "#{edges} edges end at the port #{inspect(port.name)} of #{inspect(node["id"])}, which takes one"

    [problem(:invalid_graph, message, "keep one of them or merge them", node: node["id"], port: port.name)]
  end

  defp of_input(_node, _port, edges) when edges > 0, do: []

  defp of_input(node, port, 0) do
    value = node["data"][port.name]

    cond do
      value != nil and not port.multiple -> of_value(node, port, Ports.mismatch(port.type, value))
      value != nil -> []
      is_map_key(node["data"], port.name) and Ports.takes_nil?(port.type) -> []
      port.required -> [missing(node, port)]
      true -> []
    end
  end

  defp of_value(_node, _port, nil), do: []

  defp of_value(node, port, mismatch) do
    message = "data.#{port.name} of #{inspect(node["id"])} #{mismatch}"
    [problem(:type_mismatch, message, "give a value of type #{port.type}", node: node["id"], port: port.name)]
  end

  defp missing(node, port) do
    message = "the port #{inspect(port.name)} of #{inspect(node["id"])} has no value"
    hint = "connect it, set it by set_input, or give data.#{port.name}"
    problem(:missing_input, message, hint, node: node["id"], port: port.name)
  end

  ## Edges

  defp of_edge(graph, edge) do
    case Enum.find([edge["source"], edge["target"]], &(not is_map_key(graph.specs, &1))) do
      nil -> of_ends(edge, graph.specs[edge["source"]], graph.specs[edge["target"]])
      end_of_it -> [unknown_node(edge, end_of_it)]
    end
  end

  defp unknown_node(edge, node) do
    message = "the edge #{name(edge)} names the node #{inspect(node)}, which is not in the graph"

    problem(:unknown_node, message, "add the node or remove the edge", node: node, edge: Loading.edge_id(edge))
  end

  # An end of an unknown type was reported with its node.
  defp of_ends(_edge, source, target) when is_nil(source) or is_nil(target), do: []

  defp of_ends(edge, source_spec, target_spec) do
    source = Ports.source(source_spec, edge["source_handle"])
    target = Ports.target(target_spec, edge["target_handle"])
    out = if source, do: [], else: [unknown_port(edge, "output", "source", source_spec.outputs)]
    into = if target, do: [], else: [unknown_port(edge, "input", "target", target_spec.inputs)]
    out ++ into ++ misfit(edge, source, target)
  end

  defp unknown_port(edge, kind, side, ports) do
    handle = edge["#{side}_handle"]

    message =
      "#{inspect(edge[side])} has no #{kind} port #{inspect(handle || "")}, which the edge #{name(edge)} names"

    there = if ports == [], do: "none", else: Enum.map_join(ports, ", ", & &1.name)
    place = [node: edge[side], port: handle, edge: Loading.edge_id(edge)]
    problem(:unknown_port, message, "its #{kind} ports: #{there}", place)
  end

  defp misfit(edge, source, target) when is_map(source) and is_map(target) do
    if Ports.fits?(source.type, target.type), do: [], else: [mismatch(edge, source, target)]
  end

  defp misfit(_edge, _source, _target), do: []

  defp mismatch(edge, source, target) do
    ends =
      "#{edge["source"]}.#{source.name} (#{source.type}) and #{edge["target"]}.#{target.name} (#{target.type})"

    message = "the edge #{name(edge)} joins ports that do not fit: #{ends}"
    place = [node: edge["target"], port: target.name, edge: Loading.edge_id(edge)]
    problem(:type_mismatch, message, "connect ports of one type", place)
  end

  defp name(edge), do: inspect(Loading.edge_id(edge))

  ## Cycles

  defp of_cycle(nil), do: []

  defp of_cycle([first | _] = path) do
    message = "these nodes form a cycle: #{Enum.join(path, " -> ")}"
    [problem(:cycle, message, "remove one edge of it", node: first)]
  end

  # The ids along one cycle, the first repeated at the end.
  defp cycle(nodes, edges) do
    next = Enum.group_by(edges, & &1["source"], & &1["target"])
    Enum.reduce(nodes, MapSet.new(), &visit(&1["id"], [], MapSet.new(), next, &2))
    nil
  catch
    {:cycle, path} -> path
  end

  # Depth first; `path` leads here, newest first, and `done` is what leads to no cycle.
  defp visit(id, path, on_path, next, done) do
    cond do
      MapSet.member?(done, id) ->
        done

      MapSet.member?(on_path, id) ->
        throw({:cycle, [id | Enum.reverse([id | Enum.take_while(path, &(&1 != id))])]})

      true ->
        {path, on_path} = {[id | path], MapSet.put(on_path, id)}
        after_it = Enum.reduce(Map.get(next, id, []), done, &visit(&1, path, on_path, next, &2))
        MapSet.put(after_it, id)
    end
  end
end
