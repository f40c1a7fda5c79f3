# Hosts on this machine with a BEAM each, and the cables between them, which bench/network.py carries the packets of.

defmodule Bench.Hosts do
  alias DemandPort.Launch
  alias DemandPort.Test.Peers

  @cookie :bench_network

  @doc "So many hosts; they end with this process, however that ends. Halts with a message where there can be none."
  def open(count) do
    script = Path.join(__DIR__, "network.py")
    options = [:binary, :exit_status, line: 4_096, args: [script, "#{count}"]]
    port = Port.open({:spawn_executable, Launch.python([])}, options)

    case line(port) do
      "ready " <> names -> %{port: port, names: String.split(names)}
      _ -> System.halt(1)
    end
  end

  @doc "Ends all that runs on them, and waits until nothing is left."
  def close(hosts) do
    true = Port.command(hosts.port, "end\n")
    nil = line(hosts.port)
  end

  @doc """
  What all cables are like from now on: milliseconds one way, and `jitter_ms`, `loss` (a part of 1), `bits_per_s`.
  """
  def link(hosts, ms, options \\ []) do
    jitter = Keyword.get(options, :jitter_ms, 0)
    numbers = [ms / 1_000, jitter / 1_000, options[:loss] || 0, options[:bits_per_s] || 0]
    tell(hosts, ["link" | numbers])
  end

  @doc "Nothing passes to and from a host, or between two, until `mend/1`."
  def cut(hosts, which), do: tell(hosts, ["cut" | List.wrap(which)])

  def mend(hosts), do: tell(hosts, ["mend"])

  defp tell(hosts, words) do
    true = Port.command(hosts.port, Enum.join(words, " ") <> "\n")
    "ok" = line(hosts.port)
    :ok
  end

  defp line(port) do
    receive do
      {^port, {:data, {:eol, line}}} -> line
      {^port, {:exit_status, _}} -> nil
    end
  end

  @doc "A BEAM on a host, as `Peers.launch/2` has it, with `host` and `address`; `flags` are those of `erl`."
  def start(hosts, host, flags) do
    address = {10, 77, 0, host}
    command = [~c"netns", ~c"exec", host_name(hosts, host), charlist(System.find_executable("erl"))]
    interface = [~c"-kernel", ~c"inet_dist_use_interface", charlist(inspect(address))]

    %{
      name: :bench,
      host: :inet.ntoa(address),
      exec: {charlist(System.find_executable("ip")), command},
      args: interface ++ flags
    }
    |> Peers.launch(@cookie)
    |> Map.merge(%{host: host, address: address})
  end

  defp host_name(hosts, host), do: hosts.names |> Enum.at(host - 1) |> charlist()
  defp charlist(text), do: String.to_charlist(text)
end
