defmodule DemandPort.ProtocolTest do
  use ExUnit.Case, async: true

  alias DemandPort.{Error, Msgpack, Protocol}

  defp payload(message), do: message |> Msgpack.encode!() |> IO.iodata_to_binary()
  defp handle(protocol, message), do: Protocol.handle(protocol, payload(message))

  defp parts(bytes, size) do
    slices = for <<slice::binary-size(size) <- bytes>>, do: slice
    slices ++ [binary_part(bytes, length(slices) * size, byte_size(bytes) - length(slices) * size)]
  end

  setup do
    protocol = Protocol.new(100_000)
    {:ok, 1, _, protocol} = Protocol.request(protocol, "ping", [])
    {:ok, 2, _, protocol} = Protocol.demand(protocol, "s", "n", %{"credit" => 1})
    {:ok, protocol: protocol}
  end

  test "requests have the form of the protocol", %{protocol: protocol} do
    {:ok, 3, bytes, _} = Protocol.request(protocol, "open", ["s", %{}, {:encoded, Msgpack.encode!(%{a: 1})}])
    assert Msgpack.decode(bytes) == {:ok, ["open", 3, "s", %{}, %{"a" => 1}]}
    {:ok, 3, bytes, _} = Protocol.demand(protocol, "s", "n", %{})
    assert Msgpack.decode(bytes) == {:ok, ["demand", 3, "s", "n"]}
    {:ok, 3, bytes, _} = Protocol.demand(protocol, "s", "n", %{"events" => true})
    assert Msgpack.decode(bytes) == {:ok, ["demand", 3, "s", "n", %{"events" => true}]}
    assert Msgpack.decode(Protocol.credit(2, 5)) == {:ok, ["credit", 2, 5]}
  end

  test "a reply closes its request", %{protocol: protocol} do
    assert {{:reply, 1, {:ok, "pong"}}, protocol} = handle(protocol, ["ok", 1, "pong"])
    assert {{:unexpected, ["ok", 1, "pong"]}, _} = handle(protocol, ["ok", 1, "pong"])
    assert Protocol.kind(protocol, 1) == nil
  end

  test "an ok is no answer to a demand", %{protocol: protocol} do
    assert {{:unexpected, _}, ^protocol} = handle(protocol, ["ok", 2, nil])
  end

  test "an error for a demand is its terminal", %{protocol: protocol} do
    error = %{"code" => "bad_message", "message" => "credits"}

    assert {{:terminal, 2, {:demand_error, "n", %Error{code: :bad_message}}, %{}}, _} =
             handle(protocol, ["error", 2, error])
  end

  test "a demand streams until its terminal, and not after", %{protocol: protocol} do
    stream = ["node_stream", "n", "c", 2, 0, "text"]
    assert {{:stream, 2, {:node_stream, "n", "c"}}, protocol} = handle(protocol, stream)
    done = ["demand_complete", "n", %{"a" => 1}, 2, %{"ran" => 1}]

    assert {{:terminal, 2, {:demand_complete, "n", %{"a" => 1}}, %{"ran" => 1}}, protocol} =
             handle(protocol, done)

    for message <- [stream, done], do: assert({{:unexpected, _}, ^protocol} = handle(protocol, message))
  end

  test "stream messages for a request's id are unexpected", %{protocol: protocol} do
    assert {{:unexpected, _}, ^protocol} = handle(protocol, ["node_stream", "n", "c", 1, 0, "text"])
    assert {{:unexpected, _}, ^protocol} = handle(protocol, ["demand_complete", "n", %{}, 1, %{}])
  end

  test "limits of ready are taken over, never above ours", %{protocol: protocol} do
    limits = %{"max_frame_bytes" => 5_000, "max_open_requests" => 3}
    {{:ready, _}, protocol} = handle(protocol, ["ready", %{"protocol" => 1, "limits" => limits}])

    assert {:error, %Error{code: :too_large}} =
             Protocol.request(protocol, "x", [String.duplicate("a", 5_000)])

    {:ok, 3, _, protocol} = Protocol.request(protocol, "ping", [])
    assert {:error, %Error{code: :queue_full, retryable: true}} = Protocol.request(protocol, "ping", [])
    odd = %{"max_frame_bytes" => -1, "max_open_requests" => nil}
    {{:ready, _}, ^protocol} = handle(protocol, ["ready", %{"protocol" => 1, "limits" => odd}])
    {{:ready, _}, ^protocol} = handle(protocol, ["ready", %{"protocol" => 1}])
  end

  test "parts of several messages are joined, other messages between", %{protocol: protocol} do
    one = payload(["ok", 1, String.duplicate("a", 999)])
    two = payload(["demand_complete", "n", %{"b" => :binary.copy(<<0xFF>>, 1_999)}, 2, %{}])
    pieces = for {bytes, number} <- [{one, 8}, {two, 9}], do: Enum.map(parts(bytes, 100), &{number, &1})
    [ones, twos] = pieces
    last_one = List.last(ones)
    last_two = List.last(twos)
    mixed = Enum.zip(ones, twos) |> Enum.flat_map(&Tuple.to_list/1)
    mixed = mixed ++ Enum.drop(twos, length(ones))

    {events, protocol} =
      Enum.flat_map_reduce(mixed, protocol, fn {number, bytes} = piece, protocol ->
        last = piece in [last_one, last_two]
        {event, protocol} = handle(protocol, ["part", number, last, bytes])
        {{:log, :info, _, _, _}, protocol} = handle(protocol, ["log", "info", "l", "between", %{}])
        {[event], protocol}
      end)

    assert [{:reply, 1, {:ok, "aaa" <> _}}, {:terminal, 2, {:demand_complete, "n", %{"b" => _}}, _}] =
             Enum.reject(events, &(&1 == :part))

    assert protocol.parts == %{}
  end

  test "every size of parts joins to the same message", %{protocol: protocol} do
    bytes = payload(["ok", 1, Enum.to_list(1..50)])

    for size <- 1..byte_size(bytes) do
      pieces = parts(bytes, size)

      {event, _} =
        pieces
        |> Enum.with_index(1)
        |> Enum.reduce({nil, protocol}, fn {piece, index}, {_, protocol} ->
          handle(protocol, ["part", 1, index == length(pieces), piece])
        end)

      assert {:reply, 1, {:ok, [1 | _]}} = event
    end
  end

  test "parts over the limit, within parts, or that join to nonsense are broken", %{protocol: protocol} do
    assert {:part, more} = handle(protocol, ["part", 1, false, :binary.copy(<<0xFF>>, 90_000)])
    over = ["part", 1, false, :binary.copy(<<0xFF>>, 20_000)]
    assert {{:broken, %Error{code: :too_large}}, _} = handle(more, over)
    inner = payload(["part", 2, true, <<0xFF>>])
    assert {{:broken, %Error{code: :bad_message}}, _} = handle(protocol, ["part", 1, true, inner])
    assert {{:broken, %Error{code: :bad_message}}, _} = handle(protocol, ["part", 1, true, <<0xC1>>])
  end

  test "what cannot be read is broken; what can but is not known is unexpected", %{protocol: protocol} do
    assert {{:broken, %Error{code: :bad_message}}, ^protocol} = Protocol.handle(protocol, "")
    assert {{:broken, %Error{code: :bad_message}}, ^protocol} = Protocol.handle(protocol, <<0x90>>)

    for message <- [["ready"], ["ok"], ["log", "loud", "l", "t", %{}], ["part", 1, 1, "x"], [1], ["x", "y"]] do
      assert {{:unexpected, ^message}, ^protocol} = handle(protocol, message)
    end
  end

  test "events go to the demand that asked for them", %{protocol: protocol} do
    event = %{"event" => "cache_hit", "demand_id" => 2}
    assert {{:node_event, 2, {:node_event, "s", ^event}}, _} = handle(protocol, ["node_event", "s", event])
    assert {{:unexpected, _}, _} = handle(protocol, ["node_event", "s", %{event | "demand_id" => 9}])
  end

  test "goodbye carries its typed error", %{protocol: protocol} do
    assert {{:goodbye, %Error{code: :bad_frame}}, _} = handle(protocol, ["goodbye", %{"code" => "bad_frame"}])
  end
end
