defmodule DemandPort.Test.Random do
  @moduledoc "Random values of the protocol, the same for the same seed."

  @doc "A value of every kind that travels, nested up to four deep."
  def value(seed) do
    :rand.seed(:exsss, {seed, 7, 11})
    any(4)
  end

  @doc """
  Runs a property with that many seeds; what is random in it comes from `:rand`. Says which seed failed.
  """
  def check(runs, property) do
    for seed <- 1..runs do
      :rand.seed(:exsss, {seed, 7, 11})

      try do
        property.()
      rescue
        error ->
          IO.puts(:stderr, "the property failed with seed #{seed}")
          reraise error, __STACKTRACE__
      end
    end
  end

  @doc "A value as `value/1` makes it, from what `:rand` gives next."
  def value, do: any(4)

  @doc "A list of `most` elements at most."
  def list(most, element), do: for(_ <- some(most), do: element.())

  @doc "The bytes in pieces of any sizes, one at least."
  def slices(bytes) do
    case byte_size(bytes) do
      0 ->
        [""]

      size ->
        {piece, rest} = :erlang.split_binary(bytes, :rand.uniform(size))
        [piece | if(rest == "", do: [], else: slices(rest))]
    end
  end

  @doc "The elements of all lists in one, those of each in their order."
  def interleave(lists) do
    case Enum.reject(lists, &(&1 == [])) do
      [] ->
        []

      lists ->
        {[first | rest], others} = List.pop_at(lists, :rand.uniform(length(lists)) - 1)
        [first | interleave([rest | others])]
    end
  end

  @doc "The bytes with a piece of them changed, taken out, put in or said twice, once or several times."
  def damaged(bytes) do
    damaged = Enum.reduce(1..:rand.uniform(3), bytes, fn _, bytes -> damage(bytes) end)
    if damaged == bytes, do: damaged(bytes), else: damaged
  end

  defp damage(bytes) do
    {before, rest} = :erlang.split_binary(bytes, :rand.uniform(byte_size(bytes) + 1) - 1)
    {piece, rest} = :erlang.split_binary(rest, min(:rand.uniform(8), byte_size(rest)))

    case :rand.uniform(4) do
      1 -> before <> :rand.bytes(byte_size(piece)) <> rest
      2 -> before <> rest
      3 -> before <> piece <> piece <> rest
      4 -> before <> <<:rand.uniform(256) - 1>> <> piece <> rest
    end
  end

  @doc "A text of every kind of code point, of up to `most` of them."
  def text(most), do: for(_ <- some(most), into: "", do: <<point()::utf8>>)

  defp any(0), do: plain(:rand.uniform(9))

  defp any(depth) do
    case :rand.uniform(12) do
      10 -> for _ <- some(20), do: any(depth - 1)
      11 -> for _ <- some(20), into: %{}, do: {text(12), any(depth - 1)}
      12 -> {any(depth - 1), self()}
      n -> plain(n)
    end
  end

  defp plain(1), do: Enum.random([nil, true, false, :nan, :infinity, :neg_infinity])
  defp plain(2), do: :rand.uniform(300) - 150
  defp plain(3), do: Enum.random([1, -1]) * :rand.uniform(Bitwise.bsl(1, :rand.uniform(80)))
  defp plain(4), do: (:rand.uniform() - 0.5) * :math.pow(10, :rand.uniform(600) - 300)
  defp plain(5), do: text(40)
  defp plain(6), do: :rand.bytes(:rand.uniform(300))
  defp plain(7), do: Enum.random([[], %{}, "", {}, :some_atom, {:ok, 1}])
  defp plain(8), do: make_ref()
  defp plain(9), do: :rand.uniform() * 1.0

  defp some(most), do: 1..(:rand.uniform(most + 1) - 1)//1

  defp point do
    case :rand.uniform(5) do
      1 -> Enum.random(0x80..0x7FF)
      2 -> Enum.random(0x800..0xD7FF)
      3 -> Enum.random(0xE000..0xFFFF)
      4 -> Enum.random(0x10000..0x10FFFF)
      5 -> Enum.random(0..0x7F)
    end
  end
end
