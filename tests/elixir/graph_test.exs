defmodule DemandPort.GraphTest do
  use ExUnit.Case, async: true

  alias DemandPort.{Error, Graph, Json}
  alias DemandPort.Test.Services

  doctest Graph

  @cats Path.expand("../../examples/cats.json", __DIR__)

  defp two, do: Graph.new() |> Graph.node("in", "text-input", text: "hi") |> Graph.node("out", "text-output")

  describe "building" do
    test "makes what the service reads, in the order it was said" do
      graph = two() |> Graph.connect("in", "out.text") |> Graph.connect({"in", "text"}, "out", id: "mine")

      assert Graph.to_map(graph) == %{
               "nodes" => [
                 %{"id" => "in", "node_type" => "text-input", "data" => %{"text" => "hi"}},
                 %{"id" => "out", "node_type" => "text-output", "data" => %{}}
               ],
               "edges" => [
                 %{"source" => "in", "target" => "out", "target_handle" => "text"},
                 %{"source" => "in", "source_handle" => "text", "target" => "out", "id" => "mine"}
               ]
             }
    end

    test "a graph is a value: what was built from it is not in it" do
      before = two()
      Graph.put_data(before, "in", text: "other")
      assert before == two()
    end

    test "data may have keys of either kind, and values of any" do
      graph = Graph.node(Graph.new(), "a", "template", %{:template => "x", "deep" => %{a: [self()]}})
      assert graph.nodes["a"]["data"] == %{"template" => "x", "deep" => %{a: [self()]}}
    end

    refused = [
      {"a second node of one id", ~s(has a node "in" already),
       quote(do: Graph.node(two(), "in", "text-input"))},
      {"an id that is none", "non-empty string", quote(do: Graph.node(two(), :in, "text-input"))},
      {"a type that is none", ~s(the type of node "x"), quote(do: Graph.node(two(), "x", ""))},
      {"data that is none", "keyword list or a map", quote(do: Graph.node(two(), "x", "text-input", "hi"))},
      {"a port with two values", "two values", quote(do: Graph.node(two(), "x", "t", text: 1, text: 2))},
      {"a key that is no port", "has the key 1", quote(do: Graph.node(two(), "x", "t", %{1 => 2}))},
      {"a position that is none", "two numbers, {x, y}",
       quote(do: Graph.node(two(), "x", "t", [], position: 1))},
      {"an unknown option", "not known to DemandPort.Graph.node",
       quote(do: Graph.node(two(), "x", "t", [], at: 1))},
      {"an unknown source", ~s("no" names no node of the graph; its nodes: "in", "out"),
       quote(do: Graph.connect(two(), "no", "out"))},
      {"an unknown target", ~s("no.text" names no node), quote(do: Graph.connect(two(), "in", "no.text"))},
      {"an unknown node in a tuple", ~s("no" names no node),
       quote(do: Graph.connect(two(), {"no", "x"}, "out"))},
      {"an end that is none", "an end of an edge is", quote(do: Graph.connect(two(), :in, "out"))},
      {"one edge twice", ~s(has an edge "in.->out." already),
       quote(do: two() |> Graph.connect("in", "out") |> Graph.connect("in", "out"))},
      {"one edge id twice", ~s(has an edge "e" already),
       quote(
         do:
           two()
           |> Graph.connect("in", "out", id: "e")
           |> Graph.connect("in.text", "out.text", id: "e")
       )},
      {"data for an unknown node", "names no node", quote(do: Graph.put_data(two(), "no", text: 1))}
    ]

    for {name, said, call} <- refused do
      test "refuses #{name}" do
        error = assert_raise ArgumentError, fn -> unquote(call) end
        assert error.message =~ unquote(said)
      end
    end
  end

  describe "dots" do
    defp dotted(ids), do: Enum.reduce(ids, Graph.new(), &Graph.node(&2, &1, "template"))

    defp ends(graph, source, target) do
      [edge] = graph |> Graph.connect(source, target) |> Graph.to_map() |> Map.get("edges")
      {edge["source"], edge["source_handle"], edge["target"], edge["target_handle"]}
    end

    test "are read by the ids that there are" do
      graph = dotted(["a.b", "c", "d."])
      assert ends(graph, "a.b", "c.x") == {"a.b", nil, "c", "x"}
      assert ends(graph, "a.b.x", "c.x.y") == {"a.b", "x", "c", "x.y"}
      assert ends(graph, "d.", "d..x") == {"d.", nil, "d.", "x"}
    end

    test "that can be read in two ways are refused, and a tuple says which" do
      graph = dotted(["a", "a.b"])
      error = assert_raise ArgumentError, fn -> Graph.connect(graph, "a.b", "a") end
      assert error.message == ~s("a.b" may mean {"a.b", nil} or {"a", "b"}: write which)
      assert ends(graph, {"a", "b"}, {"a.b", nil}) == {"a", "b", "a.b", nil}
    end

    test "at the end name no port" do
      assert_raise ArgumentError, fn -> Graph.connect(two(), "in.", "out") end
      assert_raise ArgumentError, fn -> Graph.connect(two(), {"in", ""}, "out") end
    end
  end

  describe "reading" do
    test "accepts each shape, and gives one" do
      expected =
        Graph.new(%{"title" => "t"})
        |> Graph.node("in", "text-input", %{"text" => "hi"}, position: {1, 2.5})
        |> Graph.node("text-output-1", "text-output")
        |> Graph.connect("in.text", "text-output-1.text")

      shapes = [
        %{
          nodes: [
            %{id: "in", nodeType: "text-input", data: %{text: "hi"}, position: %{x: 1, y: 2.5}},
            %{id: "text-output-1"}
          ],
          edges: [%{source: "in", sourceHandle: "text", target: "text-output-1", targetHandle: "text"}]
        },
        %{
          "nodes" => [
            %{
              "id" => "in",
              "data" => %{"text" => "hi", "node_type" => "text-input"},
              "position" => [1, 2.5],
              "selected" => true
            },
            %{"id" => "text-output-1", "data" => nil}
          ],
          "edges" => [
            %{
              "id" => "",
              "source" => "in",
              "source_handle" => "text",
              "target" => "text-output-1",
              "target_handle" => "text"
            }
          ]
        }
      ]

      for shape <- shapes do
        wrapped = %{version: 1, metadata: %{title: "t"}, graph: shape}
        assert {:ok, graph} = Graph.from_map(wrapped)
        graph = update_in(graph.nodes["in"]["data"], &Map.delete(&1, "node_type"))
        assert graph == expected
        assert Graph.from_map(Graph.to_map(graph)) == {:ok, graph}
      end
    end

    test "names the place of what is wrong" do
      wrong = [
        {"x", "a graph must be a map"},
        {%{}, "a list of nodes"},
        {%{nodes: [1]}, "nodes[0] must be a map"},
        {%{nodes: [%{id: ""}]}, "nodes[0].id must be a non-empty string"},
        {%{nodes: [%{id: "a", node_type: 5}]}, "nodes[0].node_type must be a string"},
        {%{nodes: [%{id: "a", data: []}]}, "nodes[0].data must be a map"},
        {%{nodes: [%{id: "a", position: [1]}]}, "nodes[0].position must be"},
        {%{nodes: [%{id: "a", position: %{x: 1}}]}, "nodes[0].position must be"},
        {%{nodes: [%{id: "a", position: %{x: 1, y: "2"}}]}, "nodes[0].position must be"},
        {%{nodes: [%{:id => "a", "id" => "b"}]}, "nodes[0] has a key twice"},
        {%{nodes: [%{1 => 2}]}, "nodes[0] has the key 1"},
        {%{nodes: [], edges: nil}, "a list of edges"},
        {%{nodes: [], edges: [%{source: "a"}]}, "edges[0].target must be a non-empty string"},
        {%{nodes: [], edges: [%{source: "a", target: "b", id: 5}]}, "edges[0].id must be a string"},
        {%{nodes: [], edges: [%{source: "a", target: "b", source_handle: 5}]}, "edges[0].source_handle"},
        {%{nodes: [], edges: List.duplicate(%{source: "a", target: "b"}, 2)}, "edges[1]: there are two edges"}
      ]

      for {map, said} <- wrong do
        assert {:error, %Error{code: :invalid_graph} = error} = Graph.from_map(map)
        assert error.message =~ said
      end
    end

    test "reads a file, or says which one and what is the matter" do
      assert {:ok, graph} = Graph.read(@cats)
      assert {:ok, wire} = Graph.to_wire(@cats)
      assert wire == Graph.to_map(graph)
      assert length(wire["nodes"]) == 4
      assert {:error, %Error{code: :invalid_graph, message: message}} = Graph.to_wire("nowhere.json")
      assert message == "nowhere.json: no such file or directory"
      assert {:error, %Error{code: :invalid_graph}} = Graph.to_wire(:cats)
      assert {:error, %Error{code: :invalid_graph}} = Graph.to_wire(%Error{})
      assert {:ok, %{"nodes" => [_, _]}} = Graph.to_wire(two())
    end
  end

  describe "JSON" do
    test "of every kind is read" do
      text =
        ~s( {"a": [1, -2.5, 1e3, 1.5E-2, true, false, null, -0], "\\u00e4\\ud83d\\ude00\\n\\/\\"": {}, "e": "ä", "z": []} )

      assert Json.decode(text) ==
               {:ok,
                %{
                  "a" => [1, -2.5, 1.0e3, 0.015, true, false, nil, 0],
                  "ä😀\n/\"" => %{},
                  "e" => "ä",
                  "z" => []
                }}
    end

    test "that is none is refused, with the place" do
      refused = [
        {"", "a value is missing (line 1, column 1)"},
        {"[1,\n ]", "a value is missing (line 2, column 2)"},
        {"{", "a key in quotation marks is missing"},
        {~s({"a" 1}), "a colon is missing"},
        {~s({"a": 1 "b"}), "a comma or } is missing"},
        {"[1 2]", "a comma or ] is missing (line 1, column 4)"},
        {"nul", "a value is missing"},
        {"1 2", "more after the value (line 1, column 3)"},
        {~s("a), "a string has no end"},
        {~s("a\nb"), "a string may not hold this"},
        {~S("\x"), "a string may not hold this"},
        {~S("\u12"), "four hexadecimal digits"},
        {~S("\u+123"), "four hexadecimal digits"},
        {~S("\ud83d"), "half a character"},
        {~S("\ude00\ud83d"), "half a character"},
        {~S("\ud83d\u0041"), "half a character"},
        {~s({"a": 1, "a": 2}), ~s(the key "a" comes twice)},
        {"1e999", "no float holds"},
        {<<?", 0xFF, ?">>, "not UTF-8"}
      ]

      for {text, said} <- refused do
        assert {:error, reason} = Json.decode(text)
        assert reason =~ said
      end

      for number <- ["01", "-", "1.", ".5", "1e", "+1", "0x1", "1.2.3", "NaN"] do
        assert {:error, _} = Json.decode(number)
      end
    end
  end

  describe "checking" do
    @types [
      %{
        "node_type" => "text-input",
        "inputs" => [%{"name" => "text", "type" => "string", "required" => false, "default" => ""}],
        "outputs" => [%{"name" => "text", "type" => "string"}]
      },
      %{node_type: "sum", inputs: [%{name: "n", type: "number"}], outputs: [%{name: "sum", type: "number"}]},
      %{node_type: "host", inputs: ["a", "b"], outputs: ["c"]},
      %{node_type: "join", inputs: [%{name: "in", multiple: true}], outputs: ["out"]},
      %{node_type: "vector", inputs: [%{name: "v", type: "vector"}], outputs: []}
    ]

    defp code(graph) do
      case Graph.validate(graph, @types) do
        {:ok, problems} -> {:ok, Enum.map(problems, & &1["code"])}
        {:error, error} -> {error.code, Enum.map(error.details["problems"], & &1["code"])}
      end
    end

    defp sums(ids), do: Enum.reduce(ids, Graph.new(), &Graph.node(&2, &1, "sum", n: 1))

    test "names each broken rule by the service's code" do
      text = Graph.node(Graph.new(), "t", "text-input", text: "x")
      assert code(text) == {:ok, []}
      assert code(Graph.node(text, "x", "no-such")) == {:unknown_node_type, ["unknown_node_type"]}
      assert code(Graph.node(text, "s", "sum")) == {:ok, ["missing_input"]}
      assert code(Graph.node(text, "s", "sum", n: "1")) == {:type_mismatch, ["type_mismatch"]}
      assert code(Graph.node(text, "s", "sum", n: nil)) == {:ok, ["missing_input"]}
      assert code(Graph.node(text, "v", "vector", v: nil)) == {:ok, []}

      assert code(text |> Graph.node("s", "sum") |> Graph.connect("t", "s")) ==
               {:type_mismatch, ["type_mismatch"]}

      assert code(sums(["a", "b"]) |> Graph.connect("a.no", "b.nor")) ==
               {:unknown_port, ["unknown_port", "unknown_port"]}

      assert code(sums(["a", "b"]) |> Graph.connect("a", "b") |> Graph.connect("a.sum", "b")) ==
               {:invalid_graph, ["invalid_graph"]}

      assert {:error, error} =
               sums(["a", "c"])
               |> Graph.node("b", "join")
               |> Graph.connect("a", "b")
               |> Graph.connect("b", "c")
               |> Graph.connect("c", "b")
               |> Graph.validate(@types)

      assert error.code == :cycle and error.node == "b" and error.message =~ "b -> c -> b"
    end

    test "holds host types to the ports that are named, and lets a bare name have any" do
      graph =
        Graph.new()
        |> Graph.node("h", "host", a: 1)
        |> Graph.node("any", "free")
        |> Graph.connect("any.x", "h.b")

      assert {:ok, []} = Graph.validate(graph, ["free" | @types])
      assert {:error, %Error{code: :unknown_node_type}} = Graph.validate(graph, @types)

      assert {:error, %Error{code: :unknown_port}} =
               graph |> Graph.connect("h.d", "any.y") |> Graph.validate(["free" | @types])

      assert {:error, %Error{code: :unknown_port}} =
               graph |> Graph.connect("h.c", "any") |> Graph.validate(["free" | @types])
    end

    test "a map is checked as well, and one that is no graph is refused" do
      assert {:ok, []} = Graph.validate(%{nodes: [%{id: "text-input-1"}]}, @types)

      assert {:error, %Error{code: :unknown_node}} =
               Graph.validate(%{nodes: [], edges: [%{source: "a", target: "b"}]}, [])

      assert {:error, %Error{code: :invalid_graph}} = Graph.validate(%{}, [])
    end

    test "a long chain is checked without a deep stack's trouble" do
      ids = Enum.map(1..5_000, &"n#{&1}")

      chain =
        ids |> Enum.zip(tl(ids)) |> Enum.reduce(sums(ids), fn {a, b}, graph -> Graph.connect(graph, a, b) end)

      assert {:ok, []} = Graph.validate(chain, @types)

      assert {:error, %Error{code: :cycle}} =
               chain |> Graph.connect("n5000", {"n1", nil}) |> Graph.validate(@types)
    end

    @tag :service
    test "finds what the service finds, on graphs of every kind" do
      port = Services.real(log_level: :none)
      {:ok, types} = DemandPort.node_types(port)
      types = Enum.reject(types, &(&1["runs"] == "host"))
      :rand.seed(:exsss, 20)

      for _ <- 1..300 do
        graph = random_graph(types)
        {:ok, %{"problems" => theirs}} = DemandPort.validate(port, graph)

        ours =
          case Graph.validate(graph, types) do
            {:ok, problems} -> problems
            {:error, error} -> error.details["problems"]
          end

        assert Enum.map(ours, &place/1) == Enum.map(theirs, &place/1),
               "on #{inspect(graph, limit: :infinity)}"
      end
    end

    defp place(problem), do: Map.take(problem, ~w(code node port edge hint))

    # Nodes of any type with some of their ports given; edges between any ends, known and not.
    defp random_graph(types) do
      ids = Enum.map(1..Enum.random(1..6), &"n#{&1}")
      nodes = Enum.map(ids, &random_node(&1, Enum.random(types)))
      edges = for _ <- 1..Enum.random(1..5), do: random_edge(nodes, types)
      %{nodes: nodes, edges: Enum.uniq(edges)}
    end

    defp random_node(id, type) do
      given = Enum.filter(type["inputs"], fn _ -> :rand.uniform() < 0.6 end)
      type_name = if :rand.uniform() < 0.05, do: "no-such-type", else: type["node_type"]
      %{id: id, node_type: type_name, data: Map.new(given, &{&1["name"], random_value(&1)})}
    end

    # Whether text is JSON is the service's to say.
    defp random_value(%{"type" => "json"}), do: Enum.random([nil, 1, true, %{a: 1}, [1]])

    defp random_value(_port),
      do: Enum.random([nil, "text", 1, 2.0, 2.5, true, [1], %{a: "b"}, <<255>>, {:a, self()}, :nan])

    defp random_edge(nodes, types) do
      source = Enum.random(nodes)
      target = Enum.random(nodes)

      %{
        source: if(:rand.uniform() < 0.05, do: "nobody", else: source.id),
        source_handle: random_port(source, types, "outputs"),
        target: target.id,
        target_handle: random_port(target, types, "inputs")
      }
    end

    defp random_port(node, types, side) do
      named = for type <- types, type["node_type"] == node.node_type, port <- type[side], do: port["name"]
      Enum.random([nil, "nope" | named ++ named ++ named])
    end
  end
end
