#!/usr/bin/env bash
# What happens on a host of a TPU; the other scripts call it there, as pushed by push_code.sh.
#
#   host.sh setup
#   host.sh start RUN_ID BUCKET|- OPTION... -- COMMAND...     options of worker_main.py, then the command line of paperjax
#   host.sh state|stop RUN_ID
#   host.sh logs RUN_ID LINES yes|no
#   host.sh profile RUN_ID PORT MILLISECONDS
#
# Everything is below ~/paperjax: source (the commit), venv, runs/RUN_ID (log, out, checkpoint, exit, pid). Needs no config.env.
# --dry-run as the first word prints the commands of setup and start, and runs none.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
PYTHON_VERSION=3.12
UV_VERSION=0.13.9
ATTEMPTS=${ATTEMPTS:-5}
BACKOFF_SECONDS=${BACKOFF_SECONDS:-5}
ROOT=$HOME/paperjax

die() {
  printf 'host.sh on %s: %s\n' "$(hostname)" "$2" >&2
  exit "$1"
}

# Package servers and metadata servers fail now and then.
retry() {
  local attempt pause=$BACKOFF_SECONDS
  for ((attempt = 1; ; attempt++)); do
    if run "$@"; then return 0; fi
    ((attempt < ATTEMPTS)) || die 1 "gave up after $ATTEMPTS attempts: $*"
    echo "attempt $attempt of $ATTEMPTS failed, again in $pause s: $*" >&2
    sleep "$pause"
    pause=$((2 * pause))
  done
}

# w-0 is the process that writes the reports; the last part of a TPU host's name, if the metadata server does not say.
worker() {
  local number
  number=$(curl --silent --fail --max-time 2 --header 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number 2>/dev/null) || number=
  if [[ ! $number =~ ^[0-9]+$ ]]; then
    number=$(hostname)
    [[ $number =~ -w-[0-9]+$ ]] || number=0
    number=${number##*-}
  fi
  printf 'w-%s\n' "$number"
}

setup() {
  cd "$ROOT"
  local wanted stamp=venv/paperjax-setup
  wanted="python $PYTHON_VERSION, requirements $(sha256sum <source/tpu_scripts/requirements.txt | cut -c 1-16), commit $(cat source/COMMIT)"
  if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    echo "$(worker): already set up: $wanted"
    return
  fi
  if tmux list-sessions -F '#{session_name}' 2>/dev/null | grep '^paperjax-'; then
    die 1 "the session above runs with what is installed. run.sh --stop first, or wait for its end."
  fi
  if ! command -v tmux >/dev/null; then
    retry sudo apt-get update --quiet
    retry sudo DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet tmux
  fi
  local uv=$HOME/.local/bin/uv
  if [[ ! -x $uv || $("$uv" --version) != "uv $UV_VERSION"* ]]; then
    retry python3 -m pip install --quiet --user "uv==$UV_VERSION"
  fi
  # TPU images have a Python that is too old for PaperJAX.
  if [[ ! -x venv/bin/python ]]; then retry "$uv" venv --quiet --python "$PYTHON_VERSION" venv; fi
  retry "$uv" pip install --quiet --python venv/bin/python --requirement source/tpu_scripts/requirements.txt
  retry "$uv" pip install --quiet --python venv/bin/python --no-deps --reinstall-package paperjax ./source
  # Devices are not asked for: on a pod that waits for all hosts.
  run venv/bin/python -c "import jax, paperjax; print('jax', jax.__version__, 'paperjax', paperjax.__version__)"
  if [[ $DRY_RUN == no ]]; then
    printf '%s\n' "$wanted" >"$stamp"
    echo "$(worker): set up: $wanted"
  fi
}

session() {
  printf 'paperjax-%s\n' "${1//[.:]/_}"
}

running() {
  tmux has-session -t "=$(session "$1")" 2>/dev/null
}

start() {
  local run_id=$1 bucket=$2 folder=$ROOT/runs/$1 latest
  shift 2
  if [[ $DRY_RUN == no ]] && running "$run_id"; then
    echo "$(worker): $run_id is running already."
    return
  fi
  [[ $DRY_RUN == yes || -x $ROOT/venv/bin/python ]] || die 2 "there is no Python; setup_host.sh first."
  run mkdir -p "$folder"
  if [[ $bucket != - && $(worker) == w-0 ]]; then
    # Whether the bucket can be written is seen now, not after the run.
    run touch "$folder/access"
    run gcloud storage cp "$folder/access" "$bucket/$run_id/access" --quiet ||
      die 2 "BUCKET=$bucket cannot be written from this host. Give its service account (SERVICE_ACCOUNT) the role roles/storage.objectAdmin on the bucket, or leave BUCKET empty."
    if [[ $DRY_RUN == yes ]]; then
      echo "gcloud storage rsync $bucket/$run_id/\$(gcloud storage cat $bucket/$run_id/LATEST) $folder --recursive --quiet"
    elif [[ ! -e $folder/log ]] && latest=$(gcloud storage cat "$bucket/$run_id/LATEST" 2>/dev/null); then
      gcloud storage rsync "$bucket/$run_id/$latest" "$folder" --recursive --quiet ||
        die 1 "$bucket/$run_id/$latest could not be read, and without it the run would begin anew."
    fi
  fi
  run rm -f "$folder/exit"
  run tmux new-session -d -s "$(session "$run_id")" bash "$ROOT/source/tpu_scripts/host.sh" inside "$run_id" "$bucket" "$@"
  [[ $DRY_RUN == yes ]] || echo "$(worker): started $run_id."
}

# Inside tmux. The status is left in the file exit, last of all.
inside() {
  local run_id=$1 bucket=$2 folder=$ROOT/runs/$1 child code latest signalled
  shift 2
  cd "$ROOT"
  exec >>"$folder/log" 2>&1
  # A preempted host sends SIGHUP and SIGTERM to every process here. The worker saves at the SIGTERM; this waits for it, and uploads.
  trap '' HUP
  trap 'signalled=yes' TERM INT
  venv/bin/python -u source/tpu_scripts/worker_main.py "$@" &
  child=$!
  echo "$child" >"$folder/pid"
  while true; do
    signalled=no
    code=0
    wait "$child" || code=$?
    # A signal to this shell ends `wait`, not the worker.
    [[ $signalled == yes ]] || break
  done
  if [[ $bucket != - && $(worker) == w-0 ]]; then
    # The worker has ended, so nothing changes meanwhile; LATEST is written when all is there, so nobody begins from half of it.
    latest=$(date -u +%Y%m%dT%H%M%SZ)
    if gcloud storage rsync "$folder" "$bucket/$run_id/$latest" --recursive --quiet; then
      printf '%s' "$latest" | gcloud storage cp - "$bucket/$run_id/LATEST" --quiet || echo "host.sh: $bucket/$run_id/LATEST could not be written."
    else
      echo "host.sh: $folder could not be copied to $bucket; it is on this host only."
    fi
  fi
  echo "$code" >"$folder/exit.part"
  mv "$folder/exit.part" "$folder/exit"
}

state() {
  local folder=$ROOT/runs/$1 what=never
  if [[ -f $folder/exit ]]; then
    what="exit $(cat "$folder/exit")"
  elif running "$1"; then
    what=running
  elif [[ -f $folder/log ]]; then
    what=lost
  fi
  echo "paperjax-run $(worker) $what"
}

stop() {
  local pid=$ROOT/runs/$1/pid
  if running "$1" && [[ -f $pid ]]; then
    kill -TERM "$(cat "$pid")"
    echo "$(worker): SIGTERM to $1; it saves and ends."
  else
    echo "$(worker): $1 is not running."
  fi
}

logs() {
  local log=$ROOT/runs/$1/log options=(-n "$2")
  [[ -f $log ]] || die 1 "there is no log of $1: it was never started here."
  [[ $3 == no ]] || options+=(--follow)
  tail "${options[@]}" "$log"
}

profile() {
  running "$1" || die 1 "$1 is not running here; status.sh --run says where it is."
  "$ROOT/venv/bin/python" -m jax.collect_profile "$2" "$3" --log_dir "$ROOT/runs/$1/profile" --no_perfetto_link ||
    die 1 "no trace from port $2. Was the run started with PROFILER_PORT=$2, and is it past its start?"
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=yes
  shift
fi
case ${1:-} in
  setup | start | inside | state | stop | logs | profile) "$@" ;;
  *) die 2 "unknown command '${1:-}'; its first lines say what there is." ;;
esac
