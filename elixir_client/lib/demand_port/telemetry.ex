defmodule DemandPort.Telemetry do
  @moduledoc """
  The `:telemetry` events of this library. Without the `telemetry` application nothing happens here. Whether it is there is
  looked up once, with the first event: it must be on the code path before the first connection starts, as every
  dependency of an application is.

  Every name begins with `:demand_port`; times are in native units, as `System.monotonic_time/0` gives them.
  Each `:start` has one `:stop` or `:exception`, also where nobody waits any more. Handlers run in the connection's process.

  | event | measurements | metadata |
  |---|---|---|
  | `[:demand, :start]` | `system_time`, `monotonic_time` | `session`, `node`, `ref` |
  | `[:demand, :first_chunk]` | `duration` since the start | the same |
  | `[:demand, :stop]` | `duration`, `chunks`, `queue_time` (that the service had it wait for a place) | the same, and `meta` as the service sent it |
  | `[:demand, :exception]` | `duration`, `chunks`, `queue_time` | the same, and `error`, a `DemandPort.Error` |
  | `[:host, :start]` | `monotonic_time` | `session`, `node`, `node_type` |
  | `[:host, :stop]` | `duration` | the same |
  | `[:host, :exception]` | `duration` | the same, and `reason`: why its process ended, or `:cancelled` |
  | `[:connection, :ready]` | `duration` since the start of the service | `server`, `os_pid`, `version` |
  | `[:connection, :down]` | `count` of restarts in a row, `delay_ms` to the next | `server`, `error` |
  | `[:health]` | `memory_bytes`, `demands`, `sessions`, `unsent_bytes` | `server`, `health` as the service sent it |

  `[:health]` comes every `health_interval_ms`, an option of `DemandPort.start_link/1`.

      iex> [:demand_port, :demand, :stop] in DemandPort.Telemetry.events()
      true
  """

  @events for suffix <- [
                [:demand, :start],
                [:demand, :first_chunk],
                [:demand, :stop],
                [:demand, :exception],
                [:host, :start],
                [:host, :stop],
                [:host, :exception],
                [:connection, :ready],
                [:connection, :down],
                [:health]
              ],
              do: [:demand_port | suffix]

  @doc "Every event, for `:telemetry.attach_many/4`."
  @spec events() :: [[atom]]
  def events, do: @events

  @doc "Reports an event; does nothing without the `telemetry` application."
  @spec execute([atom], map, map) :: :ok
  def execute(suffix, measurements, metadata) do
    if enabled?(), do: apply(:telemetry, :execute, [[:demand_port | suffix], measurements, metadata])
    :ok
  end

  @doc "Whether anybody could hear: the `telemetry` application is there."
  @spec enabled?() :: boolean
  def enabled? do
    case :persistent_term.get(__MODULE__, nil) do
      nil ->
        found = Code.ensure_loaded?(:telemetry) and function_exported?(:telemetry, :execute, 3)
        :persistent_term.put(__MODULE__, found)
        found

      known ->
        known
    end
  end

  @doc false
  # The library may be loaded later than this module is first used.
  @spec look_again() :: :ok
  def look_again do
    :persistent_term.erase(__MODULE__)
    :ok
  end
end
