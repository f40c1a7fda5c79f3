defmodule DemandPort.PropertiesTest do
  # What must hold for anything: the generators are those of DemandPort.Test.Random.
  use ExUnit.Case, async: true

  alias DemandPort.{Error, Msgpack, Protocol}
  alias DemandPort.Test.{Random, Vectors}

  defp bytes(value), do: value |> Msgpack.encode!() |> IO.iodata_to_binary()

  # Whether it is read as it should be; what is no value at all has one code.
  defp read(bytes) do
    case Msgpack.decode(bytes) do
      {:ok, value} -> {:ok, value}
      {:error, %Error{code: :bad_message}} -> :error
    end
  end

  describe "the codec" do
    test "gives back every value, in whatever it stands" do
      Random.check(1_000, fn ->
        value = %{"a" => Random.list(3, &Random.value/0), "b" => Random.value()}
        assert read(bytes(value)) === {:ok, value}
      end)
    end

    test "calls a str what is valid UTF-8, writing and reading" do
      Random.check(5_000, fn ->
        ascii = for _ <- 1..:rand.uniform(80), into: "", do: <<:rand.uniform(128) - 1>>

        text =
          Enum.random([
            ascii <> :rand.bytes(:rand.uniform(60) - 1),
            ascii <> Random.text(60) <> ascii,
            Random.damaged(Random.text(30) <> ascii),
            ascii <> <<:rand.uniform(256) - 1>> <> ascii
          ])

        valid? = String.valid?(text)
        <<tag, _::binary>> = bytes(text)
        assert tag in 0xC4..0xC6 == not valid?
        assert read(<<0xDA, byte_size(text)::16, text::binary>>) == if(valid?, do: {:ok, text}, else: :error)

        assert read(<<0x81, 0xDA, byte_size(text)::16, text::binary, 1>>) ==
                 if(valid?, do: {:ok, %{text => 1}}, else: :error)
      end)
    end

    test "reads bytes that are damaged, cut short or noise without raising" do
      Random.check(3_000, fn ->
        whole = bytes(Random.value())
        cut = binary_part(whole, 0, :rand.uniform(byte_size(whole)) - 1)
        assert read(cut) == :error
        for odd <- [Random.damaged(whole), noise(), whole <> noise()], do: read(odd)
      end)
    end

    test "refuses a key that is there twice, wherever the map stands" do
      Random.check(500, fn ->
        pairs = Random.list(40, fn -> {Random.text(8), Random.value()} end)
        pairs = [{"twice", 1} | Enum.uniq_by(pairs, &elem(&1, 0))]
        assert read(map(Enum.shuffle(pairs))) == {:ok, Map.new(pairs)}
        twice = map(Enum.shuffle([{"twice", Random.value()} | pairs]))
        assert read(twice) == :error
        assert read(<<0x92, 1, twice::binary>>) == :error
      end)
    end

    test "reads the vectors inside other values as it reads them alone" do
      valid = for vector <- Vectors.read("codec/valid.json"), do: vectors(vector)
      invalid = for %{"hex" => hex} <- Vectors.read("codec/invalid.json"), do: Vectors.bytes(hex)
      shallow = Enum.reject(valid, fn {_, bytes} -> match?(:error, read(<<0x91, bytes::binary>>)) end)
      assert length(valid) - length(shallow) <= 4

      Random.check(500, fn ->
        some = Enum.take_random(shallow, :rand.uniform(12))
        {values, encoded} = Enum.unzip(some)
        assert read(array(encoded)) === {:ok, values}
        keyed = Enum.with_index(some, fn {value, bytes}, n -> {"#{n}", value, bytes} end)
        map = for {key, _, bytes} <- keyed, into: <<0x80 + length(keyed)>>, do: bytes(key) <> bytes
        assert read(map) === {:ok, Map.new(keyed, fn {key, value, _} -> {key, value} end)}
        assert read(array([Enum.random(invalid)])) == :error
      end)
    end

    defp vectors(vector), do: {Vectors.term(vector["value"]), Vectors.bytes(vector["hex"])}
    defp array(values), do: IO.iodata_to_binary([0x90 + length(values) | values])

    defp map(pairs) do
      for {key, value} <- pairs, into: <<0xDE, length(pairs)::16>>, do: bytes(key) <> bytes(value)
    end

    # Tags and lengths more often than chance has them.
    defp noise do
      for _ <- 1..:rand.uniform(40), into: "" do
        Enum.random([<<:rand.uniform(96) + 0x7F>>, <<:rand.uniform(32) + 0xBF>>, <<:rand.uniform(4)>>, "ab"])
      end
    end
  end

  # A host with requests and demands open, and everything that a service says to end them, in any order that the
  # protocol allows: the messages of one demand in order, the slices of one message in order.
  describe "the protocol" do
    test "gives every request one reply and every demand its messages, whatever comes between" do
      Random.check(400, fn ->
        {protocol, wanted} = opened(:rand.uniform(12))
        answers = for {id, messages} <- wanted, do: travelling(messages, id)
        {events, protocol} = fed(protocol, Random.interleave([Random.list(10, &junk/0) | answers]))

        for {id, messages} <- wanted do
          assert for({^id, event} <- events, do: event) === Enum.map(messages, &event/1)
        end

        assert protocol.open == %{}
        assert protocol.parts == %{}
      end)
    end

    test "raises for nothing that a service can send" do
      Random.check(3_000, fn ->
        {protocol, wanted} = opened(3)
        messages = for {_, messages} <- wanted, message <- messages, do: message

        payloads =
          Random.list(6, fn ->
            Enum.random([
              fn -> Random.damaged(bytes(Enum.random(messages))) end,
              fn -> bytes(List.update_at(Enum.random(messages), :rand.uniform(6) - 1, fn _ -> odd() end)) end,
              fn -> bytes([odd_type() | Random.list(6, &odd/0)]) end,
              fn ->
                bytes([
                  "part",
                  :rand.uniform(2),
                  :rand.uniform() < 0.5,
                  :rand.bytes(:rand.uniform(50)) <> <<255>>
                ])
              end,
              fn -> :rand.bytes(:rand.uniform(30)) end
            ]).()
          end)

        Enum.reduce(payloads, protocol, fn payload, protocol ->
          {event, %Protocol{} = protocol} = Protocol.handle(protocol, payload)
          assert event == :part or is_atom(elem(event, 0))
          for %Error{} = error <- errors(event), do: assert(is_binary(Exception.message(error)))
          protocol
        end)
      end)
    end

    defp errors({:reply, _, {:error, error}}), do: [error]
    defp errors({:terminal, _, {:demand_error, _, error}, _}), do: [error]
    defp errors({kind, error}) when kind in [:goodbye, :broken], do: [error]
    defp errors(_no_error), do: []

    # Requests and demands by turns, with the messages that end each: {id, messages}.
    defp opened(count) do
      {wanted, protocol} =
        Enum.map_reduce(1..count, Protocol.new(1_000_000), fn n, protocol ->
          if :rand.uniform(2) == 1 do
            {:ok, id, _, protocol} = Protocol.request(protocol, "ping", [])
            {{id, [reply(id)]}, protocol}
          else
            {:ok, id, _, protocol} = Protocol.demand(protocol, "s", "n#{n}", %{})
            {{id, Random.list(4, fn -> passing(id) end) ++ [terminal(id)]}, protocol}
          end
        end)

      {protocol, wanted}
    end

    defp reply(id), do: Enum.random([["ok", id, Random.value()], ["error", id, error()]])

    defp passing(id),
      do: Enum.random([stream(id), ["node_event", "s", %{"demand_id" => id, "x" => Random.value()}]])

    defp stream(id), do: ["node_stream", "n", Random.value(), id, 0, "text"]

    defp terminal(id) do
      Enum.random([
        ["demand_complete", "n", %{"a" => Random.value()}, id, %{}],
        ["demand_error", "n", error(), id, %{}]
      ])
    end

    defp error, do: %{"code" => Enum.random(~w(cancelled node_failed)), "message" => Random.text(10)}

    # The payloads of the messages of one id, some in parts. The parts of one end before the next begins, so that the
    # number may be used again.
    defp travelling(messages, number) do
      Enum.flat_map(messages, fn message ->
        payload = bytes(message)
        if :rand.uniform(2) == 1, do: [payload], else: parts(Random.slices(payload), number)
      end)
    end

    defp parts(slices, number) do
      last = length(slices) - 1
      for {slice, at} <- Enum.with_index(slices), do: part(number, at == last, slice)
    end

    # A slice is always a bin, whatever its bytes are.
    defp part(number, last, slice) do
      bin = <<0xC6, byte_size(slice)::32, slice::binary>>
      <<0x94, bytes("part")::binary, bytes(number)::binary, bytes(last)::binary, bin::binary>>
    end

    # What is not for anybody, and what cannot be read: neither may change anything.
    defp junk do
      Enum.random([
        fn -> <<0xC1>> <> :rand.bytes(:rand.uniform(9)) end,
        fn -> binary_part(bytes(stream(1)), 0, 9) end,
        fn -> bytes(["log", "info", "l", "text", %{}]) end,
        fn -> bytes(terminal(999)) end,
        fn -> bytes(reply(0)) end,
        fn -> bytes(["new_in_version_2", Random.value()]) end
      ]).()
    end

    defp fed(protocol, payloads) do
      Enum.flat_map_reduce(payloads, protocol, fn payload, protocol ->
        {event, protocol} = Protocol.handle(protocol, payload)
        {of_id(event), protocol}
      end)
    end

    defp of_id({kind, id, _} = event) when kind in [:reply, :stream, :node_event], do: [{id, event}]
    defp of_id({:terminal, id, _, _} = event), do: [{id, event}]
    defp of_id(_no_ones), do: []

    # The event that a message is for who waits for it.
    defp event(["ok", id, result]), do: {:reply, id, {:ok, result}}
    defp event(["error", id, error]), do: {:reply, id, {:error, Error.from_wire(error)}}
    defp event(["node_stream", node, chunk, id, _, _]), do: {:stream, id, {:node_stream, node, chunk}}

    defp event(["node_event", session, event]),
      do: {:node_event, event["demand_id"], {:node_event, session, event}}

    defp event(["demand_complete", node, out, id, meta]),
      do: {:terminal, id, {:demand_complete, node, out}, meta}

    defp event(["demand_error", node, error, id, meta]) do
      {:terminal, id, {:demand_error, node, Error.from_wire(error)}, meta}
    end

    # What a service does not send, but what the codec lets through.
    defp odd, do: if(:rand.uniform(3) == 1, do: odd_map(), else: plain_or_struct())

    defp odd_map do
      keys = Enum.take_random(~w(protocol limits demand_id code message node details max_frame_bytes), 5)

      keys
      |> Map.new(&{&1, plain_or_struct()})
      |> Map.merge(Enum.random([%{}, %{"code" => "cancelled", "protocol" => 1}]))
    end

    defp plain_or_struct do
      made_up = %{"code" => "cancelled", "protocol" => 1, "demand_id" => 1, __struct__: Date}
      Enum.random([Random.value(), :rand.uniform(3), "text", ~D[2024-02-29], made_up])
    end

    defp odd_type do
      Enum.random(
        ~w(ready ok error node_stream demand_complete demand_error node_event log part goodbye) ++ [odd()]
      )
    end
  end
end
