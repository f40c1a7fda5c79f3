defmodule DemandPort.Test.Services do
  @moduledoc "Starts services for tests: the fake one, and the real one."

  alias DemandPort.{Launch, Session}

  @fake Path.expand("fake_service.py", __DIR__)

  @doc "A fake service under the test's supervisor; returns the connection's pid."
  def fake(mode \\ "", options \\ []) do
    ExUnit.Callbacks.start_supervised!({DemandPort, fake_options(mode, options)}, restart: :temporary)
  end

  def fake_options(mode, options \\ []) do
    arguments = Enum.reject([@fake, mode], &(&1 == ""))
    Keyword.merge([args: arguments, log_level: :none], options)
  end

  @doc "A session of the fake service, which knows them all."
  def session(server), do: %Session{server: server, name: "s"}

  @doc "The real service under the test's supervisor."
  def real(options \\ []) do
    ExUnit.Callbacks.start_supervised!({DemandPort, options}, restart: :permanent)
  end

  @doc "Whether the real service starts here at all."
  def real? do
    env = for {name, value} <- Launch.env([]), value, do: {"#{name}", "#{value}"}
    arguments = ["-c", "import demandport.service.main"]
    {_, status} = System.cmd(Launch.python([]), arguments, env: env, stderr_to_stdout: true)
    status == 0
  rescue
    ErlangError -> false
  end

  @doc "Waits until the condition holds; there is no event to wait for in these cases."
  def eventually(condition, timeout_ms \\ 2_000) do
    cond do
      condition.() ->
        true

      timeout_ms <= 0 ->
        false

      true ->
        Process.sleep(10)
        eventually(condition, timeout_ms - 10)
    end
  end

  @doc "Whether an operating system process runs; one that ended and was not collected does not."
  def alive?(os_pid) do
    case File.read("/proc/#{os_pid}/stat") do
      {:ok, stat} -> not (stat =~ ~r/\) [ZX] /)
      {:error, _} -> false
    end
  end
end
