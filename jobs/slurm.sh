#!/usr/bin/env bash
#SBATCH --job-name=llp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llp-%j.log
# A search on the nodes of one Slurm job, which comes back until it is finished.
#
#   sbatch jobs/slurm.sh cifar10 cifar10-1 --set dataset.root=/shared/data
#   llp status cifar10-1 --root llp_studies          # from any machine that sees the folder
#   scancel --signal=TERM --batch JOBID              # stop, saved; plain scancel loses nothing either
#
# Experiment, name of the study, then options of `llp search`. Study folders go to LLP_ROOT (default:
# llp_studies in the folder you submit from; it must be on storage that all nodes see). LLP_VENV names
# the environment llp is installed in. Where nodes have several networks, LLP_INTERFACE picks one (ib0).
#
# Five minutes before its time is up the job saves and puts itself back into the queue; Slurm does so
# when a node fails or someone more important needs it. Every start goes on with the same study.
# --exclusive, because Ray's ports are the same in every job. The token is made for this job and is in a
# file that only you can read; the page that takes jobs listens on loopback.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch jobs/slurm.sh EXPERIMENT STUDY [options of llp search]" >&2
    exit 2
fi
experiment=$1 study=$2
shift 2
root=${LLP_ROOT:-$SLURM_SUBMIT_DIR/llp_studies}
max_starts=${LLP_MAX_STARTS:-20}
[ -z "${LLP_VENV:-}" ] || PATH=$LLP_VENV/bin:$PATH

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/llp-token-$SLURM_JOB_ID
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
(
    umask 077
    mkdir -p "$HOME/.ray"
    head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
)

steps=() child="" stopped="" again="" code=0
# shellcheck disable=SC2317,SC2329 # called by the traps
clean_up() {
    for _ in 1 2 3 4 5; do # a step that has only just been forked loses a signal
        kill "${steps[@]}" 2>/dev/null || break
        sleep 0.2
    done
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
# shellcheck disable=SC2317,SC2329
save() { # llp ends at once, with everything finished in its ledger
    stopped=yes
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
attend() { # runs a command, its exit code in `code`; a signal is dealt with at once, not after it
    "$@" <&0 &
    child=$!
    [ -z "$stopped" ] || save
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the command
        code=0
        wait "$child" || code=$?
    done
    child=""
}
trap clean_up EXIT
trap save TERM INT
trap 'again=yes; save' USR1

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_node=(srun --ntasks-per-node=1 "--cpus-per-task=$SLURM_CPUS_PER_TASK")
if [ -n "${LLP_INTERFACE:-}" ]; then
    where=(ip -4 -oneline address show "$LLP_INTERFACE")
else
    where=(getent ahostsv4 "${nodes[0]}")
fi
head_ip=$("${on_node[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${where[@]}" |
    grep -oE "[0-9]+([.][0-9]+){3}" | grep -v "^127[.]" | sed -n 1p) || true
if [ -z "$head_ip" ]; then
    echo "${nodes[0]} has no address that other nodes can reach; set LLP_INTERFACE" >&2
    exit 4
fi
address=$head_ip:6379
echo "start ${SLURM_RESTART_COUNT:-0} of $study: head ${nodes[0]} ($address), ${#nodes[@]} nodes"

"${on_node[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    ray start --head --node-ip-address="$head_ip" --port=6379 --dashboard-host=127.0.0.1 \
    --num-cpus="$SLURM_CPUS_PER_TASK" --block &
steps+=($!)
if [ ${#nodes[@]} -gt 1 ]; then
    "${on_node[@]}" --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) \
        --exclude="${nodes[0]}" \
        ray start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
    steps+=($!)
fi

# All nodes first: one that does not come up ends the job here, with a reason.
attend python - "$address" "${#nodes[@]}" <<'PYTHON'
import sys, time
import ray

address, wanted = sys.argv[1], int(sys.argv[2])
deadline = time.monotonic() + 600
while True:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        there = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError):
        there = 0
    if there >= wanted:
        break
    if time.monotonic() > deadline:
        sys.exit(f"{there} of {wanted} Ray nodes came up in 10 minutes")
    time.sleep(2)
PYTHON

if [ -n "$stopped" ]; then
    code=130
elif [ "$code" -eq 0 ]; then
    attend llp search "$experiment" --study "$study" --resume \
        --set "resources.address=$address" --set "output.root=$root" "$@"
    if [ -n "$stopped" ] && [ "$code" -gt 128 ]; then
        code=130 # also when the signal came before llp listened to it
    fi
fi

if [ -n "$again" ] && [ "$code" -eq 130 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_starts" ]; then
        echo "started $max_starts times; to go on: sbatch jobs/slurm.sh $experiment $study" >&2
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
