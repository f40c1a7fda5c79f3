defmodule DemandPort.Delivery do
  @moduledoc false
  # One open demand: who receives its messages, who keeps it alive, and how far its consumer has come.

  alias DemandPort.{Credit, Telemetry}

  @enforce_keys [:ref, :session, :node]
  defstruct [
    :ref,
    # What the telemetry calls it, and the wire: a node, or several.
    :session,
    :node,
    # Options as the wire has them, without credit.
    options: %{},
    # Stream messages that may be under way; nil for the connection's default.
    window: nil,
    credit: nil,
    # Where messages go: pids, `{name, node}`, aliases, or one `{:broadcast, to}`; none once nobody waits for it.
    to: [],
    # The demand is cancelled when the `:last` or `:any` of these has died; none: when it ends by itself.
    watch: [],
    ends_with: :last,
    monitors: %{},
    cancelled: false,
    tag: :untagged,
    # Chunks are delivered: always, never, or as the consumer says that it took some.
    stream: :delivered,
    started: 0,
    chunks: 0
  ]

  @type t :: %__MODULE__{}

  @sent ~w(deadline_ms priority coalesce_ms coalesce_bytes)a

  @doc "A demand as the options of a function say it, validated; who receives it is to be put in."
  @spec new(String.t(), String.t() | [String.t()], keyword) :: t
  def new(session, node, options) do
    %__MODULE__{
      ref: make_ref(),
      session: session,
      node: node,
      options: to_wire(options),
      window: options[:credit],
      tag: if(Keyword.has_key?(options, :tag), do: {:tag, options[:tag]}, else: :untagged)
    }
  end

  # The service's own default of `events` is false.
  defp to_wire(options) do
    sent = for {name, value} <- Keyword.take(options, @sent), into: %{}, do: {Atom.to_string(name), value}
    if options[:events], do: Map.put(sent, "events", true), else: sent
  end

  @doc "It was sent: its clock runs, and those who keep it alive are watched."
  @spec opened(t, Credit.window()) :: t
  def opened(delivery, window) do
    started = System.monotonic_time()

    Telemetry.execute(
      [:demand, :start],
      %{system_time: System.system_time(), monotonic_time: started},
      about(delivery)
    )

    monitors = Map.new(delivery.watch, &{Process.monitor(&1), &1})
    %{delivery | credit: Credit.new(window), monitors: monitors, started: started}
  end

  @doc "Sends a chunk; returns how much credit to give the service for it now."
  @spec chunk(t, term) :: {non_neg_integer, t}
  def chunk(%{chunks: 0} = delivery, message) do
    Telemetry.execute([:demand, :first_chunk], %{duration: since(delivery)}, about(delivery))
    deliver_chunk(delivery, message)
  end

  def chunk(delivery, message), do: deliver_chunk(delivery, message)

  defp deliver_chunk(delivery, message) do
    if delivery.stream != :never, do: deliver(delivery, message)
    delivery = %{delivery | chunks: delivery.chunks + 1, credit: Credit.delivered(delivery.credit)}
    if delivery.stream == :consumed, do: {0, delivery}, else: grant(delivery)
  end

  @doc "The consumer says that it took `n` chunks; returns how much credit to give for them."
  @spec consumed(t, pos_integer) :: {non_neg_integer, t}
  def consumed(delivery, n) do
    {grant, credit} = Credit.consumed(delivery.credit, n)
    {grant, %{delivery | credit: credit}}
  end

  @doc "How much credit to give now, as far as its consumers have come with their mailboxes."
  @spec grant(t) :: {non_neg_integer, t}
  def grant(delivery) do
    if Credit.due?(delivery.credit) do
      {grant, credit} = Credit.grant(delivery.credit, backlog(delivery))
      {grant, %{delivery | credit: credit}}
    else
      {0, delivery}
    end
  end

  @doc "The service may send no more, and what it sent lies in a mailbox: look again later."
  @spec stalled?(t) :: boolean
  def stalled?(delivery), do: delivery.stream == :delivered and Credit.exhausted?(delivery.credit)

  @doc "Sends a message to all who receive it."
  @spec deliver(t, term) :: :ok
  def deliver(%{tag: {:tag, tag}} = delivery, message), do: send_all(delivery.to, {tag, message})
  def deliver(delivery, message), do: send_all(delivery.to, message)

  defp send_all(receivers, message), do: Enum.each(receivers, &send(&1, message))

  @doc "Its end: delivered, and counted."
  @spec ended(t, tuple, map) :: :ok
  def ended(delivery, {kind, _node, outcome} = message, meta) do
    deliver(delivery, message)
    measured = %{duration: since(delivery), chunks: delivery.chunks, queue_time: queue_time(meta)}

    if kind == :demand_complete,
      do: Telemetry.execute([:demand, :stop], measured, Map.put(about(delivery), :meta, meta)),
      else: Telemetry.execute([:demand, :exception], measured, Map.put(about(delivery), :error, outcome))
  end

  defp queue_time(%{"queued_us" => us}), do: System.convert_time_unit(us, :microsecond, :native)
  defp queue_time(_started_at_once), do: 0

  @doc "One of those who keep it alive has died; true when nobody does any more."
  @spec abandoned(t, reference) :: {boolean, t}
  def abandoned(delivery, monitor) do
    monitors = Map.delete(delivery.monitors, monitor)
    {monitors == %{} or delivery.ends_with == :any, %{delivery | monitors: monitors}}
  end

  @spec forget(t) :: :ok
  def forget(delivery),
    do: Enum.each(delivery.monitors, fn {monitor, _} -> Process.demonitor(monitor, [:flush]) end)

  @doc "Messages in the fullest of its receivers' mailboxes; those on other nodes cannot be looked into."
  @spec backlog(t) :: non_neg_integer
  def backlog(delivery) do
    Enum.reduce(delivery.to, 0, fn receiver, most ->
      with true <- is_pid(receiver) and node(receiver) == node(),
           {:message_queue_len, length} <- Process.info(receiver, :message_queue_len) do
        max(length, most)
      else
        _ -> most
      end
    end)
  end

  defp since(delivery), do: System.monotonic_time() - delivery.started
  defp about(delivery), do: %{session: delivery.session, node: delivery.node, ref: delivery.ref}
end
