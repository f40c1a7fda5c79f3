#!/usr/bin/env bash
# Installs what `make` needs and is missing. Usage: setup.sh python VENV | setup.sh elixir
set -euo pipefail

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

# Install Debian packages, or say which are missing where that cannot be done here.
need_packages() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing $* (apt-get)"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
  else
    echo "Missing: $*. Install them (Debian: sudo apt-get install $*), then run this again." >&2
    exit 1
  fi
}

install_elixir() {
  command -v mix >/dev/null && command -v erl >/dev/null && return
  need_packages elixir erlang-dev
}

install_python() {
  local venv=$1 python=${PYTHON3:-python3}
  command -v "$python" >/dev/null || need_packages python3 python3-venv
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; name one: make PYTHON3=python3.12 …" >&2
    exit 1
  }
  "$python" -c 'import venv, ensurepip' 2>/dev/null || need_packages python3-venv
  command -v c++ >/dev/null || need_packages g++
  [ -x "$venv/bin/python" ] || { say "making the virtual environment $venv"; "$python" -m venv "$venv"; }
  say "installing Python packages (the first time, llama.cpp is compiled: about 5 minutes on 2 cores)"
  "$venv/bin/python" -m pip install --upgrade --quiet 'pip>=25.1'
  compile_with_progress "$venv"
  say "Python is ready: $("$venv/bin/python" --version), $("$venv/bin/python" -m pip freeze | wc -l) packages"
}

# pip is silent while it compiles: say every 20 seconds that it still does.
compile_with_progress() {
  "$1/bin/python" -m pip install --quiet --editable '.[llama]' --group dev &
  local pip=$! seconds=0
  while kill -0 "$pip" 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    [ $((seconds % 20)) != 0 ] || echo "    still installing ($seconds s)"
  done
  wait "$pip"
}

case "${1:-}" in
  elixir) install_elixir ;;
  python) install_python "$2" ;;
  *) echo "usage: setup.sh python VENV | setup.sh elixir" >&2; exit 64 ;;
esac
