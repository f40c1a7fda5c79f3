defmodule DemandPort.Json do
  @moduledoc false
  # Reads JSON (RFC 8259), since graphs are JSON files and this library has no dependency. Strict: a key that comes
  # twice, nesting deeper than the protocol carries, and numbers that no float holds are refused.

  @spaces ' \t\r\n'
  @max_depth 100

  @type value :: nil | boolean | number | String.t() | [value] | %{String.t() => value}

  @doc "The value that a text stands for, or what is wrong with it and where."
  @spec decode(binary) :: {:ok, value} | {:error, String.t()}
  def decode(text) when is_binary(text) do
    if not String.valid?(text), do: bad("it is not UTF-8", text)
    {value, rest} = text |> skip() |> value(0)
    rest = skip(rest)
    if rest == "", do: {:ok, value}, else: bad("there is more after the value", rest)
  catch
    {:bad_json, what, rest} -> {:error, "#{what} (#{place(text, rest)})"}
  end

  @spec bad(String.t(), binary) :: no_return
  defp bad(what, rest), do: throw({:bad_json, what, rest})

  defp place(text, rest) do
    before = text |> binary_part(0, byte_size(text) - byte_size(rest)) |> String.split("\n")
    "line #{length(before)}, column #{String.length(List.last(before)) + 1}"
  end

  defp skip(<<c, rest::binary>>) when c in @spaces, do: skip(rest)
  defp skip(rest), do: rest

  defp value(text, @max_depth), do: bad("nesting is deeper than #{@max_depth}", text)
  defp value("null" <> rest, _depth), do: {nil, rest}
  defp value("true" <> rest, _depth), do: {true, rest}
  defp value("false" <> rest, _depth), do: {false, rest}
  defp value("\"" <> rest, _depth), do: string(rest, [])
  defp value("[" <> rest, depth), do: array(skip(rest), depth + 1)
  defp value("{" <> rest, depth), do: object(skip(rest), depth + 1)
  defp value(<<c, _::binary>> = text, _depth) when c in ?0..?9 or c == ?-, do: number(text)
  defp value(text, _depth), do: bad("a value is missing", text)

  defp array("]" <> rest, _depth), do: {[], rest}
  defp array(text, depth), do: items(text, depth, [])

  defp items(text, depth, values) do
    {value, rest} = value(text, depth)

    case skip(rest) do
      "," <> rest -> rest |> skip() |> items(depth, [value | values])
      "]" <> rest -> {Enum.reverse(values, [value]), rest}
      rest -> bad("a comma or ] is missing", rest)
    end
  end

  defp object("}" <> rest, _depth), do: {%{}, rest}
  defp object(text, depth), do: members(text, depth, %{})

  defp members("\"" <> rest = text, depth, map) do
    {key, rest} = string(rest, [])
    if is_map_key(map, key), do: bad("the key #{inspect(key)} comes twice", text)
    {value, rest} = rest |> skip() |> after_colon() |> value(depth)
    map = Map.put(map, key, value)

    case skip(rest) do
      "," <> rest -> rest |> skip() |> members(depth, map)
      "}" <> rest -> {map, rest}
      rest -> bad("a comma or } is missing", rest)
    end
  end

  defp members(text, _depth, _map), do: bad("a key in quotation marks is missing", text)

  defp after_colon(":" <> rest), do: skip(rest)
  defp after_colon(rest), do: bad("a colon is missing", rest)

  defp string("\"" <> rest, parts), do: {parts |> Enum.reverse() |> IO.iodata_to_binary(), rest}
  defp string("\\u" <> rest, parts), do: unicode(rest, parts)
  defp string(<<?\\, c, rest::binary>>, parts) when c in '"\\/', do: string(rest, [c | parts])
  defp string("\\b" <> rest, parts), do: string(rest, [?\b | parts])
  defp string("\\f" <> rest, parts), do: string(rest, [?\f | parts])
  defp string("\\n" <> rest, parts), do: string(rest, [?\n | parts])
  defp string("\\r" <> rest, parts), do: string(rest, [?\r | parts])
  defp string("\\t" <> rest, parts), do: string(rest, [?\t | parts])
  defp string(<<c, rest::binary>>, parts) when c >= 0x20 and c != ?\\, do: string(rest, [c | parts])
  defp string("", _parts), do: bad("a string has no end", "")
  defp string(text, _parts), do: bad("a string may not hold this", text)

  defp unicode(text, parts) do
    case unit(text) do
      {high, "\\u" <> rest} when high in 0xD800..0xDBFF -> pair(high, unit(rest), text, parts)
      {point, rest} when point not in 0xD800..0xDFFF -> string(rest, [<<point::utf8>> | parts])
      _ -> bad("this is half a character", text)
    end
  end

  defp pair(high, {low, rest}, _text, parts) when low in 0xDC00..0xDFFF do
    string(rest, [<<0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00::utf8>> | parts])
  end

  defp pair(_high, _other, text, _parts), do: bad("this is half a character", text)

  defp unit(<<digits::binary-4, rest::binary>> = text) do
    if digits =~ ~r/\A[0-9a-fA-F]{4}\z/,
      do: {String.to_integer(digits, 16), rest},
      else: bad("\\u wants four hexadecimal digits", text)
  end

  defp unit(text), do: bad("\\u wants four hexadecimal digits", text)

  defp number(text) do
    case Regex.run(~r/\A(-?(?:0|[1-9]\d*))(\.\d+)?([eE][+-]?\d+)?(?![\d.])/, text) do
      nil ->
        bad("this is no number", text)

      [digits | parts] ->
        {parsed(parts, text), binary_part(text, byte_size(digits), byte_size(text) - byte_size(digits))}
    end
  end

  defp parsed([integer], _text), do: String.to_integer(integer)
  defp parsed([integer, fraction], text), do: float(integer <> fraction, text)
  # Elixir wants a fraction before an exponent.
  defp parsed([integer, "", exponent], text), do: float(integer <> ".0" <> exponent, text)
  defp parsed([integer, fraction, exponent], text), do: float(integer <> fraction <> exponent, text)

  defp float(digits, text) do
    String.to_float(digits)
  rescue
    ArgumentError -> bad("no float holds this number", text)
  end
end
