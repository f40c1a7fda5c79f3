defmodule DemandPort.Vector do
  @moduledoc """
  Vectors of floats as they travel: one binary of little-endian 32-bit floats (`protocol/SPEC.md`, section 2).

  The output `embedding` of an `embedding` node is such a binary, or a list of them, and a vector database takes it as it
  is. Nothing here is called by the client itself.
  """

  @doc """
  The binary of a list of numbers.

      iex> DemandPort.Vector.pack([1, 0.5])
      <<0, 0, 128, 63, 0, 0, 0, 63>>
  """
  @spec pack([number]) :: binary
  def pack(numbers), do: for(number <- numbers, into: <<>>, do: <<number::float-little-32>>)

  @doc """
  The floats of a binary. One that holds a NaN or an infinity, or is no multiple of four bytes long, raises.

      iex> DemandPort.Vector.unpack(<<0, 0, 128, 63, 0, 0, 0, 63>>)
      [1.0, 0.5]

      iex> DemandPort.Vector.unpack(<<0, 0, 128>>)
      ** (ArgumentError) 3 bytes are no vector of 32-bit floats
  """
  @spec unpack(binary) :: [float]
  def unpack(binary) when rem(byte_size(binary), 4) == 0 do
    floats = for <<float::float-little-32 <- binary>>, do: float

    # A comprehension leaves out what does not match, which only NaN and the infinities do not.
    if 4 * length(floats) == byte_size(binary),
      do: floats,
      else: raise(ArgumentError, "the vector holds what is no number")
  end

  def unpack(binary), do: raise(ArgumentError, "#{byte_size(binary)} bytes are no vector of 32-bit floats")
end
