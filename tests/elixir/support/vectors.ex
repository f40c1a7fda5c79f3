defmodule DemandPort.Test.Vectors do
  @moduledoc "Reads `protocol/vectors`, and compares messages with patterns."

  alias DemandPort.Test.Json

  @folder Path.expand("../../../protocol/vectors", __DIR__)

  @doc "The content of one vector file."
  def read(name), do: Json.read!(Path.join(@folder, name))

  @doc "The files of a folder, sorted."
  def list(folder), do: @folder |> Path.join("#{folder}/*.json") |> Path.wildcard() |> Enum.sort()

  @doc "A described value as the term that it is in Elixir."
  def term(%{"$" => "binary", "hex" => hex}), do: bytes(hex)
  def term(%{"$" => "int", "text" => text}), do: String.to_integer(text)
  def term(%{"$" => "float", "text" => "nan"}), do: :nan
  def term(%{"$" => "float", "text" => "inf"}), do: :infinity
  def term(%{"$" => "float", "text" => "-inf"}), do: :neg_infinity
  def term(%{"$" => "float", "text" => text}), do: String.to_float(text)
  def term(%{"$" => "term", "hex" => hex}), do: hex |> bytes() |> :erlang.binary_to_term()
  def term(%{} = map), do: Map.new(map, fn {key, value} -> {key, term(value)} end)
  def term(list) when is_list(list), do: Enum.map(list, &term/1)
  def term(plain), do: plain

  @doc "The bytes that hexadecimal digits are."
  def bytes(hex), do: Base.decode16!(hex, case: :mixed)

  @doc "Whether a message is what a pattern describes."
  def fits?(%{"$any" => true}, _value), do: true

  def fits?(%{"$subset" => keys}, value) when is_map(value) do
    Enum.all?(keys, fn {key, pattern} -> is_map_key(value, key) and fits?(pattern, value[key]) end)
  end

  def fits?(%{"$subset" => _}, _value), do: false
  def fits?(%{"$" => _} = described, value), do: term(described) === value

  def fits?(%{} = pattern, value) when is_map(value) do
    Map.keys(pattern) == Map.keys(value) and fits?(%{"$subset" => pattern}, value)
  end

  def fits?(pattern, value) when is_list(pattern) and is_list(value) do
    length(pattern) == length(value) and Enum.zip(pattern, value) |> Enum.all?(fn {p, v} -> fits?(p, v) end)
  end

  def fits?(pattern, value), do: pattern === value
end
