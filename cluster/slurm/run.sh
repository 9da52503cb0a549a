#!/usr/bin/env bash
# Ray on all nodes of a Slurm job, and one program on it. pretrain.sbatch and ablate.sbatch end with this.
#
#   run.sh SIGNAL PROGRAM ARGUMENTS...   on the first node; SIGNAL is what the program gets when the job's time is up
#   run.sh join HOST:PORT                on each of the other nodes
#
# It runs in the checkout, which all nodes see. These may be set in the environment of sbatch:
#   VENV     the environment with the dependencies (default: .venv in the checkout)
#   INSIDE   what goes before each command to run it in a container, such as "apptainer exec --nv rotssl.sif"
set -euo pipefail
read -ra inside <<<"${INSIDE:-}"
[ -n "${INSIDE:-}" ] || PATH=${VENV:-$PWD/.venv}/bin:$PATH
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# A node that is told to end waits half a minute for services that are not there; Slurm may give the whole job no more.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
# Ray's processes write their bytecode once instead of compiling their imports each time.
unset PYTHONDONTWRITEBYTECODE RAY_ADDRESS
# The path of a socket has at most 107 characters, and the name of this folder must not be foreseen by others.
RAY_TMPDIR=$(mktemp -d /tmp/ray.XXXXXX)
export RAY_TMPDIR

# This node's address as HOST sees it, and three free ports. A name may lead to 127.0.1.1, the way to another node doesn't.
own_address() { # HOST
    "${inside[@]}" python -c '
import contextlib, socket, sys
with contextlib.ExitStack() as stack:
    way = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    way.connect((sys.argv[1], 1))
    free = [stack.enter_context(socket.socket()) for _ in range(3)]
    for each in free:
        each.bind(("", 0))
    print(way.getsockname()[0], *(each.getsockname()[1] for each in free))' "$1"
}

# Ray as long as it runs. No port is a fixed one: other jobs may share the node. No `ray stop`, which would end their Ray too.
ray_node() { # ADDRESS OPTIONS...
    local memory=()
    # Ray takes its share of the node's memory, not of the job's.
    [ -z "${SLURM_MEM_PER_NODE:-}" ] || memory=(--object-store-memory "$((SLURM_MEM_PER_NODE * 1024 * 1024 * 3 / 10))")
    exec "${inside[@]}" ray start --node-ip-address "$1" "${@:2}" --temp-dir "$RAY_TMPDIR" "${memory[@]}" \
        --num-cpus "${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
        --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0 --disable-usage-stats --block
}

alive() { kill -0 "$1" 2>/dev/null; }

# Sleep, but not through a signal.
second() {
    sleep 1 &
    wait $! || true
}

join() { # HOST:PORT
    local own node="" code told=""
    trap 'rm -rf "$RAY_TMPDIR"' EXIT
    read -r own _ < <(own_address "${1%:*}")
    # Ray gives a node 30 seconds to start, which a busy one may exceed; one that fails later starts again, too.
    trap 'told=1; kill -TERM "${node:-}" 2>/dev/null || true' TERM
    for _ in 1 2 3; do
        # Ray may be told to end, and end, before this shell is told.
        [ -z "$told" ] || exit 0
        ray_node "$own" --address "$1" &
        node=$!
        [ -z "$told" ] || kill -TERM "$node" 2>/dev/null || true
        while alive "$node"; do second; done
        [ -z "$told" ] || exit 0
        code=0
        wait "$node" || code=$?
        echo "Ray ended on $(hostname) with code $code"
    done
    exit 1
}

program="" ending="" head="" others=""

# Called by signals. The program saves its state and ends; without a program there is nothing to save.
tell() { # SIGNAL
    if [ -n "$program" ]; then
        kill -s "$1" "$program" 2>/dev/null || true
    else
        exit 143
    fi
}

finish() {
    local code=$?
    trap '' TERM USR1
    # The head last, which the other nodes say goodbye to. scancel signals the job's one step; srun itself would kill Ray there,
    # which leaves files behind.
    if [ -n "$others" ]; then
        scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true  # a job that is cancelled has none any more
        wait "$others" || true
    fi
    [ -z "$head" ] || kill -TERM "$head" 2>/dev/null || true
    wait
    rm -rf "$RAY_TMPDIR" "${private:-}"
    if [ "$ending" = requeue ] && [ "$code" != 0 ]; then
        echo "job $SLURM_JOB_ID: requeued; it goes on where it was"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}

# Wait until a log has COUNT nodes that are up; fails if the process that writes it ends before.
wait_for_nodes() { # COUNT PID LOG
    until [ "$(grep -c "Ray runtime started" "$3")" -ge "$1" ]; do
        alive "$2" || return 1
        second
    done
}

start_head() { # OTHER
    local own gcs client dashboard
    for _ in 1 2 3; do
        read -r own gcs client dashboard < <(own_address "$1")
        ray_node "$own" --head --port "$gcs" --ray-client-server-port "$client" --dashboard-port "$dashboard" \
            >"$RAY_TMPDIR/head.log" 2>&1 &
        head=$!
        if wait_for_nodes 1 "$head" "$RAY_TMPDIR/head.log"; then
            export RAY_ADDRESS=$own:$gcs
            echo "Ray's head is $RAY_ADDRESS, its dashboard http://127.0.0.1:$dashboard on $(hostname)"
            return
        fi
    done
    tail -n 20 "$RAY_TMPDIR/head.log"
    exit 1
}

start_others() { # COUNT
    # Not before the head is up: a node that comes too early hangs.
    srun --overlap --relative=1 --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
        bash "$PWD/cluster/slurm/run.sh" join "$RAY_ADDRESS" >"$RAY_TMPDIR/others.log" 2>&1 &
    others=$!
    wait_for_nodes "$1" "$others" "$RAY_TMPDIR/others.log" || { tail -n 20 "$RAY_TMPDIR/others.log" && exit 1; }
}

run() { # SIGNAL PROGRAM ARGUMENTS...
    local hosts signal=$1
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    trap finish EXIT
    trap 'ending=requeue; tell "$signal"' USR1
    trap 'ending=now; tell TERM' TERM
    # The token is in a file that only its owner can read, in the home folder, which all nodes see.
    private=$(mktemp -d "$HOME/.rotssl-$SLURM_JOB_ID.XXXXXX")
    export RAY_AUTH_TOKEN_PATH=$private/token
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    start_head "${hosts[-1]}"
    [ "${#hosts[@]}" = 1 ] || start_others "$((${#hosts[@]} - 1))"
    "${inside[@]}" python "${@:2}" &
    program=$!
    while alive "$program"; do
        second
        if [ -z "$ending" ] && ! { alive "$head" && alive "${others:-$head}"; }; then
            ending=now
            echo "a node of Ray has ended; the program ends, and the same command goes on:"
            tail -n 20 "$RAY_TMPDIR"/*.log
            tell TERM
        fi
    done
    wait "$program" || exit $?
}

if [ "$1" = join ]; then join "$2"; else run "$@"; fi
