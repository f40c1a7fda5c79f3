# Ports on three BEAMs of this machine, used from a fourth: to the node that has the model, and on when a node is killed.
#
#     mix run examples/cluster.exs
#
# The nodes are started here so that it is one command; yours are started as any nodes of a cluster are. Needs epmd, which
# comes with Erlang.

keeper =
  defmodule Example.Keeper do
    @moduledoc "Runs children under a supervisor that stays; on the nodes that are started here."

    def run(children) do
      caller = self()

      spawn(fn ->
        {:ok, _} = Supervisor.start_link(children, strategy: :one_for_one)
        send(caller, :started)
        Process.sleep(:infinity)
      end)

      receive do
        :started -> :ok
      end
    end
  end

defmodule Example.Nodes do
  @moduledoc "Starts BEAMs, each with a port and its place in the cluster."

  @scope Example.Cluster

  def scope, do: @scope

  @doc "What an application has among its children."
  def children do
    [
      {DemandPort, name: Example.Port, log_level: :none},
      {DemandPort.Cluster, scope: @scope, ports: [Example.Port], refresh_ms: 200}
    ]
  end

  def start_distribution do
    {_, 0} = System.cmd("epmd", ["-daemon"])
    {:ok, _} = :net_kernel.start([:"example_#{System.pid()}@127.0.0.1", :longnames])
    # This one has no ports of its own.
    {:ok, _} = Supervisor.start_link([{DemandPort.Cluster, scope: @scope}], strategy: :one_for_one)
  end

  def start(name, {:module, keeper, binary, _}) do
    paths = Enum.flat_map(:code.get_path(), &[~c"-pa", &1])

    {:ok, peer, node} =
      :peer.start_link(%{
        name: :"#{name}_#{System.pid()}",
        host: ~c"127.0.0.1",
        longnames: true,
        connection: :standard_io,
        args: [
          ~c"-setcookie",
          Atom.to_charlist(Node.get_cookie()),
          ~c"-kernel",
          ~c"logger_level",
          ~c"none" | paths
        ]
      })

    # This script is no file that the other could load a module from.
    {:ok, _} = :peer.call(peer, :application, :ensure_all_started, [:elixir])
    {:module, _} = :peer.call(peer, :code, :load_binary, [keeper, ~c"nofile", binary])
    :ok = :peer.call(peer, keeper, :run, [children()])
    true = Node.connect(node)
    node
  end

  @doc "Waits until the cluster, as it is known here, fulfils the condition."
  def wait(condition) do
    unless condition.() do
      Process.sleep(20)
      wait(condition)
    end
  end
end

defmodule Example do
  def main(keeper) do
    Example.Nodes.start_distribution()
    scope = Example.Nodes.scope()
    for name <- ["one", "two", "three"], do: Example.Nodes.start(name, keeper)
    Example.Nodes.wait(fn -> length(DemandPort.Cluster.members(scope)) == 3 end)
    IO.puts("#{length(DemandPort.Cluster.members(scope))} ports")

    # Whoever has least to do loads the model; from then on, what wants the model goes there.
    {:ok, first} = DemandPort.Cluster.choose(scope)
    {:ok, %{"model" => model}} = DemandPort.load_model(first, "tiny")
    Example.Nodes.wait(fn -> DemandPort.Cluster.members(scope, model: model) == [first] end)
    IO.puts("#{model} is loaded on #{name(first)}\n")

    for chunk <- DemandPort.Cluster.stream(scope, story(60), "llm", model: model), do: IO.write(chunk)
    IO.puts("\n")

    killed(scope, first, model)
    elsewhere(scope, model)
  end

  # A stream that has begun ends with a typed error; the caller decides.
  defp killed(scope, first, model) do
    {:ok, session} = DemandPort.Cluster.open(scope, waiting(), model: model)
    ^first = session.server
    {:ok, _} = DemandPort.demand_async(session, "ask", events: true)
    receive do: ({:node_event, _, _} -> :ok)
    :erpc.cast(node(first), :erlang, :halt, [1])

    receive do
      {:demand_error, "ask", %DemandPort.Error{code: :backend_unavailable} = error} ->
        IO.puts("#{name(first)} is killed: #{Exception.message(error)}")
    end
  end

  # Of what has not begun, nothing is seen but the outputs: here with two more nodes to try.
  defp elsewhere(scope, model) do
    {:ok, %{"response" => text}} = DemandPort.Cluster.run(scope, story(20), "llm", model: model, retry: 2)
    IO.puts("done on another node:#{text}")
  end

  defp name(pid), do: pid |> node() |> Atom.to_string() |> String.split("_") |> hd()

  defp story(max_tokens) do
    DemandPort.Graph.new()
    |> DemandPort.Graph.node("llm", "llamacpp-inference",
      model_path: "tiny",
      prompt: "Tell a story.",
      max_tokens: max_tokens,
      seed: 7
    )
  end

  defp waiting, do: DemandPort.Graph.new() |> DemandPort.Graph.node("ask", "human-input", prompt: "?")
end

# A match that fails raises, and `mix run` then ends with a status that is not 0.
Logger.configure(level: :error)
Example.main(keeper)
