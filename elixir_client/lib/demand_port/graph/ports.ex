defmodule DemandPort.Graph.Ports do
  @moduledoc false
  # Port types, and the ports that a descriptor says a node type has: what docs/graphs.md says, for checks made here.

  @same [~w(string prompt), ~w(audio_stream stream), ~w(number integer)]
  @text ~w(string prompt)
  @as_text ~w(json number integer boolean)
  @floats [:nan, :infinity, :neg_infinity]

  @type port_spec :: %{name: String.t(), type: String.t(), required: boolean, multiple: boolean}
  @type spec :: %{
          inputs: [port_spec],
          outputs: [port_spec],
          open_inputs: boolean,
          open_outputs: boolean
        }

  @doc "Node types by name. A descriptor that names no inputs, or no outputs, takes any; a name alone is one that does."
  @spec by_type([map | String.t()]) :: %{String.t() => spec}
  def by_type(descriptors), do: Map.new(descriptors, &described/1)

  defp described(name) when is_binary(name), do: described(%{node_type: name})

  defp described(%{} = descriptor) do
    {inputs, outputs} = {field(descriptor, :inputs), field(descriptor, :outputs)}

    spec = %{
      inputs: Enum.map(inputs || [], &port/1),
      outputs: Enum.map(outputs || [], &port/1),
      open_inputs: is_nil(inputs) or field(descriptor, :open_inputs) == true,
      open_outputs: is_nil(outputs)
    }

    {field(descriptor, :node_type), spec}
  end

  defp port(name) when is_binary(name), do: port(%{name: name})

  defp port(%{} = port) do
    required = field(port, :required)
    has_default = is_map_key(port, :default) or is_map_key(port, "default")

    %{
      name: field(port, :name),
      type: field(port, :type) || "any",
      required: if(is_nil(required), do: not has_default, else: required),
      multiple: field(port, :multiple) == true
    }
  end

  # The service's descriptors have string keys; those that a host writes down itself may have atoms.
  defp field(map, name), do: Map.get(map, Atom.to_string(name), Map.get(map, name))

  @doc "The output that a source handle means; nil, the first."
  @spec source(spec, String.t() | nil) :: port_spec | nil
  def source(spec, handle),
    do: find(spec.outputs, handle) || if(spec.open_outputs, do: any(handle || "output"))

  @doc "The input that a target handle means; nil, the first."
  @spec target(spec, String.t() | nil) :: port_spec | nil
  def target(spec, handle), do: find(spec.inputs, handle) || if(handle && spec.open_inputs, do: any(handle))

  defp find(ports, nil), do: List.first(ports)
  defp find(ports, handle), do: Enum.find(ports, &(&1.name == handle))

  defp any(name), do: %{name: name, type: "any", required: false, multiple: false}

  @doc "Whether an edge may join an output of one type to an input of another."
  @spec fits?(String.t(), String.t()) :: boolean
  def fits?(type, type), do: true
  def fits?(source, target) when source == "any" or target == "any", do: true
  def fits?(source, target) when source in @as_text and target in @text, do: true
  def fits?(source, "json") when source in @text, do: true
  def fits?(source, target), do: Enum.any?(@same, &(source in &1 and target in &1))

  @doc """
  What a value does not fit in an input of that type, or nil where it does. Whether text is JSON is left to the service.
  """
  @spec mismatch(String.t(), term) :: String.t() | nil
  def mismatch(type, value) when type in @text, do: if(text?(value), do: nil, else: wants("text", value))
  def mismatch("number", value), do: if(number?(value), do: nil, else: wants("a number", value))
  def mismatch("integer", value), do: if(whole?(value), do: nil, else: wants("an integer", value))
  def mismatch("boolean", value), do: if(is_boolean(value), do: nil, else: wants("true or false", value))
  def mismatch(_type, _value), do: nil

  @doc "Whether nil in an input of that type is a value; in the others it is none."
  @spec takes_nil?(String.t()) :: boolean
  def takes_nil?(type), do: type not in @text and type not in @as_text

  defp wants(what, value), do: "wants #{what}, not #{inspect(value, limit: 5, printable_limit: 60)}"

  defp text?(value) when is_binary(value), do: String.valid?(value)
  defp text?(value), do: number?(value) or is_boolean(value) or is_list(value) or plain_map?(value)

  defp plain_map?(value), do: is_map(value) and not is_struct(value)

  defp number?(value), do: is_number(value) or value in @floats

  defp whole?(value), do: is_integer(value) or (is_float(value) and trunc(value) == value)
end
