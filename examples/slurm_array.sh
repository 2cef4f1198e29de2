#!/usr/bin/env bash
# A batch as a SLURM job array over a shared folder, with no open port: element 0 runs the coordinator and a replica,
# every other one a replica, on whatever node and whenever SLURM starts it.
#
#   sbatch --array=0-7 slurm_array.sh prompts.jsonl rows/ --model org/name --tp 2
#
# Elements that start before element 0 wait for it; it does not wait for them. It ends when all lines are answered, and
# they with it. If it ends before (time limit, scancel, a lost node) they end, too, within 30 s; submit the same command
# again, and the batch goes on.
#SBATCH --job-name=tpctl-array
#SBATCH --cpus-per-task=2
#SBATCH --time=04:00:00
# With GPUs: #SBATCH --gpus=2 (that is, --tp)
set -euo pipefail
prompts=$1 rows=$2
shift 2

if [ "$SLURM_ARRAY_TASK_ID" = 0 ]; then
    more=()
    [ ! -e "$rows/manifest.json" ] || more=(--resume)
    exec tpctl batch "$prompts" -o "$rows" --replicas 1 "${more[@]}" "$@"
fi
for _ in 1 2 3 4 5; do
    code=0
    tpctl replica "$rows" --wait 3600 || code=$?
    [ $code = 75 ] || exit $code # 75: the engine failed, and another start may help
    sleep 2
done
exit 75
