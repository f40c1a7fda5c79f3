defmodule DemandPort.Graph do
  @moduledoc """
  A workflow graph, built step by step or read from a file, for `DemandPort.open/3`.

      iex> alias DemandPort.Graph
      iex> graph =
      ...>   Graph.new()
      ...>   |> Graph.node("topic", "text-input", text: "cats")
      ...>   |> Graph.node("prompt", "template", template: "Tell me about {{topic}}.")
      ...>   |> Graph.node("llm", "llm-inference", model: "tiny")
      ...>   |> Graph.connect("topic", "prompt.topic")
      ...>   |> Graph.connect("prompt", "llm.prompt")
      iex> length(Graph.to_map(graph)["edges"])
      2

  What cannot be meant is refused where it is written: an id that is there already, an edge from or to a node that is
  not, raise `ArgumentError`. What depends on the node types, ports and their types among them, is checked by
  `validate/2` with the service's descriptors, and by the service whenever a graph is opened.

  A graph is a value; every function gives a new one. Nothing here asks the service or starts a process.
  """

  alias DemandPort.{Error, Json, Options}
  alias DemandPort.Graph.{Loading, Validation}

  # Nodes and edges by id, as they travel; and the ids in order, newest first.
  defstruct nodes: %{}, edges: %{}, node_ids: [], edge_ids: [], metadata: %{}

  @type t :: %__MODULE__{
          nodes: %{String.t() => map},
          edges: %{String.t() => map},
          node_ids: [String.t()],
          edge_ids: [String.t()],
          metadata: %{String.t() => term}
        }
  @typedoc "The values of a node's ports that no edge gives, by port."
  @type data :: keyword | %{(String.t() | atom) => term}
  @typedoc """
  One end of an edge: `"node"` for its first port, `"node.port"`, or `{"node", "port"}`, where the port may be nil.

  A text is read by the ids that the graph has, which may hold dots themselves. One that can be read in two ways is
  refused; a tuple never can.
  """
  @type endpoint :: String.t() | {String.t(), String.t() | nil}

  ## Building

  @doc """
  A graph with no nodes. The metadata are for who keeps the graph; the service does not look at them.

      iex> DemandPort.Graph.new(title: "Cats") |> DemandPort.Graph.to_map()
      %{"metadata" => %{"title" => "Cats"}, "graph" => %{"nodes" => [], "edges" => []}}
  """
  @spec new(data) :: t
  def new(metadata \\ []), do: %__MODULE__{metadata: data(metadata, "the metadata")}

  @doc """
  Adds a node. Raises `ArgumentError` where the graph has one of that id.

      iex> graph = DemandPort.Graph.node(DemandPort.Graph.new(), "in", "text-input", [text: "hi"], position: {0, 40})
      iex> DemandPort.Graph.to_map(graph)["nodes"]
      [%{"id" => "in", "node_type" => "text-input", "data" => %{"text" => "hi"}, "position" => [0, 40]}]

  #{Options.docs(:"Graph.node")}
  """
  @spec node(t, String.t(), String.t(), data, keyword) :: t
  def node(%__MODULE__{} = graph, id, node_type, data \\ [], options \\ []) do
    named!(id, "the id of a node")
    named!(node_type, "the type of node #{inspect(id)}")
    if is_map_key(graph.nodes, id), do: raise(ArgumentError, "the graph has a node #{inspect(id)} already")
    node = %{"id" => id, "node_type" => node_type, "data" => data(data, "the data of node #{inspect(id)}")}
    put_node(graph, placed(node, Options.validate!(options, :"Graph.node")[:position]))
  end

  @doc """
  Puts values into a node's data; what it had under these ports is replaced. Raises `ArgumentError` for an unknown node.

      iex> graph = DemandPort.Graph.node(DemandPort.Graph.new(), "llm", "llm-inference", model: "tiny")
      iex> DemandPort.Graph.put_data(graph, "llm", model: "large").nodes["llm"]["data"]
      %{"model" => "large"}
  """
  @spec put_data(t, String.t(), data) :: t
  def put_data(%__MODULE__{} = graph, id, data) do
    known!(graph, id)
    update_in(graph.nodes[id]["data"], &Map.merge(&1, data(data, "the data of node #{inspect(id)}")))
  end

  @doc """
  Adds an edge. Raises `ArgumentError` for an unknown node, for an end that can be read in two ways, and where the two
  ports are connected already.

      iex> graph = DemandPort.Graph.new() |> DemandPort.Graph.node("a.b", "text-input") |> DemandPort.Graph.node("out", "text-output")
      iex> DemandPort.Graph.connect(graph, "a.b.text", "out") |> DemandPort.Graph.to_map() |> Map.get("edges")
      [%{"source" => "a.b", "source_handle" => "text", "target" => "out"}]

      iex> DemandPort.Graph.connect(DemandPort.Graph.new(), "in", "out")
      ** (ArgumentError) "in" names no node of the graph; it has none

  #{Options.docs(:"Graph.connect")}
  """
  @spec connect(t, endpoint, endpoint, keyword) :: t
  def connect(%__MODULE__{} = graph, source, target, options \\ []) do
    options = Options.validate!(options, :"Graph.connect")
    {source, source_handle} = endpoint!(graph, source)
    {target, target_handle} = endpoint!(graph, target)
    handles = [{"source_handle", source_handle}, {"target_handle", target_handle}, {"id", options[:id]}]

    edge =
      for {key, value} <- handles, value, into: %{"source" => source, "target" => target}, do: {key, value}

    id = Loading.edge_id(edge)
    if is_map_key(graph.edges, id), do: raise(ArgumentError, "the graph has an edge #{inspect(id)} already")
    put_edge(graph, edge)
  end

  ## Reading and writing

  @doc """
  The graph in a map, in every shape that the service reads: keys as strings or atoms, in snake_case or camelCase, bare
  or wrapped as `{version, metadata, graph}`. The error's code is `:invalid_graph`, and its message names the place.

      iex> {:ok, graph} = DemandPort.Graph.from_map(%{nodes: [%{id: "text-input-1"}]})
      iex> graph.nodes["text-input-1"]["node_type"]
      "text-input"

      iex> {:error, error} = DemandPort.Graph.from_map(%{nodes: [%{id: "a"}, %{id: "a"}]})
      iex> error.message
      "nodes[1]: there are two nodes with the id \\"a\\""
  """
  @spec from_map(term) :: {:ok, t} | {:error, Error.t()}
  def from_map(map) do
    with {:ok, parts} <- Loading.load(map) do
      graph = Enum.reduce(parts.nodes, %__MODULE__{metadata: parts.metadata}, &put_node(&2, &1))
      {:ok, Enum.reduce(parts.edges, graph, &put_edge(&2, &1))}
    end
  end

  @doc """
  The graph in JSON text. The error's code is `:invalid_graph`; where it is no JSON, line and column are named.

      iex> {:error, error} = DemandPort.Graph.from_json(~s({"nodes": [}))
      iex> error.message
      "the graph is no JSON: a value is missing (line 1, column 12)"
  """
  @spec from_json(String.t()) :: {:ok, t} | {:error, Error.t()}
  def from_json(text) when is_binary(text) do
    case Json.decode(text) do
      {:ok, value} -> from_map(value)
      {:error, reason} -> {:error, Error.new(:invalid_graph, "the graph is no JSON: #{reason}")}
    end
  end

  @doc "The graph in a JSON file, as `from_json/1`; reads the file in the calling process."
  @spec read(Path.t()) :: {:ok, t} | {:error, Error.t()}
  def read(path) do
    with {:ok, text} <- File.read(path), {:ok, graph} <- from_json(text) do
      {:ok, graph}
    else
      {:error, %Error{} = error} -> {:error, %{error | message: "#{path}: #{error.message}"}}
      {:error, reason} -> {:error, Error.new(:invalid_graph, "#{path}: #{:file.format_error(reason)}")}
    end
  end

  @doc "The graph as a map that `from_map/1`, the service and any JSON library understand: bare, unless it has metadata."
  @spec to_map(t) :: map
  def to_map(%__MODULE__{metadata: metadata} = graph) do
    bare = %{"nodes" => nodes(graph), "edges" => edges(graph)}
    if metadata == %{}, do: bare, else: %{"metadata" => metadata, "graph" => bare}
  end

  @doc """
  What `DemandPort.open/3` sends for a graph: a map is sent as it is, and judged by the service; a `%DemandPort.Graph{}`
  as its map; and a text is the path of a JSON file, ending in `.json`.

      iex> DemandPort.Graph.to_wire(%{nodes: []})
      {:ok, %{nodes: []}}

      iex> {:error, error} = DemandPort.Graph.to_wire("chat")
      iex> error.message
      "a graph is a map, a %DemandPort.Graph{} or the path of a .json file, not \\"chat\\""
  """
  @spec to_wire(term) :: {:ok, map} | {:error, Error.t()}
  def to_wire(%__MODULE__{} = graph), do: {:ok, to_map(graph)}
  def to_wire(%{} = map) when not is_struct(map), do: {:ok, map}

  def to_wire(path_or_other) do
    if is_binary(path_or_other) and String.ends_with?(path_or_other, ".json") do
      with {:ok, graph} <- read(path_or_other), do: {:ok, to_map(graph)}
    else
      expected = "a graph is a map, a %DemandPort.Graph{} or the path of a .json file"
      {:error, Error.new(:invalid_graph, "#{expected}, not #{inspect(path_or_other, limit: 5)}")}
    end
  end

  ## Checking

  @doc """
  Checks a graph against descriptors of node types, as `DemandPort.node_types/2` gives them, without asking the service.

  The rules, their codes and their order are the service's: `:unknown_node_type`, `:unknown_port`, `:unknown_node`,
  `:type_mismatch`, `:invalid_graph`, `:cycle`, the first that is broken in the error, and all in
  `details["problems"]`. `{:ok, problems}` holds what does not keep a graph from opening, which is `missing_input`
  alone: a `set_input` may give it later.

  Node types that the host runs are descriptors as well, or names alone, whose ports may be any. Only the service can
  say whether text in a `json` port is JSON, and whether anybody runs the node types that a host would have to.

      iex> alias DemandPort.Graph
      iex> graph = Graph.node(Graph.new(), "ask", "my-host-type")
      iex> Graph.validate(graph, ["my-host-type"])
      {:ok, []}
      iex> {:error, error} = Graph.validate(graph, [])
      iex> error.code
      :unknown_node_type
  """
  @spec validate(t | map, [map | String.t()]) :: {:ok, [map]} | {:error, Error.t()}
  def validate(%__MODULE__{} = graph, node_types) when is_list(node_types) do
    Validation.check(nodes(graph), edges(graph), node_types)
  end

  def validate(map, node_types) do
    with {:ok, graph} <- from_map(map), do: validate(graph, node_types)
  end

  ## Inside

  defp nodes(graph), do: in_order(graph.nodes, graph.node_ids)
  defp edges(graph), do: in_order(graph.edges, graph.edge_ids)

  defp in_order(map, ids), do: ids |> Enum.reverse() |> Enum.map(&Map.fetch!(map, &1))

  defp put_node(graph, %{"id" => id} = node) do
    %{graph | nodes: Map.put(graph.nodes, id, node), node_ids: [id | graph.node_ids]}
  end

  defp put_edge(graph, edge) do
    id = Loading.edge_id(edge)
    %{graph | edges: Map.put(graph.edges, id, edge), edge_ids: [id | graph.edge_ids]}
  end

  defp placed(node, nil), do: node
  defp placed(node, {x, y}), do: Map.put(node, "position", [x, y])

  defp data(data, place) do
    pairs =
      if Keyword.keyword?(data), do: data, else: is_map(data) && not is_struct(data) && Map.to_list(data)

    pairs || raise ArgumentError, "#{place} must be a keyword list or a map, got: #{inspect(data, limit: 5)}"
    keyed = for {key, value} <- pairs, into: %{}, do: {key!(key, place), value}

    if map_size(keyed) == length(pairs),
      do: keyed,
      else: raise(ArgumentError, "#{place} gives a port two values")
  end

  defp key!(key, _place) when is_binary(key), do: key
  defp key!(key, _place) when is_atom(key), do: Atom.to_string(key)

  defp key!(key, place),
    do: raise(ArgumentError, "#{place} has the key #{inspect(key)}; ports are strings or atoms")

  defp named!(name, _what) when is_binary(name) and name != "", do: name

  defp named!(name, what),
    do: raise(ArgumentError, "#{what} must be a non-empty string, got: #{inspect(name)}")

  defp endpoint!(graph, {id, port}) when is_binary(id) do
    known!(graph, id)
    {id, if(port, do: named!(port, "a port of node #{inspect(id)}"))}
  end

  defp endpoint!(graph, text) when is_binary(text) do
    case Enum.filter(readings(text), fn {id, _port} -> is_map_key(graph.nodes, id) end) do
      [end_of_it] ->
        end_of_it

      [] ->
        unknown!(graph, text)

      several ->
        raise ArgumentError,
              "#{inspect(text)} may mean #{Enum.map_join(several, " or ", &inspect/1)}: write which"
    end
  end

  defp endpoint!(_graph, other) do
    raise ArgumentError, "an end of an edge is \"node\", \"node.port\" or {node, port}, not #{inspect(other)}"
  end

  # Every way to read a text as a node and a port, by where its dots are.
  defp readings(text) do
    dots = for {at, 1} <- :binary.matches(text, "."), at + 1 < byte_size(text), do: at

    split =
      for at <- dots, do: {binary_part(text, 0, at), binary_part(text, at + 1, byte_size(text) - at - 1)}

    [{text, nil} | split]
  end

  defp known!(graph, id), do: is_map_key(graph.nodes, id) || unknown!(graph, id)

  @spec unknown!(t, term) :: no_return
  defp unknown!(graph, name) do
    there = graph.node_ids |> Enum.reverse() |> Enum.take(20) |> Enum.map_join(", ", &inspect/1)
    there = if there == "", do: "it has none", else: "its nodes: #{there}"
    raise ArgumentError, "#{inspect(name)} names no node of the graph; #{there}"
  end
end
