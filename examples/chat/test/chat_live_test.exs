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

  defp ask(view, question), do: view |> element("form") |> render_submit(%{question: question})
  defp running?(page), do: page =~ "Cancel</button>" or page =~ ~r/Cancel\s*<\/button>/
  defp answer(page), do: page |> Floki.parse_document!() |> Floki.find(".answer") |> Floki.text()

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

  test "Cancel ends it, and the session with it", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    ask(view, "Tell a long story about a lighthouse.")
    view |> element("button", "Cancel") |> render_click()
    page = page_until(view, &(not running?(&1)))
    # A model as small as this may have been quicker.
    assert page =~ "Cancelled." or answer(page) != ""
    assert eventually(fn -> sessions() == 0 end)
  end

  test "two who have a room open see the same answer; only who asked may cancel", %{conn: conn} do
    {:ok, one, _html} = live(conn, "/rooms/cats")
    {:ok, two, _html} = live(build_conn(), "/rooms/cats")
    {:ok, elsewhere, _html} = live(build_conn(), "/rooms/dogs")
    ask(one, "Tell me about cats.")
    refute running?(page_until(two, &(&1 =~ "Tell me about cats.</p>")))
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

  test "a page that is left takes its session along", %{conn: conn} do
    {:ok, view, _html} = live(conn, "/")
    ask(view, "Tell a long story about a lighthouse.")
    Process.flag(:trap_exit, true)
    Process.exit(view.pid, :kill)
    assert eventually(fn -> sessions() == 0 end)
  end

  defp sessions, do: DemandPort.health!(Chat.Port)["sessions"]["open"]

  defp eventually(condition, tries \\ 1000) do
    condition.() || (tries > 0 && Process.sleep(10) && eventually(condition, tries - 1))
  end
end
