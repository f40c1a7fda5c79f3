defmodule DemandPort.Cluster.Member do
  @moduledoc false
  # Says what this node has to offer: it puts its ports into the process groups of the scope, and takes them out again.
  # Groups: :ports has all, {:offer, term} those that offer it, {:model, name} those that have the model loaded.
  #
  # It has the scope's name, and says to who takes that for a port what it is.
  #
  # :pg tells the other nodes, and only when something changes; the ports of a node that is gone leave by themselves.

  use GenServer

  alias DemandPort.NoPort

  # scope: the cluster's    groups: where its process groups are    joined: name of a port => {pid, groups}
  defstruct [:scope, :groups, :ports, :offers, :refresh_ms, :timeout, joined: %{}]

  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(options) do
    GenServer.start_link(__MODULE__, options, name: options[:scope])
  end

  @doc "Looks at the ports and their models now; returns once this node has it in its groups."
  @spec refresh(GenServer.server()) :: :ok
  def refresh(scope), do: GenServer.call(scope, :refresh, :infinity)

  @impl true
  def init(options), do: {:ok, struct!(__MODULE__, options), {:continue, :refresh}}

  @impl true
  def handle_continue(:refresh, state), do: {:noreply, state |> refresh_ports(&known_groups/3) |> again()}

  @impl true
  def handle_call(:refresh, _from, state), do: {:reply, :ok, refresh_ports(state, &all_groups/3)}
  def handle_call(_for_a_port, _from, state), do: {:reply, {:error, no_port(state)}, state}

  @impl true
  def handle_cast(for_a_port, state) do
    NoPort.cast(for_a_port, no_port(state))
    {:noreply, state}
  end

  defp no_port(state), do: NoPort.error(state.scope, :cluster)

  @impl true
  def handle_info(:refresh, state), do: {:noreply, state |> refresh_ports(&all_groups/3) |> again()}

  # A reply of a port that came too late.
  def handle_info(_late, state), do: {:noreply, state}

  defp again(%{refresh_ms: :infinity} = state), do: state

  defp again(state) do
    Process.send_after(self(), :refresh, state.refresh_ms)
    state
  end

  defp refresh_ports(state, groups), do: Enum.reduce(state.ports, state, &refresh_port(&1, &2, groups))

  # A connection that was started anew is another process; the groups have forgotten the one before.
  defp refresh_port(port, state, groups) do
    case GenServer.whereis(port) do
      nil ->
        %{state | joined: Map.delete(state.joined, port)}

      pid ->
        before = joined(state, port, pid)
        now = groups.(state, pid, before)
        Enum.each(now -- before, &:pg.join(state.groups, &1, pid))
        Enum.each(before -- now, &:pg.leave(state.groups, &1, pid))
        %{state | joined: Map.put(state.joined, port, {pid, now})}
    end
  end

  defp joined(state, port, pid) do
    case state.joined do
      %{^port => {^pid, groups}} -> groups
      _ -> []
    end
  end

  defp known_groups(state, _pid, _before), do: [:ports | Enum.map(state.offers, &{:offer, &1})]

  # While a port does not say, it has the models that it had.
  defp all_groups(state, pid, before) do
    models =
      case DemandPort.models(pid, timeout: state.timeout) do
        {:ok, models} ->
          for %{"model" => model, "state" => "ready"} <- models, uniq: true, do: {:model, model}

        {:error, _} ->
          Enum.filter(before, &match?({:model, _}, &1))
      end

    known_groups(state, pid, before) ++ models
  end
end
