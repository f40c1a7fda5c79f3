# A GenServer that demands an answer and takes its tokens into its state, as they come.
#
#     mix run examples/genserver.exs

defmodule Storyteller do
  use GenServer

  def start_link(port), do: GenServer.start_link(__MODULE__, port, name: __MODULE__)

  @doc "Begins to tell; returns at once."
  def tell(about), do: GenServer.call(__MODULE__, {:tell, about})
  @doc "What is told so far. The process is free to say it while the model runs."
  def so_far, do: GenServer.call(__MODULE__, :so_far)
  @doc "Waits for the end."
  def wait, do: GenServer.call(__MODULE__, :wait, :infinity)

  @impl true
  def init(port) do
    graph = %{nodes: [%{id: "llm", node_type: "llamacpp-inference", data: %{model_path: "tiny"}}], edges: []}
    {:ok, session} = DemandPort.open(port, graph, restore: true)
    {:ok, %{session: session, chunks: [], waiting: []}}
  end

  @impl true
  def handle_call({:tell, about}, _from, state) do
    {:ok, _} = DemandPort.set_input(state.session, "llm", "prompt", "Tell a story about #{about}.")
    {:ok, _demand} = DemandPort.demand_async(state.session, "llm")
    {:reply, :ok, %{state | chunks: []}}
  end

  def handle_call(:so_far, _from, state), do: {:reply, text(state), state}
  def handle_call(:wait, from, state), do: {:noreply, %{state | waiting: [from | state.waiting]}}

  @impl true
  def handle_info({:node_stream, "llm", chunk}, state) do
    {:noreply, %{state | chunks: [chunk | state.chunks]}}
  end

  def handle_info({:demand_complete, "llm", outputs}, state), do: reply(state, {:ok, outputs["response"]})
  def handle_info({:demand_error, "llm", error}, state), do: reply(state, {:error, error})

  defp reply(state, result) do
    Enum.each(state.waiting, &GenServer.reply(&1, result))
    {:noreply, %{state | waiting: []}}
  end

  defp text(state), do: state.chunks |> Enum.reverse() |> Enum.join()
end

children = [{DemandPort, name: Example.Port}, {Storyteller, Example.Port}]
{:ok, _} = Supervisor.start_link(children, strategy: :rest_for_one)
:ok = Storyteller.tell("a lighthouse")
{:ok, story} = Storyteller.wait()
IO.puts("told: #{story}")
IO.puts("the chunks in its state are the whole story: #{Storyteller.so_far() == story}")
