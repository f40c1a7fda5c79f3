defmodule DemandPort.Relay do
  @moduledoc """
  A small process on the caller's node that stands between a demand on another node and those who receive its messages.

      connection (there) ══distribution══▶ relay (here) ──▶ receivers

  A connection tells its receivers how a demand ended, but not when it went down with its node. So the relay is the only
  one that the connection sends to, and the only one that sends to the receivers:

  - it watches the connection; when that, its node, or the way there is gone, the demand ends with `:backend_unavailable`
    (retryable);
  - the connection watches the relay; when that or its node is gone, the demand is cancelled;
  - it ends with the first terminal message it delivers, so there is never a second, whatever else arrives;
  - it looks into the receivers' mailboxes, as the connection does on its own node, and gives credit accordingly; a
    receiver that takes one message after the other says itself what it took.

  `DemandPort.demand_async/3` uses one for every session on another node; what the connection refuses then arrives as
  `:demand_error`. `DemandPort.Cluster` has its relays open the graph themselves, and again elsewhere if they may.

  A relay lives as long as its demand and belongs to no supervisor: it ends with the connection or with the last of those
  who keep the demand alive, whichever is first.
  """

  use GenServer, restart: :temporary

  alias DemandPort.{Broadcaster, Connection, Credit, Delivery, Error, Session}

  # The window of a demand that says nothing of it; the connection's own default is not known here.
  @window 64
  # How soon a consumer's mailbox is looked into again that was too full for more credit: at first, and at most.
  @look_again_ms 1
  @look_at_most_ms 10

  @typedoc """
  Opens the graph for `owner`, somewhere that is not among those tried already, or says where that failed. The session is
  closed when the owner dies, or by `release`.
  """
  @type open ::
          (owner :: pid, tried :: [GenServer.server()] ->
             {:ok, Session.t(), release :: (() -> term)} | {:error, Error.t(), tried :: [GenServer.server()]})

  # delivery:  of the receivers: where to, tag, who is watched, options
  # at:        nil | {:opening, pid, monitor} | {:running, server, ref, monitor}
  # open:      how to open the graph, nil for a session that is open
  # tried:     servers that had the demand already
  # retries:   how often it may be opened again
  # release:   gives back the session at hand
  # looking:   a look into the mailbox is to come; pause: how long the next one after it is put off
  defstruct [
    :delivery,
    :credit,
    :at,
    :open,
    :release,
    tried: [],
    retries: 0,
    streamed: false,
    looking: false,
    pause: @look_again_ms,
    monitors: %{}
  ]

  @doc """
  Sends a demand of an open session: straight to a connection on this node, through a relay to one on another.

  Returns whom to ask for a cancel. The demand is sent by the calling process, so that it keeps its place among the
  edits that this process makes.
  """
  @spec demand(GenServer.server(), Delivery.t()) :: {:ok, GenServer.server()} | {:error, Error.t()}
  def demand(server, delivery) do
    case GenServer.whereis(server) do
      nil ->
        {:error, Connection.unavailable("the connection is not running")}

      pid when node(pid) == node() ->
        with :ok <- Connection.demand(server, delivery, :infinity), do: {:ok, server}

      remote ->
        relayed(remote, delivery)
    end
  end

  defp relayed(server, delivery) do
    # It watches the connection before the demand is sent: what is lost on the way is lost with the connection.
    {:ok, relay} = GenServer.start(__MODULE__, {delivery, {:session, server}})
    :ok = Connection.cast_demand(server, inner(delivery, relay, delivery.ref))
    {:ok, relay}
  end

  @doc """
  Opens a graph, demands of it, and has the session closed at the end.

  `retries` is how often it is opened again after an error that is retryable, as long as no chunk was delivered. Returns
  at once; whatever goes wrong arrives as `:demand_error`.
  """
  @spec start(Delivery.t(), open, non_neg_integer) :: pid
  def start(delivery, open, retries) do
    {:ok, relay} = GenServer.start(__MODULE__, {delivery, {:open, open, retries}})
    relay
  end

  # What the connection has: it delivers to the relay alone, which says what was consumed.
  defp inner(delivery, relay, ref) do
    %{
      delivery
      | ref: ref,
        to: [relay],
        watch: [relay],
        tag: {:tag, ref},
        stream: if(delivery.stream == :never, do: :never, else: :consumed),
        window: window(delivery)
    }
  end

  defp window(%{window: nil}), do: @window
  defp window(%{window: window}), do: window

  ## Start

  @impl true
  def init({delivery, work}) do
    monitors = Map.new(delivery.watch, &{Process.monitor(&1), &1})

    relay = %__MODULE__{
      delivery: broadcast(delivery),
      credit: Credit.new(window(delivery)),
      monitors: monitors
    }

    case work do
      {:session, server} -> {:ok, aim(relay, server, delivery.ref)}
      {:open, open, retries} -> {:ok, open(%{relay | open: open, retries: retries})}
    end
  end

  # An adapter's code runs in a process of its own, which ends with the demand's last message.
  defp broadcast(%{to: [{:broadcast, to}]} = delivery) do
    %{delivery | to: [spawn_link(Broadcaster, :forward, [to, delivery.node, self()])]}
  end

  defp broadcast(delivery), do: delivery

  # To open takes a while, in which a cancel is to be heard: another process does it, and ends with the result. What it
  # opens is this process's, and is closed with it.
  defp open(%{open: open, tried: tried} = relay) do
    owner = self()
    {pid, monitor} = spawn_monitor(fn -> exit({:opened, open.(owner, tried)}) end)
    %{relay | at: {:opening, pid, monitor}}
  end

  defp aim(relay, server, ref) do
    monitor = Process.monitor(server)
    %{relay | at: {:running, server, ref, monitor}, tried: [server | relay.tried]}
  end

  ## From the connection

  @impl true
  def handle_info({ref, message}, %{at: {:running, _server, ref, _monitor}} = relay),
    do: forward(message, relay)

  def handle_info({:DOWN, monitor, :process, _, reason}, %{at: {:running, _, _, monitor}} = relay) do
    failed(Connection.unavailable("the demand's connection is gone: #{why(reason)}"), relay)
  end

  def handle_info({:DOWN, monitor, :process, _, reason}, %{at: {:opening, _, monitor}} = relay) do
    case reason do
      {:opened, {:ok, session, release}} ->
        {:noreply, send_demand(%{relay | release: release}, session)}

      {:opened, {:error, error, tried}} ->
        failed(error, %{relay | tried: tried ++ relay.tried})

      crash ->
        failed(Error.new(:internal, "the graph could not be opened: #{inspect(crash, limit: 20)}"), relay)
    end
  end

  ## From those who are watched

  def handle_info({:DOWN, monitor, :process, _, _}, relay) when is_map_key(relay.monitors, monitor) do
    monitors = Map.delete(relay.monitors, monitor)
    if monitors == %{}, do: abandoned(relay), else: {:noreply, %{relay | monitors: monitors}}
  end

  def handle_info(:look, relay), do: {:noreply, look(%{relay | looking: false})}

  # Of an attempt before this one.
  def handle_info(_late, relay), do: {:noreply, relay}

  ## From the caller

  @impl true
  def handle_cast({:cancel, _ref}, %{at: {:running, server, ref, _}} = relay) do
    Connection.cancel(server, ref)
    {:noreply, %{relay | retries: 0}}
  end

  def handle_cast({:cancel, _ref}, relay), do: finish(cancelled(), relay)
  def handle_cast({:consumed, _ref, n}, relay), do: {:noreply, give(relay, Credit.consumed(relay.credit, n))}
  def handle_cast({:abandon, _ref}, relay), do: leave(relay)

  ## On the way

  defp send_demand(relay, session) do
    ref = make_ref()
    relay = aim(relay, session.server, ref)
    delivery = %{relay.delivery | session: session.name}
    :ok = Connection.cast_demand(session.server, inner(delivery, self(), ref))
    relay
  end

  defp forward({:node_stream, _, _} = message, relay) do
    Delivery.deliver(relay.delivery, message)
    {:noreply, look(%{relay | streamed: true, credit: Credit.delivered(relay.credit)})}
  end

  defp forward({:node_event, _, _} = message, relay) do
    Delivery.deliver(relay.delivery, message)
    {:noreply, relay}
  end

  defp forward({:demand_complete, _, _} = message, relay), do: finish(message, relay)
  defp forward({:demand_error, _, error}, relay), do: failed(error, relay)

  # Who takes one after the other says what it took.
  defp look(%{delivery: %{stream: :consumed}} = relay), do: relay
  defp look(relay), do: relay |> give(grant(relay)) |> look_again()

  defp give(%{at: {:running, server, ref, _}} = relay, {grant, credit}) when grant > 0 do
    Connection.consumed(server, ref, grant)
    %{relay | credit: credit, pause: @look_again_ms}
  end

  defp give(%{at: {:running, _, _, _}} = relay, {0, credit}), do: %{relay | credit: credit}

  # Nothing that was taken is of a demand that is yet to begin.
  defp give(relay, _credit), do: relay

  defp grant(%{credit: credit, delivery: delivery}) do
    if Credit.due?(credit), do: Credit.grant(credit, Delivery.backlog(delivery)), else: {0, credit}
  end

  # Also while the service may still send: what it sends is a whole way off, and so is what this grants.
  defp look_again(%{looking: false, pause: pause} = relay) do
    if Credit.due?(relay.credit) do
      Process.send_after(self(), :look, pause)
      %{relay | looking: true, pause: min(2 * pause, @look_at_most_ms)}
    else
      relay
    end
  end

  defp look_again(relay), do: relay

  ## The end

  defp failed(%Error{retryable: true}, %{retries: retries, streamed: false} = relay) when retries > 0 do
    relay = put_down(relay)
    {:noreply, open(%{relay | retries: retries - 1})}
  end

  defp failed(error, relay), do: finish(error, relay)

  defp put_down(relay) do
    with {:running, _, _, monitor} <- relay.at, do: Process.demonitor(monitor, [:flush])
    if relay.release, do: relay.release.()
    %{relay | at: nil, release: nil, credit: Credit.new(window(relay.delivery))}
  end

  defp finish(%Error{} = error, relay), do: finish({:demand_error, relay.delivery.node, error}, relay)

  defp finish(message, relay) do
    Delivery.deliver(relay.delivery, message)
    leave(relay)
  end

  # Who subscribed to a broadcast still hears its end.
  defp abandoned(%{delivery: %{to: to, watch: watch}} = relay) do
    if to == watch, do: leave(relay), else: finish(cancelled(), relay)
  end

  # The connection and the session's keeper see this process end, and do the rest.
  defp leave(relay) do
    with {:opening, pid, _} <- relay.at, do: Process.exit(pid, :kill)
    {:stop, :normal, relay}
  end

  defp cancelled, do: Error.new(:cancelled, "the demand was cancelled")

  defp why(:noconnection), do: "its node is down or cannot be reached"
  defp why(reason), do: inspect(reason, limit: 20)

  # Crash reports say nothing of prompts and values.
  @impl true
  def format_status(_reason, [_dictionary, relay]), do: [at: relay.at, tried: relay.tried]
end
