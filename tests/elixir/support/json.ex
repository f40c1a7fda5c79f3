defmodule DemandPort.Test.Json do
  @moduledoc "Reads JSON (RFC 8259), for the vectors. Raises on anything else."

  @spaces ' \t\r\n'

  @spec decode!(binary) :: term
  def decode!(text) do
    {value, rest} = text |> skip() |> value()

    if skip(rest) != "",
      do: raise(ArgumentError, "text after the value: #{inspect(String.slice(rest, 0, 20))}")

    value
  end

  @spec read!(Path.t()) :: term
  def read!(path), do: path |> File.read!() |> decode!()

  defp skip(<<c, rest::binary>>) when c in @spaces, do: skip(rest)
  defp skip(rest), do: rest

  defp value("null" <> rest), do: {nil, rest}
  defp value("true" <> rest), do: {true, rest}
  defp value("false" <> rest), do: {false, rest}
  defp value("\"" <> rest), do: string(rest, [])
  defp value("[" <> rest), do: rest |> skip() |> array([])
  defp value("{" <> rest), do: rest |> skip() |> object([])
  defp value(<<c, _::binary>> = text) when c in ?0..?9 or c == ?-, do: number(text)
  defp value(text), do: raise(ArgumentError, "no JSON value: #{inspect(String.slice(text, 0, 20))}")

  defp array("]" <> rest, []), do: {[], rest}

  defp array(text, values) do
    {value, rest} = value(text)

    case skip(rest) do
      "," <> rest -> rest |> skip() |> array([value | values])
      "]" <> rest -> {Enum.reverse(values, [value]), rest}
    end
  end

  defp object("}" <> rest, []), do: {%{}, rest}

  defp object("\"" <> text, pairs) do
    {key, rest} = string(text, [])
    ":" <> rest = skip(rest)
    {value, rest} = rest |> skip() |> value()

    case skip(rest) do
      "," <> rest -> rest |> skip() |> object([{key, value} | pairs])
      "}" <> rest -> {Map.new([{key, value} | pairs]), rest}
    end
  end

  defp string("\"" <> rest, parts), do: {parts |> Enum.reverse() |> IO.iodata_to_binary(), rest}
  defp string("\\u" <> rest, parts), do: escape(rest, parts)
  defp string(<<?\\, c, rest::binary>>, parts), do: string(rest, [short(c) | parts])
  defp string(<<c, rest::binary>>, parts) when c >= 0x20, do: string(rest, [c | parts])

  defp short(c) when c in '"\\/', do: c
  defp short(?b), do: ?\b
  defp short(?f), do: ?\f
  defp short(?n), do: ?\n
  defp short(?r), do: ?\r
  defp short(?t), do: ?\t

  defp escape(<<high::binary-4, "\\u", low::binary-4, rest::binary>> = text, parts) do
    case {hex(high), hex(low)} do
      {high, low} when high in 0xD800..0xDBFF and low in 0xDC00..0xDFFF ->
        point = 0x10000 + (high - 0xD800) * 0x400 + (low - 0xDC00)
        string(rest, [<<point::utf8>> | parts])

      _ ->
        single(text, parts)
    end
  end

  defp escape(text, parts), do: single(text, parts)

  defp single(<<digits::binary-4, rest::binary>>, parts), do: string(rest, [<<hex(digits)::utf8>> | parts])

  defp hex(digits), do: String.to_integer(digits, 16)

  defp number(text) do
    [digits] = Regex.run(~r/^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/, text)
    rest = binary_part(text, byte_size(digits), byte_size(text) - byte_size(digits))
    {parse(digits, digits =~ ~r/[.eE]/), rest}
  end

  defp parse(digits, false), do: String.to_integer(digits)

  # Elixir wants a fraction before an exponent.
  defp parse(digits, true) do
    digits = if digits =~ ".", do: digits, else: String.replace(digits, ~r/[eE]/, ".0e")
    String.to_float(digits)
  end
end
