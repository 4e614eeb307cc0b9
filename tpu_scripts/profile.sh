#!/usr/bin/env bash
# Trace a run that goes on, with jax.profiler, and copy the trace here.
#
#   profile.sh [--worker N] [--seconds S] [--to FOLDER] [--config FILE] [--dry-run]
#
# Worker 0 and 5 seconds unless said otherwise. The run must have been started with PROFILER_PORT set. Look at it with
# `pip install xprof && xprof --logdir FOLDER`, or open the perfetto_trace.json.gz in https://ui.perfetto.dev.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
worker=0
seconds=5
folder=
set -- "${ARGUMENTS[@]}"
while (($#)); do
  (($# > 1)) || die 2 "$1 needs a value, or is no option; --help shows the options."
  case $1 in
    --worker) worker=$2 ;;
    --seconds) seconds=$2 ;;
    --to) folder=$2 ;;
    *) die 2 "unknown option $1; --help shows the options." ;;
  esac
  shift 2
done
need_tpu
need_run
[[ $worker =~ ^[0-9]+$ ]] || die 2 "--worker $worker is no number; a trace is of one host."
[[ $seconds =~ ^[0-9]+$ && $seconds -gt 0 ]] || die 2 "--seconds $seconds is no whole number of seconds."
[[ $PROFILER_PORT =~ ^[0-9]+$ && $PROFILER_PORT -gt 0 ]] || die 2 "PROFILER_PORT=$PROFILER_PORT: there is no profiler to ask. Set it, such as 9012, before run.sh."
folder=${folder:-paperjax-runs/$RUN_ID}
on_host "$worker" profile "$RUN_ID" "$PROFILER_PORT" $((1000 * seconds))
run mkdir -p "$folder"
copy "$worker" "$TPU_NAME:paperjax/runs/$RUN_ID/profile" "$folder" --recurse
