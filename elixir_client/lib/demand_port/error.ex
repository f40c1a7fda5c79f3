defmodule DemandPort.Error do
  @moduledoc """
  What went wrong, as the service or the client says it.

  `code` is stable and is what a program decides by; `message` is a sentence that says what to change. The codes and
  their meaning stand in `protocol/SPEC.md`, section 7. A code that this version does not know becomes `:unknown`,
  with the code's text in `details["code"]`.

      iex> Exception.message(%DemandPort.Error{code: :missing_input, message: "port prompt has no value", node: "llm"})
      "missing_input at node llm: port prompt has no value"

      iex> Exception.message(%DemandPort.Error{code: :draining, message: "no new demands are taken"})
      "draining: no new demands are taken"
  """

  # The only way from a code's text to an atom: the wire never makes atoms.
  @codes ~w(
    bad_frame bad_message unsupported_protocol
    unknown_session unknown_node unknown_node_type unknown_port
    invalid_graph cycle missing_input type_mismatch
    node_failed worker_crash deadline_exceeded cancelled queue_full too_large
    model_not_found model_load_failed out_of_memory context_overflow
    backend_unavailable host_unavailable forbidden draining internal
  )a
  @code_by_text Map.new(@codes, &{Atom.to_string(&1), &1})

  defexception code: :internal, message: "", node: nil, retryable: false, details: nil, traceback: nil

  @type t :: %__MODULE__{
          code: atom,
          message: String.t(),
          node: String.t() | nil,
          retryable: boolean,
          details: term,
          traceback: String.t() | nil
        }

  @doc """
  Every code of protocol version 1.

      iex> :worker_crash in DemandPort.Error.codes()
      true
  """
  @spec codes() :: [atom]
  def codes, do: @codes

  @doc """
  An error that the client itself reports.

      iex> DemandPort.Error.new(:too_large, "the value is over the limit").code
      :too_large
  """
  @spec new(atom, String.t(), keyword) :: t
  def new(code, message, fields \\ []) when code in @codes do
    struct!(%__MODULE__{code: code, message: message}, fields)
  end

  @doc """
  The error in a wire message's error object.

      iex> DemandPort.Error.from_wire(%{"code" => "cancelled", "message" => "by the host", "retryable" => false})
      %DemandPort.Error{code: :cancelled, message: "by the host"}

      iex> DemandPort.Error.from_wire(%{"code" => "brand_new", "message" => "?"})
      %DemandPort.Error{code: :unknown, message: "?", details: %{"code" => "brand_new"}}
  """
  @spec from_wire(term) :: t
  def from_wire(%{"code" => text} = fields) when is_binary(text) and not is_struct(fields) do
    error = %__MODULE__{
      code: :unknown,
      message: text_or(fields["message"], text),
      node: text_or(fields["node"], nil),
      retryable: fields["retryable"] == true,
      details: fields["details"],
      traceback: fields["traceback"]
    }

    case @code_by_text do
      %{^text => code} -> %{error | code: code}
      _ -> %{error | details: with_code(error.details, text)}
    end
  end

  def from_wire(other) do
    %__MODULE__{
      code: :unknown,
      message: "the service sent an error that has no code",
      details: %{"error" => other}
    }
  end

  @doc """
  The error object of the wire: of an error of this kind, of a text, or of any other term, which is shown.

      iex> DemandPort.Error.to_wire("no such city")
      %{"code" => "node_failed", "message" => "no such city", "details" => nil}
  """
  @spec to_wire(term) :: %{String.t() => term}
  def to_wire(%__MODULE__{} = error) do
    fields = %{"code" => Atom.to_string(error.code), "message" => error.message, "details" => error.details}
    if error.traceback, do: Map.put(fields, "traceback", error.traceback), else: fields
  end

  def to_wire(text) when is_binary(text) do
    %{"code" => "node_failed", "message" => text, "details" => nil}
  end

  def to_wire(exception) when is_exception(exception), do: to_wire(Exception.message(exception))
  def to_wire(other), do: to_wire(inspect(other, limit: 50, printable_limit: 500))

  @impl true
  def message(%__MODULE__{code: code, node: nil, message: message}), do: "#{code}: #{message}"

  def message(%__MODULE__{code: code, node: node, message: message}),
    do: "#{code} at node #{node}: #{message}"

  defp text_or(text, _default) when is_binary(text), do: text
  defp text_or(_, default), do: default

  defp with_code(details, text) when is_map(details), do: Map.put(details, "code", text)
  defp with_code(nil, text), do: %{"code" => text}
  defp with_code(details, text), do: %{"code" => text, "details" => details}
end
