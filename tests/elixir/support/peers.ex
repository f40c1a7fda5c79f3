defmodule DemandPort.Test.Peers do
  @moduledoc """
  Other BEAMs on this machine, connected by Erlang distribution, for tests.

  They are controlled through their standard input and output, so that a test can ask them things while the distribution
  to them is cut. All listen on the loopback interface alone.
  """

  @host ~c"127.0.0.1"

  @doc "Makes this BEAM a node; `{:error, text}` where that cannot be."
  def start_distribution do
    cond do
      Node.alive?() -> :ok
      epmd = System.find_executable("epmd") -> with :ok <- start_epmd(epmd), do: start_kernel()
      true -> {:error, "there is no epmd here"}
    end
  end

  # The name server of this machine, as `erl -name` would start it; it stays. Does nothing where one runs.
  defp start_epmd(epmd) do
    case System.cmd(epmd, ["-daemon"], stderr_to_stdout: true) do
      {_, 0} -> :ok
      {output, status} -> {:error, "epmd does not start: exit status #{status}, #{output}"}
    end
  end

  defp start_kernel do
    Application.put_env(:kernel, :inet_dist_use_interface, {127, 0, 0, 1})

    case :net_kernel.start([unique("test"), :longnames]) do
      {:ok, _} -> :ok
      {:error, reason} -> {:error, "the distribution does not start: #{inspect(reason, limit: 20)}"}
    end
  end

  defp unique(name), do: :"#{name}_#{System.pid()}_#{System.unique_integer([:positive])}@#{@host}"

  @doc "Another BEAM, connected to this, which ends with the calling process: `%{control, node, os_pid}`."
  def start(name) do
    [name, _host] = name |> unique() |> Atom.to_string() |> String.split("@")
    interface = [~c"-kernel", ~c"inet_dist_use_interface", ~c"{127,0,0,1}"]
    peer = launch(%{name: String.to_atom(name), host: @host, args: interface}, Node.get_cookie())
    true = Node.connect(peer.node)
    peer
  end

  @doc "Another BEAM, by the options of `:peer`, with this one's code; as `start/1`, but not connected."
  def launch(options, cookie) do
    paths = Enum.flat_map(:code.get_path(), &[~c"-pa", &1])
    args = [~c"-setcookie", Atom.to_charlist(cookie)] ++ options.args ++ paths

    {:ok, control, node} =
      :peer.start_link(Map.merge(options, %{longnames: true, connection: :standard_io, args: args}))

    peer = %{control: control, node: node, os_pid: nil}
    call(peer, Application, :put_env, [:logger, :level, :none])
    {:ok, _} = call(peer, Application, :ensure_all_started, [:logger])
    %{peer | os_pid: call(peer, System, :pid, [])}
  end

  @doc "Calls a function there, whether or not it is connected."
  def call(peer, module, function, arguments),
    do: :peer.call(peer.control, module, function, arguments, 30_000)

  @doc "Starts children there, under a supervisor that stays."
  def keep(peer, children), do: call(peer, __MODULE__, :keep_here, [children])

  @doc false
  def keep_here(children) do
    caller = self()

    spawn(fn ->
      send(caller, {:kept, Supervisor.start_link(children, strategy: :one_for_one)})
      Process.sleep(:infinity)
    end)

    receive do
      {:kept, {:ok, supervisor}} -> supervisor
    end
  end

  @doc "Ends it as a crash of the machine would: no one there gets to say good-bye."
  def kill(peer) do
    {_, 0} = System.cmd("kill", ["-KILL", peer.os_pid])
    :ok
  end

  @doc "Runs on a peer: demands, and says that the first chunk is there; the process that is returned is the receiver."
  def demand_here(session, node, report_to) do
    spawn(fn ->
      {:ok, _} = DemandPort.demand_async(session, node)

      receive do
        {:node_stream, _, _} = message -> send(report_to, {self(), message})
      end

      Process.sleep(:infinity)
    end)
  end
end
