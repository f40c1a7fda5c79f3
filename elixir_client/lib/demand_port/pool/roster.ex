defmodule DemandPort.Pool.Roster do
  @moduledoc false
  # Who is chosen next: the member with the least to do. It asks the members at each choice, and adds what was promised
  # to them and is not open yet, so that a burst of callers does not all go to the one that was idle a moment ago.
  #
  # It has the pool's name: who takes that for a port is told, where a supervisor would crash, and all members with it.

  use GenServer

  alias DemandPort.{Connection, Error, Load, NoPort}

  # A connection answers in microseconds, unless its service has stopped reading; such a one is left alone for a while.
  @answer_ms 100
  @leave_alone_ms 1_000

  # name:     the pool's
  # members:  names, in the order of their index
  # promised: monitor of who opens a session => member
  # held:     {monitor of who restarts it, member}, or nil
  # silent:   member => until when it is not asked
  @enforce_keys [:name, :members]
  defstruct [:name, :members, :held, promised: %{}, silent: %{}]

  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(options), do: GenServer.start_link(__MODULE__, options, name: options[:name])

  @doc "The member to open a session on; promised until `opened/2`, or until the caller dies."
  @spec take(GenServer.server()) :: {:ok, member :: atom, reference} | {:error, Error.t()}
  def take(roster), do: Connection.call(roster, :take, :infinity)

  @doc "The session is open, or will not be."
  @spec opened(GenServer.server(), reference) :: :ok
  def opened(roster, promise), do: GenServer.cast(roster, {:opened, promise})

  @spec members(GenServer.server()) :: {:ok, [atom]} | {:error, Error.t()}
  def members(roster), do: Connection.call(roster, :members, :infinity)

  @doc "Gives a member no new sessions until `release/2`, or until the caller dies; one at a time."
  @spec hold(GenServer.server(), atom) :: {:ok, reference} | {:error, Error.t()}
  def hold(roster, member), do: Connection.call(roster, {:hold, member}, :infinity)

  @spec release(GenServer.server(), reference) :: :ok | {:error, Error.t()}
  def release(roster, hold), do: Connection.call(roster, {:release, hold}, :infinity)

  @impl true
  def init(options), do: {:ok, struct!(__MODULE__, options)}

  @impl true
  def handle_call(:take, {pid, _}, state) do
    {member, state} = choose(state)
    promise = Process.monitor(pid)
    {:reply, {:ok, member, promise}, %{state | promised: Map.put(state.promised, promise, member)}}
  end

  def handle_call(:members, _from, state), do: {:reply, {:ok, state.members}, state}

  def handle_call({:hold, member}, {pid, _}, %{held: nil} = state) do
    hold = Process.monitor(pid)
    {:reply, {:ok, hold}, %{state | held: {hold, member}}}
  end

  def handle_call({:hold, _member}, _from, state) do
    {:reply, {:error, Error.new(:draining, "the pool is being restarted already", retryable: true)}, state}
  end

  def handle_call({:release, hold}, _from, state), do: {:reply, :ok, forget(state, hold)}
  def handle_call(_for_a_port, _from, state), do: {:reply, {:error, no_port(state)}, state}

  @impl true
  def handle_cast({:opened, promise}, state), do: {:noreply, forget(state, promise)}

  def handle_cast(for_a_port, state) do
    NoPort.cast(for_a_port, no_port(state))
    {:noreply, state}
  end

  defp no_port(state), do: NoPort.error(state.name, :pool)

  @impl true
  def handle_info({:DOWN, monitor, :process, _, _}, state), do: {:noreply, forget(state, monitor)}
  def handle_info(_for_nobody, state), do: {:noreply, state}

  defp forget(state, monitor) do
    Process.demonitor(monitor, [:flush])
    held = if match?({^monitor, _}, state.held), do: nil, else: state.held
    %{state | held: held, promised: Map.delete(state.promised, monitor)}
  end

  # When nobody can be had, the first that is not restarted is as good as any: a connection holds what comes too early.
  defp choose(state) do
    now = System.monotonic_time(:millisecond)
    silent = Map.filter(state.silent, fn {_, until} -> until > now end)
    asked = state.members -- [held(state) | Map.keys(silent)]
    loads = Load.of(asked, @answer_ms)
    answered = Enum.map(loads, &elem(&1, 0))
    silent = for member <- asked -- answered, into: silent, do: {member, now + @leave_alone_ms}
    promised = state.promised |> Map.values() |> Enum.frequencies()
    {best(loads, promised) || fallback(state), %{state | silent: silent}}
  end

  # The first of those that weigh the same: members are in the order of their index.
  defp best([], _promised), do: nil

  defp best(loads, promised) do
    {member, _} =
      Enum.min_by(loads, fn {member, load} ->
        Load.weight(%{load | requests: Map.get(promised, member, 0)})
      end)

    member
  end

  defp fallback(state), do: List.first(state.members -- [held(state)]) || hd(state.members)

  defp held(%{held: {_, member}}), do: member
  defp held(_state), do: nil
end
