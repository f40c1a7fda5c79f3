defmodule DemandPort.Subscriptions do
  @moduledoc false
  # Who hears the events of which session, and from which number on. The service has one subscription per session,
  # which begins at the least that anybody here still wants.

  # sessions: name => %{subscriber => %{at, tag, kinds, monitor}}; at is nil until the service has said what comes next
  defstruct sessions: %{}

  @always ~w(task_failed demand_started demand_completed demand_failed missed)

  @type t :: %__MODULE__{}

  @doc "One more subscriber (a pid); returns since when the service is to be asked for events, nil for the new ones."
  @spec add(t, String.t(), pid, keyword) :: {non_neg_integer | nil, t}
  def add(state, session, subscriber, options) do
    {_, state} = remove(state, session, subscriber)
    at = options[:since]
    entry = %{at: at, tag: options[:tag], kinds: options[:kinds], monitor: Process.monitor(subscriber)}
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

  @doc "The session is closed; returns the monitors of those who heard it."
  @spec close(t, String.t()) :: {[reference], t}
  def close(state, session) do
    {subscribers, sessions} = Map.pop(state.sessions, session, %{})
    {Enum.map(subscribers, fn {_, entry} -> entry.monitor end), %{state | sessions: sessions}}
  end

  @spec sessions(t) :: [String.t()]
  def sessions(state), do: Map.keys(state.sessions)

  @doc """
  There is a new service, whose events count from 0: in the sessions that are `restored` they come to everyone who heard
  them, in the others to those alone whose `held` subscription is yet to be sent.
  """
  @spec restarted(t, [String.t()], [{String.t(), pid}]) :: t
  def restarted(state, restored, held) do
    Enum.reduce(state.sessions, state, fn {session, all}, state ->
      Enum.reduce(all, state, fn {subscriber, _entry}, state ->
        cond do
          {session, subscriber} in held -> state
          session in restored -> put_in(state.sessions[session][subscriber].at, 0)
          true -> state |> remove(session, subscriber) |> elem(1)
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
              if wanted?(event, entry.kinds),
                do: send(subscriber, tagged(entry.tag, {:node_event, session, from(event, entry.at)}))

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

  defp tagged(nil, message), do: message
  defp tagged(tag, message), do: {tag, message}
end
