# One answer for many: a demand is broadcast to whoever subscribed to a topic, here through Elixir's own Registry.
# With Phoenix it is `broadcast: {Phoenix.PubSub, MyApp.PubSub, "room:1"}`, and subscribers may be on other nodes.
#
#     mix run examples/pubsub.exs

defmodule Listener do
  # Subscribes, and returns what it heard when the demand has ended.

  def start(name) do
    Task.async(fn ->
      {:ok, _} = Registry.register(Example.Topics, "room:1", nil)
      send(Example.Main, {:listening, name})
      listen("")
    end)
  end

  defp listen(text) do
    receive do
      {:workflow_stream, "llm", chunk} -> listen(text <> chunk)
      {:workflow_output, "llm", _outputs} -> {:ok, text}
      {:workflow_error, "llm", error} -> {:error, error}
    end
  end
end

Process.register(self(), Example.Main)

{:ok, _} =
  Supervisor.start_link(
    [{Registry, keys: :duplicate, name: Example.Topics}, {DemandPort, name: Example.Port}],
    strategy: :one_for_one
  )

data = %{model_path: "tiny", prompt: "Tell me about owls."}
graph = %{nodes: [%{id: "llm", node_type: "llamacpp-inference", data: data}], edges: []}
session = DemandPort.open!(Example.Port, graph)

listeners = for name <- ["Ada", "Grace"], do: Listener.start(name)
for _ <- listeners, do: receive(do: ({:listening, name} -> IO.puts("#{name} listens")))

{:ok, _demand} = DemandPort.demand_async(session, "llm", broadcast: {Registry, Example.Topics, "room:1"})
[{:ok, one}, {:ok, two}] = Task.await_many(listeners, :infinity)
IO.puts("both heard: #{one}")
IO.puts("the same: #{one == two}")
