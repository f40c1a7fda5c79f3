defmodule DemandPort.Connection do
  @moduledoc """
  The process that owns the port: it starts the service, sends requests, and hands each message to whom it is for.

  It never waits for the service. A request is sent and its caller remembered; the reply finds the caller by the id.

      starting ──ready──▶ ready ──restart/1──▶ draining ──drained──▶ starting
          │                 │                      │
          └────port ended, goodbye, unreadable payload, start timeout────▶ down ──delay──▶ starting

  - *starting*: what is asked is held (at most `max_pending`) and sent in order once the service is ready.
  - *ready*: requests go out as they come.
  - *draining*: what runs is finished, what is asked is held for the next service. A service that does not end what runs
    when its time is over is killed.
  - *down*: every request and demand that the service had was answered with a typed error; what is asked now is held.
    The first restart comes at once, later ones after a growing delay; more than `max_restarts` within a minute end
    this process, and its supervisor decides.

  In a new service, sessions that were opened with `restore: true` are opened again, before anything that was held.

  All writes go through `Port.command/2` here. It suspends this process, and no other, when more bytes wait for the
  service than two of the largest messages.

  The functions below are what `DemandPort` is made of; use that module.
  """

  @behaviour :gen_statem

  require Logger

  import DemandPort.Connection.Requests

  alias DemandPort.Connection.{Data, Heir}
  alias DemandPort.{Delivery, Error, HostCalls, Launch, Msgpack, Protocol, Restore, Subscriptions, Telemetry}

  @client "demand_port/#{Mix.Project.config()[:version]} elixir"
  @levels %{none: 0, error: 1, warning: 2, info: 3, debug: 4}
  @restarts_within_ms 60_000
  @first_delay_ms 100
  @longest_delay_ms 10_000
  # How often the mailbox of a consumer is looked into that holds all it may.
  @look_again_ms 10
  # What a service is given beyond the time to drain, to say that it has.
  @drain_grace_ms 5_000

  @typedoc "What is to be remembered of a request once the service has taken it."
  @type note ::
          nil
          | {:opened, String.t(), Restore.t() | nil, DemandPort.Host.t() | nil, owner :: pid | nil}
          | {:edited, String.t(), [map]}
          | {:closed, String.t()}

  ## Called by the sender

  @doc "Starts a service; the options are those of `DemandPort.start_link/1`, validated."
  @spec start_link(keyword) :: :gen_statem.start_ret()
  def start_link(options) do
    case options[:name] do
      nil -> :gen_statem.start_link(__MODULE__, options, [])
      name when is_atom(name) -> :gen_statem.start_link({:local, name}, __MODULE__, options, [])
      other -> :gen_statem.start_link(other, __MODULE__, options, [])
    end
  end

  @doc "Sends a request and waits for its reply. Encodes in the calling process."
  @spec request(GenServer.server(), String.t(), [term], timeout, note) :: {:ok, term} | {:error, Error.t()}
  def request(server, type, fields, timeout, note \\ nil) do
    with {:ok, fields} <- encode(fields), do: call(server, {:request, type, fields, note}, timeout)
  end

  @doc "Sends a demand; its messages go to `delivery.to`."
  @spec demand(GenServer.server(), Delivery.t(), timeout) :: :ok | {:error, Error.t()}
  def demand(server, delivery, timeout), do: call(server, {:demand, delivery}, timeout)

  @doc "Sends a demand without waiting; a refusal arrives as `:demand_error`, like any other end."
  @spec cast_demand(pid, Delivery.t()) :: :ok
  def cast_demand(server, delivery), do: GenServer.cast(server, {:demand, delivery})

  @doc "Closes a session whose `open` nobody waits for any more."
  @spec close_session(GenServer.server(), String.t()) :: :ok
  def close_session(server, name), do: GenServer.cast(server, {:close, name})

  @doc "Cancels a demand; its terminal message follows. Does nothing for one that has ended."
  @spec cancel(GenServer.server(), reference) :: :ok
  def cancel(server, ref), do: GenServer.cast(server, {:cancel, ref})

  @doc "Cancels a demand that nobody waits for any more; nothing of it is delivered."
  @spec abandon(GenServer.server(), reference) :: :ok
  def abandon(server, ref), do: GenServer.cast(server, {:abandon, ref})

  @doc "The consumer of a demand took `n` chunks, where credit follows that."
  @spec consumed(GenServer.server(), reference, pos_integer) :: :ok
  def consumed(server, ref, n), do: GenServer.cast(server, {:consumed, ref, n})

  @doc "Calls the connection itself."
  @spec call(GenServer.server(), term, timeout) :: term
  def call(server, message, timeout) do
    GenServer.call(server, message, timeout)
  catch
    :exit, {:timeout, _} -> {:error, Error.new(:deadline_exceeded, "no reply within #{timeout} ms")}
    :exit, {_reason, {GenServer, :call, _}} -> {:error, unavailable("the connection is not running")}
  end

  @doc "The error of everything that was open, or is asked for, while there is no service."
  @spec unavailable(String.t()) :: Error.t()
  def unavailable(text), do: Error.new(:backend_unavailable, text, retryable: true)

  defp encode(fields) do
    Enum.reduce_while(Enum.reverse(fields), {:ok, []}, fn field, {:ok, encoded} ->
      case Msgpack.encode(field) do
        {:ok, bytes} -> {:cont, {:ok, [{:encoded, IO.iodata_to_binary(bytes)} | encoded]}}
        {:error, error} -> {:halt, {:error, error}}
      end
    end)
  end

  ## Start

  @impl true
  def callback_mode, do: :state_functions

  @impl true
  def init(options) do
    # An exit of the port is a message, and a shutdown runs terminate/3, which tells everyone who waits.
    Process.flag(:trap_exit, true)
    # A flood of frames stays off this process's heap, where the garbage collector would copy it.
    Process.flag(:message_queue_data, :off_heap)
    {:ok, tasks} = Task.Supervisor.start_link()
    protocol = Protocol.new(options[:max_frame_bytes])
    data = %Data{options: options, tasks: tasks, heir: Heir.start(), protocol: protocol}

    case launch(data) do
      {:ok, data} -> {:ok, :starting, data, start_actions(data)}
      {:error, error} -> {:stop, error}
    end
  end

  defp launch(data) do
    with {:ok, port} <- Launch.open(data.options) do
      {:ok, %{data | port: port, started: System.monotonic_time()}}
    end
  end

  defp start_actions(data), do: [{:state_timeout, data.options[:start_timeout_ms], :not_ready}]

  ## The states

  @doc false
  def starting(:state_timeout, :not_ready, data) do
    kill("the service was not ready within #{data.options[:start_timeout_ms]} ms", data)
  end

  def starting(type, content, data), do: common(type, content, data)

  @doc false
  def ready({:timeout, :pulse}, :ask, data) do
    data = send_own(data, :pulse, &Protocol.request(&1, "ping", []))
    {:keep_state, data, [{{:timeout, :pulse}, data.options[:hang_timeout_ms], :none}]}
  end

  # Even one whose nodes hold it up answers pings: this one is stopped, or stuck in what cannot be interrupted.
  def ready({:timeout, :pulse}, :none, data) do
    kill("the service did not answer within #{data.options[:hang_timeout_ms]} ms", data)
  end

  def ready({:timeout, :health}, :ask, data) do
    case open(data, &Protocol.request(&1, "health", [])) do
      {:ok, id, data} -> {:keep_state, own(data, id, :health)}
      {:error, _full} -> {:keep_state_and_data, health_actions(data)}
    end
  end

  def ready({:call, from}, {:restart, timeout_ms}, data) do
    case drain(data, timeout_ms) do
      {:ok, data} ->
        actions = [{:state_timeout, timeout_ms + @drain_grace_ms, :stuck}]
        {:next_state, :draining, %{data | held: [], restarting: [from]}, actions}

      {:error, error} ->
        {:keep_state, data, {:reply, from, {:error, error}}}
    end
  end

  def ready(type, content, data), do: common(type, content, data)

  @doc false
  def draining({:call, from}, {:restart, _timeout_ms}, data) do
    {:keep_state, %{data | restarting: [from | data.restarting]}}
  end

  def draining(:internal, :drained, data) do
    close(data.port)
    error = unavailable("the service was restarted")
    data |> flush_port() |> fail_sent(error) |> start_again()
  end

  def draining(:state_timeout, :stuck, data) do
    kill("the service did not drain in its time", data)
  end

  def draining(type, content, data), do: common(type, content, data)

  @doc false
  def down(:state_timeout, :start, data), do: start_again(data)
  def down(type, content, data), do: common(type, content, data)

  ## What is the same in every state: from callers

  defp common({:call, from}, {:request, type, fields, note}, data) do
    case open(data, &Protocol.request(&1, type, fields)) do
      {:ok, id, data} -> {:keep_state, own(data, id, {:call, from, note})}
      {:error, error} -> {:keep_state, data, {:reply, from, {:error, error}}}
    end
  end

  defp common({:call, from}, {:demand, delivery}, data) do
    case open_demand(data, delivery) do
      {:ok, data} -> {:keep_state, data, {:reply, from, :ok}}
      {:error, error} -> {:keep_state, data, {:reply, from, {:error, error}}}
    end
  end

  defp common({:call, from}, {:restart, _timeout_ms}, data) do
    # It is on its way already.
    {:keep_state, %{data | restarting: [from | data.restarting]}}
  end

  defp common({:call, from}, {:subscribe, session, subscriber, options}, data) do
    {since, subscriptions} = Subscriptions.add(data.subscriptions, session, subscriber, options)
    data = %{data | subscriptions: subscriptions}

    case subscribe(data, session, since) do
      {:ok, id, data} ->
        {:keep_state, own(data, id, {:call, from, {:subscribed, session, subscriber}})}

      {:error, error} ->
        {:keep_state, unsubscribe(data, session, subscriber), {:reply, from, {:error, error}}}
    end
  end

  defp common({:call, from}, {:unsubscribe, session, subscriber}, data) do
    {:keep_state, unsubscribe(data, session, subscriber), {:reply, from, :ok}}
  end

  defp common({:call, from}, :info, data), do: {:keep_state, data, {:reply, from, {:ok, about(data)}}}

  defp common({:call, from}, _for_a_pool_or_cluster, data) do
    error = Error.new(:bad_message, "this is one port, and no pool or cluster: use DemandPort")
    {:keep_state, data, {:reply, from, {:error, error}}}
  end

  defp common(:cast, {:demand, delivery}, data) do
    case open_demand(data, delivery) do
      {:ok, data} ->
        {:keep_state, data}

      {:error, error} ->
        Delivery.deliver(delivery, {:demand_error, delivery.node, error})
        :keep_state_and_data
    end
  end

  defp common(:cast, {:close, name}, data), do: {:keep_state, close_session_of(data, name)}

  defp common(:cast, {:cancel, ref}, data), do: with_ref(data, ref, &send_cancel(data, &1))

  defp common(:cast, {:abandon, ref}, data),
    do: with_ref(data, ref, &(data |> release(&1) |> send_cancel(&1)))

  defp common(:cast, {:consumed, ref, n}, data) do
    with_ref(data, ref, fn id ->
      {:demand, delivery} = data.owners[id]
      give(data, id, Delivery.consumed(delivery, n))
    end)
  end

  # What a node of this program streams, and what it answers.
  defp common(:cast, {kind, {call_id, _ref} = call, payload}, data) when kind in [:answer, :answer_stream] do
    case {HostCalls.open?(data.hosts, call), Protocol.fits(data.protocol, payload)} do
      {false, _} ->
        # Nobody wants it any more; perhaps another call has that number now.
        :keep_state_and_data

      {true, :ok} when kind == :answer_stream ->
        {:keep_state, command(data, payload)}

      {true, :ok} ->
        {:keep_state, command(%{data | hosts: HostCalls.answered(data.hosts, call_id)}, payload)}

      {true, {:error, error}} ->
        {:keep_state,
         answer(%{data | hosts: HostCalls.cancel(data.hosts, call_id)}, call_id, {:error, error})}
    end
  end

  ## From the port

  defp common(:info, {port, {:data, payload}}, %{port: port} = data) do
    {event, protocol} = Protocol.handle(data.protocol, payload)
    event(event, %{data | protocol: protocol})
  end

  defp common(:info, {port, {:exit_status, status}}, %{port: port} = data) do
    lost(unavailable("the service ended with exit status #{status}"), data)
  end

  defp common(:info, {:EXIT, port, reason}, %{port: port} = data) do
    lost(unavailable("the port was closed: #{inspect(reason)}"), data)
  end

  # Of a port before this one.
  defp common(:info, {port, _}, _data) when is_port(port), do: :keep_state_and_data
  defp common(:info, {:EXIT, port, _reason}, _data) when is_port(port), do: :keep_state_and_data

  ## From those who are watched

  defp common(:info, {:DOWN, monitor, :process, pid, reason}, data) do
    cond do
      is_map_key(data.monitors, monitor) -> {:keep_state, watcher_died(data, monitor)}
      is_map_key(data.keepers, monitor) -> {:keep_state, owner_died(data, monitor)}
      HostCalls.monitor?(data.hosts, monitor) -> {:keep_state, call_died(data, monitor, reason)}
      true -> {:keep_state, drop_subscriber(data, pid)}
    end
  end

  defp common(:info, {:kill, pid}, _data) do
    Process.exit(pid, :kill)
    :keep_state_and_data
  end

  defp common(:info, {:EXIT, pid, reason}, data) do
    if pid == data.tasks, do: {:stop, reason, data}, else: :keep_state_and_data
  end

  defp common({:timeout, {:look, id}}, :again, data),
    do: {:keep_state, look_again(data, id), look_actions(data, id)}

  # They begin anew when the next service is ready.
  defp common({:timeout, name}, _, _data) when name in [:health, :pulse], do: :keep_state_and_data

  defp common(:info, message, _data) do
    Logger.warning("unexpected message: #{inspect(message, limit: 20)}", domain: [:demand_port])
    :keep_state_and_data
  end

  @impl true
  def terminate(reason, _state, data) do
    error = data.failure || unavailable("the connection stopped: #{inspect(reason, limit: 20)}")

    Enum.each(data.owners, fn {_id, owner} ->
      forget(data, owner)
      fail(owner, error)
    end)

    for name <- Subscriptions.sessions(data.subscriptions),
        do: Subscriptions.close(data.subscriptions, name, error)

    reply_all(data.restarting, {:error, error})
    if data.port, do: close(data.port)
  end

  # Crash reports say how much was open, not what the values and prompts were.
  @impl true
  def format_status(_reason, [_dictionary, state, %Data{} = data]) do
    [state: state, port: data.port, open: map_size(data.owners), failure: data.failure]
  end

  ## Losing the service, and the next one

  # It is there and does not do what it should in its time.
  defp kill(text, data) do
    Launch.kill(data.port)
    lost(unavailable(text), data)
  end

  defp lost(error, data) do
    now = System.monotonic_time(:millisecond)
    downs = [now | Enum.filter(data.downs, &(now - &1 < @restarts_within_ms))]
    close(data.port)
    # What it could not start with, it will not start with a second time either.
    fatal = error.code == :unsupported_protocol
    count = length(downs)
    {again, delay} = {not fatal and count <= data.options[:max_restarts], delay_ms(count)}
    measured = %{count: count, delay_ms: delay}
    Telemetry.execute([:connection, :down], measured, %{server: self(), error: error})
    data = data |> Map.put(:downs, downs) |> flush_port() |> fail_sent(error)

    cond do
      not again -> {:stop, {:shutdown, error}, %{data | failure: error}}
      count == 1 -> start_again(data)
      true -> {:next_state, :down, data, {:state_timeout, delay, :start}}
    end
  end

  defp delay_ms(1), do: 0
  defp delay_ms(count), do: min(@first_delay_ms * Integer.pow(2, min(count - 2, 10)), @longest_delay_ms)

  # Everything that was sent is over. What is held was not sent, and is for the next service, unless this one never
  # was ready: then nobody shall wait longer for the same.
  defp fail_sent(data, error) do
    held = if data.info, do: data.held || [], else: []
    kept = Enum.map(held, &elem(&1, 0))
    {waiting, sent} = Map.split(data.owners, kept)

    data = Enum.reduce(sent, data, fn {_id, owner}, data -> data |> forget(owner) |> failed(owner, error) end)
    sessions = Map.keys(data.sessions)
    subscribing = for {_id, {:call, _from, {:subscribed, session, pid}}} <- waiting, do: {session, pid}

    %{
      data
      | owners: waiting,
        held: held,
        open: MapSet.new(Map.keys(data.sessions)),
        port: nil,
        info: nil,
        protocol: Protocol.restarted(data.protocol, kept),
        hosts: HostCalls.restarted(data.hosts, sessions),
        subscriptions: Subscriptions.restarted(data.subscriptions, sessions, subscribing, error)
    }
  end

  defp failed(data, owner, error) do
    fail(owner, error)

    case owner do
      {:call, _from, {:subscribed, session, subscriber}} ->
        {_left, subscriptions} = Subscriptions.remove(data.subscriptions, session, subscriber)
        %{data | subscriptions: subscriptions}

      _ ->
        data
    end
  end

  defp start_again(data) do
    case launch(data) do
      {:ok, data} -> {:next_state, :starting, data, start_actions(data)}
      {:error, error} -> lost(error, %{data | port: nil})
    end
  end

  defp flush_port(%{port: port} = data) do
    receive do
      {^port, _} -> flush_port(data)
      {:EXIT, ^port, _} -> flush_port(data)
    after
      0 -> data
    end
  end

  ## Events

  defp event({:ready, info}, %{info: nil} = data) do
    if info["protocol"] == Protocol.version() do
      measured = %{duration: System.monotonic_time() - data.started}
      about = %{server: self(), os_pid: info["os_pid"], version: info["version"]}
      Telemetry.execute([:connection, :ready], measured, about)
      data = become_ready(%{data | info: info})
      {:next_state, :ready, data, health_actions(data) ++ pulse_actions(data)}
    else
      text = "the service speaks protocol #{inspect(info["protocol"])}, this client #{Protocol.version()}"
      lost(Error.new(:unsupported_protocol, text), data)
    end
  end

  defp event({:ready, info}, data), do: event({:unexpected, ["ready", info]}, data)

  defp event({:reply, id, result}, data) do
    {owner, data} = disown(data, id)
    replied(owner, result, data)
  end

  defp event({:stream, id, message}, data) do
    case data.owners do
      %{^id => {:demand, delivery}} ->
        data = give(data, id, Delivery.chunk(delivery, message))
        {:keep_state, data, look_actions(data, id)}

      _ ->
        :keep_state_and_data
    end
  end

  defp event({:node_event, id, message}, data) do
    with {:demand, delivery} <- data.owners[id], do: Delivery.deliver(delivery, message)
    :keep_state_and_data
  end

  defp event({:session_event, session, event}, data) do
    {:keep_state, %{data | subscriptions: Subscriptions.event(data.subscriptions, session, event)}}
  end

  defp event({:terminal, id, message, meta}, data) do
    {owner, data} = disown(data, id)
    with {:demand, delivery} <- owner, do: Delivery.ended(delivery, message, meta)
    {:keep_state, data}
  end

  defp event({:execute, call}, data) do
    case HostCalls.start(data.hosts, call, data.tasks) do
      {:ok, hosts} -> {:keep_state, %{data | hosts: hosts}}
      {:error, error} -> {:keep_state, answer(data, call.id, {:error, error})}
    end
  end

  defp event({:cancel_call, call_id}, data) do
    {:keep_state, %{data | hosts: HostCalls.cancel(data.hosts, call_id)}}
  end

  defp event({:log, level, logger, text, metadata}, data) do
    if @levels[level] <= @levels[data.options[:log_level]] do
      Logger.log(level, fn -> to_text(text) end,
        domain: [:demand_port],
        service_logger: logger,
        service: metadata
      )
    end

    :keep_state_and_data
  end

  defp event({:goodbye, error}, data), do: lost(error, data)
  defp event({:broken, error}, data), do: lost(error, data)
  defp event(:part, data), do: {:keep_state, data}

  defp event({:unexpected, message}, data) do
    warn("the service sent what nothing open expects: #{inspect(message, limit: 20, printable_limit: 200)}")
    {:keep_state, data}
  end

  defp replied({:call, from, note}, result, data) do
    :gen_statem.reply(from, result)
    {:keep_state, noted(note, result, data)}
  end

  defp replied({:closing, session}, result, data), do: {:keep_state, noted({:closed, session}, result, data)}

  defp replied({:note, text}, {:error, error}, data) do
    warn("#{text}: #{Exception.message(error)}")
    {:keep_state, data}
  end

  defp replied({:restored, session}, {:ok, _}, data),
    do: {:keep_state, %{data | subscriptions: Subscriptions.restored(data.subscriptions, session)}}

  defp replied({:restored, session}, {:error, error}, data),
    do: {:keep_state, not_restored(data, session, error)}

  defp replied(:drained, _result, data), do: {:keep_state, data, {:next_event, :internal, :drained}}

  defp replied(:pulse, _result, data), do: {:keep_state, data, pulse_actions(data)}

  defp replied(:health, {:ok, health}, data) do
    measured = %{
      memory_bytes: health["memory_bytes"],
      demands: health["demands"]["open"],
      sessions: health["sessions"]["open"],
      unsent_bytes: health["unsent_bytes"]
    }

    Telemetry.execute([:health], measured, %{server: self(), health: health})
    {:keep_state, data, health_actions(data)}
  end

  defp replied(:health, {:error, _error}, data), do: {:keep_state, data, health_actions(data)}

  defp replied(_nobody, _result, data), do: {:keep_state, data}

  defp noted({:opened, name, restore, host, owner}, {:ok, _}, data) do
    sessions = if restore, do: Map.put(data.sessions, name, restore), else: data.sessions
    keepers = if owner, do: Map.put(data.keepers, Process.monitor(owner), name), else: data.keepers
    hosts = HostCalls.opened(data.hosts, name, host)
    %{data | sessions: sessions, keepers: keepers, open: MapSet.put(data.open, name), hosts: hosts}
  end

  defp noted({:edited, name, operations}, {:ok, _}, data) when is_map_key(data.sessions, name) do
    %{data | sessions: Map.update!(data.sessions, name, &Restore.edited(&1, operations))}
  end

  defp noted({:closed, name}, {:ok, _}, data), do: forget_session(data, name, nil)

  defp noted({:subscribed, session, subscriber}, {:error, _}, data),
    do: unsubscribe(data, session, subscriber)

  defp noted({:subscribed, session, subscriber}, {:ok, %{"next" => next}}, data) do
    %{data | subscriptions: Subscriptions.begin_at(data.subscriptions, session, subscriber, next)}
  end

  defp noted(_nothing, _result, data), do: data

  defp owner_died(data, monitor) do
    {name, keepers} = Map.pop(data.keepers, monitor)
    close_session_of(%{data | keepers: keepers}, name)
  end

  # Nobody waits for the reply.
  defp close_session_of(data, name),
    do: send_own(data, {:closing, name}, &Protocol.request(&1, "close", [name]))

  defp forget_session(data, name, error) do
    kept = for {monitor, ^name} <- data.keepers, do: monitor
    Enum.each(kept, &Process.demonitor(&1, [:flush]))

    %{
      data
      | keepers: Map.drop(data.keepers, kept),
        sessions: Map.delete(data.sessions, name),
        open: MapSet.delete(data.open, name),
        subscriptions: Subscriptions.close(data.subscriptions, name, error),
        hosts: HostCalls.closed(data.hosts, name)
    }
  end

  ## Ready

  defp become_ready(data) do
    held = Enum.reverse(data.held)
    reply_all(data.restarting, :ok)
    data = %{data | held: nil, restarting: []} |> hello() |> restore() |> subscribe_again()
    Enum.reduce(held, data, &send_held/2)
  end

  defp hello(data), do: send_own(data, {:note, "the service refused hello"}, &Protocol.hello(&1, @client))

  # Each is one request: it is there as it was, or it is not there.
  defp restore(data) do
    Enum.reduce(data.sessions, data, fn {name, session}, data ->
      case open(data, &Protocol.request(&1, "open", Restore.fields(session, name))) do
        {:ok, id, data} -> own(data, id, {:restored, name})
        {:error, error} -> not_restored(data, name, error)
      end
    end)
  end

  defp not_restored(data, session, error) do
    warn("the session #{session} could not be restored: #{Exception.message(error)}")
    forget_session(data, session, error)
  end

  # A new service counts from 0 again.
  defp subscribe_again(data) do
    restored = Enum.filter(Subscriptions.sessions(data.subscriptions), &is_map_key(data.sessions, &1))

    Enum.reduce(restored, data, fn session, data ->
      text = "the events of session #{session} are not subscribed to any more"
      send_own(data, {:note, text}, &Protocol.request(&1, "subscribe", [session, %{"since" => 0}]))
    end)
  end

  defp look_actions(data, id) do
    case data.owners do
      %{^id => {:demand, delivery}} ->
        if Delivery.stalled?(delivery), do: [{{:timeout, {:look, id}}, @look_again_ms, :again}], else: []

      _ ->
        []
    end
  end

  defp pulse_actions(data) do
    case data.options[:hang_timeout_ms] do
      :infinity -> []
      most -> [{{:timeout, :pulse}, div(most, 2), :ask}]
    end
  end

  defp health_actions(data) do
    case data.options[:health_interval_ms] do
      :infinity -> []
      interval -> [{{:timeout, :health}, interval, :ask}]
    end
  end

  ## Subscriptions

  defp subscribe(data, session, since) do
    options = if since, do: %{"since" => since}, else: %{}
    open(data, &Protocol.request(&1, "subscribe", [session, options]))
  end

  defp unsubscribe(data, session, subscriber) do
    case Subscriptions.remove(data.subscriptions, session, subscriber) do
      {:last, subscriptions} -> stop_events(%{data | subscriptions: subscriptions}, session)
      {_, subscriptions} -> %{data | subscriptions: subscriptions}
    end
  end

  defp drop_subscriber(data, pid) do
    {empty, subscriptions} = Subscriptions.died(data.subscriptions, pid)
    Enum.reduce(empty, %{data | subscriptions: subscriptions}, &stop_events(&2, &1))
  end

  defp stop_events(data, session),
    do: send_own(data, :nobody, &Protocol.request(&1, "unsubscribe", [session]))

  ## Calls of this program's nodes

  defp call_died(data, monitor, reason) do
    {call_id, hosts} = HostCalls.died(data.hosts, monitor, reason)
    answer(%{data | hosts: hosts}, call_id, {:error, HostCalls.crash(reason)})
  end

  defp answer(data, call_id, answer) do
    {:ok, payload} = Protocol.answer(call_id, answer)
    command(data, payload)
  end

  ## Small things

  defp with_ref(data, ref, change) do
    case data.refs do
      %{^ref => id} -> {:keep_state, change.(id)}
      _ -> :keep_state_and_data
    end
  end

  defp reply_all(callers, reply), do: Enum.each(callers, &:gen_statem.reply(&1, reply))

  defp about(data) do
    recent = System.monotonic_time(:millisecond) - @restarts_within_ms
    demands = Enum.count(data.owners, &match?({_, {:demand, _}}, &1))

    %{
      os_pid: data.info["os_pid"],
      version: data.info["version"],
      limits: data.info["limits"],
      open_requests: map_size(data.owners) - demands,
      open_demands: demands,
      open_sessions: MapSet.size(data.open),
      held: length(data.held || []),
      restarts: Enum.count(data.downs, &(&1 > recent)),
      restorable_sessions: Map.keys(data.sessions),
      host_calls: HostCalls.count(data.hosts)
    }
  end

  defp close(nil), do: true

  defp close(port) do
    Port.close(port)
  rescue
    ArgumentError -> true
  end

  defp to_text(text) when is_binary(text), do: text
  defp to_text(other), do: inspect(other)

  defp warn(text), do: Logger.warning(text, domain: [:demand_port])
end
