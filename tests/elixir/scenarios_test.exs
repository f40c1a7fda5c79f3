defmodule DemandPort.ScenariosTest do
  # The ordered exchanges of protocol/vectors/scenarios, spoken to the real service over a bare port.
  use ExUnit.Case, async: true

  alias DemandPort.{Launch, Msgpack, Options}
  alias DemandPort.Test.{Json, Vectors}

  @moduletag :service

  for path <- Vectors.list("scenarios") do
    @path path
    test "scenario: #{Path.basename(path, ".json")}" do
      {:ok, port} = [] |> Options.validate!(:start_link) |> Launch.open()
      Enum.each(Json.read!(@path)["steps"], &step(port, &1))
      Port.close(port)
    end
  end

  defp step(port, %{"send" => messages}) do
    for message <- messages do
      Port.command(port, message |> Vectors.term() |> Msgpack.encode!())
    end
  end

  defp step(port, %{"expect" => patterns}) do
    for pattern <- patterns do
      message = next(port)
      assert Vectors.fits?(pattern, message), "expected #{inspect(pattern)}, got #{inspect(message)}"
    end
  end

  defp step(port, %{"expect_any_order" => patterns}) do
    Enum.reduce(patterns, patterns, fn _, left ->
      message = next(port)
      index = Enum.find_index(left, &Vectors.fits?(&1, message))
      assert index, "expected one of #{inspect(left)}, got #{inspect(message)}"
      List.delete_at(left, index)
    end)
  end

  # Logs are not what these exchanges are about.
  defp next(port) do
    receive do
      {^port, {:data, payload}} ->
        case Msgpack.decode_message(payload) do
          {:ok, ["log" | _]} -> next(port)
          {:ok, message} -> message
        end

      {^port, {:exit_status, status}} ->
        flunk("the service ended with exit status #{status}")
    after
      10_000 -> flunk("no message within 10 s")
    end
  end
end
