defmodule DemandPort.Msgpack do
  @moduledoc """
  The values of the protocol as MessagePack, as `protocol/SPEC.md`, section 2, lays them down.

  | Elixir | MessagePack |
  |---|---|
  | `nil`, `true`, `false` | nil, bool |
  | integer | int; over 64 bits: ext type 69 |
  | float, `:nan`, `:infinity`, `:neg_infinity` | float 64 |
  | binary of valid UTF-8 | str |
  | other binary | bin |
  | list | array |
  | map whose keys are strings or atoms | map with string keys |
  | any other term: tuple, pid, reference, atom, struct… | ext type 69: the term in External Term Format |

  Decoding is strict: a key that is not a string, a duplicate key, nesting deeper than 100, invalid UTF-8, an ext type
  other than 69, a truncated value, and bytes after the value are errors. Terms are decoded with `[:safe]`, so bytes
  from the wire never make an atom. Strings of a decoded value are references into the given binary, not copies.

      iex> {:ok, bytes} = DemandPort.Msgpack.encode(%{temperature: 0.7, stop: nil})
      iex> DemandPort.Msgpack.decode(IO.iodata_to_binary(bytes))
      {:ok, %{"stop" => nil, "temperature" => 0.7}}

      iex> {:error, error} = DemandPort.Msgpack.decode(<<0xC1>>)
      iex> error.code
      :bad_message
  """

  alias DemandPort.Error

  @max_depth 100
  @term_type 69
  @etf_version 131
  @etf_compressed 80

  @min_integer -0x8000_0000_0000_0000
  @max_integer 0xFFFF_FFFF_FFFF_FFFF

  # The one quiet NaN that is written; every NaN is read.
  @nan <<0xCB, 0x7FF8_0000_0000_0000::64>>
  @infinity <<0xCB, 0x7FF0_0000_0000_0000::64>>
  @neg_infinity <<0xCB, 0xFFF0_0000_0000_0000::64>>

  @type value :: term

  ## Encoding

  @doc "The bytes of a value. Fails only for nesting deeper than 100 and for keys that are equal as strings."
  @spec encode(value) :: {:ok, iodata} | {:error, Error.t()}
  def encode(value) do
    {:ok, [put(value, 0)]}
  catch
    {:bad_message, text} -> {:error, Error.new(:bad_message, text)}
  end

  @doc "As `encode/1`, but raises `DemandPort.Error`."
  @spec encode!(value) :: iodata
  def encode!(value) do
    case encode(value) do
      {:ok, bytes} -> bytes
      {:error, error} -> raise error
    end
  end

  @doc """
  The bytes of a message: an array of a type, and fields, of which any may be `{:encoded, iodata}` already.

  So a caller can encode a large value in its own process, and the connection only puts the id before it. The
  message's own array does not count as nesting.
  """
  @spec encode_message(String.t(), [value | {:encoded, iodata}]) :: {:ok, iodata} | {:error, Error.t()}
  def encode_message(type, fields) do
    {:ok, [array_header(length(fields) + 1), put_text(type) | Enum.map(fields, &put_field/1)]}
  catch
    {:bad_message, text} -> {:error, Error.new(:bad_message, text)}
  end

  defp put_field({:encoded, bytes}), do: bytes
  defp put_field(value), do: put(value, 0)

  # `depth` counts the arrays and maps around the value. A single byte is returned as an integer, which is iodata
  # only inside a list.
  defp put(nil, _depth), do: 0xC0
  defp put(false, _depth), do: 0xC2
  defp put(true, _depth), do: 0xC3
  defp put(:nan, _depth), do: @nan
  defp put(:infinity, _depth), do: @infinity
  defp put(:neg_infinity, _depth), do: @neg_infinity
  defp put(value, _depth) when is_integer(value), do: put_integer(value)
  defp put(value, _depth) when is_float(value), do: <<0xCB, value::float-64>>

  defp put(value, _depth) when is_binary(value) do
    if utf8?(value), do: put_text(value), else: put_binary(value)
  end

  defp put(value, depth) when is_list(value) do
    if proper?(value), do: put_array(value, depth + 1), else: put_term(value)
  end

  defp put(value, depth) when is_map(value) and not is_struct(value) do
    if Enum.all?(value, &text_key?/1), do: put_map(value, depth + 1), else: put_term(value)
  end

  defp put(value, _depth), do: put_term(value)

  defp put_integer(n) when n >= 0 and n < 0x80, do: n
  defp put_integer(n) when n < 0 and n >= -0x20, do: <<n::8>>
  defp put_integer(n) when n >= 0 and n < 0x100, do: <<0xCC, n::8>>
  defp put_integer(n) when n >= 0 and n < 0x1_0000, do: <<0xCD, n::16>>
  defp put_integer(n) when n >= 0 and n < 0x1_0000_0000, do: <<0xCE, n::32>>
  defp put_integer(n) when n >= 0 and n <= @max_integer, do: <<0xCF, n::64>>
  defp put_integer(n) when n < 0 and n >= -0x80, do: <<0xD0, n::8>>
  defp put_integer(n) when n < 0 and n >= -0x8000, do: <<0xD1, n::16>>
  defp put_integer(n) when n < 0 and n >= -0x8000_0000, do: <<0xD2, n::32>>
  defp put_integer(n) when n < 0 and n >= @min_integer, do: <<0xD3, n::64>>
  defp put_integer(n), do: put_term(n)

  defp put_text(text), do: [text_header(byte_size(text)), text]

  defp text_header(size) when size < 0x20, do: 0xA0 + size
  defp text_header(size) when size < 0x100, do: <<0xD9, size::8>>
  defp text_header(size) when size < 0x1_0000, do: <<0xDA, size::16>>
  defp text_header(size), do: <<0xDB, sized(size)::32>>

  defp put_binary(bytes), do: [binary_header(byte_size(bytes)), bytes]

  defp binary_header(size) when size < 0x100, do: <<0xC4, size::8>>
  defp binary_header(size) when size < 0x1_0000, do: <<0xC5, size::16>>
  defp binary_header(size), do: <<0xC6, sized(size)::32>>

  defp put_array(_list, depth) when depth > @max_depth, do: too_deep()
  defp put_array(list, depth), do: [array_header(length(list)) | put_each(list, depth)]

  defp put_each([], _depth), do: []
  defp put_each([value | rest], depth), do: [put(value, depth) | put_each(rest, depth)]

  defp array_header(size) when size < 0x10, do: 0x90 + size
  defp array_header(size) when size < 0x1_0000, do: <<0xDC, size::16>>
  defp array_header(size), do: <<0xDD, sized(size)::32>>

  defp put_map(_map, depth) when depth > @max_depth, do: too_deep()

  defp put_map(map, depth) do
    check_keys(map)
    [map_header(map_size(map)) | for({key, value} <- map, do: [put_text(key_text(key)), put(value, depth)])]
  end

  defp map_header(size) when size < 0x10, do: 0x80 + size
  defp map_header(size) when size < 0x1_0000, do: <<0xDE, size::16>>
  defp map_header(size), do: <<0xDF, sized(size)::32>>

  defp check_keys(map) do
    mixed? = Enum.any?(map, fn {key, _} -> is_atom(key) and is_map_key(map, Atom.to_string(key)) end)
    if mixed?, do: throw({:bad_message, "a map has a key both as an atom and as a string"})
  end

  defp text_key?({key, _value}) when is_atom(key), do: true
  defp text_key?({key, _value}) when is_binary(key), do: utf8?(key)
  defp text_key?(_pair), do: false

  defp key_text(key) when is_atom(key), do: Atom.to_string(key)
  defp key_text(key), do: key

  defp put_term(term) do
    bytes = :erlang.term_to_binary(term)
    [ext_header(byte_size(bytes)), @term_type, bytes]
  end

  defp ext_header(1), do: 0xD4
  defp ext_header(2), do: 0xD5
  defp ext_header(4), do: 0xD6
  defp ext_header(8), do: 0xD7
  defp ext_header(16), do: 0xD8
  defp ext_header(size) when size < 0x100, do: <<0xC7, size::8>>
  defp ext_header(size) when size < 0x1_0000, do: <<0xC8, size::16>>
  defp ext_header(size), do: <<0xC9, sized(size)::32>>

  defp sized(size) when size <= 0xFFFF_FFFF, do: size
  defp sized(_size), do: throw({:bad_message, "a value is longer than MessagePack can say"})

  defp proper?([]), do: true
  defp proper?([_ | rest]), do: proper?(rest)
  defp proper?(_tail), do: false

  ## Decoding

  @doc "The value that the bytes are, all of them."
  @spec decode(binary) :: {:ok, value} | {:error, Error.t()}
  def decode(bytes) when is_binary(bytes) do
    {:ok, value(bytes, [], 0)}
  catch
    {:bad_message, text} -> {:error, Error.new(:bad_message, text)}
  end

  @doc "The message that the bytes are: a non-empty array, which does not count as nesting of the values in it."
  @spec decode_message(binary) :: {:ok, [value, ...]} | {:error, Error.t()}
  def decode_message(bytes) when is_binary(bytes) do
    case value(bytes, [], -1) do
      [_ | _] = message -> {:ok, message}
      _ -> {:error, Error.new(:bad_message, "a message is a non-empty array")}
    end
  catch
    {:bad_message, text} -> {:error, Error.new(:bad_message, text)}
  end

  # One loop in tail position: `value` reads one value and hands it to `done`, which puts it into the innermost open
  # array or map on the stack. The binary's match context lives through all of it, and nesting uses no call stack.
  defp value(<<0::1, n::7, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0b101::3, size::5, rest::binary>>, stack, depth), do: text(rest, stack, depth, size)
  defp value(<<0b1000::4, size::4, rest::binary>>, stack, depth), do: map(rest, stack, depth, size)
  defp value(<<0b1001::4, size::4, rest::binary>>, stack, depth), do: array(rest, stack, depth, size)
  defp value(<<0b111::3, n::5, rest::binary>>, stack, depth), do: done(rest, stack, depth, n - 0x20)
  defp value(<<0xC0, rest::binary>>, stack, depth), do: done(rest, stack, depth, nil)
  defp value(<<0xC2, rest::binary>>, stack, depth), do: done(rest, stack, depth, false)
  defp value(<<0xC3, rest::binary>>, stack, depth), do: done(rest, stack, depth, true)
  defp value(<<0xC4, size::8, rest::binary>>, stack, depth), do: bin(rest, stack, depth, size)
  defp value(<<0xC5, size::16, rest::binary>>, stack, depth), do: bin(rest, stack, depth, size)
  defp value(<<0xC6, size::32, rest::binary>>, stack, depth), do: bin(rest, stack, depth, size)
  defp value(<<0xCA, n::float-32, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xCB, n::float-64, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)

  # Erlang has no float for these bits, so the two clauses above did not match.
  defp value(<<0xCA, sign::1, 0xFF::8, fraction::23, rest::binary>>, stack, depth) do
    done(rest, stack, depth, not_finite(sign, fraction))
  end

  defp value(<<0xCB, sign::1, 0x7FF::11, fraction::52, rest::binary>>, stack, depth) do
    done(rest, stack, depth, not_finite(sign, fraction))
  end

  defp value(<<0xCC, n::8, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xCD, n::16, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xCE, n::32, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xCF, n::64, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xD0, n::signed-8, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xD1, n::signed-16, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xD2, n::signed-32, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xD3, n::signed-64, rest::binary>>, stack, depth), do: done(rest, stack, depth, n)
  defp value(<<0xD4, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, 1)
  defp value(<<0xD5, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, 2)
  defp value(<<0xD6, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, 4)
  defp value(<<0xD7, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, 8)
  defp value(<<0xD8, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, 16)
  defp value(<<0xC7, size::8, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, size)
  defp value(<<0xC8, size::16, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, size)
  defp value(<<0xC9, size::32, type, rest::binary>>, stack, depth), do: ext(rest, stack, depth, type, size)
  defp value(<<0xD9, size::8, rest::binary>>, stack, depth), do: text(rest, stack, depth, size)
  defp value(<<0xDA, size::16, rest::binary>>, stack, depth), do: text(rest, stack, depth, size)
  defp value(<<0xDB, size::32, rest::binary>>, stack, depth), do: text(rest, stack, depth, size)
  defp value(<<0xDC, size::16, rest::binary>>, stack, depth), do: array(rest, stack, depth, size)
  defp value(<<0xDD, size::32, rest::binary>>, stack, depth), do: array(rest, stack, depth, size)
  defp value(<<0xDE, size::16, rest::binary>>, stack, depth), do: map(rest, stack, depth, size)
  defp value(<<0xDF, size::32, rest::binary>>, stack, depth), do: map(rest, stack, depth, size)
  defp value(<<0xC1, _::binary>>, _stack, _depth), do: bad("byte 0xC1 begins no value")
  defp value(<<_::binary>>, _stack, _depth), do: cut_short()

  defp done(<<>>, [], _depth, value), do: value
  defp done(<<_, _::binary>>, [], _depth, _value), do: bad("there are bytes after the value")

  defp done(<<rest::binary>>, [{:array, 1, values} | stack], depth, value) do
    done(rest, stack, depth - 1, :lists.reverse(values, [value]))
  end

  defp done(<<rest::binary>>, [{:array, left, values} | stack], depth, value) do
    value(rest, [{:array, left - 1, [value | values]} | stack], depth)
  end

  defp done(<<rest::binary>>, [{:map, 1, size, key, pairs} | stack], depth, value) do
    map = :maps.from_list([{key, value} | pairs])
    if map_size(map) < size, do: bad("a map has a duplicate key")
    done(rest, stack, depth - 1, map)
  end

  defp done(<<rest::binary>>, [{:map, left, size, key, pairs} | stack], depth, value) do
    key(rest, stack, depth, left - 1, size, [{key, value} | pairs])
  end

  defp array(<<_::binary>>, _stack, depth, _size) when depth == @max_depth, do: too_deep()
  defp array(<<rest::binary>>, stack, depth, 0), do: done(rest, stack, depth, [])
  defp array(<<rest::binary>>, stack, depth, size), do: value(rest, [{:array, size, []} | stack], depth + 1)

  defp map(<<_::binary>>, _stack, depth, _size) when depth == @max_depth, do: too_deep()
  defp map(<<rest::binary>>, stack, depth, 0), do: done(rest, stack, depth, %{})
  defp map(<<rest::binary>>, stack, depth, size), do: key(rest, stack, depth + 1, size, size, [])

  defp key(<<0b101::3, n::5, key::binary-size(n), rest::binary>>, stack, depth, left, size, pairs) do
    value(rest, [{:map, left, size, checked(key), pairs} | stack], depth)
  end

  defp key(<<0xD9, n::8, key::binary-size(n), rest::binary>>, stack, depth, left, size, pairs) do
    value(rest, [{:map, left, size, checked(key), pairs} | stack], depth)
  end

  defp key(<<0xDA, n::16, key::binary-size(n), rest::binary>>, stack, depth, left, size, pairs) do
    value(rest, [{:map, left, size, checked(key), pairs} | stack], depth)
  end

  defp key(<<0xDB, n::32, key::binary-size(n), rest::binary>>, stack, depth, left, size, pairs) do
    value(rest, [{:map, left, size, checked(key), pairs} | stack], depth)
  end

  defp key(<<>>, _stack, _depth, _left, _size, _pairs), do: cut_short()
  defp key(<<_::binary>>, _stack, _depth, _left, _size, _pairs), do: bad("a map key is not a whole string")

  defp text(<<bytes::binary>>, stack, depth, size) do
    case bytes do
      <<text::binary-size(size), rest::binary>> -> done(rest, stack, depth, checked(text))
      _ -> cut_short()
    end
  end

  defp bin(<<bytes::binary>>, stack, depth, size) do
    case bytes do
      <<bin::binary-size(size), rest::binary>> -> done(rest, stack, depth, bin)
      _ -> cut_short()
    end
  end

  defp ext(<<bytes::binary>>, stack, depth, @term_type, size) do
    case bytes do
      <<etf::binary-size(size), rest::binary>> -> done(rest, stack, depth, term(etf))
      _ -> cut_short()
    end
  end

  defp ext(<<_::binary>>, _stack, _depth, type, _size), do: bad("ext type #{type} is not of this protocol")

  # A compressed term may be a thousand times its size.
  defp term(<<@etf_version, @etf_compressed, _::binary>>), do: bad("a compressed term is refused")

  defp term(<<@etf_version, _::binary>> = etf) do
    {term, used} = :erlang.binary_to_term(etf, [:safe, :used])
    if used == byte_size(etf), do: term, else: bad("there are bytes after a term")
  rescue
    ArgumentError -> bad("ext type 69 holds no External Term Format term that is safe here")
  end

  defp term(_etf), do: bad("ext type 69 does not begin with version byte 131")

  defp checked(text), do: if(utf8?(text), do: text, else: bad("a string is not valid UTF-8"))

  defp not_finite(_sign, fraction) when fraction > 0, do: :nan
  defp not_finite(0, _fraction), do: :infinity
  defp not_finite(1, _fraction), do: :neg_infinity

  # Half the time of String.valid?/1, and it yields on long strings.
  defp utf8?(bytes), do: is_binary(:unicode.characters_to_binary(bytes))

  @spec too_deep() :: no_return
  defp too_deep, do: bad("nesting is deeper than #{@max_depth}")

  @spec cut_short() :: no_return
  defp cut_short, do: bad("the value is cut short")

  @spec bad(String.t()) :: no_return
  defp bad(text), do: throw({:bad_message, text})
end
