# A BEAM between a host and the service: it opens the service as a port, and hands every frame on as it is.
#
#     elixir --erl -noinput relay.exs PROGRAM ARGUMENT…
#
# The end of the service is told to the host as a message of its own, in msgpack: ["exit_status", status], or
# ["port_closed", reason] when the port failed. End of input ends the BEAM.

defmodule Relay do
  def run([program | arguments]) do
    Process.flag(:trap_exit, true)
    stdio = if "--fd" in arguments, do: [:nouse_stdio], else: []
    options = [:binary, :exit_status, packet: 4, args: arguments] ++ stdio
    service = Port.open({:spawn_executable, program}, options)
    host = Port.open({:fd, 0, 1}, [:binary, :eof, packet: 4])
    hand_on(service, host)
  end

  defp hand_on(service, host) do
    receive do
      {^service, {:data, payload}} ->
        Port.command(host, payload)

      {^host, {:data, payload}} ->
        command(service, payload)

      {^service, {:exit_status, status}} ->
        Port.command(host, [<<0x92, 0xAB>>, "exit_status", <<0xCC, status>>])

      {:EXIT, ^service, :normal} ->
        :ok

      {:EXIT, ^service, reason} ->
        Port.command(host, [<<0x92, 0xAB>>, "port_closed", string("#{reason}")])

      {^host, :eof} ->
        System.halt(0)
    end

    hand_on(service, host)
  end

  defp command(service, payload) do
    Port.command(service, payload)
  rescue
    # The port has ended, and its last message says so.
    ArgumentError -> false
  end

  defp string(text), do: [0xD9, byte_size(text), text]
end

Relay.run(System.argv())
