# shellcheck shell=bash
# What every script here shares: configuration, --dry-run, gcloud. Sourced, not run.
set -euo pipefail
if [ -z "${BASH_VERSINFO:-}" ] || ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash 4.4 or later is needed; this is ${BASH_VERSION:-no bash}. On macOS: brew install bash" >&2
  exit 2
fi
SCRIPTS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
DRY_RUN=no
CONFIG=
ARGUMENTS=()

# Statuses of all scripts: 0 done; 1 it failed; 2 wrong configuration or option; 124 time-out.
die() {
  local status=$1
  shift
  printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
  exit "$status"
}

# The comment at the top of a script is its help.
usage() {
  sed -n '2,/^[^#]/{/^#/!q;/^# shellcheck/d;s/^# \{0,1\}//p}' "$0"
}

# Words as they would be typed: in quotes where a shell needs them; of --name=value only the value.
quoted() {
  local word name out='' plain='^[A-Za-z0-9_./:=,@%+-]+$' quote="'\\''"
  for word in "$@"; do
    name=
    if [[ ! $word =~ $plain ]]; then
      if [[ $word =~ ^--[a-z-]+= ]]; then
        name=${word%%=*}=
        word=${word#*=}
      fi
      word="'${word//\'/"$quote"}'"
    fi
    out+=" $name$word"
  done
  printf '%s\n' "${out# }"
}

# Run a command, or print it.
run() {
  if [[ $DRY_RUN == yes ]]; then quoted "$@"; else "$@"; fi
}

# --config, --dry-run and --help of every script; the rest goes to ARGUMENTS.
begin() {
  while (($#)); do
    case $1 in
      --config)
        (($# > 1)) || die 2 "--config needs a file."
        CONFIG=$2
        shift
        ;;
      --dry-run) DRY_RUN=yes ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) ARGUMENTS+=("$1") ;;
    esac
    shift
  done
  load_config
}

no_arguments() {
  ((${#ARGUMENTS[@]} == 0)) || die 2 "unknown option ${ARGUMENTS[0]}; --help shows the options."
}

# config.env.example names all variables and has their defaults; the file goes before it, the environment before both.
load_config() {
  local given=${CONFIG:-$SCRIPTS/config.env}
  [[ -z $CONFIG || -f $CONFIG ]] || die 2 "--config $CONFIG: there is no such file. Copy $SCRIPTS/config.env.example there and fill it in."
  local -A known=()
  read_variables "$SCRIPTS/config.env.example"
  [[ ! -f $given ]] || read_variables "$given"
}

# The first file says which variables are known, and whether the environment has them: then no file sets them.
read_variables() {
  local file=$1 first=${#known[@]} line name number=0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $line == *[![:space:]]* && $line != \#* ]] || continue
    name=${line%%=*}
    [[ $line == *=* && $name =~ ^[A-Z_]+$ ]] || die 2 "$file:$number: '$line' is not NAME=value."
    if ((first == 0)); then
      known[$name]='a file'
      [[ ! -v $name ]] || known[$name]='the environment'
    fi
    [[ -v known[$name] ]] || die 2 "$file:$number: there is no variable $name; config.env.example has them all."
    [[ ${known[$name]} == "the environment" ]] || printf -v "$name" '%s' "${line#*=}"
  done <"$file"
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || die 2 "$name is not set. Set it in ${CONFIG:-$SCRIPTS/config.env} (config.env.example says what it is), or in the environment."
  done
}

need_number() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^[0-9]+(\.[0-9]+)?$ ]] || die 2 "$name=${!name} is not a number; config.env.example has the default."
  done
}

# The names go into paths and remote commands.
need_tpu() {
  need PROJECT ZONE TPU_NAME
  [[ $TPU_NAME =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] || die 2 "TPU_NAME=$TPU_NAME: Google takes a-z, 0-9 and -, beginning with a letter."
  [[ $INTERNAL_IPS == yes || $INTERNAL_IPS == no ]] || die 2 "INTERNAL_IPS=$INTERNAL_IPS is neither yes nor no."
}

need_run() {
  need RUN_ID
  [[ $RUN_ID =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || die 2 "RUN_ID=$RUN_ID: letters, digits, _, . and - only."
}

# TOPOLOGY_CHIPS, TOPOLOGY_HOSTS, ... of ACCELERATOR_TYPE.
load_topology() {
  need ACCELERATOR_TYPE
  local lines line
  lines=$(python3 "$SCRIPTS/topology.py" --shell -- "$ACCELERATOR_TYPE") || die 2 "ACCELERATOR_TYPE=$ACCELERATOR_TYPE cannot be had."
  while IFS= read -r line; do printf -v "${line%%=*}" '%s' "${line#*=}"; done <<<"$lines"
}

need_cloud_tpu_api() {
  load_topology
  [[ $TOPOLOGY_GKE_ONLY == no ]] || die 2 "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: $TOPOLOGY_GENERATION can only be had through GKE. Use gke/submit.sh."
}

queued_resources() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE" "$@" --quiet
}

# on_workers WORKERS WORD...: run a command on hosts.
on_workers() {
  local workers=$1 internal=()
  shift
  [[ $INTERNAL_IPS == no ]] || internal=(--internal-ip)
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE" "--worker=$workers" "${internal[@]}" \
    "--command=$(quoted "$@")" --quiet
}

# on_host WORKERS SUBCOMMAND WORD...: host.sh, as pushed, on hosts.
on_host() {
  local workers=$1
  shift
  on_workers "$workers" bash paperjax/source/tpu_scripts/host.sh "$@"
}

# copy WORKERS FROM TO [OPTION...]
copy() {
  local workers=$1 internal=()
  shift
  [[ $INTERNAL_IPS == no ]] || internal=(--internal-ip)
  run gcloud compute tpus tpu-vm scp "$@" "--project=$PROJECT" "--zone=$ZONE" "--worker=$workers" "${internal[@]}" --quiet
}

# Prints STATE and, after a tab, Google's message if it failed. A queued resource that does not exist is MISSING.
tpu_state() {
  local out errors
  local format='--format=value(state.state,state.failedData.error.message)'
  if [[ $DRY_RUN == yes ]]; then
    queued_resources describe "$format"
    return
  fi
  errors=$(mktemp)
  if out=$(queued_resources describe "$format" 2>"$errors"); then
    printf '%s\n' "${out:-STATE_UNSPECIFIED}"
  elif grep -q -i -E 'NOT_FOUND|was not found' "$errors"; then
    echo MISSING
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

# run_words OUT CHECKPOINT MESH: WORKER_OPTIONS for worker_main.py and RUN_WORDS for paperjax, from ARGUMENTS or else SLUG and RUN_OPTIONS.
# shellcheck disable=SC2034 # They are for who calls.
run_words() {
  local options=()
  if ((${#ARGUMENTS[@]})); then
    [[ ${ARGUMENTS[0]} != -* ]] || die 2 "${ARGUMENTS[0]} comes before the paper: $(basename -- "$0") SLUG OPTION..."
    SLUG=${ARGUMENTS[0]}
    options=("${ARGUMENTS[@]:1}")
  else
    need SLUG
    read -r -a options <<<"$RUN_OPTIONS"
  fi
  [[ $SLUG =~ ^[a-z0-9][a-z0-9-]*$ ]] || die 2 "SLUG=$SLUG is no paper; paperjax list shows them."
  [[ $SIZE == quick || $SIZE == full ]] || die 2 "SIZE=$SIZE is neither quick nor full."
  [[ -z $BUCKET || $BUCKET =~ ^gs://[a-z0-9][a-z0-9._-]+(/[^/]+)*$ ]] || die 2 "BUCKET=$BUCKET is not of the form gs://bucket/folder."
  need_number PROFILER_PORT COORDINATOR_TIMEOUT
  WORKER_OPTIONS=(--timeout "$COORDINATOR_TIMEOUT" --profiler-port "$PROFILER_PORT")
  RUN_WORDS=(run "$SLUG" --size "$SIZE" --out "$1" --checkpoint "$2")
  [[ -z $3 || $3 == none ]] || RUN_WORDS+=(--mesh "$3")
  RUN_WORDS+=("${options[@]}")
}
