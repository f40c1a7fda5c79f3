defmodule DemandPort.Restore do
  @moduledoc false
  # What it takes to open a session again in a new service: its graph, the edits of its structure, and the inputs that
  # stand. Pure data; an input that is set again replaces the one before, and so does a node's data, so that it grows with
  # changes of the structure alone.

  defstruct [:graph, :options, edits: [], inputs: %{}]

  @type t :: %__MODULE__{
          graph: map,
          options: map,
          edits: [map],
          inputs: %{{String.t(), String.t()} => term}
        }

  @spec new(map, map) :: t
  def new(graph, options), do: %__MODULE__{graph: graph, options: options}

  @doc "The session after an edit that the service took."
  @spec edited(t, [map]) :: t
  def edited(session, operations), do: Enum.reduce(operations, session, &apply_one(plain(&1), &2))

  @doc "The fields of the `open` that opens it again as it stands, or not at all."
  @spec fields(t, String.t()) :: [term]
  def fields(session, name) do
    set =
      for {{node, port}, value} <- session.inputs,
          do: %{"op" => "set_input", "node" => node, "port" => port, "value" => value}

    case Enum.reverse(session.edits, set) do
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

  defp apply_one(%{"op" => "remove_node", "node" => node} = operation, session) do
    inputs = for {{of, _port} = key, value} <- session.inputs, of != node, into: %{}, do: {key, value}
    %{session | inputs: inputs, edits: [operation | session.edits]}
  end

  # Of a node's data the last counts as well: a later update goes into the one before it.
  defp apply_one(%{"op" => "update_node_data", "node" => node, "data" => %{} = data} = operation, session) do
    {since, before} = Enum.split_while(session.edits, &(&1["node"] != node))

    case before do
      [%{"op" => "update_node_data", "data" => earlier} = update | rest] ->
        merged = %{update | "data" => Map.merge(with_texts(earlier), with_texts(data))}
        %{session | edits: since ++ [merged | rest]}

      _ ->
        %{session | edits: [operation | session.edits]}
    end
  end

  defp apply_one(operation, session), do: %{session | edits: [operation | session.edits]}

  defp with_texts(data), do: Map.new(data, fn {key, value} -> {to_string(key), value} end)

  defp plain(operation), do: Map.new(operation, fn {key, value} -> {to_string(key), value} end)
end
