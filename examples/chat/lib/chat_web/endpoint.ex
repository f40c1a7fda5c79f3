defmodule ChatWeb.Endpoint do
  use Phoenix.Endpoint, otp_app: :chat

  @session [store: :cookie, key: "_chat", signing_salt: "rs3sR0pe", same_site: "Lax"]

  socket "/live", Phoenix.LiveView.Socket, websocket: [connect_info: [session: @session]]

  # The two scripts come built with their packages: nothing is bundled here.
  plug Plug.Static, at: "/assets", from: {:phoenix, "priv/static"}, only: ["phoenix.min.js"]

  plug Plug.Static,
    at: "/assets",
    from: {:phoenix_live_view, "priv/static"},
    only: ["phoenix_live_view.min.js"]

  plug Plug.Parsers, parsers: [:urlencoded], pass: ["*/*"]
  plug Plug.Session, @session
  plug ChatWeb.Router
end
