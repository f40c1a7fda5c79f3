# A port without the client: frames by the BEAM, messages as plain Erlang terms.
#
#     elixir examples/bare_port.exs
#
# DEMAND_PORT_PYTHON names the Python to use.

python = System.find_executable(System.get_env("DEMAND_PORT_PYTHON", "python3"))
path = Enum.join([Path.expand("../python", __DIR__) | List.wrap(System.get_env("PYTHONPATH"))], ":")

port =
  Port.open({:spawn_executable, python}, [
    :binary,
    :exit_status,
    packet: 4,
    args: ["-m", "demandport", "serve", "--codec", "etf"],
    env: [{~c"PYTHONPATH", to_charlist(path)}]
  ])

next = fn ->
  receive do
    {^port, {:data, payload}} -> :erlang.binary_to_term(payload, [:safe])
    {^port, {:exit_status, status}} -> raise "the service ended with exit status #{status}"
  after
    30_000 -> raise "no message within 30 s"
  end
end

send_message = fn message -> Port.command(port, :erlang.term_to_binary(message)) end

# `:safe` makes no atoms, so those of the protocol must be known before the first message: naming them does it.
_known = [
  :ready,
  :ok,
  :error,
  :node_stream,
  :demand_complete,
  :demand_error,
  :node_event,
  :log,
  :part,
  :goodbye
]

{:ready, info} = next.()
IO.puts("ready: protocol #{info["protocol"]}, codec #{info["codec"]}")

graph = %{
  "nodes" => [
    %{"id" => "in", "node_type" => "text-input", "data" => %{"text" => "port"}},
    %{"id" => "greet", "node_type" => "template", "data" => %{"template" => "Hello, {{name}}!"}},
    %{"id" => "out", "node_type" => "text-output", "data" => %{}}
  ],
  "edges" => [
    %{
      "id" => "1",
      "source" => "in",
      "source_handle" => "text",
      "target" => "greet",
      "target_handle" => "name"
    },
    %{
      "id" => "2",
      "source" => "greet",
      "source_handle" => "text",
      "target" => "out",
      "target_handle" => "text"
    }
  ]
}

send_message.({:open, 1, "s", graph, %{}})
{:ok, 1, _opened} = next.()

send_message.({:demand, 2, "s", "out", %{}})

defmodule Until do
  # A chunk or the end of the demand: the first three elements are what a GenServer would match on.
  def terminal(next) do
    case next.() do
      {:node_stream, node, chunk, 2, _seq, _port} ->
        IO.inspect({:node_stream, node, chunk})
        terminal(next)

      {:demand_complete, node, outputs, 2, _meta} ->
        IO.inspect({:demand_complete, node, outputs})

      {:demand_error, node, error, 2, _meta} ->
        IO.inspect({:demand_error, node, error})
        System.halt(1)

      {:log, _level, _logger, _text, _metadata} ->
        terminal(next)
    end
  end
end

Until.terminal(next)
Port.close(port)
