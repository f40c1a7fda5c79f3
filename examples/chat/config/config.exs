import Config

# A secret of this run alone: when the server was restarted, open pages load themselves anew.
config :chat, ChatWeb.Endpoint,
  adapter: Bandit.PhoenixAdapter,
  http: [ip: {127, 0, 0, 1}, port: String.to_integer(System.get_env("PORT", "4000"))],
  check_origin: ["//localhost", "//127.0.0.1"],
  render_errors: [formats: [html: ChatWeb.ErrorHTML], layout: false],
  pubsub_server: Chat.PubSub,
  secret_key_base: Base.encode64(:crypto.strong_rand_bytes(48)),
  live_view: [signing_salt: Base.encode64(:crypto.strong_rand_bytes(12))]

config :phoenix, :json_library, Jason

if config_env() == :test do
  config :logger, level: :warning
end
