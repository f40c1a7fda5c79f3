defmodule DemandPort.Host do
  @moduledoc """
  Nodes that this program runs itself: Elixir code in the middle of a graph.

      defmodule MyApp.Nodes do
        use DemandPort.Host

        @impl true
        def node_types, do: ["shout", "tool-executor", "rag-search"]

        @impl true
        def handle_node("shout", %{"text" => text}, _context), do: {:ok, %{"output" => String.upcase(text)}}

        @impl true
        def handle_tool("weather", %{"city" => city}, _context), do: {:ok, MyApp.Weather.of(city)}

        @impl true
        def handle_search(query, limit, _context), do: {:ok, MyApp.Documents.find(query, limit)}
      end

      {:ok, session} = DemandPort.open(port, graph, host: MyApp.Nodes)

  Each call runs in a process of its own, supervised by the connection. A crash in it is the node's error
  (`:node_failed`, with what was raised as `message`, and where as `traceback`), and nothing else. When nobody wants the answer any more (cancel, deadline, the session's end), the
  process is shut down as by a supervisor: it may trap exits to clean up, and has five seconds for it.

  `stream/3` sends chunks before the answer; they reach whoever demanded, as any node's do.
  """

  alias DemandPort.{Error, Protocol}

  defmodule Context do
    @moduledoc """
    What a call knows of itself.

    | field | what it is |
    |---|---|
    | `session` | the name of the session |
    | `node`, `node_type` | the node's id in the graph, and its type; a tool that a `tool-loop` calls has the loop as its node |
    | `arg` | what stands beside the module in `host: {module, arg}`; else nil |
    | `timeout_ms` | time for the answer, from the beginning of the call: `host_timeout_ms` of `DemandPort.open/3` |
    | `deadline_ms` | what the demand had left of its deadline as the call began, in milliseconds; nil without one |
    | `priority` | the demand's |

    `connection` and `call` are for `DemandPort.Host.stream/3`, which takes the whole context.
    """

    @enforce_keys [:connection, :call, :session, :node, :node_type]
    defstruct [
      :connection,
      :call,
      :session,
      :node,
      :node_type,
      :timeout_ms,
      :deadline_ms,
      :arg,
      priority: 0
    ]

    @type t :: %__MODULE__{
            connection: pid,
            call: {id :: pos_integer, reference},
            session: String.t(),
            node: String.t(),
            node_type: String.t(),
            timeout_ms: pos_integer | nil,
            deadline_ms: non_neg_integer | nil,
            priority: integer,
            arg: term
          }
  end

  @typedoc "Values by output port; an atom is taken by its name."
  @type outputs :: %{optional(String.t() | atom) => DemandPort.value()}
  @typedoc "Outputs by port; an error as a text, a `DemandPort.Error` or any term; or `:unknown`, to hand the node back."
  @type answer :: {:ok, outputs} | {:error, term} | :unknown
  @typedoc "A module, or a module and what its calls find as `arg` in their context."
  @type t :: module | {module, arg :: term}

  @doc """
  Runs a node.

  `inputs` has the values by input port, whether they come from an edge, `DemandPort.set_input/5` or the node's own data.
  Where the type was claimed by a descriptor they were checked, and have its defaults; else there is what the graph gives.

  * `{:ok, outputs}`: the values by output port. A type without a descriptor has any ports; an edge without a port reads
    `"output"`. What hangs on a port that is left out is skipped, unless that port streamed: its chunks, joined, are its value.
  * `{:error, reason}`: the node's error, see `t:answer/0`.
  * `:unknown`: the service is to run the node itself, where it has the type.

  Anything else, and whatever is raised, is `:node_failed`. It may take its time, in a process of its own, and wait for others;
  past `context.timeout_ms` the demand ends with `:host_unavailable`, past its deadline with `:deadline_exceeded`, and in
  both cases the process is shut down, as on a cancel.

      def handle_node("lines", %{"path" => path}, context) do
        if File.exists?(path) do
          # Chunks for who streams, and joined the value of "output".
          for line <- File.stream!(path), do: :ok = DemandPort.Host.stream(context, line, "output")
          {:ok, %{count: path |> File.stream!() |> Enum.count()}}
        else
          {:error, "there is no file \#{path}"}
        end
      end
  """
  @callback handle_node(node_type :: String.t(), inputs :: %{String.t() => term}, Context.t()) :: answer

  @doc """
  The node types that sessions opened with this host claim, names or descriptors, or `:all`. Without it none are claimed but by
  `host_types:` or `host_else:` of `DemandPort.open/3`.

  A descriptor gives the ports, which are then checked, types and defaults too:

      %{
        node_type: "weather",
        inputs: [%{name: "city", type: "string"}, %{name: "days", type: "integer", default: 1}],
        outputs: [%{name: "report", type: "string"}]
      }
  """
  @callback node_types() :: [String.t() | map] | :all

  @doc """
  Runs a tool that a model called in a `tool-loop`, or a `tool-executor` node, where that type is claimed.

  `arguments` is what the model wrote, or the node's input of that name: a map as a rule, nil without any. The result is any
  value. An error is told to the model, or is the `tool-executor`'s own. Without this callback `handle_node/3` is asked, with
  the type `"tool-executor"` and the inputs `"tool"` and `"arguments"`.
  """
  @callback handle_tool(name :: String.t(), arguments :: term, Context.t()) :: {:ok, term} | {:error, term}

  @doc """
  Finds at most `limit` documents for a `rag-search` node, where that type is claimed.

  `{:ok, documents}` makes the node's output `context` of their texts, with empty lines between (a document is a text, or a map
  with one under `text`); `{:ok, documents, context}` gives it. Without this callback `handle_node/3` is asked, with the type
  `"rag-search"` and the inputs `"query"` and `"limit"`.
  """
  @callback handle_search(query :: String.t(), limit :: integer, Context.t()) ::
              {:ok, [term]} | {:ok, [term], String.t()} | {:error, term}

  @optional_callbacks node_types: 0, handle_tool: 3, handle_search: 3, handle_node: 3

  @doc false
  defmacro __using__(_options) do
    quote do
      @behaviour DemandPort.Host
    end
  end

  @doc """
  Sends a chunk ahead of the answer, on `port` (without it on the node's first). Does not wait.

  Chunks of text joined are the port's value, unless the answer gives one; chunks of other values are its list. Text is merged
  while its consumer is slow. Of other values a call may be 1024 ahead; with more it ends as `:queue_full`. An error is
  returned for what cannot be sent; once nobody wants the answer, `:ok` is, and nothing happens.
  """
  @spec stream(Context.t(), term, String.t() | nil) :: :ok | {:error, Error.t()}
  def stream(%Context{} = context, chunk, port \\ nil) do
    {id, _ref} = context.call

    with {:ok, payload} <- Protocol.answer_stream(id, chunk, port) do
      GenServer.cast(context.connection, {:answer_stream, context.call, payload})
    end
  end

  @doc "Whether the module can be a host: it runs nodes, tools or searches."
  @spec valid?(module) :: boolean
  def valid?(module) do
    runs = [handle_node: 3, handle_tool: 3, handle_search: 3]

    Code.ensure_loaded?(module) and
      Enum.any?(runs, fn {name, arity} -> function_exported?(module, name, arity) end)
  end

  @doc "What the host's module claims by itself; `[]` when it does not say."
  @spec claims(t) :: [String.t() | map] | :all
  def claims({module, _arg}), do: claims(module)

  def claims(module) do
    Code.ensure_loaded(module)
    if function_exported?(module, :node_types, 0), do: module.node_types(), else: []
  end

  @doc false
  # Runs one call in the calling process, which is the call's own, once it is told to begin, and sends the answer.
  @spec run(t, call :: map, pid) :: :ok
  def run(host, %{ref: ref} = call, connection) do
    inputs = receive do: ({:begin, ^ref, inputs} -> inputs)
    {module, arg} = if is_tuple(host), do: host, else: {host, nil}
    context = context(call, connection, arg)
    answer = module |> answer(inputs, context) |> encoded(call.id)
    GenServer.cast(connection, {:answer, context.call, answer})
  end

  defp context(call, connection, arg) do
    %Context{
      connection: connection,
      call: {call.id, call.ref},
      session: call.session,
      node: call.node,
      node_type: call.node_type,
      timeout_ms: call.options["timeout_ms"],
      deadline_ms: call.options["deadline_ms"],
      priority: call.options["priority"] || 0,
      arg: arg
    }
  end

  defp answer(module, inputs, %{node_type: "tool-executor"} = context) do
    if function_exported?(module, :handle_tool, 3) do
      with {:ok, result} <- module.handle_tool(inputs["tool"], inputs["arguments"], context),
           do: {:ok, %{"result" => result}}
    else
      module.handle_node("tool-executor", inputs, context)
    end
  end

  defp answer(module, inputs, %{node_type: "rag-search"} = context) do
    if function_exported?(module, :handle_search, 3) do
      case module.handle_search(inputs["query"], inputs["limit"], context) do
        {:ok, documents} -> {:ok, %{"documents" => documents, "context" => joined(documents)}}
        {:ok, documents, text} -> {:ok, %{"documents" => documents, "context" => text}}
        {:error, reason} -> {:error, reason}
      end
    else
      module.handle_node("rag-search", inputs, context)
    end
  end

  defp answer(module, inputs, context), do: module.handle_node(context.node_type, inputs, context)

  defp joined(documents) do
    Enum.map_join(documents, "\n\n", fn
      text when is_binary(text) -> text
      %{"text" => text} when is_binary(text) -> text
      %{text: text} when is_binary(text) -> text
      other -> inspect(other)
    end)
  end

  # What cannot travel is the node's error, as it is for every other node.
  defp encoded(answer, id) do
    case Protocol.answer(id, answer) do
      {:ok, payload} ->
        payload

      {:error, error} ->
        {:ok, payload} = Protocol.answer(id, {:error, error})
        payload
    end
  end
end
