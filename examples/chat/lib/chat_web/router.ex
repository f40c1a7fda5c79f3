defmodule ChatWeb.Router do
  use Phoenix.Router

  import Phoenix.LiveView.Router

  pipeline :browser do
    plug :accepts, ["html"]
    plug :fetch_session
    plug :fetch_live_flash
    plug :put_root_layout, html: {ChatWeb.Layouts, :root}
    plug :protect_from_forgery
    plug :put_secure_browser_headers
  end

  scope "/" do
    pipe_through :browser
    # Answers come to this page alone; or to everyone in the room.
    live "/", ChatWeb.ChatLive, :alone
    live "/rooms/:room", ChatWeb.ChatLive, :room
  end
end
