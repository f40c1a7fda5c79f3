defmodule DemandPort.Load do
  @moduledoc """
  How much connections have to do, as they know it themselves, without asking their services.

  All are asked at once, on whatever nodes they are; who does not answer in time is left out. So it costs one message
  to each and back, and is as fresh as that.
  """

  @typedoc "Open demands, sessions and requests; `ready` is false while there is no service."
  @type t :: %{
          demands: non_neg_integer,
          sessions: non_neg_integer,
          requests: non_neg_integer,
          ready: boolean
        }

  @doc "The load of each that answers within `timeout` milliseconds, in the order asked."
  @spec of([GenServer.server()], non_neg_integer) :: [{GenServer.server(), t}]
  def of(servers, timeout) do
    until = {:abs, System.monotonic_time(:millisecond) + timeout}
    requests = for server <- servers, do: {server, :gen_statem.send_request(server, :info)}

    for {server, request} <- requests,
        {:reply, {:ok, info}} <- [:gen_statem.receive_response(request, until)],
        do: {server, load(info)}
  end

  defp load(info) do
    %{
      demands: info.open_demands,
      sessions: info.open_sessions,
      requests: info.open_requests,
      ready: info.os_pid != nil
    }
  end

  @doc """
  The sum by which two are compared: one without a service comes after all that have one.

      iex> busy = %{demands: 3, sessions: 1, requests: 0, ready: true}
      iex> DemandPort.Load.weight(busy) < DemandPort.Load.weight(%{busy | demands: 0, ready: false})
      true
  """
  @spec weight(t) :: {0 | 1, non_neg_integer}
  def weight(load), do: {if(load.ready, do: 0, else: 1), load.demands + load.sessions + load.requests}
end
