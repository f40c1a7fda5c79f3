defmodule DemandPort.NoPort do
  @moduledoc false
  # What the processes of a pool and of a cluster answer whoever takes their name for that of a port.

  alias DemandPort.{Delivery, Error}

  @doc "The error that says what the name stands for."
  @spec error(atom, :pool | :cluster) :: Error.t()
  def error(name, :pool), do: refusal(name, "a pool: use DemandPort.Pool")
  def error(name, :cluster), do: refusal(name, "a cluster: use DemandPort.Cluster")

  # It does not become right by being said again.
  defp refusal(name, text), do: Error.new(:bad_message, "#{inspect(name)} is #{text}, or one of its members")

  @doc "Ends a demand that was sent without waiting; of anything else nobody waits for an answer."
  @spec cast(term, Error.t()) :: :ok
  def cast({:demand, delivery}, error), do: Delivery.deliver(delivery, {:demand_error, delivery.node, error})
  def cast(_other, _error), do: :ok
end
