[
  line_length: 110,
  plugins: [Phoenix.LiveView.HTMLFormatter],
  import_deps: [:phoenix],
  inputs: ["*.exs", "{config,lib,test}/**/*.{ex,exs}"]
]
