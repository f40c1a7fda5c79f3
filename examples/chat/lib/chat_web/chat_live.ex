defmodule ChatWeb.ChatLive do
  @moduledoc """
  A question, and its answer as it comes.

  Each question is a graph of one node, whose id names the answer: so several may run at once, and whatever arrives says
  by its node what it belongs to. At `/` the demand's messages come to this process. At `/rooms/:room` they are
  broadcast, and whoever has the room open sees the same.
  """
  use Phoenix.LiveView

  alias Phoenix.LiveView.JS
  alias Phoenix.PubSub

  @impl true
  def mount(params, _session, socket) do
    room = params["room"]
    if room && connected?(socket), do: PubSub.subscribe(Chat.PubSub, topic(room))
    # turns: questions with their answers, oldest first      asked: id => {session, demand} of this page
    # forms: counts what was asked, so that the form is a new, empty one each time
    {:ok, assign(socket, room: room, turns: [], asked: %{}, forms: 0)}
  end

  ## From the page

  @impl true
  def handle_event("ask", %{"question" => question}, socket) do
    case String.trim(question) do
      "" -> {:noreply, socket}
      question -> {:noreply, socket |> ask(question) |> update(:forms, &(&1 + 1))}
    end
  end

  def handle_event("cancel", _params, socket) do
    for {_id, {_session, demand}} <- socket.assigns.asked, do: DemandPort.cancel(demand)
    {:noreply, socket}
  end

  # Tasks open and close: both wait for the service, which may just be starting, and the page does not.
  defp ask(socket, question) do
    id = "answer-#{Base.encode16(:crypto.strong_rand_bytes(6), case: :lower)}"
    page = self()

    socket
    |> tell({:asked, id, question})
    |> start_async({:open, id}, fn -> DemandPort.open(Chat.Port, graph(id, question), owner: page) end)
  end

  @impl true
  def handle_async({:open, id}, {:ok, opened}, socket) do
    with {:ok, session} <- opened,
         {:ok, demand} <- DemandPort.demand_async(session, id, delivery(socket.assigns.room)) do
      {:noreply, update(socket, :asked, &Map.put(&1, id, {session, demand}))}
    else
      {:error, error} -> {:noreply, tell(socket, {:workflow_error, id, error})}
    end
  end

  def handle_async({:close, _id}, _closed, socket), do: {:noreply, socket}

  # Text that a browser can show comes thirty times a second, however fast the model is.
  defp delivery(nil), do: [coalesce_ms: 33]
  defp delivery(room), do: [coalesce_ms: 33, broadcast: {PubSub, Chat.PubSub, topic(room)}]

  defp graph(id, question) do
    data = %{model_path: System.get_env("MODEL", "tiny"), prompt: question, max_tokens: 256}
    %{nodes: [%{id: id, node_type: "llamacpp-inference", data: data}], edges: []}
  end

  defp tell(%{assigns: %{room: nil}} = socket, message), do: heard(socket, message)

  defp tell(socket, message) do
    :ok = PubSub.broadcast(Chat.PubSub, topic(socket.assigns.room), message)
    socket
  end

  defp topic(room), do: "room:" <> room

  ## From the demand: to this process, or broadcast

  @impl true
  def handle_info({:node_stream, id, chunk}, socket),
    do: {:noreply, heard(socket, {:workflow_stream, id, chunk})}

  def handle_info({:demand_complete, id, outputs}, socket),
    do: {:noreply, heard(socket, {:workflow_output, id, outputs})}

  def handle_info({:demand_error, id, error}, socket),
    do: {:noreply, heard(socket, {:workflow_error, id, error})}

  def handle_info(message, socket), do: {:noreply, heard(socket, message)}

  defp heard(socket, {:asked, id, question}) do
    turn = %{id: id, question: question, answer: "", state: :running}
    update(socket, :turns, &(&1 ++ [turn]))
  end

  defp heard(socket, {:workflow_stream, id, chunk}) do
    change(socket, id, &%{&1 | answer: &1.answer <> chunk})
  end

  # The whole text: a node that is cached streams nothing. (Who opens a room sees what is asked from then on.)
  defp heard(socket, {:workflow_output, id, outputs}) do
    socket |> change(id, &%{&1 | answer: outputs["response"], state: :done}) |> over(id)
  end

  defp heard(socket, {:workflow_error, id, error}) do
    socket |> change(id, &%{&1 | state: {:failed, error}}) |> over(id)
  end

  defp change(socket, id, change) do
    update(socket, :turns, &Enum.map(&1, fn turn -> if turn.id == id, do: change.(turn), else: turn end))
  end

  defp over(socket, id) do
    {asked, others} = Map.pop(socket.assigns.asked, id)
    socket = assign(socket, asked: others)

    case asked do
      {session, _demand} -> start_async(socket, {:close, id}, fn -> DemandPort.close(session) end)
      nil -> socket
    end
  end

  @impl true
  def render(assigns) do
    ~H"""
    <h1><%= if @room, do: "Room #{@room}", else: "Chat" %></h1>
    <p :if={!@room}>
      What you ask here, you alone see. <a href="/rooms/lobby">Open a room</a>
      in two tabs: both see the same answer.
    </p>
    <p :if={@room}>Whoever has this page open sees the same. <a href="/">Ask alone</a>.</p>
    <main>
      <div class="turns">
        <section :for={turn <- @turns} id={turn.id}>
          <p class="question"><%= turn.question %></p>
          <p class={["answer", turn.state == :running && "running"]}><%= turn.answer %></p>
          <p :if={message = failure(turn.state)} class="error" role="alert"><%= message %></p>
        </section>
      </div>
    </main>
    <p class="error offline" role="status">The connection is lost. Trying again …</p>
    <form id={"ask-#{@forms}"} phx-submit="ask">
      <input
        name="question"
        aria-label="Question"
        placeholder="Tell me about cats."
        maxlength="2000"
        autocomplete="off"
        phx-mounted={JS.focus()}
      />
      <button :if={@asked != %{}} type="button" phx-click="cancel">Cancel</button>
      <button>Ask</button>
    </form>
    """
  end

  defp failure({:failed, %DemandPort.Error{code: :cancelled}}), do: "Cancelled."
  defp failure({:failed, %DemandPort.Error{retryable: true} = error}), do: "#{error.message}. Ask again."
  defp failure({:failed, error}), do: "#{error.message} (#{error.code})"
  defp failure(_state), do: nil
end
