# For quickstart.sh and test.sh, which source this file. `environment EXTRA` makes .venv at the top
# of the repository, installs nucsam there with that extra ("" = none), and puts it on the PATH.
# It installs again only after setup.cfg has changed.

environment() {
  local extra=${1:+[$1]} python stamp=".venv/installed-${1:-plain}"
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python: found $("$python" --version 2>&1), expected Python 3.11 or newer; set PYTHON to one" >&2
    exit 2
  }
  [ -x .venv/bin/pip ] || "$python" -m venv .venv # pip comes last
  if [ ! "$stamp" -nt setup.cfg ]; then
    echo "installing nucsam$extra into .venv (once; PyTorch is a large download)"
    {
      .venv/bin/python -m pip install --quiet --upgrade pip &&
        .venv/bin/python -m pip install --quiet --editable ".$extra"
    } >.venv/install.log 2>&1 || {
      tail -n 20 .venv/install.log >&2
      exit 1
    }
    touch "$stamp"
  fi
  PATH="$PWD/.venv/bin:$PATH"
}

# Runs a command and forwards SIGTERM and Ctrl-C to all its processes as SIGTERM, because
# `accelerate launch` of one process does not. Training then saves, and `--resume` continues it.
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
