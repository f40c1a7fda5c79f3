defmodule DemandPort.MsgpackTest do
  use ExUnit.Case, async: true

  alias DemandPort.{Error, Msgpack}
  alias DemandPort.Test.{Random, Vectors}

  doctest Msgpack

  defp bytes(value), do: value |> Msgpack.encode!() |> IO.iodata_to_binary()
  defp roundtrip(value), do: value |> bytes() |> Msgpack.decode()

  describe "vectors" do
    for %{"name" => name} = vector <- Vectors.read("codec/valid.json") do
      @vector Macro.escape(vector)
      test "valid: #{String.slice(name, 0, 100)}" do
        vector = unquote(@vector)
        value = Vectors.term(vector["value"])
        encoded = Vectors.bytes(vector["hex"])

        assert {:ok, decoded} = Msgpack.decode(encoded)
        assert decoded === value
        if vector["canonical"], do: assert(bytes(value) == encoded)
        assert {:ok, ^value} = roundtrip(value)
      end
    end

    for %{"name" => name, "hex" => hex, "code" => code} <- Vectors.read("codec/invalid.json") do
      test "invalid: #{String.slice(name, 0, 100)}" do
        assert {:error, %Error{code: code}} = unquote(hex) |> Vectors.bytes() |> Msgpack.decode()
        assert Atom.to_string(code) == unquote(code)
      end
    end
  end

  describe "random values" do
    test "cut anywhere are an error, never an exception" do
      for seed <- 1..150, encoded = bytes(Random.value(seed)), byte_size(encoded) < 2_000 do
        for size <- 0..(byte_size(encoded) - 1) do
          assert {:error, %Error{code: :bad_message}} = Msgpack.decode(binary_part(encoded, 0, size))
        end
      end
    end
  end

  describe "Erlang terms" do
    test "pass unchanged" do
      terms = [
        self(),
        make_ref(),
        {:ok, "x", [1.5]},
        :an_atom,
        %{1 => 2},
        %{{1, 2} => :three},
        %{"k" => 1, 2 => 3},
        ~D[2024-02-29],
        [1 | 2],
        <<1::3>>,
        &String.length/1,
        2 ** 64,
        -(2 ** 63) - 1,
        {},
        %{<<0xFF>> => 1},
        hd(Port.list())
      ]

      for term <- terms, value <- [term, [term], %{"k" => term}], do: assert({:ok, ^value} = roundtrip(value))
    end

    test "of every size choose a header that is read back" do
      for size <- [0, 1, 2, 4, 8, 16, 255, 256, 65_535, 65_536, 70_000] do
        value = {String.duplicate("x", size)}
        assert {:ok, ^value} = roundtrip(value)
      end
    end

    test "that would make an atom are refused" do
      name = "atom_that_nobody_has_#{System.unique_integer([:positive])}"
      etf = <<131, 119, byte_size(name), name::binary>>
      assert {:error, %Error{code: :bad_message}} = Msgpack.decode(<<0xC7, byte_size(etf), 69, etf::binary>>)
      assert_raise ArgumentError, fn -> String.to_existing_atom(name) end
    end

    test "compressed, cut short or with bytes after them are refused" do
      compressed = :erlang.term_to_binary({String.duplicate("a", 200)}, [:compressed])
      whole = :erlang.term_to_binary({1})

      for etf <- [compressed, binary_part(whole, 0, byte_size(whole) - 1), whole <> "x", <<131>>] do
        assert {:error, %Error{}} = Msgpack.decode(<<0xC8, byte_size(etf)::16, 69, etf::binary>>)
      end
    end
  end

  describe "maps" do
    test "atom keys are sent as strings" do
      assert {:ok, %{"a" => 1, "nil" => 2}} = roundtrip(%{:a => 1, nil => 2})
    end

    test "a key as atom and as string is refused" do
      assert {:error, %Error{code: :bad_message}} = Msgpack.encode(%{:a => 1, "a" => 2})
    end

    test "of all header sizes" do
      for size <- [0, 1, 15, 16, 17, 65_535, 65_536] do
        map = Map.new(1..size//1, &{"k#{&1}", &1})
        assert {:ok, ^map} = roundtrip(map)
      end
    end
  end

  describe "sizes" do
    test "strings, binaries and lists at every header's border" do
      for size <- [0, 1, 15, 16, 31, 32, 255, 256, 65_535, 65_536, 1_000_000] do
        for value <- [String.duplicate("a", size), :binary.copy(<<0xFF>>, size), List.duplicate(0, size)] do
          assert {:ok, back} = roundtrip(value)
          assert back == value
        end
      end
    end

    test "integers at every border" do
      for shift <- 0..70, sign <- [1, -1], near <- -1..1 do
        n = sign * Bitwise.bsl(1, shift) + near
        assert {:ok, ^n} = roundtrip(n)
      end
    end
  end

  describe "nesting" do
    test "of 100 is read and written, 101 is not" do
      deep = fn depth -> Enum.reduce(1..depth, 1, fn _, value -> [value] end) end
      assert {:ok, _} = roundtrip(deep.(100))
      assert {:error, %Error{code: :bad_message}} = Msgpack.encode(deep.(101))
      assert {:error, %Error{code: :bad_message}} = Msgpack.decode(:binary.copy(<<0x91>>, 101) <> <<1>>)
    end

    test "does not count the message's own array" do
      deep = Enum.reduce(1..100, 1, fn _, value -> %{"k" => value} end)
      {:ok, message} = Msgpack.encode_message("x", [deep])
      assert {:ok, ["x", ^deep]} = message |> IO.iodata_to_binary() |> Msgpack.decode_message()
      assert {:error, _} = Msgpack.encode_message("x", [[deep]])
    end

    test "a million levels cost no stack" do
      assert {:error, %Error{}} = Msgpack.decode(:binary.copy(<<0x91>>, 1_000_000))
    end
  end

  test "a message is a non-empty array" do
    for bytes <- [<<0x90>>, <<0x01>>, <<0x80>>, <<0xA1, ?x>>] do
      assert {:error, %Error{code: :bad_message}} = Msgpack.decode_message(bytes)
    end
  end

  test "all ext types but 69 are refused" do
    for type <- 0..255, type != 69 do
      assert {:error, %Error{code: :bad_message}} = Msgpack.decode(<<0xC7, 3, type, 131, 97, 1>>)
    end
  end

  test "claimed lengths allocate nothing" do
    for tag <- [0xC6, 0xC9, 0xDB, 0xDD, 0xDF] do
      {us, result} = :timer.tc(fn -> Msgpack.decode(<<tag, 0xFFFF_FFFF::32, 69, 0>>) end)
      assert {:error, %Error{}} = result
      assert us < 100_000
    end
  end

  test "encode! raises the error" do
    assert_raise Error, ~r/bad_message/, fn -> Msgpack.encode!(%{:a => 1, "a" => 2}) end
  end
end
