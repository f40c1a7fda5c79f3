defmodule DemandPort.ExamplesTest do
  # The examples are run as a reader would run them.
  use ExUnit.Case, async: true

  alias DemandPort.Launch

  @moduletag :service
  @moduletag timeout: 180_000
  @root Path.expand("../..", __DIR__)

  defp run(program, arguments) do
    env = [{"DEMAND_PORT_PYTHON", Launch.python([])}, {"MIX_ENV", "test"}]
    System.cmd(program, arguments, cd: @root, env: env, stderr_to_stdout: true)
  end

  test "bare_port.exs prints the documented tuples" do
    {output, status} = run("elixir", ["examples/bare_port.exs"])
    assert status == 0, output
    assert output =~ ~s({:demand_complete, "out", %{"text" => "Hello, port!"}})
  end

  test "bare_port.erl prints the documented tuples" do
    {output, status} = run("escript", ["examples/bare_port.erl"])
    assert status == 0, output
    assert output =~ ~s({demand_complete,<<"out">>,\#{<<"text">> => <<"Hello, port!">>}})
  end

  @tag :model
  test "demo.exs shows streaming, cache, edit and cancel" do
    {output, status} = run("mix", ["run", "--no-compile", "examples/demo.exs"])
    assert status == 0, output
    assert output =~ "time to first token"
    assert output =~ "from the cache"
    assert output =~ "cancelled"
  end

  @tag :model
  test "cluster.exs goes on when a node is killed" do
    {output, status} = run("mix", ["run", "--no-compile", "examples/cluster.exs"])
    assert status == 0, output
    assert output =~ "is killed: backend_unavailable"
    assert output =~ "done on another node"
  end
end
