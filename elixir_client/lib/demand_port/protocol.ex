defmodule DemandPort.Protocol do
  @moduledoc """
  The host's side of the protocol as a value: it turns requests into payloads and payloads into events. No process is
  called and nothing is sent here; `protocol/SPEC.md` is the contract.

      request ──▶ {id, payload, protocol}        payload ──▶ {event, protocol}

  It holds the ids that are open and the parts that are incomplete, so that it can say of each message whether it is
  expected: a stream or terminal message of a demand that is not open is `:unexpected`, whatever the service does.

  | event | meaning |
  |---|---|
  | `{:ready, info}` | the first message |
  | `{:reply, id, {:ok, result} or {:error, error}}` | the one reply to a request, which is closed by it |
  | `{:stream, id, {:node_stream, node, chunk}}` | a chunk of an open demand |
  | `{:terminal, id, message, meta}` | `:demand_complete` or `:demand_error`; the demand is closed by it |
  | `{:node_event, id, {:node_event, session, event}}` | asked for by `events: true` |
  | `{:session_event, session, event}` | asked for by a subscription |
  | `{:execute, call}` | this program is to run a node; `call` has `id`, `session`, `node`, `node_type`, `inputs`, `options` |
  | `{:cancel_call, call_id}` | nobody wants the answer to that call any more |
  | `{:log, level, logger, text, metadata}` | a line for the log |
  | `{:goodbye, error}` | the service ends the connection |
  | `:part` | a slice of a message whose other slices are to come |
  | `{:unexpected, message}` | nothing that is open; to be logged |
  | `{:broken, error}` | the payload cannot be read, so a terminal may be lost: the connection is to be ended |
  """

  alias DemandPort.{Error, Msgpack}

  @version 1
  @max_id 0xFFFF_FFFF_FFFF_FFFF
  @max_open_requests 100_000
  @levels %{"debug" => :debug, "info" => :info, "warning" => :warning, "error" => :error}

  defstruct next_id: 1,
            open: %{},
            parts: %{},
            max_frame_bytes: 67_108_864,
            peer_max_frame_bytes: 67_108_864,
            max_open_requests: @max_open_requests

  @type id :: pos_integer
  @type fields :: [term | {:encoded, iodata}]
  @typedoc "What an open id is: a request by its type, or a demand with the node, or the nodes, it is on."
  @type kind :: {:request, String.t()} | {:demand, node :: String.t() | [String.t()]}
  @type terminal ::
          {:demand_complete, String.t() | [String.t()], map | [map]}
          | {:demand_error, String.t() | [String.t()], Error.t()}
  @type event ::
          {:ready, map}
          | {:reply, id, {:ok, term} | {:error, Error.t()}}
          | {:stream, id, {:node_stream, String.t(), term}}
          | {:terminal, id, terminal, map}
          | {:node_event, id, {:node_event, String.t(), map}}
          | {:session_event, String.t(), map}
          | {:execute, map}
          | {:cancel_call, pos_integer}
          | {:log, Logger.level(), logger :: term, text :: term, metadata :: term}
          | {:goodbye, Error.t()}
          | :part
          | {:unexpected, term}
          | {:broken, Error.t()}

  @type t :: %__MODULE__{
          next_id: id,
          open: %{id => kind},
          parts: %{term => {size :: non_neg_integer, iodata}},
          max_frame_bytes: pos_integer,
          peer_max_frame_bytes: pos_integer,
          max_open_requests: pos_integer
        }

  @doc "A fresh connection that accepts and sends messages up to this size."
  @spec new(pos_integer) :: t
  def new(max_frame_bytes) do
    %__MODULE__{max_frame_bytes: max_frame_bytes, peer_max_frame_bytes: max_frame_bytes}
  end

  @doc "The protocol version that this module speaks."
  @spec version() :: pos_integer
  def version, do: @version

  ## Host to service

  @doc "Opens a request. `fields` are what stands after the id."
  @spec request(t, String.t(), fields) :: {:ok, id, binary, t} | {:error, Error.t()}
  def request(protocol, type, fields), do: open(protocol, {:request, type}, type, fields)

  @doc "Opens a demand on a node. Options that are not set are left out of the message."
  @spec demand(t, String.t(), String.t(), map) :: {:ok, id, binary, t} | {:error, Error.t()}
  def demand(protocol, session, node, options) do
    open(protocol, {:demand, node}, "demand", [session, node | present(options)])
  end

  @doc "Opens a demand on several nodes, which has one terminal."
  @spec demand_many(t, String.t(), [String.t()], map) :: {:ok, id, binary, t} | {:error, Error.t()}
  def demand_many(protocol, session, nodes, options) do
    open(protocol, {:demand, nodes}, "demand_many", [session, nodes | present(options)])
  end

  @doc "The answer to a call: what `DemandPort.Host` gave. Fails when it cannot be written."
  @spec answer(pos_integer, {:ok, map} | {:error, term} | :unknown | term) ::
          {:ok, binary} | {:error, Error.t()}
  def answer(call_id, {:ok, outputs}) when is_map(outputs), do: payload("answer", [call_id, "ok", outputs])
  def answer(call_id, {:error, error}), do: payload("answer", [call_id, "error", Error.to_wire(error)])

  def answer(call_id, :unknown) do
    answer(call_id, {:error, Error.new(:unknown_node_type, "the host does not run this type")})
  end

  def answer(call_id, other) do
    text = "the host must answer {:ok, map}, {:error, reason} or :unknown, not #{inspect(other, limit: 5)}"
    answer(call_id, {:error, Error.new(:node_failed, text)})
  end

  @doc "A chunk ahead of the answer to a call."
  @spec answer_stream(pos_integer, term, String.t() | nil) :: {:ok, binary} | {:error, Error.t()}
  def answer_stream(call_id, chunk, port), do: payload("answer_stream", [call_id, chunk, port])

  defp payload(type, fields) do
    with {:ok, bytes} <- Msgpack.encode_message(type, fields), do: {:ok, IO.iodata_to_binary(bytes)}
  end

  @doc "Allows `n` more stream messages of a demand; has no reply."
  @spec credit(id, pos_integer) :: binary
  def credit(id, n) do
    {:ok, bytes} = Msgpack.encode_message("credit", [id, n])
    IO.iodata_to_binary(bytes)
  end

  @doc "The greeting that names this client and the largest message it accepts."
  @spec hello(t, String.t()) :: {:ok, id, binary, t} | {:error, Error.t()}
  def hello(protocol, client) do
    request(protocol, "hello", [
      %{
        "protocol" => [@version, @version],
        "client" => client,
        "max_frame_bytes" => protocol.max_frame_bytes,
        "features" => []
      }
    ])
  end

  defp open(%{open: open, max_open_requests: max}, _kind, _type, _fields) when map_size(open) >= max do
    {:error, Error.new(:queue_full, "#{max} requests are open on this connection", retryable: true)}
  end

  defp open(%{next_id: id} = protocol, kind, type, fields) do
    with {:ok, bytes} <- Msgpack.encode_message(type, [id | fields]),
         {:ok, payload} <- fitting(IO.iodata_to_binary(bytes), protocol.peer_max_frame_bytes) do
      {:ok, id, payload, %{protocol | next_id: after_id(id), open: Map.put(protocol.open, id, kind)}}
    end
  end

  # The service would end the connection over a longer one, and with it everybody's demands.
  defp fitting(payload, limit) when byte_size(payload) <= limit, do: {:ok, payload}

  defp fitting(payload, limit) do
    {:error,
     Error.new(:too_large, "the message has #{byte_size(payload)} bytes; the service accepts #{limit}",
       details: %{"bytes" => byte_size(payload), "max_frame_bytes" => limit}
     )}
  end

  @doc """
  Whether a payload made before `ready` fits what the service then said it accepts; one that does not is closed.
  """
  @spec recheck(t, id, binary) :: {:ok, t} | {:error, Error.t(), t}
  def recheck(protocol, id, payload) do
    case fitting(payload, protocol.peer_max_frame_bytes) do
      {:ok, _payload} -> {:ok, protocol}
      {:error, error} -> {:error, error, close(protocol, id)}
    end
  end

  defp after_id(@max_id), do: 1
  defp after_id(id), do: id + 1

  defp present(options) when map_size(options) == 0, do: []
  defp present(options), do: [options]

  @doc "The connection to a new service: of all that was open, only what it has not been sent yet is."
  @spec restarted(t, [id]) :: t
  def restarted(protocol, unsent) do
    %{new(protocol.max_frame_bytes) | next_id: protocol.next_id, open: Map.take(protocol.open, unsent)}
  end

  @doc "The kind of an open id, or nil."
  @spec kind(t, id) :: kind | nil
  def kind(protocol, id), do: Map.get(protocol.open, id)

  ## Service to host

  @doc "Reads one payload."
  @spec handle(t, binary) :: {event, t}
  def handle(protocol, payload) do
    case Msgpack.decode_message(payload) do
      {:ok, message} -> message(protocol, message)
      {:error, error} -> {{:broken, error}, protocol}
    end
  end

  # An opaque term may be a struct, which Access does not read.
  defp message(protocol, ["ready", %{"protocol" => _} = info]) when not is_struct(info) do
    {{:ready, info}, adopt(protocol, info["limits"])}
  end

  defp message(protocol, ["ok", id, result] = message) do
    case protocol.open do
      %{^id => {:request, _type}} -> {{:reply, id, {:ok, result}}, close(protocol, id)}
      _ -> {{:unexpected, message}, protocol}
    end
  end

  defp message(protocol, ["error", id, error] = message) do
    error = Error.from_wire(error)

    case protocol.open do
      %{^id => {:request, _type}} -> {{:reply, id, {:error, error}}, close(protocol, id)}
      # A demand message that the service could not read never became a demand; its sender waits all the same.
      %{^id => {:demand, node}} -> {{:terminal, id, {:demand_error, node, error}, %{}}, close(protocol, id)}
      _ -> {{:unexpected, message}, protocol}
    end
  end

  defp message(protocol, ["node_stream", node, chunk, id, _seq, _port] = message) do
    for_demand(protocol, id, message, {:stream, id, {:node_stream, node, chunk}})
  end

  defp message(protocol, ["demand_complete", node, outputs, id, meta] = message) do
    terminal(protocol, id, message, {:demand_complete, node, outputs}, meta)
  end

  defp message(protocol, ["demand_error", node, error, id, meta] = message) do
    terminal(protocol, id, message, {:demand_error, node, Error.from_wire(error)}, meta)
  end

  defp message(protocol, ["node_event", session, %{"demand_id" => id} = event] = message) do
    for_demand(protocol, id, message, {:node_event, id, {:node_event, session, event}})
  end

  defp message(protocol, ["node_event", session, %{"seq" => seq} = event]) when is_integer(seq) do
    {{:session_event, session, event}, protocol}
  end

  defp message(protocol, ["node_execute", id, session, node, node_type, inputs, options])
       when is_integer(id) and is_map(inputs) and is_map(options) and not is_struct(options) do
    call = %{id: id, session: session, node: node, node_type: node_type, inputs: inputs, options: options}
    {{:execute, call}, protocol}
  end

  defp message(protocol, ["node_cancel", id]), do: {{:cancel_call, id}, protocol}

  defp message(protocol, ["log", level, logger, text, metadata]) when is_map_key(@levels, level) do
    {{:log, @levels[level], logger, text, metadata}, protocol}
  end

  defp message(protocol, ["part", number, last, bytes]) when is_boolean(last) and is_binary(bytes) do
    part(protocol, number, last, bytes)
  end

  defp message(protocol, ["goodbye", error]), do: {{:goodbye, Error.from_wire(error)}, protocol}
  defp message(protocol, message), do: {{:unexpected, message}, protocol}

  defp for_demand(protocol, id, message, event) do
    case protocol.open do
      %{^id => {:demand, _node}} -> {event, protocol}
      _ -> {{:unexpected, message}, protocol}
    end
  end

  defp terminal(protocol, id, message, terminal, meta) do
    case for_demand(protocol, id, message, {:terminal, id, terminal, meta}) do
      {{:terminal, _, _, _}, _} = event -> put_elem(event, 1, close(protocol, id))
      unexpected -> unexpected
    end
  end

  @doc "Nothing more is expected of that id."
  @spec close(t, id) :: t
  def close(protocol, id), do: %{protocol | open: Map.delete(protocol.open, id)}

  defp adopt(protocol, limits) when is_map(limits) and not is_struct(limits) do
    %{
      protocol
      | peer_max_frame_bytes: limit(limits["max_frame_bytes"], protocol.peer_max_frame_bytes),
        max_open_requests: limit(limits["max_open_requests"], protocol.max_open_requests)
    }
  end

  defp adopt(protocol, _none), do: protocol

  defp limit(stated, ours) when is_integer(stated) and stated > 0, do: min(stated, ours)
  defp limit(_not_stated, ours), do: ours

  ## Parts

  defp part(protocol, number, last, bytes) do
    {size, joined} = Map.get(protocol.parts, number, {0, []})
    size = size + byte_size(bytes)
    joined = [joined, bytes]

    cond do
      size > protocol.max_frame_bytes -> {{:broken, over_limit(size, protocol.max_frame_bytes)}, protocol}
      last -> handle_joined(%{protocol | parts: Map.delete(protocol.parts, number)}, joined)
      true -> {:part, put_in(protocol.parts[number], {size, joined})}
    end
  end

  defp handle_joined(protocol, joined) do
    case Msgpack.decode_message(IO.iodata_to_binary(joined)) do
      {:ok, ["part" | _]} -> {{:broken, Error.new(:bad_message, "a part inside parts")}, protocol}
      {:ok, message} -> message(protocol, message)
      {:error, error} -> {{:broken, error}, protocol}
    end
  end

  defp over_limit(size, limit) do
    Error.new(:too_large, "the service sent #{size} bytes and more in parts; max_frame_bytes is #{limit}")
  end
end
