defmodule DemandPort.Connection.Data do
  @moduledoc false
  # The state of a connection.
  #
  # owners:   id => {:call, from, note} | {:demand, delivery} | {:note, text} | {:restored, session} | :nobody …
  # refs:     demand reference => id        monitors: monitor reference => id
  # held:     {id, payload} to send to the next service that is ready, newest first; nil while one is
  # sessions: name => what it takes to open it again      open: names of the sessions that are
  # keepers:  monitor reference of a session's owner => its name
  # downs:    when services were lost, the latest first
  # heir:     table of those who are to be told should this process be killed

  alias DemandPort.{HostCalls, Subscriptions}

  @enforce_keys [:options, :tasks, :heir]
  defstruct [
    :port,
    :protocol,
    :options,
    :tasks,
    :heir,
    :started,
    :failure,
    :info,
    hosts: %HostCalls{},
    subscriptions: %Subscriptions{},
    owners: %{},
    refs: %{},
    monitors: %{},
    held: [],
    sessions: %{},
    keepers: %{},
    open: MapSet.new(),
    downs: [],
    restarting: []
  ]

  @type t :: %__MODULE__{}
end
