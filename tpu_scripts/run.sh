#!/usr/bin/env bash
# Start a paper on all hosts, or stop it.
#
#   run.sh [SLUG [OPTION...]] [--config FILE] [--dry-run]     for `paperjax run SLUG OPTION...`; else SLUG and RUN_OPTIONS
#   run.sh --stop                                             SIGTERM to the run, which saves and ends
#
# Each host runs worker_main.py in a tmux session called paperjax-RUN_ID, which outlives this command and the connection, and
# writes paperjax/runs/RUN_ID/log. A run that goes on is left alone: starting it twice does no harm.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
need_tpu
need_run
if [[ ${ARGUMENTS[0]:-} == --stop ]]; then
  ARGUMENTS=("${ARGUMENTS[@]:1}")
  no_arguments
  on_host all stop "$RUN_ID"
  exit
fi
load_topology
run_words "runs/$RUN_ID/out" "${CHECKPOINT:-runs/$RUN_ID/checkpoint}" "${MESH:-$TOPOLOGY_MESH}"
on_host all start "$RUN_ID" "${BUCKET:--}" "${WORKER_OPTIONS[@]}" -- "${RUN_WORDS[@]}"
