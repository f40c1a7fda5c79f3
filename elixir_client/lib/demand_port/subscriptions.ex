defmodule DemandPort.Subscriptions do
  @moduledoc false
  # Who hears the events of which session, and from which number on. The service has one subscription per session,
  # which begins at the least that anybody here still wants.
  #
  # What the service cannot say of a session is said here: that it is closed, or lost with its service, and that it goes on
  # in a new one.

  alias DemandPort.Error

  # sessions: name => %{subscriber => %{at, tag, kinds, monitor, lost}}; at is nil until the service has said what comes
  # next, lost until the session goes on in a new service
  defstruct sessions: %{}

  @always ~w(task_failed demand_started demand_completed demand_failed missed)

  @type t :: %__MODULE__{}

  @doc "One more subscriber (a pid); returns since when the service is to be asked for events, nil for the new ones."
  @spec add(t, String.t(), pid, keyword) :: {non_neg_integer | nil, t}
  def add(state, session, subscriber, options) do
    {_, state} = remove(state, session, subscriber)
    at = options[:since]

    entry = %{
      at: at,
      tag: options[:tag],
      kinds: options[:kinds],
      monitor: Process.monitor(subscriber),
      lost: false
    }

    others = Map.get(state.sessions, session, %{})
    ats = for {_, %{at: at}} <- others, at != nil, do: at
    sessions = Map.put(state.sessions, session, Map.put(others, subscriber, entry))
    since = if at == nil, do: Enum.min(ats, fn -> nil end), else: Enum.min([at | ats])
    {since, %{state | sessions: sessions}}
  end

  @doc """
  The service's next event has this number: who asked for new ones alone gets those from it on, and so does who asked for
  those from a number on that is yet to come, since it counts anew.
  """
  @spec begin_at(t, String.t(), pid, non_neg_integer) :: t
  def begin_at(state, session, subscriber, next) do
    case state.sessions do
      # A number is less than nil.
      %{^session => %{^subscriber => %{at: at}}} ->
        put_in(state.sessions[session][subscriber].at, min(at, next))

      _ ->
        state
    end
  end

  @doc "One less; `:last` when nobody hears the session any more."
  @spec remove(t, String.t(), pid) :: {:last | :others | :none, t}
  def remove(state, session, subscriber) do
    case state.sessions do
      %{^session => %{^subscriber => entry} = all} ->
        Process.demonitor(entry.monitor, [:flush])
        left = Map.delete(all, subscriber)

        if left == %{},
          do: {:last, %{state | sessions: Map.delete(state.sessions, session)}},
          else: {:others, put_in(state.sessions[session], left)}

      _ ->
        {:none, state}
    end
  end

  @doc "A subscriber died; returns the sessions that nobody hears any more."
  @spec died(t, pid) :: {[String.t()], t}
  def died(state, pid) do
    Enum.reduce(Map.keys(state.sessions), {[], state}, fn session, {empty, state} ->
      case remove(state, session, pid) do
        {:last, state} -> {[session | empty], state}
        {_, state} -> {empty, state}
      end
    end)
  end

  @doc "The session is closed, or lost with an error: the last that those who heard it are told."
  @spec close(t, String.t(), Error.t() | nil) :: t
  def close(state, session, error) do
    state.sessions
    |> Map.get(session, %{})
    |> Enum.reduce(state, fn {subscriber, _entry}, state -> lose(state, session, subscriber, error) end)
  end

  defp lose(state, session, subscriber, error) do
    tell(state.sessions[session][subscriber], subscriber, session, own_event("session_closed", error))
    state |> remove(session, subscriber) |> elem(1)
  end

  @doc "The session is open in a new service."
  @spec restored(t, String.t()) :: t
  def restored(state, session) do
    case state.sessions do
      %{^session => all} ->
        for {subscriber, %{lost: true} = entry} <- all,
            do: tell(entry, subscriber, session, own_event("session_restored", nil))

        put_in(state.sessions[session], Map.new(all, fn {pid, entry} -> {pid, %{entry | lost: false}} end))

      _ ->
        state
    end
  end

  defp own_event(name, error) do
    %{"event" => name, "node" => nil, "seq" => nil, "time_us" => nil, "error" => error && as_sent(error)}
  end

  # As the error of an event that the service sent.
  defp as_sent(error) do
    Map.merge(%{"node" => nil, "retryable" => error.retryable, "traceback" => nil}, Error.to_wire(error))
  end

  @spec sessions(t) :: [String.t()]
  def sessions(state), do: Map.keys(state.sessions)

  @doc """
  There is a new service, whose events count from 0: in the sessions that are `restored` they come to everyone who heard
  them, in the others to those alone whose `held` subscription is yet to be sent. The rest is told that the session is
  lost, and by which error.
  """
  @spec restarted(t, [String.t()], [{String.t(), pid}], Error.t()) :: t
  def restarted(state, restored, held, error) do
    Enum.reduce(state.sessions, state, fn {session, all}, state ->
      Enum.reduce(all, state, fn {subscriber, _entry}, state ->
        cond do
          {session, subscriber} in held -> state
          session in restored -> update_in(state.sessions[session][subscriber], &%{&1 | at: 0, lost: true})
          true -> lose(state, session, subscriber, error)
        end
      end)
    end)
  end

  @doc "Hands an event to those who have not had it."
  @spec event(t, String.t(), map) :: t
  def event(state, session, %{"seq" => seq} = event) do
    case state.sessions do
      %{^session => all} ->
        all =
          Map.new(all, fn {subscriber, entry} ->
            # nil is more than any number.
            if seq >= entry.at do
              if wanted?(event, entry.kinds), do: tell(entry, subscriber, session, from(event, entry.at))
              {subscriber, %{entry | at: seq + 1}}
            else
              {subscriber, entry}
            end
          end)

        put_in(state.sessions[session], all)

      _ ->
        state
    end
  end

  # Of what is gone for good, those may be a part that this subscriber has had.
  defp from(%{"event" => "missed", "seq" => last, "count" => count} = event, at),
    do: %{event | "count" => min(count, last - at + 1)}

  defp from(event, _at), do: event

  defp wanted?(_event, nil), do: true
  defp wanted?(%{"event" => kind}, kinds), do: kind in kinds or kind in @always

  defp tell(entry, subscriber, session, event),
    do: send(subscriber, tagged(entry.tag, {:node_event, session, event}))

  defp tagged(nil, message), do: message
  defp tagged(tag, message), do: {tag, message}
end
