#!/bin/bash
# A server and eight sites, each a task of its own on a cluster with Slurm:
#   sbatch --ntasks=9 deploy/slurm.sh CONFIG SITES OUTPUT [KEY=VALUE ...]
# SITES is a folder with a site's file for each: SITES/NAME.yaml, whose paths are whole paths that
# the site's node sees. Kits are made for the job in OUTPUT/federation, on a disk that all nodes
# see; the private parts of the sites' clients stay there, in OUTPUT/federation/NAME/fedpref.
#SBATCH --job-name=fedpref
#SBATCH --cpus-per-task=4
#SBATCH --output=fedpref-%j.log
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: sbatch --ntasks=N slurm.sh CONFIG SITES OUTPUT [KEY=VALUE ...]"; exit 2; }
config=$1 sites=$2 output=$3
shift 3
server=$(hostname) port=${FEDPREF_PORT:-8002} federation=$output/federation
names=() named=()
for file in "$sites"/*.yaml; do
    name=$(basename "$file" .yaml)
    names+=("$name") named+=(--site "$name")
done
mkdir -p "$output"
fedpref federation init "$federation" --server "$server" --port "$port" "${named[@]}"
for name in "${names[@]}"; do cp "$sites/$name.yaml" "$federation/$name/site.yaml"; done

started=()
trap 'kill "${started[@]}" 2>/dev/null || true; wait' EXIT
alone="--ntasks=1 --nodes=1"
srun $alone --nodelist="$server" --overlap fedpref site start "$federation/$server" --runs "$output/server" --foreground &
started+=($!)
for name in "${names[@]}"; do
    srun $alone --exact fedpref site start "$federation/$name" --foreground &
    started+=($!)
done
for _ in $(seq 60); do # until all have come
    sleep 5
    status=$(fedpref federation status --admin "$federation/admin@fedpref.org" 2>&1) || continue
    missing=0
    for name in "${names[@]}"; do grep -q "$name" <<< "$status" || missing=1; done
    [ $missing = 0 ] && break
done
echo "$status"
fedpref submit "$config" --admin "$federation/admin@fedpref.org" --output "$output/run" "patience.min_sites=${#names[@]}" "$@"
