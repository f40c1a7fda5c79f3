# A local model in a GenServer: tokens as they arrive, while the BEAM stays free.
#
#     mix run examples/demo.exs
#     MODEL=/path/to/model.gguf PROMPT="Why is the sky blue?" mix run examples/demo.exs

defmodule Demo.Load do
  # Which share of their time the schedulers worked since `start/0`.

  def start do
    :erlang.system_flag(:scheduler_wall_time, true)
    :erlang.statistics(:scheduler_wall_time_all) |> Enum.sort()
  end

  def since(before) do
    now = :erlang.statistics(:scheduler_wall_time_all) |> Enum.sort()
    normal = :erlang.system_info(:schedulers)
    dirty_cpu = :erlang.system_info(:dirty_cpu_schedulers)

    # Numbered: normal schedulers first, then dirty CPU, then dirty I/O.
    shares = Enum.zip_with(before, now, fn {id, a0, t0}, {id, a1, t1} -> {id, a1 - a0, t1 - t0} end)
    {percent(shares, 1, normal), percent(shares, normal + 1, normal + dirty_cpu)}
  end

  defp percent(shares, first, last) do
    of = Enum.filter(shares, fn {id, _, _} -> id in first..last end)
    total = of |> Enum.map(&elem(&1, 2)) |> Enum.sum()
    Float.round(100 * (of |> Enum.map(&elem(&1, 1)) |> Enum.sum()) / max(total, 1), 2)
  end
end

defmodule Demo.Writer do
  @moduledoc "Demands a node, prints its tokens, and tells whoever asked how it went."
  use GenServer

  def start_link(_), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @doc "Runs a demand; `cancel_after` cancels it at that many chunks."
  def run(session, node, cancel_after \\ :never) do
    GenServer.call(__MODULE__, {:run, session, node, cancel_after}, :infinity)
  end

  @impl true
  def init(_), do: {:ok, nil}

  @impl true
  def handle_call({:run, session, node, cancel_after}, from, nil) do
    began = now()
    {:ok, demand} = DemandPort.demand_async(session, node)

    {:noreply,
     %{from: from, demand: demand, cancel_after: cancel_after, began: began, first: nil, chunks: []}}
  end

  @impl true
  def handle_info({:node_stream, _node, chunk}, run) do
    IO.write(chunk)
    run = %{run | first: run.first || now(), chunks: [chunk | run.chunks]}
    if length(run.chunks) == run.cancel_after, do: DemandPort.cancel(run.demand)
    {:noreply, run}
  end

  def handle_info({:demand_complete, _node, outputs}, run), do: finish(run, {:ok, outputs})
  def handle_info({:demand_error, _node, error}, run), do: finish(run, {:error, error})

  defp finish(run, result) do
    GenServer.reply(run.from, %{
      result: result,
      text: run.chunks |> Enum.reverse() |> Enum.join(),
      chunks: length(run.chunks),
      first_us: run.first && run.first - run.began,
      total_us: now() - run.began
    })

    {:noreply, nil}
  end

  defp now, do: System.monotonic_time(:microsecond)
end

defmodule Demo do
  def main do
    {:ok, _} = Supervisor.start_link([{DemandPort, name: Demo.Port}, Demo.Writer], strategy: :rest_for_one)

    {topic, template} =
      case System.get_env("PROMPT", "") do
        "" -> {"a lighthouse at night", "Tell a story about {{topic}}."}
        prompt -> {prompt, "{{topic}}"}
      end

    {:ok, session} = DemandPort.open(Demo.Port, graph(System.get_env("MODEL", "tiny"), topic, template))

    stream(session)
    cached(session)
    edited(session)
    cancelled(session)
    :ok = DemandPort.close(session)
  end

  defp stream(session) do
    heading("tokens as they arrive")
    load = Demo.Load.start()
    run = Demo.Writer.run(session, "out")
    {normal, dirty} = Demo.Load.since(load)

    {:ok, %{"text" => text}} = run.result
    true = run.chunks > 0
    true = text == run.text
    after_first_s = max(run.total_us - run.first_us, 1) / 1_000_000

    IO.puts("\n")
    IO.puts("time to first token          #{ms(run.first_us)} ms")

    IO.puts(
      "chunks per second            #{Float.round((run.chunks - 1) / after_first_s, 1)} (#{run.chunks} chunks; " <>
        "up to 100 tokens a second come one by one)"
    )

    with tokens when is_integer(tokens) <- tokens(session), do: rate(tokens, after_first_s)
    IO.puts("scheduler utilisation        #{normal} %")
    IO.puts("dirty CPU scheduler use      #{dirty} %")
  end

  # The node's own count, since a chunk may hold several tokens.
  defp tokens(session) do
    case DemandPort.get_output(session, "llm", "usage") do
      {:ok, %{"completion_tokens" => tokens}} -> tokens
      _ -> nil
    end
  end

  defp rate(tokens, seconds),
    do: IO.puts("tokens per second            #{Float.round((tokens - 1) / seconds, 1)} (#{tokens} tokens)")

  defp cached(session) do
    heading("the same again")
    run = Demo.Writer.run(session, "out")
    {:ok, _} = run.result
    0 = run.chunks
    IO.puts("answered from the cache in   #{ms(run.total_us)} ms")
  end

  defp edited(session) do
    heading("an edit makes it stale")
    {:ok, stale} = DemandPort.edit(session, {:update_node_data, "llm", %{max_tokens: 20}})
    true = "out" in stale
    :absent = DemandPort.get_output(session, "out", "text")
    IO.puts("stale now: #{Enum.join(stale, ", ")}")
    run = Demo.Writer.run(session, "out")
    {:ok, _} = run.result
    IO.puts("\nran again in                 #{ms(run.total_us)} ms")
  end

  # A model as small as the packaged one may be done before the cancel reaches it; another seed then has another try.
  defp cancelled(session, seed \\ 1) do
    if seed == 1, do: heading("a cancel in mid-stream")
    {:ok, _} = DemandPort.edit(session, {:update_node_data, "llm", %{max_tokens: 400, seed: seed}})
    run = Demo.Writer.run(session, "out", 2)

    case run.result do
      {:error, %DemandPort.Error{code: :cancelled}} ->
        IO.puts("\ncancelled at chunk 2, ended after #{run.chunks} chunks, #{ms(run.total_us)} ms")

      {:ok, _} when seed < 20 ->
        IO.puts("\n(done before the cancel arrived; again)")
        cancelled(session, seed + 1)
    end
  end

  defp graph(model, topic, template) do
    %{
      nodes: [
        %{id: "topic", node_type: "text-input", data: %{text: topic}},
        %{id: "prompt", node_type: "template", data: %{template: template}},
        %{
          id: "llm",
          node_type: "llamacpp-inference",
          data: %{model_path: model, max_tokens: 200, temperature: 0.7, seed: 7}
        },
        %{id: "out", node_type: "text-output", data: %{}}
      ],
      edges: [
        %{id: "1", source: "topic", source_handle: "text", target: "prompt", target_handle: "topic"},
        %{id: "2", source: "prompt", source_handle: "text", target: "llm", target_handle: "prompt"},
        %{id: "3", source: "llm", source_handle: "response", target: "out", target_handle: "text"}
      ]
    }
  end

  defp heading(text), do: IO.puts("\n== #{text}")
  defp ms(us), do: Float.round(us / 1_000, 1)
end

# A match that fails raises, and `mix run` then ends with a status that is not 0.
Demo.main()
