#!/usr/bin/env bash
# Run a paper on the GPUs of a SLURM cluster: a process for each GPU, which find each other by SLURM's environment.
#
#   slurm/submit.sh [SLUG [OPTION...]] [--config FILE] [--dry-run]
#
# Logs, checkpoint and results are in RUNS/RUN_ID. Before TIME_LIMIT the run gets SIGTERM, saves, and is queued again.
# shellcheck source=../lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"
begin "$@"
need_run
need VENV RUNS
[[ $NODES =~ ^[1-9][0-9]*$ ]] || die 2 "NODES=$NODES is no number of nodes."
[[ $GPUS_PER_NODE =~ ^[1-9][0-9]*$ ]] || die 2 "GPUS_PER_NODE=$GPUS_PER_NODE is no number of GPUs."
[[ $TIME_LIMIT =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || die 2 "TIME_LIMIT=$TIME_LIMIT is no time such as 24:00:00 or 2-00:00:00."
[[ $RUNS == /* && $VENV == /* ]] || die 2 "RUNS=$RUNS and VENV=$VENV must be whole paths, from / on, which all nodes share."
need_number RESUME_EXIT_CODE MAX_RESTARTS
folder=$RUNS/$RUN_ID
run_words "$folder/out" "${CHECKPOINT:-$folder/checkpoint}" "${MESH:-sweep=$NODES,data=$GPUS_PER_NODE}"
options=("--job-name=paperjax-$RUN_ID" "--nodes=$NODES" "--gpus-per-node=$GPUS_PER_NODE" "--ntasks-per-node=$GPUS_PER_NODE" "--time=$TIME_LIMIT")
[[ -z $PARTITION ]] || options+=("--partition=$PARTITION")
[[ -z $ACCOUNT ]] || options+=("--account=$ACCOUNT")
run mkdir -p "$folder"
run sbatch "${options[@]}" "--output=$folder/slurm-%j.log" "$SCRIPTS/slurm/paperjax.sbatch" \
  "$folder" "$VENV" "$RESUME_EXIT_CODE" "$MAX_RESTARTS" "$SCRIPTS/worker_main.py" "${WORKER_OPTIONS[@]}" -- "${RUN_WORDS[@]}"
