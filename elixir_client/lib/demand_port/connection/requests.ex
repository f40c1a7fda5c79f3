defmodule DemandPort.Connection.Requests do
  @moduledoc false
  # What of a connection's state is about messages to the service: requests and demands that are open or held, whose they
  # are, and the credit that demands are given.

  require Logger

  alias DemandPort.{Delivery, Error, Protocol}
  alias DemandPort.Connection.{Data, Heir}

  @type id :: pos_integer
  @type build :: (Protocol.t() -> {:ok, id, binary, Protocol.t()} | {:error, Error.t()})

  ## Requests

  @doc "Sends a demand, or holds it, and watches those who keep it alive."
  @spec open_demand(Data.t(), Delivery.t()) :: {:ok, Data.t()} | {:error, Error.t()}
  def open_demand(data, delivery) do
    window = if delivery.window == nil, do: data.options[:credit], else: delivery.window

    with {:ok, id, data} <- open(data, &to_wire(&1, delivery, window)) do
      delivery = delivery |> broadcast(data.tasks) |> Delivery.opened(window)
      Heir.note(data.heir, delivery)

      {:ok,
       %{
         own(data, id, {:demand, delivery})
         | refs: Map.put(data.refs, delivery.ref, id),
           monitors:
             Enum.reduce(delivery.monitors, data.monitors, fn {monitor, _}, all ->
               Map.put(all, monitor, id)
             end)
       }}
    end
  end

  defp to_wire(protocol, %{node: nodes} = delivery, _window) when is_list(nodes) do
    Protocol.demand_many(protocol, delivery.session, nodes, delivery.options)
  end

  defp to_wire(protocol, delivery, :infinity) do
    Protocol.demand(protocol, delivery.session, delivery.node, delivery.options)
  end

  defp to_wire(protocol, delivery, window) do
    Protocol.demand(protocol, delivery.session, delivery.node, Map.put(delivery.options, "credit", window))
  end

  # An adapter's code runs in a process of its own, whose mailbox is the demand's, and without which it is of no use.
  defp broadcast(%{to: [{:broadcast, to}]} = delivery, tasks) do
    arguments = [to, delivery.node, tasks]
    {:ok, pid} = Task.Supervisor.start_child(tasks, DemandPort.Broadcaster, :forward, arguments)
    %{delivery | to: [pid], watch: [pid | delivery.watch], ends_with: :any}
  end

  defp broadcast(delivery, _tasks), do: delivery

  @doc "Sends a request, or holds it. `build` makes its payload of the protocol."
  @spec open(Data.t(), build) :: {:ok, id, Data.t()} | {:error, Error.t()}
  def open(data, build) do
    with :ok <- room(data),
         {:ok, id, payload, protocol} <- build.(data.protocol) do
      {:ok, id, transmit(%{data | protocol: protocol}, id, payload)}
    end
  end

  @doc "Sends a request of the connection's own."
  @spec send_own(Data.t(), term, build) :: Data.t()
  def send_own(data, owner, build) do
    case open(data, build) do
      {:ok, id, data} ->
        own(data, id, owner)

      {:error, error} ->
        warn("a request was not sent: #{Exception.message(error)}")
        data
    end
  end

  defp room(%{held: nil}), do: :ok

  defp room(%{held: held, options: options}) do
    max = options[:max_pending]

    if length(held) < max do
      :ok
    else
      {:error, Error.new(:queue_full, "the service is starting and #{max} requests wait", retryable: true)}
    end
  end

  defp transmit(%{held: nil} = data, _id, payload), do: command(data, payload)
  defp transmit(data, id, payload), do: %{data | held: [{id, payload} | data.held]}

  @doc "Writes a payload to the port, if there is one."
  @spec command(Data.t(), binary) :: Data.t()
  def command(%{port: nil} = data, _payload), do: data

  def command(data, payload) do
    Port.command(data.port, payload)
    data
  rescue
    # The port has ended; its exit message is on the way and says so to everyone.
    ArgumentError -> data
  end

  @doc "Cancels a demand: one that is held still is not sent at all, and one that was cancelled is not cancelled again."
  @spec send_cancel(Data.t(), id) :: Data.t()
  def send_cancel(%{held: held} = data, demand_id) do
    {:demand, delivery} = data.owners[demand_id]

    cond do
      held != nil and List.keymember?(held, demand_id, 0) ->
        {owner, data} = disown(%{data | held: List.keydelete(held, demand_id, 0)}, demand_id)
        fail(owner, Error.new(:cancelled, "the demand was cancelled"))
        %{data | protocol: Protocol.close(data.protocol, demand_id)}

      delivery.cancelled ->
        data

      true ->
        data = own(data, demand_id, {:demand, %{delivery | cancelled: true}})
        send_now(data, :nobody, &Protocol.cancel(&1, demand_id))
    end
  end

  # While draining, what is about running demands goes to the service that has them.
  defp send_now(data, owner, build) do
    case build.(data.protocol) do
      {:ok, id, payload, protocol} -> %{data | protocol: protocol} |> command(payload) |> own(id, owner)
      {:error, error} -> tap(data, fn _ -> warn("a request was not sent: #{Exception.message(error)}") end)
    end
  end

  @doc "Asks the service to drain, whatever is held."
  @spec drain(Data.t(), non_neg_integer) :: {:ok, Data.t()} | {:error, Error.t()}
  def drain(data, timeout_ms) do
    with {:ok, id, payload, protocol} <- Protocol.request(data.protocol, "drain", [timeout_ms]) do
      {:ok, %{data | protocol: protocol} |> command(payload) |> own(id, :drained)}
    end
  end

  ## Credit

  # The credit of what was taken is given back here: by delivery and the look of a mailbox, or as the consumer says.
  @doc "Keeps the demand as it is now, and gives the service the credit that is due."
  @spec give(Data.t(), id, {non_neg_integer, Delivery.t()}) :: Data.t()
  def give(data, id, {grant, delivery}) do
    data = own(data, id, {:demand, delivery})
    if grant > 0, do: command(data, Protocol.credit(id, grant)), else: data
  end

  @doc "Looks into the mailboxes of a demand's consumers, and gives what credit they allow."
  @spec look_again(Data.t(), id) :: Data.t()
  def look_again(data, id) do
    case data.owners do
      %{^id => {:demand, delivery}} -> give(data, id, Delivery.grant(delivery))
      _ -> data
    end
  end

  @doc "Sends what was held to the service that is ready now."
  @spec send_held({id, binary}, Data.t()) :: Data.t()
  def send_held({id, payload}, data) do
    case Protocol.recheck(data.protocol, id, payload) do
      {:ok, _protocol} ->
        transmit(data, id, payload)

      {:error, error, protocol} ->
        {owner, data} = disown(%{data | protocol: protocol}, id)
        fail(owner, error)
        data
    end
  end

  ## Owners

  @doc "Remembers whose an id is."
  @spec own(Data.t(), id, term) :: Data.t()
  def own(data, id, owner), do: %{data | owners: Map.put(data.owners, id, owner)}

  @doc "The id is over; returns whose it was."
  @spec disown(Data.t(), id) :: {term, Data.t()}
  def disown(data, id) do
    {owner, owners} = Map.pop(data.owners, id)
    {owner, forget(%{data | owners: owners}, owner)}
  end

  @doc "Nobody receives the demand any more; it is open until the service has ended it."
  @spec release(Data.t(), id) :: Data.t()
  def release(data, id) do
    {:demand, delivery} = owner = data.owners[id]
    data |> forget(owner) |> own(id, {:demand, %{delivery | to: [], monitors: %{}}})
  end

  @doc "Nobody is watched, and no reference found, for that owner any more."
  @spec forget(Data.t(), term) :: Data.t()
  def forget(data, {:demand, delivery}) do
    Heir.forget(data.heir, delivery)
    data = unwatch(data, delivery)
    %{data | refs: Map.delete(data.refs, delivery.ref)}
  end

  def forget(data, _owner), do: data

  defp unwatch(data, delivery) do
    Delivery.forget(delivery)
    %{data | monitors: Map.drop(data.monitors, Map.keys(delivery.monitors))}
  end

  @doc "One of those who keep a demand alive has died. Who receives it, if anybody lives who does, learns its end from the service."
  @spec watcher_died(Data.t(), reference) :: Data.t()
  def watcher_died(data, monitor) do
    {id, monitors} = Map.pop(data.monitors, monitor)
    {:demand, delivery} = data.owners[id]
    data = %{data | monitors: monitors}

    case Delivery.abandoned(delivery, monitor) do
      {true, delivery} ->
        data |> unwatch(delivery) |> own(id, {:demand, %{delivery | monitors: %{}}}) |> send_cancel(id)

      {false, delivery} ->
        own(data, id, {:demand, delivery})
    end
  end

  ## Ends

  @doc "Tells an owner what went wrong."
  @spec fail(term, Error.t()) :: term
  def fail({:call, from, _note}, error), do: :gen_statem.reply(from, {:error, error})

  def fail({:demand, delivery}, error),
    do: Delivery.ended(delivery, {:demand_error, delivery.node, error}, %{})

  def fail(_nobody, _error), do: :ok

  defp warn(text), do: Logger.warning(text, domain: [:demand_port])
end
