#!/usr/bin/env bash
# A Ray cluster of two nodes (two raylets of one CPU each, token authentication on) on this machine, to try out jobs.
#
#   cluster/local.sh start   starts it and prints what to export
#   cluster/local.sh env     prints that again:  eval "$(cluster/local.sh env)"
#   cluster/local.sh stop    stops these two nodes, and nothing else, and removes their token, logs and files
#
# CPUS (a node, default 1), GCS_PORT (6399) and DASHBOARD_PORT (8299) may be set; state lies in STATE (default: a folder in TMPDIR).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/ray" ] && PATH="$here/.venv/bin:$PATH"
STATE=${STATE:-${TMPDIR:-/tmp}/rotssl-cluster-$(id -u)}
GCS_PORT=${GCS_PORT:-6399}
DASHBOARD_PORT=${DASHBOARD_PORT:-8299}
CPUS=${CPUS:-1}
# A folder of its own for the second node: two that unpack a job's files into the same one delete each other's.
SECOND=${RAY_TMPDIR:-${TMPDIR:-/tmp}}/ray-second-$(id -u)-$GCS_PORT
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$STATE/token" RAY_USAGE_STATS_ENABLED=0
# Ray's processes write their bytecode once instead of compiling their imports each time.
unset PYTHONDONTWRITEBYTECODE RAY_ADDRESS

print_env() {
    echo "export RAY_AUTH_MODE=token"
    echo "export RAY_AUTH_TOKEN_PATH=$STATE/token"
    echo "export RAY_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT"
}

# A node in the background; its log and process id in STATE.
node() {
    local name=$1
    shift
    # Any free port for the agent, which starts jobs: another cluster's has the usual one.
    setsid ray start "$@" --num-cpus="$CPUS" --dashboard-agent-listen-port=0 --disable-usage-stats --block >"$STATE/$name.log" 2>&1 </dev/null &
    echo $! >"$STATE/$name.pid"
}

running() { [ -f "$STATE/$1.pid" ] && kill -0 "$(cat "$STATE/$1.pid")" 2>/dev/null; }

start() {
    if running head; then
        echo "already running; cluster/local.sh stop ends it" >&2
        exit 1
    fi
    mkdir -p "$STATE"
    [ -f "$STATE/token" ] || (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$STATE/token")
    node head --head --port="$GCS_PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT"
    wait_for head "the head node" started head
    wait_for head "the job server" ray job list --address "http://127.0.0.1:$DASHBOARD_PORT"
    node worker --address="127.0.0.1:$GCS_PORT" --temp-dir="$SECOND"
    wait_for worker "the second node" started worker
    echo "two nodes are up; for the commands that follow:" >&2
    print_env
}

started() { grep -q "Ray runtime started" "$STATE/$1.log"; }

wait_for() {
    local name=$1 what=$2
    shift 2
    for _ in $(seq 60); do
        if "$@" >/dev/null 2>&1; then return; fi
        if ! running "$name"; then break; fi
        sleep 1
    done
    echo "$what did not come up; its log:" >&2
    tail -20 "$STATE/$name.log" >&2
    stop
    exit 1
}

stop() {
    # The leaders of the process groups end their raylets (and GCS, dashboard) when asked to; what is left after that is killed.
    local nodes=()
    for name in worker head; do
        if running "$name"; then
            nodes+=("$name")
            kill -TERM "$(cat "$STATE/$name.pid")" 2>/dev/null || true
        fi
    done
    for name in "${nodes[@]}"; do
        for _ in $(seq 20); do
            running "$name" || break
            sleep 0.5
        done
        kill -KILL -- "-$(cat "$STATE/$name.pid")" 2>/dev/null || true
    done
    rm -rf "$SECOND"
    rm -f "$STATE"/{worker,head}.{pid,log} "$STATE/token"
    if [ -d "$STATE" ]; then rmdir --ignore-fail-on-non-empty "$STATE"; fi
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    env) print_env ;;
    *)
        sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//'
        exit 2
        ;;
esac
