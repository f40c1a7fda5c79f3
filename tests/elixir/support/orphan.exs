# Run by a child BEAM that the test kills: starts a service, says which process it is, and stays.
{:ok, server} = DemandPort.start_link()
{:ok, %{"os_pid" => os_pid}} = DemandPort.health(server)
IO.puts("pids #{os_pid} #{System.pid()}")
Process.sleep(:infinity)
