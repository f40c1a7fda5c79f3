[
  line_length: 110,
  inputs: [
    "mix.exs",
    ".formatter.exs",
    "elixir_client/lib/**/*.ex",
    "tests/elixir/**/*.{ex,exs}",
    "tests/interop/*.exs",
    "bench/*.exs",
    "examples/*.exs"
  ]
]
