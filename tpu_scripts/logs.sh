#!/usr/bin/env bash
# Show the end of the hosts' logs.
#
#   logs.sh [--worker N|all] [--lines N] [--follow] [--config FILE] [--dry-run]
#
# Worker 0, which alone prints results, unless --worker says otherwise. --follow goes on, and takes one worker.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
worker=0 lines=50 follow=no
set -- "${ARGUMENTS[@]}"
while (($#)); do
  case $1 in
    --worker | --lines)
      (($# > 1)) || die 2 "$1 needs a value."
      if [[ $1 == --worker ]]; then worker=$2; else lines=$2; fi
      shift
      ;;
    --follow) follow=yes ;;
    *) die 2 "unknown option $1; --help shows the options." ;;
  esac
  shift
done
need_tpu
need_run
[[ $lines =~ ^[0-9]+$ ]] || die 2 "--lines $lines is no number."
[[ $worker == all || $worker =~ ^[0-9]+$ ]] || die 2 "--worker $worker is neither a number nor all."
[[ $follow == no || $worker != all ]] || die 2 "--follow takes one --worker, such as --worker 0."
on_host "$worker" logs "$RUN_ID" "$lines" "$follow"
