# Sourced by quickstart.sh and test.sh: makes .venv at the top of the repository, once, and puts it on the PATH.
# `environment EXTRA` installs nucsam with that extra ("" = none); a second call with nothing changed takes no time.

environment() {
  local extra=${1:+[$1]} python stamp=".venv/installed-${1:-plain}"
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python: found $("$python" --version 2>&1), expected Python 3.11 or newer; set PYTHON to one" >&2
    exit 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  if [ ! "$stamp" -nt setup.cfg ]; then
    echo "installing nucsam$extra into .venv (PyTorch is a large download; this is done once)"
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet --editable ".$extra"
    touch "$stamp"
  fi
  PATH="$PWD/.venv/bin:$PATH"
}

# Runs a command so that SIGTERM, and Ctrl-C as one, reach all its processes: `accelerate launch` of a single process ends
# without telling it. Training saves then, and `--resume` goes on.
forwarding_sigterm() {
  local child status=0
  set -m
  "$@" &
  child=$!
  set +m
  trap 'kill -TERM -- "-$child"' TERM INT
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done
  trap - TERM INT
  return "$status"
}
