defmodule DemandPort.Test.Json do
  @moduledoc "Reads the JSON of the vectors; raises on anything else."

  @spec decode!(binary) :: term
  def decode!(text) do
    case DemandPort.Json.decode(text) do
      {:ok, value} -> value
      {:error, reason} -> raise ArgumentError, reason
    end
  end

  @spec read!(Path.t()) :: term
  def read!(path), do: path |> File.read!() |> decode!()
end
