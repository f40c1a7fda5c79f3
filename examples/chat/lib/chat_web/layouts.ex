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
        <style>
          body { font: 16px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 2rem auto; padding: 0 1rem }
          .question { font-weight: 600; margin-bottom: 0 }
          .answer { white-space: pre-wrap; margin-top: 0 }
          .error { color: #a00 }
          form { display: flex; gap: .5rem }
          input { flex: 1 }
        </style>
        <script src="/assets/phoenix.min.js">
        </script>
        <script src="/assets/phoenix_live_view.min.js">
        </script>
        <script>
          addEventListener("DOMContentLoaded", () => {
            const token = document.querySelector("meta[name=csrf-token]").content
            new LiveView.LiveSocket("/live", Phoenix.Socket, {params: {_csrf_token: token}}).connect()
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
