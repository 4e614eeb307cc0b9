#!/usr/bin/env bash
# Run a paper on a TPU slice in GKE, as a JobSet. For TPU7x there is no other way.
#
#   gke/submit.sh [SLUG [OPTION...]] [--config FILE] [--dry-run]
#
# Needs a node pool (gke/node_pool.sh), the image (gke/Dockerfile), the JobSet controller, and a cluster with the GcsFuseCsiDriver
# add-on, in which KUBERNETES_ACCOUNT may write to BUCKET. Then: kubectl get jobset RUN_ID; kubectl logs -l
# jobset.sigs.k8s.io/jobset-name=RUN_ID; kubectl delete jobset RUN_ID. Results are in BUCKET/RUN_ID/out.
# shellcheck source=../lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"
begin "$@"
need_run
need IMAGE BUCKET KUBERNETES_ACCOUNT
need_number MAX_RESTARTS
[[ $RUN_ID =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die 2 "RUN_ID=$RUN_ID: Kubernetes takes at most 40 of a-z, 0-9 and -, beginning with a letter."
load_topology
run_words "/runs/$RUN_ID/out" "${CHECKPOINT:-/runs/$RUN_ID/checkpoint}" "${MESH:-$TOPOLOGY_MESH}"

bucket=${BUCKET#gs://}
only=
[[ $bucket != */* ]] || only=,only-dir:${bucket#*/}
# As JSON strings, which YAML takes.
command=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:])[1:-1])' "${WORKER_OPTIONS[@]}" -- "${RUN_WORDS[@]}")
manifest=$(<"$SCRIPTS/gke/jobset.yaml")
fill() {
  manifest=${manifest//"@$1@"/"$2"}
}
fill RUN_ID "$RUN_ID"
fill MAX_RESTARTS "$MAX_RESTARTS"
fill HOSTS "$TOPOLOGY_HOSTS"
fill KUBERNETES_ACCOUNT "$KUBERNETES_ACCOUNT"
fill ACCELERATOR "$TOPOLOGY_GKE_ACCELERATOR"
fill SHAPE "$TOPOLOGY_SHAPE"
fill IMAGE "$IMAGE"
fill COMMAND "$command"
fill CHIPS_PER_HOST "$TOPOLOGY_CHIPS_PER_HOST"
fill BUCKET_NAME "${bucket%%/*}"
fill ONLY_DIR "$only"
if [[ $DRY_RUN == yes ]]; then
  printf "kubectl apply --filename=- <<'EOF'\n%s\nEOF\n" "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
