defmodule ChatWeb.ChatLiveTest do
  # With the real service and the model that comes with it: its Python is that of DEMAND_PORT_PYTHON.
  use ExUnit.Case

  import Phoenix.ConnTest
  import Phoenix.LiveViewTest

  @endpoint ChatWeb.Endpoint
  @wait 60_000

  setup do
    {:ok, conn: build_conn()}
  end

  test "the page is there without its scripts, and the scripts are", %{conn: conn} do
    assert html_response(get(conn, "/"), 200) =~ "<h1>Chat</h1>"
    assert response(get(conn, "/assets/phoenix.min.js"), 200) =~ "Phoenix"
    assert response(get(conn, "/assets/phoenix_live_view.min.js"), 200) =~ "LiveView"
  end

  test "an answer streams into the page", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    assert view |> ask("Tell me about cats.") |> running?()
    page = page_until(view, &(not running?(&1)))
    assert answer(page) =~ ~r/cat/i
    refute page =~ "role=\"alert\""
  end

  test "what is asked is text, and an empty question asks nothing", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    refute ask(view, "  ") =~ "class=\"question\""
    assert ask(view, "<script>alert(1)</script>") =~ "&lt;script&gt;alert(1)&lt;/script&gt;"
    page_until(view, &(not running?(&1)))
  end

  test "Cancel ends it, and the session with it", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    held(view)
    view |> element("button", "Cancel") |> render_click()
    page_until(view, &(&1 =~ "Cancelled." and not cancel?(&1)))
    assert eventually(fn -> sessions() == 0 end)
    signal("CONT", worker())
    answered(view)
  end

  test "two who have a room open see the same answer; only who asked may cancel", %{conn: conn} do
    {:ok, one, _html} = live(conn, "/rooms/cats")
    {:ok, two, _html} = live(build_conn(), "/rooms/cats")
    {:ok, elsewhere, _html} = live(build_conn(), "/rooms/dogs")
    ask(one, "Tell me about cats.")
    refute cancel?(page_until(two, &(&1 =~ "Tell me about cats.</p>")))
    page = page_until(one, &(not running?(&1)))
    text = answer(page)
    assert text =~ ~r/cat/i
    assert answer(page_until(two, &(answer(&1) == text))) == text
    refute render(elsewhere) =~ "class=\"answer\""
  end

  test "an error is shown", %{conn: conn} do
    System.put_env("MODEL", "no-such-model")
    on_exit(fn -> System.delete_env("MODEL") end)
    {:ok, view, _html} = live(conn, "/")
    ask(view, "Hello?")
    assert page_until(view, &(&1 =~ "role=\"alert\"")) =~ "model_not_found"
  end

  test "the page does not wait for the service", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    service = service()
    signal("STOP", service)
    assert view |> ask("Tell me about cats.") |> running?()
    signal("CONT", service)
    assert answer(page_until(view, &(not running?(&1)))) =~ ~r/cat/i
  end

  test "a kill of the worker or of the service is told in both pages; the next is answered", %{conn: conn} do
    {:ok, one, _html} = live(conn, "/rooms/kill")
    {:ok, two, _html} = live(build_conn(), "/rooms/kill")

    for killed <- [&worker/0, &service/0] do
      held(one)
      told = render(two) |> count("Ask again.")
      signal("KILL", killed.())
      for view <- [one, two], do: page_until(view, &(count(&1, "Ask again.") > told and not running?(&1)))
    end

    answered(one)
  end

  @tag :capture_log
  test "pages outlive the port", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    endpoint = Process.whereis(ChatWeb.Endpoint)
    port = Process.whereis(Chat.Port)
    Process.exit(port, :kill)
    assert eventually(fn -> Process.whereis(Chat.Port) not in [nil, port] end)
    answered(view)
    assert Process.whereis(ChatWeb.Endpoint) == endpoint
  end

  test "a page that is left takes its session along", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    held(view)
    assert sessions() == 1
    Process.flag(:trap_exit, true)
    Process.exit(view.pid, :kill)
    assert eventually(fn -> sessions() == 0 end)
    signal("CONT", worker())
  end

  ## The page

  defp ask(view, question), do: view |> element("form") |> render_submit(%{question: question})

  # Asks and waits for the answer; then the model has a worker, too.
  defp answered(view) do
    errors = render(view) |> count("role=\"alert\"")
    ask(view, "Are you there?")
    page = page_until(view, &(not running?(&1)))
    assert count(page, "role=\"alert\"") == errors
  end

  # Asks, with the model's worker stopped, so that what runs does not end by itself.
  defp held(view) do
    answered(view)
    signal("STOP", worker())
    ask(view, "Tell me about cats.")
    page_until(view, &cancel?/1)
  end

  # The page's text, once the condition holds of it; each message of the demand draws it anew.
  defp page_until(view, condition, until \\ now() + @wait) do
    page = render(view)

    cond do
      condition.(page) -> page
      now() > until -> flunk("still not there: #{page}")
      true -> Process.sleep(10) && page_until(view, condition, until)
    end
  end

  defp now, do: System.monotonic_time(:millisecond)

  defp running?(page), do: page =~ "answer running"
  defp cancel?(page), do: page =~ ~r/Cancel\s*<\/button>/
  defp answer(page), do: page |> Floki.parse_document!() |> Floki.find(".answer") |> Floki.text()
  defp count(page, text), do: length(String.split(page, text)) - 1

  ## The service

  defp service, do: DemandPort.health!(Chat.Port)["os_pid"]

  defp worker do
    [%{"os_pid" => pid}] = DemandPort.health!(Chat.Port)["workers"]
    pid
  end

  defp signal(name, pid), do: {_, 0} = System.cmd("kill", ["-#{name}", "#{pid}"])

  defp sessions, do: DemandPort.health!(Chat.Port)["sessions"]["open"]

  defp eventually(condition, tries \\ 1000) do
    condition.() || (tries > 0 && Process.sleep(10) && eventually(condition, tries - 1))
  end
end
