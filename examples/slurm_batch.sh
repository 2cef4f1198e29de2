#!/usr/bin/env bash
# A batch within one SLURM job: the coordinator runs here, on the job's first node, and srun starts a replica a task.
#
#   sbatch slurm_batch.sh prompts.jsonl rows/ --model org/name --tp 2
#
# The same command goes on where the last job ended. SLURM sends SIGUSR1 120 s before the time limit: the batch ends in
# order, rows that are finished are kept, and the job queues itself again. After scancel it does not.
#SBATCH --job-name=tpctl-batch
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=2
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
# With GPUs: #SBATCH --gpus=8 (as many as tasks times --tp)
set -euo pipefail
prompts=$1 rows=$2
shift 2

more=()
[ ! -e "$rows/manifest.json" ] || more=(--resume)
tpctl batch "$prompts" -o "$rows" --hosts slurm "${more[@]}" "$@" &
coordinator=$!
code=0 again=
trap 'again=1; kill -TERM $coordinator' USR1
trap 'kill -TERM $coordinator' TERM
while kill -0 $coordinator 2>/dev/null; do # a trap ends the wait, not the coordinator
    code=0
    wait $coordinator || code=$?
done
if [ $code = 143 ] && [ -n "$again" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
