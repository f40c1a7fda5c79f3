defmodule DemandPort.FramingTest do
  # The BEAM frames by itself with `{:packet, 4}`; its decoder is held to the same vectors as the service's framing.
  use ExUnit.Case, async: true

  alias DemandPort.Test.Vectors

  for %{"name" => name} = vector <- Vectors.read("framing/cases.json") do
    @vector Macro.escape(vector)
    test "vector: #{name}" do
      vector = unquote(@vector)
      chunks = Enum.map(vector["chunks"], &Vectors.bytes/1)
      {frames, rest} = feed(chunks, vector["max_frame_bytes"])

      assert frames == Enum.map(vector["frames"], &Vectors.bytes/1)

      case vector["error"] do
        nil -> assert byte_size(rest) == vector["rest"]
        "bad_frame" -> assert rest == :bad_frame
      end
    end
  end

  defp feed(chunks, max) do
    Enum.reduce(chunks, {[], ""}, fn
      _chunk, {frames, :bad_frame} -> {frames, :bad_frame}
      chunk, {frames, rest} -> take(frames, rest <> chunk, max)
    end)
  end

  defp take(frames, <<size::32, _::binary>>, max) when size > max, do: {frames, :bad_frame}

  defp take(frames, bytes, max) do
    case :erlang.decode_packet(4, bytes, []) do
      {:ok, frame, rest} -> take(frames ++ [frame], rest, max)
      {:more, _} -> {frames, bytes}
    end
  end
end
