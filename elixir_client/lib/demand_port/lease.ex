defmodule DemandPort.Lease do
  @moduledoc """
  A session that is open as long as somebody wants it: a process beside the connection opens it, and closes it when its
  owner releases it, dies, or cannot be reached any more.

  The owner may be on another node; the lease is on the connection's, so that nothing is left open there when the
  owner's node is gone. The session is opened with `restore: true`: a rolling restart does not take it away.
  """

  alias DemandPort.{Connection, Error, Session}

  @timeout 30_000

  @type supervisor :: Supervisor.supervisor()

  @doc """
  Opens a graph on `server` for `owner`; `supervisor` is a `Task.Supervisor` on the server's node. Waits for the reply.

  `options` are those of `DemandPort.open/3`, and `timeout` among them the longest that this takes.
  """
  @spec open(supervisor, GenServer.server(), map, keyword, pid) ::
          {:ok, Session.t(), lease :: pid} | {:error, Error.t()}
  def open(supervisor, server, graph, options, owner) do
    # Once it is dropped, a reply that comes too late vanishes.
    ref = :erlang.alias()
    options = Keyword.merge(options, restore: true, session: Session.new_name())

    case start(supervisor, [ref, server, graph, options, owner]) do
      {:ok, lease} ->
        await(lease, ref, options[:timeout] || @timeout)

      {:error, reason} ->
        {:error, Connection.unavailable("no session could be had: #{inspect(reason, limit: 20)}")}
    end
  end

  @doc "Has the session closed; returns at once."
  @spec release(pid) :: :ok
  def release(lease) do
    send(lease, :release)
    :ok
  end

  defp start(supervisor, arguments) do
    Task.Supervisor.start_child(supervisor, __MODULE__, :hold, arguments, restart: :temporary)
  catch
    :exit, {reason, _call} -> {:error, reason}
  end

  defp await(lease, ref, timeout) do
    monitor = Process.monitor(lease)

    result =
      receive do
        {^ref, {:ok, session}} -> {:ok, session, lease}
        {^ref, {:error, error}} -> {:error, error}
        {:DOWN, ^monitor, :process, _, reason} -> {:error, gone(reason)}
      after
        timeout ->
          {:error, Error.new(:deadline_exceeded, "the graph was not opened in time", retryable: true)}
      end

    Process.demonitor(monitor, [:flush])
    :erlang.unalias(ref)
    if match?({:error, _}, result), do: release(lease)
    flush(ref)
    result
  end

  defp gone(reason), do: Connection.unavailable("the session's node is gone: #{inspect(reason, limit: 20)}")

  defp flush(ref) do
    receive do
      {^ref, _} -> :ok
    after
      0 -> :ok
    end
  end

  @doc false
  @spec hold(reference, GenServer.server(), map, keyword, pid) :: term
  def hold(ref, server, graph, options, owner) do
    # When its supervisor stops, the session is closed all the same.
    Process.flag(:trap_exit, true)
    monitor = Process.monitor(owner)

    case DemandPort.open(server, graph, options) do
      {:ok, session} ->
        send(ref, {ref, {:ok, session}})
        wait(monitor)
        DemandPort.close(session)

      {:error, error} ->
        send(ref, {ref, {:error, error}})
        # It may be opened yet, by a service that was slow.
        if error.code == :deadline_exceeded,
          do: DemandPort.close(%Session{server: server, name: options[:session]})
    end
  end

  defp wait(monitor) do
    receive do
      :release -> :ok
      {:EXIT, _supervisor, _reason} -> :ok
      {:DOWN, ^monitor, :process, _, _} -> :ok
    end
  end
end
