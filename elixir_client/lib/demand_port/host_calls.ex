defmodule DemandPort.HostCalls do
  @moduledoc false
  # The calls that the service made of this program's nodes, each a supervised process. Belongs to the connection.

  alias DemandPort.{Error, Host, Telemetry}

  @grace_ms 5_000

  # hosts: session => host      calls: call id => {pid, monitor, call}      monitors: monitor => call id
  defstruct hosts: %{}, calls: %{}, monitors: %{}

  @type t :: %__MODULE__{}

  @spec opened(t, String.t(), Host.t() | nil) :: t
  def opened(state, _session, nil), do: state
  def opened(state, session, host), do: %{state | hosts: Map.put(state.hosts, session, host)}

  @spec closed(t, String.t()) :: t
  def closed(state, session), do: %{state | hosts: Map.delete(state.hosts, session)}

  @spec start(t, map, pid) :: {:ok, t} | {:error, Error.t()}
  def start(state, call, tasks) do
    case Map.fetch(state.hosts, call.session) do
      {:ok, host} ->
        {:ok, pid} = Task.Supervisor.start_child(tasks, Host, :run, [host, call, self()], shutdown: @grace_ms)
        monitor = Process.monitor(pid)

        {:ok,
         %{
           state
           | calls: Map.put(state.calls, call.id, {pid, monitor, call}),
             monitors: Map.put(state.monitors, monitor, call.id)
         }}

      :error ->
        {:error, Error.new(:host_unavailable, "the session #{call.session} was opened without a host")}
    end
  end

  @doc "Nobody wants the answer: the process is shut down, and killed if it takes too long."
  @spec cancel(t, pos_integer) :: t
  def cancel(state, call_id) do
    case state.calls do
      %{^call_id => {pid, _monitor, _call}} ->
        Process.exit(pid, :shutdown)
        Process.send_after(self(), {:kill, pid}, @grace_ms)
        answered(state, call_id)

      _ ->
        state
    end
  end

  @spec stop_all(t) :: t
  def stop_all(state), do: state.calls |> Map.keys() |> Enum.reduce(state, &cancel(&2, &1))

  @spec answered(t, pos_integer) :: t
  def answered(state, call_id) do
    case Map.pop(state.calls, call_id) do
      {nil, _} ->
        state

      {{_pid, monitor, _call}, calls} ->
        Process.demonitor(monitor, [:flush])
        %{state | calls: calls, monitors: Map.delete(state.monitors, monitor)}
    end
  end

  @spec monitor?(t, reference) :: boolean
  def monitor?(state, monitor), do: is_map_key(state.monitors, monitor)

  @doc "A process ended without an answer: which call's it was."
  @spec died(t, reference) :: {pos_integer | nil, t}
  def died(state, monitor) do
    {call_id, monitors} = Map.pop(state.monitors, monitor)
    {{_pid, _monitor, call}, calls} = Map.pop(state.calls, call_id)
    about = %{session: call.session, node: call.node, node_type: call.node_type}
    Telemetry.execute([:host, :exception], %{}, about)
    {call_id, %{state | calls: calls, monitors: monitors}}
  end

  @spec crash(term) :: Error.t()
  def crash(reason) do
    Error.new(:node_failed, "the host's process ended: #{Exception.format_exit(reason)}")
  end

  @spec count(t) :: non_neg_integer
  def count(state), do: map_size(state.calls)
end
