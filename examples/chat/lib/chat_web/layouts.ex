defmodule ChatWeb.Layouts do
  @moduledoc false
  use Phoenix.Component

  def root(assigns) do
    ~H"""
    <!DOCTYPE html>
    <html lang="en">
      <head>
        <meta charset="utf-8" />
        <meta name="viewport" content="width=device-width, initial-scale=1" />
        <meta name="csrf-token" content={Plug.CSRFProtection.get_csrf_token()} />
        <title>Chat</title>
        <link rel="icon" href="data:," />
        <style>
          * { box-sizing: border-box }
          body { font: 16px/1.5 system-ui, sans-serif; margin: 0 }
          [data-phx-main] { display: flex; flex-direction: column; height: 100vh; height: 100dvh;
            max-width: 42rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
          h1, p { margin: 0 0 .5rem }
          /* Reversed, it is scrolled to its end at first, and stays there while an answer grows. */
          main { flex: 1; display: flex; flex-direction: column-reverse; overflow-y: auto }
          .turns { margin-bottom: auto }
          .question { font-weight: 600; margin: .5rem 0 0 }
          .answer { white-space: pre-wrap }
          .running::after { content: "▍" }
          .error { color: #a00 }
          .error::first-letter { text-transform: uppercase }
          form { display: flex; gap: .5rem; padding-top: .5rem }
          input { flex: 1; min-width: 0 }
          input, button { font: inherit; padding: .5rem .75rem; border: 1px solid #999; border-radius: .5rem }
          .offline { display: none }
          .phx-client-error .offline { display: block }
        </style>
        <script src="/assets/phoenix.min.js">
        </script>
        <script src="/assets/phoenix_live_view.min.js">
        </script>
        <script>
          addEventListener("DOMContentLoaded", () => {
            const token = document.querySelector("meta[name=csrf-token]").content
            new LiveView.LiveSocket("/live", Phoenix.Socket, {params: {_csrf_token: token}}).connect()
            // Who had scrolled up sees what they ask.
            addEventListener("submit", () => document.querySelector("main").scrollTo(0, 0))
          })
        </script>
      </head>
      <body><%= @inner_content %></body>
    </html>
    """
  end
end

defmodule ChatWeb.ErrorHTML do
  @moduledoc false
  def render(template, _assigns), do: Phoenix.Controller.status_message_from_template(template)
end
