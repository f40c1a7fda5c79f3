defmodule DemandPort.Test.Random do
  @moduledoc "Random values of the protocol, the same for the same seed."

  @doc "A value of every kind that travels, nested up to four deep."
  def value(seed) do
    :rand.seed(:exsss, {seed, 7, 11})
    any(4)
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
