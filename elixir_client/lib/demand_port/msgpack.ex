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

  import Bitwise, only: [band: 2, bor: 2]

  alias DemandPort.Error

  @compile {:inline, checked: 1, utf8?: 1}

  @max_depth 100
  @term_type 69
  @etf_version 131
  @etf_compressed 80

  @short 256
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
    {:ok, put(value, 0, [])}
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
    {:ok, [array_header(length(fields) + 1) | put_text(type, put_fields(fields))]}
  catch
    {:bad_message, text} -> {:error, Error.new(:bad_message, text)}
  end

  defp put_fields([]), do: []
  defp put_fields([{:encoded, bytes} | rest]), do: [bytes | put_fields(rest)]
  defp put_fields([value | rest]), do: put(value, 0, put_fields(rest))

  # All these put the bytes of something before `tail`, the bytes of what follows it: so the whole is one flat list,
  # made from its end. `depth` counts the arrays and maps around the value.
  defp put(value, _depth, tail) when is_binary(value) do
    if utf8?(value), do: put_text(value, tail), else: put_binary(value, tail)
  end

  defp put(value, _depth, tail) when is_integer(value), do: put_integer(value, tail)
  defp put(value, _depth, tail) when is_float(value), do: [<<0xCB, value::float-64>> | tail]
  defp put(nil, _depth, tail), do: [0xC0 | tail]
  defp put(false, _depth, tail), do: [0xC2 | tail]
  defp put(true, _depth, tail), do: [0xC3 | tail]
  defp put(:nan, _depth, tail), do: [@nan | tail]
  defp put(:infinity, _depth, tail), do: [@infinity | tail]
  defp put(:neg_infinity, _depth, tail), do: [@neg_infinity | tail]

  # The length of an improper list makes the guard fail.
  defp put(list, depth, tail) when length(list) >= 0 do
    if depth == @max_depth, do: too_deep()
    [array_header(length(list)) | put_each(list, depth + 1, tail)]
  end

  defp put(map, depth, tail) when is_map(map) and not is_struct(map) do
    pairs = :maps.to_list(map)
    if text_keys?(pairs), do: put_map(map, pairs, depth, tail), else: put_term(map, tail)
  end

  defp put(term, _depth, tail), do: put_term(term, tail)

  defp put_integer(n, tail) when n < 0, do: put_negative(n, tail)
  defp put_integer(n, tail) when n < 0x80, do: [n | tail]
  defp put_integer(n, tail) when n < 0x100, do: [0xCC, n | tail]
  defp put_integer(n, tail) when n < 0x1_0000, do: [<<0xCD, n::16>> | tail]
  defp put_integer(n, tail) when n < 0x1_0000_0000, do: [<<0xCE, n::32>> | tail]
  defp put_integer(n, tail) when n <= @max_integer, do: [<<0xCF, n::64>> | tail]
  defp put_integer(n, tail), do: put_term(n, tail)

  defp put_negative(n, tail) when n >= -0x20, do: [0x100 + n | tail]
  defp put_negative(n, tail) when n >= -0x80, do: [0xD0, 0x100 + n | tail]
  defp put_negative(n, tail) when n >= -0x8000, do: [<<0xD1, n::16>> | tail]
  defp put_negative(n, tail) when n >= -0x8000_0000, do: [<<0xD2, n::32>> | tail]
  defp put_negative(n, tail) when n >= @min_integer, do: [<<0xD3, n::64>> | tail]
  defp put_negative(n, tail), do: put_term(n, tail)

  defp put_text(text, tail) when byte_size(text) < 0x20, do: [0xA0 + byte_size(text), text | tail]
  defp put_text(text, tail) when byte_size(text) < 0x100, do: [0xD9, byte_size(text), text | tail]
  defp put_text(text, tail), do: [text_header(byte_size(text)), text | tail]

  defp text_header(size) when size < 0x1_0000, do: <<0xDA, size::16>>
  defp text_header(size), do: <<0xDB, sized(size)::32>>

  defp put_binary(bytes, tail) when byte_size(bytes) < 0x100, do: [0xC4, byte_size(bytes), bytes | tail]
  defp put_binary(bytes, tail), do: [binary_header(byte_size(bytes)), bytes | tail]

  defp binary_header(size) when size < 0x1_0000, do: <<0xC5, size::16>>
  defp binary_header(size), do: <<0xC6, sized(size)::32>>

  defp put_each([], _depth, tail), do: tail
  defp put_each([value | rest], depth, tail), do: put(value, depth, put_each(rest, depth, tail))

  defp array_header(size) when size < 0x10, do: 0x90 + size
  defp array_header(size) when size < 0x1_0000, do: <<0xDC, size::16>>
  defp array_header(size), do: <<0xDD, sized(size)::32>>

  defp put_map(_map, _pairs, @max_depth, _tail), do: too_deep()

  defp put_map(map, pairs, depth, tail) do
    [map_header(map_size(map)) | put_pairs(pairs, map, depth + 1, tail)]
  end

  defp put_pairs([], _map, _depth, tail), do: tail

  defp put_pairs([{key, value} | rest], map, depth, tail) do
    put_text(key_text(key, map), put(value, depth, put_pairs(rest, map, depth, tail)))
  end

  defp map_header(size) when size < 0x10, do: 0x80 + size
  defp map_header(size) when size < 0x1_0000, do: <<0xDE, size::16>>
  defp map_header(size), do: <<0xDF, sized(size)::32>>

  defp text_keys?([]), do: true
  defp text_keys?([{key, _value} | rest]) when is_atom(key), do: text_keys?(rest)
  defp text_keys?([{key, _value} | rest]) when is_binary(key), do: utf8?(key) and text_keys?(rest)
  defp text_keys?(_pairs), do: false

  defp key_text(key, _map) when is_binary(key), do: key

  defp key_text(key, map) do
    text = Atom.to_string(key)
    if is_map_key(map, text), do: bad("a map has a key both as an atom and as a string")
    text
  end

  defp put_term(term, tail) do
    bytes = :erlang.term_to_binary(term)
    [ext_header(byte_size(bytes)), @term_type, bytes | tail]
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
  defp sized(_size), do: bad("a value is longer than MessagePack can say")

  ## Decoding

  @doc "The value that the bytes are, all of them."
  @spec decode(binary) :: {:ok, value} | {:error, Error.t()}
  def decode(bytes) when is_binary(bytes) do
    {:ok, value(bytes, :whole, 1, [], [0])}
  catch
    {:bad_message, text} -> {:error, Error.new(:bad_message, text)}
  end

  @doc "The message that the bytes are: a non-empty array, which does not count as nesting of the values in it."
  @spec decode_message(binary) :: {:ok, [value, ...]} | {:error, Error.t()}
  def decode_message(bytes) when is_binary(bytes) do
    case value(bytes, :whole, 1, [], [-1]) do
      [_ | _] = message -> {:ok, message}
      _ -> {:error, Error.new(:bad_message, "a message is a non-empty array")}
    end
  catch
    {:bad_message, text} -> {:error, Error.new(:bad_message, text)}
  end

  # One loop in tail position: `value` reads one value and hands it to `done`, which puts it into the innermost open
  # array or map: `kind`, with `left` values still to come, and `read`, those that came, the last first. `outer` is a list
  # of how deep that is, and the same four of what is around it. So nesting uses no call stack, and the binary's match
  # context lives through all of it, as long as the binary is the first thing that each function here matches.
  defp value(<<n, rest::binary>>, kind, left, read, outer) when n < 0x80,
    do: done(rest, kind, left, read, outer, n)

  defp value(<<tag, rest::binary>>, kind, left, read, outer) when tag < 0x90,
    do: map(rest, kind, left, read, outer, tag - 0x80)

  defp value(<<tag, rest::binary>>, kind, left, read, outer) when tag < 0xA0,
    do: array(rest, kind, left, read, outer, tag - 0x90)

  defp value(<<tag, rest::binary>>, kind, left, read, outer) when tag < 0xC0,
    do: text(rest, kind, left, read, outer, tag - 0xA0)

  defp value(<<n, rest::binary>>, kind, left, read, outer) when n >= 0xE0,
    do: done(rest, kind, left, read, outer, n - 0x100)

  for {tag, constant} <- [{0xC0, nil}, {0xC2, false}, {0xC3, true}] do
    defp value(<<unquote(tag), rest::binary>>, kind, left, read, outer) do
      done(rest, kind, left, read, outer, unquote(constant))
    end
  end

  for {tag, bits} <- [{0xC4, 8}, {0xC5, 16}, {0xC6, 32}] do
    defp value(<<unquote(tag), size::unquote(bits), rest::binary>>, kind, left, read, outer) do
      bin(rest, kind, left, read, outer, size)
    end
  end

  for {tag, bits} <- [{0xD9, 8}, {0xDA, 16}, {0xDB, 32}] do
    defp value(<<unquote(tag), size::unquote(bits), rest::binary>>, kind, left, read, outer) do
      text(rest, kind, left, read, outer, size)
    end
  end

  for {tag, bits} <- [{0xDC, 16}, {0xDD, 32}] do
    defp value(<<unquote(tag), size::unquote(bits), rest::binary>>, kind, left, read, outer) do
      array(rest, kind, left, read, outer, size)
    end
  end

  for {tag, bits} <- [{0xDE, 16}, {0xDF, 32}] do
    defp value(<<unquote(tag), size::unquote(bits), rest::binary>>, kind, left, read, outer) do
      map(rest, kind, left, read, outer, size)
    end
  end

  for {tag, bits} <- [{0xCC, 8}, {0xCD, 16}, {0xCE, 32}, {0xCF, 64}] do
    defp value(<<unquote(tag), n::unquote(bits), rest::binary>>, kind, left, read, outer) do
      done(rest, kind, left, read, outer, n)
    end
  end

  for {tag, bits} <- [{0xD0, 8}, {0xD1, 16}, {0xD2, 32}, {0xD3, 64}] do
    defp value(<<unquote(tag), n::signed-unquote(bits), rest::binary>>, kind, left, read, outer) do
      done(rest, kind, left, read, outer, n)
    end
  end

  for {tag, bits} <- [{0xCA, 32}, {0xCB, 64}] do
    defp value(<<unquote(tag), n::float-unquote(bits), rest::binary>>, kind, left, read, outer) do
      done(rest, kind, left, read, outer, n)
    end
  end

  # Erlang has no float for these bits, so that the clauses above did not match.
  defp value(<<0xCA, sign::1, 0xFF::8, fraction::23, rest::binary>>, kind, left, read, outer) do
    done(rest, kind, left, read, outer, not_finite(sign, fraction))
  end

  defp value(<<0xCB, sign::1, 0x7FF::11, fraction::52, rest::binary>>, kind, left, read, outer) do
    done(rest, kind, left, read, outer, not_finite(sign, fraction))
  end

  for {tag, bits} <- [{0xC7, 8}, {0xC8, 16}, {0xC9, 32}] do
    defp value(<<unquote(tag), size::unquote(bits), type, rest::binary>>, kind, left, read, outer) do
      ext(rest, kind, left, read, outer, type, size)
    end
  end

  for {tag, size} <- [{0xD4, 1}, {0xD5, 2}, {0xD6, 4}, {0xD7, 8}, {0xD8, 16}] do
    defp value(<<unquote(tag), type, rest::binary>>, kind, left, read, outer) do
      ext(rest, kind, left, read, outer, type, unquote(size))
    end
  end

  defp value(<<0xC1, _::binary>>, _kind, _left, _read, _outer), do: bad("byte 0xC1 begins no value")
  defp value(<<_::binary>>, _kind, _left, _read, _outer), do: cut_short()

  defp done(<<rest::binary>>, :array, 1, read, [_depth, kind, left, before | outer], value) do
    done(rest, kind, left, before, outer, :lists.reverse(read, [value]))
  end

  defp done(<<rest::binary>>, :array, left, read, outer, value) do
    value(rest, :array, left - 1, [value | read], outer)
  end

  defp done(<<rest::binary>>, :map, 1, [key | pairs], [_depth, kind, left, before | outer], value) do
    done(rest, kind, left, before, outer, to_map([{key, value} | pairs]))
  end

  defp done(<<rest::binary>>, :map, left, [key | pairs], outer, value) do
    key(rest, left - 1, [{key, value} | pairs], outer)
  end

  defp done(<<>>, :whole, 1, [], [_depth], value), do: value
  defp done(<<_::binary>>, :whole, 1, [], [_depth], _value), do: bad("there are bytes after the value")

  # Reversed, since keys often come in order, and a map is made of those in half the time.
  defp to_map(pairs) do
    map = pairs |> :lists.reverse() |> :maps.from_list()
    if map_size(map) == length(pairs), do: map, else: bad("a map has a duplicate key")
  end

  defp array(<<_::binary>>, _kind, _left, _read, [@max_depth | _], _size), do: too_deep()
  defp array(<<rest::binary>>, kind, left, read, outer, 0), do: done(rest, kind, left, read, outer, [])

  defp array(<<rest::binary>>, kind, left, read, outer, size),
    do: value(rest, :array, size, [], inner(kind, left, read, outer))

  defp map(<<_::binary>>, _kind, _left, _read, [@max_depth | _], _size), do: too_deep()
  defp map(<<rest::binary>>, kind, left, read, outer, 0), do: done(rest, kind, left, read, outer, %{})

  defp map(<<rest::binary>>, kind, left, read, outer, size),
    do: key(rest, size, [], inner(kind, left, read, outer))

  defp inner(kind, left, read, [depth | _] = outer), do: [depth + 1, kind, left, read | outer]

  defp key(<<tag, rest::binary>>, left, pairs, outer) when tag >= 0xA0 and tag < 0xC0 do
    key(rest, left, pairs, outer, tag - 0xA0)
  end

  defp key(<<0xD9, size::8, rest::binary>>, left, pairs, outer), do: key(rest, left, pairs, outer, size)
  defp key(<<0xDA, size::16, rest::binary>>, left, pairs, outer), do: key(rest, left, pairs, outer, size)
  defp key(<<0xDB, size::32, rest::binary>>, left, pairs, outer), do: key(rest, left, pairs, outer, size)
  defp key(<<>>, _left, _pairs, _outer), do: cut_short()
  defp key(<<_::binary>>, _left, _pairs, _outer), do: bad("a map key is not a whole string")

  # The key goes before the pairs, where `done` finds it.
  defp key(<<bytes::binary>>, left, pairs, outer, size) do
    case bytes do
      <<key::binary-size(size), rest::binary>> -> value(rest, :map, left, [checked(key) | pairs], outer)
      _ -> cut_short()
    end
  end

  defp text(<<bytes::binary>>, kind, left, read, outer, size) do
    case bytes do
      <<text::binary-size(size), rest::binary>> -> done(rest, kind, left, read, outer, checked(text))
      _ -> cut_short()
    end
  end

  defp bin(<<bytes::binary>>, kind, left, read, outer, size) do
    case bytes do
      <<bin::binary-size(size), rest::binary>> -> done(rest, kind, left, read, outer, bin)
      _ -> cut_short()
    end
  end

  defp ext(<<bytes::binary>>, kind, left, read, outer, @term_type, size) do
    case bytes do
      <<etf::binary-size(size), rest::binary>> -> done(rest, kind, left, read, outer, term(etf))
      _ -> cut_short()
    end
  end

  defp ext(<<_::binary>>, _kind, _left, _read, _outer, type, _size),
    do: bad("ext type #{type} is not of this protocol")

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

  # To match a binary costs more than to look at a short one, so the runtime is asked first: `bin_is_7bit/1` is in every
  # release, though in no manual, and takes a tenth of the time of what manuals have. It does not yield, hence the limit.
  defp utf8?(bytes) when byte_size(bytes) <= @short do
    :unicode.bin_is_7bit(bytes) or utf8_after_ascii?(bytes)
  end

  defp utf8?(bytes), do: utf8_after_ascii?(bytes)

  defp utf8_after_ascii?(<<a::32, b::32, c::32, d::32, rest::binary>>)
       when band(bor(bor(a, b), bor(c, d)), 0x80808080) == 0,
       do: utf8_after_ascii?(rest)

  defp utf8_after_ascii?(<<byte, rest::binary>>) when byte < 0x80, do: utf8_after_ascii?(rest)
  defp utf8_after_ascii?(<<>>), do: true

  # The function is slow to say no: most binaries are found out by their first character that is not ASCII.
  defp utf8_after_ascii?(<<rest::binary>>) do
    match?(<<_::utf8, _::binary>>, rest) and is_binary(:unicode.characters_to_binary(rest, :utf8))
  end

  @spec too_deep() :: no_return
  defp too_deep, do: bad("nesting is deeper than #{@max_depth}")

  @spec cut_short() :: no_return
  defp cut_short, do: bad("the value is cut short")

  @spec bad(String.t()) :: no_return
  defp bad(text), do: throw({:bad_message, text})
end
