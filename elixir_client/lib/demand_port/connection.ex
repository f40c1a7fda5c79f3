defmodule DemandPort.Connection do
  @moduledoc """
  The process that owns the port: it starts the service, sends requests, and hands each message to whom it is for.

  It never waits for the service. A request is sent and its caller remembered; the reply finds the caller by the id.
  Requests that come before the service is ready are held (at most `max_pending`) and sent in order once it is.

      starting ──ready──▶ ready ──▶ down        port ended, goodbye, unreadable payload, start timeout

  *Down* is the end of the process: every open request is answered, and every open demand ended, with a typed error,
  then the process stops and its supervisor starts a new service. A demand whose receiver dies is cancelled.

  All writes go through `Port.command/2` here. It suspends this process, and no other, when more bytes wait for the
  service than two of the largest messages.

  The functions below are what `DemandPort` is made of; use that module.
  """

  use GenServer

  require Logger

  alias DemandPort.{Credit, Error, Launch, Msgpack, Protocol}

  @client "demand_port/#{Mix.Project.config()[:version]} elixir"
  @levels %{none: 0, error: 1, warning: 2, info: 3, debug: 4}

  @typedoc """
  A demand as its sender describes it. `watch` is the process whose death cancels it; `to` is where messages go,
  which for a waiting call is a process alias; `stream` says whether chunks are delivered.
  """
  @type demand :: %{
          ref: reference,
          session: String.t(),
          node: String.t(),
          options: map,
          credit: non_neg_integer | :infinity | nil,
          to: pid | {atom, node} | reference,
          watch: pid | {atom, node},
          tag: {:tag, term} | :untagged,
          stream: boolean
        }

  defmodule State do
    @moduledoc false
    @enforce_keys [:port, :protocol, :options]
    # owners:   id => {:call, from} | {:demand, demand, credit, monitor} | :nobody
    # refs:     demand reference => id        monitors: monitor reference => id
    # held:     {id, payload} to send once the service is ready, newest first; nil when it is
    # failure:  what open requests and demands are told when the process stops
    defstruct [:port, :protocol, :options, owners: %{}, refs: %{}, monitors: %{}, held: [], failure: nil]
  end

  ## Called by the sender

  @doc "Starts a service; the options are those of `DemandPort.start_link/1`, validated."
  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(options) do
    GenServer.start_link(__MODULE__, options, Keyword.take(options, [:name]))
  end

  @doc "Sends a request and waits for its reply. Encodes in the calling process."
  @spec request(GenServer.server(), String.t(), [term], timeout) :: {:ok, term} | {:error, Error.t()}
  def request(server, type, fields, timeout) do
    with {:ok, fields} <- encode(fields), do: call(server, {:request, type, fields}, timeout)
  end

  @doc "Sends a demand; its messages go to `demand.to`."
  @spec demand(GenServer.server(), demand, timeout) :: :ok | {:error, Error.t()}
  def demand(server, demand, timeout), do: call(server, {:demand, demand}, timeout)

  @doc "Sends a demand without waiting; a refusal arrives as `:demand_error`, like any other end."
  @spec cast_demand(pid, demand) :: :ok
  def cast_demand(server, demand), do: GenServer.cast(server, {:demand, demand})

  @doc "Cancels a demand; its terminal message follows. Does nothing for one that has ended."
  @spec cancel(GenServer.server(), reference) :: :ok
  def cancel(server, ref), do: GenServer.cast(server, {:cancel, ref})

  @doc "Cancels a demand that nobody waits for any more; nothing of it is delivered."
  @spec abandon(GenServer.server(), reference) :: :ok
  def abandon(server, ref), do: GenServer.cast(server, {:abandon, ref})

  @doc "The error of everything that was open, or is asked for, while there is no service."
  @spec unavailable(String.t()) :: Error.t()
  def unavailable(text), do: Error.new(:backend_unavailable, text, retryable: true)

  defp call(server, message, timeout) do
    GenServer.call(server, message, timeout)
  catch
    :exit, {:timeout, _} -> {:error, Error.new(:deadline_exceeded, "no reply within #{timeout} ms")}
    :exit, {_reason, {GenServer, :call, _}} -> {:error, unavailable("the connection is not running")}
  end

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
  def init(options) do
    # An exit of the port is a message, and a shutdown runs terminate/2, which tells everyone who waits.
    Process.flag(:trap_exit, true)
    # A flood of frames stays off this process's heap, where the garbage collector would copy it.
    Process.flag(:message_queue_data, :off_heap)

    case Launch.open(options) do
      {:ok, port} ->
        Process.send_after(self(), :start_timeout, options[:start_timeout_ms])
        {:ok, %State{port: port, protocol: Protocol.new(options[:max_frame_bytes]), options: options}}

      {:error, error} ->
        {:stop, error}
    end
  end

  ## From callers

  @impl true
  def handle_call({:request, type, fields}, from, state) do
    case open(state, &Protocol.request(&1, type, fields)) do
      {:ok, id, state} -> {:noreply, own(state, id, {:call, from})}
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  def handle_call({:demand, demand}, _from, state) do
    case open_demand(state, demand) do
      {:ok, state} -> {:reply, :ok, state}
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  @impl true
  def handle_cast({:demand, demand}, state) do
    case open_demand(state, demand) do
      {:ok, state} ->
        {:noreply, state}

      {:error, error} ->
        deliver(demand, {:demand_error, demand.node, error})
        {:noreply, state}
    end
  end

  def handle_cast({:cancel, ref}, state) do
    case state.refs do
      %{^ref => id} -> {:noreply, send_cancel(state, id)}
      _ -> {:noreply, state}
    end
  end

  def handle_cast({:abandon, ref}, state) do
    case state.refs do
      %{^ref => id} -> {:noreply, state |> release(id) |> send_cancel(id)}
      _ -> {:noreply, state}
    end
  end

  ## From the port

  @impl true
  def handle_info({port, {:data, payload}}, %{port: port} = state) do
    {event, protocol} = Protocol.handle(state.protocol, payload)
    event(event, %{state | protocol: protocol})
  end

  def handle_info({port, {:exit_status, status}}, %{port: port} = state) do
    stop({:service_exited, status}, unavailable("the service ended with exit status #{status}"), state)
  end

  def handle_info({:EXIT, port, reason}, %{port: port} = state) do
    stop({:port_closed, reason}, unavailable("the port was closed: #{inspect(reason)}"), state)
  end

  def handle_info(:start_timeout, %{held: nil} = state), do: {:noreply, state}

  def handle_info(:start_timeout, state) do
    text = "the service was not ready within #{state.options[:start_timeout_ms]} ms"
    stop(:start_timeout, unavailable(text), state)
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state) do
    case state.monitors do
      %{^monitor => id} -> {:noreply, state |> release(id) |> send_cancel(id)}
      _ -> {:noreply, state}
    end
  end

  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  def handle_info(message, state) do
    Logger.warning("unexpected message: #{inspect(message, limit: 20)}", domain: [:demand_port])
    {:noreply, state}
  end

  @impl true
  def terminate(reason, state) do
    error = state.failure || unavailable("the connection stopped: #{inspect(reason, limit: 20)}")
    Enum.each(state.owners, fn {_id, owner} -> fail(owner, error) end)
    close(state.port)
  end

  # Crash reports say how much was open, not what the values and prompts were.
  @impl true
  def format_status(_reason, [_dictionary, %State{} = state]) do
    [port: state.port, starting: state.held != nil, open: map_size(state.owners), failure: state.failure]
  end

  ## Events

  defp event({:ready, info}, %{held: nil} = state), do: event({:unexpected, ["ready", info]}, state)

  defp event({:ready, info}, state) do
    if info["protocol"] == Protocol.version() do
      {:noreply, become_ready(state)}
    else
      text = "the service speaks protocol #{inspect(info["protocol"])}, this client #{Protocol.version()}"
      stop(:unsupported_protocol, Error.new(:unsupported_protocol, text), state)
    end
  end

  defp event({:reply, id, result}, state) do
    {owner, state} = disown(state, id)

    case {owner, result} do
      {{:call, from}, _} -> GenServer.reply(from, result)
      {:hello, {:error, error}} -> warn("the service refused hello: #{Exception.message(error)}")
      _ -> :ok
    end

    {:noreply, state}
  end

  defp event({:stream, id, message}, state), do: {:noreply, stream(state, id, message)}

  defp event({:node_event, id, message}, state) do
    with {:demand, demand, _, _} <- state.owners[id], do: deliver(demand, message)
    {:noreply, state}
  end

  defp event({:terminal, id, message, _meta}, state) do
    {owner, state} = disown(state, id)
    with {:demand, demand, _, _} <- owner, do: deliver(demand, message)
    {:noreply, state}
  end

  defp event({:log, level, logger, text, metadata}, state) do
    if @levels[level] <= @levels[state.options[:log_level]] do
      Logger.log(level, fn -> to_text(text) end,
        domain: [:demand_port],
        service_logger: logger,
        service: metadata
      )
    end

    {:noreply, state}
  end

  defp event({:goodbye, error}, state), do: stop({:goodbye, error.code}, error, state)
  defp event({:broken, error}, state), do: stop({:unreadable, error.code}, error, state)
  defp event(:part, state), do: {:noreply, state}

  defp event({:unexpected, message}, state) do
    warn("the service sent what nothing open expects: #{inspect(message, limit: 20, printable_limit: 200)}")
    {:noreply, state}
  end

  defp become_ready(state) do
    held = Enum.reverse(state.held)
    Enum.reduce(held, hello(%{state | held: nil}), &send_held/2)
  end

  defp hello(state) do
    case open(state, &Protocol.hello(&1, @client)) do
      {:ok, id, state} ->
        own(state, id, :hello)

      {:error, error} ->
        warn("hello was not sent: #{Exception.message(error)}")
        state
    end
  end

  defp send_held({id, payload}, state) do
    case Protocol.recheck(state.protocol, id, payload) do
      {:ok, _protocol} ->
        transmit(state, id, payload)

      {:error, error, protocol} ->
        {owner, state} = disown(%{state | protocol: protocol}, id)
        fail(owner, error)
        state
    end
  end

  # The credit of what was delivered is given back here, by delivery.
  defp stream(state, id, message) do
    case state.owners do
      %{^id => {:demand, demand, credit, monitor}} ->
        if demand.stream, do: deliver(demand, message)
        {grant, credit} = Credit.delivered(credit)
        if grant > 0, do: command(state, Protocol.credit(id, grant))
        own(state, id, {:demand, demand, credit, monitor})

      _ ->
        state
    end
  end

  ## Requests

  defp open_demand(state, demand) do
    window = if demand.credit == nil, do: state.options[:credit], else: demand.credit
    options = with_credit(demand.options, window)

    with {:ok, id, state} <- open(state, &Protocol.demand(&1, demand.session, demand.node, options)) do
      monitor = Process.monitor(demand.watch)

      {:ok,
       %{
         own(state, id, {:demand, demand, Credit.new(window), monitor})
         | refs: Map.put(state.refs, demand.ref, id),
           monitors: Map.put(state.monitors, monitor, id)
       }}
    end
  end

  defp with_credit(options, :infinity), do: options
  defp with_credit(options, window), do: Map.put(options, "credit", window)

  defp open(state, build) do
    with :ok <- room(state),
         {:ok, id, payload, protocol} <- build.(state.protocol) do
      {:ok, id, transmit(%{state | protocol: protocol}, id, payload)}
    end
  end

  defp room(%{held: nil}), do: :ok

  # Until the service is ready, every open request is a held one.
  defp room(%{protocol: protocol, options: options}) do
    max = options[:max_pending]

    if map_size(protocol.open) < max do
      :ok
    else
      {:error, Error.new(:queue_full, "the service is starting and #{max} requests wait", retryable: true)}
    end
  end

  defp transmit(%{held: nil} = state, _id, payload) do
    command(state, payload)
    state
  end

  defp transmit(state, id, payload), do: %{state | held: [{id, payload} | state.held]}

  defp command(state, payload) do
    Port.command(state.port, payload)
  rescue
    # The port has ended; its exit message is on the way and says so to everyone.
    ArgumentError -> false
  end

  defp send_cancel(state, demand_id) do
    case open(state, &Protocol.request(&1, "cancel", [demand_id])) do
      {:ok, id, state} ->
        own(state, id, :nobody)

      {:error, error} ->
        warn("a cancel was not sent: #{Exception.message(error)}")
        state
    end
  end

  ## Owners

  defp own(state, id, owner), do: %{state | owners: Map.put(state.owners, id, owner)}

  defp disown(state, id) do
    state = forget(state, state.owners[id])
    {owner, owners} = Map.pop(state.owners, id)
    {owner, %{state | owners: owners}}
  end

  # Nobody receives the demand any more; its id stays open until the service has ended it.
  defp release(state, id), do: state |> forget(state.owners[id]) |> own(id, :nobody)

  defp forget(state, {:demand, demand, _credit, monitor}) do
    Process.demonitor(monitor, [:flush])
    %{state | refs: Map.delete(state.refs, demand.ref), monitors: Map.delete(state.monitors, monitor)}
  end

  defp forget(state, _owner), do: state

  defp deliver(%{tag: {:tag, tag}, to: to}, message), do: send(to, {tag, message})
  defp deliver(%{tag: :untagged, to: to}, message), do: send(to, message)

  defp fail({:call, from}, error), do: GenServer.reply(from, {:error, error})
  defp fail({:demand, demand, _, _}, error), do: deliver(demand, {:demand_error, demand.node, error})
  defp fail(_nobody, _error), do: :ok

  defp stop(reason, error, state), do: {:stop, reason, %{state | failure: error}}

  defp close(port) do
    Port.close(port)
  rescue
    ArgumentError -> true
  end

  defp to_text(text) when is_binary(text), do: text
  defp to_text(other), do: inspect(other)

  defp warn(text), do: Logger.warning(text, domain: [:demand_port])
end
