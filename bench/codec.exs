# What the client's MessagePack costs, and how that stands beside Msgpax:
#
#     mix run bench/codec.exs [WORD…]
#     MSGPAX_EBIN=FOLDER mix run bench/codec.exs [WORD…]
#
# FOLDER holds Msgpax's compiled modules, its protocol consolidated. With WORDs only the rows with one of them are run.
#
# Encoding ends with one binary, as the port is given one; strings are checked for UTF-8 here, and by Msgpax not at all.
# The two take turns, each in a fresh process; times are medians over the turns, a ratio is the median of the ratios of
# one turn with the one beside it. Exit status 1 when a ratio misses its target; without FOLDER there is none.

defmodule Bench.Codec do
  @compile {:no_warn_undefined, [Msgpax, Msgpax.Bin, Msgpax.Packer]}

  alias DemandPort.Msgpack

  @turns 41
  @turn_ns 2_000_000

  # A message is an array as it travels, a value what it is made of. A long string costs Msgpax next to nothing, since it
  # does not look at it: that is shown (unchecked), but judged with a String.valid?/1 on Msgpax's side (checked).
  @targets %{message: 1.2, value: 2.0, checked: 1.2, unchecked: nil}

  def main(words) do
    theirs? = load_msgpax(System.get_env("MSGPAX_EBIN"))
    rows = Enum.filter(rows(), fn {_, name, _} -> words == [] or String.contains?(name, words) end)

    IO.puts("| what | encode, µs | Msgpax | ratio | decode, µs | Msgpax | ratio | target |")
    IO.puts(String.duplicate("|---", 8) <> "|")
    missed = Enum.flat_map(rows, &row(&1, theirs?))
    if missed != [], do: stop(missed)
  end

  defp load_msgpax(nil), do: false

  defp load_msgpax(folder) do
    Code.prepend_path(folder)

    (Code.ensure_loaded?(Msgpax.Packer) and Msgpax.Packer.__protocol__(:consolidated?)) or
      raise "#{folder} holds no consolidated Msgpax"
  end

  defp stop(missed) do
    Enum.each(missed, &IO.puts(:stderr, "missed: " <> &1))
    System.halt(1)
  end

  defp row({kind, name, value}, theirs?) do
    bytes = value |> Msgpack.encode!() |> IO.iodata_to_binary()
    encode = compare(encoder(kind, value), theirs? && their_encoder(kind, value))
    decode = compare(decoder(kind, bytes), theirs? && their_decoder(kind, bytes))
    IO.puts("| #{name} | #{cells(encode)} | #{cells(decode)} | #{target(kind, theirs?)} |")

    for {way, {_, _, ratio}} <- [encode: encode, decode: decode], missed?(ratio, @targets[kind]) do
      "#{name}, #{way}: #{Float.round(ratio, 2)}, target #{@targets[kind]}"
    end
  end

  defp target(kind, theirs?), do: if(theirs? && @targets[kind], do: "<= #{@targets[kind]}")
  defp missed?(ratio, target), do: target != nil and ratio > target

  defp encoder(:message, [type | fields]) do
    fn ->
      {:ok, bytes} = Msgpack.encode_message(type, fields)
      IO.iodata_to_binary(bytes)
    end
  end

  defp encoder(_, value), do: fn -> value |> Msgpack.encode!() |> IO.iodata_to_binary() end

  defp decoder(:message, bytes), do: fn -> {:ok, _} = Msgpack.decode_message(bytes) end
  defp decoder(_, bytes), do: fn -> {:ok, _} = Msgpack.decode(bytes) end

  defp their_encoder(:checked, value) do
    fn ->
      true = String.valid?(value)
      Msgpax.pack!(value, iodata: false)
    end
  end

  defp their_encoder(_, value) do
    value = with_bins(value)
    fn -> Msgpax.pack!(value, iodata: false) end
  end

  defp their_decoder(:checked, bytes) do
    fn ->
      {:ok, value} = Msgpax.unpack(bytes)
      true = String.valid?(value)
    end
  end

  defp their_decoder(_, bytes), do: fn -> {:ok, _} = Msgpax.unpack(bytes) end

  # Msgpax writes bytes as bytes where it is told so.
  defp with_bins(value) when is_binary(value),
    do: if(String.valid?(value), do: value, else: Msgpax.Bin.new(value))

  defp with_bins(value) when is_list(value), do: Enum.map(value, &with_bins/1)
  defp with_bins(value) when is_map(value), do: Map.new(value, fn {key, value} -> {key, with_bins(value)} end)
  defp with_bins(value), do: value

  ## Turns

  defp compare(ours, theirs) do
    ours = {ours, rounds(ours)}
    theirs = theirs && {theirs, rounds(theirs)}
    turns = for _ <- 1..@turns, do: {turn(ours), theirs && turn(theirs)}
    ratios = for {a, b} when is_number(b) <- turns, do: a / b
    {median(Enum.map(turns, &elem(&1, 0))), theirs && median(Enum.map(turns, &elem(&1, 1))), median(ratios)}
  end

  # The first call loads modules.
  defp rounds(function) do
    function.()
    rounds(function, 1)
  end

  defp rounds(function, n) do
    if turn({function, n}) * n * 1_000 < @turn_ns, do: rounds(function, 2 * n), else: n
  end

  # Microseconds for one call.
  defp turn({function, rounds}) do
    fn -> timed(function, rounds) end |> Task.async() |> Task.await(:infinity)
  end

  defp timed(function, rounds) do
    start = System.monotonic_time(:nanosecond)
    repeat(function, rounds)
    (System.monotonic_time(:nanosecond) - start) / rounds / 1_000
  end

  defp repeat(_function, 0), do: :ok

  defp repeat(function, n) do
    function.()
    repeat(function, n - 1)
  end

  defp median([]), do: 0.0
  defp median(numbers), do: numbers |> Enum.sort() |> Enum.at(div(length(numbers), 2))

  defp cells({ours, false, _}), do: "#{Float.round(ours, 2)} | | "
  defp cells({ours, theirs, ratio}), do: Enum.map_join([ours, theirs, ratio], " | ", &Float.round(&1, 2))

  ## Rows

  defp rows do
    [
      {:message, "node_stream", ["node_stream", "llm", " the cat", 71, 12, "text"]},
      {:message, "node_stream, 200 bytes", ["node_stream", "llm", text(200), 71, 12, "text"]},
      {:message, "demand_complete", demand_complete()},
      {:message, "demand_complete, 100 outputs", ["demand_complete", "n", outputs(100), 71, %{"ran" => 100}]},
      {:message, "demand_error", ["demand_error", "n", error(), 71, %{"duration_us" => 153, "ran" => 0}]},
      {:message, "demand", ["demand", 71, "session-1", "answer", %{"credit" => 64}]},
      {:message, "open, 50 nodes", ["open", 1, "session-1", graph(50), %{}]},
      {:message, "ok, 1000 integers", ["ok", 1, Enum.to_list(1..1_000)]},
      {:message, "ok, 1000 strings", ["ok", 1, strings(1_000)]},
      {:message, "array of everything",
       ["x" | Enum.flat_map(1..50, &[&1, &1 * 1_000, &1 / 7, nil, "text", [&1]])]},
      {:value, "nil", nil},
      {:value, "true", true}
    ] ++ integers() ++ strings_and_binaries() ++ collections()
  end

  defp integers do
    of_bits = for bits <- [7, 8, 16, 32, 64], do: {:value, "unsigned, #{bits} bits", Bitwise.bsl(1, bits) - 1}
    signed = for bits <- [6, 8, 16, 32, 64], do: {:value, "negative, #{bits} bits", -Bitwise.bsl(1, bits - 1)}
    lists = for {_, name, n} <- of_bits ++ signed, do: {:value, "100 × " <> name, List.duplicate(n, 100)}
    of_bits ++ signed ++ lists ++ [{:value, "float", 0.1}, {:value, "100 × float", List.duplicate(0.1, 100)}]
  end

  defp strings_and_binaries do
    short = for size <- [0, 8, 31, 100, 200], do: {:value, "string, #{size} bytes", text(size)}
    two_bytes = {:value, "string, 8 letters of 2 bytes", String.duplicate("ж", 8)}

    long = [
      {"string, 1000 bytes", text(1_000)},
      {"string, 1000000 bytes", text(1_000_000)},
      {"string, 100 letters of 2 bytes", String.duplicate("ж", 100)},
      {"string, 10000 letters of 2 bytes", String.duplicate("ж", 10_000)}
    ]

    long = for {name, text} <- long, kind <- [:checked, :unchecked], do: {kind, "#{name}, #{kind}", text}

    binaries =
      for size <- [8, 300, 100_000], do: {:value, "binary, #{size} bytes", <<0xFF>> <> text(size - 1)}

    short ++ [two_bytes | long] ++ binaries
  end

  defp collections do
    [
      {:value, "[]", []},
      {:value, "%{}", %{}},
      {:value, "list of 10 integers", Enum.to_list(1..10)},
      {:value, "list of 10 strings", strings(10)},
      {:value, "list of 10000 integers", Enum.to_list(1..10_000)},
      {:value, "list of 10000 strings", strings(10_000)},
      {:value, "map of 1", outputs(1)},
      {:value, "map of 10", outputs(10)},
      {:value, "map of 100", outputs(100)},
      {:value, "map of 10000", outputs(10_000)},
      {:value, "lists, 90 deep", Enum.reduce(1..90, [], fn _, inner -> [inner] end)},
      {:value, "maps, 90 deep", Enum.reduce(1..90, %{}, fn _, inner -> %{"k" => inner} end)}
    ]
  end

  defp text(size), do: String.slice(String.duplicate("the quick brown fox ", div(size, 20) + 1), 0, size)
  defp strings(n), do: for(i <- 1..n, do: "word #{i}")
  defp outputs(n), do: for(i <- 1..n, into: %{}, do: {"output_#{i}", i})

  defp demand_complete do
    meta = %{
      "duration_us" => 153_214,
      "ran" => 2,
      "cached" => 1,
      "skipped" => false,
      "usage" => %{"llm" => %{"prompt_tokens" => 26, "completion_tokens" => 40}}
    }

    ["demand_complete", "answer", %{"text" => text(150), "finish_reason" => "stop"}, 71, meta]
  end

  defp error do
    %{
      "code" => "node_failed",
      "message" => "the file is not there",
      "node" => "read",
      "retryable" => false,
      "details" => %{"path" => "a/b"},
      "traceback" => nil
    }
  end

  defp graph(n) do
    nodes =
      for i <- 1..n do
        %{
          "id" => "node-#{i}",
          "node_type" => "text-input",
          "data" => %{"text" => "some text"},
          "position" => [i * 10, 1.5]
        }
      end

    edges =
      for i <- 2..n//1 do
        %{
          "id" => "#{i}",
          "source" => "node-#{i - 1}",
          "source_handle" => "text",
          "target" => "node-#{i}",
          "target_handle" => "text"
        }
      end

    %{"nodes" => nodes, "edges" => edges}
  end
end

Bench.Codec.main(System.argv())
