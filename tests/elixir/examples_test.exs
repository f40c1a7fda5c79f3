defmodule DemandPort.ExamplesTest do
  # The examples are run as a reader would run them.
  use ExUnit.Case, async: true

  alias DemandPort.Launch

  @moduletag :service
  @moduletag timeout: 180_000
  @root Path.expand("../..", __DIR__)

  defp run(program, arguments, env \\ []) do
    env = [{"DEMAND_PORT_PYTHON", Launch.python([])}, {"MIX_ENV", "test"} | env]
    System.cmd(program, arguments, cd: @root, env: env, stderr_to_stdout: true)
  end

  defp python_path, do: for({name, value} <- Launch.env([]), value, do: {"#{name}", "#{value}"})

  defp example(file) do
    {output, status} = run("mix", ["run", "--no-compile", "examples/#{file}"])
    assert status == 0, output
    output
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

  test "host_node.exs streams, answers a tool and a search" do
    output = example("host_node.exs")
    assert output =~ "chunk o.\nchunk w.\nchunk l.\n"
    assert output =~ ~s({:ok, %{"text" => "o.w.l."}})
    assert output =~ ~s(%{"result" => 3})
    assert output =~ ~s("documents" => ["Owls hunt at night."])
    assert output =~ "node_failed at node none: there is no tool fly"
  end

  @tag :model
  test "genserver.exs has the chunks in its state" do
    output = example("genserver.exs")
    assert output =~ ~r/told: \w/
    assert output =~ "are the whole story: true"
  end

  @tag :model
  test "pubsub.exs reaches every listener" do
    output = example("pubsub.exs")
    assert output =~ ~r/both heard: .*owl/i
    assert output =~ "the same: true"
  end

  @tag :model
  test "minimal_client.py speaks the protocol with a msgpack library alone" do
    {output, status} =
      run(Launch.python([]), ["examples/minimal_client.py", "Tell me about cats."], python_path())

    assert status == 0, output
    assert output =~ "the chunks are the text: True"
    assert output =~ "a large value came back: True"
    assert output =~ "ended with status 0"
  end

  @tag :model
  test "demo.exs shows streaming, cache, edit and cancel" do
    {output, status} = run("mix", ["run", "--no-compile", "examples/demo.exs"])
    assert status == 0, output
    assert output =~ "time to first token"
    assert output =~ "from the cache"
    assert output =~ "cancelled"
  end
end
