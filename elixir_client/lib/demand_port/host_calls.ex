defmodule DemandPort.HostCalls do
  @moduledoc false
  # The calls that the service made of this program's nodes, each a supervised process. Belongs to the connection.

  alias DemandPort.{Error, Host, Telemetry}

  @grace_ms 5_000
  # Characters of what it says of a crash, and of where it was.
  @longest 10_000

  # hosts: session => host      calls: call id => call      monitors: monitor => call id
  # A service numbers its calls from 1, as the one before it did: `ref` tells an answer that comes late from one to the
  # call that has the number now.
  defstruct hosts: %{}, calls: %{}, monitors: %{}

  @type t :: %__MODULE__{}
  @typedoc "A call as its process names it."
  @type name :: {id :: pos_integer, reference}

  @spec opened(t, String.t(), Host.t() | nil) :: t
  def opened(state, session, nil), do: closed(state, session)
  def opened(state, session, host), do: %{state | hosts: Map.put(state.hosts, session, host)}

  @spec closed(t, String.t()) :: t
  def closed(state, session), do: %{state | hosts: Map.delete(state.hosts, session)}

  @spec start(t, map, pid) :: {:ok, t} | {:error, Error.t()}
  def start(state, call, tasks) do
    case Map.fetch(state.hosts, call.session) do
      {:ok, host} ->
        {inputs, call} = Map.pop!(call, :inputs)
        call = call |> Map.put(:ref, make_ref()) |> Map.put(:started, System.monotonic_time())
        Telemetry.execute([:host, :start], %{monotonic_time: call.started}, about(call))
        {:ok, pid} = Task.Supervisor.start_child(tasks, Host, :run, [host, call, self()], shutdown: @grace_ms)
        monitor = Process.monitor(pid)

        # Only what is watched may crash: its reason would be lost. A report of the crash shows what the process was
        # started with, so the inputs come later.
        send(pid, {:begin, call.ref, inputs})
        call = Map.merge(call, %{pid: pid, monitor: monitor})

        {:ok,
         %{
           state
           | calls: Map.put(state.calls, call.id, call),
             monitors: Map.put(state.monitors, monitor, call.id)
         }}

      :error ->
        {:error, Error.new(:host_unavailable, "the session #{call.session} was opened without a host")}
    end
  end

  @doc "Whether the service still waits for the answer to that very call."
  @spec open?(t, name) :: boolean
  def open?(state, {id, ref}), do: match?(%{^id => %{ref: ^ref}}, state.calls)

  @doc "Nobody wants the answer: the process is shut down, and killed if it takes too long."
  @spec cancel(t, pos_integer) :: t
  def cancel(state, call_id) do
    case pop(state, call_id) do
      {nil, state} ->
        state

      {call, state} ->
        Process.exit(call.pid, :shutdown)
        Process.send_after(self(), {:kill, call.pid}, @grace_ms)
        ended(call, :exception, %{reason: :cancelled})
        state
    end
  end

  @doc "There is a new service: nobody wants the calls of the one before, and `sessions` alone are open there."
  @spec restarted(t, [String.t()]) :: t
  def restarted(state, sessions) do
    state = state.calls |> Map.keys() |> Enum.reduce(state, &cancel(&2, &1))
    %{state | hosts: Map.take(state.hosts, sessions)}
  end

  @spec answered(t, pos_integer) :: t
  def answered(state, call_id) do
    {call, state} = pop(state, call_id)
    ended(call, :stop, %{})
    state
  end

  @spec monitor?(t, reference) :: boolean
  def monitor?(state, monitor), do: is_map_key(state.monitors, monitor)

  @doc "A process ended without an answer: which call's it was."
  @spec died(t, reference, term) :: {pos_integer, t}
  def died(state, monitor, reason) do
    call_id = Map.fetch!(state.monitors, monitor)
    {call, state} = pop(state, call_id)
    ended(call, :exception, %{reason: reason})
    {call_id, state}
  end

  @doc "The error of a call whose process ended so: what was raised, as it is told of a node in Python."
  @spec crash(reason :: term) :: Error.t()
  def crash({raised, [{_module, _function, _arity, _location} | _] = stacktrace}) do
    traceback = stacktrace |> Enum.map(&without_values/1) |> Exception.format_stacktrace() |> bounded()

    case Exception.normalize(:error, raised, stacktrace) do
      %Error{} = error -> %{error | traceback: traceback}
      exception -> Error.new(:node_failed, bounded(said(exception)), traceback: traceback)
    end
  end

  def crash(reason),
    do: Error.new(:node_failed, bounded("the host's process ended: #{Exception.format_exit(reason)}"))

  defp said(exception), do: "#{inspect(exception.__struct__)}: #{Exception.message(exception)}"

  # Where no clause matched, the arguments stand in the place of their number.
  defp without_values({module, function, arguments, location}) when is_list(arguments),
    do: {module, function, length(arguments), location}

  defp without_values(entry), do: entry

  defp bounded(text), do: String.slice(text, 0, @longest)

  @spec count(t) :: non_neg_integer
  def count(state), do: map_size(state.calls)

  defp pop(state, call_id) do
    case Map.pop(state.calls, call_id) do
      {nil, _calls} ->
        {nil, state}

      {call, calls} ->
        Process.demonitor(call.monitor, [:flush])
        {call, %{state | calls: calls, monitors: Map.delete(state.monitors, call.monitor)}}
    end
  end

  defp ended(call, how, more) do
    measured = %{duration: System.monotonic_time() - call.started}
    Telemetry.execute([:host, how], measured, Map.merge(about(call), more))
  end

  defp about(call), do: %{session: call.session, node: call.node, node_type: call.node_type}
end
