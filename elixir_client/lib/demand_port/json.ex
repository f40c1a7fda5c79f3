defmodule DemandPort.Json do
  @moduledoc false
  # Reads JSON (RFC 8259), since graphs are JSON files and this library has no dependency. Strict: a key that comes
  # twice and numbers that no float holds are refused.

  @spaces ~c" \t\r\n"

  @type value :: nil | boolean | number | String.t() | [value] | %{String.t() => value}

  @doc "The value that a text stands for, or what is wrong with it and where."
  @spec decode(binary) :: {:ok, value} | {:error, String.t()}
  def decode(text) when is_binary(text) do
    if not String.valid?(text), do: bad("it is not UTF-8", text)
    {value, rest} = text |> skip() |> value()
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

  defp value("null" <> rest), do: {nil, rest}
  defp value("true" <> rest), do: {true, rest}
  defp value("false" <> rest), do: {false, rest}
  defp value("\"" <> rest), do: string(rest, [])
  defp value("[" <> rest), do: array(skip(rest))
  defp value("{" <> rest), do: object(skip(rest))
  defp value(<<c, _::binary>> = text) when c in ?0..?9 or c == ?-, do: number(text)
  defp value(text), do: bad("a value is missing", text)

  defp array("]" <> rest), do: {[], rest}
  defp array(text), do: items(text, [])

  defp items(text, values) do
    {value, rest} = value(text)

    case skip(rest) do
      "," <> rest -> rest |> skip() |> items([value | values])
      "]" <> rest -> {Enum.reverse(values, [value]), rest}
      rest -> bad("a comma or ] is missing", rest)
    end
  end

  defp object("}" <> rest), do: {%{}, rest}
  defp object(text), do: members(text, %{})

  defp members("\"" <> rest = text, map) do
    {key, rest} = string(rest, [])
    if is_map_key(map, key), do: bad("the key #{inspect(key)} comes twice", text)
    {value, rest} = rest |> skip() |> after_colon() |> value()
    map = Map.put(map, key, value)

    case skip(rest) do
      "," <> rest -> rest |> skip() |> members(map)
      "}" <> rest -> {map, rest}
      rest -> bad("a comma or } is missing", rest)
    end
  end

  defp members(text, _map), do: bad("a key in quotation marks is missing", text)

  defp after_colon(":" <> rest), do: skip(rest)
  defp after_colon(rest), do: bad("a colon is missing", rest)

  defp string("\"" <> rest, parts), do: {parts |> Enum.reverse() |> IO.iodata_to_binary(), rest}
  defp string("\\u" <> rest, parts), do: unicode(rest, parts)
  defp string(<<?\\, c, rest::binary>>, parts) when c in ~c"\"\\/", do: string(rest, [c | parts])
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
