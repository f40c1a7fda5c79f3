defmodule DemandPort.GuidesTest do
  # What the guides and the notebook show is run, block after block, as a reader would.
  use ExUnit.Case

  alias DemandPort.Test.Services

  @moduletag :service
  @moduletag timeout: 180_000
  @root Path.expand("../..", __DIR__)

  # The cells fenced as elixir, each with the line that it begins at.
  defp cells(file) do
    text = File.read!(Path.join(@root, file))

    for [{all, _}, {at, size}] <- Regex.scan(~r/^```elixir\n(.*?)^```$/ms, text, return: :index) do
      {line(text, all), binary_part(text, at, size)}
    end
  end

  defp line(text, at), do: text |> binary_part(0, at) |> String.split("\n") |> length() |> Kernel.+(1)

  # In a process of its own, where the messages of the guide's demands go; the bindings are handed on.
  defp run(file) do
    file
    |> cells()
    |> Enum.reject(fn {_line, code} -> code =~ "Mix.install" end)
    |> Enum.reduce({[], env()}, fn {line, code}, {binding, env} ->
      quoted = Code.string_to_quoted!(code, file: file, line: line)
      {_result, binding, env} = Code.eval_quoted_with_env(quoted, binding, env)
      {binding, env}
    end)
  end

  defp env, do: Code.env_for_eval([])

  # What a guide starts is linked to its process, and ends with it.
  defp in_a_process(file) do
    task = Task.async(fn -> run(file) && Process.info(self(), :links) end)
    assert {:links, _} = Task.await(task, 170_000)
    assert Services.eventually(fn -> Process.whereis(MyApp.DemandPort) == nil end, 10_000)
  end

  for file <- ~w(docs/getting-started.md docs/host-nodes.md docs/failure-semantics.md) do
    @tag :model
    test file do
      assert cells(unquote(file)) != []
      ExUnit.CaptureIO.capture_io(fn -> in_a_process(unquote(file)) end)
    end
  end

  @tag :model
  test "livebook/demand_port.livemd" do
    assert [{_, install} | cells] = cells("livebook/demand_port.livemd")
    assert install =~ "Mix.install" and length(cells) > 5
    in_a_process("livebook/demand_port.livemd")
  end
end
